//! Who may connect, and what becomes of the others.

use std::io;
use std::net::SocketAddr;
use std::pin::Pin;
use std::sync::{Arc, mpsc};
use std::task::{Context, Poll, ready};
use std::time::{Duration, Instant};

use futures_util::FutureExt;
use futures_util::future::BoxFuture;
use rcgen::{
    BasicConstraints, CertificateParams, CertifiedIssuer, DnType, IsCa, KeyPair, date_time_ymd,
};
use tablecast::access::tcp::{TcpAccess, TcpListener};
use tablecast::access::tls::{TlsAccess, TlsListener, client_config, server_config};
use tablecast::access::{Access, Incoming, Listener, Stream, memory};
use tablecast::{
    Applicant, Authorize, Client, ClientConfig, Event, Health, HeartbeatConfig, MemoryStore,
    Server, ServerConfig, Token,
};
use tablecast_actors::protocol::{Limits, Reason, ToClient, ToServer, wire};
use tokio::io::{AsyncRead, AsyncReadExt, AsyncWrite, AsyncWriteExt, ReadBuf};
use tokio::net::TcpStream;

use crate::harness::{
    LONG, assert_converges, connect, disconnected, event, filled, key, quick, serve, within,
};
use crate::limits::{last_words, read_message};

/// A certificate and its key, PEM.
pub type Identity = (String, String);

