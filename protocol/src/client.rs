//! The follower's end of one connection.
//!
//! ```text
//!           Welcome            handle_diff              SyncStart            SyncSeq
//!   Hello ──────────── Relay ────────────── PreDiff ────────────── Diff ────────────── PostDiff
//!     │                 ^ ^                    │                     │                     │
//!     │ Welcome,        │ └──── SyncAbort ─────┴───── SyncAbort ─────┴ SyncAbort, SyncDone ┘
//!     │ shortened       │ CaughtUp, FellBehind
//!     └───── CatchUp ───┘
//!   any state ── Refuse, Farewell, a message that must not come ── Closed
//! ```
//!
//! | state \ message | `Welcome` | `Refuse` | `Farewell` | `Live` | `FellBehind` | `SyncStart` | `SyncRequest` | `SyncSeq` | `Repair` | `SyncDone` | `SyncAbort` | `Verify` | `Ping` | `Pong` | `Mark` | `CatchUp` | `CaughtUp` |
//! |---|---|---|---|---|---|---|---|---|---|---|---|---|---|---|---|---|---|
//! | Hello | accept | accept | close | close | close | close | close | close | close | close | close | close | accept | accept | close | close | close |
//! | CatchUp | close | close | accept | close | accept | close | close | close | close | close | close | ignore | accept | accept | close | accept | accept |
//! | Relay | close | close | accept | accept | accept | close | close | close | close | close | close | accept | accept | accept | accept | close | accept |
//! | PreDiff | close | close | accept | accept | accept | accept | close | close | close | close | accept | ignore | accept | accept | ignore | close | close |
//! | Diff | close | close | accept | accept | close | close | accept | accept | close | close | accept | ignore | accept | accept | ignore | close | close |
//! | PostDiff | close | close | accept | accept | close | close | close | close | accept | accept | accept | ignore | accept | accept | ignore | close | close |
//! | Closed | ignore | ignore | ignore | ignore | ignore | ignore | ignore | ignore | ignore | ignore | ignore | ignore | ignore | ignore | ignore | ignore | ignore |
//!
//! *Accept* still closes on what only a broken server says: a number of another diff, a live change
//! that does not follow the one before it, more repairs than announced, a `Mark` elsewhere than
//! where the stream stands. A `Verify` of a mark that was not taken is ignored. `FellBehind` comes after
//! the abort of a diff that ran, so it does not come in Diff and PostDiff.
//!
//! Live changes are applied in every state, in their order, each once. What makes repairs right
//! beside them is the server's to keep, and is argued in [`server`](crate::server).
//!
//! # The position
//!
//! The stream's place (revision and chain) follows every live change. It is the *table's* place
//! only while nothing is missing: from a connection in the middle of a history, or a jump, until
//! a `SyncDone`, the position is void ([`Session::position`] is `None`), and such a follower is never
//! resumed from it. A follower that presents a position is resumed there if the server's log still has
//! all that came since and the chains agree: then it is void at no time, unless what it missed comes
//! shortened.
//!
//! A shortened follower gets one change a key, and is nowhere until `CaughtUp`: some keys are as new
//! as the end already, others not. Were it cut off there and resumed from where it began, the changes
//! that were left out would take the new keys back. So its position is void meanwhile, and a cut is
//! followed by a diff.
//!
//! # Held repairs
//!
//! A follower says with `SyncReq` how many keys the repair may delete. A server that came up empty, or with
//! a part of its table only, would take the rest from every follower; such a diff ends as
//! [`Output::Held`], with nothing changed. A server that sends such a repair all the same is not
//! listened to.

use std::collections::VecDeque;
use std::time::Duration;

use serde::{Deserialize, Serialize};

use crate::change::Change;
use crate::diff::Query;
use crate::error::{DecodeError, ProtocolError};
use crate::heartbeat::{Beat, Heartbeat, HeartbeatConfig};
use crate::limits::{FRAME_OVERHEAD, Limits, MAX_CHANGES, SMALL_FRAME_BYTES};
use crate::message::{
    AbortReason, DiffId, NAME_BYTES, Reason, TEXT_BYTES, ToClient, ToServer, Way, clip, said,
};
use crate::mutation::{Broken, Mutation};
use crate::position::{Chain, ChainTag, Digest, Epoch, Position, Revision};
use crate::server::{Close, limits_text};
use crate::tree::{Hash, KeyPrefix, TREE_VERSION, Tree};
use crate::wire::{Message, Raw, VERSION};

/// The follower's end of one connection, without the connection.
///
/// The contract: after every `handle_*` call [`Session::poll_output`] until there is none, and do what
/// it says in that order. Applying and snapshots are outputs too, so that a snapshot is taken at
/// the very place in the stream that it is of.
///
/// ```
/// use std::time::Duration;
/// use tablecast_protocol::client::{Output, Session};
/// use tablecast_protocol::{HeartbeatConfig, Limits, ToServer};
///
/// let heartbeat = HeartbeatConfig::default();
/// let mut session = Session::new("edge-1", Limits::default(), heartbeat, None, Duration::ZERO);
/// assert!(matches!(session.poll_output(), Some(Output::Send(ToServer::Hello { .. }))));
/// assert_eq!(session.poll_output(), None);
/// ```
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub struct Session {
    limits: Limits,
    state: State,
    /// What was presented.
    presented: Option<Position>,
    /// Where the stream stands; `None` before `Welcome`.
    stream: Option<Position>,
    /// Nothing is missing up to the stream's place.
    whole: bool,
    /// It was resumed, and what it had missed is still coming.
    catching_up: bool,
    /// The store refused a live change, or was found to be wrong, since the last diff began.
    refused: bool,
    /// How many `FellBehind` there were.
    jumps: u32,
    /// What an answer may hold: within this end's limit, and within a frame that the server takes.
    answer_bytes: usize,
    last_diff: DiffId,
    /// The mark behind the last diff, or the last one from time to time, until both roots are there.
    check: Option<Check>,
    /// How many marks there were from time to time.
    checkpoints: u64,
    /// The last diff was held: the table is not known to be whole, and may become so by live changes.
    held: bool,
    heartbeat: Heartbeat,
    /// When something came that is more than a sign of life, or when this end did not wait for anything.
    progressed: Duration,
    outputs: VecDeque<Output>,
    broken: Broken,
}

