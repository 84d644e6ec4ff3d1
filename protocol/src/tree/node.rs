//! Leaves, inner nodes and entries; how they split, merge and hash.

use std::cmp::Ordering;
use std::fmt;
use std::hint::black_box;
use std::sync::Arc;

use super::hash::CachedHash;
use super::{Hash, KeyHash, Path};

/// A subtree of at most this many entries is one leaf; of more, an inner node.
///
/// 32 keeps a table of a million at four levels (15 entries in a leaf on the average), at 60 bytes
/// beside each key; with 16, almost half of its keys would sit in leaves of one or two.
pub const LEAF_ENTRIES: usize = 32;

/// One key of the table, as the tree knows it: the value stays in the store.
#[derive(Clone, PartialEq, Eq, Hash)]
pub struct Entry {
    pub(super) key_hash: KeyHash,
    pub(super) hash: Hash,
    key: StoredKey,
}

/// A key of up to 22 bytes lives inside its entry (and so in the leaf's own memory).
#[derive(Clone, PartialEq, Eq, Hash)]
enum StoredKey {
    Short { length: u8, bytes: [u8; 22] },
    Long(Arc<[u8]>),
}

impl Entry {
    /// The entry of `key` with `value`; costs two hashes.
    pub fn new(key: &[u8], value: &[u8]) -> Self {
        Self::from_hashes(key, KeyHash::of(key), Hash::of_entry(key, value))
    }

    pub(crate) fn from_hashes(key: &[u8], key_hash: KeyHash, hash: Hash) -> Self {
        let mut bytes = [0; 22];
        let key = match (bytes.get_mut(..key.len()), u8::try_from(key.len())) {
            (Some(room), Ok(length)) => {
                room.copy_from_slice(key);
                StoredKey::Short { length, bytes }
            }
            _ => StoredKey::Long(Arc::from(key)),
        };
        Self { key_hash, hash, key }
    }

    /// The key.
    pub fn key(&self) -> &[u8] {
        match &self.key {
            StoredKey::Short { length, bytes } => {
                bytes.get(..usize::from(*length)).unwrap_or_default()
            }
            StoredKey::Long(bytes) => bytes,
        }
    }

    /// The key's hash: its place in the trie.
    pub fn key_hash(&self) -> &KeyHash {
        &self.key_hash
    }

    /// The hash of key and value.
    pub fn hash(&self) -> &Hash {
        &self.hash
    }

    /// The order of the trie: by the key's hash, then (should two collide) by the key.
    pub(super) fn order(&self) -> (&KeyHash, &[u8]) {
        (&self.key_hash, self.key())
    }
}

impl fmt::Debug for Entry {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{:?}={:?}", self.key().escape_ascii().to_string(), self.hash)
    }
}

/// A node as whoever is above it holds it, its parent or the tree.
///
/// Its kind and its hash are kept there. So a parent is hashed, and compared in a walk, by what is
/// in its own memory: 15 siblings of a changed node would be 15 cache misses.
#[derive(Clone, Debug)]
pub(crate) struct Node {
    /// Empty from a change in the node or below it until somebody asks.
    hash: CachedHash,
    pub(super) kind: Kind,
}

#[derive(Clone, Debug)]
pub(super) enum Kind {
    /// In the order of the trie; never empty. One piece of memory, of which the parent knows where it
    /// is and how long, so that a search begins with the entry and not with a header. A new key
    /// copies it: it would have to move up half of the entries anyway.
    Leaf(Arc<[Entry]>),
    Inner(Arc<Inner>),
}

#[derive(Debug)]
pub(super) struct Inner {
    pub(super) len: usize,
    pub(super) children: [Option<Node>; 16],
}

/// The place of a key among the entries of a leaf, or the place where it belongs.
///
/// Hashes are spread evenly, so the search begins where the key would be if they were spread
/// perfectly, and goes on from neighbour to neighbour. That touches two or three cache lines
/// where halving touches five, each of them a miss in a large table.
pub(super) fn find(
    entries: &[Entry],
    depth: usize,
    hash: &KeyHash,
    key: &[u8],
) -> Result<usize, usize> {
    let order = |at: usize| entries.get(at).map(|there| there.order().cmp(&(hash, key)));
    let mut at = (entries.len() * hash.below(depth)) >> 16;
    while order(at) == Some(Ordering::Less) {
        at += 1;
    }
    loop {
        match order(at) {
            Some(Ordering::Equal) => return Ok(at),
            Some(Ordering::Less) => return Err(at + 1),
            Some(Ordering::Greater) | None if at == 0 => return Err(0),
            Some(Ordering::Greater) | None => at -= 1,
        }
    }
}

