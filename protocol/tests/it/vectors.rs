//! The test vectors of docs/protocol.md: what is made here must be those bytes, and those bytes must
//! be what is made here.
//!
//! A vector that is missing or differs fails with the line that belongs into the page.

use std::collections::{BTreeMap, BTreeSet};
use std::fmt::{Debug, Write};

use tablecast_protocol::diff::{Query, Step, Walk, Widths, answer};
use tablecast_protocol::wire::{self, Changes, HEADER_BYTES, Message, Raw, VERSION};
use tablecast_protocol::{
    AbortReason, Chain, Change, DiffId, Digest, Epoch, Hash, KeyHash, Limits, Position, Reason,
    Revision, ToClient, ToServer, Tree, Way,
};

const PAGE: &str = include_str!("../../../docs/protocol.md");

/// The lines `name = hex` of the section with the test vectors.
fn vectors() -> BTreeMap<&'static str, &'static str> {
    let (_, section) = PAGE.split_once("\n## Test vectors\n").expect("the page has the section");
    let mut vectors = BTreeMap::new();
    for line in section.lines() {
        if let Some((name, hex)) = line.split_once(" = ")
            && name.bytes().all(|byte| byte.is_ascii_alphanumeric() || b"_.".contains(&byte))
        {
            assert_eq!(vectors.insert(name, hex), None, "{name} comes twice");
        }
    }
    vectors
}

fn hex(bytes: &[u8]) -> String {
    bytes.iter().fold(String::new(), |mut text, byte| {
        write!(text, "{byte:02x}").unwrap();
        text
    })
}

fn unhex(text: &str) -> Vec<u8> {
    assert!(text.len().is_multiple_of(2), "half a byte in {text}");
    (0..text.len())
        .step_by(2)
        .map(|at| u8::from_str_radix(&text[at..at + 2], 16).unwrap())
        .collect()
}

/// All of these are on the page, and nothing else that begins with `kind`.
fn compare(kind: &str, expected: &[(String, Vec<u8>)]) {
    let vectors = vectors();
    let mut wrong = String::new();
    for (name, bytes) in expected {
        let made = hex(bytes);
        if vectors.get(name.as_str()) != Some(&made.as_str()) {
            writeln!(wrong, "{name} = {made}").unwrap();
        }
    }
    assert!(wrong.is_empty(), "docs/protocol.md should say\n{wrong}");
    let known: BTreeSet<_> = expected.iter().map(|(name, _)| name.as_str()).collect();
    let more = vectors.keys().find(|name| name.starts_with(kind) && !known.contains(*name));
    assert_eq!(more, None, "a vector that no test knows");
}

