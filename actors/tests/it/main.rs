//! The actors together in one process, without handles and sockets.

#![allow(missing_docs, clippy::unwrap_used, clippy::indexing_slicing, reason = "tests may panic")]

use std::time::Duration;

use tablecast_actors::protocol::{Key, MemoryStore, Value};

mod busy;
mod by_hand;
mod connection;
mod heartbeat;
mod history;
mod hostile;
mod limits;
mod metrics;
mod next_diff;
mod slow_line;
mod stop;
mod storm;
mod strangers;

/// Longer than this takes on a busy machine: only a hang is noticed by it.
const LONG: Duration = Duration::from_secs(120);

fn filled(keys: usize) -> MemoryStore {
    let entry = |number| (Key::from(format!("key-{number}")), Value::from("value"));
    (0..keys).map(entry).collect()
}
