//! A node's place in the trie, and a leading part of a key's hash.

use std::fmt;

use super::KeyHash;

/// The path from the root to a node: the first `depth` nibbles of the hashes of all keys below it.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct Path {
    nibbles: KeyHash,
    depth: u8,
}

impl Path {
    /// The longest path: two nibbles for each byte of a key's hash.
    pub const MAX_DEPTH: usize = 2 * KeyHash::BYTES;

    /// The root's.
    pub const ROOT: Self = Self { nibbles: KeyHash::from_bytes([0; KeyHash::BYTES]), depth: 0 };

    /// Where the keys of this hash are: there is none below.
    pub(crate) fn of(hash: KeyHash) -> Self {
        Self { nibbles: hash, depth: u8::try_from(Self::MAX_DEPTH).unwrap_or(u8::MAX) }
    }

    /// How many nibbles there are.
    pub fn depth(&self) -> usize {
        usize::from(self.depth)
    }

    /// The path of child `nibble` (0 to 15); `None` at the greatest depth.
    pub fn child(&self, nibble: usize) -> Option<Self> {
        let low = u8::try_from(nibble).ok().filter(|low| *low < 16)?;
        let mut bytes = *self.nibbles.as_bytes();
        let byte = bytes.get_mut(self.depth() / 2)?;
        *byte |= if self.depth().is_multiple_of(2) { low << 4 } else { low };
        Some(Self { nibbles: KeyHash::from_bytes(bytes), depth: self.depth + 1 })
    }

    /// The nibble that leads from the node at `depth` to the next one on the path.
    pub fn nibble(&self, depth: usize) -> usize {
        self.nibbles.nibble(depth)
    }

    /// Whether a key of this hash lives below the node.
    pub fn covers(&self, hash: &KeyHash) -> bool {
        let (whole, odd) = (self.depth() / 2, !self.depth().is_multiple_of(2));
        self.nibbles.as_bytes().get(..whole) == hash.as_bytes().get(..whole)
            && (!odd || self.nibble(self.depth() - 1) == hash.nibble(self.depth() - 1))
    }

    /// The least hash that lives below the node: entries are compared with it to find a range.
    pub(super) fn first(&self) -> &KeyHash {
        &self.nibbles
    }

    /// The bytes that hold the nibbles; a half byte at the end is padded with a zero.
    pub fn packed(&self) -> &[u8] {
        self.nibbles.as_bytes().get(..self.depth().div_ceil(2)).unwrap_or_default()
    }

    /// The reverse of [`Path::packed`]: `None` unless the length fits and the padding is zero.
    pub fn unpack(depth: usize, packed: &[u8]) -> Option<Self> {
        if depth > Self::MAX_DEPTH || packed.len() != depth.div_ceil(2) {
            return None;
        }
        if !depth.is_multiple_of(2) && packed.last()? & 0xf != 0 {
            return None;
        }
        let mut bytes = [0; KeyHash::BYTES];
        bytes.get_mut(..packed.len())?.copy_from_slice(packed);
        Some(Self { nibbles: KeyHash::from_bytes(bytes), depth: u8::try_from(depth).ok()? })
    }
}

impl fmt::Debug for Path {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "/")?;
        (0..self.depth()).try_for_each(|depth| write!(f, "{:x}", self.nibble(depth)))
    }
}

/// The first bytes of a key's hash: how a repair names the keys that a follower has too many.
///
/// Why a short name is safe: a follower deletes the keys *of the snapshot that was walked* that
/// begin with it, and the server names it only while no key of its own table, and no key updated
/// since the diff began, begins with it. So every key that is hit is one that the server lacks.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct KeyPrefix {
    /// Zero behind the first `length` bytes.
    hash: KeyHash,
    length: u8,
}

impl KeyPrefix {
    /// A prefix from 1 to 16 bytes.
    pub fn new(bytes: &[u8]) -> Option<Self> {
        Self::joined(bytes, &[])
    }

    /// A prefix whose bytes come in two parts.
    pub(crate) fn joined(head: &[u8], tail: &[u8]) -> Option<Self> {
        let mut padded = [0; KeyHash::BYTES];
        let length = head.len() + tail.len();
        padded.get_mut(..head.len())?.copy_from_slice(head);
        padded.get_mut(head.len()..length)?.copy_from_slice(tail);
        let length = u8::try_from(length).ok().filter(|length| *length > 0)?;
        Some(Self { hash: KeyHash::from_bytes(padded), length })
    }

    /// Its bytes.
    pub fn as_bytes(&self) -> &[u8] {
        self.hash.as_bytes().get(..usize::from(self.length)).unwrap_or_default()
    }

    /// Whether a key of this hash is meant.
    pub fn covers(&self, hash: &KeyHash) -> bool {
        hash.as_bytes().starts_with(self.as_bytes())
    }

    /// The least hash that begins with it.
    pub fn first(&self) -> &KeyHash {
        &self.hash
    }

    /// The greatest hash that begins with it.
    pub(crate) fn last(&self) -> KeyHash {
        let mut bytes = *self.hash.as_bytes();
        bytes.iter_mut().skip(self.as_bytes().len()).for_each(|byte| *byte = u8::MAX);
        KeyHash::from_bytes(bytes)
    }
}

impl fmt::Debug for KeyPrefix {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.as_bytes().iter().try_for_each(|byte| write!(f, "{byte:02x}"))
    }
}
