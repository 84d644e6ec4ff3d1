//! A server's session whose follower says anything, in any order.

use std::collections::VecDeque;
use std::time::Duration;

use arbitrary::{Result, Unstructured};
use tablecast_protocol::diff::{self, Step, Walk};
use tablecast_protocol::server::{Event, Session, SessionConfig, Transmit};
use tablecast_protocol::wire::{self, Changes, HEADER_BYTES};
use tablecast_protocol::{
    Chain, DecodeError, DiffId, Epoch, FollowerId, Limits, Log, MemoryStore, Missed, ProtocolError,
    Reason, Revision, Shortened, Table, ToClient, ToServer, Tree, Way,
};

use super::message::{Fitting, changes, key, to_server};
use super::ran_out;
use crate::Coverage;

/// What a connection may cost whatever is said on it: the handshake and the end.
const ONCE: usize = 3000;

/// Bytes that are sent for a byte that is received, changes and repairs aside.
const FACTOR: usize = 40;

/// Bytes around one key and its value: a frame of its own.
const AROUND: usize = 64;

/// Most requests of a session that wait at a time.
const REQUESTS: usize = 24;

const FOLLOWER: FollowerId = FollowerId(1);

/// A server's session, fed with any messages that can be said, in any order, beside writes and time. Never a
/// panic. What it sends is at most `FACTOR` times what it was sent, each change once, and the whole table for
/// every diff that was begun; a repair is as large as it may be and a key more; it asks for at most `REQUESTS` things at a time,
/// and two whenever it falls off the log, which is as many writes of a server that answers in between, or is told that others wait; and behind its
/// last word it says nothing. Answers which messages came in which states.
pub fn server(input: &[u8]) -> Coverage {
    let mut u = Unstructured::new(input);
    let mut coverage = Coverage::server();
    ran_out(Server::new(&mut u).and_then(|mut server| server.run(&mut u, &mut coverage)));
    coverage
}

struct Server {
    session: Session,
    table: Table,
    log: Log,
    now: Duration,
    /// The largest query.
    query_bytes: usize,
    /// Of how many keys that a walk found the entries are held at once.
    part_keys: usize,
    repair_bytes: usize,
    requests: VecDeque<Event>,
    walk: Option<(DiffId, Walk)>,
    /// What the follower has, if it is honest for once.
    follower: Tree,
    fitting: Fitting,
    said_hello: bool,
    received: usize,
    sent: usize,
    /// What may be sent without being asked for.
    unasked: usize,
    /// All that was ever in the table.
    written: usize,
    /// Diffs that were begun.
    diffs: usize,
    falls: usize,
    /// The last word was sent.
    ended: bool,
}

impl Server {
    fn new(u: &mut Unstructured<'_>) -> Result<Self> {
        let repair_bytes = u.int_in_range(8..=200)?;
        let config = SessionConfig {
            repair_bytes,
            part_keys: repair_bytes / 8,
            updated_keys: u.int_in_range(1..=40)?,
            shorten_changes: *u.choose(&[0, 1000])?,
            missed_bytes: u.int_in_range(8..=400)?,
            ..SessionConfig::default()
        };
        let mut table = Table::open(MemoryStore::new(), Limits::default()).unwrap();
        let mut follower = Tree::new();
        for _ in 0..u.int_in_range(0..=40_u8)? {
            follower.insert(&key(u)?, b"another");
        }
        table.ready(Epoch::from_bytes([1; 16]));
        let log_bytes = *u.choose(&[400, 4000, 1 << 20])?;
        let fitting =
            Fitting { root: follower.root(), len: follower.len() as u64, ..Fitting::default() };
        let mut server = Self {
            session: Session::new(config, FOLLOWER, Duration::ZERO),
            table,
            log: Log::new(log_bytes, Revision::ZERO, Chain::START),
            now: Duration::ZERO,
            query_bytes: *u.choose(&[4, 60, 1 << 20])?,
            part_keys: config.part_keys,
            repair_bytes,
            requests: VecDeque::new(),
            walk: None,
            follower,
            fitting,
            said_hello: false,
            received: 0,
            sent: 0,
            unasked: 0,
            written: 0,
            diffs: 0,
            falls: 0,
            ended: false,
        };
        for _ in 0..u.int_in_range(0..=12_u8)? {
            server.write(u)?;
            if u.ratio(1, 4)? {
                server.fitting.position = server.table.position().unwrap();
            }
        }
        Ok(server)
    }

