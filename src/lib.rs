//! Tablecast keeps a key-value table on a server identical on any number of followers.
//!
//! Two things run on one connection at once: a live, ordered stream of writes, for latency, and a
//! Merkle-tree diff, for repair. Keys updated while a diff runs are left out of its result, so that a
//! repair never takes a key back. A follower that missed something never fetches what it has, and
//! after every diff both ends have compared their roots: it is known to be equal, not hoped.
//!
//! ```
//! use std::time::Duration;
//! use tablecast::access::tcp::TcpAccess;
//! use tablecast::{Client, ClientConfig, DiffOutcome, MemoryStore, Server, ServerConfig};
//!
//! # actix_rt::System::new().block_on(async {
//! let server = Server::start(ServerConfig::default(), MemoryStore::new())?;
//! server.write("key1", "filled").await?;
//! let address = server.listen("127.0.0.1:0")?;
//! server.ready().await?;
//!
//! let access = TcpAccess::new(address.to_string());
//! let client = Client::start(ClientConfig::default(), MemoryStore::new(), access)?;
//! client.write("key9", "the server has no such key").await?;
//! client.ready().await?;
//!
//! let written = server.write("key2", "streamed").await?.position().unwrap();
//! client.wait_for(written, Duration::from_secs(10)).await?;
//! assert_eq!(client.reader().len()?, 2);
//!
//! client.delete("key1").await?;
//! let DiffOutcome::Done(report) = client.diff().await? else { panic!("the diff was aborted") };
//! assert_eq!((report.written, report.deleted, report.equal()), (1, 0, true));
//!
//! client.stop().await;
//! server.stop().await;
//! # Ok::<(), tablecast::Error>(())
//! # }).unwrap();
//! ```
//!
//! The handles [`Server`] and [`Client`] are the way in. The actors behind them are in
//! [`tablecast_actors`], the protocol without any IO in [`tablecast_actors::protocol`].

#[cfg(feature = "cli")]
pub mod cli;
mod client;
mod error;
mod runtime;
mod server;

pub use client::Client;
pub use error::Error;
pub use server::Server;
pub use tablecast_actors::client::Event;
pub use tablecast_actors::protocol::client::{DiffPhase, Progress};
pub use tablecast_actors::protocol::{
    AbortReason, Chain, Change, Epoch, Hash, HeartbeatConfig, Key, Limits, MemoryStore, Position,
    Reader, Revision, Store, StoreError, Value, Way,
    server::{Served, SessionConfig},
};
pub use tablecast_actors::server::{Applied, Written};
pub use tablecast_actors::{
    AccessError, AllowAll, Applicant, Authorize, ClientConfig, ClientStatus, DiffAborted,
    DiffError, DiffOutcome, DiffReport, FollowerStatus, Health, MassDelete, ServedDiff,
    ServerConfig, ServerStatus, Token, TokenError, Verified, WaitError, access, metrics,
};
