//! The asking side: one query in flight, one level at a time.

use super::answer::cut;
use super::collect::{collect, part_keys, sort};
use super::{Answer, Difference, QUERY_BYTES, Query, SMALL, Widths};
use crate::error::ProtocolError;
use crate::tree::{Entry, Hash, KeyPrefix, LEAF_ENTRIES, Path, Subtree, Tree};

/// How many nodes of a level are kept to be asked for, about 18 MB of paths: when there is no room for the children of more, the walk
/// goes on below before it comes back. Five levels of a table that differs everywhere have no more, so that it is a
/// matter of tables above 33 million keys.
const LEVEL_NODES: usize = 1 << 20;

/// Most nodes of all levels that are kept: what an honest follower cannot exceed, as nodes are full to the fifth
/// level and few have children below the sixth. A hostile one can make the server remember no more.
const OPEN_NODES: usize = 1 << 22;

/// Most prefixes to delete at that may be found, about 1.1 GB of them. A hostile follower could name new ones without end.
const MAX_DELETES: usize = 1 << 26;

/// After an answer that leaves nodes open, so many times as many as it covered are asked for at most. Else a
/// follower that covers one at a time, in a byte, would be sent all the others again for each.
const ASK_AGAIN: usize = 2;

/// A table of at least this many keys has its first two levels asked for at once: they are full,
/// and cost 1.5 kB. A smaller one is through in two rounds anyway.
const TWO_LEVELS: u64 = 4096;

/// How many entries a node has at most that is answered with them, for a table of so many keys.
///
/// A walk of many differences ends at the first level whose nodes are no larger than a leaf on the
/// average: of a million keys at the fourth, with 15. But a node is as large as chance has it, and
/// one that has more than a leaf costs everybody another round: of a million keys, three of 65,536. Six
/// standard deviations above the average there is none. What that costs is bytes, where the average is close to a
/// leaf: a quarter more at two million keys, nothing at one. Nodes of the level above have 16 times
/// the average, so that they are never told whole for this.
fn small(len: u64) -> u32 {
    let mut mean = len;
    while mean > LEAF_ENTRIES as u64 {
        mean /= 16;
    }
    SMALL.max(u32::try_from(mean + (36 * mean).isqrt()).unwrap_or(SMALL))
}

/// A walk over a snapshot of the server's tree against that of a follower.
///
/// ```
/// use tablecast_protocol::Tree;
/// use tablecast_protocol::diff::{Step, Walk, answer};
///
/// let server = Tree::build((0..1000).map(|n: u32| (n.to_be_bytes(), "value")));
/// let mut follower = server.clone();
/// follower.remove(&7_u32.to_be_bytes());
/// follower.insert(b"extra", b"value");
///
/// let (root, len) = (follower.root(), follower.len() as u64);
/// let (mut walk, mut step) = Walk::new(server, Some(root), len, false, 1 << 20, 10_000);
/// let difference = loop {
///     match step {
///         Step::Ask(query) => {
///             let answer = answer(&follower, &query, 1 << 20).unwrap();
///             step = walk.handle_answer(&answer).unwrap();
///         }
///         Step::Done(found) => break found.first,
///     }
/// };
/// assert_eq!(difference.writes[0].key(), 7_u32.to_be_bytes());
/// assert_eq!(difference.deletes.len(), 1);
/// ```
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub struct Walk {
    tree: Tree,
    widths: Widths,
    small: u32,
    levels: u8,
    query_bytes: usize,
    /// Most nodes of the next query.
    query_nodes: usize,
    /// The nodes of the query in flight, all at one depth.
    asked: Vec<Path>,
    /// How many of them are answered.
    answered: usize,
    /// Nodes found to differ below those, to be asked for when all of them are answered, or there is no room for more.
    below: Vec<Path>,
    /// Of the levels above, what was left to be asked for then.
    above: Vec<Vec<Path>>,
    found: Found,
    /// Most keys to write of which the entries are kept.
    part_keys: usize,
}

/// What a walk does next.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub enum Step {
    /// Wait for the answer to this query.
    Ask(Query),
    /// It is done.
    Done(Found),
}

/// What a walk finds. Keys to write beyond the first part of them are told by where they are, in 17 bytes at the most: a
/// follower may lack a whole table.
#[derive(Clone, Debug, Default, PartialEq, Eq, Hash)]
pub struct Found {
    /// The first part of it, with all deletes.
    pub first: Difference,
    /// How many keys there are to write, `first` included.
    pub writes: u64,
    /// Nodes below which all keys are to be written, too: [`collect`] has their entries. A single key is a node of the greatest
    /// depth.
    pub rest: Vec<Path>,
}

