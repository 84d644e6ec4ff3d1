//! `stream`: live changes from a server, in a process of its own, to followers that only read.
//!
//! First the latency: one write at a time, at a steady rate, each with the time in its value. Then
//! the throughput: as many writes as the server takes while no follower lags too far.

pub(crate) mod follower;
pub(crate) mod server;

use std::io::{BufRead, BufReader, Lines, Write};
use std::net::SocketAddr;
use std::process::{Child, ChildStdin, ChildStdout, Command, Stdio};
use std::sync::mpsc;
use std::time::Duration;

use anyhow::Context;
use clap::ArgAction;
use tablecast_bench::percentile;
use tablecast_protocol::Revision;

use crate::process;
use crate::report::{Report, rounded};
use server::{Order, Wrote};

#[derive(Debug, clap::Args)]
pub(crate) struct Args {
    /// Followers.
    #[arg(long, default_value_t = 100, value_parser = clap::value_parser!(u64).range(1..=9000))]
    followers: u64,
    /// Writes whose delivery is timed.
    #[arg(long, default_value_t = 500_000, value_parser = clap::value_parser!(u64).range(1..))]
    writes: u64,
    /// The length of each value; keys have 16 bytes.
    #[arg(long, default_value_t = 32, value_parser = clap::value_parser!(u64).range(8..=1 << 20))]
    value_bytes: u64,
    /// Keys in the server's table before; each write changes one of them.
    #[arg(long, default_value_t = 100_000, value_parser = clap::value_parser!(u64).range(1..))]
    keys: u64,
    /// Writes that are one unit and one message to the server.
    #[arg(long, default_value_t = 64, value_parser = clap::value_parser!(u64).range(1..=4096))]
    batch: u64,
    /// Units that the writer does not wait for.
    #[arg(long, default_value_t = 64, value_parser = clap::value_parser!(u64).range(1..=1024))]
    in_flight: u64,
    /// The writer waits while any follower lags by more changes than this.
    #[arg(long, default_value_t = 200_000)]
    max_lag: u64,
    /// Writes for the latency.
    #[arg(long, default_value_t = 2000)]
    paced_writes: u64,
    /// Their rate, in writes a second.
    #[arg(long, default_value_t = 1000, value_parser = clap::value_parser!(u64).range(1..=1000))]
    rate: u64,
    /// Followers whose latency is taken.
    #[arg(long, default_value_t = 10)]
    sampled: u64,
    /// Whether TCP_NODELAY is set on the server's end. The followers send nothing that it matters for.
    #[arg(long, default_value_t = true, action = ArgAction::Set)]
    nodelay: bool,
    /// One JSON object instead of lines.
    #[arg(long)]
    pub(crate) json: bool,
}

/// The server's process. It is killed if it is not told to stop.
struct Server {
    child: Child,
    orders: ChildStdin,
    replies: Lines<BufReader<ChildStdout>>,
    address: SocketAddr,
}

impl Server {
    fn start(args: &Args) -> anyhow::Result<Self> {
        let mut command = Command::new(std::env::current_exe()?);
        command.arg("stream-server");
        command.args(["--keys", &args.keys.to_string()]);
        command.args(["--value-bytes", &args.value_bytes.to_string()]);
        command.args(["--nodelay", &args.nodelay.to_string()]);
        let mut child = command.stdin(Stdio::piped()).stdout(Stdio::piped()).spawn()?;
        let orders = child.stdin.take().context("stdin is a pipe")?;
        let mut replies = BufReader::new(child.stdout.take().context("stdout is a pipe")?).lines();
        let address = replies.next().context("the server ended")??.parse()?;
        Ok(Self { child, orders, replies, address })
    }

    fn order(&mut self, order: &Order) -> anyhow::Result<()> {
        Ok(writeln!(self.orders, "{}", serde_json::to_string(order)?)?)
    }

    fn wrote(&mut self) -> anyhow::Result<Wrote> {
        let line = self.replies.next().context("the server ended")??;
        Ok(serde_json::from_str(&line)?)
    }

    fn pid(&self) -> String {
        self.child.id().to_string()
    }
}

