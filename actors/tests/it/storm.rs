//! A thousand followers that come at once.

use std::time::Duration;

use actix::prelude::*;
use tablecast_actors::access::memory;
use tablecast_actors::client::{self, Client};
use tablecast_actors::protocol::{Change, Epoch, Limits, MemoryStore, Reader, Replica, Table};
use tablecast_actors::server::{Arbiters, Endpoint, GetFollowers, GetStatus, Ready, Write};
use tablecast_actors::{ClientConfig, DiffOutcome, FollowerStatus, ServerConfig};

use crate::{LONG, filled};

const FOLLOWERS: usize = 1000;
const AT_ONCE: usize = 4;
const LACKING: usize = 10;

fn is_done(follower: &FollowerStatus) -> bool {
    follower.last_diff.is_some_and(|diff| diff.aborted.is_none())
}

#[actix_rt::test]
async fn a_restart_of_the_server_is_no_storm_of_diffs() {
    let config = ServerConfig { diffs_at_once: AT_ONCE, ..ServerConfig::default() };
    let table = Table::open(filled(300), Limits::default()).unwrap();
    let [here, server, differs] = [(); 3].map(|()| Arbiter::new().handle());
    let arbiters = Arbiters { server, connections: vec![here.clone()], differs: vec![differs] };
    let endpoint = Endpoint::start(table, config, &arbiters);
    let (listener, access) = memory::pair();
    endpoint.listen(listener);
    let server = endpoint.server();
    let stores: Vec<MemoryStore> = (0..FOLLOWERS).map(|_| filled(300 - LACKING)).collect();
    let mut clients = Vec::new();
    for store in &stores {
        let replica = Replica::open(store.clone()).unwrap();
        let client = Client::new(replica, access.clone(), ClientConfig::default()).start();
        client.send(client::Ready).await.unwrap();
        clients.push(client);
    }
    server.send(Ready(Epoch::from_bytes([7; 16]))).await.unwrap();

    let (mut most, mut queued) = (0, 0);
    let storm = async {
        let mut tick = tokio::time::interval(Duration::from_millis(5));
        loop {
            tick.tick().await;
            // Live changes go on.
            let change = Change::write("live", format!("{queued}"));
            let written = server.send(Write(vec![change])).await.unwrap().unwrap();
            let status = server.send(GetStatus).await.unwrap();
            most = most.max(status.diffs_running);
            queued = queued.max(status.diffs_waiting);
            let followers = server.send(GetFollowers).await.unwrap();
            if followers.len() == FOLLOWERS && followers.iter().all(is_done) {
                return written.position().unwrap();
            }
        }
    };
    let head = tokio::time::timeout(LONG, storm).await.expect("it takes too long");
    assert!(most <= AT_ONCE && queued > AT_ONCE, "{most} ran, {queued} waited");
    let (epoch, revision, timeout) = (head.epoch, head.revision, LONG);
    for (client, store) in clients.iter().zip(&stores) {
        client.send(client::WaitFor { epoch, revision, timeout }).await.unwrap().unwrap();
        assert_eq!(store.len().unwrap(), 301);
        let status = client.send(client::GetStatus).await.unwrap();
        let Some(DiffOutcome::Done(report)) = status.last_diff else { panic!("{status:?}") };
        // Each was told how long it waited, and got what it lacked.
        assert!(report.written >= LACKING as u64 && report.waited <= report.elapsed, "{report:?}");
    }
}
