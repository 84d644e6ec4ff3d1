//! Walk and answer against a naive diff.

use std::collections::{BTreeMap, BTreeSet};

use proptest::prelude::*;
use tablecast_protocol::diff::{Difference, Found, Query, Step, Walk, Widths, answer, collect};
use tablecast_protocol::{Entry, Hash, Tree};

type Map = BTreeMap<Vec<u8>, Vec<u8>>;

/// Of how many keys that a walk found the entries are told at once.
const PART_KEYS: usize = 500;

pub struct Walked {
    pub difference: Difference,
    pub rounds: usize,
    pub query_bytes: usize,
    pub answer_bytes: usize,
}

pub fn walk(server: &Tree, follower: &Tree, full: bool, max_bytes: usize) -> Walked {
    let (mut walk, mut step) = Walk::new(
        server.clone(),
        Some(follower.root()),
        follower.len() as u64,
        full,
        1 << 20,
        PART_KEYS,
    );
    let (mut rounds, mut query_bytes, mut answer_bytes) = (0, 0, 0);
    loop {
        match step {
            Step::Ask(query) => {
                rounds += 1;
                query_bytes += query.nodes.len() + 16;
                let answer = answer(follower, &query, max_bytes).unwrap();
                answer_bytes += answer.len();
                step = walk.handle_answer(&answer).unwrap();
            }
            Step::Done(found) => {
                let difference = all(server, found);
                return Walked { difference, rounds, query_bytes, answer_bytes };
            }
        }
    }
}

/// All parts of what was found.
fn all(server: &Tree, found: Found) -> Difference {
    let Found { first: Difference { mut writes, deletes }, writes: count, mut rest } = found;
    let most = PART_KEYS.max(server.len() / 16);
    let whole = |part: &[Entry]| part.len() <= most && part.is_sorted_by_key(Entry::key);
    assert!(whole(&writes), "too many, or not in the order of the keys");
    assert!(!writes.is_empty() || rest.is_empty(), "the first part is empty, and not the last");
    while !rest.is_empty() {
        let part = collect(server, &mut rest, PART_KEYS);
        assert!(whole(&part), "too many, or not in the order of the keys");
        assert!(!part.is_empty() || rest.is_empty(), "a part is empty, and not the last");
        writes.extend(part);
    }
    assert_eq!(writes.len() as u64, count);
    Difference { writes, deletes }
}

/// Does what the difference says to a copy of the follower's map.
fn repaired(server: &Map, follower: &Map, tree: &Tree, difference: &Difference) -> Map {
    let mut map = follower.clone();
    for prefix in &difference.deletes {
        for entry in tree.get_prefix(*prefix) {
            assert!(!server.contains_key(entry.key()), "a key that the server has is deleted");
            map.remove(entry.key());
        }
    }
    for key in difference.writes.iter().map(Entry::key) {
        map.insert(key.to_vec(), server[key].clone());
    }
    map
}

fn table(keys: std::ops::Range<usize>) -> impl Strategy<Value = Map> {
    proptest::collection::btree_map(
        (0_u16..6000).prop_map(|n| n.to_be_bytes().to_vec()),
        proptest::collection::vec(any::<u8>(), 1),
        keys,
    )
}

