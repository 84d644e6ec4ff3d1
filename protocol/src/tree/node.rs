//! Leaves, inner nodes and entries; how they split, merge and hash.

use std::cmp::Ordering;
use std::fmt;
use std::sync::{Arc, OnceLock};

use super::{Hash, KeyHash, Path};

/// A subtree of at most this many entries is one leaf; of more, an inner node.
///
/// 32 keeps a table of a million at four levels (15 entries in a leaf on the average), at 60 bytes
/// beside each key; with 16, almost half of its keys would sit in leaves of one or two.
pub const LEAF_ENTRIES: usize = 32;

/// Room for this many more entries is made when a leaf is full: doubling would waste a quarter.
const LEAF_STEP: usize = 4;

/// One key of the table, as the tree knows it: the value stays in the store.
#[derive(Clone, PartialEq, Eq)]
pub struct Entry {
    pub(super) key_hash: KeyHash,
    pub(super) hash: Hash,
    key: StoredKey,
}

/// A key of up to 22 bytes lives inside its entry (and so in the leaf's own memory).
#[derive(Clone, PartialEq, Eq)]
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

/// A node as its parent holds it. The kind is told by the parent, which saves a cache miss.
#[derive(Clone, Debug)]
pub(super) enum Node {
    Leaf(Arc<Leaf>),
    Inner(Arc<Inner>),
}

#[derive(Debug, Default)]
pub(crate) struct Leaf {
    /// Empty from a change until somebody asks.
    hash: OnceLock<Hash>,
    /// In the order of the trie; never empty.
    pub(super) entries: Vec<Entry>,
}

#[derive(Debug)]
pub(crate) struct Inner {
    /// Empty from a change below it until somebody asks.
    hash: OnceLock<Hash>,
    pub(super) len: usize,
    pub(super) children: [Option<Node>; 16],
}

impl Clone for Leaf {
    /// A copy is made to be changed: with room for one more entry, and without the hash.
    fn clone(&self) -> Self {
        let mut entries = Vec::with_capacity(self.entries.len() + 1);
        entries.extend_from_slice(&self.entries);
        Self { hash: OnceLock::new(), entries }
    }
}

impl Clone for Inner {
    /// A copy is made to be changed: without the hash.
    fn clone(&self) -> Self {
        Self { hash: OnceLock::new(), len: self.len, children: self.children.clone() }
    }
}

impl Leaf {
    pub(super) fn hash(&self) -> &Hash {
        self.hash.get_or_init(|| Hash::of_leaf(self.entries.iter().map(|entry| &entry.hash)))
    }

    /// The place of a key, or the place where it belongs.
    ///
    /// Hashes are spread evenly, so the search begins where the key would be if they were spread
    /// perfectly, and goes on from neighbour to neighbour. That touches two or three cache lines
    /// where halving touches five, each of them a miss in a large table.
    pub(super) fn find(&self, depth: usize, hash: &KeyHash, key: &[u8]) -> Result<usize, usize> {
        let order = |at: usize| self.entries.get(at).map(|there| there.order().cmp(&(hash, key)));
        let mut at = (self.entries.len() * hash.below(depth)) >> 16;
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
}

impl Inner {
    pub(super) fn hash(&self) -> &Hash {
        self.hash.get_or_init(|| {
            Hash::of_inner(
                self.present(),
                self.children.iter().flatten().map(|child| *child.hash()),
            )
        })
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
        Node::Leaf(Arc::new(Leaf { hash: OnceLock::new(), entries }))
    }

    fn slot(&mut self, nibble: usize) -> &mut Option<Node> {
        self.children.get_mut(nibble).expect("a nibble is below 16")
    }
}

impl Node {
    pub(super) fn hash(&self) -> &Hash {
        match self {
            Self::Leaf(leaf) => leaf.hash(),
            Self::Inner(inner) => inner.hash(),
        }
    }

    pub(super) fn len(&self) -> usize {
        match self {
            Self::Leaf(leaf) => leaf.entries.len(),
            Self::Inner(inner) => inner.len,
        }
    }

    /// A subtree of `count` entries, which `sorted` yields next, in the order of the trie.
    pub(super) fn build(
        sorted: &mut std::vec::IntoIter<Entry>,
        count: usize,
        depth: usize,
    ) -> Self {
        if count <= LEAF_ENTRIES || depth == Path::MAX_DEPTH {
            let entries = sorted.take(count).collect();
            return Self::Leaf(Arc::new(Leaf { hash: OnceLock::new(), entries }));
        }
        let mut children = [const { None }; 16];
        let mut left = count;
        for (nibble, child) in children.iter_mut().enumerate() {
            let below = sorted.as_slice().get(..left).unwrap_or_default();
            let here = below.partition_point(|entry| entry.key_hash.nibble(depth) == nibble);
            if here > 0 {
                *child = Some(Self::build(sorted, here, depth + 1));
                left -= here;
            }
        }
        Self::Inner(Arc::new(Inner { hash: OnceLock::new(), len: count, children }))
    }

