//! Rows about delivery: how much, how soon, and what a follower costs.

use std::sync::atomic::Ordering;
use std::sync::mpsc;
use std::time::{Duration, Instant};

use super::load::{Readers, Seen};
use super::system::{Own, Published, System, finish, followers, now_ns};
use super::{Bench, Goal, Line};
use crate::process;

const VALUE_BYTES: usize = 32;

/// Keys in the tables.
const KEYS: usize = 100_000;

/// Followers whose latency is taken.
pub(crate) const SAMPLED: usize = 10;

/// What a system does when it is given all that it takes.
pub(crate) struct Saturated {
    pub(crate) delivered_per_s: f64,
    pub(crate) writes_per_s: f64,
    p99_us: f64,
    /// Of the server's process.
    cpu_ns_each: f64,
}

pub(crate) fn saturate(
    system: &mut dyn System,
    count: usize,
    time: Duration,
    window: u64,
) -> anyhow::Result<Saturated> {
    let (told, delivered) = mpsc::channel();
    let readers = Readers::start(followers(system, count)?, SAMPLED, window / 8, told.clone());
    let (start, begun_ns) = (Instant::now(), now_ns()?);
    let pid = system.process().pid();
    let cpu_s = process::cpu_s(&pid)?;
    let writes = match system.saturate(time, window, &told, delivered) {
        Ok(writes) => writes,
        Err(error) => return Err(readers.because(error)),
    };
    let writing_s = start.elapsed().as_secs_f64();
    let seen = finish(system, readers, writes)?;
    let seconds = (seen.done - Duration::from_nanos(begun_ns)).as_secs_f64();
    let delivered = (writes + 1) as f64 * count as f64;
    Ok(Saturated {
        delivered_per_s: delivered / seconds,
        writes_per_s: writes as f64 / writing_s,
        p99_us: seen.percentile(0, 99),
        cpu_ns_each: (process::cpu_s(&pid)? - cpu_s) * 1e9 / delivered,
    })
}

/// Delivered changes a second and their p99, beside both of Redis' ways.
fn fanout(
    bench: &Bench,
    count: usize,
    value_bytes: usize,
    aims: (Goal, Goal),
) -> anyhow::Result<Vec<Line>> {
    let (count, keys) = (bench.followers(count), bench.keys(KEYS));
    let (time, window) = (bench.time(4000), bench.window(value_bytes));
    let mut own = Own::tablecast(&bench.found, keys, value_bytes)?;
    let ours = saturate(&mut own, count, time, window)?;
    drop(own);
    let pub_sub = match bench.found.redis()? {
        Some(peer) => {
            let mut system = Published::pub_sub(peer, value_bytes)?;
            Some(saturate(&mut system, count, time, window)?)
        }
        None => None,
    };
    let replication = match bench.found.redis()? {
        Some(peer) => {
            let mut system = Published::replication(peer, keys, value_bytes)?;
            Some(saturate(&mut system, count, time, window)?)
        }
        None => None,
    };
    let delivered = |of: &Option<Saturated>| of.as_ref().map(|it| it.delivered_per_s);
    let p99 = |of: &Option<Saturated>| of.as_ref().map(|it| it.p99_us);
    let cpu = |of: &Option<Saturated>| of.as_ref().map(|it| it.cpu_ns_each);
    let ours = Some(ours);
    let line = |what: &str, unit| Line::new(format!("{what}, {count} followers"), unit);
    Ok(vec![
        line("delivered", "1/s")
            .ours(delivered(&ours))
            .theirs("Redis pub/sub", delivered(&pub_sub))
            .goal(aims.0),
        line("delivered", "1/s")
            .ours(delivered(&ours))
            .theirs("Redis replication", delivered(&replication))
            .goal(aims.1),
        line("p99 at that", "us")
            .ours(p99(&ours))
            .theirs("Redis pub/sub", p99(&pub_sub))
            .goal(Goal::AtMost(0.2)),
        line("p99 at that", "us").ours(p99(&ours)).theirs("Redis replication", p99(&replication)),
        line("server's processor time each", "ns")
            .ours(cpu(&ours))
            .theirs("Redis pub/sub", cpu(&pub_sub)),
        line("writes taken", "1/s").ours(ours.map(|it| it.writes_per_s)).goal(match value_bytes {
            VALUE_BYTES if count <= 100 => Goal::Above(400_000.0),
            _ => Goal::None,
        }),
    ])
}

pub(crate) fn to_100(bench: &Bench) -> anyhow::Result<Vec<Line>> {
    fanout(bench, 100, VALUE_BYTES, (Goal::AtLeast(8.0), Goal::AtLeast(3.0)))
}

pub(crate) fn to_1000(bench: &Bench) -> anyhow::Result<Vec<Line>> {
    fanout(bench, 1000, VALUE_BYTES, (Goal::AtLeast(4.0), Goal::AtLeast(1.5)))
}

pub(crate) fn large_values(bench: &Bench) -> anyhow::Result<Vec<Line>> {
    fanout(bench, 100, 1024, (Goal::AtLeast(2.0), Goal::None))
}

/// Latencies of so many paced writes.
pub(crate) fn pace(
    system: &mut dyn System,
    count: usize,
    writes: u64,
    rate: u64,
) -> anyhow::Result<Seen> {
    let (told, _) = mpsc::channel();
    let readers = Readers::start(followers(system, count)?, SAMPLED.min(count), 1, told);
    system.pace(writes, rate)?;
    finish(system, readers, writes)
}