impl Clone for Inner {
    fn clone(&self) -> Self {
        self.touch();
        Self { len: self.len, children: self.children.clone() }
    }
}

impl Inner {
    /// Loads what a copy is going to count up, 16 references in 16 places, all at once. Counting
    /// waits for memory each time: without this a write below a snapshot takes a seventh longer.
    fn touch(&self) {
        for child in self.children.iter().flatten() {
            black_box(match &child.kind {
                Kind::Leaf(entries) => Arc::strong_count(entries),
                Kind::Inner(inner) => Arc::strong_count(inner),
            });
        }
    }

    /// Bit n is set if there is a child at nibble n.
    pub(super) fn present(&self) -> u16 {
        (0..16).zip(&self.children).filter(|(_, child)| child.is_some()).map(|(n, _)| 1 << n).sum()
    }

    pub(super) fn child(&self, nibble: usize) -> Option<&Node> {
        self.children.get(nibble).and_then(Option::as_ref)
    }

    /// All entries below as one leaf.
    fn into_leaf(self) -> Node {
        let mut entries = Vec::with_capacity(self.len);
        self.children.into_iter().flatten().for_each(|child| child.into_entries(&mut entries));
        Node::leaf(entries.into())
    }

    fn slot(&mut self, nibble: usize) -> &mut Option<Node> {
        self.children.get_mut(nibble).expect("a nibble is below 16")
    }
}

impl Node {
    fn leaf(entries: Arc<[Entry]>) -> Self {
        Self { hash: CachedHash::default(), kind: Kind::Leaf(entries) }
    }

    fn inner(inner: Inner) -> Self {
        Self { hash: CachedHash::default(), kind: Kind::Inner(Arc::new(inner)) }
    }

    pub(super) fn hash(&self) -> Hash {
        self.hash.get_or(|| match &self.kind {
            Kind::Leaf(entries) => Hash::of_leaf(entries.iter().map(Entry::hash)),
            Kind::Inner(inner) => {
                let children = inner.children.iter().flatten();
                Hash::of_inner(inner.present(), children.map(Self::hash))
            }
        })
    }

    /// The nodes one level below that are to be hashed.
    pub(super) fn unhashed(&self) -> impl Iterator<Item = &Self> {
        let children = match &self.kind {
            Kind::Inner(inner) => inner.children.as_slice(),
            Kind::Leaf(_) => &[],
        };
        children.iter().flatten().filter(|child| !child.hash.is_known())
    }

    pub(super) fn len(&self) -> usize {
        match &self.kind {
            Kind::Leaf(entries) => entries.len(),
            Kind::Inner(inner) => inner.len,
        }
    }

    /// A subtree of these entries, which are in the order of the trie.
    pub(super) fn build(sorted: &[Entry], depth: usize) -> Self {
        if sorted.len() <= LEAF_ENTRIES || depth == Path::MAX_DEPTH {
            return Self::leaf(sorted.into());
        }
        let mut left = sorted;
        let children = std::array::from_fn(|nibble| {
            let here = left.partition_point(|entry| entry.key_hash.nibble(depth) == nibble);
            let (here, behind) = left.split_at(here);
            left = behind;
            (!here.is_empty()).then(|| Self::build(here, depth + 1))
        });
        Self::inner(Inner { len: sorted.len(), children })
    }

    /// The node over these children: what fits a leaf is a leaf, so the shape follows the content.
    pub(super) fn join(children: [Option<Self>; 16]) -> Option<Self> {
        let len = children.iter().flatten().map(Self::len).sum();
        let inner = Inner { len, children };
        match len {
            0 => None,
            1..=LEAF_ENTRIES => Some(inner.into_leaf()),
            _ => Some(Self::inner(inner)),
        }
    }

    fn into_entries(self, into: &mut Vec<Entry>) {
        match self.kind {
            Kind::Leaf(entries) => into.extend_from_slice(&entries),
            Kind::Inner(inner) => {
                let children = inner.children.iter().flatten();
                children.for_each(|child| child.clone().into_entries(into));
            }
        }
    }
}

