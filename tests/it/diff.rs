//! Repair beside the live stream, over real TCP.

use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex};

use tablecast::{
    Change, DiffAborted, DiffError, DiffOutcome, DiffPhase, Error, Event, Health, MemoryStore,
    Progress, Reader, Revision, Server, ServerConfig, Store, StoreError, Verified,
};

use crate::harness::{
    Gate, LONG, Proxy, assert_converges, connect, entries, event, filled, follower, key, report,
    serve, within,
};
use crate::limits::hold_a_place;

#[actix_rt::test]
async fn a_diff_reports_what_it_did() {
    let (server, address) = serve(ServerConfig::default(), filled(5000)).await;
    let client = follower(address, filled(5000));
    let first = connect(&client).await;
    assert_eq!((first.rounds, first.written, first.deleted, first.failed), (1, 0, 0, 0));
    assert!(first.equal());
    assert!(first.bytes_sent + first.bytes_received < 200, "{first:?}");

    for number in 0..30 {
        client.write(key(number), "other").await.unwrap();
        client.delete(key(1000 + number)).await.unwrap();
        client.write(key(9000 + number), "extra").await.unwrap();
    }
    let DiffOutcome::Done(report) = client.diff().await.unwrap() else { panic!("aborted") };
    assert_eq!((report.written, report.deleted, report.suppressed), (60, 30, 0));
    assert!(report.equal() && report.rounds > 1 && report.rounds <= 6, "{report:?}");
    assert!(report.bytes_received > 60 * 12);
    assert_eq!(client.status().await.unwrap().last_diff, Some(DiffOutcome::Done(report)));
    assert_converges(&server, &client).await;
}

#[actix_rt::test]
async fn only_one_diff_at_a_time_and_only_when_connected() {
    let (_server, address) = serve(ServerConfig::default(), filled(20_000)).await;
    let client = follower(address, MemoryStore::new());
    let disconnected = client.diff().await.unwrap_err();
    assert!(matches!(disconnected, Error::Diff(DiffError::Disconnected)), "{disconnected}");
    let mut events = client.events().await.unwrap();
    client.ready().await.unwrap();
    event(&mut events, |event| matches!(event, Event::Connected(..)).then_some(())).await;
    // The diff that follows a connect brings 20,000 keys, so it is still under way.
    let busy = client.diff().await.unwrap_err();
    assert!(matches!(busy, Error::Diff(DiffError::AlreadyDiffing)), "{busy}");
    assert_eq!(report(&mut events).await.written, 20_000);
}

#[actix_rt::test]
async fn what_came_while_a_diff_waited_does_not_come_again() {
    let config = ServerConfig { diffs_at_once: 1, ..ServerConfig::default() };
    let (server, address) = serve(config, filled(5000)).await;
    let client = follower(address, filled(5000));
    assert!(connect(&client).await.equal());
    let holds = hold_a_place(address).await;
    client.write(key(0), "its own").await.unwrap();
    let mut events = client.events().await.unwrap();
    let diff = actix_rt::spawn({
        let client = client.clone();
        async move { client.diff().await }
    });
    let queued = |event: &Event| matches!(event, Event::Progress(_)).then_some(());
    event(&mut events, queued).await;
    // Of before and of after it is asked for.
    client.write(key(4000), "its own, too").await.unwrap();
    let mut last = None;
    for number in 1..1000 {
        last = server.write(key(number), "live").await.unwrap().position();
    }
    // Its own write is known to it, so that it is nowhere.
    within(async { while client.status().await.unwrap().stream != last {} }).await;
    drop(holds);
    let DiffOutcome::Done(report) = within(diff).await.unwrap().unwrap() else { panic!() };
    assert_eq!((report.written, report.suppressed, report.deleted), (2, 0, 0), "{report:?}");
    assert!(report.equal() && report.bytes_received < 200_000, "{report:?}");
    // Nothing that was changed beside the server is left.
    assert!(client.status().await.unwrap().position.is_some());
    assert_converges(&server, &client).await;
}

/// Writes to every tenth key until told to stop.
fn keep_writing(server: &Server, keys: usize) -> tokio::sync::oneshot::Sender<()> {
    let (stop, mut stopped) = tokio::sync::oneshot::channel();
    let server = server.clone();
    actix_rt::spawn(async move {
        for number in 0.. {
            if stopped.try_recv() != Err(tokio::sync::oneshot::error::TryRecvError::Empty) {
                return;
            }
            let key = key(number * 10 % keys);
            if number % 7 == 0 {
                server.delete(key).await.unwrap();
            } else {
                server.write(key, format!("live-{number}")).await.unwrap();
            }
        }
    });
    stop
}

