//! What `serve` and `follow` answer over HTTP: metrics, health, status, and the table itself.
//!
//! | | |
//! |---|---|
//! | `GET /metrics` | Prometheus text |
//! | `GET /healthz` | 200 while the actor answers |
//! | `GET /readyz` | 200 while the table can be relied on, else 503 and why |
//! | `GET /status` | [`ServerStatus`](crate::ServerStatus) or [`ClientStatus`](crate::ClientStatus) |
//! | `GET /followers` | [`FollowerStatus`](crate::FollowerStatus), each; a server's only |
//! | `GET /keys/KEY` | the value as it is, or 404 |
//! | `PUT`, `DELETE /keys/KEY` | the position behind the change; a server's only |
//!
//! A key is percent-encoded and may be any bytes, none included. There is no authentication: writes
//! are taken from this machine only, unless that is switched off.

use std::any::Any;
use std::net::{IpAddr, Shutdown, SocketAddr, TcpListener};
use std::time::Duration;

use actix_web::dev::{Extensions, ServerHandle, Service as _};
use actix_web::http::header::{self, HeaderMap};
use actix_web::http::{ConnectionType, StatusCode};
use actix_web::middleware::DefaultHeaders;
use actix_web::web::{self, Data, Payload};
use actix_web::{App, HttpRequest, HttpResponse, HttpServer, ResponseError, Route, guard};
use anyhow::{Context as _, anyhow};
use metrics_exporter_prometheus::{Matcher, PrometheusBuilder, PrometheusHandle};
use percent_encoding::percent_decode_str;
use serde::Serialize;
use socket2::SockRef;
use tablecast_actors::protocol::{LimitError, WriteError};
use tokio::net::TcpStream;
use tokio::task::JoinHandle;
use tokio::time::Instant;

use super::credentials::is_local;
use super::{Failure, STOP_TIMEOUT};
use crate::{Client, Error, Health, Key, Limits, Reader, Server, Value, Written, metrics};

/// How long the actor may take to answer before it counts as dead.
const PATIENCE: Duration = Duration::from_secs(2);

/// How long the body of a PUT may take.
const BODY_TIMEOUT: Duration = Duration::from_secs(30);

/// Requests that run when it stops have so long to end, in seconds.
const END_SECONDS: u64 = 1;

/// Threads, and connections for each. One more waits.
const WORKERS: usize = 2;
const CONNECTIONS: usize = 64;

/// How long one connection may last, whatever is asked on it. Whoever asks once more at the end of this is told that it
/// was the last time.
const CONNECTION_TIME: Duration = Duration::from_secs(60);
const LAST_TIME: Duration = Duration::from_secs(40);

/// How often the recorder puts together what nobody has asked for.
const UPKEEP: Duration = Duration::from_secs(5);

/// Bounds of the histogram of diffs, in seconds.
const DIFF_SECONDS: [f64; 10] = [0.001, 0.005, 0.025, 0.1, 0.5, 1.0, 5.0, 30.0, 120.0, 600.0];

/// Whose table it is.
#[derive(Clone, Debug)]
pub(super) enum Table {
    /// The canonical one. Written from this machine, or from anywhere.
    Server { server: Server, writes_from_anywhere: bool },
    /// A follower's, which is written at its server.
    Follower(Client),
}

impl Table {
    fn reader(&self) -> &dyn Reader {
        match self {
            Self::Server { server, .. } => &**server.reader(),
            Self::Follower(client) => &**client.reader(),
        }
    }
}

/// Whether a Host names this machine whoever resolves it: by an address, or as localhost. A page whose own name leads here may read what
/// it asks for under that name (DNS rebinding).
fn is_here(host: &str) -> bool {
    let port = |(_, port): &(&str, &str)| port.bytes().all(|byte| byte.is_ascii_digit());
    let name = host.rsplit_once(':').filter(port).map_or(host, |(name, _)| name);
    let address = name.strip_prefix('[').and_then(|name| name.strip_suffix(']'));
    let address = address.unwrap_or(name).parse::<IpAddr>();
    address.is_ok() || name.eq_ignore_ascii_case("localhost")
}

fn check_host(headers: &HeaderMap) -> Result<(), Refusal> {
    let host = headers.get(header::HOST).and_then(|host| host.to_str().ok());
    let Some(host) = host.filter(|host| !is_here(host)) else { return Ok(()) };
    let text = format!(
        "{host} is a name that a page may have given to this machine: \
         ask for localhost or an address, or let others ask (--insecure)"
    );
    Err(Refusal::new(StatusCode::MISDIRECTED_REQUEST, text))
}

