//! Stores that panic or block, transports that fail, servers that lie: what each may end.

use std::io;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex};
use std::time::{Duration, Instant};

use futures_util::FutureExt;
use futures_util::future::BoxFuture;
use tablecast::access::{Access, Stream, tcp::TcpAccess};
use tablecast::{
    Chain, Change, Client, ClientConfig, Epoch, Error, Event, Hash, HeartbeatConfig, Limits,
    MemoryStore, Reader, Revision, Server, ServerConfig, SessionConfig, Store, StoreError,
    WaitError, Way,
};
use tablecast_actors::protocol::wire::{self, Changes};
use tablecast_actors::protocol::{DiffId, Digest, Position, ToClient, ToServer};
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::{TcpListener, TcpStream};

use crate::harness::{
    Gate, LONG, Proxy, assert_converges, connect, disconnected, event, filled, follower, quick,
    report, serve, within,
};

async fn get<M: wire::Message>(stream: &mut TcpStream) -> M {
    let length = within(stream.read_u32()).await.unwrap();
    let mut payload = vec![0; length as usize];
    within(stream.read_exact(&mut payload)).await.unwrap();
    wire::decode(&payload, &Limits::default()).unwrap()
}

async fn put<M: wire::Message>(stream: &mut TcpStream, message: &M) {
    stream.write_all(&wire::encode(message)).await.unwrap();
}

fn welcome(revision: u64) -> ToClient {
    let (epoch, revision) = (Epoch::from_bytes([1; 16]), Revision(revision));
    let at = Position { epoch, revision, chain: Chain::START };
    ToClient::welcome(at, Way::NoPosition, &Limits::default())
}

/// A server by hand, whose follower has just said Hello and been welcomed at `revision`.
async fn by_hand(store: impl Store, revision: u64) -> (Client, TcpStream) {
    let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
    let access = TcpAccess::new(listener.local_addr().unwrap().to_string());
    let client = Client::start(quick(), store, access).unwrap();
    client.ready().await.unwrap();
    let (mut stream, _) = within(listener.accept()).await.unwrap();
    stream.set_nodelay(true).unwrap();
    assert!(matches!(get(&mut stream).await, ToServer::Hello { .. }));
    put(&mut stream, &welcome(revision)).await;
    (client, stream)
}

async fn sync_req(stream: &mut TcpStream) -> (DiffId, Hash, bool) {
    match get(stream).await {
        ToServer::SyncReq { diff, root, full, .. } => (diff, root, full),
        other => panic!("{other:?}"),
    }
}

fn done(diff: DiffId, failed: u64) -> ToClient {
    let chain = Chain::START.tag();
    ToClient::SyncDone { diff, revision: Revision(0), chain, suppressed: 0, failed }
}

/// A diff that finds nothing, but for the roots at its end; that of the follower.
async fn nothing_differs(stream: &mut TcpStream) -> Hash {
    let (diff, root, _) = sync_req(stream).await;
    put(stream, &ToClient::SyncStart { diff }).await;
    put(stream, &ToClient::SyncSeq { diff, writes: 0, deletes: 0 }).await;
    put(stream, &done(diff, 0)).await;
    root
}

fn live(first: u64, key: &'static str, value: Vec<u8>) -> ToClient {
    let changes = Changes(vec![Change::write(key, value)]);
    ToClient::Live { first: Revision(first), before: Chain::START.tag(), changes }
}

/// A store that refuses, panics or is slow while it is told to.
#[derive(Clone, Default)]
struct Odd {
    inner: MemoryStore,
    refuse: Arc<AtomicBool>,
    panic: Arc<AtomicBool>,
    slow: Arc<Mutex<Duration>>,
}

impl Store for Odd {
    fn apply(&mut self, changes: &[Change]) -> Result<(), StoreError> {
        assert!(!self.panic.load(Ordering::SeqCst), "the store panics");
        std::thread::sleep(*self.slow.lock().unwrap());
        if self.refuse.load(Ordering::SeqCst) {
            return Err(StoreError::new("not now"));
        }
        self.inner.apply(changes)
    }

    fn reader(&self) -> Arc<dyn Reader> {
        self.inner.reader()
    }
}

