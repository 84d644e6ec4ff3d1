//! The keys that were updated while a diff runs.

use crate::diff::{Difference, One};
use crate::table::Values;
use crate::tree::{KeyHash, KeyPrefix};

/// How many keys a [`Shard`] has at most before it is two: 8 KiB of them, which halving goes through in some three cache
/// lines. No piece of memory is large then, so that what is freed is of use to others.
const SHARD: usize = 512;

/// How many keys a shard takes as they come before it brings them into order: few enough to look at each.
const RECENT: usize = 32;

/// Hashes of the keys of all live changes that were put on the wire since it began: a B+ tree of two levels (Bayer and
/// McCreight, 1972) whose leaves bring into order many at a time.
#[derive(Clone, Debug, Default, PartialEq, Eq, Hash)]
pub(super) struct Updated {
    /// The least hash that each shard may have, in their order.
    firsts: Vec<KeyHash>,
    shards: Vec<Shard>,
    /// How many there are in all of them, some of them twice.
    held: usize,
}

#[derive(Clone, Debug, Default, PartialEq, Eq, Hash)]
struct Shard {
    /// In their order, none twice.
    keys: Vec<KeyHash>,
    /// As they came.
    recent: Vec<KeyHash>,
}

impl Updated {
    /// These were updated, too.
    pub(super) fn extend(&mut self, keys: &[KeyHash]) {
        if self.shards.is_empty() {
            self.firsts.push(KeyHash::from_bytes([0; KeyHash::BYTES]));
            self.shards.push(Shard::default());
        }
        for key in keys {
            let at = self.place(key);
            let Some(shard) = self.shards.get_mut(at) else { continue };
            shard.recent.push(*key);
            self.held += 1;
            if shard.recent.len() == RECENT {
                self.held -= shard.sort();
                if let Some(behind) = shard.split() {
                    self.firsts.splice(at + 1..at + 1, behind.keys.first().copied());
                    self.shards.insert(at + 1, behind);
                }
            }
        }
    }

    /// Which shard has this key, if one has.
    fn place(&self, key: &KeyHash) -> usize {
        self.firsts.partition_point(|first| first <= key).saturating_sub(1)
    }

    /// Whether there are more than `limit` keys. Those that there are twice are found when there may be a sixteenth more, or whoever
    /// updates as many over and over would have them looked for each time.
    pub(super) fn exceeds(&mut self, limit: usize) -> bool {
        if self.held <= limit.saturating_add(limit / 16) {
            return false;
        }
        self.held -= self.shards.iter_mut().map(Shard::sort).sum::<usize>();
        self.held > limit
    }

    /// Takes out what was updated.
    pub(super) fn suppress(&self, values: &mut Values, deletes: bool) {
        values.writes.retain(|(hash, ..)| !self.contains(hash));
        values.deletes.retain(|prefix| !deletes || !self.any_covered(*prefix));
    }

    /// Takes from the end of what a walk found, until there are `many` that were not updated, or four times as many were
    /// looked at; the others would be taken out when they have been read.
    pub(super) fn skim(&self, found: &mut Difference, many: usize) -> Difference {
        let mut part = Difference::default();
        for _ in 0..4 * many {
            match found.pop() {
                Some(One::Write(entry)) if !self.contains(entry.key_hash()) => {
                    part.writes.push(entry);
                }
                Some(One::Delete(prefix)) if !self.any_covered(prefix) => {
                    part.deletes.push(prefix);
                }
                Some(One::Write(_) | One::Delete(_)) => {}
                None => break,
            }
            if part.len() == many {
                break;
            }
        }
        part.writes.reverse();
        part
    }

    /// How many of these were not updated.
    pub(super) fn count_others<'a>(&self, keys: impl IntoIterator<Item = &'a KeyHash>) -> u64 {
        keys.into_iter().filter(|hash| !self.contains(hash)).count() as u64
    }

    fn contains(&self, hash: &KeyHash) -> bool {
        let shard = self.shards.get(self.place(hash));
        shard.is_some_and(|Shard { keys, recent }| {
            keys.binary_search(hash).is_ok() || recent.contains(hash)
        })
    }

    fn any_covered(&self, prefix: KeyPrefix) -> bool {
        let shards = self.place(prefix.first())..=self.place(&prefix.last());
        self.shards.get(shards).unwrap_or_default().iter().any(|Shard { keys, recent }| {
            let at = keys.partition_point(|key| key < prefix.first());
            keys.get(at).into_iter().chain(recent).any(|hash| prefix.covers(hash))
        })
    }
}

impl Shard {
    /// Brings into order what came. How many there were twice.
    fn sort(&mut self) -> usize {
        let before = self.keys.len() + self.recent.len();
        self.recent.sort_unstable();
        self.recent.dedup();
        if !self.recent.is_empty() {
            self.keys = merge(&self.keys, &self.recent);
            self.recent.clear();
        }
        before - self.keys.len()
    }

