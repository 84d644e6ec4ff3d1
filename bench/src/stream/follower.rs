//! The followers of `stream`: they say Hello, and then only read. All on one thread.
//!
//! A follower learns from the head of each frame how far it is, and looks at nothing else.

use std::cell::RefCell;
use std::io::{Read as _, Write as _};
use std::net::SocketAddr;
use std::rc::Rc;
use std::sync::mpsc;
use std::time::Duration;

use anyhow::{Context, bail};
use tablecast_protocol::wire::{self, HEADER_BYTES};
use tablecast_protocol::{Limits, Revision, ToClient, ToServer};
use tokio::net::TcpStream;
use tokio::task::LocalSet;

use crate::process;

/// How much one read takes at most. One buffer for all, or it would not stay in the cache.
pub(crate) const READ_BYTES: usize = 256 << 10;

/// As much of a frame as is looked at: its head, and the first key and the first 8 bytes of its
/// value where that has a key of 16 bytes.
const HEAD_BYTES: usize = 64;

/// Longer than any step takes: only a hang is noticed by it.
const PATIENCE: Duration = Duration::from_secs(600);

/// Whom to follow, and how far.
#[derive(Debug)]
pub(crate) struct Plan {
    pub(crate) address: SocketAddr,
    pub(crate) followers: u64,
    /// How many of them take the time.
    pub(crate) sampled: u64,
    /// Up to here each frame has the time in its first value.
    pub(crate) paced: Revision,
    pub(crate) end: Revision,
}

/// What the followers saw.
#[derive(Debug, Default)]
pub(crate) struct Read {
    /// When the last one had read all.
    pub(crate) done: Duration,
    /// How long paced writes took, in no order.
    pub(crate) latencies: Vec<Duration>,
    /// Bytes behind the paced part, and how many reads they came in, of all together.
    pub(crate) bytes: u64,
    pub(crate) reads: u64,
}

/// Runs them to the end. Says when all are connected, when all have read the paced part, and when
/// all have read everything.
pub(crate) fn run(plan: &Plan, reached: &mpsc::Sender<()>) -> anyhow::Result<Read> {
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build()?;
    runtime.block_on(async {
        let mut followers = Vec::new();
        for number in 0..plan.followers {
            let samples = number * plan.sampled / plan.followers
                != (number + 1) * plan.sampled / plan.followers;
            followers.push(Follower::connect(plan.address, samples)?);
        }
        reached.send(())?;
        let mut followers = read_all(followers, plan.paced, true).await?;
        reached.send(())?;
        for follower in &mut followers {
            (follower.bytes, follower.reads) = (0, 0);
        }
        let followers = read_all(followers, plan.end, false).await?;
        let mut read = Read { done: process::now(), ..Read::default() };
        // The main thread hangs up first if it failed.
        reached.send(())?;
        for follower in followers {
            read.latencies.extend(follower.latencies);
            read.bytes += follower.bytes;
            read.reads += follower.reads;
        }
        Ok(read)
    })
}

async fn read_all(
    followers: Vec<Follower>,
    end: Revision,
    paced: bool,
) -> anyhow::Result<Vec<Follower>> {
    let buffer: Rc<RefCell<Box<[u8]>>> = Rc::new(RefCell::new(vec![0; READ_BYTES].into()));
    let reading = async {
        let tasks: Vec<_> = followers
            .into_iter()
            .map(|follower| tokio::task::spawn_local(follower.read(end, paced, Rc::clone(&buffer))))
            .collect();
        let mut followers = Vec::new();
        for task in tasks {
            followers.push(task.await??);
        }
        Ok(followers)
    };
    let here = LocalSet::new();
    tokio::time::timeout(PATIENCE, here.run_until(reading)).await.context("the followers hang")?
}

struct Follower {
    stream: TcpStream,
    at: Frames,
    samples: bool,
    latencies: Vec<Duration>,
    bytes: u64,
    reads: u64,
}

