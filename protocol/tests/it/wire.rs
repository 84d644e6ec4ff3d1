//! Round trips, hostile bytes, and the frames that are put together by hand.

use proptest::prelude::*;
use tablecast_protocol::diff::{Query, Widths};
use tablecast_protocol::wire::{self, Changes, HEADER_BYTES, LiveFrame, Message, Raw, VERSION};
use tablecast_protocol::{
    AbortReason, Chain, Change, DecodeError, DiffId, Epoch, Hash, Limits, MAX_CHANGES, MemoryStore,
    Position, Reason, Revision, Table, ToClient, ToServer, Way,
};

fn bytes() -> impl Strategy<Value = bytes::Bytes> {
    proptest::collection::vec(any::<u8>(), 0..300).prop_map(Into::into)
}

fn change() -> impl Strategy<Value = Change> {
    (bytes(), proptest::option::of(bytes())).prop_map(|(key, value)| match value {
        Some(value) => Change::Write { key, value },
        None => Change::Delete { key },
    })
}

fn hash() -> impl Strategy<Value = Hash> {
    any::<[u8; 24]>().prop_map(Hash::from_bytes)
}

fn position() -> impl Strategy<Value = Position> {
    (any::<[u8; 16]>(), any::<u64>(), any::<[u8; 24]>()).prop_map(|(epoch, revision, chain)| {
        Position {
            epoch: Epoch::from_bytes(epoch),
            revision: Revision(revision),
            chain: Chain::from_bytes(chain),
        }
    })
}

fn way() -> impl Strategy<Value = Way> {
    proptest::sample::select(Way::ALL)
}

fn abort_reason() -> impl Strategy<Value = AbortReason> {
    proptest::sample::select(AbortReason::ALL)
}

fn to_server() -> impl Strategy<Value = ToServer> {
    let diff = any::<u32>().prop_map(DiffId);
    prop_oneof![
        (proptest::option::of(position()), ".{0,20}").prop_map(|(position, name)| ToServer::hello(
            &name,
            &Limits::default(),
            position
        )),
        (diff.clone(), any::<u32>(), any::<bool>(), hash(), any::<u64>(), any::<u64>()).prop_map(
            |(diff, jumps, full, root, len, max_deletes)| {
                ToServer::SyncReq { diff, jumps, full, root, len, max_deletes }
            }
        ),
        (diff.clone(), bytes())
            .prop_map(|(diff, answer)| ToServer::SyncResponse { diff, answer: Raw(answer) }),
        (diff, any::<u32>(), any::<u32>()).prop_map(|(diff, failed, micros)| ToServer::RepairAck {
            diff,
            failed,
            micros
        }),
        (any::<u64>(), hash())
            .prop_map(|(revision, root)| ToServer::Verified { revision: Revision(revision), root }),
        Just(ToServer::Ping {}),
        Just(ToServer::Pong {}),
        ".{0,20}".prop_map(|text| ToServer::Farewell { reason: Reason::Stopping, text }),
    ]
}

