//! `instructions`: how many instructions the hot paths take, for inputs that never change. Counted by
//! callgrind, so that a noisy machine counts the same, and beside a file of what was accepted.

use std::collections::BTreeMap;
use std::fs;
use std::hint::black_box;
use std::path::PathBuf;
use std::process::{Command, Stdio};
use std::time::Duration;

use anyhow::{Context, bail, ensure};
use clap::ValueEnum;
use serde::{Deserialize, Serialize};
use tablecast::MemoryStore;
use tablecast_bench::{KEY_BYTES, SEED, differences, keys, random_bytes, store};
use tablecast_protocol::server::{Session, SessionConfig, Transmit};
use tablecast_protocol::{Change, Epoch, FollowerId, Limits, Log, Table, ToServer, Tree, Way};

use crate::diff::{VALUE_BYTES, tree_of, walk};
use crate::machine;

const KEYS: usize = 20_000;
const FOLLOWERS: u64 = 100;

/// Small work is done so often: where things happen to be in memory makes some ten thousand instructions.
const TIMES: usize = 10;

/// By how much a count may grow.
const TOLERATED: f64 = 0.1;

#[derive(Debug, clap::Args)]
pub(crate) struct Args {
    /// Writes what is counted to the file, instead of comparing it with what is there.
    #[arg(long)]
    accept: bool,
    /// What was accepted.
    #[arg(long, value_name = "FILE", default_value = "bench/instructions.json")]
    file: PathBuf,
}

#[derive(Debug, clap::Args)]
pub(crate) struct WorkArgs {
    #[arg(long)]
    what: What,
    /// Only what comes before: the difference is what counts.
    #[arg(long)]
    idle: bool,
}

/// What is counted.
#[derive(Clone, Copy, Debug, ValueEnum)]
enum What {
    /// 5,000 new keys into a tree of 20,000.
    Insert,
    /// Ten times the root of a tree of 20,000 behind 1,000 writes.
    Root,
    /// Ten times a walk that finds 300 of 20,000 keys.
    Walk,
    /// 64 units of 64 writes into a table, into frames, and out of a log to 100 followers.
    FanOut,
}

/// The committed file. Counts of another compiler or architecture say nothing.
#[derive(Debug, PartialEq, Serialize, Deserialize)]
struct Accepted {
    compiler: String,
    architecture: String,
    counts: BTreeMap<String, u64>,
}

pub(crate) fn run(args: &Args) -> anyhow::Result<()> {
    if machine::said("valgrind", &["--version"]).is_empty() {
        println!("skipped: valgrind is not installed");
        return Ok(());
    }
    let mut counts = BTreeMap::new();
    for what in What::value_variants() {
        let name = what.to_possible_value().context("every one has a name")?.get_name().to_owned();
        let count = count(&name, false)?.checked_sub(count(&name, true)?);
        counts.insert(name, count.context("work takes instructions")?);
    }
    let counted = Accepted {
        compiler: machine::said("rustc", &["--version"]),
        architecture: std::env::consts::ARCH.to_owned(),
        counts,
    };
    if args.accept {
        let text = serde_json::to_string_pretty(&counted)? + "\n";
        fs::write(&args.file, &text)
            .with_context(|| format!("cannot write {}", args.file.display()))?;
        print!("{text}");
        return Ok(());
    }
    let text = fs::read_to_string(&args.file)
        .with_context(|| format!("cannot read {}", args.file.display()))?;
    compare(&counted, &serde_json::from_str(&text)?)
}

fn compare(counted: &Accepted, accepted: &Accepted) -> anyhow::Result<()> {
    let same =
        (&counted.compiler, &counted.architecture) == (&accepted.compiler, &accepted.architecture);
    let mut grown = Vec::new();
    for (name, count) in &counted.counts {
        let before = accepted.counts.get(name).copied().unwrap_or_default();
        let change = *count as f64 / before as f64 - 1.0;
        println!(
            "{name:8} {count:>12} instructions, accepted {before:>12}: {:+.1} %",
            change * 100.0
        );
        if *count as f64 > before as f64 * (1.0 + TOLERATED) {
            grown.push(name.as_str());
        }
    }
    if !same {
        println!(
            "not judged: accepted were those of {} on {}, these are of {} on {}",
            accepted.compiler, accepted.architecture, counted.compiler, counted.architecture
        );
    } else if !grown.is_empty() {
        bail!(
            "more than {:.0} % above what was accepted: {}. If that is wanted: cargo run --release -p \
             tablecast-bench -- instructions --accept",
            TOLERATED * 100.0,
            grown.join(", ")
        );
    }
    Ok(())
}

