//! Panics in every actor, and in what users give them: what ends, what goes on, and that nothing is carried on half.
//! (A decision that panics is in `authorize.rs`, a transport that panics as it connects in `faults.rs`, a walk beside
//! the Differ.)

use std::io;
use std::panic::resume_unwind;
use std::pin::Pin;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use std::task::{Context, Poll, ready};
use std::time::Duration;

use futures_util::FutureExt;
use futures_util::future::BoxFuture;
use tablecast::access::{Access, Incoming, Listener, Stream, memory, tcp::TcpAccess};
use tablecast::{
    Change, Client, Error, Key, MemoryStore, Reader, Revision, Server, ServerConfig, Store,
    StoreError, Value, WaitError, Way,
};
use tokio::io::{AsyncRead, AsyncWrite, ReadBuf};

use crate::harness::{
    LONG, assert_converges, connect, disconnected, entries, event, filled, follower, quick, report,
    serve, within,
};

/// Without the hook's text on stderr.
fn panic_if(flag: &AtomicBool) {
    if flag.load(Ordering::SeqCst) {
        resume_unwind(Box::new("as told"));
    }
}

/// A store that panics where it is told to: half-way through a frame or batch, when it is read, when somebody begins to go
/// through it, or while that is done.
#[derive(Clone, Default)]
struct Panics {
    inner: MemoryStore,
    apply: Arc<AtomicBool>,
    get: Arc<AtomicBool>,
    snapshot: Arc<AtomicBool>,
    next: Arc<AtomicBool>,
}

impl Store for Panics {
    fn apply(&mut self, changes: &[Change]) -> Result<(), StoreError> {
        let (first, others) = changes.split_at(changes.len().min(1));
        self.inner.apply(first)?;
        panic_if(&self.apply);
        self.inner.apply(others)
    }

    fn reader(&self) -> Arc<dyn Reader> {
        Arc::new(self.clone())
    }
}

impl Reader for Panics {
    fn get(&self, key: &[u8]) -> Result<Option<Value>, StoreError> {
        panic_if(&self.get);
        self.inner.get(key)
    }

    fn len(&self) -> Result<usize, StoreError> {
        self.inner.len()
    }

    fn snapshot(&self) -> Box<dyn Iterator<Item = Result<(Key, Value), StoreError>> + Send> {
        panic_if(&self.snapshot);
        let next = Arc::clone(&self.next);
        Box::new(self.inner.snapshot().inspect(move |_| panic_if(&next)))
    }
}

/// A connection that panics at the n-th read that brings something, if n is not 0.
struct Breaks {
    stream: Box<dyn Stream>,
    left: Arc<AtomicUsize>,
}

impl AsyncRead for Breaks {
    fn poll_read(
        mut self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        buffer: &mut ReadBuf<'_>,
    ) -> Poll<io::Result<()>> {
        ready!(Pin::new(&mut self.stream).poll_read(cx, buffer))?;
        let left = self.left.load(Ordering::SeqCst);
        self.left.store(left.saturating_sub(1), Ordering::SeqCst);
        if left == 1 {
            resume_unwind(Box::new("as told"));
        }
        Poll::Ready(Ok(()))
    }
}

impl AsyncWrite for Breaks {
    fn poll_write(
        mut self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        bytes: &[u8],
    ) -> Poll<io::Result<usize>> {
        Pin::new(&mut self.stream).poll_write(cx, bytes)
    }

    fn poll_flush(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.stream).poll_flush(cx)
    }

    fn poll_shutdown(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.stream).poll_shutdown(cx)
    }
}

/// Either end of such a connection.
struct Broken<T>(T, Arc<AtomicUsize>);

