//! `storm`: a server with many followers restarts, all of them come back at once, and each has to be
//! repaired. How late are live changes before and meanwhile?
//!
//! All in one process, without sockets: the followers take processor time from the server, as they
//! would not elsewhere.

use std::io;
use std::sync::{Arc, Mutex, PoisonError};
use std::time::{Duration, Instant};

use actix::prelude::*;
use anyhow::Context as _;
use futures_util::future::BoxFuture;
use tablecast_actors::access::{Access, Stream, memory};
use tablecast_actors::client::{self, Client, Event};
use tablecast_actors::protocol::{Change, Epoch, Key, Limits, MemoryStore, Replica, Table, Value};
use tablecast_actors::server::{self, Arbiters, Endpoint, GetFollowers, GetStatus};
use tablecast_actors::{ClientConfig, DiffOutcome, ServerConfig};
use tablecast_bench::percentile;
use tokio::sync::broadcast;

use crate::report::{Report, rounded};

/// What is written to measure.
const PROBE: &str = "probe";

/// After how many writes is looked whether all followers have been repaired.
const LOOK_EVERY: u64 = 10;

/// How long a phase may take.
const LIMIT: Duration = Duration::from_secs(300);

#[derive(Debug, clap::Args)]
pub(crate) struct Args {
    /// Followers.
    #[arg(long, default_value_t = 1000, value_parser = clap::value_parser!(u64).range(1..=9000))]
    followers: u64,
    /// Keys of every table.
    #[arg(long, default_value_t = 1000, value_parser = clap::value_parser!(u64).range(1..))]
    keys: u64,
    /// Keys that every follower has to be repaired of.
    #[arg(long, default_value_t = 100)]
    differ: u64,
    /// Live writes a second.
    #[arg(long, default_value_t = 50, value_parser = clap::value_parser!(u64).range(1..=1000))]
    rate: u64,
    /// Live writes whose delivery is timed before the restart.
    #[arg(long, default_value_t = 500, value_parser = clap::value_parser!(u64).range(1..))]
    quiet_writes: u64,
    /// Diffs that the server runs at once.
    #[arg(long, default_value_t = 4, value_parser = clap::value_parser!(u64).range(1..))]
    diffs_at_once: u64,
    /// One JSON object instead of lines.
    #[arg(long)]
    pub(crate) json: bool,
}

/// Leads to the server that there is at the moment.
#[derive(Clone)]
struct Switch(Arc<Mutex<memory::MemoryAccess>>);

impl Access for Switch {
    fn connect(&self) -> BoxFuture<'static, io::Result<Box<dyn Stream>>> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner).connect()
    }

    fn address(&self) -> String {
        "memory".to_owned()
    }
}

/// What a writer saw.
#[derive(Default)]
struct Seen {
    late: Vec<Duration>,
    /// Most diffs at once, and in the queue.
    running: usize,
    waiting: usize,
}

pub(crate) fn run(args: &Args) -> anyhow::Result<Report> {
    System::new().block_on(measure(args))
}

fn filled(keys: u64, changed: u64) -> MemoryStore {
    let entry = |number| {
        let value = if number < changed { "changed" } else { "value" };
        (Key::from(format!("key-{number:012}")), Value::from(format!("{value:32}")))
    };
    (0..keys).map(entry).collect()
}

fn serve(args: &Args, store: MemoryStore, arbiters: &Arbiters) -> anyhow::Result<Endpoint> {
    let diffs_at_once = usize::try_from(args.diffs_at_once)?;
    let config = ServerConfig { diffs_at_once, verify_every: None, ..ServerConfig::default() };
    Ok(Endpoint::start(Table::open(store, Limits::default())?, config, arbiters))
}

