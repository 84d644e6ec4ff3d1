//! What a peer can make this end hold, as the process has it: so there is one test here, alone in its process.

#![allow(missing_docs, clippy::unwrap_used, reason = "tests may panic")]
#![cfg(target_os = "linux")]

#[path = "../it/by_hand.rs"]
mod by_hand;

use std::sync::mpsc;

use actix::prelude::*;
use by_hand::{by_hand, read, welcome};
use tablecast_actors::ClientConfig;
use tablecast_actors::client::{Client, GetStatus, Ready};
use tablecast_actors::protocol::wire;
use tablecast_actors::protocol::{MemoryStore, Replica, ToClient, ToServer};
use tokio::io::AsyncWriteExt;

const MESSAGES: usize = 1 << 20;

/// Written at once.
const AT_ONCE: usize = 1 << 10;

/// A message that waits is of some 100 bytes: they would be ten times as many.
const HELD_KB: usize = 16 << 10;

fn resident_kb() -> usize {
    let status = std::fs::read_to_string("/proc/self/status").unwrap();
    let line = status.lines().find_map(|line| line.strip_prefix("VmRSS:")).unwrap();
    line.trim().trim_end_matches(" kB").parse().unwrap()
}

#[actix_rt::test]
async fn what_is_said_to_a_follower_whose_store_blocks_is_not_kept() {
    let (access, mut connected) = by_hand();
    let (table, connection) = (Arbiter::new(), Arbiter::new().handle());
    let client = Client::start_in_arbiter(&table.handle(), |_| {
        let replica = Replica::open(MemoryStore::new()).unwrap();
        Client::new(replica, access, ClientConfig::default()).with_connection_on(connection)
    });
    client.send(Ready).await.unwrap();
    let mut stream = welcome(&mut connected).await;
    // So it has read that.
    let asked = read(&mut stream).await;
    assert!(matches!(asked, ToServer::SyncReq { .. }), "{asked:?}");

    let (blocked, is_blocked) = tokio::sync::oneshot::channel();
    let (release, released) = mpsc::channel();
    table.spawn_fn(move || {
        blocked.send(()).unwrap();
        released.recv().unwrap();
    });
    is_blocked.await.unwrap();
    let before = resident_kb();
    // What is answered is not read.
    for message in [ToClient::Ping {}, ToClient::Pong {}] {
        let messages = wire::encode(&message).repeat(AT_ONCE);
        for _ in 0..MESSAGES / AT_ONCE {
            stream.write_all(&messages).await.unwrap();
        }
    }
    let grown = resident_kb().saturating_sub(before);
    release.send(()).unwrap();
    let status = client.send(GetStatus).await.unwrap();
    assert_eq!(status.connects, 1, "{status:?}");
    assert!(grown < HELD_KB, "{MESSAGES} of each: {grown} kB more");
    let pong = read(&mut stream).await;
    assert!(matches!(pong, ToServer::Pong {}), "{pong:?}");
}
