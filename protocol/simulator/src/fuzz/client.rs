//! A follower's session whose server says anything, in any order.

use std::collections::VecDeque;
use std::time::Duration;

use arbitrary::{Result, Unstructured};
use tablecast_protocol::client::{Output, RootOf, Session};
use tablecast_protocol::diff::{self, Query};
use tablecast_protocol::{
    Change, DecodeError, DiffId, HeartbeatConfig, Limits, MemoryStore, Reason, Replica, ToClient,
    ToServer, Tree, wire,
};

use super::message::{Fitting, key, to_client};
use super::ran_out;
use crate::Coverage;

/// What a connection may cost whatever is said on it: the handshake and the end.
const ONCE: usize = 3000;

/// Bytes that are sent for a byte that is received, answers aside.
const FACTOR: usize = 2;

/// Most bytes that one node of a tree of this size takes in an answer, which may be above its limit by that.
const NODE: usize = 16 << 10;

/// What a diff that this end asks for, or a look at the clock, may cost.
const UNASKED: usize = 80;

/// Most outputs for one message.
const OUTPUTS: usize = 4;

/// A follower's session, fed with any messages that can be said, in any order, beside diffs and time. Never a
/// panic. What it sends is at most `FACTOR` times what it was sent, and one answer of the size that the
/// limits allow for each query; a message has `OUTPUTS` effects at the most; a diff deletes no more keys
/// than the follower had, or allows; store and tree agree in the end; and behind its last word it says and does nothing.
/// Answers which messages came in which states.
pub fn client(input: &[u8]) -> Coverage {
    let mut u = Unstructured::new(input);
    let mut coverage = Coverage::client();
    ran_out(Client::new(&mut u).and_then(|mut client| client.run(&mut u, &mut coverage)));
    coverage
}

enum Work {
    Root(RootOf, Tree),
    Answer(DiffId, Tree, Query, usize),
}

struct Client {
    session: Session,
    replica: Replica,
    store: MemoryStore,
    now: Duration,
    work: VecDeque<Work>,
    fitting: Fitting,
    received: usize,
    sent: usize,
    /// What may be sent beside.
    allowed: usize,
    /// Keys that the diff at hand may delete still.
    deletes: u64,
    max_deletes: u64,
    /// How many of the next repairs the store refuses.
    refuses: u32,
    /// The connection is closed.
    ended: bool,
}

impl Client {
    fn new(u: &mut Unstructured<'_>) -> Result<Self> {
        let store = MemoryStore::new();
        let mut replica = Replica::open(store.clone()).unwrap();
        for _ in 0..u.int_in_range(0..=60_u8)? {
            replica.apply(&Change::write(key(u)?, "value")).unwrap();
        }
        let fitting = Fitting { root: replica.tree().root(), ..Fitting::default() };
        let position = Some(fitting.position).filter(|_| u.arbitrary() == Ok(true));
        let limits = Limits { answer_bytes: u.int_in_range(40..=1000)?, ..Limits::default() };
        let heartbeat = HeartbeatConfig::default();
        Ok(Self {
            session: Session::new("", limits, heartbeat, position, Duration::ZERO),
            replica,
            store,
            now: Duration::ZERO,
            work: VecDeque::new(),
            fitting,
            received: 0,
            sent: 0,
            allowed: ONCE,
            deletes: 0,
            max_deletes: 0,
            refuses: 0,
            ended: false,
        })
    }

    fn run(&mut self, u: &mut Unstructured<'_>, coverage: &mut Coverage) -> Result<()> {
        self.drain();
        while !u.is_empty() {
            match u.int_in_range(0..=15_u8)? {
                0..9 => self.hear(u, coverage)?,
                9..12 => self.work(u)?,
                12..14 => self.diff(u)?,
                14 => self.happen(u)?,
                _ => {
                    self.now += Duration::from_millis(u.arbitrary::<u16>()?.into());
                    self.allowed += UNASKED;
                    self.session.handle_timeout(self.now);
                }
            }
            self.drain();
        }
        let opened = Replica::open(self.store.clone()).unwrap();
        assert_eq!(opened.tree().root(), self.replica.tree().root());
        Ok(())
    }

    /// What comes of its own.
    fn happen(&mut self, u: &mut Unstructured<'_>) -> Result<()> {
        match u.int_in_range(0..=15_u8)? {
            0..4 => self.session.handle_refused(),
            4..7 => self.session.handle_unread(u.arbitrary::<u8>()?.into()),
            7..10 => self.replica.apply(&Change::write(key(u)?, "own")).unwrap(),
            10..12 => self.refuses = u.int_in_range(0..=3)?,
            12 => self.session.handle_part(self.now),
            13 => self.session.handle_heard(self.now),
            14 => {
                let error = DecodeError::Malformed { bytes: 1, why: "no message".to_owned() };
                self.session.handle_malformed(&error);
            }
            _ => self.session.handle_close(Reason::Failed, ""),
        }
        Ok(())
    }

