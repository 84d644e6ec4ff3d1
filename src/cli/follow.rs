//! `tablecast follow`.

use std::process::ExitCode;
use std::sync::Arc;
use std::time::{Duration, Instant};

use anyhow::anyhow;
use tablecast_actors::client as actors;
use tokio::sync::broadcast;
use tokio::sync::broadcast::error::{RecvError, TryRecvError};

use super::events::{Closed, Event, Output};
use super::file::{self, Dump};
use super::http::{Http, Table};
use super::progress::DiffBar;
use super::signals::Signals;
use super::{Failure, Follow, STOP_TIMEOUT, credentials, resume};
use crate::{
    Client, ClientConfig, DiffAborted, DiffOutcome, DiffPhase, DiffReport, Error,
    Event as Happened, MassDelete, MemoryStore, Position, Progress,
};

/// How many events the printing may lag behind the table. Then some are missed, which is said.
pub(super) const EVENT_CAPACITY: usize = 1 << 16;

/// How often it is said how far a phase of a diff is.
const PROGRESS_EVERY: Duration = Duration::from_millis(250);

/// Why it leaves.
#[derive(Debug)]
enum Left {
    /// `--once`: a diff was done, and found both tables equal or not.
    Done { equal: bool },
    /// `--once`: the repair is held.
    Held,
    /// `--once`: not in time; why there was no connection.
    TooLate(Option<String>),
    /// A signal.
    Told,
    /// Nobody reads what is printed.
    Unread,
}

pub(super) async fn run(args: &Follow, output: &Output) -> Result<ExitCode, Failure> {
    let dump = args.dump.as_deref().map(Dump::at).transpose()?;
    let store = file::load(args.load.as_deref(), args.dump.as_deref())?;
    let mut signals = Signals::new()?;
    let position = position(args, &store, output).await;
    let access = credentials::access(&args.connect, &args.credentials)?;
    let client = Client::start(config(args)?, store.clone(), access)?;
    let table = Arc::clone(client.reader());
    if let Some(position) = position {
        client.continue_from(position).await?;
    }
    let http = args.http.as_deref();
    let table_of = || Table::Follower(client.clone());
    let http = http.map(|address| Http::start(address, args.insecure, table_of()));
    let http = http.transpose()?;
    if let Some(http) = &http {
        // Nobody reads it: then that is noticed at the next event.
        output.say(Event::Started { http: http.address }).await.ok();
    }
    let mut events = client.events().await?;
    client.ready().await?;
    let bar = DiffBar::default();
    let mut follower = Follower {
        args,
        client: &client,
        output,
        bar,
        said: None,
        connected: false,
        disconnected: None,
    };
    let left = tokio::select! {
        left = follower.follow(&mut events) => left,
        () = signals.recv() => Ok(Left::Told),
        () = tokio::time::sleep(args.timeout), if args.once => {
            // What was to be said before may have taken its time.
            client.status().await.map(|status| {
                left_by(status.last_diff).unwrap_or(Left::TooLate(status.disconnected))
            })
        }
    };
    let connected = follower.connected;
    drop(follower);
    if let Some(http) = http {
        http.stop().await;
    }
    // It is of no consequence here if the farewell does not get through.
    let position = tokio::time::timeout(STOP_TIMEOUT, client.stop()).await.ok().flatten();
    let left = left?;
    if let (Some(dump), Some(path)) = (dump, &args.dump)
        && (!args.once || matches!(left, Left::Done { .. }))
    {
        // A table in the middle of a diff is none that there ever was, and an empty one need not be the server's: the file may
        // hold the last whole one. What was loaded, and is as it was, may be written, but not in place of another table.
        let may_be = if !connected && is_silent(events) {
            let load = args.load.as_deref().filter(|load| load.exists());
            load.is_some_and(|load| dump.replaces(load))
        } else {
            position.is_some()
        };
        if !args.once && !may_be {
            let path = path.display();
            return Err(Failure::Work(anyhow!(
                "{path} is as it was: the table may lack something"
            )));
        }
        dump.write(&*table)?;
        if args.resume {
            let (root, keys) = resume::root_of(&store)?;
            resume::save(path, position, root, keys)?;
        }
    }
    verdict(args, &left)
}

fn config(args: &Follow) -> Result<ClientConfig, Failure> {
    Ok(ClientConfig {
        name: args.name.clone(),
        token: credentials::token(args.credentials.token_file.as_deref())?,
        diff_every: args.diff_every,
        mass_delete: (!args.allow_mass_delete).then(MassDelete::default),
        scrub: !args.no_scrub,
        event_capacity: EVENT_CAPACITY,
        ..ClientConfig::default()
    })
}

/// Where the table stands that was loaded, if that is known.
async fn position(args: &Follow, store: &MemoryStore, output: &Output) -> Option<Position> {
    let path = args.load.as_deref().filter(|_| args.resume)?;
    match resume::load(path, || resume::root_of(store)) {
        Ok(position) => position,
        Err(error) => {
            let message = format!("a diff is needed: {error:#}");
            output.say(Event::Warning { message }).await.ok();
            None
        }
    }
}

fn verdict(args: &Follow, left: &Left) -> Result<ExitCode, Failure> {
    match left {
        Left::Done { equal: false } | Left::Held => Ok(ExitCode::FAILURE),
        Left::TooLate(why) => {
            let Follow { connect, timeout, .. } = args;
            let why = why.as_ref().map_or(String::new(), |why| format!(": {why}"));
            Err(Failure::Work(anyhow!("no diff with {connect} was done within {timeout:?}{why}")))
        }
        Left::Told if args.once => {
            Err(Failure::Work(anyhow!("told to end before a diff with {} was done", args.connect)))
        }
        // Without a word: who would read it?
        Left::Unread if args.once => Ok(ExitCode::FAILURE),
        Left::Done { equal: true } | Left::Told | Left::Unread => Ok(ExitCode::SUCCESS),
    }
}

