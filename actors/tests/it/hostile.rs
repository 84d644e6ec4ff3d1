//! A server that means harm.

use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::{Arc, Mutex, PoisonError, mpsc};

use actix::prelude::*;
use tablecast_actors::ClientConfig;
use tablecast_actors::client::{Client, GetStatus, Ready};
use tablecast_actors::protocol::{
    Chain, Change, Key, MemoryStore, Reader, Reason, Replica, Revision, Store, StoreError,
    ToClient, ToServer, Value,
};
use tokio::io::AsyncWriteExt;

use crate::by_hand::{by_hand, read, welcome, write};
use crate::connection::follower;
use crate::filled;

const ROUNDS: u32 = 20;

type Entries = Box<dyn Iterator<Item = Result<(Key, Value), StoreError>> + Send>;

/// A store whose snapshots, but for the first, come to nothing while it is locked.
struct Slow {
    inner: MemoryStore,
    opened: Arc<AtomicUsize>,
    lock: Arc<Mutex<()>>,
    alive: Arc<()>,
}

impl Store for Slow {
    fn apply(&mut self, changes: &[Change]) -> Result<(), StoreError> {
        self.inner.apply(changes)
    }

    fn reader(&self) -> Arc<dyn Reader> {
        let Self { inner, opened, lock, alive } = self;
        let (inner, opened) = (inner.clone(), Arc::clone(opened));
        Arc::new(Self { inner, opened, lock: Arc::clone(lock), alive: Arc::clone(alive) })
    }
}

impl Reader for Slow {
    fn get(&self, key: &[u8]) -> Result<Option<Value>, StoreError> {
        self.inner.get(key)
    }

    fn len(&self) -> Result<usize, StoreError> {
        Reader::len(&self.inner)
    }

    fn snapshot(&self) -> Entries {
        let entries = self.inner.snapshot();
        if self.opened.fetch_add(1, Ordering::Relaxed) == 0 {
            return entries;
        }
        let (lock, alive) = (Arc::clone(&self.lock), Arc::clone(&self.alive));
        Box::new(entries.inspect(move |_| {
            drop(lock.lock().unwrap_or_else(PoisonError::into_inner));
            let _ = &alive;
        }))
    }
}

#[actix_rt::test]
async fn a_table_is_looked_through_once_at_a_time_whatever_a_server_says() {
    let (alive, lock) = (Arc::new(()), Arc::new(Mutex::new(())));
    let (inner, opened) = (filled(100), Arc::default());
    let store = Slow { inner, opened, lock: Arc::clone(&lock), alive: Arc::clone(&alive) };
    let (access, mut connected) = by_hand();
    let replica = Replica::open(store).unwrap();
    let client = Client::new(replica, access, ClientConfig::default()).start();
    // The store, its reader, and this.
    let before = Arc::strong_count(&alive);
    client.send(Ready).await.unwrap();
    let mut stream = welcome(&mut connected).await;

    let (release, released) = mpsc::channel::<()>();
    let (locked, is_locked) = mpsc::channel();
    std::thread::spawn(move || {
        let _locked = lock.lock().unwrap_or_else(PoisonError::into_inner);
        locked.send(()).unwrap();
        released.recv().unwrap_err()
    });
    is_locked.recv().unwrap();
    let mut most = 0;
    for jumps in 1..=ROUNDS {
        let ToServer::SyncReq { diff, root, .. } = read(&mut stream).await else { panic!() };
        let (revision, chain) = (Revision::ZERO, Chain::START);
        let done =
            ToClient::SyncDone { diff, revision, chain: chain.tag(), suppressed: 0, failed: 0 };
        write(&mut stream, &ToClient::SyncStart { diff }).await;
        write(&mut stream, &ToClient::SyncSeq { diff, writes: 0, deletes: 0 }).await;
        write(&mut stream, &done).await;
        write(&mut stream, &ToClient::Verify { revision, root }).await;
        let equal = read(&mut stream).await;
        assert!(matches!(equal, ToServer::Verified { .. }), "{equal:?}");
        // Nobody waits for what comes of it.
        write(&mut stream, &ToClient::Mark { revision }).await;
        write(&mut stream, &ToClient::FellBehind { jumps, revision, chain }).await;
        client.send(GetStatus).await.unwrap();
        most = most.max(Arc::strong_count(&alive) - before);
    }
    drop(release);
    // The one that is read, and the newest; and what is being dropped, on another thread.
    assert!((2..6).contains(&most), "{most} snapshots at once");
    assert_eq!(client.send(GetStatus).await.unwrap().verified, Some(Revision::ZERO));
}

#[actix_rt::test]
async fn a_frame_that_is_too_long_is_told() {
    let config = ClientConfig::default();
    let (_client, _connected, mut stream) = follower(MemoryStore::new(), config).await;
    let asked = read(&mut stream).await;
    assert!(matches!(asked, ToServer::SyncReq { .. }), "{asked:?}");
    stream.write_u32(u32::MAX).await.unwrap();
    let ToServer::Farewell { reason, text } = read(&mut stream).await else { panic!() };
    assert_eq!(reason, Reason::Protocol);
    assert!(text.contains("4294967295 bytes") && text.contains("9437184"), "{text}");
}
