//! The server's end of one connection.
//!
//! ```text
//!           Hello                  subscribed               SyncReq
//!   Hello ───────── Subscribing ────────────── Relay ─────────────────── Diff
//!                        │                     ^   ^                      │
//!              shortened └─ CatchUp ───────────┘   └ SyncDone, SyncAbort ─┘
//!                              CaughtUp, FellBehind
//!   any state ── Refuse, Farewell, a message that must not come ── Closed
//! ```
//!
//! | state \ message | `Hello` | `SyncReq` | `SyncResponse` | `RepairAck` | `Verified` | `Ping` | `Pong` | `Farewell` |
//! |---|---|---|---|---|---|---|---|---|
//! | Hello | accept | close | close | close | close | close | close | close |
//! | Subscribing | close | close | close | close | close | accept | accept | accept |
//! | CatchUp | close | close | close | close | close | accept | accept | accept |
//! | Relay | close | accept | ignore | accept | accept | accept | accept | accept |
//! | Diff | close | close | accept | accept | close | accept | accept | accept |
//! | Closed | ignore | ignore | ignore | ignore | ignore | ignore | ignore | ignore |
//!
//! *Accept* still closes on what only a broken peer says: an acknowledgement of nothing, a `Verified`
//! of no mark, a diff number used before, a diff asked for before the last one's roots are compared, an
//! answer that nobody waits for. *Ignore* in Relay is for the answer that crossed the abort of its diff;
//! one of a diff that was never asked for closes.
//!
//! # Why a repair under live writes is right
//!
//! Three promises: a repair never takes a key back; no follower of one epoch sees an older value
//! after a newer one; after a diff on a quiet stream both tables are equal. What keeps them:
//!
//! 1. **Record, then snapshot.** [`Session::handle_admitted`] begins to record the key of every
//!    live change that goes on the wire, and only then asks for the snapshot that is walked. So a
//!    key changed behind the snapshot is in `updated` when its change is on the wire. In the other
//!    order a change between the two would be in neither, and its key repaired although updated.
//! 2. **Read late.** Values are not those of the snapshot: the server reads them chunk by chunk,
//!    each chunk in one turn, so all of them are as they were at one revision q. (Keys beyond the first part of what
//!    was found are looked up late, too, in a later snapshot. It lacks what was deleted meanwhile, and has what was
//!    added or changed: the first is not to be repaired, the others are in `updated` when they would be sent, by 3.)
//! 3. **Hold.** A chunk read at q goes on the wire only when every live change up to q has
//!    ([`Session::poll_transmit`]). Sent earlier it would be followed by a change older than itself.
//! 4. **Suppress at that moment, not before.** Between the reading and the sending the stream went on. What
//!    is in `updated` is on the wire already, as new as the chunk or newer, so it is taken out.
//!    With 3: what remains is a key that no change between q and here touched, with its value at q. That
//!    is its value here. (What is in `updated` before it is read will be then, too, and is not read.)
//! 5. **One lane.** Repairs and live changes share the connection, so "on the wire before" is "applied
//!    before". Recording ends with the last repair, not with the walk: step 4 needs it to the end.
//! 6. **The end mark is the stream's place.** When the last repair is sent the server marks the log
//!    at its head e, and `SyncDone { e }` goes out exactly when the stream stands there. (The mark
//!    is in the log, so that the stream cannot pass e before the answer that names e is here.) Keys that the walk found equal were equal in two
//!    snapshots, and every change since, on either side, came by live: so the tables at e are equal.
//! 7. **A jump aborts.** A cursor that fell off the log goes on at the head, and what it skipped was
//!    neither sent nor recorded. So the diff ends, unless it still waits for its place: the follower takes the snapshot that is walked
//!    where it hears `SyncStart`, behind the gap. But the root that it asked with may be the server's again, although
//!    a live change from before the gap came on top of it, which was undone within the gap; so that root is not compared.
//! 8. **Only the diff at hand.** Everything about a diff carries its number; a Differ, a reading or a
//!    snapshot of an earlier one is not listened to.
//! 9. **Bounds.** `updated` has one; past it the diff is aborted and asked for again later.

mod updated;

use std::collections::{BTreeSet, VecDeque};
use std::sync::Arc;
use std::time::Duration;

use bytes::Bytes;
use serde::{Deserialize, Serialize};

use crate::diff::{Answer, Difference, Found, Step};
use crate::error::{DecodeError, ProtocolError};
use crate::heartbeat::{Beat, Heartbeat, HeartbeatConfig};
use crate::limits::Limits;
#[cfg(doc)]
use crate::log::Missed;
use crate::log::{Chunk, FollowerId, Log, Next, Shortened};
use crate::message::{
    AbortReason, DiffId, NAME_BYTES, Reason, TEXT_BYTES, ToClient, ToServer, Way, clip, said,
};
use crate::mutation::{Broken, Mutation};
use crate::position::{Chain, Position, Revision};
use crate::table::Values;
use crate::tree::{Entry, Hash, KeyHash, Path, TREE_VERSION, Tree};
use crate::wire::{self, Changes, HEADER_BYTES, LiveFrame, Message, Raw, VERSION};
use crate::{Change, limits};
use updated::Updated;

/// What a server's sessions are set to. All of one server have the same.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct SessionConfig {
    /// Largest things.
    pub limits: Limits,
    /// About how many bytes of repairs go between two looks at the live stream: up to 64 KiB, about what
    /// a socket takes at once, and less while the follower takes long to apply them, or the stream is busy.
    pub repair_bytes: usize,
    /// Most repairs sent and not acknowledged: 2, so that one is on its way while one is applied,
    /// and no megabytes of them stand in a socket's buffer before a live change.
    pub repair_window: u32,
    /// Most keys updated during one diff that are remembered: 1 Mi, some 20 MiB. More of them, by a sixteenth
    /// at the most, abort it. So do more that cannot be read.
    pub updated_keys: usize,
    /// Of how many keys that a walk found the entries are held at once: 4 Ki, 256 KiB of them, or a sixteenth of the table if
    /// that is more. Others are held as nodes of the tree, until it is their turn.
    pub part_keys: usize,
    /// Most changes of which a follower that comes back is sent one a key: 256 Ki, for 32 KiB of memory a
    /// follower. One that missed more is sent all of them. 0 is never.
    pub shorten_changes: usize,
    /// About how many bytes of what a follower missed are put together in one frame: 64 KiB. Written one by
    /// one, changes are as many frames, each with a header of some 20 bytes.
    pub missed_bytes: usize,
    /// How long a diff that waits for its follower may go without an answer, an acknowledgement, or room for a repair, or a part of
    /// these: 30 s. Then it is aborted, so that others have its place.
    pub diff_stall: Duration,
    /// When the peer is asked whether it is there, and given up.
    pub heartbeat: HeartbeatConfig,
}

impl Default for SessionConfig {
    fn default() -> Self {
        Self {
            limits: Limits::default(),
            repair_bytes: 64 << 10,
            repair_window: 2,
            updated_keys: 1 << 20,
            part_keys: 4 << 10,
            shorten_changes: 256 << 10,
            missed_bytes: 64 << 10,
            diff_stall: Duration::from_secs(30),
            heartbeat: HeartbeatConfig::default(),
        }
    }
}

/// Most control messages that wait to be sent before nothing more is read: what bounds them, for a
/// peer that asks and does not read.
pub(crate) const MAX_CONTROL: usize = 16;

/// Changes that leaving out must spare, for a shortened catch-up to be fewer bytes: a change is 3 bytes at
/// the least, and what ends the catch-up is of 41.
const WORTH_SHORTENING: u64 = 14;

