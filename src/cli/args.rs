//! What the command is told: subcommands, options, and what is wrong with them.

use std::ffi::OsString;
use std::path::PathBuf;
use std::time::Duration;

use clap::{ArgGroup, Args, Parser, Subcommand};
use tablecast_actors::protocol::NAME_BYTES;

/// The longest time that can be given: a year.
const LONGEST_SECONDS: f64 = 31_536_000.0;

const AFTER_HELP: &str = "\
FILE is NDJSON, one object a line: {\"key\":\"k\",\"value\":\"v\"}. Bytes that are not UTF-8 are given as
key_base64 and value_base64. Empty lines are skipped; of a key that comes twice the last counts.
Keys are up to 64 KiB, values up to 8 MiB.

SIGINT, SIGTERM and, on Linux, a closed terminal end the command in an orderly way, a second of the
first two, half a second later or more, at once. While a file is loaded, the first one does so as the system
does it, and nothing has been done then. The log goes to stderr; RUST_LOG=info says more.

Exit codes: 0 done, or ended by a signal (--once and verify were not done then: 1); 1 it failed, the
tables differ (--once, verify), a repair is held (--once), a dump was not written, there is no such key
(get), or ended by a second signal; 2 wrong usage or unreadable input.";

const HTTP_HELP: &str = "\
HTTP: GET /metrics (Prometheus), /healthz, /readyz, /status, /followers (serve) and /keys/KEY; PUT and
DELETE /keys/KEY (serve). KEY is percent-encoded, any bytes, up to 65,000 bytes so encoded. There is no
authentication: whoever reaches the address reads the table, and whoever is on this machine, pages in
a browser aside, writes it.";

#[derive(Debug, Parser)]
#[command(name = "tablecast", version, about, after_help = AFTER_HELP)]
pub(super) struct Cli {
    #[command(subcommand)]
    pub(super) command: Command,
}

#[derive(Debug, Subcommand)]
pub(super) enum Command {
    Serve(Serve),
    Follow(Follow),
    Watch(Watch),
    Verify(Verify),
    Status(Status),
    Followers(Followers),
    Put(Put),
    Get(Get),
    Delete(Delete),
}

/// Serve a table until a signal.
#[derive(Debug, Args)]
#[command(
    after_help = format!("{HTTP_HELP}\n\n{AFTER_HELP}"),
    group = ArgGroup::new("files").args(["load", "dump"]).multiple(true)
)]
pub(super) struct Serve {
    /// Where to listen; port 0 is one that is free. Exit code 1 if that cannot be
    #[arg(long, value_name = "HOST:PORT", value_parser = host_port)]
    pub(super) listen: String,
    /// Let in only followers that show the token in FILE: its bytes, up to 255, without the end of the line
    #[arg(long, value_name = "FILE")]
    pub(super) token_file: Option<PathBuf>,
    /// Talk TLS 1.3, with the certificate in FILE and the chain behind it, PEM
    #[arg(long, value_name = "FILE", requires = "tls_key")]
    pub(super) tls_cert: Option<PathBuf>,
    /// The key of --tls-cert, PEM
    #[arg(long, value_name = "FILE", requires = "tls_cert")]
    pub(super) tls_key: Option<PathBuf>,
    /// Let in only followers with a certificate of a CA in FILE, PEM
    #[arg(long, value_name = "FILE", requires = "tls_cert")]
    pub(super) tls_ca: Option<PathBuf>,
    /// Listen for anybody, where others than this machine reach the address, without --token-file or
    /// --tls-ca; and answer HTTP there, which asks nobody who they are
    #[arg(long)]
    pub(super) insecure: bool,
    /// How long followers have to read what is left for them when a signal comes. A second signal, half a
    /// second later or more, ends it at once
    #[arg(long, value_name = "SECONDS", default_value = "5", value_parser = seconds)]
    pub(super) drain_timeout: Duration,
    /// How often followers compare their roots with the table's; 0 is only behind a diff
    #[arg(long, value_name = "SECONDS", default_value = "60", value_parser = seconds_or_never)]
    pub(super) verify_every: Duration,
    /// What the table holds at first; nothing without it
    #[arg(long, value_name = "FILE")]
    pub(super) load: Option<PathBuf>,
    /// Write the table to FILE when leaving, sorted by key, whole or not at all. Exit code 1 if that
    /// fails
    #[arg(long, value_name = "FILE")]
    pub(super) dump: Option<PathBuf>,
    /// Keep the place in the history in FILE.position beside --dump, and go on from the one beside
    /// --load, so that followers are resumed. It is used once: after a crash a new history begins
    #[arg(long, requires = "files")]
    pub(super) resume: bool,
    /// Read changes from stdin, one a line, like FILE with "op":"write" (the default) or
    /// "op":"delete". A bad line is reported and skipped; the end of input ends nothing
    #[arg(long)]
    pub(super) stdin: bool,
    /// Where to answer HTTP; port 0 is one that is free. Exit code 1 if that cannot be
    #[arg(long, value_name = "HOST:PORT", value_parser = host_port)]
    pub(super) http: Option<String>,
    /// Take PUT and DELETE from other machines too, and from any page in a browser. A proxy on this machine is this machine
    #[arg(long, requires = "http")]
    pub(super) http_writes_from_anywhere: bool,
    /// Print every event as one JSON object a line
    #[arg(long)]
    pub(super) json: bool,
}

