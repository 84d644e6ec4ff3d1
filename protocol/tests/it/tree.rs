//! The tree against a plain map.

use std::collections::BTreeMap;

use proptest::prelude::*;
use tablecast_protocol::{Entry, Hash, KeyHash, KeyPrefix, Tree};

type Map = BTreeMap<Vec<u8>, Vec<u8>>;

#[derive(Clone, Debug)]
enum Step {
    Insert(Vec<u8>, Vec<u8>),
    InsertAll(Vec<(Vec<u8>, Vec<u8>)>),
    Remove(Vec<u8>),
    Root,
    Snapshot,
}

/// Few enough keys that they meet, enough of them that leaves split and merge.
fn key() -> impl Strategy<Value = Vec<u8>> {
    prop_oneof![
        8 => (0_u16..600).prop_map(|n| n.to_be_bytes().to_vec()),
        1 => Just(vec![]),
        1 => (0_u8..4).prop_map(|n| vec![n; 40]),
    ]
}

fn steps() -> impl Strategy<Value = Vec<Step>> {
    let step = prop_oneof![
        60 => (key(), proptest::collection::vec(any::<u8>(), 0..3))
            .prop_map(|(key, value)| Step::Insert(key, value)),
        3 => proptest::collection::vec((key(), proptest::collection::vec(any::<u8>(), 0..3)), 0..90)
            .prop_map(Step::InsertAll),
        40 => key().prop_map(Step::Remove),
        3 => Just(Step::Root),
        3 => Just(Step::Snapshot),
    ];
    proptest::collection::vec(step, 0..900)
}

fn assert_equal(tree: &Tree, map: &Map) {
    assert_eq!(tree.len(), map.len());
    let mut entries: Vec<&Entry> = tree.iter().collect();
    assert_eq!(entries.len(), tree.len());
    assert!(entries.is_sorted_by_key(|entry| *entry.key_hash()));
    entries.sort_by_key(|entry| entry.key().to_vec());
    for (entry, (key, value)) in entries.iter().zip(map) {
        assert_eq!(entry.key(), key);
        assert_eq!(entry.hash(), &Hash::of_entry(key, value));
        assert_eq!(tree.get(key), Some(*entry));
    }
    let rebuilt = Tree::build(map);
    assert_eq!(tree.root(), rebuilt.root(), "the root depends on more than the content");
}

proptest! {
    #[test]
    fn is_a_map(steps in steps()) {
        let (mut tree, mut map) = (Tree::new(), Map::new());
        let mut snapshots = Vec::new();
        for step in steps {
            match step {
                Step::Insert(key, value) => {
                    let old = map.insert(key.clone(), value.clone());
                    let hash = old.map(|old| Hash::of_entry(&key, &old));
                    prop_assert_eq!(tree.insert(&key, &value), hash);
                }
                Step::InsertAll(entries) => {
                    tree.insert_all(entries.iter().map(|(k, v)| Entry::new(k, v)).collect());
                    map.extend(entries);
                }
                Step::Remove(key) => {
                    let hash = map.remove(&key).map(|old| Hash::of_entry(&key, &old));
                    prop_assert_eq!(tree.remove(&key), hash);
                    prop_assert_eq!(tree.get(&key), None);
                }
                Step::Root => {
                    tree.root();
                }
                Step::Snapshot => snapshots.push((tree.clone(), map.clone())),
            }
            prop_assert_eq!(tree.len(), map.len());
        }
        assert_equal(&tree, &map);
        for (tree, map) in &snapshots {
            assert_equal(tree, map);
        }
    }

    #[test]
    fn order_does_not_matter(
        entries in proptest::collection::btree_map(key(), any::<u8>(), 0..400),
        seed in any::<u64>(),
    ) {
        let mut shuffled: Vec<_> = entries.iter().map(|(k, v)| (k.clone(), [*v])).collect();
        fastrand::Rng::with_seed(seed).shuffle(&mut shuffled);
        let mut one_by_one = Tree::new();
        for (key, value) in &shuffled {
            one_by_one.insert(key, value);
        }
        prop_assert_eq!(&one_by_one, &Tree::build(entries.iter().map(|(k, v)| (k, [*v]))));
        prop_assert_eq!(one_by_one, Tree::build(shuffled));
    }
}

#[test]
fn of_a_key_built_twice_the_last_value_counts() {
    let tree = Tree::build([("a", "1"), ("b", "2"), ("a", "3")]);
    assert_eq!(tree, Tree::build([("b", "2"), ("a", "3")]));
    assert_eq!(tree.len(), 2);
}

