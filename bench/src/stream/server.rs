//! The server's side of `stream`: a process that serves, and writes what it is ordered to.
//!
//! Orders are lines of JSON on stdin, answers lines of JSON on stdout. The first line is the
//! address. The process ends with stdin.

use std::collections::VecDeque;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::{Duration, Instant};

use anyhow::Context;
use bytes::Bytes;
use clap::ArgAction;
use serde::{Deserialize, Serialize};
use tablecast::{Change, HeartbeatConfig, Server, ServerConfig, SessionConfig};
use tablecast_actors::access::tcp::TcpListener;
use tablecast_actors::access::tls::{TlsListener, server_config};
use tablecast_actors::server::Write;
use tablecast_bench::{KEY_BYTES, SEED, keys, serve, store};
use tokio::io::{AsyncBufReadExt, BufReader, Lines, Stdin};

use crate::process;

/// Other values than so many, of so many bytes in all, are not written; they are copied for each write.
const VALUES: usize = 4096;
const VALUES_BYTES: usize = 64 << 20;

/// Units of a `Saturate` that the writer does not wait for.
const IN_FLIGHT: usize = 64;

/// Longer than anything is on its way.
const PATIENCE: Duration = Duration::from_secs(60);

/// How often the followers' lag is looked at, and how long a writer pauses while it is too much.
const LOOK: Duration = Duration::from_millis(2);

#[derive(Debug, clap::Args)]
pub(crate) struct Args {
    #[arg(long)]
    keys: usize,
    #[arg(long)]
    value_bytes: usize,
    #[arg(long, action = ArgAction::Set)]
    nodelay: bool,
}

/// What to write.
#[derive(Debug, Serialize, Deserialize)]
pub(crate) enum Order {
    /// One at a time, `rate` a second, each with the time in its value's first eight bytes.
    Pace { writes: u64, rate: u64 },
    /// As many as the server takes.
    Burst { writes: u64, batch: u64, in_flight: u64, max_lag: u64 },
    /// As many as the followers take in `ms`, while all of them but the last `window` writes are
    /// delivered. Each has the time in its value's first eight bytes.
    Saturate { ms: u64, batch: u64, window: u64 },
    /// So many of the writes of a `Saturate` have reached every follower.
    Delivered(u64),
    /// Listen over TLS, too, with this certificate and its key, PEM. Answered with the address.
    Tls { certificate: String, key: String },
}

/// It is written.
#[derive(Debug, Default, Serialize, Deserialize)]
pub(crate) struct Wrote {
    /// The time of day before the first write.
    pub(crate) begun_ns: u64,
    /// And behind the answer to the last one.
    pub(crate) ended_ns: u64,
    /// How long the writer waited for followers that lagged.
    pub(crate) waited_ns: u64,
    /// How many writes there were.
    pub(crate) writes: u64,
}

struct Writer {
    server: Server,
    keys: Vec<[u8; KEY_BYTES]>,
    values: Vec<Vec<u8>>,
    random: fastrand::Rng,
}

pub(crate) async fn run(args: &Args) -> anyhow::Result<()> {
    // The followers only read: they do not answer when they are asked whether they are there.
    let patience = Duration::from_secs(3600);
    let heartbeat = HeartbeatConfig { ping_after: patience, dead_after: 2 * patience };
    let session = SessionConfig { heartbeat, ..SessionConfig::default() };
    // Nor do they have a root to compare.
    let config = ServerConfig { session, verify_every: None, ..ServerConfig::default() };

    let keys = keys(args.keys);
    let (server, address) = serve(config, store(&keys, args.value_bytes), args.nodelay).await?;
    println!("{address}");

    let mut random = fastrand::Rng::with_seed(SEED + 9);
    let count = (VALUES_BYTES / args.value_bytes.max(1)).clamp(1, VALUES);
    let values = (0..count).map(|_| {
        let mut value = vec![0; args.value_bytes];
        random.fill(&mut value);
        value
    });
    let values = values.collect();
    let mut writer = Writer { server, keys, values, random };
    let mut orders = Orders(BufReader::new(tokio::io::stdin()).lines());
    while let Some(order) = orders.next().await? {
        let wrote = match order {
            Order::Pace { writes, rate } => writer.pace(writes, rate).await?,
            Order::Burst { writes, batch, in_flight, max_lag } => {
                writer.burst(writes, batch, usize::try_from(in_flight)?, max_lag).await?
            }
            Order::Saturate { ms, batch, window } => {
                writer.saturate(Duration::from_millis(ms), batch, window, &mut orders).await?
            }
            // What was under way when a `Saturate` ended.
            Order::Delivered(_) => continue,
            Order::Tls { certificate, key } => {
                let config = server_config(certificate.as_bytes(), key.as_bytes(), None)?;
                let listener = TcpListener::bind("127.0.0.1:0")?;
                println!("{}", serde_json::to_string(&listener.local_address())?);
                writer.server.listen_on(TlsListener::new(listener, config));
                continue;
            }
        };
        println!("{}", serde_json::to_string(&wrote)?);
    }
    Ok(())
}