/// How long nothing but signs of life may come from a server that owes what comes next of the handshake, of a catch-up or of
/// a diff that runs: four times as long as a server waits in a diff that makes no progress.
const STALL: Duration = Duration::from_secs(120);

#[derive(Clone, Debug, PartialEq, Eq, Hash)]
enum State {
    Hello,
    /// What was missed comes, one change a key; so far up to this revision.
    CatchUp(Revision),
    Relay,
    /// The root of a table of so many keys is being computed (not yet `asked`), or asked with.
    PreDiff {
        diff: Running,
        len: u64,
        asked: bool,
        jumps: u32,
    },
    Diff {
        diff: Running,
        answering: bool,
    },
    PostDiff {
        diff: Running,
    },
    Closed,
}

/// A diff under way.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
struct Running {
    id: DiffId,
    full: bool,
    /// What is walked, from `SyncStart` on.
    tree: Tree,
    counts: Counts,
    /// More keys than these may not be deleted.
    max_deletes: u64,
    /// Writes and deletes, from `SyncSeq` on.
    announced: (u64, u64),
    /// Of these, what has not come.
    left: (u64, u64),
}

/// How far a diff is.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash, Serialize, Deserialize)]
pub struct Progress {
    /// What is going on.
    pub phase: DiffPhase,
    /// Queries of the walk so far.
    pub rounds: u32,
    /// Keys repaired.
    pub done: u64,
    /// Keys to repair, at most: those that are updated meanwhile are left out. 0 before that is known.
    pub total: u64,
}

/// What goes on in a diff, as the follower sees it.
#[derive(
    Clone, Copy, Debug, Default, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize,
)]
pub enum DiffPhase {
    /// It was asked for, and waits for a place at the server.
    #[default]
    Queued,
    /// What differs is looked for.
    Walk,
    /// Repairs come.
    Repair,
    /// All repairs are there; roots are compared.
    Compare,
}

/// What a diff did to this follower.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash)]
pub struct Counts {
    /// Queries of the walk; 1 if the roots that came with the asking were enough.
    pub rounds: u32,
    /// Keys written by repairs.
    pub written: u64,
    /// Keys deleted by repairs.
    pub deleted: u64,
    /// Keys left out because they were updated meanwhile.
    pub suppressed: u64,
    /// Keys that could not be repaired: the server could not read them, or this store refused them.
    pub failed: u64,
}

#[derive(Clone, Debug, PartialEq, Eq, Hash)]
struct Check {
    /// What is verified: the end of a diff, or the table from time to time.
    of: Option<(DiffId, Counts)>,
    /// The number of the one from time to time.
    number: u64,
    mark: Revision,
    ours: Option<Hash>,
    theirs: Option<Hash>,
}

impl Check {
    /// Whether this is the one of this number from time to time.
    fn is_checkpoint(&self, number: u64) -> bool {
        self.of.is_none() && self.number == number
    }
}

/// Where a root belongs that was asked for.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum RootOf {
    /// To a diff that is about to be asked for.
    Diff(DiffId),
    /// To the mark at the end of a diff.
    Mark(Revision),
    /// To a mark from time to time, by its number.
    Checkpoint(u64),
}

/// What the actor must do, in this order.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub enum Output {
    /// Send this.
    Send(ToServer),
    /// The handshake is through: every change behind this place will come. Diff now, unless that is
    /// where the table stands ([`Way::resumes`]).
    Connected(Position, Way),
    /// Apply these live changes; `first` is the revision of the first.
    Apply {
        /// Its revision; the others follow.
        first: Revision,
        /// Each with its hashes.
        changes: Vec<(Change, Digest)>,
    },
    /// Apply these changes, one a key, of those up to this revision.
    CatchUp {
        /// None of them is newer.
        revision: Revision,
        /// Each with its hashes.
        changes: Vec<(Change, Digest)>,
    },
    /// All that was missed before the follower was resumed is there.
    CaughtUp(Revision),
    /// Apply these repairs, then [`Session::handle_repaired`].
    Repair {
        /// Of which diff.
        diff: DiffId,
        /// Each with its hashes.
        changes: Vec<(Change, Digest)>,
    },
    /// Answer this from the snapshot, away from everything else, then [`Session::handle_answer`].
    Answer {
        /// Of which diff.
        diff: DiffId,
        /// The snapshot.
        tree: Tree,
        /// What is asked.
        query: Query,
        /// The largest answer that both ends' limits allow.
        max_bytes: usize,
    },
    /// Compute the root of this snapshot away from everything else, then [`Session::handle_root`].
    Root(DiffId, Tree),
    /// The diff has its place. Snapshot the table *now*, then [`Session::handle_snapshot`].
    Snapshot(DiffId),
    /// The end of a diff. Snapshot the table *now* and compute the root away from everything else, then
    /// [`Session::handle_root`].
    Mark(Revision),
    /// The same from time to time, and the place to look through the store as well. This is its number;
    /// [`Session::handle_unread`] if there is no root that can be relied on.
    Checkpoint(u64),
    /// How far the diff under way is, after every step of it.
    Progress(Progress),
    /// A diff ended, and changed nothing: it would delete more keys than [`Session::handle_diff`] allows.
    Held {
        /// Which.
        diff: DiffId,
        /// Keys that it would have written.
        writes: u64,
        /// Keys that it would have deleted.
        deletes: u64,
        /// Keys that there were.
        keys: u64,
    },
    /// A diff is done, and both ends' roots at its end are known.
    DiffDone {
        /// Which.
        diff: DiffId,
        /// What it did.
        counts: Counts,
        /// Where the roots were compared.
        revision: Revision,
        /// Our root at the end.
        root: Hash,
        /// The server's there.
        server_root: Hash,
    },
    /// Both ends' roots at a mark are known. If they are not equal, diff now, at full width.
    Verified {
        /// The mark.
        revision: Revision,
        /// Our root there.
        root: Hash,
        /// The server's there.
        server_root: Hash,
    },
    /// A diff ended early.
    DiffAborted {
        /// Which.
        diff: DiffId,
        /// Why.
        reason: AbortReason,
    },
    /// Changes were missed; the stream goes on behind this place. Diff now.
    FellBehind(Revision),
    /// The connection ends, after what was sent so far.
    Close(Close),
}