impl Follower {
    fn connect(address: SocketAddr, samples: bool) -> anyhow::Result<Self> {
        let (stream, at) = connect(address)?;
        stream.set_nonblocking(true)?;
        let stream = TcpStream::from_std(stream)?;
        Ok(Self { stream, at, samples, latencies: Vec::new(), bytes: 0, reads: 0 })
    }

    async fn read(
        mut self,
        end: Revision,
        paced: bool,
        buffer: Rc<RefCell<Box<[u8]>>>,
    ) -> anyhow::Result<Self> {
        while self.at.revision < end || self.at.skip > 0 {
            self.stream.readable().await?;
            let mut buffer = buffer.borrow_mut();
            let read = match self.stream.try_read(&mut buffer) {
                Ok(0) => bail!("the server closed a connection"),
                Ok(read) => buffer.get(..read).unwrap_or_default(),
                Err(error) if error.kind() == std::io::ErrorKind::WouldBlock => continue,
                Err(error) => return Err(error.into()),
            };
            self.bytes += read.len() as u64;
            self.reads += 1;
            let (samples, latencies) = (paced && self.samples, &mut self.latencies);
            self.at.pass(read, |head| {
                if samples {
                    let sent = Duration::from_nanos(head.first_value);
                    latencies.push(process::now().saturating_sub(sent));
                }
            })?;
        }
        Ok(self)
    }
}

/// Says Hello, and reads what is answered: a follower that only reads from there on.
pub(crate) fn connect(address: SocketAddr) -> anyhow::Result<(std::net::TcpStream, Frames)> {
    let mut stream = std::net::TcpStream::connect(address)?;
    stream.set_nodelay(true)?;
    let limits = Limits::default();
    stream.write_all(&wire::encode(&ToServer::hello("reader", &limits, None)))?;
    let mut length = [0; HEADER_BYTES];
    stream.read_exact(&mut length)?;
    let length = usize::try_from(u32::from_be_bytes(length))?;
    let mut frame = vec![0; length.min(limits.frame_bytes)];
    stream.read_exact(&mut frame)?;
    let message = wire::decode(&frame, &limits)?;
    let ToClient::Welcome { revision, .. } = message else { bail!("no welcome: {message:?}") };
    Ok((stream, Frames { revision, ..Frames::default() }))
}

/// Where in the stream of frames a follower is.
#[derive(Debug, Default)]
pub(crate) struct Frames {
    /// The last change that has been read.
    pub(crate) revision: Revision,
    /// Bytes that are left of the frame whose head has been read.
    pub(crate) skip: usize,
    /// The beginning of a frame, until enough of it is there.
    head: Vec<u8>,
}

/// What is looked at of a live frame.
#[derive(Debug, PartialEq, Eq)]
pub(crate) struct Head {
    pub(crate) first: Revision,
    pub(crate) changes: u64,
    /// The first 8 bytes of the first value.
    pub(crate) first_value: u64,
}

impl Frames {
    /// Goes on by these bytes, and says every live frame *once its head* has been read.
    pub(crate) fn pass(
        &mut self,
        mut bytes: &[u8],
        mut live: impl FnMut(&Head),
    ) -> anyhow::Result<()> {
        while !bytes.is_empty() {
            let skipped = self.skip.min(bytes.len());
            self.skip -= skipped;
            bytes = bytes.get(skipped..).unwrap_or_default();
            let wanted = self.wanted().saturating_sub(self.head.len()).min(bytes.len());
            let (taken, left) = bytes.split_at(wanted);
            self.head.extend_from_slice(taken);
            bytes = left;
            if self.head.len() >= HEADER_BYTES && self.head.len() == self.wanted() {
                let (length, payload) = self.head.split_first_chunk().context("it is longer")?;
                self.skip = usize::try_from(u32::from_be_bytes(*length))? - payload.len();
                let head = look(payload)?;
                anyhow::ensure!(
                    head.first == self.revision.next(),
                    "revision {} follows {}",
                    head.first,
                    self.revision
                );
                self.revision = self.revision.plus(head.changes);
                live(&head);
                self.head.clear();
            }
        }
        Ok(())
    }

