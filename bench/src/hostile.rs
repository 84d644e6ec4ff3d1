//! `hostile`: what is delivered to honest followers when nobody else is there, and beside connections that mean
//! harm, by turns; what such a connection costs the server in memory, and how long a newcomer waits.

pub(crate) mod load;

use std::io::{Read as _, Write as _};
use std::net::SocketAddr;
use std::process::{Child, Command, Stdio};
use std::sync::atomic::Ordering;
use std::sync::mpsc;
use std::time::{Duration, Instant};

use anyhow::{Context, ensure};
use clap::ValueEnum as _;
use rcgen::{CertificateParams, KeyPair};
use serde_json::Value;
use tablecast_actors::ServerConfig;
use tablecast_bench::median;
use tempfile::NamedTempFile;

use crate::compare::load::Readers;
use crate::compare::peer::{Cores, Found};
use crate::compare::system::{Own, System, finish, followers};
use crate::compare::window;
use crate::report::{Report, rounded};
use crate::stream::follower;
use crate::{machine, process};
use load::Kind;

const VALUE_BYTES: usize = 32;

/// Bytes of keys and values that are on their way to each follower at most.
const IN_FLIGHT_BYTES: u64 = 256 << 10;

/// The log is full then, and caches and buffers are warm.
const WARM: Duration = Duration::from_secs(6);

/// How long as many empty followers as a server repairs at once have themselves repaired, over and over, before anything is measured.
const REPAIRED: Duration = Duration::from_secs(6);

/// How often memory is looked at.
const LOOK: Duration = Duration::from_millis(50);

/// What is not measured at the beginning of a turn.
const CHANGE: Duration = Duration::from_millis(500);

const QUIET: usize = 1;
const HOSTILE: usize = 2;

#[derive(Debug, clap::Args)]
pub(crate) struct Args {
    /// Connections that mean harm, of all kinds together. More than that are not let in at once.
    #[arg(long, default_value_t = 100, value_parser = clap::value_parser!(u64).range(1..=1000))]
    connections: u64,
    /// Only those of one kind.
    #[arg(long)]
    kind: Option<Kind>,
    /// Followers.
    #[arg(long, default_value_t = 100, value_parser = clap::value_parser!(u64).range(1..=4000))]
    followers: u64,
    /// Keys of the table.
    #[arg(long, default_value_t = 100_000, value_parser = clap::value_parser!(u64).range(1..))]
    keys: u64,
    /// How long it is measured, half of it quiet.
    #[arg(long, default_value_t = 30, value_parser = clap::value_parser!(u64).range(1..))]
    seconds: u64,
    /// Turns, each of them quiet and then hostile. Figures are medians.
    #[arg(long, default_value_t = 5, value_parser = clap::value_parser!(u64).range(1..=100))]
    turns: u64,
    /// One JSON object instead of lines.
    #[arg(long)]
    pub(crate) json: bool,
}

/// Who is bothered: a server, and the same over TLS with a certificate.
struct Target {
    address: SocketAddr,
    tls: SocketAddr,
    ca: NamedTempFile,
}

impl Target {
    fn of(server: &mut Own) -> anyhow::Result<Self> {
        let address = server.address();
        let key = KeyPair::generate()?;
        let certificate = CertificateParams::new([address.ip().to_string()])?;
        let certificate = certificate.self_signed(&key)?.pem();
        let mut ca = NamedTempFile::new()?;
        ca.write_all(certificate.as_bytes())?;
        let tls = server.listen_tls(certificate, key.serialize_pem())?;
        Ok(Self { address, tls, ca })
    }
}

/// The other side, in a process of its own.
struct Hostile(Child);

impl Hostile {
    fn start(connections: u64, kind: Option<Kind>, target: &Target) -> anyhow::Result<Self> {
        let mut command = Command::new(std::env::current_exe()?);
        command.arg("hostile-load").args(["--address", &target.address.to_string()]);
        command.args(["--tls", &target.tls.to_string()]).arg("--ca").arg(target.ca.path());
        command.args(["--connections", &connections.to_string()]);
        if let Some(kind) = kind.and_then(|kind| kind.to_possible_value()) {
            command.args(["--kind", kind.get_name()]);
        }
        Ok(Self(command.stdin(Stdio::piped()).stdout(Stdio::piped()).spawn()?))
    }