/// Why a diff cannot begin.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, thiserror::Error)]
pub enum NotNow {
    /// One is under way.
    #[error("a diff is under way already")]
    AlreadyDiffing,
    /// Changes that were missed come first.
    #[error("what was missed comes first")]
    CatchingUp,
    /// There is no connection with its handshake through.
    #[error("not connected")]
    Disconnected,
}

impl Session {
    /// A session on a fresh connection: says Hello. `now` is counted from whatever the caller likes.
    pub fn new(
        name: &str,
        limits: Limits,
        heartbeat: HeartbeatConfig,
        position: Option<Position>,
        now: Duration,
    ) -> Self {
        let hello = ToServer::hello(clip(name, NAME_BYTES), &limits, position);
        Self {
            limits,
            state: State::Hello,
            presented: position,
            stream: None,
            whole: false,
            catching_up: false,
            refused: false,
            jumps: 0,
            answer_bytes: 0,
            last_diff: DiffId(0),
            check: None,
            checkpoints: 0,
            held: false,
            heartbeat: Heartbeat::new(heartbeat, now),
            progressed: now,
            outputs: VecDeque::from([Output::Send(hello)]),
            broken: Broken::default(),
        }
    }

    /// Breaks a rule from here on, so that a test can show that it would be noticed.
    #[cfg(feature = "mutations")]
    pub fn mutate(&mut self, mutation: Mutation) {
        self.broken = Broken::by(mutation);
    }

    // What comes from the peer.

    /// A message arrived.
    pub fn handle_message(&mut self, message: ToClient, now: Duration) {
        self.heartbeat.heard(now);
        if !matches!(message, ToClient::Ping {} | ToClient::Pong {}) {
            self.progressed = now;
        }
        if let Err(error) = self.accept(message) {
            self.close(Reason::Protocol, error.to_string());
        }
    }

    /// The peer is alive: it has said no more than that, to whoever answers for this end.
    pub fn handle_heard(&mut self, now: Duration) {
        self.heartbeat.heard(now);
    }

    /// A part of a message arrived; or this end has not listened until now, having worked off the last one.
    pub fn handle_part(&mut self, now: Duration) {
        self.heartbeat.heard(now);
        self.progressed = now;
    }

    /// A frame arrived that is no message.
    pub fn handle_malformed(&mut self, error: &DecodeError) {
        let version = matches!(error, DecodeError::Version { .. });
        let reason = if version { Reason::Version } else { Reason::Protocol };
        self.handle_close(reason, error.to_string());
    }

    fn accept(&mut self, message: ToClient) -> Result<(), ProtocolError> {
        let state = std::mem::replace(&mut self.state, State::Closed);
        if matches!(state, State::Closed) {
            return Ok(());
        }
        let got = message.name();
        let unexpected = Err(ProtocolError::Unexpected { state: state.name(), got });
        self.state = match (state, message) {
            (State::Hello, welcome @ ToClient::Welcome { .. }) => return self.welcome(welcome),
            (State::Hello, ToClient::Refuse { reason, text })
            | (
                State::CatchUp(_)
                | State::Relay
                | State::PreDiff { .. }
                | State::Diff { .. }
                | State::PostDiff { .. },
                ToClient::Farewell { reason, text },
            ) => {
                self.end(Close::Peer { reason, text: said(&text) });
                return Ok(());
            }
            (state, ToClient::Ping {}) => {
                self.outputs.push_back(Output::Send(ToServer::Pong {}));
                state
            }
            (state, ToClient::Pong {}) => state,
            (State::Hello, _) => return unexpected,
            (State::CatchUp(so_far), message) => {
                return self.catch_up(so_far, message, unexpected);
            }
            (State::Relay, ToClient::CaughtUp { revision, chain }) => {
                self.caught_up(revision, chain, unexpected)?;
                State::Relay
            }
            (state, ToClient::Live { first, before, changes }) => {
                self.follow(first, before, changes.0)?;
                state
            }
            (state, ToClient::Verify { revision, root }) => {
                self.verify(revision, root);
                state
            }
            (state, ToClient::Mark { revision }) => {
                self.mark(&state, revision)?;
                state
            }
            (state, ToClient::FellBehind { jumps, revision, chain }) => {
                return self.fell_behind(state, jumps, revision, chain, unexpected);
            }
            (
                State::PreDiff { diff, asked: true, .. }
                | State::Diff { diff, .. }
                | State::PostDiff { diff },
                ToClient::SyncAbort { diff: id, reason },
            ) if id == diff.id && reason != AbortReason::Held => {
                self.outputs.push_back(Output::DiffAborted { diff: id, reason });
                State::Relay
            }
            (State::PreDiff { diff, asked: true, .. }, ToClient::SyncStart { diff: id })
                if id == diff.id =>
            {
                self.start(diff)
            }
            (state @ State::Diff { .. }, message) => self.walked(state, message, unexpected)?,
            (state @ State::PostDiff { .. }, message) => {
                self.repaired(state, message, unexpected)?
            }
            (State::Relay | State::PreDiff { .. } | State::Closed, _) => return unexpected,
        };
        Ok(())
    }

