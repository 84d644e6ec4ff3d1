//! `soak`: a server and followers, each in a process of its own, over TCP, that are killed, stopped, cut off and
//! disturbed while there are writes all the time. Every now and then, and at the end, it gets quiet, and every follower's table must
//! be the server's, entry by entry, and the server's that of who wrote.
//!
//! The seed draws what is done. When it happens is up to the machine, so a run is not repeated by it.

pub(crate) mod follower;
pub(crate) mod server;

use std::collections::BTreeMap;
use std::io::Write as _;
use std::path::PathBuf;
use std::process::Stdio;
use std::sync::{Arc, Mutex, PoisonError};
use std::time::{Duration, Instant};

use anyhow::{Context, bail, ensure};
use rustix::process::{Pid, Signal, kill_process};
use serde::Serialize;
use tablecast::{Change, Key, MemoryStore, Position, Reader, Revision, StoreError, Value};
use tablecast_protocol::Reason;
use tempfile::TempDir;
use tokio::io::{AsyncBufReadExt, AsyncWriteExt, BufReader, Lines};
use tokio::process::{Child, ChildStdin, ChildStdout, Command};
use tokio::sync::mpsc;

use crate::report::{Report, rounded};
use follower::Told;
use server::{Answer, Order};

/// Keys that are written; about seven of eight of them are there.
const KEYS: u64 = 3000;

/// Most changes of one write.
const BATCH: usize = 16;

/// How long things go wrong before it gets quiet.
const ROUND: Duration = Duration::from_secs(20);

/// How long a process may take to answer.
const PATIENCE: Duration = Duration::from_secs(30);

/// How long all followers may take from the last fault until they are equal.
const SETTLE: Duration = Duration::from_secs(60);

/// How often it is looked whether they are, and who has been verified.
const LOOK: Duration = Duration::from_millis(200);

/// One in so many writes comes with a fault.
const FAULTS: u64 = 40;

/// How old the table is at the most to which a server goes back, in writes.
const AGE: u64 = 500;

/// How many of the keys that differ are named.
const NAMED: usize = 5;

/// Where the server listens. It is not the address from which followers connect, so that none of them can have
/// taken its port while it is away.
const ADDRESS: &str = "127.0.0.2:0";

/// A table as it is told.
type Entries = BTreeMap<String, String>;

/// Keys and their new values; `None` is a delete.
type Changes = Vec<(String, Option<String>)>;

#[derive(Debug, clap::Args)]
pub(crate) struct Args {
    /// How long, without the last quiet.
    #[arg(long, default_value_t = 60, value_parser = clap::value_parser!(u64).range(1..))]
    seconds: u64,
    /// Draws what is done.
    #[arg(long, default_value_t = 0)]
    seed: u64,
    /// Followers.
    #[arg(long, default_value_t = 6, value_parser = clap::value_parser!(u64).range(1..=64))]
    followers: u64,
    /// One JSON object instead of lines.
    #[arg(long)]
    pub(crate) json: bool,
}

fn change((key, value): (String, Option<String>)) -> Change {
    match value {
        Some(value) => Change::write(key, value),
        None => Change::delete(key),
    }
}

fn store(table: Entries) -> MemoryStore {
    table.into_iter().map(|(key, value)| (Key::from(key), Value::from(value))).collect()
}

fn collect(
    entries: impl Iterator<Item = Result<(Key, Value), StoreError>>,
) -> anyhow::Result<Entries> {
    let text = |bytes: &[u8]| String::from_utf8_lossy(bytes).into_owned();
    entries
        .map(|entry| entry.map(|(key, value)| (text(&key), text(&value))))
        .map(|it| Ok(it?))
        .collect()
}

fn entries(reader: &dyn Reader) -> anyhow::Result<Entries> {
    collect(reader.snapshot())
}

/// A line on stdout.
fn say(line: &impl Serialize) -> anyhow::Result<()> {
    let line = serde_json::to_string(line)?;
    Ok(writeln!(std::io::stdout(), "{line}")?)
}