proptest! {
    #[test]
    fn finds_what_a_naive_diff_finds(
        server in table(0..3000),
        edits in table(0..300),
        drops in proptest::collection::btree_set(0_usize..3000, 0..40),
        full in any::<bool>(),
        max_bytes in prop_oneof![Just(1 << 20), 40_usize..2000],
    ) {
        let mut follower = server.clone();
        for index in drops {
            if let Some(key) = server.keys().nth(index) {
                follower.remove(key);
            }
        }
        follower.extend(edits);
        check(&server, &follower, full, max_bytes)?;
        check(&follower, &server, full, max_bytes)?;
    }

    #[test]
    fn finds_all_between_strangers(server in table(0..600), follower in table(0..600)) {
        check(&server, &follower, false, 1 << 20)?;
        check(&server, &follower, true, 100)?;
    }

    #[test]
    fn any_bytes_are_an_error_and_no_panic(
        bytes in proptest::collection::vec(any::<u8>(), 0..200),
        nodes in proptest::collection::vec(any::<u8>(), 0..40),
        (depth, levels, small) in (0_u8..40, 0_u8..5, 0_u32..50),
        widths in (0_u8..30, 0_u8..30, 0_u8..30),
    ) {
        let server = Tree::build((0..500_u32).map(|n| (n.to_be_bytes(), "server")));
        let (mut walk, _) = Walk::new(server.clone(), Some(Tree::new().root()), 1, false, 1 << 20, 10);
        let mut bytes = bytes::Bytes::from(bytes);
        // A walk goes on as long as the answers are well-formed, whatever they say.
        for _ in 0..20 {
            match walk.handle_answer(&bytes) {
                Ok(Step::Ask(_)) => bytes = bytes.slice(bytes.len() / 3..),
                Ok(Step::Done(_)) | Err(_) => break,
            }
        }
        let (node, key, entry) = widths;
        let widths = Widths { node, key, entry };
        let query = Query { depth, levels, small, widths, nodes: nodes.into() };
        if let Ok(answer) = answer(&server, &query, 1000) {
            prop_assert!(answer.len() < 1000 + 4096 * 24 + 2 * 273);
        }
    }
}

fn check(server: &Map, follower: &Map, full: bool, max_bytes: usize) -> Result<(), TestCaseError> {
    let (ours, theirs) = (Tree::build(server), Tree::build(follower));
    let Walked { difference, .. } = walk(&ours, &theirs, full, max_bytes);
    prop_assert_eq!(&repaired(server, follower, &theirs, &difference), server);
    let naive: BTreeSet<&[u8]> = server
        .iter()
        .filter(|(key, value)| follower.get(*key) != Some(value))
        .map(|(key, _)| &key[..])
        .collect();
    let writes: BTreeSet<&[u8]> = difference.writes.iter().map(Entry::key).collect();
    prop_assert_eq!(writes.len(), difference.writes.len(), "a key is named twice");
    prop_assert_eq!(writes, naive);
    let extra = follower.keys().filter(|key| !server.contains_key(*key)).count();
    prop_assert_eq!(difference.deletes.len(), extra);
    Ok(())
}

fn filled(keys: u32) -> Tree {
    Tree::build((0..keys).map(|n| (n.to_be_bytes(), "value")))
}

#[test]
fn equal_and_empty_cost_no_query_or_one() {
    let (full, empty) = (filled(3000), Tree::new());
    let equal = walk(&full, &full.clone(), false, 1 << 20);
    assert_eq!((equal.rounds, equal.difference.len()), (0, 0));
    // An empty follower: what SyncReq says is enough.
    let bulk = walk(&full, &empty, false, 1 << 20);
    assert_eq!((bulk.rounds, bulk.difference.writes.len()), (0, 3000));
    // An empty server: one query brings the names of all that is to go.
    let purge = walk(&empty, &full, false, 1 << 20);
    assert_eq!((purge.rounds, purge.difference.deletes.len()), (1, 3000));
}

/// Children's hashes that differ from everybody's: one level, or two.
fn all_other(levels: u32) -> Vec<u8> {
    let below = if levels > 1 { all_other(levels - 1) } else { vec![7; 6] };
    [vec![0xff; 2], below.repeat(16)].concat()
}

