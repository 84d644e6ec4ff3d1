//! The server's side of `soak`: a process that is killed again and again, and keeps nothing itself.
//!
//! Orders are lines of JSON on stdin, answers lines of JSON on stdout; the first order is what it holds. The
//! process ends with stdin.

use std::time::Duration;

use anyhow::Context;
use serde::{Deserialize, Serialize};
use tablecast::{FollowerStatus, HeartbeatConfig, Position, Server, ServerConfig, SessionConfig};
use tokio::io::{AsyncBufReadExt, BufReader};

use super::{Entries, change, entries, store};

#[derive(Debug, clap::Args)]
pub(crate) struct Args {
    /// Where to listen.
    #[arg(long)]
    address: String,
}

#[derive(Debug, Serialize, Deserialize)]
pub(super) enum Order {
    /// The table, and where its history goes on; a new one begins if it is `None`. The first order, and not
    /// a later one.
    Begin(Entries, Option<Position>),
    /// One unit: keys and their new values, `None` for a delete.
    Write(Vec<(String, Option<String>)>),
    Table,
    Followers,
}

#[derive(Debug, Serialize, Deserialize)]
pub(super) enum Answer {
    /// It listens at this address; the history stands there.
    Begun(String, Position),
    Wrote(Position),
    Table(Entries),
    Followers(Vec<FollowerStatus>),
}

/// Impatient, so that a short soak reaches every bound, and with so little history that followers fall behind.
fn config() -> ServerConfig {
    ServerConfig {
        session: SessionConfig {
            heartbeat: heartbeat(),
            diff_stall: Duration::from_secs(5),
            ..SessionConfig::default()
        },
        log_bytes: 256 << 10,
        diffs_at_once: 2,
        verify_every: Some(Duration::from_millis(500)),
        handshake_timeout: Duration::from_secs(3),
        stall_timeout: Duration::from_secs(3),
        ..ServerConfig::default()
    }
}

pub(super) fn heartbeat() -> HeartbeatConfig {
    HeartbeatConfig { ping_after: Duration::from_secs(1), dead_after: Duration::from_secs(3) }
}

pub(crate) async fn run(args: &Args) -> anyhow::Result<()> {
    let mut orders = BufReader::new(tokio::io::stdin()).lines();
    let first = orders.next_line().await?.context("there is no order")?;
    let Order::Begin(table, position) = serde_json::from_str(&first)? else {
        anyhow::bail!("the first order is not to begin");
    };
    let server = Server::start(config(), store(table))?;
    let address = server.listen(&*args.address)?;
    let position = match position {
        Some(position) => server.continue_from(position).await?,
        None => server.ready().await?,
    };
    super::say(&Answer::Begun(address.to_string(), position))?;
    while let Some(line) = orders.next_line().await? {
        super::say(&match serde_json::from_str(&line)? {
            Order::Begin(..) => anyhow::bail!("it has begun"),
            Order::Write(changes) => {
                let written = server.batch(changes.into_iter().map(change).collect()).await?;
                Answer::Wrote(written.position().context("it is ready")?)
            }
            Order::Table => Answer::Table(entries(&**server.reader())?),
            Order::Followers => Answer::Followers(server.followers().await?),
        })?;
    }
    Ok(())
}
