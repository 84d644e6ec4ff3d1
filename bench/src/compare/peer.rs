//! Processes that are measured: Tablecast's own server, a plain fan-out, Redis and NATS. Each is
//! killed when it is dropped.

use std::fs;
use std::io::{BufRead, BufReader, Read, Write};
use std::net::{SocketAddr, TcpListener, TcpStream};
use std::path::{Path, PathBuf};
use std::process::{Child, ChildStdin, ChildStdout, Command, Stdio};
use std::time::{Duration, Instant};

use anyhow::{Context, bail};
use rustix::thread::{CpuSet, sched_getaffinity, sched_setaffinity};
use serde::Deserialize;
use serde_json::Value;
use tempfile::TempDir;

use crate::stream::server::{Order, Wrote};

/// How long a peer may take to start.
const PATIENCE: Duration = Duration::from_secs(20);

/// Nothing is kept on disk, nobody is cut off for reading slowly, and a first synchronisation does not
/// wait for others to join it. What is not named has its default.
pub(crate) const REDIS_CONF: &str = r#"bind 127.0.0.1
protected-mode no
save ""
appendonly no
maxclients 20000
tcp-keepalive 0
client-output-buffer-limit normal 0 0 0
client-output-buffer-limit replica 0 0 0
client-output-buffer-limit pubsub 0 0 0
repl-diskless-sync yes
repl-diskless-sync-delay 0
repl-diskless-load on-empty-db
repl-backlog-size 512mb
repl-backlog-ttl 0
repl-timeout 3600
repl-ping-replica-period 3600
loglevel warning
"#;

pub(crate) const NATS_CONF: &str = r#"host: 127.0.0.1
max_connections: 20000
max_pending: 2000000000
max_payload: 8388608
write_deadline: "1h"
ping_interval: "1h"
"#;

/// Which processors the measured servers and the load run on.
#[derive(Clone, Debug, Default)]
pub(crate) struct Cores {
    /// The servers' and the load's; `None` if there is one for all.
    split: Option<(CpuSet, CpuSet)>,
}

impl Cores {
    /// The first for servers, the others for this thread and those that it starts.
    pub(crate) fn split() -> anyhow::Result<Self> {
        let mut load = sched_getaffinity(None)?;
        let mut server = CpuSet::new();
        if let Some(first) = (0..CpuSet::MAX_CPU).find(|core| load.is_set(*core)) {
            server.set(first);
            load.unset(first);
        }
        if load.count() == 0 {
            return Ok(Self::default());
        }
        sched_setaffinity(None, &load)?;
        Ok(Self { split: Some((server, load)) })
    }

    pub(crate) fn tell(&self) -> &'static str {
        match self.split {
            Some(_) => "servers on the first, load and followers on the others",
            None => "one for servers and load",
        }
    }

    /// A child inherits where the thread may run that starts it.
    fn spawn_server(&self, command: &mut Command) -> anyhow::Result<Process> {
        let Some((server, load)) = &self.split else { return Ok(Process(command.spawn()?)) };
        sched_setaffinity(None, server)?;
        let child = command.spawn();
        sched_setaffinity(None, load)?;
        Ok(Process(child?))
    }
}

/// A child that does not outlive this.
pub(crate) struct Process(Child);

impl Process {
    pub(crate) fn pid(&self) -> String {
        self.0.id().to_string()
    }
}

impl Drop for Process {
    fn drop(&mut self) {
        // It has ended before if this fails; what it leaves is taken away below.
        drop(self.0.kill());
        drop(self.0.wait());
    }
}

/// A server of this program in a process of its own, which writes what it is ordered to.
pub(crate) struct Ordered {
    pub(crate) process: Process,
    orders: ChildStdin,
    replies: BufReader<ChildStdout>,
    pub(crate) address: SocketAddr,
}