/// A process of this program that is spoken to in lines.
struct Process {
    child: Child,
    orders: ChildStdin,
}

impl Process {
    fn start(args: &[&str]) -> anyhow::Result<(Self, Lines<BufReader<ChildStdout>>)> {
        let mut command = Command::new(std::env::current_exe()?);
        command.args(args).stdin(Stdio::piped()).stdout(Stdio::piped()).kill_on_drop(true);
        let mut child = command.spawn()?;
        let orders = child.stdin.take().context("stdin is a pipe")?;
        let lines = BufReader::new(child.stdout.take().context("stdout is a pipe")?).lines();
        Ok((Self { child, orders }, lines))
    }

    async fn order(&mut self, order: &impl Serialize) -> anyhow::Result<()> {
        let line = serde_json::to_string(order)? + "\n";
        let written = self.orders.write_all(line.as_bytes());
        Ok(tokio::time::timeout(PATIENCE, written).await.context("an order is not read")??)
    }

    fn signal(&self, signal: Signal) -> anyhow::Result<()> {
        let pid = self.child.id().context("it has ended")?;
        let pid = Pid::from_raw(i32::try_from(pid)?).context("it has a number")?;
        Ok(kill_process(pid, signal)?)
    }

    async fn kill(mut self) -> anyhow::Result<()> {
        ensure!(self.child.try_wait()?.is_none(), "it had ended by itself");
        Ok(self.child.kill().await?)
    }
}

/// The server, and the record of what it has said to have written.
struct Server {
    process: Process,
    answers: Lines<BufReader<ChildStdout>>,
    address: String,
    table: Entries,
    position: Position,
    /// The record as it was a while ago, and how many writes that is.
    old: (Entries, Position, u64),
    /// The mark at which the root of each connection was compared last.
    verified: BTreeMap<u64, Revision>,
}

impl Server {
    async fn start(
        address: &str,
        table: Entries,
        position: Option<Position>,
    ) -> anyhow::Result<Self> {
        let (mut process, mut answers) = Process::start(&["soak-server", "--address", address])?;
        process.order(&Order::Begin(table.clone(), position)).await?;
        let Answer::Begun(address, position) = answer(&mut answers).await? else {
            bail!("a server does not say where it listens");
        };
        let old = (table.clone(), position, 0);
        Ok(Self { process, answers, address, table, position, old, verified: BTreeMap::new() })
    }

    async fn ask(&mut self, order: &Order) -> anyhow::Result<Answer> {
        self.process.order(order).await?;
        answer(&mut self.answers).await
    }

    async fn write(&mut self, changes: Changes) -> anyhow::Result<()> {
        let answer = self.ask(&Order::Write(changes.clone())).await?;
        let Answer::Wrote(position) = answer else { bail!("the server answers {answer:?}") };
        self.old.2 += 1;
        if self.old.2 > AGE {
            self.old = (self.table.clone(), self.position, 0);
        }
        for (key, value) in changes {
            match value {
                Some(value) => self.table.insert(key, value),
                None => self.table.remove(&key),
            };
        }
        self.position = position;
        Ok(())
    }
}

async fn answer(lines: &mut Lines<BufReader<ChildStdout>>) -> anyhow::Result<Answer> {
    let line = tokio::time::timeout(PATIENCE, lines.next_line()).await;
    let line =
        line.context("the server does not answer")??.context("the server ended by itself")?;
    Ok(serde_json::from_str(&line)?)
}

/// A follower, or its place while it is away.
struct Follower {
    number: u64,
    /// How often it was started.
    started: u64,
    file: PathBuf,
    process: Option<Process>,
    /// When it is started again, or goes on.
    until: Option<Instant>,
    tables: mpsc::UnboundedReceiver<Entries>,
}

impl Follower {
    fn name(&self) -> String {
        format!("{}.{}", self.number, self.started)
    }

