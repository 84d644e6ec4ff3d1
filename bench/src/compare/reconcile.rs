//! Rows about finding what differs: the walk, beside other ways to reconcile two sets. Both ends are in
//! one thread, so that all bytes and all work are counted and nothing else is.

use std::collections::HashMap;

use anyhow::{Context, ensure};
use negentropy::{Id, Negentropy, NegentropyStorageVector};
use riblt::{RatelessIBLT, Symbol, UnmanagedRatelessIBLT};
use tablecast::Change;
use tablecast_bench::{KEY_BYTES, differences, keys, store};
use tablecast_protocol::Tree;

use super::{Bench, Goal, Line};
use crate::diff::{VALUE_BYTES, tree_of, walk};
use crate::machine::cpu_ms;

/// A key and the half of its value: random bytes already, so that nobody pays for a hash.
type EntryId = [u8; 32];

/// How many keys differ in the rows that go through several.
const DIFFERING: [usize; 5] = [1, 100, 1000, 10_000, 100_000];

/// The decoder of `riblt` is quadratic: 10,000 take a minute.
const RIBLT_MOST: usize = 1000;

/// What one reconciliation took.
struct Took {
    rounds: u32,
    bytes: usize,
    cpu_ms: f64,
}

/// The tables of both ends, as trees and as ids.
struct Ends {
    trees: (Tree, Tree),
    ids: (Vec<EntryId>, Vec<EntryId>),
    /// In how many ids they differ: a changed key has two.
    differing_ids: usize,
}

impl Ends {
    fn new(
        keys: &[[u8; KEY_BYTES]],
        tree: &Tree,
        differ: usize,
        round: u64,
    ) -> anyhow::Result<Self> {
        let mut follower = tree.clone();
        let (mut there, mut differing_ids) = (ids(keys)?, 0);
        let here: Vec<_> = there.values().copied().collect();
        for change in differences(keys, differ, VALUE_BYTES, round) {
            let old = match &change {
                Change::Write { key, value } => {
                    follower.insert(key, value);
                    differing_ids += 1;
                    there.insert(key[..].try_into()?, id(key, value)?)
                }
                Change::Delete { key } => {
                    follower.remove(key);
                    there.remove(&key[..])
                }
            };
            differing_ids += usize::from(old.is_some());
        }
        follower.root();
        let trees = (tree.clone(), follower);
        Ok(Self { trees, ids: (here, there.into_values().collect()), differing_ids })
    }

    fn walk(&self, differ: usize) -> anyhow::Result<Took> {
        let before = cpu_ms();
        let (walked, found) = walk(&self.trees.0, &self.trees.1)?;
        let cpu_ms = cpu_ms() - before;
        ensure!(found.len() == differ as u64, "the walk found {}", found.len());
        Ok(Took { rounds: walked.rounds, bytes: walked.bytes, cpu_ms })
    }

    fn negentropy(&self) -> anyhow::Result<Took> {
        let sealed = |ids: &[EntryId]| -> Result<_, negentropy::Error> {
            let mut storage = NegentropyStorageVector::with_capacity(ids.len());
            for id in ids {
                storage.insert(0, Id::from_byte_array(*id))?;
            }
            storage.seal()?;
            Ok(storage)
        };
        let (here, there) = (sealed(&self.ids.0)?, sealed(&self.ids.1)?);
        let before = cpu_ms();
        let mut server = Negentropy::borrowed(&here, 0)?;
        let mut follower = Negentropy::borrowed(&there, 0)?;
        let (mut have, mut need) = (Vec::new(), Vec::new());
        let mut asked = Some(server.initiate()?);
        let (mut rounds, mut bytes) = (0, 0);
        while let Some(question) = asked {
            let answer = follower.reconcile(&question)?;
            rounds += 1;
            bytes += question.len() + answer.len();
            asked = server.reconcile_with_ids(&answer, &mut have, &mut need)?;
        }
        let cpu_ms = cpu_ms() - before;
        let found = have.len() + need.len();
        ensure!(found == self.differing_ids, "negentropy found {found}");
        Ok(Took { rounds, bytes, cpu_ms })
    }