/// An empty follower is repaired of everything without a question, unless it was sent as many changes as this part of the table
/// while it waited for its place: then it is asked what it has.
const WORTH_WALKING: u64 = 8;

/// More bytes of live changes than these had to go ahead of a repair that was read, and the stream is busy: it is a server, or a
/// line, with as much to do as it can. The next repair is as small as the first one then: its changes are for one follower, live
/// ones for all.
const BUSY_BYTES: usize = 16 << 10;

/// How large the first repair of a diff is at most, so that the follower has something to apply while more is
/// read, and the smallest to which a slow follower brings it.
const FIRST_REPAIR_BYTES: usize = 8 << 10;
const LEAST_REPAIR_BYTES: usize = 4 << 10;

/// A part of what a walk found has a key for each so many bytes of a repair: some readings, so that few of them are short, and
/// little of it is updated before it is read.
const PART_BYTES: usize = 8;

/// How long a follower may take to apply a repair before the next ones are smaller. What is written
/// meanwhile waits for as many of them as are on their way. This is what is known of delay-based
/// congestion control (LEDBAT, RFC 6817: data that can wait gives way by the delay that it
/// causes); but the follower tells its time, so that a long line is not taken for a slow follower.
const REPAIR_TIME: Duration = Duration::from_micros(300);

/// Most checkpoints that are not answered and remembered. A follower that cannot read its store answers none.
const MAX_CHECKING: usize = 8;

/// The server's end of one connection, without the connection.
///
/// The contract: after every `handle_*` call, and after [`Session::poll_transmit`] too,
/// [`Session::poll_event`] until there is none, and do what the events say; whenever the connection
/// has room, [`Session::poll_transmit`] until there is nothing, and send that in its order. Frames
/// are asked for last of all, so that what is decided
/// about their order is decided when they go on the wire. A session that is dropped or closed in the
/// middle of a diff says no [`Event::EndDiff`]: whoever drops it gives back what the diff had.
///
/// ```
/// use std::time::Duration;
/// use tablecast_protocol::server::{Event, Session, SessionConfig, Transmit};
/// use tablecast_protocol::{
///     Chain, Epoch, FollowerId, Log, Position, Revision, ToClient, ToServer, Way,
/// };
///
/// let (config, now) = (SessionConfig::default(), Duration::ZERO);
/// let log = Log::new(1 << 20, Revision(9), Chain::START);
/// let mut session = Session::new(config, FollowerId(1), now);
/// session.handle_message(ToServer::hello("edge-1", &config.limits, None), now);
/// assert!(matches!(session.poll_event(), Some(Event::Subscribe { .. })));
/// let epoch = Epoch::from_bytes([1; 16]);
/// let at = Position { epoch, revision: log.head(), chain: log.chain() };
/// session.handle_subscribed(at, Way::NoPosition, at);
/// assert!(matches!(
///     session.poll_transmit(&log),
///     Some(Transmit::Message(ToClient::Welcome { revision: Revision(9), .. }))
/// ));
/// assert_eq!(session.poll_transmit(&log), None);
/// ```
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub struct Session {
    config: SessionConfig,
    follower: FollowerId,
    state: State,
    /// The next change that goes on the wire.
    cursor: Revision,
    /// The end of what the follower had missed when it was resumed: small frames up to here are put
    /// together, and it is told when the stream stands there.
    missed: Option<Position>,
    /// What Welcome said; from then on the end of the connection is a farewell, no refusal.
    way: Option<Way>,
    /// To be closed at the end of the log.
    stopping: bool,
    /// How often the cursor fell off the log.
    jumps: u32,
    /// The last diff that was asked for.
    last_diff: DiffId,
    /// Repairs sent and not acknowledged; outlives the diff by a round trip.
    unacknowledged: u32,
    /// `SyncDone` has named this mark, and its root is still being computed.
    mark_due: Option<Revision>,
    /// The mark whose root was sent last, until the follower says its own.
    verifying: Option<(Revision, Hash)>,
    /// The number of the newest checkpoint that was marked, and whether its root was sent.
    checkpoint: (u64, bool),
    /// Checkpoints whose root was sent, until the follower says its own at one of them or a later one, or
    /// asks for a diff: then it has done with them. Answers may be on their way when the next is sent.
    checking: VecDeque<(Revision, Hash)>,
    /// The newest of them that was forgotten for lack of room: its answer may be on its way.
    forgotten: Option<Revision>,
    /// Until when an answer may come, which alone may be large: for ever while one is waited for, and for a while behind the end of
    /// its diff, as it may be on its way.
    answer_until: Option<Duration>,
    heartbeat: Heartbeat,
    /// When the last whole message came, or the peer was told that this end hears parts of one.
    whole: Duration,
    /// Counts what happens in diffs; how far it was, and when, when the clock was last looked at.
    progress: u64,
    progressed: (u64, Duration),
    events: VecDeque<Event>,
    /// What goes out before any live change.
    control: VecDeque<ToClient>,
    broken: Broken,
}

#[derive(Clone, Debug, PartialEq, Eq, Hash)]
enum State {
    Hello,
    /// With the follower's place, while it is found out what counts of what it missed.
    Subscribing(Option<Position>),
    /// What it missed is sent, one change a key.
    CatchUp(Shortened),
    Relay,
    Diff(Box<Diff>),
    Closed,
}

#[derive(Clone, Debug, PartialEq, Eq, Hash)]
struct Diff {
    id: DiffId,
    full: bool,
    /// What it was asked with; `None` if that was before a jump.
    root: Option<Hash>,
    len: u64,
    /// Where the stream stood.
    asked_at: Revision,
    max_deletes: u64,
    served: Served,
    recording: bool,
    /// Keys of all live changes put on the wire while recording.
    updated: Updated,
    phase: Phase,
}

#[derive(Clone, Debug, PartialEq, Eq, Hash)]
enum Phase {
    /// Waiting for one of the places at which diffs run.
    Queued,
    /// Recording; the snapshot has been asked for.
    Snapshot,
    /// A Differ walks; `asked` while a query is with the follower.
    Walk { asked: bool },
    /// Repairs are read and sent.
    Repair(Repair),
    /// All repairs are sent, and the server is asked to mark the log: `SyncDone` goes out when the
    /// stream stands at the mark.
    Mark { suppressed: u64, failed: u64, mark: Option<Revision>, root: Option<Hash> },
}

#[derive(Clone, Debug, PartialEq, Eq, Hash)]
struct Repair {
    /// Of all that was found, what is not in `found` yet.
    rest: Vec<Path>,
    /// The next part of it is being collected, out of a snapshot of the tree as it is then.
    collecting: bool,
    /// The next reading waits for that.
    waits: bool,
    /// What has not been looked at.
    found: Difference,
    /// A part of what was found, without what was updated by then: what is read.
    part: Arc<Difference>,
    /// Where in the part the next reading begins.
    next: usize,
    /// How large the next one is, and may be.
    max_bytes: usize,
    most_bytes: usize,
    /// Read, and waiting for its turn; `None` while a reading is under way.
    ready: Option<Values>,
    /// Bytes of live changes that went on the wire before it might.
    held_bytes: usize,
    /// How many keys were sent.
    sent: u64,
    failed: BTreeSet<KeyHash>,
}

