//! The runner: one question a subcommand, its figures as JSON.

#![allow(
    clippy::cast_precision_loss,
    reason = "figures are told in three digits, and f64 has fifteen"
)]

mod diff;
mod process;
mod report;
mod storm;
mod stream;
mod tree;

use clap::{Parser, Subcommand};

/// What Tablecast costs. Every question is described in bench/README.md.
#[derive(Debug, Parser)]
#[command(name = "tablecast-bench")]
struct Cli {
    #[command(subcommand)]
    question: Question,
}

#[derive(Debug, Subcommand)]
enum Question {
    /// The Merkle tree alone: building, writing, hashing, memory.
    Tree(tree::Args),
    /// A diff between a server and a follower over TCP.
    Diff(diff::Args),
    /// Live changes from a server to many followers over TCP.
    Stream(stream::Args),
    /// Many followers that come back at once to a server that was restarted.
    Storm(storm::Args),
    /// The memory of one tree, for `tree`, in a process of its own.
    #[command(hide = true)]
    TreeMemory(tree::MemoryArgs),
    /// The server and the writer of `stream`, in a process of their own.
    #[command(hide = true)]
    StreamServer(stream::server::Args),
}

fn main() -> anyhow::Result<()> {
    match Cli::parse().question {
        Question::Tree(args) => tree::run(&args)?.print(args.json),
        Question::Diff(args) => block_on(diff::run(&args))?.print(args.json),
        Question::Stream(args) => stream::run(&args)?.print(args.json),
        Question::Storm(args) => storm::run(&args)?.print(args.json),
        Question::TreeMemory(args) => tree::run_memory(&args),
        Question::StreamServer(args) => block_on(stream::server::run(&args)),
    }
}

/// Runs what only asks and waits: the actors have threads of their own.
fn block_on<T>(asking: impl Future<Output = anyhow::Result<T>>) -> anyhow::Result<T> {
    tokio::runtime::Builder::new_current_thread().enable_all().build()?.block_on(asking)
}