fn to_client() -> impl Strategy<Value = ToClient> {
    let diff = any::<u32>().prop_map(DiffId);
    let changes = || proptest::collection::vec(change(), 0..20).prop_map(Changes);
    prop_oneof![
        (position(), any::<u64>(), way()).prop_map(|(position, bytes, way)| ToClient::Welcome {
            version: VERSION,
            tree: 1,
            epoch: position.epoch,
            revision: position.revision,
            chain: position.chain,
            frame_bytes: bytes,
            key_bytes: bytes,
            value_bytes: bytes,
            way,
        }),
        ".{0,20}".prop_map(|text| ToClient::Refuse { reason: Reason::Full, text }),
        ".{0,20}".prop_map(|text| ToClient::Farewell { reason: Reason::Silent, text }),
        (position(), changes()).prop_map(|(position, changes)| ToClient::Live {
            first: position.revision,
            before: position.chain.tag(),
            changes
        }),
        (position(), any::<u32>()).prop_map(|(position, jumps)| ToClient::FellBehind {
            jumps,
            revision: position.revision,
            chain: position.chain
        }),
        diff.clone().prop_map(|diff| ToClient::SyncStart { diff }),
        (diff.clone(), bytes()).prop_map(|(diff, nodes)| ToClient::SyncRequest {
            diff,
            query: Query { depth: 3, levels: 1, small: 32, widths: Widths::SHORT, nodes }
        }),
        (diff.clone(), any::<u64>()).prop_map(|(diff, writes)| ToClient::SyncSeq {
            diff,
            writes,
            deletes: 7
        }),
        (diff.clone(), changes(), bytes()).prop_map(|(diff, writes, deletes)| ToClient::Repair {
            diff,
            writes,
            prefix_bytes: 6,
            deletes: Raw(deletes)
        }),
        (diff.clone(), position()).prop_map(|(diff, position)| ToClient::SyncDone {
            diff,
            revision: position.revision,
            chain: position.chain.tag(),
            suppressed: 3,
            failed: 1
        }),
        (diff, abort_reason()).prop_map(|(diff, reason)| ToClient::SyncAbort { diff, reason }),
        (any::<u64>(), hash())
            .prop_map(|(revision, root)| ToClient::Verify { revision: Revision(revision), root }),
        any::<u64>().prop_map(|revision| ToClient::Mark { revision: Revision(revision) }),
        (any::<u64>(), changes()).prop_map(|(revision, changes)| ToClient::CatchUp {
            revision: Revision(revision),
            changes
        }),
        position().prop_map(|position| ToClient::CaughtUp {
            revision: position.revision,
            chain: position.chain
        }),
        Just(ToClient::Ping {}),
        Just(ToClient::Pong {}),
    ]
}

fn payload<M: Message>(message: &M) -> Vec<u8> {
    let frame = wire::encode(message);
    let length = u32::from_be_bytes(frame[..HEADER_BYTES].try_into().unwrap());
    assert_eq!(length as usize, frame.len() - HEADER_BYTES);
    frame[HEADER_BYTES..].to_vec()
}

fn round_trip<M: Message + PartialEq + std::fmt::Debug>(message: &M) {
    let mut payload = payload(message);
    let limits = Limits::default();
    assert_eq!(wire::decode::<M>(&payload, &limits).as_ref(), Ok(message));
    for cut in 0..payload.len() {
        assert!(wire::decode::<M>(&payload[..cut], &limits).is_err(), "cut off at {cut}");
    }
    payload.push(0xc0);
    let bytes = payload.len();
    assert_eq!(wire::decode::<M>(&payload, &limits), Err(DecodeError::Trailing { bytes }));
}

proptest! {
    #[test]
    fn messages_to_the_server_survive(message in to_server()) {
        round_trip(&message);
    }

    #[test]
    fn messages_to_the_client_survive(message in to_client()) {
        round_trip(&message);
    }

    #[test]
    fn any_bytes_are_an_error_and_no_panic(bytes in proptest::collection::vec(any::<u8>(), 0..100)) {
        let limits = Limits::default();
        if let Ok(message) = wire::decode::<ToServer>(&bytes, &limits) {
            prop_assert_eq!(wire::decode(&payload(&message), &limits), Ok(message));
        }
        if let Ok(message) = wire::decode::<ToClient>(&bytes, &limits) {
            prop_assert_eq!(wire::decode(&payload(&message), &limits), Ok(message));
        }
    }

    #[test]
    fn a_changed_byte_is_no_panic(
        message in to_client(),
        at in any::<proptest::sample::Index>(),
        byte in any::<u8>(),
    ) {
        let mut bytes = payload(&message);
        let at = at.index(bytes.len());
        bytes[at] = byte;
        let _ = wire::decode::<ToClient>(&bytes, &Limits::default());
    }

    #[test]
    fn live_frames_are_what_the_encoder_makes(
        changes in proptest::collection::vec(change(), 1..30),
        first in any::<u64>(),
        chain in any::<[u8; 24]>(),
    ) {
        let (first, chain) = (Revision(first), Chain::from_bytes(chain));
        let mut frame = LiveFrame::default();
        changes.iter().for_each(|change| frame.push(change));
        prop_assert_eq!(frame.changes(), changes.len());
        let live = ToClient::Live { first, before: chain.tag(), changes: Changes(changes) };
        prop_assert_eq!(frame.take(first, &chain), wire::encode(&live));
        prop_assert_eq!((frame.changes(), frame.bytes()), (0, 0));
    }
}

