//! The server's retained tail of recent changes: the queue of every follower at once.

use std::collections::{BTreeMap, VecDeque};
use std::sync::Arc;

use bytes::Bytes;

use crate::message::{DiffId, Way};
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
        self.frame.len() + self.keys.len() * KeyHash::BYTES
    }
}

/// A bounded queue of chunks that any number of cursors read. A cursor is a [`Revision`]: that of
/// the next change to be sent.
///
/// Memory is bounded by the log, whatever the followers do. One that does not read falls off the
/// tail: [`Log::at`] says [`Next::Fell`].
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub struct Log {
    chunks: VecDeque<Chunk>,
    bytes: usize,
    max_bytes: usize,
    head: Revision,
    chain: Chain,
    /// Places at which the stream of one follower is to end its diff.
    marks: BTreeMap<(FollowerId, DiffId), (Revision, Chain)>,
    checkpoint: Option<Checkpoint>,
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
        }
    }

    /// Appends what follows the head; `chain` is the chain behind it.
    ///
    /// # Panics
    /// If the chunk does not follow the head: a gap in the log would be a gap in every table.
    pub fn push(&mut self, chunk: Chunk, chain: Chain) {
        assert_eq!(chunk.first, self.head.next(), "a chunk follows the head of the log");
        self.head = self.head.plus(chunk.keys.len() as u64);
        self.chain = chain;
        self.bytes += chunk.bytes();
        self.chunks.push_back(chunk);
        while self.bytes > self.max_bytes && self.chunks.len() > 1 {
            self.bytes -= self.chunks.pop_front().map_or(0, |chunk| chunk.bytes());
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
        self.chunks.front().map_or(self.head.next(), |chunk| chunk.first)
    }

    /// Bytes kept: frames and key hashes.
    pub fn bytes(&self) -> usize {
        self.bytes
    }

    /// How to bring a follower that presents this position to the head of this history, which is that
    /// of `epoch`. It is resumed only if the log still has everything behind the position, and if the
    /// chain proves that everything before is the same.
    pub fn way(&self, epoch: Epoch, presented: Option<&Position>) -> Way {
        let Some(at) = presented else { return Way::NoPosition };
        if at.epoch != epoch {
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
        if chain == at.chain { Way::Resumed } else { Way::OtherChain }
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
        if cursor > self.head {
            return Next::End;
        }
        let index = self.chunks.partition_point(|chunk| chunk.first < cursor);
        match self.chunks.get(index) {
            Some(chunk) if chunk.first == cursor => Next::Chunk(chunk),
            Some(_) | None => Next::Fell,
        }
    }
}
