//! What waits for followers although the log has gone on without it.

use std::collections::VecDeque;
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};

use tablecast_protocol::Revision;

/// Bytes that wait to be written to one follower and that the log no longer has: no other follower shares them. They are few
/// for one, but each may wait for a long frame.
#[derive(Debug)]
pub(super) struct Held {
    /// Where in all that is written to it something begins, and the change behind which that stands. In order;
    /// of what has been written already only the last is left.
    marks: VecDeque<(u64, Revision)>,
    bytes: usize,
    /// The same of all followers.
    all: Arc<AtomicUsize>,
}

impl Held {
    /// Of one more follower.
    pub(super) fn new(all: Arc<AtomicUsize>) -> Self {
        Self { marks: VecDeque::new(), bytes: 0, all }
    }

    /// What is queued from this place on stands behind this change.
    pub(super) fn queued(&mut self, from: u64, behind: Revision) {
        self.marks.push_back((from, behind));
    }

    /// So much has been written, and so many bytes wait, of a log that begins at `tail`: how many bytes are held for all
    /// followers, if any are for this one.
    pub(super) fn count(&mut self, written: u64, waiting: usize, tail: Revision) -> Option<usize> {
        while self.marks.get(1).is_some_and(|(from, _)| *from <= written) {
            self.marks.pop_front();
        }
        let gone = self.marks.front().is_some_and(|(_, behind)| behind.next() < tail);
        let before = std::mem::replace(&mut self.bytes, if gone { waiting } else { 0 });
        self.all.fetch_add(self.bytes, Ordering::Relaxed);
        let all = self.all.fetch_sub(before, Ordering::Relaxed) - before;
        (self.bytes > 0).then_some(all)
    }
}

impl Drop for Held {
    fn drop(&mut self) {
        self.all.fetch_sub(self.bytes, Ordering::Relaxed);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_the_log_has_is_not_held() {
        let all = Arc::new(AtomicUsize::new(0));
        let mut held = Held::new(Arc::clone(&all));
        assert_eq!(held.count(0, 0, Revision(1)), None);
        // Changes 1 to 3 are queued, then 4 to 9.
        held.queued(0, Revision(0));
        held.queued(100, Revision(3));
        assert_eq!(held.count(0, 300, Revision(1)), None);
        assert_eq!(held.count(50, 250, Revision(2)), Some(250));
        let mut other = Held::new(Arc::clone(&all));
        other.queued(0, Revision(0));
        assert_eq!(other.count(0, 1000, Revision(2)), Some(1250));
        // Of what waits now the log has all.
        assert_eq!(held.count(100, 200, Revision(4)), None);
        assert_eq!(all.load(Ordering::Relaxed), 1000);
        assert_eq!(held.count(299, 1, Revision(5)), Some(1001));
        drop(other);
        assert_eq!(held.count(300, 0, Revision(5)), None);
        assert_eq!(all.load(Ordering::Relaxed), 0);
    }
}
