//! Tablecast's runtime: four kinds of actors around the machines of [`tablecast_protocol`].
//!
//! ```text
//!   user ── write, delete ──> Server ── chunks ──> log <── cursor ── server::Middleman ── socket
//!                               ^   \__ wake-up, answers ________________^   │  ^
//!                               └────── subscribe, snapshot, read, mark ─────┘  │ steps
//!                                                                             Differ
//!   socket ── client::Middleman ── messages ──> Client <── write, diff, wait_for ── user
//!                   ^______________ messages _____/
//! ```
//!
//! | actor | owns | lives on | ends |
//! |---|---|---|---|
//! | [`server::Server`] | table, readiness, places for diffs | an arbiter of its own | when told |
//! | [`server::middleman::Middleman`] | one connection and its session | one of a few arbiters | with its connection |
//! | [`server::differ::Differ`] | one walk | one of a few arbiters | with its diff |
//! | [`client::Client`] | the follower's table and session | any arbiter | when told |
//! | [`client::middleman::Middleman`] | one connection after the other | an arbiter of its own | with its Client |
//!
//! Who ends with whom: a Differ that fails ends its diff, not the connection. A Middleman that fails
//! ends its Differ and its connection, and the client connects again. Neither harms the Server or
//! another follower: a panic in an actor ends that actor, and what it owned tells the others as it
//! is dropped. The Client's table survives every failure of its connection. A Server that fails, by its
//! store most of all, ends every connection, and nobody listens any more.
//!
//! The log is the queue: the Server appends a batch once and wakes those who do not know yet; each
//! Middleman reads from its own place whenever its socket has room. Nothing is kept for a follower
//! but that place.

pub mod access;
mod authorize;
mod budget;
pub mod client;
mod compute;
mod config;
mod error;
pub mod metrics;
pub mod server;
mod status;

pub use authorize::{AllowAll, Applicant, Authorize, Token, TokenError};
pub use compute::compute_here;
pub use config::{ClientConfig, MassDelete, ServerConfig};
pub use error::{AccessError, DiffAborted, DiffError, WaitError};
pub use status::{
    ClientStatus, DiffOutcome, DiffReport, FollowerStatus, Health, ServedDiff, ServerStatus,
    Verified,
};
pub use tablecast_protocol as protocol;