#[actix_rt::test]
async fn a_change_refused_behind_the_mark_is_repaired_although_the_roots_were_equal() {
    let store = Odd::default();
    let (client, mut stream) = by_hand(store.clone(), 0).await;
    let mut events = client.events().await.unwrap();
    let root = nothing_differs(&mut stream).await;
    store.refuse.store(true, Ordering::SeqCst);
    put(&mut stream, &live(1, "k", vec![1])).await;
    put(&mut stream, &ToClient::Verify { revision: Revision(0), root }).await;
    assert!(report(&mut events).await.equal());
    assert!(matches!(get(&mut stream).await, ToServer::Verified { .. }));
    assert_eq!(client.status().await.unwrap().position, None);
    sync_req(&mut stream).await;
}

#[actix_rt::test]
async fn the_diff_behind_a_mismatch_is_at_full_width_whatever_else_was_due() {
    let store = Odd::default();
    store.refuse.store(true, Ordering::SeqCst);
    let (_client, mut stream) = by_hand(store, 0).await;
    let (diff, _, full) = sync_req(&mut stream).await;
    assert!(!full);
    put(&mut stream, &ToClient::SyncStart { diff }).await;
    put(&mut stream, &live(1, "k", vec![])).await;
    put(&mut stream, &ToClient::SyncSeq { diff, writes: 0, deletes: 0 }).await;
    let chain = Chain::START.fold(&Digest::of(&Change::write("k", vec![]))).tag();
    let revision = Revision(1);
    let done = ToClient::SyncDone { diff, revision, chain, suppressed: 0, failed: 0 };
    put(&mut stream, &done).await;
    let root = Hash::from_bytes([9; Hash::BYTES]);
    put(&mut stream, &ToClient::Verify { revision, root }).await;
    // A refused change may have asked for one before the verdict was there.
    let mut abort = async || loop {
        if let ToServer::SyncReq { diff, full, .. } = get(&mut stream).await {
            let reason = tablecast_actors::protocol::AbortReason::Busy;
            put(&mut stream, &ToClient::SyncAbort { diff, reason }).await;
            return full;
        }
    };
    while !abort().await {}
    // One that came to nothing has found nothing.
    assert!(abort().await && abort().await);
}

#[actix_rt::test]
async fn a_store_that_is_found_to_be_wrong_has_no_position_whatever_the_server_says() {
    let mut store = MemoryStore::new();
    let (client, mut stream) = by_hand(store.clone(), 0).await;
    let mut events = client.events().await.unwrap();
    let root = nothing_differs(&mut stream).await;
    put(&mut stream, &ToClient::Verify { revision: Revision(0), root }).await;
    assert!(report(&mut events).await.equal());
    assert!(matches!(get(&mut stream).await, ToServer::Verified { .. }));
    store.apply(&[Change::write("k", "v")]).unwrap();
    put(&mut stream, &ToClient::Mark { revision: Revision(0) }).await;
    // The server's root does not come.
    event(&mut events, |event| matches!(event, Event::Corrupt { .. }).then_some(())).await;
    assert_eq!(client.status().await.unwrap().position, None);
    let (_, found, full) = sync_req(&mut stream).await;
    assert!(found != root && full);
}

#[actix_rt::test]
async fn whoever_changes_a_follower_itself_has_no_position_until_a_diff() {
    let (_server, address) = serve(ServerConfig::default(), filled(10)).await;
    let client = follower(address, MemoryStore::new());
    assert!(connect(&client).await.equal());
    assert!(client.status().await.unwrap().position.is_some());
    client.write("k", "v").await.unwrap();
    assert_eq!(client.status().await.unwrap().position, None);
    client.diff().await.unwrap();
    assert!(client.status().await.unwrap().position.is_some());
}

#[actix_rt::test]
async fn settings_at_their_ends_are_no_panic() {
    for long in [Duration::MAX, Duration::MAX / 2] {
        let heartbeat = HeartbeatConfig { ping_after: long, dead_after: long };
        let session = SessionConfig { diff_stall: long, heartbeat, ..SessionConfig::default() };
        let config = ServerConfig {
            session,
            diff_turn: long,
            diff_rest: long,
            handshake_timeout: long,
            stranger_pause: Duration::ZERO,
            stall_timeout: long,
            verify_every: Some(long),
            ..ServerConfig::default()
        };
        let (server, address) = serve(config, filled(10)).await;
        let access = TcpAccess::new(address.to_string());
        let config = ClientConfig {
            heartbeat,
            diff_every: Some(long),
            inbox_bytes: 0,
            connect_timeout: long,
            ..quick()
        };
        let client = Client::start(config, MemoryStore::new(), access).unwrap();
        assert!(connect(&client).await.equal());
        server.write("k", "v").await.unwrap();
        client.diff().await.unwrap();
        assert_converges(&server, &client).await;
    }
}

