//! A server and its followers on simulated hosts, and what befalls them.

use std::cell::RefCell;
use std::fmt::Debug;
use std::panic::{self, AssertUnwindSafe};
use std::rc::Rc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use actix::prelude::*;
use fastrand::Rng;
use tablecast_actors::client::{self, Client};
use tablecast_actors::protocol::server::SessionConfig;
use tablecast_actors::protocol::{
    Change, HeartbeatConfig, Key, Limits, MemoryStore, Position, Reader, Replica, Store,
    StoreError, Table, Value,
};
use tablecast_actors::server::{self, Endpoint, Server};
use tablecast_actors::{ClientConfig, DiffError, Health, ServerConfig, Token};
use tokio::sync::broadcast::error::RecvError;
use tokio::time::sleep;

use crate::history::{History, Map, Seen, map};
use crate::net::{SimAccess, SimListener};

const TICK: Duration = Duration::from_millis(5);

/// How long things go wrong, and how long all may take to be equal again.
const FAULTS: Duration = Duration::from_secs(4);
const QUIET: Duration = Duration::from_secs(60);

/// How often a follower is looked at.
const LOOK: Duration = Duration::from_millis(50);

const HEARTBEAT: HeartbeatConfig = HeartbeatConfig {
    ping_after: Duration::from_millis(200),
    dead_after: Duration::from_millis(700),
};

/// What panicked during the run at hand. A panic of an actor, or of work that was given to a thread, ends that and is
/// not seen by the simulated host.
static PANICS: Mutex<Vec<String>> = Mutex::new(Vec::new());

/// One run at a time: the panic hook is one for all threads.
static RUNNING: Mutex<()> = Mutex::new(());

/// What is the same through a run.
struct Plan {
    seed: u64,
    keys: u64,
    value_bytes: usize,
    /// Between two writes, at most.
    pause: u64,
    server: ServerConfig,
    client: ClientConfig,
}

/// A follower's store, which outlives its host's crashes unless that is lost too.
#[derive(Clone, Default)]
struct FollowerStore {
    inner: MemoryStore,
    panics: Arc<AtomicBool>,
}

impl Store for FollowerStore {
    fn apply(&mut self, changes: &[Change]) -> Result<(), StoreError> {
        assert!(!self.panics.load(Ordering::Relaxed), "the store panics");
        self.inner.apply(changes)
    }

    fn reader(&self) -> Arc<dyn Reader> {
        self.inner.reader()
    }
}

/// What is left of a host when it crashes, and what it is told.
#[derive(Default)]
struct Follower {
    store: FollowerStore,
    seen: Seen,
    /// Where it stood when it was stopped.
    position: Option<Position>,
    stop: bool,
    diff: bool,
    /// Diffs that were asked for on this host, and not answered.
    asked: u64,
    client: Option<Addr<Client>>,
    health: Option<Health>,
    starts: u64,
}

#[derive(Default)]
struct ServerHost {
    store: MemoryStore,
    position: Option<Position>,
    /// A write may be in the table or not.
    writing: bool,
    /// Whether the next start knows where the table stands.
    forgets: bool,
    stop: bool,
    server: Option<Addr<Server>>,
    followers: usize,
    diffs: usize,
    starts: u64,
}

struct World {
    plan: Plan,
    history: History,
    server: ServerHost,
    followers: Vec<Follower>,
    quiet: bool,
    /// Until when nothing reaches this follower, nor the server from it.
    released: Option<(Duration, String)>,
    trace: Vec<String>,
}

impl World {
    fn new(plan: Plan, rng: &mut Rng) -> Self {
        let mut server = ServerHost::default();
        let entry =
            |number: u64| Change::write(key(number), Value::from(number.to_be_bytes().to_vec()));
        for number in 0..plan.keys {
            server.store.apply(&[entry(number)]).unwrap();
        }
        let follower = |_| {
            let mut follower = Follower::default();
            // Some of what the server has, and some that it has not.
            for number in (0..2 * plan.keys).filter(|_| rng.bool()) {
                follower.store.inner.apply(&[entry(number)]).unwrap();
            }
            follower
        };
        let followers = (0..plan.seed % 4 + 1).map(follower).collect();
        let (history, trace) = (History::new(plan.keys), Vec::new());
        Self { plan, history, server, followers, quiet: false, released: None, trace }
    }
}