    /// The upper half, if there are too many.
    fn split(&mut self) -> Option<Self> {
        let half = self.keys.len() / 2;
        (half > SHARD / 2)
            .then(|| Self { keys: self.keys.split_off(half), recent: Vec::with_capacity(RECENT) })
    }
}

/// Both are in order, with none twice.
fn merge(long: &[KeyHash], short: &[KeyHash]) -> Vec<KeyHash> {
    let mut merged = Vec::with_capacity(long.len() + short.len());
    let mut long = long.iter().copied().peekable();
    for key in short.iter().copied() {
        while let Some(before) = long.next_if(|other| *other < key) {
            merged.push(before);
        }
        long.next_if_eq(&key);
        merged.push(key);
    }
    merged.extend(long);
    merged
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeSet;

    use proptest::prelude::*;

    use super::*;
    use crate::tree::Entry;

    fn hash(number: u8) -> KeyHash {
        KeyHash::of(&[number])
    }

    proptest! {
        #[test]
        fn it_is_a_set(
            chunks in proptest::collection::vec((proptest::collection::vec(any::<u16>(), 0..400), any::<bool>()), 0..60),
            (different, bits, length) in (1..20_000_u16, 0..120_u32, 1..5_usize),
            limit in 0..5000_usize,
        ) {
            // Spread evenly, or crowded.
            let hash = |number: u16| {
                let hash = u128::from_be_bytes(*KeyHash::of(&(number % different).to_be_bytes()).as_bytes());
                KeyHash::from_bytes((hash >> bits).to_be_bytes())
            };
            let (mut updated, mut set) = (Updated::default(), BTreeSet::new());
            for (chunk, asked) in chunks {
                let keys: Vec<KeyHash> = chunk.into_iter().map(hash).collect();
                updated.extend(&keys);
                set.extend(keys);
                prop_assert!(updated.held <= set.len() + RECENT * updated.shards.len());
                prop_assert!(updated.firsts.is_sorted() && !updated.exceeds(usize::MAX));
                if asked {
                    let exceeds = updated.exceeds(limit);
                    let most = if exceeds { usize::MAX } else { limit + limit / 16 };
                    prop_assert!(set.len() <= most && (set.len() > limit || !exceeds));
                }
                for number in (0..500).map(|n| n * 131) {
                    let hash = hash(number);
                    prop_assert_eq!(updated.contains(&hash), set.contains(&hash));
                    let prefix = KeyPrefix::new(&hash.as_bytes()[..length]).unwrap();
                    let covered = set.range(prefix.first()..).next().is_some_and(|key| prefix.covers(key));
                    prop_assert_eq!(updated.any_covered(prefix), covered);
                }
            }
        }
    }

    proptest! {
        #[test]
        fn what_is_to_be_read_was_not_updated(
            writes in proptest::collection::vec(0..60_u8, 0..20),
            deletes in proptest::collection::vec(0..60_u8, 0..20),
            many in 1..30_usize,
            keys in proptest::collection::vec(0..60_u8, 0..60),
        ) {
            let entry = |number: &u8| Entry::new(&[*number], b"");
            let prefix = |number: &u8| KeyPrefix::new(&hash(*number).as_bytes()[..6]).unwrap();
            let mut found = Difference {
                writes: writes.iter().map(entry).collect(),
                deletes: deletes.iter().map(prefix).collect(),
            };
            let mut updated = Updated::default();
            updated.extend(&keys.iter().map(|number| hash(*number)).collect::<Vec<_>>());
            let mut all = Difference::default();
            while !found.is_empty() {
                let before = found.len();
                let part = updated.skim(&mut found, many);
                let looked_at = before - found.len();
                prop_assert!((1..=4 * many).contains(&looked_at));
                prop_assert!(part.len() == many || looked_at == 4 * many || found.is_empty());
                prop_assert!(found.writes.capacity() <= 2 * found.writes.len() + 1);
                all.writes.splice(0..0, part.writes);
                all.deletes.extend(part.deletes);
            }
            all.deletes.reverse();
            let others = |numbers: &[u8]| {
                let others = numbers.iter().filter(|number| !keys.contains(number));
                others.copied().collect::<Vec<_>>()
            };
            prop_assert_eq!(all.writes, others(&writes).iter().map(entry).collect::<Vec<_>>());
            prop_assert_eq!(all.deletes, others(&deletes).iter().map(prefix).collect::<Vec<_>>());
        }
    }

    #[test]
    fn one_key_over_and_over_is_one_key() {
        let mut updated = Updated::default();
        for _ in 0..1000 {
            updated.extend(&[hash(1), hash(2)]);
            assert!(!updated.exceeds(2));
            assert!(updated.held <= 2 + RECENT, "{}", updated.held);
        }
        updated.extend(&[hash(3), hash(4), hash(5)]);
        assert!(updated.exceeds(2));
    }
}
