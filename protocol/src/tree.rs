//! The Merkle tree over a table.
//!
//! A 16-ary trie over the hash of the key. A subtree of up to [`LEAF_ENTRIES`] entries is a leaf,
//! one of more an inner node, so the shape (and with it the root) depends on the content alone:
//!
//! ```text
//!                       root: 40 entries
//!        nibble 0 ─────────┼── ... ──────── nibble f
//!     leaf: 3 entries   leaf: 2              (absent)
//!     00.. 02.. 0f..    71.. 7c..
//! ```
//!
//! Nodes are shared by `Arc`: a snapshot is a copy of one pointer, and a writer copies only the
//! path that it touches while a snapshot is held. Hashes are computed when somebody asks for a
//! root and cached, each beside the pointer to its node, so that a batch of writes pays once, and so
//! that a root computed on a snapshot, on any thread, is there for everyone who shares the nodes
//! above.
//!
//! The idea of a trie whose shape the keys' hashes decide is that of merklet and of Merkle search
//! trees (Auvolat and Taïani, 2019); hashing real child hashes (never their sum or XOR) is what
//! keeps a table from being forged.

mod build;
mod hash;
mod node;
mod path;

use std::hash::Hasher;

pub use hash::{Hash, KeyHash};
pub(crate) use hash::{from_hex, sent_as_bytes, shown_as_hex};
pub use node::{Entry, LEAF_ENTRIES};
use node::{Kind, Node, find};
pub use path::{KeyPrefix, Path};

/// The tree's layout and hashes on the wire; peers with different ones refuse each other.
pub const TREE_VERSION: u8 = 1;

/// A persistent Merkle trie over the keys of a table and hashes of their values.
///
/// `clone` is the snapshot: O(1), whatever its size. Equality compares roots.
///
/// ```
/// use tablecast_protocol::Tree;
///
/// let mut tree = Tree::new();
/// tree.insert(b"colour", b"blue");
/// let snapshot = tree.clone();
/// tree.insert(b"colour", b"red");
/// assert_ne!(tree.root(), snapshot.root());
/// tree.insert(b"colour", b"blue");
/// assert_eq!(tree.root(), snapshot.root());
/// assert_eq!(tree, Tree::build([("colour", "blue")]));
/// ```
#[derive(Clone, Debug, Default)]
pub struct Tree {
    top: Option<Node>,
}

impl Tree {
    /// An empty tree.
    pub fn new() -> Self {
        Self::default()
    }

    /// A tree of unsorted entries; of a key that comes twice the last value counts.
    ///
    /// Six times as fast as inserting one by one: O(n log n), with memory touched in order and, from
    /// 65,536 entries on, on all processors, for which the caller waits. No node is hashed before a
    /// root is asked for.
    pub fn build<K, V, I>(entries: I) -> Self
    where
        K: AsRef<[u8]> + Send,
        V: AsRef<[u8]> + Send,
        I: IntoIterator<Item = (K, V), IntoIter: Send>,
    {
        let entry = |(key, value): (K, V)| Entry::new(key.as_ref(), value.as_ref());
        Self { top: build::hash_and_build(entries.into_iter(), entry) }
    }

    /// How many keys there are. O(1).
    pub fn len(&self) -> usize {
        self.top.as_ref().map_or(0, Node::len)
    }

    /// Whether there is no key.
    pub fn is_empty(&self) -> bool {
        self.top.is_none()
    }

    /// Writes a key; the hash of its entry before, `None` if it is new.
    ///
    /// Costs the two hashes and one path of at most [`Path::MAX_DEPTH`] nodes.
    pub fn insert(&mut self, key: &[u8], value: &[u8]) -> Option<Hash> {
        self.insert_entry(Entry::new(key, value))
    }

    /// Writes an entry that is hashed already.
    pub fn insert_entry(&mut self, entry: Entry) -> Option<Hash> {
        node::insert(&mut self.top, 0, entry)
    }

    /// Writes entries that are hashed already; of a key that comes twice the last one counts. In a batch
    /// the nodes near the root are gone through once, and a subtree that is new is built at once.
    pub fn insert_all(&mut self, mut entries: Vec<Entry>) {
        build::sort(&mut entries);
        node::insert_all(&mut self.top, 0, &entries);
    }

    /// Deletes a key; the hash of its entry, `None` if it was absent.
    pub fn remove(&mut self, key: &[u8]) -> Option<Hash> {
        self.remove_hashed(&KeyHash::of(key), key)
    }

    /// Deletes a key whose hash is known.
    pub fn remove_hashed(&mut self, hash: &KeyHash, key: &[u8]) -> Option<Hash> {
        // Asked first, so that an absent key copies no node and clears no hash.
        self.get_hashed(hash, key)?;
        node::remove(&mut self.top, 0, hash, key)
    }

    /// The entry of a key.
    pub fn get(&self, key: &[u8]) -> Option<&Entry> {
        self.get_hashed(&KeyHash::of(key), key)
    }

    /// The entry of a key whose hash is known.
    pub fn get_hashed(&self, hash: &KeyHash, key: &[u8]) -> Option<&Entry> {
        let mut node = self.top.as_ref()?;
        let mut depth = 0;
        loop {
            match &node.kind {
                Kind::Leaf(entries) => {
                    return find(entries, depth, hash, key).ok().and_then(|at| entries.get(at));
                }
                Kind::Inner(inner) => node = inner.child(hash.nibble(depth))?,
            }
            depth += 1;
        }
    }