impl Walk {
    /// Begins a walk against a follower whose table had this root, if it is of use, and has about so many keys, and decides the
    /// first step. Equal roots and an empty follower end it at once: what `SyncReq` brought is
    /// enough.
    ///
    /// `max_bytes` is the largest query: what a frame may hold, less its header; `most` how many keys to write
    /// [`Found::first`] has at most, if that is not a large part of them ([`collect`]).
    pub fn new(
        tree: Tree,
        root: Option<Hash>,
        len: u64,
        full: bool,
        max_bytes: usize,
        most: usize,
    ) -> (Self, Step) {
        let part_keys = part_keys(&tree, most);
        let widths = if full { Widths::FULL } else { Widths::SHORT };
        // Everything the follower has is to go: its entries at once, as far as an answer holds.
        let larger = len.max(tree.len() as u64);
        let small = if tree.is_empty() { u32::MAX } else { small(larger) };
        let two_levels = 16 * 16 * usize::from(widths.node) + 17 * 2 < max_bytes;
        let levels = if larger < TWO_LEVELS || !two_levels { 1 } else { 2 };
        let mut walk = Self {
            tree,
            widths,
            small,
            levels,
            query_bytes: max_bytes.min(QUERY_BYTES),
            query_nodes: usize::MAX,
            asked: Vec::new(),
            answered: 0,
            below: Vec::new(),
            above: Vec::new(),
            found: Found::default(),
            part_keys,
        };
        if len == 0 {
            // Without a root, for which all that changed would be hashed.
            walk.found.write_all(&Path::ROOT, walk.tree.subtree(&Path::ROOT), part_keys);
        } else if root.is_none_or(|root| walk.tree.root() != root) {
            walk.asked.push(Path::ROOT);
        }
        let step = walk.step();
        (walk, step)
    }

    /// Compares an answer with the tree, and decides the next step.
    ///
    /// Ends after at most [`Path::MAX_DEPTH`] levels: every query but one for what an answer had
    /// no room for, or the walk itself, asks below the one before it, and every answer covers a node at the least.
    ///
    /// # Errors
    /// If the answer is malformed. The walk is of no use then.
    pub fn handle_answer(&mut self, answer: &Answer) -> Result<Step, ProtocolError> {
        let mut reader = Reader { bytes: answer };
        let before = self.answered;
        while !reader.bytes.is_empty() {
            let more = malformed("it covers more nodes than asked");
            let path = self.asked.get(self.answered).ok_or(more)?;
            self.answered += 1;
            let ours = self.tree.subtree(path);
            let Self { widths, levels, below, found, part_keys, .. } = self;
            let mut comparing = Comparing { widths: *widths, below, found, most: *part_keys };
            match reader.varint()?.checked_sub(1) {
                Some(count) if count > self.small.into() && path.depth() < Path::MAX_DEPTH => {
                    return Err(malformed("it has more entries of a node than were asked for"));
                }
                Some(count) => {
                    let theirs = reader.entries(count, path, *widths)?;
                    comparing.entries(path, ours, &theirs)?;
                }
                None => comparing.children(&mut reader, path, ours, *levels)?,
            }
        }
        let open = self.below.len() + self.above.iter().map(Vec::len).sum::<usize>();
        if open > OPEN_NODES {
            return Err(malformed("more nodes differ than a server remembers"));
        }
        if self.found.first.deletes.len() > MAX_DELETES {
            return Err(malformed("more keys are to be deleted than a server remembers"));
        }
        if self.answered == before && before < self.asked.len() {
            return Err(malformed("it covers no node"));
        }
        self.query_nodes = (self.answered - before).saturating_mul(ASK_AGAIN);
        // Not for the last few of them alone, or each query would be for fewer.
        if self.answered == self.asked.len() || self.room() < LEVEL_NODES / 64 {
            self.descend();
        }
        Ok(self.step())
    }

    /// For the children of how many nodes there is room.
    fn room(&self) -> usize {
        LEVEL_NODES.saturating_sub(self.below.len()) / 16
    }

    /// Goes on below what has been answered, and then with what was left above.
    fn descend(&mut self) {
        self.asked.drain(..self.answered);
        let left = std::mem::replace(&mut self.asked, std::mem::take(&mut self.below));
        self.above.push(left);
        while self.asked.is_empty()
            && let Some(left) = self.above.pop()
        {
            self.asked = left;
        }
        self.answered = 0;
        self.levels = 1;
        self.query_nodes = usize::MAX;
    }

