//! Who delivers changes: each of them can be followed by a bare socket, and told to write at a
//! rate or as much as is taken.

use std::io::{BufRead, Write};
use std::net::{SocketAddr, TcpStream};
use std::sync::mpsc;
use std::time::{Duration, Instant};

use anyhow::{Context, ensure};
use serde::Deserialize;
use serde_json::json;
use tablecast_bench::{KEY_BYTES, SEED, keys, random_bytes};

use super::load::{Counting, Fixed, Readers};
use super::peer::{Found, Ordered, Peer, Process, Resp, command, reply};
use crate::process;
use crate::stream::follower;
use crate::stream::server::{Order, Wrote};

/// Writes that are one unit, or one `write` to a socket: 64 of them, fewer if they are large.
pub(crate) fn batch(value_bytes: usize) -> u64 {
    (256 * 1024 / (KEY_BYTES + value_bytes) as u64).clamp(1, 64)
}

/// Longer than anything is on its way.
const PATIENCE: Duration = Duration::from_secs(60);

/// Said instead of a number of delivered changes: nobody waits for any more.
const ENOUGH: u64 = u64::MAX;

/// A system under measurement.
pub(crate) trait System {
    fn process(&self) -> &Process;

    /// A follower that only reads.
    fn follow(&self) -> anyhow::Result<(TcpStream, Counting)>;

    /// Writes one change at a time.
    fn pace(&mut self, writes: u64, rate: u64) -> anyhow::Result<()>;

    /// Writes as much as the followers take, with `window` changes on their way. Answers how many.
    fn saturate(
        &mut self,
        time: Duration,
        window: u64,
        told: &mpsc::Sender<u64>,
        delivered: mpsc::Receiver<u64>,
    ) -> anyhow::Result<u64>;
}

/// Tablecast, or the plain fan-out: a process of this program that writes by itself.
pub(crate) struct Own {
    ordered: Ordered,
    batch: u64,
    /// A plain fan-out sends these; Tablecast sends frames.
    fixed: Option<Fixed>,
}

impl Own {
    pub(crate) fn tablecast(
        found: &Found,
        keys: usize,
        value_bytes: usize,
    ) -> anyhow::Result<Self> {
        let batch = batch(value_bytes);
        let (keys, value_bytes) = (keys.to_string(), value_bytes.to_string());
        let args = ["--keys", &keys, "--value-bytes", &value_bytes, "--nodelay", "true"];
        let args: Vec<_> = args.map(str::to_owned).into();
        let ordered = Ordered::start(&found.cores, "stream-server", &args)?;
        Ok(Self { ordered, batch, fixed: None })
    }

    pub(crate) fn plain(found: &Found, value_bytes: usize) -> anyhow::Result<Self> {
        let args = ["--value-bytes".to_owned(), value_bytes.to_string()];
        let fixed = Some(super::plain::message(value_bytes));
        let ordered = Ordered::start(&found.cores, "plain-server", &args)?;
        Ok(Self { ordered, batch: 1, fixed })
    }

    pub(crate) fn address(&self) -> SocketAddr {
        self.ordered.address
    }

    /// Where Tablecast listens over TLS from now on, with this certificate and its key, PEM.
    pub(crate) fn listen_tls(
        &mut self,
        certificate: String,
        key: String,
    ) -> anyhow::Result<SocketAddr> {
        self.ordered.order(&Order::Tls { certificate, key })?;
        Ok(SocketAddr::deserialize(reply(self.ordered.halves().1)?)?)
    }

    /// As `Pace`, and told apart from it only by its speed.
    pub(crate) fn burst(&mut self, writes: u64) -> anyhow::Result<Wrote> {
        let order = Order::Burst { writes, batch: self.batch, in_flight: 16, max_lag: u64::MAX };
        self.ordered.order(&order)?;
        self.ordered.wrote()
    }
}

impl System for Own {
    fn process(&self) -> &Process {
        &self.ordered.process
    }

    fn follow(&self) -> anyhow::Result<(TcpStream, Counting)> {
        if let Some(fixed) = &self.fixed {
            let stream = TcpStream::connect(self.ordered.address)?;
            stream.set_nodelay(true)?;
            // It says so once it is subscribed.
            read_line(&stream)?;
            return Ok((stream, Counting::Fixed(fixed.clone())));
        }
        let (stream, frames) = follower::connect(self.ordered.address)?;
        Ok((stream, Counting::Frames(frames)))
    }

    fn pace(&mut self, writes: u64, rate: u64) -> anyhow::Result<()> {
        self.ordered.order(&Order::Pace { writes, rate })?;
        self.ordered.wrote()?;
        Ok(())
    }

