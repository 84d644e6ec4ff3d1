//! Each end asks whether the other one is there as often as it says.

use tablecast_actors::protocol::wire::{self, Message};
use tablecast_actors::protocol::{HeartbeatConfig, MemoryStore, ToClient, ToServer};
use tablecast_actors::{ClientConfig, ServerConfig};
use tokio::io::{AsyncRead, AsyncWrite, AsyncWriteExt};
use tokio::time::Instant;

use crate::by_hand::read;
use crate::connection::{follower, serve, subscribe};

/// Answers every Ping at once, and does not say anything else.
async fn pings<M: Message + PartialEq>(
    mut stream: impl AsyncRead + AsyncWrite + Unpin,
    ping: M,
    pong: impl Message,
) {
    let HeartbeatConfig { ping_after, .. } = HeartbeatConfig::default();
    let mut last = Instant::now();
    for number in 0..4 {
        assert!(read::<M>(&mut stream).await == ping);
        let asked = last.elapsed();
        assert!((ping_after..ping_after.mul_f64(1.1)).contains(&asked), "{number}: {asked:?}");
        last = Instant::now();
        stream.write_all(&wire::encode(&pong)).await.unwrap();
    }
}

#[actix_rt::test]
async fn a_server_asks_again_as_long_behind_every_answer() {
    tokio::time::pause();
    let config = ServerConfig { verify_every: None, ..ServerConfig::default() };
    let (_endpoint, access) = serve(config).await;
    pings(subscribe(&access).await, ToClient::Ping {}, ToServer::Pong {}).await;
}

#[actix_rt::test]
async fn so_does_a_follower() {
    tokio::time::pause();
    let config = ClientConfig::default();
    let (_client, _connected, mut stream) = follower(MemoryStore::new(), config).await;
    let asked = read(&mut stream).await;
    assert!(matches!(asked, ToServer::SyncReq { .. }), "{asked:?}");
    pings(stream, ToServer::Ping {}, ToClient::Pong {}).await;
}
