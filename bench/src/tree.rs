//! `tree`: the Merkle tree alone, without store, socket or actor.

use std::hint::black_box;
use std::process::{Command, Stdio};
use std::time::Instant;

use anyhow::Context;
use clap::ValueEnum;
use serde_json::json;
use tablecast_bench::{KEY_BYTES, SEED, keys, median, random_key};
use tablecast_protocol::Tree;

use crate::process;
use crate::report::{Report, rounded};

const VALUE_BYTES: usize = 32;

/// How many writes are scattered before the root whose time is taken.
const SCATTERED: usize = 1000;

#[derive(Debug, clap::Args)]
pub(crate) struct Args {
    /// Keys in the table, of 16 bytes each, with values of 32.
    #[arg(long, default_value_t = 1_000_000)]
    keys: usize,
    /// Single writes in each of the rows that measure them; as many as keys if not given.
    #[arg(long)]
    writes: Option<usize>,
    /// One JSON object instead of lines.
    #[arg(long)]
    pub(crate) json: bool,
}

#[derive(Debug, clap::Args)]
pub(crate) struct MemoryArgs {
    #[arg(long)]
    keys: usize,
    #[arg(long)]
    how: How,
}

/// How a tree came to be.
#[derive(Clone, Copy, Debug, ValueEnum)]
enum How {
    /// In bulk.
    Built,
    /// Key by key.
    Filled,
}

type Value = [u8; VALUE_BYTES];

pub(crate) fn run(args: &Args) -> anyhow::Result<Report> {
    let keys = keys(args.keys);
    let count = args.writes.unwrap_or(args.keys);
    let values = values(args.keys, SEED + 1);

    let (mut tree, build_ns) = per(args.keys, || Tree::build(keys.iter().zip(&values)));
    let (_, first_root_ns) = per(args.keys, || tree.root());
    let (_, fill_ns) = per(args.keys, || {
        let mut tree = Tree::new();
        write(&mut tree, keys.iter().zip(&values), 100_000, usize::MAX);
        tree
    });

    let mut random = fastrand::Rng::with_seed(SEED + 2);
    let new = self::values(count, SEED + 3);
    let chosen: Vec<_> = (0..count).filter_map(|_| random.choice(&keys).copied()).collect();
    let mut written = |root_every, snapshot_every| {
        per(count, || write(&mut tree, chosen.iter().zip(&new), root_every, snapshot_every)).1
    };
    let root_1000_ns = written(1000, usize::MAX);
    let root_100_000_ns = written(100_000, usize::MAX);
    let snapshot_1000_ns = written(100_000, 1000);

    let roots = chosen.chunks(SCATTERED).zip(new.chunks(SCATTERED)).take(20).map(|(keys, new)| {
        write(&mut tree, keys.iter().zip(new), usize::MAX, usize::MAX);
        let start = Instant::now();
        black_box(tree.root());
        start.elapsed().as_secs_f64() * 1e3
    });
    let root_ms = median(roots.collect());

    Ok(Report::of("tree")
        .with("keys", args.keys)
        .with("writes", count)
        .with("build_ns_per_key", build_ns)
        .with("first_root_ns_per_key", first_root_ns)
        .with("fill_ns_per_key", fill_ns)
        .with(
            "write_ns",
            json!({
                "root_every_1000": root_1000_ns,
                "root_every_100000": root_100_000_ns,
                "snapshot_every_1000": snapshot_1000_ns,
            }),
        )
        .with("root_after_1000_writes_ms", rounded(root_ms))
        .with(
            "bytes_per_key",
            json!({
                "built": memory(args.keys, How::Built)?,
                "filled": memory(args.keys, How::Filled)?,
            }),
        ))
}

fn values(count: usize, seed: u64) -> Vec<Value> {
    let mut random = fastrand::Rng::with_seed(seed);
    (0..count).map(|_| value(&mut random)).collect()
}

fn value(random: &mut fastrand::Rng) -> Value {
    let mut value = [0; VALUE_BYTES];
    random.fill(&mut value);
    value
}

/// What `work` gives, and how many nanoseconds it took for each of `count`.
fn per<T>(count: usize, work: impl FnOnce() -> T) -> (T, f64) {
    let start = Instant::now();
    let result = black_box(work());
    (result, rounded(start.elapsed().as_secs_f64() * 1e9 / count.max(1) as f64))
}

/// Single writes, with a root and a new snapshot, which is held until the next, every so many.
fn write<'a>(
    tree: &mut Tree,
    changes: impl Iterator<Item = (&'a [u8; KEY_BYTES], &'a Value)>,
    root_every: usize,
    snapshot_every: usize,
) {
    let mut snapshot = None;
    for (number, (key, value)) in (1..).zip(changes) {
        tree.insert(key, value);
        if number % root_every == 0 {
            black_box(tree.root());
        }
        if number % snapshot_every == 0 {
            snapshot = Some(tree.clone());
        }
    }
    drop(snapshot);
}

/// Bytes of a tree for each key, beside the key's own, in a fresh process: memory that another
/// measurement has freed would be taken for none.
fn memory(keys: usize, how: How) -> anyhow::Result<f64> {
    let how = how.to_possible_value().context("every way has a name")?;
    let output = Command::new(std::env::current_exe()?)
        .args(["tree-memory", "--keys", &keys.to_string(), "--how", how.get_name()])
        .stderr(Stdio::inherit())
        .output()?;
    anyhow::ensure!(output.status.success(), "tree-memory ended with {}", output.status);
    let bytes: f64 = String::from_utf8(output.stdout)?.trim().parse()?;
    Ok(rounded(bytes / keys.max(1) as f64 - KEY_BYTES as f64))
}

/// Prints the bytes by which a tree made this process grow. Nothing else is kept meanwhile.
pub(crate) fn run_memory(args: &MemoryArgs) -> anyhow::Result<()> {
    let mut random = fastrand::Rng::with_seed(SEED);
    let entries = (0..args.keys).map(|_| (random_key(&mut random), value(&mut random)));
    let before = process::rss_bytes("self")?;
    let tree = match args.how {
        How::Built => Tree::build(entries),
        How::Filled => entries.fold(Tree::new(), |mut tree, (key, value)| {
            tree.insert(&key, &value);
            tree
        }),
    };
    tree.root();
    println!("{}", process::rss_bytes("self")?.saturating_sub(before));
    drop(tree);
    Ok(())
}
