//! A follower of `soak`: a process that is killed again and again, with its table in a file at times.
//!
//! Orders are lines of JSON on stdin, and what happens is lines of JSON on stdout. The process ends with stdin.

use std::io;
use std::net::Shutdown;
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use anyhow::Context;
use futures_util::FutureExt;
use futures_util::future::BoxFuture;
use serde::{Deserialize, Serialize};
use tablecast::access::{Access, Stream};
use tablecast::{
    Change, Client, ClientConfig, DiffAborted, DiffOutcome, Event, MemoryStore, Position, Reader,
    Store, StoreError, Way,
};
use tokio::io::{AsyncBufReadExt, BufReader};
use tokio::net::TcpStream;
use tokio::sync::broadcast::error::RecvError;

use super::server::heartbeat;
use super::{Entries, entries, say, store};

/// How many events may wait to be printed.
const EVENTS: usize = 1 << 16;

/// How often it is tried to find the table and its position at one moment.
const TRIES: usize = 20;

#[derive(Debug, clap::Args)]
pub(crate) struct Args {
    /// Where the server is.
    #[arg(long)]
    address: String,
    /// What it calls itself.
    #[arg(long)]
    name: String,
    /// Where its table is kept.
    #[arg(long)]
    file: PathBuf,
}

#[derive(Debug, Serialize, Deserialize)]
pub(super) enum Order {
    /// Keep the table in the file, with its position.
    Save,
    /// End in an orderly way, and keep the table.
    Stop,
    /// The connection is lost.
    Cut,
    /// These keys are changed by the follower's user.
    Disturb(Vec<(String, Option<String>)>),
    /// These keys are changed behind the follower's back.
    Corrupt(Vec<(String, Option<String>)>),
    /// The store refuses whatever comes for so many milliseconds.
    Refuse(u64),
    /// Say the table.
    Table,
}

/// What happens.
#[derive(Debug, Serialize, Deserialize)]
pub(super) enum Told {
    Connected(Way),
    /// And why.
    Disconnected(String),
    FellBehind,
    Diverged,
    Held,
    Corrupt,
    Refused,
    Aborted(String),
    /// Keys that were repaired, and whether the roots were equal then.
    Diff(u64, bool),
    /// So many events were missed by who tells them.
    Untold(u64),
    Saved(bool),
    Table(Entries),
}

/// What is in the file.
#[derive(Debug, Serialize, Deserialize)]
struct Saved {
    table: Entries,
    position: Option<Position>,
}

/// A store in memory that refuses now and then.
struct Moody {
    store: MemoryStore,
    refuses: Arc<AtomicBool>,
}

impl Store for Moody {
    fn apply(&mut self, changes: &[Change]) -> Result<(), StoreError> {
        if self.refuses.load(Ordering::Relaxed) {
            return Err(StoreError::new(io::Error::other("not now")));
        }
        self.store.apply(changes)
    }

    fn reader(&self) -> Arc<dyn Reader> {
        self.store.reader()
    }
}

/// TCP, of which the connection at hand can be cut.
#[derive(Clone)]
struct Cuttable {
    address: String,
    socket: Arc<Mutex<Option<std::net::TcpStream>>>,
}

impl Cuttable {
    fn socket(&self) -> std::sync::MutexGuard<'_, Option<std::net::TcpStream>> {
        self.socket.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn cut(&self) {
        if let Some(socket) = self.socket().take() {
            // It has ended before if this fails.
            drop(socket.shutdown(Shutdown::Both));
        }
    }
}

impl Access for Cuttable {
    fn connect(&self) -> BoxFuture<'static, io::Result<Box<dyn Stream>>> {
        let this = self.clone();
        async move {
            let stream = TcpStream::connect(&this.address).await?;
            stream.set_nodelay(true)?;
            let stream = stream.into_std()?;
            *this.socket() = Some(stream.try_clone()?);
            Ok(Box::new(TcpStream::from_std(stream)?) as Box<dyn Stream>)
        }
        .boxed()
    }

    fn address(&self) -> String {
        self.address.clone()
    }
}

