//! What the command says while it runs: on stdout, as sentences or as JSON.
//!
//! A thread of its own writes it, so that a reader who does not read holds up neither the table nor
//! the end: what it has not taken within [`STOP_TIMEOUT`] is lost then. Nothing stays in a buffer
//! once there is nothing more to say.

use std::fmt;
use std::io::{self, BufWriter, ErrorKind, Write};
use std::net::SocketAddr;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;

use serde::Serialize;
use tokio::sync::{mpsc, oneshot};

use super::STOP_TIMEOUT;
use super::ndjson::Fields;
use super::verify::Verdict;
use crate::{Change, DiffReport, Hash, Key, Position, Progress, Revision, Way};

/// How many events wait to be written. Then the next one waits, and a follower's events with it.
const WAITING: usize = 64;

/// How much of a key or value a sentence shows.
const SHOWN_BYTES: usize = 100;

/// What there is to say.
#[derive(Debug)]
pub(super) enum Event {
    /// The server serves.
    Ready {
        listen: SocketAddr,
        http: Option<SocketAddr>,
        keys: usize,
        revision: Revision,
        root: Hash,
    },
    /// The follower answers HTTP.
    Started { http: SocketAddr },
    /// The handshake is through.
    Connected(Position, Way),
    /// The connection ended.
    Disconnected { reason: String },
    /// How far a diff is.
    Progress(Progress),
    /// A diff was done.
    Diff(DiffReport),
    /// A diff would have deleted too much, and changed nothing.
    Held { writes: u64, deletes: u64, keys: u64 },
    /// The table was changed behind the follower's back.
    Corrupt { keys: usize, example: Key },
    /// A file was compared with a server's table.
    Verified(Verdict),
    /// A change was applied.
    Change { change: Change, revision: Revision, repair: bool },
    /// Something is not as it was asked for.
    Warning { message: String },
    /// Something is wrong.
    Error { message: String },
}

/// Where events go.
#[derive(Debug)]
pub(super) struct Output {
    events: mpsc::Sender<Event>,
    /// Nobody reads stdout any more.
    unread: Arc<AtomicBool>,
    written: oneshot::Receiver<io::Result<()>>,
}

/// Nobody reads any more.
#[derive(Debug)]
pub(super) struct Closed;

impl Output {
    pub(super) fn start(json: bool) -> Self {
        let (events, receiver) = mpsc::channel(WAITING);
        let (ended, written) = oneshot::channel();
        let unread = Arc::new(AtomicBool::new(false));
        let nobody = Arc::clone(&unread);
        std::thread::spawn(move || {
            // Nobody waits if the process is about to end anyway.
            drop(ended.send(write_all(receiver, json, &nobody)));
        });
        Self { events, unread, written }
    }

    /// Says it. Waits while too much is unsaid.
    pub(super) async fn say(&self, event: Event) -> Result<(), Closed> {
        let complains = matches!(event, Event::Error { .. } | Event::Warning { .. });
        if self.unread.load(Ordering::Relaxed) && !complains {
            return Err(Closed);
        }
        self.events.send(event).await.map_err(|_| Closed)
    }

    /// Says it, if there is room for it in so long a time; whether there was.
    pub(super) async fn say_within(&self, patience: Duration, event: Event) -> bool {
        // No time is a millisecond for a timer.
        if patience.is_zero() {
            return self.events.try_send(event).is_ok();
        }
        self.events.send_timeout(event, patience).await.is_ok()
    }

    /// Says why it failed, if it did, and waits until all is said. Whether it was; a reader that has
    /// gone missed nothing that it wanted.
    pub(super) async fn finish(self, error: Option<String>) -> bool {
        let Self { events, written, .. } = self;
        let mut unsaid = error.clone();
        let all = async {
            if let Some(message) = error
                && events.send(Event::Error { message }).await.is_err()
            {
                return None;
            }
            drop(events);
            written.await.ok()
        };
        let written = tokio::time::timeout(STOP_TIMEOUT, all).await.ok().flatten();
        if written.is_some() {
            unsaid = None;
        }
        if let Some(message) = unsaid {
            complain(message);
        }
        match written {
            Some(Err(error)) if error.kind() != ErrorKind::BrokenPipe => {
                complain(format_args!("cannot write to stdout: {error}"));
                false
            }
            Some(_) | None => true,
        }
    }
}

/// Says what is wrong to people. A stderr that is closed is nobody's.
pub(super) fn complain(message: impl fmt::Display) {
    drop(writeln!(io::stderr().lock(), "error: {message}"));
}

fn warn(message: impl fmt::Display) {
    drop(writeln!(io::stderr().lock(), "warning: {message}"));
}