type Shared = Rc<RefCell<World>>;

fn note(world: &Shared, who: &str, what: impl Debug) {
    let at = turmoil::sim_elapsed().unwrap_or_default();
    world.borrow_mut().trace.push(format!("{at:?} {who}: {what:?}"));
}

fn millis(rng: &mut Rng, from: u64, to: u64) -> Duration {
    Duration::from_millis(rng.u64(from..=to))
}

fn key(number: u64) -> Key {
    format!("key-{number}").into()
}

fn plan(seed: u64, rng: &mut Rng) -> Plan {
    let mut one_of = |sizes: &[usize]| rng.choice(sizes).copied().unwrap();
    let session = SessionConfig {
        heartbeat: HEARTBEAT,
        repair_bytes: one_of(&[100, 4 << 10, 64 << 10]),
        updated_keys: one_of(&[3, 1 << 20]),
        part_keys: one_of(&[2, 4 << 10]),
        shorten_changes: one_of(&[0, 1 << 10]),
        diff_stall: Duration::from_millis(500),
        ..SessionConfig::default()
    };
    let (keys, value_bytes) = (one_of(&[5, 50, 500]) as u64, one_of(&[0, 100, 5_000]));
    let pause = one_of(&[5, 40]) as u64;
    let token = Token::new("secret").unwrap();
    let server = ServerConfig {
        session,
        authorize: Arc::new(token.clone()),
        log_bytes: one_of(&[1_000, 50_000, 1 << 20]),
        diffs_at_once: one_of(&[1, 4]),
        diff_turn: Duration::from_millis(300),
        diffs_waiting: one_of(&[1, 100]),
        verify_every: Some(Duration::from_millis(300)),
        strangers: one_of(&[1, 100]),
        handshake_timeout: Duration::from_millis(500),
        stall_timeout: Duration::from_millis(500),
        drain_timeout: Duration::from_millis(200),
        flush_bytes: one_of(&[100, 256 << 10]),
        ..ServerConfig::default()
    };
    let client = ClientConfig {
        token: Some(token),
        heartbeat: HEARTBEAT,
        connect_timeout: Duration::from_millis(300),
        backoff_min: Duration::from_millis(10),
        backoff_max: Duration::from_millis(200),
        diff_every: Some(Duration::from_millis(400)).filter(|_| one_of(&[0, 1]) == 1),
        inbox_bytes: one_of(&[100, 4 << 20]),
        event_capacity: 1 << 16,
        ..ClientConfig::default()
    };
    Plan { seed, keys, value_bytes, pause, server, client }
}

/// The server's host: lets followers in, and writes.
async fn serve(world: Shared) -> turmoil::Result {
    loop {
        let (store, config, known, mut rng) = {
            let World { plan, server, .. } = &mut *world.borrow_mut();
            server.starts += 1;
            (server.stop, server.server) = (false, None);
            let known = server.position.filter(|_| !server.writing && !server.forgets);
            (server.writing, server.forgets) = (false, false);
            let rng = Rng::with_seed(plan.seed ^ server.starts << 32);
            (server.store.clone(), plan.server.clone(), known, rng)
        };
        let endpoint = Endpoint::start_here(Table::open(store.clone(), Limits::default())?, config);
        endpoint.listen(SimListener::bind().await?);
        let server = endpoint.server();
        let at = match known {
            Some(at) => server.send(server::ContinueFrom(at)).await?,
            None => {
                let epoch = world.borrow_mut().history.begin(map(&store));
                server.send(server::Ready(epoch)).await?
            }
        };
        note(&world, "server", at);
        {
            let host = &mut world.borrow_mut().server;
            (host.position, host.server) = (Some(at), Some(server.clone()));
        }
        while !world.borrow().server.stop {
            let status = server.send(server::GetStatus).await?;
            {
                let host = &mut world.borrow_mut().server;
                host.followers = status.followers;
                host.diffs = status.diffs_running + status.diffs_waiting;
            }
            let pause = world.borrow().plan.pause;
            sleep(millis(&mut rng, 1, pause)).await;
            if !world.borrow().quiet {
                write(&world, server, &mut rng).await?;
            }
        }
        endpoint.close().await;
        server.send(server::Stop).await?;
        note(&world, "server", "stopped");
        sleep(millis(&mut rng, 1, 300)).await;
    }
}