#[actix_rt::test]
async fn several_followers_diff_at_once_while_writes_go_on() {
    let config = ServerConfig { diffs_at_once: 2, ..ServerConfig::default() };
    let (server, address) = serve(config, filled(5000)).await;
    let writing = keep_writing(&server, 5000);
    let mut clients = Vec::new();
    for number in 0..6 {
        // Each lacks another part, and has keys of its own.
        let mut store: Vec<_> = entries(&filled(5000)).into_iter().skip(number * 700).collect();
        store.extend((0..100).map(|extra| (key(100_000 + number * 100 + extra), "x".into())));
        clients.push(follower(address, store.into_iter().collect::<MemoryStore>()));
    }
    let reports = futures_util::future::join_all(clients.iter().map(connect)).await;
    for report in &reports {
        assert!(report.equal(), "{report:?}");
    }
    for round in 0..5 {
        for (number, client) in clients.iter().enumerate() {
            client.write(key(round * 50 + number), "broken").await.unwrap();
        }
        let diffs = clients.iter().map(|client| client.diff());
        for outcome in futures_util::future::join_all(diffs).await {
            let DiffOutcome::Done(report) = outcome.unwrap() else { panic!("aborted") };
            assert!(report.equal(), "{report:?}");
        }
    }
    writing.send(()).unwrap();
    for client in &clients {
        assert_converges(&server, client).await;
    }
    let status = server.status().await.unwrap();
    assert_eq!((status.followers, status.diffs_running, status.diffs_waiting), (6, 0, 0));
}

#[actix_rt::test]
async fn a_follower_killed_in_the_middle_of_a_diff_harms_nobody() {
    let config = ServerConfig { diffs_at_once: 1, ..ServerConfig::default() };
    let (server, address) = serve(config, filled(50_000)).await;
    let honest = follower(address, filled(50_000));
    assert!(connect(&honest).await.equal());
    for _ in 0..5 {
        let proxy = Proxy::start(address).await;
        let victim = follower(proxy.address, MemoryStore::new());
        let mut events = victim.events().await.unwrap();
        victim.ready().await.unwrap();
        // The first repairs are there, tens of thousands are still to come.
        event(&mut events, |event| {
            matches!(event, Event::Change { repair: true, .. }).then_some(())
        })
        .await;
        proxy.set(Gate::Cut);
        drop(victim);
    }
    // The one place for diffs is free again.
    honest.write(key(7), "broken").await.unwrap();
    let outcome = within(honest.diff()).await.unwrap();
    assert!(matches!(outcome, DiffOutcome::Done(report) if report.written == 1 && report.equal()));
    assert_converges(&server, &honest).await;
}

/// A store that refuses one key while it is told to.
#[derive(Clone)]
struct Stubborn {
    inner: MemoryStore,
    refused: Arc<Mutex<Option<&'static str>>>,
}

impl Store for Stubborn {
    fn apply(&mut self, changes: &[Change]) -> Result<(), StoreError> {
        let refused = self.refused.lock().unwrap();
        if changes.iter().any(|change| Some(&change.key()[..]) == refused.map(str::as_bytes)) {
            return Err(StoreError::new("no such key here"));
        }
        self.inner.apply(changes)
    }

    fn reader(&self) -> Arc<dyn Reader> {
        self.inner.reader()
    }
}

#[actix_rt::test]
async fn a_refused_change_is_counted_and_repaired_later_by_itself() {
    let (server, address) = serve(ServerConfig::default(), filled(10)).await;
    let store =
        Stubborn { inner: MemoryStore::new(), refused: Arc::new(Mutex::new(Some("stubborn"))) };
    let refused = Arc::clone(&store.refused);
    let client = follower(address, store);
    assert!(connect(&client).await.equal());
    let mut events = client.events().await.unwrap();
    server.write("stubborn", "value").await.unwrap();
    event(&mut events, |event| matches!(event, Event::Refused(_)).then_some(())).await;
    // The follower asks by itself, and again as long as it is refused.
    let failed = report(&mut events).await;
    assert!(!failed.equal() && failed.failed == 1, "{failed:?}");
    assert_eq!(client.status().await.unwrap().position, None);
    *refused.lock().unwrap() = None;
    within(async { while !report(&mut events).await.equal() {} }).await;
    assert_converges(&server, &client).await;
    assert!(client.status().await.unwrap().refused >= 2);
}

