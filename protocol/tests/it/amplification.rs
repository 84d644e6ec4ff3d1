//! What one message makes the other end send, against the tables in docs/protocol.md: each end is driven by a peer that asks
//! for as much as it can, and all that the end asks for itself is there at once.

use std::collections::BTreeMap;
use std::time::Duration;

use bytes::Bytes;
use tablecast_protocol::client::{self, Output, RootOf};
use tablecast_protocol::diff::{Query, Walk, Widths, answer, collect};
use tablecast_protocol::server::{self, Event, SessionConfig, Transmit};
use tablecast_protocol::wire::{self, Changes, Message, Raw};
use tablecast_protocol::{
    AbortReason, Chain, Change, DiffId, Epoch, FollowerId, Hash, HeartbeatConfig, Key, Limits, Log,
    MemoryStore, Position, Reason, Replica, Revision, Table, ToClient, ToServer, Value, Way,
};

const PAGE: &str = include_str!("../../../docs/protocol.md");
/// Whole hashes.
const WIDE: Widths = Widths { node: 24, key: 16, entry: 24 };

const NOW: Duration = Duration::ZERO;

/// So that many frames are needed.
const QUERY_BYTES: usize = 200;
const REPAIR_BYTES: usize = 1000;
const PART_KEYS: usize = 50;
const ANSWER_BYTES: usize = 3000;

/// Of each message how many frames the page allows because of it, and how many bytes.
fn allowed(heading: &str) -> BTreeMap<&'static str, (usize, usize)> {
    let (_, text) = PAGE.split_once(heading).expect("the page has the heading");
    let lines = text.lines().skip_while(|line| !line.starts_with("| `"));
    let bytes = |cell: &str| -> usize {
        let term = |term: &str| match term.trim_matches('`') {
            "query" => QUERY_BYTES,
            "repair" => REPAIR_BYTES,
            "answer" => ANSWER_BYTES,
            number => number.replace(',', "").parse().unwrap(),
        };
        let product = |text: &str| text.split(" x ").map(term).product::<usize>();
        cell.split(" + ").map(product).sum()
    };
    let row = |line: &'static str| {
        let cells: Vec<_> = line.trim_matches('|').split('|').map(str::trim).collect();
        (cells[0].trim_matches('`'), (cells[1].parse().unwrap(), bytes(cells[2])))
    };
    lines.take_while(|line| line.starts_with('|')).map(row).collect()
}