/// Some batches at once, so that other messages may come between them.
async fn write(world: &Shared, server: &Addr<Server>, rng: &mut Rng) -> turmoil::Result {
    let mut written = Vec::new();
    for _ in 0..rng.u8(1..4) {
        let World { plan, history, server: host, .. } = &mut *world.borrow_mut();
        host.writing = true;
        let count = rng.usize(1..4);
        let change = |_| {
            let bytes = rng.usize(0..=plan.value_bytes);
            history.change(key(rng.u64(0..plan.keys)), Some(bytes).filter(|_| rng.u8(0..4) > 0))
        };
        let batch = (0..count).map(change).collect();
        written.push(server.send(server::Write(batch)));
    }
    let mut position = None;
    for written in written {
        position = written.await??.position();
    }
    let host = &mut world.borrow_mut().server;
    (host.position, host.writing) = (position, false);
    Ok(())
}

/// A follower's host.
async fn follow(world: Shared, number: usize) -> turmoil::Result {
    let name = format!("follower-{number}");
    loop {
        let (store, config, position, mut rng) = {
            let World { plan, followers, .. } = &mut *world.borrow_mut();
            let host = &mut followers[number];
            host.starts += 1;
            (host.stop, host.diff, host.asked, host.health) = (false, false, 0, None);
            let rng = Rng::with_seed(plan.seed ^ host.starts << 32 ^ (number as u64 + 1) << 48);
            (host.store.clone(), plan.client.clone(), host.position.take(), rng)
        };
        let client = Client::new(Replica::open(store.clone())?, SimAccess, config).start();
        world.borrow_mut().followers[number].client = Some(client.clone());
        let mut events = client.send(client::Subscribe).await?;
        if let Some(position) = position {
            client.send(client::ContinueFrom(position)).await?;
        }
        client.send(client::Ready).await?;
        let (watched, watcher) = (Rc::clone(&world), name.clone());
        let watching = actix_rt::spawn(async move {
            loop {
                match events.recv().await {
                    Ok(event) => {
                        note(&watched, &watcher, &event);
                        let World { history, followers, .. } = &mut *watched.borrow_mut();
                        history.check(&mut followers[number].seen, &event);
                    }
                    Err(RecvError::Closed) => return,
                    Err(RecvError::Lagged(_)) => panic!("events are lost"),
                }
            }
        });
        while !world.borrow().followers[number].stop {
            look(&world, number, &client, &store.inner).await?;
            if std::mem::take(&mut world.borrow_mut().followers[number].diff) {
                ask(&world, number, &client);
            }
            sleep(LOOK).await;
        }
        let position = client.send(client::Stop).await?;
        watching.await?;
        note(&world, &name, position);
        world.borrow_mut().followers[number].position = position;
        sleep(millis(&mut rng, 1, 500)).await;
    }
}

/// Who says that nothing is missing has what the server had there.
async fn look(
    world: &Shared,
    number: usize,
    client: &Addr<Client>,
    store: &MemoryStore,
) -> turmoil::Result {
    let before = client.send(client::GetStatus).await?;
    let found = map(store);
    let after = client.send(client::GetStatus).await?;
    if before.health == Health::Ready
        && after.health == Health::Ready
        && let Some(at) = after.position
        && before.position == after.position
    {
        let wanted = world.borrow().history.at(at);
        assert!(found == wanted, "ready at {at:?}, but {}", difference(&found, &wanted));
    }
    world.borrow_mut().followers[number].health = Some(after.health);
    Ok(())
}