impl Ordered {
    pub(crate) fn start(cores: &Cores, question: &str, args: &[String]) -> anyhow::Result<Self> {
        let mut command = Command::new(std::env::current_exe()?);
        command.arg(question).args(args).stdin(Stdio::piped()).stdout(Stdio::piped());
        let mut process = cores.spawn_server(&mut command)?;
        let orders = process.0.stdin.take().context("stdin is a pipe")?;
        let mut replies = BufReader::new(process.0.stdout.take().context("stdout is a pipe")?);
        let mut address = String::new();
        replies.read_line(&mut address)?;
        let address = address.trim().parse().context("the server ended")?;
        Ok(Self { process, orders, replies, address })
    }

    pub(crate) fn order(&mut self, order: &Order) -> anyhow::Result<()> {
        Ok(writeln!(self.orders, "{}", serde_json::to_string(order)?)?)
    }

    pub(crate) fn wrote(&mut self) -> anyhow::Result<Wrote> {
        Ok(Wrote::deserialize(reply(&mut self.replies)?)?)
    }

    /// What is told while an order is carried out, and where its answer comes.
    pub(crate) fn halves(&mut self) -> (&mut ChildStdin, &mut BufReader<ChildStdout>) {
        (&mut self.orders, &mut self.replies)
    }
}

/// A line of a server's answers.
pub(crate) fn reply(replies: &mut impl BufRead) -> anyhow::Result<Value> {
    let mut line = String::new();
    anyhow::ensure!(replies.read_line(&mut line)? > 0, "the server ended");
    Ok(serde_json::from_str(&line)?)
}

/// A server of somebody else.
pub(crate) struct Peer {
    pub(crate) process: Process,
    pub(crate) address: SocketAddr,
    /// Its files.
    _folder: TempDir,
}

/// Where a program is, if it is in PATH.
pub(crate) fn find(program: &str) -> Option<PathBuf> {
    let path = std::env::var_os("PATH")?;
    let mut folders: Vec<_> = std::env::split_paths(&path).collect();
    // Where Debian puts servers; not every PATH has it.
    folders.push("/usr/sbin".into());
    folders.into_iter().map(|folder| folder.join(program)).find(|path| path.is_file())
}

impl Peer {
    fn start(
        cores: &Cores,
        program: &Path,
        args: &[&str],
        conf: impl Fn(u16) -> String,
    ) -> anyhow::Result<Self> {
        let folder = tempfile::tempdir()?;
        // Free a moment ago; nobody else is likely to take it.
        let address = TcpListener::bind("127.0.0.1:0")?.local_addr()?;
        let file = folder.path().join("conf");
        fs::write(&file, conf(address.port()))?;
        let mut command = Command::new(program);
        command.args(args).arg(&file).current_dir(&folder);
        command.stdin(Stdio::null()).stdout(Stdio::null()).stderr(Stdio::null());
        let mut process = cores.spawn_server(&mut command)?;
        let start = Instant::now();
        while TcpStream::connect(address).is_err() {
            if let Some(status) = process.0.try_wait()? {
                bail!("{command:?} ended with {status}");
            }
            anyhow::ensure!(start.elapsed() < PATIENCE, "{command:?} does not listen");
            std::thread::sleep(Duration::from_millis(5));
        }
        Ok(Self { process, address, _folder: folder })
    }
}

/// What may be started for a comparison.
#[derive(Clone, Debug, Default)]
pub(crate) struct Found {
    pub(crate) cores: Cores,
    pub(crate) redis: Option<PathBuf>,
    pub(crate) nats: Option<PathBuf>,
}

impl Found {
    pub(crate) fn look() -> anyhow::Result<Self> {
        let (redis, nats) = (find("redis-server"), find("nats-server"));
        Ok(Self { cores: Cores::split()?, redis, nats })
    }

    /// Redis on the servers' processor.
    pub(crate) fn redis(&self) -> anyhow::Result<Option<Peer>> {
        self.redis_on(&self.cores)
    }

    /// Redis where the followers are.
    pub(crate) fn redis_replica(&self) -> anyhow::Result<Option<Peer>> {
        self.redis_on(&Cores::default())
    }

