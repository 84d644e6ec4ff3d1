//! `simulate`: seeded runs of the protocol's core with faults, for as long as asked, or one of them again.

use std::sync::atomic::{AtomicBool, Ordering};
use std::thread;
use std::time::{Duration, Instant};

use anyhow::{bail, ensure};
use serde_json::{Map, Value};
use tablecast_simulator::{Coverage, Failure, Fault, Run, Totals};

use crate::report::{Report, rounded};

/// From so many runs on every fault and every reachable cell has come.
const REACHES_ALL: u64 = 10_000;

#[derive(Debug, clap::Args)]
pub(crate) struct Args {
    /// Only this run, step by step if it fails.
    #[arg(long, conflicts_with_all = ["seconds", "from"])]
    seed: Option<u64>,
    /// Runs for so long.
    #[arg(long, default_value_t = 10)]
    seconds: u64,
    /// The first seed. The others follow.
    #[arg(long, default_value_t = 0)]
    from: u64,
    /// Messages that are delivered in a run before it gets quiet.
    #[arg(long, default_value_t = 400, value_parser = clap::value_parser!(u64).range(1..))]
    deliveries: u64,
    /// Threads, which take the seeds by turns.
    #[arg(long, default_value_t = 2, value_parser = clap::value_parser!(u64).range(1..=64))]
    threads: u64,
    /// One JSON object instead of lines.
    #[arg(long)]
    json: bool,
}

pub(crate) fn run(args: &Args) -> anyhow::Result<()> {
    let begun = Instant::now();
    let (totals, failure) = match args.seed {
        Some(seed) => {
            let mut totals = Totals::default();
            #[allow(clippy::needless_update, reason = "there is more where rules can be broken")]
            let run = Run { seed, deliveries: args.deliveries, trace: true, ..Run::default() };
            let failure = run.run(&mut totals).err();
            (totals, failure)
        }
        None => runs(args, begun + Duration::from_secs(args.seconds)),
    };
    report(args, &totals, begun.elapsed()).print(args.json)?;
    if let Some(failure) = failure {
        failure.trace.iter().for_each(|line| eprintln!("{line}"));
        bail!(failure);
    }
    let wrong = [totals.server.wrong(), totals.client.wrong()].concat();
    ensure!(wrong.is_empty(), "honest ends were sent {wrong:?}");
    let never = never(&totals);
    ensure!(totals.runs < REACHES_ALL || never.is_empty(), "never came: {}", never.join(", "));
    Ok(())
}

/// What has not happened of what can.
fn never(totals: &Totals) -> Vec<String> {
    let faults = Fault::ALL.iter().zip(&totals.faults);
    let faults = faults.filter(|(_, count)| **count == 0).map(|(fault, _)| fault.name().to_owned());
    let cells = totals.server.missing().into_iter().chain(totals.client.missing());
    faults.chain(cells.map(|(state, message)| format!("{state} x {message}"))).collect()
}

/// Runs until then, or until one fails.
fn runs(args: &Args, end: Instant) -> (Totals, Option<Failure>) {
    let failed = AtomicBool::new(false);
    let work = |first: u64| {
        let mut totals = Totals::default();
        let mut seed = args.from + first;
        while Instant::now() < end && !failed.load(Ordering::Relaxed) {
            if let Err(failure) = tablecast_simulator::run(seed, args.deliveries, &mut totals) {
                failed.store(true, Ordering::Relaxed);
                return (totals, Some(failure));
            }
            seed += args.threads;
        }
        (totals, None)
    };
    thread::scope(|scope| {
        let threads: Vec<_> =
            (0..args.threads).map(|first| scope.spawn(move || work(first))).collect();
        let mut all = (Totals::default(), None);
        for thread in threads {
            let (totals, failure) = thread.join().expect("a run that panics fails");
            all.0.add(&totals);
            all.1 = all.1.or(failure);
        }
        all
    })
}

fn report(args: &Args, totals: &Totals, took: Duration) -> Report {
    let per_s = |count: u64| rounded(count as f64 / took.as_secs_f64());
    let faults = Fault::ALL.iter().zip(&totals.faults);
    let faults: Map<String, Value> =
        faults.map(|(fault, count)| (fault.name().to_owned(), (*count).into())).collect();
    Report::of("simulate")
        .with("from", args.seed.unwrap_or(args.from))
        .with("threads", args.threads)
        .with("seconds", rounded(took.as_secs_f64()))
        .with("runs", totals.runs)
        .with("runs_per_s", per_s(totals.runs))
        .with("delivered", totals.delivered)
        .with("delivered_per_s", per_s(totals.delivered))
        .with("delivered_per_run", totals.delivered / totals.runs.max(1))
        .with("steps", totals.steps)
        .with("diffs", totals.diffs)
        .with("aborts", totals.aborts)
        .with("repaired", totals.repaired)
        .with("verified", totals.verified)
        .with("caught_up", totals.caught_up)
        .with("corruptions_found", totals.found)
        .with("ways", totals.ways.to_vec())
        .with("faults", faults)
        .with("server_cells", covered(&totals.server))
        .with("client_cells", covered(&totals.client))
}

/// How often each message came in each state, and which cells of the protocol's page did not come.
fn covered(coverage: &Coverage) -> Value {
    let missing = coverage.missing();
    let reachable = coverage.reachable().len();
    let counts: Map<String, Value> = coverage
        .cells()
        .filter(|(.., count)| *count > 0)
        .map(|(state, message, count)| (format!("{state} x {message}"), count.into()))
        .collect();
    let missing: Vec<String> =
        missing.into_iter().map(|(state, message)| format!("{state} x {message}")).collect();
    serde_json::json!({
        "reachable": reachable,
        "reached": reachable - missing.len(),
        "missing": missing,
        "counts": counts,
    })
}