async fn measure(args: &Args) -> anyhow::Result<Report> {
    let [server, connections, differs, followers, alone] =
        [(); 5].map(|()| Arbiter::new().handle());
    let arbiters = Arbiters { server, connections: vec![connections], differs: vec![differs] };
    let mut endpoint = serve(args, filled(args.keys, 0), &arbiters)?;
    let (listener, access) = memory::pair();
    endpoint.listen(listener);
    let switch = Switch(Arc::new(Mutex::new(access)));
    endpoint.server().send(server::Ready(Epoch::from_bytes([1; 16]))).await?;
    let mut clients = Vec::new();
    for number in 0..args.followers {
        // The one that is measured does not wait for the others' work.
        let here = if number == 0 { &alone } else { &followers };
        let replica = Replica::open(filled(args.keys, 0))?;
        let (access, config) = (switch.clone(), ClientConfig::default());
        let client = Client::start_in_arbiter(here, move |_| Client::new(replica, access, config));
        client.do_send(client::Ready);
        clients.push(client);
    }
    for client in &clients {
        client.send(client::WaitReady(LIMIT)).await?.context("a follower is not in step")?;
    }
    let probe = clients.first().context("there is no follower")?;
    let mut events = probe.send(client::Subscribe).await?;
    let writes = args.quiet_writes;
    let quiet = write(args, &endpoint, &mut events, |written, _| written == writes).await?;

    endpoint.close().await;
    endpoint.server().send(server::Stop).await?;
    let begun = Instant::now();
    endpoint = serve(args, filled(args.keys, args.differ), &arbiters)?;
    let (listener, access) = memory::pair();
    endpoint.listen(listener);
    *switch.0.lock().unwrap_or_else(PoisonError::into_inner) = access;
    endpoint.server().send(server::Ready(Epoch::from_bytes([2; 16]))).await?;
    let all = clients.len();
    let storm = write(args, &endpoint, &mut events, |_, done| done == all).await?;
    let took = begun.elapsed();

    let mut waited = Vec::new();
    for client in &clients {
        let status = client.send(client::GetStatus).await?;
        let Some(DiffOutcome::Done(report)) = status.last_diff else {
            anyhow::bail!("a follower was not repaired: {status:?}");
        };
        anyhow::ensure!(report.equal(), "a follower differs: {report:?}");
        waited.push(report.waited.as_secs_f64() * 1e3);
    }
    waited.sort_by(f64::total_cmp);
    let (quiet_p50, quiet_p99) = percentiles(quiet.late)?;
    let samples = storm.late.len();
    let (storm_p50, storm_p99) = percentiles(storm.late)?;
    let longest = waited.last().copied().unwrap_or_default();
    Ok(Report::of("storm")
        .with("followers", args.followers)
        .with("keys", args.keys)
        .with("differ", args.differ)
        .with("rate", args.rate)
        .with("diffs_at_once", args.diffs_at_once)
        .with("most_diffs_running", storm.running as u64)
        .with("most_diffs_waiting", storm.waiting as u64)
        .with("repaired_all_ms", rounded(took.as_secs_f64() * 1e3))
        .with("longest_wait_ms", rounded(longest))
        .with("quiet_p50_ms", rounded(quiet_p50))
        .with("quiet_p99_ms", rounded(quiet_p99))
        .with("storm_p50_ms", rounded(storm_p50))
        .with("storm_p99_ms", rounded(storm_p99))
        .with("storm_samples", samples as u64)
        .with("p99_ratio", rounded(storm_p99 / quiet_p99)))
}

/// Writes at the rate, and takes the time until the follower whose events these are has each change, until
/// `end` says so: it is told how many were written, and how many followers have been repaired.
async fn write(
    args: &Args,
    endpoint: &Endpoint,
    events: &mut broadcast::Receiver<Event>,
    end: impl Fn(u64, usize) -> bool,
) -> anyhow::Result<Seen> {
    let mut seen = Seen::default();
    let since = Instant::now();
    let mut tick = tokio::time::interval(Duration::from_secs(1) / u32::try_from(args.rate)?);
    let (mut written, mut done) = (0, 0);
    loop {
        tokio::select! {
            biased;
            event = events.recv() => match event {
                Ok(Event::Change { change: Change::Write { key, value }, repair: false, .. })
                    if key == PROBE =>
                {
                    let sent = value.first_chunk().copied().map_or(0, u64::from_be_bytes);
                    seen.late.push(since.elapsed().saturating_sub(Duration::from_nanos(sent)));
                }
                Ok(_) | Err(broadcast::error::RecvError::Lagged(_)) => {}
                Err(error) => return Err(error.into()),
            },
            _ = tick.tick() => {
                let now = u64::try_from(since.elapsed().as_nanos())?;
                let change = Change::write(PROBE, now.to_be_bytes().to_vec());
                endpoint.server().send(server::Write(vec![change])).await??;
                written += 1;
                let status = endpoint.server().send(GetStatus).await?;
                seen.running = seen.running.max(status.diffs_running);
                seen.waiting = seen.waiting.max(status.diffs_waiting);
                // It is asked rarely: the answer is long.
                if written % LOOK_EVERY == 0 {
                    let followers = endpoint.server().send(GetFollowers).await?;
                    done = followers.iter().filter(|follower| follower.diffs > 0).count();
                }
                if end(written, done) {
                    return Ok(seen);
                }
                anyhow::ensure!(since.elapsed() < LIMIT, "it takes longer than {LIMIT:?}");
            }
        }
    }
}

/// Of latencies in milliseconds: the one in the middle, and the one that a hundredth is above.
fn percentiles(mut late: Vec<Duration>) -> anyhow::Result<(f64, f64)> {
    late.sort();
    let at = |percent: usize| {
        let late = percentile(&late, percent).context("no change was delivered")?;
        anyhow::Ok(late.as_secs_f64() * 1e3)
    };
    Ok((at(50)?, at(99)?))
}