    fn welcome(&mut self, welcome: ToClient) -> Result<(), ProtocolError> {
        let ToClient::Welcome {
            version,
            tree,
            epoch,
            revision,
            chain,
            frame_bytes: frame,
            key_bytes: key,
            value_bytes: value,
            way,
        } = welcome
        else {
            return Ok(());
        };
        let Limits { frame_bytes, key_bytes, value_bytes, .. } = self.limits;
        if version != VERSION {
            let theirs = DecodeError::Version { theirs: version, ours: VERSION };
            self.close(Reason::Version, theirs.to_string());
        } else if tree != TREE_VERSION {
            let text = format!("peer has tree version {tree}, this end {TREE_VERSION}");
            self.close(Reason::Tree, text);
        } else if frame > frame_bytes as u64 || key > key_bytes as u64 || value > value_bytes as u64
        {
            let theirs = (frame, key, value);
            self.close(Reason::Limits, limits_text(theirs, &self.limits));
        } else {
            let at = Position { epoch, revision, chain };
            if way.resumes() {
                if self.presented != Some(at) && !self.broken.breaks(Mutation::ResumedElsewhere) {
                    let stands = self.presented.map_or(0, |at| at.revision.0);
                    let (got, revision) = ("Welcome", revision.0);
                    return Err(ProtocolError::Revision { got, revision, stands });
                }
                // Nothing was missing there, and everything behind it will come, in its order; unless what the
                // store holds was found to be wrong since.
                self.whole = (way == Way::Resumed
                    || self.broken.breaks(Mutation::CatchUpKeepsPosition))
                    && (!self.refused || self.broken.breaks(Mutation::RefusalForgotten));
                self.catching_up = true;
            }
            self.whole |= self.broken.breaks(Mutation::NewcomerHasPosition);
            let shortened = way == Way::Shortened;
            self.state = if shortened { State::CatchUp(revision) } else { State::Relay };
            self.stream = Some(at);
            let fits = usize::try_from(frame).unwrap_or(usize::MAX).saturating_sub(FRAME_OVERHEAD);
            self.answer_bytes = self.limits.answer_bytes.min(fits);
            self.outputs.push_back(Output::Connected(at, way));
        }
        Ok(())
    }

    /// Live changes: exactly those that come next, of exactly this history.
    fn follow(
        &mut self,
        first: Revision,
        before: ChainTag,
        changes: Vec<Change>,
    ) -> Result<(), ProtocolError> {
        let stream = self.stream.as_mut().expect("the stream has a place since Welcome");
        if first != stream.revision.next() {
            return Err(ProtocolError::Gap { expected: stream.revision.next().0, got: first.0 });
        }
        if before != stream.chain.tag() && !self.broken.breaks(Mutation::ChainUnchecked) {
            return Err(ProtocolError::Chain { revision: stream.revision.0 });
        }
        let changes: Vec<(Change, Digest)> = changes.into_iter().map(digested).collect();
        let Some(revision) = stream.revision.0.checked_add(changes.len() as u64) else {
            let (got, revision, stands) = ("Live", first.0, stream.revision.0);
            return Err(ProtocolError::Revision { got, revision, stands });
        };
        stream.revision = Revision(revision);
        stream.chain = changes.iter().fold(stream.chain, |chain, (_, digest)| chain.fold(digest));
        self.outputs.push_back(Output::Apply { first, changes });
        Ok(())
    }

    /// The end of what was missed, where all of it was sent.
    fn caught_up(
        &mut self,
        revision: Revision,
        chain: Chain,
        unexpected: Result<(), ProtocolError>,
    ) -> Result<(), ProtocolError> {
        let stands =
            self.stream.map_or((Revision::ZERO, Chain::START), |at| (at.revision, at.chain));
        if !self.catching_up {
            return unexpected;
        }
        if stands.0 != revision {
            let (got, revision, stands) = ("CaughtUp", revision.0, stands.0.0);
            return Err(ProtocolError::Revision { got, revision, stands });
        }
        if stands.1 != chain {
            return Err(ProtocolError::Chain { revision: revision.0 });
        }
        self.catching_up = false;
        self.outputs.push_back(Output::CaughtUp(revision));
        Ok(())
    }

