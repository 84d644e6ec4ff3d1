//! `tablecast verify`.

use std::cmp::Ordering;
use std::collections::BTreeSet;
use std::fmt;
use std::process::ExitCode;

use anyhow::anyhow;
use serde::{Serialize, Serializer};
use tokio::sync::broadcast;
use tokio::sync::broadcast::error::RecvError;

use super::events::{Event, Output, Shown};
use super::follow::EVENT_CAPACITY;
use super::ndjson::Fields;
use super::progress::DiffBar;
use super::signals::Signals;
use super::{Failure, STOP_TIMEOUT, Verify, credentials, file};
use crate::{
    Client, ClientConfig, DiffOutcome, DiffReport, Error, Event as Happened, Hash, Key,
    Reader as _, Revision, StoreError, Value,
};

/// How a file and a server's table compare.
#[derive(Debug, Serialize)]
pub(super) struct Verdict {
    equal: bool,
    revision: Revision,
    server_root: Hash,
    #[serde(flatten)]
    counts: Counts,
    /// Keys that changed at the server while they were compared; they are not among the others.
    changed_meanwhile: usize,
    /// The first of those that differ.
    keys: Vec<Differing>,
}

#[derive(Debug, Default, Serialize)]
struct Counts {
    missing_in_the_file: u64,
    different: u64,
    not_at_the_server: u64,
}

#[derive(Debug)]
struct Differing {
    key: Key,
    what: What,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize)]
#[serde(rename_all = "snake_case")]
enum What {
    MissingInTheFile,
    Different,
    NotAtTheServer,
}

/// What a table holds, in the order of its keys.
type Entries = Box<dyn Iterator<Item = Result<(Key, Value), StoreError>> + Send>;

pub(super) async fn run(args: &Verify, output: &Output) -> Result<ExitCode, Failure> {
    let store = file::load(Some(&args.load), None)?;
    let in_file = store.snapshot();
    let mut signals = Signals::new()?;
    let config = ClientConfig {
        name: "tablecast verify".to_owned(),
        token: credentials::token(args.credentials.token_file.as_deref())?,
        // What is repaired is a copy, however much it is.
        mass_delete: None,
        scrub: false,
        event_capacity: EVENT_CAPACITY,
        ..ClientConfig::default()
    };
    let access = credentials::access(&args.connect, &args.credentials)?;
    let client = Client::start(config, store, access)?;
    let table = client.reader().clone();
    let mut events = client.events().await?;
    client.ready().await?;
    let mut compared = Compared::default();
    let report = tokio::select! {
        report = compared.diff(&client, &mut events) => report,
        () = signals.recv() => Err(anyhow!("told to end before the tables were compared")),
        () = tokio::time::sleep(args.timeout) => Err(anyhow!("not compared within {:?}", args.timeout)),
    };
    if report.is_err()
        && let Ok(status) = client.status().await
        && let Some(reason) = status.disconnected
    {
        compared.trouble = Some(reason);
    }
    // It is of no consequence here if the farewell does not get through.
    tokio::time::timeout(STOP_TIMEOUT, client.stop()).await.ok();
    let report = report.map_err(|error| match &compared.trouble {
        Some(trouble) => error.context(format!("no verdict from {}: {trouble}", args.connect)),
        None => error.context(format!("no verdict from {}", args.connect)),
    })?;
    // The table is as the last event left it.
    loop {
        match events.recv().await {
            Ok(event) => compared.note(event),
            Err(RecvError::Lagged(missed)) => compared.missed += missed,
            Err(RecvError::Closed) => break,
        }
    }
    if compared.missed > 0 {
        let message = format!(
            "{} events were missed: keys that changed meanwhile may be among those that differ",
            compared.missed
        );
        // Nobody reads it: then nobody reads the verdict either.
        output.say(Event::Warning { message }).await.ok();
    }
    let verdict = verdict(&report, &compared.live, (in_file, table.snapshot()), args.keys)?;
    let equal = verdict.equal;
    output.say(Event::Verified(verdict)).await.ok();
    Ok(if equal { ExitCode::SUCCESS } else { ExitCode::FAILURE })
}

/// What came while the tables were compared.
#[derive(Debug, Default)]
struct Compared {
    /// Keys that changed at the server.
    live: BTreeSet<Key>,
    missed: u64,
    /// Why it takes so long.
    trouble: Option<String>,
    bar: DiffBar,
}

impl Compared {
    /// Waits for a diff.
    async fn diff(
        &mut self,
        client: &Client,
        events: &mut broadcast::Receiver<Happened>,
    ) -> anyhow::Result<DiffReport> {
        loop {
            match self.bar.next(events).await {
                Ok(Happened::Diff(DiffOutcome::Done(report))) => {
                    self.bar.clear();
                    return Ok(report);
                }
                Ok(event) => self.note(event),
                Err(RecvError::Lagged(missed)) => {
                    self.missed += missed;
                    // It may have been among them.
                    if let Some(DiffOutcome::Done(report)) = client.status().await?.last_diff {
                        self.bar.clear();
                        return Ok(report);
                    }
                }
                Err(RecvError::Closed) => return Err(Error::Stopped.into()),
            }
        }
    }