pub(crate) fn one_follower(bench: &Bench) -> anyhow::Result<Vec<Line>> {
    let writes = bench.writes(2000);
    let mut own = Own::tablecast(&bench.found, bench.keys(KEYS), VALUE_BYTES)?;
    let ours = pace(&mut own, 1, writes, 200)?;
    drop(own);
    let plain = pace(&mut Own::plain(&bench.found, VALUE_BYTES)?, 1, writes, 200)?;
    Ok([(50, Goal::AtMost(1.3)), (99, Goal::None)]
        .map(|(percent, goal)| {
            Line::new(format!("p{percent} of one write, one idle follower"), "us")
                .ours(ours.percentile(0, percent))
                .theirs("plain tokio", plain.percentile(0, percent))
                .goal(goal)
        })
        .into())
}

pub(crate) fn paced(bench: &Bench) -> anyhow::Result<Vec<Line>> {
    let (count, writes) = (bench.followers(1000), bench.writes(5000));
    let mut own = Own::tablecast(&bench.found, bench.keys(KEYS), VALUE_BYTES)?;
    let ours = pace(&mut own, count, writes, 1000)?;
    drop(own);
    let replication = match bench.found.redis()? {
        Some(peer) => {
            let mut system = Published::replication(peer, bench.keys(KEYS), VALUE_BYTES)?;
            Some(pace(&mut system, count, writes, 1000)?)
        }
        None => None,
    };
    let nats = match bench.found.nats()? {
        Some(peer) => Some(pace(&mut Published::nats(peer, VALUE_BYTES)?, count, writes, 1000)?),
        None => None,
    };
    let mut lines = Vec::new();
    for percent in [50, 99] {
        let of = |seen: &Option<Seen>| seen.as_ref().map(|seen| seen.percentile(0, percent));
        for (whose, theirs, goal) in
            [("Redis replication", of(&replication), 1.2), ("NATS core", of(&nats), 0.5)]
        {
            let what = format!("p{percent} of 1,000 writes a second, {count} followers");
            let line = Line::new(what, "us").ours(ours.percentile(0, percent));
            lines.push(line.theirs(whose, theirs).goal(Goal::AtMost(goal)));
        }
    }
    Ok(lines)
}

/// By how much a server grows with each follower that is connected and idle.
fn memory_of(system: &mut dyn System, count: usize) -> anyhow::Result<f64> {
    // Whatever is made with the first one is no follower's.
    let first = system.follow()?;
    system.pace(1, 1000)?;
    let pid = system.process().pid();
    let before = process::rss_bytes(&pid)?;
    let followers = followers(system, count)?;
    system.pace(1, 1000)?;
    let after = process::rss_bytes(&pid)?;
    drop((first, followers));
    Ok(after.saturating_sub(before) as f64 / count as f64)
}

pub(crate) fn memory(bench: &Bench) -> anyhow::Result<Vec<Line>> {
    let count = bench.followers(1000);
    let keys = bench.keys(KEYS);
    let ours = memory_of(&mut Own::tablecast(&bench.found, keys, VALUE_BYTES)?, count)?;
    let theirs = match bench.found.redis()? {
        Some(peer) => Some(memory_of(&mut Published::pub_sub(peer, VALUE_BYTES)?, count)?),
        None => None,
    };
    let line = Line::new(format!("server's memory a follower, {count} idle"), "bytes").ours(ours);
    Ok(vec![line.theirs("Redis pub/sub", theirs).goal(Goal::Below(8000.0))])
}

/// Delivered changes a second while nothing else happens, and while a real follower is compared over
/// and over.
pub(crate) fn during_diffs(bench: &Bench) -> anyhow::Result<Vec<Line>> {
    let (count, keys) = (bench.followers(1000), bench.keys(1_000_000));
    let mut own = Own::tablecast(&bench.found, keys, VALUE_BYTES)?;
    let diffs = super::repair::Diffs::start(own.address(), keys, bench.keys(1000))?;
    let window = bench.window(VALUE_BYTES);
    let (told, delivered) = mpsc::channel();
    let readers = Readers::start(followers(&own, count)?, 0, window / 8, told.clone());
    let shared = std::sync::Arc::clone(&readers.shared);
    let time = bench.time(4000);
    let measure = move || -> anyhow::Result<_> {
        let rate = |time: Duration| {
            let (start, before) = (Instant::now(), shared.delivered.load(Ordering::Relaxed));
            std::thread::sleep(time);
            let delivered = shared.delivered.load(Ordering::Relaxed) - before;
            delivered as f64 * count as f64 / start.elapsed().as_secs_f64()
        };
        // What comes first fills caches and buffers.
        rate(time / 4);
        let quiet = rate(time);
        diffs.go_on();
        let busy = rate(time);
        Ok((quiet, busy, diffs.stop()?))
    };
    let measuring = std::thread::spawn(measure);
    let writes = own.saturate(time * 5 / 2, window, &told, delivered)?;
    let (quiet, busy, diffs) =
        measuring.join().map_err(|_| anyhow::anyhow!("a thread panicked"))??;
    finish(&mut own, readers, writes)?;
    let what = format!("delivered while diffs run ({diffs} were done), {count} followers");
    let line = Line::new(what, "1/s").ours(busy);
    Ok(vec![line.theirs("without a diff", quiet).goal(Goal::AtLeast(0.9))])
}