#[actix_rt::test]
async fn a_batch_that_the_servers_store_refuses_changes_nothing() {
    let store = Stubborn { inner: filled(3), refused: Arc::new(Mutex::new(Some("stubborn"))) };
    let server = Server::start(ServerConfig::default(), store).unwrap();
    let position = server.ready().await.unwrap();
    let before = server.root().await.unwrap();
    let batch = vec![Change::write("fine", "1"), Change::delete("stubborn")];
    let error = server.batch(batch).await.unwrap_err();
    assert_eq!(error.to_string(), "store: no such key here");
    assert_eq!(server.root().await.unwrap(), before);
    let status = server.status().await.unwrap();
    assert_eq!((status.position, status.refused), (Some(position), 1));
    assert_eq!(server.reader().len().unwrap(), 3);
}

#[actix_rt::test]
async fn silent_divergence_is_found_and_healed_by_itself() {
    let every = Some(std::time::Duration::from_millis(20));
    let config = ServerConfig { verify_every: every, ..ServerConfig::default() };
    let (server, address) = serve(config, filled(1000)).await;
    let client = follower(address, MemoryStore::new());
    assert!(connect(&client).await.equal());
    let mut events = client.events().await.unwrap();
    for (number, broken) in
        [Change::write(key(3), "changed"), Change::delete(key(4)), Change::write("extra", "")]
            .into_iter()
            .enumerate()
    {
        match broken {
            Change::Write { key, value } => client.write(key, value).await.unwrap(),
            Change::Delete { key } => client.delete(key).await.unwrap(),
        }
        let (revision, differ) = event(&mut events, |event| match event {
            Event::Diverged { revision, root, server_root } => {
                Some((*revision, root != server_root))
            }
            _ => None,
        })
        .await;
        assert!(differ);
        let healed = report(&mut events).await;
        assert!(healed.equal() && healed.written + healed.deleted == 1, "{healed:?}");
        let status = client.status().await.unwrap();
        assert_eq!(status.diverged, number as u64 + 1);
        assert!(status.verified >= Some(revision));
        // Writes go on, and are compared as well.
        server.write("live", format!("{number}")).await.unwrap();
    }
    assert_converges(&server, &client).await;
    // The server knows too.
    let head = server.status().await.unwrap().position.unwrap().revision;
    within(async {
        while server.followers().await.unwrap()[0].verified
            != Some(Verified { revision: head, equal: true })
        {}
    })
    .await;
}

/// Changes in the store itself: neither the tree nor the actor knows.
#[actix_rt::test]
async fn what_is_changed_behind_the_followers_back_is_found_and_healed() {
    let every = Some(std::time::Duration::from_millis(50));
    let config = ServerConfig { verify_every: every, ..ServerConfig::default() };
    let (server, address) = serve(config, filled(1000)).await;
    let mut store = MemoryStore::new();
    let client = follower(address, store.clone());
    assert!(connect(&client).await.equal());
    let mut events = client.events().await.unwrap();
    let mut found = 0;
    for (changes, keys, written, deleted) in [
        (vec![Change::write(key(3), "changed")], 1, 1, 0),
        (vec![Change::delete(key(4))], 1, 1, 0),
        (vec![Change::write("added", "")], 1, 0, 1),
        (vec![Change::write(key(5), ""), Change::delete(key(6)), Change::write("x", "y")], 3, 2, 1),
    ] {
        store.apply(&changes).unwrap();
        let corrupt = event(&mut events, |event| match event {
            Event::Corrupt { keys, .. } => Some(*keys),
            _ => None,
        });
        assert_eq!(corrupt.await, keys);
        event(&mut events, |event| matches!(event, Event::Diverged { .. }).then_some(())).await;
        let healed = report(&mut events).await;
        assert_eq!((healed.written, healed.deleted), (written, deleted), "{healed:?}");
        assert!(healed.equal());
        assert_converges(&server, &client).await;
        found += keys as u64;
        assert_eq!(client.status().await.unwrap().corrupt, found);
        // What is live meanwhile is not mistaken for it.
        server.write("live", format!("{found}")).await.unwrap();
    }
    assert_eq!(client.status().await.unwrap().health, Health::Ready);
}

