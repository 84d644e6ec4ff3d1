//! The server's retained tail of recent changes: the queue of every follower at once.

use std::collections::{BTreeMap, HashSet, VecDeque};
use std::sync::Arc;
use std::time::Duration;

use bytes::Bytes;

use crate::message::{DiffId, Way};
use crate::mutation::{Broken, Mutation};
use crate::position::{Chain, Epoch, Position, Revision};
use crate::tree::{Hash, KeyHash};

/// Some consecutive changes, encoded once for all followers.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub struct Chunk {
    /// The revision of the first change.
    pub first: Revision,
    /// The chain before the first change.
    pub before: Chain,
    /// The whole frame, length header included: a `Live` message.
    pub frame: Bytes,
    /// Where in the frame the changes begin.
    pub body: usize,
    /// The hashes of the changed keys, one a change.
    pub keys: Arc<[KeyHash]>,
}

impl Chunk {
    /// The revision of the change behind the last one.
    pub fn end(&self) -> Revision {
        self.first.plus(self.keys.len() as u64)
    }

    /// What it counts for in the log's bound.
    fn bytes(&self) -> usize {
        CHUNK_BYTES + self.frame.len() + self.keys.len() * KeyHash::BYTES
    }
}

/// What a chunk takes beside its frame and its keys: a place in the queue, of which up to half are empty, and what two pieces of memory
/// have around them. It is most of a change that is written alone.
const CHUNK_BYTES: usize = 256;

/// A bounded queue of chunks that any number of cursors read. A cursor is a [`Revision`]: that of
/// the next change to be sent.
///
/// Memory is bounded by the log, whatever the followers do. One that does not read falls off the
/// tail: [`Log::at`] says [`Next::Fell`].
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub struct Log {
    /// Each with the time at which it was appended.
    chunks: VecDeque<(Chunk, Duration)>,
    bytes: usize,
    max_bytes: usize,
    head: Revision,
    chain: Chain,
    /// Places at which the stream of one follower is to end its diff.
    marks: BTreeMap<(FollowerId, DiffId), (Revision, Chain)>,
    checkpoint: Option<Checkpoint>,
    broken: Broken,
}

/// A mark for all followers, the newest: each that passes it compares its root with the server's.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct Checkpoint {
    /// Tells it from another one at the same revision.
    pub number: u64,
    /// Where it is.
    pub revision: Revision,
    /// The server's root there; `None` while it is computed.
    pub root: Option<Hash>,
}

/// The number of a connection on its server.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct FollowerId(pub u64);

/// What a cursor finds in the log.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Next<'a> {
    /// These changes.
    Chunk(&'a Chunk),
    /// Nothing yet: everything has been read.
    End,
    /// What comes next is no longer there.
    Fell,
}

impl Log {
    /// An empty log of a history that stands at `head`. The newest chunk is kept whatever its size;
    /// older ones go as soon as all together are above `max_bytes`.
    pub fn new(max_bytes: usize, head: Revision, chain: Chain) -> Self {
        Self {
            chunks: VecDeque::new(),
            bytes: 0,
            max_bytes,
            head,
            chain,
            marks: BTreeMap::new(),
            checkpoint: None,
            broken: Broken::default(),
        }
    }

    /// Breaks a rule from here on, so that a test can show that it would be noticed.
    #[cfg(feature = "mutations")]
    pub fn mutate(&mut self, mutation: Mutation) {
        self.broken = Broken::by(mutation);
    }

    /// Appends what follows the head; `chain` is the chain behind it, `now` is counted from whatever the
    /// caller likes.
    ///
    /// # Panics
    /// If the chunk does not follow the head: a gap in the log would be a gap in every table.
    pub fn push(&mut self, chunk: Chunk, chain: Chain, now: Duration) {
        assert_eq!(chunk.first, self.head.next(), "a chunk follows the head of the log");
        self.head = self.head.plus(chunk.keys.len() as u64);
        self.chain = chain;
        self.bytes += chunk.bytes();
        self.chunks.push_back((chunk, now));
        while self.bytes > self.max_bytes && self.chunks.len() > 1 {
            self.bytes -= self.chunks.pop_front().map_or(0, |(chunk, _)| chunk.bytes());
        }
    }

    /// The revision of the newest change.
    pub fn head(&self) -> Revision {
        self.head
    }

    /// The chain at the head.
    pub fn chain(&self) -> Chain {
        self.chain
    }

    /// The revision of the oldest change that is still there; the one behind the head if none is.
    pub fn tail(&self) -> Revision {
        self.chunks.front().map_or(self.head.next(), |(chunk, _)| chunk.first)
    }