    fn saturate(
        &mut self,
        time: Duration,
        window: u64,
        told: &mpsc::Sender<u64>,
        delivered: mpsc::Receiver<u64>,
    ) -> anyhow::Result<u64> {
        let ms = u64::try_from(time.as_millis())?;
        self.ordered.order(&Order::Saturate { ms, batch: self.batch, window })?;
        let (orders, replies) = self.ordered.halves();
        std::thread::scope(|scope| {
            let telling = scope.spawn(move || -> anyhow::Result<()> {
                for count in delivered.into_iter().take_while(|count| *count != ENOUGH) {
                    writeln!(orders, "{}", json!({ "Delivered": count }))?;
                }
                Ok(())
            });
            let wrote = Wrote::deserialize(reply(replies)?);
            told.send(ENOUGH)?;
            telling.join().map_err(|_| anyhow::anyhow!("a thread panicked"))??;
            Ok(wrote?.writes)
        })
    }
}

/// How a message is written to a peer: what is around key and value.
struct Words {
    before: Vec<u8>,
    between: Vec<u8>,
    behind: &'static [u8],
}

/// How one follows a peer.
enum Follow {
    /// Says this, and reads so many lines.
    Saying { words: Vec<u8>, lines: usize },
    /// Asks Redis for its replication stream from where it stands.
    Replica,
}

/// A peer that a socket of this process publishes to.
pub(crate) struct Published {
    peer: Peer,
    publisher: TcpStream,
    words: Words,
    fixed: Fixed,
    follow: Follow,
    keys: Vec<[u8; KEY_BYTES]>,
    values: Vec<Vec<u8>>,
    random: fastrand::Rng,
}

impl Published {
    pub(crate) fn pub_sub(peer: Peer, value_bytes: usize) -> anyhow::Result<Self> {
        let payload = vec![0; KEY_BYTES + value_bytes];
        let cut = |mut bytes: Vec<u8>| {
            bytes.truncate(bytes.len() - payload.len() - 2);
            bytes
        };
        let message = command(&[b"message", b"c", &payload]);
        let time_at = message.len() - 2 - value_bytes;
        let words = Words {
            before: cut(command(&[b"PUBLISH", b"c", &payload])),
            between: Vec::new(),
            behind: b"\r\n",
        };
        let follow = Follow::Saying { words: b"SUBSCRIBE c\r\n".to_vec(), lines: 6 };
        let fixed = Fixed::new(b'*', message.len(), time_at);
        Self::redis(peer, words, fixed, follow, 1, value_bytes)
    }

    pub(crate) fn replication(peer: Peer, keys: usize, value_bytes: usize) -> anyhow::Result<Self> {
        let bytes = command(&[b"SET", &[0; KEY_BYTES], &vec![0; value_bytes]]).len();
        let words = Words {
            before: format!("*3\r\n$3\r\nSET\r\n${KEY_BYTES}\r\n").into_bytes(),
            between: format!("\r\n${value_bytes}\r\n").into_bytes(),
            behind: b"\r\n",
        };
        // The first replica makes Redis keep its stream; the others begin in it, without a copy.
        let mut first = TcpStream::connect(peer.address)?;
        first.write_all(b"PSYNC ? -1\r\n")?;
        read_line(&first)?;
        drop(first);
        let fixed = Fixed::new(b'*', bytes, bytes - 2 - value_bytes);
        Self::redis(peer, words, fixed, Follow::Replica, keys, value_bytes)
    }

    fn redis(
        peer: Peer,
        words: Words,
        fixed: Fixed,
        follow: Follow,
        count: usize,
        value_bytes: usize,
    ) -> anyhow::Result<Self> {
        let mut published = Self::new(peer, words, fixed, follow, count, value_bytes)?;
        let Self { keys, values, .. } = &published;
        let entries = keys.iter().map(|key| &key[..]).zip(values.iter().cycle().map(|it| &it[..]));
        Resp::connect(published.peer.address)?.fill(entries)?;
        published.publisher.write_all(b"CLIENT REPLY OFF\r\n")?;
        Ok(published)
    }

    pub(crate) fn nats(peer: Peer, value_bytes: usize) -> anyhow::Result<Self> {
        let payload = KEY_BYTES + value_bytes;
        let head = format!("MSG c 1 {payload}\r\n");
        let fixed = Fixed::new(b'M', head.len() + payload + 2, head.len() + payload - value_bytes);
        let words = Words {
            before: format!("PUB c {payload}\r\n").into_bytes(),
            between: Vec::new(),
            behind: b"\r\n",
        };
        let hello = b"CONNECT {\"verbose\":false,\"pedantic\":false}\r\n";
        let subscribe = [&hello[..], b"SUB c 1\r\nPING\r\n"].concat();
        let follow = Follow::Saying { words: subscribe, lines: 2 };
        let mut published = Self::new(peer, words, fixed, follow, 1, value_bytes)?;
        published.publisher.write_all(hello)?;
        Ok(published)
    }