/// One look puts right 65,536 keys, and is followed by another one, before anything is said to be equal.
#[actix_rt::test]
async fn however_much_is_changed_behind_its_back_is_found_at_once() {
    const KEYS: usize = 150_000;
    // Once, and not a second time.
    let every = Some(std::time::Duration::from_secs(2));
    let config = ServerConfig { verify_every: every, ..ServerConfig::default() };
    let (server, address) = serve(config, filled(KEYS)).await;
    let mut store = MemoryStore::new();
    let client = follower(address, store.clone());
    assert!(connect(&client).await.equal());
    let mut events = client.events().await.unwrap();
    let lost: Vec<_> = (0..KEYS - 10).map(|n| Change::delete(key(n))).collect();
    store.apply(&lost).unwrap();
    let mut found = 0;
    while found < lost.len() {
        found += event(&mut events, |event| match event {
            Event::Corrupt { keys, .. } => Some(*keys),
            Event::Diff(diff) => panic!("{diff:?} after {found} keys"),
            _ => None,
        })
        .await;
        // Behind the last one there is a diff.
        let position = client.status().await.unwrap().position;
        assert!(position.is_none() || found == lost.len(), "{found} keys");
    }
    let healed = report(&mut events).await;
    assert!(healed.equal() && healed.written == lost.len() as u64, "{healed:?}");
    assert_converges(&server, &client).await;
}

/// A store that says that it has written everything, and loses one key.
#[derive(Clone, Default)]
struct Leaky(MemoryStore, Arc<AtomicBool>);

impl Store for Leaky {
    fn apply(&mut self, changes: &[Change]) -> Result<(), StoreError> {
        let lost = |change: &&Change| change.key() == &key(3) && self.1.load(Ordering::Relaxed);
        let kept: Vec<Change> = changes.iter().filter(|change| !lost(change)).cloned().collect();
        self.0.apply(&kept)
    }

    fn reader(&self) -> Arc<dyn Reader> {
        self.0.reader()
    }
}

#[actix_rt::test]
async fn a_store_that_keeps_losing_a_key_is_not_healed() {
    let every = Some(std::time::Duration::from_millis(20));
    let config = ServerConfig { verify_every: every, ..ServerConfig::default() };
    let (server, address) = serve(config, filled(10)).await;
    let store = Leaky::default();
    store.1.store(true, Ordering::Relaxed);
    let client = follower(address, store.clone());
    let mut events = client.events().await.unwrap();
    // The tree was told that it is there.
    assert!(connect(&client).await.equal());
    event(&mut events, |event| matches!(event, Event::Corrupt { .. }).then_some(())).await;
    event(&mut events, |event| matches!(event, Event::Refused(_)).then_some(())).await;
    let reason = within(async {
        loop {
            if let Health::Diverged { reason } = client.status().await.unwrap().health {
                return reason;
            }
        }
    });
    assert!(reason.await.ends_with("it does not keep what is written at key key-000003"));
    assert_eq!(client.status().await.unwrap().position, None);
    // As soon as it does, all is well.
    store.1.store(false, Ordering::Relaxed);
    client.wait_ready(LONG).await.unwrap();
    assert_converges(&server, &client).await;
}

#[actix_rt::test]
async fn a_table_that_does_not_heal_says_why() {
    let (server, address) = serve(ServerConfig::default(), filled(10)).await;
    let store =
        Stubborn { inner: MemoryStore::new(), refused: Arc::new(Mutex::new(Some("key-000003"))) };
    let client = follower(address, store);
    let report = connect(&client).await;
    assert!(!report.equal() && report.failed == 1, "{report:?}");
    let health = client.status().await.unwrap().health;
    let Health::Diverged { reason } = health else { panic!("{health:?}") };
    assert_eq!(reason, "the store refuses: store: no such key here");
    // As soon as it is not needed any more, all is well.
    server.delete(key(3)).await.unwrap();
    client.wait_ready(LONG).await.unwrap();
    assert_eq!(client.status().await.unwrap().health, Health::Ready);
}

