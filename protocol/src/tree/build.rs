//! What many processors do: a tree of entries in any order, dealt out, sorted and built in parts, and the
//! hashes of a tree in which much has changed.
//!
//! Threads are how it is computed, and nothing that a caller could see: all have ended when the
//! function returns, and the tree does not depend on how many there were.

use std::panic::resume_unwind;
use std::sync::{Mutex, PoisonError};
use std::thread;

use super::node::Node;
use super::{Entry, Hash};

/// How many entries are hashed and dealt out at a time, 4 MB of them. Fewer than that are built
/// by the caller alone, within 20 ms.
const CHUNK: usize = 1 << 16;

/// So few entries are sorted and built as they are: 256 parts would cost more than they do.
const FEW: usize = 1 << 10;

/// The entries of one chunk by the first byte of their keys' hashes.
///
/// So each part is sorted within a processor's cache and its memory is free again before the
/// next: fresh memory costs as much as the hashes.
type Dealt = Vec<Vec<Entry>>;

/// A tree of what `entry` makes of the items; the last one of a key counts.
pub(super) fn hash_and_build<T: Send>(
    items: impl Iterator<Item = T> + Send,
    entry: impl Fn(T) -> Entry + Sync,
) -> Option<Node> {
    let mut chunks = chunks(items).peekable();
    let first = chunks.peek().map_or(0, Vec::len);
    if first <= FEW {
        let entries = chunks.map(|chunk| chunk.into_iter().map(&entry).collect());
        return sort_and_build(entries.collect(), 0);
    }
    let threads = threads(first);
    join(map(threads, chunks, |chunk| deal(chunk.into_iter().map(&entry))), threads)
}

/// A tree of entries that are hashed already.
pub(super) fn build(entries: impl Iterator<Item = Entry>) -> Option<Node> {
    let dealt: Vec<Dealt> = chunks(entries).map(|chunk| deal(chunk.into_iter())).collect();
    let threads = threads(if dealt.len() > 1 { CHUNK } else { 0 });
    join(dealt, threads)
}

fn chunks<T>(items: impl Iterator<Item = T>) -> impl Iterator<Item = Vec<T>> {
    let mut items = items.fuse();
    std::iter::from_fn(move || {
        let chunk: Vec<T> = items.by_ref().take(CHUNK).collect();
        (!chunk.is_empty()).then_some(chunk)
    })
}

/// How many threads pay if the first chunk has so many entries.
fn threads(first: usize) -> usize {
    if first < CHUNK { 1 } else { thread::available_parallelism().map_or(1, usize::from) }
}

fn deal(entries: impl ExactSizeIterator<Item = Entry>) -> Dealt {
    let count = entries.len();
    let mut parts = Vec::new();
    parts.resize_with(256, || Vec::with_capacity(count / 256 + count / 2048));
    for entry in entries {
        if let Some(part) = parts.get_mut(usize::from(entry.key_hash().as_bytes()[0])) {
            part.push(entry);
        }
    }
    parts
}

/// The tree of all chunks, which are in their order.
fn join(dealt: Vec<Dealt>, threads: usize) -> Option<Node> {
    let mut dealt: Vec<_> = dealt.into_iter().map(Vec::into_iter).collect();
    let parts = (0..256).map(|_| dealt.iter_mut().filter_map(Iterator::next).collect());
    let mut nodes = map(threads, parts, |part: Dealt| sort_and_build(part, 2)).into_iter();
    let mut half = || Node::join(std::array::from_fn(|_| nodes.next().flatten()));
    Node::join(std::array::from_fn(|_| half()))
}

/// A subtree of entries in any order, of which the last of a key counts.
fn sort_and_build(entries: Vec<Vec<Entry>>, depth: usize) -> Option<Node> {
    // What is sorted are 16 bytes an entry, and then each entry moves once. The place among
    // the others keeps entries of one key in the order in which they came.
    let mut places: Vec<(u64, u32, u32)> = Vec::with_capacity(entries.iter().map(Vec::len).sum());
    for (run, entries) in (0..).zip(&entries) {
        places.extend(entries.iter().zip(0..).map(|(e, at)| (e.key_hash().first_bits(), run, at)));
    }
    places.sort_unstable();
    let moved =
        |(_, run, at): (u64, u32, u32)| entries.get(run as usize)?.get(at as usize).cloned();
    let mut sorted: Vec<Entry> = places.into_iter().filter_map(moved).collect();
    drop(entries);
    if !sorted.is_sorted_by(|a, b| a.order() <= b.order()) {
        // Two hashes agree in 64 bits. Stable, and quick on what is all but sorted.
        sorted.sort_by(|a, b| a.order().cmp(&b.order()));
    }
    keep_last(&mut sorted);
    (!sorted.is_empty()).then(|| Node::build(&sorted, depth))
}

/// So many subtrees two levels below the top, of 256, are to be hashed before other processors help: to
/// wake them takes as long as to hash a fifth of that.
const WORTH_SHARING: usize = 128;

/// The hash of a tree's top.
pub(super) fn hash(top: &Node) -> Hash {
    if top.len() >= CHUNK {
        let below: Vec<&Node> = top.unhashed().flat_map(Node::unhashed).collect();
        if below.len() >= WORTH_SHARING {
            // Sixteen at a time: they are as evenly spread as the hashes of the keys.
            map(threads(CHUNK), below.chunks(16), |nodes| {
                for node in nodes {
                    node.hash();
                }
            });
        }
    }
    top.hash()
}

/// Brings entries into the order of the trie, one a key: the last.
pub(super) fn sort(entries: &mut Vec<Entry>) {
    entries.sort_by(|a, b| a.order().cmp(&b.order()));
    keep_last(entries);
}

/// Of the entries of one key, which are together, keeps the last.
fn keep_last(entries: &mut Vec<Entry>) {
    entries.dedup_by(|later, kept| {
        let same = later.order() == kept.order();
        if same {
            std::mem::swap(later, kept);
        }
        same
    });
}

/// What `work` makes of each job, in the order of the jobs.
///
/// Whoever is free takes the next job, the caller like the other threads. A panic in any of them is
/// the caller's.
fn map<T: Send, R: Send>(
    threads: usize,
    jobs: impl Iterator<Item = T> + Send,
    work: impl Fn(T) -> R + Sync,
) -> Vec<R> {
    let jobs = Mutex::new(jobs.enumerate());
    let next = || jobs.lock().unwrap_or_else(PoisonError::into_inner).next();
    let take = || -> Vec<(usize, R)> {
        std::iter::from_fn(next).map(|(number, job)| (number, work(job))).collect()
    };
    let mut done = thread::scope(|scope| {
        let others: Vec<_> = (1..threads).map(|_| scope.spawn(take)).collect();
        let mut done = take();
        for other in others {
            done.extend(other.join().unwrap_or_else(|panic| resume_unwind(panic)));
        }
        done
    });
    done.sort_unstable_by_key(|(number, _)| *number);
    done.into_iter().map(|(_, result)| result).collect()
}
