//! Every state x every message, at both ends, against the tables in docs/protocol.md; and what is
//! accepted by its name but closes by what it says.
//!
//! A state of the tables has several inner ones (a query is out or not, a repair is on its way or not), so
//! sessions are brought to *stages*, several of which have one state. A message fits a stage if
//! somebody waits for it there: it is built so that all it says is right.

use std::collections::VecDeque;
use std::time::Duration;

use tablecast_protocol::client::{self, DiffPhase, NotNow, Output, Progress, RootOf};
use tablecast_protocol::diff::{
    Answer, Difference, Found, Query, Step, Walk, Widths, answer, collect,
};
use tablecast_protocol::server::{self, Close, Event, Served, SessionConfig, Transmit};
use tablecast_protocol::wire::{self, Changes, HEADER_BYTES, Message, Raw, VERSION};
use tablecast_protocol::{
    AbortReason, Chain, ChainTag, Change, DecodeError, DiffId, Digest, Entry, Epoch, FollowerId,
    Hash, HeartbeatConfig, KeyHash, Limits, Log, MemoryStore, Missed, Mutation, Position, Reason,
    Replica, Revision, Shortened, Store, Table, ToClient, ToServer, Tree, Values, Way,
};

const PAGE: &str = include_str!("../../../docs/protocol.md");
const SERVER: &str = include_str!("../../src/server.rs");
const CLIENT: &str = include_str!("../../src/client.rs");

/// All that happens here happens at once, so that a session that ignored something is equal to what
/// it was.
const NOW: Duration = Duration::ZERO;

// The tables.

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Cell {
    Accept,
    Ignore,
    Close,
}

/// The lines of the table of states and messages behind `heading`.
fn lines<'a>(text: &'a str, heading: &str) -> Vec<&'a str> {
    let (_, text) = text.split_once(heading).expect("the page has the heading");
    let lines = text.lines().skip_while(|line| !line.starts_with("| state \\ message |"));
    lines.take_while(|line| line.starts_with('|')).collect()
}

fn cells(line: &str) -> Vec<&str> {
    line.trim_matches('|').split('|').map(|cell| cell.trim().trim_matches('`')).collect()
}

/// State, message and what happens then.
fn table(heading: &str) -> Vec<(&'static str, &'static str, Cell)> {
    let lines = lines(PAGE, heading);
    let messages = cells(lines[0]);
    let mut table = Vec::new();
    for line in &lines[2..] {
        let row = cells(line);
        assert_eq!(row.len(), messages.len(), "{line}");
        for (message, cell) in messages.iter().zip(&row).skip(1) {
            let cell = match *cell {
                "accept" => Cell::Accept,
                "ignore" => Cell::Ignore,
                "close" => Cell::Close,
                other => panic!("{other} in {line}"),
            };
            table.push((row[0], *message, cell));
        }
    }
    table
}

fn check_columns(heading: &str, tags: &[(u8, &str)]) {
    let columns = cells(lines(PAGE, heading)[0]);
    let mut columns: Vec<_> = columns.into_iter().skip(1).collect();
    let mut names: Vec<_> = tags.iter().map(|(_, name)| *name).collect();
    columns.sort_unstable();
    names.sort_unstable();
    assert_eq!(columns, names, "a column for every message");
}

#[test]
fn the_tables_of_the_sources_are_those_of_the_page() {
    for (source, heading) in [(SERVER, SERVER_END), (CLIENT, CLIENT_END)] {
        let docs = source.lines().map_while(|line| line.strip_prefix("//!"));
        let docs: String = docs.flat_map(|line| [line.trim_start(), "\n"]).collect();
        assert_eq!(lines(&docs, ""), lines(PAGE, heading));
    }
    check_columns(SERVER_END, ToServer::TAGS);
    check_columns(CLIENT_END, ToClient::TAGS);
}

const SERVER_END: &str = "\n### The server's end\n";
const CLIENT_END: &str = "\n### The client's end\n";

// The server's end.

thread_local! {
    /// The rule that the sessions of this thread break: none, but in the last test.
    static BROKEN: std::cell::Cell<Option<Mutation>> = const { std::cell::Cell::new(None) };
}

fn server_session(config: SessionConfig) -> server::Session {
    let mut session = server::Session::new(config, FollowerId(1), NOW);
    if let Some(mutation) = BROKEN.get() {
        session.mutate(mutation);
    }
    session
}

const DIFF: DiffId = DiffId(1);
const NEXT_DIFF: DiffId = DiffId(2);

fn epoch() -> Epoch {
    Epoch::from_bytes([7; 16])
}

/// A session with the table and log that it serves, and what happened to it since last asked.
#[derive(Clone)]
struct ServerEnd {
    session: server::Session,
    log: Log,
    events: Vec<Event>,
    sent: Vec<ToClient>,
}

fn server_tree() -> Tree {
    Tree::build([("a", "1"), ("b", "2")])
}

/// Lacks `b` and has `c` too many.
fn follower_tree() -> Tree {
    Tree::build([("a", "1"), ("c", "3")])
}

fn server_table() -> Table {
    let store: MemoryStore = [("a", "1"), ("b", "2")]
        .map(|(key, value)| (key.into(), value.into()))
        .into_iter()
        .collect();
    let mut table = Table::open(store, Limits::default()).unwrap();
    table.ready(epoch());
    table
}

/// What was missed is sent a frame of the log at a time.
fn one_by_one() -> SessionConfig {
    SessionConfig { missed_bytes: 0, ..SessionConfig::default() }
}

impl ServerEnd {
    fn new() -> Self {
        let session = server_session(one_by_one());
        let log = Log::new(1 << 20, Revision::ZERO, Chain::START);
        Self { session, log, events: Vec::new(), sent: Vec::new() }
    }

    /// Does to the session, then takes what comes of it.
    fn act(&mut self, act: impl FnOnce(&mut server::Session)) -> &mut Self {
        self.act_with_room(usize::MAX, act)
    }

    /// The same on a connection that takes so many frames.
    fn act_with_room(
        &mut self,
        frames: usize,
        act: impl FnOnce(&mut server::Session),
    ) -> &mut Self {
        act(&mut self.session);
        self.events.clear();
        self.sent = (0..frames).map_while(|_| self.transmit()).collect();
        self.events.extend(std::iter::from_fn(|| self.session.poll_event()));
        self
    }

    /// What goes on the wire next, as the follower reads it.
    fn transmit(&mut self) -> Option<ToClient> {
        let limits = Limits::default();
        Some(match self.session.poll_transmit(&self.log)? {
            Transmit::Message(message) => message,
            Transmit::Live(frame) => wire::decode(&frame[HEADER_BYTES..], &limits).unwrap(),
            Transmit::Joined(joined) => {
                wire::decode(&joined.frame()[HEADER_BYTES..], &limits).unwrap()
            }
            Transmit::Part(part) => part.message(&limits),
        })
    }

    fn message(&mut self, message: ToServer) -> &mut Self {
        self.act(|session| session.handle_message(message, NOW))
    }

    fn closed(&self) -> Option<(Reason, &str)> {
        self.events.iter().find_map(|event| match event {
            Event::Close(Close::Here { reason, text }) => Some((*reason, text.as_str())),
            _ => None,
        })
    }

    /// Closed by this end, which said so to the peer: `Refuse` before `Welcome`, `Farewell` after.
    fn closes(&self, before: &Self, why: &str) -> String {
        assert_eq!(self.session.state(), "Closed", "{why}");
        let (reason, text) = self.closed().unwrap_or_else(|| panic!("{why}: no event"));
        let early = matches!(before.session.state(), "Hello" | "Subscribing");
        let said = match self.sent.as_slice() {
            [ToClient::Refuse { reason, text }] if early => (*reason, text.as_str()),
            [ToClient::Farewell { reason, text }] if !early => (*reason, text.as_str()),
            other => panic!("{why}: says {other:?}"),
        };
        assert_eq!(said, (reason, text), "{why}");
        assert_eq!(reason, Reason::Protocol, "{why}");
        text.to_owned()
    }
}

/// Each stage with its name; a diff is followed from the first to the last.
fn server_stages() -> Vec<(&'static str, ServerEnd)> {
    let mut stages = Vec::new();
    let mut end = ServerEnd::new();
    let mut table = server_table();
    stages.push(("hello", end.clone()));

    end.message(ToServer::hello("", &Limits::default(), None));
    assert!(matches!(end.events[..], [Event::Subscribe { .. }]));
    stages.push(("subscribing", end.clone()));
    stages.extend(shortened_stages());

    end.act(|session| {
        let at = table.position().unwrap();
        session.handle_subscribed(at, Way::NoPosition, at);
    });
    assert!(matches!(end.sent[..], [ToClient::Welcome { .. }]));
    stages.push(("relay", end.clone()));

    end.message(sync_req(DIFF));
    assert_eq!(end.events, [Event::Admit(DIFF)]);
    stages.push(("queued", end.clone()));

    end.act(|session| session.handle_admitted(DIFF));
    assert_eq!(end.sent, [ToClient::SyncStart { diff: DIFF }]);
    stages.push(("snapshot", end.clone()));

    end.act(|session| session.handle_snapshot(DIFF, server_tree()));
    let [Event::Walk { tree, root, len, full, .. }] = &end.events[..] else { panic!() };
    let (mut walk, step) = Walk::new(tree.clone(), *root, *len, *full, 1 << 20, 100);
    stages.push(("walk", end.clone()));

    end.act(|session| session.handle_step(DIFF, step));
    assert_eq!(end.sent, [ToClient::SyncRequest { diff: DIFF, query: query() }]);
    stages.push(("asked", end.clone()));
    let mut aborted = end.clone();
    aborted.act(|session| session.handle_walk_failed(DIFF));
    assert_eq!(aborted.sent, [ToClient::SyncAbort { diff: DIFF, reason: AbortReason::Walk }]);
    stages.push(("aborted", aborted));

    end.message(ToServer::SyncResponse { diff: DIFF, answer: Raw(an_answer()) });
    assert_eq!(end.events, [Event::Answer(DIFF, an_answer())]);
    stages.push(("answered", end.clone()));

    let step = walk.handle_answer(&an_answer()).unwrap();
    end.act(|session| session.handle_step(DIFF, step));
    assert_eq!(end.sent, [ToClient::SyncSeq { diff: DIFF, writes: 1, deletes: 1 }]);
    stages.push(("reading", end.clone()));

    let [Event::Read { found, from, max_bytes, .. }] = &end.events[..] else { panic!() };
    let values = table.read(found, *from, *max_bytes);
    end.act(|session| session.handle_values(DIFF, values));
    assert!(matches!(end.sent[..], [ToClient::Repair { .. }]));
    assert_eq!(end.events, [Event::Mark(DIFF)]);
    stages.push(("repaired", end.clone()));

    end.log.mark(FollowerId(1), DIFF);
    end.act(|session| session.handle_mark(DIFF, Revision::ZERO, server_tree()));
    assert!(matches!(end.sent[..], [ToClient::SyncDone { suppressed: 0, failed: 0, .. }]));
    stages.push(("done", end.clone()));

    end.act(|session| session.handle_root(Revision::ZERO, server_tree().root()));
    assert!(matches!(end.sent[..], [ToClient::Verify { revision: Revision::ZERO, .. }]));
    stages.push(("verifying", end.clone()));

    end.message(to_server("Verified"));
    assert_eq!(end.events, [Event::Verified { revision: Revision::ZERO, equal: true }]);
    stages.push(("verified", end.clone()));

    let mut again = end.clone();
    again.message(to_server("RepairAck"));
    again.message(sync_req(NEXT_DIFF));
    assert_eq!(again.events, [Event::Admit(NEXT_DIFF)]);
    stages.push(("queued again", again));

    end.act(|session| session.handle_close(Reason::Stopping, ""));
    assert!(matches!(end.sent[..], [ToClient::Farewell { reason: Reason::Stopping, .. }]));
    stages.push(("closed", end));
    stages
}

