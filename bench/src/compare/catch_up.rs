//! Rows about followers that lack something: everything, or what was written while they were away.

use std::io::{Read, Write};
use std::net::{Shutdown, SocketAddr, TcpListener, TcpStream};
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex, PoisonError, mpsc};
use std::time::{Duration, Instant};

use anyhow::{Context, ensure};
use bytes::Bytes;
use tablecast::access::tcp::TcpAccess;
use tablecast::{Client, ClientConfig, MemoryStore, Position};
use tablecast_bench::{keys, random_bytes, store};

use super::peer::{Peer, Resp};
use super::system::Own;
use super::{Bench, Goal, Line};
use crate::block_on;

const VALUE_BYTES: usize = 32;

/// Longer than any of it takes: only a hang is noticed by it.
const PATIENCE: Duration = Duration::from_secs(300);

/// How often Redis is asked how far it is: it does not tell by itself.
const POLL: Duration = Duration::from_micros(200);

pub(crate) fn empty(bench: &Bench) -> anyhow::Result<Vec<Line>> {
    let count = bench.keys(1_000_000);
    let own = Own::tablecast(&bench.found, count, VALUE_BYTES)?;
    let ours = block_on(async {
        let client = start(own.address(), MemoryStore::new())?;
        let start = Instant::now();
        client.ready().await?;
        client.wait_ready(PATIENCE).await?;
        let took = start.elapsed();
        let held = client.status().await?.keys;
        ensure!(held == count, "the follower holds {held} keys");
        client.stop().await;
        Ok(took)
    })?;
    drop(own);
    let theirs = match (bench.found.redis()?, bench.found.redis_replica()?) {
        (Some(master), Some(replica)) => {
            fill(&master, count, count, 1)?;
            let mut asking = Resp::connect(replica.address)?;
            let start = Instant::now();
            asking.ask(&format!("REPLICAOF 127.0.0.1 {}", master.address.port()))?;
            wait_up(&mut asking, count)?;
            Some(start.elapsed())
        }
        _ => None,
    };
    let ms = |time: Duration| time.as_secs_f64() * 1e3;
    let line = Line::new(format!("an empty follower of {count} keys until it is equal"), "ms");
    let line = line.ours(ms(ours)).theirs("Redis full sync", theirs.map(ms));
    Ok(vec![line.goal(Goal::AtMost(1.0))])
}

pub(crate) fn missed(bench: &Bench) -> anyhow::Result<Vec<Line>> {
    let (count, writes) = (bench.keys(100_000), bench.writes(10_000));
    let ours = missed_by_us(bench, count, writes)?;
    let theirs = match (bench.found.redis()?, bench.found.redis_replica()?) {
        (Some(master), Some(replica)) => Some(missed_by_redis(&master, &replica, count, writes)?),
        _ => None,
    };
    let line = |what, unit| Line::new(format!("{what}, {writes} changes missed"), unit);
    let (time, bytes) = theirs.unzip();
    Ok(vec![
        line("time from the reconnect", "ms")
            .ours(ours.0)
            .theirs("Redis partial resync", time)
            .goal(Goal::AtMost(1.5)),
        line("bytes both ways", "bytes")
            .ours(ours.1)
            .theirs("Redis partial resync", bytes)
            .goal(Goal::AtMost(0.8)),
    ])
}

fn missed_by_us(bench: &Bench, count: usize, writes: u64) -> anyhow::Result<(f64, f64)> {
    let mut own = Own::tablecast(&bench.found, count, VALUE_BYTES)?;
    let (proxy, connects) = Proxy::start(own.address())?;
    block_on(async {
        let client = start(proxy.address, store(&keys(count), VALUE_BYTES))?;
        client.ready().await?;
        client.wait_ready(PATIENCE).await?;
        let at = client.status().await?.stream.context("the follower is connected")?;
        proxy.cut();
        own.burst(writes)?;
        proxy.open();
        let end = Position { revision: at.revision.plus(writes), ..at };
        client.wait_for(end, PATIENCE).await?;
        let took = connects.try_iter().last().context("it has connected")?.elapsed();
        let bytes = proxy.bytes.load(Ordering::Relaxed);
        let connected = client.status().await?;
        ensure!(connected.last_diff.is_some() && connected.connects == 2, "{connected:?}");
        client.stop().await;
        Ok((took.as_secs_f64() * 1e3, bytes as f64))
    })
}

fn missed_by_redis(
    master: &Peer,
    replica: &Peer,
    count: usize,
    writes: u64,
) -> anyhow::Result<(f64, f64)> {
    fill(master, count, count, 1)?;
    let (proxy, connects) = Proxy::start(master.address)?;
    let mut asking = Resp::connect(replica.address)?;
    asking.ask(&format!("REPLICAOF 127.0.0.1 {}", proxy.address.port()))?;
    wait_up(&mut asking, count)?;
    proxy.cut();
    let (key, value) = fill(master, count, usize::try_from(writes)?, 2)?;
    proxy.open();
    while asking.call(&[b"GET", &key])? != value {
        std::thread::sleep(POLL);
    }
    let took = connects.try_iter().last().context("it has connected")?.elapsed();
    let bytes = proxy.bytes.load(Ordering::Relaxed);
    Ok((took.as_secs_f64() * 1e3, bytes as f64))
}