#[actix_rt::test]
async fn a_report_counts_the_bytes_up_to_the_end_of_the_diff() {
    let (client, mut stream) = by_hand(MemoryStore::new(), 0).await;
    let mut events = client.events().await.unwrap();
    let (diff, root, _) = sync_req(&mut stream).await;
    let frames = |messages: &[ToClient]| -> Vec<u8> {
        messages.iter().flat_map(|message| wire::encode(message).to_vec()).collect()
    };
    let start = ToClient::SyncStart { diff };
    let sequence = ToClient::SyncSeq { diff, writes: 0, deletes: 0 };
    let counted = frames(&[start, sequence, done(diff, 0)]);
    let verify = ToClient::Verify { revision: Revision(0), root };
    let more = frames(&[live(1, "k", vec![7; 20_000]), verify]);
    stream.write_all(&[&counted[..], &more].concat()).await.unwrap();
    assert_eq!(report(&mut events).await.bytes_received, counted.len() as u64);
}

#[actix_rt::test]
async fn numbers_at_their_end_are_no_panic() {
    // The stream is followed to the last revision that there is.
    let (client, mut stream) = by_hand(MemoryStore::new(), u64::MAX - 1).await;
    sync_req(&mut stream).await;
    put(&mut stream, &live(u64::MAX, "k", vec![])).await;
    put(&mut stream, &ToClient::Ping {}).await;
    assert_eq!(get::<ToServer>(&mut stream).await, ToServer::Pong {});
    client.status().await.unwrap();

    // More failures than a number holds are no success.
    let store = Odd::default();
    store.refuse.store(true, Ordering::SeqCst);
    let (client, mut stream) = by_hand(store, 0).await;
    let mut events = client.events().await.unwrap();
    let (diff, root, _) = sync_req(&mut stream).await;
    put(&mut stream, &ToClient::SyncStart { diff }).await;
    put(&mut stream, &ToClient::SyncSeq { diff, writes: 1, deletes: 0 }).await;
    let writes = Changes(vec![Change::write("a", "b")]);
    let deletes = wire::Raw(bytes::Bytes::new());
    put(&mut stream, &ToClient::Repair { diff, writes, prefix_bytes: 1, deletes }).await;
    put(&mut stream, &done(diff, u64::MAX)).await;
    put(&mut stream, &ToClient::Verify { revision: Revision(0), root }).await;
    assert_eq!(report(&mut events).await.failed, u64::MAX);
    assert_eq!(client.status().await.unwrap().position, None);
}

/// A transport that panics, and counts.
struct Panics(tokio::sync::mpsc::UnboundedSender<Instant>);

impl Access for Panics {
    fn connect(&self) -> BoxFuture<'static, io::Result<Box<dyn Stream>>> {
        self.0.send(Instant::now()).unwrap();
        // A panic without the hook's text on stderr.
        async { std::panic::resume_unwind(Box::new(())) }.boxed()
    }

    fn address(&self) -> String {
        "nowhere".to_owned()
    }
}

#[actix_rt::test]
async fn a_transport_that_panics_is_tried_again_as_slowly_as_one_that_fails() {
    let (sender, mut attempts) = tokio::sync::mpsc::unbounded_channel();
    let wait = Duration::from_millis(20);
    let config = ClientConfig { backoff_min: wait, ..ClientConfig::default() };
    let client = Client::start(config, MemoryStore::new(), Panics(sender)).unwrap();
    client.ready().await.unwrap();
    let first = within(attempts.recv()).await.unwrap();
    for _ in 0..3 {
        within(attempts.recv()).await.unwrap();
    }
    // 20, 40 and 80 ms at the least.
    assert!(first.elapsed() >= 7 * wait, "{:?}", first.elapsed());
    client.status().await.unwrap();
}

#[actix_rt::test]
async fn who_is_cut_off_behind_each_handshake_comes_back_later_each_time() {
    let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
    let access = TcpAccess::new(listener.local_addr().unwrap().to_string());
    let config = ClientConfig { backoff_min: Duration::from_millis(50), ..ClientConfig::default() };
    let client = Client::start(config, MemoryStore::new(), access).unwrap();
    client.ready().await.unwrap();
    let mut ended = None::<Instant>;
    for wait in [0, 50, 100, 200] {
        let (mut stream, _) = within(listener.accept()).await.unwrap();
        let waited = ended.map_or(Duration::ZERO, |ended| ended.elapsed());
        assert!(waited >= Duration::from_millis(wait), "{waited:?} and not {wait} ms");
        assert!(matches!(get(&mut stream).await, ToServer::Hello { .. }));
        put(&mut stream, &welcome(0)).await;
        assert!(matches!(get(&mut stream).await, ToServer::SyncReq { .. }));
        ended = Some(Instant::now());
    }
    assert_eq!(client.status().await.unwrap().connects, 4);
}