/// Instructions of a whole process of this program, which does nothing else.
fn count(what: &str, idle: bool) -> anyhow::Result<u64> {
    let mut command = Command::new("valgrind");
    command.args(["--tool=callgrind", "--callgrind-out-file=/dev/null"]);
    command.arg(std::env::current_exe()?).args(["instructions-work", "--what", what]);
    command.args(idle.then_some("--idle")).stdin(Stdio::null());
    let output = command.output()?;
    let said = String::from_utf8_lossy(&output.stderr);
    ensure!(output.status.success(), "{command:?} ended with {}: {said}", output.status);
    let line = said.lines().find_map(|line| line.split("Collected :").nth(1));
    Ok(line.with_context(|| format!("callgrind counted nothing: {said}"))?.trim().parse()?)
}

/// What runs under callgrind.
pub(crate) fn work(args: &WorkArgs) -> anyhow::Result<()> {
    let keys = keys(KEYS);
    match args.what {
        What::Insert | What::Root => insert(&keys, args)?,
        What::Walk => {
            let server = tree_of(&store(&keys, VALUE_BYTES))?;
            let mut follower = server.clone();
            for change in differences(&keys, 300, VALUE_BYTES, 0) {
                match change {
                    Change::Write { key, value } => follower.insert(&key, &value),
                    Change::Delete { key } => follower.remove(&key),
                };
            }
            server.root();
            follower.root();
            for _ in 0..if args.idle { 0 } else { TIMES } {
                black_box(walk(&server, &follower)?);
            }
        }
        What::FanOut => fan_out(&keys, args.idle)?,
    }
    Ok(())
}

fn insert(keys: &[[u8; KEY_BYTES]], args: &WorkArgs) -> anyhow::Result<()> {
    let mut tree: Tree = tree_of(&store(keys, VALUE_BYTES))?;
    tree.root();
    let mut random = fastrand::Rng::with_seed(SEED + 5);
    let value = random_bytes(&mut random, VALUE_BYTES);
    if matches!(args.what, What::Root) {
        for keys in keys.chunks(1000).take(TIMES) {
            for key in keys {
                tree.insert(key, &value);
            }
            if !args.idle {
                black_box(tree.root());
            }
        }
    } else {
        let new: Vec<_> = (0..5000).map(|_| tablecast_bench::random_key(&mut random)).collect();
        let count = if args.idle { 0 } else { new.len() };
        for key in new.iter().take(count) {
            tree.insert(key, &value);
        }
    }
    // Taking it down is in neither count.
    std::mem::forget(black_box(tree));
    Ok(())
}

fn fan_out(keys: &[[u8; KEY_BYTES]], idle: bool) -> anyhow::Result<()> {
    let limits = Limits::default();
    let store: MemoryStore = store(keys, VALUE_BYTES);
    let mut table = Table::open(store, limits)?;
    table.ready(Epoch::from_bytes([7; 16]));
    let at = table.position().context("it is ready")?;
    let mut log = Log::new(64 << 20, at.revision, at.chain);
    let mut random = fastrand::Rng::with_seed(SEED + 5);
    let mut changes = differences(keys, 3 * 64 * 64, VALUE_BYTES, 0);
    random.shuffle(&mut changes);
    let mut sessions = Vec::new();
    for number in 0..FOLLOWERS {
        let (config, now) = (SessionConfig::default(), Duration::ZERO);
        let mut session = Session::new(config, FollowerId(number), now);
        session.handle_message(ToServer::hello("counted", &limits, None), now);
        session.handle_subscribed(at, Way::NoPosition, at);
        while session.poll_transmit(&log).is_some() {}
        sessions.push(session);
    }
    let mut bytes = 0;
    for unit in changes.chunks(64).take(if idle { 0 } else { 64 }) {
        table.write(unit)?;
        table.seal();
        while let Some((chunk, chain)) = table.next_chunk() {
            log.push(chunk, chain, Duration::ZERO);
        }
        for session in &mut sessions {
            while let Some(Transmit::Live(frame)) = session.poll_transmit(&log) {
                bytes += frame.len();
            }
        }
    }
    black_box(bytes);
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::{Accepted, compare};

    fn counted(compiler: &str, count: u64) -> Accepted {
        let counts = [("insert".to_owned(), count)].into();
        Accepted { compiler: compiler.into(), architecture: "any".into(), counts }
    }

    #[test]
    fn growth_is_refused() {
        let accepted = counted("1", 1000);
        compare(&counted("1", 1100), &accepted).unwrap();
        let error = compare(&counted("1", 1101), &accepted).unwrap_err();
        assert!(error.to_string().contains("--accept"), "{error}");
        compare(&counted("2", 9999), &accepted).unwrap();
    }
}
