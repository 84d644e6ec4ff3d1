//! The diff: how two ends find out where their trees differ, without sending either.
//!
//! The server asks and the follower answers, as in sdiff; but one [`Query`] asks for *all*
//! differing nodes of a level, and a subtree with few entries is answered with its entries at once.
//!
//! ```text
//! Walk (server, over a snapshot)              answer (follower, over a snapshot)
//!   roots differ
//!   Query { depth 0, nodes: [/] }        ->   the hashes below, two levels of them
//!   Query { depth 2, nodes: [/a0, /3f] } ->   /a0: 16 hashes, /3f: 16 hashes
//!   Query { depth 3, nodes: [/a07] }     ->   /a07: 21 entries
//!   Done: keys to write, prefixes to delete
//! ```
//!
//! Hashes are cut short on the wire ([`Widths::SHORT`]). What that can cost is a difference that
//! is not seen, never a wrong repair: repairs carry whole keys and values, and deletes are named
//! as [`KeyPrefix`] argues. Roots are compared at full width before and after, and
//! a diff that follows a mismatch walks with [`Widths::FULL`].
//!
//! The batched breadth-first walk is that of anti-entropy in Dynamo-like stores; asking one end
//! only is sdiff's.

mod answer;
mod collect;
mod walk;

pub use answer::answer;
use bytes::Bytes;
pub use collect::collect;
use serde::{Deserialize, Serialize};
pub use walk::{Found, Step, Walk};

use crate::error::ProtocolError;
use crate::tree::{Entry, Hash, KeyHash, KeyPrefix, LEAF_ENTRIES, Path};
use crate::wire::{AsIs, Raw};

/// Most levels below a node that one query may ask for: 16^3 hashes a node.
pub const MAX_LEVELS: u8 = 3;

/// A subtree of at most this many entries, at least, is answered with its entries: the size of a
/// leaf. A walk asks for more where the sizes of the tables say that this saves a round.
pub const SMALL: u32 = 32;

/// How many bytes of each hash an answer holds.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct Widths {
    /// Of a node's hash, 1 to 24.
    pub node: u8,
    /// Of a key's hash, 1 to 16, those that the node's path tells included.
    pub key: u8,
    /// Of an entry's hash, 1 to 24.
    pub entry: u8,
}

impl Widths {
    /// For every walk but the one after a mismatch.
    ///
    /// * Nodes: 48 bits. A differing node passes for equal once in 2^48; at a hundred thousand
    ///   compared nodes that is once in three billion diffs.
    /// * Keys: 48 bits. Two of the n keys in a node must share them to be confused; in nodes of
    ///   fewer than 32 keys that already share 16 bits, that is once in ten million nodes.
    /// * Entries: 32 bits, compared for one key at a time: a changed value passes for equal once in
    ///   four billion changed keys.
    pub const SHORT: Self = Self { node: 6, key: 6, entry: 4 };

    /// Whole hashes.
    pub const FULL: Self = Self { node: 24, key: 16, entry: 24 };

    const _FULL_IS_WHOLE: () = assert!(
        Self::FULL.node as usize == Hash::BYTES
            && Self::FULL.key as usize == KeyHash::BYTES
            && Self::FULL.entry as usize == Hash::BYTES
            && SMALL as usize >= LEAF_ENTRIES
    );

    fn check(&self) -> Result<(), ProtocolError> {
        let fits = |width: u8, full: u8| (1..=full).contains(&width);
        if fits(self.node, Self::FULL.node)
            && fits(self.key, Self::FULL.key)
            && fits(self.entry, Self::FULL.entry)
        {
            Ok(())
        } else {
            Err(ProtocolError::Query { why: "a width is zero or above that of the hash" })
        }
    }

    /// The bytes of an entry's key hash that an answer for a node at `depth` holds: those that the
    /// path does not tell.
    fn key_part(&self, depth: usize) -> std::ops::Range<usize> {
        (depth / 2).min(usize::from(self.key))..usize::from(self.key)
    }
}

impl<'de> Deserialize<'de> for Widths {
    fn deserialize<D: serde::Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        let (node, key, entry) = Deserialize::deserialize(AsIs(deserializer))?;
        Ok(Self { node, key, entry })
    }
}