#[test]
fn another_version_is_named_whatever_comes_behind_it() {
    // [0, 7, "a field of the future", {1: 2}]
    let hello = [&[0x94, 0, 7, 0xb5][..], b"a field of the future", &[0x81, 1, 2]].concat();
    let error = wire::decode::<ToServer>(&hello, &Limits::default()).unwrap_err();
    assert_eq!(error, DecodeError::Version { theirs: 7, ours: VERSION });
    assert_eq!(error.to_string(), "peer speaks version 7, this end speaks version 1");

    // A Hello as it is now, of that version, and something behind it.
    let now = wire::encode(&ToServer::hello("", &Limits::default(), None));
    let mut hello = [&now[HEADER_BYTES..], b"more"].concat();
    hello[2] = 7;
    let error = wire::decode::<ToServer>(&hello, &Limits::default()).unwrap_err();
    assert_eq!(error, DecodeError::Version { theirs: 7, ours: VERSION });
}

#[test]
fn nothing_comes_behind_a_message() {
    let refused = |behind: &[u8]| {
        for more in [0, 10] {
            let bytes = [&[0x91, 5], behind, &vec![0xc0; more]].concat();
            let trailing = Err(DecodeError::Trailing { bytes: bytes.len() });
            assert_eq!(
                wire::decode::<ToServer>(&bytes, &Limits::default()),
                trailing,
                "{bytes:x?}"
            );
        }
    };
    (0..=255).for_each(|byte| refused(&[byte]));
    // The beginning of an array, and of a map.
    refused(&[0xdd, 0, 1, 0, 0]);
    refused(&[0xdf, 0, 1, 0, 0]);
}

#[test]
fn maps_are_no_messages() {
    let limits = Limits::default();
    let text = |text: &str| [&[0xa0 | text.len() as u8], text.as_bytes()].concat();
    let position = |epoch: &[u8], revision: &[u8], chain: &[u8], header| {
        let mut hello = payload(&ToServer::hello("", &limits, None));
        assert_eq!(hello.pop(), Some(0xc0));
        let epoch = [epoch, &[0xc4, 16], &[1; 16]].concat();
        let chain = [chain, &[0xc4, 24], &[2; 24]].concat();
        let bytes = [&hello[..], &[header], &epoch, revision, &[9], &chain].concat();
        wire::decode::<ToServer>(&bytes, &limits)
    };
    assert!(position(&[], &[], &[], 0x93).is_ok());
    let named = position(&text("epoch"), &text("revision"), &text("chain"), 0x83);
    assert!(matches!(named, Err(DecodeError::Malformed { .. })), "{named:?}");

    let query = |bytes: &[&[u8]]| {
        wire::decode::<ToClient>(&[&[0x93, 6, 1][..], &bytes.concat()].concat(), &limits)
    };
    let (list, raw) = ([0x93, 6, 6, 4], [0xc4, 0]);
    assert!(query(&[&[0x95, 0, 1, 32], &list, &raw]).is_ok());
    let map = |widths: &[u8]| {
        query(&[
            &[0x85],
            &[text("depth"), vec![0], text("levels"), vec![1], text("small"), vec![32]].concat(),
            &text("widths"),
            widths,
            &text("nodes"),
            &raw,
        ])
    };
    let widths = [&[0x83], &text("node")[..], &[6], &text("key"), &[6], &text("entry"), &[4]];
    let widths = widths.concat();
    for query in [map(&list), map(&widths), query(&[&[0x95, 0, 1, 32], &widths, &raw])] {
        assert!(matches!(query, Err(DecodeError::Malformed { .. })), "{query:?}");
    }
    // [{}], {0: 1}
    assert!(wire::decode::<ToServer>(&[0x91, 0x80], &limits).is_err());
    assert!(wire::decode::<ToServer>(&[0x81, 5, 1], &limits).is_err());
}