    fn new(
        peer: Peer,
        words: Words,
        fixed: Fixed,
        follow: Follow,
        count: usize,
        value_bytes: usize,
    ) -> anyhow::Result<Self> {
        let publisher = TcpStream::connect(peer.address)?;
        publisher.set_nodelay(true)?;
        let mut random = fastrand::Rng::with_seed(SEED + 9);
        let values = (0..64).map(|_| random_bytes(&mut random, value_bytes).to_vec()).collect();
        let keys = keys(count);
        Ok(Self { peer, publisher, words, fixed, follow, keys, values, random })
    }

    /// Puts a message with the time in its value behind others.
    fn encode(&mut self, out: &mut Vec<u8>, now_ns: u64) -> anyhow::Result<()> {
        let key = self.random.choice(&self.keys).context("there are keys")?;
        let value = self.random.choice(&self.values).context("there are values")?;
        let Words { before, between, behind } = &self.words;
        for part in [before, &key[..], between, &now_ns.to_be_bytes()] {
            out.extend_from_slice(part);
        }
        out.extend_from_slice(value.get(8..).context("a value has 8 bytes")?);
        out.extend_from_slice(behind);
        Ok(())
    }
}

impl System for Published {
    fn process(&self) -> &Process {
        &self.peer.process
    }

    fn follow(&self) -> anyhow::Result<(TcpStream, Counting)> {
        let mut stream = TcpStream::connect(self.peer.address)?;
        stream.set_nodelay(true)?;
        match &self.follow {
            Follow::Saying { words, lines } => {
                stream.write_all(words)?;
                for _ in 0..*lines {
                    read_line(&stream)?;
                }
            }
            Follow::Replica => {
                let mut asking = Resp::connect(self.peer.address)?;
                let id = asking.replication("master_replid")?;
                let next = asking.replication("master_repl_offset")?.parse::<u64>()? + 1;
                writeln!(stream, "PSYNC {id} {next}\r")?;
                let answer = read_line(&stream)?;
                ensure!(answer.starts_with("+CONTINUE"), "Redis answered {answer}");
            }
        }
        Ok((stream, Counting::Fixed(self.fixed.clone())))
    }

    fn pace(&mut self, writes: u64, rate: u64) -> anyhow::Result<()> {
        let between = Duration::from_secs(1) / u32::try_from(rate)?;
        let mut next = Instant::now();
        let mut message = Vec::new();
        for _ in 0..writes {
            std::thread::sleep(next.saturating_duration_since(Instant::now()));
            next += between;
            message.clear();
            self.encode(&mut message, now_ns()?)?;
            self.publisher.write_all(&message)?;
        }
        Ok(())
    }

    fn saturate(
        &mut self,
        time: Duration,
        window: u64,
        _: &mpsc::Sender<u64>,
        delivered: mpsc::Receiver<u64>,
    ) -> anyhow::Result<u64> {
        let start = Instant::now();
        let (mut writes, mut known) = (0, 0);
        let batch = self.values.first().map_or(1, |value| batch(value.len()));
        let mut messages = Vec::new();
        while start.elapsed() < time {
            while writes + batch > known + window {
                known = delivered.recv_timeout(PATIENCE).context("nothing is delivered")?;
            }
            known = delivered.try_iter().last().unwrap_or(known);
            messages.clear();
            let now_ns = now_ns()?;
            for _ in 0..batch {
                self.encode(&mut messages, now_ns)?;
            }
            self.publisher.write_all(&messages)?;
            writes += batch;
        }
        Ok(writes)
    }
}

/// Some bare followers of a system.
pub(crate) fn followers(
    system: &dyn System,
    count: usize,
) -> anyhow::Result<Vec<(TcpStream, Counting)>> {
    (0..count).map(|_| system.follow()).collect()
}

/// Ends a measurement behind so many writes: one more makes every follower look up.
pub(crate) fn finish(
    system: &mut dyn System,
    readers: Readers,
    writes: u64,
) -> anyhow::Result<super::load::Seen> {
    readers.shared.end.store(writes + 1, std::sync::atomic::Ordering::Relaxed);
    system.pace(1, 1000)?;
    readers.join()
}

/// A line that has come, and not a byte more.
fn read_line(stream: &TcpStream) -> anyhow::Result<String> {
    let mut line = Vec::new();
    let mut reader = std::io::BufReader::with_capacity(1, stream);
    reader.read_until(b'\n', &mut line)?;
    ensure!(line.ends_with(b"\n"), "the connection was closed");
    Ok(String::from_utf8_lossy(&line).trim_end().to_owned())
}

pub(crate) fn now_ns() -> anyhow::Result<u64> {
    u64::try_from(process::now().as_nanos()).context("the year is past 2554")
}
