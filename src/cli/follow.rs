//! `tablecast follow`.

use std::process::ExitCode;
use std::sync::Arc;

use anyhow::anyhow;
use tokio::sync::broadcast;
use tokio::sync::broadcast::error::RecvError;

use super::events::{Closed, Event, Output};
use super::file::{self, Dump};
use super::progress::Progress;
use super::signals::Signals;
use super::{Failure, Follow, STOP_TIMEOUT};
use crate::access::tcp::TcpAccess;
use crate::{Client, ClientConfig, DiffOutcome, DiffReport, Error, Event as Happened};

/// How many events the printing may lag behind the table. Then some are missed, which is said.
const EVENT_CAPACITY: usize = 1 << 16;

/// Why it leaves.
#[derive(Debug)]
enum Left {
    /// `--once`: a diff was done, and found both tables equal or not.
    Done { equal: bool },
    /// `--once`: not in time.
    TooLate,
    /// A signal.
    Told,
    /// Nobody reads what is printed.
    Unread,
}

pub(super) async fn run(args: &Follow, output: &Output) -> Result<ExitCode, Failure> {
    let dump = args.dump.as_deref().map(Dump::at).transpose()?;
    let store = file::load(args.load.as_deref())?;
    let mut signals = Signals::new()?;
    let client = Client::start(config(args), store, TcpAccess::new(&*args.connect))?;
    let table = Arc::clone(client.reader());
    let events = client.events().await?;
    client.ready().await?;
    let mut follower = Follower { args, client: &client, output, repairing: None };
    let left = tokio::select! {
        left = follower.follow(events) => left,
        () = signals.recv() => Ok(Left::Told),
        () = tokio::time::sleep(args.timeout), if args.once => Ok(Left::TooLate),
    };
    drop(follower);
    // It is of no consequence here if the farewell does not get through.
    tokio::time::timeout(STOP_TIMEOUT, client.stop()).await.ok();
    let left = left?;
    // A table that was to be compared and was not is none to be taken for the server's.
    if let Some(dump) = dump
        && (!args.once || matches!(left, Left::Done { .. }))
    {
        dump.write(&*table)?;
    }
    verdict(args, &left)
}

fn config(args: &Follow) -> ClientConfig {
    ClientConfig {
        name: "tablecast follow".to_owned(),
        diff_every: args.diff_every,
        event_capacity: EVENT_CAPACITY,
        ..ClientConfig::default()
    }
}

fn verdict(args: &Follow, left: &Left) -> Result<ExitCode, Failure> {
    match left {
        Left::Done { equal: false } => Ok(ExitCode::FAILURE),
        Left::TooLate => {
            let Follow { connect, timeout, .. } = args;
            Err(Failure::Work(anyhow!("no diff with {connect} was done within {timeout:?}")))
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
    /// Since the first repair of a diff.
    repairing: Option<Progress>,
}

impl Follower<'_> {
    /// Says what happens until it is time to leave.
    async fn follow(&mut self, mut events: broadcast::Receiver<Happened>) -> Result<Left, Error> {
        loop {
            let left = match events.recv().await {
                Ok(event) => self.happened(event).await,
                Err(RecvError::Lagged(missed)) => self.missed(missed).await?,
                Err(RecvError::Closed) => return Err(Error::Stopped),
            };
            match left {
                Ok(None) => {}
                Ok(Some(left)) => return Ok(left),
                Err(Closed) => return Ok(Left::Unread),
            }
        }
    }

    async fn happened(&mut self, event: Happened) -> Result<Option<Left>, Closed> {
        let event = match event {
            Happened::Connected(at, way) => Event::Connected(at, way),
            Happened::Disconnected(reason) => {
                self.repairing = None;
                Event::Disconnected { reason }
            }
            Happened::Change { change, revision, repair } => {
                if self.args.print {
                    Event::Change { change, revision, repair }
                } else {
                    if repair {
                        self.repaired();
                    }
                    return Ok(None);
                }
            }
            Happened::Diff(DiffOutcome::Done(report)) => return self.done(report).await,
            Happened::Diff(DiffOutcome::Aborted(why)) => {
                self.repairing = None;
                Event::Error { message: format!("no diff was done: {why}") }
            }
            Happened::Refused(error) => Event::Error { message: error.to_string() },
            Happened::Diverged { revision, root, server_root } => Event::Error {
                message: format!(
                    "the table has diverged at revision {revision}: root {root}, the server's is {server_root}"
                ),
            },
            // The diff that follows says what came of it.
            Happened::FellBehind(_)
            | Happened::Progress(_)
            | Happened::Held { .. }
            | Happened::Corrupt { .. } => return Ok(None),
        };
        self.output.say(event).await?;
        Ok(None)
    }

    async fn done(&mut self, report: DiffReport) -> Result<Option<Left>, Closed> {
        self.repairing = None;
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
        let message = format!("{events} events were missed");
        if let Err(Closed) = self.output.say(Event::Error { message }).await {
            return Ok(Err(Closed));
        }
        if self.args.once
            && let Some(DiffOutcome::Done(report)) = self.client.status().await?.last_diff
        {
            return Ok(self.done(report).await);
        }
        Ok(Ok(None))
    }

    /// One more key. A bar would be in the way of what `--print` prints.
    fn repaired(&mut self) {
        self.repairing.get_or_insert_with(|| Progress::of_keys("repairing")).advance(1);
    }
}