impl Repair {
    /// Of what the walk found, the next part that is to be read, when the last one has been. It may be empty: so much is looked at
    /// in one go, and no more.
    fn look_on(&mut self, updated: &Updated, broken: Broken) {
        if self.next < self.part.len() {
            return;
        }
        let early = !broken.breaks(Mutation::NoSuppression)
            && !broken.breaks(Mutation::NoDeleteSuppression)
            && !broken.breaks(Mutation::SuppressAtReading);
        let many = (self.max_bytes / PART_BYTES).max(1);
        let nothing = &Updated::default();
        let updated = if early { updated } else { nothing };
        self.part = Arc::new(updated.skim(&mut self.found, many));
        self.next = if broken.breaks(Mutation::PartCutShort) { 1 } else { 0 };
    }

    /// One took so long.
    fn applied(&mut self, took: Duration) {
        if took > REPAIR_TIME {
            self.max_bytes = LEAST_REPAIR_BYTES.max(self.max_bytes / 2).min(self.most_bytes);
        } else if took < REPAIR_TIME / 2 {
            self.max_bytes = self.most_bytes.min(self.max_bytes.saturating_mul(2));
        }
    }

    /// Those that are read next may be so large, and no larger beside a busy stream than the first one is.
    fn limit(&mut self, most_bytes: usize) {
        let busy = std::mem::take(&mut self.held_bytes) > BUSY_BYTES;
        self.most_bytes = if busy { most_bytes.min(FIRST_REPAIR_BYTES) } else { most_bytes };
        self.max_bytes = self.max_bytes.min(self.most_bytes);
    }
}

/// What the actor must do.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub enum Event {
    /// Put what has been written into the log ([`Table::seal`](crate::Table::seal)) and subscribe
    /// this follower to it, in one turn, then [`Session::handle_subscribed`] with the place from
    /// which it is, or [`Session::handle_close`].
    Subscribe {
        /// What it calls itself.
        name: String,
        /// What it presents.
        position: Option<Position>,
    },
    /// Find out away from everything else which changes behind this revision count, up to this position
    /// ([`Missed::collect`], [`Shortened::of`]), then [`Session::handle_shortened`].
    Shorten(Revision, Position),
    /// Ask for a place to run a diff, then [`Session::handle_admitted`] or [`Session::handle_busy`].
    Admit(DiffId),
    /// Take a snapshot of the server's tree, then [`Session::handle_snapshot`].
    Snapshot(DiffId),
    /// Start a Differ, whose steps go to [`Session::handle_step`].
    Walk {
        /// Of which diff.
        diff: DiffId,
        /// The snapshot.
        tree: Tree,
        /// The root that the follower had when it asked, if it missed nothing since.
        root: Option<Hash>,
        /// How many keys the follower has, about: what it was sent while it waited may be new to it.
        len: u64,
        /// Compare full-width hashes.
        full: bool,
    },
    /// Give this to the Differ.
    Answer(DiffId, Answer),
    /// Collect the next part of what a walk found ([`collect`](crate::diff::collect)), away from everything else, then
    /// [`Session::handle_collected`], or [`Session::handle_walk_failed`].
    Collect {
        /// Of which diff.
        diff: DiffId,
        /// The server's tree.
        tree: Tree,
        /// Where the keys are that were not collected yet.
        rest: Vec<Path>,
        /// How many keys, if that is not less than a sixteenth of the table.
        most: usize,
    },
    /// Read repairs ([`Table::read`](crate::Table::read)), then [`Session::handle_values`].
    Read {
        /// Of which diff.
        diff: DiffId,
        /// A part of what the walk found.
        found: Arc<Difference>,
        /// Where to begin.
        from: usize,
        /// How many bytes.
        max_bytes: usize,
    },
    /// Put what has been written into the log, mark its head ([`Log::mark`]) and snapshot the
    /// server's tree, in one turn, then
    /// [`Session::handle_mark`].
    Mark(DiffId),
    /// The diff is over: stop its Differ, give its place back, [`Log::unmark`].
    EndDiff {
        /// Which.
        diff: DiffId,
        /// `None` if it was done.
        aborted: Option<AbortReason>,
        /// What was found and sent.
        served: Served,
    },
    /// Compute the root of this tree away from everything else, then [`Session::handle_root`].
    Root(Revision, Tree),
    /// The follower's root at a mark.
    Verified {
        /// The mark.
        revision: Revision,
        /// Whether it is the server's.
        equal: bool,
    },
    /// The cursor fell off the log and goes on behind this revision.
    FellBehind(Revision),
    /// Send what [`Session::poll_transmit`] still has, then close.
    Close(Close),
}

/// What the actor answers to an [`Event`], as a value that can be sent and kept: each is the argument of the
/// method that the event names. [`Session::handle_reply`] takes any.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub enum Reply {
    /// [`Session::handle_subscribed`].
    Subscribed(Position, Way, Position),
    /// [`Session::handle_shortened`].
    Shortened(Option<Shortened>),
    /// [`Session::handle_admitted`].
    Admitted(DiffId),
    /// [`Session::handle_busy`].
    Busy(DiffId),
    /// [`Session::handle_snapshot`].
    Snapshot(DiffId, Tree),
    /// [`Session::handle_step`].
    Step(DiffId, Step),
    /// [`Session::handle_collected`].
    Collected(DiffId, Vec<Entry>, Vec<Path>),
    /// [`Session::handle_walk_failed`].
    WalkFailed(DiffId),
    /// [`Session::handle_bad_answer`].
    BadAnswer(DiffId, ProtocolError),
    /// [`Session::handle_values`].
    Values(DiffId, Values),
    /// [`Session::handle_mark`].
    Mark(DiffId, Revision, Tree),
    /// [`Session::handle_root`].
    Root(Revision, Hash),
    /// [`Session::handle_close`].
    Close(Reason, String),
}

/// What a diff was for the server.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash, Serialize, Deserialize)]
pub struct Served {
    /// Queries of the walk that waited for an answer.
    pub rounds: u32,
    /// Keys to write, as the walk found them.
    pub writes: u64,
    /// Prefixes to delete at, as the walk found them.
    pub deletes: u64,
    /// Keys that were left out because they were updated meanwhile.
    pub suppressed: u64,
    /// Keys that could not be read.
    pub failed: u64,
}

/// Why a connection ends. For a log and for people.
#[derive(Clone, Debug, PartialEq, Eq, Hash, thiserror::Error)]
pub enum Close {
    /// The peer said so.
    #[error("peer left: {reason}{}{text}", if text.is_empty() { "" } else { ": " })]
    Peer {
        /// Its reason.
        reason: Reason,
        /// Its text: 1,024 bytes of it at the most, with a space for each control character.
        text: String,
    },
    /// This end says so.
    #[error("{reason}{}{text}", if text.is_empty() { "" } else { ": " })]
    Here {
        /// The reason that the peer is given.
        reason: Reason,
        /// The text that the peer is given.
        text: String,
    },
}

/// What goes on the wire next.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub enum Transmit {
    /// A frame of the log, as it is.
    Live(Bytes),
    /// A message, to be encoded.
    Message(ToClient),
    /// Frames of the log, to be put together into one.
    Joined(Joined),
    /// Frames of the log of which not all is needed, to be encoded again as one.
    Part(Part),
}

/// Consecutive frames of the log, for a follower that missed them: written one by one they may be as
/// many frames as changes.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub struct Joined(Vec<Chunk>);

impl Joined {
    /// The one frame that goes on the wire. Copies, so not while others wait for the log.
    pub fn frame(&self) -> Bytes {
        let mut frame = LiveFrame::default();
        for chunk in &self.0 {
            frame.append(chunk.frame.get(chunk.body..).unwrap_or_default(), chunk.keys.len());
        }
        let first = self.0.first().map(|chunk| (chunk.first, chunk.before));
        let (first, before) = first.unwrap_or((Revision::ZERO, Chain::START));
        frame.take(first, &before)
    }
}