    fn start(&mut self, address: &str, totals: &Arc<Mutex<Totals>>) -> anyhow::Result<()> {
        self.started += 1;
        let (name, file) = (self.name(), self.file.to_string_lossy().into_owned());
        let args = ["soak-follower", "--address", address, "--name", &name, "--file", &file];
        let (process, lines) = Process::start(&args)?;
        let (sender, tables) = mpsc::unbounded_channel();
        tokio::spawn(hear(lines, Arc::clone(totals), sender));
        self.process = Some(process);
        self.tables = tables;
        Ok(())
    }

    fn process(&mut self) -> anyhow::Result<&mut Process> {
        self.process.as_mut().with_context(|| format!("follower {} is away", self.number))
    }

    async fn order(&mut self, order: follower::Order) -> anyhow::Result<()> {
        let number = self.number;
        let ordered = self.process()?.order(&order).await;
        ordered.with_context(|| format!("follower {number} was told {order:?}"))
    }

    async fn table(&mut self) -> anyhow::Result<Entries> {
        self.order(follower::Order::Table).await?;
        let table = tokio::time::timeout(PATIENCE, self.tables.recv()).await;
        let number = self.number;
        let table = table.with_context(|| format!("follower {number} does not answer"))?;
        table.with_context(|| format!("follower {number} ended by itself"))
    }
}

/// An end says that the other one has broken the protocol: all of them are honest.
const BROKEN: &str = "broken: ";

/// What happened, by its name.
type Totals = BTreeMap<String, u64>;

/// Counts what a follower tells until its end, and hands its tables on.
async fn hear(
    mut lines: Lines<BufReader<ChildStdout>>,
    totals: Arc<Mutex<Totals>>,
    tables: mpsc::UnboundedSender<Entries>,
) {
    // A line that is cut off is that of a process that was killed.
    while let Ok(Some(line)) = lines.next_line().await
        && let Ok(told) = serde_json::from_str(&line)
    {
        let (what, count) = match told {
            Told::Table(table) => {
                // Nobody waits for it only if all ends.
                tables.send(table).ok();
                continue;
            }
            Told::Connected(way) => (format!("way {way:?}"), 1),
            Told::Disconnected(why) if why.contains(&Reason::Protocol.to_string()) => {
                (format!("{BROKEN}{why}"), 1)
            }
            Told::Disconnected(_) => ("disconnected".to_owned(), 1),
            Told::FellBehind => ("fell behind".to_owned(), 1),
            Told::Diverged => ("roots differed".to_owned(), 1),
            Told::Held => ("held repairs".to_owned(), 1),
            Told::Corrupt => ("scrubs that found something".to_owned(), 1),
            Told::Refused => ("refused by a store".to_owned(), 1),
            Told::Aborted(why) => (format!("diffs aborted: {why}"), 1),
            Told::Diff(keys, equal) => {
                count(&totals, "keys repaired", keys);
                (format!("diffs done, roots {}", if equal { "equal" } else { "differ" }), 1)
            }
            Told::Untold(events) => ("events not told".to_owned(), events),
            Told::Saved(true) => ("tables kept".to_owned(), 1),
            Told::Saved(false) => ("tables not kept, since something was missing".to_owned(), 1),
        };
        self::count(&totals, &what, count);
    }
}

fn count(totals: &Mutex<Totals>, what: &str, by: u64) {
    let mut totals = totals.lock().unwrap_or_else(PoisonError::into_inner);
    *totals.entry(what.to_owned()).or_default() += by;
}

struct Soak {
    random: fastrand::Rng,
    server: Server,
    followers: Vec<Follower>,
    /// What was done.
    done: Totals,
    /// What happened then.
    seen: Arc<Mutex<Totals>>,
    writes: u64,
    changes: u64,
    verified: u64,
    /// How long the longest quiet took.
    longest: Duration,
    looked: Instant,
    /// Files of the followers.
    folder: TempDir,
}