    fn cpu_s(&self) -> anyhow::Result<f64> {
        process::cpu_s(&self.0.id().to_string())
    }

    /// What it has done.
    fn stop(mut self) -> anyhow::Result<Value> {
        drop(self.0.stdin.take());
        let mut told = String::new();
        self.0.stdout.take().context("stdout is a pipe")?.read_to_string(&mut told)?;
        Ok(serde_json::from_str(&told)?)
    }
}

impl Drop for Hostile {
    fn drop(&mut self) {
        // It has ended before if this fails; what it leaves is taken away below.
        drop(self.0.kill());
        drop(self.0.wait());
    }
}

/// What is seen in a turn, half by half.
#[derive(Debug, Default)]
struct Figures {
    delivered_per_s: Vec<f64>,
    server_cpu: Vec<f64>,
    /// The most, with some looks a second.
    rss_bytes: Vec<u64>,
    connect_ms: Vec<f64>,
    /// Of the other side.
    load_cpu: Vec<f64>,
}

pub(crate) fn run(args: &Args) -> anyhow::Result<Report> {
    machine::open_files()?;
    let found = Found { cores: Cores::split()?, ..Found::default() };
    let mut own = Own::tablecast(&found, usize::try_from(args.keys)?, VALUE_BYTES)?;
    let target = Target::of(&mut own)?;
    let (address, pid) = (target.address, own.process().pid());
    let count = usize::try_from(args.followers)?;
    let window = window(IN_FLIGHT_BYTES, VALUE_BYTES);
    let (told, delivered) = mpsc::channel();
    let readers = Readers::start(followers(&own, count)?, count.min(10), window / 8, told.clone());
    let shared = readers.shared.clone();
    let turns = u32::try_from(args.turns)?;
    let half = Duration::from_secs(args.seconds) / turns / 2;

    std::thread::scope(|scope| {
        let measure = || -> anyhow::Result<_> {
            let watch = |figures: &mut Figures, phase, load: Option<&Hostile>| {
                std::thread::sleep(CHANGE);
                shared.phase.store(phase, Ordering::Relaxed);
                let load_cpu = || load.map_or(Ok(0.0), Hostile::cpu_s);
                let cpu = (process::cpu_s(&pid)?, load_cpu()?);
                let (start, before) = (Instant::now(), shared.delivered.load(Ordering::Relaxed));
                let first = most_memory(&pid, half / 2)?;
                let connect = connect_time(address, half / 2)?;
                figures.connect_ms.push(connect.as_secs_f64() * 1e3);
                let second = most_memory(&pid, (half / 2).saturating_sub(connect))?;
                let delivered = shared.delivered.load(Ordering::Relaxed) - before;
                let took = start.elapsed().as_secs_f64();
                shared.phase.store(0, Ordering::Relaxed);
                figures.delivered_per_s.push((delivered * args.followers) as f64 / took);
                figures.server_cpu.push((process::cpu_s(&pid)? - cpu.0) / took);
                figures.load_cpu.push((load_cpu()? - cpu.1) / took);
                figures.rss_bytes.push(first.max(second));
                anyhow::Ok(())
            };
            std::thread::sleep(WARM);
            let diffs_bytes = repair(&target, &pid)?;
            let (mut quiet, mut hostile) = (Figures::default(), Figures::default());
            let mut done = Value::Null;
            for _ in 0..turns {
                watch(&mut quiet, QUIET, None)?;
                let load = Hostile::start(args.connections, args.kind, &target)?;
                watch(&mut hostile, HOSTILE, Some(&load))?;
                done = load.stop()?;
            }
            Ok((quiet, hostile, diffs_bytes, done))
        };
        let measuring = scope.spawn(measure);
        // A little longer than it is measured: it is more than enough of it, and ends what hangs.
        let time = WARM + REPAIRED + (half + CHANGE) * 2 * turns + CHANGE * (2 + turns);
        let writes = match own.saturate(time, window, &told, delivered) {
            Ok(writes) => writes,
            Err(error) => return Err(readers.because(error)),
        };
        ensure!(measuring.is_finished(), "the writer had done before all was measured");
        let measured = measuring.join().map_err(|_| anyhow::anyhow!("a thread panicked"))?;
        let seen = finish(&mut own, readers, writes)?;
        let (quiet, hostile, diffs_bytes, done) = measured?;
        let idle = quiet.delivered_per_s.iter().any(|delivered| *delivered <= 0.0);
        ensure!(!idle, "nothing was delivered in a quiet half");
        let ms = |phase, percent| rounded(seen.percentile(phase, percent) / 1e3);
        Ok(report(args, &quiet, &hostile)
            .with("quiet_p50_ms", ms(QUIET, 50))
            .with("quiet_p99_ms", ms(QUIET, 99))
            .with("hostile_p50_ms", ms(HOSTILE, 50))
            .with("hostile_p99_ms", ms(HOSTILE, 99))
            .with("diffs_bytes", diffs_bytes)
            .with("done_in_last_turn", done))
    })
}

