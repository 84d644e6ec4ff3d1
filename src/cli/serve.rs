//! `tablecast serve`.

use std::io::{BufRead, stdin};
use std::process::ExitCode;
use std::sync::Arc;
use std::time::Duration;

use anyhow::{Context as _, ensure};
use tokio::sync::mpsc;
#[cfg(target_os = "linux")]
use tracing::warn;

use super::events::{Event, Output};
use super::file::{self, Dump};
use super::http::{Http, Table};
use super::ndjson::{self, Found, LINE_BYTES, Lines};
use super::signals::Signals;
use super::{Failure, STOP_TIMEOUT, Serve, credentials, resume};
use crate::access::tcp::TcpListener;
use crate::access::tls::TlsListener;
use crate::{Change, Error, Hash, Limits, Position, Server, ServerConfig};

/// How many changes from stdin wait to be written. Then no more is read.
const WAITING: usize = 16;

/// How many files may be open beside followers' connections, where that is less than half of all.
#[cfg(target_os = "linux")]
const OTHER_FILES: u64 = 256;

/// How long a writer waits for whoever reads what is wrong, the first time.
const PATIENCE: Duration = Duration::from_secs(1);

/// What a line of stdin says, or what is wrong with it and where.
type Line = Result<(u64, Change), String>;

pub(super) async fn run(args: &Serve, output: &Output) -> Result<ExitCode, Failure> {
    credentials::check(args)?;
    let (mut config, tls) = (config(args)?, credentials::tls(args)?);
    #[cfg(target_os = "linux")]
    if let Some(files) = raise_open_files() {
        fit(&mut config, files);
    }
    let dump = args.dump.as_deref().map(Dump::at).transpose()?;
    let store = file::load(args.load.as_deref(), args.dump.as_deref())?;
    let mut signals = Signals::new()?;
    let server = Server::start(config, store)?;
    let table = Arc::clone(server.reader());
    let (_, root) = server.root().await?;
    let listener = TcpListener::bind(&*args.listen)
        .with_context(|| format!("cannot listen at {}", args.listen))?;
    let listen = listener.local_address();
    credentials::check_at(args, &listen)?;
    match tls {
        Some(tls) => server.listen_on(TlsListener::new(listener, tls)),
        None => server.listen_on(listener),
    }
    let http = args.http.as_deref().map(|address| {
        let writes_from_anywhere = args.http_writes_from_anywhere;
        let table = Table::Server { server: server.clone(), writes_from_anywhere };
        Http::start(address, args.insecure, table)
    });
    let http = http.transpose()?;
    // Behind all that can fail: a start that comes to nothing uses nothing up.
    let position = position(args, (root, table.len()?), output).await;
    let revision = match position {
        Some(position) => server.continue_from(position).await?.revision,
        None => server.ready().await?.revision,
    };
    let ready = Event::Ready {
        listen,
        http: http.as_ref().map(|http| http.address),
        keys: table.len()?,
        revision,
        root,
    };
    let served = tokio::select! {
        served = serve(args, &server, output, ready) => served,
        () = signals.recv() => Ok(()),
    };
    if let Some(http) = http {
        http.stop().await;
    }
    // Nobody writes any more; this is answered behind the last write.
    let standing = server.root().await;
    // Who has not heard it by then hears that the connection ended.
    drop(tokio::time::timeout(args.drain_timeout + STOP_TIMEOUT, server.stop()).await);
    served?;
    if let (Some(dump), Some(path)) = (dump, &args.dump) {
        dump.write(&*table)?;
        if args.resume {
            let (position, root) = standing?;
            resume::save(path, position, root, table.len()?)?;
        }
    }
    Ok(ExitCode::SUCCESS)
}

/// As many open files as the system allows: often 1,024 are left at first, fewer than there may be connections. How many there
/// are then, if there is a limit.
#[cfg(target_os = "linux")]
fn raise_open_files() -> Option<u64> {
    use rustix::process::{Resource, Rlimit, getrlimit, setrlimit};
    let limit = getrlimit(Resource::Nofile);
    setrlimit(Resource::Nofile, Rlimit { current: limit.maximum, ..limit }).ok();
    getrlimit(Resource::Nofile).current
}

