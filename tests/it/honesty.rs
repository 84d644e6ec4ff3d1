//! What a follower says of itself is true: of its health, of its position, of what it has verified. And
//! many that come back, or flood, hold up nobody.

use std::net::SocketAddr;
use std::sync::{Arc, Condvar, Mutex};
use std::time::Duration;

use tablecast::access::tcp::TcpAccess;
use tablecast::{
    Change, Client, ClientStatus, DiffAborted, DiffOutcome, Event, FollowerStatus, Health, Key,
    MemoryStore, Position, Reader, Server, ServerConfig, ServerStatus, Store, StoreError, Value,
};
use tablecast_actors::protocol::{Limits, ToClient, ToServer, wire};
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::TcpStream;

use crate::harness::{
    LONG, Proxy, connect, entries, event, filled, follower, key, quick, report, serve, within,
};
use crate::limits::{ask_for_diff, read_message};

/// A diff that is held: health and the position that stop gives.
#[actix_rt::test]
async fn a_held_repair_leaves_no_position() {
    let (server, address) = serve(ServerConfig::default(), filled(100)).await;
    let client = follower(address, MemoryStore::new());
    assert!(connect(&client).await.equal());
    for number in 0..1500 {
        client.write(format!("mine-{number}"), "x").await.unwrap();
    }
    let outcome = client.diff().await.unwrap();
    assert!(
        matches!(outcome, DiffOutcome::Aborted(DiffAborted::Held { deletes: 1500, .. })),
        "{outcome:?}"
    );
    let status = client.status().await.unwrap();
    let keys = entries(&**client.reader()).len();
    let position = client.stop().await;
    assert_eq!(position, None, "stop gives a position, the table has {keys} keys, not 100");
    assert!(matches!(status.health, Health::Held { .. }), "{:?}", status.health);
    drop(server);
}

/// A diff that the server aborts forgets that the table was changed.
#[actix_rt::test]
async fn a_diff_that_was_aborted_has_not_healed() {
    let config = ServerConfig { diffs_waiting: 0, ..ServerConfig::default() };
    let server = Server::start(config, MemoryStore::new()).unwrap();
    let address = server.listen("127.0.0.1:0").unwrap();
    let at = server.ready().await.unwrap();
    let client = follower(address, MemoryStore::new());
    client.continue_from(at).await.unwrap();
    client.ready().await.unwrap();
    client.wait_ready(LONG).await.unwrap();
    client.write("mine", "x").await.unwrap();
    let outcome = client.diff().await.unwrap();
    assert!(matches!(outcome, DiffOutcome::Aborted(_)));
    let position = client.stop().await;
    assert_eq!(position, None, "the table has a key that the server has not");
}

/// Live deletes hold a repair, for ever.
#[actix_rt::test]
async fn live_deletes_hold_no_repair() {
    let config = ServerConfig { diffs_at_once: 1, ..ServerConfig::default() };
    let (server, address) = serve(config, filled(3000)).await;
    // Somebody takes the only place, and does not answer.
    let mut stream = TcpStream::connect(address).await.unwrap();
    let hello = wire::encode(&ToServer::hello("raw", &Limits::default(), None));
    stream.write_all(&hello).await.unwrap();
    assert!(matches!(read_message(&mut stream).await, Some(ToClient::Welcome { .. })));
    ask_for_diff(&mut stream).await;
    assert!(matches!(read_message(&mut stream).await, Some(ToClient::SyncStart { .. })));

    let client = follower(address, filled(3000));
    let mut events = client.events().await.unwrap();
    client.ready().await.unwrap();
    within(async { while server.status().await.unwrap().diffs_waiting != 1 {} }).await;
    let deletes = (0..2000).map(|number| Change::delete(key(number))).collect();
    server.batch(deletes).await.unwrap();
    within(async { while client.reader().len().unwrap() != 1000 {} }).await;
    drop(stream);
    event(&mut events, |event| matches!(event, Event::Diff(_)).then_some(())).await;
    assert!(entries(&**server.reader()) == entries(&**client.reader()), "tables differ");
    let ready = client.wait_ready(Duration::from_secs(20)).await;
    let health = client.status().await.unwrap().health;
    assert!(ready.is_ok(), "the tables are equal, and it is {health:?}");
}