    fn step(&mut self) -> Step {
        let open = self.asked.get(self.answered..).unwrap_or_default();
        let Some(first) = open.first() else {
            // Whoever writes copies what a snapshot holds.
            let tree = std::mem::take(&mut self.tree);
            let mut found = std::mem::take(&mut self.found);
            let Found { first, rest, .. } = &mut found;
            rest.shrink_to_fit();
            // Several nodes below its end may have one.
            first.deletes.sort_unstable();
            first.deletes.dedup();
            if first.writes.is_empty() {
                first.writes = collect(&tree, rest, self.part_keys);
            } else {
                sort(&mut first.writes);
            }
            return Step::Done(found);
        };
        let nodes = (self.query_bytes / first.packed().len().max(1)).max(1);
        let asked = open.iter().take(nodes.min(self.query_nodes).min(self.room()).max(1));
        Step::Ask(Query {
            depth: u8::try_from(first.depth()).unwrap_or(u8::MAX),
            levels: self.levels,
            small: self.small,
            widths: self.widths,
            nodes: asked.flat_map(|path| path.packed()).copied().collect(),
        })
    }
}

fn malformed(why: &'static str) -> ProtocolError {
    ProtocolError::Answer { why }
}

impl Found {
    /// How many repairs there are.
    pub fn len(&self) -> u64 {
        self.writes + self.first.deletes.len() as u64
    }

    /// Whether the snapshots are equal.
    pub fn is_empty(&self) -> bool {
        self.len() == 0
    }

    /// The follower lacks an entry, or has another value.
    fn write(&mut self, entry: &Entry, most: usize) {
        self.writes += 1;
        if self.first.writes.len() < most {
            self.first.writes.push(entry.clone());
        } else {
            self.rest.push(Path::of(*entry.key_hash()));
        }
    }

    /// The follower lacks all of a subtree.
    fn write_all(&mut self, path: &Path, subtree: Subtree<'_>, most: usize) {
        let len = subtree.len();
        self.writes += len as u64;
        if self.first.writes.len() + len <= most {
            self.first.writes.extend(subtree.iter().cloned());
        } else {
            self.rest.push(*path);
        }
    }
}

/// How an answer is compared with our tree, and where what comes of it goes.
struct Comparing<'a> {
    widths: Widths,
    below: &'a mut Vec<Path>,
    found: &'a mut Found,
    most: usize,
}

impl Comparing<'_> {
    /// Compares the hashes of a node's children, `levels` deep, with ours: equal ones are done with,
    /// what the follower lacks is written, and the rest is asked for next.
    fn children(
        &mut self,
        reader: &mut Reader<'_>,
        path: &Path,
        ours: Subtree<'_>,
        levels: u8,
    ) -> Result<(), ProtocolError> {
        let present = u16::from_be_bytes(reader.array()?);
        if present == 0 {
            return Err(malformed("a node with many entries has no child"));
        }
        let width = self.widths.node;
        for nibble in 0..16 {
            let path = path.child(nibble).ok_or(malformed("it is deeper than a hash is long"))?;
            let ours = ours.child(&path);
            if present & (1 << nibble) == 0 {
                self.found.write_all(&path, ours, self.most);
            } else if levels > 1 && path.depth() < Path::MAX_DEPTH {
                self.children(reader, &path, ours, levels - 1)?;
            } else {
                let theirs = reader.take(usize::from(width))?;
                if ours.hash().is_none_or(|ours| cut(ours.as_bytes(), width) != theirs) {
                    self.below.push(path);
                }
            }
        }
        Ok(())
    }

    /// Compares all entries of a subtree. Both sides are in the order of the keys' hashes; those that
    /// share a prefix are compared as a group.
    fn entries(
        &mut self,
        path: &Path,
        ours: Subtree<'_>,
        theirs: &[Theirs<'_>],
    ) -> Result<(), ProtocolError> {
        if theirs.is_empty() {
            self.found.write_all(path, ours, self.most);
            return Ok(());
        }
        if !theirs.is_sorted_by_key(|entry| entry.prefix) {
            return Err(malformed("entries are not in the order of their keys' hashes"));
        }
        let Self { widths, found, most, .. } = self;
        let mut ours = ours.iter().peekable();
        for group in theirs.chunk_by(|a, b| a.prefix == b.prefix) {
            let Some(Theirs { prefix, .. }) = group.first() else { continue };
            let before = |entry: &&Entry| {
                entry.key_hash() < prefix.first() && !prefix.covers(entry.key_hash())
            };
            while let Some(missing) = ours.next_if(|entry| before(entry)) {
                found.write(missing, *most);
            }
            let mut known = false;
            while let Some(entry) = ours.next_if(|entry| prefix.covers(entry.key_hash())) {
                known = true;
                let hash = cut(entry.hash().as_bytes(), widths.entry);
                if group.iter().all(|theirs| theirs.entry != hash) {
                    found.write(entry, *most);
                }
            }
            if !known {
                found.first.deletes.push(*prefix);
            }
        }
        ours.for_each(|entry| found.write(entry, *most));
        Ok(())
    }
}

