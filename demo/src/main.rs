//! The main job, on real input: two tables that differ are filled, connected, streamed to, and
//! repaired by a diff while writes keep coming.

#![allow(
    clippy::indexing_slicing,
    reason = "indexes are below the length that they were drawn from"
)]

use std::collections::BTreeSet;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::time::{Duration, Instant};

use anyhow::{Context, bail, ensure};
use clap::Parser;
use tablecast::access::tcp::TcpAccess;
use tablecast::{
    Client, ClientConfig, DiffOutcome, DiffReport, Event, Key, MemoryStore, Position, Reader,
    Server, ServerConfig, Value,
};
use tokio::sync::broadcast::error::RecvError;
use tokio::time::timeout;

/// How long anything here may take.
const LONG: Duration = Duration::from_secs(60);

/// Fills two tables, streams a key, breaks the follower, repairs it by a diff, and shows both
/// sides.
#[derive(Debug, Parser)]
struct Arguments {
    /// How many keys the second act's tables have
    #[arg(long, default_value_t = 100_000)]
    keys: usize,
    /// How many of them are broken on the follower
    #[arg(long, default_value_t = 1000)]
    differ: usize,
    /// Which keys, and which writes: the same seed draws the same
    #[arg(long, default_value_t = 1)]
    seed: u64,
}

fn main() -> anyhow::Result<()> {
    let arguments = Arguments::parse();
    ensure!(
        arguments.differ <= arguments.keys,
        "--differ {} is above --keys {}",
        arguments.differ,
        arguments.keys
    );
    actix_rt::System::new().block_on(async {
        first_act().await.context("first act")?;
        second_act(&arguments).await.context("second act")
    })
}

/// A server that is ready and its follower, connected over TCP on loopback, with the report of the
/// diff that follows every connect.
async fn connected(
    server: MemoryStore,
    client: MemoryStore,
) -> anyhow::Result<(Server, Client, DiffReport)> {
    let server = Server::start(ServerConfig::default(), server)?;
    let address = server.listen("127.0.0.1:0")?;
    server.ready().await?;
    let access = TcpAccess::new(address.to_string());
    let client = Client::start(ClientConfig::default(), client, access)?;
    let mut events = client.events().await?;
    client.ready().await?;
    let diff = async {
        loop {
            match events.recv().await {
                Ok(Event::Diff(outcome)) => break done(outcome),
                Err(RecvError::Closed) => bail!("the follower has ended"),
                Ok(_) | Err(RecvError::Lagged(_)) => {}
            }
        }
    };
    let report = timeout(LONG, diff).await.context("no diff")??;
    Ok((server, client, report))
}

async fn diff(client: &Client) -> anyhow::Result<DiffReport> {
    done(timeout(LONG, client.diff()).await.context("no diff")??)
}

fn done(outcome: DiffOutcome) -> anyhow::Result<DiffReport> {
    match outcome {
        DiffOutcome::Done(report) => Ok(report),
        DiffOutcome::Aborted(why) => bail!("the diff was aborted: {why}"),
    }
}

/// What sdiff's demo shows: a handful of keys on both sides, step by step.
async fn first_act() -> anyhow::Result<()> {
    let table = |keys: &[(&'static str, &'static str)]| -> MemoryStore {
        keys.iter().map(|(key, value)| (Key::from(*key), Value::from(*value))).collect()
    };
    println!("Act one: a few keys\n");
    let ours = table(&[("key1", "1"), ("key2", "2"), ("key3", "3")]);
    let theirs = table(&[("key1", "1"), ("key3", "old"), ("key9", "9")]);
    show("both tables are filled, and differ", &ours, &theirs)?;

    let (server, client, report) = connected(ours, theirs).await?;
    show("connected: a diff followed by itself", &**server.reader(), &**client.reader())?;
    println!("    {} written, {} deleted\n", report.written, report.deleted);

    let written = server.write("key4", "4").await?.position().context("the server is ready")?;
    client.wait_for(written, LONG).await?;
    show("key4 was written on the server, and streamed", &**server.reader(), &**client.reader())?;

    client.delete("key1").await?;
    client.write("key2", "broken").await?;
    client.write("key5", "nobody else has it").await?;
    show("three keys of the follower are broken", &**server.reader(), &**client.reader())?;

    let report = diff(&client).await?;
    show("a diff repaired them", &**server.reader(), &**client.reader())?;
    println!("    {} written, {} deleted\n", report.written, report.deleted);
    check(&server, &client)?;
    client.stop().await;
    server.stop().await;
    Ok(())
}