/// Who signs certificates.
pub struct Authority(CertifiedIssuer<'static, KeyPair>);

impl Authority {
    pub fn new(name: &str) -> Self {
        let mut params = CertificateParams::default();
        params.distinguished_name.push(DnType::CommonName, name);
        params.is_ca = IsCa::Ca(BasicConstraints::Unconstrained);
        Self(CertifiedIssuer::self_signed(params, KeyPair::generate().unwrap()).unwrap())
    }

    pub fn pem(&self) -> String {
        self.0.pem()
    }

    pub fn issue(&self, name: &str) -> Identity {
        self.issue_until(name, 4000)
    }

    /// With so many certificates between it and this one, as far as anybody says.
    fn issue_behind(&self, name: &str, between: usize) -> Identity {
        let (certificate, key) = self.issue(name);
        let rest = (0..between).map(|_| Self::new("between").pem());
        (std::iter::once(certificate).chain(rest).collect(), key)
    }

    fn issue_until(&self, name: &str, year: i32) -> Identity {
        let mut params = CertificateParams::new([name.to_owned()]).unwrap();
        params.not_after = date_time_ymd(year, 1, 1);
        let key = KeyPair::generate().unwrap();
        (params.signed_by(&key, &self.0).unwrap().pem(), key.serialize_pem())
    }
}

fn bytes((certificate, key): &Identity) -> (&[u8], &[u8]) {
    (certificate.as_bytes(), key.as_bytes())
}

async fn serve_tls(
    config: ServerConfig,
    store: MemoryStore,
    identity: &Identity,
    client_ca: Option<&Authority>,
) -> (Server, SocketAddr) {
    let (certificate, key) = bytes(identity);
    let ca = client_ca.map(Authority::pem);
    let tls = server_config(certificate, key, ca.as_ref().map(String::as_bytes)).unwrap();
    let listener = TcpListener::bind("127.0.0.1:0").unwrap();
    let address = listener.local_address();
    let server = Server::start(config, store).unwrap();
    server.listen_on(TlsListener::new(listener, tls));
    server.ready().await.unwrap();
    (server, address)
}

fn tls_access(
    address: SocketAddr,
    ca: &Authority,
    identity: Option<&Identity>,
) -> TlsAccess<TcpAccess> {
    let config = client_config(ca.pem().as_bytes(), identity.map(bytes)).unwrap();
    TlsAccess::new(TcpAccess::new(address.to_string()), "127.0.0.1", config).unwrap()
}

fn client(config: ClientConfig, access: impl Access) -> Client {
    Client::start(config, MemoryStore::new(), access).unwrap()
}

/// Why it is not connected, as its status says, when that is what `wanted` picks.
async fn not_connected(client: &Client, wanted: &str) {
    client.ready().await.unwrap();
    within(async {
        loop {
            let status = client.status().await.unwrap();
            assert!(!status.connected && status.health == Health::Disconnected);
            if status.disconnected.is_some_and(|why| why.contains(wanted)) {
                return;
            }
            tokio::task::yield_now().await;
        }
    })
    .await;
}

fn token(text: &'static str) -> Token {
    Token::new(text).unwrap()
}

#[actix_rt::test]
async fn who_does_not_show_the_token_is_refused() {
    let config = ServerConfig { authorize: Arc::new(token("right")), ..ServerConfig::default() };
    let (server, address) = serve(config, filled(10)).await;
    for (shown, why) in [(Some(token("wrong")), "wrong token"), (None, "no token")] {
        let access = TcpAccess::new(address.to_string());
        let refused = client(ClientConfig { token: shown, ..quick() }, access);
        let mut events = refused.events().await.unwrap();
        not_connected(&refused, &format!("refused: {why}")).await;
        let said = event(&mut events, disconnected);
        assert!(said.await.contains(why));
        assert_eq!(refused.reader().len().unwrap(), 0);
    }
    assert_eq!(server.followers().await.unwrap(), []);
    let access = TcpAccess::new(address.to_string());
    let welcome = client(ClientConfig { token: Some(token("right")), ..quick() }, access);
    assert_eq!(connect(&welcome).await.written, 10);
    assert_eq!(welcome.status().await.unwrap().disconnected, None);
}

#[actix_rt::test]
async fn a_token_is_shown_once_and_ahead_of_hello() {
    let (_server, address) = serve(ServerConfig::default(), filled(10)).await;
    let shown = [&b"\0\0\0\x07\xc4\x05right"[..]];
    let hello = wire::encode(&ToServer::hello("raw", &Limits::default(), None));
    // A server that asks for none takes any.
    let mut stream = TcpStream::connect(address).await.unwrap();
    stream.write_all(&[shown[0], &hello].concat()).await.unwrap();
    assert!(matches!(read_message(&mut stream).await, Some(ToClient::Welcome { .. })));
    stream.write_all(shown[0]).await.unwrap();
    assert_eq!(last_words(&mut stream).await.0, Reason::Protocol);
    let mut stream = TcpStream::connect(address).await.unwrap();
    stream.write_all(&[shown[0], shown[0]].concat()).await.unwrap();
    assert_eq!(last_words(&mut stream).await.0, Reason::Protocol);
}

/// Tells who asks, and lets nobody in.
#[derive(Debug)]
struct Tell(mpsc::Sender<Asked>);

#[derive(Debug)]
struct Asked {
    at: Instant,
    who: String,
    token: Option<Token>,
    certificate: Option<Vec<u8>>,
}

impl Authorize for Tell {
    fn authorize(&self, follower: &Applicant<'_>) -> Result<(), String> {
        let asked = Asked {
            at: Instant::now(),
            who: format!("{} at {}", follower.name, follower.address),
            token: follower.token.cloned(),
            certificate: follower.certificate.map(<[u8]>::to_vec),
        };
        self.0.send(asked).ok();
        Err("not you".to_owned())
    }
}

#[actix_rt::test]
async fn who_is_refused_comes_back_later_each_time() {
    let (sender, asked) = mpsc::channel();
    let config = ServerConfig { authorize: Arc::new(Tell(sender)), ..ServerConfig::default() };
    let (listener, access) = memory::pair();
    let server = Server::start(config, filled(10)).unwrap();
    server.listen_on(listener);
    server.ready().await.unwrap();
    let config = ClientConfig { backoff_min: Duration::from_millis(20), ..ClientConfig::default() };
    let refused = client(config, access);
    not_connected(&refused, "refused: not you").await;
    let attempts = within(actix_rt::task::spawn_blocking(move || {
        asked.iter().map(|asked| asked.at).take(5).collect::<Vec<_>>()
    }));
    let attempts = attempts.await.unwrap();
    for (attempt, wait) in attempts.windows(2).zip([20, 40, 80, 160]) {
        assert!(attempt[1] - attempt[0] >= Duration::from_millis(wait), "{attempts:?}");
    }
}

#[derive(Debug)]
struct Panics;

impl Authorize for Panics {
    fn authorize(&self, follower: &Applicant<'_>) -> Result<(), String> {
        assert_ne!(follower.name, "odd", "of no consequence for others");
        Ok(())
    }
}

#[actix_rt::test]
async fn a_decision_that_panics_ends_its_own_connection() {
    let config = ServerConfig { authorize: Arc::new(Panics), ..ServerConfig::default() };
    let (server, address) = serve(config, filled(10)).await;
    let follower = |name: &str| {
        let access = TcpAccess::new(address.to_string());
        client(ClientConfig { name: name.to_owned(), ..quick() }, access)
    };
    let odd = follower("odd");
    not_connected(&odd, "").await;
    // Kept: a handle that is dropped takes its connection with it.
    let even = follower("even");
    assert!(connect(&even).await.equal());
    assert!(!odd.status().await.unwrap().connected);
    assert_eq!(server.followers().await.unwrap().len(), 1);
}

#[actix_rt::test]
async fn the_decision_knows_name_address_token_and_certificate() {
    let (sender, asked) = mpsc::channel();
    let config = ServerConfig { authorize: Arc::new(Tell(sender)), ..ServerConfig::default() };
    let ca = Authority::new("ours");
    let (server, address) = serve_tls(config, filled(10), &ca.issue("127.0.0.1"), Some(&ca)).await;
    let identity = ca.issue("edge-1");
    let config = ClientConfig { name: "edge".to_owned(), token: Some(token("t")), ..quick() };
    let refused = client(config, tls_access(address, &ca, Some(&identity)));
    not_connected(&refused, "refused: not you").await;
    let asked = asked.try_recv().unwrap();
    assert!(asked.who.starts_with("edge at 127.0.0.1:"), "{asked:?}");
    assert_eq!(asked.token, Some(token("t")));
    use tablecast::access::tls::rustls::pki_types::{CertificateDer, pem::PemObject};
    let der = CertificateDer::from_pem_slice(identity.0.as_bytes()).unwrap();
    assert_eq!(asked.certificate.as_deref(), Some(&*der));
    assert_eq!(server.followers().await.unwrap(), []);
}

#[actix_rt::test]
async fn certificates_that_do_not_fit() {
    let (ca, other) = (Authority::new("ours"), Authority::new("theirs"));
    let good = ca.issue("127.0.0.1");
    // What the server shows.
    for (identity, why) in [
        (other.issue("127.0.0.1"), "UnknownIssuer"),
        (ca.issue_until("127.0.0.1", 2001), "certificate expired"),
        (ca.issue("127.0.0.2"), "certificate not valid for name"),
        (ca.issue_behind("127.0.0.1", 5), "5 intermediate certificates; the limit is 4"),
    ] {
        let (server, address) =
            serve_tls(ServerConfig::default(), filled(10), &identity, None).await;
        not_connected(&client(quick(), tls_access(address, &ca, None)), why).await;
        assert_eq!(server.followers().await.unwrap(), []);
    }
    // What the follower shows.
    let (server, address) = serve_tls(ServerConfig::default(), filled(10), &good, Some(&ca)).await;
    for (identity, why) in [
        (None, "CertificateRequired"),
        (Some(other.issue("edge")), "UnknownCA"),
        (Some(ca.issue_until("edge", 2001)), "CertificateExpired"),
        (Some(ca.issue_behind("edge", 5)), "CertificateUnknown"),
    ] {
        let access = tls_access(address, &ca, identity.as_ref());
        not_connected(&client(quick(), access), why).await;
    }
    assert_eq!(server.followers().await.unwrap(), []);
    let welcome = ca.issue_behind("edge", 4);
    let welcome = client(quick(), tls_access(address, &ca, Some(&welcome)));
    assert_eq!(connect(&welcome).await.written, 10);
}

#[actix_rt::test]
async fn one_end_speaks_tls_and_the_other_does_not() {
    let ca = Authority::new("ours");
    let (_server, address) =
        serve_tls(ServerConfig::default(), filled(10), &ca.issue("127.0.0.1"), None).await;
    let plain = client(quick(), TcpAccess::new(address.to_string()));
    not_connected(&plain, "above the limit of 4096: the other end speaks TLS").await;
    let (_server, address) = serve(ServerConfig::default(), filled(10)).await;
    not_connected(&client(quick(), tls_access(address, &ca, None)), "InvalidContentType").await;
}

#[actix_rt::test]
async fn pem_that_is_none() {
    let ca = Authority::new("ours");
    let (certificate, key) = ca.issue("127.0.0.1");
    let (_, other) = ca.issue("127.0.0.1");
    for (certificate, key) in
        [("", &*key), ("nonsense", &key), (&certificate, ""), (&certificate, &other)]
    {
        let error = server_config(certificate.as_bytes(), key.as_bytes(), None).unwrap_err();
        assert_eq!(error.kind(), io::ErrorKind::InvalidInput, "{error}");
    }
    assert!(client_config(b"", None).is_err());
}

#[actix_rt::test]
async fn the_table_is_kept_equal_under_tls() {
    let ca = Authority::new("ours");
    let (server, address) =
        serve_tls(ServerConfig::default(), filled(20_000), &ca.issue("127.0.0.1"), None).await;
    let follower = client(quick(), tls_access(address, &ca, None));
    assert!(connect(&follower).await.equal());
    server.write("large", vec![7; 8 << 20]).await.unwrap();
    for number in 0..1000 {
        server.write(key(number), "new").await.unwrap();
    }
    assert_converges(&server, &follower).await;
    follower.delete(key(1)).await.unwrap();
    let mut events = follower.events().await.unwrap();
    follower.diff().await.unwrap();
    assert_eq!(crate::harness::report(&mut events).await.written, 1);
    // Farewells are heard.
    server.stop().await;
    event(&mut events, |event| match event {
        Event::Disconnected(reason) if reason.contains("shutting down") => Some(()),
        _ => None,
    })
    .await;
}

/// As TLS does when its socket is full: takes what is written, and needs to be flushed more than once.
struct Holds {
    stream: Box<dyn Stream>,
    held: Vec<u8>,
    asked: bool,
}

impl AsyncRead for Holds {
    fn poll_read(
        mut self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        buffer: &mut ReadBuf<'_>,
    ) -> Poll<io::Result<()>> {
        Pin::new(&mut self.stream).poll_read(cx, buffer)
    }
}

impl AsyncWrite for Holds {
    fn poll_write(
        mut self: Pin<&mut Self>,
        _: &mut Context<'_>,
        bytes: &[u8],
    ) -> Poll<io::Result<usize>> {
        self.held.extend_from_slice(bytes);
        self.asked = false;
        Poll::Ready(Ok(bytes.len()))
    }

    fn poll_flush(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        if !std::mem::replace(&mut self.asked, true) && !self.held.is_empty() {
            cx.waker().wake_by_ref();
            return Poll::Pending;
        }
        let Self { stream, held, .. } = &mut *self;
        while !held.is_empty() {
            let written = ready!(Pin::new(&mut *stream).poll_write(cx, held))?;
            held.drain(..written);
        }
        Pin::new(stream).poll_flush(cx)
    }

    fn poll_shutdown(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        ready!(self.as_mut().poll_flush(cx))?;
        Pin::new(&mut self.stream).poll_shutdown(cx)
    }
}

struct HoldsListener(memory::MemoryListener);

impl Listener for HoldsListener {
    fn accept(&mut self) -> BoxFuture<'_, io::Result<Incoming>> {
        let hold = |stream| async {
            let holds = Holds { stream, held: Vec::new(), asked: false };
            Ok((Box::new(holds) as Box<dyn Stream>, None))
        };
        self.0.accept().map(move |incoming| Ok(incoming?.with_handshake(hold))).boxed()
    }

    fn address(&self) -> String {
        "memory".to_owned()
    }
}