/// An entry as an answer holds it.
struct Theirs<'a> {
    prefix: KeyPrefix,
    entry: &'a [u8],
}

/// What is left of an answer.
struct Reader<'a> {
    bytes: &'a [u8],
}

impl<'a> Reader<'a> {
    fn take(&mut self, count: usize) -> Result<&'a [u8], ProtocolError> {
        let (taken, left) = self.bytes.split_at_checked(count).ok_or(malformed("it is cut off"))?;
        self.bytes = left;
        Ok(taken)
    }

    fn array<const N: usize>(&mut self) -> Result<[u8; N], ProtocolError> {
        self.take(N)?.try_into().map_err(|_| malformed("it is cut off"))
    }

    fn varint(&mut self) -> Result<u64, ProtocolError> {
        let mut number = 0;
        for shift in [0, 7, 14, 21, 28] {
            let [byte] = self.array()?;
            number |= u64::from(byte & 0x7f) << shift;
            if byte & 0x80 == 0 {
                return Ok(number);
            }
        }
        Err(malformed("a count has more than five bytes"))
    }

    fn entries(
        &mut self,
        count: u64,
        path: &Path,
        widths: Widths,
    ) -> Result<Vec<Theirs<'a>>, ProtocolError> {
        let part = widths.key_part(path.depth()).len();
        let size = part + usize::from(widths.entry);
        let count = usize::try_from(count).unwrap_or(usize::MAX);
        let bytes = self.take(count.saturating_mul(size))?;
        let known = usize::from(widths.key) - part;
        let told = path.packed().get(..known).ok_or(malformed("the path tells less"))?;
        bytes
            .chunks_exact(size)
            .map(|entry| {
                let (key, entry) =
                    entry.split_at_checked(part).ok_or(malformed("it is cut off"))?;
                let prefix = KeyPrefix::joined(told, key).ok_or(malformed("a key has no hash"))?;
                // An odd path tells half of a byte that the answer repeats.
                if part > 0 && !path.covers(prefix.first()) {
                    return Err(malformed("an entry is not below its node"));
                }
                Ok(Theirs { prefix, entry })
            })
            .collect()
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::diff::answer;
    use crate::tree::KeyHash;

    /// Keys of whose hashes forty share their first 6 bytes each, as somebody may choose them. One crowd has a leaf
    /// where the other one has nodes.
    fn crowded() -> Tree {
        let mut tree = Tree::new();
        for (crowd, step) in [(7, 6), (8, 1)] {
            for n in 0..40_u8 {
                let mut hash = [crowd; KeyHash::BYTES];
                hash[6..].fill(n.wrapping_mul(step));
                let (key, hash) = ([crowd, n], KeyHash::from_bytes(hash));
                tree.insert_entry(Entry::from_hashes(&key, hash, Hash::of_entry(&key, b"")));
            }
        }
        tree
    }

    /// What a follower resolves twice, it would count twice.
    #[test]
    fn a_prefix_that_several_nodes_have_is_named_once() {
        let follower = crowded();
        for others in [0_u32, 1000] {
            let server = Tree::build((0..others).map(|n| (n.to_be_bytes(), "")));
            for (full, deletes) in [(false, 2), (true, 80)] {
                let root = Some(follower.root());
                let (mut walk, mut step) =
                    Walk::new(server.clone(), root, 80, full, 1 << 20, 10_000);
                while let Step::Ask(query) = step {
                    step =
                        walk.handle_answer(&answer(&follower, &query, 1 << 20).unwrap()).unwrap();
                }
                let Step::Done(found) = step else { panic!("it asks") };
                assert_eq!(found.first.deletes.len(), deletes, "{others} {full}");
            }
        }
    }
}