pub(crate) async fn run(args: &Args) -> anyhow::Result<Report> {
    let begun = Instant::now();
    let mut soak = Soak::start(args).await?;
    let (end, mut rounds) = (begun + Duration::from_secs(args.seconds), 0);
    while Instant::now() < end {
        soak.disturb_until(end.min(Instant::now() + ROUND)).await?;
        soak.settle().await.with_context(|| format!("{:?}, {:?}", soak.done, soak.seen))?;
        rounds += 1;
        let seen = soak.seen();
        let broken: Vec<_> = seen.keys().filter(|what| what.starts_with(BROKEN)).collect();
        ensure!(broken.is_empty(), "{broken:?}");
        if !args.json {
            let (time, writes) = (begun.elapsed().as_secs(), soak.writes);
            eprintln!("{time} s: all equal, {writes} writes, {:?}", soak.done);
        }
    }
    let seen = soak.seen();
    Ok(Report::of("soak")
        .with("seed", args.seed)
        .with("followers", args.followers)
        .with("seconds", rounded(begun.elapsed().as_secs_f64()))
        .with("times_all_equal", rounds)
        .with("longest_until_equal_ms", rounded(soak.longest.as_secs_f64() * 1e3))
        .with("writes", soak.writes)
        .with("changes", soak.changes)
        .with("verified", soak.verified)
        .with("faults", serde_json::to_value(&soak.done)?)
        .with("seen", serde_json::to_value(&seen)?))
}

impl Soak {
    async fn start(args: &Args) -> anyhow::Result<Self> {
        let mut soak = Self {
            random: fastrand::Rng::with_seed(args.seed),
            server: Server::start(ADDRESS, Entries::new(), None).await?,
            followers: Vec::new(),
            done: Totals::new(),
            seen: Arc::default(),
            writes: 0,
            changes: 0,
            verified: 0,
            longest: Duration::ZERO,
            looked: Instant::now(),
            folder: tempfile::tempdir()?,
        };
        for number in 0..args.followers {
            let mut follower = Follower {
                number,
                started: 0,
                file: soak.folder.path().join(number.to_string()),
                process: None,
                until: None,
                tables: mpsc::unbounded_channel().1,
            };
            follower.start(&soak.server.address, &soak.seen)?;
            soak.followers.push(follower);
        }
        Ok(soak)
    }

    /// What has happened so far.
    fn seen(&self) -> Totals {
        self.seen.lock().unwrap_or_else(PoisonError::into_inner).clone()
    }

    /// Writes, with faults, until then. Whoever is away or paused is back behind that.
    async fn disturb_until(&mut self, end: Instant) -> anyhow::Result<()> {
        while Instant::now() < end {
            let changes = self.draw(BATCH);
            self.changes += changes.len() as u64;
            self.writes += 1;
            self.server.write(changes).await?;
            if self.random.u64(..FAULTS) == 0 {
                self.fault().await?;
            }
            self.wake(Instant::now())?;
            if self.looked.elapsed() > LOOK {
                self.count_verified().await?;
            }
            tokio::time::sleep(Duration::from_micros(self.random.u64(..3000))).await;
        }
        let later = self.followers.iter().filter_map(|follower| follower.until).max();
        self.wake(later.unwrap_or(end))
    }

    fn draw(&mut self, most: usize) -> Changes {
        let random = &mut self.random;
        let count = random.usize(1..=most);
        let draw = |_| {
            let key = format!("key-{}", random.u64(..KEYS));
            let bytes = random.usize(8..100);
            let value = (random.u64(..8) > 0).then(|| format!("{:0bytes$}", random.u64(..)));
            (key, value)
        };
        (0..count).map(draw).collect()
    }