    /// The entries whose keys' hashes begin with these bytes.
    pub fn get_prefix(&self, prefix: KeyPrefix) -> impl Iterator<Item = &Entry> {
        let whole = prefix.as_bytes().len() * 2;
        let subtree = Path::unpack(whole, prefix.as_bytes()).map(|path| self.subtree(&path));
        subtree.into_iter().flat_map(|subtree| subtree.iter())
    }

    /// The root: two tables with one root are equal. Hashes what changed since the last time: 1.6 us a
    /// changed key of a million, on all processors if it is much.
    pub fn root(&self) -> Hash {
        self.top.as_ref().map_or_else(|| Hash::of_leaf(std::iter::empty()), build::hash)
    }

    /// All entries, in the order of their keys' hashes.
    pub fn iter(&self) -> Entries<'_> {
        self.subtree(&Path::ROOT).iter()
    }

    /// What is at a path.
    pub(crate) fn subtree(&self, path: &Path) -> Subtree<'_> {
        let Some(mut node) = self.top.as_ref() else { return Subtree::Empty };
        for depth in 0..path.depth() {
            match &node.kind {
                Kind::Leaf(entries) => return Subtree::part(entries, path),
                Kind::Inner(inner) => match inner.child(path.nibble(depth)) {
                    Some(child) => node = child,
                    None => return Subtree::Empty,
                },
            }
        }
        Subtree::Node(node)
    }
}

impl FromIterator<Entry> for Tree {
    /// A tree of entries that are hashed already; of a key that comes twice the last one counts.
    fn from_iter<I: IntoIterator<Item = Entry>>(entries: I) -> Self {
        Self { top: build::build(entries.into_iter()) }
    }
}

impl PartialEq for Tree {
    fn eq(&self, other: &Self) -> bool {
        self.root() == other.root()
    }
}

impl Eq for Tree {}

impl std::hash::Hash for Tree {
    fn hash<H: Hasher>(&self, state: &mut H) {
        self.root().hash(state);
    }
}

/// The entries below a path, as the trie would hold them were the path its root.
///
/// A leaf may stand above the path; then the part of it that is below the path is meant. So a
/// subtree has the same hash on both ends whenever it has the same entries, however the trees
/// around it are shaped.
#[derive(Clone, Copy, Debug)]
pub(crate) enum Subtree<'a> {
    Empty,
    Node(&'a Node),
    /// A part of a leaf; never empty.
    Part(&'a [Entry]),
}

impl<'a> Subtree<'a> {
    fn part(entries: &'a [Entry], path: &Path) -> Self {
        let start = entries.partition_point(|entry| entry.key_hash() < path.first());
        let tail = entries.get(start..).unwrap_or_default();
        let part = tail.get(..tail.partition_point(|entry| path.covers(entry.key_hash())));
        part.filter(|part| !part.is_empty()).map_or(Self::Empty, Self::Part)
    }

    pub(crate) fn len(&self) -> usize {
        match self {
            Self::Empty => 0,
            Self::Node(node) => node.len(),
            Self::Part(entries) => entries.len(),
        }
    }

    /// The hash of its node; `None` if it is empty.
    pub(crate) fn hash(&self) -> Option<Hash> {
        match self {
            Self::Empty => None,
            Self::Node(node) => Some(node.hash()),
            Self::Part(entries) => Some(Hash::of_leaf(entries.iter().map(Entry::hash))),
        }
    }

    /// The subtree at `path`, a child of the one that this is.
    pub(crate) fn child(&self, path: &Path) -> Self {
        match self {
            Self::Empty => Self::Empty,
            Self::Part(entries) => Self::part(entries, path),
            Self::Node(node) => match &node.kind {
                Kind::Leaf(entries) => Self::part(entries, path),
                Kind::Inner(inner) => inner
                    .child(path.nibble(path.depth().saturating_sub(1)))
                    .map_or(Self::Empty, Self::Node),
            },
        }
    }

    pub(crate) fn iter(self) -> Entries<'a> {
        let mut entries = Entries { inner: Vec::new(), leaf: [].iter(), left: self.len() };
        match self {
            Self::Empty => {}
            Self::Part(part) => entries.leaf = part.iter(),
            Self::Node(node) => entries.enter(node),
        }
        entries
    }
}

/// Entries in the order of their keys' hashes.
#[derive(Clone, Debug)]
pub struct Entries<'a> {
    /// The inner nodes on the way to the current leaf, each with the children not yet visited.
    inner: Vec<std::slice::Iter<'a, Option<Node>>>,
    leaf: std::slice::Iter<'a, Entry>,
    left: usize,
}

impl<'a> Entries<'a> {
    fn enter(&mut self, node: &'a Node) {
        match &node.kind {
            Kind::Leaf(entries) => self.leaf = entries.iter(),
            Kind::Inner(inner) => self.inner.push(inner.children.iter()),
        }
    }
}

impl<'a> Iterator for Entries<'a> {
    type Item = &'a Entry;

    fn next(&mut self) -> Option<&'a Entry> {
        loop {
            if let Some(entry) = self.leaf.next() {
                self.left -= 1;
                return Some(entry);
            }
            match self.inner.last_mut()?.next() {
                None => {
                    self.inner.pop();
                }
                Some(None) => {}
                Some(Some(node)) => self.enter(node),
            }
        }
    }

    fn size_hint(&self) -> (usize, Option<usize>) {
        (self.left, Some(self.left))
    }
}

impl ExactSizeIterator for Entries<'_> {}
