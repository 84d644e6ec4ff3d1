//! Connections of somebody who means harm, or does not know better: in a process of its own.

use std::cell::RefCell;
use std::collections::BTreeMap;
use std::net::SocketAddr;
use std::path::PathBuf;
use std::rc::Rc;
use std::time::Duration;

use serde::Serialize;
use tablecast_actors::access::Access as _;
use tablecast_actors::access::tcp::TcpAccess;
use tablecast_actors::access::tls::{TlsAccess, client_config};
use tablecast_protocol::diff::answer;
use tablecast_protocol::wire::{self, HEADER_BYTES, Raw};
use tablecast_protocol::{DiffId, Limits, ToClient, ToServer, Tree};
use tokio::io::{AsyncReadExt, AsyncWriteExt, BufReader};
use tokio::net::TcpStream;
use tokio::task::LocalSet;

/// How long before somebody who was closed is back.
const PAUSE: Duration = Duration::from_millis(5);

const READ_BYTES: usize = 64 << 10;

#[derive(Debug, clap::Args)]
pub(crate) struct Args {
    /// Whom to bother.
    #[arg(long)]
    address: SocketAddr,
    /// The same server over TLS.
    #[arg(long)]
    tls: SocketAddr,
    /// Its certificate, a file.
    #[arg(long)]
    ca: PathBuf,
    /// How many connections there are at once, of all kinds together.
    #[arg(long)]
    connections: usize,
    /// Only this kind.
    #[arg(long)]
    kind: Option<Kind>,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Serialize, clap::ValueEnum)]
pub(crate) enum Kind {
    /// Random bytes.
    Garbage,
    /// Hello, and a frame of random bytes.
    GarbageAfterHello,
    /// A frame that declares four gigabytes.
    HugeLength,
    /// Half of a Hello, and no more.
    HalfHello,
    /// Nothing.
    Silent,
    /// Hello and half of a frame; reads nothing.
    NotReading,
    /// Has itself repaired of everything, over and over.
    Diffs,
    /// Connects, and is gone.
    Storm,
    /// Connects over TLS, and is gone.
    Handshakes,
}

impl Kind {
    const ALL: [Self; 9] = [
        Self::Garbage,
        Self::GarbageAfterHello,
        Self::HugeLength,
        Self::HalfHello,
        Self::Silent,
        Self::NotReading,
        Self::Diffs,
        Self::Storm,
        Self::Handshakes,
    ];
}

/// What was done, by kind.
type Counts = Rc<RefCell<BTreeMap<Kind, u64>>>;

/// Goes on until the end of stdin, and prints how much was done then.
pub(crate) async fn run(args: &Args) -> anyhow::Result<()> {
    let counts = Counts::default();
    let here = LocalSet::new();
    let kinds = args.kind.as_ref().map_or(&Kind::ALL[..], std::slice::from_ref);
    let config = client_config(&std::fs::read(&args.ca)?, None)?;
    let tls = TcpAccess::new(args.tls.to_string());
    let tls = Rc::new(TlsAccess::new(tls, &args.tls.ip().to_string(), config)?);
    for kind in kinds.iter().cycle().take(args.connections) {
        here.spawn_local(bother(*kind, args.address, Rc::clone(&tls), Rc::clone(&counts)));
    }
    let mut all = Vec::new();
    here.run_until(tokio::io::stdin().read_to_end(&mut all)).await?;
    println!("{}", serde_json::to_string(&*counts.borrow())?);
    Ok(())
}

/// One connection after the other.
async fn bother(kind: Kind, address: SocketAddr, tls: Rc<TlsAccess<TcpAccess>>, counts: Counts) {
    let count = || *counts.borrow_mut().entry(kind).or_default() += 1;
    loop {
        if kind == Kind::Handshakes {
            if tls.connect().await.is_ok() {
                count();
            }
        } else if let Ok(stream) = TcpStream::connect(address).await {
            // Of those, every diff that is asked for is counted.
            if kind != Kind::Diffs {
                count();
            }
            // It ends one way or the other.
            drop(act(kind, stream, count).await);
        }
        tokio::time::sleep(PAUSE).await;
    }
}

async fn act(kind: Kind, mut stream: TcpStream, count: impl FnMut()) -> anyhow::Result<()> {
    let hello = wire::encode(&ToServer::hello("hostile", &Limits::default(), None));
    let half = hello.get(..hello.len() / 2).unwrap_or_default();
    match kind {
        Kind::Garbage => stream.write_all(&garbage()).await?,
        Kind::GarbageAfterHello => {
            stream.write_all(&hello).await?;
            stream.write_all(&[0, 0, 1, 0]).await?;
            stream.write_all(&garbage()).await?;
        }
        Kind::HugeLength => stream.write_all(&[0xff; HEADER_BYTES + 1]).await?,
        Kind::HalfHello => stream.write_all(half).await?,
        Kind::Silent => {}
        Kind::NotReading => {
            stream.write_all(&hello).await?;
            stream.write_all(half).await?;
            std::future::pending::<()>().await;
        }
        Kind::Diffs => return diffs(stream, &hello, count).await,
        Kind::Storm => {
            // Its port is free at once.
            stream.set_zero_linger()?;
            return Ok(());
        }
        Kind::Handshakes => return Ok(()),
    }
    let mut buffer = vec![0; 1024];
    while stream.read(&mut buffer).await? > 0 {}
    Ok(())
}

fn garbage() -> [u8; 256] {
    let mut bytes = [0; 256];
    fastrand::fill(&mut bytes);
    bytes
}

/// An empty follower that stays empty, whatever comes.
async fn diffs(stream: TcpStream, hello: &[u8], mut count: impl FnMut()) -> anyhow::Result<()> {
    let (limits, tree) = (Limits::default(), Tree::new());
    let mut stream = BufReader::with_capacity(READ_BYTES, stream);
    stream.write_all(hello).await?;
    let (mut number, mut jumps) = (0, 0);
    let mut ask = |jumps| {
        number += 1;
        count();
        let (diff, root) = (DiffId(number), tree.root());
        let all = u64::MAX;
        ToServer::SyncReq { diff, jumps, full: true, root, len: 0, max_deletes: all }
    };
    let mut frame = Vec::new();
    loop {
        let length = usize::try_from(stream.read_u32().await?)?;
        frame.resize(length.min(limits.frame_bytes), 0);
        stream.read_exact(&mut frame).await?;
        if frame.get(1) == Some(&ToClient::LIVE) {
            continue;
        }
        let reply = match wire::decode(&frame, &limits)? {
            ToClient::Welcome { .. } => ask(jumps),
            ToClient::FellBehind { jumps: now, .. } => {
                jumps = now;
                continue;
            }
            ToClient::SyncRequest { diff, query } => {
                let answer = Raw(answer(&tree, &query, limits.answer_bytes)?);
                ToServer::SyncResponse { diff, answer }
            }
            ToClient::Repair { diff, .. } => ToServer::RepairAck { diff, failed: 0, micros: 0 },
            ToClient::SyncDone { .. } | ToClient::SyncAbort { .. } => ask(jumps),
            ToClient::Ping {} => ToServer::Pong {},
            ToClient::Farewell { .. } | ToClient::Refuse { .. } => return Ok(()),
            ToClient::Live { .. }
            | ToClient::SyncStart { .. }
            | ToClient::SyncSeq { .. }
            | ToClient::Verify { .. }
            | ToClient::Mark { .. }
            | ToClient::CatchUp { .. }
            | ToClient::CaughtUp { .. }
            | ToClient::Pong {} => continue,
        };
        stream.write_all(&wire::encode(&reply)).await?;
    }
}
