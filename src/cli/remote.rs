//! `tablecast status`, `followers`, `put`, `get` and `delete`: what is asked over HTTP.

use std::fmt::Write as _;
use std::io::{self, ErrorKind, Read as _, Write as _};

use anyhow::{Context as _, anyhow, ensure};
use base64::Engine as _;
use base64::engine::general_purpose::STANDARD;
use percent_encoding::{AsciiSet, NON_ALPHANUMERIC, percent_encode};
use serde::Deserialize;
use serde::de::DeserializeOwned;
use ureq::http::{Response, StatusCode};
use ureq::{Agent, Body};

use super::Failure;
use super::args::{At, Delete, Followers, Get, KeyArg, Put, Status};
use crate::{
    Change, ClientStatus, DiffOutcome, DiffReport, FollowerStatus, Health, Key, Limits, Position,
    ServedDiff, ServerStatus, Verified,
};

/// More than any answer has: 10,000 followers with the longest names, and the largest value.
const ANSWER_BYTES: u64 = 64 << 20;

/// The longest path that HTTP libraries take.
const PATH_BYTES: usize = 65_000;

/// What stands for itself in a path, beside letters and digits. A `.` does not: `.` and `..` go
/// elsewhere.
const ENCODED: &AsciiSet = &NON_ALPHANUMERIC.remove(b'-').remove(b'_').remove(b'~');

pub(super) fn status(args: &Status) -> Result<(), Failure> {
    let text = args.at.ask("/status")?;
    if args.json {
        return print_line(&text);
    }
    let status: AnyStatus = parse(&text)?;
    print(
        match status {
            AnyStatus::Server(status) => server_table(&status),
            AnyStatus::Follower(status) => follower_table(&status),
        }
        .as_bytes(),
    )
}

pub(super) fn followers(args: &Followers) -> Result<(), Failure> {
    let text = args.at.ask("/followers")?;
    if args.json {
        return print_line(&text);
    }
    let followers: Vec<FollowerStatus> = parse(&text)?;
    print(followers_table(&followers).as_bytes())
}

pub(super) fn put(args: &Put) -> Result<(), Failure> {
    let limits = Limits::default();
    let value = match &args.value {
        Some(value) => value.as_encoded_bytes().to_vec(),
        None => value_of_stdin(&limits)?,
    };
    let change = Change::write(args.key.key().map_err(Failure::Input)?, value);
    limits.check(&change).map_err(|error| Failure::Input(error.into()))?;
    let url = args.at.url(&path(change.key())?);
    let value = change.value().cloned().unwrap_or_default();
    let answer = args.at.agent().put(url).content_type("application/octet-stream").send(&value[..]);
    print_position("written", &args.at.written(answer)?, args.json)
}

pub(super) fn get(args: &Get) -> Result<(), Failure> {
    let key = args.key.key().map_err(Failure::Input)?;
    print(&args.at.ask(&path(&key)?)?)
}

pub(super) fn delete(args: &Delete) -> Result<(), Failure> {
    let key = args.key.key().map_err(Failure::Input)?;
    let answer = args.at.agent().delete(args.at.url(&path(&key)?)).call();
    print_position("deleted", &args.at.written(answer)?, args.json)
}

fn value_of_stdin(limits: &Limits) -> Result<Vec<u8>, Failure> {
    let limit = limits.value_bytes;
    let mut value = Vec::new();
    let read = io::stdin().lock().take(limit as u64 + 1).read_to_end(&mut value);
    let read = read.context("cannot read stdin").map_err(Failure::Input)?;
    if read > limit {
        let error = anyhow!("value of more than {limit} bytes, which is the limit");
        return Err(Failure::Input(error));
    }
    Ok(value)
}

fn print_position(what: &str, answer: &[u8], json: bool) -> Result<(), Failure> {
    if json {
        return print_line(answer);
    }
    let position: Option<Position> = parse(answer)?;
    print(
        match position {
            Some(at) => format!("{what} at revision {} of history {}\n", at.revision, at.epoch),
            None => format!("{what} before the server is ready\n"),
        }
        .as_bytes(),
    )
}

/// What is asked for to stdout. A reader who has gone has had enough.
fn print(bytes: &[u8]) -> Result<(), Failure> {
    let mut out = io::stdout().lock();
    match out.write_all(bytes).and_then(|()| out.flush()) {
        Err(error) if error.kind() != ErrorKind::BrokenPipe => {
            Err(Failure::Work(anyhow!("cannot write to stdout: {error}")))
        }
        Ok(()) | Err(_) => Ok(()),
    }
}

fn print_line(text: &[u8]) -> Result<(), Failure> {
    print(&[text, b"\n"].concat())
}