/// Installs the recorder of metrics; once a process.
fn record() -> anyhow::Result<PrometheusHandle> {
    let seconds = Matcher::Full("tablecast_client_diff_seconds".to_owned());
    let recorder = PrometheusBuilder::new()
        .set_buckets_for_metric(seconds, &DIFF_SECONDS)
        .and_then(PrometheusBuilder::install_recorder)
        .context("cannot install the recorder of metrics")?;
    metrics::describe();
    Ok(recorder)
}

/// A listener that runs.
#[derive(Debug)]
pub(super) struct Http {
    pub(super) address: SocketAddr,
    handle: ServerHandle,
    upkeep: JoinHandle<()>,
}

impl Http {
    /// Listens, where others than this machine reach it if that is meant; what comes is answered at once.
    pub(super) fn start(address: &str, insecure: bool, table: Table) -> Result<Self, Failure> {
        let context = || format!("cannot answer HTTP at {address}");
        let listener = TcpListener::bind(address).with_context(context)?;
        let at = listener.local_addr().with_context(context)?;
        if !insecure && !is_local(&at) {
            return Err(Failure::Input(anyhow!(
                "whoever reaches {address} could read the table over HTTP, which asks nobody who they are: \
                 say that it is meant (--insecure)"
            )));
        }
        let recorder = record()?;
        let (table, metrics) = (Data::new(table), Data::new(recorder.clone()));
        let by_any_name = insecure || !is_local(&at);
        let app = move || {
            let app = App::new().app_data(table.clone()).app_data(metrics.clone());
            let app = app.wrap_fn(move |request, next| {
                let ending = request.conn_data::<Ending>();
                let last = ending.is_some_and(|ending| ending.since.elapsed() >= LAST_TIME);
                let named = if by_any_name { Ok(()) } else { check_host(request.headers()) };
                let answer = named.map(|()| next.call(request));
                async move {
                    let mut response = answer?.await?;
                    if last {
                        let head = response.response_mut().head_mut();
                        head.set_connection_type(ConnectionType::Close);
                    }
                    Ok(response)
                }
            });
            // A page from anywhere may not have a value run as its script.
            let headers = DefaultHeaders::new()
                .add((header::X_CONTENT_TYPE_OPTIONS, "nosniff"))
                .add((header::CROSS_ORIGIN_RESOURCE_POLICY, "same-origin"));
            app.wrap(headers).configure(routes).default_service(web::to(unknown))
        };
        let server = HttpServer::new(app)
            .workers(WORKERS)
            .max_connections(CONNECTIONS)
            .on_connect(end_in_time)
            .disable_signals()
            .shutdown_timeout(END_SECONDS)
            .listen(listener)
            .with_context(context)?
            .run();
        let handle = server.handle();
        actix_rt::spawn(server);
        let upkeep = actix_rt::spawn(async move {
            loop {
                tokio::time::sleep(UPKEEP).await;
                recorder.run_upkeep();
            }
        });
        Ok(Self { address: at, handle, upkeep })
    }

    /// Answers nobody any more; who is being answered has a moment.
    pub(super) async fn stop(self) {
        self.upkeep.abort();
        // Whoever hangs on is cut off when the process ends.
        tokio::time::timeout(STOP_TIMEOUT, self.handle.stop(true)).await.ok();
    }
}

/// A connection that is to be closed when its time is over, and is closed before most of the time.
struct Ending {
    since: Instant,
    task: JoinHandle<()>,
}

impl Drop for Ending {
    fn drop(&mut self) {
        self.task.abort();
    }
}

/// Ends a connection that is there for too long: whoever sends the rest of a request never, or reads no answer, would
/// keep one of few places for ever.
fn end_in_time(connection: &dyn Any, data: &mut Extensions) {
    let Some(stream) = connection.downcast_ref::<TcpStream>() else { return };
    let Ok(stream) = SockRef::from(stream).try_clone() else {
        // There is no file for what would end it.
        SockRef::from(stream).shutdown(Shutdown::Both).ok();
        return;
    };
    let task = actix_rt::spawn(async move {
        tokio::time::sleep(CONNECTION_TIME).await;
        // It may have ended by itself just now.
        stream.shutdown(Shutdown::Both).ok();
    });
    data.insert(Ending { since: Instant::now(), task });
}