/// A server that would send all open nodes again for each byte of an answer that covers one.
#[test]
fn a_follower_that_answers_bit_by_bit_is_not_asked_for_all_again() {
    let (mut walk, step) =
        Walk::new(filled(100_000), Some(Hash::from_bytes([7; 24])), 1, false, 1 << 20, 10);
    assert!(matches!(step, Step::Ask(_)));
    let mut received = 0;
    let mut sent = 0;
    // At depth 4 there are 65,536 nodes; then one of them at a time, with no entries.
    let root = [vec![0], all_other(2)].concat();
    let level = [vec![0], all_other(1)].concat();
    let answers = [root, level.repeat(256), level.repeat(4096)];
    let bit_by_bit = std::iter::repeat_n(vec![1], 1000);
    for answer in answers.into_iter().chain(bit_by_bit) {
        received += answer.len();
        match walk.handle_answer(&answer.into()).unwrap() {
            Step::Ask(query) => sent += query.nodes.len(),
            Step::Done(_) => panic!("nodes are open still"),
        }
    }
    assert!(sent <= 2 * received, "{sent} bytes are asked for {received}");
}

/// What is asked behind an answer: the depth, and how many nodes.
fn asked_behind(walk: &mut Walk, answer: Vec<u8>) -> (u8, usize) {
    match walk.handle_answer(&answer.into()) {
        Ok(Step::Ask(query)) => {
            (query.depth, query.nodes.len() / usize::from(query.depth.div_ceil(2)))
        }
        other => panic!("{other:?}"),
    }
}

/// A walk of a table of forty million that differs everywhere: most of a million nodes of the fifth level have more than a leaf.
/// The first of them are asked for.
fn at_the_fifth_level() -> Walk {
    let root = Some(Hash::from_bytes([7; 24]));
    let (mut walk, _) = Walk::new(filled(1000), root, 40_000_000, false, 1 << 20, 10);
    let root = [vec![0], all_other(2)].concat();
    let level = [vec![0], all_other(1)].concat();
    assert_eq!(asked_behind(&mut walk, root), (2, 256));
    assert_eq!(asked_behind(&mut walk, level.repeat(256)), (3, 4096));
    assert_eq!(asked_behind(&mut walk, level.repeat(4096)), (4, 65_536));
    assert_eq!(asked_behind(&mut walk, level.repeat(65_536)), (5, 65_536));
    walk
}

#[test]
fn a_walk_that_finds_more_than_it_keeps_goes_down_before_it_goes_on() {
    let mut walk = at_the_fifth_level();
    let level = [vec![0], all_other(1)].concat();
    // A sixteenth of this level, and what is below; then the next.
    for part in 1..=16 {
        assert_eq!(asked_behind(&mut walk, level.repeat(65_536)).0, 6, "{part}");
        for last in (0..16).map(|part| part == 15) {
            let next = walk.handle_answer(&vec![1; 65_536].into()).unwrap();
            match next {
                Step::Ask(query) => assert_eq!(query.depth, if last { 5 } else { 6 }),
                Step::Done(_) => assert!(part == 16 && last),
            }
        }
    }
}

/// Were all room used, the last of it would be for a node a query.
#[test]
fn a_walk_that_goes_down_asks_for_many_at_once() {
    let mut walk = at_the_fifth_level();
    // One child differs, and the others are not there.
    let one = [&[0, 0x80, 0][..], &[7; 6]].concat();
    let mut nodes = 65_536;
    let mut queries = 0;
    while let (5, next) = asked_behind(&mut walk, one.repeat(nodes)) {
        (nodes, queries) = (next, queries + 1);
        assert!(nodes >= 16_000, "{nodes} nodes in query {queries}");
    }
    assert!(queries < 30, "{queries} queries");
}

#[test]
fn no_more_entries_of_a_node_are_taken_than_were_asked_for() {
    for (count, fits) in [(32, true), (33, false)] {
        let follower = filled(count);
        let root = Some(follower.root());
        let (mut walk, step) = Walk::new(filled(1000), root, 40, false, 1 << 20, 10);
        let Step::Ask(query) = step else { panic!("the roots differ") };
        let query = Query { small: 1000, ..query };
        let answer = answer(&follower, &query, 1 << 20).unwrap();
        assert_eq!(walk.handle_answer(&answer).is_ok(), fits, "{count}");
    }
}

