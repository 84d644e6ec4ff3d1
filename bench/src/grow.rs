//! `grow`: how what is paid grows with what there is. Each question is a plot over several orders of
//! magnitude, with the exponent that fits best.

mod plot;

use std::fs;
use std::path::PathBuf;
use std::time::{Duration, Instant};

use anyhow::{Context, ensure};
use tablecast::Change;
use tablecast_bench::{KEY_BYTES, SEED, differences, keys};
use tablecast_protocol::Tree;

use crate::compare::fanout::{pace, saturate};
use crate::compare::peer::Found;
use crate::compare::system::{Own, System, followers as bare};
use crate::compare::window;
use crate::diff::{VALUE_BYTES, once, walk};
use crate::{block_on, machine, process};
use plot::{Growth, Series};

/// How a question is measured.
type Measure = fn(&Bench) -> anyhow::Result<Growth>;

const QUESTIONS: [(&str, Measure); 4] =
    [("keys", keys_grow), ("followers", followers), ("differing", differing), ("values", values)];

#[derive(Debug, clap::Args)]
pub(crate) struct Args {
    /// Only these questions, and no page with tables; all if none is given.
    #[arg(long, value_delimiter = ',', value_parser = ["keys", "followers", "differing", "values"])]
    only: Vec<String>,
    /// Few and small points, to see that it works. The figures mean nothing.
    #[arg(long)]
    quick: bool,
    /// Where plots and the page with the tables are written to.
    #[arg(long, value_name = "FOLDER", default_value = "bench/plots")]
    folder: PathBuf,
}

struct Bench {
    found: Found,
    quick: bool,
}

impl Bench {
    /// The points, or two small ones if it is to be quick.
    fn points(&self, all: &[usize], quick: [usize; 2]) -> Vec<usize> {
        if self.quick { quick.into() } else { all.into() }
    }
}

pub(crate) fn run(args: &Args) -> anyhow::Result<()> {
    // Thousands of followers need a socket at either end.
    machine::open_files()?;
    let machine = machine::line();
    let bench = Bench { found: Found::look()?, quick: args.quick };
    fs::create_dir_all(&args.folder)
        .with_context(|| format!("cannot make {}", args.folder.display()))?;
    let mut page = format!("# How costs grow\n\n{machine}\n");
    let wanted = |name: &str| args.only.is_empty() || args.only.iter().any(|only| only == name);
    for (name, measure) in QUESTIONS.into_iter().filter(|(name, _)| wanted(name)) {
        let growth = measure(&bench).with_context(|| format!("question {name}"))?;
        growth.draw(&args.folder.join(format!("{name}.svg")))?;
        let section = format!("\n## {}\n\n![]({name}.svg)\n\n{}", growth.title, growth.table());
        print!("{section}");
        page += &section;
    }
    // A page with some of the plots would take the place of the one with all.
    if args.only.is_empty() {
        let file = args.folder.join("README.md");
        fs::write(&file, page).with_context(|| format!("cannot write {}", file.display()))?;
    }
    println!("\nwritten to {}", args.folder.display());
    Ok(())
}

fn ms(time: Duration) -> f64 {
    time.as_secs_f64() * 1e3
}

/// The tree and the walk; no store, no socket.
fn keys_grow(bench: &Bench) -> anyhow::Result<Growth> {
    let points = bench.points(&[10_000, 100_000, 1_000_000, 10_000_000], [1000, 3000]);
    let differ = if bench.quick { 90 } else { 1000 };
    let mut series = [
        Series::new("building", "ms"),
        Series::new("one write", "ns"),
        Series::new("root behind 1,000 writes", "ms"),
        Series::new("walk, 1,000 differ: both ends", "ms"),
        Series::new("walk, 1,000 differ: bytes", "kB"),
    ];
    for point in &points {
        let keys = keys(*point);
        let mut random = fastrand::Rng::with_seed(SEED + 1);
        let values: Vec<[u8; VALUE_BYTES]> = keys.iter().map(|_| value(&mut random)).collect();
        let start = Instant::now();
        let mut tree = Tree::build(keys.iter().zip(&values));
        let building = start.elapsed();
        drop(values);
        tree.root();

        let writes = 20_000.min(*point);
        let chosen: Vec<_> = (0..writes).filter_map(|_| random.choice(&keys)).collect();
        let value = value(&mut random);
        let write = |tree: &mut Tree, chosen: &[&[u8; KEY_BYTES]]| {
            chosen.iter().for_each(|key| {
                tree.insert(&key[..], &value);
            });
        };
        let (most, last) = chosen.split_at(writes - 1000.min(writes));
        let start = Instant::now();
        write(&mut tree, most);
        let writing_ns = start.elapsed().as_secs_f64() * 1e9 / most.len().max(1) as f64;
        tree.root();
        write(&mut tree, last);
        let start = Instant::now();
        tree.root();
        let root = start.elapsed();

        let (cpu_ms, bytes) = walked(&tree, &keys, differ)?;
        let figures = [ms(building), writing_ns, ms(root), cpu_ms, bytes / 1e3];
        push(&mut series, figures);
    }
    Ok(Growth::new("Cost by the number of keys", "keys", points, series))
}

