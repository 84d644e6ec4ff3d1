//! What the server's table was at every revision, key by key: what a follower may see.

use bytes::Bytes;
use tablecast_protocol::{Chain, Epoch, Key, Value};

/// Most keys of a table. Sets of them are the bits of a `u64`; the last bit is for all other keys.
pub(crate) const KEYS: usize = 63;

/// A follower has keys that nobody wrote.
pub(crate) const STRANGERS: u64 = 1 << KEYS;

/// The number of a write, which its value names. 0 is no value.
pub(crate) type Id = u32;

/// A value that nobody wrote.
pub(crate) const FORGED: Id = Id::MAX;

/// What each key has. 0 is nothing.
pub(crate) type Cells = [Id; KEYS];

static NAMES: [[u8; 2]; KEYS] = {
    let mut names = [[b'k', 0]; KEYS];
    let mut number = 0;
    while number < KEYS {
        names[number][1] = number as u8;
        number += 1;
    }
    names
};

/// The key of this number; the first is the empty one.
pub(crate) fn key(number: usize) -> Key {
    if number == 0 { Key::new() } else { Bytes::from_static(&NAMES[number]) }
}

/// The number of a key; `None` of one that nobody writes.
pub(crate) fn number(key: &[u8]) -> Option<usize> {
    match key {
        [] => Some(0),
        [b'k', number] if *number > 0 => Some(usize::from(*number)).filter(|key| *key < KEYS),
        _ => None,
    }
}

/// Values of the first writes, which no run allocates.
static VALUES: [[u8; 12]; 4096] = {
    let mut values = [[b'-'; 12]; 4096];
    let mut id = 0;
    while id < values.len() {
        *values[id].first_chunk_mut().unwrap() = (id as Id).to_be_bytes();
        id += 1;
    }
    values
};

/// The value of a write. Its length varies.
pub(crate) fn value(id: Id) -> Value {
    let length = 4 + id as usize % 8;
    if let Some(bytes) = VALUES.get(id as usize) {
        return Bytes::from_static(&bytes[..length]);
    }
    let mut bytes = [b'-'; 12];
    bytes[..4].copy_from_slice(&id.to_be_bytes());
    Bytes::copy_from_slice(&bytes[..length])
}

/// Whether this is the value of that write; `None` is no value, as is 0.
pub(crate) fn is(found: Option<&Value>, id: Id) -> bool {
    match found {
        None => id == 0,
        Some(found) => {
            id != 0
                && id != FORGED
                && found.len() == 4 + id as usize % 8
                && found[..4] == id.to_be_bytes()
                && found[4..].iter().all(|byte| *byte == b'-')
        }
    }
}

/// The write that a value is of.
pub(crate) fn id(found: Option<&Value>) -> Id {
    let Some(found) = found else { return 0 };
    let id = found.first_chunk().map_or(FORGED, |id| Id::from_be_bytes(*id));
    if is(Some(found), id) { id } else { FORGED }
}

/// One history of revisions.
#[derive(Clone, Debug)]
pub(crate) struct History {
    pub(crate) epoch: Epoch,
    /// Each change of each key, with its revision.
    keys: Vec<Vec<(u64, Id)>>,
    /// Where batches end, and the chain there.
    ends: Vec<(u64, Chain)>,
    head: u64,
}

impl History {
    pub(crate) fn new(epoch: Epoch, cells: &[Id]) -> Self {
        let keys = cells.iter().map(|id| vec![(0, *id)]).collect();
        Self { epoch, keys, ends: vec![(0, Chain::START)], head: 0 }
    }

    pub(crate) fn head(&self) -> u64 {
        self.head
    }

    pub(crate) fn push(&mut self, key: usize, id: Id) {
        self.head += 1;
        self.keys[key].push((self.head, id));
    }

    /// A batch ends here.
    pub(crate) fn end(&mut self, chain: Chain) {
        self.ends.push((self.head, chain));
    }

    /// Where the last batch ends that is not behind this revision, and the chain there.
    pub(crate) fn last_end(&self, revision: u64) -> (u64, Chain) {
        self.ends[self.ends.partition_point(|(end, _)| *end <= revision) - 1]
    }

    /// The last change of a key up to a revision, and when that was.
    pub(crate) fn last(&self, key: usize, revision: u64) -> (u64, Id) {
        // A flipped bit may name a key that is not used in this run.
        let Some(changes) = self.keys.get(key) else { return (0, 0) };
        *changes.iter().rev().find(|(at, _)| *at <= revision).unwrap_or(&changes[0])
    }

    pub(crate) fn at(&self, key: usize, revision: u64) -> Id {
        self.last(key, revision).1
    }

    pub(crate) fn cells(&self, revision: u64) -> Cells {
        std::array::from_fn(|key| self.at(key, revision))
    }

    /// The same, cut short: what is written next forks it.
    pub(crate) fn until(&self, revision: u64) -> Self {
        let mut cut = self.clone();
        cut.head = revision;
        cut.ends.retain(|(end, _)| *end <= revision);
        for changes in &mut cut.keys {
            let kept = changes.partition_point(|(at, _)| *at <= revision);
            changes.truncate(kept);
        }
        cut
    }
}