/// A server that came up empty is filled again: the follower that was held equals it, and does not know.
#[actix_rt::test]
async fn who_was_held_and_is_equal_notices() {
    let every = Some(Duration::from_millis(100));
    let config = ServerConfig { verify_every: every, ..ServerConfig::default() };
    let (server, address) = serve(config, MemoryStore::new()).await;
    let client = follower(address, filled(3000));
    let mut events = client.events().await.unwrap();
    client.ready().await.unwrap();
    event(&mut events, |event| matches!(event, Event::Held { .. }).then_some(())).await;
    for number in 0..3000 {
        server.write(key(number), format!("value-{number}")).await.unwrap();
    }
    let ready = client.wait_ready(Duration::from_secs(20)).await;
    assert!(entries(&**server.reader()) == entries(&**client.reader()), "tables differ");
    let health = client.status().await.unwrap().health;
    assert!(ready.is_ok(), "the tables are equal, and it is {health:?}");
}

/// A store whose snapshots are read only while the gate is open.
#[derive(Clone, Default)]
struct Gated {
    inner: MemoryStore,
    gate: Arc<(Mutex<(bool, usize)>, Condvar)>,
}

impl Gated {
    fn shut(&self, shut: bool) {
        self.gate.0.lock().unwrap().0 = shut;
        self.gate.1.notify_all();
    }
    fn waiting(&self) -> usize {
        self.gate.0.lock().unwrap().1
    }
    /// Changes a key behind the follower's back, and waits until it looks through the store, which it does not come to the end of.
    async fn corrupt(&mut self) {
        self.shut(true);
        self.inner.apply(&[Change::write(key(3), "changed")]).unwrap();
        within(async {
            while self.waiting() == 0 {
                tokio::task::yield_now().await;
            }
        })
        .await;
    }
}

impl Store for Gated {
    fn apply(&mut self, changes: &[Change]) -> Result<(), StoreError> {
        self.inner.apply(changes)
    }
    fn reader(&self) -> Arc<dyn Reader> {
        Arc::new(GatedReader { inner: self.inner.reader(), gate: self.gate.clone() })
    }
}

struct GatedReader {
    inner: Arc<dyn Reader>,
    gate: Arc<(Mutex<(bool, usize)>, Condvar)>,
}

impl Reader for GatedReader {
    fn get(&self, key: &[u8]) -> Result<Option<Value>, StoreError> {
        self.inner.get(key)
    }
    fn len(&self) -> Result<usize, StoreError> {
        self.inner.len()
    }
    fn snapshot(&self) -> Box<dyn Iterator<Item = Result<(Key, Value), StoreError>> + Send> {
        let mut inner = self.inner.snapshot();
        let gate = self.gate.clone();
        let mut passed = false;
        Box::new(std::iter::from_fn(move || {
            if !passed {
                let mut state = gate.0.lock().unwrap();
                state.1 += 1;
                while state.0 {
                    state = gate.1.wait(state).unwrap();
                }
                state.1 -= 1;
                passed = true;
            }
            inner.next()
        }))
    }
}

/// Corruption that is found while there is no connection (or another one) leaves the position.
#[actix_rt::test]
async fn what_was_found_corrupt_has_no_position() {
    let every = Some(Duration::from_millis(500));
    let config = ServerConfig { verify_every: every, ..ServerConfig::default() };
    let (_server, address) = serve(config, filled(100)).await;
    let proxy = Proxy::start(address).await;
    let mut store = Gated::default();
    let access = TcpAccess::new(proxy.address.to_string());
    let client = Client::start(quick(), store.clone(), access).unwrap();
    assert!(connect(&client).await.equal());
    let mut events = client.events().await.unwrap();
    store.corrupt().await;
    proxy.cut(&mut events).await;
    store.shut(false);
    event(&mut events, |event| matches!(event, Event::Corrupt { .. }).then_some(())).await;
    let position = client.stop().await;
    assert_eq!(position, None, "the store is known not to be what it was at the position");
}

/// A diff that begins while the store is looked through knows nothing of what is found, and ends with equal roots.
#[actix_rt::test]
async fn what_was_found_corrupt_beside_a_diff_is_healed() {
    let every = Some(Duration::from_millis(500));
    let config = ServerConfig { verify_every: every, ..ServerConfig::default() };
    let (server, address) = serve(config, filled(100)).await;
    let mut store = Gated::default();
    let access = TcpAccess::new(address.to_string());
    let client = Client::start(quick(), store.clone(), access).unwrap();
    assert!(connect(&client).await.equal());
    let mut events = client.events().await.unwrap();
    store.corrupt().await;
    let DiffOutcome::Done(report) = client.diff().await.unwrap() else { panic!() };
    assert!(report.equal() && report.written == 0, "{report:?}");
    store.shut(false);
    event(&mut events, |event| matches!(event, Event::Corrupt { .. }).then_some(())).await;
    // Not by the next look through the store, which does not come.
    store.shut(true);
    event(&mut events, |event| matches!(event, Event::Diff(_)).then_some(())).await;
    assert!(entries(&**server.reader()) == entries(&*store.inner.reader()), "tables differ");
    store.shut(false);
}