/// Both ways, for every message of one direction; `tags` are all there are.
fn messages<M: Message + PartialEq + Debug>(
    kind: &str,
    tags: &[(u8, &'static str)],
    messages: &[(&str, M)],
) {
    let named: Vec<_> = messages
        .iter()
        .map(|(variant, message)| {
            let name = format!("{kind}.{}{variant}", message.name());
            (name, wire::encode(message).to_vec())
        })
        .collect();
    compare(kind, &named);
    let vectors = vectors();
    for ((name, _), (_, message)) in named.iter().zip(messages) {
        let frame = unhex(vectors[name.as_str()]);
        let (header, payload) = frame.split_at(HEADER_BYTES);
        assert_eq!(header, u32::try_from(payload.len()).unwrap().to_be_bytes(), "{name}");
        assert_eq!(wire::decode::<M>(payload, &Limits::default()).as_ref(), Ok(message), "{name}");
    }
    for (tag, name) in tags {
        let has = |(_, message): &&(&str, M)| message.name() == *name;
        let (_, message) = messages.iter().find(has).unwrap_or_else(|| panic!("no {name}"));
        // A message is an array of fewer than 16, so that its tag is the second byte.
        assert_eq!(wire::encode(message)[HEADER_BYTES + 1], *tag, "{name}");
    }
}

fn bytes<const N: usize>(first: u8) -> [u8; N] {
    std::array::from_fn(|n| first + n as u8)
}

fn hash(first: u8) -> Hash {
    Hash::from_bytes(bytes(first))
}

fn position() -> Position {
    Position {
        epoch: Epoch::from_bytes(bytes(0x10)),
        revision: Revision(300),
        chain: Chain::from_bytes(bytes(0x20)),
    }
}

/// n keys: the number as four bytes, big endian; the value is always the same.
fn numbered(count: u32) -> Tree {
    Tree::build((0..count).map(|number| (number.to_be_bytes(), "value")))
}

fn root_query() -> Query {
    Query { depth: 0, levels: 1, small: 32, widths: Widths::SHORT, nodes: bytes::Bytes::new() }
}

fn node_query() -> Query {
    Query { depth: 1, nodes: bytes::Bytes::from_static(&[0x00, 0x70]), ..root_query() }
}

#[test]
fn messages_to_the_server() {
    let diff = DiffId(1);
    let sync_req = |max_deletes| {
        let (root, len) = (hash(0x40), 40);
        ToServer::SyncReq { diff, jumps: 0, full: false, root, len, max_deletes }
    };
    let vectors = [
        ("", ToServer::hello("edge-1", &Limits::default(), None)),
        (".position", ToServer::hello("", &Limits::default(), Some(position()))),
        ("", sync_req(1000)),
        (".unbounded", sync_req(u64::MAX)),
        ("", {
            let answer = answer(&numbered(40), &node_query(), 1 << 20).unwrap();
            ToServer::SyncResponse { diff, answer: Raw(answer) }
        }),
        ("", ToServer::RepairAck { diff, failed: 0, micros: 250 }),
        ("", ToServer::Verified { revision: Revision(70_000), root: hash(0x40) }),
        ("", ToServer::Ping {}),
        ("", ToServer::Pong {}),
        ("", ToServer::Farewell { reason: Reason::Stopping, text: "bye".to_owned() }),
    ];
    messages("to_server", ToServer::TAGS, &vectors);
}

#[test]
fn messages_to_the_client() {
    let diff = DiffId(1);
    let Position { epoch, revision, chain } = position();
    let limits = Limits::default();
    let welcome = |way| ToClient::Welcome {
        version: VERSION,
        tree: 1,
        epoch,
        revision,
        chain,
        frame_bytes: limits.frame_bytes as u64,
        key_bytes: limits.key_bytes as u64,
        value_bytes: limits.value_bytes as u64,
        way,
    };
    let vectors = [
        ("", welcome(Way::NotInLog)),
        (".shortened", welcome(Way::Shortened)),
        (
            "",
            ToClient::Refuse {
                reason: Reason::Version,
                text: "peer speaks version 2, this end speaks version 1".to_owned(),
            },
        ),
        ("", ToClient::Farewell { reason: Reason::Silent, text: String::new() }),
        (
            "",
            ToClient::Live {
                first: Revision(301),
                before: chain.tag(),
                changes: Changes(vec![
                    Change::write("colour", "blue"),
                    Change::delete("size"),
                    Change::write("", ""),
                ]),
            },
        ),
        ("", ToClient::FellBehind { jumps: 1, revision: Revision(1 << 32), chain }),
        ("", ToClient::SyncStart { diff }),
        ("", ToClient::SyncRequest { diff, query: node_query() }),
        ("", ToClient::SyncSeq { diff, writes: 1, deletes: 2 }),
        (
            "",
            ToClient::Repair {
                diff,
                writes: Changes(vec![Change::write("colour", "blue")]),
                prefix_bytes: 6,
                deletes: Raw(bytes::<12>(0x60).to_vec().into()),
            },
        ),
        (
            ".writes_only",
            ToClient::Repair {
                diff,
                writes: Changes(vec![Change::write("colour", "blue")]),
                prefix_bytes: 1,
                deletes: Raw::default(),
            },
        ),
        (
            "",
            ToClient::SyncDone {
                diff,
                revision: Revision(70_000),
                chain: chain.tag(),
                suppressed: 3,
                failed: 0,
            },
        ),
        ("", ToClient::SyncAbort { diff, reason: AbortReason::Updated }),
        (".held", ToClient::SyncAbort { diff, reason: AbortReason::Held }),
        ("", ToClient::Verify { revision: Revision(70_000), root: hash(0x40) }),
        ("", ToClient::Ping {}),
        ("", ToClient::Pong {}),
        ("", ToClient::Mark { revision: Revision(70_000) }),
        (
            "",
            ToClient::CatchUp {
                revision: Revision(70_000),
                changes: Changes(vec![Change::write("colour", "blue"), Change::delete("size")]),
            },
        ),
        ("", ToClient::CaughtUp { revision: Revision(70_000), chain }),
    ];
    messages("to_client", ToClient::TAGS, &vectors);
}

#[test]
fn hashes() {
    let write = Chain::START.fold(&Digest::of(&Change::write("colour", "blue")));
    let delete = write.fold(&Digest::of(&Change::delete("size")));
    let vectors = [
        ("key_hash", KeyHash::of(b"colour").as_bytes().to_vec()),
        ("key_hash.empty", KeyHash::of(b"").as_bytes().to_vec()),
        ("entry_hash", Hash::of_entry(b"colour", b"blue").as_bytes().to_vec()),
        ("entry_hash.empty", Hash::of_entry(b"", b"").as_bytes().to_vec()),
        ("root.0", Tree::new().root().as_bytes().to_vec()),
        ("root.1", Tree::build([("colour", "blue")]).root().as_bytes().to_vec()),
        ("root.32", numbered(32).root().as_bytes().to_vec()),
        ("root.40", numbered(40).root().as_bytes().to_vec()),
        ("root.1000", numbered(1000).root().as_bytes().to_vec()),
        ("chain.write", write.as_bytes().to_vec()),
        ("chain.delete", delete.as_bytes().to_vec()),
        ("chain.tag", delete.tag().as_bytes().to_vec()),
    ];
    compare("hash", &vectors.map(|(name, bytes)| (format!("hash.{name}"), bytes)));
}

/// The trie by hand, from nothing but what the page says of it.
#[test]
fn roots_follow_from_the_page() {
    fn blake3_24(parts: &[&[u8]]) -> Vec<u8> {
        blake3::hash(&parts.concat()).as_bytes()[..24].to_vec()
    }

    fn node(entries: &[(Vec<u8>, Vec<u8>)], depth: usize) -> Vec<u8> {
        if entries.len() <= 32 || depth == 32 {
            let hashes: Vec<u8> = entries.iter().flat_map(|(_, hash)| hash.clone()).collect();
            return blake3_24(&[&[0], &hashes]);
        }
        let nibble = |hash: &[u8]| (hash[depth / 2] >> (4 * (1 - depth % 2))) & 15;
        let (mut bitmap, mut children) = (0_u16, Vec::new());
        for child in 0..16 {
            let below = entries.iter().filter(|(key, _)| nibble(key) == child);
            let below: Vec<_> = below.cloned().collect();
            if !below.is_empty() {
                bitmap |= 1 << child;
                children.extend(node(&below, depth + 1));
            }
        }
        blake3_24(&[&[1], &bitmap.to_le_bytes(), &children])
    }

    let vectors = vectors();
    for count in [0_u32, 32, 40, 1000] {
        let entry = |number: u32| {
            let key = number.to_be_bytes();
            let hash = blake3_24(&[&[2], &(key.len() as u64).to_le_bytes(), &key, b"value"]);
            (blake3::hash(&key).as_bytes()[..16].to_vec(), hash)
        };
        let mut entries: Vec<_> = (0..count).map(entry).collect();
        entries.sort();
        assert_eq!(hex(&node(&entries, 0)), vectors[format!("hash.root.{count}").as_str()]);
    }
}

#[test]
fn query_and_answer() {
    let tree = numbered(40);
    let asked = |query: &Query| {
        let message = ToClient::SyncRequest { diff: DiffId(1), query: query.clone() };
        wire::encode(&message).to_vec()
    };
    let full = Query { widths: Widths::FULL, ..node_query() };
    let answered = |query: &Query| answer(&tree, query, 1 << 20).unwrap().to_vec();
    compare(
        "walk",
        &[
            ("walk.root.query".to_owned(), asked(&root_query())),
            ("walk.root.answer".to_owned(), answered(&root_query())),
            ("walk.nodes.query".to_owned(), asked(&node_query())),
            ("walk.nodes.answer".to_owned(), answered(&node_query())),
            ("walk.full.query".to_owned(), asked(&full)),
            ("walk.full.answer".to_owned(), answered(&full)),
        ],
    );
}

/// The queries of the page are those that a server asks, and the answers lead to what it says.
#[test]
fn the_walk_of_the_page() {
    let mut server = numbered(40);
    let follower = numbered(40);
    let found = {
        // Node 0 lacks a key that the follower has, node 7 has one of another value.
        let in_node = |nibble: u8| {
            follower.iter().find(|entry| entry.key_hash().as_bytes()[0] >> 4 == nibble).unwrap()
        };
        server.remove(in_node(0).key());
        server.insert(in_node(7).key(), b"another");
        let (mut walk, step) =
            Walk::new(server, Some(follower.root()), follower.len() as u64, false, 1 << 20, 100);
        assert_eq!(step, Step::Ask(root_query()));
        let step = walk.handle_answer(&answer(&follower, &root_query(), 1 << 20).unwrap()).unwrap();
        assert_eq!(step, Step::Ask(node_query()));
        let step = walk.handle_answer(&answer(&follower, &node_query(), 1 << 20).unwrap()).unwrap();
        let Step::Done(found) = step else { panic!("{step:?}") };
        let found = found.first;
        assert!(found.writes.iter().map(|entry| entry.key()).eq([in_node(7).key()]));
        let deleted = &in_node(0).key_hash().as_bytes()[..6];
        assert_eq!(found.deletes.iter().map(|p| p.as_bytes()).collect::<Vec<_>>(), [deleted]);
        found
    };
    assert_eq!(found.len(), 2);
}