impl Drop for Server {
    fn drop(&mut self) {
        // It has ended before if this fails; what it leaves is taken away below.
        drop(self.child.kill());
        drop(self.child.wait());
    }
}

pub(crate) fn run(args: &Args) -> anyhow::Result<Report> {
    let mut server = Server::start(args)?;
    let paced = Revision(args.paced_writes);
    let end = paced.plus(args.writes);
    let plan = follower::Plan {
        address: server.address,
        followers: args.followers,
        sampled: args.sampled,
        paced,
        end,
    };
    let (sender, heard) = mpsc::channel();
    let followers = std::thread::spawn(move || follower::run(&plan, &sender));
    // Whoever fails drops the sender; why is what the thread ends with.
    let reached = || heard.recv().ok();

    let mut figures = Figures::default();
    let went_well = (|| -> anyhow::Result<Option<()>> {
        if reached().is_none() {
            return Ok(None);
        }
        server.order(&Order::Pace { writes: args.paced_writes, rate: args.rate })?;
        server.wrote()?;
        let Some(()) = reached() else { return Ok(None) };

        let before = (process::cpu_s(&server.pid())?, process::cpu_s("self")?);
        let Args { writes, batch, in_flight, max_lag, .. } = *args;
        server.order(&Order::Burst { writes, batch, in_flight, max_lag })?;
        let Some(()) = reached() else { return Ok(None) };
        figures.wrote = server.wrote()?;
        figures.server_cpu_s = process::cpu_s(&server.pid())? - before.0;
        figures.followers_cpu_s = process::cpu_s("self")? - before.1;
        figures.rss_bytes = process::rss_bytes(&server.pid())?;
        Ok(Some(()))
    })();
    if went_well.is_err() {
        // Followers that still wait are woken by the end of their connections.
        drop(server);
    }
    let read = followers.join().map_err(|_| anyhow::anyhow!("the followers' thread panicked"))?;
    went_well?;
    Ok(report(args, &figures, read?))
}

#[derive(Default)]
struct Figures {
    wrote: Wrote,
    server_cpu_s: f64,
    followers_cpu_s: f64,
    rss_bytes: u64,
}

fn report(args: &Args, figures: &Figures, read: follower::Read) -> Report {
    let seconds =
        |from: u64, to: Duration| to.as_secs_f64() - Duration::from_nanos(from).as_secs_f64();
    let Figures { wrote, server_cpu_s, followers_cpu_s, rss_bytes } = figures;
    let delivered = (args.followers * args.writes) as f64;
    let delivery_s = seconds(wrote.begun_ns, read.done);
    let writing_s = seconds(wrote.begun_ns, Duration::from_nanos(wrote.ended_ns));
    let mut latencies = read.latencies;
    latencies.sort_unstable();
    let latency = |percent: usize| {
        percentile(&latencies, percent).map(|latency| rounded(latency.as_secs_f64() * 1e6))
    };
    Report::of("stream")
        .with("followers", args.followers)
        .with("writes", args.writes)
        .with("value_bytes", args.value_bytes)
        .with("keys", args.keys)
        .with("batch", args.batch)
        .with("in_flight", args.in_flight)
        .with("max_lag", args.max_lag)
        .with("nodelay", args.nodelay)
        .with("delivered_per_s", (delivered / delivery_s).round())
        .with("writes_per_s", (args.writes as f64 / writing_s).round())
        .with("writer_waited_s", rounded(wrote.waited_ns as f64 / 1e9))
        .with("bytes_per_s", (read.bytes as f64 / delivery_s).round())
        .with("bytes_per_read", (read.bytes as f64 / read.reads.max(1) as f64).round())
        .with("paced_writes", args.paced_writes)
        .with("rate", args.rate)
        .with("p50_us", latency(50))
        .with("p99_us", latency(99))
        .with("server_cpu_s_per_million", rounded(server_cpu_s / delivered * 1e6))
        .with("followers_cpu_s_per_million", rounded(followers_cpu_s / delivered * 1e6))
        .with("rss_bytes", *rss_bytes)
}
