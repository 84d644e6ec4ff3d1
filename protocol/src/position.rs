//! Where in a history a table stands: revision, epoch, chain.

use std::fmt;

use serde::{Deserialize, Serialize};

use crate::change::Change;
use crate::tree::{Entry, Hash, KeyHash, sent_as_bytes, shown_as_hex};

/// The number of a change: 1 for the first of an epoch, then dense, so that a gap is provable.
///
/// As a place it stands behind its change; [`Revision::ZERO`] is the place before the first.
#[derive(
    Clone, Copy, Debug, Default, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize,
)]
#[serde(transparent)]
pub struct Revision(pub u64);

impl Revision {
    /// The place before the first change.
    pub const ZERO: Self = Self(0);

    /// The revision `changes` later.
    #[must_use]
    pub const fn plus(self, changes: u64) -> Self {
        Self(self.0.saturating_add(changes))
    }

    /// The revision of the change that comes next.
    #[must_use]
    pub const fn next(self) -> Self {
        self.plus(1)
    }
}

impl fmt::Display for Revision {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.0.fmt(f)
    }
}

/// One history of revisions: 128 random bits, drawn when a server becomes ready.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct Epoch([u8; 16]);

impl Epoch {
    /// An epoch from its bytes. Draw them from a good source: two histories must not share one.
    pub const fn from_bytes(bytes: [u8; 16]) -> Self {
        Self(bytes)
    }

    /// Its bytes.
    pub const fn as_bytes(&self) -> &[u8; 16] {
        &self.0
    }
}

/// A running hash over the changes of a history, one change at a time, whatever their batches.
///
/// `chain(n) = BLAKE3(3, chain(n-1), op, hash)`, cut to 24 bytes; `op` is 1 with the entry's hash
/// for a write and 0 with the key's hash for a delete. It begins as 24 zero bytes.
///
/// ```
/// use tablecast_protocol::{Chain, Change, Digest};
///
/// let one = Chain::START.fold(&Digest::of(&Change::write("k", "1")));
/// let two = one.fold(&Digest::of(&Change::delete("k")));
/// assert_ne!(one, two);
/// ```
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct Chain([u8; Hash::BYTES]);

impl Chain {
    /// The chain of an empty history.
    pub const START: Self = Self([0; Hash::BYTES]);

    /// A chain from its bytes.
    pub const fn from_bytes(bytes: [u8; Hash::BYTES]) -> Self {
        Self(bytes)
    }

    /// Its bytes.
    pub const fn as_bytes(&self) -> &[u8; Hash::BYTES] {
        &self.0
    }

    /// The chain after one more change. Costs one BLAKE3 block.
    #[must_use]
    pub fn fold(&self, change: &Digest) -> Self {
        const CHAIN: u8 = 3;
        Self(
            *match &change.entry {
                Some(entry) => Hash::of_bytes(&[&[CHAIN], &self.0, &[1], entry.as_bytes()]),
                None => Hash::of_bytes(&[&[CHAIN], &self.0, &[0], change.key.as_bytes()]),
            }
            .as_bytes(),
        )
    }

    /// What every live frame and `SyncDone` carry of it.
    pub fn tag(&self) -> ChainTag {
        ChainTag(*self.0.first_chunk().unwrap_or(&[0; 8]))
    }
}

/// The first 8 bytes of a chain: enough to notice a foreign stream at its next frame. What is
/// *proved* is the whole chain, on connect, and the root.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct ChainTag([u8; 8]);

impl ChainTag {
    /// Its bytes.
    pub const fn as_bytes(&self) -> &[u8; 8] {
        &self.0
    }
}

/// What a follower presents when it comes back: this history, up to here, and the proof that what
/// it was sent live was that history.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct Position {
    /// Which history.
    pub epoch: Epoch,
    /// The last change of it that is in the table.
    pub revision: Revision,
    /// The chain at that revision.
    pub chain: Chain,
}

/// A position as people read it.
#[derive(Serialize, Deserialize)]
#[serde(rename = "Position")]
struct Named {
    epoch: Epoch,
    revision: Revision,
    chain: Chain,
}

// On the wire an array, and nothing else: a derived reader would take a map with the fields' names as
// well.
impl Serialize for Position {
    fn serialize<S: serde::Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        let Self { epoch, revision, chain } = *self;
        if serializer.is_human_readable() {
            return Named { epoch, revision, chain }.serialize(serializer);
        }
        (epoch, revision, chain).serialize(serializer)
    }
}

impl<'de> Deserialize<'de> for Position {
    fn deserialize<D: serde::Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        if deserializer.is_human_readable() {
            let Named { epoch, revision, chain } = Named::deserialize(deserializer)?;
            return Ok(Self { epoch, revision, chain });
        }
        let (epoch, revision, chain) = Deserialize::deserialize(deserializer)?;
        Ok(Self { epoch, revision, chain })
    }
}

/// The hashes of one change, computed once and used by tree, chain and suppression alike.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct Digest {
    /// The hash of its key.
    pub key: KeyHash,
    /// The hash of its entry; `None` for a delete.
    pub entry: Option<Hash>,
}

impl Digest {
    /// The hashes of a change. Costs one hash for a delete, two for a write.
    pub fn of(change: &Change) -> Self {
        let entry = change.value().map(|value| Hash::of_entry(change.key(), value));
        Self { key: KeyHash::of(change.key()), entry }
    }

    /// The tree's entry of `key` after the change; `None` for a delete.
    pub(crate) fn entry(&self, key: &[u8]) -> Option<Entry> {
        self.entry.map(|hash| Entry::from_hashes(key, self.key, hash))
    }
}

shown_as_hex!(Epoch, Chain, ChainTag);
sent_as_bytes!(Epoch, Chain, ChainTag);
