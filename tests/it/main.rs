//! The whole system, through its public face.

#![allow(
    clippy::unwrap_used,
    clippy::indexing_slicing,
    clippy::cast_possible_truncation,
    clippy::wildcard_enum_match_arm,
    clippy::let_underscore_must_use,
    clippy::too_many_lines,
    unreachable_pub,
    missing_docs,
    reason = "a test fails by panicking, and its numbers are small"
)]

#[cfg(feature = "tls")]
mod authorize;
#[cfg(feature = "cli")]
mod cli;
mod diff;
mod faults;
mod harness;
mod honesty;
mod limits;
mod model;
mod panics;
mod reconnect;
mod stream;
mod tidy;