    fn note(&mut self, event: Happened) {
        match event {
            Happened::Change { change, repair: false, .. } => {
                self.live.insert(change.key().clone());
            }
            Happened::Progress(progress) => self.bar.set(progress),
            Happened::Diff(DiffOutcome::Aborted(why)) => {
                self.bar.clear();
                self.trouble = Some(why.to_string());
            }
            Happened::Disconnected(reason) => {
                self.bar.clear();
                self.trouble = Some(reason);
            }
            Happened::Refused(error) => self.trouble = Some(error.to_string()),
            Happened::Change { .. }
            | Happened::Connected(..)
            | Happened::Diff(DiffOutcome::Done(_))
            | Happened::FellBehind(_)
            | Happened::Diverged { .. }
            | Happened::Held { .. }
            | Happened::Corrupt { .. } => {}
        }
    }
}

/// Compares what was in the file with what the table is after its repair.
fn verdict(
    report: &DiffReport,
    live: &BTreeSet<Key>,
    (mut file, mut table): (Entries, Entries),
    shown: usize,
) -> Result<Verdict, StoreError> {
    let (mut counts, mut keys) = (Counts::default(), Vec::new());
    let mut ahead = (file.next().transpose()?, table.next().transpose()?);
    loop {
        let (order, key) = match &ahead {
            (None, None) => break,
            (Some((key, _)), None) => (Ordering::Less, key),
            (None, Some((key, _))) => (Ordering::Greater, key),
            (Some((key, _)), Some((other, _))) => (key.cmp(other), key.min(other)),
        };
        let what = match (order, &ahead) {
            (Ordering::Less, _) => Some(What::NotAtTheServer),
            (Ordering::Greater, _) => Some(What::MissingInTheFile),
            (Ordering::Equal, (file, table)) => (file != table).then_some(What::Different),
        };
        if let Some(what) = what.filter(|_| !live.contains(key)) {
            *counts.of(what) += 1;
            if keys.len() < shown {
                keys.push(Differing { key: key.clone(), what });
            }
        }
        if order.is_le() {
            ahead.0 = file.next().transpose()?;
        }
        if order.is_ge() {
            ahead.1 = table.next().transpose()?;
        }
    }
    Ok(Verdict {
        equal: report.equal() && counts.all() == 0,
        revision: report.revision,
        server_root: report.server_root,
        counts,
        changed_meanwhile: live.len(),
        keys,
    })
}

impl Counts {
    fn of(&mut self, what: What) -> &mut u64 {
        match what {
            What::MissingInTheFile => &mut self.missing_in_the_file,
            What::Different => &mut self.different,
            What::NotAtTheServer => &mut self.not_at_the_server,
        }
    }

    fn all(&self) -> u64 {
        self.missing_in_the_file + self.different + self.not_at_the_server
    }
}

impl Serialize for Differing {
    fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        #[derive(Serialize)]
        struct Line<'a> {
            #[serde(flatten)]
            key: Fields<'a>,
            what: What,
        }
        Line { key: Fields::of_key(&self.key), what: self.what }.serialize(serializer)
    }
}

impl fmt::Display for What {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::MissingInTheFile => "missing in the file",
            Self::Different => "different",
            Self::NotAtTheServer => "not at the server",
        })
    }
}

/// The verdict in a line, then a line a key.
impl fmt::Display for Verdict {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Self { revision, server_root, changed_meanwhile, .. } = self;
        let Counts { missing_in_the_file, different, not_at_the_server } = self.counts;
        if self.equal {
            write!(f, "equal at revision {revision}, root {server_root}")?;
        } else if self.counts.all() == 0 {
            write!(f, "not comparable: the roots differ at revision {revision}, no key does")?;
        } else {
            write!(
                f,
                "differs: {missing_in_the_file} missing in the file, {different} different, \
                 {not_at_the_server} not at the server"
            )?;
        }
        if *changed_meanwhile > 0 {
            write!(f, "; {changed_meanwhile} keys that changed meanwhile left out")?;
        }
        for Differing { key, what } in &self.keys {
            write!(f, "\n{what}: {}", Shown(key))?;
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::MemoryStore;
    use std::time::Duration;

    fn entries(keys: &[(&'static str, &'static str)]) -> Entries {
        let table: MemoryStore =
            keys.iter().map(|(key, value)| (Key::from(*key), Value::from(*value))).collect();
        table.snapshot()
    }

    fn report() -> DiffReport {
        let root = Hash::of_entry(b"", b"");
        DiffReport {
            rounds: 1,
            bytes_sent: 0,
            bytes_received: 0,
            written: 0,
            deleted: 0,
            suppressed: 0,
            failed: 0,
            waited: Duration::ZERO,
            elapsed: Duration::ZERO,
            revision: Revision(7),
            root,
            server_root: root,
        }
    }

    #[test]
    fn keys_that_changed_meanwhile_are_left_out() {
        let file = || entries(&[("a", "1"), ("b", "1"), ("c", "1"), ("e", "1")]);
        let table = || entries(&[("b", "2"), ("c", "1"), ("d", "1"), ("e", "2")]);
        let live = BTreeSet::from([Key::from("e"), Key::from("f")]);
        let found = verdict(&report(), &live, (file(), table()), 2).unwrap();
        assert_eq!(
            found.to_string(),
            "differs: 1 missing in the file, 1 different, 1 not at the server; 2 keys that changed \
             meanwhile left out\nnot at the server: \"a\"\ndifferent: \"b\""
        );
        let found = verdict(&report(), &live, (table(), table()), 2).unwrap();
        assert!(found.equal && found.to_string().starts_with("equal at revision 7, root "));
        let unequal = DiffReport { root: Hash::of_entry(b"", b"1"), ..report() };
        let found = verdict(&unequal, &live, (table(), table()), 2).unwrap();
        assert!(!found.equal && found.to_string().starts_with("not comparable"));
    }
}
