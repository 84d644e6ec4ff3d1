//! The canonical table: store, tree, and the history of its changes.

use std::collections::VecDeque;
use std::fmt;
use std::sync::Arc;

use crate::change::{Change, Key, Value};
use crate::diff::Difference;
use crate::limits::{CHANGE_OVERHEAD, LimitError, Limits};
use crate::log::Chunk;
use crate::position::{Chain, Digest, Epoch, Position, Revision};
use crate::store::{Reader, Store, StoreError};
use crate::tree::{Entry, Hash, KeyHash, KeyPrefix, Tree};
use crate::wire::LiveFrame;

/// Single changes are put together into frames of up to about this size: about as much as a
/// socket takes at once, and little enough that a change in it is not delayed by the others.
const LIVE_FRAME_BYTES: usize = 64 << 10;

/// Most keys that one turn of the server looks up for a repair, whatever their size: about a
/// millisecond of work, which is how long a repair may delay a write.
const READ_KEYS: usize = 1024;

/// Why a write did not happen. Nothing has changed then, anywhere.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum WriteError {
    /// Too large.
    #[error(transparent)]
    Limit(#[from] LimitError),
    /// The store refused.
    #[error(transparent)]
    Store(#[from] StoreError),
    /// The history would go beyond revision 2^64 - 2: it was continued from a position that nobody can have come to.
    #[error("{changes} changes are more than come behind revision {head}")]
    LastRevision {
        /// Where it stands.
        head: Revision,
        /// How many were to be written.
        changes: usize,
    },
}

/// What the server owns, without the actor: one call validates a batch, applies it to the store
/// and the tree, gives it its revisions and encodes it, once for all followers.
///
/// ```
/// use tablecast_protocol::{Change, Epoch, Limits, MemoryStore, Revision, Table};
///
/// let mut table = Table::open(MemoryStore::new(), Limits::default()).unwrap();
/// table.write(&[Change::write("filled", "before")]).unwrap();
/// table.ready(Epoch::from_bytes([7; 16]));
/// table.write(&[Change::write("a", "1"), Change::delete("b")]).unwrap();
/// assert_eq!(table.position().unwrap().revision, Revision(2));
/// table.seal();
/// let (chunk, _chain) = table.next_chunk().unwrap();
/// assert_eq!((chunk.first, chunk.keys.len()), (Revision(1), 2));
/// ```
pub struct Table {
    store: Box<dyn Store>,
    reader: Arc<dyn Reader>,
    tree: Tree,
    limits: Limits,
    /// `None` until [`Table::ready`]: changes before have no revision, and nobody sees them live.
    epoch: Option<Epoch>,
    head: Revision,
    chain: Chain,
    open: OpenFrame,
    sealed: VecDeque<(Chunk, Chain)>,
}

/// Changes that are in the table, and not in a chunk yet.
struct OpenFrame {
    frame: LiveFrame,
    first: Revision,
    before: Chain,
    keys: Vec<KeyHash>,
    /// How large the frame is at most.
    bytes: usize,
}

/// What a turn of the server read for a repair: the state of some keys at one revision.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub struct Values {
    /// The revision: every change up to it is in these values.
    pub revision: Revision,
    /// Where in the [`Difference`] the next read begins: writes first, then deletes.
    pub next: usize,
    /// Keys that are there, with their values.
    pub writes: Vec<(KeyHash, Key, Value)>,
    /// Prefixes that no key of the table begins with.
    pub deletes: Vec<KeyPrefix>,
    /// Keys whose value is not what the tree says, or could not be read.
    pub failed: Vec<KeyHash>,
}

impl Table {
    /// A table of what a store holds already. Builds its tree in bulk.
    ///
    /// # Errors
    /// If the store cannot be read, or holds something that is too large to be sent.
    pub fn open(store: impl Store, limits: Limits) -> Result<Self, StoreError> {
        let reader = store.reader();
        let tree = build(&*reader, |key, value| limits.check_entry(key, value))?;
        Ok(Self {
            store: Box::new(store),
            reader,
            tree,
            limits,
            epoch: None,
            head: Revision::ZERO,
            chain: Chain::START,
            open: OpenFrame {
                frame: LiveFrame::default(),
                first: Revision::ZERO.next(),
                before: Chain::START,
                keys: Vec::new(),
                bytes: 0,
            },
            sealed: VecDeque::new(),
        })
    }