impl Listener for Broken<memory::MemoryListener> {
    fn accept(&mut self) -> BoxFuture<'_, io::Result<Incoming>> {
        let left = Arc::clone(&self.1);
        let wrap =
            |stream| async { Ok((Box::new(Breaks { stream, left }) as Box<dyn Stream>, None)) };
        self.0.accept().map(|incoming| Ok(incoming?.with_handshake(wrap))).boxed()
    }

    fn address(&self) -> String {
        self.0.address()
    }
}

impl Access for Broken<memory::MemoryAccess> {
    fn connect(&self) -> BoxFuture<'static, io::Result<Box<dyn Stream>>> {
        let left = Arc::clone(&self.1);
        let stream = self.0.connect();
        async { Ok(Box::new(Breaks { stream: stream.await?, left }) as Box<dyn Stream>) }.boxed()
    }

    fn address(&self) -> String {
        self.0.address()
    }
}

#[actix_rt::test]
async fn a_middleman_of_the_server_that_panics_ends_its_connection_and_gives_its_diff_back() {
    let config = ServerConfig { diffs_at_once: 1, ..ServerConfig::default() };
    let (server, address) = serve(config, filled(1000)).await;
    let other = follower(address, MemoryStore::new());
    assert!(connect(&other).await.equal());
    // Hello, SyncReq, SyncResponse: in the middle of the walk.
    let (listener, access) = memory::pair();
    server.listen_on(Broken(listener, Arc::new(AtomicUsize::new(3))));
    let client = Client::start(quick(), filled(500), access).unwrap();
    let mut events = client.events().await.unwrap();
    client.ready().await.unwrap();
    event(&mut events, disconnected).await;
    // It is the only diff at a time, so the one that was cut has given its place back.
    assert!(report(&mut events).await.equal());
    assert_eq!(client.status().await.unwrap().connects, 2);
    server.write("k", "v").await.unwrap();
    for client in [&client, &other] {
        assert_converges(&server, client).await;
    }
    assert_eq!(other.status().await.unwrap().connects, 1);
    assert_eq!(server.followers().await.unwrap().len(), 2);
}

#[actix_rt::test]
async fn a_middleman_of_the_client_that_panics_is_replaced_and_resumes() {
    let (server, _) = serve(ServerConfig::default(), filled(10)).await;
    let (listener, access) = memory::pair();
    server.listen_on(listener);
    let left = Arc::new(AtomicUsize::new(0));
    let access = Broken(access, Arc::clone(&left));
    let client = Client::start(quick(), MemoryStore::new(), access).unwrap();
    assert!(connect(&client).await.equal());
    let mut events = client.events().await.unwrap();
    left.store(1, Ordering::SeqCst);
    server.write("k", "v").await.unwrap();
    assert_eq!(event(&mut events, disconnected).await, "the connection failed");
    assert_converges(&server, &client).await;
    let status = client.status().await.unwrap();
    assert_eq!((status.connects, status.way), (2, Some(Way::Resumed)));
}

#[actix_rt::test]
async fn a_server_whose_store_panics_when_it_is_read_ends_and_frees_its_address() {
    let store = Panics { inner: filled(10), ..Panics::default() };
    let (server, address) = serve(ServerConfig::default(), store.clone()).await;
    let client = follower(address, filled(5));
    let mut events = client.events().await.unwrap();
    store.get.store(true, Ordering::SeqCst);
    // For the repair.
    client.ready().await.unwrap();
    let why = event(&mut events, disconnected).await;
    assert_eq!(why, "peer left: internal failure: the server failed");
    assert!(matches!(server.write("k", "v").await, Err(Error::Stopped)));
    assert_eq!(client.reader().len().unwrap(), 5);
    // Nobody is let in any more who would wait for it.
    within(async {
        while std::net::TcpListener::bind(address).is_err() {
            tokio::task::yield_now().await;
        }
    })
    .await;
    within(server.stop()).await;
}