/// Many that missed much come back at once, and each may be told at once what counts of it.
#[actix_rt::test]
async fn all_that_come_back_at_once_are_let_in() {
    const MISSED: u64 = 131_000;
    const MANY: usize = 200;
    let config = ServerConfig { verify_every: None, ..ServerConfig::default() };
    let server = Server::start(config, MemoryStore::new()).unwrap();
    let address = server.listen("127.0.0.1:0").unwrap();
    let epoch = tablecast::Epoch::from_bytes([1; 16]);
    let chain = tablecast::Chain::START;
    let revision = tablecast::Revision(1_000_000_000);
    let at = server.continue_from(Position { epoch, revision, chain }).await.unwrap();
    for part in 0..131 {
        let batch = (0..1000).map(|n| Change::write(key(part % 65 * 1000 + n), "v")).collect();
        server.batch(batch).await.unwrap();
    }
    let welcomed = Arc::new(Mutex::new(0));
    for _ in 0..MANY {
        actix_rt::spawn(come_back(address, at, Arc::clone(&welcomed)));
    }
    within(async {
        while *welcomed.lock().unwrap() < MANY {
            for follower in server.followers().await.unwrap() {
                // Before it is let in, too.
                assert!(follower.lag <= MISSED, "{follower:?}");
            }
        }
    })
    .await;
}

async fn come_back(address: SocketAddr, at: Position, welcomed: Arc<Mutex<usize>>) {
    // As `Backoff` waits by default.
    let mut floor = 0.1_f64;
    loop {
        let Ok(mut stream) = TcpStream::connect(address).await else { continue };
        let hello = wire::encode(&ToServer::hello("raw", &Limits::default(), Some(at)));
        stream.write_all(&hello).await.unwrap();
        let first = tokio::time::timeout(LONG, async {
            let length = stream.read_u32().await.ok()?;
            let mut payload = vec![0; length as usize];
            stream.read_exact(&mut payload).await.ok()?;
            wire::decode::<ToClient>(&payload, &Limits::default()).ok()
        })
        .await;
        if let Ok(Some(ToClient::Welcome { .. })) = first {
            *welcomed.lock().unwrap() += 1;
            let mut rest = vec![0; 1 << 16];
            while matches!(stream.read(&mut rest).await, Ok(read) if read > 0) {}
            return;
        }
        let wait = (floor + fastrand::f64() * floor).min(10.0);
        floor = (floor * 2.0).min(5.0);
        tokio::time::sleep(Duration::from_secs_f64(wait)).await;
    }
}

fn round<T: serde::Serialize + serde::de::DeserializeOwned + PartialEq + std::fmt::Debug>(of: &T) {
    let text = serde_json::to_string(of).unwrap();
    let back: T = serde_json::from_str(&text).unwrap_or_else(|error| panic!("{error}: {text}"));
    assert_eq!(*of, back, "{text}");
    let value = serde_json::to_value(of).unwrap();
    let back: T = serde_json::from_value(value).unwrap();
    assert_eq!(*of, back, "{text}");
}

#[actix_rt::test]
async fn statuses_survive_json() {
    let (server, address) = serve(ServerConfig::default(), filled(100)).await;
    let client = follower(address, MemoryStore::new());
    round::<ClientStatus>(&client.status().await.unwrap());
    connect(&client).await;
    server.write("x", "y").await.unwrap();
    round::<ClientStatus>(&client.status().await.unwrap());
    round::<ServerStatus>(&server.status().await.unwrap());
    for follower in server.followers().await.unwrap() {
        round::<FollowerStatus>(&follower);
        let mut other = follower.clone();
        for (reason, seconds) in [
            (tablecast::AbortReason::Held, 0.1),
            (tablecast::AbortReason::Busy, 123_456.789_012_345),
            (tablecast::AbortReason::Walk, 1e-9),
        ] {
            other.lag_time = Duration::from_secs_f64(seconds);
            let last = other.last_diff.as_mut().unwrap();
            last.aborted = Some(reason);
            last.waited = Duration::from_secs_f64(seconds);
            last.elapsed = Duration::new(7_654_321, 123_456_789);
            last.served.writes = u64::MAX;
            round(&other);
        }
    }
    for outcome in [
        DiffOutcome::Aborted(DiffAborted::Server(tablecast::AbortReason::Updated)),
        DiffOutcome::Aborted(DiffAborted::Held { deletes: u64::MAX, keys: 0 }),
        DiffOutcome::Aborted(DiffAborted::Disconnected),
    ] {
        round(&outcome);
    }
    for health in [
        Health::Disconnected,
        Health::Held { writes: u64::MAX, deletes: 1, keys: 2 },
        Health::Diverged { reason: "\u{0}\"".into() },
    ] {
        round(&health);
    }
}