struct Follower<'a> {
    args: &'a Follow,
    client: &'a Client,
    output: &'a Output,
    bar: DiffBar,
    /// What was said of a diff last, and when.
    said: Option<(DiffPhase, Instant)>,
    /// There was a connection, or there may have been.
    connected: bool,
    /// Why there is none, as it was said last.
    disconnected: Option<String>,
}

impl Follower<'_> {
    /// Says what happens until it is time to leave.
    async fn follow(&mut self, events: &mut broadcast::Receiver<Happened>) -> Result<Left, Error> {
        loop {
            let left = match self.bar.next(events).await {
                Ok(event) => self.happened(event).await,
                Err(RecvError::Lagged(missed)) => self.missed(missed).await?,
                Err(RecvError::Closed) => return Err(Error::Stopped),
            };
            match left {
                Ok(None) => {}
                Ok(Some(left)) => return Ok(left),
                // It goes on for those who ask over HTTP.
                Err(Closed) if self.args.http.is_some() && !self.args.once => {}
                Err(Closed) => return Ok(Left::Unread),
            }
        }
    }

    async fn happened(&mut self, event: Happened) -> Result<Option<Left>, Closed> {
        let event = match event {
            Happened::Connected(at, way) => {
                self.connected = true;
                self.disconnected = None;
                if self.args.once && way.resumes() {
                    // It comes by itself otherwise. It begins when what was missed is there, and its end is an
                    // event.
                    self.client.actor().do_send(actors::Diff);
                }
                Event::Connected(at, way)
            }
            Happened::Disconnected(reason) => {
                self.diff_ended();
                // Who is refused tries over and over.
                if self.disconnected.as_ref() == Some(&reason) {
                    return Ok(None);
                }
                self.disconnected = Some(reason.clone());
                Event::Disconnected { reason }
            }
            Happened::Change { change, revision, repair } if self.args.print => {
                Event::Change { change, revision, repair }
            }
            Happened::Progress(progress) => return self.progress(progress).await,
            Happened::Held { writes, deletes, keys } => {
                self.diff_ended();
                let said = self.output.say(Event::Held { writes, deletes, keys }).await;
                return if self.args.once { Ok(Some(Left::Held)) } else { said.map(|()| None) };
            }
            Happened::Corrupt { keys, example } => Event::Corrupt { keys, example },
            Happened::Diff(DiffOutcome::Done(report)) => return self.done(report).await,
            Happened::Diff(DiffOutcome::Aborted(why)) if !is_held(why) => {
                self.diff_ended();
                Event::Error { message: format!("no diff was done: {why}") }
            }
            Happened::Refused(error) => Event::Error { message: error.to_string() },
            Happened::Diverged { revision, root, server_root } => Event::Error {
                message: format!(
                    "the table has diverged at revision {revision}: root {root}, the server's is {server_root}"
                ),
            },
            // The diff that follows says what came of it, or what came before said so.
            Happened::Change { .. } | Happened::FellBehind(_) | Happened::Diff(_) => {
                return Ok(None);
            }
        };
        self.output.say(event).await?;
        Ok(None)
    }

    async fn progress(&mut self, progress: Progress) -> Result<Option<Left>, Closed> {
        // A bar would be in the way of what `--print` prints.
        if !self.args.print {
            self.bar.set(progress);
        }
        let due = |(phase, at): (DiffPhase, Instant)| {
            phase != progress.phase || at.elapsed() >= PROGRESS_EVERY
        };
        if self.args.json && self.said.is_none_or(due) {
            self.said = Some((progress.phase, Instant::now()));
            self.output.say(Event::Progress(progress)).await?;
        }
        Ok(None)
    }

    fn diff_ended(&mut self) {
        self.bar.clear();
        self.said = None;
    }

    async fn done(&mut self, report: DiffReport) -> Result<Option<Left>, Closed> {
        self.diff_ended();
        let equal = report.equal();
        let said = self.output.say(Event::Diff(report)).await;
        if self.args.once {
            // It is done, whether anybody reads it or not.
            return Ok(Some(Left::Done { equal }));
        }
        said.map(|()| None)
    }

    /// Among what was missed may be the diff that is waited for.
    async fn missed(&mut self, events: u64) -> Result<Result<Option<Left>, Closed>, Error> {
        self.connected = true;
        let message = format!("{events} events were missed");
        if let Err(Closed) = self.output.say(Event::Error { message }).await {
            return Ok(Err(Closed));
        }
        if !self.args.once {
            return Ok(Ok(None));
        }
        Ok(match self.client.status().await?.last_diff {
            Some(DiffOutcome::Done(report)) => self.done(report).await,
            last => Ok(left_by(last)),
        })
    }
}

/// Nor does what is left say that there was a connection.
fn is_silent(mut events: broadcast::Receiver<Happened>) -> bool {
    loop {
        match events.try_recv() {
            Ok(Happened::Connected(..)) | Err(TryRecvError::Lagged(_)) => return false,
            Ok(_) => {}
            Err(TryRecvError::Empty | TryRecvError::Closed) => return true,
        }
    }
}

/// Why `--once` leaves, if this is how the last diff ended.
fn left_by(last: Option<DiffOutcome>) -> Option<Left> {
    match last? {
        DiffOutcome::Done(report) => Some(Left::Done { equal: report.equal() }),
        DiffOutcome::Aborted(why) => is_held(why).then_some(Left::Held),
    }
}

fn is_held(why: DiffAborted) -> bool {
    matches!(why, DiffAborted::Held { .. })
}
