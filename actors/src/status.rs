//! How things stand, as types that serialise: for a program, for JSON, for people.
//!
//! Durations are in seconds. Hashes, epochs and chains are hexadecimal in JSON.

use std::borrow::Cow;
use std::time::Duration;

use serde::{Deserialize, Serialize};
use tablecast_protocol::client::Progress;
use tablecast_protocol::server::Served;
use tablecast_protocol::{AbortReason, Hash, Position, Revision, Way};

use crate::error::DiffAborted;

/// How a server is.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct ServerStatus {
    /// Where the history stands; `None` before `ready`.
    pub position: Option<Position>,
    /// How many keys there are.
    pub keys: usize,
    /// How many followers are subscribed.
    pub followers: usize,
    /// Diffs that run.
    pub diffs_running: usize,
    /// Diffs that wait for a place.
    pub diffs_waiting: usize,
    /// Bytes of history kept for followers that lag.
    pub log_bytes: usize,
    /// The oldest change that is kept.
    pub log_tail: Revision,
    /// Writes that were refused, by a limit or by the store.
    pub refused: u64,
}

/// How a follower is, as its Middleman at the server sees it.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
pub struct FollowerStatus {
    /// Which connection.
    pub id: u64,
    /// What it calls itself.
    pub name: String,
    /// Where it is.
    pub address: String,
    /// The session's state: `Subscribing`, `CatchUp`, `Relay` or `Diff`, `Closed` at the end.
    pub state: Cow<'static, str>,
    /// What the diff under way is at: `Queued`, `Walk`, `Repair` or `Mark`.
    pub phase: Option<Cow<'static, str>>,
    /// How it was brought to where the server is when it connected, and why.
    pub way: Option<Way>,
    /// The last revision that was handed to its socket.
    pub sent: Revision,
    /// How many changes it lags behind the head.
    pub lag: u64,
    /// How long the oldest of them has waited.
    #[serde(with = "seconds")]
    pub lag_time: Duration,
    /// How often it fell behind.
    pub jumps: u32,
    /// How many diffs were done on this connection.
    pub diffs: u64,
    /// What became of the last one.
    pub last_diff: Option<ServedDiff>,
    /// The mark at which its root was compared last.
    pub verified: Option<Verified>,
    /// Bytes that were sent to it.
    pub bytes_sent: u64,
    /// Bytes that came from it.
    pub bytes_received: u64,
}

/// Roots that were compared.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Verified {
    /// At this mark.
    pub revision: Revision,
    /// Whether they were equal.
    pub equal: bool,
}

/// What became of a diff, as the server sees it.
#[derive(Clone, Copy, Debug, PartialEq, Serialize, Deserialize)]
pub struct ServedDiff {
    /// Why it ended early; `None` if it was done.
    pub aborted: Option<AbortReason>,
    /// What was found and sent.
    #[serde(flatten)]
    pub served: Served,
    /// How long it waited for a place.
    #[serde(with = "seconds")]
    pub waited: Duration,
    /// From the asking to the end, the waiting included.
    #[serde(with = "seconds")]
    pub elapsed: Duration,
}

/// How a follower is.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct ClientStatus {
    /// What it calls itself.
    pub name: String,
    /// Where its server is.
    pub server: String,
    /// The handshake is through.
    pub connected: bool,
    /// Why it is not: how the last connection ended, or how the last attempt failed. `None` if it is, or nothing
    /// has failed yet.
    pub disconnected: Option<String>,
    /// The session's state; `Disconnected` without one.
    pub state: Cow<'static, str>,
    /// Whether the table can be relied on.
    pub health: Health,
    /// How the last connection brought it to where the server is, and why.
    pub way: Option<Way>,
    /// Where the stream stands; `None` without a connection.
    pub stream: Option<Position>,
    /// Where the table stands; `None` while something may be missing, or since it was changed beside the server until the
    /// end of a diff.
    pub position: Option<Position>,
    /// How many keys there are.
    pub keys: usize,
    /// Live changes applied.
    pub applied: u64,
    /// Changes that the store refused.
    pub refused: u64,
    /// Keys that were found to have been changed behind the follower's back.
    pub corrupt: u64,
    /// How often the handshake was through.
    pub connects: u64,
    /// How often the follower fell behind.
    pub fell_behind: u64,
    /// The last mark of this history at which this table's root was that of the server.
    pub verified: Option<Revision>,
    /// How often it was not, where nothing was known to be missing.
    pub diverged: u64,
    /// How far the diff under way is.
    pub progress: Option<Progress>,
    /// How the last diff ended.
    pub last_diff: Option<DiffOutcome>,
    /// Bytes that were sent, on all connections.
    pub bytes_sent: u64,
    /// Bytes that came, on all connections.
    pub bytes_received: u64,
}

/// Whether a follower's table can be relied on.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub enum Health {
    /// There is no connection: the table is as old as the last one.
    Disconnected,
    /// Something may be missing: changes that were missed are on their way, or a diff is.
    Syncing,
    /// Nothing is known to be missing, what its user has changed in it aside.
    Ready,
    /// A diff was done, and the table differs still. It is asked for again, more and more slowly.
    Diverged {
        /// Why, as far as that is known.
        reason: String,
    },
    /// A repair is held, since it would delete too much ([`MassDelete`](crate::MassDelete)).
    Held {
        /// Keys that it would write.
        writes: u64,
        /// Keys that it would delete.
        deletes: u64,
        /// Keys that there were.
        keys: u64,
    },
}

/// How a diff ended.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub enum DiffOutcome {
    /// It was done, whatever it found.
    Done(DiffReport),
    /// It ended early.
    Aborted(DiffAborted),
}

/// What a diff did.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct DiffReport {
    /// Queries of the walk that waited for an answer; 1 if what came with the asking was enough.
    pub rounds: u32,
    /// Bytes to the server, frames and all, from `SyncReq` to `SyncDone`.
    pub bytes_sent: u64,
    /// Bytes from the server, live changes included, from `SyncReq` to `SyncDone`.
    pub bytes_received: u64,
    /// Keys written.
    pub written: u64,
    /// Keys deleted.
    pub deleted: u64,
    /// Keys that differed and were left out, because a live change brought them.
    pub suppressed: u64,
    /// Keys that could not be repaired: unreadable there, or refused by the store here.
    pub failed: u64,
    /// How long it waited for a place at the server.
    #[serde(with = "seconds")]
    pub waited: Duration,
    /// From the asking to the verdict.
    #[serde(with = "seconds")]
    pub elapsed: Duration,
    /// The mark at which the roots were compared.
    pub revision: Revision,
    /// This table's root there.
    pub root: Hash,
    /// The server's root there.
    pub server_root: Hash,
}

impl DiffReport {
    /// Whether both tables were equal at the mark.
    pub fn equal(&self) -> bool {
        self.root == self.server_root
    }
}

/// A duration as a number of seconds.
mod seconds {
    use std::time::Duration;

    use serde::de::Error;
    use serde::{Deserialize, Deserializer, Serializer};

    pub(super) fn serialize<S: Serializer>(
        duration: &Duration,
        serializer: S,
    ) -> Result<S::Ok, S::Error> {
        serializer.serialize_f64(duration.as_secs_f64())
    }

    pub(super) fn deserialize<'de, D: Deserializer<'de>>(
        deserializer: D,
    ) -> Result<Duration, D::Error> {
        let seconds = f64::deserialize(deserializer)?;
        Duration::try_from_secs_f64(seconds).map_err(D::Error::custom)
    }
}