#[test]
fn a_refusal_of_a_later_version_is_heard() {
    let limits = Limits::default();
    for code in [&[9][..], &[100], &[0xcc, 254], &[0xcc, 255]] {
        let bytes = [&[0x93, 1], code, &[0xa5], b"later"].concat();
        let refuse = ToClient::Refuse { reason: Reason::Other, text: "later".to_owned() };
        assert_eq!(wire::decode(&bytes, &limits), Ok(refuse));
        let bytes = [&[0x93, 7], code, &[0xa5], b"later"].concat();
        let farewell = ToServer::Farewell { reason: Reason::Other, text: "later".to_owned() };
        assert_eq!(wire::decode(&bytes, &limits), Ok(farewell));
    }
    let other = ToClient::Refuse { reason: Reason::Other, text: String::new() };
    assert_eq!(payload(&other), [0x93, 1, 0xcc, 255, 0xa0]);
    // A code is one byte, and those of an abort are of this version.
    assert!(wire::decode::<ToClient>(&[0x93, 1, 0xcd, 1, 0, 0xa0], &limits).is_err());
    assert!(wire::decode::<ToClient>(&[0x93, 10, 1, 99], &limits).is_err());
}

#[test]
fn codes_that_this_version_does_not_have_are_refused() {
    let limits = Limits::default();
    let held = ToClient::SyncAbort { diff: DiffId(1), reason: AbortReason::Held };
    assert_eq!(wire::decode(&[0x93, 10, 1, 6], &limits), Ok(held));
    assert!(wire::decode::<ToClient>(&[0x93, 10, 1, 7], &limits).is_err());
    let mut welcome = payload(&ToClient::Welcome {
        version: VERSION,
        tree: 1,
        epoch: Epoch::from_bytes([7; 16]),
        revision: Revision(1),
        chain: Chain::START,
        frame_bytes: 0,
        key_bytes: 0,
        value_bytes: 0,
        way: Way::Shortened,
    });
    assert_eq!(welcome.pop(), Some(6));
    welcome.push(7);
    assert!(wire::decode::<ToClient>(&welcome, &limits).is_err());
}

#[test]
fn a_diff_is_not_asked_for_without_a_bound() {
    let (diff, root) = (DiffId(1), Hash::from_bytes([1; 24]));
    let mut bytes =
        payload(&ToServer::SyncReq { diff, jumps: 0, full: false, root, len: 1, max_deletes: 9 });
    assert!(wire::decode::<ToServer>(&bytes, &Limits::default()).is_ok());
    // One field less, and said so; and nil for it.
    assert_eq!((bytes[0], bytes.pop()), (0x97, Some(9)));
    let nil = [&bytes[..], &[0xc0]].concat();
    bytes[0] = 0x96;
    for bytes in [bytes, nil] {
        let error = wire::decode::<ToServer>(&bytes, &Limits::default()).unwrap_err();
        assert!(matches!(error, DecodeError::Malformed { .. }), "{error:?}");
    }
}

