//! Starts and stops servers and followers, waits for events, and stands between them.

use std::net::SocketAddr;
use std::time::Duration;

use tablecast::access::tcp::TcpAccess;
use tablecast::{
    Client, ClientConfig, DiffOutcome, DiffReport, Event, Key, MemoryStore, Reader, Server,
    ServerConfig, Store, Value,
};
use tokio::sync::broadcast;

/// Longer than anything here takes on a busy machine: only a hang is noticed by it.
pub const LONG: Duration = Duration::from_secs(60);

pub fn key(number: usize) -> Key {
    format!("key-{number:06}").into()
}

pub fn filled(keys: usize) -> MemoryStore {
    (0..keys).map(|number| (key(number), Value::from(format!("value-{number}")))).collect()
}

/// A server that is ready, and where.
pub async fn serve(config: ServerConfig, store: impl Store) -> (Server, SocketAddr) {
    let server = Server::start(config, store).unwrap();
    let address = server.listen("127.0.0.1:0").unwrap();
    server.ready().await.unwrap();
    (server, address)
}

/// Comes back quickly: tests do not wait for backoff.
pub fn quick() -> ClientConfig {
    ClientConfig {
        backoff_min: Duration::from_millis(5),
        backoff_max: Duration::from_millis(50),
        event_capacity: 1 << 16,
        ..ClientConfig::default()
    }
}

pub fn follower(address: SocketAddr, store: impl Store) -> Client {
    Client::start(quick(), store, TcpAccess::new(address.to_string())).unwrap()
}

pub async fn within<T>(what: impl Future<Output = T>) -> T {
    tokio::time::timeout(LONG, what).await.expect("it takes too long")
}

/// The next event that `wanted` picks.
pub async fn event<T>(
    events: &mut broadcast::Receiver<Event>,
    wanted: impl Fn(&Event) -> Option<T>,
) -> T {
    within(async {
        loop {
            match events.recv().await {
                Ok(event) => {
                    if let Some(found) = wanted(&event) {
                        return found;
                    }
                }
                Err(broadcast::error::RecvError::Lagged(_)) => {}
                Err(error) => panic!("no more events: {error}"),
            }
        }
    })
    .await
}

/// Why the connection ended, for [`event`].
pub fn disconnected(event: &Event) -> Option<String> {
    match event {
        Event::Disconnected(why) => Some(why.clone()),
        _ => None,
    }
}

/// The report of the next diff that is done.
pub async fn report(events: &mut broadcast::Receiver<Event>) -> DiffReport {
    event(events, |event| match event {
        Event::Diff(DiffOutcome::Done(report)) => Some(report.clone()),
        _ => None,
    })
    .await
}

/// Connects, and waits for the diff that follows.
pub async fn connect(client: &Client) -> DiffReport {
    let mut events = client.events().await.unwrap();
    client.ready().await.unwrap();
    report(&mut events).await
}

pub fn entries(reader: &dyn Reader) -> Vec<(Key, Value)> {
    reader.snapshot().map(Result::unwrap).collect()
}

/// Waits until the follower has reached the server's head, and compares them entry by entry.
pub async fn assert_converges(server: &Server, client: &Client) {
    let head = server.status().await.unwrap().position.unwrap();
    client.wait_for(head, LONG).await.unwrap();
    let (ours, theirs) = (entries(&**server.reader()), entries(&**client.reader()));
    assert_eq!(ours.len(), theirs.len());
    assert!(ours == theirs, "the tables differ");
}

/// Stands between a follower and its server: it can stop the server's bytes, and cut.
pub struct Proxy {
    pub address: SocketAddr,
    /// `Some(bytes)`: so many more bytes go to the follower, then the server's socket is not read.
    gate: tokio::sync::watch::Sender<Gate>,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Gate {
    Open,
    /// Nothing of what the server sends is read.
    Stopped,
    /// Every connection is closed at once; new ones are let through again when it opens.
    Cut,
}

impl Proxy {
    pub async fn start(server: SocketAddr) -> Self {
        let listener = tokio::net::TcpListener::bind("127.0.0.1:0").await.unwrap();
        let address = listener.local_addr().unwrap();
        let (gate, watch) = tokio::sync::watch::channel(Gate::Open);
        actix_rt::spawn(async move {
            while let Ok((follower, _)) = listener.accept().await {
                if *watch.borrow() == Gate::Cut {
                    continue;
                }
                let watch = watch.clone();
                actix_rt::spawn(async move {
                    let Ok(server) = tokio::net::TcpStream::connect(server).await else { return };
                    server.set_nodelay(true).unwrap();
                    follower.set_nodelay(true).unwrap();
                    let mut cut = watch.clone();
                    tokio::select! {
                        () = forward(follower, server, watch) => {}
                        _ = cut.wait_for(|gate| *gate == Gate::Cut) => {}
                    }
                });
            }
        });
        Self { address, gate }
    }

    /// Cuts, and waits until the follower has noticed.
    pub async fn cut(&self, events: &mut broadcast::Receiver<Event>) {
        self.set(Gate::Cut);
        event(events, |event| matches!(event, Event::Disconnected(_)).then_some(())).await;
    }

    pub fn set(&self, gate: Gate) {
        self.gate.send_replace(gate);
    }
}

async fn forward(
    follower: tokio::net::TcpStream,
    server: tokio::net::TcpStream,
    mut gate: tokio::sync::watch::Receiver<Gate>,
) {
    use tokio::io::{AsyncReadExt, AsyncWriteExt};
    let (mut from_follower, mut to_follower) = follower.into_split();
    let (mut from_server, mut to_server) = server.into_split();
    let up = tokio::io::copy(&mut from_follower, &mut to_server);
    let down = async {
        let mut buffer = vec![0; 16 << 10];
        while gate.wait_for(|gate| *gate != Gate::Stopped).await.is_ok() {
            tokio::select! {
                biased;
                _ = gate.changed() => {}
                read = from_server.read(&mut buffer) => match read {
                    Ok(0) | Err(_) => return,
                    Ok(read) => {
                        if to_follower.write_all(&buffer[..read]).await.is_err() {
                            return;
                        }
                    }
                }
            }
        }
    };
    tokio::select! {
        _ = up => {}
        () = down => {}
    }
}