/// Keep a table equal to a server's until a signal.
#[derive(Debug, Args)]
#[command(
    after_help = format!("{HTTP_HELP}\n\n{AFTER_HELP}"),
    group = ArgGroup::new("files").args(["load", "dump"]).multiple(true)
)]
pub(super) struct Follow {
    /// Where the server is. Tried again and again
    #[arg(long, value_name = "HOST:PORT", value_parser = host_port)]
    pub(super) connect: String,
    #[command(flatten)]
    pub(super) credentials: Credentials,
    /// What the server's people see; up to 255 bytes
    #[arg(long, default_value = "tablecast follow", value_parser = follower_name)]
    pub(super) name: String,
    /// The old table; empty without it
    #[arg(long, value_name = "FILE")]
    pub(super) load: Option<PathBuf>,
    /// Leave after the first diff: exit code 0 if both roots are equal, 1 if not, or if the repair is
    /// held
    #[arg(long)]
    pub(super) once: bool,
    /// With --once: how long connecting and the first diff may take together. Exit code 1 then
    #[arg(long, value_name = "SECONDS", default_value = "30", value_parser = seconds, requires = "once")]
    pub(super) timeout: Duration,
    /// Write the table to FILE when leaving, sorted by key, whole or not at all. With --once only if
    /// a diff was done, else only if nothing is missing, as it is in the middle of a diff. Exit code 1
    /// if it is not written
    #[arg(long, value_name = "FILE")]
    pub(super) dump: Option<PathBuf>,
    /// Keep the place in the server's history in FILE.position beside --dump, and present the one
    /// beside --load: only what was missed comes then, as long as the server still has it
    #[arg(long, requires = "files")]
    pub(super) resume: bool,
    /// Print every change as it is applied
    #[arg(long)]
    pub(super) print: bool,
    /// Ask for a diff about so often, and not only when something may be missing
    #[arg(long, value_name = "SECONDS", value_parser = seconds)]
    pub(super) diff_every: Option<Duration>,
    /// Let a repair delete whatever it finds. Without it one that would delete more than half of the
    /// keys, and more than 1,000, is held
    #[arg(long)]
    pub(super) allow_mass_delete: bool,
    /// Do not look the table through for what was changed behind the follower's back
    #[arg(long)]
    pub(super) no_scrub: bool,
    /// Answer HTTP where others than this machine reach the address: it asks nobody who they are
    #[arg(long, requires = "http")]
    pub(super) insecure: bool,
    /// Where to answer HTTP; port 0 is one that is free. Exit code 1 if that cannot be
    #[arg(long, value_name = "HOST:PORT", value_parser = host_port)]
    pub(super) http: Option<String>,
    /// Print every event as one JSON object a line
    #[arg(long)]
    pub(super) json: bool,
}

/// Print a server's live changes until a signal.
///
/// The table itself is fetched, into memory, and not printed.
#[derive(Debug, Args)]
pub(super) struct Watch {
    /// Where the server is. Tried again and again
    #[arg(long, value_name = "HOST:PORT", value_parser = host_port)]
    pub(super) connect: String,
    #[command(flatten)]
    pub(super) credentials: Credentials,
    /// Only changes of this key; may come more than once
    #[arg(long = "key", value_name = "KEY")]
    pub(super) keys: Vec<OsString>,
    /// Only changes of keys that begin so, beside those of every --key
    #[arg(long)]
    pub(super) prefix: Option<OsString>,
    /// Print every event as one JSON object a line
    #[arg(long)]
    pub(super) json: bool,
}

/// Compare a file with a server's table, and change neither.
#[derive(Debug, Args)]
#[command(after_help = AFTER_HELP)]
pub(super) struct Verify {
    /// Where the server is
    #[arg(long, value_name = "HOST:PORT", value_parser = host_port)]
    pub(super) connect: String,
    #[command(flatten)]
    pub(super) credentials: Credentials,
    /// The table to compare
    #[arg(long, value_name = "FILE")]
    pub(super) load: PathBuf,
    /// How long connecting and comparing may take together. Exit code 1 then
    #[arg(long, value_name = "SECONDS", default_value = "30", value_parser = seconds)]
    pub(super) timeout: Duration,
    /// How many of the keys that differ are printed
    #[arg(long, value_name = "N", default_value_t = 10)]
    pub(super) keys: usize,
    /// Print the verdict as one JSON object
    #[arg(long)]
    pub(super) json: bool,
}

