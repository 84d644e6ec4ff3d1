//! The answering side: a pure function of a tree and a query.

use super::{Answer, Query, Widths};
use crate::error::ProtocolError;
use crate::tree::{Path, Subtree, Tree};

/// What `tree` has at the nodes of `query`: at all of them, or at the first ones that fit
/// `max_bytes` (but at one at the least).
///
/// Costs one descent a node, and what it answers. Hashes the nodes that were never hashed.
///
/// # Errors
/// If the query is malformed.
pub fn answer(tree: &Tree, query: &Query, max_bytes: usize) -> Result<Answer, ProtocolError> {
    let paths = query.paths()?;
    let mut answer = Vec::new();
    for path in &paths {
        let subtree = tree.subtree(path);
        let whole = answer.len();
        put_node(&mut answer, path, subtree, query, max_bytes);
        if answer.len() > max_bytes && whole > 0 {
            answer.truncate(whole);
            break;
        }
    }
    Ok(answer.into())
}

fn put_node(
    answer: &mut Vec<u8>,
    path: &Path,
    subtree: Subtree<'_>,
    query: &Query,
    max_bytes: usize,
) {
    let part = query.widths.key_part(path.depth());
    let entry_bytes = part.len() + usize::from(query.widths.entry);
    let count = subtree.len() as u64 + 1;
    let bytes = varint_bytes(count) + subtree.len() * entry_bytes;
    let few = subtree.len() == 0 || subtree.len() <= query.small as usize && bytes <= max_bytes;
    // Where the path cannot grow, only the entries themselves can tell.
    if few || path.depth() == Path::MAX_DEPTH {
        put_varint(answer, count);
        for entry in subtree.iter() {
            let hash = entry.key_hash().as_bytes();
            answer.extend_from_slice(hash.get(part.clone()).unwrap_or_default());
            answer.extend_from_slice(cut(entry.hash().as_bytes(), query.widths.entry));
        }
    } else {
        put_varint(answer, 0);
        put_children(answer, path, subtree, query.levels, query.widths);
    }
}

fn put_children(
    answer: &mut Vec<u8>,
    path: &Path,
    subtree: Subtree<'_>,
    levels: u8,
    widths: Widths,
) {
    let at = answer.len();
    answer.extend_from_slice(&[0, 0]);
    let mut present: u16 = 0;
    for (nibble, path) in (0..16).filter_map(|nibble| Some((nibble, path.child(nibble)?))) {
        let child = subtree.child(&path);
        let Some(hash) = child.hash() else { continue };
        present |= 1 << nibble;
        if levels == 1 || path.depth() == Path::MAX_DEPTH {
            answer.extend_from_slice(cut(hash.as_bytes(), widths.node));
        } else {
            put_children(answer, &path, child, levels - 1, widths);
        }
    }
    if let Some(bitmap) = answer.get_mut(at..at + 2) {
        bitmap.copy_from_slice(&present.to_be_bytes());
    }
}

pub(super) fn cut(hash: &[u8], width: u8) -> &[u8] {
    hash.get(..usize::from(width)).unwrap_or(hash)
}

/// How many bytes [`put_varint`] puts.
fn varint_bytes(number: u64) -> usize {
    let bits = u64::BITS - (number | 1).leading_zeros();
    bits.div_ceil(7) as usize
}

fn put_varint(answer: &mut Vec<u8>, mut number: u64) {
    while number >= 0x80 {
        answer.push((number & 0x7f) as u8 | 0x80);
        number >>= 7;
    }
    answer.push((number & 0x7f) as u8);
}