    fn run(&mut self, u: &mut Unstructured<'_>, coverage: &mut Coverage) -> Result<()> {
        while !u.is_empty() {
            match u.int_in_range(0..=16_u8)? {
                0..8 => self.hear(u, coverage)?,
                8..10 => drop(self.transmit()),
                10 => {
                    if let Some(request) = self.next_request(u)? {
                        self.serve(u, request)?;
                    }
                }
                16 => self.happen(u)?,
                11..13 => self.settle(u)?,
                13 => self.write(u)?,
                14 => {
                    self.unasked += AROUND;
                    match self.log.checkpoint() {
                        Some(newest) if newest.root.is_none() => {
                            self.log.set_root(newest.number, self.table.tree().root());
                        }
                        _ => drop(self.log.set_checkpoint()),
                    }
                }
                _ => {
                    self.now += Duration::from_millis(u.arbitrary::<u16>()?.into());
                    self.unasked += AROUND;
                    self.session.handle_timeout(self.now);
                }
            }
            self.drain();
        }
        self.settle(u)
    }

    /// The Server answers in order; what is computed elsewhere is there at any time.
    fn next_request(&mut self, u: &mut Unstructured<'_>) -> Result<Option<Event>> {
        let Some(last) = self.requests.len().checked_sub(1) else { return Ok(None) };
        let at = u.int_in_range(0..=last)?;
        let computed = |event: &Event| {
            matches!(event, Event::Root(..) | Event::Collect { .. } | Event::Shorten(..))
        };
        let at = if self.requests.get(at).is_some_and(computed) { at } else { 0 };
        Ok(self.requests.remove(at))
    }

    /// What comes seldom.
    fn happen(&mut self, u: &mut Unstructured<'_>) -> Result<()> {
        match u.int_in_range(0..=7_u8)? {
            0 => self.session.handle_stop(),
            1 => self.session.handle_close(Reason::Failed, ""),
            2 => {
                let error = DecodeError::Malformed { bytes: 1, why: "no message".to_owned() };
                self.session.handle_malformed(&error);
            }
            3..5 => self.session.handle_walk_failed(self.fitting.diff),
            5 => {
                // Said to one that waits it is an answer, and what was asked is none the less here.
                self.falls += 1;
                self.session.handle_busy(self.fitting.diff);
            }
            6 => self.session.handle_room(self.now),
            _ => self.session.handle_part(self.now),
        }
        Ok(())
    }

    /// Something is said, if it is read.
    fn hear(&mut self, u: &mut Unstructured<'_>, coverage: &mut Coverage) -> Result<()> {
        if !self.session.wants_input() {
            return Ok(());
        }
        let message = match std::mem::replace(&mut self.said_hello, true) {
            false if u.ratio(7, 8)? => {
                let position = Some(self.fitting.position).filter(|_| u.arbitrary() == Ok(true));
                ToServer::hello("", &Limits::default(), position)
            }
            _ => to_server(u, &self.fitting)?,
        };
        if let ToServer::SyncReq { diff, .. } = &message {
            self.fitting.diff = *diff;
        }
        coverage.count(self.session.state(), message.tag());
        self.received += wire::encode(&message).len();
        self.session.handle_message(message, self.now);
        Ok(())
    }

    fn drain(&mut self) {
        while let Some(event) = self.session.poll_event() {
            match event {
                Event::Verified { .. } => {}
                Event::FellBehind(_) => self.falls += 1,
                Event::Close(_) => {}
                request => self.requests.push_back(request),
            }
        }
        assert!(self.requests.len() <= REQUESTS + 2 * self.falls);
        let allowed =
            ONCE + FACTOR * self.received + self.unasked + (1 + self.diffs) * self.written;
        assert!(self.sent <= allowed, "{} bytes are sent for {}", self.sent, self.received);
    }

    /// Everything that can be done, until the follower says something.
    fn settle(&mut self, u: &mut Unstructured<'_>) -> Result<()> {
        loop {
            if let Some(request) = self.next_request(u)? {
                self.serve(u, request)?;
            } else if !self.transmit() {
                return Ok(());
            }
            self.drain();
        }
    }

    fn transmit(&mut self) -> bool {
        let Some(transmit) = self.session.poll_transmit(&self.log) else {
            self.ended |= self.session.state() == "Closed";
            return false;
        };
        assert!(!self.ended, "something is sent behind the last word");
        let frame = match transmit {
            Transmit::Live(frame) => frame,
            Transmit::Joined(joined) => joined.frame(),
            Transmit::Part(part) => wire::encode(&part.message(&Limits::default())),
            Transmit::Message(message) => {
                self.listen(&message);
                wire::encode(&message)
            }
        };
        self.sent += frame.len();
        let payload = &frame[HEADER_BYTES..];
        let message = wire::decode::<ToClient>(payload, &Limits::default()).unwrap();
        let most = match message {
            ToClient::Repair { .. } => self.repair_bytes + 2 * AROUND,
            _ => Limits::default().frame_bytes,
        };
        assert!(payload.len() <= most, "{} bytes in a frame of {most}", payload.len());
        true
    }

