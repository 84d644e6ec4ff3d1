//! Tablecast's pure core in one thread, under a scheduler that owns time, delivery and whatever goes wrong.
//!
//! One seed is one run: a server and one to three followers, with real tables, logs, sessions and walks,
//! joined by queues of frames. The seed decides what the run is like (sizes, limits, which faults, what is
//! slow) and then every step. A run has two parts: so many deliveries of messages with faults, then
//! quiet. Tables, logs and frames are small, so that a few hundred deliveries reach all of the protocol. In one run of
//! eight, and where a bit is to flip, messages are on their way as bytes; in the others as they are.
//!
//! What must hold is checked at every step, key by key, against the history of the server's table:
//!
//! * every change that a follower is sent is one of the history, with that value at that revision; none is
//!   older than what the follower has seen of its key; no repair touches a key updated meanwhile;
//! * a follower that has a position has the server's table of that revision; one that knows of a refusal or of another
//!   root has none, and does not compare roots;
//! * roots that are compared are equal exactly if the tables are, stores included: every corruption
//!   is found by the next comparison;
//! * no honest end breaks the protocol; a flipped bit on the wire ends its own connection at the most;
//! * no queue grows beyond its bound, nor what a diff remembers, nor the repairs that are on their way;
//! * after quiet, everything comes to its end within a bounded number of steps, and after two checkpoints
//!   all tables are equal, without anybody asking for a diff.
//!
//! The method is that of FoundationDB's and TigerBeetle's simulators: deterministic simulation with
//! faults drawn anew for each run (swarm testing, Groce et al., 2012).
//!
//! ```
//! use tablecast_simulator::{Totals, run};
//!
//! let mut totals = Totals::default();
//! run(7, 400, &mut totals).unwrap();
//! assert!(totals.delivered >= 400);
//! ```

#![allow(
    clippy::unwrap_used,
    clippy::indexing_slicing,
    clippy::cast_possible_truncation,
    clippy::wildcard_enum_match_arm,
    clippy::too_many_lines,
    reason = "a run that panics has failed, and its numbers are small"
)]

mod choices;
mod coverage;
mod fault;
mod follower;
pub mod fuzz;
mod history;
mod pipe;
mod scheduler;
mod store;
mod world;

use std::fmt;
use std::panic::{AssertUnwindSafe, catch_unwind};

use choices::Choices;
pub use coverage::Coverage;
pub use fault::Fault;
use world::World;

type Checked = Result<(), String>;

fn check(holds: bool, why: impl FnOnce() -> String) -> Checked {
    if holds { Ok(()) } else { Err(why()) }
}

/// What a run is like.
#[derive(Clone, Debug)]
struct Config {
    followers: usize,
    keys: usize,
    log_bytes: usize,
    updated_keys: usize,
    repair_bytes: usize,
    answer_bytes: usize,
    query_bytes: usize,
    part_keys: usize,
    diffs_at_once: usize,
    diffs_waiting: usize,
    shorten_changes: usize,
    /// How many keys a diff may delete before somebody says that it is meant.
    max_deletes: u64,
    /// Most frames on their way to a follower.
    room: usize,
    /// Deliveries before it gets quiet.
    deliveries: u64,
    /// Of a thousand steps, how many are faults, and how many are writes and the like.
    fault_rate: u16,
    write_rate: u16,
    /// Kinds of steps that are late most of the time.
    slow: u8,
    /// A bit a fault that may happen.
    faults: u64,
    /// Messages are on their way as bytes.
    as_bytes: bool,
    #[cfg(feature = "mutations")]
    mutation: Option<tablecast_protocol::Mutation>,
}

impl Config {
    fn draw(rng: &mut Choices<'_>, deliveries: u64) -> Self {
        let mut pick = |choices: &[usize]| choices[rng.usize(..choices.len())];
        let keys = pick(&[4, 6, 6, 9, 9, 12, 24, 63]);
        let shorten_changes = pick(&[0, 1000, 1000]);
        let max_deletes = pick(&[1, usize::MAX, usize::MAX]) as u64;
        let fault_rate = pick(&[0, 6, 24, 72]) as u16;
        let write_rate = pick(&[10, 30, 70]) as u16;
        Self {
            followers: rng.usize(1..=3),
            keys,
            log_bytes: if rng.bool() { rng.usize(9000..24_000) } else { rng.usize(300..4000) },
            updated_keys: rng.usize(2..18),
            repair_bytes: rng.usize(8..200),
            answer_bytes: rng.usize(60..500),
            query_bytes: rng.usize(4..60),
            part_keys: rng.usize(1..30),
            diffs_at_once: rng.usize(1..=2),
            diffs_waiting: rng.usize(1..=3),
            shorten_changes,
            max_deletes,
            room: rng.usize(1..=6),
            deliveries,
            fault_rate,
            write_rate,
            slow: rng.u8(..) & rng.u8(..),
            // A quarter of the runs have all faults, the others half of them each.
            faults: if rng.u8(..4) == 0 { u64::MAX } else { rng.u64(..) },
            as_bytes: rng.u8(..8) == 0,
            #[cfg(feature = "mutations")]
            mutation: None,
        }
    }

    fn allows(&self, fault: Fault) -> bool {
        self.faults >> (fault as u32) & 1 == 1
    }
}

