//! The one public error.

use tablecast_actors::{DiffError, WaitError, protocol};

/// What a call on a [`Server`](crate::Server) or a [`Client`](crate::Client) can fail with.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum Error {
    /// A change or batch is too large, or the server's store refused it. Nothing has changed.
    #[error(transparent)]
    Write(#[from] protocol::WriteError),
    /// The follower's own store refused, or a store could not be read.
    #[error(transparent)]
    Store(#[from] protocol::StoreError),
    /// A diff cannot begin.
    #[error(transparent)]
    Diff(#[from] DiffError),
    /// The address cannot be listened at, or a thread cannot be started.
    #[error(transparent)]
    Io(#[from] std::io::Error),
    /// A position was not reached.
    #[error(transparent)]
    Wait(#[from] WaitError),
    /// There is no randomness to draw an epoch from.
    #[error("no epoch can be drawn: {0}")]
    Random(getrandom::Error),
    /// The server or client has been stopped.
    #[error("stopped")]
    Stopped,
}

impl From<actix::MailboxError> for Error {
    fn from(_: actix::MailboxError) -> Self {
        Self::Stopped
    }
}