fn routes(config: &mut web::ServiceConfig) {
    config
        .route("/metrics", read().to(exposition))
        .route("/healthz", read().to(healthz))
        .route("/readyz", read().to(readyz))
        .route("/status", read().to(status))
        .route("/followers", read().to(followers))
        .route("/keys/{key:.*}", read().to(get))
        .route("/keys/{key:.*}", web::put().to(put))
        .route("/keys/{key:.*}", web::delete().to(delete))
        .route("/keys/{key:.*}", web::route().to(no_such_method));
}

/// `GET`, and `HEAD`, with which many look whether something is well.
fn read() -> Route {
    web::route().guard(guard::Any(guard::Get()).or(guard::Head()))
}

/// An answer other than what was asked for.
#[derive(Debug, PartialEq, Eq, thiserror::Error)]
#[error("{text}")]
struct Refusal {
    status: StatusCode,
    text: String,
}

impl Refusal {
    fn new(status: StatusCode, text: impl Into<String>) -> Self {
        Self { status, text: text.into() }
    }

    fn unavailable(text: impl Into<String>) -> Self {
        Self::new(StatusCode::SERVICE_UNAVAILABLE, text)
    }

    fn too_large(text: impl Into<String>) -> Self {
        Self::new(StatusCode::PAYLOAD_TOO_LARGE, text)
    }
}

impl ResponseError for Refusal {
    fn status_code(&self) -> StatusCode {
        self.status
    }
}

/// Of a call on a handle: a write that is too large, a store that fails, or an actor that is gone.
impl From<Error> for Refusal {
    fn from(error: Error) -> Self {
        let status = match &error {
            Error::Write(WriteError::Limit(_)) => StatusCode::PAYLOAD_TOO_LARGE,
            Error::Stopped => StatusCode::SERVICE_UNAVAILABLE,
            Error::Write(_)
            | Error::Store(_)
            | Error::Diff(_)
            | Error::Io(_)
            | Error::Wait(_)
            | Error::Random(_) => StatusCode::INTERNAL_SERVER_ERROR,
        };
        Self::new(status, error.to_string())
    }
}

/// What the actor answers, if it does so in time.
async fn asked<T>(answer: impl Future<Output = Result<T, Error>>) -> Result<T, Refusal> {
    match tokio::time::timeout(PATIENCE, answer).await {
        Ok(answered) => Ok(answered?),
        Err(_) => Err(Refusal::unavailable(format!("no answer within {PATIENCE:?}"))),
    }
}

fn json(what: &impl Serialize) -> HttpResponse {
    HttpResponse::Ok().json(what)
}

async fn unknown(request: HttpRequest) -> Result<&'static str, Refusal> {
    let text = format!("no {} {}", request.method(), request.uri().path());
    Err(Refusal::new(StatusCode::NOT_FOUND, text))
}

async fn no_such_method() -> HttpResponse {
    let allowed = (header::ALLOW, "GET, HEAD, PUT, DELETE");
    HttpResponse::MethodNotAllowed().insert_header(allowed).body("GET, HEAD, PUT or DELETE")
}

async fn exposition(recorder: Data<PrometheusHandle>) -> HttpResponse {
    let format = (header::CONTENT_TYPE, "text/plain; version=0.0.4; charset=utf-8");
    HttpResponse::Ok().insert_header(format).body(recorder.render())
}

async fn healthz(table: Data<Table>) -> Result<&'static str, Refusal> {
    match &**table {
        Table::Server { server, .. } => asked(server.status()).await.map(drop)?,
        Table::Follower(client) => asked(client.status()).await.map(drop)?,
    }
    Ok("alive")
}

async fn readyz(table: Data<Table>) -> Result<&'static str, Refusal> {
    match &**table {
        Table::Server { server, .. } => {
            let ready = asked(server.status()).await?.position.is_some();
            if ready { Ok("ready") } else { Err(Refusal::unavailable("being filled")) }
        }
        Table::Follower(client) => {
            let status = asked(client.status()).await?;
            let why = unready(&status.health, &status.server);
            why.map_or(Ok("ready"), |why| Err(Refusal::unavailable(why)))
        }
    }
}

