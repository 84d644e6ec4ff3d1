//! What the table was at every revision of every history, and what a follower may say about it.

use std::collections::BTreeMap;

use tablecast_actors::DiffOutcome;
use tablecast_actors::client::Event;
use tablecast_actors::protocol::{
    Change, Epoch, Key, MemoryStore, Position, Reader, Reason, Value,
};

pub type Map = BTreeMap<Key, Value>;

pub fn map(store: &MemoryStore) -> Map {
    store.snapshot().map(Result::unwrap).collect()
}

/// One history: where it began, and the changes since.
struct Past {
    epoch: Epoch,
    start: Map,
    changes: Vec<Change>,
    /// Of each key the numbers of its writes, and of its deletes. A number is counted over all histories.
    writes: BTreeMap<Key, Vec<u64>>,
    deletes: BTreeMap<Key, Vec<u64>>,
}

pub struct History {
    pasts: Vec<Past>,
    /// Of the last change.
    number: u64,
}

/// What a follower has seen of each key in a history: the number of the last change.
#[derive(Default)]
pub struct Seen {
    epoch: Option<Epoch>,
    keys: BTreeMap<Key, u64>,
}

/// The number that a value begins with.
fn number(value: &Value) -> u64 {
    value.first_chunk().map_or(0, |bytes| u64::from_be_bytes(*bytes))
}

impl History {
    /// The numbers up to this one are of what was there before.
    pub fn new(number: u64) -> Self {
        Self { pasts: Vec::new(), number }
    }

    pub fn begin(&mut self, start: Map) -> Epoch {
        let count = u8::try_from(self.pasts.len()).unwrap();
        let epoch = Epoch::from_bytes([count; 16]);
        let mut writes: BTreeMap<Key, Vec<u64>> = BTreeMap::new();
        for (key, value) in &start {
            writes.entry(key.clone()).or_default().push(number(value));
        }
        let (changes, deletes) = (Vec::new(), BTreeMap::new());
        self.pasts.push(Past { epoch, start, changes, writes, deletes });
        epoch
    }

    /// A change that the server is about to make.
    pub fn change(&mut self, key: Key, bytes: Option<usize>) -> Change {
        self.number += 1;
        let past = self.pasts.last_mut().unwrap();
        let numbers = if bytes.is_some() { &mut past.writes } else { &mut past.deletes };
        numbers.entry(key.clone()).or_default().push(self.number);
        let change = match bytes {
            Some(bytes) => {
                let mut value = self.number.to_be_bytes().to_vec();
                value.resize(8 + bytes, 0);
                Change::write(key, value)
            }
            None => Change::delete(key),
        };
        past.changes.push(change.clone());
        change
    }

    /// The table at a place.
    pub fn at(&self, position: Position) -> Map {
        let past = self.pasts.iter().find(|past| past.epoch == position.epoch).unwrap();
        let mut map = past.start.clone();
        for change in &past.changes[..usize::try_from(position.revision.0).unwrap()] {
            match change.value() {
                Some(value) => map.insert(change.key().clone(), value.clone()),
                None => map.remove(change.key()),
            };
        }
        map
    }

    /// Holds what a follower says against what there was.
    ///
    /// # Panics
    /// If it has what never was, or something older than it had; or if it says what only a fault of the protocol or of a
    /// store would lead to, and there is none of these here.
    pub fn check(&self, seen: &mut Seen, event: &Event) {
        match event {
            Event::Connected(at, _) if seen.epoch != Some(at.epoch) => {
                *seen = Seen { epoch: Some(at.epoch), keys: BTreeMap::new() };
            }
            Event::Change { change, .. } => {
                let past = self.pasts.iter().find(|past| Some(past.epoch) == seen.epoch).unwrap();
                let key = change.key();
                let last = seen.keys.get(key).copied().unwrap_or(0);
                let now = match change.value() {
                    Some(value) => {
                        let known =
                            past.writes.get(key).is_some_and(|n| n.contains(&number(value)));
                        assert!(known, "{key:?} never was {}", number(value));
                        Some(number(value)).filter(|now| *now >= last)
                    }
                    // Which of its deletes it is nobody says: the first one that may be.
                    None => {
                        let mut deletes = past.deletes.get(key).into_iter().flatten().copied();
                        let before = (!past.start.contains_key(key) && last == 0).then_some(0);
                        before.or_else(|| deletes.find(|delete| *delete >= last))
                    }
                };
                let Some(now) = now else { panic!("{change:?} is older than {last}") };
                seen.keys.insert(key.clone(), now);
            }
            Event::Diff(DiffOutcome::Done(report)) => {
                assert!(report.equal() && report.failed == 0, "{report:?}");
            }
            Event::Disconnected(reason) => {
                let broken = Reason::Protocol.to_string();
                assert!(!reason.contains(&broken), "{reason}");
            }
            Event::Diverged { .. } | Event::Corrupt { .. } | Event::Refused(_) => {
                panic!("{event:?}")
            }
            Event::Connected(..)
            | Event::FellBehind(_)
            | Event::Progress(_)
            | Event::Held { .. }
            | Event::Diff(DiffOutcome::Aborted(_)) => {}
        }
    }
}