/// What is at these nodes? All are at one depth.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub struct Query {
    /// The depth of the nodes, 0 at the root, at most [`Path::MAX_DEPTH`].
    pub depth: u8,
    /// How many levels below each node to tell the hashes of, 1 to [`MAX_LEVELS`].
    pub levels: u8,
    /// A node of at most this many entries is answered with them instead.
    pub small: u32,
    /// How much of each hash.
    pub widths: Widths,
    /// The nodes' paths, each packed into `(depth + 1) / 2` bytes, one behind the other.
    pub nodes: Bytes,
}

// Arrays, and nothing else: a derived reader would take a map with the fields' names as well.
impl Serialize for Query {
    fn serialize<S: serde::Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        let Self { depth, levels, small, widths: Widths { node, key, entry }, nodes } = self;
        (depth, levels, small, (node, key, entry), Raw(nodes.clone())).serialize(serializer)
    }
}

impl<'de> Deserialize<'de> for Query {
    fn deserialize<D: serde::Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        let (depth, levels, small, widths, Raw(nodes)) =
            Deserialize::deserialize(AsIs(deserializer))?;
        Ok(Self { depth, levels, small, widths, nodes })
    }
}

/// Most bytes of paths in one query, whatever a frame may hold: more are asked for in the next. A follower takes
/// 17 bytes for one of them.
const QUERY_BYTES: usize = 1 << 20;

impl Query {
    /// The nodes' paths.
    ///
    /// # Errors
    /// If anything in the query is out of its range.
    pub fn paths(&self) -> Result<Vec<Path>, ProtocolError> {
        let query = |why| ProtocolError::Query { why };
        self.widths.check()?;
        let depth = usize::from(self.depth);
        if depth > Path::MAX_DEPTH {
            return Err(query("the depth is above 32"));
        }
        if !(1..=MAX_LEVELS).contains(&self.levels) {
            return Err(query("the number of levels is not 1, 2 or 3"));
        }
        if depth == 0 {
            return if self.nodes.is_empty() {
                Ok(vec![Path::ROOT])
            } else {
                Err(query("the root has no path"))
            };
        }
        if self.nodes.len() > QUERY_BYTES {
            return Err(query("the paths are above 1 MiB"));
        }
        let packed = self.nodes.chunks_exact(depth.div_ceil(2));
        if self.nodes.is_empty() || !packed.remainder().is_empty() {
            return Err(query("the paths do not fill their bytes"));
        }
        packed
            .map(|packed| Path::unpack(depth, packed).ok_or(query("a path is padded with a bit")))
            .collect()
    }
}

/// What a follower has at the nodes of a query, or at the first of them, in their order:
///
/// ```text
/// answer   = node+
/// node     = count+1 (varint), then so many entries     few entries (a 1 alone: none)
///          | 0, then children                           more
/// entry    = key hash (what the path does not tell, up to Widths::key), entry hash (Widths::entry)
/// children = bitmap (2 bytes, big endian; bit n: there is a child n), then for each child
///            its hash (Widths::node) on the last level, its children on the others
/// ```
///
/// Entries are in the order of their keys' hashes. A varint has 7 bits a byte, the lowest first,
/// the top bit set on all but the last.
pub type Answer = Bytes;

/// What to do on the follower so that its snapshot becomes the server's, or a part of it.
#[derive(Clone, Debug, Default, PartialEq, Eq, Hash)]
pub struct Difference {
    /// Entries that the follower lacks or has another value of, in the order of their keys.
    pub writes: Vec<Entry>,
    /// Where the follower has keys that the server lacks.
    pub deletes: Vec<KeyPrefix>,
}

impl Difference {
    /// How many repairs there are.
    pub fn len(&self) -> usize {
        self.writes.len() + self.deletes.len()
    }

    /// The last one to write, or to delete at when there is none to write any more. What is taken is given
    /// back by halves: deletes may be a whole table.
    pub(crate) fn pop(&mut self) -> Option<One> {
        let write = pop(&mut self.writes).map(One::Write);
        write.or_else(|| pop(&mut self.deletes).map(One::Delete))
    }

    /// Whether the snapshots are equal.
    pub fn is_empty(&self) -> bool {
        self.len() == 0
    }
}

/// One of a [`Difference`].
pub(crate) enum One {
    Write(Entry),
    Delete(KeyPrefix),
}

fn pop<T>(all: &mut Vec<T>) -> Option<T> {
    let last = all.pop();
    if all.len() < all.capacity() / 2 {
        all.shrink_to_fit();
    }
    last
}