#[actix_rt::test]
async fn a_server_that_came_up_empty_empties_nobody() {
    let (server, address) = serve(ServerConfig::default(), filled(5000)).await;
    let client = follower(address, MemoryStore::new());
    assert!(connect(&client).await.equal());
    assert_eq!(client.status().await.unwrap().verified, Some(Revision(0)));
    let mut events = client.events().await.unwrap();
    within(server.stop()).await;

    let server = Server::start(ServerConfig::default(), filled(2000)).unwrap();
    server.write("new", "").await.unwrap();
    server.listen(address).unwrap();
    server.ready().await.unwrap();
    let held = event(&mut events, |event| match event {
        Event::Held { writes, deletes, keys } => Some((*writes, *deletes, *keys)),
        _ => None,
    });
    assert_eq!(held.await, (1, 3000, 5000));
    let status = client.status().await.unwrap();
    assert_eq!(status.health, Health::Held { writes: 1, deletes: 3000, keys: 5000 });
    // What was equal once was so in another history.
    assert_eq!((status.keys, status.position, status.verified), (5000, None, None));
    // Asked for once more, it is held once more. Live deletes are not.
    let outcome = client.diff().await.unwrap();
    let held = DiffAborted::Held { deletes: 3000, keys: 5000 };
    assert_eq!(outcome, DiffOutcome::Aborted(held));
    server.delete(key(0)).await.unwrap();
    server.delete(key(4999)).await.unwrap();
    let gone = |event: &Event| match event {
        Event::Change { change: Change::Delete { key: gone }, repair: false, .. } => {
            (*gone == key(4999)).then_some(())
        }
        _ => None,
    };
    event(&mut events, gone).await;
    assert_eq!(client.status().await.unwrap().keys, 4998);

    client.allow_mass_delete().await.unwrap();
    let meant = report(&mut events).await;
    assert_eq!((meant.written, meant.deleted, meant.equal()), (1, 2999, true), "{meant:?}");
    assert_converges(&server, &client).await;
    assert_eq!(client.status().await.unwrap().health, Health::Ready);
    let served = server.followers().await.unwrap()[0].last_diff.unwrap();
    assert_eq!((served.aborted, served.served.deletes), (None, 2999));

    // Whoever comes next is another server.
    server.stop().await;
    let gone = |event: &Event| matches!(event, Event::Disconnected(_)).then_some(());
    event(&mut events, gone).await;
    let refused = client.allow_mass_delete().await.unwrap_err();
    assert!(matches!(refused, Error::Diff(DiffError::Disconnected)), "{refused}");
}

/// An allowance is for one diff, and for the server that was asked for it.
#[actix_rt::test]
async fn what_is_allowed_once_is_allowed_once() {
    let config = || ServerConfig { diffs_at_once: 1, ..ServerConfig::default() };
    let (server, address) = serve(config(), filled(10)).await;
    let client = follower(address, filled(3000));
    let mut events = client.events().await.unwrap();
    client.ready().await.unwrap();
    let held = |event: &Event| match event {
        Event::Held { deletes, .. } => Some(*deletes),
        _ => None,
    };
    assert_eq!(event(&mut events, held).await, 2990);
    // Somebody has the only place, so it is not used before the server is another one, which is empty, too.
    let _holds = hold_a_place(address).await;
    client.allow_mass_delete().await.unwrap();
    within(server.stop()).await;
    let server = Server::start(config(), filled(10)).unwrap();
    server.listen(address).unwrap();
    server.ready().await.unwrap();
    assert_eq!(event(&mut events, held).await, 2990);
    assert_eq!(client.status().await.unwrap().keys, 3000);

    client.allow_mass_delete().await.unwrap();
    assert_eq!(report(&mut events).await.deleted, 2990);
    for number in 10..3000 {
        client.write(key(number), "its own").await.unwrap();
    }
    let outcome = client.diff().await.unwrap();
    let held = DiffAborted::Held { deletes: 2990, keys: 3000 };
    assert_eq!(outcome, DiffOutcome::Aborted(held));
}

#[actix_rt::test]
async fn a_diff_says_how_far_it_is() {
    let (_server, address) = serve(ServerConfig::default(), filled(20_000)).await;
    let client = follower(address, MemoryStore::new());
    let mut events = client.events().await.unwrap();
    client.ready().await.unwrap();
    let mut steps: Vec<Progress> = Vec::new();
    within(async {
        loop {
            match events.recv().await.unwrap() {
                Event::Progress(progress) => steps.push(progress),
                Event::Diff(_) => break,
                _ => {}
            }
        }
    })
    .await;
    let mut phases: Vec<_> = steps.iter().map(|step| step.phase).collect();
    assert!(phases.is_sorted(), "{phases:?}");
    phases.dedup();
    let all = [DiffPhase::Queued, DiffPhase::Walk, DiffPhase::Repair, DiffPhase::Compare];
    assert_eq!(phases, all);
    let repairs: Vec<_> = steps.iter().filter(|step| step.phase == DiffPhase::Repair).collect();
    assert!(repairs.len() > 5 && repairs.is_sorted_by_key(|step| step.done), "{repairs:?}");
    assert!(repairs.iter().all(|step| step.total == 20_000));
    assert_eq!(repairs.last().unwrap().done, 20_000);
}
