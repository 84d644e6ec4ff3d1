//! The entries of what a walk found, part by part.

use crate::tree::{Entry, Path, Tree};

/// In how many parts a large table is collected. More would take less memory, but keys that are next to each other in a store are
/// in as many parts: of a million keys, a follower has all in 0.9 times the time that it takes in one part, and in 1.2 times that in 256.
const PARTS: usize = 16;

/// How many entries a part has at most, if it is to have no more than `most`, but of a large table a sixteenth.
pub(super) fn part_keys(tree: &Tree, most: usize) -> usize {
    most.max(tree.len() / PARTS)
}

/// Takes nodes from the end of `rest` for as long as `tree` has no more than `most` entries below them, or a sixteenth of its
/// entries if that is more, and at least one: those entries, in the order of their keys. A node that has more is taken apart.
///
/// The tree may be a later one than that which was walked. What it has no more of was deleted, and what it has more was
/// written: live changes say so.
///
/// ```
/// use tablecast_protocol::diff::collect;
/// use tablecast_protocol::tree::{Entry, Path, Tree};
///
/// let tree = Tree::build((0..1000).map(|n: u32| (n.to_be_bytes(), "value")));
/// let mut rest = vec![Path::ROOT];
/// let mut parts = Vec::new();
/// while !rest.is_empty() {
///     parts.push(collect(&tree, &mut rest, 300));
/// }
/// assert!(parts.iter().all(|part| part.len() <= 300 && part.is_sorted_by_key(Entry::key)));
/// assert_eq!(parts.iter().map(Vec::len).sum::<usize>(), 1000);
/// ```
///
/// Costs one descent a node, and the sorting of a part.
pub fn collect(tree: &Tree, rest: &mut Vec<Path>, most: usize) -> Vec<Entry> {
    let most = part_keys(tree, most);
    let mut entries = Vec::new();
    while let Some(path) = rest.last().copied() {
        let subtree = tree.subtree(&path);
        if subtree.len() > most && path.depth() < Path::MAX_DEPTH {
            rest.pop();
            rest.extend((0..16).rev().filter_map(|nibble| path.child(nibble)));
            continue;
        }
        if entries.len() + subtree.len() > most && !entries.is_empty() {
            break;
        }
        rest.pop();
        entries.extend(subtree.iter().cloned());
    }
    // What is left may be a whole table, and is kept for long.
    if rest.len() < rest.capacity() / 2 {
        rest.shrink_to_fit();
    }
    sort(&mut entries);
    entries
}

/// Brings what is to be written into the order of the keys, in which a store that is ordered is read, and the
/// follower's written, from one end to the other.
pub(super) fn sort(writes: &mut [Entry]) {
    writes.sort_unstable_by(|a, b| a.key().cmp(b.key()));
}