fn parse<T: DeserializeOwned>(answer: &[u8]) -> anyhow::Result<T> {
    serde_json::from_slice(answer).context("the answer is not that of this version")
}

impl KeyArg {
    fn key(&self) -> anyhow::Result<Key> {
        let bytes = self.key.as_encoded_bytes();
        if self.key_base64 {
            return Ok(STANDARD.decode(bytes).context("KEY is not base64")?.into());
        }
        Ok(Key::copy_from_slice(bytes))
    }
}

fn path(key: &[u8]) -> Result<String, Failure> {
    let path = format!("/keys/{}", percent_encode(key, ENCODED));
    let bytes = path.len();
    if bytes > PATH_BYTES {
        let error = anyhow!("path of {bytes} bytes is above the limit of {PATH_BYTES}");
        return Err(Failure::Input(error.context(format!("key of {} bytes", key.len()))));
    }
    Ok(path)
}

impl At {
    /// Asks the address that it is told, and no other.
    fn agent(&self) -> Agent {
        let config = Agent::config_builder();
        config
            .http_status_as_error(false)
            .max_redirects(0)
            .proxy(None)
            .timeout_global(Some(self.timeout))
            .build()
            .into()
    }

    fn url(&self, path: &str) -> String {
        format!("http://{}{path}", self.http)
    }

    fn ask(&self, path: &str) -> anyhow::Result<Vec<u8>> {
        self.body(self.agent().get(self.url(path)).call())
    }

    /// What was answered to a write.
    fn written(&self, answer: Result<Response<Body>, ureq::Error>) -> anyhow::Result<Vec<u8>> {
        let unknown = matches!(answer, Err(ureq::Error::Timeout(_)));
        let body = self.body(answer);
        if unknown { body.context("it may be written all the same") } else { body }
    }

    /// What was answered, if it is what was asked for.
    fn body(&self, answer: Result<Response<Body>, ureq::Error>) -> anyhow::Result<Vec<u8>> {
        let answer = answer.with_context(|| format!("cannot reach {}", self.http))?;
        let status = answer.status();
        let body = answer.into_body().into_with_config().limit(ANSWER_BYTES).read_to_vec();
        let body = body.with_context(|| format!("cannot read what {} answers", self.http))?;
        ensure!(
            status == StatusCode::OK,
            "{} answers {}: {}",
            self.http,
            status.as_u16(),
            shown(&String::from_utf8_lossy(&body))
        );
        Ok(body)
    }
}

#[derive(Debug, Deserialize)]
#[serde(untagged)]
enum AnyStatus {
    Server(ServerStatus),
    Follower(Box<ClientStatus>),
}

fn server_table(status: &ServerStatus) -> String {
    let ServerStatus { keys, followers, diffs_running, diffs_waiting, .. } = status;
    let ServerStatus { log_bytes, log_tail, refused, .. } = status;
    rows(&[
        ("position", position(status.position)),
        ("keys", keys.to_string()),
        ("followers", followers.to_string()),
        ("diffs", format!("{diffs_running} running, {diffs_waiting} waiting")),
        ("log", format!("{log_bytes} bytes, from revision {log_tail} on")),
        ("refused", format!("{refused} writes")),
    ])
}

fn follower_table(status: &ClientStatus) -> String {
    let ClientStatus { name, server, state, keys, applied, refused, .. } = status;
    let ClientStatus { corrupt, connects, fell_behind, diverged, .. } = status;
    let ClientStatus { bytes_sent, bytes_received, .. } = status;
    let progress = status.progress.map(|at| {
        format!("{:?}, {} rounds, {} of {} keys", at.phase, at.rounds, at.done, at.total)
    });
    rows(&[
        ("name", shown(name)),
        ("server", shown(server)),
        ("health", health(&status.health, status.disconnected.as_deref())),
        ("state", shown(state)),
        ("connected", status.way.map_or_else(|| "not yet".to_owned(), |way| way.to_string())),
        ("position", position(status.position)),
        ("stream", position(status.stream)),
        ("keys", keys.to_string()),
        ("changes", format!("{applied} applied, {refused} refused, {corrupt} keys corrupt")),
        ("connects", format!("{connects}, fell behind {fell_behind} times")),
        ("verified", status.verified.map_or_else(none, |at| format!("revision {at}"))),
        ("diverged", format!("{diverged} times")),
        ("diff", progress.unwrap_or_else(none)),
        ("last diff", status.last_diff.as_ref().map_or_else(none, diffed)),
        ("bytes", format!("{bytes_sent} sent, {bytes_received} received")),
    ])
}

fn none() -> String {
    "-".to_owned()
}

fn position(at: Option<Position>) -> String {
    at.map_or_else(none, |at| format!("revision {} of history {}", at.revision, at.epoch))
}