    /// Those whose time has come are started, or go on.
    fn wake(&mut self, now: Instant) -> anyhow::Result<()> {
        for follower in &mut self.followers {
            if follower.until.take_if(|until| *until <= now).is_some() {
                match &follower.process {
                    Some(process) => process.signal(Signal::CONT)?,
                    None => follower.start(&self.server.address, &self.seen)?,
                }
            }
        }
        Ok(())
    }

    async fn fault(&mut self) -> anyhow::Result<()> {
        let fault = match self.random.u64(..40) {
            0 | 1 => self.restart_server().await?,
            2 => {
                let pause = Duration::from_millis(self.random.u64(1..500));
                self.server.process.signal(Signal::STOP)?;
                tokio::time::sleep(pause).await;
                self.server.process.signal(Signal::CONT)?;
                "server paused"
            }
            _ => self.fault_of_follower().await?,
        };
        *self.done.entry(fault.to_owned()).or_default() += 1;
        Ok(())
    }

    /// Kills the server, with a write on its way that followers may have seen, and starts another one.
    async fn restart_server(&mut self) -> anyhow::Result<&'static str> {
        let last = Order::Write(self.draw(BATCH));
        self.server.process.order(&last).await?;
        tokio::time::sleep(Duration::from_micros(self.random.u64(..3000))).await;
        let away = Duration::from_millis(self.random.u64(..300));
        let (kind, table, position) = {
            let Server { table, position, old, .. } = &self.server;
            let (old, then) = (old.0.clone(), old.1);
            match self.random.u64(..8) {
                0..=2 => ("server killed, goes on", table.clone(), Some(*position)),
                3 => ("server killed, new history", table.clone(), None),
                4 | 5 => ("server killed, goes on with an older table", old, Some(then)),
                6 => ("server killed, new history of an older table", old, None),
                _ => ("server killed, comes up empty", Entries::new(), None),
            }
        };
        let address = self.server.address.clone();
        // Another one listens there only when this one has ended.
        let server = &mut self.server.process;
        ensure!(server.child.try_wait()?.is_none(), "the server ended by itself");
        server.child.kill().await?;
        tokio::time::sleep(away).await;
        self.server = Server::start(&address, table, position).await?;
        Ok(kind)
    }

    async fn fault_of_follower(&mut self) -> anyhow::Result<&'static str> {
        let changes = self.draw(4 * BATCH);
        let random = &mut self.random;
        let number = random.usize(..self.followers.len());
        let follower = self.followers.get_mut(number).context("it is one of them")?;
        if follower.until.is_some() {
            return Ok("nothing: the follower is away");
        }
        let away = Instant::now() + Duration::from_millis(random.u64(..1500));
        Ok(match random.u64(..20) {
            0..=5 => {
                follower.order(follower::Order::Cut).await?;
                "connection cut"
            }
            6..=8 => {
                follower.order(follower::Order::Save).await?;
                "table kept"
            }
            9 | 10 => {
                follower.process.take().context("it is there")?.kill().await?;
                follower.until = Some(away);
                "follower killed, back with what it kept"
            }
            11 => {
                follower.process.take().context("it is there")?.kill().await?;
                // There is none if it has never kept any.
                drop(std::fs::remove_file(&follower.file));
                follower.until = Some(away);
                "follower killed, back without its table"
            }
            12 => {
                follower.order(follower::Order::Stop).await?;
                let mut process = follower.process.take().context("it is there")?;
                let ended = tokio::time::timeout(PATIENCE, process.child.wait()).await;
                let ended = ended.context("a follower does not stop")??;
                ensure!(ended.success(), "a follower that was stopped ended with {ended}");
                follower.until = Some(away);
                "follower stopped, back with its table"
            }
            13 => {
                // Longer than a heartbeat allows, now and then.
                let away = Instant::now() + Duration::from_millis(random.u64(..5000));
                follower.process()?.signal(Signal::STOP)?;
                follower.until = Some(away);
                "follower paused"
            }
            14 | 15 => {
                follower.order(follower::Order::Refuse(random.u64(..1000))).await?;
                "store refuses"
            }
            16 | 17 => {
                follower.order(follower::Order::Disturb(changes)).await?;
                "table changed at the follower"
            }
            _ => {
                follower.order(follower::Order::Corrupt(changes)).await?;
                "store changed behind the follower's back"
            }
        })
    }

    /// Which followers' roots were compared at `since` or later, by name. Counts those that are new.
    async fn count_verified(&mut self) -> anyhow::Result<BTreeMap<String, Revision>> {
        self.looked = Instant::now();
        let answer = self.server.ask(&Order::Followers).await?;
        let Answer::Followers(followers) = answer else { bail!("the server answers {answer:?}") };
        let mut equal = BTreeMap::new();
        for follower in followers {
            if let Some(verified) = follower.verified {
                let before = self.server.verified.insert(follower.id, verified.revision);
                self.verified += u64::from(verified.equal && before != Some(verified.revision));
                if verified.equal {
                    equal.insert(follower.name, verified.revision);
                }
            }
        }
        Ok(equal)
    }

    /// Waits until every follower's root is known to be the server's, and then compares everything.
    async fn settle(&mut self) -> anyhow::Result<()> {
        let begun = Instant::now();
        loop {
            // A mark behind this one has seen everything that was done to any store.
            self.server.write(vec![("quiet".to_owned(), Some(format!("{begun:?}")))]).await?;
            let since = self.server.position.revision;
            let mut waiting: Vec<String> = self.followers.iter().map(Follower::name).collect();
            while !waiting.is_empty() {
                ensure!(begun.elapsed() < SETTLE, "not in step after {SETTLE:?}: {waiting:?}");
                tokio::time::sleep(LOOK).await;
                let verified = self.count_verified().await?;
                waiting.retain(|name| verified.get(name).is_none_or(|at| *at < since));
            }
            let answer = self.server.ask(&Order::Table).await?;
            let Answer::Table(table) = answer else { bail!("the server answers {answer:?}") };
            let differ = differences(&self.server.table, &table);
            ensure!(differ.is_empty(), "the server has not what was written: {differ:?}");
            let mut unequal = Vec::new();
            for follower in &mut self.followers {
                let differ = differences(&table, &follower.table().await?);
                if !differ.is_empty() {
                    unequal.push(format!("follower {}: {differ:?}", follower.name()));
                }
            }
            if unequal.is_empty() {
                self.longest = self.longest.max(begun.elapsed());
                return Ok(());
            }
            // The root that was compared may be one that a diff ended with, which reads no store: what was
            // changed behind its back is found the next time.
            *self.done.entry("compared once more".to_owned()).or_default() += 1;
            ensure!(begun.elapsed() < SETTLE, "not equal after {SETTLE:?}: {unequal:?}");
        }
    }
}

/// Some of the keys that have another value there, with both.
fn differences(here: &Entries, there: &Entries) -> Vec<String> {
    let keys = here.keys().chain(there.keys().filter(|key| !here.contains_key(*key)));
    let differs = |key: &&String| here.get(*key) != there.get(*key);
    let tell = |key: &String| format!("{key}: {:?}, {:?}", here.get(key), there.get(key));
    keys.filter(differs).map(tell).take(NAMED).collect()
}

#[cfg(test)]
mod tests {
    use super::{Entries, differences};

    #[test]
    fn every_difference_is_told() {
        let table = |entries: &[(&str, &str)]| -> Entries {
            entries.iter().map(|(key, value)| ((*key).to_owned(), (*value).to_owned())).collect()
        };
        let here = table(&[("a", "1"), ("b", "1"), ("c", "1")]);
        let there = table(&[("a", "1"), ("b", "2"), ("d", "1")]);
        assert_eq!(differences(&here, &here), Vec::<String>::new());
        let told = ["b: Some(\"1\"), Some(\"2\")", "c: Some(\"1\"), None", "d: None, Some(\"1\")"];
        assert_eq!(differences(&here, &there), told);
    }
}