/// Goes on with what is said on stderr when nothing can be written to stdout any more.
fn write_all(mut events: mpsc::Receiver<Event>, json: bool, unread: &AtomicBool) -> io::Result<()> {
    let mut out = BufWriter::with_capacity(64 << 10, io::stdout().lock());
    let mut written = Ok(());
    while let Some(event) = events.blocking_recv() {
        let mut next = Some(event);
        while let Some(event) = next {
            if written.is_ok() {
                written = write(&mut out, &event, json);
            } else {
                write(&mut io::sink(), &event, json).ok();
            }
            next = events.try_recv().ok();
        }
        written = written.and_then(|()| out.flush());
        unread.store(written.is_err(), Ordering::Relaxed);
    }
    written
}

fn write(out: &mut impl Write, event: &Event, json: bool) -> io::Result<()> {
    if let Event::Error { message } = event {
        if !json {
            complain(message);
            return Ok(());
        }
        tracing::error!("{message}");
    }
    if let Event::Warning { message } = event
        && !json
    {
        warn(message);
        return Ok(());
    }
    if json {
        serde_json::to_writer(&mut *out, &Json::from(event))?;
        writeln!(out)
    } else {
        writeln!(out, "{event}")
    }
}

/// An event as a machine reads it.
#[derive(Debug, Serialize)]
#[serde(tag = "event", rename_all = "snake_case")]
enum Json<'a> {
    Ready {
        listen: SocketAddr,
        #[serde(skip_serializing_if = "Option::is_none")]
        http: Option<SocketAddr>,
        keys: usize,
        revision: u64,
        root: String,
    },
    Started {
        http: SocketAddr,
    },
    Connected {
        epoch: String,
        revision: u64,
        way: String,
    },
    Disconnected {
        reason: &'a str,
    },
    Progress {
        phase: String,
        rounds: u32,
        done: u64,
        total: u64,
    },
    Held {
        writes: u64,
        deletes: u64,
        keys: u64,
    },
    Corrupt {
        keys: usize,
        example: Fields<'a>,
    },
    Verified(&'a Verdict),
    Diff {
        rounds: u32,
        bytes_sent: u64,
        bytes_received: u64,
        written: u64,
        deleted: u64,
        suppressed: u64,
        failed: u64,
        waited_ms: u64,
        elapsed_ms: u64,
        revision: u64,
        root: String,
        server_root: String,
        equal: bool,
    },
    Change {
        #[serde(flatten)]
        change: Fields<'a>,
        revision: u64,
        repair: bool,
    },
    Warning {
        message: &'a str,
    },
    Error {
        message: &'a str,
    },
}

fn milliseconds(duration: Duration) -> u64 {
    u64::try_from(duration.as_millis()).unwrap_or(u64::MAX)
}

impl<'a> From<&'a Event> for Json<'a> {
    fn from(event: &'a Event) -> Self {
        match event {
            Event::Ready { listen, http, keys, revision, root } => Self::Ready {
                listen: *listen,
                http: *http,
                keys: *keys,
                revision: revision.0,
                root: root.to_string(),
            },
            Event::Started { http } => Self::Started { http: *http },
            Event::Connected(at, way) => Self::Connected {
                epoch: at.epoch.to_string(),
                revision: at.revision.0,
                way: way.to_string(),
            },
            Event::Disconnected { reason } => Self::Disconnected { reason },
            Event::Progress(Progress { phase, rounds, done, total }) => Self::Progress {
                phase: format!("{phase:?}").to_lowercase(),
                rounds: *rounds,
                done: *done,
                total: *total,
            },
            Event::Held { writes, deletes, keys } => {
                Self::Held { writes: *writes, deletes: *deletes, keys: *keys }
            }
            Event::Corrupt { keys, example } => {
                Self::Corrupt { keys: *keys, example: Fields::of_key(example) }
            }
            Event::Verified(verdict) => Self::Verified(verdict),
            Event::Diff(report) => Self::Diff {
                rounds: report.rounds,
                bytes_sent: report.bytes_sent,
                bytes_received: report.bytes_received,
                written: report.written,
                deleted: report.deleted,
                suppressed: report.suppressed,
                failed: report.failed,
                waited_ms: milliseconds(report.waited),
                elapsed_ms: milliseconds(report.elapsed),
                revision: report.revision.0,
                root: report.root.to_string(),
                server_root: report.server_root.to_string(),
                equal: report.equal(),
            },
            Event::Change { change, revision, repair } => Self::Change {
                change: Fields::of_change(change),
                revision: revision.0,
                repair: *repair,
            },
            Event::Warning { message } => Self::Warning { message },
            Event::Error { message } => Self::Error { message },
        }
    }
}