    /// Ends the filling and begins a history. Does nothing the second time.
    pub fn ready(&mut self, epoch: Epoch) {
        self.epoch.get_or_insert(epoch);
    }

    /// Ends the filling and continues a history from this position: whoever says so knows that the
    /// store is as the table was there. Does nothing behind [`Table::ready`].
    ///
    /// A store that is older or newer than the position is noticed by verification only, not here.
    pub fn continue_from(&mut self, at: Position) {
        if self.epoch.is_none() {
            self.epoch = Some(at.epoch);
            (self.head, self.chain) = (at.revision, at.chain);
            (self.open.first, self.open.before) = (at.revision.next(), at.chain);
        }
    }

    /// Applies a batch, all or nothing. An empty batch changes nothing.
    ///
    /// Costs, beside the store: two hashes, a chain block and a path of the tree a change.
    ///
    /// # Errors
    /// If a change or the batch is too large, the store refuses, or the history has no more revisions. Nothing has changed then.
    pub fn write(&mut self, changes: &[Change]) -> Result<(), WriteError> {
        let bytes = self.limits.check_batch(changes)?;
        // Nothing could come behind the last number of all, so that it is none.
        if self.head.0.saturating_add(changes.len() as u64) == u64::MAX {
            return Err(WriteError::LastRevision { head: self.head, changes: changes.len() });
        }
        self.store.apply(changes)?;
        if self.open.bytes + bytes > LIVE_FRAME_BYTES.min(self.limits.frame_bytes) {
            self.seal();
        }
        let digests: Vec<Digest> = changes.iter().map(Digest::of).collect();
        apply_to_tree(&mut self.tree, changes, &digests);
        if self.epoch.is_some() {
            for (change, digest) in changes.iter().zip(&digests) {
                self.head = self.head.next();
                self.chain = self.chain.fold(digest);
                self.open.frame.push(change);
                self.open.keys.push(digest.key);
            }
            self.open.bytes += bytes;
        }
        Ok(())
    }

    /// Makes a chunk of what was written since the last one. The head is the end of a chunk then,
    /// so that a stream can stand exactly there.
    pub fn seal(&mut self) {
        if self.open.keys.is_empty() {
            return;
        }
        let OpenFrame { frame, first, before, keys, bytes } = &mut self.open;
        let body = frame.bytes();
        let frame = frame.take(*first, before);
        let chunk = Chunk {
            first: *first,
            before: *before,
            body: frame.len() - body,
            frame,
            keys: keys.as_slice().into(),
        };
        keys.clear();
        *bytes = 0;
        (*first, *before) = (self.head.next(), self.chain);
        self.sealed.push_back((chunk, self.chain));
    }

    /// Whether a chunk is sealed and not taken yet.
    pub fn has_chunk(&self) -> bool {
        !self.sealed.is_empty()
    }

    /// The next chunk for the log, and the chain behind it.
    pub fn next_chunk(&mut self) -> Option<(Chunk, Chain)> {
        self.sealed.pop_front()
    }

    /// Where the first chunk begins that has not been taken: where a log of it begins.
    pub fn taken(&self) -> (Revision, Chain) {
        let (next, chain) = match self.sealed.front() {
            Some((chunk, _)) => (chunk.first, chunk.before),
            None => (self.open.first, self.open.before),
        };
        (Revision(next.0.saturating_sub(1)), chain)
    }

    /// Where the history stands; `None` before [`Table::ready`].
    pub fn position(&self) -> Option<Position> {
        self.epoch.map(|epoch| Position { epoch, revision: self.head, chain: self.chain })
    }

    /// How large what is written may be.
    pub fn limits(&self) -> Limits {
        self.limits
    }

