//! The three hashes of the tree, and which bytes they cover.
//!
//! All are BLAKE3, cut short. Every input but a key's begins with a byte of its own
//! ([`ENTRY`], [`LEAF`], [`INNER`]), so that no entry can be passed off as a node nor a leaf as
//! an inner node.

use std::cmp::Ordering;
use std::fmt;
use std::sync::atomic::Ordering::{Acquire, Relaxed, Release};
use std::sync::atomic::{AtomicBool, AtomicU64};

use serde::{Deserialize, Serialize};

const LEAF: u8 = 0;
const INNER: u8 = 1;
const ENTRY: u8 = 2;

/// The hash of a node, of an entry, or of a whole table (its root).
///
/// 24 bytes of BLAKE3: forging a second table with the same root takes 2^192 tries, finding any
/// two that collide 2^96. With 24 bytes an entry of a short key is one cache line of 64 bytes, and
/// a full inner node hashes in 7 blocks rather than 9.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct Hash([u8; 24]);

/// Where a key lives in the trie: 16 bytes of BLAKE3 of the key, 32 nibbles of path.
///
/// Two keys with one hash share a leaf; the tree compares the keys themselves.
#[derive(Clone, Copy, PartialEq, Eq, Hash)]
pub struct KeyHash([u8; 16]);

impl Ord for KeyHash {
    /// That of the bytes, by two words of them: the derived one is a call.
    fn cmp(&self, other: &Self) -> Ordering {
        u128::from_be_bytes(self.0).cmp(&u128::from_be_bytes(other.0))
    }
}

impl PartialOrd for KeyHash {
    fn partial_cmp(&self, other: &Self) -> Option<Ordering> {
        Some(self.cmp(other))
    }
}

/// A node's hash, computed when somebody asks.
///
/// What an `OnceLock` does, but for a function that gives the same whenever it is called: threads that
/// ask at once all compute, and write the same words. A copy is four loads and four stores then;
/// that of an `OnceLock` made the copy of an inner node, which has 16 of them, three times as dear.
#[derive(Debug, Default)]
pub(super) struct CachedHash {
    words: [AtomicU64; 3],
    /// Set after the words.
    known: AtomicBool,
}

impl CachedHash {
    pub(super) fn get_or(&self, compute: impl FnOnce() -> Hash) -> Hash {
        let mut bytes = [0; Hash::BYTES];
        let words = bytes.as_chunks_mut().0.iter_mut().zip(&self.words);
        if self.known.load(Acquire) {
            words.for_each(|(bytes, word)| *bytes = word.load(Relaxed).to_ne_bytes());
            return Hash(bytes);
        }
        let hash = compute();
        for (bytes, word) in hash.0.as_chunks().0.iter().zip(&self.words) {
            word.store(u64::from_ne_bytes(*bytes), Relaxed);
        }
        self.known.store(true, Release);
        hash
    }

    pub(super) fn is_known(&self) -> bool {
        self.known.load(Acquire)
    }

    pub(super) fn forget(&mut self) {
        *self.known.get_mut() = false;
    }
}

impl Clone for CachedHash {
    fn clone(&self) -> Self {
        let known = AtomicBool::new(self.known.load(Acquire));
        let word = |word: &AtomicU64| AtomicU64::new(word.load(Relaxed));
        Self { known, words: self.words.each_ref().map(word) }
    }
}

impl Hash {
    /// Its width in bytes.
    pub const BYTES: usize = 24;

    /// A hash from its bytes, as they came from a peer or from a file.
    pub const fn from_bytes(bytes: [u8; Self::BYTES]) -> Self {
        Self(bytes)
    }

    /// Its bytes.
    pub const fn as_bytes(&self) -> &[u8; Self::BYTES] {
        &self.0
    }

    /// The hash of an entry: of key and value together, the key's length first.
    pub fn of_entry(key: &[u8], value: &[u8]) -> Self {
        let length = (key.len() as u64).to_le_bytes();
        of_parts(&[&[ENTRY], &length, key, value])
    }

    /// The hash of a leaf: of its entries' hashes in the order of the trie.
    pub(super) fn of_leaf<'a>(entries: impl Iterator<Item = &'a Self>) -> Self {
        // One BLAKE3 chunk holds any leaf but one of colliding keys.
        let mut buffer = [0; 1024];
        let mut filled = push(&mut buffer, 0, &[LEAF]);
        let mut entries = entries;
        while let Some(entry) = entries.next() {
            if filled + Self::BYTES > buffer.len() {
                let mut hasher = blake3::Hasher::new();
                hasher.update(buffer.get(..filled).unwrap_or_default()).update(&entry.0);
                entries.for_each(|entry| {
                    hasher.update(&entry.0);
                });
                return cut(&hasher.finalize());
            }
            filled = push(&mut buffer, filled, &entry.0);
        }
        cut(&blake3::hash(buffer.get(..filled).unwrap_or_default()))
    }

    /// The hash of an inner node: which children there are (bit n for nibble n), then theirs.
    pub(super) fn of_inner(present: u16, children: impl Iterator<Item = Self>) -> Self {
        let mut buffer = [0; 3 + 16 * Self::BYTES];
        let mut filled = push(&mut buffer, 0, &[INNER]);
        filled = push(&mut buffer, filled, &present.to_le_bytes());
        for child in children {
            filled = push(&mut buffer, filled, &child.0);
        }
        cut(&blake3::hash(buffer.get(..filled).unwrap_or_default()))
    }

    /// The hash of several byte strings, one after the other, without anything between them.
    pub(crate) fn of_bytes(parts: &[&[u8]]) -> Self {
        of_parts(parts)
    }
}

