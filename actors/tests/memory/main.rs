//! What a peer can make this end hold, as the process has it: so there is one test here, alone in its process.

#![allow(missing_docs, clippy::unwrap_used, reason = "tests may panic")]
#![cfg(target_os = "linux")]

use std::io;
use std::sync::mpsc;

use actix::prelude::*;
use futures_util::FutureExt;
use futures_util::future::BoxFuture;
use tablecast_actors::ClientConfig;
use tablecast_actors::access::{Access, Stream};
use tablecast_actors::client::{Client, GetStatus, Ready};
use tablecast_actors::protocol::tree::TREE_VERSION;
use tablecast_actors::protocol::wire::{self, HEADER_BYTES, VERSION};
use tablecast_actors::protocol::{
    Chain, Epoch, Limits, MemoryStore, Replica, Revision, ToClient, ToServer, Way,
};
use tokio::io::{AsyncReadExt, AsyncWriteExt, DuplexStream};

const PINGS: usize = 1 << 20;

/// Written at once.
const AT_ONCE: usize = 1 << 10;

/// A message that waits is of some 100 bytes: they would be five times as many.
const HELD_KB: usize = 16 << 10;

/// A server by hand: what it is to do is done with the other end.
struct ByHand(tokio::sync::mpsc::UnboundedSender<DuplexStream>);

impl Access for ByHand {
    fn connect(&self) -> BoxFuture<'static, io::Result<Box<dyn Stream>>> {
        let (theirs, ours) = tokio::io::duplex(64 << 10);
        let refused = |_| io::Error::from(io::ErrorKind::ConnectionRefused);
        let sent = self.0.send(ours).map_err(refused);
        async { sent.map(|()| Box::new(theirs) as Box<dyn Stream>) }.boxed()
    }

    fn address(&self) -> String {
        "by hand".to_owned()
    }
}

fn resident_kb() -> usize {
    let status = std::fs::read_to_string("/proc/self/status").unwrap();
    let line = status.lines().find_map(|line| line.strip_prefix("VmRSS:")).unwrap();
    line.trim().trim_end_matches(" kB").parse().unwrap()
}

#[actix_rt::test]
async fn pings_to_a_follower_whose_store_blocks_are_answered_and_not_kept() {
    let (sender, mut connected) = tokio::sync::mpsc::unbounded_channel();
    let (table, connection) = (Arbiter::new(), Arbiter::new().handle());
    let client = Client::start_in_arbiter(&table.handle(), |_| {
        let replica = Replica::open(MemoryStore::new()).unwrap();
        Client::new(replica, ByHand(sender), ClientConfig::default()).with_connection_on(connection)
    });
    client.send(Ready).await.unwrap();

    let mut stream = connected.recv().await.unwrap();
    let length = usize::try_from(stream.read_u32().await.unwrap()).unwrap();
    stream.read_exact(&mut vec![0; length]).await.unwrap();
    let limits = Limits::default();
    let welcome = ToClient::Welcome {
        version: VERSION,
        tree: TREE_VERSION,
        epoch: Epoch::from_bytes([1; 16]),
        revision: Revision::ZERO,
        chain: Chain::START,
        frame_bytes: limits.frame_bytes as u64,
        key_bytes: limits.key_bytes as u64,
        value_bytes: limits.value_bytes as u64,
        way: Way::NoPosition,
    };
    stream.write_all(&wire::encode(&welcome)).await.unwrap();
    // It asks for a diff, so it has read that.
    let length = usize::try_from(stream.read_u32().await.unwrap()).unwrap();
    stream.read_exact(&mut vec![0; length]).await.unwrap();

    let (blocked, is_blocked) = tokio::sync::oneshot::channel();
    let (release, released) = mpsc::channel();
    table.spawn_fn(move || {
        blocked.send(()).unwrap();
        released.recv().unwrap();
    });
    is_blocked.await.unwrap();
    let before = resident_kb();
    let (mut reader, mut writer) = tokio::io::split(stream);
    let pings = wire::encode(&ToClient::Ping {}).repeat(AT_ONCE);
    let mut pongs = wire::encode(&ToServer::Pong {}).repeat(AT_ONCE);
    assert!(pongs.len() > HEADER_BYTES * AT_ONCE);
    for _ in 0..PINGS / AT_ONCE {
        let (written, read) = tokio::join!(writer.write_all(&pings), reader.read_exact(&mut pongs));
        written.and(read).unwrap();
    }
    let grown = resident_kb().saturating_sub(before);
    release.send(()).unwrap();
    let status = client.send(GetStatus).await.unwrap();
    assert_eq!(status.connects, 1, "{status:?}");
    assert!(grown < HELD_KB, "{PINGS} pings: {grown} kB more");
}
