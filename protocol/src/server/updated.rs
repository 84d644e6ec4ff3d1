//! The keys that were updated while a diff runs.

use crate::diff::{Difference, Found};
use crate::table::Values;
use crate::tree::{KeyHash, KeyPrefix};

/// Hashes of keys in their order, none twice, and where to look for one.
///
/// Hashes are spread evenly: of as many spans of equal length as there are places in `starts`, each holds some
/// [`SPAN`] of them. So a lookup waits for memory once or twice, where halving would for each of its steps.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
struct Run {
    keys: Vec<KeyHash>,
    /// Where each span begins; behind the last one, where that ends.
    starts: Vec<u32>,
}

/// How many keys a span of a [`Run`] holds, on the average: 128 bytes of them, for 4 of its place.
const SPAN: usize = 8;

/// Hashes of the keys of all live changes that were put on the wire since it began.
///
/// Much is added and little asked, so adding is a copy, and order is made by whoever asks: sorted runs, each at
/// least twice as long as the next, as in a log-structured merge tree (O'Neil et al. 1996).
#[derive(Clone, Debug, Default, PartialEq, Eq, Hash)]
pub(super) struct Updated {
    runs: Vec<Run>,
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
        let added = self.recent.len() + self.sorted();
        if added <= limit.max(2 * self.counted) {
            return false;
        }
        self.recent.extend(self.runs.drain(..).flat_map(|run| run.keys));
        self.sort();
        self.counted = self.sorted();
        self.counted > limit
    }

    /// How many there are in the runs.
    fn sorted(&self) -> usize {
        self.runs.iter().map(|run| run.keys.len()).sum()
    }

    /// Takes out what was updated; how much that is.
    pub(super) fn suppress(&mut self, values: &mut Values, deletes: bool) -> u64 {
        self.sort();
        let read = values.writes.len() + values.deletes.len();
        values.writes.retain(|(hash, ..)| !self.contains(hash));
        values.deletes.retain(|prefix| !deletes || !self.any_covered(*prefix));
        (read - values.writes.len() - values.deletes.len()) as u64
    }

    /// Takes from the end of what a walk found, until there are `many` that were not updated, or four times as many were
    /// looked at; the others would be taken out when they have been read. Those, and how many others there were.
    pub(super) fn skim(&mut self, found: &mut Difference, many: usize) -> (Difference, u64) {
        self.sort();
        let (mut part, mut others) = (Difference::default(), 0);
        for _ in 0..4 * many {
            match found.pop() {
                Some(Found::Write(entry)) if !self.contains(entry.key_hash()) => {
                    part.writes.push(entry);
                }
                Some(Found::Delete(prefix)) if !self.any_covered(prefix) => {
                    part.deletes.push(prefix);
                }
                Some(_) => others += 1,
                None => break,
            }
            if part.len() == many {
                break;
            }
        }
        part.writes.reverse();
        (part, others)
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
        let mut keys = std::mem::take(&mut self.recent);
        keys.sort_unstable();
        while let Some(longer) = self.runs.pop_if(|last| last.keys.len() < 2 * keys.len()) {
            keys.extend(longer.keys);
            // It finds the two runs, and merges them.
            keys.sort();
        }
        keys.dedup();
        self.runs.push(Run::new(keys));
    }

    fn contains(&self, hash: &KeyHash) -> bool {
        self.runs.iter().any(|run| run.from(hash).first() == Some(hash))
    }

    fn any_covered(&self, prefix: KeyPrefix) -> bool {
        let covered =
            |run: &Run| run.from(prefix.first()).first().is_some_and(|hash| prefix.covers(hash));
        self.runs.iter().any(covered)
    }
}

impl Run {
    /// Of keys in their order, none twice.
    fn new(keys: Vec<KeyHash>) -> Self {
        let spans = keys.len() / SPAN + 1;
        let mut starts = Vec::with_capacity(spans + 1);
        for (key, at) in keys.iter().zip(0..) {
            starts.resize(starts.len().max(span(key, spans) + 1), at);
        }
        starts.resize(spans + 1, u32::try_from(keys.len()).unwrap_or(u32::MAX));
        Self { keys, starts }
    }

    /// The keys from the first one on that is not below this one.
    fn from(&self, hash: &KeyHash) -> &[KeyHash] {
        let span = span(hash, self.starts.len() - 1);
        let place = |span: usize| self.starts.get(span).map_or(0, |at| *at as usize);
        let (first, end) = (place(span), place(span + 1));
        let below = |keys: &[KeyHash]| keys.partition_point(|key| key < hash);
        let at = first + self.keys.get(first..end).map_or(0, below);
        self.keys.get(at..).unwrap_or_default()
    }
}

/// In which of so many spans of all hashes one is.
fn span(hash: &KeyHash, spans: usize) -> usize {
    // Less than `spans`, since the hash is less than 1.
    let span = (u128::from(hash.first_bits()) * spans as u128) >> 64;
    usize::try_from(span).unwrap_or(0)
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
                    prop_assert!(updated.runs.windows(2).all(|pair| pair[0].keys.len() >= pair[1].keys.len()));
                }
                if updated.exceeds(40) {
                    prop_assert!(set.len() > 40);
                }
                prop_assert!(set.len() <= 80, "{} are held", set.len());
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
                let (part, others) = updated.skim(&mut found, many);
                let looked_at = before - found.len();
                prop_assert!((1..=4 * many).contains(&looked_at));
                prop_assert_eq!(part.len() as u64 + others, looked_at as u64);
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

        #[test]
        fn the_place_is_that_of_a_binary_search(numbers in proptest::collection::vec(any::<u128>(), 0..80), bits in 0..128_u32) {
            // Spread evenly, and crowded.
            let hash = |number: u128| KeyHash::from_bytes((number >> bits).to_be_bytes());
            let mut keys: Vec<KeyHash> = numbers.iter().copied().map(hash).collect();
            keys.sort_unstable();
            keys.dedup();
            let run = Run::new(keys.clone());
            for number in numbers.iter().flat_map(|number| [*number, number.wrapping_add(1 << bits), !number]).map(hash) {
                let place = keys.partition_point(|other| *other < number);
                prop_assert_eq!(run.from(&number), &keys[place..]);
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
