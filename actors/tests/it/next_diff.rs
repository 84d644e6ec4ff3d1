//! When a follower asks for another diff, and for which.

use actix::prelude::*;
use tablecast_actors::client::{Client, GetStatus};
use tablecast_actors::protocol::wire::{Changes, Raw};
use tablecast_actors::protocol::{Chain, DiffId, Reason, Revision, ToClient, ToServer};
use tablecast_actors::{ClientConfig, Health, MassDelete, compute_here};
use tokio::io::DuplexStream;
use tokio::sync::mpsc;
use tokio::time::Instant;

use crate::by_hand::{read, welcome, write};
use crate::connection::follower;
use crate::filled;

/// A follower of ten thousand keys, of which a repair may delete one; its server is done by hand.
async fn connected() -> (Addr<Client>, mpsc::UnboundedReceiver<DuplexStream>, DuplexStream) {
    tokio::time::pause();
    compute_here();
    let mass_delete = Some(MassDelete { share: 0.0, keys: 1 });
    let config = ClientConfig { mass_delete, ..ClientConfig::default() };
    follower(filled(10_000), config).await
}

/// What is asked for is begun.
async fn begin(stream: &mut DuplexStream, deletes: u64) -> (DiffId, ToServer) {
    let asked = read(stream).await;
    let ToServer::SyncReq { diff, .. } = asked else { panic!("{asked:?}") };
    write(stream, &ToClient::SyncStart { diff }).await;
    write(stream, &ToClient::SyncSeq { diff, writes: 0, deletes }).await;
    (diff, asked)
}

#[actix_rt::test]
async fn who_falls_behind_while_roots_are_compared_asks_at_once() {
    let (client, _connected, mut stream) = connected().await;
    let (diff, asked) = begin(&mut stream, 0).await;
    let ToServer::SyncReq { root, .. } = asked else { unreachable!() };
    let (revision, chain) = (Revision::ZERO, Chain::START);
    let (suppressed, failed) = (0, 0);
    let done = ToClient::SyncDone { diff, revision, chain: chain.tag(), suppressed, failed };
    write(&mut stream, &done).await;
    write(&mut stream, &ToClient::FellBehind { jumps: 1, revision: Revision(5), chain }).await;
    let start = Instant::now();
    write(&mut stream, &ToClient::Verify { revision, root }).await;
    let compared: ToServer = read(&mut stream).await;
    assert_eq!(compared, ToServer::Verified { revision, root });
    let next = read(&mut stream).await;
    assert!(matches!(next, ToServer::SyncReq { jumps: 1, full: false, .. }), "{next:?}");
    assert_eq!(start.elapsed().as_millis(), 0);
    assert_eq!(client.send(GetStatus).await.unwrap().health, Health::Syncing);
}

/// By short prefixes several keys may be one, and a diff that would be held looks like one that should have been.
#[actix_rt::test]
async fn behind_a_repair_that_deletes_too_much_full_hashes_are_compared() {
    let (_client, mut connected, mut stream) = connected().await;
    let (diff, asked) = begin(&mut stream, 1).await;
    assert!(matches!(asked, ToServer::SyncReq { full: false, max_deletes: 1, .. }), "{asked:?}");
    let (writes, deletes) = (Changes(vec![]), Raw(vec![7].into()));
    write(&mut stream, &ToClient::Repair { diff, writes, prefix_bytes: 1, deletes }).await;
    let farewell = read(&mut stream).await;
    assert!(
        matches!(farewell, ToServer::Farewell { reason: Reason::Protocol, .. }),
        "{farewell:?}"
    );
    drop(stream);
    let mut stream = welcome(&mut connected).await;
    let next = read(&mut stream).await;
    assert!(matches!(next, ToServer::SyncReq { full: true, .. }), "{next:?}");
}