/// Lets no more connections in than there are files for, beside those of HTTP, dumps and threads: whoever comes then hears that
/// the server is full, and whoever asks how it is has an answer.
#[cfg(target_os = "linux")]
fn fit(config: &mut ServerConfig, files: u64) {
    let room = usize::try_from(files - OTHER_FILES.min(files / 2)).unwrap_or(usize::MAX);
    if config.followers.saturating_add(config.strangers) > room {
        config.strangers = config.strangers.min(room / 8).max(1);
        config.followers = config.followers.min(room.saturating_sub(config.strangers));
        let ServerConfig { followers, strangers, .. } = config;
        warn!(files, followers, strangers, "few open files are allowed, and so few connections");
    }
}

fn config(args: &Serve) -> Result<ServerConfig, Failure> {
    let verify_every = Some(args.verify_every).filter(|every| !every.is_zero());
    let drain_timeout = args.drain_timeout;
    let mut config = ServerConfig { drain_timeout, verify_every, ..ServerConfig::default() };
    if let Some(token) = credentials::token(args.token_file.as_deref())? {
        config.authorize = Arc::new(token);
    }
    Ok(config)
}

/// Where the history goes on, if it does. That is used up: were it used twice, there would be two histories
/// of one name.
async fn position(args: &Serve, table: (Hash, usize), output: &Output) -> Option<Position> {
    let path = args.load.as_deref().filter(|_| args.resume)?;
    let forgotten = |position: Option<Position>| {
        let known = resume::forget(path)?;
        ensure!(known || position.is_none(), "another server has just taken it");
        Ok(position)
    };
    match resume::load(path, || Ok(table)).and_then(forgotten) {
        Ok(position) => position,
        Err(error) => {
            let message = format!("a new history begins: {error:#}");
            // Nobody reads it: then that is noticed at the next event.
            output.say(Event::Warning { message }).await.ok();
            None
        }
    }
}

/// Ends when the server ends. That nobody reads what is said ends nothing: followers do.
async fn serve(args: &Serve, server: &Server, output: &Output, ready: Event) -> Result<(), Error> {
    output.say(ready).await.ok();
    if args.stdin {
        let mut lines = read_stdin()?;
        // Who does not read what is wrong does not keep what is right from being written.
        let mut unsaid = 0;
        while let Some(line) = lines.recv().await {
            if let Err(message) = write(server, line).await? {
                let patience = if unsaid == 0 { PATIENCE } else { Duration::ZERO };
                let error = Event::Error { message };
                unsaid += u64::from(!output.say_within(patience, error).await);
            }
            if unsaid > 0 {
                let message = format!("{unsaid} errors were not said: what was said was not read");
                let error = Event::Error { message };
                if output.say_within(Duration::ZERO, error).await {
                    unsaid = 0;
                }
            }
        }
    }
    std::future::pending().await
}

/// Makes the change of one line. The inner error is only the line's.
async fn write(server: &Server, line: Line) -> Result<Result<(), String>, Error> {
    let (number, change) = match line {
        Ok(change) => change,
        Err(message) => return Ok(Err(message)),
    };
    match server.batch(vec![change]).await {
        Ok(_) => Ok(Ok(())),
        Err(Error::Write(error)) => Ok(Err(format!("stdin:{number}: {error}"))),
        Err(error) => Err(error),
    }
}

/// Reads stdin on a thread of its own, which nobody waits for: it may be in the middle of a read
/// when the process ends.
fn read_stdin() -> Result<mpsc::Receiver<Line>, Error> {
    let (sender, lines) = mpsc::channel(WAITING);
    let thread = std::thread::Builder::new().name("stdin".to_owned());
    thread.spawn(move || send_lines(Lines::new(stdin().lock()), &sender))?;
    Ok(lines)
}

/// Sends what every line says. Ends with the input, or when nobody receives.
fn send_lines(mut lines: Lines<impl BufRead>, sender: &mpsc::Sender<Line>) {
    let limits = Limits::default();
    loop {
        let (change, end) = match lines.next() {
            Ok(Found::Line(line)) => (ndjson::parse_change(line, &limits), false),
            Ok(Found::TooLong) => (
                Err(anyhow::anyhow!("line of more than {LINE_BYTES} bytes, which is the limit")),
                false,
            ),
            Ok(Found::End) => return,
            Err(error) => (Err(anyhow::Error::new(error).context("cannot read")), true),
        };
        let number = lines.number();
        let sent = match change {
            Ok(None) => Ok(()),
            Ok(Some(change)) => sender.blocking_send(Ok((number, change))),
            Err(error) => sender.blocking_send(Err(format!("stdin:{number}: {error:#}"))),
        };
        if end || sent.is_err() {
            return;
        }
    }
}
