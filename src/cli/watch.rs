//! `tablecast watch`.

use std::process::ExitCode;

use tokio::sync::broadcast;
use tokio::sync::broadcast::error::RecvError;

use super::events::{Closed, Event, Output};
use super::follow::EVENT_CAPACITY;
use super::signals::Signals;
use super::{Failure, STOP_TIMEOUT, Watch, credentials};
use crate::{Client, ClientConfig, DiffOutcome, Error, Event as Happened, MemoryStore};

pub(super) async fn run(args: &Watch, output: &Output) -> Result<ExitCode, Failure> {
    let mut signals = Signals::new()?;
    let config = ClientConfig {
        name: "tablecast watch".to_owned(),
        token: credentials::token(args.credentials.token_file.as_deref())?,
        // Nobody relies on this table: what happened is what there is to see.
        mass_delete: None,
        scrub: false,
        event_capacity: EVENT_CAPACITY,
        ..ClientConfig::default()
    };
    let access = credentials::access(&args.connect, &args.credentials)?;
    let client = Client::start(config, MemoryStore::new(), access)?;
    let events = client.events().await?;
    client.ready().await?;
    let watched = tokio::select! {
        watched = watch(args, output, events) => watched,
        () = signals.recv() => Ok(()),
    };
    // It is of no consequence here if the farewell does not get through.
    tokio::time::timeout(STOP_TIMEOUT, client.stop()).await.ok();
    watched?;
    Ok(ExitCode::SUCCESS)
}

/// Ends when nobody reads what is said, or when the client ends.
async fn watch(
    args: &Watch,
    output: &Output,
    mut events: broadcast::Receiver<Happened>,
) -> Result<(), Error> {
    // Since the first diff: what is repaired before is how the table was.
    let mut in_step = false;
    loop {
        let event = match events.recv().await {
            Ok(event) => said(args, &mut in_step, event),
            Err(RecvError::Lagged(missed)) => {
                // The first diff may be among them.
                in_step = true;
                Some(Event::Error { message: format!("{missed} events were missed") })
            }
            Err(RecvError::Closed) => return Err(Error::Stopped),
        };
        if let Some(event) = event
            && let Err(Closed) = output.say(event).await
        {
            return Ok(());
        }
    }
}

/// What there is to say about what happened.
fn said(args: &Watch, in_step: &mut bool, event: Happened) -> Option<Event> {
    match event {
        Happened::Connected(at, way) => Some(Event::Connected(at, way)),
        Happened::Disconnected(reason) => Some(Event::Disconnected { reason }),
        Happened::Diff(DiffOutcome::Done(report)) => {
            *in_step = true;
            Some(Event::Diff(report))
        }
        Happened::Change { change, revision, repair } => {
            let wanted = (*in_step || !repair) && is_watched(args, change.key());
            wanted.then_some(Event::Change { change, revision, repair })
        }
        // A diff follows.
        Happened::Diff(DiffOutcome::Aborted(_))
        | Happened::FellBehind(_)
        | Happened::Diverged { .. }
        | Happened::Refused(_)
        | Happened::Corrupt { .. }
        // Of no concern here, or not for a table that is not guarded.
        | Happened::Progress(_)
        | Happened::Held { .. } => None,
    }
}

fn is_watched(args: &Watch, key: &[u8]) -> bool {
    let Watch { keys, prefix, .. } = args;
    let all = keys.is_empty() && prefix.is_none();
    all || keys.iter().any(|watched| watched.as_encoded_bytes() == key)
        || prefix.as_ref().is_some_and(|prefix| key.starts_with(prefix.as_encoded_bytes()))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::{Change, Revision};
    use clap::{Args as _, Command, FromArgMatches as _};

    #[test]
    fn live_changes_are_printed_from_the_connect_on() {
        let command = Watch::augment_args(Command::new("watch"));
        let matches = command.try_get_matches_from(["watch", "--connect", "localhost:1"]).unwrap();
        let args = Watch::from_arg_matches(&matches).unwrap();
        for (mut in_step, repair, printed) in
            [(false, false, true), (false, true, false), (true, false, true), (true, true, true)]
        {
            let change = Change::write("k", "v");
            let event = Happened::Change { change, revision: Revision(1), repair };
            assert_eq!(said(&args, &mut in_step, event).is_some(), printed);
        }
    }
}