/// Frames of the log, and which of their changes count.
#[derive(Clone, Debug, Default, PartialEq, Eq, Hash)]
pub struct Part {
    revision: Revision,
    frames: Vec<Bytes>,
    /// One a change of all frames.
    counts: Vec<bool>,
}

impl Part {
    /// The message that goes on the wire. Decodes the frames, so not while others wait for the log.
    ///
    /// # Panics
    /// If one is no frame of a log.
    pub fn message(self, limits: &Limits) -> ToClient {
        let changes = self.frames.iter().flat_map(|frame| {
            let payload = frame.get(HEADER_BYTES..).unwrap_or_default();
            let ToClient::Live { changes, .. } =
                wire::decode(payload, limits).expect("the log holds what was encoded for it")
            else {
                unreachable!("the log holds live frames");
            };
            changes.0
        });
        let counting = changes.zip(self.counts).filter(|(_, counts)| *counts);
        let changes = Changes(counting.map(|(change, _)| change).collect());
        ToClient::CatchUp { revision: self.revision, changes }
    }
}

impl Session {
    /// A session that waits for `Hello`. `now` is counted from whatever the caller likes.
    pub fn new(config: SessionConfig, follower: FollowerId, now: Duration) -> Self {
        Self {
            config,
            follower,
            state: State::Hello,
            cursor: Revision::ZERO,
            missed: None,
            way: None,
            stopping: false,
            jumps: 0,
            last_diff: DiffId(0),
            unacknowledged: 0,
            mark_due: None,
            verifying: None,
            checkpoint: (0, true),
            checking: VecDeque::new(),
            forgotten: None,
            answer_until: None,
            heartbeat: Heartbeat::new(config.heartbeat, now),
            whole: now,
            progress: 0,
            progressed: (0, now),
            events: VecDeque::new(),
            control: VecDeque::new(),
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
    pub fn handle_message(&mut self, message: ToServer, now: Duration) {
        self.heartbeat.heard(now);
        self.whole = now;
        if let Err(error) = self.accept(message) {
            self.close(Reason::Protocol, error.to_string());
        }
    }

    /// Bytes arrived that are not a whole message yet: the peer is alive. If that takes long, it is told that this end is: a `Ping` of it
    /// would stand behind them.
    pub fn handle_part(&mut self, now: Duration) {
        self.heartbeat.heard(now);
        // All else that comes is short.
        if self.waits_for_answer() {
            self.progress += 1;
        }
        let subscribed =
            !matches!(self.state, State::Hello | State::Subscribing(_) | State::Closed);
        if subscribed && now.saturating_sub(self.whole) >= self.config.heartbeat.ping_after {
            self.whole = now;
            self.say_once(ToClient::Pong {});
        }
    }

    /// The peer took some bytes for which there had been no room: it is alive, and what it is sent is on its way.
    pub fn handle_room(&mut self, now: Duration) {
        self.heartbeat.heard(now);
        self.progress += 1;
    }

    /// Whether a query is with the follower.
    fn waits_for_answer(&self) -> bool {
        matches!(&self.state, State::Diff(at) if matches!(at.phase, Phase::Walk { asked: true }))
    }

    /// Unless that is to be said already.
    fn say_once(&mut self, message: ToClient) {
        if !self.control.contains(&message) {
            self.control.push_back(message);
        }
    }

    /// A frame arrived that is no message.
    pub fn handle_malformed(&mut self, error: &DecodeError) {
        let version = matches!(error, DecodeError::Version { .. });
        let reason = if version { Reason::Version } else { Reason::Protocol };
        self.handle_close(reason, error.to_string());
    }

    fn accept(&mut self, message: ToServer) -> Result<(), ProtocolError> {
        let got = message.name();
        let state = std::mem::replace(&mut self.state, State::Closed);
        let unexpected = ProtocolError::Unexpected { state: state.name(), got };
        self.state = match (state, message) {
            (State::Closed, _) => State::Closed,
            (State::Hello, hello @ ToServer::Hello { .. }) => self.greet(hello),
            (State::Hello, _) => return Err(unexpected),
            (state, ToServer::Ping {}) => {
                // One answer is enough for however many were asked.
                self.say_once(ToClient::Pong {});
                state
            }
            (state, ToServer::Pong {}) => state,
            (_, ToServer::Farewell { reason, text }) => {
                self.control.clear();
                self.end(Close::Peer { reason, text: said(&text) });
                State::Closed
            }
            (State::Subscribing(_) | State::CatchUp(_), _) | (_, ToServer::Hello { .. }) => {
                return Err(unexpected);
            }
            (State::Relay, ToServer::SyncReq { diff, jumps, full, root, len, max_deletes })
                if (diff > self.last_diff || self.broken.breaks(Mutation::DiffNumberTwice))
                    && self.may_ask() =>
            {
                self.last_diff = diff;
                self.checking.clear();
                (self.forgotten, self.answer_until) = (None, None);
                let asked = Diff::asked_for(diff, full, root, len, self.cursor, max_deletes);
                self.request(jumps, asked)
            }
            (State::Relay | State::Diff(_), ToServer::SyncReq { .. }) => return Err(unexpected),
            (State::Diff(at), ToServer::SyncResponse { diff, answer: Raw(answer) })
                if diff == at.id || self.broken.breaks(Mutation::AnswerOfAnyDiff) =>
            {
                self.answer_until = None;
                State::Diff(self.answered(at, answer).ok_or(unexpected)?)
            }
            // It crossed the abort of its diff.
            (state, ToServer::SyncResponse { diff, .. })
                if DiffId(0) < diff && diff <= self.last_diff =>
            {
                state
            }
            (_, ToServer::SyncResponse { .. }) => return Err(unexpected),
            (_, ToServer::RepairAck { diff, .. })
                if diff != self.last_diff && !self.broken.breaks(Mutation::AckOfAnyDiff) =>
            {
                return Err(unexpected);
            }
            (mut state, ToServer::RepairAck { micros, .. }) => {
                self.unacknowledged = self.unacknowledged.checked_sub(1).ok_or(unexpected)?;
                self.progress += 1;
                if let State::Diff(at) = &mut state
                    && let Phase::Repair(repair) = &mut at.phase
                {
                    repair.applied(Duration::from_micros(micros.into()));
                }
                state
            }
            // Who asks for a diff has done with comparing.
            (State::Diff(_), ToServer::Verified { .. }) => return Err(unexpected),
            (state, ToServer::Verified { revision, root }) => {
                if !self.verified(revision, root) {
                    return Err(unexpected);
                }
                state
            }
        };
        Ok(())
    }

    /// Whether a diff may be asked for: what was missed has been sent, and the last diff is done with at both ends.
    fn may_ask(&self) -> bool {
        let compared = self.mark_due.is_none() && self.verifying.is_none();
        let free = self.missed.is_none() && self.unacknowledged == 0;
        free && (compared || self.broken.breaks(Mutation::DiffWhileComparing))
    }

    /// The follower's root at a mark. Whether it is one that may come.
    fn verified(&mut self, revision: Revision, root: Hash) -> bool {
        let ended = self.verifying.take_if(|(mark, _)| *mark == revision);
        let Some((_, ours)) = ended.or_else(|| self.check(revision)) else {
            return self.forgotten >= Some(revision);
        };
        // A checkpoint where a diff ended has the root that the diff still waits for.
        self.mark_due.take_if(|due| *due == revision);
        self.events.push_back(Event::Verified { revision, equal: root == ours });
        true
    }

    /// The checkpoint at this revision, if its root was sent and is not answered. A follower that says one skips those before.
    fn check(&mut self, revision: Revision) -> Option<(Revision, Hash)> {
        let at = self.checking.iter().position(|(mark, _)| *mark == revision)?;
        self.checking.drain(..=at).next_back()
    }

    /// An answer for the Differ, if one is waited for.
    fn answered(&mut self, mut at: Box<Diff>, answer: Answer) -> Option<Box<Diff>> {
        let Phase::Walk { asked } = &mut at.phase else { return None };
        self.progress += 1;
        std::mem::take(asked).then(|| {
            self.events.push_back(Event::Answer(at.id, answer));
            at
        })
    }

    fn greet(&mut self, hello: ToServer) -> State {
        let ToServer::Hello { version, tree, frame_bytes, key_bytes, value_bytes, name, position } =
            hello
        else {
            return State::Hello;
        };
        let limits = &self.config.limits;
        let fits = frame_bytes >= limits.frame_bytes as u64
            && key_bytes >= limits.key_bytes as u64
            && value_bytes >= limits.value_bytes as u64;
        if version != VERSION {
            let theirs = DecodeError::Version { theirs: version, ours: VERSION };
            self.close(Reason::Version, theirs.to_string());
        } else if tree != TREE_VERSION {
            let text = format!("peer has tree version {tree}, this end {TREE_VERSION}");
            self.close(Reason::Tree, text);
        } else if !fits {
            let theirs = (frame_bytes, key_bytes, value_bytes);
            self.close(Reason::Limits, limits_text(theirs, limits));
        } else {
            let name = clip(&name, NAME_BYTES).to_owned();
            self.events.push_back(Event::Subscribe { name, position });
            return State::Subscribing(None);
        }
        State::Closed
    }

    fn request(&mut self, jumps: u32, mut diff: Diff) -> State {
        if jumps != self.jumps && !self.broken.breaks(Mutation::StaleRoot) {
            diff.root = None;
        }
        self.events.push_back(Event::Admit(diff.id));
        State::Diff(Box::new(diff))
    }

    // What comes from the server and the Differ.

    /// The follower is subscribed: it will be sent every change behind this position, which is its own
    /// if it is resumed ([`Log::way`]), the log's head if not. `head` is where the log stands.
    pub fn handle_subscribed(&mut self, at: Position, way: Way, head: Position) {
        if self.state != State::Subscribing(None) {
            return;
        }
        let changes = head.revision.0.saturating_sub(at.revision.0);
        self.missed = way.resumes().then_some(head);
        if way == Way::Resumed
            && changes > WORTH_SHORTENING
            && changes <= self.config.shorten_changes as u64
        {
            self.state = State::Subscribing(Some(at));
            self.events.push_back(Event::Shorten(at.revision, head));
        } else {
            self.welcome(at, way, State::Relay);
        }
    }

    /// Which of the changes that were missed count. If that is not known, or spares nothing, all of them
    /// are sent.
    pub fn handle_shortened(&mut self, shortened: Option<Shortened>) {
        let State::Subscribing(Some(at)) = self.state else { return };
        match shortened.filter(|shortened| shortened.dropped() >= WORTH_SHORTENING) {
            Some(shortened) => self.welcome(at, Way::Shortened, State::CatchUp(shortened)),
            None => self.welcome(at, Way::Resumed, State::Relay),
        }
    }

    fn welcome(&mut self, at: Position, way: Way, state: State) {
        self.state = state;
        self.way = Some(way);
        self.cursor = at.revision.next();
        if let Some(head) = self.missed
            && self.broken.breaks(Mutation::ResumeAtHead)
        {
            self.cursor = head.revision.next();
        }
        self.control.push_back(ToClient::welcome(at, way, &self.config.limits));
    }

    /// The diff may run.
    pub fn handle_admitted(&mut self, diff: DiffId) {
        let late = self.broken.breaks(Mutation::RecordAfterSnapshot);
        if let Some(at) = self.diff(diff)
            && at.phase == Phase::Queued
        {
            // In this order: record, then snapshot.
            at.recording = !late;
            at.phase = Phase::Snapshot;
            self.progress += 1;
            self.control.push_back(ToClient::SyncStart { diff });
            self.events.push_back(Event::Snapshot(diff));
        }
    }

    /// There are too many diffs waiting already.
    pub fn handle_busy(&mut self, diff: DiffId) {
        self.abort(diff, AbortReason::Busy);
    }

    /// The snapshot of the server's tree.
    pub fn handle_snapshot(&mut self, diff: DiffId, tree: Tree) {
        let (most, cursor) = (self.config.part_keys, self.cursor);
        let Some(at) = self.diff(diff) else { return };
        match &mut at.phase {
            Phase::Snapshot => {
                at.recording = true;
                at.phase = Phase::Walk { asked: false };
                let full = at.full;
                let sent = cursor.0.saturating_sub(at.asked_at.0);
                let little = sent <= tree.len() as u64 / WORTH_WALKING;
                let nothing = at.len == 0 && at.root.is_some() && little;
                // Nor is there anything to compare that of an empty table with, for which all that changed would be hashed.
                let root = at.root.filter(|_| nothing || at.len > 0);
                let len = if nothing { 0 } else { at.len.saturating_add(sent).max(1) };
                self.events.push_back(Event::Walk { diff, tree, root, len, full });
            }
            Phase::Repair(repair) if repair.collecting && !repair.rest.is_empty() => {
                let rest = std::mem::take(&mut repair.rest);
                self.events.push_back(Event::Collect { diff, tree, rest, most });
            }
            Phase::Queued | Phase::Walk { .. } | Phase::Repair(_) | Phase::Mark { .. } => {}
        }
    }

    /// The Differ asks or is done.
    pub fn handle_step(&mut self, diff: DiffId, step: Step) {
        let ends = self.broken.breaks(Mutation::RecordingEndsWithWalk);
        let hold = !self.broken.breaks(Mutation::HeldRepairsSent);
        let most_bytes = self.repair_bytes();
        let Some(at) = self.diff(diff) else { return };
        let diff = at.id;
        let Phase::Walk { asked } = &mut at.phase else { return };
        match step {
            Step::Ask(query) => {
                *asked = true;
                at.served.rounds += 1;
                self.answer_until = Some(Duration::MAX);
                self.progress += 1;
                self.control.push_back(ToClient::SyncRequest { diff, query });
            }
            Step::Done(Found { first: found, writes, rest }) => {
                let deletes = found.deletes.len() as u64;
                (at.served.writes, at.served.deletes) = (writes, deletes);
                let held = hold && deletes > at.max_deletes;
                at.recording = !ends;
                at.phase = Phase::Repair(Repair {
                    rest,
                    collecting: false,
                    waits: false,
                    found,
                    part: Arc::default(),
                    next: 0,
                    max_bytes: FIRST_REPAIR_BYTES.min(most_bytes),
                    most_bytes,
                    ready: None,
                    held_bytes: 0,
                    sent: 0,
                    failed: BTreeSet::new(),
                });
                self.progress += 1;
                self.control.push_back(ToClient::SyncSeq { diff, writes, deletes });
                if held {
                    self.abort(diff, AbortReason::Held);
                } else {
                    self.look_on(diff);
                    self.read_on(diff);
                }
            }
        }
    }

    /// The next part of what was found, and what is left of the rest.
    pub fn handle_collected(&mut self, diff: DiffId, writes: Vec<Entry>, rest: Vec<Path>) {
        if let Some(at) = self.diff(diff)
            && let Phase::Repair(repair) = &mut at.phase
            && repair.collecting
        {
            repair.found.writes = writes;
            (repair.rest, repair.collecting) = (rest, false);
            let waits = std::mem::take(&mut repair.waits);
            self.progress += 1;
            self.look_on(diff);
            if waits {
                self.read_on(diff);
            }
        }
    }

    /// Of what the walk found, the next part that is to be read, and more of the rest where there is no other.
    fn look_on(&mut self, diff: DiffId) {
        let broken = self.broken;
        let Some(at) = self.diff(diff) else { return };
        let Phase::Repair(repair) = &mut at.phase else { return };
        repair.look_on(&at.updated, broken);
        if repair.found.is_empty() && !repair.rest.is_empty() && !repair.collecting {
            repair.collecting = true;
            self.events.push_back(Event::Snapshot(diff));
        }
    }

    /// The Differ ended without a result, or the next part was not collected. Another diff may do better.
    pub fn handle_walk_failed(&mut self, diff: DiffId) {
        let works = |at: &Diff| match &at.phase {
            Phase::Walk { .. } => true,
            Phase::Repair(repair) => repair.collecting,
            Phase::Queued | Phase::Snapshot | Phase::Mark { .. } => false,
        };
        if self.diff(diff).is_some_and(|at| works(at)) {
            self.abort(diff, AbortReason::Walk);
        }
    }

    /// The Differ says that an answer was malformed.
    pub fn handle_bad_answer(&mut self, diff: DiffId, error: &ProtocolError) {
        if self.diff(diff).is_some() {
            self.close(Reason::Protocol, error.to_string());
        }
    }

    /// What the server read for a repair.
    pub fn handle_values(&mut self, diff: DiffId, mut values: Values) {
        let early = self.broken.breaks(Mutation::SuppressAtReading);
        let most_failed = self.config.updated_keys;
        if let Some(at) = self.diff(diff)
            && let Phase::Repair(repair) = &mut at.phase
            && repair.ready.is_none()
        {
            repair.next = values.next;
            repair.failed.extend(&values.failed);
            let unreadable = repair.failed.len() > most_failed;
            if early {
                at.updated.suppress(&mut values, true);
            }
            repair.ready = Some(values);
            if unreadable {
                return self.abort(diff, AbortReason::Walk);
            }
            // Here and not where the next reading is asked for, which is beside the log.
            self.look_on(diff);
        }
    }

    /// The log is marked at this revision, and this is the server's tree there. The stream may have
    /// passed it meanwhile.
    pub fn handle_mark(&mut self, diff: DiffId, revision: Revision, tree: Tree) {
        if let Some(at) = self.diff(diff)
            && let Phase::Mark { mark, .. } = &mut at.phase
        {
            *mark = Some(revision);
        } else if self.mark_due != Some(revision) {
            return;
        }
        self.events.push_back(Event::Root(revision, tree));
    }

    /// The root of the tree at a mark. That of an earlier diff's mark may come late, and is of no use.
    pub fn handle_root(&mut self, revision: Revision, root: Hash) {
        if self.mark_due == Some(revision) {
            self.verify(revision, root);
        } else if let State::Diff(at) = &mut self.state
            && let Phase::Mark { mark, root: early, .. } = &mut at.phase
            && *mark == Some(revision)
        {
            // The follower has not been told of the mark yet.
            *early = Some(root);
        }
    }

    fn verify(&mut self, revision: Revision, root: Hash) {
        self.mark_due = None;
        self.verifying = Some((revision, root));
        self.control.push_back(ToClient::Verify { revision, root });
    }

    // Time, and the end.

    /// When to call [`Session::handle_timeout`] next; `None` when closed.
    pub fn poll_timeout(&self) -> Option<Duration> {
        match &self.state {
            State::Closed => None,
            State::Hello | State::Subscribing(_) | State::CatchUp(_) | State::Relay => {
                Some(self.heartbeat.next())
            }
            State::Diff(_) => Some(
                self.heartbeat.next().min(self.progressed.1.saturating_add(self.config.diff_stall)),
            ),
        }
    }

    /// An answer to an [`Event`].
    pub fn handle_reply(&mut self, reply: Reply) {
        match reply {
            Reply::Subscribed(at, way, head) => self.handle_subscribed(at, way, head),
            Reply::Shortened(shortened) => self.handle_shortened(shortened),
            Reply::Admitted(diff) => self.handle_admitted(diff),
            Reply::Busy(diff) => self.handle_busy(diff),
            Reply::Snapshot(diff, tree) => self.handle_snapshot(diff, tree),
            Reply::Step(diff, step) => self.handle_step(diff, step),
            Reply::Collected(diff, writes, rest) => self.handle_collected(diff, writes, rest),
            Reply::WalkFailed(diff) => self.handle_walk_failed(diff),
            Reply::BadAnswer(diff, error) => self.handle_bad_answer(diff, &error),
            Reply::Values(diff, values) => self.handle_values(diff, values),
            Reply::Mark(diff, revision, tree) => self.handle_mark(diff, revision, tree),
            Reply::Root(revision, root) => self.handle_root(revision, root),
            Reply::Close(reason, text) => self.handle_close(reason, text),
        }
    }

    /// It is this late now.
    pub fn handle_timeout(&mut self, now: Duration) {
        if self.state == State::Closed {
            return;
        }
        self.watch_answer(now);
        self.watch_diff(now);
        match self.heartbeat.beat(now) {
            Beat::Quiet => {}
            // Before the handshake there is nobody to ask: silence is counted all the same.
            Beat::Ping if matches!(self.state, State::Hello) => {}
            Beat::Ping => self.say_once(ToClient::Ping {}),
            Beat::Dead => self.close(Reason::Silent, String::new()),
        }
    }

    /// Gives an answer that nobody waits for any more its time, and no more.
    fn watch_answer(&mut self, now: Duration) {
        self.answer_until = match self.answer_until {
            Some(Duration::MAX) if !self.waits_for_answer() => {
                Some(now.saturating_add(self.config.diff_stall))
            }
            until => until.filter(|until| now < *until),
        };
    }

    /// Aborts a diff that has a place and makes no use of it.
    fn watch_diff(&mut self, now: Duration) {
        let (counted, since) = self.progressed;
        match &self.state {
            State::Diff(at) if at.waits_for_follower() && counted == self.progress => {
                if now.saturating_sub(since) >= self.config.diff_stall {
                    self.abort(at.id, AbortReason::Stalled);
                }
            }
            State::Diff(_)
            | State::Hello
            | State::Subscribing(_)
            | State::CatchUp(_)
            | State::Relay
            | State::Closed => self.progressed = (self.progress, now),
        }
    }

    /// The server stops: the connection ends as soon as the stream has reached the end of the log.
    pub fn handle_stop(&mut self) {
        match self.state {
            State::Closed => {}
            State::Hello | State::Subscribing(_) => self.close(Reason::Stopping, String::new()),
            State::CatchUp(_) | State::Relay | State::Diff(_) => self.stopping = true,
        }
    }

    /// The connection is to end, for this reason: says so.
    pub fn handle_close(&mut self, reason: Reason, text: impl Into<String>) {
        if self.state != State::Closed {
            self.close(reason, text.into());
        }
    }

    fn close(&mut self, reason: Reason, text: String) {
        let text = clip(&text, TEXT_BYTES).to_owned();
        let said = text.clone();
        self.control.push_back(if self.way.is_some() {
            ToClient::Farewell { reason, text: said }
        } else {
            ToClient::Refuse { reason, text: said }
        });
        self.end(Close::Here { reason, text });
    }

    fn end(&mut self, close: Close) {
        self.state = State::Closed;
        // Nothing comes behind the last words.
        self.mark_due = None;
        self.events.push_back(Event::Close(close));
    }

    // What goes out.

    /// What the actor must do next.
    pub fn poll_event(&mut self) -> Option<Event> {
        self.events.pop_front()
    }

    /// What goes on the wire next, now that there is room; `None` when there is nothing.
    ///
    /// This is where the order of frames is decided: control messages, then a jump if the log no
    /// longer has what comes next, then the end mark if the stream stands there, then a repair if
    /// it is its turn, then live changes.
    pub fn poll_transmit(&mut self, log: &Log) -> Option<Transmit> {
        if self.control.is_empty()
            && let Some(part) = self.catch_up(log)
        {
            return Some(Transmit::Part(part));
        }
        if self.control.is_empty() && matches!(self.state, State::Relay | State::Diff(_)) {
            let next = log.at(self.cursor);
            if next == Next::Fell {
                self.jump(log);
            } else {
                self.end_at_mark(log);
                self.end_of_missed();
                self.pass_checkpoint(log);
                self.repair();
            }
            if self.control.is_empty()
                && let Next::Chunk(chunk) = next
            {
                return Some(self.send_from(chunk, log));
            }
            if self.control.is_empty() && self.stopping {
                self.close(Reason::Stopping, String::new());
            }
        }
        self.control.pop_front().map(Transmit::Message)
    }

    /// Says so when a follower that was resumed has been sent all that it had missed.
    fn end_of_missed(&mut self) {
        let early = self.broken.breaks(Mutation::CaughtUpEarly);
        let sent = |missed: &mut Position| early || missed.revision.next() == self.cursor;
        if let Some(Position { revision, chain, .. }) = self.missed.take_if(sent) {
            self.control.push_back(ToClient::CaughtUp { revision, chain });
        }
    }

    /// A frame of the log, or what a follower missed as far as it fits one. Not beside a diff, whose mark the
    /// stream must not pass.
    fn send_from(&mut self, chunk: &Chunk, log: &Log) -> Transmit {
        let frame = self.send_live(chunk);
        // Nothing is kept for a follower that missed nothing: that is every frame to everybody.
        let mut joined = Vec::new();
        let mut room = self.joined_bytes().saturating_sub(frame.len());
        let mut changes = chunk.keys.len();
        while self.state == State::Relay
            && self.missed.is_some_and(|missed| self.cursor <= missed.revision)
            && let Next::Chunk(next) = log.at(self.cursor)
            && next.frame.len() <= room
            && changes + next.keys.len() <= limits::MAX_CHANGES
        {
            room -= next.frame.len();
            changes += next.keys.len();
            self.send_live(next);
            if joined.is_empty() {
                joined.push(chunk.clone());
            }
            joined.push(next.clone());
        }
        if joined.is_empty() { Transmit::Live(frame) } else { Transmit::Joined(Joined(joined)) }
    }

    /// How large a frame of several is at most.
    fn joined_bytes(&self) -> usize {
        self.config.missed_bytes.min(self.config.limits.frame_bytes)
    }

    /// The next frame of a shortened catch-up that has something that counts; at its end, says so.
    fn catch_up(&mut self, log: &Log) -> Option<Part> {
        let State::CatchUp(shortened) = &self.state else { return None };
        let Some(next) = shortened.next(self.cursor) else {
            self.cursor = shortened.end().revision.next();
            self.state = State::Relay;
            self.end_of_missed();
            return None;
        };
        if log.holding(next).is_none() {
            self.state = State::Relay;
            self.jump(log);
            return None;
        }
        let mut part = Part::default();
        let (mut room, mut next) = (self.joined_bytes(), Some(next));
        while let Some(chunk) = next.and_then(|next| log.holding(next))
            && (part.frames.is_empty() || chunk.frame.len() <= room)
            && part.counts.len() + chunk.keys.len() <= limits::MAX_CHANGES
        {
            room = room.saturating_sub(chunk.frame.len());
            self.cursor = chunk.end();
            part.revision = Revision(chunk.end().0 - 1);
            part.frames.push(chunk.frame.clone());
            let revisions = (chunk.first.0..chunk.end().0).map(Revision);
            part.counts.extend(revisions.map(|at| shortened.counts(at)));
            next = shortened.next(self.cursor);
        }
        Some(part)
    }

    fn send_live(&mut self, chunk: &Chunk) -> Bytes {
        self.cursor = chunk.end();
        if let State::Diff(at) = &mut self.state
            && at.recording
        {
            at.updated.extend(&chunk.keys);
            if let Phase::Repair(Repair { ready: Some(values), held_bytes, .. }) = &mut at.phase
                && chunk.first <= values.revision
            {
                *held_bytes += chunk.frame.len();
            }
            let (id, full) = (at.id, at.updated.exceeds(self.config.updated_keys));
            if full && !self.broken.breaks(Mutation::UpdatedUnbounded) {
                self.abort(id, AbortReason::Updated);
            }
        }
        chunk.frame.clone()
    }

    /// Rule 7.
    fn jump(&mut self, log: &Log) {
        if let State::Diff(at) = &mut self.state {
            let id = at.id;
            if at.phase != Phase::Queued {
                if !self.broken.breaks(Mutation::JumpKeepsDiff) {
                    self.abort(id, AbortReason::FellBehind);
                }
            } else if !self.broken.breaks(Mutation::StaleRoot) {
                at.root = None;
            }
        }
        self.jumps = self.jumps.wrapping_add(1);
        self.missed = None;
        self.cursor = log.head().next();
        let (jumps, revision, chain) = (self.jumps, log.head(), log.chain());
        self.control.push_back(ToClient::FellBehind { jumps, revision, chain });
        self.events.push_back(Event::FellBehind(revision));
    }

    /// Rule 6.
    fn end_at_mark(&mut self, log: &Log) {
        let State::Diff(at) = &self.state else { return };
        let Phase::Mark { suppressed, failed, root, .. } = at.phase else { return };
        let (diff, served) = (at.id, Served { suppressed, failed, ..at.served });
        let Some((revision, chain)) = log.marked(self.follower, diff) else { return };
        if self.cursor < revision.next() && !self.broken.breaks(Mutation::EndMarkOvertakes)
            || self.cursor <= log.head() && self.broken.breaks(Mutation::LivePassesMark)
        {
            return;
        }
        self.state = State::Relay;
        self.events.push_back(Event::EndDiff { diff, aborted: None, served });
        let chain = chain.tag();
        self.control.push_back(ToClient::SyncDone { diff, revision, chain, suppressed, failed });
        self.mark_due = Some(revision);
        if let Some(root) = root {
            self.verify(revision, root);
        }
    }

    /// Marks the newest checkpoint if the stream stands there, and sends its root when it is known. A
    /// stream that passed its place before it was set has missed it, and waits for the next.
    fn pass_checkpoint(&mut self, log: &Log) {
        let Some(newest) = log.checkpoint() else { return };
        let (number, told) = self.checkpoint;
        // Whoever runs a diff compares at its end.
        let open = self.state == State::Relay;
        let here =
            self.cursor == newest.revision.next() || self.broken.breaks(Mutation::MarkAnywhere);
        if newest.number != number && here && open {
            self.checkpoint = (newest.number, false);
            self.control.push_back(ToClient::Mark { revision: newest.revision });
        } else if newest.number == number
            && !told
            && let Some(root) = newest.root
        {
            self.checkpoint = (number, true);
            // On a quiet stream it is the same place again, and each is answered.
            if self.checking.len() == MAX_CHECKING {
                self.forgotten = self.checking.pop_front().map(|(mark, _)| mark);
            }
            self.checking.push_back((newest.revision, root));
            self.control.push_back(ToClient::Verify { revision: newest.revision, root });
        }
    }

    /// Rules 3, 4 and 5: sends the repairs that were read, if the stream has come far enough.
    fn repair(&mut self) {
        let hold = !self.broken.breaks(Mutation::NoHold);
        let late = !self.broken.breaks(Mutation::NoSuppression)
            && !self.broken.breaks(Mutation::SuppressAtReading);
        let deletes = !self.broken.breaks(Mutation::NoDeleteSuppression);
        let window = self.unacknowledged < self.config.repair_window.max(1)
            || self.broken.breaks(Mutation::NoWindow);
        let State::Diff(at) = &mut self.state else { return };
        let Phase::Repair(repair) = &mut at.phase else { return };
        let due = |values: &mut Values| !hold || self.cursor > values.revision;
        let Some(mut values) = repair.ready.take_if(|values| window && due(values)) else { return };

        if late {
            at.updated.suppress(&mut values, deletes);
        }
        repair.sent += (values.writes.len() + values.deletes.len()) as u64;
        self.progress += 1;
        let diff = at.id;
        if !values.writes.is_empty() || !values.deletes.is_empty() {
            self.unacknowledged += 1;
            self.control.push_back(repair_message(diff, values));
        }
        self.read_on(diff);
    }

    /// How large a repair is at most.
    fn repair_bytes(&self) -> usize {
        let fits = self.config.limits.frame_bytes.saturating_sub(limits::FRAME_OVERHEAD);
        self.config.repair_bytes.min(fits).max(1)
    }

    /// Asks for the next repairs, or for the mark when all have been sent.
    fn read_on(&mut self, diff: DiffId) {
        let most_bytes = self.repair_bytes();
        let Some(at) = self.diff(diff) else { return };
        let Phase::Repair(repair) = &mut at.phase else { return };
        if repair.next < repair.part.len() || !repair.found.is_empty() {
            repair.limit(most_bytes);
            let (found, from) = (Arc::clone(&repair.part), repair.next);
            let max_bytes = repair.max_bytes;
            self.events.push_back(Event::Read { diff, found, from, max_bytes });
        } else if repair.collecting {
            repair.waits = true;
        } else {
            // A value that could not be read is no loss if a live change of its key came by.
            let failed = at.updated.count_others(&repair.failed);
            let Served { writes, deletes, .. } = at.served;
            let suppressed = (writes + deletes).saturating_sub(repair.sent + failed);
            at.phase = Phase::Mark { suppressed, failed, mark: None, root: None };
            at.recording = false;
            at.updated = Updated::default();
            self.events.push_back(Event::Mark(diff));
        }
    }

    fn abort(&mut self, diff: DiffId, reason: AbortReason) {
        if let Some(at) = self.diff(diff) {
            let served = at.served;
            self.state = State::Relay;
            self.control.push_back(ToClient::SyncAbort { diff, reason });
            self.events.push_back(Event::EndDiff { diff, aborted: Some(reason), served });
        }
    }

    /// The diff at hand, if it is this one. Rule 8.
    fn diff(&mut self, diff: DiffId) -> Option<&mut Diff> {
        let any = self.broken.breaks(Mutation::StaleDiffer);
        match &mut self.state {
            State::Diff(at) if at.id == diff || any => Some(at),
            State::Diff(_)
            | State::Hello
            | State::Subscribing(_)
            | State::CatchUp(_)
            | State::Relay
            | State::Closed => None,
        }
    }

    // What can be asked.

    /// The name of the state, as in the table above.
    pub fn state(&self) -> &'static str {
        self.state.name()
    }

    /// How the follower is brought to where the server is; `None` before the handshake is through.
    pub fn way(&self) -> Option<Way> {
        self.way
    }

    /// The diff that has a place, and how many things have happened since the session began: more of them since it was asked last is
    /// a diff that goes on.
    pub fn progress(&self) -> Option<(DiffId, u64)> {
        let State::Diff(at) = &self.state else { return None };
        (at.phase != Phase::Queued).then_some((at.id, self.progress))
    }

    /// How far the diff under way is: the name of its phase.
    pub fn phase(&self) -> Option<&'static str> {
        let State::Diff(at) = &self.state else { return None };
        Some(match at.phase {
            Phase::Queued => "Queued",
            Phase::Snapshot | Phase::Walk { .. } => "Walk",
            Phase::Repair(_) => "Repair",
            Phase::Mark { .. } => "Mark",
        })
    }

