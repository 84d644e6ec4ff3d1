//! A store that refuses, and that is changed behind its table's back.

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering::Relaxed};

use tablecast_protocol::{Change, Key, MemoryStore, Reader, Store, StoreError, Value};

use crate::history::number;

/// A clone is another handle on the same store.
#[derive(Clone, Default)]
pub(crate) struct FaultyStore {
    pub(crate) inner: MemoryStore,
    /// A bit a key that is refused.
    pub(crate) refused: Arc<AtomicU64>,
    /// It cannot be read as a whole.
    pub(crate) unread: Arc<AtomicBool>,
}

impl Store for FaultyStore {
    fn apply(&mut self, changes: &[Change]) -> Result<(), StoreError> {
        let refused = self.refused.load(Relaxed);
        let refuses = |change: &Change| refused >> number(change.key()).unwrap_or(63) & 1 == 1;
        match refused != 0 && changes.iter().any(refuses) {
            true => Err(StoreError::new("a change is refused")),
            false => self.inner.apply(changes),
        }
    }

    fn reader(&self) -> Arc<dyn Reader> {
        Arc::new(self.clone())
    }
}

impl Reader for FaultyStore {
    fn get(&self, key: &[u8]) -> Result<Option<Value>, StoreError> {
        self.inner.get(key)
    }

    fn len(&self) -> Result<usize, StoreError> {
        self.inner.len()
    }

    fn snapshot(&self) -> Box<dyn Iterator<Item = Result<(Key, Value), StoreError>> + Send> {
        if self.unread.load(Relaxed) {
            return Box::new(std::iter::once(Err(StoreError::new("it cannot be read"))));
        }
        self.inner.snapshot()
    }
}