    /// Bytes kept: frames, key hashes, and about what keeping them takes.
    pub fn bytes(&self) -> usize {
        self.bytes
    }

    /// How to bring a follower that presents this position to the head of this history, which is that
    /// of `epoch`. It is resumed only if the log still has everything behind the position, and if the
    /// chain proves that everything before is the same.
    pub fn way(&self, epoch: Epoch, presented: Option<&Position>) -> Way {
        let Some(at) = presented else { return Way::NoPosition };
        if at.epoch != epoch && !self.broken.breaks(Mutation::ResumeAnyEpoch) {
            return Way::OtherEpoch;
        }
        if at.revision > self.head {
            return Way::Ahead;
        }
        let chain = match self.at(at.revision.next()) {
            Next::End => self.chain,
            Next::Chunk(chunk) => chunk.before,
            Next::Fell if at.revision.next() < self.tail() => return Way::NotInLog,
            // No stream of this history stands within a frame.
            Next::Fell => return Way::OtherChain,
        };
        if chain == at.chain || self.broken.breaks(Mutation::ResumeAnyChain) {
            Way::Resumed
        } else {
            Way::OtherChain
        }
    }

    /// Marks the head for a follower's diff. Whoever reads the log up to here sees the mark before
    /// anything behind it, so no stream can pass it unseen. One for each running diff; taken back
    /// by [`Log::unmark`].
    pub fn mark(&mut self, follower: FollowerId, diff: DiffId) {
        self.marks.insert((follower, diff), (self.head, self.chain));
    }

    /// Where the mark is, and the chain there.
    pub fn marked(&self, follower: FollowerId, diff: DiffId) -> Option<(Revision, Chain)> {
        self.marks.get(&(follower, diff)).copied()
    }

    /// The diff is over.
    pub fn unmark(&mut self, follower: FollowerId, diff: DiffId) {
        self.marks.remove(&(follower, diff));
    }

    /// How many marks there are: one for each diff that is at its end.
    pub fn marks(&self) -> usize {
        self.marks.len()
    }

    /// Sets a checkpoint at the head, in place of the last one; its number.
    pub fn set_checkpoint(&mut self) -> u64 {
        let number = self.checkpoint.map_or(1, |last| last.number + 1);
        self.checkpoint = Some(Checkpoint { number, revision: self.head, root: None });
        number
    }

    /// The server's root at a checkpoint, if that is still the newest.
    pub fn set_root(&mut self, number: u64, root: Hash) {
        if let Some(checkpoint) = self.checkpoint.as_mut().filter(|last| last.number == number) {
            checkpoint.root = Some(root);
        }
    }

    /// The newest checkpoint.
    pub fn checkpoint(&self) -> Option<Checkpoint> {
        self.checkpoint
    }

    /// The chunk that begins at `cursor`. O(log n).
    pub fn at(&self, cursor: Revision) -> Next<'_> {
        // There is nothing behind the last number.
        if cursor > self.head || self.head.next() == self.head {
            return Next::End;
        }
        match self.chunks.get(self.index(cursor)) {
            Some((chunk, _)) if chunk.first == cursor => Next::Chunk(chunk),
            Some(_) | None => Next::Fell,
        }
    }

    /// The chunk that this change is in, if it is still there. O(log n).
    pub fn holding(&self, revision: Revision) -> Option<&Chunk> {
        let behind = self.index(revision.next());
        let (chunk, _) = self.chunks.get(behind.checked_sub(1)?)?;
        (revision < chunk.end()).then_some(chunk)
    }

    /// The first chunk that does not begin before `cursor`.
    fn index(&self, cursor: Revision) -> usize {
        self.chunks.partition_point(|(chunk, _)| chunk.first < cursor)
    }

    /// When the oldest change that a cursor has not read was appended, as far as the log knows it;
    /// `None` if everything has been read. O(log n).
    pub fn waiting_since(&self, cursor: Revision) -> Option<Duration> {
        if cursor > self.head {
            return None;
        }
        let oldest = self.chunks.get(self.index(cursor)).or_else(|| self.chunks.front());
        oldest.map(|(_, at)| *at)
    }

    /// The keys of the changes from this one on, for at most so many chunks; `None` if they are not there any
    /// more. Copies a pointer a chunk.
    pub fn keys_from(&self, first: Revision, chunks: usize) -> Option<Vec<Arc<[KeyHash]>>> {
        let there = first > self.head || matches!(self.at(first), Next::Chunk(_));
        let chunks = self.chunks.range(self.index(first)..).take(chunks);
        there.then(|| chunks.map(|(chunk, _)| Arc::clone(&chunk.keys)).collect())
    }
}

