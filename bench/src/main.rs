//! The runner: one question a subcommand, its figures as JSON.

#![allow(
    clippy::cast_precision_loss,
    reason = "figures are told in three digits, and f64 has fifteen"
)]

mod compare;
mod diff;
mod grow;
mod hostile;
mod instructions;
mod machine;
mod process;
mod report;
mod simulate;
mod soak;
mod storm;
mod stream;
mod tree;

use clap::{Parser, Subcommand};

#[cfg(all(unix, feature = "jemalloc"))]
#[global_allocator]
static ALLOCATOR: tikv_jemallocator::Jemalloc = tikv_jemallocator::Jemalloc;

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
    /// Tablecast beside other systems, as far as they are installed: every claim about speed.
    Compare(compare::Args),
    /// How the costs grow with keys, followers, differences and values: plots and tables.
    Grow(grow::Args),
    /// How many instructions the hot paths take, beside what was accepted. Needs valgrind.
    Instructions(instructions::Args),
    /// Seeded runs of the protocol with faults: is everything kept that is promised?
    Simulate(simulate::Args),
    /// Processes that are killed, stopped and disturbed, over TCP, for as long as asked: are all tables equal in the end?
    Soak(soak::Args),
    /// What honest followers get beside connections that mean harm, and what such a connection costs.
    Hostile(hostile::Args),
    /// The memory of one tree, for `tree`, in a process of its own.
    #[command(hide = true)]
    TreeMemory(tree::MemoryArgs),
    /// The server and the writer of `stream`, in a process of their own.
    #[command(hide = true)]
    StreamServer(stream::server::Args),
    /// The connections of `hostile`, in a process of their own.
    #[command(hide = true)]
    HostileLoad(hostile::load::Args),
    /// The server of `soak`, in a process of its own.
    #[command(hide = true)]
    SoakServer(soak::server::Args),
    /// A follower of `soak`, in a process of its own.
    #[command(hide = true)]
    SoakFollower(soak::follower::Args),
    /// What `instructions` counts, in a process of its own.
    #[command(hide = true)]
    InstructionsWork(instructions::WorkArgs),
    /// The plain fan-out of `compare`, in a process of its own.
    #[command(hide = true)]
    PlainServer(compare::plain::Args),
}

fn main() -> anyhow::Result<()> {
    let question = Cli::parse().question;
    // An actor that panics harms nobody else, and what is measured then is something else; runs of `simulate` catch theirs.
    if !matches!(question, Question::Simulate(_)) {
        let say = std::panic::take_hook();
        std::panic::set_hook(Box::new(move |panic| {
            say(panic);
            std::process::abort();
        }));
    }
    match question {
        Question::Tree(args) => tree::run(&args)?.print(args.json),
        Question::Diff(args) => block_on(diff::run(&args))?.print(args.json),
        Question::Stream(args) => stream::run(&args)?.print(args.json),
        Question::Storm(args) => storm::run(&args)?.print(args.json),
        Question::Compare(args) => compare::run(&args),
        Question::Grow(args) => grow::run(&args),
        Question::Instructions(args) => instructions::run(&args),
        Question::Simulate(args) => simulate::run(&args),
        Question::Soak(args) => block_on(soak::run(&args))?.print(args.json),
        Question::Hostile(args) => hostile::run(&args)?.print(args.json),
        Question::HostileLoad(args) => block_on(hostile::load::run(&args)),
        Question::SoakServer(args) => block_on(soak::server::run(&args)),
        Question::SoakFollower(args) => block_on(soak::follower::run(&args)),
        Question::InstructionsWork(args) => instructions::work(&args),
        Question::TreeMemory(args) => tree::run_memory(&args),
        Question::StreamServer(args) => block_on(stream::server::run(&args)),
        Question::PlainServer(args) => compare::plain::run(&args),
    }
}

/// Runs what only asks and waits: the actors have threads of their own.
fn block_on<T>(asking: impl Future<Output = anyhow::Result<T>>) -> anyhow::Result<T> {
    tokio::runtime::Builder::new_current_thread().enable_all().build()?.block_on(asking)
}
