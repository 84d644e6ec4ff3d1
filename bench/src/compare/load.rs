//! The followers of a comparison: bare sockets on one thread, the same ones for every system. They
//! count what they read, and keep nothing.

use std::cell::RefCell;
use std::net::TcpStream;
use std::rc::Rc;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, AtomicUsize, Ordering};
use std::sync::mpsc;
use std::thread::JoinHandle;
use std::time::Duration;

use anyhow::{Context, bail};
use tablecast_bench::percentile;
use tokio::task::LocalSet;

use crate::process;
use crate::stream::follower::{Frames, READ_BYTES};

/// Longer than any measurement takes: only a hang is noticed by it.
const PATIENCE: Duration = Duration::from_secs(600);

/// How a follower knows how far it is.
pub(crate) enum Counting {
    /// Live frames of Tablecast.
    Frames(Frames),
    /// Messages that are all equally long.
    Fixed(Fixed),
}

/// Messages of one length, each with a time in it. Lines that begin otherwise are no messages.
#[derive(Clone, Debug, Default)]
pub(crate) struct Fixed {
    /// What every message begins with, and no other line does.
    pub(crate) first: u8,
    pub(crate) bytes: usize,
    /// Where in it the time is.
    pub(crate) time_at: usize,
    /// Bytes of the message at hand that have been read.
    at: usize,
    in_line: bool,
    time: [u8; 8],
}

impl Fixed {
    pub(crate) fn new(first: u8, bytes: usize, time_at: usize) -> Self {
        Self { first, bytes, time_at, ..Self::default() }
    }

    /// Goes on by these bytes, and says the time in every message once all of it has been read.
    fn pass(&mut self, mut bytes: &[u8], mut seen: impl FnMut(u64)) {
        while let Some(next) = bytes.first() {
            self.in_line |= self.at == 0 && *next != self.first;
            let taken = if self.in_line {
                let end = bytes.iter().position(|byte| *byte == b'\n');
                self.in_line = end.is_none();
                end.map_or(bytes.len(), |end| end + 1)
            } else {
                let taken = (self.bytes - self.at).min(bytes.len());
                for (number, byte) in (self.time_at..).zip(&mut self.time) {
                    let here = number.checked_sub(self.at).filter(|at| *at < taken);
                    *byte = here.and_then(|at| bytes.get(at)).copied().unwrap_or(*byte);
                }
                self.at = (self.at + taken) % self.bytes;
                if self.at == 0 {
                    seen(u64::from_be_bytes(self.time));
                }
                taken
            };
            bytes = bytes.get(taken..).unwrap_or_default();
        }
    }
}

/// What the followers and whoever waits for them know of each other.
#[derive(Debug)]
pub(crate) struct Shared {
    /// They end when they have read so many changes.
    pub(crate) end: AtomicU64,
    /// What is measured now: latencies are kept by its number.
    pub(crate) phase: AtomicUsize,
    /// So many changes have reached all, to a `step`.
    pub(crate) delivered: AtomicU64,
}

/// What the followers saw.
#[derive(Debug, Default)]
pub(crate) struct Seen {
    /// When the last one had read all, since the epoch.
    pub(crate) done: Duration,
    /// How long changes took, of each phase, in order.
    pub(crate) latencies: Vec<Vec<u64>>,
}

impl Seen {
    /// In microseconds.
    pub(crate) fn percentile(&self, phase: usize, percent: usize) -> f64 {
        let latencies = self.latencies.get(phase).map_or(&[][..], |latencies| latencies);
        percentile(latencies, percent).map_or(f64::NAN, |latency| latency as f64 / 1e3)
    }
}

/// Followers that read on a thread of their own.
pub(crate) struct Readers {
    pub(crate) shared: Arc<Shared>,
    thread: JoinHandle<anyhow::Result<Seen>>,
}

impl Readers {
    /// `sampled` of them, spread over all, take the time. Every `step` changes that all have read are
    /// told.
    pub(crate) fn start(
        followers: Vec<(TcpStream, Counting)>,
        sampled: usize,
        step: u64,
        delivered: mpsc::Sender<u64>,
    ) -> Self {
        let shared = Arc::new(Shared {
            end: AtomicU64::new(u64::MAX),
            phase: AtomicUsize::new(0),
            delivered: AtomicU64::new(0),
        });
        let of_thread = Arc::clone(&shared);
        let thread = std::thread::spawn(move || {
            let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build()?;
            let reading = read(followers, sampled, step, delivered, of_thread);
            LocalSet::new().block_on(&runtime, async {
                tokio::time::timeout(PATIENCE, reading).await.context("the followers hang")?
            })
        });
        Self { shared, thread }
    }

    /// Why a measurement failed: theirs, if they have failed before.
    pub(crate) fn because(self, error: anyhow::Error) -> anyhow::Error {
        if self.thread.is_finished() { self.join().err().unwrap_or(error) } else { error }
    }