/// The keys of consecutive changes: all that a follower missed.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub struct Missed {
    first: Revision,
    keys: Vec<Arc<[KeyHash]>>,
    /// Where they end.
    head: Position,
}

impl Missed {
    /// How many chunks are taken from the log at once: others wait for it no longer than for a few
    /// microseconds.
    pub const CHUNKS: usize = 1024;

    /// Collects what was missed behind a revision up to a position, by asking [`Log::keys_from`] again and
    /// again; `None` if the log did not keep it for so long.
    pub fn collect(
        behind: Revision,
        head: Position,
        mut keys_from: impl FnMut(Revision, usize) -> Option<Vec<Arc<[KeyHash]>>>,
    ) -> Option<Self> {
        let first = behind.next();
        let (mut next, mut all) = (first, Vec::new());
        while next <= head.revision {
            for keys in keys_from(next, Self::CHUNKS)? {
                if next <= head.revision {
                    next = next.plus(keys.len() as u64);
                    all.push(keys);
                }
            }
        }
        Some(Self { first, keys: all, head })
    }
}

/// Which of the changes that a follower missed still count: one a key, the last.
///
/// Kept as a bit a change, whatever their keys. What is left out is superseded by what is not, so a
/// follower that gets all that is left is where one is that got everything; in between it is nowhere.
///
/// ```
/// use std::time::Duration;
/// use tablecast_protocol::{
///     Change, Chain, Epoch, Limits, Log, MemoryStore, Missed, Revision, Shortened, Table,
/// };
///
/// let mut table = Table::open(MemoryStore::new(), Limits::default()).unwrap();
/// table.ready(Epoch::from_bytes([1; 16]));
/// table.write(&[Change::write("a", "1"), Change::write("b", "1"), Change::delete("a")]).unwrap();
/// table.seal();
/// let mut log = Log::new(1 << 20, Revision::ZERO, Chain::START);
/// let (chunk, chain) = table.next_chunk().unwrap();
/// log.push(chunk, chain, Duration::ZERO);
/// let head = table.position().unwrap();
/// let missed = Missed::collect(Revision::ZERO, head, |from, chunks| log.keys_from(from, chunks));
/// let shortened = Shortened::of(&missed.unwrap());
/// assert_eq!(shortened.dropped(), 1);
/// assert!(!shortened.counts(Revision(1)) && shortened.counts(Revision(3)));
/// ```
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub struct Shortened {
    first: Revision,
    /// Bit n is about the change at `first` and n.
    counts: Box<[u64]>,
    dropped: u64,
    head: Position,
}

impl Shortened {
    /// Finds the last change of every key: some 30 ns a change. It takes 20 bytes a key meanwhile.
    ///
    /// Keys are told apart by their hashes. Two that collide (2^64 tries by whoever chooses keys) would
    /// make one of them be left out; comparing roots finds that.
    pub fn of(missed: &Missed) -> Self {
        let changes: usize = missed.keys.iter().map(|keys| keys.len()).sum();
        let mut counts = vec![0_u64; changes.div_ceil(64)].into_boxed_slice();
        // Hashed anew, with a key that nobody knows: whoever chooses keys can have their hashes begin alike.
        let mut seen = HashSet::new();
        let newest_first = missed.keys.iter().rev().flat_map(|keys| keys.iter().rev());
        for (key, index) in newest_first.zip((0..changes).rev()) {
            if seen.insert(key)
                && let Some(word) = counts.get_mut(index / 64)
            {
                *word |= 1 << (index % 64);
            }
        }
        Self {
            first: missed.first,
            counts,
            dropped: (changes - seen.len()) as u64,
            head: missed.head,
        }
    }

    /// How many changes are left out.
    pub fn dropped(&self) -> u64 {
        self.dropped
    }

    /// Whether the change at this revision is the last of its key.
    pub fn counts(&self, revision: Revision) -> bool {
        let index = revision.0.checked_sub(self.first.0).and_then(|n| usize::try_from(n).ok());
        let word = index.and_then(|index| Some((self.counts.get(index / 64)?, index % 64)));
        word.is_some_and(|(word, bit)| word >> bit & 1 == 1)
    }

    /// The first change from this revision on that counts.
    pub fn next(&self, from: Revision) -> Option<Revision> {
        let from = usize::try_from(from.0.saturating_sub(self.first.0)).ok()?;
        let mut mask = u64::MAX << (from % 64);
        for (word, bits) in self.counts.iter().enumerate().skip(from / 64) {
            let bits = bits & mask;
            if bits != 0 {
                return Some(self.first.plus(64 * word as u64 + u64::from(bits.trailing_zeros())));
            }
            mask = u64::MAX;
        }
        None
    }

    /// Where it ends.
    pub fn end(&self) -> Position {
        self.head
    }
}