/// Asks for a diff, which is answered as long as the host lives.
fn ask(world: &Shared, number: usize, client: &Addr<Client>) {
    world.borrow_mut().followers[number].asked += 1;
    let (world, answer) = (Rc::clone(world), client.send(client::Diff));
    actix_rt::spawn(async move {
        let answer = answer.await;
        note(&world, &format!("follower-{number}"), &answer);
        match answer {
            Ok(Err(DiffError::AlreadyDiffing | DiffError::Disconnected | DiffError::Stopped))
            | Ok(Ok(_))
            | Err(_) => {}
            Ok(Err(error)) => panic!("{error}"),
        }
        let host = &mut world.borrow_mut().followers[number];
        host.asked = host.asked.saturating_sub(1);
    });
}

fn difference(found: &Map, wanted: &Map) -> String {
    let lacks = wanted.iter().filter(|(key, value)| found.get(*key) != Some(value)).count();
    let surplus = found.keys().filter(|key| !wanted.contains_key(*key)).count();
    format!("{lacks} keys are missing or differ, and {surplus} are too many")
}

/// Something that befalls a host or its way to the server.
fn fault(sim: &mut turmoil::Sim<'_>, world: &Shared, rng: &mut Rng) {
    let number = rng.usize(0..world.borrow().followers.len());
    let name = format!("follower-{number}");
    let host = name.as_str();
    let kind = rng.u8(0..16);
    match kind {
        0 => sim.partition("server", host),
        1 => sim.partition_oneway("server", host),
        2 => sim.partition_oneway(host, "server"),
        3 => {
            sim.hold("server", host);
            let until = sim.elapsed() + millis(rng, 100, 1000);
            world.borrow_mut().released = Some((until, name.clone()));
        }
        4 => sim.release("server", host),
        5..=7 => {
            sim.repair("server", host);
            sim.release("server", host);
        }
        8 => sim.crash(host),
        9 => {
            sim.crash(host);
            let follower = &mut world.borrow_mut().followers[number];
            (follower.store, follower.seen) = (FollowerStore::default(), Seen::default());
            follower.position = None;
        }
        10 => sim.bounce(host),
        11 => world.borrow_mut().followers[number].stop = true,
        12 => world.borrow_mut().followers[number].diff = true,
        13 => world.borrow_mut().server.stop = true,
        14 => {
            sim.crash("server");
            let server = &mut world.borrow_mut().server;
            server.forgets |= rng.bool();
            if rng.u8(0..4) == 0 {
                (server.store, server.forgets) = (MemoryStore::new(), true);
            }
        }
        _ => sim.bounce("server"),
    }
    let what = format!("fault {kind} {host}");
    world.borrow_mut().trace.push(format!("{:?} {what}", sim.elapsed()));
}

/// Nothing goes wrong any more, and all hosts run.
fn heal(sim: &mut turmoil::Sim<'_>, world: &Shared) {
    sim.set_fail_rate(0.0);
    world.borrow_mut().quiet = true;
    let count = world.borrow().followers.len();
    for number in 0..count {
        let host = format!("follower-{number}");
        sim.repair("server", host.as_str());
        sim.release("server", host.as_str());
        if !sim.is_host_running(host.as_str()) {
            sim.bounce(host.as_str());
        }
    }
    if !sim.is_host_running("server") {
        sim.bounce("server");
    }
}

/// What is not as it should be after quiet yet.
fn unfinished(world: &Shared) -> Option<String> {
    let world = world.borrow();
    let World { server, followers, .. } = &*world;
    let wanted = map(&server.store);
    for (number, follower) in followers.iter().enumerate() {
        let found = map(&follower.store.inner);
        if found != wanted {
            return Some(format!("follower-{number}: {}", difference(&found, &wanted)));
        }
        let alive = follower.client.as_ref().is_some_and(Addr::connected);
        if follower.health != Some(Health::Ready) || !alive {
            return Some(format!("follower-{number} is {:?}", follower.health));
        }
        if follower.asked > 0 {
            return Some(format!("follower-{number} waits for {} diffs", follower.asked));
        }
    }
    if !server.server.as_ref().is_some_and(Addr::connected) {
        return Some("there is no server".to_owned());
    }
    let (connected, diffs) = (server.followers, server.diffs);
    (connected != followers.len() || diffs > 0)
        .then(|| format!("the server has {connected} followers and {diffs} diffs"))
}

