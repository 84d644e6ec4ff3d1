//! A follower's table: store and tree.

use std::fmt;
use std::sync::Arc;

use crate::change::Change;
use crate::position::Digest;
use crate::store::{Reader, Store, StoreError};
use crate::table::{apply_to_tree, build};
use crate::tree::Tree;

/// What the client owns, without the actor.
///
/// ```
/// use tablecast_protocol::{Change, MemoryStore, Replica};
///
/// let mut replica = Replica::open(MemoryStore::new()).unwrap();
/// replica.apply(&Change::write("colour", "blue")).unwrap();
/// assert_eq!(replica.tree().len(), 1);
/// ```
pub struct Replica {
    store: Box<dyn Store>,
    reader: Arc<dyn Reader>,
    tree: Tree,
}

impl Replica {
    /// A table of what a store holds already. Builds its tree in bulk.
    ///
    /// # Errors
    /// If the store cannot be read.
    pub fn open(store: impl Store) -> Result<Self, StoreError> {
        let reader = store.reader();
        let tree = build(&*reader, |_, _| Ok(()))?;
        Ok(Self { store: Box::new(store), reader, tree })
    }

    /// Applies one change to the store and, if that takes it, to the tree.
    ///
    /// # Errors
    /// If the store refuses. Both are as they were then.
    pub fn apply(&mut self, change: &Change) -> Result<(), StoreError> {
        self.apply_digested(change, &Digest::of(change))
    }

    /// Applies a change whose hashes are known.
    ///
    /// # Errors
    /// If the store refuses. Both are as they were then.
    pub fn apply_digested(&mut self, change: &Change, digest: &Digest) -> Result<(), StoreError> {
        self.store.apply(std::slice::from_ref(change))?;
        apply_to_tree(&mut self.tree, change.key(), digest);
        Ok(())
    }

    /// The tree as it is. Clone it for a snapshot: O(1).
    pub fn tree(&self) -> &Tree {
        &self.tree
    }

    /// Reads the table from any thread.
    pub fn reader(&self) -> Arc<dyn Reader> {
        Arc::clone(&self.reader)
    }
}

impl fmt::Debug for Replica {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Replica").field("len", &self.tree.len()).finish_non_exhaustive()
    }
}