pub(crate) async fn run(args: &Args) -> anyhow::Result<()> {
    let saved = match std::fs::read(&args.file) {
        Ok(bytes) => serde_json::from_slice(&bytes)?,
        Err(_) => Saved { table: Entries::new(), position: None },
    };
    let inner = store(saved.table);
    let refuses = Arc::new(AtomicBool::new(false));
    let moody = Moody { store: inner.clone(), refuses: Arc::clone(&refuses) };
    let access = Cuttable { address: args.address.clone(), socket: Arc::default() };
    let config = ClientConfig {
        name: args.name.clone(),
        heartbeat: heartbeat(),
        connect_timeout: Duration::from_secs(2),
        backoff_min: Duration::from_millis(20),
        backoff_max: Duration::from_millis(500),
        event_capacity: EVENTS,
        ..ClientConfig::default()
    };
    let client = Client::start(config, moody, access.clone())?;
    let telling = tokio::spawn(tell(client.clone()));
    if let Some(position) = saved.position {
        client.continue_from(position).await?;
    }
    client.ready().await?;
    let mut follower = Follower { client, inner, refuses, access, file: args.file.clone() };
    let mut orders = BufReader::new(tokio::io::stdin()).lines();
    while let Some(line) = orders.next_line().await? {
        let order = serde_json::from_str(&line)?;
        anyhow::ensure!(!telling.is_finished(), "nobody hears what happens any more");
        if matches!(order, Order::Stop) {
            let Follower { client, inner, file, .. } = follower;
            let position = client.stop().await;
            return save(&file, &Saved { table: entries(&inner)?, position });
        }
        follower.obey(order).await?;
    }
    Ok(())
}

struct Follower {
    client: Client,
    /// The store, without its moods and behind the follower's back.
    inner: MemoryStore,
    refuses: Arc<AtomicBool>,
    access: Cuttable,
    file: PathBuf,
}

impl Follower {
    async fn obey(&mut self, order: Order) -> anyhow::Result<()> {
        match order {
            Order::Stop => {}
            Order::Save => {
                let saved = self.at_one_moment().await?;
                if let Some(saved) = &saved {
                    save(&self.file, saved)?;
                }
                say(&Told::Saved(saved.is_some()))?;
            }
            Order::Cut => self.access.cut(),
            Order::Disturb(changes) => {
                for (key, value) in changes {
                    // A store that refuses just now is not disturbed.
                    drop(match value {
                        Some(value) => self.client.write(key, value).await,
                        None => self.client.delete(key).await,
                    });
                }
            }
            Order::Corrupt(changes) => {
                let changes: Vec<_> = changes.into_iter().map(super::change).collect();
                self.inner.apply(&changes)?;
            }
            Order::Refuse(ms) => {
                self.refuses.store(true, Ordering::Relaxed);
                let refuses = Arc::clone(&self.refuses);
                tokio::spawn(async move {
                    tokio::time::sleep(Duration::from_millis(ms)).await;
                    refuses.store(false, Ordering::Relaxed);
                });
            }
            Order::Table => say(&Told::Table(entries(&self.inner)?))?,
        }
        Ok(())
    }

    /// The table, and where it stood before and behind the moment at which it was looked at.
    async fn at_one_moment(&self) -> anyhow::Result<Option<Saved>> {
        for _ in 0..TRIES {
            let before = self.client.status().await?.position;
            let snapshot = self.inner.snapshot();
            let position = self.client.status().await?.position;
            if position.is_some() && before == position {
                return Ok(Some(Saved { table: super::collect(snapshot)?, position }));
            }
        }
        Ok(None)
    }
}

/// Whole or not at all, whenever the process is killed.
fn save(file: &Path, saved: &Saved) -> anyhow::Result<()> {
    let new = file.with_extension("new");
    std::fs::write(&new, serde_json::to_vec(saved)?)?;
    std::fs::rename(&new, file).context("a table cannot be kept")
}

/// Says what happens, and lets repairs through that are held.
async fn tell(client: Client) -> anyhow::Result<()> {
    let mut events = client.events().await?;
    loop {
        let told = match events.recv().await {
            Ok(Event::Connected(_, way)) => Told::Connected(way),
            Ok(Event::Change { .. } | Event::Progress(_)) => continue,
            Ok(Event::Disconnected(why)) => Told::Disconnected(why),
            Ok(Event::FellBehind(_)) => Told::FellBehind,
            Ok(Event::Diverged { .. }) => Told::Diverged,
            Ok(Event::Held { .. }) => {
                // If the connection has gone meanwhile, it is held again.
                client.allow_mass_delete().await.ok();
                Told::Held
            }
            Ok(Event::Corrupt { .. }) => Told::Corrupt,
            Ok(Event::Refused(_)) => Told::Refused,
            // It is told above.
            Ok(Event::Diff(DiffOutcome::Aborted(DiffAborted::Held { .. }))) => continue,
            Ok(Event::Diff(DiffOutcome::Aborted(why))) => Told::Aborted(why.to_string()),
            Ok(Event::Diff(DiffOutcome::Done(report))) => {
                Told::Diff(report.written + report.deleted, report.equal())
            }
            Err(RecvError::Lagged(events)) => Told::Untold(events),
            Err(RecvError::Closed) => return Ok(()),
        };
        say(&told)?;
    }
}