    fn redis_on(&self, cores: &Cores) -> anyhow::Result<Option<Peer>> {
        let Some(path) = &self.redis else { return Ok(None) };
        let conf = |port| format!("{REDIS_CONF}port {port}\n");
        Peer::start(cores, path, &[], conf).map(Some)
    }

    pub(crate) fn nats(&self) -> anyhow::Result<Option<Peer>> {
        let Some(path) = &self.nats else { return Ok(None) };
        let conf = |port| format!("{NATS_CONF}port: {port}\n");
        Peer::start(&self.cores, path, &["-c"], conf).map(Some)
    }
}

/// A connection that speaks RESP, one command at a time.
pub(crate) struct Resp(BufReader<TcpStream>);

impl Resp {
    pub(crate) fn connect(address: SocketAddr) -> anyhow::Result<Self> {
        let stream = TcpStream::connect(address)?;
        stream.set_nodelay(true)?;
        Ok(Self(BufReader::new(stream)))
    }

    pub(crate) fn call(&mut self, words: &[&[u8]]) -> anyhow::Result<Vec<u8>> {
        self.send(&command(words))?;
        self.reply()
    }

    /// The answer to words of a command.
    pub(crate) fn ask(&mut self, words: &str) -> anyhow::Result<String> {
        let words: Vec<_> = words.split(' ').map(str::as_bytes).collect();
        Ok(String::from_utf8(self.call(&words)?)?)
    }

    pub(crate) fn send(&mut self, bytes: &[u8]) -> anyhow::Result<()> {
        Ok(self.0.get_mut().write_all(bytes)?)
    }

    /// A status, number or string; nothing that is nested.
    pub(crate) fn reply(&mut self) -> anyhow::Result<Vec<u8>> {
        let mut line = String::new();
        anyhow::ensure!(self.0.read_line(&mut line)? > 0, "Redis closed the connection");
        let (kind, rest) = line.trim_end().split_at_checked(1).context("an empty reply")?;
        match kind {
            "+" | ":" => Ok(rest.as_bytes().to_vec()),
            "$" => {
                let length: i64 = rest.parse()?;
                let mut bytes = vec![0; usize::try_from(length.max(-2) + 2)?];
                self.0.read_exact(if length < 0 { &mut [] } else { &mut bytes })?;
                bytes.truncate(bytes.len() - 2);
                Ok(bytes)
            }
            _ => bail!("Redis answered {line:?}"),
        }
    }

    /// A field of `INFO replication`.
    pub(crate) fn replication(&mut self, field: &str) -> anyhow::Result<String> {
        let info = self.ask("INFO replication")?;
        let value = info.lines().find_map(|line| line.strip_prefix(field)?.strip_prefix(':'));
        Ok(value.with_context(|| format!("no {field} in {info}"))?.to_owned())
    }

    /// Sets these keys, many at a time.
    pub(crate) fn fill<'a>(
        &mut self,
        entries: impl Iterator<Item = (&'a [u8], &'a [u8])>,
    ) -> anyhow::Result<()> {
        let mut bytes = Vec::new();
        let mut sent = 0;
        for (key, value) in entries {
            bytes.extend(command(&[b"SET", key, value]));
            sent += 1;
            if sent == 1000 {
                self.filled(&mut bytes, &mut sent)?;
            }
        }
        self.filled(&mut bytes, &mut sent)
    }

    fn filled(&mut self, bytes: &mut Vec<u8>, sent: &mut u32) -> anyhow::Result<()> {
        self.send(bytes)?;
        for _ in 0..std::mem::take(sent) {
            self.reply()?;
        }
        bytes.clear();
        Ok(())
    }
}

/// A command as RESP.
pub(crate) fn command(words: &[&[u8]]) -> Vec<u8> {
    let mut bytes = format!("*{}\r\n", words.len()).into_bytes();
    for word in words {
        bytes.extend_from_slice(format!("${}\r\n", word.len()).as_bytes());
        bytes.extend_from_slice(word);
        bytes.extend_from_slice(b"\r\n");
    }
    bytes
}