    /// The revision up to which changes are on the wire; meaningless before the handshake.
    pub fn sent(&self) -> Revision {
        Revision(self.cursor.0.saturating_sub(1))
    }

    /// Whether to read from the connection: not while what it was answered waits to be sent.
    pub fn wants_input(&self) -> bool {
        self.control.len() < MAX_CONTROL
    }

    /// How often the follower fell behind.
    pub fn jumps(&self) -> u32 {
        self.jumps
    }

    /// How large a frame the peer may send now.
    pub fn max_frame_bytes(&self) -> usize {
        if self.answer_until.is_some() && self.state != State::Closed {
            self.config.limits.frame_bytes
        } else {
            limits::SMALL_FRAME_BYTES
        }
    }
}

impl State {
    fn name(&self) -> &'static str {
        match self {
            Self::Hello => "Hello",
            Self::Subscribing(_) => "Subscribing",
            Self::CatchUp(_) => "CatchUp",
            Self::Relay => "Relay",
            Self::Diff(_) => "Diff",
            Self::Closed => "Closed",
        }
    }
}

impl Diff {
    /// Whether it goes on when the follower has answered, acknowledged or taken something, and not when this end is done.
    fn waits_for_follower(&self) -> bool {
        match &self.phase {
            Phase::Queued | Phase::Snapshot => false,
            Phase::Walk { asked } => *asked,
            Phase::Repair(repair) => repair.ready.is_some(),
            Phase::Mark { mark, .. } => mark.is_some(),
        }
    }

