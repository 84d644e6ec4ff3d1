//! What can be wrong with what a peer sent.

use crate::limits::LimitError;

/// Bytes that are no message of this protocol. Ends the connection that they came from.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[non_exhaustive]
pub enum DecodeError {
    /// The peer speaks another version.
    #[error("peer speaks version {theirs}, this end speaks version {ours}")]
    Version {
        /// The peer's.
        theirs: u16,
        /// Ours.
        ours: u16,
    },
    /// Not MessagePack, or not a message: unknown tag, wrong count or kind of fields.
    #[error("malformed message of {bytes} bytes: {why}")]
    Malformed {
        /// The length of the frame.
        bytes: usize,
        /// What the decoder said.
        why: String,
    },
    /// A whole message, and more behind it.
    #[error("{bytes} bytes of frame hold more than one message")]
    Trailing {
        /// The length of the frame.
        bytes: usize,
    },
    /// Something in it is too large.
    #[error(transparent)]
    Limit(#[from] LimitError),
}

/// A message that must not come now, or that says what cannot be. Ends the connection.
#[derive(Debug, Clone, PartialEq, Eq, Hash, thiserror::Error)]
#[non_exhaustive]
pub enum ProtocolError {
    /// Not legal in this state.
    #[error("{got} must not come in state {state}")]
    Unexpected {
        /// The state's name.
        state: &'static str,
        /// The message's name.
        got: &'static str,
    },
    /// An answer of the walk that no honest follower gives.
    #[error("malformed answer: {why}")]
    Answer {
        /// What is wrong with it.
        why: &'static str,
    },
    /// A repair that no honest server sends.
    #[error("malformed repair: {why}")]
    Repair {
        /// What is wrong with it.
        why: &'static str,
    },
    /// A query of the walk that no honest server asks.
    #[error("malformed query: {why}")]
    Query {
        /// What is wrong with it.
        why: &'static str,
    },
    /// A live frame that does not follow the one before it.
    #[error("live changes from revision {got} came where {expected} was next")]
    Gap {
        /// The next revision of the stream.
        expected: u64,
        /// The frame's first.
        got: u64,
    },
    /// A live frame, or the end of a diff, of another history than the one that was sent.
    #[error("the chain at revision {revision} is not that of the stream so far")]
    Chain {
        /// Where the stream stands.
        revision: u64,
    },
    /// A revision that only a server that miscounts can name.
    #[error("{got} names revision {revision}, the stream stands at {stands}")]
    Revision {
        /// The message's name.
        got: &'static str,
        /// The revision that it names.
        revision: u64,
        /// Where the stream stands.
        stands: u64,
    },
}