/// Why a follower's table cannot be relied on, if it cannot.
fn unready(health: &Health, server: &str) -> Option<String> {
    Some(match health {
        Health::Ready => return None,
        Health::Disconnected => format!("not connected to {server}"),
        Health::Syncing => "syncing: something may be missing".to_owned(),
        Health::Diverged { reason } => format!("diverged: {reason}"),
        Health::Held { writes, deletes, keys } => {
            format!("held: a repair would write {writes} keys and delete {deletes} of {keys}")
        }
    })
}

async fn status(table: Data<Table>) -> Result<HttpResponse, Refusal> {
    Ok(match &**table {
        Table::Server { server, .. } => json(&asked(server.status()).await?),
        Table::Follower(client) => json(&asked(client.status()).await?),
    })
}

async fn followers(table: Data<Table>) -> Result<HttpResponse, Refusal> {
    match &**table {
        Table::Server { server, .. } => Ok(json(&asked(server.followers()).await?)),
        Table::Follower(_) => {
            Err(Refusal::new(StatusCode::NOT_FOUND, "a follower has no followers"))
        }
    }
}

async fn get(request: HttpRequest, table: Data<Table>) -> Result<HttpResponse, Refusal> {
    let key = key_of(&request)?;
    let value = table.reader().get(&key).map_err(Error::Store)?;
    let value = value.ok_or_else(|| Refusal::new(StatusCode::NOT_FOUND, "no such key"))?;
    Ok(HttpResponse::Ok().content_type("application/octet-stream").body(value))
}

async fn put(
    request: HttpRequest,
    table: Data<Table>,
    body: Payload,
) -> Result<HttpResponse, Refusal> {
    let server = written_by(&request, &table)?;
    let key = key_of(&request)?;
    let value = value_of(&request, body, Limits::default().value_bytes).await?;
    Ok(position(server.write(key, value).await?))
}

async fn delete(request: HttpRequest, table: Data<Table>) -> Result<HttpResponse, Refusal> {
    let server = written_by(&request, &table)?;
    Ok(position(server.delete(key_of(&request)?).await?))
}

/// `null` before the server is ready.
fn position(written: Written) -> HttpResponse {
    json(&written.position())
}

/// What would make a write depend on what is there. Written all the same, it would be lost unseen.
const CONDITIONS: [header::HeaderName; 5] = [
    header::IF_MATCH,
    header::IF_NONE_MATCH,
    header::IF_MODIFIED_SINCE,
    header::IF_UNMODIFIED_SINCE,
    header::CONTENT_RANGE,
];

/// The server, if whoever asks may write.
fn written_by<'a>(request: &HttpRequest, table: &'a Table) -> Result<&'a Server, Refusal> {
    if let Some(name) = CONDITIONS.iter().find(|name| request.headers().contains_key(*name)) {
        let text = format!("a write has no conditions, and is whole: {name}");
        return Err(Refusal::new(StatusCode::NOT_IMPLEMENTED, text));
    }
    match table {
        Table::Follower(_) => {
            let text = "a follower's table is written at its server";
            Err(Refusal::new(StatusCode::METHOD_NOT_ALLOWED, text))
        }
        Table::Server { server, writes_from_anywhere } => {
            let in_a_browser = request.headers().contains_key(header::ORIGIN);
            if may_write(request.peer_addr(), in_a_browser, *writes_from_anywhere) {
                return Ok(server);
            }
            let text = "only this machine may write, and no page in a browser; \
                        --http-writes-from-anywhere lets others";
            Err(Refusal::new(StatusCode::FORBIDDEN, text))
        }
    }
}

/// A page in a browser on this machine may come from anywhere, whatever name it calls this address by.
fn may_write(peer: Option<SocketAddr>, in_a_browser: bool, from_anywhere: bool) -> bool {
    let here = peer.is_some_and(|peer| is_local(&peer));
    from_anywhere || (here && !in_a_browser)
}

fn key_of(request: &HttpRequest) -> Result<Key, Refusal> {
    let wrong = |text| Refusal::new(StatusCode::BAD_REQUEST, text);
    if request.uri().query().is_some() {
        return Err(wrong("a ? in a key is %3F"));
    }
    // As it came: the framework's own decoding takes what is not UTF-8 for something else.
    let path = request.uri().path().strip_prefix("/keys/");
    decoded(path.ok_or_else(|| wrong("not /keys/KEY"))?)
}