/// The most that was seen of each message.
#[derive(Default)]
struct Seen(BTreeMap<&'static str, (usize, usize)>);

impl Seen {
    fn count<M: Message>(&mut self, because: &'static str, sent: &[M]) {
        let bytes = sent.iter().map(|message| wire::encode(message).len()).sum();
        let most = self.0.entry(because).or_default();
        *most = (most.0.max(sent.len()), most.1.max(bytes));
    }

    /// Nothing is above what the page says, no message is left out, and the frames are reached.
    fn check(&self, heading: &str) {
        let allowed = allowed(heading);
        for (message, (frames, bytes)) in &allowed {
            let seen = self.0.get(message).unwrap_or_else(|| panic!("{message} was not tried"));
            assert!(seen.0 == *frames && seen.1 <= *bytes, "{message}: {seen:?}, {frames} {bytes}");
            // A limit that is far above what happens says nothing.
            assert!(seen.1 * 3 >= *bytes, "{message}: {seen:?}, {frames} {bytes}");
        }
        assert_eq!(allowed.len(), self.0.len());
    }
}

fn store(keys: std::ops::Range<usize>, bytes: usize) -> MemoryStore {
    keys.map(|key| (Key::from(format!("{key}")), Value::from(vec![1; bytes]))).collect()
}

fn limits() -> Limits {
    Limits { answer_bytes: ANSWER_BYTES, ..Limits::default() }
}

struct ServerEnd {
    session: server::Session,
    table: Table,
    log: Log,
    walk: Option<Walk>,
}

impl ServerEnd {
    fn new(keys: usize) -> Self {
        let (repair_bytes, part_keys) = (REPAIR_BYTES, PART_KEYS);
        let config = SessionConfig { repair_bytes, part_keys, ..SessionConfig::default() };
        let mut table = Table::open(store(0..keys, 100), config.limits).unwrap();
        table.ready(Epoch::from_bytes([1; 16]));
        let log = Log::new(1 << 20, Revision::ZERO, Chain::START);
        Self { session: server::Session::new(config, FollowerId(1), NOW), table, log, walk: None }
    }

    /// All that is sent because of a message.
    fn say(&mut self, message: ToServer, seen: &mut Seen) -> Vec<ToClient> {
        let because = message.name();
        self.session.handle_message(message, NOW);
        let mut sent = Vec::new();
        loop {
            let before = sent.len();
            while let Some(transmit) = self.session.poll_transmit(&self.log) {
                let Transmit::Message(message) = transmit else { panic!("nothing was written") };
                sent.push(message);
            }
            let events: Vec<_> = std::iter::from_fn(|| self.session.poll_event()).collect();
            if events.is_empty() && sent.len() == before {
                break;
            }
            for event in events {
                self.act(event);
            }
        }
        seen.count(because, &sent);
        sent
    }

    fn act(&mut self, event: Event) {
        let session = &mut self.session;
        match event {
            Event::Subscribe { .. } => {
                let at = self.table.position().unwrap();
                session.handle_subscribed(at, Way::NoPosition, at);
            }
            Event::Admit(diff) => session.handle_admitted(diff),
            Event::Snapshot(diff) => session.handle_snapshot(diff, self.table.tree().clone()),
            Event::Walk { diff, tree, root, len, full } => {
                let (walk, step) = Walk::new(tree, root, len, full, QUERY_BYTES, PART_KEYS);
                self.walk = Some(walk);
                session.handle_step(diff, step);
            }
            Event::Answer(diff, answer) => {
                let step = self.walk.as_mut().unwrap().handle_answer(&answer).unwrap();
                session.handle_step(diff, step);
            }
            Event::Collect { diff, tree, mut rest, most } => {
                let writes = collect(&tree, &mut rest, most);
                session.handle_collected(diff, writes, rest);
            }
            Event::Read { diff, found, from, max_bytes } => {
                session.handle_values(diff, self.table.read(&found, from, max_bytes));
            }
            Event::Mark(diff) => {
                self.log.mark(FollowerId(1), diff);
                session.handle_mark(diff, self.log.head(), self.table.tree().clone());
            }
            Event::Root(revision, tree) => session.handle_root(revision, tree.root()),
            Event::EndDiff { .. } | Event::Verified { .. } | Event::Close(_) => {}
            Event::Shorten(..) | Event::FellBehind(_) => panic!("nothing was written"),
        }
    }

    /// Goes through a diff of a follower with this store to its end.
    fn diff(&mut self, diff: DiffId, store: MemoryStore, seen: &mut Seen) {
        let tree = Replica::open(store).unwrap().tree().clone();
        let (root, len) = (tree.root(), tree.len() as u64);
        let max_deletes = u64::MAX;
        let request = ToServer::SyncReq { diff, jumps: 0, full: true, root, len, max_deletes };
        let mut said = vec![request];
        while let Some(message) = said.pop() {
            for sent in self.say(message, seen) {
                match sent {
                    ToClient::SyncRequest { diff, query } => {
                        let answer = Raw(answer(&tree, &query, ANSWER_BYTES).unwrap());
                        said.push(ToServer::SyncResponse { diff, answer });
                    }
                    ToClient::Repair { diff, .. } => {
                        said.insert(0, ToServer::RepairAck { diff, failed: 0, micros: 1000 });
                    }
                    ToClient::Verify { revision, .. } => {
                        said.insert(0, ToServer::Verified { revision, root });
                    }
                    _ => {}
                }
            }
        }
        assert_eq!(self.session.state(), "Relay");
    }
}

#[test]
fn no_message_makes_a_server_send_more_than_the_page_says() {
    let mut seen = Seen::default();
    let mut end = ServerEnd::new(1000);
    end.say(ToServer::hello("", &Limits::default(), None), &mut seen);
    let stores = [
        // Equal; empty; of few; with some that differ, are missing, or are too many; with many of those.
        store(0..1000, 100),
        store(0..0, 0),
        store(0..3, 100),
        store(5..1000, 100),
        store(0..1010, 100),
        store(0..1000, 99),
        store(500..3000, 100),
    ];
    for (store, diff) in stores.into_iter().zip(1..) {
        end.diff(DiffId(diff), store, &mut seen);
    }
    // Tables that go into a few repairs.
    for keys in 2..40 {
        let mut end = ServerEnd::new(keys);
        end.say(ToServer::hello("", &Limits::default(), None), &mut seen);
        end.diff(DiffId(1), store(0..0, 0), &mut seen);
        end.diff(DiffId(2), store(0..1, 100), &mut seen);
    }
    for _ in 0..3 {
        end.say(ToServer::Ping {}, &mut seen);
        end.say(ToServer::Pong {}, &mut seen);
    }
    let text = "x".repeat(5000);
    end.say(ToServer::Farewell { reason: Reason::Other, text }, &mut seen);
    seen.check("\n### What a server does\n");
}

#[test]
fn pings_that_wait_are_one_pong() {
    let mut end = ServerEnd::new(10);
    end.say(ToServer::hello("", &Limits::default(), None), &mut Seen::default());
    for _ in 0..1000 {
        end.session.handle_message(ToServer::Ping {}, NOW);
    }
    assert_eq!(end.say(ToServer::Ping {}, &mut Seen::default()), [ToClient::Pong {}]);
}

struct ClientEnd {
    session: client::Session,
    replica: Replica,
    diff: DiffId,
}

impl ClientEnd {
    fn new() -> Self {
        let position = None;
        let heartbeat = HeartbeatConfig::default();
        let session = client::Session::new("", limits(), heartbeat, position, NOW);
        let replica = Replica::open(store(0..1000, 100)).unwrap();
        let mut end = Self { session, replica, diff: DiffId(0) };
        end.drain();
        end
    }

    fn drain(&mut self) -> Vec<ToServer> {
        let mut sent = Vec::new();
        while let Some(output) = self.session.poll_output() {
            let session = &mut self.session;
            let tree = self.replica.tree().clone();
            match output {
                Output::Send(message) => sent.push(message),
                Output::Answer { diff, tree, query, max_bytes } => {
                    session.handle_answer(diff, answer(&tree, &query, max_bytes).unwrap());
                }
                Output::Root(diff, tree) => session.handle_root(RootOf::Diff(diff), tree.root()),
                Output::Snapshot(diff) => session.handle_snapshot(diff, tree),
                Output::Mark(at) => session.handle_root(RootOf::Mark(at), tree.root()),
                Output::Checkpoint(n) => session.handle_root(RootOf::Checkpoint(n), tree.root()),
                Output::Repair { diff, .. } => session.handle_repaired(diff, 0, 0, NOW),
                // As the actor does, but at once.
                Output::Connected(..) | Output::FellBehind(_) | Output::DiffAborted { .. } => {
                    self.ask();
                }
                Output::DiffDone { root, server_root, .. } if root != server_root => self.ask(),
                _ => {}
            }
        }
        sent
    }

    fn ask(&mut self) {
        let tree = self.replica.tree().clone();
        self.diff = self.session.handle_diff(tree, true, u64::MAX).unwrap();
    }

    fn say(&mut self, message: ToClient, seen: &mut Seen) -> &mut Self {
        let because = message.name();
        self.session.handle_message(message, NOW);
        let sent = self.drain();
        seen.count(because, &sent);
        self
    }
}

fn welcome(way: Way) -> ToClient {
    let epoch = Epoch::from_bytes([1; 16]);
    let at = Position { epoch, revision: Revision::ZERO, chain: Chain::START };
    ToClient::welcome(at, way, &Limits::default())
}

#[test]
fn no_message_makes_a_client_send_more_than_the_page_says() {
    let mut seen = Seen::default();
    let end = &mut ClientEnd::new();
    end.say(welcome(Way::NoPosition), &mut seen);
    let diff = end.diff;
    end.say(ToClient::SyncAbort { diff, reason: AbortReason::Busy }, &mut seen);
    let diff = end.diff;
    end.say(ToClient::SyncStart { diff }, &mut seen);
    // All entries of all keys, over and over; and all hashes of three levels.
    for (depth, nodes, small, levels) in
        [(0, vec![], u32::MAX, 1), (2, vec![0x11; 5000], u32::MAX, 1), (2, vec![1; 5000], 0, 3)]
    {
        let nodes = Bytes::from(nodes);
        let query = Query { depth, levels, small, widths: WIDE, nodes };
        end.say(ToClient::SyncRequest { diff, query }, &mut seen);
    }
    end.say(ToClient::SyncSeq { diff, writes: 10, deletes: 10 }, &mut seen);
    for _ in 0..3 {
        let (writes, deletes) = (Changes(vec![Change::write("k", "v")]), Raw(Bytes::new()));
        end.say(ToClient::Repair { diff, writes, prefix_bytes: 1, deletes }, &mut seen);
    }
    let (revision, chain) = (Revision::ZERO, Chain::START);
    let done = ToClient::SyncDone { diff, revision, chain: chain.tag(), suppressed: 0, failed: 0 };
    end.say(done, &mut seen);
    // Of another table: a diff at full width follows.
    end.say(ToClient::Verify { revision, root: Hash::from_bytes([9; Hash::BYTES]) }, &mut seen);
    for _ in 0..3 {
        end.say(ToClient::Ping {}, &mut seen);
        end.say(ToClient::Pong {}, &mut seen);
        end.say(ToClient::Mark { revision }, &mut seen);
    }
    let changes = Changes(vec![Change::write("k", "v"); 100]);
    end.say(ToClient::Live { first: Revision(1), before: chain.tag(), changes }, &mut seen);
    let diff = end.diff;
    // In Relay, where nobody has asked yet.
    end.session.handle_message(ToClient::SyncAbort { diff, reason: AbortReason::Busy }, NOW);
    while end.session.poll_output().is_some() {}
    let revision = Revision(1000);
    end.say(ToClient::FellBehind { jumps: 1, revision, chain }, &mut seen);
    end.say(ToClient::Farewell { reason: Reason::Stopping, text: "bye".to_owned() }, &mut seen);

    ClientEnd::new()
        .say(ToClient::Refuse { reason: Reason::Full, text: "no".to_owned() }, &mut seen);
    let (epoch, revision) = (Epoch::from_bytes([1; 16]), Revision::ZERO);
    let position = Some(Position { epoch, revision, chain });
    let mut back = ClientEnd::new();
    let heartbeat = HeartbeatConfig::default();
    back.session = client::Session::new("", limits(), heartbeat, position, NOW);
    back.session.handle_message(welcome(Way::Shortened), NOW);
    while back.session.poll_output().is_some() {}
    let changes = Changes(vec![Change::write("k", "v"); 100]);
    let revision = Revision(200);
    back.say(ToClient::CatchUp { revision, changes }, &mut seen);
    back.say(ToClient::CaughtUp { revision, chain }, &mut seen);
    seen.check("\n### What a client does\n");
}