    /// A message in a shortened catch-up.
    fn catch_up(
        &mut self,
        so_far: Revision,
        message: ToClient,
        unexpected: Result<(), ProtocolError>,
    ) -> Result<(), ProtocolError> {
        if let ToClient::FellBehind { jumps, revision, chain } = message {
            let state = State::CatchUp(so_far);
            return self.fell_behind(state, jumps, revision, chain, unexpected);
        }
        let names = |got, revision: Revision| {
            let (revision, stands) = (revision.0, so_far.0);
            Err(ProtocolError::Revision { got, revision, stands })
        };
        self.state = State::CatchUp(so_far);
        let stream = self.stream.as_mut().expect("the stream has a place since Welcome");
        if let ToClient::CatchUp { revision, changes } = message {
            if revision <= so_far {
                return names("CatchUp", revision);
            }
            self.state = State::CatchUp(revision);
            let changes = changes.0.into_iter().map(digested).collect();
            self.outputs.push_back(Output::CatchUp { revision, changes });
        } else if let ToClient::CaughtUp { revision, chain } = message {
            if revision < so_far {
                return names("CaughtUp", revision);
            }
            (stream.revision, stream.chain) = (revision, chain);
            self.whole = !self.refused || self.broken.breaks(Mutation::RefusalForgotten);
            self.catching_up = false;
            self.state = State::Relay;
            self.outputs.push_back(Output::CaughtUp(revision));
        } else if !matches!(message, ToClient::Verify { .. }) {
            // No root is of a mark that was taken here.
            return unexpected;
        }
        Ok(())
    }

    fn progress(&mut self, phase: DiffPhase, diff: &Running) {
        self.outputs.push_back(Output::Progress(diff.progress(phase)));
    }

    fn fell_behind(
        &mut self,
        state: State,
        jumps: u32,
        revision: Revision,
        chain: Chain,
        unexpected: Result<(), ProtocolError>,
    ) -> Result<(), ProtocolError> {
        if matches!(state, State::Diff { .. } | State::PostDiff { .. } | State::Hello) {
            return unexpected;
        }
        let stream = self.stream.as_mut().expect("the stream has a place since Welcome");
        if jumps != self.jumps.wrapping_add(1) || revision < stream.revision {
            let (revision, stands) = (revision.0, stream.revision.0);
            return Err(ProtocolError::Revision { got: "FellBehind", revision, stands });
        }
        (stream.revision, stream.chain) = (revision, chain);
        self.whole &= self.broken.breaks(Mutation::JumpKeepsPosition);
        // Nor does it become whole by live changes: what was skipped is missing.
        self.held = false;
        self.catching_up = false;
        self.jumps = jumps;
        self.outputs.push_back(Output::FellBehind(revision));
        self.state = match state {
            State::CatchUp(_) => State::Relay,
            // A diff that waits is of the table as it is when the server begins, behind the gap.
            State::Hello
            | State::Relay
            | State::PreDiff { .. }
            | State::Diff { .. }
            | State::PostDiff { .. }
            | State::Closed => state,
        };
        Ok(())
    }

    /// A diff has its place.
    fn start(&mut self, diff: Running) -> State {
        self.progress(DiffPhase::Walk, &diff);
        self.outputs.push_back(Output::Snapshot(diff.id));
        State::Diff { diff, answering: false }
    }

    /// A message in Diff.
    fn walked(
        &mut self,
        state: State,
        message: ToClient,
        unexpected: Result<(), ProtocolError>,
    ) -> Result<State, ProtocolError> {
        match (state, message) {
            (
                State::Diff { mut diff, answering: false },
                ToClient::SyncRequest { diff: id, query },
            ) if id == diff.id => {
                query.paths()?;
                diff.counts.rounds += 1;
                self.progress(DiffPhase::Walk, &diff);
                let tree = diff.tree.clone();
                let max_bytes = self.answer_bytes;
                self.outputs.push_back(Output::Answer { diff: id, tree, query, max_bytes });
                Ok(State::Diff { diff, answering: true })
            }
            (
                State::Diff { mut diff, answering: false },
                ToClient::SyncSeq { diff: id, writes, deletes },
            ) if id == diff.id => {
                diff.counts.rounds = diff.counts.rounds.max(1);
                (diff.announced, diff.left) = ((writes, deletes), (writes, deletes));
                self.whole |= self.broken.breaks(Mutation::PositionBeforeRepairs);
                if self.broken.breaks(Mutation::HeldRepairsTaken) {
                    diff.max_deletes = u64::MAX;
                }
                self.progress(DiffPhase::Repair, &diff);
                Ok(State::PostDiff { diff })
            }
            (state, _) => unexpected.map(|()| state),
        }
    }