    /// Waits until all have read as many changes as `Shared::end` says.
    pub(crate) fn join(self) -> anyhow::Result<Seen> {
        let seen = self.thread.join();
        seen.map_err(|_| anyhow::anyhow!("the followers' thread panicked"))?
    }
}

/// What the followers have in common, on their thread.
struct Common {
    buffer: Box<[u8]>,
    /// How many have passed each step.
    passed: Vec<usize>,
    step: u64,
    followers: usize,
    told: mpsc::Sender<u64>,
    latencies: Vec<Vec<u64>>,
    shared: Arc<Shared>,
}

impl Common {
    /// A follower has gone on from `before` to `now` changes.
    fn passed(&mut self, before: u64, now: u64) {
        for step in before / self.step..now / self.step {
            let at = usize::try_from(step).unwrap_or(usize::MAX);
            if at >= self.passed.len() {
                self.passed.resize(at + 1, 0);
            }
            let Some(passed) = self.passed.get_mut(at) else { return };
            *passed += 1;
            if *passed == self.followers {
                let delivered = (step + 1) * self.step;
                self.shared.delivered.store(delivered, Ordering::Relaxed);
                // Whoever saturates has stopped listening at its end.
                self.told.send(delivered).ok();
            }
        }
    }

    fn took(&mut self, latency: u64) {
        let phase = self.shared.phase.load(Ordering::Relaxed);
        if phase >= self.latencies.len() {
            self.latencies.resize(phase + 1, Vec::new());
        }
        if let Some(latencies) = self.latencies.get_mut(phase) {
            latencies.push(latency);
        }
    }
}

async fn read(
    followers: Vec<(TcpStream, Counting)>,
    sampled: usize,
    step: u64,
    told: mpsc::Sender<u64>,
    shared: Arc<Shared>,
) -> anyhow::Result<Seen> {
    let count = followers.len();
    let common = Rc::new(RefCell::new(Common {
        buffer: vec![0; READ_BYTES].into(),
        passed: Vec::new(),
        step: step.max(1),
        followers: count,
        told,
        latencies: Vec::new(),
        shared,
    }));
    let mut tasks = Vec::new();
    for (number, (stream, counting)) in followers.into_iter().enumerate() {
        stream.set_nonblocking(true)?;
        let stream = tokio::net::TcpStream::from_std(stream)?;
        let samples = number * sampled / count != (number + 1) * sampled / count;
        tasks.push(tokio::task::spawn_local(follow(stream, counting, samples, Rc::clone(&common))));
    }
    for task in tasks {
        task.await??;
    }
    let mut latencies = std::mem::take(&mut common.borrow_mut().latencies);
    latencies.iter_mut().for_each(|latencies| latencies.sort_unstable());
    Ok(Seen { done: process::now(), latencies })
}

async fn follow(
    stream: tokio::net::TcpStream,
    mut counting: Counting,
    samples: bool,
    common: Rc<RefCell<Common>>,
) -> anyhow::Result<()> {
    let shared = Arc::clone(&common.borrow().shared);
    let mut count = 0;
    while count < shared.end.load(Ordering::Relaxed) {
        stream.readable().await?;
        let common = &mut *common.borrow_mut();
        let read = match stream.try_read(&mut common.buffer) {
            Ok(0) => bail!("the server closed a connection"),
            Ok(read) => read,
            Err(error) if error.kind() == std::io::ErrorKind::WouldBlock => continue,
            Err(error) => return Err(error.into()),
        };
        let bytes = common.buffer.get(..read).unwrap_or_default();
        let (before, mut times) = (count, Vec::new());
        let mut seen = |changes, time| {
            count += changes;
            if samples {
                times.push(time);
            }
        };
        match &mut counting {
            Counting::Frames(at) => at.pass(bytes, |head| seen(head.changes, head.first_value))?,
            Counting::Fixed(at) => at.pass(bytes, |time| seen(1, time)),
        }
        if samples {
            let now = u64::try_from(process::now().as_nanos())?;
            times.into_iter().for_each(|time| common.took(now.saturating_sub(time)));
        }
        common.passed(before, count);
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::Fixed;

    #[test]
    fn messages_are_passed_however_they_are_cut() {
        let mut bytes = b"PING\r\n".to_vec();
        for number in 1..=5_u64 {
            bytes.extend_from_slice(b"MSG ");
            bytes.extend_from_slice(&number.to_be_bytes());
            bytes.extend_from_slice(b"\nM\r\n");
            if number == 3 {
                bytes.extend_from_slice(b"PING\r\n+OK\r\n");
            }
        }
        for piece in [1, 2, 3, 7, 16, bytes.len()] {
            let mut at = Fixed::new(b'M', 16, 4);
            let mut seen = Vec::new();
            bytes.chunks(piece).for_each(|piece| at.pass(piece, |time| seen.push(time)));
            assert_eq!(seen, [1, 2, 3, 4, 5], "{piece}");
        }
    }
}