/// What happened in all runs so far.
#[derive(Clone, Debug)]
pub struct Totals {
    /// Runs.
    pub runs: u64,
    /// Messages that were delivered.
    pub delivered: u64,
    /// Steps of any kind.
    pub steps: u64,
    /// How often each fault of [`Fault::ALL`] happened.
    pub faults: Vec<u64>,
    /// What the server's ends were sent.
    pub server: Coverage,
    /// What the followers' ends were sent.
    pub client: Coverage,
    /// Diffs that were done.
    pub diffs: u64,
    /// Diffs that were aborted.
    pub aborts: u64,
    /// Keys that were repaired.
    pub repaired: u64,
    /// Roots that were compared from time to time.
    pub verified: u64,
    /// Keys that were found to be changed behind a follower's back.
    pub found: u64,
    /// Catch-ups that came to their end.
    pub caught_up: u64,
    /// How often each way was taken, by its code.
    pub ways: [u64; 7],
}

impl Default for Totals {
    fn default() -> Self {
        Self {
            runs: 0,
            delivered: 0,
            steps: 0,
            faults: vec![0; Fault::ALL.len()],
            server: Coverage::server(),
            client: Coverage::client(),
            diffs: 0,
            aborts: 0,
            repaired: 0,
            verified: 0,
            found: 0,
            caught_up: 0,
            ways: [0; 7],
        }
    }
}

impl Totals {
    /// Adds what another thread counted.
    pub fn add(&mut self, other: &Self) {
        let sums = self.faults.iter_mut().chain(&mut self.ways);
        for (sum, count) in sums.zip(other.faults.iter().chain(&other.ways)) {
            *sum += count;
        }
        self.server.add(&other.server);
        self.client.add(&other.client);
        self.runs += other.runs;
        self.delivered += other.delivered;
        self.steps += other.steps;
        self.diffs += other.diffs;
        self.aborts += other.aborts;
        self.repaired += other.repaired;
        self.verified += other.verified;
        self.found += other.found;
        self.caught_up += other.caught_up;
    }
}

/// A run that did not hold what it must.
#[derive(Clone, Debug)]
pub struct Failure {
    /// Which run.
    pub seed: u64,
    /// Of how many deliveries it was to be.
    pub deliveries: u64,
    /// What did not hold.
    pub why: String,
    /// What had been done, if that was asked for.
    pub trace: Vec<String>,
}

impl fmt::Display for Failure {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Self { seed, deliveries, why, .. } = self;
        writeln!(f, "seed {seed}: {why}")?;
        let command = "cargo run --release -p tablecast-bench -- simulate";
        write!(f, "{command} --seed {seed} --deliveries {deliveries}")
    }
}

impl std::error::Error for Failure {}

/// One run, of so many deliveries with faults and as many without as it takes to converge.
///
/// # Errors
/// If something does not hold that must, a panic included. The error has the seed.
pub fn run(seed: u64, deliveries: u64, totals: &mut Totals) -> Result<(), Failure> {
    Run { seed, deliveries, ..Run::default() }.run(totals)
}

/// One run whose decisions are these bytes, one each, as far as they go: for a fuzzer, which finds what a
/// seed does not. A panic is left to the caller.
///
/// # Errors
/// Says what did not hold.
pub fn run_choices(bytes: &[u8], totals: &mut Totals) -> Result<(), String> {
    let mut choices = Choices::of_bytes(bytes);
    // A delivery takes some eight decisions.
    let config = Config::draw(&mut choices, bytes.len() as u64 / 8);
    totals.runs += 1;
    let mut world = World::new(config, choices, totals);
    world.run().and_then(|()| world.converge())
}

/// A run, and what is special about it.
#[derive(Clone, Copy, Debug, Default)]
pub struct Run {
    /// What decides everything.
    pub seed: u64,
    /// Messages that are delivered before it gets quiet.
    pub deliveries: u64,
    /// Keep what was done for [`Failure::trace`].
    pub trace: bool,
    /// Break this rule of the protocol.
    #[cfg(feature = "mutations")]
    pub mutation: Option<tablecast_protocol::Mutation>,
}

impl Run {
    /// Runs it.
    ///
    /// # Errors
    /// If something does not hold that must.
    pub fn run(self, totals: &mut Totals) -> Result<(), Failure> {
        let mut rng = Choices::of_seed(self.seed);
        #[cfg_attr(not(feature = "mutations"), expect(unused_mut, reason = "one shape"))]
        let mut config = Config::draw(&mut rng, self.deliveries);
        #[cfg(feature = "mutations")]
        {
            config.mutation = self.mutation;
        }
        totals.runs += 1;
        let Self { seed, deliveries, .. } = self;
        let failed = |why, trace| Failure { seed, deliveries, why, trace };
        let panicked = |_| "a panic: see above".to_owned();
        let world = catch_unwind(AssertUnwindSafe(|| World::new(config, rng, totals)));
        let mut world = world.map_err(|panic| failed(panicked(panic), Vec::new()))?;
        world.trace = self.trace.then(Vec::new);
        let ran = catch_unwind(AssertUnwindSafe(|| world.run().and_then(|()| world.converge())));
        world.totals.delivered += world.delivered;
        world.totals.steps += world.steps;
        let trace = world.trace.take().unwrap_or_default();
        ran.map_err(panicked).flatten().map_err(|why| failed(why, trace))
    }
}