    /// What a follower that listens learns.
    fn listen(&mut self, message: &ToClient) {
        match message {
            ToClient::SyncStart { .. } => self.diffs += 1,
            ToClient::SyncRequest { query, .. } => {
                self.fitting.answer = diff::answer(&self.follower, query, 1000).unwrap();
            }
            ToClient::SyncSeq { deletes, .. } => {
                assert!(*deletes as usize <= self.received, "{deletes} deletes are remembered");
            }
            ToClient::FellBehind { jumps, .. } => self.fitting.jumps = *jumps,
            ToClient::Verify { revision, .. } => self.fitting.position.revision = *revision,
            _ => {}
        }
    }

    fn write(&mut self, u: &mut Unstructured<'_>) -> Result<()> {
        let Changes(batch) = changes(u)?;
        self.table.write(&batch).unwrap();
        let bytes = |change: &tablecast_protocol::Change| {
            AROUND + change.key().len() + change.value().map_or(0, |value| value.len())
        };
        self.written += batch.iter().map(bytes).sum::<usize>();
        self.seal();
        Ok(())
    }

    fn seal(&mut self) {
        self.table.seal();
        while let Some((chunk, chain)) = self.table.next_chunk() {
            self.log.push(chunk, chain, self.now);
        }
    }

    fn serve(&mut self, u: &mut Unstructured<'_>, request: Event) -> Result<()> {
        match request {
            Event::Subscribe { position, .. } => {
                let head = self.table.position().unwrap();
                let way = self.log.way(head.epoch, position.as_ref());
                let at = position.filter(|_| way == Way::Resumed).unwrap_or(head);
                self.session.handle_subscribed(at, way, head);
            }
            Event::Shorten(behind, head) => {
                let keys = |from, chunks: usize| self.log.keys_from(from, chunks.min(2));
                let missed = Missed::collect(behind, head, keys);
                self.session.handle_shortened(missed.as_ref().map(Shortened::of));
            }
            Event::Admit(diff) if u.ratio(1, 16)? => self.session.handle_busy(diff),
            Event::Admit(diff) => self.session.handle_admitted(diff),
            Event::Snapshot(diff) => {
                self.session.handle_snapshot(diff, self.table.tree().clone());
            }
            Event::Walk { diff, tree, root, len, full } => {
                let (bytes, keys) = (self.query_bytes, self.part_keys);
                let (walk, step) = Walk::new(tree, root, len, full, bytes, keys);
                self.walk = Some((diff, walk));
                self.session.handle_step(diff, step);
            }
            Event::Answer(diff, answer) => {
                if let Some((of, walk)) = &mut self.walk
                    && *of == diff
                {
                    let step = walk.handle_answer(&answer);
                    self.step(diff, step);
                }
            }
            Event::Read { diff, found, from, max_bytes } => {
                let mut values = self.table.read(&found, from, max_bytes);
                self.seal();
                if u.ratio(1, 16)? {
                    // A value is not what the tree says.
                    let unread = values.writes.pop().map(|(hash, ..)| hash);
                    values.failed.extend(unread);
                }
                self.session.handle_values(diff, values);
            }
            Event::Mark(diff) => {
                self.log.mark(FOLLOWER, diff);
                self.session.handle_mark(diff, self.log.head(), self.table.tree().clone());
            }
            Event::EndDiff { diff, .. } => {
                self.log.unmark(FOLLOWER, diff);
                self.walk.take_if(|(of, _)| *of == diff);
            }
            Event::Collect { diff, tree, mut rest, most } => {
                let writes = diff::collect(&tree, &mut rest, most);
                self.session.handle_collected(diff, writes, rest);
            }
            Event::Root(revision, tree) => self.session.handle_root(revision, tree.root()),
            Event::Verified { .. } | Event::FellBehind(_) | Event::Close(_) => {}
        }
        Ok(())
    }

    fn step(&mut self, diff: DiffId, step: std::result::Result<Step, ProtocolError>) {
        match step {
            Ok(step) => self.session.handle_step(diff, step),
            Err(error) => self.session.handle_bad_answer(diff, &error),
        }
    }
}