    /// A message in PostDiff.
    fn repaired(
        &mut self,
        state: State,
        message: ToClient,
        unexpected: Result<(), ProtocolError>,
    ) -> Result<State, ProtocolError> {
        match (state, message) {
            (
                State::PostDiff { mut diff },
                ToClient::Repair { diff: id, writes, prefix_bytes, deletes: Raw(deletes) },
            ) if id == diff.id => {
                let changes = diff.repairs(writes.0, usize::from(prefix_bytes), &deletes)?;
                self.outputs.push_back(Output::Repair { diff: id, changes });
                Ok(State::PostDiff { diff })
            }
            (
                State::PostDiff { diff },
                ToClient::SyncAbort { diff: id, reason: AbortReason::Held },
            ) if id == diff.id && diff.is_held() => {
                let (writes, deletes) = diff.announced;
                let keys = diff.tree.len() as u64;
                (self.whole, self.held) = (false, true);
                self.outputs.push_back(Output::Held { diff: id, writes, deletes, keys });
                Ok(State::Relay)
            }
            (
                State::PostDiff { mut diff },
                ToClient::SyncDone { diff: id, revision, chain, suppressed, failed },
            ) if id == diff.id && !diff.is_held() => {
                let stream = self.stream.as_ref().expect("the stream has a place since Welcome");
                if revision != stream.revision {
                    let (got, stands) = ("SyncDone", stream.revision.0);
                    return Err(ProtocolError::Revision { got, revision: revision.0, stands });
                }
                if chain != stream.chain.tag() {
                    return Err(ProtocolError::Chain { revision: revision.0 });
                }
                // A key that could not be repaired is missing still.
                self.whole = (diff.counts.failed.saturating_add(failed) == 0
                    || self.broken.breaks(Mutation::FailedKeepsPosition))
                    && (!self.refused || self.broken.breaks(Mutation::RefusalForgotten));
                diff.counts.suppressed = suppressed;
                diff.counts.failed = diff.counts.failed.saturating_add(failed);
                self.progress(DiffPhase::Compare, &diff);
                let of = Some((diff.id, diff.counts));
                let number = 0;
                self.check = Some(Check { of, number, mark: revision, ours: None, theirs: None });
                self.outputs.push_back(Output::Mark(revision));
                Ok(State::Relay)
            }
            (state, _) => unexpected.map(|()| state),
        }
    }

    fn verify(&mut self, revision: Revision, root: Hash) {
        match &mut self.check {
            Some(check)
                if (check.mark == revision || self.broken.breaks(Mutation::VerifyAnyMark))
                    && check.theirs.is_none() =>
            {
                check.theirs = Some(root);
                self.compare();
            }
            // Of a mark that was passed while something was missing, or a diff was under way.
            Some(_) | None => {}
        }
    }

    /// A place to compare roots at, which is of use only while nothing is known to be missing.
    fn mark(&mut self, state: &State, revision: Revision) -> Result<(), ProtocolError> {
        let stands = self.stream.map_or(Revision::ZERO, |stream| stream.revision);
        if revision != stands {
            let (revision, stands) = (revision.0, stands.0);
            return Err(ProtocolError::Revision { got: "Mark", revision, stands });
        }
        // One whose root is still awaited stays: a table is looked through once at a time.
        let busy = self.check.as_ref().is_some_and(|check| check.ours.is_none());
        let whole = self.whole || self.held || self.broken.breaks(Mutation::MarkWhileMissing);
        if whole && !self.is_comparing() && !busy && *state == State::Relay {
            self.checkpoints += 1;
            let number = self.checkpoints;
            self.check = Some(Check { of: None, number, mark: revision, ours: None, theirs: None });
            self.outputs.push_back(Output::Checkpoint(number));
        }
        Ok(())
    }

    fn compare(&mut self) {
        if let Some(Check { of, mark, ours: Some(root), theirs: Some(server_root), .. }) =
            self.check.take_if(|check| check.ours.is_some() && check.theirs.is_some())
        {
            self.outputs.push_back(Output::Send(ToServer::Verified { revision: mark, root }));
            // A position that is known to be wrong is none, and a table that is equal is whole: not, if the store has
            // refused what came behind the mark.
            let (equal, held) = (root == server_root, std::mem::take(&mut self.held));
            self.whole = (equal || self.broken.breaks(Mutation::UnequalKeepsPosition))
                && (self.whole || held && !self.refused);
            let revision = mark;
            match of {
                Some((diff, counts)) => self.outputs.push_back(Output::DiffDone {
                    diff,
                    counts,
                    revision,
                    root,
                    server_root,
                }),
                // That it differs while a repair is held is no news.
                None if held && !equal => self.held = true,
                None => {
                    self.outputs.push_back(Output::Verified { revision, root, server_root });
                }
            }
        }
    }

    // What comes from the client.

    /// Begins a diff of this snapshot of the table as it is now. `full` compares full-width hashes,
    /// as after a mismatch. A repair that would delete more keys than `max_deletes` is held.
    ///
    /// Only its root and its length are asked with. What is walked is a snapshot of when the server begins
    /// ([`Output::Snapshot`]): a diff may wait for its place for long, and what comes live meanwhile would come once more.
    ///
    /// # Errors
    /// If one is under way (until its report is out), what was missed has not come yet, or there is no
    /// connection.
    pub fn handle_diff(
        &mut self,
        tree: Tree,
        full: bool,
        max_deletes: u64,
    ) -> Result<DiffId, NotNow> {
        match self.state {
            State::CatchUp(_) | State::Relay if self.catching_up => {
                return Err(NotNow::CatchingUp);
            }
            State::Relay if !self.is_comparing() => self.check = None,
            State::Relay | State::PreDiff { .. } | State::Diff { .. } | State::PostDiff { .. } => {
                return Err(NotNow::AlreadyDiffing);
            }
            State::Hello | State::CatchUp(_) | State::Closed => {
                return Err(NotNow::Disconnected);
            }
        }
        self.last_diff = DiffId(self.last_diff.0.wrapping_add(1));
        let id = self.last_diff;
        (self.refused, self.held) = (false, false);
        let len = tree.len() as u64;
        self.outputs.push_back(Output::Root(id, tree));
        let (tree, counts) = (Tree::new(), Counts::default());
        let (announced, left) = ((0, 0), (0, 0));
        let diff = Running { id, full, tree, counts, max_deletes, announced, left };
        self.state = State::PreDiff { diff, len, asked: false, jumps: self.jumps };
        Ok(id)
    }