/// Lines of stdin.
struct Orders(Lines<BufReader<Stdin>>);

impl Orders {
    async fn next(&mut self) -> anyhow::Result<Option<Order>> {
        Ok(self.0.next_line().await?.as_deref().map(serde_json::from_str).transpose()?)
    }
}

impl Writer {
    fn change(&mut self) -> Change {
        let key = self.random.choice(&self.keys).map_or(&[][..], |key| key);
        let value = self.random.choice(&self.values).map_or(&[][..], |value| value);
        Change::write(Bytes::copy_from_slice(key), Bytes::copy_from_slice(value))
    }

    fn stamped(&mut self, now_ns: u64) -> Change {
        let key = self.random.choice(&self.keys).map_or(&[][..], |key| key);
        let mut value = self.random.choice(&self.values).cloned().unwrap_or_default();
        if let Some(time) = value.first_chunk_mut() {
            *time = now_ns.to_be_bytes();
        }
        Change::write(Bytes::copy_from_slice(key), value)
    }

    async fn pace(&mut self, writes: u64, rate: u64) -> anyhow::Result<Wrote> {
        let mut ticks = tokio::time::interval(Duration::from_secs(1) / u32::try_from(rate)?);
        let begun_ns = now_ns()?;
        for _ in 0..writes {
            ticks.tick().await;
            let change = self.stamped(now_ns()?);
            self.server.batch(vec![change]).await?;
        }
        Ok(Wrote { begun_ns, ended_ns: now_ns()?, waited_ns: 0, writes })
    }

    async fn saturate(
        &mut self,
        time: Duration,
        batch: u64,
        window: u64,
        orders: &mut Orders,
    ) -> anyhow::Result<Wrote> {
        let start = Instant::now();
        let mut wrote = Wrote { begun_ns: now_ns()?, ..Wrote::default() };
        let mut flying = VecDeque::with_capacity(IN_FLIGHT);
        let mut delivered = 0;
        while start.elapsed() < time {
            let waiting = Instant::now();
            while wrote.writes + batch > delivered + window {
                let order = tokio::time::timeout(PATIENCE, orders.next()).await;
                match order.context("nothing is delivered")??.context("stdin ended")? {
                    Order::Delivered(count) => delivered = count,
                    other @ (Order::Pace { .. }
                    | Order::Burst { .. }
                    | Order::Saturate { .. }
                    | Order::Tls { .. }) => anyhow::bail!("{other:?} came while saturating"),
                }
            }
            wrote.waited_ns += u64::try_from(waiting.elapsed().as_nanos())?;
            let now_ns = now_ns()?;
            let changes: Vec<_> = (0..batch).map(|_| self.stamped(now_ns)).collect();
            wrote.writes += batch;
            flying.push_back(self.server.actor().send(Write(changes)));
            if flying.len() >= IN_FLIGHT
                && let Some(first) = flying.pop_front()
            {
                first.await??;
            }
        }
        for write in flying {
            write.await??;
        }
        wrote.ended_ns = now_ns()?;
        Ok(wrote)
    }

    async fn burst(
        &mut self,
        writes: u64,
        batch: u64,
        in_flight: usize,
        max_lag: u64,
    ) -> anyhow::Result<Wrote> {
        let lag = Arc::new(AtomicU64::new(0));
        let looking = tokio::spawn(look(self.server.clone(), Arc::clone(&lag)));
        let mut flying = VecDeque::with_capacity(in_flight);
        let mut wrote = Wrote { begun_ns: now_ns()?, writes, ..Wrote::default() };
        let mut left = writes;
        while left > 0 {
            let changes: Vec<Change> = (0..batch.min(left)).map(|_| self.change()).collect();
            left -= changes.len() as u64;
            // It is in the mailbox now, not only when somebody waits for the answer.
            flying.push_back(self.server.actor().send(Write(changes)));
            if flying.len() >= in_flight
                && let Some(first) = flying.pop_front()
            {
                first.await??;
            }
            let lagging = Instant::now();
            while lag.load(Ordering::Relaxed) > max_lag {
                tokio::time::sleep(LOOK).await;
            }
            wrote.waited_ns += u64::try_from(lagging.elapsed().as_nanos())?;
        }
        for write in flying {
            write.await??;
        }
        wrote.ended_ns = now_ns()?;
        looking.abort();
        Ok(wrote)
    }
}

/// Keeps `lag` at the changes by which the last of the followers lags, for ever.
async fn look(server: Server, lag: Arc<AtomicU64>) {
    while let Ok(followers) = server.followers().await {
        let most = followers.iter().map(|follower| follower.lag).max();
        lag.store(most.unwrap_or(0), Ordering::Relaxed);
        tokio::time::sleep(LOOK).await;
    }
}

fn now_ns() -> anyhow::Result<u64> {
    u64::try_from(process::now().as_nanos()).context("the year is past 2554")
}
