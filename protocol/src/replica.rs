//! A follower's table: store and tree.

use std::fmt;
use std::sync::Arc;

use crate::change::{Change, Key, Value};
use crate::position::Digest;
use crate::store::{Reader, Store, StoreError, head};
use crate::table::{apply_to_tree, build};
use crate::tree::{Entry, Hash, Tree};

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
        let digest = Digest::of(change);
        let change = std::slice::from_ref(change);
        self.store.apply(change)?;
        apply_to_tree(&mut self.tree, change, &[digest]);
        Ok(())
    }

    /// Applies changes in their order, and hands each back with the error if it was refused: of such a one
    /// neither store nor tree knows. The store gets all of them at once, and one by one if it refuses that.
    pub fn apply_all(
        &mut self,
        changes: Vec<(Change, Digest)>,
    ) -> impl Iterator<Item = (Change, Option<StoreError>)> + use<> {
        let (changes, digests): (Vec<Change>, Vec<Digest>) = changes.into_iter().unzip();
        let mut refused = Vec::new();
        if self.store.apply(&changes).is_ok() {
            apply_to_tree(&mut self.tree, &changes, &digests);
        } else {
            for (at, (change, digest)) in changes.iter().zip(&digests).enumerate() {
                let change = std::slice::from_ref(change);
                match self.store.apply(change) {
                    Ok(()) => apply_to_tree(&mut self.tree, change, std::slice::from_ref(digest)),
                    Err(error) => refused.push((at, error)),
                }
            }
        }
        let mut refused = refused.into_iter().peekable();
        changes.into_iter().enumerate().map(move |(at, change)| {
            (change, refused.next_if(|(refused, _)| *refused == at).map(|(_, error)| error))
        })
    }

    /// Puts into the tree what the store holds at this key; whether the tree said something else.
    ///
    /// # Errors
    /// If the store cannot be read.
    pub fn look_up(&mut self, key: &[u8]) -> Result<bool, StoreError> {
        let entry = self.reader.get(key)?.map(|value| Entry::new(key, &value));
        let now = entry.as_ref().map(|entry| *entry.hash());
        let before = match entry {
            Some(entry) => self.tree.insert_entry(entry),
            None => self.tree.remove(key),
        };
        Ok(before != now)
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

/// A key whose value is not what the tree says, and what it is.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Correction {
    /// The key.
    pub key: Key,
    /// Its entry in the store; `None` if it has none.
    pub entry: Option<Entry>,
}

impl Correction {
    /// Makes a tree say what the store holds at the key, which it answers.
    pub fn put_into(self, tree: &mut Tree) -> Key {
        match self.entry {
            Some(entry) => tree.insert_entry(entry),
            None => tree.remove(&self.key),
        };
        self.key
    }
}

/// Compares a tree with what the store holds, at one moment: what was changed behind the table's back.
/// Answers at most `max` keys, and why it could not read on, if it could not, or what it read was not in the order of the keys.
///
/// Roots are computed from the tree, so they do not notice what happens to values in the store. This
/// is the scrub of storage systems. Costs a hash of every value and 32 bytes of memory a key: the tree's entries are brought into
/// the order of the store's, which costs less than looking each of these up, a cache miss or two each.
///
/// ```
/// use tablecast_protocol::{Change, MemoryStore, Reader, Replica, Store, scrub};
///
/// let mut store = MemoryStore::new();
/// let mut replica = Replica::open(store.clone()).unwrap();
/// replica.apply(&Change::write("colour", "blue")).unwrap();
/// store.apply(&[Change::write("colour", "red")]).unwrap();
/// let (found, error) = scrub(replica.tree(), store.snapshot(), 10);
/// assert_eq!(found.len(), 1);
/// assert!(error.is_none());
/// ```
pub fn scrub(
    tree: &Tree,
    entries: impl Iterator<Item = Result<(Key, Value), StoreError>>,
    max: usize,
) -> (Vec<Correction>, Option<StoreError>) {
    let mut found = Vec::new();
    let mut push = |correction| {
        if found.len() < max {
            found.push(correction);
        }
    };
    let gone = |entry: &Entry| Correction { key: Key::copy_from_slice(entry.key()), entry: None };
    let mut expected: Vec<(u128, &Entry)> =
        tree.iter().map(|entry| (head(entry.key()), entry)).collect();
    expected.sort_unstable_by(|(a, entry), (b, other)| {
        a.cmp(b).then_with(|| entry.key().cmp(other.key()))
    });
    let mut expected = expected.into_iter().map(|(_, entry)| entry).peekable();
    let mut last: Option<Key> = None;
    for entry in entries {
        let (key, value) = match entry {
            Ok(entry) => entry,
            Err(error) => return (found, Some(error)),
        };
        if last.is_some_and(|last| last >= key) {
            // What was passed over may be still to come.
            found.retain(|correction| correction.entry.is_some());
            return (found, Some(StoreError::new("its keys are not in order")));
        }
        while let Some(entry) = expected.next_if(|entry| *entry.key() < *key) {
            push(gone(entry));
        }
        let entry = expected.next_if(|entry| *entry.key() == *key);
        if entry.map(Entry::hash) != Some(&Hash::of_entry(&key, &value)) {
            push(Correction { key: key.clone(), entry: Some(Entry::new(&key, &value)) });
        }
        last = Some(key);
    }
    expected.for_each(|entry| push(gone(entry)));
    (found, None)
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeMap;

    use proptest::prelude::*;

    use super::*;

    /// Keys that are the same in their first bytes, or one the other with zeros behind it.
    fn entries() -> impl Strategy<Value = BTreeMap<Key, Value>> {
        let key = (0..3_u8, 0..20_usize).prop_map(|(last, length)| {
            let mut key = vec![0; length];
            key.extend([last].iter().filter(|last| **last > 0));
            Key::from(key)
        });
        let value = (0..2_u8).prop_map(|value| Value::from(vec![value]));
        proptest::collection::btree_map(key, value, 0..40)
    }

    proptest! {
        #[test]
        fn a_scrub_finds_what_is_not_as_the_tree_says(tree in entries(), store in entries(), max in 0..50_usize) {
            let expected: Vec<Correction> = tree.keys().chain(store.keys())
                .collect::<std::collections::BTreeSet<_>>().into_iter()
                .filter(|key| tree.get(*key) != store.get(*key))
                .map(|key| Correction {
                    key: key.clone(),
                    entry: store.get(key).map(|value| Entry::new(key, value)),
                })
                .take(max)
                .collect();
            let tree = Tree::build(tree);
            let (found, error) = scrub(&tree, store.into_iter().map(Ok), max);
            prop_assert!(error.is_none());
            prop_assert_eq!(found, expected);
        }
    }

    #[test]
    fn a_store_that_is_not_in_order_is_an_error() {
        let entry = |key: &'static str| Ok((Key::from(key), Value::new()));
        let tree = Tree::build([("a", ""), ("b", "changed")]);
        for keys in [["b", "a"], ["b", "b"]] {
            let (found, error) = scrub(&tree, keys.map(entry).into_iter(), 10);
            assert_eq!(found.iter().map(|found| &*found.key).collect::<Vec<_>>(), [b"b"]);
            assert_eq!(
                error.map(|error| error.to_string()).as_deref(),
                Some("store: its keys are not in order")
            );
        }
    }
}