    /// The snapshot that [`Output::Snapshot`] asked for.
    pub fn handle_snapshot(&mut self, diff: DiffId, tree: Tree) {
        if let State::Diff { diff: at, .. } = &mut self.state
            && at.id == diff
        {
            at.tree = tree;
        }
    }

    /// A root that was asked for by [`Output::Root`] or [`Output::Mark`].
    pub fn handle_root(&mut self, of: RootOf, root: Hash) {
        match of {
            RootOf::Diff(id) => {
                if let State::PreDiff { diff, len, asked, jumps } = &mut self.state
                    && diff.id == id
                    && !*asked
                {
                    *asked = true;
                    let (full, len, jumps) = (diff.full, *len, *jumps);
                    let max_deletes = diff.max_deletes;
                    let request =
                        ToServer::SyncReq { diff: id, jumps, full, root, len, max_deletes };
                    self.outputs.push_back(Output::Send(request));
                    self.outputs.push_back(Output::Progress(diff.progress(DiffPhase::Queued)));
                }
            }
            RootOf::Mark(revision) => {
                let ends = |check: &&mut Check| check.of.is_some() && check.mark == revision;
                if let Some(check) = self.check.as_mut().filter(ends) {
                    check.ours = Some(root);
                    self.compare();
                }
            }
            RootOf::Checkpoint(number) => {
                let check = self.check.as_mut();
                if let Some(check) = check.filter(|check| check.is_checkpoint(number)) {
                    check.ours = Some(root);
                    self.compare();
                }
            }
        }
    }

    /// Whether the root at this mark from time to time is still to be compared: a diff that begins has done with it.
    pub fn is_checking(&self, checkpoint: u64) -> bool {
        self.check.as_ref().is_some_and(|check| check.is_checkpoint(checkpoint))
    }

    /// The store could not be read at this mark from time to time: nothing is compared there.
    pub fn handle_unread(&mut self, checkpoint: u64) {
        self.check.take_if(|check| check.is_checkpoint(checkpoint));
    }

    /// The answer that [`Output::Answer`] asked for.
    pub fn handle_answer(&mut self, diff: DiffId, answer: crate::diff::Answer) {
        if let State::Diff { diff: at, answering } = &mut self.state
            && at.id == diff
            && std::mem::take(answering)
        {
            let answer = Raw(answer);
            self.outputs.push_back(Output::Send(ToServer::SyncResponse { diff, answer }));
        }
    }

    /// The repairs of [`Output::Repair`] have been applied, but for those that the store refused, and took so
    /// long.
    pub fn handle_repaired(
        &mut self,
        diff: DiffId,
        refused_writes: u32,
        refused_deletes: u32,
        took: Duration,
    ) {
        if matches!(self.state, State::Hello | State::Closed) {
            return;
        }
        let failed = refused_writes + refused_deletes;
        self.whole &= failed == 0;
        if let State::PostDiff { diff: at, .. } = &mut self.state
            && at.id == diff
        {
            at.counts.written = at.counts.written.saturating_sub(u64::from(refused_writes));
            at.counts.deleted = at.counts.deleted.saturating_sub(u64::from(refused_deletes));
            at.counts.failed += u64::from(failed);
            self.outputs.push_back(Output::Progress(at.progress(DiffPhase::Repair)));
        }
        let micros = u32::try_from(took.as_micros()).unwrap_or(u32::MAX);
        self.outputs.push_back(Output::Send(ToServer::RepairAck { diff, failed, micros }));
    }

    /// The store refused a live change of [`Output::Apply`], or does not hold what it took: the table is not whole
    /// until a diff.
    pub fn handle_refused(&mut self) {
        self.whole &= self.broken.breaks(Mutation::RefusedKeepsPosition);
        // The diff that runs may leave its key out, as one that a live change brought.
        self.refused = true;
    }

    // Time, and the end.

    /// When to call [`Session::handle_timeout`] next; `None` when closed.
    pub fn poll_timeout(&self) -> Option<Duration> {
        // Whether anything is owed then is seen then.
        let stalled = self.progressed.saturating_add(STALL);
        (!matches!(self.state, State::Closed)).then(|| self.heartbeat.next().min(stalled))
    }

    /// Whether the server owes a message that is not long in coming: not while a diff waits for its place, or an answer is
    /// computed here.
    fn waits(&self) -> bool {
        let uncompared = |check: &Check| check.of.is_some() && check.theirs.is_none();
        match self.state {
            State::Hello
            | State::CatchUp(_)
            | State::Diff { answering: false, .. }
            | State::PostDiff { .. } => true,
            State::Relay | State::PreDiff { .. } | State::Diff { answering: true, .. } => {
                self.catching_up || self.check.as_ref().is_some_and(uncompared)
            }
            State::Closed => false,
        }
    }

    /// It is this late now.
    pub fn handle_timeout(&mut self, now: Duration) {
        if matches!(self.state, State::Closed) {
            return;
        }
        if !self.waits() {
            self.progressed = now;
        } else if now.saturating_sub(self.progressed) >= STALL {
            let seconds = STALL.as_secs();
            let state = self.state.name();
            return self.close(Reason::Silent, format!("nothing came in {state} for {seconds} s"));
        }
        match self.heartbeat.beat(now) {
            Beat::Quiet => {}
            // A server that is not ready yet has not read Hello: silence is counted all the same.
            Beat::Ping if matches!(self.state, State::Hello) => {}
            Beat::Ping => self.outputs.push_back(Output::Send(ToServer::Ping {})),
            Beat::Dead => self.close(Reason::Silent, String::new()),
        }
    }