    fn hear(&mut self, u: &mut Unstructured<'_>, coverage: &mut Coverage) -> Result<()> {
        if let Some(stream) = self.session.stream() {
            self.fitting.position = stream;
        }
        let message = to_client(u, &self.fitting)?;
        coverage.count(self.session.state(), message.tag());
        if let ToClient::CatchUp { revision, .. } = &message {
            self.fitting.caught_up = *revision;
        }
        self.received += wire::encode(&message).len();
        self.session.handle_message(message, self.now);
        let outputs = self.drain();
        assert!(outputs <= OUTPUTS, "{outputs} outputs for a message");
        Ok(())
    }

    fn diff(&mut self, u: &mut Unstructured<'_>) -> Result<()> {
        let (tree, full) = (self.replica.tree().clone(), u.arbitrary()?);
        let max_deletes = *u.choose(&[u64::MAX, 0, 2])?;
        if self.session.handle_diff(tree, full, max_deletes).is_ok() {
            self.max_deletes = max_deletes;
            self.allowed += UNASKED;
        }
        Ok(())
    }

    /// Something that is computed elsewhere is there.
    fn work(&mut self, u: &mut Unstructured<'_>) -> Result<()> {
        let Some(last) = self.work.len().checked_sub(1) else { return Ok(()) };
        match self.work.remove(u.int_in_range(0..=last)?) {
            None => {}
            Some(Work::Root(of, tree)) => self.session.handle_root(of, tree.root()),
            Some(Work::Answer(id, tree, query, max_bytes)) => {
                let answer = diff::answer(&tree, &query, max_bytes).unwrap();
                assert!(answer.len() <= max_bytes.max(NODE), "{} bytes answer", answer.len());
                self.allowed += UNASKED + answer.len();
                self.session.handle_answer(id, answer);
            }
        }
        Ok(())
    }

    /// Does what the session says; how many things that were.
    fn drain(&mut self) -> usize {
        let mut outputs = 0;
        while let Some(output) = self.session.poll_output() {
            outputs += 1;
            assert!(!self.ended, "{output:?} behind the end");
            match output {
                Output::Send(message) => {
                    if let ToServer::SyncReq { diff, .. } = message {
                        self.fitting.diff = diff;
                    }
                    self.sent += wire::encode(&message).len();
                }
                Output::Apply { changes, .. } | Output::CatchUp { changes, .. } => {
                    drop(self.replica.apply_all(changes));
                }
                Output::Repair { diff, changes } => {
                    let deletes = changes.iter().filter(|(change, _)| change.value().is_none());
                    let deletes = deletes.count() as u64;
                    self.deletes = self.deletes.checked_sub(deletes).expect("a bound on deletes");
                    let refused = self.refuses.min(changes.len() as u32);
                    self.refuses -= refused;
                    drop(self.replica.apply_all(changes));
                    self.session.handle_repaired(diff, refused, 0, Duration::ZERO);
                }
                Output::Answer { diff, tree, query, max_bytes } => {
                    self.work.push_back(Work::Answer(diff, tree, query, max_bytes));
                }
                Output::Root(diff, tree) => {
                    self.work.push_back(Work::Root(RootOf::Diff(diff), tree));
                }
                Output::Snapshot(diff) => {
                    let tree = self.replica.tree().clone();
                    let most = self.max_deletes.min(tree.len() as u64);
                    self.deletes = most + most / 8 + 16;
                    self.session.handle_snapshot(diff, tree);
                }
                Output::Mark(revision) => {
                    let tree = self.replica.tree().clone();
                    self.work.push_back(Work::Root(RootOf::Mark(revision), tree));
                }
                Output::Checkpoint(number) => {
                    let tree = self.replica.tree().clone();
                    self.work.push_back(Work::Root(RootOf::Checkpoint(number), tree));
                }
                Output::FellBehind(_) => self.fitting.jumps += 1,
                Output::Connected(..)
                | Output::CaughtUp(_)
                | Output::Progress(_)
                | Output::Held { .. }
                | Output::DiffDone { .. }
                | Output::Verified { .. }
                | Output::DiffAborted { .. } => {}
                Output::Close(_) => self.ended = true,
            }
        }
        let allowed = FACTOR * self.received + self.allowed;
        assert!(self.sent <= allowed, "{} bytes are sent for {}", self.sent, self.received);
        outputs
    }
}
