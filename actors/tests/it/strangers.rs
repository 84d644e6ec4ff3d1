//! Connections that do not become followers.

use std::time::Duration;

use tablecast_actors::ServerConfig;
use tablecast_actors::access::{Access, Stream, memory};
use tablecast_actors::protocol::wire::{self, HEADER_BYTES};
use tablecast_actors::protocol::{Epoch, Limits, MemoryStore, Table, ToClient, ToServer};
use tablecast_actors::server::{Endpoint, Ready};
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::time::Instant;

const PAUSE: Duration = Duration::from_secs(3600);

async fn subscribe(access: &impl Access) -> (Box<dyn Stream>, Duration) {
    let start = Instant::now();
    let mut stream = access.connect().await.unwrap();
    let hello = ToServer::hello("", &Limits::default(), None);
    stream.write_all(&wire::encode(&hello)).await.unwrap();
    let mut header = [0; HEADER_BYTES];
    stream.read_exact(&mut header).await.unwrap();
    let mut payload = vec![0; u32::from_be_bytes(header) as usize];
    stream.read_exact(&mut payload).await.unwrap();
    let message = wire::decode(&payload, &Limits::default()).unwrap();
    assert!(matches!(message, ToClient::Welcome { .. }), "{message:?}");
    (stream, start.elapsed())
}

#[actix_rt::test]
async fn who_comes_behind_them_waits_a_moment() {
    // An hour is over as soon as there is nothing else to do.
    tokio::time::pause();
    let table = Table::open(MemoryStore::new(), Limits::default()).unwrap();
    let config = ServerConfig { stranger_pause: PAUSE, ..ServerConfig::default() };
    let endpoint = Endpoint::start_here(table, config);
    let (listener, access) = memory::pair();
    endpoint.listen(listener);
    endpoint.server().send(Ready(Epoch::from_bytes([1; 16]))).await.unwrap();

    let (first, waited) = subscribe(&access).await;
    assert!(waited < PAUSE, "{waited:?}");
    drop(first);
    for _ in 0..2 {
        let mut stranger = access.connect().await.unwrap();
        stranger.write_all(&[0xff; 100]).await.unwrap();
        stranger.read_to_end(&mut Vec::new()).await.unwrap();
    }
    // Once for each of them.
    for _ in 0..2 {
        let (_stream, waited) = subscribe(&access).await;
        assert!((PAUSE..2 * PAUSE).contains(&waited), "{waited:?}");
    }
    let (_last, waited) = subscribe(&access).await;
    assert!(waited < PAUSE, "{waited:?}");
}