#[actix_rt::test]
async fn requests_in_one_piece_are_all_answered() {
    let (_server, address) = serve(ServerConfig::default(), filled(10)).await;
    let mut stream = TcpStream::connect(address).await.unwrap();
    put(&mut stream, &ToServer::hello("raw", &Limits::default(), None)).await;
    assert!(matches!(get(&mut stream).await, ToClient::Welcome { .. }));
    let root = Hash::from_bytes([0; Hash::BYTES]);
    let (diff, max_deletes) = (DiffId(1), 0);
    let request = ToServer::SyncReq { diff, jumps: 0, full: false, root, len: 0, max_deletes };
    let mut all = wire::encode(&ToServer::Ping {}).repeat(100);
    all.extend_from_slice(&wire::encode(&request));
    stream.write_all(&all).await.unwrap();
    // Before the first ping of the server, which would wake whoever sleeps.
    let mut pongs = 0;
    let then = loop {
        match get(&mut stream).await {
            ToClient::Pong {} => pongs += 1,
            then => break then,
        }
    };
    assert_eq!(then, ToClient::SyncStart { diff });
    assert!((1..=100).contains(&pongs), "{pongs} answers");
}

#[actix_rt::test]
async fn a_slow_store_is_not_taken_for_a_dead_follower() {
    let heartbeat = HeartbeatConfig {
        ping_after: Duration::from_millis(100),
        dead_after: Duration::from_millis(400),
    };
    let session = SessionConfig { heartbeat, ..SessionConfig::default() };
    let config = ServerConfig { session, ..ServerConfig::default() };
    let (server, address) = serve(config, MemoryStore::new()).await;
    let store = Odd::default();
    let config = ClientConfig { heartbeat, ..quick() };
    let access = TcpAccess::new(address.to_string());
    let client = Client::start(config, store.clone(), access).unwrap();
    assert!(connect(&client).await.equal());
    *store.slow.lock().unwrap() = Duration::from_millis(1);
    // More than a second of work, most of it in one turn of the Client.
    for number in 0..1000 {
        server.write(format!("{number}"), "v").await.unwrap();
    }
    assert_converges(&server, &client).await;
    assert_eq!(client.status().await.unwrap().connects, 1);
}

#[actix_rt::test]
async fn a_server_whose_store_panics_leaves_its_followers_in_no_doubt() {
    let store = Odd { inner: filled(10), ..Odd::default() };
    let (server, address) = serve(ServerConfig::default(), store.clone()).await;
    let client = follower(address, MemoryStore::new());
    assert!(connect(&client).await.equal());
    let mut events = client.events().await.unwrap();
    store.panic.store(true, Ordering::SeqCst);
    assert!(matches!(server.write("k", "v").await, Err(Error::Stopped)));
    let why = event(&mut events, disconnected);
    assert_eq!(why.await, "peer left: internal failure: the server failed");
    assert_eq!(client.reader().len().unwrap(), 10);
    within(server.stop()).await;
}

#[actix_rt::test]
async fn a_client_whose_store_panics_takes_its_connection_with_it() {
    let store = Odd::default();
    let (client, mut stream) = by_hand(store.clone(), 0).await;
    sync_req(&mut stream).await;
    store.panic.store(true, Ordering::SeqCst);
    put(&mut stream, &live(1, "k", vec![])).await;
    let end = within(stream.read_u8()).await;
    assert!(end.is_err(), "{end:?}");
    assert!(matches!(client.status().await, Err(Error::Stopped)));
}

#[actix_rt::test]
async fn stopping_flushes_closes_all_and_frees_the_address() {
    for round in 0..20 {
        let (server, address) = serve(ServerConfig::default(), MemoryStore::new()).await;
        let client = follower(address, MemoryStore::new());
        assert!(connect(&client).await.equal());
        let mut events = client.events().await.unwrap();
        let mut stranger = TcpStream::connect(address).await.unwrap();
        for _ in 0..200 {
            server.write("filler", vec![1; 1000]).await.unwrap();
        }
        server.write("last", "value").await.unwrap();
        let handle = server.clone();
        within(server.stop()).await;
        std::net::TcpListener::bind(address).unwrap();
        let why = event(&mut events, disconnected).await;
        let last = client.reader().get(b"last").unwrap();
        assert!(last.is_some(), "lost in round {round}: {why}");
        // Told so, or closed before it was accepted.
        let mut said = Vec::new();
        let _ = within(stranger.read_to_end(&mut said)).await;
        drop(handle);
    }
}