/// Of a follower whose missed changes are shortened.
fn shortened_stages() -> [(&'static str, ServerEnd); 2] {
    let behind = Behind::new(1 << 20);
    let shortening = behind.shortening();
    let mut catching_up = shortening.clone();
    catching_up.act_with_room(1, |session| session.handle_shortened(Some(behind.shortened())));
    assert_eq!(catching_up.sent, [behind.welcome(Way::Shortened)]);
    [("shortening", shortening), ("catching up", catching_up)]
}

fn sync_req(diff: DiffId) -> ToServer {
    let tree = follower_tree();
    let (root, len) = (tree.root(), tree.len() as u64);
    ToServer::SyncReq { diff, jumps: 0, full: false, root, len, max_deletes: u64::MAX }
}

fn query() -> Query {
    let nodes = bytes::Bytes::new();
    Query { depth: 0, levels: 1, small: 32, widths: Widths::SHORT, nodes }
}

fn an_answer() -> Answer {
    answer(&follower_tree(), &query(), 1 << 20).unwrap()
}

fn to_server(message: &str) -> ToServer {
    match message {
        "Hello" => ToServer::hello("", &Limits::default(), None),
        "SyncReq" => sync_req(DiffId(3)),
        "SyncResponse" => ToServer::SyncResponse { diff: DIFF, answer: Raw(an_answer()) },
        "RepairAck" => ToServer::RepairAck { diff: DIFF, failed: 0, micros: 0 },
        "Verified" => ToServer::Verified { revision: Revision::ZERO, root: server_tree().root() },
        "Ping" => ToServer::Ping {},
        "Pong" => ToServer::Pong {},
        "Farewell" => ToServer::Farewell { reason: Reason::Stopping, text: "bye".to_owned() },
        other => panic!("{other} is no message"),
    }
}

/// Whether the server waits for what [`to_server`] makes.
fn fits_server(stage: &str, message: &str) -> bool {
    match message {
        // Not while the roots of the last diff are being compared, or a repair of it is not acknowledged.
        "SyncReq" => !["done", "verifying", "verified"].contains(&stage),
        "SyncResponse" => {
            ["asked", "aborted", "done", "verifying", "verified", "queued again"].contains(&stage)
        }
        // The one repair of the last diff.
        "RepairAck" => ["repaired", "done", "verifying", "verified"].contains(&stage),
        "Verified" => stage == "verifying",
        _ => true,
    }
}

#[test]
fn the_server_obeys_its_table() {
    let stages = server_stages();
    for (state, message, cell) in table(SERVER_END) {
        let mut fitted = 0;
        let here = stages.iter().filter(|(_, end)| end.session.state() == state);
        for (stage, before) in here {
            let why = format!("{message} in {state}, {stage}: {cell:?}");
            let mut end = before.clone();
            end.message(to_server(message));
            let fits = fits_server(stage, message);
            match cell {
                Cell::Ignore if fits || state == "Closed" => {
                    fitted += 1;
                    assert_eq!(end.session, before.session, "{why}");
                    assert_eq!((end.events, end.sent), (vec![], vec![]), "{why}");
                }
                Cell::Accept if fits && message == "Farewell" => {
                    fitted += 1;
                    assert_eq!(end.session.state(), "Closed", "{why}");
                    let (reason, text) = (Reason::Stopping, "bye".to_owned());
                    assert_eq!(end.events, [Event::Close(Close::Peer { reason, text })], "{why}");
                    assert_eq!(end.sent, [], "{why}");
                }
                Cell::Accept if fits => {
                    fitted += 1;
                    assert_ne!(end.session.state(), "Closed", "{why}");
                    assert_eq!(end.closed(), None, "{why}");
                }
                Cell::Close | Cell::Accept | Cell::Ignore => {
                    end.closes(before, &why);
                }
            }
        }
        assert!(cell == Cell::Close || fitted > 0, "{message} is never waited for in {state}");
    }
}

fn server_stage(name: &str) -> ServerEnd {
    let found = server_stages().into_iter().find(|(stage, _)| *stage == name);
    found.unwrap_or_else(|| panic!("{name} is no stage")).1
}

/// The text with which the server closes.
fn server_closes(stage: &str, message: ToServer) -> String {
    let before = server_stage(stage);
    let mut end = before.clone();
    let why = format!("{} in {stage}", message.name());
    end.message(message).closes(&before, &why)
}

#[test]
fn the_server_closes_on_an_acknowledgement_of_nothing() {
    let ack = || ToServer::RepairAck { diff: DIFF, failed: 0, micros: 0 };
    assert_eq!(server_closes("relay", ack()), "RepairAck must not come in state Relay");
    let mut end = server_stage("done");
    end.message(ack());
    assert_eq!(end.session.state(), "Relay");
    let before = end.clone();
    end.message(ack()).closes(&before, "the second of one repair");
}

#[test]
fn the_server_closes_on_an_acknowledgement_of_another_diff() {
    let ack = |diff| ToServer::RepairAck { diff, failed: 0, micros: 0 };
    for stage in ["repaired", "done", "verifying", "verified"] {
        server_closes(stage, ack(DiffId(0)));
        server_closes(stage, ack(NEXT_DIFF));
    }
    // It is not acknowledged yet, but all of a diff is, before the next one is asked for.
    server_closes("queued again", ack(DIFF));
}

#[test]
fn the_server_closes_on_a_diff_before_the_last_is_compared() {
    for stage in ["done", "verifying"] {
        let mut end = server_stage(stage);
        end.message(to_server("RepairAck"));
        let before = end.clone();
        let text = end.message(sync_req(NEXT_DIFF)).closes(&before, stage);
        assert_eq!(text, "SyncReq must not come in state Relay");
    }
    let mut end = server_stage("done");
    end.act(|session| session.handle_root(Revision::ZERO, server_tree().root()));
    end.message(to_server("Verified"));
    let mut unacknowledged = end.clone();
    let before = end.clone();
    unacknowledged.message(sync_req(NEXT_DIFF)).closes(&before, "a repair is not acknowledged");
    end.message(to_server("RepairAck"));
    assert_eq!(end.message(sync_req(NEXT_DIFF)).events, [Event::Admit(NEXT_DIFF)]);

    // What was missed comes first.
    let mut resumed = Behind::new(1 << 20).shortening();
    resumed.act_with_room(1, |session| session.handle_shortened(None));
    assert!(matches!(resumed.sent[..], [ToClient::Welcome { way: Way::Resumed, .. }]));
    let before = resumed.clone();
    resumed.act_with_room(0, |session| session.handle_message(sync_req(DIFF), NOW));
    resumed.sent = vec![resumed.transmit().unwrap()];
    resumed.closes(&before, "what was missed has not been sent");
}

/// One that falls behind over and over while it waits would never be repaired. What it asked with says nothing any more.
#[test]
fn a_diff_that_waits_outlives_a_jump() {
    let walk = |end: &mut ServerEnd| {
        end.act(|session| session.handle_admitted(DIFF));
        end.act(|session| session.handle_snapshot(DIFF, server_tree()));
        let [Event::Walk { root, len, .. }] = end.events[..] else { panic!("{:?}", end.events) };
        (root, len)
    };
    let (asked, root) = (follower_tree().len() as u64, follower_tree().root());
    assert_eq!(walk(&mut server_stage("queued")), (Some(root), asked));

    for len in [0, asked] {
        let mut end = server_stage("relay");
        let ToServer::SyncReq { diff, full, max_deletes, .. } = sync_req(DIFF) else { panic!() };
        end.message(ToServer::SyncReq { diff, jumps: 0, full, root, len, max_deletes });
        // Holds one chunk, so that whoever is two behind falls off.
        end.log = Log::new(1, Revision::ZERO, Chain::START);
        let mut table = server_table();
        push(&mut table, &mut end.log, 2);
        end.act(|_| {});
        assert!(matches!(end.sent[..], [ToClient::FellBehind { .. }]), "{:?}", end.sent);
        assert_eq!(walk(&mut end), (None, len + 2));

        // It was asked for before the follower knew of it.
        let mut end = server_stage("relay");
        end.message(ToServer::SyncReq { diff, jumps: 7, full, root, len, max_deletes });
        assert_eq!(end.events, [Event::Admit(DIFF)]);
        assert_eq!(walk(&mut end), (None, len.max(1)));
    }
}

#[test]
fn an_empty_follower_that_was_sent_much_while_it_waited_is_asked() {
    let server = Tree::build((0..80_u8).map(|n| ([n], "value")));
    for (sent, len) in [(0, 0), (10, 0), (11, 11)] {
        let mut end = server_stage("relay");
        let ToServer::SyncReq { diff, jumps, full, max_deletes, .. } = sync_req(DIFF) else {
            panic!()
        };
        let root = Tree::new().root();
        end.message(ToServer::SyncReq { diff, jumps, full, root, len: 0, max_deletes });
        push(&mut server_table(), &mut end.log, sent);
        end.act(|_| {});
        assert_eq!(end.sent.len(), sent);
        end.act(|session| session.handle_admitted(DIFF));
        end.act(|session| session.handle_snapshot(DIFF, server.clone()));
        let [Event::Walk { len: asked, root, .. }] = end.events[..] else { panic!() };
        assert_eq!((asked, root.is_some()), (len, len == 0), "{sent}");
    }
}

/// So many changes, each in a frame of its own.
fn push(table: &mut Table, log: &mut Log, changes: usize) {
    for number in 0..changes {
        append(table, log, &[Change::write("a", number.to_string())]);
    }
}

/// A batch, in a frame of its own.
fn append(table: &mut Table, log: &mut Log, changes: &[Change]) {
    table.write(changes).unwrap();
    table.seal();
    let (chunk, chain) = table.next_chunk().unwrap();
    log.push(chunk, chain, NOW);
}

#[test]
fn the_server_ignores_the_root_of_an_earlier_mark() {
    // Holds one chunk, so that whoever is two behind falls off.
    let mut end = server_stage("repaired");
    end.log = Log::new(1, Revision::ZERO, Chain::START);
    let mut table = server_table();
    let mut write = |log: &mut Log| {
        append(&mut table, log, &[Change::write("a", "4")]);
        log.head()
    };
    let (early, late) = (server_tree().root(), follower_tree().root());

    let first = write(&mut end.log);
    end.log.mark(FollowerId(1), DIFF);
    end.session.handle_mark(DIFF, first, server_tree());
    assert_eq!(end.session.poll_event(), Some(Event::Root(first, server_tree())));
    let revision = write(&mut end.log);
    end.act(|_| {});
    let chain = end.log.chain();
    let abort = ToClient::SyncAbort { diff: DIFF, reason: AbortReason::FellBehind };
    assert_eq!(end.sent, [abort, ToClient::FellBehind { jumps: 1, revision, chain }]);
    end.log.unmark(FollowerId(1), DIFF);

    end.message(to_server("RepairAck"));
    let ToServer::SyncReq { full, root, len, .. } = sync_req(NEXT_DIFF) else { panic!() };
    end.message(ToServer::SyncReq { diff: NEXT_DIFF, jumps: 1, full, root, len, max_deletes: 0 });
    end.act(|session| session.handle_admitted(NEXT_DIFF));
    end.act(|session| session.handle_snapshot(NEXT_DIFF, server_tree()));
    end.act(|session| session.handle_step(NEXT_DIFF, Step::Done(Found::default())));
    assert_eq!(end.events, [Event::Mark(NEXT_DIFF)]);

    let third = write(&mut end.log);
    end.log.mark(FollowerId(1), NEXT_DIFF);
    end.session.handle_root(first, early);
    end.session.handle_mark(NEXT_DIFF, third, follower_tree());
    assert!(matches!(end.session.poll_transmit(&end.log), Some(Transmit::Live(_))));
    end.act(|_| {});
    assert!(
        matches!(end.sent[..], [ToClient::SyncDone { revision, .. }] if revision == third),
        "{:?}",
        end.sent
    );
    assert!(end.events.contains(&Event::Root(third, follower_tree())));
    end.act(|session| session.handle_root(first, early));
    assert_eq!(end.sent, []);
    end.act(|session| session.handle_root(third, late));
    assert_eq!(end.sent, [ToClient::Verify { revision: third, root: late }]);
}

#[test]
fn the_server_closes_on_verified_of_no_mark() {
    let verified = |revision| ToServer::Verified { revision, root: server_tree().root() };
    server_closes("relay", verified(Revision::ZERO));
    server_closes("done", verified(Revision::ZERO));
    server_closes("verifying", verified(Revision(1)));
    let mut end = server_stage("verifying");
    end.message(verified(Revision::ZERO));
    let equal = Event::Verified { revision: Revision::ZERO, equal: true };
    assert_eq!(end.events, [equal]);
    let before = end.clone();
    end.message(verified(Revision::ZERO)).closes(&before, "the second of one mark");
}

#[test]
fn the_server_says_whether_the_roots_are_equal() {
    let mut end = server_stage("verifying");
    end.message(ToServer::Verified { revision: Revision::ZERO, root: follower_tree().root() });
    assert_eq!(end.events, [Event::Verified { revision: Revision::ZERO, equal: false }]);
    assert_eq!(end.session.state(), "Relay");
}

#[test]
fn the_server_closes_on_a_diff_number_used_before() {
    let mut verified = server_stage("verified");
    verified.message(to_server("RepairAck"));
    for before in [server_stage("aborted"), verified] {
        for number in [DIFF, DiffId(0)] {
            before.clone().message(sync_req(number)).closes(&before, "a number of before");
        }
        assert_eq!(before.clone().message(sync_req(DiffId(9))).session.state(), "Diff");
    }
    // A number is used up by a diff that was refused, too.
    let mut end = server_stage("queued");
    end.act(|session| session.handle_busy(DIFF));
    assert_eq!(end.sent, [ToClient::SyncAbort { diff: DIFF, reason: AbortReason::Busy }]);
    assert_eq!(end.session.state(), "Relay");
    let before = end.clone();
    end.message(sync_req(DIFF)).closes(&before, "the number of a refused diff");
}

#[test]
fn the_server_closes_on_an_answer_that_nobody_asked_for() {
    let of = |diff| ToServer::SyncResponse { diff, answer: Raw(an_answer()) };
    // Of this diff, while no query is out; of a later one; of one when there was none.
    for stage in ["queued", "snapshot", "walk", "answered", "reading", "repaired"] {
        server_closes(stage, of(DIFF));
    }
    server_closes("asked", of(NEXT_DIFF));
    server_closes("done", of(NEXT_DIFF));
    server_closes("relay", of(DIFF));
    let mut end = server_stage("asked");
    end.message(of(DIFF));
    let before = end.clone();
    end.message(of(DIFF)).closes(&before, "the second answer to one query");
    // Of an earlier diff it is late, not wrong.
    let mut end = server_stage("queued again");
    end.message(of(DIFF));
    assert_eq!((end.session.state(), end.events), ("Diff", vec![]));
}

#[test]
fn the_server_closes_on_a_malformed_answer() {
    let before = server_stage("answered");
    let mut end = before.clone();
    let [Event::Answer(..)] = &before.events[..] else { panic!() };
    let (mut walk, _) =
        Walk::new(server_tree(), Some(follower_tree().root()), 2, false, 1 << 20, 100);
    let error = walk.handle_answer(&Answer::from_static(&[7])).unwrap_err();
    end.act(|session| session.handle_bad_answer(DIFF, &error));
    assert_eq!(end.closes(&before, "a bad answer"), "malformed answer: it is cut off");
}

/// What an end of default limits says of others that do not fit.
fn limits_text((frame, key, value): (u64, u64, u64)) -> String {
    let ours = Limits::default();
    format!(
        "peer's frames, keys and values are of up to {frame}, {key} and {value} bytes, \
         this end's of up to {}, {} and {}",
        ours.frame_bytes, ours.key_bytes, ours.value_bytes
    )
}

#[test]
fn the_server_refuses_other_versions_trees_and_limits() {
    let limits = Limits::default();
    let refused = |message: ToServer| {
        let mut end = ServerEnd::new();
        end.message(message);
        assert_eq!(end.session.state(), "Closed");
        let (reason, text) = end.closed().unwrap();
        let text = text.to_owned();
        assert_eq!(end.sent, [ToClient::Refuse { reason, text: text.clone() }]);
        (reason, text)
    };
    let hello = |version, tree, frame_bytes, key_bytes, value_bytes| ToServer::Hello {
        version,
        tree,
        frame_bytes,
        key_bytes,
        value_bytes,
        name: String::new(),
        position: None,
    };
    let (frame, key, value) =
        (limits.frame_bytes as u64, limits.key_bytes as u64, limits.value_bytes as u64);

    let (reason, text) = refused(hello(7, 1, frame, key, value));
    assert_eq!(reason, Reason::Version);
    assert_eq!(text, format!("peer speaks version 7, this end speaks version {VERSION}"));
    let (reason, text) = refused(hello(VERSION, 9, frame, key, value));
    assert_eq!(reason, Reason::Tree);
    assert_eq!(text, "peer has tree version 9, this end 1");
    for (frame, key, value) in
        [(frame - 1, key, value), (frame, key - 1, value), (frame, key, value - 1)]
    {
        let (reason, text) = refused(hello(VERSION, 1, frame, key, value));
        assert_eq!(reason, Reason::Limits);
        assert_eq!(text, limits_text((frame, key, value)));
    }
    // The version counts first: what another one means by its fields is unknown.
    assert_eq!(refused(hello(7, 9, 0, 0, 0)).0, Reason::Version);

    let mut end = ServerEnd::new();
    end.message(hello(VERSION, 1, frame + 1, key + 1, u64::MAX));
    assert_eq!(end.session.state(), "Subscribing");
}

#[test]
fn frames_that_are_no_message_close() {
    let version = DecodeError::Version { theirs: 7, ours: VERSION };
    let malformed = DecodeError::Trailing { bytes: 9 };
    let mut end = ServerEnd::new();
    end.act(|session| session.handle_malformed(&version));
    assert_eq!(end.closed().unwrap().0, Reason::Version);
    assert!(matches!(end.sent[..], [ToClient::Refuse { reason: Reason::Version, .. }]));
    for stage in ["hello", "subscribing", "shortening", "catching up", "relay", "asked"] {
        let before = server_stage(stage);
        let mut end = before.clone();
        end.act(|session| session.handle_malformed(&malformed));
        assert_eq!(end.closes(&before, stage), malformed.to_string());
    }

    let mut end = client_stage("hello");
    end.act(|session| session.handle_malformed(&version));
    assert_eq!(end.closed().unwrap().0, Reason::Version);
    for stage in ["hello", "catching up", "relay", "diff"] {
        let mut end = client_stage(stage);
        end.act(|session| session.handle_malformed(&malformed));
        assert_eq!(end.closes(stage), malformed.to_string());
    }

    // Closed already: nothing is said twice.
    let before = server_stage("closed");
    let mut end = before.clone();
    end.act(|session| session.handle_malformed(&malformed));
    assert_eq!((end.session, end.events, end.sent), (before.session, vec![], vec![]));
    let before = client_stage("closed");
    let mut end = before.clone();
    end.act(|session| session.handle_malformed(&malformed));
    assert_eq!((end.session, end.outputs), (before.session, vec![]));
}

#[test]
fn names_and_texts_are_cut_to_their_limits() {
    // Each character has two bytes, and is not cut in the middle.
    let long = "\u{e9}".repeat(1000);
    let heartbeat = HeartbeatConfig::default();
    let mut session = client::Session::new(&long, Limits::default(), heartbeat, None, NOW);
    let Some(Output::Send(ToServer::Hello { name, .. })) = session.poll_output() else { panic!() };
    assert_eq!(name, long[..254]);

    let cut = &long[..1024];
    let mut end = client_stage("relay");
    end.act(|session| session.handle_close(Reason::Failed, long.as_str()));
    let farewell = ToServer::Farewell { reason: Reason::Failed, text: cut.to_owned() };
    assert_eq!(end.outputs[0], Output::Send(farewell));
    assert_eq!(end.closed(), Some((Reason::Failed, cut)));

    for stage in ["hello", "relay"] {
        let mut end = server_stage(stage);
        end.act(|session| session.handle_close(Reason::Failed, long.as_str()));
        let (reason, text) = (Reason::Failed, cut.to_owned());
        let said = match stage {
            "hello" => ToClient::Refuse { reason, text },
            _ => ToClient::Farewell { reason, text },
        };
        assert_eq!(end.sent, [said]);
        assert_eq!(end.closed(), Some((reason, cut)));
    }
}

/// A follower whose store cannot be read answers no mark. When it can be read again, there are marks still.
#[test]
fn marks_that_are_not_answered_are_not_the_last() {
    let (mut table, mut end) = (server_table(), server_stage("relay"));
    for number in 1..=12 {
        append(&mut table, &mut end.log, &[Change::write("a", number.to_string())]);
        let (checkpoint, root) = (end.log.set_checkpoint(), table.tree().root());
        end.log.set_root(checkpoint, root);
        let revision = Revision(number);
        end.act(|_| {});
        let [.., ToClient::Mark { .. }, verify] = &end.sent[..] else { panic!("{:?}", end.sent) };
        assert_eq!(*verify, ToClient::Verify { revision, root });
    }
    let root = table.tree().root();
    let verified = |revision| ToServer::Verified { revision: Revision(revision), root };
    // It was forgotten, and may come late.
    assert_eq!(end.message(verified(4)).events, []);
    let unequal = Event::Verified { revision: Revision(5), equal: false };
    assert_eq!(end.message(verified(5)).events, [unequal]);
    let equal = Event::Verified { revision: Revision(12), equal: true };
    assert_eq!(end.message(verified(12)).events, [equal]);
    let before = end.clone();
    end.message(verified(11)).closes(&before, "one that a later answer has skipped");
}

#[test]
fn no_root_comes_behind_the_last_words() {
    let mut end = server_stage("done");
    end.act(|session| session.handle_close(Reason::Failed, ""));
    assert!(matches!(end.sent[..], [ToClient::Farewell { .. }]));
    end.act(|session| {
        session.handle_mark(DIFF, Revision::ZERO, server_tree());
        session.handle_root(Revision::ZERO, server_tree().root());
    });
    assert_eq!((end.sent.len(), end.events.len()), (0, 0));
}

/// Each that is unequal is a line of a log, at the server.
#[test]
fn a_mark_is_answered_as_often_as_its_root_is_sent() {
    let (table, mut end) = (server_table(), server_stage("relay"));
    let root = table.tree().root();
    let verified = ToServer::Verified { revision: Revision::ZERO, root };
    let equal = [Event::Verified { revision: Revision::ZERO, equal: true }];
    for times in 1..4 {
        // On a quiet stream it is the same place again, and an answer may cross the next root.
        for _ in 0..times {
            let checkpoint = end.log.set_checkpoint();
            end.log.set_root(checkpoint, root);
            end.act(|_| {});
            assert!(matches!(end.sent[..], [ToClient::Mark { .. }, ToClient::Verify { .. }]));
        }
        for _ in 0..times {
            assert_eq!(end.message(verified.clone()).events, equal);
        }
    }
    let before = end.clone();
    end.message(verified).closes(&before, "one more than roots");
}

// The client's end.

/// A follower's session, and what came of the last thing that happened to it.
#[derive(Clone)]
struct ClientEnd {
    session: client::Session,
    /// All but how far a diff is, and that a snapshot is wanted.
    outputs: Vec<Output>,
    progress: Vec<Progress>,
    /// What is there when a diff begins at the server.
    tree: Tree,
}

impl ClientEnd {
    fn new() -> Self {
        Self::at(Limits::default(), None)
    }

    fn at(limits: Limits, position: Option<Position>) -> Self {
        let heartbeat = HeartbeatConfig::default();
        let mut session = client::Session::new("", limits, heartbeat, position, NOW);
        if let Some(mutation) = BROKEN.get() {
            session.mutate(mutation);
        }
        let (outputs, progress) = (Vec::new(), Vec::new());
        let mut end = Self { session, outputs, progress, tree: follower_tree() };
        end.act(|_| {});
        assert!(matches!(end.outputs[..], [Output::Send(ToServer::Hello { .. })]));
        end
    }

    fn act(&mut self, act: impl FnOnce(&mut client::Session)) -> &mut Self {
        act(&mut self.session);
        self.outputs.clear();
        self.progress.clear();
        while let Some(output) = self.session.poll_output() {
            match output {
                Output::Snapshot(diff) => self.session.handle_snapshot(diff, self.tree.clone()),
                Output::Progress(progress) => self.progress.push(progress),
                output => self.outputs.push(output),
            }
        }
        self
    }

    fn message(&mut self, message: ToClient) -> &mut Self {
        self.act(|session| session.handle_message(message, NOW))
    }

    fn closed(&self) -> Option<(Reason, &str)> {
        self.outputs.iter().find_map(|output| match output {
            Output::Close(Close::Here { reason, text }) => Some((*reason, text.as_str())),
            _ => None,
        })
    }

    /// Closed by this end, which said so to the peer, and nothing after.
    fn closes(&self, why: &str) -> String {
        assert_eq!(self.session.state(), "Closed", "{why}");
        let [
            ..,
            Output::Send(ToServer::Farewell { reason: said, text: said_text }),
            Output::Close(Close::Here { reason, text }),
        ] = &self.outputs[..]
        else {
            panic!("{why}: {:?}", self.outputs)
        };
        assert_eq!((said, said_text), (reason, text), "{why}");
        assert_eq!(*reason, Reason::Protocol, "{why}");
        text.to_owned()
    }

    fn tag(&self) -> ChainTag {
        self.session.stream().unwrap().chain.tag()
    }
}

/// Where the stream begins.
const START: Revision = Revision(8);

/// What the follower presents where it comes back to a history.
fn start() -> Position {
    Position { epoch: epoch(), revision: START, chain: Chain::START }
}

fn welcome() -> ToClient {
    welcome_with(VERSION, 1, Limits::default())
}

fn welcome_with(version: u16, tree: u8, limits: Limits) -> ToClient {
    welcome_at(version, tree, limits, start(), Way::NoPosition)
}

fn welcome_at(version: u16, tree: u8, limits: Limits, at: Position, way: Way) -> ToClient {
    ToClient::Welcome {
        version,
        tree,
        epoch: at.epoch,
        revision: at.revision,
        chain: at.chain,
        frame_bytes: limits.frame_bytes as u64,
        key_bytes: limits.key_bytes as u64,
        value_bytes: limits.value_bytes as u64,
        way,
    }
}

/// What a follower that was resumed is told.
fn resumed(at: Position, way: Way) -> ToClient {
    welcome_at(VERSION, 1, Limits::default(), at, way)
}

fn client_stages() -> Vec<(&'static str, ClientEnd)> {
    let mut stages = Vec::new();
    let mut end = ClientEnd::new();
    stages.push(("hello", end.clone()));

    let mut back = ClientEnd::at(Limits::default(), Some(start()));
    back.message(resumed(start(), Way::Shortened));
    assert_eq!(back.outputs, [Output::Connected(start(), Way::Shortened)]);
    stages.push(("catching up", back));
    let mut back = ClientEnd::at(Limits::default(), Some(start()));
    back.message(resumed(start(), Way::Resumed));
    stages.push(("resumed", back));

    end.message(welcome());
    assert!(matches!(
        end.outputs[..],
        [Output::Connected(Position { revision: START, .. }, Way::NoPosition)]
    ));
    stages.push(("relay", end.clone()));

    end.act(|session| assert_eq!(session.handle_diff(follower_tree(), false, u64::MAX), Ok(DIFF)));
    assert_eq!(end.outputs, [Output::Root(DIFF, follower_tree())]);
    stages.push(("preparing", end.clone()));

    end.act(|session| session.handle_root(RootOf::Diff(DIFF), follower_tree().root()));
    assert_eq!(end.outputs, [Output::Send(sync_req(DIFF))]);
    stages.push(("waiting", end.clone()));

    end.message(ToClient::SyncStart { diff: DIFF });
    stages.push(("diff", end.clone()));

    end.message(ToClient::SyncRequest { diff: DIFF, query: query() });
    assert!(matches!(end.outputs[..], [Output::Answer { diff: DIFF, .. }]));
    stages.push(("answering", end.clone()));

    end.act(|session| session.handle_answer(DIFF, an_answer()));
    assert_eq!(end.outputs, [Output::Send(to_server("SyncResponse"))]);
    stages.push(("answered", end.clone()));

    end.message(ToClient::SyncSeq { diff: DIFF, writes: 1, deletes: 1 });
    stages.push(("announced", end.clone()));

    let repair = to_client("Repair", &end);
    end.message(repair);
    let [Output::Repair { changes, .. }] = &end.outputs[..] else { panic!() };
    let changes: Vec<_> = changes.iter().map(|(change, _)| change.clone()).collect();
    assert_eq!(changes, [Change::write("b", "2"), Change::delete("c")]);
    end.act(|session| session.handle_repaired(DIFF, 0, 0, Duration::ZERO));
    assert_eq!(end.outputs, [Output::Send(to_server("RepairAck"))]);
    stages.push(("repaired", end.clone()));

    let done = to_client("SyncDone", &end);
    end.message(done);
    assert!(end.outputs.contains(&Output::Mark(START)));
    stages.push(("done", end.clone()));

    let mut verified = end.clone();
    verified.act(|session| session.handle_root(RootOf::Mark(START), server_tree().root()));
    verified.message(to_client("Verify", &end));
    assert!(matches!(
        verified.outputs[..],
        [Output::Send(ToServer::Verified { revision: START, .. }), Output::DiffDone { .. }]
    ));
    stages.push(("verified", verified));

    end.act(|session| session.handle_close(Reason::Stopping, ""));
    stages.push(("closed", end));
    stages
}

/// Right in everything that it says, for a stream that stands where `end` does.
fn to_client(message: &str, end: &ClientEnd) -> ToClient {
    let stream = end.session.stream();
    let (revision, chain) = stream.map_or((START, Chain::START), |at| (at.revision, at.chain));
    let (reason, text) = (Reason::Stopping, "bye".to_owned());
    match message {
        "Welcome" => welcome(),
        "Refuse" => ToClient::Refuse { reason, text },
        "Farewell" => ToClient::Farewell { reason, text },
        "Live" => {
            let changes = Changes(vec![Change::write("a", "4"), Change::delete("b")]);
            ToClient::Live { first: revision.next(), before: chain.tag(), changes }
        }
        "FellBehind" => {
            ToClient::FellBehind { jumps: 1, revision: revision.plus(5), chain: Chain::START }
        }
        "SyncStart" => ToClient::SyncStart { diff: DIFF },
        "SyncRequest" => ToClient::SyncRequest { diff: DIFF, query: query() },
        "SyncSeq" => ToClient::SyncSeq { diff: DIFF, writes: 1, deletes: 1 },
        "Repair" => repair(vec![Change::write("b", "2")], 6, &prefix_of("c")),
        "SyncDone" => sync_done(revision, chain.tag()),
        "SyncAbort" => ToClient::SyncAbort { diff: DIFF, reason: AbortReason::Walk },
        "Verify" => ToClient::Verify { revision, root: server_tree().root() },
        "Ping" => ToClient::Ping {},
        "Pong" => ToClient::Pong {},
        "Mark" => ToClient::Mark { revision },
        "CatchUp" => catch_up(revision.plus(2)),
        // One change a key leads further, live changes have.
        "CaughtUp" if end.session.state() == "Relay" => ToClient::CaughtUp { revision, chain },
        "CaughtUp" => caught_up(revision.plus(3)),
        other => panic!("{other} is no message"),
    }
}

fn catch_up(revision: Revision) -> ToClient {
    let changes = Changes(vec![Change::write("a", "4"), Change::delete("b")]);
    ToClient::CatchUp { revision, changes }
}

fn caught_up(revision: Revision) -> ToClient {
    ToClient::CaughtUp { revision, chain: END_CHAIN }
}

/// The chain at the end of a shortened catch-up.
const END_CHAIN: Chain = Chain::from_bytes([3; 24]);

fn prefix_of(key: &str) -> Vec<u8> {
    Digest::of(&Change::delete(key.to_owned())).key.as_bytes()[..6].to_vec()
}

fn repair(writes: Vec<Change>, prefix_bytes: u8, deletes: &[u8]) -> ToClient {
    let deletes = Raw(deletes.to_vec().into());
    ToClient::Repair { diff: DIFF, writes: Changes(writes), prefix_bytes, deletes }
}

fn sync_done(revision: Revision, chain: ChainTag) -> ToClient {
    ToClient::SyncDone { diff: DIFF, revision, chain, suppressed: 0, failed: 0 }
}

/// Whether the client waits for what [`to_client`] makes.
fn fits_client(stage: &str, message: &str) -> bool {
    match message {
        "SyncStart" => stage == "waiting",
        // Nobody has been asked yet.
        "SyncAbort" => stage != "preparing",
        "SyncRequest" | "SyncSeq" => ["diff", "answered"].contains(&stage),
        // The one repair that was announced.
        "Repair" => stage == "announced",
        // Once, where all that was missed has been sent.
        "CaughtUp" => ["catching up", "resumed"].contains(&stage),
        _ => true,
    }
}

#[test]
fn the_client_obeys_its_table() {
    let stages = client_stages();
    for (state, message, cell) in table(CLIENT_END) {
        let mut fitted = 0;
        let here = stages.iter().filter(|(_, end)| end.session.state() == state);
        for (stage, before) in here {
            let why = format!("{message} in {state}, {stage}: {cell:?}");
            let mut end = before.clone();
            end.message(to_client(message, before));
            let fits = fits_client(stage, message);
            match cell {
                Cell::Ignore => {
                    fitted += 1;
                    assert_eq!(end.session, before.session, "{why}");
                    assert_eq!(end.outputs, [], "{why}");
                }
                Cell::Accept if fits && ["Refuse", "Farewell"].contains(&message) => {
                    fitted += 1;
                    assert_eq!(end.session.state(), "Closed", "{why}");
                    let (reason, text) = (Reason::Stopping, "bye".to_owned());
                    let peer = Output::Close(Close::Peer { reason, text });
                    assert_eq!(end.outputs, [peer], "{why}");
                }
                Cell::Accept if fits => {
                    fitted += 1;
                    assert_ne!(end.session.state(), "Closed", "{why}");
                    assert_eq!(end.closed(), None, "{why}");
                }
                Cell::Close | Cell::Accept => {
                    end.closes(&why);
                }
            }
        }
        assert!(cell == Cell::Close || fitted > 0, "{message} in {state}");
    }
}

fn client_stage(name: &str) -> ClientEnd {
    let found = client_stages().into_iter().find(|(stage, _)| *stage == name);
    found.unwrap_or_else(|| panic!("{name} is no stage")).1
}

/// The text with which the client closes.
fn client_closes(stage: &str, message: ToClient) -> String {
    let why = format!("{message:?} in {stage}");
    client_stage(stage).message(message).closes(&why)
}

fn live(first: Revision, before: ChainTag) -> ToClient {
    ToClient::Live { first, before, changes: Changes(vec![Change::write("a", "4")]) }
}

#[test]
fn the_client_closes_on_a_gap_in_the_live_changes() {
    let right = Chain::START.tag();
    for first in [Revision::ZERO, START, START.plus(2), Revision(u64::MAX)] {
        for stage in ["relay", "waiting", "diff", "announced"] {
            let text = client_closes(stage, live(first, right));
            assert_eq!(text, format!("live changes from revision {first} came where 9 was next"));
        }
    }
    // The same frame a second time.
    let mut end = client_stage("relay");
    end.message(live(START.next(), right));
    assert_eq!(end.session.stream().unwrap().revision, START.next());
    end.message(live(START.next(), right)).closes("a frame that came before");
}

#[test]
fn the_client_closes_on_changes_behind_the_last_revision() {
    let mut end = client_stage("relay");
    let (revision, chain) = (Revision(u64::MAX - 1), Chain::START);
    end.message(ToClient::FellBehind { jumps: 1, revision, chain });
    end.message(live(revision.next(), chain.tag()));
    let last = end.session.stream().unwrap();
    assert_eq!(last.revision, Revision(u64::MAX));
    let text = end.message(live(last.revision, last.chain.tag())).closes("one more");
    assert!(text.starts_with("Live names revision 18446744073709551615"), "{text}");
}

#[test]
fn the_client_closes_on_another_chain() {
    let other = Chain::from_bytes([1; 24]).tag();
    for stage in ["relay", "waiting", "diff", "announced"] {
        let text = client_closes(stage, live(START.next(), other));
        assert_eq!(text, "the chain at revision 8 is not that of the stream so far");
    }
    client_closes("repaired", sync_done(START, other));
    // The chain goes over what was sent.
    let mut end = client_stage("repaired");
    end.message(live(START.next(), Chain::START.tag()));
    let folded = Chain::START.fold(&Digest::of(&Change::write("a", "4"))).tag();
    assert_eq!(end.tag(), folded);
    end.message(sync_done(START.next(), Chain::START.tag())).closes("the chain of before");
}

#[test]
fn the_client_closes_on_more_repairs_than_announced() {
    let write = || Change::write("b", "2");
    let (one, two) = (prefix_of("c"), [prefix_of("c"), prefix_of("d")].concat());
    let more = "malformed repair: there are more repairs than announced";
    assert_eq!(client_closes("announced", repair(vec![write(), write()], 6, &one)), more);
    assert_eq!(client_closes("announced", repair(vec![], 6, &two)), more);
    assert_eq!(client_closes("repaired", repair(vec![write()], 1, &[])), more);
    assert_eq!(client_closes("repaired", repair(vec![], 6, &one)), more);
    // And on repairs that say what cannot be.
    for (message, why) in [
        (repair(vec![Change::delete("b")], 1, &[]), "a repair deletes a key by its name"),
        (repair(vec![], 4, &one), "the prefixes of a repair do not fill their bytes"),
        (repair(vec![], 17, &[0; 17]), "a prefix is longer than a key's hash"),
        (repair(vec![], 0, &[]), "its prefixes have no bytes"),
        (repair(vec![write()], 0, &one), "its prefixes have no bytes"),
    ] {
        assert_eq!(client_closes("announced", message), format!("malformed repair: {why}"));
    }
    // Fewer are no fault.
    let mut end = client_stage("announced");
    let done = to_client("SyncDone", &end);
    assert_eq!(end.message(done).session.state(), "Relay");
}

#[test]
fn the_client_closes_on_the_end_of_a_diff_elsewhere() {
    for revision in [START.next(), Revision(START.0 - 1), Revision::ZERO] {
        let text = client_closes("repaired", sync_done(revision, Chain::START.tag()));
        assert_eq!(text, format!("SyncDone names revision {revision}, the stream stands at 8"));
    }
}

#[test]
fn the_client_closes_on_a_wrong_count_of_jumps() {
    let fell = |jumps, revision| ToClient::FellBehind { jumps, revision, chain: Chain::START };
    for jumps in [0, 2, u32::MAX] {
        client_closes("relay", fell(jumps, START.plus(5)));
        client_closes("waiting", fell(jumps, START.plus(5)));
    }
    client_closes("relay", fell(1, Revision(START.0 - 1)));
    let mut end = client_stage("relay");
    end.message(fell(1, START.plus(5)));
    assert_eq!(end.outputs, [Output::FellBehind(START.plus(5))]);
    end.message(fell(1, START.plus(9))).closes("the first jump a second time");
}

#[test]
fn the_client_closes_on_a_jump_in_the_middle_of_a_diff() {
    for stage in ["diff", "answering", "answered", "announced", "repaired"] {
        let before = client_stage(stage);
        let mut end = before.clone();
        end.message(to_client("FellBehind", &before)).closes(stage);
        assert_eq!(end.session.stream(), before.session.stream(), "{stage}");
        assert_eq!(end.session.position(), before.session.position(), "{stage}");
    }
}

#[test]
fn the_client_closes_on_the_abort_of_a_diff_before_it_asks() {
    let text = client_closes("preparing", to_client("SyncAbort", &client_stage("preparing")));
    assert_eq!(text, "SyncAbort must not come in state PreDiff");
}

#[test]
fn an_answer_fits_both_ends() {
    let asked = |answer_bytes, frame_bytes| {
        let limits = Limits { answer_bytes, ..Limits::default() };
        let mut end = ClientEnd::at(limits, None);
        end.message(welcome_with(VERSION, 1, Limits { frame_bytes, ..limits }));
        end.act(|session| {
            assert_eq!(session.handle_diff(follower_tree(), false, u64::MAX), Ok(DIFF))
        });
        end.act(|session| session.handle_root(RootOf::Diff(DIFF), follower_tree().root()));
        end.message(ToClient::SyncStart { diff: DIFF });
        end.message(ToClient::SyncRequest { diff: DIFF, query: query() });
        let [Output::Answer { max_bytes, .. }] = end.outputs[..] else { panic!() };
        max_bytes
    };
    let frame = Limits::default().frame_bytes;
    assert_eq!(asked(1000, frame), 1000);
    assert_eq!(asked(frame, frame), frame - 64);
    assert_eq!(asked(8 << 20, 16 << 10), (16 << 10) - 64);
}

// The position.

/// A diff without repairs, from a state of Relay to `SyncDone`.
fn diff_again(end: &mut ClientEnd, diff: DiffId) {
    let at = end.session.stream().unwrap();
    end.act(|session| assert_eq!(session.handle_diff(server_tree(), false, u64::MAX), Ok(diff)));
    end.act(|session| session.handle_root(RootOf::Diff(diff), server_tree().root()));
    end.message(ToClient::SyncStart { diff });
    end.message(ToClient::SyncSeq { diff, writes: 0, deletes: 0 });
    let (revision, chain) = (at.revision, at.chain.tag());
    end.message(ToClient::SyncDone { diff, revision, chain, suppressed: 0, failed: 0 });
    assert!(end.outputs.contains(&Output::Mark(revision)));
}

/// Both roots at the mark where `end` stands.
fn compare_roots(end: &mut ClientEnd, ours: Hash, theirs: Hash) {
    let Position { revision, .. } = end.session.stream().unwrap();
    end.act(|session| session.handle_root(RootOf::Mark(revision), ours));
    end.message(ToClient::Verify { revision, root: theirs });
    assert!(matches!(end.outputs[..], [Output::Send(_), Output::DiffDone { .. }]));
}

#[test]
fn a_diff_makes_the_position_whole() {
    for stage in [
        "catching up",
        "relay",
        "preparing",
        "waiting",
        "diff",
        "answered",
        "announced",
        "repaired",
    ] {
        assert_eq!(client_stage(stage).session.position(), None, "{stage}");
    }
    for stage in ["done", "verified"] {
        let end = client_stage(stage);
        assert_eq!(end.session.position(), end.session.stream(), "{stage}");
    }
    let mut end = client_stage("verified");
    end.message(to_client("FellBehind", &end.clone()));
    assert_eq!(end.session.position(), None);
}

#[test]
fn a_refused_live_change_leaves_no_position() {
    let mut end = ClientEnd::at(Limits::default(), Some(start()));
    end.message(resumed(start(), Way::Resumed));
    let message = to_client("Live", &end);
    end.message(message);
    assert_eq!(end.session.position(), end.session.stream());
    end.act(client::Session::handle_refused);
    assert_eq!(end.session.position(), None);
}

#[test]
fn a_store_that_is_found_to_be_wrong_before_welcome_leaves_no_position() {
    // By a look through it that began on the last connection (seed 960006645).
    let mut end = ClientEnd::at(Limits::default(), Some(start()));
    end.act(client::Session::handle_refused);
    end.message(resumed(start(), Way::Resumed));
    assert_eq!((end.session.state(), end.session.position()), ("Relay", None));
    end.message(to_client("CaughtUp", &end.clone()));
    diff_again(&mut end, DIFF);
    assert_eq!(end.session.position(), end.session.stream());
}

#[test]
fn a_refused_live_change_in_the_middle_of_a_diff_leaves_no_position() {
    let root = server_tree().root();
    for stage in ["preparing", "waiting", "diff", "answered", "announced", "repaired"] {
        let mut end = client_stage(stage);
        let message = to_client("Live", &end);
        end.message(message);
        end.act(client::Session::handle_refused);
        for next in ["preparing", "waiting", "diff", "answered", "announced", "repaired"] {
            // From wherever it is on to the end of the diff.
            match (end.session.state(), next) {
                ("PreDiff", "preparing") => {
                    end.act(|session| session.handle_root(RootOf::Diff(DIFF), root));
                }
                ("PreDiff", "waiting") => {
                    end.message(ToClient::SyncStart { diff: DIFF });
                }
                ("Diff", "answered") => {
                    end.message(ToClient::SyncSeq { diff: DIFF, writes: 1, deletes: 1 });
                }
                _ => {}
            }
        }
        let done = to_client("SyncDone", &end);
        assert!(matches!(done, ToClient::SyncDone { failed: 0, .. }));
        end.message(done);
        assert_eq!((end.session.state(), end.session.position()), ("Relay", None), "{stage}");
        compare_roots(&mut end, root, root);
        assert_eq!(end.session.position(), None, "{stage}");
        // A diff that begins after it mends that.
        diff_again(&mut end, NEXT_DIFF);
        assert_eq!(end.session.position(), end.session.stream(), "{stage}");
    }
}

#[test]
fn a_repair_that_failed_leaves_no_position() {
    // The store refused it, before or after the last word; or the server could not read it.
    let mut end = client_stage("announced");
    end.message(to_client("Repair", &end.clone()));
    let mut late = end.clone();
    end.act(|session| session.handle_repaired(DIFF, 1, 0, Duration::ZERO));
    assert_eq!(
        end.outputs,
        [Output::Send(ToServer::RepairAck { diff: DIFF, failed: 1, micros: 0 })]
    );
    end.message(to_client("SyncDone", &end.clone()));
    assert_eq!((end.session.state(), end.session.position()), ("Relay", None));

    late.message(to_client("SyncDone", &late.clone()));
    late.act(|session| session.handle_repaired(DIFF, 0, 1, Duration::ZERO));
    assert_eq!((late.session.state(), late.session.position()), ("Relay", None));

    let mut end = client_stage("repaired");
    let chain = end.tag();
    let (revision, suppressed) = (START, 0);
    end.message(ToClient::SyncDone { diff: DIFF, revision, chain, suppressed, failed: 1 });
    assert_eq!((end.session.state(), end.session.position()), ("Relay", None));
}

#[test]
fn unequal_roots_leave_no_position() {
    let mut end = client_stage("done");
    assert_eq!(end.session.position(), end.session.stream());
    compare_roots(&mut end, follower_tree().root(), server_tree().root());
    assert_eq!((end.session.state(), end.session.position()), ("Relay", None));
    diff_again(&mut end, NEXT_DIFF);
    assert_eq!(end.session.position(), end.session.stream());
}

/// All that a diff says of how far it is, by the stage that it comes to.
#[test]
fn a_diff_says_how_far_it_is() {
    use DiffPhase::{Compare, Queued, Repair, Walk};
    let progress = |phase, rounds, done, total| vec![Progress { phase, rounds, done, total }];
    for (stage, end) in client_stages() {
        let expected = match stage {
            "waiting" => progress(Queued, 0, 0, 0),
            "diff" => progress(Walk, 0, 0, 0),
            "answering" => progress(Walk, 1, 0, 0),
            "announced" => progress(Repair, 1, 0, 2),
            "repaired" => progress(Repair, 1, 2, 2),
            "done" => progress(Compare, 1, 2, 2),
            _ => vec![],
        };
        assert_eq!(end.progress, expected, "{stage}");
    }

    // Roots alone were enough, and every walk has a round.
    let mut end = client_stage("diff");
    end.message(ToClient::SyncSeq { diff: DIFF, writes: 3, deletes: 1 });
    assert_eq!(end.progress, progress(Repair, 1, 0, 4));
    // What a store refuses is done with, too; what is left out does not count.
    end.message(repair(vec![Change::write("b", "2")], 6, &prefix_of("c")));
    assert_eq!(end.progress, []);
    end.act(|session| session.handle_repaired(DIFF, 1, 0, Duration::ZERO));
    assert_eq!(end.progress, progress(Repair, 1, 2, 4));
    let (revision, chain) = (START, end.tag());
    end.message(ToClient::SyncDone { diff: DIFF, revision, chain, suppressed: 1, failed: 1 });
    assert_eq!(end.progress, progress(Compare, 1, 3, 4));
    // Applied late.
    let mut end = client_stage("announced");
    end.message(to_client("Repair", &end.clone()));
    end.message(to_client("SyncDone", &end.clone()));
    end.act(|session| session.handle_repaired(DIFF, 0, 0, Duration::ZERO));
    assert_eq!(end.progress, []);
    // Live changes are no part of it, and neither is the end of one that is aborted.
    for message in ["Live", "SyncAbort"] {
        let mut end = client_stage("announced");
        end.message(to_client(message, &end.clone()));
        assert_eq!(end.progress, [], "{message}");
    }
}

// What was missed, shortened.

/// A table that was empty, its log, and a follower's position behind the first two changes.
struct Behind {
    table: Table,
    log: Log,
    at: Position,
}

impl Behind {
    /// Missed 26 changes of 4 keys, in three frames. In the first nothing counts.
    fn new(log_bytes: usize) -> Self {
        let mut behind = Self::empty(log_bytes);
        let again: Vec<_> = (1..=20).map(|n| Change::write("a", n.to_string())).collect();
        behind.write(&again);
        behind.write(&[Change::write("c", "1"), Change::delete("b"), Change::write("d", "1")]);
        behind.write(&[Change::write("a", "21"), Change::delete("c"), Change::write("a", "22")]);
        assert_eq!(behind.log.head(), Revision(28));
        behind
    }

    /// Missed nothing yet.
    fn empty(log_bytes: usize) -> Self {
        let mut table = Table::open(MemoryStore::new(), Limits::default()).unwrap();
        table.ready(epoch());
        let at = table.position().unwrap();
        let mut behind = Self { table, log: Log::new(log_bytes, at.revision, at.chain), at };
        behind.write(&[Change::write("a", "0"), Change::write("b", "0")]);
        behind.at = behind.table.position().unwrap();
        behind
    }

    /// A batch, in a frame of its own.
    fn write(&mut self, changes: &[Change]) {
        append(&mut self.table, &mut self.log, changes);
    }

    fn head(&self) -> Position {
        let (revision, chain) = (self.log.head(), self.log.chain());
        Position { revision, chain, ..self.at }
    }

    fn shortened(&self) -> Shortened {
        let keys = |from, chunks| self.log.keys_from(from, chunks);
        Shortened::of(&Missed::collect(self.at.revision, self.head(), keys).unwrap())
    }

    fn welcome(&self, way: Way) -> ToClient {
        resumed(self.at, way)
    }

    /// A session whose follower presents the position, and is subscribed there.
    fn subscribed(&self, config: SessionConfig) -> ServerEnd {
        let mut end = ServerEnd::new();
        end.session = server_session(config);
        end.log = self.log.clone();
        end.message(ToServer::hello("", &Limits::default(), Some(self.at)));
        assert!(matches!(end.events[..], [Event::Subscribe { .. }]));
        let way = self.log.way(epoch(), Some(&self.at));
        assert_eq!(way, Way::Resumed);
        let head = self.head();
        end.act(|session| session.handle_subscribed(self.at, way, head));
        end
    }

    fn shortening(&self) -> ServerEnd {
        let end = self.subscribed(one_by_one());
        assert_eq!(end.events, [Event::Shorten(self.at.revision, self.head())]);
        assert_eq!((end.session.state(), &end.sent[..]), ("Subscribing", &[][..]));
        end
    }

    /// What is sent of the 26.
    fn catch_up(&self) -> [ToClient; 3] {
        [
            ToClient::CatchUp {
                revision: Revision(25),
                changes: Changes(vec![Change::delete("b"), Change::write("d", "1")]),
            },
            ToClient::CatchUp {
                revision: Revision(28),
                changes: Changes(vec![Change::delete("c"), Change::write("a", "22")]),
            },
            ToClient::CaughtUp { revision: Revision(28), chain: self.log.chain() },
        ]
    }
}

#[test]
fn what_was_missed_is_sent_one_change_a_key() {
    let mut behind = Behind::new(1 << 20);
    let mut replica = Replica::open(MemoryStore::new()).unwrap();
    replica.apply(&Change::write("a", "0")).unwrap();
    replica.apply(&Change::write("b", "0")).unwrap();
    let mut follower = ClientEnd::at(Limits::default(), Some(behind.at));
    let mut end = behind.shortening();
    let (shortened, [first, second, last]) = (behind.shortened(), behind.catch_up());

    // What is written meanwhile waits.
    behind.write(&[Change::write("a", "23"), Change::write("e", "1")]);
    let late = behind.table.position().unwrap();
    end.log = behind.log.clone();
    end.act(|session| session.handle_shortened(Some(shortened)));
    let live = ToClient::Live {
        first: Revision(29),
        before: match &last {
            ToClient::CaughtUp { chain, .. } => chain.tag(),
            _ => unreachable!(),
        },
        changes: Changes(vec![Change::write("a", "23"), Change::write("e", "1")]),
    };
    let sent = [behind.welcome(Way::Shortened), first, second, last, live];
    assert_eq!(end.sent, sent);
    assert_eq!((end.session.state(), end.session.sent()), ("Relay", late.revision));
    assert_eq!(end.events, []);

    behind.write(&[Change::delete("a")]);
    end.log = behind.log.clone();
    end.act(|_| {});
    assert!(matches!(end.sent[..], [ToClient::Live { first: Revision(31), .. }]));

    // And the follower comes where the server is, by that alone.
    for message in sent.into_iter().chain(end.sent) {
        follower.message(message);
        for output in &follower.outputs {
            if let Output::Apply { changes, .. } | Output::CatchUp { changes, .. } = output {
                changes.iter().for_each(|(change, _)| replica.apply(change).unwrap());
            }
        }
    }
    assert_eq!(follower.session.position(), behind.table.position());
    assert_eq!(replica.tree().root(), behind.table.tree().root());
}

#[test]
fn little_is_not_shortened() {
    let again = |count: usize| vec![Change::write("a", "1"); count];
    let live = |changes: Vec<Change>, at: &Position| ToClient::Live {
        first: at.revision.next(),
        before: at.chain.tag(),
        changes: Changes(changes),
    };
    let behind = |changes: &[Change]| {
        let mut behind = Behind::empty(1 << 20);
        behind.write(changes);
        behind
    };
    let config = one_by_one();
    // Of 14 changes no 14 are left out: nobody looks which.
    let few = behind(&again(14));
    let end = few.subscribed(config);
    let caught_up = |behind: &Behind| {
        let Position { revision, chain, .. } = behind.head();
        ToClient::CaughtUp { revision, chain }
    };
    let all = [few.welcome(Way::Resumed), live(again(14), &few.at), caught_up(&few)];
    assert_eq!(end.sent, all);
    assert_eq!((end.session.state(), end.events), ("Relay", vec![]));

    // 13 of 15 are left out, and 14 of 15.
    let other = [again(14), vec![Change::write("b", "1")]].concat();
    for (changes, dropped) in [(other, 13), (again(15), 14)] {
        let behind = behind(&changes);
        let (mut end, shortened) = (behind.shortening(), behind.shortened());
        assert_eq!(shortened.dropped(), dropped);
        end.act(|session| session.handle_shortened(Some(shortened)));
        assert_eq!((end.session.state(), &end.events[..]), ("Relay", &[][..]));
        if dropped < 14 {
            let sent = live(changes, &behind.at);
            let all = [behind.welcome(Way::Resumed), sent, caught_up(&behind)];
            assert_eq!(end.sent, all);
        } else {
            let (revision, chain) = (behind.log.head(), behind.log.chain());
            let changes = Changes(vec![Change::write("a", "1")]);
            let last = ToClient::CatchUp { revision, changes };
            let caught_up = ToClient::CaughtUp { revision, chain };
            assert_eq!(end.sent, [behind.welcome(Way::Shortened), last, caught_up]);
        }
    }
}

#[test]
fn much_is_not_shortened() {
    let behind = Behind::new(1 << 20);
    for (shorten_changes, shortens) in [(0, false), (25, false), (26, true)] {
        let config = SessionConfig { shorten_changes, ..one_by_one() };
        let end = behind.subscribed(config);
        if shortens {
            assert!(matches!(end.events[..], [Event::Shorten(..)]));
            continue;
        }
        let [welcome, live @ .., ToClient::CaughtUp { .. }] = &end.sent[..] else { panic!() };
        assert_eq!(*welcome, behind.welcome(Way::Resumed));
        let frames: Vec<_> = live
            .iter()
            .map(|message| match message {
                ToClient::Live { first, changes, .. } => (first.0, changes.0.len()),
                other => panic!("{other:?}"),
            })
            .collect();
        assert_eq!(frames, [(3, 20), (23, 3), (26, 3)]);
        assert_eq!(end.events, []);
    }
}

#[test]
fn who_is_not_resumed_is_not_shortened() {
    let behind = Behind::new(1 << 20);
    for way in [Way::NoPosition, Way::OtherEpoch, Way::NotInLog, Way::OtherChain, Way::Ahead] {
        let mut end = server_stage("subscribing");
        let head = behind.head();
        end.act_with_room(1, |session| session.handle_subscribed(behind.at, way, head));
        assert_eq!(end.sent, [behind.welcome(way)]);
        assert_eq!((end.session.state(), end.events), ("Relay", vec![]));
    }
}

#[test]
fn small_frames_that_were_missed_are_put_together() {
    let live = |message: &ToClient| match message {
        ToClient::Live { first, changes, .. } => (first.0, changes.0.len()),
        other => panic!("{other:?}"),
    };
    let mut behind = Behind::empty(1 << 20);
    for number in 0..100 {
        behind.write(&[Change::write(format!("key-{number}"), "value")]);
    }
    // All in one; as many as fit; as they are in the log.
    for (missed_bytes, frames) in [(64 << 10, 1..=1), (500, 5..=10), (0, 100..=100)] {
        let config = SessionConfig { missed_bytes, shorten_changes: 0, ..SessionConfig::default() };
        let end = behind.subscribed(config);
        assert_eq!(end.sent[0], behind.welcome(Way::Resumed));
        let [_, sent @ .., ToClient::CaughtUp { .. }] = &end.sent[..] else { panic!() };
        let sent: Vec<_> = sent.iter().map(live).collect();
        assert!(frames.contains(&sent.len()), "{sent:?}");
        assert_eq!(sent.iter().map(|(_, changes)| changes).sum::<usize>(), 100);
        // A follower takes them for what they are, and knows when it has them all.
        let mut client = ClientEnd::at(Limits::default(), Some(behind.at));
        for message in end.sent.clone() {
            assert!(matches!(message, ToClient::Welcome { .. }) || client.session.is_catching_up());
            client.message(message);
        }
        assert!(!client.session.is_catching_up());
        assert_eq!(client.session.position(), behind.table.position());
    }
}

#[test]
fn what_counts_is_not_asked_for_twice() {
    let behind = Behind::new(1 << 20);
    for (stage, before) in server_stages() {
        if stage != "shortening" {
            let mut end = before.clone();
            end.session.handle_shortened(Some(behind.shortened()));
            assert_eq!(end.session, before.session, "{stage}");
        }
        if stage != "subscribing" {
            let mut end = before.clone();
            let head = behind.head();
            end.session.handle_subscribed(behind.at, Way::Resumed, head);
            assert_eq!(end.session, before.session, "{stage}");
        }
    }
}

#[test]
fn a_follower_that_owes_no_answer_sends_small_frames() {
    let (small, large) = (tablecast_protocol::SMALL_FRAME_BYTES, Limits::default().frame_bytes);
    let limit = |end: &ServerEnd| end.session.max_frame_bytes();
    for stage in
        ["hello", "relay", "queued", "snapshot", "walk", "answered", "reading", "repaired", "done"]
    {
        assert_eq!(limit(&server_stage(stage)), small, "{stage}");
    }
    let mut end = server_stage("asked");
    assert_eq!(limit(&end), large);
    let mut answered = end.clone();
    answered.message(to_server("SyncResponse"));
    assert_eq!(limit(&answered), small);
    // It may have been on its way when its diff was aborted, and come later than anything else.
    end.act(|session| session.handle_busy(DIFF));
    let mut asks = end.clone();
    let stall = SessionConfig::default().diff_stall;
    for (now, allowed) in [(0, large), (1, large), (29, large), (30, small)] {
        let now = Duration::from_secs(now).min(stall);
        end.session.handle_message(ToServer::Pong {}, now);
        end.act(|session| session.handle_timeout(now));
        assert_eq!(limit(&end), allowed, "{now:?}");
    }
    assert_eq!(end.message(to_server("SyncResponse")).session.state(), "Relay");
    // Whoever asks for a diff has read that the last one is over.
    let mut request = sync_req(DIFF);
    if let ToServer::SyncReq { diff, .. } = &mut request {
        *diff = NEXT_DIFF;
    }
    assert_eq!(limit(asks.message(request)), small);
}

#[test]
fn an_answer_of_no_diff_closes() {
    let mut end = server_stage("relay");
    let answer = Raw(bytes::Bytes::from_static(&[1]));
    end.message(ToServer::SyncResponse { diff: DiffId(0), answer });
    assert_eq!(end.session.state(), "Closed");
}

#[test]
fn who_falls_off_the_log_is_not_caught_up() {
    let limits = |end: &ServerEnd| end.session.max_frame_bytes();
    // Before the first frame, between two, and behind the last.
    for frames in 0..3 {
        let mut behind = Behind::new(4096);
        let mut end = behind.shortening();
        let mut sent = vec![behind.welcome(Way::Shortened)];
        sent.extend(behind.catch_up().into_iter().take(frames));
        end.act_with_room(1 + frames, |session| session.handle_shortened(Some(behind.shortened())));
        assert_eq!((&end.sent, end.session.state()), (&sent, "CatchUp"));
        assert_eq!(limits(&end), tablecast_protocol::SMALL_FRAME_BYTES);
        let Position { revision: last, chain: at, .. } = behind.shortened().end();
        // Takes the place of all that was before, and of one that came behind the end.
        behind.write(&[Change::write("big", vec![0; 5000])]);
        behind.write(&[Change::write("big", vec![1; 5000])]);
        end.log = behind.log.clone();
        end.act(|_| {});
        let (revision, chain) = (behind.log.head(), behind.log.chain());
        let fell = ToClient::FellBehind { jumps: 1, revision, chain };
        // Behind the last frame nothing of it is missing.
        let caught_up = ToClient::CaughtUp { revision: last, chain: at };
        let expected = if frames == 2 { vec![caught_up, fell] } else { vec![fell] };
        assert_eq!(end.sent, expected, "{frames}");
        assert_eq!(end.events, [Event::FellBehind(revision)]);
        assert_eq!((end.session.state(), end.session.jumps()), ("Relay", 1));
        // A diff comes next.
        let ToServer::SyncReq { diff, full, root, len, max_deletes, .. } = sync_req(DIFF) else {
            panic!()
        };
        end.message(ToServer::SyncReq { diff, jumps: 1, full, root, len, max_deletes });
        assert_eq!(end.events, [Event::Admit(DIFF)]);
    }
    // While it is found out what counts, too.
    let mut behind = Behind::new(4096);
    let (mut end, shortened) = (behind.shortening(), behind.shortened());
    behind.write(&[Change::write("big", vec![0; 5000])]);
    end.log = behind.log.clone();
    end.act(|session| session.handle_shortened(Some(shortened)));
    let (revision, chain) = (behind.log.head(), behind.log.chain());
    let fell = ToClient::FellBehind { jumps: 1, revision, chain };
    assert_eq!(end.sent, [behind.welcome(Way::Shortened), fell]);
}

#[test]
fn a_shortened_catch_up_is_ended_in_the_middle() {
    let behind = Behind::new(1 << 20);
    let farewell = || ToClient::Farewell { reason: Reason::Stopping, text: String::new() };
    let refuse = || ToClient::Refuse { reason: Reason::Stopping, text: String::new() };
    let here = || Event::Close(Close::Here { reason: Reason::Stopping, text: String::new() });

    // Who stops sends what there is first; who closes does not.
    let mut end = server_stage("catching up");
    end.act(server::Session::handle_stop);
    let [first, second, last] = behind.catch_up();
    assert_eq!(end.sent, [first, second, last, farewell()]);
    assert_eq!(end.events, [here()]);
    let mut end = server_stage("catching up");
    end.act_with_room(1, |_| {});
    end.act(|session| session.handle_close(Reason::Stopping, ""));
    assert_eq!((&end.sent[..], &end.events[..]), (&[farewell()][..], &[here()][..]));
    end.act(|_| {});
    assert_eq!(end.sent, []);

    // Before Welcome both refuse, and what counts is no longer of use.
    for act in [server::Session::handle_stop, |session: &mut server::Session| {
        session.handle_close(Reason::Stopping, "");
    }] {
        let mut end = server_stage("shortening");
        end.act(act);
        assert_eq!((&end.sent[..], &end.events[..]), (&[refuse()][..], &[here()][..]));
        end.act(|session| session.handle_shortened(Some(behind.shortened())));
        assert_eq!((end.session.state(), end.sent), ("Closed", vec![]));
    }

    // The follower leaves.
    for stage in ["shortening", "catching up"] {
        let mut end = server_stage(stage);
        end.message(to_server("Farewell"));
        assert_eq!((end.session.state(), end.sent), ("Closed", vec![]), "{stage}");
    }
}

#[test]
fn control_goes_before_what_was_missed_and_marks_behind_it() {
    let behind = Behind::new(1 << 20);
    let [first, second, last] = behind.catch_up();
    let HeartbeatConfig { ping_after, dead_after } = HeartbeatConfig::default();
    let mut end = server_stage("catching up");
    end.log.set_checkpoint();
    assert_eq!(end.session.poll_timeout(), Some(ping_after));
    end.act_with_room(2, |session| {
        session.handle_message(ToServer::Ping {}, NOW);
        session.handle_timeout(ping_after);
    });
    assert_eq!(end.sent, [ToClient::Pong {}, ToClient::Ping {}]);
    end.act(|_| {});
    assert_eq!(end.sent, [first, second, last, ToClient::Mark { revision: Revision(28) }]);

    let mut end = server_stage("catching up");
    end.act(|session| session.handle_timeout(dead_after));
    let text = String::new();
    assert_eq!(end.sent, [ToClient::Farewell { reason: Reason::Silent, text }]);
}

#[test]
fn a_shortened_catch_up_has_a_position_at_its_end() {
    let mut end = client_stage("catching up");
    assert!(end.session.is_catching_up());
    assert_eq!((end.session.position(), end.session.stream()), (None, Some(start())));
    for behind in [2, 5] {
        let revision = START.plus(behind);
        end.message(catch_up(revision));
        let changes = [Change::write("a", "4"), Change::delete("b")];
        let changes = changes.map(|change| (change.clone(), Digest::of(&change))).to_vec();
        assert_eq!(end.outputs, [Output::CatchUp { revision, changes }]);
        assert_eq!((end.session.position(), end.session.stream()), (None, Some(start())));
    }
    let revision = START.plus(7);
    end.message(caught_up(revision));
    assert_eq!(end.outputs, [Output::CaughtUp(revision)]);
    assert!(!end.session.is_catching_up());
    let at = Position { epoch: epoch(), revision, chain: END_CHAIN };
    assert_eq!((end.session.position(), end.session.stream()), (Some(at), Some(at)));
    // What comes live must follow it.
    end.clone().message(live(revision.next(), Chain::START.tag())).closes("another chain");
    end.clone().message(live(START.next(), END_CHAIN.tag())).closes("what was caught up with");
    end.message(live(revision.next(), END_CHAIN.tag()));
    assert_eq!(end.session.position().unwrap().revision, revision.next());

    // Nor is it caught up where everything was sent, but in another history.
    let mut end = client_stage("resumed");
    let revision = end.session.stream().unwrap().revision;
    end.message(ToClient::CaughtUp { revision, chain: END_CHAIN }).closes("another chain");
    // Nothing came behind the position after all.
    let mut end = client_stage("catching up");
    end.message(ToClient::CaughtUp { revision: START, chain: Chain::START });
    assert_eq!(end.session.position(), Some(start()));
}

#[test]
fn a_refused_change_of_a_shortened_catch_up_leaves_no_position() {
    let mut end = client_stage("catching up");
    end.message(catch_up(START.plus(2)));
    end.act(client::Session::handle_refused);
    end.message(catch_up(START.plus(3)));
    // Or it is known after the last word only.
    let mut late = client_stage("catching up");
    late.message(catch_up(START.plus(3)));
    late.message(caught_up(START.plus(3)));
    late.act(client::Session::handle_refused);
    end.message(caught_up(START.plus(3)));
    for mut end in [end, late] {
        assert_eq!((end.session.state(), end.session.position()), ("Relay", None));
        assert_eq!(end.message(ToClient::Mark { revision: START.plus(3) }).outputs, []);
        diff_again(&mut end, DIFF);
        assert_eq!(end.session.position(), end.session.stream());
    }
}

#[test]
fn who_fell_behind_in_a_shortened_catch_up_has_no_position() {
    for missed in [0, 2] {
        let mut end = client_stage("catching up");
        if missed > 0 {
            end.message(catch_up(START.plus(missed)));
        }
        end.message(to_client("FellBehind", &end.clone()));
        assert_eq!(end.outputs, [Output::FellBehind(START.plus(5))]);
        assert_eq!((end.session.state(), end.session.position()), ("Relay", None));
        for message in [catch_up(START.plus(6)), caught_up(START.plus(6))] {
            end.clone().message(message).closes("the catch-up goes on");
        }
        end.act(|session| {
            assert_eq!(session.handle_diff(follower_tree(), false, u64::MAX), Ok(DIFF));
        });
        end.act(|session| session.handle_root(RootOf::Diff(DIFF), follower_tree().root()));
        assert!(matches!(end.outputs[..], [Output::Send(ToServer::SyncReq { jumps: 1, .. })]));
    }
    let fell = |jumps, revision| ToClient::FellBehind { jumps, revision, chain: Chain::START };
    client_closes("catching up", fell(2, START.plus(5)));
    client_closes("catching up", fell(1, Revision(START.0 - 1)));
}

#[test]
fn the_client_closes_on_what_does_not_belong_into_a_shortened_catch_up() {
    let text = client_closes("catching up", live(START.next(), Chain::START.tag()));
    assert_eq!(text, "Live must not come in state CatchUp");
    let text = client_closes("catching up", ToClient::Mark { revision: START });
    assert_eq!(text, "Mark must not come in state CatchUp");
    let text = client_closes("catching up", caught_up(Revision(START.0 - 1)));
    assert_eq!(text, "CaughtUp names revision 7, the stream stands at 8");
    let mut end = client_stage("catching up");
    end.message(caught_up(START.plus(3)));
    let text = end.clone().message(caught_up(START.plus(3))).closes("the second");
    assert_eq!(text, "CaughtUp must not come in state Relay");
    let text = end.message(catch_up(START.plus(4))).closes("behind the end");
    assert_eq!(text, "CatchUp must not come in state Relay");
}

#[test]
fn who_is_resumed_is_where_it_said() {
    let other = [
        Position { epoch: Epoch::from_bytes([8; 16]), ..start() },
        Position { revision: START.next(), ..start() },
        Position { revision: Revision(START.0 - 1), ..start() },
        Position { chain: END_CHAIN, ..start() },
    ];
    for way in [Way::Resumed, Way::Shortened] {
        for at in other {
            let mut end = ClientEnd::at(Limits::default(), Some(start()));
            end.message(resumed(at, way)).closes("resumed elsewhere");
            assert_eq!((end.session.stream(), end.session.position()), (None, None));
        }
        ClientEnd::new().message(resumed(start(), way)).closes("nothing was presented");
    }
    let mut end = ClientEnd::at(Limits::default(), Some(start()));
    end.message(resumed(start(), Way::Resumed));
    assert_eq!((end.session.state(), end.session.position()), ("Relay", Some(start())));
}

// Held repairs.

#[test]
fn the_server_holds_a_repair_that_deletes_too_much() {
    // The repair of this fixture writes one key and deletes one.
    let walked = |allowed| {
        let mut end = server_stage("relay");
        let ToServer::SyncReq { diff, jumps, full, root, len, .. } = sync_req(DIFF) else {
            panic!()
        };
        let max_deletes = allowed;
        end.message(ToServer::SyncReq { diff, jumps, full, root, len, max_deletes });
        end.act(|session| session.handle_admitted(DIFF));
        end.act(|session| session.handle_snapshot(DIFF, server_tree()));
        let [Event::Walk { tree, root, len, full, .. }] = &end.events[..] else { panic!() };
        let (mut walk, step) = Walk::new(tree.clone(), *root, *len, *full, 1 << 20, 100);
        end.act(|session| session.handle_step(DIFF, step));
        end.message(to_server("SyncResponse"));
        let step = walk.handle_answer(&an_answer()).unwrap();
        end.act(|session| session.handle_step(DIFF, step));
        end
    };
    let announced = || ToClient::SyncSeq { diff: DIFF, writes: 1, deletes: 1 };

    let mut end = walked(0);
    let held = ToClient::SyncAbort { diff: DIFF, reason: AbortReason::Held };
    assert_eq!(end.sent, [announced(), held]);
    let served = Served { rounds: 1, writes: 1, deletes: 1, ..Served::default() };
    let ended = Event::EndDiff { diff: DIFF, aborted: Some(AbortReason::Held), served };
    assert_eq!(end.events, [ended], "nothing is read");
    assert_eq!(end.session.state(), "Relay");
    // It may be asked for again.
    end.message(sync_req(NEXT_DIFF));
    assert_eq!(end.events, [Event::Admit(NEXT_DIFF)]);

    for allowed in [1, 2, u64::MAX] {
        let end = walked(allowed);
        assert_eq!(end.sent, [announced()], "{allowed}");
        assert!(matches!(end.events[..], [Event::Read { .. }]), "{allowed}");
        assert_eq!(end.session.state(), "Diff");
    }
}

/// Has asked for a diff of this tree, and been told what it comes to.
fn announced(tree: &Tree, max_deletes: u64, writes: u64, deletes: u64) -> ClientEnd {
    let mut end = client_stage("relay");
    end.tree = tree.clone();
    end.act(|session| {
        assert_eq!(session.handle_diff(tree.clone(), false, max_deletes), Ok(DIFF));
    });
    end.act(|session| session.handle_root(RootOf::Diff(DIFF), tree.root()));
    let [Output::Send(ToServer::SyncReq { max_deletes: asked, .. })] = end.outputs[..] else {
        panic!()
    };
    assert_eq!(asked, max_deletes);
    end.message(ToClient::SyncStart { diff: DIFF });
    end.message(ToClient::SyncSeq { diff: DIFF, writes, deletes });
    assert_eq!(end.session.state(), "PostDiff");
    end
}

fn held() -> ToClient {
    ToClient::SyncAbort { diff: DIFF, reason: AbortReason::Held }
}

/// Closed because of that, with nothing of the repair applied.
fn closes_on_too_much(end: &ClientEnd, why: &str) {
    let text = end.closes(why);
    assert!(text.starts_with("malformed repair: "), "{why}: {text}");
    assert!(text.contains("more keys than"), "{why}: {text}");
    assert_eq!(end.outputs.len(), 2, "{why}");
}

#[test]
fn the_client_closes_when_what_comes_next_does_not_come() {
    // The server is alive, or what comes is long.
    for part in [false, true] {
        for (stage, mut end) in client_stages().into_iter().filter(|(stage, _)| *stage != "closed")
        {
            let mut now = Duration::ZERO;
            while end.session.state() != "Closed" && now < Duration::from_secs(200) {
                now = end.session.poll_timeout().unwrap();
                end.act(|session| {
                    if part {
                        session.handle_part(now)
                    } else {
                        session.handle_heard(now)
                    }
                    session.handle_timeout(now);
                });
            }
            let free = ["relay", "preparing", "waiting", "answering", "verified"];
            let open = part || free.contains(&stage);
            assert_eq!(end.session.state() != "Closed", open, "{stage}");
            if let [.., Output::Close(Close::Here { reason, text })] = &end.outputs[..] {
                assert_eq!((*reason, now), (Reason::Silent, Duration::from_secs(120)), "{stage}");
                assert!(text.starts_with("nothing came in "), "{stage}: {text}");
            }
        }
    }
}

#[test]
fn what_does_not_come_is_noticed_however_long_silence_may_be() {
    let never = HeartbeatConfig { ping_after: Duration::MAX, dead_after: Duration::MAX };
    let mut session =
        client::Session::new("", Limits::default(), never, Some(start()), Duration::ZERO);
    let (revision, chain) = (START, Chain::START);
    for (state, message) in [
        ("Relay", resumed(start(), Way::Resumed)),
        // Nothing is owed, and a diff may begin before anybody looks at the clock again.
        ("Relay", ToClient::CaughtUp { revision, chain }),
    ] {
        assert!(session.poll_timeout().unwrap() <= Duration::from_secs(120));
        session.handle_message(message, Duration::ZERO);
        assert_eq!(session.state(), state);
    }
    assert!(session.poll_timeout().unwrap() <= Duration::from_secs(120));
}

#[test]
fn what_a_peer_says_is_one_line_and_not_long() {
    let text = format!("\u{1b}[2Jgone\n{}", "é".repeat(1000));
    let reason = Reason::Stopping;
    let kept = format!(" [2Jgone {}", "é".repeat(507));
    let peer = Close::Peer { reason, text: kept };
    let mut end = client_stage("relay");
    end.message(ToClient::Farewell { reason, text: text.clone() });
    assert_eq!(end.outputs, [Output::Close(peer.clone())]);
    let mut end = server_stage("relay");
    end.message(ToServer::Farewell { reason, text });
    assert_eq!(end.events, [Event::Close(peer)]);
}

#[test]
fn the_client_says_what_was_held() {
    for (allowed, deletes) in [(0, 1), (6, 7), (6, u64::MAX)] {
        let mut end = announced(&follower_tree(), allowed, 5, deletes);
        end.message(held());
        assert_eq!(end.outputs, [Output::Held { diff: DIFF, writes: 5, deletes, keys: 2 }]);
        assert_eq!((end.session.state(), end.session.position()), ("Relay", None));
        end.act(|session| {
            assert_eq!(session.handle_diff(follower_tree(), false, u64::MAX), Ok(NEXT_DIFF));
        });
    }
    // What was whole is not known to be any more, until roots at a mark say so.
    let mut end = client_stage("verified");
    end.act(|session| assert_eq!(session.handle_diff(server_tree(), true, 0), Ok(NEXT_DIFF)));
    end.act(|session| session.handle_root(RootOf::Diff(NEXT_DIFF), server_tree().root()));
    end.message(ToClient::SyncStart { diff: NEXT_DIFF });
    end.message(ToClient::SyncSeq { diff: NEXT_DIFF, writes: 0, deletes: 2 });
    end.message(ToClient::SyncAbort { diff: NEXT_DIFF, reason: AbortReason::Held });
    assert_eq!(end.outputs, [Output::Held { diff: NEXT_DIFF, writes: 0, deletes: 2, keys: 2 }]);
    assert_eq!(end.session.position(), None);
    let (root, other) = (server_tree().root(), follower_tree().root());
    for (number, theirs) in [(1, other), (2, root)] {
        end.message(ToClient::Mark { revision: START });
        assert_eq!(end.outputs, [Output::Checkpoint(number)]);
        end.act(|session| session.handle_root(RootOf::Checkpoint(number), root));
        end.message(ToClient::Verify { revision: START, root: theirs });
        assert_eq!(end.session.position().is_some(), theirs == root);
    }
    let equal = Output::Verified { revision: START, root, server_root: root };
    assert!(end.outputs.contains(&equal), "{:?}", end.outputs);
}

#[test]
fn roots_that_were_equal_make_nothing_whole_that_was_refused_since() {
    for refused in [false, true] {
        let mut end = announced(&server_tree(), 0, 0, 2);
        end.message(held());
        end.message(ToClient::Mark { revision: START });
        if refused {
            let message = to_client("Live", &end);
            end.message(message);
            end.act(client::Session::handle_refused);
        }
        let root = server_tree().root();
        end.act(|session| session.handle_root(RootOf::Checkpoint(1), root));
        end.message(ToClient::Verify { revision: START, root });
        assert_eq!(end.session.position().is_none(), refused);
    }
}

#[test]
fn a_jump_makes_nothing_whole_that_was_held() {
    let mut end = announced(&server_tree(), 0, 0, 2);
    end.message(held());
    end.message(ToClient::Mark { revision: START });
    let chain = Chain::START;
    end.message(ToClient::FellBehind { jumps: 1, revision: Revision(START.0 + 5), chain });
    let root = server_tree().root();
    end.act(|session| session.handle_root(RootOf::Checkpoint(1), root));
    end.message(ToClient::Verify { revision: START, root });
    assert_eq!(end.session.position(), None);
}

#[test]
fn the_client_deletes_no_key_over_and_over() {
    // Where nothing is held, a prefix that half of a table begins with could be named in a byte a time.
    let tree = Tree::build((0..64_u32).map(|n| (n.to_be_bytes(), "1")));
    let first = *tree.iter().next().unwrap().key_hash().as_bytes().first().unwrap();
    let mut end = announced(&tree, u64::MAX, 0, u64::MAX);
    end.message(repair(vec![], 1, &[first; 8]));
    assert!(matches!(end.outputs[..], [Output::Repair { .. }]));
    end.message(repair(vec![], 1, &[first; 96]));
    closes_on_too_much(&end, "more keys than there are");
}

/// A few bytes would be a whole table in memory otherwise.
#[test]
fn the_client_deletes_no_more_keys_at_once_than_a_frame_has_changes() {
    let tree = Tree::build((0..70_000_u32).map(|n| (n.to_be_bytes(), "1")));
    let prefixes: Vec<_> = (0..=255).collect();
    let mut end = announced(&tree, u64::MAX, 0, 256);
    let text = end.message(repair(vec![], 1, &prefixes)).closes("all at once");
    assert_eq!(text, "malformed repair: it deletes more keys than one repair may");
    let mut end = announced(&tree, u64::MAX, 0, 256);
    for half in prefixes.chunks(128) {
        end.message(repair(vec![], 1, half));
        assert!(matches!(end.outputs[..], [Output::Repair { .. }]));
        end.act(|session| session.handle_repaired(DIFF, 0, 0, Duration::ZERO));
    }
}

#[test]
fn a_mark_at_which_the_store_cannot_be_read_is_none() {
    let mut end = client_stage("verified");
    let mark = ToClient::Mark { revision: START };
    assert_eq!(end.message(mark.clone()).outputs, [Output::Checkpoint(1)]);
    end.act(|session| session.handle_unread(1));
    end.message(ToClient::Verify { revision: START, root: follower_tree().root() });
    assert_eq!(end.outputs, []);
    assert!(end.session.position().is_some());
    assert_eq!(end.message(mark).outputs, [Output::Checkpoint(2)]);
}

#[test]
fn the_client_closes_on_what_is_held_without_reason() {
    for (allowed, deletes) in [(0, 0), (1, 1), (2, 1), (u64::MAX, u64::MAX)] {
        let mut end = announced(&follower_tree(), allowed, 1, deletes);
        let text = end.message(held()).closes("few deletes");
        assert_eq!(text, "SyncAbort must not come in state PostDiff");
    }
    for stage in ["preparing", "waiting", "diff", "answering", "answered", "announced", "repaired"]
    {
        client_closes(stage, held());
    }
    // Of another diff.
    let other = ToClient::SyncAbort { diff: NEXT_DIFF, reason: AbortReason::Held };
    announced(&follower_tree(), 0, 1, 1).message(other).closes("another diff");
}

#[test]
fn the_client_closes_on_a_repair_that_should_have_been_held() {
    // Be it one that deletes nothing.
    for message in [
        repair(vec![], 6, &prefix_of("c")),
        repair(vec![Change::write("b", "2")], 1, &[]),
        repair(vec![], 1, &[]),
    ] {
        let mut end = announced(&follower_tree(), 0, 1, 1);
        closes_on_too_much(end.message(message), "held");
    }
    // Nor is it done.
    let mut end = announced(&follower_tree(), 0, 1, 1);
    let done = to_client("SyncDone", &end);
    end.message(done).closes("SyncDone of a diff that is held");
    // One that deletes as much as is allowed is applied.
    let mut end = announced(&follower_tree(), 1, 1, 1);
    end.message(repair(vec![], 6, &prefix_of("c")));
    assert!(matches!(end.outputs[..], [Output::Repair { .. }]));
}

#[test]
fn the_client_closes_on_prefixes_that_hit_more_keys_than_allowed() {
    let tree = Tree::build((0..20_000_u16).map(|n| (n.to_be_bytes(), "value")));
    let hits = |first: u8| {
        let below = |entry: &&Entry| entry.key_hash().as_bytes()[0] == first;
        tree.iter().filter(below).count() as u64
    };
    let (one, two) = (hits(1), hits(2));
    assert!(one > 20 && two > 20);
    // Keys whose hashes begin alike are counted once by the server: some more are let through.
    let least = |hits| (1_u64..).find(|most| most + most / 8 + 16 >= hits).unwrap();
    let prefix = |first: u8| repair(vec![], 1, &[first]);

    // One short prefix, which was announced as one.
    let mut end = announced(&tree, least(one), 0, 1);
    end.message(prefix(1));
    let [Output::Repair { changes, .. }] = &end.outputs[..] else { panic!() };
    assert_eq!(changes.len() as u64, one);
    let mut end = announced(&tree, least(one) - 1, 0, 1);
    closes_on_too_much(end.message(prefix(1)), "one too many");

    // Two in one repair, and in two.
    let all = one + two;
    for (allowed, closes) in [(least(all), false), (least(all) - 1, true)] {
        let mut together = announced(&tree, allowed, 0, 2);
        together.message(repair(vec![], 1, &[1, 2]));
        let mut apart = announced(&tree, allowed, 0, 2);
        apart.message(prefix(1));
        apart.act(|session| session.handle_repaired(DIFF, 0, 0, Duration::ZERO));
        apart.message(prefix(2));
        for end in [together, apart] {
            if closes {
                closes_on_too_much(&end, "one too many");
            } else {
                assert!(matches!(end.outputs[..], [Output::Repair { .. }]));
            }
        }
    }
}

// How large what is sent may be.

#[test]
fn queries_hold_what_a_frame_does() {
    let tree = Tree::build((0..2000_u32).map(|n| (n.to_be_bytes(), "value")));
    let follower = Tree::build((0..2000_u32).map(|n| (n.to_be_bytes(), "other")));
    let (mut walk, mut step) = Walk::new(tree, Some(follower.root()), 2000, false, 7, 10_000);
    let mut queries = 0;
    let found = loop {
        match step {
            Step::Ask(query) => {
                queries += 1;
                assert!(query.nodes.len() <= 7, "{query:?}");
                step = walk.handle_answer(&answer(&follower, &query, 1 << 20).unwrap()).unwrap();
            }
            Step::Done(found) => break found.first,
        }
    };
    assert_eq!((found.writes.len(), found.deletes.len()), (2000, 0));
    assert!(queries > 16);
}

#[test]
fn repairs_hold_what_a_frame_does() {
    let limits = Limits { frame_bytes: 1000, ..Limits::default() };
    let entries = (0..200_u8).map(|n| (vec![n].into(), vec![n; usize::from(n)].into()));
    let mut table = Table::open(entries.collect::<MemoryStore>(), limits).unwrap();
    table.ready(epoch());
    let config = SessionConfig { limits, ..SessionConfig::default() };
    let mut end = ServerEnd::new();
    end.session = server_session(config);
    end.message(ToServer::hello("", &limits, None));
    end.act(|session| {
        let at = table.position().unwrap();
        session.handle_subscribed(at, Way::NoPosition, at);
    });
    end.message(sync_req(DIFF));
    end.act(|session| session.handle_admitted(DIFF));
    end.act(|session| session.handle_snapshot(DIFF, table.tree().clone()));
    // A follower that has 200 keys too many, and none of the server's.
    let extra = Tree::build((0..200_u8).map(|n| ([n, n], "")));
    let (mut walk, step) = Walk::new(Tree::new(), Some(extra.root()), 200, true, 1 << 20, 1000);
    let Step::Ask(query) = step else { panic!() };
    let step = walk.handle_answer(&answer(&extra, &query, 1 << 20).unwrap()).unwrap();
    let Step::Done(Found { first: Difference { deletes, .. }, .. }) = step else { panic!() };
    let (_, step) =
        Walk::new(table.tree().clone(), Some(Tree::new().root()), 0, true, 1 << 20, 1000);
    let Step::Done(Found { first: Difference { writes, .. }, .. }) = step else { panic!() };
    let first = Difference { writes, deletes };
    assert_eq!(first.len(), 400);
    end.act(|session| session.handle_step(DIFF, Step::Done(Found { first, ..Found::default() })));
    let (mut writes, mut deletes) = (0, 0);
    while let [Event::Read { found, from, max_bytes, .. }] = &end.events[..] {
        let values = table.read(found, *from, *max_bytes);
        end.act(|session| session.handle_values(DIFF, values));
        let [repair @ ToClient::Repair { writes: Changes(wrote), deletes: Raw(gone), .. }] =
            &end.sent[..]
        else {
            panic!("{:?}", end.sent)
        };
        let payload = wire::encode(repair).len() - HEADER_BYTES;
        assert!(payload <= limits.frame_bytes, "{payload}");
        (writes, deletes) = (writes + wrote.len(), deletes + gone.len() / 16);
        let next = std::mem::take(&mut end.events);
        end.message(to_server("RepairAck"));
        end.events = next;
    }
    assert_eq!((writes, deletes), (200, 200));
    assert_eq!(end.events, [Event::Mark(DIFF)]);
}

/// A diff that has just been admitted.
fn admitted(table: &Table, config: SessionConfig) -> ServerEnd {
    let mut end = ServerEnd::new();
    end.session = server_session(config);
    end.message(ToServer::hello("", &Limits::default(), None));
    let at = table.position().unwrap();
    end.act(|session| session.handle_subscribed(at, Way::NoPosition, at));
    end.message(sync_req(DIFF));
    end.act(|session| session.handle_admitted(DIFF));
    assert_eq!(end.events, [Event::Snapshot(DIFF)]);
    end
}

#[test]
fn two_repairs_are_sent_without_an_acknowledgement() {
    let entries = (0..5_u8).map(|n| (vec![n].into(), "value".into()));
    let mut table = Table::open(entries.collect::<MemoryStore>(), Limits::default()).unwrap();
    table.ready(epoch());
    let mut end = admitted(&table, SessionConfig { repair_bytes: 1, ..SessionConfig::default() });
    end.act(|session| session.handle_snapshot(DIFF, table.tree().clone()));
    let writes = (0..5_u8).map(|n| Entry::new(&[n], b"")).collect();
    let first = Difference { writes, deletes: Vec::new() };
    end.act(|session| session.handle_step(DIFF, Step::Done(Found { first, ..Found::default() })));
    let mut read = |end: &mut ServerEnd| {
        let [Event::Read { found, from, max_bytes, .. }] = &end.events[..] else { panic!() };
        let values = table.read(found, *from, *max_bytes);
        end.act(|session| session.handle_values(DIFF, values)).sent.len()
    };
    assert_eq!([(); 3].map(|()| read(&mut end)), [1, 1, 0]);
    end.message(to_server("RepairAck"));
    assert!(matches!(end.sent[..], [ToClient::Repair { .. }]));
    assert_eq!(read(&mut end), 0);
}

#[test]
fn what_is_found_is_collected_part_by_part() {
    let entries = (0..10_u8).map(|n| (vec![n].into(), "value".into()));
    let mut table = Table::open(entries.collect::<MemoryStore>(), Limits::default()).unwrap();
    table.ready(epoch());
    let config = SessionConfig { part_keys: 3, ..SessionConfig::default() };
    let begin = |table: &Table| {
        let mut end = admitted(table, config);
        end.act(|session| session.handle_snapshot(DIFF, table.tree().clone()));
        // As if the follower were empty.
        let (tree, root) = (table.tree().clone(), Tree::new().root());
        let (_, step) = Walk::new(tree, Some(root), 0, true, 1 << 20, config.part_keys);
        end.act(|session| session.handle_step(DIFF, step));
        assert!(matches!(end.sent[..], [ToClient::SyncSeq { writes: 10, deletes: 0, .. }]));
        end
    };
    let mut end = begin(&table);
    let (mut keys, mut parts) = (Vec::new(), 0);
    let mut events = VecDeque::from(std::mem::take(&mut end.events));
    loop {
        let act: Box<dyn FnOnce(&mut server::Session)> = match events.pop_front().unwrap() {
            Event::Snapshot(_) => {
                parts += 1;
                if parts == 1 {
                    // A key is gone, another is new, both beside what was collected.
                    let gone = (0..10).find(|key| !keys.contains(key)).unwrap();
                    let new = Change::write(vec![77], "new");
                    append(&mut table, &mut end.log, &[Change::delete(vec![gone]), new]);
                }
                let tree = table.tree().clone();
                Box::new(|session| session.handle_snapshot(DIFF, tree))
            }
            Event::Collect { tree, mut rest, most, .. } => {
                assert_eq!(most, 3);
                let writes = collect(&tree, &mut rest, most);
                Box::new(|session| session.handle_collected(DIFF, writes, rest))
            }
            Event::Read { found, from, max_bytes, .. } => {
                let values = table.read(&found, from, max_bytes);
                Box::new(|session| session.handle_values(DIFF, values))
            }
            Event::Mark(_) => break,
            other => panic!("{other:?}"),
        };
        end.act(act);
        events.extend(end.events.drain(..));
        let repairs = end.sent.iter().filter_map(|sent| match sent {
            ToClient::Repair { writes: Changes(writes), .. } => Some(writes),
            _ => None,
        });
        let before = keys.len();
        keys.extend(repairs.flatten().map(|change| change.key()[0]));
        if keys.len() > before {
            end.message(to_server("RepairAck"));
            events.extend(end.events.drain(..));
        }
    }
    assert!(parts >= 3, "{parts}");
    assert!(keys.len() == 9 && !keys.contains(&77), "{keys:?}");
    end.log.mark(FollowerId(1), DIFF);
    let head = end.log.head();
    end.act(|session| session.handle_mark(DIFF, head, table.tree().clone()));
    assert!(matches!(end.sent[..], [ToClient::SyncDone { suppressed: 1, failed: 0, .. }]));

    // Whatever went wrong with it, another diff may do better.
    let mut end = begin(&table);
    end.act(|session| session.handle_walk_failed(DIFF));
    assert_eq!(end.sent, [ToClient::SyncAbort { diff: DIFF, reason: AbortReason::Walk }]);
    end.act(|session| session.handle_collected(DIFF, Vec::new(), Vec::new()));
    assert!(end.events.is_empty() && end.sent.is_empty());
}

/// A diff of 20 keys, of which each is a repair, whose walk is done.
fn found_all(table: &Table) -> ServerEnd {
    let mut end = admitted(table, SessionConfig { repair_bytes: 1, ..SessionConfig::default() });
    end.act(|session| session.handle_snapshot(DIFF, table.tree().clone()));
    let writes: Vec<_> = table.tree().iter().cloned().collect();
    let count = writes.len() as u64;
    let first = Difference { writes, deletes: Vec::new() };
    let found = Found { first, writes: count, rest: Vec::new() };
    end.act(|session| session.handle_step(DIFF, Step::Done(found)));
    end
}

fn twenty_keys() -> Table {
    let entries = (0..20_u8).map(|n| (vec![n].into(), "value".into()));
    let mut table = Table::open(entries.collect::<MemoryStore>(), Limits::default()).unwrap();
    table.ready(epoch());
    table
}

/// What is asked for is read.
fn read(end: &mut ServerEnd, table: &mut Table) {
    let [Event::Read { found, from, max_bytes, .. }] = &end.events[..] else { panic!() };
    let values = table.read(found, *from, *max_bytes);
    end.act(|session| session.handle_values(DIFF, values));
}

/// Two repairs are not acknowledged, and the third is read.
fn unacknowledged() -> ServerEnd {
    let mut table = twenty_keys();
    let mut end = found_all(&table);
    for _ in 0..3 {
        read(&mut end, &mut table);
    }
    assert_eq!(end.events, []);
    end
}

#[test]
fn a_diff_goes_on_for_as_long_as_something_happens() {
    let mut table = twenty_keys();
    let mut end = found_all(&table);
    for number in 1..15 {
        read(&mut end, &mut table);
        let next = std::mem::take(&mut end.events);
        let now = Duration::from_secs(20) * number;
        end.session.handle_message(ToServer::Pong {}, now);
        end.act(|session| session.handle_timeout(now));
        assert_eq!((&end.sent[..], end.session.state()), (&[][..], "Diff"), "{now:?}");
        end.message(to_server("RepairAck"));
        end.events = next;
    }
}

/// Each thing that it says counts by itself, however long the server takes for the rest.
#[test]
fn what_a_follower_says_in_a_diff_keeps_it_alive() {
    let table = twenty_keys();
    let wait = |end: &mut ServerEnd, seconds| {
        let now = Duration::from_secs(seconds);
        end.session.handle_message(ToServer::Pong {}, now);
        end.act(|session| session.handle_timeout(now));
        assert_eq!(end.session.state(), "Diff", "after {now:?}");
    };
    let mut end = admitted(&table, SessionConfig::default());
    end.act(|session| session.handle_snapshot(DIFF, table.tree().clone()));
    for round in 0..5 {
        end.act(|session| session.handle_step(DIFF, Step::Ask(query())));
        wait(&mut end, 40 * round);
        wait(&mut end, 40 * round + 20);
        end.message(to_server("SyncResponse"));
        wait(&mut end, 40 * round + 20);
        wait(&mut end, 40 * round + 40);
    }
    let mut table = table;
    let mut end = found_all(&table);
    for round in 0..5 {
        read(&mut end, &mut table);
        let next = std::mem::take(&mut end.events);
        wait(&mut end, 40 * round);
        wait(&mut end, 40 * round + 20);
        end.message(to_server("RepairAck"));
        wait(&mut end, 40 * round + 20);
        wait(&mut end, 40 * round + 40);
        end.events = next;
    }
}

#[test]
fn who_asks_and_does_not_read_is_not_read_from() {
    let mut end = server_stage("relay");
    for number in 1..1000 {
        assert!(number < 100, "there is no end to what waits");
        end.session.handle_message(sync_req(DiffId(number)), NOW);
        end.session.handle_busy(DiffId(number));
        assert_ne!(end.session.state(), "Closed", "{number}");
        if !end.session.wants_input() {
            break;
        }
    }
    end.act(|_| {});
    assert!(end.session.wants_input());
}

/// A turn of the server reads no more for it than for what is sent.
#[test]
fn what_is_not_what_the_tree_says_is_read_all_the_same() {
    let mut store: MemoryStore =
        (0..20_u8).map(|key| (vec![key].into(), bytes::Bytes::from("value"))).collect();
    let mut table = Table::open(store.clone(), Limits::default()).unwrap();
    let forged: Vec<_> = (0..20_u8).map(|key| Change::write(vec![key], vec![0; 1000])).collect();
    Store::apply(&mut store, &forged).unwrap();
    let writes = table.tree().iter().cloned().collect();
    let found = Difference { writes, deletes: Vec::new() };
    let values = table.read(&found, 0, 3000);
    assert_eq!((values.next, values.failed.len(), values.writes.len()), (3, 3, 0));
}

#[test]
fn what_cannot_be_read_and_was_updated_has_not_failed() {
    for updated in [false, true] {
        let mut table = twenty_keys();
        let mut end = found_all(&table);
        while let [Event::Read { found, from, max_bytes, .. }] = &end.events[..] {
            let mut values = table.read(found, *from, *max_bytes);
            let seven = values.writes.extract_if(.., |(_, key, _)| key[..] == [7]);
            let failed: Vec<_> = seven.map(|(hash, ..)| hash).collect();
            values.failed.extend(failed);
            if updated && !values.failed.is_empty() {
                // Behind the reading: what was updated before is not read.
                append(&mut table, &mut end.log, &[Change::write(vec![7], "live")]);
            }
            end.act(|session| session.handle_values(DIFF, values));
            let next = std::mem::take(&mut end.events);
            if matches!(end.sent[..], [.., ToClient::Repair { .. }]) {
                end.message(to_server("RepairAck"));
            }
            end.events.extend(next);
        }
        assert_eq!(end.events, [Event::Mark(DIFF)]);
        end.log.mark(FollowerId(1), DIFF);
        let (head, tree) = (end.log.head(), table.tree().clone());
        end.act(|session| session.handle_mark(DIFF, head, tree));
        let [ToClient::SyncDone { suppressed, failed, .. }] = end.sent[..] else { panic!() };
        assert_eq!((suppressed, failed), if updated { (1, 0) } else { (0, 1) });
    }
}

#[test]
fn more_unreadable_keys_than_are_remembered_end_a_diff() {
    for (remembered, ends) in [(3, false), (2, true)] {
        let table = server_table();
        let config = SessionConfig { updated_keys: remembered, ..SessionConfig::default() };
        let mut end = admitted(&table, config);
        end.act(|session| session.handle_snapshot(DIFF, table.tree().clone()));
        let first = Difference { writes: table.tree().iter().cloned().collect(), deletes: vec![] };
        let writes = first.writes.len() as u64;
        let found = Found { first, writes, rest: Vec::new() };
        end.act(|session| session.handle_step(DIFF, Step::Done(found)));
        let failed = (0..3_u8).map(|n| KeyHash::of(&[n])).collect();
        let values = Values {
            revision: Revision::ZERO,
            next: writes as usize,
            writes: vec![],
            deletes: vec![],
            failed,
        };
        end.act(|session| session.handle_values(DIFF, values));
        let aborted = ToClient::SyncAbort { diff: DIFF, reason: AbortReason::Walk };
        assert_eq!(end.sent.contains(&aborted), ends, "{:?}", end.sent);
    }
}

#[test]
fn more_updated_keys_than_are_remembered_end_a_diff() {
    let mut table = server_table();
    let mut end = admitted(&table, SessionConfig { updated_keys: 2, ..SessionConfig::default() });
    let mut write = |keys: &[&'static str]| {
        let changes: Vec<_> = keys.iter().map(|key| Change::write(*key, "3")).collect();
        append(&mut table, &mut end.log, &changes);
        end.act(|_| {}).sent.clone()
    };
    assert!(matches!(write(&["a", "b"])[..], [ToClient::Live { .. }]));
    // The same key again is not another.
    assert!(matches!(write(&["a"])[..], [ToClient::Live { .. }]));
    let aborted = ToClient::SyncAbort { diff: DIFF, reason: AbortReason::Updated };
    assert_eq!(write(&["c"])[1..], [aborted]);
}

/// How large repairs are, in KiB, if the follower takes so many microseconds for each, and a change of so many bytes has to
/// go ahead of it.
fn repair_sizes(repairs: impl IntoIterator<Item = (u32, usize)>) -> Vec<usize> {
    let entries = (0..3000_u16).map(|n| (n.to_be_bytes().to_vec().into(), vec![0; 1000].into()));
    let mut table = Table::open(entries.collect::<MemoryStore>(), Limits::default()).unwrap();
    table.ready(epoch());
    let mut end = server_stage("walk");
    let (_, step) =
        Walk::new(table.tree().clone(), Some(Tree::new().root()), 0, false, 1 << 20, 10_000);
    end.act(|session| session.handle_step(DIFF, step));
    let mut sizes = Vec::new();
    for (micros, live_bytes) in repairs {
        let [Event::Read { found, from, max_bytes, .. }] = &end.events[..] else {
            panic!("{:?}", end.events)
        };
        sizes.push(max_bytes >> 10);
        table.write(&[Change::write("live", vec![0; live_bytes])]).unwrap();
        let values = table.read(found, *from, *max_bytes);
        let (chunk, chain) = table.next_chunk().unwrap();
        end.log.push(chunk, chain, NOW);
        // The next reading is asked for as this one goes out, so an answer is for the one behind it.
        end.act(|session| session.handle_values(DIFF, values));
        let next = std::mem::take(&mut end.events);
        end.message(ToServer::RepairAck { diff: DIFF, failed: 0, micros });
        end.events = next;
    }
    sizes
}

#[test]
fn repairs_are_as_small_as_the_follower_is_slow() {
    let micros = [100, 100, 100, 100, 200, 400, 301, u32::MAX, 400, 400, 0];
    let sizes = repair_sizes(micros.map(|micros| (micros, 0)));
    assert_eq!(sizes, [8, 8, 16, 32, 64, 64, 64, 32, 16, 8, 4]);
}

#[test]
fn repairs_are_small_beside_a_busy_stream() {
    let live_bytes = [0, 0, 0, 20_000, 0, 10_000, 20_000, 20_000, 0];
    let sizes = repair_sizes(live_bytes.map(|bytes| (0, bytes)));
    assert_eq!(sizes, [8, 8, 16, 32, 8, 8, 16, 8, 8]);
}

#[test]
fn the_client_ignores_verify_of_a_mark_that_it_did_not_take() {
    let verify = |revision| ToClient::Verify { revision, root: server_tree().root() };
    for stage in ["catching up", "relay", "preparing", "waiting", "diff", "announced", "verified"] {
        let mut end = client_stage(stage);
        let state = end.session.state();
        assert_eq!(end.message(verify(START)).outputs, [], "{stage}");
        assert_eq!(end.session.state(), state);
    }
    let mut end = client_stage("done");
    assert_eq!(end.message(verify(START.next())).outputs, []);
}

#[test]
fn a_mark_is_taken_where_nothing_is_missing() {
    let mark = ToClient::Mark { revision: START };
    for stage in ["relay", "preparing", "waiting", "diff", "announced", "done"] {
        assert_eq!(client_stage(stage).message(mark.clone()).outputs, [], "{stage}");
    }
    let mut end = client_stage("verified");
    assert_eq!(end.message(mark.clone()).outputs, [Output::Checkpoint(1)]);
    let root = server_tree().root();
    // Looked through once at a time; and no root counts but that of this mark.
    assert_eq!(end.message(mark.clone()).outputs, []);
    end.act(|session| session.handle_root(RootOf::Checkpoint(2), follower_tree().root()));
    end.act(|session| session.handle_root(RootOf::Mark(START), follower_tree().root()));
    end.act(|session| session.handle_root(RootOf::Checkpoint(1), root));
    end.message(ToClient::Verify { revision: START, root: follower_tree().root() });
    let unequal = Output::Verified { revision: START, root, server_root: follower_tree().root() };
    assert!(end.outputs.contains(&unequal), "{:?}", end.outputs);
    assert_eq!(end.session.position(), None);
    let text = client_closes("verified", ToClient::Mark { revision: START.next() });
    assert_eq!(text, "Mark names revision 9, the stream stands at 8");
}

#[test]
fn the_client_closes_on_the_number_of_another_diff() {
    let other = NEXT_DIFF;
    client_closes("waiting", ToClient::SyncStart { diff: other });
    client_closes("diff", ToClient::SyncRequest { diff: other, query: query() });
    client_closes("diff", ToClient::SyncSeq { diff: other, writes: 1, deletes: 1 });
    for stage in ["waiting", "diff", "answering", "announced"] {
        client_closes(stage, ToClient::SyncAbort { diff: other, reason: AbortReason::Walk });
    }
    client_closes(
        "announced",
        ToClient::Repair {
            diff: other,
            writes: Changes::default(),
            prefix_bytes: 1,
            deletes: Raw::default(),
        },
    );
}

/// What comes live while a diff waits for its place would come once more.
#[test]
fn what_is_walked_is_the_table_where_the_diff_begins() {
    let mut end = client_stage("waiting");
    end.tree = server_tree();
    end.message(ToClient::SyncStart { diff: DIFF });
    end.message(ToClient::SyncRequest { diff: DIFF, query: query() });
    let [Output::Answer { tree, .. }] = &end.outputs[..] else { panic!("{:?}", end.outputs) };
    assert_eq!(*tree, server_tree());
    // Nor is a jump before it the end of it.
    for stage in ["preparing", "waiting"] {
        let mut end = client_stage(stage);
        end.message(to_client("FellBehind", &end.clone()));
        assert_eq!(end.outputs, [Output::FellBehind(START.plus(5))], "{stage}");
        assert_eq!(end.session.state(), "PreDiff");
    }
}

#[test]
fn the_client_closes_on_a_malformed_query() {
    let asked = |query| ToClient::SyncRequest { diff: DIFF, query };
    let text = client_closes("diff", asked(Query { depth: 33, ..query() }));
    assert_eq!(text, "malformed query: the depth is above 32");
    client_closes("diff", asked(Query { levels: 0, ..query() }));
    client_closes("diff", asked(Query { levels: 4, ..query() }));
    client_closes("diff", asked(Query { depth: 1, ..query() }));
    let node = Widths { node: 0, ..Widths::SHORT };
    client_closes("diff", asked(Query { widths: node, ..query() }));
    let nodes = vec![0x10; (1 << 20) + 1].into();
    let text = client_closes("diff", asked(Query { depth: 1, nodes, ..query() }));
    assert_eq!(text, "malformed query: the paths are above 1 MiB");
}

#[test]
fn a_diff_begins_when_the_one_before_is_verified() {
    for (stage, _) in client_stages() {
        let mut end = client_stage(stage);
        let mut diff = None;
        end.act(|session| diff = Some(session.handle_diff(follower_tree(), true, u64::MAX)));
        let expected = match stage {
            "hello" | "closed" => Err(NotNow::Disconnected),
            "relay" => Ok(DIFF),
            "verified" => Ok(NEXT_DIFF),
            "catching up" | "resumed" => Err(NotNow::CatchingUp),
            _ => Err(NotNow::AlreadyDiffing),
        };
        assert_eq!(diff, Some(expected), "{stage}");
    }
}

#[test]
fn the_client_refuses_other_versions_trees_and_limits() {
    let limits = Limits::default();
    let closed = |message: ToClient| {
        let mut end = client_stage("hello");
        end.message(message);
        assert_eq!(end.session.state(), "Closed");
        let (reason, text) = end.closed().unwrap();
        let text = text.to_owned();
        let farewell = Output::Send(ToServer::Farewell { reason, text: text.clone() });
        assert_eq!(end.outputs[0], farewell);
        (reason, text)
    };
    let (reason, text) = closed(welcome_with(7, 1, limits));
    assert_eq!(reason, Reason::Version);
    assert_eq!(text, format!("peer speaks version 7, this end speaks version {VERSION}"));
    let (reason, text) = closed(welcome_with(VERSION, 9, limits));
    assert_eq!(reason, Reason::Tree);
    assert_eq!(text, "peer has tree version 9, this end 1");
    for more in [
        Limits { frame_bytes: limits.frame_bytes + 1, ..limits },
        Limits { key_bytes: limits.key_bytes + 1, ..limits },
        Limits { value_bytes: limits.value_bytes + 1, ..limits },
    ] {
        let (reason, text) = closed(welcome_with(VERSION, 1, more));
        assert_eq!(reason, Reason::Limits);
        let theirs = (more.frame_bytes as u64, more.key_bytes as u64, more.value_bytes as u64);
        assert_eq!(text, limits_text(theirs));
    }
    let less = Limits { frame_bytes: 100, key_bytes: 10, value_bytes: 10, ..limits };
    let mut end = client_stage("hello");
    assert_eq!(end.message(welcome_with(VERSION, 1, less)).session.state(), "Relay");
}

// Heartbeats.

#[test]
fn the_server_asks_then_gives_up() {
    let HeartbeatConfig { ping_after, dead_after } = HeartbeatConfig::default();
    let moment = Duration::from_millis(1);
    for stage in ["subscribing", "shortening", "relay", "queued", "asked", "repaired", "done"] {
        let mut end = server_stage(stage);
        assert_eq!(end.session.poll_timeout(), Some(ping_after));
        end.act(|session| session.handle_timeout(ping_after - moment));
        assert_eq!((&end.sent[..], &end.events[..]), (&[][..], &[][..]), "{stage}");
        end.act(|session| session.handle_timeout(ping_after));
        assert_eq!(end.sent, [ToClient::Ping {}], "{stage}");
        assert_eq!(end.session.poll_timeout(), Some(dead_after));
        end.act(|session| session.handle_timeout(dead_after - moment));
        assert_eq!(end.sent, [], "one at a time, {stage}");
        end.act(|session| session.handle_timeout(dead_after));
        assert_eq!(end.closed().unwrap().0, Reason::Silent, "{stage}");
        let said = match &end.sent[..] {
            [ToClient::Refuse { reason, .. }] if ["subscribing", "shortening"].contains(&stage) => {
                reason
            }
            [ToClient::Farewell { reason, .. }] => reason,
            other => panic!("{stage}: {other:?}"),
        };
        assert_eq!(*said, Reason::Silent);
        assert_eq!(end.session.poll_timeout(), None);
        end.act(|session| session.handle_timeout(2 * dead_after));
        assert_eq!((end.sent, end.events), (vec![], vec![]), "{stage}");
    }
}

#[test]
fn a_diff_in_which_nothing_happens_gives_its_place_back() {
    let stall = SessionConfig::default().diff_stall;
    let step = Duration::from_secs(4);
    let stages = [("asked", server_stage("asked")), ("unacknowledged", unacknowledged())];
    for (stage, mut end) in stages {
        let mut now = step;
        // The follower is there, and answers everything but what the diff waits for.
        while now < stall {
            end.act(|session| {
                session.handle_message(ToServer::Pong {}, now);
                session.handle_timeout(now);
            });
            now += step;
            assert_eq!(end.session.state(), "Diff", "{stage} after {now:?}");
        }
        end.act(|session| {
            session.handle_message(ToServer::Pong {}, now + stall);
            session.handle_timeout(now + stall);
        });
        let ended = |event: &Event| {
            matches!(event, Event::EndDiff { aborted: Some(AbortReason::Stalled), .. })
        };
        assert!(end.events.iter().any(ended), "{stage}: {:?}", end.events);
        assert_eq!(end.session.state(), "Relay", "{stage}");
    }
    // One that waits for a place has none to give back, and what this end is not done with is not the follower's fault.
    for stage in ["queued", "snapshot", "walk", "answered", "reading", "repaired"] {
        let mut end = server_stage(stage);
        for now in [2 * stall, 4 * stall] {
            end.act(|session| {
                session.handle_message(ToServer::Pong {}, now);
                session.handle_timeout(now);
            });
        }
        assert_eq!(end.session.state(), "Diff", "{stage}");
    }
}

/// What is long on its way is no reason to begin anew: it would take as long again.
#[test]
fn parts_of_what_a_diff_waits_for_keep_its_place() {
    let stall = SessionConfig::default().diff_stall;
    let hears: fn(&mut server::Session, Duration) = server::Session::handle_part;
    let takes: fn(&mut server::Session, Duration) = server::Session::handle_room;
    for (mut end, happens, goes_on) in [
        (server_stage("asked"), hears, true),
        (unacknowledged(), takes, true),
        // An acknowledgement is short.
        (unacknowledged(), hears, false),
    ] {
        let progress = end.session.progress();
        for now in (1..10).map(|number| number * stall / 2) {
            happens(&mut end.session, now);
            end.act(|session| session.handle_timeout(now));
            let asks = |sent: &ToClient| matches!(sent, ToClient::Ping {});
            assert!(!end.sent.iter().any(asks), "it is known to be there");
        }
        assert_eq!(end.session.state(), if goes_on { "Diff" } else { "Relay" });
        assert_eq!(end.session.progress() > progress, goes_on);
    }
    for stage in ["queued", "relay"] {
        assert_eq!(server_stage(stage).session.progress(), None, "{stage}");
    }
}

/// A `Ping` of it stands behind what it sends.
#[test]
fn who_sends_a_long_frame_is_told_that_it_is_heard() {
    let HeartbeatConfig { ping_after, .. } = HeartbeatConfig::default();
    let parts = |stage: &str| {
        let mut end = server_stage(stage);
        let mut pongs = 0;
        for now in (1..=12).map(|quarter| quarter * ping_after / 4) {
            let sent = &end.act(|session| session.handle_part(now)).sent;
            pongs += sent.iter().filter(|sent| **sent == ToClient::Pong {}).count();
        }
        pongs
    };
    assert_eq!(["asked", "relay", "hello", "subscribing"].map(parts), [3, 3, 0, 0]);
}

#[test]
fn pings_that_were_not_sent_yet_are_one() {
    let HeartbeatConfig { ping_after, .. } = HeartbeatConfig::default();
    let mut end = server_stage("relay");
    for now in (1..100).map(|number| number * 2 * ping_after) {
        end.session.handle_timeout(now - ping_after);
        end.session.handle_room(now);
    }
    assert!(end.session.wants_input());
    assert_eq!(end.act(|_| {}).sent, [ToClient::Ping {}]);
}

#[test]
fn the_client_asks_then_gives_up() {
    let HeartbeatConfig { ping_after, dead_after } = HeartbeatConfig::default();
    let moment = Duration::from_millis(1);
    for stage in ["catching up", "relay", "preparing", "waiting", "answering", "announced", "done"]
    {
        let mut end = client_stage(stage);
        assert_eq!(end.session.poll_timeout(), Some(ping_after));
        end.act(|session| session.handle_timeout(ping_after - moment));
        assert_eq!(end.outputs, [], "{stage}");
        end.act(|session| session.handle_timeout(ping_after));
        assert_eq!(end.outputs, [Output::Send(ToServer::Ping {})], "{stage}");
        assert_eq!(end.session.poll_timeout(), Some(dead_after));
        end.act(|session| session.handle_timeout(dead_after - moment));
        assert_eq!(end.outputs, [], "one at a time, {stage}");
        end.act(|session| session.handle_timeout(dead_after));
        assert_eq!(end.closed().unwrap().0, Reason::Silent, "{stage}");
        assert!(matches!(end.outputs[0], Output::Send(ToServer::Farewell { .. })));
        assert_eq!(end.session.poll_timeout(), None);
        end.act(|session| session.handle_timeout(2 * dead_after));
        assert_eq!(end.outputs, [], "{stage}");
    }
}

#[test]
fn nobody_is_asked_before_the_handshake() {
    let HeartbeatConfig { ping_after, dead_after } = HeartbeatConfig::default();
    let mut end = ServerEnd::new();
    end.act(|session| session.handle_timeout(ping_after));
    assert_eq!(end.sent, []);
    end.act(|session| session.handle_timeout(dead_after));
    assert!(matches!(end.sent[..], [ToClient::Refuse { reason: Reason::Silent, .. }]));
    let mut end = ClientEnd::new();
    end.act(|session| session.handle_timeout(ping_after));
    assert_eq!(end.outputs, []);
    end.act(|session| session.handle_timeout(dead_after));
    assert_eq!(end.closed().unwrap().0, Reason::Silent);
}

#[test]
fn whatever_is_heard_counts() {
    let HeartbeatConfig { ping_after, dead_after } = HeartbeatConfig::default();
    let late = dead_after - Duration::from_millis(1);
    for message in ["Ping", "Pong", "SyncReq"] {
        let mut end = server_stage("relay");
        end.act(|session| session.handle_timeout(ping_after));
        end.act(|session| session.handle_message(to_server(message), late));
        assert_eq!(end.session.poll_timeout(), Some(late + ping_after), "{message}");
        end.act(|session| session.handle_timeout(dead_after));
        assert_eq!(end.closed(), None);
        end.act(|session| session.handle_timeout(late + ping_after));
        assert_eq!(end.sent, [ToClient::Ping {}], "it asks again");
    }
    for message in ["Ping", "Pong", "Live", "FellBehind"] {
        let mut end = client_stage("relay");
        let message = to_client(message, &end);
        end.act(|session| session.handle_timeout(ping_after));
        end.act(|session| session.handle_message(message, late));
        assert_eq!(end.session.poll_timeout(), Some(late + ping_after));
        end.act(|session| session.handle_timeout(late + ping_after));
        assert_eq!(end.outputs, [Output::Send(ToServer::Ping {})], "it asks again");
    }
    // A part of a frame, too.
    let mut end = server_stage("relay");
    end.act(|session| session.handle_part(late));
    assert_eq!(end.session.poll_timeout(), Some(late + ping_after));
    let mut end = client_stage("hello");
    end.act(|session| session.handle_heard(late));
    assert_eq!(end.session.poll_timeout(), Some(late + ping_after));
}

#[test]
fn a_ping_is_answered() {
    for stage in ["subscribing", "shortening", "relay", "asked"] {
        let mut end = server_stage(stage);
        // However many were asked before there was room.
        end.act(|session| (0..40).for_each(|_| session.handle_message(ToServer::Ping {}, NOW)));
        assert_eq!(end.sent, [ToClient::Pong {}], "{stage}");
    }
    for stage in ["hello", "catching up", "relay", "diff", "announced"] {
        let mut end = client_stage(stage);
        end.message(ToClient::Ping {});
        assert_eq!(end.outputs, [Output::Send(ToServer::Pong {})], "{stage}");
    }
}

/// A test of the above that fails if a rule is broken.
#[test]
fn notices_what_is_broken() {
    use Mutation as M;
    let noticed: &[(Mutation, fn())] = &[
        (M::UpdatedUnbounded, more_updated_keys_than_are_remembered_end_a_diff),
        (M::NoWindow, two_repairs_are_sent_without_an_acknowledgement),
        (M::AnswerOfAnyDiff, the_server_obeys_its_table),
        (M::AckOfAnyDiff, the_server_closes_on_an_acknowledgement_of_another_diff),
        (M::HeldRepairsSent, the_server_holds_a_repair_that_deletes_too_much),
        (M::DiffNumberTwice, the_server_closes_on_a_diff_number_used_before),
        (M::DiffWhileComparing, the_server_closes_on_a_diff_before_the_last_is_compared),
        (M::StaleRoot, a_diff_that_waits_outlives_a_jump),
        (M::ResumeAtHead, small_frames_that_were_missed_are_put_together),
        (M::CaughtUpEarly, small_frames_that_were_missed_are_put_together),
        (M::CatchUpKeepsPosition, a_shortened_catch_up_has_a_position_at_its_end),
        (M::NewcomerHasPosition, a_diff_makes_the_position_whole),
        (M::ResumedElsewhere, who_is_resumed_is_where_it_said),
        (M::ChainUnchecked, the_client_closes_on_another_chain),
        (M::PositionBeforeRepairs, a_diff_makes_the_position_whole),
        (M::FailedKeepsPosition, a_repair_that_failed_leaves_no_position),
        (M::RefusedKeepsPosition, a_refused_live_change_leaves_no_position),
        (M::RefusalForgotten, a_refused_live_change_in_the_middle_of_a_diff_leaves_no_position),
        (M::UnequalKeepsPosition, unequal_roots_leave_no_position),
        (M::HeldRepairsTaken, the_client_closes_on_a_repair_that_should_have_been_held),
        (M::MarkWhileMissing, a_mark_is_taken_where_nothing_is_missing),
    ];
    for (mutation, test) in noticed {
        BROKEN.set(Some(*mutation));
        let result = std::panic::catch_unwind(test);
        BROKEN.set(None);
        assert!(result.is_err(), "nobody notices {mutation:?}");
    }
}
