//! A server whose mailbox is never empty: its store takes a while, and writers do not pause.

use std::collections::BTreeSet;
use std::sync::Arc;
use std::time::Duration;

use actix::prelude::*;
use futures_util::future::{select_all, try_join_all};
use tablecast_actors::access::memory::{self, MemoryAccess};
use tablecast_actors::client::{self, Client};
use tablecast_actors::protocol::{
    Change, Epoch, Limits, MemoryStore, Reader, Replica, Store, StoreError, Table,
};
use tablecast_actors::server::{Arbiters, Endpoint, GetStatus, Ready, Server, Write};
use tablecast_actors::{ClientConfig, ClientStatus, DiffOutcome, ServerConfig};

use crate::connection::follow;
use crate::{LONG, filled};

const AT_ONCE: usize = 2;

/// Writes that wait for the store, always: whatever else the server is asked waits behind them.
const WRITERS: usize = 8;

/// A store that takes a millisecond for a batch, as one does that waits for a disk.
struct Slow(MemoryStore);

impl Store for Slow {
    fn apply(&mut self, changes: &[Change]) -> Result<(), StoreError> {
        std::thread::sleep(Duration::from_millis(1));
        self.0.apply(changes)
    }

    fn reader(&self) -> Arc<dyn Reader> {
        self.0.reader()
    }
}

/// A server of this store, and a way to connect to it.
async fn serve(store: impl Store, config: ServerConfig) -> (Addr<Server>, MemoryAccess) {
    let table = Table::open(store, Limits::default()).unwrap();
    let [here, server, differs] = [(); 3].map(|()| Arbiter::new().handle());
    let arbiters = Arbiters { server, connections: vec![here], differs: vec![differs] };
    let endpoint = Endpoint::start(table, config, &arbiters);
    let (listener, access) = memory::pair();
    endpoint.listen(listener);
    let server = endpoint.server().clone();
    server.send(Ready(Epoch::from_bytes([7; 16]))).await.unwrap();
    (server, access)
}

/// A slow server, and so many followers that lack half of its table.
async fn connected(followers: usize) -> (Addr<Server>, Vec<Addr<Client>>) {
    let verify_every = Some(Duration::from_millis(10));
    let config = ServerConfig { diffs_at_once: AT_ONCE, verify_every, ..ServerConfig::default() };
    let (server, access) = serve(Slow(filled(1000)), config).await;
    let mut clients = Vec::new();
    for _ in 0..followers {
        clients.push(follow(access.clone(), filled(500), ClientConfig::default()).await);
    }
    (server, clients)
}

/// Does this while the writers write.
async fn beside(writers: impl Iterator<Item: Future + Unpin>, work: impl Future<Output = ()>) {
    let done = async {
        tokio::select! {
            () = work => {}
            _ = select_all(writers) => unreachable!("they write for ever"),
        }
    };
    tokio::time::timeout(LONG, done).await.expect("it waits for ever");
}

async fn beside_writers(server: &Addr<Server>, work: impl Future<Output = ()>) {
    let writers = (0..WRITERS).map(|writer| {
        let server = server.clone();
        Box::pin(async move {
            for number in 0_u64.. {
                let change = Change::write(format!("live-{writer}"), format!("{number}"));
                server.send(Write(vec![change])).await.unwrap().unwrap();
            }
        })
    });
    beside(writers, work).await;
}

fn is_equal(client: &ClientStatus) -> bool {
    matches!(&client.last_diff, Some(DiffOutcome::Done(report)) if report.equal())
}

#[actix_rt::test]
async fn diffs_begin_one_after_the_other_and_each_comes_to_its_end() {
    let (server, clients) = connected(8).await;
    let mut paced = false;
    let diffs = async {
        loop {
            let status = server.send(GetStatus).await.unwrap();
            // There is a place, and somebody waits.
            paced |= status.diffs_running < AT_ONCE && status.diffs_waiting > 0;
            let followers = try_join_all(clients.iter().map(|one| one.send(client::GetStatus)));
            if followers.await.unwrap().iter().all(is_equal) {
                return;
            }
        }
    };
    beside_writers(&server, diffs).await;
    assert!(paced, "every diff began at once");
}

/// A frame that is not full goes out all the same: with a full one a follower would be thousands of writes behind. And
/// roots are compared, which are computed on another thread, and when it is time.
#[actix_rt::test]
async fn changes_go_out_without_a_pause_of_the_writers() {
    let (server, clients) = connected(1).await;
    let frames = async {
        let (mut seen, mut compared) = (BTreeSet::new(), BTreeSet::new());
        while seen.len() < 20 || compared.len() < 5 {
            let status = clients[0].send(client::GetStatus).await.unwrap();
            seen.extend(status.stream.map(|stream| stream.revision.0));
            compared.extend(status.verified);
            server.send(GetStatus).await.unwrap();
        }
    };
    beside_writers(&server, frames).await;
    let head = server.send(GetStatus).await.unwrap().position.unwrap().revision.0;
    assert!(head < 10_000, "20 frames of {head} changes");
}

/// The same at the other end: what a follower computes elsewhere, its roots and answers, must come to it though the stream
/// does not pause.
#[actix_rt::test]
async fn a_follower_whose_store_is_slow_is_repaired_all_the_same() {
    let (server, access) = serve(filled(1000), ServerConfig::default()).await;
    let connection = Arbiter::new().handle();
    let client = Client::start_in_arbiter(&Arbiter::new().handle(), move |_| {
        let replica = Replica::open(Slow(filled(500))).unwrap();
        Client::new(replica, access, ClientConfig::default()).with_connection_on(connection)
    });
    client.send(client::Ready).await.unwrap();
    // Always some frames ahead of what is applied, and never far.
    let writer = |writer| {
        let (server, client) = (server.clone(), client.clone());
        Box::pin(async move {
            let mut ahead = None;
            for number in 0_u64.. {
                let change = Change::write(format!("live-{writer}"), format!("{number}"));
                server.send(Write(vec![change])).await.unwrap().unwrap();
                if number % 32 == 0
                    && let Some(before) = ahead.replace(client.send(client::GetStatus))
                {
                    before.await.unwrap();
                }
            }
        })
    };
    let repaired = async { while !is_equal(&client.send(client::GetStatus).await.unwrap()) {} };
    beside((0..4).map(writer), repaired).await;
}