#[actix_rt::test]
async fn stopping_waits_for_no_follower_that_does_not_read() {
    let (server, address) = serve(ServerConfig::default(), MemoryStore::new()).await;
    let proxy = Proxy::start(address).await;
    let client = follower(proxy.address, MemoryStore::new());
    assert!(connect(&client).await.equal());
    proxy.set(Gate::Stopped);
    for _ in 0..20 {
        server.write("k", vec![0; 1 << 20]).await.unwrap();
    }
    within(server.stop()).await;
}

#[actix_rt::test]
async fn a_wait_is_for_a_revision_of_one_history() {
    let (old, address) = serve(ServerConfig::default(), MemoryStore::new()).await;
    let proxy = Proxy::start(address).await;
    let client = follower(proxy.address, MemoryStore::new());
    assert!(connect(&client).await.equal());
    let mut reached = None;
    for _ in 0..10 {
        reached = old.write("old", "1").await.unwrap().position();
    }
    let reached = reached.unwrap();
    client.wait_for(reached, LONG).await.unwrap();
    // The follower does not know yet that another server took over.
    proxy.set(Gate::Stopped);
    within(old.stop()).await;
    let new = Server::start(ServerConfig::default(), MemoryStore::new()).unwrap();
    new.listen(address).unwrap();
    new.ready().await.unwrap();
    let at = new.write("new", "1").await.unwrap().position().unwrap();
    assert!(at.revision < reached.revision);
    let never = Position { revision: Revision(100), ..reached };
    let waits = futures_util::future::join(client.wait_for(at, LONG), client.wait_for(never, LONG));
    proxy.set(Gate::Open);
    let (written, never) = within(waits).await;
    assert_eq!(written.unwrap().epoch, at.epoch);
    assert!(client.reader().get(b"new").unwrap().is_some());
    let gone = WaitError::NewEpoch(at.epoch);
    assert!(matches!(never, Err(Error::Wait(why)) if why == gone), "{never:?}");
    let short = Duration::from_millis(1);
    let late = client.wait_for(Position { revision: Revision(100), ..at }, short).await;
    assert!(matches!(late, Err(Error::Wait(WaitError::Timeout(_)))), "{late:?}");
}

#[test]
fn handles_outlive_the_system_of_their_thread() {
    let system = actix_rt::System::new();
    system.block_on(async { actix_rt::System::current().stop() });
    system.run().unwrap();
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().unwrap();
    runtime.block_on(async {
        let config = ServerConfig { event_capacity: 0, diffs_at_once: 0, ..Default::default() };
        let (server, address) = serve(config, filled(10)).await;
        let client = follower(address, MemoryStore::new());
        assert!(connect(&client).await.equal());
        client.stop().await;
        within(server.stop()).await;
    });
}

#[actix_rt::test]
async fn a_socket_that_takes_nothing_is_given_up() {
    let stall_timeout = Duration::from_millis(100);
    let config = ServerConfig { stall_timeout, ..ServerConfig::default() };
    let (server, address) = serve(config, MemoryStore::new()).await;
    // Says that it is there, and reads nothing.
    let mut stream = TcpStream::connect(address).await.unwrap();
    put(&mut stream, &ToServer::hello("raw", &Limits::default(), None)).await;
    assert!(matches!(get(&mut stream).await, ToClient::Welcome { .. }));
    for _ in 0..40 {
        server.write("k", vec![0; 1 << 20]).await.unwrap();
    }
    within(async {
        let ping = wire::encode(&ToServer::Ping {});
        while stream.write_all(&ping).await.is_ok() {
            tokio::task::yield_now().await;
            if server.followers().await.unwrap().is_empty() {
                return;
            }
        }
    })
    .await;
}

#[actix_rt::test]
async fn ready_means_equal_since_the_connect() {
    let (_server, address) = serve(ServerConfig::default(), filled(20_000)).await;
    let client = follower(address, MemoryStore::new());
    let early = client.wait_ready(Duration::from_millis(1)).await;
    assert!(matches!(early, Err(Error::Wait(WaitError::Timeout(_)))), "{early:?}");
    client.ready().await.unwrap();
    client.wait_ready(LONG).await.unwrap();
    assert_eq!(client.reader().len().unwrap(), 20_000);
}