/// Show how a server or a follower is.
#[derive(Debug, Args)]
pub(super) struct Status {
    #[command(flatten)]
    pub(super) at: At,
    /// Print it as JSON
    #[arg(long)]
    pub(super) json: bool,
}

/// Show who follows a server, and how far each is.
#[derive(Debug, Args)]
pub(super) struct Followers {
    #[command(flatten)]
    pub(super) at: At,
    /// Print them as JSON
    #[arg(long)]
    pub(super) json: bool,
}

/// Write a key at a server.
#[derive(Debug, Args)]
pub(super) struct Put {
    #[command(flatten)]
    pub(super) key: KeyArg,
    /// The value; stdin without it
    #[arg(allow_hyphen_values = true)]
    pub(super) value: Option<OsString>,
    #[command(flatten)]
    pub(super) at: At,
    /// Print the position behind it as JSON
    #[arg(long)]
    pub(super) json: bool,
}

/// Print a key's value as it is, at a server or a follower. Exit code 1 if there is no such key.
#[derive(Debug, Args)]
pub(super) struct Get {
    #[command(flatten)]
    pub(super) key: KeyArg,
    #[command(flatten)]
    pub(super) at: At,
}

/// Delete a key at a server, whether it is there or not.
#[derive(Debug, Args)]
pub(super) struct Delete {
    #[command(flatten)]
    pub(super) key: KeyArg,
    #[command(flatten)]
    pub(super) at: At,
    /// Print the position behind it as JSON
    #[arg(long)]
    pub(super) json: bool,
}

/// What a follower shows, and whom it believes.
#[derive(Debug, Args)]
pub(super) struct Credentials {
    /// Show the server the token in FILE: its bytes, up to 255, without the end of the line
    #[arg(long, value_name = "FILE")]
    pub(super) token_file: Option<PathBuf>,
    /// Talk TLS 1.3, with a server that has a certificate for HOST of a CA in FILE, PEM
    #[arg(long, value_name = "FILE")]
    pub(super) tls_ca: Option<PathBuf>,
    /// Show the certificate in FILE, and the chain behind it, PEM, if the server asks for one
    #[arg(long, value_name = "FILE", requires = "tls_key", requires = "tls_ca")]
    pub(super) tls_cert: Option<PathBuf>,
    /// The key of --tls-cert, PEM
    #[arg(long, value_name = "FILE", requires = "tls_cert")]
    pub(super) tls_key: Option<PathBuf>,
}

/// Where to ask.
#[derive(Debug, Args)]
pub(super) struct At {
    /// What was given to `serve` or `follow` as --http
    #[arg(long, value_name = "HOST:PORT", value_parser = host_port)]
    pub(super) http: String,
    /// How long the answer may take, with all that is sent
    #[arg(long, value_name = "SECONDS", default_value = "30", value_parser = seconds)]
    pub(super) timeout: Duration,
}

/// Which key.
#[derive(Debug, Args)]
pub(super) struct KeyArg {
    /// The key
    pub(super) key: OsString,
    /// KEY is base64
    #[arg(long)]
    pub(super) key_base64: bool,
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

fn seconds_or_never(text: &str) -> Result<Duration, String> {
    if text == "0" { Ok(Duration::ZERO) } else { seconds(text) }
}

fn follower_name(text: &str) -> Result<String, String> {
    if text.len() > NAME_BYTES {
        return Err(format!("of {} bytes, above the limit of {NAME_BYTES}", text.len()));
    }
    Ok(text.to_owned())
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
    fn a_time_for_the_first_diff_is_of_one_that_leaves_after_it() {
        let follow = ["tablecast", "follow", "--connect", "localhost:1"];
        let parses = |more: &[&str]| Cli::try_parse_from([&follow, more].concat()).is_ok();
        assert!(parses(&[]) && parses(&["--once"]) && parses(&["--once", "--timeout", "3"]));
        assert!(!parses(&["--timeout", "3"]));
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
        assert_eq!(seconds_or_never("0"), Ok(Duration::ZERO));
        assert!(seconds_or_never("-0").is_err());
    }

    #[test]
    fn names_are_bounded() {
        assert!(follower_name(&"n".repeat(255)).is_ok());
        let error = follower_name(&"n".repeat(256)).unwrap_err();
        assert_eq!(error, "of 256 bytes, above the limit of 255");
    }
}