/// The decoder would take them for lists of numbers, and leave what is behind those unread.
#[test]
fn raw_bytes_are_no_list() {
    let limits = Limits::default();
    let ping = ToServer::Ping {};
    assert_eq!(wire::decode(&[0x91, 5], &limits), Ok(ping));
    let to_server: &[&[u8]] =
        &[&[0xc4, 1, 5], &[0xc6, 0, 0, 0, 1, 5], &[0xc4, 4, 3, 1, 0, 0], &[0xc4, 2, 0, 1]];
    for bytes in to_server {
        let error = wire::decode::<ToServer>(bytes, &limits).unwrap_err();
        assert!(matches!(error, DecodeError::Malformed { .. }), "{error:?}");
    }
    let widths = |widths: &[u8]| [&[0x93, 6, 1, 0x95, 0, 1, 0x20], widths, &[0xc4, 0]].concat();
    assert!(wire::decode::<ToClient>(&widths(&[0x93, 6, 6, 4]), &limits).is_ok());
    let to_client = [
        vec![0xc4, 2, 5, 1],
        widths(&[0xc4, 3, 6, 6, 4]),
        widths(&[0xc4, 5, 6, 6, 4, 9, 9]),
        // A query, and the changes of a live frame.
        vec![0x93, 6, 1, 0xc4, 5, 0, 1, 0x20, 6, 6],
        vec![0x94, 3, 1, 0xc4, 8, 0, 0, 0, 0, 0, 0, 0, 0, 0xc4, 0],
    ];
    for bytes in &to_client {
        let error = wire::decode::<ToClient>(bytes, &limits).unwrap_err();
        assert!(matches!(error, DecodeError::Malformed { .. }), "{error:?}");
    }
}

/// What is wrong is said shortly, and costs no more than it is long: the decoder repeats a text that is where none belongs.
#[test]
fn a_long_text_is_not_repeated() {
    let limits = Limits::default();
    let text = |length: u32| {
        let mut bytes = vec![0xdb];
        bytes.extend(length.to_be_bytes());
        bytes.resize(bytes.len() + length as usize, 1);
        bytes
    };
    for (length, long) in [(4096, false), (4097, true), (1 << 20, true)] {
        let [first, diff] = [&[][..], &[0x93, 2]];
        let key = &[0x94, 3, 1, 0xc4, 8, 0, 0, 0, 0, 0, 0, 0, 0, 0x92][..];
        for before in [first, diff, key] {
            // Behind raw bytes of any length.
            let bytes = [before, &text(length)].concat();
            let behind = [&[0x92, 0xc5, 0x20, 0][..], &[0xdb; 0x2000], &text(length)].concat();
            for bytes in [bytes, behind] {
                for error in [
                    wire::decode::<ToServer>(&bytes, &limits).unwrap_err(),
                    wire::decode::<ToClient>(&bytes, &limits).unwrap_err(),
                ] {
                    let DecodeError::Malformed { why, .. } = &error else { panic!("{error:?}") };
                    assert!(why.len() <= 256, "{} bytes", why.len());
                    assert_eq!(why == "a text is above 4096 bytes", long, "{why}");
                }
            }
        }
    }
}

#[test]
fn declared_lengths_cost_nothing() {
    let limits = Limits::default();
    let hostile: &[&[u8]] = &[
        // 4 G changes, 4 G bytes of key, 4 G of anything.
        &[0x94, 3, 1, 0xc4, 8, 0, 0, 0, 0, 0, 0, 0, 0, 0xdd, 0xff, 0xff, 0xff, 0xff],
        &[0x94, 3, 1, 0xc4, 8, 0, 0, 0, 0, 0, 0, 0, 0, 0x92, 0xc6, 0xff, 0xff, 0xff, 0xff],
        &[0xdd, 0xff, 0xff, 0xff, 0xff, 3],
        &[0xc6, 0xff, 0xff, 0xff, 0xff],
    ];
    for bytes in hostile {
        assert!(wire::decode::<ToClient>(bytes, &limits).is_err());
        assert!(wire::decode::<ToServer>(bytes, &limits).is_err());
    }
    // A thousand arrays in each other.
    assert!(wire::decode::<ToClient>(&[0x91; 1000], &limits).is_err());
    assert!(
        wire::decode::<ToServer>(&[vec![0x92, 0], vec![0x91; 100_000]].concat(), &limits).is_err()
    );
}

