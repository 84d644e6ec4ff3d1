//! The keys that were updated while a diff runs.

use crate::table::Values;
use crate::tree::{KeyHash, KeyPrefix};

/// Hashes of the keys of all live changes that were put on the wire since it began.
///
/// Much is added and little asked, so adding is a copy, and order is made by whoever asks: sorted runs, each at
/// least twice as long as the next, as in a log-structured merge tree (O'Neil et al. 1996).
#[derive(Clone, Debug, Default, PartialEq, Eq, Hash)]
pub(super) struct Updated {
    /// Sorted, none twice in a run.
    runs: Vec<Vec<KeyHash>>,
    /// As they came.
    recent: Vec<KeyHash>,
    /// How many there were when they were last counted.
    counted: usize,
}

impl Updated {
    /// These were updated, too.
    pub(super) fn extend(&mut self, keys: &[KeyHash]) {
        self.recent.extend_from_slice(keys);
    }

    /// Whether there are more than `limit` keys. Keys that were updated over and over are found to be the
    /// same ones when as many have been added as there were; so up to twice the limit are held.
    pub(super) fn exceeds(&mut self, limit: usize) -> bool {
        let added = self.recent.len() + self.runs.iter().map(Vec::len).sum::<usize>();
        if added <= limit.max(2 * self.counted) {
            return false;
        }
        self.recent.extend(self.runs.drain(..).flatten());
        self.sort();
        self.counted = self.runs.iter().map(Vec::len).sum();
        self.counted > limit
    }

    /// Takes out what was updated; how much that is.
    pub(super) fn suppress(&mut self, values: &mut Values, deletes: bool) -> u64 {
        self.sort();
        let read = values.writes.len() + values.deletes.len();
        values.writes.retain(|(hash, ..)| !self.contains(hash));
        values.deletes.retain(|prefix| !deletes || !self.any_covered(*prefix));
        (read - values.writes.len() - values.deletes.len()) as u64
    }

    /// How many of these were not updated.
    pub(super) fn count_others<'a>(&mut self, keys: impl IntoIterator<Item = &'a KeyHash>) -> u64 {
        self.sort();
        keys.into_iter().filter(|hash| !self.contains(hash)).count() as u64
    }

    fn sort(&mut self) {
        if self.recent.is_empty() {
            return;
        }
        let mut run = std::mem::take(&mut self.recent);
        run.sort_unstable();
        while let Some(longer) = self.runs.pop_if(|last| last.len() < 2 * run.len()) {
            run.extend(longer);
            // It finds the two runs, and merges them.
            run.sort();
        }
        run.dedup();
        self.runs.push(run);
    }

    fn contains(&self, hash: &KeyHash) -> bool {
        self.runs.iter().any(|run| run.binary_search(hash).is_ok())
    }

    fn any_covered(&self, prefix: KeyPrefix) -> bool {
        self.runs.iter().any(|run| {
            let first = run.partition_point(|hash| hash < prefix.first());
            run.get(first).is_some_and(|hash| prefix.covers(hash))
        })
    }
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeSet;

    use proptest::prelude::*;

    use super::*;

    fn hash(number: u8) -> KeyHash {
        KeyHash::of(&[number])
    }

    proptest! {
        #[test]
        fn it_is_a_set(chunks in proptest::collection::vec((proptest::collection::vec(0..60_u8, 0..20), any::<bool>()), 0..30)) {
            let (mut updated, mut set) = (Updated::default(), BTreeSet::new());
            for (chunk, asked) in chunks {
                let keys: Vec<KeyHash> = chunk.iter().map(|number| hash(*number)).collect();
                updated.extend(&keys);
                set.extend(keys);
                if asked {
                    let all: Vec<KeyHash> = (0..60).map(hash).collect();
                    let others = all.iter().filter(|hash| !set.contains(hash)).count() as u64;
                    prop_assert_eq!(updated.count_others(&all), others);
                    for hash in all {
                        let prefix = KeyPrefix::new(&hash.as_bytes()[..6]).unwrap();
                        prop_assert_eq!(updated.any_covered(prefix), set.contains(&hash));
                    }
                    prop_assert!(updated.runs.windows(2).all(|pair| pair[0].len() >= pair[1].len()));
                }
                if updated.exceeds(40) {
                    prop_assert!(set.len() > 40);
                }
                prop_assert!(set.len() <= 80, "{} are held", set.len());
            }
        }
    }

    #[test]
    fn one_key_over_and_over_is_one_key() {
        let mut updated = Updated::default();
        for _ in 0..1000 {
            updated.extend(&[hash(1), hash(2)]);
            assert!(!updated.exceeds(2));
            assert!(updated.recent.len() <= 4, "{}", updated.recent.len());
        }
        updated.extend(&[hash(3), hash(4), hash(5)]);
        assert!(updated.exceeds(2));
    }
}
