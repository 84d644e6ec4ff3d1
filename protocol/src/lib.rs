//! The pure core of Tablecast: it knows no socket, clock, thread, executor or actor.
//!
//! # One diff, from the first frame to the last
//!
//! ```text
//! follower                                             server
//!   session: snapshot, root
//!   SyncReq { diff, root, len }             ------>    session: a place to run, then
//!                                           <------    SyncStart; record keys, snapshot, Walk
//!                                           <------    SyncRequest { nodes of one level }
//!   answer (a pure function of the snapshot)
//!   SyncResponse { hashes, entries }        ------>    Walk: compare, next level ...
//!                                           <------    SyncSeq { writes, deletes }
//!                                           <------    Repair { keys and values }
//!   apply
//!   RepairAck                               ------>    ... until all are sent
//!                                           <------    SyncDone { revision }, a mark
//!   snapshot at the mark, root                         snapshot at the mark, root
//!                                           <------    Verify { revision, root }
//!   equal: Verified                         ------>
//! ```
//!
//! All the time `Live` frames go from the server to the follower, in the order of their revisions.
//!
//! # Map
//!
//! | module | what is there |
//! |---|---|
//! | [`Change`], [`Position`] | keys, values, changes; revision, epoch, chain |
//! | [`tree`] | the Merkle trie over a table |
//! | [`diff`] | query and answer; [`diff::Walk`] asks, [`diff::answer`] replies |
//! | [`server`], [`client`] | the sessions: the two ends of one connection |
//! | [`Table`], [`Replica`] | the two ends of the system: the server's table and the follower's |
//! | [`Log`] | the queue of live changes, one for all followers |
//! | [`Store`] | where values live |
//! | [`ToServer`], [`ToClient`], [`wire`] | what crosses the wire, and as which bytes |
//! | [`Limits`] | how large things may be |

mod change;
pub mod client;
pub mod diff;
mod error;
mod heartbeat;
mod limits;
mod log;
mod message;
mod mutation;
mod position;
mod replica;
pub mod server;
mod store;
mod table;
pub mod tree;
pub mod wire;

pub use change::{Change, Key, Value};
pub use error::{DecodeError, ProtocolError};
pub use heartbeat::HeartbeatConfig;
pub use limits::{LimitError, Limits, MAX_CHANGES, SMALL_FRAME_BYTES};
pub use log::{Checkpoint, Chunk, FollowerId, Log, Missed, Next, Shortened};
pub use message::{AbortReason, DiffId, NAME_BYTES, Reason, ToClient, ToServer, Way};
#[cfg(feature = "mutations")]
pub use mutation::Mutation;
pub use position::{Chain, ChainTag, Digest, Epoch, Position, Revision};
pub use replica::{Correction, Replica, scrub};
pub use store::{MemoryStore, Reader, Store, StoreError};
pub use table::{Table, Values, WriteError};
pub use tree::{Entry, Hash, KeyHash, KeyPrefix, Tree};
