//! The protocol crate's tests: what crosses its modules.

#![allow(
    clippy::unwrap_used,
    clippy::indexing_slicing,
    clippy::cast_possible_truncation,
    clippy::wildcard_enum_match_arm,
    clippy::let_underscore_must_use,
    clippy::too_many_lines,
    clippy::wrong_self_convention,
    clippy::disallowed_methods,
    unreachable_pub,
    missing_docs,
    reason = "a test fails by panicking, and its numbers are small"
)]

mod amplification;
mod convergence;
mod pair;
mod table;
mod transitions;
mod tree;
mod vectors;
mod walk;
mod wire;
