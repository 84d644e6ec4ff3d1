//! Connections end; nothing is lost by that.

use tablecast::{
    Error, Event, Key, MemoryStore, Position, Revision, Server, ServerConfig, Value, WaitError, Way,
};
use tokio::sync::broadcast::Receiver;

use crate::harness::{
    Gate, Proxy, assert_converges, connect, disconnected, event, filled, follower, key, report,
    serve, within,
};

/// While the follower is away, these keys are written, and as many others deleted.
async fn cut_and_write(
    server: &Server,
    proxy: &Proxy,
    events: &mut Receiver<Event>,
    keys: std::ops::Range<usize>,
) {
    proxy.cut(events).await;
    for number in keys {
        server.write(key(number), "while away").await.unwrap();
        server.delete(key(500 + number)).await.unwrap();
    }
}

#[actix_rt::test]
async fn what_was_written_while_a_follower_was_away_arrives_by_itself() {
    // The log holds less than what is written while the follower is away.
    let config = ServerConfig { log_bytes: 100, ..ServerConfig::default() };
    let (server, address) = serve(config, filled(1000)).await;
    let proxy = Proxy::start(address).await;
    let client = follower(proxy.address, MemoryStore::new());
    assert!(connect(&client).await.equal());
    let mut events = client.events().await.unwrap();
    for round in 0..5 {
        let left = server.status().await.unwrap().position.unwrap().revision;
        cut_and_write(&server, &proxy, &mut events, round * 20..round * 20 + 20).await;
        // What is written in one go is one frame, and the log keeps the last one whole.
        while server.status().await.unwrap().log_tail <= left.next() {
            server.write(key(round * 20), "while away").await.unwrap();
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
    let reason = event(&mut events, disconnected);
    assert_eq!(reason.await, "peer left: shutting down");
    assert!(!client.status().await.unwrap().connected);
    // The follower still has its table, and it can be read.
    assert_eq!(client.reader().len().unwrap(), 300);

    // The same store at the same address, with a change that nobody saw.
    let server = Server::start(ServerConfig::default(), store).unwrap();
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
            let head = written.unwrap();
            quick.wait_for(head, crate::harness::LONG).await.unwrap();
        }
        let status = server.status().await.unwrap();
        assert!(status.log_bytes <= (1 << 20) + (64 << 10), "{} bytes", status.log_bytes);
    }
    let head = written.unwrap();
    assert_eq!(head.revision.0, WRITES as u64);
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

/// The way of the next connect.
async fn way(events: &mut Receiver<Event>) -> Way {
    event(events, |event| match event {
        Event::Connected(_, way) => Some(*way),
        _ => None,
    })
    .await
}

#[actix_rt::test]
async fn a_short_absence_costs_what_was_missed_and_no_diff() {
    let (server, address) = serve(ServerConfig::default(), filled(1000)).await;
    let proxy = Proxy::start(address).await;
    let client = follower(proxy.address, MemoryStore::new());
    assert!(connect(&client).await.equal());
    let mut events = client.events().await.unwrap();
    for round in 0..5 {
        cut_and_write(&server, &proxy, &mut events, round * 20..round * 20 + 20).await;
        proxy.set(Gate::Open);
        assert_eq!(way(&mut events).await, Way::Resumed);
        assert_converges(&server, &client).await;
    }
    // The first connect's, and none since.
    let followed = client.status().await.unwrap();
    assert_eq!((followed.connects, followed.applied), (6, 200));
    let diffs: u64 = server.followers().await.unwrap().iter().map(|f| f.diffs).sum();
    assert_eq!(diffs, 0, "the connection at hand needed none");
}

#[actix_rt::test]
async fn a_table_that_was_changed_beside_the_server_is_not_resumed() {
    let (server, address) = serve(ServerConfig::default(), filled(1000)).await;
    let proxy = Proxy::start(address).await;
    let client = follower(proxy.address, MemoryStore::new());
    assert!(connect(&client).await.equal());
    let mut events = client.events().await.unwrap();
    client.write(key(3), "broken").await.unwrap();
    proxy.cut(&mut events).await;
    proxy.set(Gate::Open);
    assert_eq!(way(&mut events).await, Way::NoPosition);
    assert_eq!(report(&mut events).await.written, 1);
    assert_converges(&server, &client).await;
}

#[actix_rt::test]
async fn a_server_that_continues_its_history_resumes_and_a_restored_one_does_not() {
    let store = filled(300);
    let (server, address) = serve(ServerConfig::default(), store.clone()).await;
    let client = follower(address, MemoryStore::new());
    assert!(connect(&client).await.equal());
    let mut events = client.events().await.unwrap();
    let early = server.write(key(1), "one").await.unwrap().position().unwrap();
    let older: MemoryStore = crate::harness::entries(&store).into_iter().collect();
    let late = server.write(key(2), "two").await.unwrap().position().unwrap();
    client.wait_for(late, crate::harness::LONG).await.unwrap();
    within(server.stop()).await;

    let again = async |store: MemoryStore, at| {
        let server = Server::start(ServerConfig::default(), store).unwrap();
        server.listen(address).unwrap();
        assert_eq!(server.continue_from(at).await.unwrap(), at);
        server
    };
    // The same table at the same place.
    let server = again(store, late).await;
    assert_eq!(way(&mut events).await, Way::Resumed);
    assert_converges(&server, &client).await;
    within(server.stop()).await;

    // An older copy, which does not know what it lost: first nothing more, then something else.
    let later = Position { revision: Revision(late.revision.0 + 1), ..late };
    let waits = client.wait_for(later, crate::harness::LONG);
    // It waits before the server is there.
    let (waited, server) = futures_util::future::join(waits, again(older.clone(), early)).await;
    assert_eq!(way(&mut events).await, Way::Ahead);
    // What it waited for would have been another change.
    let forked = WaitError::Forked(late.epoch);
    assert!(matches!(waited, Err(Error::Wait(why)) if why == forked), "{waited:?}");
    let found = report(&mut events).await;
    assert!(found.equal() && found.written == 1, "{found:?}");
    let lost = server.write(key(3), "three").await.unwrap().position().unwrap();
    client.wait_for(lost, crate::harness::LONG).await.unwrap();
    within(server.stop()).await;

    let older: MemoryStore = crate::harness::entries(&older).into_iter().collect();
    let server = Server::start(ServerConfig::default(), older).unwrap();
    server.continue_from(early).await.unwrap();
    server.write(key(4), "four").await.unwrap();
    server.write(key(5), "five").await.unwrap();
    server.listen(address).unwrap();
    assert_eq!(way(&mut events).await, Way::OtherChain);
    assert!(report(&mut events).await.equal());
    assert_converges(&server, &client).await;
}

#[actix_rt::test]
async fn many_changes_of_few_keys_are_caught_up_one_a_key() {
    let (server, address) = serve(ServerConfig::default(), filled(1000)).await;
    let proxy = Proxy::start(address).await;
    let client = follower(proxy.address, MemoryStore::new());
    assert!(connect(&client).await.equal());
    let mut events = client.events().await.unwrap();
    proxy.cut(&mut events).await;
    let before = client.status().await.unwrap();
    for number in 0..10_000 {
        server.write(key(number % 50), format!("{number}")).await.unwrap();
    }
    server.delete(key(7)).await.unwrap();
    proxy.set(Gate::Open);
    assert_eq!(way(&mut events).await, Way::Shortened);
    assert_converges(&server, &client).await;
    let after = client.status().await.unwrap();
    assert_eq!(after.applied - before.applied, 50);
    assert!(after.bytes_received - before.bytes_received < 4000, "{after:?}");
    // The server says so behind the writing, which may be read sooner.
    let followers = within(async {
        loop {
            let followers = server.followers().await.unwrap();
            if followers[0].way.is_some() {
                return followers;
            }
        }
    });
    let followers = followers.await;
    assert_eq!((followers[0].way, followers[0].diffs), (Some(Way::Shortened), 0));
    // Live changes go on behind it.
    let at = server.write("live", "").await.unwrap().position().unwrap();
    assert_eq!(client.wait_for(at, crate::harness::LONG).await.unwrap(), at);
}

#[actix_rt::test]
async fn a_stopped_follower_goes_on_where_it_was() {
    let (server, address) = serve(ServerConfig::default(), filled(1000)).await;
    let store = MemoryStore::new();
    let client = follower(address, store.clone());
    assert!(connect(&client).await.equal());
    let at = server.write("seen", "").await.unwrap().position().unwrap();
    client.wait_for(at, crate::harness::LONG).await.unwrap();
    assert_eq!(client.stop().await, Some(at));
    server.write("missed", "").await.unwrap();

    let client = follower(address, store.clone());
    client.continue_from(at).await.unwrap();
    let mut events = client.events().await.unwrap();
    client.ready().await.unwrap();
    // Ready is who has what was missed.
    client.wait_ready(crate::harness::LONG).await.unwrap();
    assert!(client.reader().get(b"missed").unwrap().is_some());
    assert_eq!(way(&mut events).await, Way::Resumed);
    assert_converges(&server, &client).await;
    client.stop().await;

    // Whoever changes the table afterwards has no position.
    let client = follower(address, store);
    client.continue_from(at).await.unwrap();
    client.write("more", "").await.unwrap();
    let mut events = client.events().await.unwrap();
    client.ready().await.unwrap();
    assert_eq!(way(&mut events).await, Way::NoPosition);
    assert_eq!(report(&mut events).await.deleted, 1);
    assert_eq!(client.status().await.unwrap().way, Some(Way::NoPosition));
}

/// Keys of 16 bytes, values of 32.
fn entry(number: u32, value: u8) -> (Key, Value) {
    (format!("{number:016}").into(), vec![value; 32].into())
}

#[actix_rt::test]
async fn an_outage_costs_the_bytes_of_what_was_missed() {
    const KEYS: u32 = 50_000;
    const MISSED: u64 = 10_000;
    for (log_bytes, ways) in [(64 << 20, Way::Resumed), (10_000, Way::NotInLog)] {
        let store: MemoryStore = (0..KEYS).map(|number| entry(number, 0)).collect();
        let config = ServerConfig { log_bytes, ..ServerConfig::default() };
        let (server, address) = serve(config, store.clone()).await;
        let proxy = Proxy::start(address).await;
        let same: MemoryStore = crate::harness::entries(&store).into_iter().collect();
        let client = follower(proxy.address, same);
        assert!(connect(&client).await.equal());
        let mut events = client.events().await.unwrap();
        proxy.cut(&mut events).await;
        let before = client.status().await.unwrap();
        let missed = (0..KEYS).step_by(5).map(|number| entry(number, 1));
        for (key, value) in missed {
            server.write(key, value).await.unwrap();
        }
        proxy.set(Gate::Open);
        assert_eq!(way(&mut events).await, ways);
        let changes = 48 * MISSED;
        let most = if ways == Way::Resumed {
            changes * 11 / 10 + 5 * MISSED
        } else {
            // What the walk asks, and the changed keys with their values; the answers go the other way.
            let report = report(&mut events).await;
            assert_eq!((report.written, report.deleted), (MISSED, 0));
            changes * 11 / 10 + 5 * MISSED + 30_000
        };
        assert_converges(&server, &client).await;
        let after = client.status().await.unwrap();
        let received = after.bytes_received - before.bytes_received;
        assert!((changes..most).contains(&received), "{ways}: {received} bytes, at most {most}");
    }
}
