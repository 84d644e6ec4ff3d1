//! The actors together in one process, without handles and sockets.

#![allow(missing_docs, clippy::unwrap_used, clippy::indexing_slicing, reason = "tests may panic")]

mod busy;
mod connection;
mod stop;
mod storm;
mod strangers;
