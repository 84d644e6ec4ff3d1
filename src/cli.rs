//! The `tablecast` command: `serve` a table, or `follow` one.
//!
//! What it is told is in its `--help`; the format of its files in `cli/ndjson.rs`. Events go to
//! stdout, as sentences or as JSON; what goes wrong and the log go to stderr.

mod events;
mod file;
mod follow;
mod ndjson;
mod progress;
mod serve;
mod signals;

use std::io::IsTerminal;
use std::path::PathBuf;
use std::process::ExitCode;
use std::time::Duration;

use clap::{Args, Parser, Subcommand};
use tracing::level_filters::LevelFilter;
use tracing_subscriber::EnvFilter;

use events::Output;

/// How long the other end may take to hear that this one ends.
const STOP_TIMEOUT: Duration = Duration::from_secs(5);

/// The longest time that can be given: a year.
const LONGEST_SECONDS: f64 = 31_536_000.0;

const AFTER_HELP: &str = "\
FILE is NDJSON, one object a line: {\"key\":\"k\",\"value\":\"v\"}. Bytes that are not UTF-8 are given as
key_base64 and value_base64. Empty lines are skipped; of a key that comes twice the last counts.
Keys are up to 64 KiB, values up to 8 MiB.

SIGINT and SIGTERM end the command in an orderly way. The log goes to stderr; RUST_LOG=info says
more.

Exit codes: 0 done, or ended by a signal; 1 it failed, or the roots differ (--once); 2 wrong usage
or unreadable input.";

#[derive(Debug, Parser)]
#[command(name = "tablecast", version, about, after_help = AFTER_HELP)]
struct Cli {
    #[command(subcommand)]
    command: Command,
}

#[derive(Debug, Subcommand)]
enum Command {
    Serve(Serve),
    Follow(Follow),
}

/// Serve a table until a signal.
#[derive(Debug, Args)]
#[command(after_help = AFTER_HELP)]
struct Serve {
    /// Where to listen; port 0 is one that is free. Exit code 1 if that cannot be
    #[arg(long, value_name = "HOST:PORT", value_parser = host_port)]
    listen: String,
    /// What the table holds at first; nothing without it
    #[arg(long, value_name = "FILE")]
    load: Option<PathBuf>,
    /// Read changes from stdin, one a line, like FILE with "op":"write" (the default) or
    /// "op":"delete". A bad line is reported and skipped; the end of input ends nothing
    #[arg(long)]
    stdin: bool,
    /// Print every event as one JSON object a line
    #[arg(long)]
    json: bool,
}

/// Keep a table equal to a server's until a signal.
#[derive(Debug, Args)]
#[command(after_help = AFTER_HELP)]
struct Follow {
    /// Where the server is. Tried again and again
    #[arg(long, value_name = "HOST:PORT", value_parser = host_port)]
    connect: String,
    /// The old table; empty without it
    #[arg(long, value_name = "FILE")]
    load: Option<PathBuf>,
    /// Leave after the first diff: exit code 0 if both roots are equal, 1 if not
    #[arg(long)]
    once: bool,
    /// With --once: how long connecting and the first diff may take together. Exit code 1 then
    #[arg(long, value_name = "SECONDS", default_value = "30", value_parser = seconds)]
    timeout: Duration,
    /// Write the table to FILE when leaving, sorted by key, whole or not at all. With --once only if
    /// a diff was done. Exit code 1 if that fails
    #[arg(long, value_name = "FILE")]
    dump: Option<PathBuf>,
    /// Print every change as it is applied
    #[arg(long)]
    print: bool,
    /// Ask for a diff so long after the last time, and not only when something may be missing
    #[arg(long, value_name = "SECONDS", value_parser = seconds)]
    diff_every: Option<Duration>,
    /// Print every event as one JSON object a line
    #[arg(long)]
    json: bool,
}

/// Why the command leaves without having done its work.
#[derive(Debug)]
enum Failure {
    /// The input cannot be read.
    Input(anyhow::Error),
    /// Anything else.
    Work(anyhow::Error),
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
    actix_rt::System::new().block_on(execute(cli.command))
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

async fn execute(command: Command) -> ExitCode {
    let json = match &command {
        Command::Serve(Serve { json, .. }) | Command::Follow(Follow { json, .. }) => *json,
    };
    let output = Output::start(json);
    let result = match &command {
        Command::Serve(serve) => serve::run(serve, &output).await,
        Command::Follow(follow) => follow::run(follow, &output).await,
    };
    let (code, error) = match result {
        Ok(code) => (code, None),
        Err(Failure::Input(error)) => (ExitCode::from(2), Some(error)),
        Err(Failure::Work(error)) => (ExitCode::FAILURE, Some(error)),
    };
    let error = error.map(|error| format!("{error:#}"));
    if output.finish(error).await { code } else { ExitCode::FAILURE }
}

fn host_port(text: &str) -> Result<String, String> {
    match text.rsplit_once(':') {
        Some((host, port)) if !host.is_empty() && port.parse::<u16>().is_ok() => {
            Ok(text.to_owned())
        }
        _ => Err("not of the form HOST:PORT, with a port up to 65535".to_owned()),
    }
}

fn seconds(text: &str) -> Result<Duration, String> {
    let seconds: f64 = text.parse().map_err(|_| "not a number of seconds".to_owned())?;
    if seconds > LONGEST_SECONDS {
        return Err(format!("above the limit of {LONGEST_SECONDS} seconds"));
    }
    match Duration::try_from_secs_f64(seconds) {
        Ok(duration) if !duration.is_zero() => Ok(duration),
        _ => Err("not above 0 seconds".to_owned()),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use clap::CommandFactory;

    #[test]
    fn the_definitions_are_sound() {
        Cli::command().debug_assert();
    }

    #[test]
    fn addresses_are_host_and_port() {
        for good in ["127.0.0.1:0", "[::1]:80", "example.org:65535"] {
            assert_eq!(host_port(good).as_deref(), Ok(good));
        }
        for bad in ["", "localhost", ":80", "host:", "host:65536", "host:x"] {
            assert!(host_port(bad).is_err(), "{bad}");
        }
    }

    #[test]
    fn seconds_are_above_zero_and_bounded() {
        assert_eq!(seconds("0.5"), Ok(Duration::from_millis(500)));
        assert_eq!(seconds("31536000"), Ok(Duration::from_secs(31_536_000)));
        for bad in ["", "x", "0", "-1", "nan", "inf", "-inf", "1e300", "1e-300", "31536001"] {
            assert!(seconds(bad).is_err(), "{bad}");
        }
    }
}