#[test]
fn a_large_table_is_built_in_its_order() {
    // More than one thread takes at a time, twice over; the second value of a key is in another piece.
    let entries = (0..200_000_u32).map(|n| ((n % 100_000).to_be_bytes(), n.to_be_bytes()));
    let mut one_by_one = Tree::new();
    for (key, value) in entries.clone().skip(100_000) {
        one_by_one.insert(&key, &value);
    }
    assert_eq!(Tree::build(entries.clone()).len(), 100_000);
    assert_eq!(Tree::build(entries.clone()), one_by_one);
    assert_eq!(entries.map(|(k, v)| Entry::new(&k, &v)).collect::<Tree>(), one_by_one);
}

#[test]
fn many_threads_hash_what_one_does() {
    let entry = |n: u32, value: u32| Entry::new(&n.to_be_bytes(), &value.to_be_bytes());
    let mut little_by_little: Tree = (0..100_000).map(|n| entry(n, 0)).collect();
    let mut at_once = little_by_little.clone();
    // Few enough behind each root that one thread hashes them, and with the others all at once.
    for first in (0..5000).step_by(50) {
        little_by_little.insert_all((first..first + 50).map(|n| entry(n, 1)).collect());
        little_by_little.root();
    }
    at_once.insert_all((0..5000).map(|n| entry(n, 1)).collect());
    assert_eq!(at_once.root(), little_by_little.root());
    assert_eq!(at_once.root(), at_once.clone().root());
}

#[test]
fn key_and_value_do_not_run_into_each_other() {
    assert_ne!(Hash::of_entry(b"ab", b"c"), Hash::of_entry(b"a", b"bc"));
    assert_ne!(Tree::build([("", "")]).root(), Tree::new().root());
}

#[test]
fn long_inputs_hash_like_short_ones() {
    // Both ways of hashing cover the same bytes: 1 + 8 + 100 + 147 is the longest short one.
    for value in [146, 147, 148, 5000] {
        let bytes = [&[2][..], &100_u64.to_le_bytes(), &[7; 100], &vec![9; value]].concat();
        let whole = blake3_hex(&bytes);
        assert_eq!(Hash::of_entry(&[7; 100], &vec![9; value]).to_string(), whole[..48]);
    }
}

fn blake3_hex(bytes: &[u8]) -> String {
    blake3::hash(bytes).to_hex().to_string()
}

#[test]
fn a_leaf_of_colliding_keys_holds_any_number() {
    // Keys cannot be made to collide in 128 bits, so entries are: 60 of them, a leaf's chunk is 42.
    let entries = (0..60_u8).map(|n| Entry::new(&[n], b"")).collect::<Vec<_>>();
    let all: Vec<_> = entries.iter().flat_map(|entry| *entry.hash().as_bytes()).collect();
    let mut hasher = blake3::Hasher::new();
    hasher.update(&[0]).update(&all);
    assert_eq!(entries.len() * Hash::BYTES, all.len());
    let tree = entries.into_iter().collect::<Tree>();
    assert_eq!(tree.len(), 60);
    // 60 entries are no leaf here, but the hash of a long leaf is that of its bytes.
    assert_ne!(tree.root().to_string(), hasher.finalize().to_hex()[..48]);
}

#[test]
fn prefixes_find_their_keys() {
    let tree = Tree::build((0..5000_u32).map(|n| (n.to_be_bytes(), "")));
    for entry in tree.iter().step_by(97) {
        for length in [1, 2, 3, 6, 16] {
            let prefix = KeyPrefix::new(&entry.key_hash().as_bytes()[..length]).unwrap();
            let expected = tree.iter().filter(|entry| prefix.covers(entry.key_hash())).count();
            assert_eq!(tree.get_prefix(prefix).count(), expected);
            assert!(tree.get_prefix(prefix).all(|entry| prefix.covers(entry.key_hash())));
        }
    }
    assert_eq!(KeyPrefix::new(&[]), None);
    assert_eq!(KeyPrefix::new(&[0; KeyHash::BYTES + 1]), None);
}

#[test]
fn a_root_on_a_snapshot_serves_whoever_shares_its_nodes() {
    let mut tree = Tree::build((0..10_000_u32).map(|n| (n.to_be_bytes(), "")));
    let snapshot = tree.clone();
    let root = std::thread::spawn(move || snapshot.root()).join().unwrap();
    assert_eq!(tree.root(), root);
    tree.insert(b"one more", b"");
    assert_ne!(tree.root(), root);
    tree.remove(b"one more");
    assert_eq!(tree.root(), root);
}
