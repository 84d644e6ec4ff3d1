//! A server, or a follower, that stops.

use std::cell::Cell;
use std::time::Duration;

use actix::prelude::*;
use tablecast_actors::client;
use tablecast_actors::protocol::{Change, MemoryStore, Reason, ToClient, ToServer};
use tablecast_actors::server::{Server, Stop, Write};
use tablecast_actors::{ClientConfig, ServerConfig};
use tokio::time::Instant;

use crate::by_hand::{read, write};
use crate::connection::{follower, serve, subscribe};

#[actix_rt::test]
async fn who_does_not_read_in_time_is_told_where_the_history_ends() {
    tokio::time::pause();
    let config = ServerConfig::default();
    let drain_timeout = config.drain_timeout;
    let (endpoint, access) = serve(config).await;
    let server = endpoint.server();
    let mut stream = subscribe(&access).await;
    for _ in 0..10 {
        let change = Change::write("large", vec![7; 1 << 20]);
        server.send(Write(vec![change])).await.unwrap().unwrap();
    }
    let stopping = server.send(Stop);
    let reading = async {
        // Its time is over, and it has some for the last words.
        tokio::time::sleep(drain_timeout + Duration::from_millis(500)).await;
        let (reason, text) = loop {
            if let ToClient::Farewell { reason, text } = read(&mut stream).await {
                break (reason, text);
            }
        };
        drop(stream);
        (reason, text)
    };
    let (stopped, (reason, text)) = tokio::join!(stopping, reading);
    stopped.unwrap();
    assert_eq!(reason, Reason::Stopping);
    let sent = text.strip_prefix("the history ends at revision 10, sent up to ");
    let sent = sent.unwrap_or_else(|| panic!("{text:?}"));
    assert!((1..10).contains(&sent.parse().unwrap()), "{text}");
}

/// More than the connection takes unread, and less than is handed to it at once.
async fn write_more_than_it_takes(server: &Addr<Server>) {
    for _ in 0..8 {
        let change = Change::write("large", vec![7; 60_000]);
        server.send(Write(vec![change])).await.unwrap().unwrap();
    }
}

#[actix_rt::test]
async fn who_is_slow_is_sent_all_within_the_time_for_it() {
    tokio::time::pause();
    let (endpoint, access) = serve(ServerConfig::default()).await;
    let server = endpoint.server();
    let mut stream = subscribe(&access).await;
    write_more_than_it_takes(server).await;
    let stopping = server.send(Stop);
    let reading = async {
        tokio::time::sleep(Duration::from_secs(2)).await;
        let mut revisions = Vec::new();
        let reason = loop {
            let message = read(&mut stream).await;
            if let ToClient::Live { first, .. } = message {
                revisions.push(first.0);
            } else if let ToClient::Farewell { reason, .. } = message {
                break reason;
            }
        };
        drop(stream);
        (reason, revisions)
    };
    let (stopped, (reason, revisions)) = tokio::join!(stopping, reading);
    stopped.unwrap();
    assert_eq!(reason, Reason::Stopping);
    assert_eq!(revisions, [1, 2, 3, 4, 5, 6, 7, 8]);
}

/// However long it has to read.
#[actix_rt::test]
async fn who_takes_nothing_any_more_does_not_hold_up_the_end() {
    tokio::time::pause();
    let drain_timeout = Duration::from_secs(3600);
    let config = ServerConfig { drain_timeout, ..ServerConfig::default() };
    let stall_timeout = config.stall_timeout;
    let (endpoint, access) = serve(config).await;
    let server = endpoint.server();
    let _stream = subscribe(&access).await;
    write_more_than_it_takes(server).await;
    let start = Instant::now();
    server.send(Stop).await.unwrap();
    assert!(start.elapsed() < 3 * stall_timeout, "{:?}", start.elapsed());
}

#[actix_rt::test]
async fn a_follower_has_stopped_when_its_server_has_heard_so() {
    tokio::time::pause();
    let config = ClientConfig::default();
    let (client, _connected, mut stream) = follower(MemoryStore::new(), config).await;
    let asked = read(&mut stream).await;
    assert!(matches!(asked, ToServer::SyncReq { .. }), "{asked:?}");
    // What is on its way meanwhile is nobody's any more.
    write(&mut stream, &ToClient::Ping {}).await;
    let heard = Cell::new(false);
    let hearing = async {
        tokio::time::sleep(Duration::from_millis(500)).await;
        let mut last = read(&mut stream).await;
        while let ToServer::Pong {} = last {
            last = read(&mut stream).await;
        }
        assert!(matches!(last, ToServer::Farewell { reason: Reason::Stopping, .. }), "{last:?}");
        heard.set(true);
        drop(stream);
    };
    let stopping = async {
        let start = Instant::now();
        assert_eq!(client.send(client::Stop).await.unwrap(), None);
        assert!(heard.get() && start.elapsed() < Duration::from_millis(900));
    };
    tokio::join!(stopping, hearing);
}

/// A server that is silent holds up nobody for long.
#[actix_rt::test]
async fn a_follower_stops_though_its_server_does_not_close() {
    tokio::time::pause();
    let config = ClientConfig::default();
    let (client, _connected, _stream) = follower(MemoryStore::new(), config).await;
    let start = Instant::now();
    client.send(client::Stop).await.unwrap();
    assert!(start.elapsed() < Duration::from_secs(2), "{:?}", start.elapsed());
}
