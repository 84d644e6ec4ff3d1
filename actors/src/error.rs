//! What ends a connection, and what a call on an actor can fail with.

use serde::{Deserialize, Serialize};
use tablecast_protocol::server::Close;
use tablecast_protocol::{AbortReason, DecodeError, Reason};

/// The world failed: what ends a connection beside the peers' own words.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum AccessError {
    /// The transport.
    #[error("connection: {0}")]
    Io(#[from] std::io::Error),
    /// A frame that is longer than this end accepts now.
    #[error("frame of {bytes} bytes is above the limit of {limit}{}", tls_hint(*bytes))]
    FrameTooLong {
        /// What its header says.
        bytes: u32,
        /// The limit: 4 KiB before the handshake is through.
        limit: usize,
    },
    /// The peer closed in the middle of a frame.
    #[error("peer closed within a frame, {bytes} bytes of it came")]
    CutOff {
        /// How much of it there was.
        bytes: usize,
    },
    /// The peer closed without a word.
    #[error("peer closed")]
    Closed,
    /// No connection, or no handshake, in time.
    #[error("no {what} within {seconds} s")]
    Timeout {
        /// What was waited for.
        what: &'static str,
        /// How long.
        seconds: f32,
    },
    /// A follower that does not read, where there are many.
    #[error("{bytes} bytes wait for followers although the log has gone on, of {limit} for all")]
    Held {
        /// For all followers.
        bytes: usize,
        /// The limit: as much as the log has.
        limit: usize,
    },
    /// Bytes that are no message.
    #[error(transparent)]
    Decode(#[from] DecodeError),
    /// One of the ends said so.
    #[error(transparent)]
    Close(#[from] Close),
}

impl AccessError {
    /// In a word, for metrics.
    pub(crate) fn name(&self) -> String {
        match self {
            Self::Io(_) => "Network".to_owned(),
            Self::FrameTooLong { .. } | Self::Decode(_) => format!("{:?}", Reason::Protocol),
            Self::CutOff { .. } | Self::Closed => "Gone".to_owned(),
            Self::Timeout { .. } => "Stalled".to_owned(),
            Self::Held { .. } => "Held".to_owned(),
            Self::Close(Close::Peer { .. }) => "Farewell".to_owned(),
            Self::Close(Close::Here { reason, .. }) => format!("{reason:?}"),
        }
    }
}

/// Why a diff could not even begin.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
#[non_exhaustive]
pub enum DiffError {
    /// One is under way; its report comes as an event.
    #[error("a diff is under way already")]
    AlreadyDiffing,
    /// There is no connection.
    #[error("not connected")]
    Disconnected,
    /// The client has ended.
    #[error("the client has stopped")]
    Stopped,
}

/// Why a position was not reached.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
#[non_exhaustive]
pub enum WaitError {
    /// It took too long.
    #[error("not within {0:?}")]
    Timeout(std::time::Duration),
    /// The server has begun another history, or is another one: the revision will not come.
    #[error("the follower has gone over to history {0}")]
    NewEpoch(tablecast_protocol::Epoch),
    /// The server has an older table of the same history than the follower had, or another one: the revision may never come, or
    /// be another change's.
    #[error("history {0} goes on otherwise at the server")]
    Forked(tablecast_protocol::Epoch),
    /// The client has ended.
    #[error("the client has stopped")]
    Stopped,
}

/// Why a diff ended without a report.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error, Serialize, Deserialize)]
#[non_exhaustive]
pub enum DiffAborted {
    /// The server says so.
    #[error("the server ended the diff: {0}")]
    Server(AbortReason),
    /// It would delete more keys than [`MassDelete`](crate::MassDelete) allows, and changed nothing.
    #[error("held: it would delete {deletes} of {keys} keys")]
    Held {
        /// Keys that it would delete.
        deletes: u64,
        /// Keys that there are.
        keys: u64,
    },
    /// The connection ended.
    #[error("the connection ended")]
    Disconnected,
}

impl From<tablecast_protocol::client::NotNow> for DiffError {
    fn from(error: tablecast_protocol::client::NotNow) -> Self {
        use tablecast_protocol::client::NotNow;
        match error {
            // Whoever asks while what was missed comes waits: see `Client`.
            NotNow::AlreadyDiffing | NotNow::CatchingUp => Self::AlreadyDiffing,
            NotNow::Disconnected => Self::Disconnected,
        }
    }
}

/// The first bytes of a TLS record, an alert or a handshake, read as a length.
fn tls_hint(bytes: u32) -> &'static str {
    match bytes >> 16 {
        0x1503 | 0x1603 => ": the other end speaks TLS",
        _ => "",
    }
}