fn decoded(key: &str) -> Result<Key, Refusal> {
    let is_byte = |digits: &str| {
        digits
            .as_bytes()
            .first_chunk::<2>()
            .is_some_and(|two| two.iter().all(u8::is_ascii_hexdigit))
    };
    if !key.split('%').skip(1).all(is_byte) {
        let text = "a % that is not followed by two hexadecimal digits; a % in a key is %25";
        return Err(Refusal::new(StatusCode::BAD_REQUEST, text));
    }
    Ok(percent_decode_str(key).collect())
}

/// The body, if it is within the limit. What is declared too long is not read at all.
async fn value_of(request: &HttpRequest, body: Payload, limit: usize) -> Result<Value, Refusal> {
    let declared = request.headers().get(header::CONTENT_LENGTH);
    let declared = declared.and_then(|length| length.to_str().ok()?.parse().ok());
    if let Some(bytes) = declared.filter(|bytes| *bytes > limit) {
        return Err(Refusal::too_large(LimitError::Value { bytes, limit }.to_string()));
    }
    let bad = |text: String| Refusal::new(StatusCode::BAD_REQUEST, text);
    match tokio::time::timeout(BODY_TIMEOUT, body.to_bytes_limited(limit)).await {
        Ok(Ok(value)) => value.map_err(|error| bad(error.to_string())),
        Ok(Err(_)) => {
            Err(Refusal::too_large(format!("value of more than {limit} bytes, which is the limit")))
        }
        Err(_) => Err(Refusal::new(
            StatusCode::REQUEST_TIMEOUT,
            format!("the value did not come within {BODY_TIMEOUT:?}"),
        )),
    }
}

#[cfg(test)]
mod tests {
    use tokio::io::AsyncReadExt as _;

    use super::*;

    #[actix_rt::test]
    async fn a_connection_ends_in_time() {
        let listener = tokio::net::TcpListener::bind("127.0.0.1:0").await.unwrap();
        let address = listener.local_addr().unwrap();
        let connect = TcpStream::connect(address);
        let (accepted, connected) = tokio::join!(listener.accept(), connect);
        let (served, mut peer) = (accepted.unwrap().0, connected.unwrap());
        // A minute is over as soon as there is nothing else to do.
        tokio::time::pause();
        let start = Instant::now();
        let mut data = Extensions::new();
        end_in_time(&served, &mut data);
        assert_eq!(peer.read(&mut [0]).await.unwrap(), 0);
        assert!(start.elapsed() >= CONNECTION_TIME);
    }

    #[test]
    fn only_this_machine_writes() {
        for (peer, here) in [
            ("127.0.0.1:1", true),
            ("127.1.2.3:1", true),
            ("[::1]:1", true),
            ("[::ffff:127.0.0.1]:1", true),
            ("10.0.0.1:1", false),
            ("[::ffff:10.0.0.1]:1", false),
            ("[fe80::1]:1", false),
        ] {
            let peer = Some(peer.parse().unwrap());
            assert_eq!(may_write(peer, false, false), here, "{peer:?}");
            assert!(!may_write(peer, true, false));
            assert!(may_write(peer, true, true));
        }
        assert!(!may_write(None, false, false));
    }

    #[test]
    fn keys_are_any_bytes() {
        for (path, key) in [
            ("", &b""[..]),
            ("a/b", b"a/b"),
            ("%2Fa%2f", b"/a/"),
            ("%25", b"%"),
            ("%2525", b"%25"),
            ("%ff%00%0A", b"\xff\0\n"),
            ("+", b"+"),
            ("..", b".."),
        ] {
            assert_eq!(decoded(path).as_deref(), Ok(key), "{path}");
        }
        for bad in ["%", "%2", "a%zz", "%25%", "%+1", "%é"] {
            assert_eq!(decoded(bad).unwrap_err().status, StatusCode::BAD_REQUEST, "{bad}");
        }
    }

    #[test]
    fn health_says_why() {
        assert_eq!(unready(&Health::Ready, "x:1"), None);
        assert_eq!(unready(&Health::Disconnected, "x:1").unwrap(), "not connected to x:1");
        let held = Health::Held { writes: 1, deletes: 2_000, keys: 3_000 };
        assert_eq!(
            unready(&held, "x:1").unwrap(),
            "held: a repair would write 1 keys and delete 2000 of 3000"
        );
    }
}