    /// The connection is to end, for this reason: says so.
    pub fn handle_close(&mut self, reason: Reason, text: impl Into<String>) {
        if !matches!(self.state, State::Closed) {
            self.close(reason, text.into());
        }
    }

    fn close(&mut self, reason: Reason, text: String) {
        let text = clip(&text, TEXT_BYTES).to_owned();
        let farewell = ToServer::Farewell { reason, text: text.clone() };
        self.outputs.push_back(Output::Send(farewell));
        self.end(Close::Here { reason, text });
    }

    fn end(&mut self, close: Close) {
        self.state = State::Closed;
        // A root that is there later is compared with nothing.
        self.check = None;
        self.outputs.push_back(Output::Close(close));
    }

    // What can be asked.

    /// What to do next.
    pub fn poll_output(&mut self) -> Option<Output> {
        self.outputs.pop_front()
    }

    /// The name of the state, as in the table above.
    pub fn state(&self) -> &'static str {
        self.state.name()
    }

    /// Whether a diff is done but for its verdict: the roots at its end are still compared.
    pub fn is_comparing(&self) -> bool {
        self.check.as_ref().is_some_and(|check| check.of.is_some())
    }

    /// Whether it was resumed, and what it had missed is still coming.
    pub fn is_catching_up(&self) -> bool {
        self.catching_up
    }

    /// Where the stream stands, or stood when a shortened catch-up began; `None` before the handshake is through.
    pub fn stream(&self) -> Option<Position> {
        self.stream
    }

    /// Where the table stands; `None` while that is void.
    pub fn position(&self) -> Option<Position> {
        self.stream.filter(|_| self.whole)
    }

    /// The history that is followed; `None` before the handshake is through.
    pub fn epoch(&self) -> Option<Epoch> {
        self.stream.map(|stream| stream.epoch)
    }

    /// How large a frame the peer may send now.
    pub fn max_frame_bytes(&self) -> usize {
        match self.state {
            State::Hello | State::Closed => SMALL_FRAME_BYTES,
            State::CatchUp(_)
            | State::Relay
            | State::PreDiff { .. }
            | State::Diff { .. }
            | State::PostDiff { .. } => self.limits.frame_bytes,
        }
    }
}

impl Running {
    fn progress(&self, phase: DiffPhase) -> Progress {
        let Counts { rounds, written, deleted, failed, .. } = self.counts;
        let (writes, deletes) = self.announced;
        let done = written.saturating_add(deleted).saturating_add(failed);
        let total = writes.saturating_add(deletes);
        // A prefix may stand for several keys.
        Progress { phase, rounds, done: done.min(total), total }
    }

    /// The server has announced more deletes than are allowed.
    fn is_held(&self) -> bool {
        self.announced.1 > self.max_deletes
    }

    /// What a `Repair` makes of the table.
    fn repairs(
        &mut self,
        writes: Vec<Change>,
        width: usize,
        deletes: &[u8],
    ) -> Result<Vec<(Change, Digest)>, ProtocolError> {
        let broken = |why| ProtocolError::Repair { why };
        let held = broken("it deletes more keys than are allowed");
        if width == 0 {
            return Err(broken("its prefixes have no bytes"));
        }
        if self.is_held() {
            return Err(held);
        }
        let prefixes = (deletes.len() / width) as u64;
        let (writes_left, deletes_left) = self.left;
        let left =
            (writes_left.checked_sub(writes.len() as u64), deletes_left.checked_sub(prefixes));
        let (Some(writes_left), Some(deletes_left)) = left else {
            return Err(broken("there are more repairs than announced"));
        };
        self.left = (writes_left, deletes_left);
        if writes.iter().any(|change| change.value().is_none()) {
            return Err(broken("a repair deletes a key by its name"));
        }
        if !deletes.len().is_multiple_of(width) {
            return Err(broken("the prefixes of a repair do not fill their bytes"));
        }
        self.counts.written += writes.len() as u64;
        let mut changes: Vec<_> = writes.into_iter().map(digested).collect();
        for prefix in deletes.chunks_exact(width) {
            let prefix =
                KeyPrefix::new(prefix).ok_or(broken("a prefix is longer than a key's hash"))?;
            // Of the snapshot that was walked, not of the table as it is now.
            let room = MAX_CHANGES.saturating_sub(changes.len());
            let entries = self.tree.get_prefix(prefix);
            changes.extend(entries.take(room + 1).map(|entry| {
                let key = bytes::Bytes::copy_from_slice(entry.key());
                self.counts.deleted += 1;
                (Change::Delete { key }, Digest { key: *entry.key_hash(), entry: None })
            }));
            if changes.len() > MAX_CHANGES {
                return Err(broken("it deletes more keys than one repair may"));
            }
            // Keys whose hashes begin alike are one prefix for the server; such keys are rare. And no honest
            // one names a prefix twice: a short one in a byte could be the whole table each time.
            let most = self.max_deletes.min(self.tree.len() as u64);
            if self.counts.deleted > most.saturating_add(most / 8 + 16) {
                return Err(held);
            }
        }
        Ok(changes)
    }
}

impl State {
    fn name(&self) -> &'static str {
        match self {
            Self::Hello => "Hello",
            Self::CatchUp(_) => "CatchUp",
            Self::Relay => "Relay",
            Self::PreDiff { .. } => "PreDiff",
            Self::Diff { .. } => "Diff",
            Self::PostDiff { .. } => "PostDiff",
            Self::Closed => "Closed",
        }
    }
}

fn digested(change: Change) -> (Change, Digest) {
    let digest = Digest::of(&change);
    (change, digest)
}
