//! Starts and stops servers and followers, waits for events, and stands between them.

use std::net::SocketAddr;
use std::time::Duration;

use tablecast::access::tcp::TcpAccess;
use tablecast::{
    Client, ClientConfig, DiffOutcome, DiffReport, Event, Key, MemoryStore, Reader, Server,
    ServerConfig, Value,
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
pub async fn serve(config: ServerConfig, store: MemoryStore) -> (Server, SocketAddr) {
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

pub fn follower(address: SocketAddr, store: MemoryStore) -> Client {
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
    let head = server.status().await.unwrap().position.unwrap().revision;
    client.wait_for(head, LONG).await.unwrap();
    let (ours, theirs) = (entries(&**server.reader()), entries(&**client.reader()));
    assert_eq!(ours.len(), theirs.len());
    assert!(ours == theirs, "the tables differ");
}