fn simulate(seed: u64, panics: bool, world: &mut Option<Shared>) -> Result<(), String> {
    let mut rng = Rng::with_seed(seed);
    // Of the waits between attempts.
    fastrand::seed(seed);
    tablecast_actors::compute_here();
    let plan = plan(seed, &mut rng);
    let latency = rng.u64(1..=30);
    let mut sim = turmoil::Builder::new()
        .rng_seed(rng.u64(..))
        .tick_duration(TICK)
        .simulation_duration(2 * (FAULTS + QUIET))
        .min_message_latency(Duration::ZERO)
        .max_message_latency(Duration::from_millis(latency))
        .fail_rate(rng.choice([0.0, 0.0, 0.002, 0.02]).unwrap())
        .repair_rate(0.3)
        // It panics where more connections wait to be accepted.
        .tcp_capacity(rng.choice([64, 1024]).unwrap())
        .build();
    let shared = World::new(plan, &mut rng);
    let count = shared.followers.len();
    let shared: Shared = Rc::new(RefCell::new(shared));
    *world = Some(Rc::clone(&shared));
    let hosted = Rc::clone(&shared);
    sim.host("server", move || serve(Rc::clone(&hosted)));
    for number in 0..count {
        let hosted = Rc::clone(&shared);
        sim.host(format!("follower-{number}"), move || follow(Rc::clone(&hosted), number));
    }
    let step = |sim: &mut turmoil::Sim<'_>| {
        sim.step().map_err(|error| error.to_string())?;
        let panics = PANICS.lock().unwrap_or_else(PoisonError::into_inner);
        if panics.is_empty() { Ok(()) } else { Err(panics.join("; ")) }
    };
    while sim.elapsed() < FAULTS {
        step(&mut sim)?;
        let released = shared.borrow_mut().released.take_if(|(until, _)| *until < sim.elapsed());
        if let Some((_, host)) = released {
            sim.release("server", host);
        }
        if rng.u8(0..30) == 0 {
            fault(&mut sim, &shared, &mut rng);
        }
        if panics && sim.elapsed() > FAULTS / 2 {
            shared.borrow().followers[0].store.panics.store(true, Ordering::Relaxed);
        }
    }
    heal(&mut sim, &shared);
    while let Some(why) = unfinished(&shared) {
        if sim.elapsed() > FAULTS + QUIET {
            return Err(format!("after {QUIET:?} of quiet: {why}"));
        }
        step(&mut sim)?;
    }
    Ok(())
}

/// What happened in a run, and why it failed, if it did.
pub struct Run {
    pub trace: Vec<String>,
    pub failed: Option<String>,
}

/// One run; `panics` makes a follower's store panic half-way.
pub fn run(seed: u64, panics: bool) -> Run {
    let _one = RUNNING.lock().unwrap_or_else(PoisonError::into_inner);
    PANICS.lock().unwrap_or_else(PoisonError::into_inner).clear();
    let hook = panic::take_hook();
    panic::set_hook(Box::new(|info| {
        let what = info.to_string();
        PANICS.lock().unwrap_or_else(PoisonError::into_inner).push(what);
    }));
    let mut world = None;
    let ended = panic::catch_unwind(AssertUnwindSafe(|| simulate(seed, panics, &mut world)));
    panic::set_hook(hook);
    let panics = PANICS.lock().unwrap_or_else(PoisonError::into_inner).join("; ");
    let failed = match ended {
        Ok(Ok(())) => Some(panics).filter(|panics| !panics.is_empty()),
        Ok(Err(why)) if panics.is_empty() => Some(why),
        Ok(Err(_)) => Some(panics),
        Err(_) => Some(panics),
    };
    let trace = world.map_or_else(Vec::new, |world| world.borrow().trace.clone());
    Run { trace, failed }
}