    /// A subtree of entries in any order, of which the last of a key counts.
    pub(super) fn build_unsorted(entries: Vec<Entry>, depth: usize) -> Option<Self> {
        // What is sorted are 16 bytes an entry, and then each entry moves once. The place among
        // the others keeps entries of one key in the order in which they came.
        let bits = entries.iter().map(|entry| entry.key_hash.first_bits());
        let mut places: Vec<(u64, usize)> = bits.zip(0..).collect();
        places.sort_unstable();
        let moved = places.into_iter().filter_map(|(_, at)| entries.get(at).cloned());
        let mut sorted: Vec<Entry> = moved.collect();
        drop(entries);
        if !sorted.is_sorted_by(|a, b| a.order() <= b.order()) {
            // Two hashes agree in 64 bits. Stable, and quick on what is all but sorted.
            sorted.sort_by(|a, b| a.order().cmp(&b.order()));
        }
        sorted.dedup_by(|later, kept| {
            let same = later.order() == kept.order();
            if same {
                std::mem::swap(later, kept);
            }
            same
        });
        let count = sorted.len();
        (count > 0).then(|| Self::build(&mut sorted.into_iter(), count, depth))
    }

    /// The node over these children: what fits a leaf is a leaf, so the shape follows the content.
    pub(super) fn join(children: [Option<Self>; 16]) -> Option<Self> {
        let len = children.iter().flatten().map(Self::len).sum();
        let inner = Inner { hash: OnceLock::new(), len, children };
        match len {
            0 => None,
            1..=LEAF_ENTRIES => Some(inner.into_leaf()),
            _ => Some(Self::Inner(Arc::new(inner))),
        }
    }

    fn into_entries(self, into: &mut Vec<Entry>) {
        match self {
            Self::Leaf(leaf) => into.extend_from_slice(&leaf.entries),
            Self::Inner(inner) => {
                let children = inner.children.iter().flatten();
                children.for_each(|child| child.clone().into_entries(into));
            }
        }
    }
}

/// Puts an entry below `slot`, a node at `depth`; the hash that the key had before.
pub(super) fn insert(slot: &mut Option<Node>, depth: usize, entry: Entry) -> Option<Hash> {
    match slot {
        None => {
            *slot =
                Some(Node::Leaf(Arc::new(Leaf { hash: OnceLock::new(), entries: vec![entry] })));
            None
        }
        Some(Node::Inner(inner)) => {
            let inner = Arc::make_mut(inner);
            inner.hash.take();
            let nibble = entry.key_hash.nibble(depth);
            let old = insert(inner.slot(nibble), depth + 1, entry);
            inner.len += usize::from(old.is_none());
            old
        }
        Some(Node::Leaf(leaf)) => match leaf.find(depth, &entry.key_hash, entry.key()) {
            Ok(at) => {
                let leaf = Arc::make_mut(leaf);
                leaf.hash.take();
                let there = leaf.entries.get_mut(at).expect("the search found this place");
                Some(std::mem::replace(&mut there.hash, entry.hash))
            }
            Err(at) if leaf.entries.len() < LEAF_ENTRIES || depth == Path::MAX_DEPTH => {
                let leaf = Arc::make_mut(leaf);
                leaf.hash.take();
                if leaf.entries.len() == leaf.entries.capacity() {
                    leaf.entries.reserve_exact(LEAF_STEP);
                }
                leaf.entries.insert(at, entry);
                None
            }
            Err(at) => {
                let mut entries = leaf.entries.clone();
                entries.insert(at, entry);
                let count = entries.len();
                *slot = Some(Node::build(&mut entries.into_iter(), count, depth));
                None
            }
        },
    }
}

/// Takes an entry from below `slot`, a node at `depth`; the hash that the key had.
///
/// An absent key leaves everything as it was, cached hashes and shared nodes included: `present`
/// is asked first.
pub(super) fn remove(
    slot: &mut Option<Node>,
    depth: usize,
    hash: &KeyHash,
    key: &[u8],
) -> Option<Hash> {
    let old = match slot {
        None => None,
        Some(Node::Leaf(leaf)) => {
            let at = leaf.find(depth, hash, key).ok()?;
            let leaf = Arc::make_mut(leaf);
            leaf.hash.take();
            let old = leaf.entries.remove(at);
            if leaf.entries.capacity() > leaf.entries.len() + 2 * LEAF_STEP {
                leaf.entries.shrink_to(leaf.entries.len() + LEAF_STEP);
            }
            Some(old.hash)
        }
        Some(Node::Inner(inner)) => {
            let inner = Arc::make_mut(inner);
            inner.hash.take();
            let old = remove(inner.slot(hash.nibble(depth)), depth + 1, hash, key);
            inner.len -= usize::from(old.is_some());
            old
        }
    };
    match slot {
        Some(node) if node.len() == 0 => *slot = None,
        Some(Node::Inner(inner)) if inner.len <= LEAF_ENTRIES => {
            *slot = Some(Inner::clone(inner).into_leaf());
        }
        Some(_) | None => {}
    }
    old
}