/// With why it is disconnected, if it is.
fn health(health: &Health, disconnected: Option<&str>) -> String {
    match health {
        Health::Ready => "ready".to_owned(),
        Health::Disconnected => disconnected.map_or_else(
            || "disconnected".to_owned(),
            |why| format!("disconnected: {}", shown(why)),
        ),
        Health::Syncing => "syncing".to_owned(),
        Health::Diverged { reason } => format!("diverged: {}", shown(reason)),
        Health::Held { writes, deletes, keys } => {
            format!("held: would write {writes} keys and delete {deletes} of {keys}")
        }
    }
}

fn diffed(outcome: &DiffOutcome) -> String {
    match outcome {
        DiffOutcome::Done(report) => {
            let DiffReport { written, deleted, revision, elapsed, .. } = report;
            let equal = if report.equal() { "equal" } else { "NOT equal" };
            format!(
                "{equal} at revision {revision}: written {written}, deleted {deleted}, in {elapsed:.1?}"
            )
        }
        DiffOutcome::Aborted(why) => format!("aborted: {why}"),
    }
}

fn followers_table(followers: &[FollowerStatus]) -> String {
    if followers.is_empty() {
        return "no followers\n".to_owned();
    }
    let head = ["NAME", "ADDRESS", "STATE", "REVISION", "LAG", "VERIFIED", "LAST DIFF", "BYTES"];
    let mut lines = vec![head.map(str::to_owned)];
    lines.extend(followers.iter().map(|follower| {
        let FollowerStatus { name, address, state, phase, sent, lag, lag_time, .. } = follower;
        let FollowerStatus { verified, last_diff, bytes_sent, bytes_received, .. } = follower;
        [
            shown(name),
            shown(address),
            phase.as_ref().map_or_else(|| shown(state), |phase| shown(&format!("{state}/{phase}"))),
            sent.to_string(),
            format!("{lag} ({:.1} s)", lag_time.as_secs_f64()),
            verified.map_or_else(none, compared),
            last_diff.map_or_else(none, served),
            format!("{bytes_sent} out, {bytes_received} in"),
        ]
    }));
    columns(&lines)
}

fn compared(Verified { revision, equal }: Verified) -> String {
    format!("{} at {revision}", if equal { "equal" } else { "NOT equal" })
}

fn served(diff: ServedDiff) -> String {
    let ServedDiff { aborted, served, elapsed, .. } = diff;
    match aborted {
        Some(why) => format!("{why:?}"),
        None => format!("{} written, {} deleted, {elapsed:.1?}", served.writes, served.deletes),
    }
}

/// Text that came from elsewhere, without what a terminal would obey.
fn shown(text: &str) -> String {
    let printed = |c: char| if c.is_control() { c.escape_default().to_string() } else { c.into() };
    text.chars().map(printed).collect()
}

fn rows(rows: &[(&str, String)]) -> String {
    let rows: Vec<_> = rows.iter().map(|(name, what)| [(*name).to_owned(), what.clone()]).collect();
    columns(&rows)
}

/// Lines whose columns stand under each other.
fn columns<const N: usize>(lines: &[[String; N]]) -> String {
    let mut widths = [0; N];
    for line in lines {
        for (width, cell) in widths.iter_mut().zip(line) {
            *width = cell.chars().count().max(*width);
        }
    }
    let mut table = String::new();
    for line in lines {
        let start = table.len();
        for (width, cell) in widths.iter().zip(line) {
            // A String takes whatever is written to it.
            write!(table, "{cell:width$}  ").ok();
        }
        let end = table.trim_end().len().max(start);
        table.truncate(end);
        table.push('\n');
    }
    table
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn keys_in_paths() {
        for (key, expected) in [
            (&b""[..], "/keys/"),
            (b"..", "/keys/%2E%2E"),
            (b"a/b?c", "/keys/a%2Fb%3Fc"),
            (b"\xff% ", "/keys/%FF%25%20"),
        ] {
            assert_eq!(path(key).ok().unwrap(), expected);
        }
        let Err(Failure::Input(error)) = path(&[b'/'; 30_000]) else { panic!("it is too long") };
        let text = "key of 30000 bytes: path of 90006 bytes is above the limit of 65000";
        assert_eq!(format!("{error:#}"), text);
    }

    #[test]
    fn tables_have_columns() {
        let line = |cells: [&str; 3]| cells.map(str::to_owned);
        let table = columns(&[line(["a", "bé", ""]), line(["long", "b", "c"])]);
        assert_eq!(table, "a     bé\nlong  b   c\n");
        assert_eq!(shown("a\x1b[2J\n"), "a\\u{1b}[2J\\n");
    }
}