    fn asked_for(
        id: DiffId,
        full: bool,
        root: Hash,
        len: u64,
        asked_at: Revision,
        max_deletes: u64,
    ) -> Self {
        Self {
            id,
            full,
            root: Some(root),
            len,
            asked_at,
            max_deletes,
            served: Served::default(),
            recording: false,
            updated: Updated::default(),
            phase: Phase::Queued,
        }
    }
}

/// Both ends' limits, for whoever has to change one of them.
pub(crate) fn limits_text(theirs: (u64, u64, u64), ours: &Limits) -> String {
    let (frame, key, value) = theirs;
    let Limits { frame_bytes, key_bytes, value_bytes, .. } = ours;
    format!(
        "peer's frames, keys and values are of up to {frame}, {key} and {value} bytes, \
         this end's of up to {frame_bytes}, {key_bytes} and {value_bytes}"
    )
}

fn repair_message(diff: DiffId, values: Values) -> ToClient {
    let writes = values.writes.into_iter().map(|(_, key, value)| Change::Write { key, value });
    // All prefixes of one walk are of one length.
    let prefix_bytes = values.deletes.first().map_or(1, |prefix| prefix.as_bytes().len());
    let deletes: Vec<u8> = values.deletes.iter().flat_map(|p| p.as_bytes()).copied().collect();
    ToClient::Repair {
        diff,
        writes: Changes(writes.collect()),
        prefix_bytes: u8::try_from(prefix_bytes).unwrap_or(u8::MAX),
        deletes: Raw(deletes.into()),
    }
}