fn start(address: SocketAddr, store: MemoryStore) -> anyhow::Result<Client> {
    Ok(Client::start(ClientConfig::default(), store, TcpAccess::new(address.to_string()))?)
}

/// So many writes to `count` keys, in turn, of values that `seed` chooses. Answers the last one.
fn fill(master: &Peer, count: usize, writes: usize, seed: u64) -> anyhow::Result<(Vec<u8>, Bytes)> {
    let mut random = fastrand::Rng::with_seed(seed);
    let keys = keys(count);
    let keys = keys.iter().cycle().take(writes);
    let entries: Vec<_> = keys.map(|key| (key, random_bytes(&mut random, VALUE_BYTES))).collect();
    let written = entries.iter().map(|(key, value)| (&key[..], &value[..]));
    Resp::connect(master.address)?.fill(written)?;
    let (key, value) = entries.last().context("something is written")?;
    Ok((key.to_vec(), value.clone()))
}

/// Waits until a replica is up and holds so many keys.
fn wait_up(asking: &mut Resp, count: usize) -> anyhow::Result<()> {
    let start = Instant::now();
    loop {
        // While it loads it refuses to answer.
        let up = asking.replication("master_link_status").is_ok_and(|status| status == "up");
        if up && asking.ask("DBSIZE").is_ok_and(|keys| keys == count.to_string()) {
            return Ok(());
        }
        ensure!(start.elapsed() < PATIENCE, "the replica does not come up");
        std::thread::sleep(POLL);
    }
}

/// Counts what goes through it, and can be cut.
struct Proxy {
    address: SocketAddr,
    /// Bytes of both directions since the last cut.
    bytes: Arc<AtomicU64>,
    links: Arc<Mutex<Links>>,
}

/// The connections of a [`Proxy`].
#[derive(Default)]
struct Links {
    /// Who comes is closed at once.
    cut: bool,
    streams: Vec<TcpStream>,
}

impl Proxy {
    /// Tells when each connection was made.
    fn start(to: SocketAddr) -> anyhow::Result<(Self, mpsc::Receiver<Instant>)> {
        let listener = TcpListener::bind("127.0.0.1:0")?;
        let (told, connects) = mpsc::channel();
        let (bytes, links) = (Arc::new(AtomicU64::new(0)), Arc::new(Mutex::default()));
        let proxy = Self { address: listener.local_addr()?, bytes, links };
        let (bytes, links) = (Arc::clone(&proxy.bytes), Arc::clone(&proxy.links));
        std::thread::spawn(move || {
            for stream in listener.incoming() {
                let accepted = Instant::now();
                let linked = stream.and_then(|stream| link(&links, stream, to, &bytes));
                // Nobody measures any more if one of these fails.
                match linked {
                    Ok(false) => {}
                    Ok(true) if told.send(accepted).is_ok() => {}
                    Ok(true) | Err(_) => return,
                }
            }
        });
        Ok((proxy, connects))
    }

    fn links(&self) -> std::sync::MutexGuard<'_, Links> {
        self.links.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Ends all connections, and lets nobody through.
    fn cut(&self) {
        let mut links = self.links();
        links.cut = true;
        for stream in links.streams.drain(..) {
            // The other end may have closed it.
            drop(stream.shutdown(Shutdown::Both));
        }
        self.bytes.store(0, Ordering::Relaxed);
    }

    fn open(&self) {
        self.links().cut = false;
    }
}

impl Drop for Proxy {
    fn drop(&mut self) {
        self.cut();
    }
}

/// Joins a connection with one of its own to the server. `false` if all are cut.
fn link(
    links: &Mutex<Links>,
    stream: TcpStream,
    to: SocketAddr,
    bytes: &Arc<AtomicU64>,
) -> std::io::Result<bool> {
    let mut links = links.lock().unwrap_or_else(PoisonError::into_inner);
    if links.cut {
        return Ok(false);
    }
    let server = TcpStream::connect(to)?;
    for end in [&stream, &server] {
        end.set_nodelay(true)?;
        links.streams.push(end.try_clone()?);
    }
    for (from, to) in [(stream.try_clone()?, server.try_clone()?), (server, stream)] {
        let bytes = Arc::clone(bytes);
        std::thread::spawn(move || copy(from, to, &bytes));
    }
    Ok(true)
}

/// Until either end is closed.
fn copy(mut from: TcpStream, mut to: TcpStream, bytes: &AtomicU64) {
    let mut buffer = vec![0; 64 << 10];
    while let Ok(read) = from.read(&mut buffer) {
        let read = buffer.get(..read).unwrap_or_default();
        bytes.fetch_add(read.len() as u64, Ordering::Relaxed);
        if read.is_empty() || to.write_all(read).is_err() {
            break;
        }
    }
    // The other end may have closed it.
    drop(to.shutdown(Shutdown::Both));
}