    /// Bytes of the cells until all is decoded: id, its hash of 8 bytes and a count of 1 byte each. They
    /// are streamed, so there is one round.
    fn riblt(&self) -> anyhow::Result<Took> {
        let cells = |ids: &[EntryId]| RatelessIBLT::new(ids.iter().map(|id| Item(*id)).collect());
        let before = cpu_ms();
        let mut here: RatelessIBLT<Item, Vec<Item>> = cells(&self.ids.0);
        let mut there: RatelessIBLT<Item, Vec<Item>> = cells(&self.ids.1);
        // As many as are needed on average, and some more until it can be decoded.
        let mut count = self.differing_ids * 135 / 100 + 1;
        let found = loop {
            // Each extension goes through all keys again: at once, not cell by cell.
            here.extend_coded_symbols(count);
            there.extend_coded_symbols(count);
            let mut mine = UnmanagedRatelessIBLT::<Item>::new();
            let mut theirs = UnmanagedRatelessIBLT::<Item>::new();
            for at in 0..count {
                mine.add_coded_symbol(&here.get_coded_symbol(at));
                theirs.add_coded_symbol(&there.get_coded_symbol(at));
            }
            let mut difference = mine.collapse(&theirs);
            let found = difference.peel_all_symbols();
            if difference.is_empty() {
                break found.len();
            }
            count += count / 10 + 1;
        };
        ensure!(found == self.differing_ids, "riblt found {found} of {}", self.differing_ids);
        let cpu_ms = cpu_ms() - before;
        Ok(Took { rounds: 1, bytes: count * (32 + 8 + 1), cpu_ms })
    }
}

#[derive(Clone, Debug)]
struct Item(EntryId);

impl Symbol for Item {
    const BYTE_ARRAY_LENGTH: usize = 32;

    fn encode_to_bytes(&self) -> Vec<u8> {
        self.0.to_vec()
    }

    fn decode_from_bytes(bytes: &Vec<u8>) -> Self {
        Self(bytes.first_chunk().copied().unwrap_or_default())
    }
}

fn id(key: &[u8], value: &[u8]) -> anyhow::Result<EntryId> {
    let half = value.get(..16).context("a value has 32 bytes")?;
    [key, half].concat().try_into().ok().context("a key has 16 bytes")
}

fn ids(keys: &[[u8; KEY_BYTES]]) -> anyhow::Result<HashMap<[u8; KEY_BYTES], EntryId>> {
    let entries = tablecast::Store::reader(&store(keys, VALUE_BYTES)).snapshot();
    entries
        .map(|entry| {
            let (key, value) = entry?;
            Ok((key[..].try_into()?, id(&key, &value)?))
        })
        .collect()
}

fn table(bench: &Bench) -> anyhow::Result<(Vec<[u8; KEY_BYTES]>, Tree)> {
    let keys = keys(bench.keys(1_000_000));
    let tree = tree_of(&store(&keys, VALUE_BYTES))?;
    tree.root();
    Ok((keys, tree))
}

pub(crate) fn cpu(bench: &Bench) -> anyhow::Result<Vec<Line>> {
    let (keys, tree) = table(bench)?;
    let differ = bench.keys(1000);
    let ends = Ends::new(&keys, &tree, differ, 0)?;
    let (ours, theirs) = (ends.walk(differ)?, ends.negentropy()?);
    let what = format!("processor time of both ends, {differ} of {} differ", keys.len());
    let line = Line::new(what, "ms").ours(ours.cpu_ms);
    Ok(vec![line.theirs("negentropy", theirs.cpu_ms).goal(Goal::AtMost(1.0 / 6.0))])
}

pub(crate) fn bytes(bench: &Bench) -> anyhow::Result<Vec<Line>> {
    let (keys, tree) = table(bench)?;
    let mut lines = Vec::new();
    for differ in DIFFERING.map(|differ| bench.keys(differ)) {
        let ends = Ends::new(&keys, &tree, differ, 0)?;
        let ours = ends.walk(differ)?;
        let line = |what: &str, unit, ours| {
            Line::new(format!("{what}, {differ} of {} differ", keys.len()), unit).ours(ours)
        };
        let theirs = ends.negentropy()?;
        lines.push(
            line("bytes", "bytes", ours.bytes as f64).theirs("negentropy", theirs.bytes as f64),
        );
        let rounds = line("rounds", "rounds", f64::from(ours.rounds));
        lines.push(rounds.theirs("negentropy", f64::from(theirs.rounds)));
        if differ <= RIBLT_MOST {
            let theirs = ends.riblt()?;
            let bytes = line("bytes", "bytes", ours.bytes as f64);
            lines.push(bytes.theirs("riblt", theirs.bytes as f64));
            let cpu = line("processor time", "ms", ours.cpu_ms);
            lines.push(cpu.theirs("riblt", theirs.cpu_ms));
        }
    }
    Ok(lines)
}
