//! Connections end; nothing is lost by that.

use tablecast::{Event, MemoryStore, ServerConfig};

use crate::harness::{
    Gate, Proxy, assert_converges, connect, event, filled, follower, key, report, serve, within,
};

#[actix_rt::test]
async fn what_was_written_while_a_follower_was_away_arrives_by_itself() {
    let (server, address) = serve(ServerConfig::default(), filled(1000)).await;
    let proxy = Proxy::start(address).await;
    let client = follower(proxy.address, MemoryStore::new());
    assert!(connect(&client).await.equal());
    let mut events = client.events().await.unwrap();
    for round in 0..5 {
        proxy.set(Gate::Cut);
        event(&mut events, |event| matches!(event, Event::Disconnected(_)).then_some(())).await;
        for number in 0..20 {
            server.write(key(round * 20 + number), "while away").await.unwrap();
            server.delete(key(500 + round * 20 + number)).await.unwrap();
        }
        proxy.set(Gate::Open);
        let report = report(&mut events).await;
        assert!(report.equal() && report.written == 20 && report.deleted == 20, "{report:?}");
        assert_converges(&server, &client).await;
    }
    assert_eq!(client.status().await.unwrap().connects, 6);
}

#[actix_rt::test]
async fn a_restarted_server_begins_a_new_history() {
    let store = filled(300);
    let (server, address) = serve(ServerConfig::default(), store.clone()).await;
    let client = follower(address, MemoryStore::new());
    assert!(connect(&client).await.equal());
    let mut events = client.events().await.unwrap();
    let old = client.status().await.unwrap().stream.unwrap();
    within(server.stop()).await;
    let reason = event(&mut events, |event| match event {
        Event::Disconnected(reason) => Some(reason.clone()),
        _ => None,
    });
    assert_eq!(reason.await, "peer left: shutting down");
    assert!(!client.status().await.unwrap().connected);
    // The follower still has its table, and it can be read.
    assert_eq!(client.reader().len().unwrap(), 300);

    // The same store at the same address, with a change that nobody saw.
    let server = tablecast::Server::start(ServerConfig::default(), store).unwrap();
    server.write(key(1), "while down").await.unwrap();
    server.listen(address).unwrap();
    server.ready().await.unwrap();
    let found = report(&mut events).await;
    assert!(found.equal() && found.written == 1, "{found:?}");
    let new = client.status().await.unwrap().stream.unwrap();
    assert_ne!(new.epoch, old.epoch);
    assert_converges(&server, &client).await;
}

#[actix_rt::test]
async fn a_follower_that_does_not_read_falls_behind_and_harms_nobody() {
    const WRITES: usize = 200_000;
    let config = ServerConfig { log_bytes: 1 << 20, ..ServerConfig::default() };
    let (server, address) = serve(config, filled(1000)).await;
    let proxy = Proxy::start(address).await;
    let (slow, quick) = (follower(proxy.address, filled(1000)), follower(address, filled(1000)));
    assert!(connect(&slow).await.equal());
    assert!(connect(&quick).await.equal());
    let mut events = slow.events().await.unwrap();
    proxy.set(Gate::Stopped);
    let mut written = None;
    for number in 0..WRITES / 100 {
        let batch = (0..100)
            .map(|n| tablecast::Change::write(key((number * 100 + n) % 5000), vec![7; 32]))
            .collect();
        written = server.batch(batch).await.unwrap().position();
        // The quick one keeps up, as far as one core lets it: it is not slowed by the other.
        if number % 20 == 0 {
            let head = written.unwrap().revision;
            quick.wait_for(head, crate::harness::LONG).await.unwrap();
        }
        let status = server.status().await.unwrap();
        assert!(status.log_bytes <= (1 << 20) + (64 << 10), "{} bytes", status.log_bytes);
    }
    let head = written.unwrap().revision;
    assert_eq!(head.0, WRITES as u64);
    quick.wait_for(head, crate::harness::LONG).await.unwrap();
    assert_eq!(quick.status().await.unwrap().fell_behind, 0);
    assert_converges(&server, &quick).await;
    let lag = |followers: Vec<tablecast::FollowerStatus>| {
        followers.iter().map(|follower| follower.lag).max().unwrap()
    };
    assert!(lag(server.followers().await.unwrap()) > 100_000);

    proxy.set(Gate::Open);
    event(&mut events, |event| matches!(event, Event::FellBehind(_)).then_some(())).await;
    let report = report(&mut events).await;
    assert!(report.equal(), "{report:?}");
    assert_converges(&server, &slow).await;
    assert!(slow.status().await.unwrap().fell_behind > 0);
}