fn show(step: &str, server: &dyn Reader, client: &dyn Reader) -> anyhow::Result<()> {
    println!("{step}");
    for (name, reader) in [("server", server), ("follower", client)] {
        let mut line = String::new();
        for entry in reader.snapshot() {
            let (key, value) = entry?;
            let text = |bytes: &[u8]| String::from_utf8_lossy(bytes).into_owned();
            line.push_str(&format!(" {}={:?}", text(&key), text(&value)));
        }
        println!("    {name:8}{line}");
    }
    println!();
    Ok(())
}

fn key(number: usize) -> Key {
    format!("key-{number:012}").into()
}

/// What sdiff could not: many keys, few of them broken, and writes that go on during the repair,
/// some of them to broken keys.
async fn second_act(arguments: &Arguments) -> anyhow::Result<()> {
    let Arguments { keys, differ, seed } = *arguments;
    println!("Act two: {keys} keys, {differ} of them broken, and writes that go on\n");
    let table = || (0..keys).map(|n| (key(n), Value::from(format!("value-{n:026}")))).collect();
    let filling = Instant::now();
    let (server, client, first) = connected(table(), table()).await?;
    println!("both tables filled and connected in {:?}", filling.elapsed());
    ensure!(first.equal(), "the tables differ from the first");

    let mut random = fastrand::Rng::with_seed(seed);
    let broken = random.choose_multiple(0..keys, differ);
    for (number, kind) in broken.iter().zip((0..3).cycle()) {
        match kind {
            0 => client.write(key(*number), "broken").await?,
            1 => client.delete(key(*number)).await?,
            _ => client.write(format!("extra-{number}"), "nobody else has it").await?,
        }
    }
    println!("{differ} keys of the follower changed, deleted or added");

    let writes = Writes::start(&server, keys, broken, random);
    let report = diff(&client).await?;
    let (count, touched, head) = writes.stop().await?;
    println!(
        "a diff repaired them while {count} changes were written, to {touched} broken keys too:"
    );
    print_report(&report);
    ensure!(report.equal(), "the roots differ after the diff");

    if let Some(head) = head {
        client.wait_for(head, LONG).await?;
    }
    check(&server, &client)?;
    println!("all {} entries of both tables are equal", server.reader().len()?);
    client.stop().await;
    server.stop().await;
    Ok(())
}

fn print_report(report: &DiffReport) {
    println!("    rounds      {}", report.rounds);
    println!("    bytes       {} to the server, {} back", report.bytes_sent, report.bytes_received);
    println!("    written     {}", report.written);
    println!("    deleted     {}", report.deleted);
    println!("    suppressed  {}", report.suppressed);
    println!("    failed      {}", report.failed);
    println!("    time        {:?}", report.elapsed);
    println!("    root        {}", report.root);
}

/// Writes to random keys, one in four of them a broken one, until it is stopped.
struct Writes {
    stop: Arc<AtomicBool>,
    count: Arc<AtomicU64>,
    task: actix_rt::task::JoinHandle<anyhow::Result<(usize, Option<Position>)>>,
}

impl Writes {
    fn start(server: &Server, keys: usize, broken: Vec<usize>, mut random: fastrand::Rng) -> Self {
        let (stop, count) = (Arc::new(AtomicBool::new(false)), Arc::new(AtomicU64::new(0)));
        let (server, stopped, counted) = (server.clone(), Arc::clone(&stop), Arc::clone(&count));
        let task = actix_rt::spawn(async move {
            let mut touched = BTreeSet::new();
            let mut head = None;
            while !stopped.load(Ordering::Relaxed) {
                let mut number = random.usize(..keys.max(1));
                if !broken.is_empty() && random.u8(..4) == 0 {
                    number = broken[random.usize(..broken.len())];
                    touched.insert(number);
                }
                let written = if random.u8(..5) == 0 {
                    server.delete(key(number)).await?
                } else {
                    server.write(key(number), format!("live-{}", random.u64(..))).await?
                };
                head = written.position();
                counted.fetch_add(1, Ordering::Relaxed);
            }
            Ok((touched.len(), head))
        });
        Self { stop, count, task }
    }

    /// How many changes there were, how many broken keys they touched, and where the last one went.
    async fn stop(self) -> anyhow::Result<(u64, usize, Option<Position>)> {
        self.stop.store(true, Ordering::Relaxed);
        let (touched, head) = self.task.await??;
        Ok((self.count.load(Ordering::Relaxed), touched, head))
    }
}

/// Entry by entry, not by the roots.
fn check(server: &Server, client: &Client) -> anyhow::Result<()> {
    let (mut ours, mut theirs) = (server.reader().snapshot(), client.reader().snapshot());
    loop {
        match (ours.next().transpose()?, theirs.next().transpose()?) {
            (None, None) => return Ok(()),
            (ours, theirs) => ensure!(ours == theirs, "{ours:?} here, {theirs:?} there"),
        }
    }
}