#[actix_rt::test]
async fn what_a_transport_holds_back_goes_out_without_anything_behind_it() {
    let mut config = ServerConfig::default();
    // No ping pushes it.
    let heartbeat = HeartbeatConfig { ping_after: LONG * 2, dead_after: LONG * 4 };
    config.session.heartbeat = heartbeat;
    let (listener, access) = memory::pair();
    let server = Server::start(config, filled(10)).unwrap();
    server.listen_on(HoldsListener(listener));
    server.ready().await.unwrap();
    let follower = client(ClientConfig { heartbeat, ..quick() }, access);
    assert!(connect(&follower).await.equal());
    server.write("k", "v").await.unwrap();
    assert_converges(&server, &follower).await;
    within(server.stop()).await;
}

/// Neither a slow TLS handshake nor a slow Hello is waited for by anybody else, or for long.
#[actix_rt::test]
async fn the_silent_hold_up_nobody_and_are_closed() {
    let limit = Duration::from_millis(500);
    let ca = Authority::new("ours");
    let config = || ServerConfig { handshake_timeout: limit, ..ServerConfig::default() };
    let (_tls, tls) = serve_tls(config(), filled(10), &ca.issue("127.0.0.1"), None).await;
    let (_plain, plain) = serve(config(), filled(10)).await;
    for address in [tls, plain] {
        let since = Instant::now();
        let mut silent = Vec::new();
        for _ in 0..20 {
            let mut stream = TcpStream::connect(address).await.unwrap();
            // The beginning of either.
            stream.write_all(&[if address == tls { 0x16 } else { 0 }]).await.unwrap();
            silent.push(stream);
        }
        if address == tls {
            assert!(connect(&client(quick(), tls_access(tls, &ca, None))).await.equal());
        } else {
            let access = TcpAccess::new(plain.to_string());
            assert!(connect(&client(quick(), access)).await.equal());
        }
        for mut stream in silent {
            within(stream.read_to_end(&mut Vec::new())).await.unwrap();
        }
        assert!(since.elapsed() >= limit);
    }
}