fn value(random: &mut fastrand::Rng) -> [u8; VALUE_BYTES] {
    let mut value = [0; VALUE_BYTES];
    random.fill(&mut value);
    value
}

/// Processor time and bytes of a walk between this tree and one that differs.
fn walked(tree: &Tree, keys: &[[u8; KEY_BYTES]], differ: usize) -> anyhow::Result<(f64, f64)> {
    let mut follower = tree.clone();
    for change in differences(keys, differ, VALUE_BYTES, 0) {
        match change {
            Change::Write { key, value } => follower.insert(&key, &value),
            Change::Delete { key } => follower.remove(&key),
        };
    }
    follower.root();
    let before = machine::cpu_ms();
    let (walked, found) = walk(tree, &follower)?;
    ensure!(found.len() == differ as u64, "the walk found {}", found.len());
    Ok((machine::cpu_ms() - before, walked.bytes as f64))
}

/// What one change costs that is delivered to all.
fn followers(bench: &Bench) -> anyhow::Result<Growth> {
    let points = bench.points(&[1, 10, 100, 1000, 4000], [1, 4]);
    let (keys, ms, writes) = if bench.quick { (1000, 100, 10) } else { (100_000, 3000, 100) };
    let mut series = [
        Series::new("a change to all, saturated", "us"),
        Series::new("p50 of a single write", "us"),
        Series::new("server's memory, all idle", "MB"),
    ];
    for point in &points {
        let mut own = Own::tablecast(&bench.found, keys, VALUE_BYTES)?;
        let idle = bare(&own, *point)?;
        let memory = process::rss_bytes(&own.process().pid())? as f64 / 1e6;
        drop(idle);
        // Slow enough that one has reached all before the next.
        let paced = pace(&mut own, *point, writes, 25)?;
        // What is on its way to thousands is in the kernel's memory.
        let window = window(64 << 10, VALUE_BYTES);
        let most = saturate(&mut own, *point, Duration::from_millis(ms), window)?;
        push(&mut series, [1e6 / most.writes_per_s, paced.percentile(0, 50), memory]);
    }
    Ok(Growth::new("Cost by the number of followers", "followers", points, series))
}

/// A diff over TCP, repairs and verdict included.
fn differing(bench: &Bench) -> anyhow::Result<Growth> {
    let all = [0, 1, 10, 100, 1000, 10_000, 100_000, 500_000];
    let points = bench.points(&all, [0, 90]);
    let keys = keys(if bench.quick { 1000 } else { 1_000_000 });
    let mut series = [
        Series::new("until the roots are equal", "ms"),
        Series::new("bytes both ways, repairs included", "kB"),
        Series::new("rounds", ""),
    ];
    for point in &points {
        let (report, total) = block_on(once(&keys, *point))?;
        let bytes = (report.bytes_sent + report.bytes_received) as f64 / 1e3;
        push(&mut series, [ms(total), bytes, f64::from(report.rounds)]);
    }
    let title = format!("Cost of a diff of {} keys by how many differ", keys.len());
    Ok(Growth::new(title, "keys that differ", points, series))
}

/// What one change costs that is delivered to ten followers.
fn values(bench: &Bench) -> anyhow::Result<Growth> {
    let all = [16, 64, 256, 1 << 10, 4 << 10, 16 << 10, 64 << 10, 256 << 10, 1 << 20];
    let points = bench.points(&all, [16, 4096]);
    let (ms, writes) = if bench.quick { (100, 10) } else { (2000, 200) };
    let mut series = [
        Series::new("a change to ten, saturated", "us"),
        Series::new("p50 of a single write", "us"),
    ];
    for point in &points {
        let keys = ((64 << 20) / point).clamp(100, if bench.quick { 1000 } else { 100_000 });
        let mut own = Own::tablecast(&bench.found, keys, *point)?;
        let paced = pace(&mut own, 10, writes, 50)?;
        let window = window(1 << 20, *point);
        let most = saturate(&mut own, 10, Duration::from_millis(ms), window)?;
        push(&mut series, [1e6 / most.writes_per_s, paced.percentile(0, 50)]);
    }
    Ok(Growth::new("Cost by the size of values", "bytes of a value", points, series))
}

fn push<const N: usize>(series: &mut [Series; N], figures: [f64; N]) {
    for (series, figure) in series.iter_mut().zip(figures) {
        series.figures.push(figure);
    }
}