/// The most resident memory in so long a time.
fn most_memory(pid: &str, time: Duration) -> anyhow::Result<u64> {
    let start = Instant::now();
    let mut most = process::rss_bytes(pid)?;
    while start.elapsed() < time {
        std::thread::sleep(LOOK.min(time.saturating_sub(start.elapsed())));
        most = most.max(process::rss_bytes(pid)?);
    }
    Ok(most)
}

/// How long a newcomer waits for its Welcome; nobody waits for it longer than this.
fn connect_time(address: SocketAddr, most: Duration) -> anyhow::Result<Duration> {
    let start = Instant::now();
    let (told, connected) = mpsc::channel();
    // Whether somebody still waits for it is nothing to it.
    std::thread::spawn(move || drop(told.send(follower::connect(address).map(drop))));
    match connected.recv_timeout(most) {
        Ok(connected) => connected.map(|()| start.elapsed()),
        Err(_) => Ok(most),
    }
}

/// As many empty followers are repaired, over and over, as the server repairs at once: what memory that leaves is not what those
/// cost who mean harm.
fn repair(target: &Target, pid: &str) -> anyhow::Result<u64> {
    let before = process::rss_bytes(pid)?;
    let at_once = ServerConfig::default().diffs_at_once as u64;
    let newcomers = Hostile::start(at_once, Some(Kind::Diffs), target)?;
    std::thread::sleep(REPAIRED);
    newcomers.stop()?;
    Ok(process::rss_bytes(pid)?.saturating_sub(before))
}

fn report(args: &Args, quiet: &Figures, hostile: &Figures) -> Report {
    let middle = |figures: &Vec<f64>| rounded(median(figures.clone()));
    let ratios = hostile.delivered_per_s.iter().zip(&quiet.delivered_per_s);
    let ratio = middle(&ratios.map(|(hostile, quiet)| hostile / quiet).collect());
    let most = |figures: &Figures| figures.rss_bytes.iter().copied().max().unwrap_or_default();
    // What the first quiet half did not have; what was freed since may be in it still.
    let before = quiet.rss_bytes.first().copied().unwrap_or_default();
    let grown = most(hostile).saturating_sub(before);
    Report::of("hostile")
        .with("connections", args.connections)
        .with("kind", args.kind.map(|kind| format!("{kind:?}")))
        .with("followers", args.followers)
        .with("keys", args.keys)
        .with("seconds", args.seconds)
        .with("turns", args.turns)
        .with("quiet_delivered_per_s", middle(&quiet.delivered_per_s).round())
        .with("hostile_delivered_per_s", middle(&hostile.delivered_per_s).round())
        .with("ratio", ratio)
        .with("rss_bytes", before)
        .with("grown_bytes", grown)
        .with("grown_bytes_per_connection", grown / args.connections)
        .with("quiet_server_cpu", middle(&quiet.server_cpu))
        .with("hostile_server_cpu", middle(&hostile.server_cpu))
        .with("hostile_load_cpu", middle(&hostile.load_cpu))
        .with("quiet_connect_ms", middle(&quiet.connect_ms))
        .with("hostile_connect_ms", middle(&hostile.connect_ms))
}
