//! The `tablecast` command: `serve` a table or `follow` one, `watch` or `verify` it, and ask either
//! of the first two over HTTP.
//!
//! What it is told is in its `--help`; the format of its files in `cli/ndjson.rs`. Events go to
//! stdout, as sentences or as JSON; what goes wrong and the log go to stderr.

mod args;
mod credentials;
mod events;
mod file;
mod follow;
mod http;
mod ndjson;
mod progress;
mod remote;
mod resume;
mod serve;
mod signals;
mod verify;
mod watch;

use std::io::IsTerminal;
use std::process::ExitCode;
use std::time::Duration;

use clap::Parser;
use tracing::level_filters::LevelFilter;
use tracing_subscriber::EnvFilter;

use args::{Cli, Command, Credentials, Follow, Serve, Verify, Watch};
use events::{Output, complain};

/// How long the other end may take to hear that this one ends.
const STOP_TIMEOUT: Duration = Duration::from_secs(5);

/// Why the command leaves without having done its work.
#[derive(Debug)]
enum Failure {
    /// The input cannot be read, or what was asked for is not done.
    Input(anyhow::Error),
    /// Anything else.
    Work(anyhow::Error),
}

impl Failure {
    fn code(&self) -> ExitCode {
        match self {
            Self::Input(_) => ExitCode::from(2),
            Self::Work(_) => ExitCode::FAILURE,
        }
    }

    fn text(&self) -> String {
        let (Self::Input(error) | Self::Work(error)) = self;
        format!("{error:#}")
    }
}

impl<E: Into<anyhow::Error>> From<E> for Failure {
    fn from(error: E) -> Self {
        Self::Work(error.into())
    }
}

/// Runs the command with the arguments of the process.
pub fn run() -> ExitCode {
    let cli = match Cli::try_parse() {
        Ok(cli) => cli,
        Err(error) => {
            // Nobody reads it.
            drop(error.print());
            return ExitCode::from(u8::try_from(error.exit_code()).unwrap_or(2));
        }
    };
    log_to_stderr();
    let answered = match &cli.command {
        Command::Serve(args) => return with_events(args.json, args, serve::run),
        Command::Follow(args) => return with_events(args.json, args, follow::run),
        Command::Watch(args) => return with_events(args.json, args, watch::run),
        Command::Verify(args) => return with_events(args.json, args, verify::run),
        Command::Status(args) => remote::status(args),
        Command::Followers(args) => remote::followers(args),
        Command::Put(args) => remote::put(args),
        Command::Get(args) => remote::get(args),
        Command::Delete(args) => remote::delete(args),
    };
    match answered {
        Ok(()) => ExitCode::SUCCESS,
        Err(failure) => {
            complain(failure.text());
            failure.code()
        }
    }
}

fn log_to_stderr() {
    let filter = EnvFilter::builder().with_default_directive(LevelFilter::WARN.into());
    tracing_subscriber::fmt()
        .with_env_filter(filter.from_env_lossy())
        .with_writer(std::io::stderr)
        .with_ansi(std::io::stderr().is_terminal())
        // It would panic when stderr is closed.
        .log_internal_errors(false)
        .init();
}

/// Runs a subcommand that says what happens while it runs.
fn with_events<A>(
    json: bool,
    args: &A,
    run: impl AsyncFnOnce(&A, &Output) -> Result<ExitCode, Failure>,
) -> ExitCode {
    actix_rt::System::new().block_on(async {
        let output = Output::start(json);
        let (code, error) = match run(args, &output).await {
            Ok(code) => (code, None),
            Err(failure) => (failure.code(), Some(failure.text())),
        };
        if output.finish(error).await { code } else { ExitCode::FAILURE }
    })
}