#[test]
fn text_and_numbers_are_no_bytes() {
    let ok =
        wire::encode(&ToClient::Verify { revision: Revision(1), root: Hash::from_bytes([1; 24]) });
    assert!(wire::decode::<ToClient>(&ok[4..], &Limits::default()).is_ok());
    // The same 24 bytes as text, and as an array of numbers.
    let text = [&[0x93, 11, 1, 0xb8][..], &[1; 24]].concat();
    let array = [&[0x93, 11, 1, 0xdc, 0, 24][..], &[1; 24]].concat();
    assert!(wire::decode::<ToClient>(&text, &Limits::default()).is_err());
    assert!(wire::decode::<ToClient>(&array, &Limits::default()).is_err());
    // The chain of a CaughtUp is whole: not the tag of one, either.
    let raw = |length: u8| [&[0x93, 16, 1, 0xc4, length][..], &vec![1; length.into()]].concat();
    assert!(wire::decode::<ToClient>(&raw(24), &Limits::default()).is_ok());
    let text = [&[0x93, 16, 1, 0xb8][..], &[1; 24]].concat();
    for bytes in [raw(8), raw(23), raw(25), text] {
        assert!(wire::decode::<ToClient>(&bytes, &Limits::default()).is_err());
    }
}

#[test]
fn too_many_changes_and_too_long_values_are_refused() {
    let live = |changes| ToClient::Live {
        first: Revision(1),
        before: Chain::START.tag(),
        changes: Changes(changes),
    };
    let catch_up = |changes| ToClient::CatchUp { revision: Revision(1), changes: Changes(changes) };
    let limits = Limits { key_bytes: 2, value_bytes: 3, ..Limits::default() };
    for message in [&live as &dyn Fn(Vec<Change>) -> ToClient, &catch_up] {
        let many = payload(&message(vec![Change::delete(""); MAX_CHANGES + 1]));
        assert!(matches!(
            wire::decode::<ToClient>(&many, &Limits::default()),
            Err(DecodeError::Malformed { .. })
        ));
        let refused = |change| {
            let long = payload(&message(vec![change]));
            wire::decode::<ToClient>(&long, &limits).unwrap_err().to_string()
        };
        let error = refused(Change::write("k", "four"));
        assert_eq!(error, "value of 4 bytes is above the limit of 3");
        let error = refused(Change::delete("key"));
        assert_eq!(error, "key of 3 bytes is above the limit of 2");
    }
}

#[test]
fn frames_are_within_their_limit() {
    let limits = Limits { frame_bytes: 1000, ..Limits::default() };
    let mut table = Table::open(MemoryStore::new(), limits).unwrap();
    table.ready(Epoch::from_bytes([7; 16]));
    for number in 0..100_u8 {
        table
            .write(&[Change::write(vec![number], vec![number; usize::from(number % 40)])])
            .unwrap();
    }
    table.seal();
    let (mut changes, mut chunks) = (0, 0);
    while let Some((chunk, _)) = table.next_chunk() {
        let payload = &chunk.frame[HEADER_BYTES..];
        assert!(payload.len() <= limits.frame_bytes, "{}", payload.len());
        assert!(matches!(wire::decode(payload, &limits), Ok(ToClient::Live { .. })));
        (changes, chunks) = (changes + chunk.keys.len(), chunks + 1);
    }
    assert_eq!(changes, 100);
    assert!((3..50).contains(&chunks), "{chunks}");
}

#[test]
fn what_a_store_holds_already_is_within_the_limits() {
    let limits = Limits { key_bytes: 3, value_bytes: 4, ..Limits::default() };
    let open = |key: &'static str, value: &'static str| {
        let store: MemoryStore = [("a", "1"), (key, value)]
            .map(|(key, value)| (key.into(), value.into()))
            .into_iter()
            .collect();
        Table::open(store, limits).map(drop).map_err(|error| error.to_string())
    };
    assert_eq!(open("key", "four"), Ok(()));
    let error = open("key", "value").unwrap_err();
    assert!(error.contains("value of 5 bytes is above the limit of 4"), "{error}");
    let error = open("keys", "four").unwrap_err();
    assert!(error.contains("key of 4 bytes is above the limit of 3"), "{error}");
}
