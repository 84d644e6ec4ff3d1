//! Where values live: what a user implements on either side, and the one in memory.

use std::cmp::Ordering;
use std::fmt;
use std::sync::{Arc, PoisonError, RwLock};

use equivalent::{Comparable, Equivalent};
use imbl::OrdMap;

use crate::change::{Change, Key, Value};

/// What a store says when it does not do what it was told. The text is for people.
#[derive(Debug, thiserror::Error)]
#[error("store: {0}")]
pub struct StoreError(#[source] Box<dyn std::error::Error + Send + Sync>);

impl StoreError {
    /// An error from whatever the storage underneath said.
    pub fn new(error: impl Into<Box<dyn std::error::Error + Send + Sync>>) -> Self {
        Self(error.into())
    }
}

/// Holds the values of a table. Owned by one actor, which alone writes; read by anyone.
///
/// Synchronous: a store may block, and then blocks its own actor only.
///
/// ```
/// use tablecast_protocol::{Change, MemoryStore, Reader, Store};
///
/// let mut store = MemoryStore::new();
/// store.apply(&[Change::write("colour", "blue")]).unwrap();
/// let reader = store.reader();
/// assert_eq!(reader.get(b"colour").unwrap().as_deref(), Some(&b"blue"[..]));
/// ```
pub trait Store: Send + 'static {
    /// Applies changes in their order, all or nothing. A server passes a whole batch; a follower what came
    /// in one frame, and that change by change if it is refused.
    ///
    /// # Errors
    /// If it refuses: then it must be as it was before. No change is made anywhere else.
    fn apply(&mut self, changes: &[Change]) -> Result<(), StoreError>;

    /// A reader of what has been applied, now and later. Called once.
    fn reader(&self) -> Arc<dyn Reader>;
}

/// Reads a store, from any thread, while its owner writes.
pub trait Reader: Send + Sync {
    /// The value of a key.
    ///
    /// # Errors
    /// If the storage underneath fails.
    fn get(&self, key: &[u8]) -> Result<Option<Value>, StoreError>;

    /// How many keys there are.
    ///
    /// # Errors
    /// If the storage underneath fails.
    fn len(&self) -> Result<usize, StoreError>;

    /// Whether there is no key.
    ///
    /// # Errors
    /// If the storage underneath fails.
    fn is_empty(&self) -> Result<bool, StoreError> {
        Ok(self.len()? == 0)
    }

    /// All keys and values as they are at one moment, in the order of the keys' bytes.
    fn snapshot(&self) -> Box<dyn Iterator<Item = Result<(Key, Value), StoreError>> + Send>;
}

/// A store in memory: an ordered map whose snapshots are O(1).
///
/// A clone is another handle on the same map: keep one to read, or to change the map behind the
/// table's back in a test.
#[derive(Clone, Default)]
pub struct MemoryStore {
    map: Arc<RwLock<Map>>,
}

type Map = OrdMap<Headed, Value>;

/// A key with its first bytes in place: comparisons are decided there, and a key that is somewhere else
/// in memory costs a cache miss each.
#[derive(Clone)]
struct Headed {
    head: u128,
    key: Key,
}

/// The same for a lookup, without a key of its own.
struct Wanted<'a> {
    head: u128,
    key: &'a [u8],
}

/// The first 16 bytes, in their order; a shorter key ends with zeros. Where two are the same the keys
/// themselves decide.
pub(crate) fn head(key: &[u8]) -> u128 {
    let mut head = [0; 16];
    let length = key.len().min(head.len());
    if let (Some(head), Some(key)) = (head.get_mut(..length), key.get(..length)) {
        head.copy_from_slice(key);
    }
    u128::from_be_bytes(head)
}

impl Headed {
    fn new(key: Key) -> Self {
        Self { head: head(&key), key }
    }
}

impl Wanted<'_> {
    fn new(key: &[u8]) -> Wanted<'_> {
        Wanted { head: head(key), key }
    }
}

impl PartialEq for Headed {
    fn eq(&self, other: &Self) -> bool {
        self.cmp(other).is_eq()
    }
}

impl Eq for Headed {}

impl PartialOrd for Headed {
    fn partial_cmp(&self, other: &Self) -> Option<Ordering> {
        Some(self.cmp(other))
    }
}

impl Ord for Headed {
    fn cmp(&self, other: &Self) -> Ordering {
        Wanted { head: self.head, key: &self.key }.compare(other)
    }
}

impl Equivalent<Headed> for Wanted<'_> {
    fn equivalent(&self, other: &Headed) -> bool {
        self.compare(other).is_eq()
    }
}

impl Comparable<Headed> for Wanted<'_> {
    fn compare(&self, other: &Headed) -> Ordering {
        self.head.cmp(&other.head).then_with(|| {
            let lengths = (self.key.len(), other.key.len());
            if lengths.0.max(lengths.1) <= size_of::<u128>() {
                // All of both is in the heads, and one is the other with zeros behind it.
                lengths.0.cmp(&lengths.1)
            } else {
                self.key.cmp(&other.key)
            }
        })
    }
}

impl MemoryStore {
    /// An empty store.
    pub fn new() -> Self {
        Self::default()
    }

    fn map(&self) -> Map {
        self.map.read().unwrap_or_else(PoisonError::into_inner).clone()
    }
}

impl FromIterator<(Key, Value)> for MemoryStore {
    fn from_iter<I: IntoIterator<Item = (Key, Value)>>(entries: I) -> Self {
        let entries = entries.into_iter().map(|(key, value)| (Headed::new(key), value));
        Self { map: Arc::new(RwLock::new(entries.collect())) }
    }
}

impl Store for MemoryStore {
    fn apply(&mut self, changes: &[Change]) -> Result<(), StoreError> {
        let mut map = self.map.write().unwrap_or_else(PoisonError::into_inner);
        for change in changes {
            match change {
                Change::Write { key, value } => map.insert(Headed::new(key.clone()), value.clone()),
                Change::Delete { key } => map.remove(&Wanted::new(key)),
            };
        }
        Ok(())
    }

    fn reader(&self) -> Arc<dyn Reader> {
        Arc::new(self.clone())
    }
}

impl Reader for MemoryStore {
    fn get(&self, key: &[u8]) -> Result<Option<Value>, StoreError> {
        let map = self.map.read().unwrap_or_else(PoisonError::into_inner);
        Ok(map.get(&Wanted::new(key)).cloned())
    }

    fn len(&self) -> Result<usize, StoreError> {
        Ok(self.map.read().unwrap_or_else(PoisonError::into_inner).len())
    }

    fn snapshot(&self) -> Box<dyn Iterator<Item = Result<(Key, Value), StoreError>> + Send> {
        Box::new(self.map().into_iter().map(|(Headed { key, .. }, value)| Ok((key, value))))
    }
}

impl fmt::Debug for MemoryStore {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("MemoryStore").field("len", &self.map().len()).finish()
    }
}