    /// How many bytes the head of the frame at hand has, as far as that is known.
    fn wanted(&self) -> usize {
        match self.head.first_chunk() {
            Some(length) => HEADER_BYTES + (u32::from_be_bytes(*length) as usize).min(HEAD_BYTES),
            None => HEADER_BYTES,
        }
    }
}

/// Reads the head of a live frame; any other frame is the end of the measurement.
fn look(mut payload: &[u8]) -> anyhow::Result<Head> {
    let mut take = |count: usize| -> anyhow::Result<&[u8]> {
        let (taken, left) = payload.split_at_checked(count).context("a frame is cut off")?;
        payload = left;
        Ok(taken)
    };
    let mut number = |count: usize| -> anyhow::Result<u64> {
        Ok(take(count)?.iter().fold(0, |number, byte| number << 8 | u64::from(*byte)))
    };
    match number(2)? {
        0x9403 => {}
        0x9404 => bail!("a follower fell behind: lower --max-lag, so that the log holds its lag"),
        other => bail!("a frame that begins with {other:#x} came to a follower that only reads"),
    }
    let first = match number(1)? {
        fixed @ 0..0x80 => fixed,
        width @ 0xcc..=0xcf => number(1 << (width - 0xcc))?,
        other => bail!("{other:#x} is no revision"),
    };
    number(2 + 8)?;
    let elements = match number(1)? {
        fixed @ 0x90..0xa0 => fixed - 0x90,
        0xdc => number(2)?,
        0xdd => number(4)?,
        other => bail!("{other:#x} is no array"),
    };
    let key = match number(1)? {
        0xc4 => number(1)?,
        other => bail!("{other:#x} is no short key"),
    };
    number(usize::try_from(key)?)?;
    let width = number(1)?;
    number(match width {
        0xc4..=0xc6 => 1 << (width - 0xc4),
        other => bail!("{other:#x} is no value"),
    })?;
    Ok(Head { first: Revision(first), changes: elements / 2, first_value: number(8)? })
}

#[cfg(test)]
mod tests {
    use tablecast_protocol::wire::{LiveFrame, encode};
    use tablecast_protocol::{Chain, Change, Revision, ToClient};

    use super::{Frames, Head};

    fn frames() -> Vec<u8> {
        let mut bytes = Vec::new();
        let mut first = Revision(1);
        for (changes, value_bytes) in [(1, 8), (7, 32), (8, 300), (200, 40), (70, 70_000), (1, 8)] {
            let mut frame = LiveFrame::default();
            for number in 0..changes {
                let mut value = vec![0xcc; value_bytes];
                value[..8].copy_from_slice(&(first.0 + number).to_be_bytes());
                frame.push(&Change::write(vec![7; 16], value));
            }
            bytes.extend_from_slice(&frame.take(first, &Chain::START));
            first = first.plus(changes);
        }
        bytes
    }

    #[test]
    fn frames_are_passed_however_they_are_cut() {
        let bytes = frames();
        for piece in [1, 2, 3, 63, 64, 65, 1000, bytes.len()] {
            let mut at = Frames::default();
            let mut heads = Vec::new();
            for piece in bytes.chunks(piece) {
                at.pass(piece, |&Head { first, changes, first_value }| {
                    assert_eq!(first.0, first_value);
                    heads.push(changes);
                })
                .unwrap();
            }
            assert_eq!(heads, [1, 7, 8, 200, 70, 1]);
            assert_eq!((at.revision, at.skip, at.head.len()), (Revision(287), 0, 0));
        }
    }

    #[test]
    fn falling_behind_is_told() {
        let (jumps, revision, chain) = (1, Revision(9), Chain::START);
        let frame = encode(&ToClient::FellBehind { jumps, revision, chain });
        let error = Frames::default().pass(&frame, |_| {}).unwrap_err();
        assert!(error.to_string().contains("fell behind"), "{error}");
    }
}