#[test]
fn a_nearly_empty_follower_costs_one_query() {
    let nearly = walk(&filled(3000), &filled(20), false, 1 << 20);
    assert_eq!((nearly.rounds, nearly.difference.writes.len()), (1, 2980));
}

/// Neither one byte more, nor children where there was room.
#[test]
fn entries_are_answered_if_they_fit_exactly() {
    let widths = Widths { node: 6, key: 6, entry: 4 };
    for count in [32, 126, 127, 1000] {
        let tree = filled(count);
        let nodes = bytes::Bytes::new();
        let query = Query { depth: 0, levels: 1, small: u32::MAX, widths, nodes };
        let whole = answer(&tree, &query, 1 << 20).unwrap();
        assert_eq!(whole.len(), count as usize * 10 + if count < 127 { 1 } else { 2 });
        assert_eq!(answer(&tree, &query, whole.len()).unwrap(), whole);
        assert_eq!(answer(&tree, &query, whole.len() - 1).unwrap()[0], 0, "{count}: children");
    }
}

/// An empty node is one byte, whatever fits.
#[test]
fn nothing_is_answered_as_nothing() {
    let nodes = bytes::Bytes::new();
    let query = Query { depth: 0, levels: 2, small: 0, widths: Widths::FULL, nodes };
    assert_eq!(answer(&Tree::new(), &query, 0).unwrap()[..], [1]);
}

/// A server that accepts small frames asks for what fits them.
#[test]
fn two_levels_are_asked_for_if_they_fit() {
    let (server, follower) = (filled(5000), filled(4900));
    for (frame_bytes, full) in [(4096, true), (4096, false), (1024, false), (64 << 10, true)] {
        let root = Some(follower.root());
        let (mut walk, mut step) =
            Walk::new(server.clone(), root, 4900, full, frame_bytes / 2, PART_KEYS);
        while let Step::Ask(query) = step {
            let answer = answer(&follower, &query, frame_bytes - 64).unwrap();
            assert!(answer.len() <= frame_bytes - 64, "{frame_bytes} {full}: {}", answer.len());
            step = walk.handle_answer(&answer).unwrap();
        }
        let Step::Done(found) = step else { panic!() };
        assert_eq!(all(&server, found).writes.len(), 100);
    }
}

#[test]
fn a_short_hash_that_was_fooled_is_seen_at_full_width() {
    // Two keys whose hashes share 48 bits are hard to find; a width of one byte shows the same.
    let server = filled(100);
    let query =
        |widths| Query { depth: 0, levels: 1, small: 1000, widths, nodes: bytes::Bytes::new() };
    let short = answer(&server, &query(Widths { node: 1, key: 1, entry: 1 }), 1 << 20).unwrap();
    let full = answer(&server, &query(Widths::FULL), 1 << 20).unwrap();
    assert_eq!((short.len(), full.len()), (1 + 100 * 2, 1 + 100 * 40));
}

/// What README promises of a table of a million, at a hundred thousand (a million takes longer than
/// a test should; `tablecast-bench diff` does that).
#[test]
fn bytes_and_rounds_stay_within_their_bounds() {
    let server = filled(100_000);
    for (differing, rounds, bytes) in [(1_usize, 3, 2600), (100, 3, 40_000), (1000, 3, 260_000)] {
        let mut follower = server.clone();
        for n in 0..differing as u32 {
            match n % 3 {
                0 => follower.insert(&(n * 97).to_be_bytes(), b"other"),
                1 => follower.remove(&(n * 97).to_be_bytes()),
                _ => follower.insert(&(1_000_000 + n).to_be_bytes(), b"extra"),
            };
        }
        let walked = walk(&server, &follower, false, 8 << 20);
        assert_eq!(walked.difference.len(), differing);
        assert!(walked.rounds <= rounds, "{} rounds for {differing}", walked.rounds);
        let both = walked.query_bytes + walked.answer_bytes;
        assert!(both <= bytes, "{both} bytes for {differing}");
    }
}