impl KeyHash {
    /// Its width in bytes.
    pub const BYTES: usize = 16;

    /// The hash of a key.
    pub fn of(key: &[u8]) -> Self {
        let mut bytes = [0; Self::BYTES];
        bytes.copy_from_slice(
            blake3::hash(key).as_bytes().first_chunk::<{ Self::BYTES }>().unwrap_or(&[0; 16]),
        );
        Self(bytes)
    }

    /// A key's hash from its bytes.
    pub const fn from_bytes(bytes: [u8; Self::BYTES]) -> Self {
        Self(bytes)
    }

    /// Its bytes.
    pub const fn as_bytes(&self) -> &[u8; Self::BYTES] {
        &self.0
    }

    /// The nibble that chooses the child at `depth` (0 at the root); 0 past the last.
    pub(super) fn nibble(&self, depth: usize) -> usize {
        let byte = self.0.get(depth / 2).copied().unwrap_or(0);
        usize::from(if depth.is_multiple_of(2) { byte >> 4 } else { byte & 0xf })
    }

    /// The 16 bits behind the first `depth` nibbles: where below a node of that depth the key is.
    pub(super) fn below(&self, depth: usize) -> usize {
        let shift = u32::try_from(4 * depth).unwrap_or(u32::MAX);
        let bits = u128::from_be_bytes(self.0).checked_shl(shift).unwrap_or(0) >> 112;
        usize::try_from(bits).unwrap_or(0)
    }

    /// The first 64 bits.
    pub(crate) fn first_bits(&self) -> u64 {
        self.0.first_chunk().copied().map_or(0, u64::from_be_bytes)
    }
}

/// Appends what fits, and answers how much is filled then.
fn push(buffer: &mut [u8], filled: usize, bytes: &[u8]) -> usize {
    match buffer.get_mut(filled..filled + bytes.len()) {
        Some(room) => {
            room.copy_from_slice(bytes);
            filled + bytes.len()
        }
        None => unreachable!("{filled} bytes are filled and {} more do not fit", bytes.len()),
    }
}

/// Short inputs are put together first: a call of `blake3::hash` costs a third of a `Hasher`.
fn of_parts(parts: &[&[u8]]) -> Hash {
    let mut buffer = [0; 256];
    if parts.iter().map(|part| part.len()).sum::<usize>() <= buffer.len() {
        let filled = parts.iter().fold(0, |filled, part| push(&mut buffer, filled, part));
        return cut(&blake3::hash(buffer.get(..filled).unwrap_or_default()));
    }
    let mut hasher = blake3::Hasher::new();
    for part in parts {
        hasher.update(part);
    }
    cut(&hasher.finalize())
}

fn cut(hash: &blake3::Hash) -> Hash {
    Hash(*hash.as_bytes().first_chunk().unwrap_or(&[0; Hash::BYTES]))
}

macro_rules! shown_as_hex {
    ($($name:ident),*) => {$(
        impl fmt::Display for $name {
            fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                self.0.iter().try_for_each(|byte| write!(f, "{byte:02x}"))
            }
        }

        impl fmt::Debug for $name {
            fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                // The first eight bytes tell two of them apart in a test's output.
                self.0.iter().take(8).try_for_each(|byte| write!(f, "{byte:02x}"))
            }
        }
    )*};
}

/// Exactly so many bytes, as text.
pub(crate) fn from_hex<'de, D: serde::Deserializer<'de>, const N: usize>(
    deserializer: D,
) -> Result<[u8; N], D::Error> {
    let text = String::deserialize(deserializer)?;
    let mut bytes = [0; N];
    let digits = text.as_bytes().chunks_exact(2);
    let whole = text.len() == 2 * N && text.bytes().all(|byte| byte.is_ascii_hexdigit());
    for (byte, pair) in bytes.iter_mut().zip(digits) {
        let pair = std::str::from_utf8(pair).ok();
        *byte = pair.and_then(|pair| u8::from_str_radix(pair, 16).ok()).unwrap_or(0);
    }
    if whole {
        Ok(bytes)
    } else {
        Err(serde::de::Error::custom(format_args!("not {} hexadecimal digits: {text:?}", 2 * N)))
    }
}

macro_rules! sent_as_bytes {
    ($($name:ident),*) => {$(
        impl Serialize for $name {
            fn serialize<S: serde::Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
                // Where people read it, in JSON most of all, it is hex.
                if serializer.is_human_readable() {
                    serializer.collect_str(self)
                } else {
                    serializer.serialize_bytes(&self.0)
                }
            }
        }

        impl<'de> Deserialize<'de> for $name {
            fn deserialize<D: serde::Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
                if deserializer.is_human_readable() {
                    crate::tree::from_hex(deserializer).map(Self)
                } else {
                    crate::wire::fixed_bytes(deserializer).map(Self)
                }
            }
        }
    )*};
}

pub(crate) use {sent_as_bytes, shown_as_hex};

shown_as_hex!(Hash, KeyHash);
sent_as_bytes!(Hash, KeyHash);