/// An event as people read it.
impl fmt::Display for Event {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Ready { listen, http, keys, revision, root } => {
                write!(f, "ready at {listen}: {keys} keys at revision {revision}, root {root}")?;
                http.map_or(Ok(()), |http| write!(f, "; HTTP at {http}"))
            }
            Self::Started { http } => write!(f, "HTTP at {http}"),
            Self::Connected(at, way) => {
                let Position { epoch, revision, .. } = at;
                write!(f, "connected to history {epoch} at revision {revision}: {way}")
            }
            Self::Progress(Progress { phase, rounds, done, total }) => {
                write!(f, "{phase:?}: {rounds} rounds, {done} of {total} keys")
            }
            Self::Held { writes, deletes, keys } => write!(
                f,
                "held: a repair would write {writes} keys and delete {deletes} of {keys}; \
                 --allow-mass-delete lets it"
            ),
            Self::Corrupt { keys, example } => write!(
                f,
                "{keys} keys were changed behind the follower's back, {} among them",
                Shown(example)
            ),
            Self::Verified(verdict) => verdict.fmt(f),
            Self::Disconnected { reason } => write!(f, "disconnected: {reason}"),
            Self::Diff(report) => sentence(f, report),
            Self::Change { change, revision, repair } => {
                let what = if *repair { "repaired" } else { "changed" };
                write!(f, "{what} at revision {revision}: ")?;
                match change {
                    Change::Write { key, value } => {
                        write!(f, "{} is now {}", Shown(key), Shown(value))
                    }
                    Change::Delete { key } => write!(f, "{} is gone", Shown(key)),
                }
            }
            Self::Warning { message } | Self::Error { message } => message.fmt(f),
        }
    }
}

fn sentence(f: &mut fmt::Formatter<'_>, report: &DiffReport) -> fmt::Result {
    let DiffReport { rounds, bytes_sent, bytes_received, revision, root, server_root, .. } = report;
    let DiffReport { written, deleted, suppressed, failed, waited, elapsed, .. } = report;
    if report.equal() {
        write!(f, "equal at revision {revision}, root {root}")?;
    } else {
        write!(f, "NOT equal at revision {revision}, root {root}, there {server_root}")?;
    }
    write!(
        f,
        "; written {written}, deleted {deleted}, left to live changes {suppressed}, failed {failed}; \
         rounds {rounds}, bytes sent {bytes_sent}, received {bytes_received}, in {elapsed:.1?}, \
         waited {waited:.1?} of it"
    )
}

/// Bytes in quotes, cut where they are long.
pub(super) struct Shown<'a>(pub(super) &'a [u8]);

impl fmt::Display for Shown<'_> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let cut = self.0.get(..SHOWN_BYTES).unwrap_or(self.0);
        match std::str::from_utf8(cut) {
            Ok(text) => write!(f, "{text:?}")?,
            // Cut within a character.
            Err(error) if error.error_len().is_none() && cut.len() < self.0.len() => {
                let (text, _) = cut.split_at(error.valid_up_to());
                write!(f, "{:?}", String::from_utf8_lossy(text))?;
            }
            Err(_) => write!(f, "b\"{}\"", cut.escape_ascii())?,
        }
        if cut.len() < self.0.len() { write!(f, "... ({} bytes)", self.0.len()) } else { Ok(()) }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn said(event: &Event, json: bool) -> String {
        let mut out = Vec::new();
        write(&mut out, event, json).unwrap();
        String::from_utf8(out).unwrap()
    }

    #[test]
    fn changes_as_json_and_as_sentences() {
        let change = Change::write(vec![0xff], "v\n");
        let event = Event::Change { change, revision: Revision(7), repair: true };
        assert_eq!(
            said(&event, true),
            "{\"event\":\"change\",\"op\":\"write\",\"key_base64\":\"/w==\",\"value\":\"v\\n\",\
             \"revision\":7,\"repair\":true}\n"
        );
        assert_eq!(said(&event, false), "repaired at revision 7: b\"\\xff\" is now \"v\\n\"\n");
        let change = Change::delete("k");
        let event = Event::Change { change, revision: Revision(8), repair: false };
        assert_eq!(said(&event, false), "changed at revision 8: \"k\" is gone\n");
    }

    #[test]
    fn long_values_are_cut() {
        let text = "é".repeat(200);
        let shown = Shown(&text.as_bytes()[1..]).to_string();
        assert!(shown.starts_with("b\"\\xa9"), "{shown}");
        let text = format!("x{text}");
        let shown = Shown(text.as_bytes()).to_string();
        assert_eq!(shown, format!("\"x{}\"... (401 bytes)", "é".repeat(49)));
    }

    #[test]
    fn what_was_changed_behind_its_back() {
        let event = Event::Corrupt { keys: 2, example: Key::from(vec![0xff]) };
        assert_eq!(
            said(&event, true),
            "{\"event\":\"corrupt\",\"keys\":2,\"example\":{\"key_base64\":\"/w==\"}}\n"
        );
        assert_eq!(
            said(&event, false),
            "2 keys were changed behind the follower's back, b\"\\xff\" among them\n"
        );
    }

    #[test]
    fn warnings_are_json_only_on_stdout() {
        let event = Event::Warning { message: "odd".to_owned() };
        assert_eq!(said(&event, true), "{\"event\":\"warning\",\"message\":\"odd\"}\n");
        assert_eq!(said(&event, false), "");
    }

    #[test]
    fn errors_are_json_only_on_stdout() {
        let event = Event::Error { message: "no".to_owned() };
        assert_eq!(said(&event, true), "{\"event\":\"error\",\"message\":\"no\"}\n");
        assert_eq!(said(&event, false), "");
    }
}