/// The snapshot fails at its end.
#[derive(Clone, Default)]
struct Failing(MemoryStore, Arc<std::sync::atomic::AtomicBool>);

impl Store for Failing {
    fn apply(&mut self, changes: &[Change]) -> Result<(), StoreError> {
        self.0.apply(changes)
    }
    fn reader(&self) -> Arc<dyn Reader> {
        Arc::new(FailingReader(self.0.reader(), self.1.clone()))
    }
}

struct FailingReader(Arc<dyn Reader>, Arc<std::sync::atomic::AtomicBool>);

impl Reader for FailingReader {
    fn get(&self, key: &[u8]) -> Result<Option<Value>, StoreError> {
        self.0.get(key)
    }
    fn len(&self) -> Result<usize, StoreError> {
        self.0.len()
    }
    fn snapshot(&self) -> Box<dyn Iterator<Item = Result<(Key, Value), StoreError>> + Send> {
        let fails = self.1.load(std::sync::atomic::Ordering::Relaxed);
        let end = fails.then(|| Err(StoreError::new("a block that cannot be read")));
        Box::new(self.0.snapshot().chain(end))
    }
}

#[actix_rt::test]
async fn a_store_that_cannot_be_read_is_not_verified() {
    let every = Some(Duration::from_millis(100));
    let config = ServerConfig { verify_every: every, ..ServerConfig::default() };
    let (server, address) = serve(config, filled(100)).await;
    let mut store = Failing::default();
    let client = follower(address, store.clone());
    assert!(connect(&client).await.equal());
    let mut events = client.events().await.unwrap();
    store.1.store(true, std::sync::atomic::Ordering::Relaxed);
    store.0.apply(&[Change::write(key(3), "changed")]).unwrap();
    // What was found is put right all the same.
    event(&mut events, |event| matches!(event, Event::Corrupt { .. }).then_some(())).await;
    event(&mut events, |event| matches!(event, Event::Refused(_)).then_some(())).await;
    let healed = report(&mut events).await;
    assert!(healed.equal() && healed.written == 1, "{healed:?}");
    let head = server.write("x", "y").await.unwrap().position().unwrap();
    client.wait_for(head, LONG).await.unwrap();
    let mut events = client.events().await.unwrap();
    for _ in 0..2 {
        event(&mut events, |event| matches!(event, Event::Refused(_)).then_some(())).await;
    }
    let status = client.status().await.unwrap();
    assert!(status.verified < Some(head.revision), "nobody has read what the store holds");
    assert_eq!(status.corrupt, 1);
    store.1.store(false, std::sync::atomic::Ordering::Relaxed);
    within(async { while client.status().await.unwrap().verified < Some(head.revision) {} }).await;
}

/// Peers that send without a pause, and do not read: what do they hold up?
#[actix_rt::test]
async fn floods_hold_up_neither_others_nor_a_stop() {
    let (server, address) = serve(ServerConfig::default(), filled(100)).await;
    for kind in 0..6 {
        actix_rt::spawn(async move {
            let mut stream = TcpStream::connect(address).await.unwrap();
            let hello = wire::encode(&ToServer::hello("raw", &Limits::default(), None));
            stream.write_all(&hello).await.unwrap();
            let what = match kind % 3 {
                0 => wire::encode(&ToServer::Ping {}).repeat(10_000),
                1 => wire::encode(&ToServer::Pong {}).repeat(10_000),
                _ => vec![0xc1; 60_000],
            };
            while stream.write_all(&what).await.is_ok() {}
        });
    }
    within(async { while server.followers().await.unwrap().len() < 4 {} }).await;
    let client = follower(address, MemoryStore::new());
    assert!(connect(&client).await.equal());
    within(server.stop()).await;
}