/// Puts an entry below `slot`, a node at `depth`; the hash that the key had before.
pub(super) fn insert(slot: &mut Option<Node>, depth: usize, entry: Entry) -> Option<Hash> {
    let Some(node) = slot else {
        *slot = Some(Node::leaf(Arc::new([entry])));
        return None;
    };
    node.hash.forget();
    match &mut node.kind {
        Kind::Inner(inner) => {
            let inner = Arc::make_mut(inner);
            let nibble = entry.key_hash.nibble(depth);
            let old = insert(inner.slot(nibble), depth + 1, entry);
            inner.len += usize::from(old.is_none());
            old
        }
        Kind::Leaf(entries) => match find(entries, depth, &entry.key_hash, entry.key()) {
            Ok(at) => {
                let there = Arc::make_mut(entries).get_mut(at);
                let there = there.expect("the search found this place");
                Some(std::mem::replace(&mut there.hash, entry.hash))
            }
            Err(at) => {
                let (before, behind) = entries.split_at(at);
                let all = before.iter().cloned().chain([entry]).chain(behind.iter().cloned());
                let count = entries.len() + 1;
                if count <= LEAF_ENTRIES || depth == Path::MAX_DEPTH {
                    *entries = all.collect();
                } else {
                    let all: Vec<Entry> = all.collect();
                    *node = Node::build(&all, depth);
                }
                None
            }
        },
    }
}

/// Puts entries, which are in the order of the trie, below `slot`, a node at `depth`; how many keys are new.
pub(super) fn insert_all(slot: &mut Option<Node>, depth: usize, entries: &[Entry]) -> usize {
    match entries {
        // Copies no node and clears no hash.
        [] => return 0,
        [entry] => return usize::from(insert(slot, depth, entry.clone()).is_none()),
        _ => {}
    }
    let Some(node) = slot else {
        *slot = Some(Node::build(entries, depth));
        return entries.len();
    };
    let before = node.len();
    match &mut node.kind {
        Kind::Inner(inner) => {
            let mut left = entries;
            let inner = Arc::make_mut(inner);
            while let Some(first) = left.first() {
                let nibble = first.key_hash.nibble(depth);
                let here = left.partition_point(|entry| entry.key_hash.nibble(depth) == nibble);
                let (here, behind) = left.split_at(here);
                inner.len += insert_all(inner.slot(nibble), depth + 1, here);
                left = behind;
            }
            node.hash.forget();
        }
        Kind::Leaf(there) => *node = Node::build(&merge(there, entries), depth),
    }
    node.len() - before
}

/// Both in the order of the trie; of a key in both, the entry of `new`.
fn merge(old: &[Entry], new: &[Entry]) -> Vec<Entry> {
    let mut merged = Vec::with_capacity(old.len() + new.len());
    let mut old = old.iter().peekable();
    for entry in new {
        while let Some(before) = old.next_if(|old| old.order() < entry.order()) {
            merged.push(before.clone());
        }
        old.next_if(|old| old.order() == entry.order());
        merged.push(entry.clone());
    }
    merged.extend(old.cloned());
    merged
}

/// Takes an entry from below `slot`, a node at `depth`; the hash that the key had.
///
/// The caller knows that it is there: an absent key would clear hashes and copy shared nodes.
pub(super) fn remove(
    slot: &mut Option<Node>,
    depth: usize,
    hash: &KeyHash,
    key: &[u8],
) -> Option<Hash> {
    let node = slot.as_mut()?;
    node.hash.forget();
    let old = match &mut node.kind {
        Kind::Leaf(entries) => {
            let at = find(entries, depth, hash, key).ok()?;
            let (before, behind) = entries.split_at(at);
            let (old, behind) = behind.split_first()?;
            let old = old.hash;
            *entries = before.iter().chain(behind).cloned().collect();
            old
        }
        Kind::Inner(inner) => {
            let inner = Arc::make_mut(inner);
            let old = remove(inner.slot(hash.nibble(depth)), depth + 1, hash, key)?;
            inner.len -= 1;
            if inner.len <= LEAF_ENTRIES {
                *node = inner.clone().into_leaf();
            }
            old
        }
    };
    if node.len() == 0 {
        *slot = None;
    }
    Some(old)
}
