//! Rows about a diff while the stream goes on: what the others notice, and the one that is repaired.

use std::net::SocketAddr;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Arc, Mutex, PoisonError, mpsc};
use std::thread::JoinHandle;
use std::time::Duration;

use anyhow::{Context, ensure};
use tablecast::access::tcp::TcpAccess;
use tablecast::{
    Change, Client, ClientConfig, DiffOutcome, MemoryStore, Reader, Store, StoreError,
};
use tablecast_bench::{differences, disturb, keys, missing, percentile, store};

use super::load::Readers;
use super::system::{Own, System, finish, followers, now_ns};
use super::{Bench, Goal, Line};
use crate::block_on;

const VALUE_BYTES: usize = 32;

/// Longer than any of it takes: only a hang is noticed by it.
const PATIENCE: Duration = Duration::from_secs(300);

/// Writes that are ordered at once while a diff runs.
const PIECE: u64 = 100;

const QUIET: usize = 0;
const REPAIR: usize = 1;
const AFTERWARDS: usize = 2;

/// Live changes as they arrive in a follower's table: how old each is.
#[derive(Debug, Default)]
struct Ages {
    /// Older changes are not live ones; `u64::MAX` takes none.
    since_ns: AtomicU64,
    taken: Mutex<Vec<u64>>,
}

impl Ages {
    /// What has been taken, in order; from here on, changes made from now on are.
    fn take(&self) -> anyhow::Result<Vec<u64>> {
        self.since_ns.store(now_ns()?, Ordering::Relaxed);
        let mut taken = std::mem::take(&mut *self.lock());
        taken.sort_unstable();
        Ok(taken)
    }

    fn lock(&self) -> std::sync::MutexGuard<'_, Vec<u64>> {
        self.taken.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// A store in memory that looks at the time in each value.
struct Timed {
    store: MemoryStore,
    ages: Arc<Ages>,
}

impl Store for Timed {
    fn apply(&mut self, changes: &[Change]) -> Result<(), StoreError> {
        let now_ns = now_ns().map_err(StoreError::new)?;
        // A repair may bring a live change once more.
        let new = |change: &&Change| {
            self.store.get(change.key()).ok().flatten().as_ref() != change.value()
        };
        let written = changes.iter().filter(new).filter_map(|change| change.value()?.first_chunk());
        let since_ns = self.ages.since_ns.load(Ordering::Relaxed);
        let live = |time: &u64| (since_ns..=now_ns).contains(time);
        let times = written.copied().map(u64::from_be_bytes).filter(live);
        self.ages.lock().extend(times.map(|time| now_ns - time));
        self.store.apply(changes)
    }

    fn reader(&self) -> Arc<dyn Reader> {
        self.store.reader()
    }
}

async fn connect(address: SocketAddr, store: impl Store) -> anyhow::Result<Client> {
    let access = TcpAccess::new(address.to_string());
    let client = Client::start(ClientConfig::default(), store, access)?;
    client.ready().await?;
    client.wait_ready(PATIENCE).await?;
    Ok(client)
}

pub(crate) fn live(bench: &Bench) -> anyhow::Result<Vec<Line>> {
    let (count, lacking) = (bench.keys(1_000_000), bench.keys(100_000));
    let mut own = Own::tablecast(&bench.found, count, VALUE_BYTES)?;
    let keys = keys(count);
    let ages = Arc::new(Ages::default());
    let timed = Timed { store: store(&keys, VALUE_BYTES), ages: Arc::clone(&ages) };
    let client = block_on(connect(own.address(), timed))?;
    let (told, _) = mpsc::channel();
    let others = 9;
    let readers = Readers::start(followers(&own, others)?, others, 1, told);
    let shared = Arc::clone(&readers.shared);
    let phase = |phase| shared.phase.store(phase, Ordering::Relaxed);

    let mut writes = bench.writes(3000);
    ages.take()?;
    phase(QUIET);
    own.pace(writes, 1000)?;
    let quiet = ages.take()?;
    phase(AFTERWARDS);
    block_on(disturb(&client, missing(&keys, lacking, 0)))?;

    let over = AtomicBool::new(false);
    let (report, repaired) = std::thread::scope(|scope| -> anyhow::Result<_> {
        let (own, over, writes) = (&mut own, &over, &mut writes);
        let pacing = scope.spawn(move || -> anyhow::Result<()> {
            while !over.load(Ordering::Relaxed) {
                own.pace(PIECE, 1000)?;
                *writes += PIECE;
            }
            Ok(())
        });
        phase(REPAIR);
        ages.take()?;
        let outcome = block_on(async { Ok(client.diff().await?) });
        let repaired = ages.take();
        phase(AFTERWARDS);
        over.store(true, Ordering::Relaxed);
        pacing.join().map_err(|_| anyhow::anyhow!("a thread panicked"))??;
        let DiffOutcome::Done(report) = outcome? else { anyhow::bail!("the diff was aborted") };
        Ok((report, repaired?))
    })?;
    ensure!(report.equal(), "the roots differ: {report:?}");
    block_on(async {
        client.stop().await;
        Ok(())
    })?;
    let seen = finish(&mut own, readers, writes)?;

    let p99 = |ages: &[u64]| percentile(ages, 99).map(|age| age as f64 / 1e3);
    let line = |what, ours: Option<f64>, theirs: Option<f64>, goal| {
        let what = format!("{what} p99 while {lacking} keys are repaired");
        Line::new(what, "us").ours(ours).theirs("quiet", theirs).goal(Goal::AtMost(goal))
    };
    let of_others = |phase| Some(seen.percentile(phase, 99));
    Ok(vec![
        line("nine others:", of_others(REPAIR), of_others(QUIET), 2.0),
        line("the repaired:", p99(&repaired), p99(&quiet), 5.0),
    ])
}

/// A follower that is made to differ and compared, again and again, on a thread of its own.
pub(crate) struct Diffs {
    /// Begins them; dropped, it ends them.
    begin: mpsc::Sender<()>,
    over: Arc<AtomicBool>,
    thread: JoinHandle<anyhow::Result<u64>>,
}

impl Diffs {
    /// Connects it.
    pub(crate) fn start(address: SocketAddr, count: usize, differ: usize) -> anyhow::Result<Self> {
        let (begin, begun) = mpsc::channel();
        let over = Arc::new(AtomicBool::new(false));
        let keys = keys(count);
        let client = block_on(connect(address, store(&keys, VALUE_BYTES)))?;
        let ended = Arc::clone(&over);
        let thread = std::thread::spawn(move || {
            begun.recv().context("nobody wants diffs")?;
            block_on(async {
                let mut done = 0;
                while !ended.load(Ordering::Relaxed) {
                    disturb(&client, differences(&keys, differ, VALUE_BYTES, done)).await?;
                    // One that began by itself, or was aborted as the follower fell behind, is no error.
                    done += u64::from(matches!(client.diff().await, Ok(DiffOutcome::Done(_))));
                }
                client.stop().await;
                Ok(done)
            })
        });
        Ok(Self { begin, over, thread })
    }

    pub(crate) fn go_on(&self) {
        // It has failed if nobody hears this; `stop` says why.
        self.begin.send(()).ok();
    }

    /// How many were done.
    pub(crate) fn stop(self) -> anyhow::Result<u64> {
        self.over.store(true, Ordering::Relaxed);
        self.thread.join().map_err(|_| anyhow::anyhow!("a thread panicked"))?
    }
}