#[actix_rt::test]
async fn half_a_batch_reaches_nobody() {
    let store = Panics { inner: filled(10), ..Panics::default() };
    let (server, address) = serve(ServerConfig::default(), store.clone()).await;
    let client = follower(address, MemoryStore::new());
    assert!(connect(&client).await.equal());
    let mut events = client.events().await.unwrap();
    store.apply.store(true, Ordering::SeqCst);
    let batch = vec![Change::write("first", "1"), Change::write("second", "1")];
    assert!(matches!(server.batch(batch).await, Err(Error::Stopped)));
    event(&mut events, disconnected).await;
    assert_eq!(entries(&**client.reader()), entries(&filled(10)));
    // What the store holds now is the table of whoever goes on with it, in another history.
    store.apply.store(false, Ordering::SeqCst);
    within(server.stop()).await;
    let server = Server::start(ServerConfig::default(), store).unwrap();
    server.listen(address).unwrap();
    server.ready().await.unwrap();
    assert!(report(&mut events).await.equal());
    assert_converges(&server, &client).await;
    assert_eq!(client.status().await.unwrap().way, Some(Way::OtherEpoch));
}

/// A server, and a follower with this store that is equal to it.
async fn pair(store: &Panics) -> (Server, std::net::SocketAddr, Client) {
    let verify_every = Some(Duration::from_millis(20));
    let config = ServerConfig { verify_every, ..ServerConfig::default() };
    let (server, address) = serve(config, filled(10)).await;
    let client = follower(address, store.clone());
    assert!(connect(&client).await.equal());
    (server, address, client)
}

#[actix_rt::test]
async fn a_client_whose_store_panics_ends_alone_and_the_next_one_heals_the_table() {
    let flags: [fn(&Panics) -> &AtomicBool; 3] =
        [|store| &store.apply, |store| &store.get, |store| &store.snapshot];
    for (number, flag) in flags.into_iter().enumerate() {
        let store = Panics::default();
        let (server, address, client) = pair(&store).await;
        let other = follower(address, MemoryStore::new());
        assert!(connect(&other).await.equal());
        let head = server.status().await.unwrap().position.unwrap();
        let never = tablecast::Position { revision: Revision(100), ..head };
        flag(&store).store(true, Ordering::SeqCst);
        match number {
            0 => drop(
                server.batch((0..2).map(|n| Change::write(format!("{n}"), "v")).collect()).await,
            ),
            // It is looked up when it is found to be another.
            1 => store.inner.clone().apply(&[Change::write("odd", "one")]).unwrap(),
            // The next time it is looked through.
            _ => {}
        }
        // Whoever waits is told.
        let waited = within(client.wait_for(never, LONG)).await;
        let told = matches!(waited, Err(Error::Stopped | Error::Wait(WaitError::Stopped)));
        assert!(told, "{waited:?}");
        assert!(matches!(client.status().await, Err(Error::Stopped)));
        within(async {
            while server.followers().await.unwrap().len() > 1 {
                tokio::task::yield_now().await;
            }
        })
        .await;
        server.write("k", "v").await.unwrap();
        assert_converges(&server, &other).await;
        assert_eq!(other.status().await.unwrap().connects, 1);
        // Half a frame was applied, or something was changed: a diff finds it.
        flag(&store).store(false, Ordering::SeqCst);
        let access = TcpAccess::new(address.to_string());
        let client = Client::start(quick(), store, access).unwrap();
        assert!(connect(&client).await.equal());
        assert_eq!(client.status().await.unwrap().way, Some(Way::NoPosition));
        assert_converges(&server, &client).await;
    }
}

#[actix_rt::test]
async fn a_look_through_the_store_that_panics_ends_the_connection_and_no_more() {
    let store = Panics::default();
    let (server, _, client) = pair(&store).await;
    let mut events = client.events().await.unwrap();
    store.next.store(true, Ordering::SeqCst);
    assert_eq!(event(&mut events, disconnected).await, "internal failure: no root");
    store.next.store(false, Ordering::SeqCst);
    server.write("k", "v").await.unwrap();
    assert_converges(&server, &client).await;
}