    /// The tree as it is. Clone it for a snapshot: O(1).
    pub fn tree(&self) -> &Tree {
        &self.tree
    }

    /// Reads the table from any thread.
    pub fn reader(&self) -> Arc<dyn Reader> {
        Arc::clone(&self.reader)
    }

    /// The keys of `found` from number `from` on, as they are now: up to about `max_bytes` of them,
    /// and one at the least. Each value is checked against the tree, since somebody may have
    /// changed the store behind the server's back.
    pub fn read(&mut self, found: &Difference, from: usize, max_bytes: usize) -> Values {
        self.seal();
        let mut values = Values {
            revision: self.head,
            next: from,
            writes: Vec::new(),
            deletes: Vec::new(),
            failed: Vec::new(),
        };
        let mut bytes = 0;
        while bytes < max_bytes && values.next - from < READ_KEYS {
            if let Some(entry) = found.writes.get(values.next) {
                let (hash, key) = (*entry.key_hash(), entry.key());
                match self.checked_value(entry) {
                    Ok(Some(value)) => {
                        let size = key.len() + value.len() + CHANGE_OVERHEAD;
                        if bytes > 0 && bytes + size > max_bytes {
                            break;
                        }
                        bytes += size;
                        values.writes.push((hash, Key::copy_from_slice(key), value));
                    }
                    // A live change says so.
                    Ok(None) => {}
                    // It was read all the same.
                    Err(size) => {
                        bytes += size;
                        values.failed.push(hash);
                    }
                }
            } else if let Some(prefix) = found.deletes.get(values.next - found.writes.len()) {
                if self.tree.get_prefix(*prefix).next().is_none() {
                    values.deletes.push(*prefix);
                }
                bytes += KeyHash::BYTES;
            } else {
                break;
            }
            values.next += 1;
        }
        values
    }

    /// The value of a key that the walk found; `Ok(None)` if the tree has no such key any more, an error, with how many bytes
    /// the store has, if that is not what the tree says.
    fn checked_value(&self, found: &Entry) -> Result<Option<Value>, usize> {
        let value = self.reader.get(found.key()).map_err(|_| 0);
        let hash = value.as_ref().ok().and_then(Option::as_ref);
        let hash = hash.map(|value| Hash::of_entry(found.key(), value));
        if hash == Some(*found.hash()) {
            // Then the tree is not asked, which would be a cache miss or two. Has it another entry by now,
            // the key was updated, and this value is suppressed.
            return value;
        }
        match self.tree.get_hashed(found.key_hash(), found.key()) {
            None => Ok(None),
            Some(now) if hash == Some(*now.hash()) => value,
            Some(_) => Err(value?.map_or(0, |value| value.len())),
        }
    }
}

impl fmt::Debug for Table {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Table")
            .field("len", &self.tree.len())
            .field("position", &self.position())
            .finish_non_exhaustive()
    }
}

/// The tree of what a store holds.
pub(crate) fn build(
    reader: &dyn Reader,
    check: impl Fn(&Key, &Value) -> Result<(), LimitError> + Sync,
) -> Result<Tree, StoreError> {
    let mut failed = None;
    let entries = reader.snapshot().map_while(|entry| {
        let checked = entry.and_then(|(key, value)| {
            check(&key, &value).map_err(StoreError::new).map(|()| (key, value))
        });
        checked.map_err(|error| failed = Some(error)).ok()
    });
    let tree = Tree::build(entries);
    failed.map_or(Ok(tree), Err)
}

/// Does to a tree what changes did to its store.
pub(crate) fn apply_to_tree(tree: &mut Tree, changes: &[Change], digests: &[Digest]) {
    let mut digests = digests.iter();
    for run in changes.chunk_by(|a, b| a.value().is_some() == b.value().is_some()) {
        let mut writes = Vec::with_capacity(run.len());
        for (change, digest) in run.iter().zip(&mut digests) {
            match digest.entry(change.key()) {
                Some(entry) => writes.push(entry),
                None => drop(tree.remove_hashed(&digest.key, change.key())),
            }
        }
        tree.insert_all(writes);
    }
}
