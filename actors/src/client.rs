//! The Client: a follower's table, and the session that keeps it equal to the server's.
//!
//! Whoever embeds it starts it, and it starts its Middleman. It applies live changes and repairs,
//! asks for a diff by itself whenever something may be missing (after every connect, when it fell
//! behind, when its store refused something, when roots differ), and answers the user. What is
//! long (roots, answers of the walk) is computed on threads that may block, from snapshots.
//!
//! | message | answer | from |
//! |---|---|---|
//! | [`Apply`] | done, or why not | user: local filling |
//! | [`Ready`] | at once; the Middleman connects | user |
//! | [`Diff`] | how the diff ended | user |
//! | [`WaitFor`], [`WaitReady`] | when the table has reached a revision, or lacks nothing | user |
//! | [`GetStatus`], [`Subscribe`] | what is asked for | user |
//! | [`ContinueFrom`] | at once | user |
//! | [`AllowMassDelete`] | at once: whether there is a connection | user |
//! | [`Stop`] | where the table stood, when the connection has been told farewell | user |
//! | `LinkUp`, `LinkDown`, `Unreached`, `Received`, `Heard`, `Malformed` | | Middleman |

pub(crate) mod backoff;
pub mod middleman;

use std::collections::BTreeMap;
use std::collections::btree_map::Entry;
use std::fmt;
use std::sync::Arc;
use std::time::Duration;

use actix::prelude::*;
use actix_rt::ArbiterHandle;
use tablecast_protocol::client::{Counts, DiffPhase, Output, Progress, RootOf, Session};
use tablecast_protocol::diff::{Query, answer};
use tablecast_protocol::server::Close;
use tablecast_protocol::{
    Change, Correction, DiffId, Digest, Epoch, Hash, Key, Position, ProtocolError, Reason, Replica,
    Revision, StoreError, ToClient, Tree, Value, Way, scrub,
};
use tokio::sync::{broadcast, oneshot};
use tokio::time::Instant;
use tracing::{debug, info, warn};

use crate::access::Access;
use crate::access::codec::LAST_WORDS;
use crate::budget::{Budget, Later, computed, later};
use crate::compute::compute;
use crate::config::{ClientConfig, MAX_EVENTS, NEVER};
use crate::error::{AccessError, DiffAborted, DiffError, WaitError};
use crate::metrics;
use crate::server::root_of;
use crate::status::{ClientStatus, DiffOutcome, DiffReport, Health};
use backoff::Backoff;
use middleman::{Command, ConnectionId, HEARD_BYTES, Middleman};

/// Most keys that one look through the store puts right; then it is looked through once more.
const SCRUBBED_KEYS: usize = 1 << 16;

/// Of how many of them it is seen whether they are there behind the diff that puts them right.
const MAX_REPAIRED: usize = 1024;

/// A change of the follower's own table, beside the server: to fill it, or to break it in a test.
#[derive(Debug, Message)]
#[rtype(result = "Result<(), StoreError>")]
pub struct Apply(pub Change);

/// Connect, and stay connected.
#[derive(Debug, Message)]
#[rtype(result = "()")]
pub struct Ready;

/// Ask for a diff, and wait for its end.
#[derive(Debug, Message)]
#[rtype(result = "Result<DiffOutcome, DiffError>")]
pub struct Diff;

/// Wait until the table holds every change up to a revision of a history; answered with where it
/// stands then.
#[derive(Debug, Message)]
#[rtype(result = "Result<Position, WaitError>")]
pub struct WaitFor {
    /// The history.
    pub epoch: Epoch,
    /// The revision.
    pub revision: Revision,
    /// How long to wait.
    pub timeout: Duration,
}

/// Wait until nothing is known to be missing: the table has been equal to the server's since the connect.
/// Answered with where it stands then.
#[derive(Debug, Message)]
#[rtype(result = "Result<Position, WaitError>")]
pub struct WaitReady(pub Duration);

/// How the follower is.
#[derive(Debug, Message)]
#[rtype(result = "ClientStatus")]
pub struct GetStatus;

/// A subscription to what happens.
#[derive(Debug, Message)]
#[rtype(result = "broadcast::Receiver<Event>")]
pub struct Subscribe;

/// The table is as it was at this position, of an earlier [`Stop`]: it is presented to the server. Does
/// nothing once there was a connection, or the table has been changed since.
#[derive(Debug, Message)]
#[rtype(result = "()")]
pub struct ContinueFrom(pub Position);

/// The repair that is held, or would be, is meant, from the server of the connection at hand: diff at once,
/// and let that delete whatever it finds. Refused without a connection: the next server may be another one.
#[derive(Debug, Message)]
#[rtype(result = "Result<(), DiffError>")]
pub struct AllowMassDelete;

/// Says farewell to the server and ends. Answered when the server has heard it, or a second later at the latest, with where the
/// table stands; `None` if something may be missing.
#[derive(Debug, Message)]
#[rtype(result = "Option<Position>")]
pub struct Stop;

/// What happens to a follower.
#[derive(Clone, Debug)]
pub enum Event {
    /// The handshake is through; every change behind this place will come. A diff follows, unless the
    /// follower was resumed there.
    Connected(Position, Way),
    /// The connection ended. Another attempt follows.
    Disconnected(String),
    /// A change was applied.
    Change {
        /// The change.
        change: Change,
        /// Its revision; where the stream stands, for a repair; of changes that were missed and come one a key,
        /// that of a later one.
        revision: Revision,
        /// It is a repair.
        repair: bool,
    },
    /// Changes were missed; a diff follows.
    FellBehind(Revision),
    /// Roots were compared at a mark, and are not equal: the table has diverged without anybody noticing.
    /// A diff at full width follows.
    Diverged {
        /// The mark.
        revision: Revision,
        /// This table's root there.
        root: Hash,
        /// The server's root there.
        server_root: Hash,
    },
    /// How far the diff under way is, after every step of it.
    Progress(Progress),
    /// A diff found more to delete than [`MassDelete`](crate::MassDelete) allows, and changed nothing.
    /// The next one comes with the next connection, with `diff_every`, or when it is asked for;
    /// [`AllowMassDelete`] lets it through.
    Held {
        /// Keys that it would write.
        writes: u64,
        /// Keys that it would delete.
        deletes: u64,
        /// Keys that there were.
        keys: u64,
    },
    /// The store was looked through, and does not hold what was written: so many keys have been changed
    /// behind the follower's back. A diff follows.
    Corrupt {
        /// How many.
        keys: usize,
        /// One of them.
        example: Key,
    },
    /// A diff ended.
    Diff(DiffOutcome),
    /// The store refused a change, and a diff follows; or it could not be looked through, and nothing is
    /// verified.
    Refused(Arc<StoreError>),
}

/// A connection is there.
#[derive(Debug, Message)]
#[rtype(result = "()")]
pub(crate) struct LinkUp(pub(crate) ConnectionId);

/// It is over.
#[derive(Debug, Message)]
#[rtype(result = "()")]
pub(crate) struct LinkDown(pub(crate) ConnectionId, pub(crate) String);

/// Bytes between `SyncReq` and now.
#[derive(Clone, Copy, Debug, Default)]
pub(crate) struct Traffic {
    pub(crate) sent: u64,
    pub(crate) received: u64,
}

/// An attempt to connect failed.
#[derive(Debug, Message)]
#[rtype(result = "()")]
pub(crate) struct Unreached(pub(crate) String);

/// A message came.
#[derive(Debug, Message)]
#[rtype(result = "()")]
pub(crate) struct Received {
    pub(crate) connection: ConnectionId,
    pub(crate) message: ToClient,
    pub(crate) bytes: usize,
    /// Since the last `SyncReq`.
    pub(crate) traffic: Traffic,
    /// Since the connect.
    pub(crate) total: Traffic,
}

/// A part of a message came, or one that is answered already.
#[derive(Debug, Message)]
#[rtype(result = "()")]
pub(crate) struct Heard {
    pub(crate) connection: ConnectionId,
    pub(crate) part: bool,
}

/// No message came, but bytes.
#[derive(Debug, Message)]
#[rtype(result = "()")]
pub(crate) struct Malformed(pub(crate) ConnectionId, pub(crate) AccessError);

/// The Middleman has ended without being told to; its last connection.
#[derive(Debug, Message)]
#[rtype(result = "()")]
pub(crate) struct MiddlemanFailed(pub(crate) ConnectionId);

/// It is time, behind everything that has come before.
#[derive(Debug, Message)]
#[rtype(result = "()")]
enum Timer {
    /// The session looks at the clock.
    Session,
    /// A diff that failed is asked for again.
    Retry,
    /// A diff is due, as one is from time to time.
    Diff(Duration),
    /// The Middleman that failed is replaced.
    Middleman(ConnectionId),
}

/// What is long, and computed elsewhere.
enum Work {
    Root(RootOf, Tree),
    Answer {
        diff: DiffId,
        tree: Tree,
        query: Query,
        max_bytes: usize,
    },
    /// A look through the store at a checkpoint.
    Scrub(u64, Tree, Box<dyn Iterator<Item = Result<(Key, Value), StoreError>> + Send>),
}

/// A kind of [`Work`]. Of each one is done at a time: what is not waited for any more goes on until it is
/// done all the same, and whoever makes this end begin another must not make it begin a hundred.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
enum Kind {
    /// The root with which a diff is asked for.
    Diff,
    /// The root at its end.
    Mark,
    Checkpoint,
    Answer,
}

impl From<RootOf> for Kind {
    fn from(of: RootOf) -> Self {
        match of {
            RootOf::Diff(_) => Self::Diff,
            RootOf::Mark(_) => Self::Mark,
            RootOf::Checkpoint(_) => Self::Checkpoint,
        }
    }
}

impl Work {
    fn kind(&self) -> Kind {
        match self {
            Self::Root(of, _) => (*of).into(),
            Self::Scrub(..) => Kind::Checkpoint,
            Self::Answer { .. } => Kind::Answer,
        }
    }
}

/// What has come of [`Work`].
#[derive(Debug, Message)]
#[rtype(result = "()")]
enum Computed {
    Root(ConnectionId, RootOf, Option<Hash>),
    Answer(ConnectionId, DiffId, Option<Result<tablecast_protocol::diff::Answer, ProtocolError>>),
    /// The root of what the store holds at a mark, and keys that the tree is wrong about.
    Scrubbed(ConnectionId, u64, Option<(Hash, Vec<Key>, Option<StoreError>)>),
}

impl Computed {
    fn kind(&self) -> Kind {
        match self {
            Self::Root(_, of, _) => (*of).into(),
            Self::Scrubbed(..) => Kind::Checkpoint,
            Self::Answer(..) => Kind::Answer,
        }
    }
}

/// Who waits for a revision of a history, or for any.
#[derive(Debug)]
struct Waiter {
    epoch: Option<Epoch>,
    revision: Revision,
    waiter: oneshot::Sender<Result<Position, WaitError>>,
}

/// A diff that is under way.
#[derive(Debug)]
struct Running {
    since: Instant,
    /// Where the stream stood when it began at the server, or when it was asked for.
    at: Option<Position>,
    /// The table had been changed beside the server: it still is if the diff comes to nothing.
    changed: bool,
    /// It compares full-width hashes, and so does the next one if it comes to nothing.
    full: bool,
    /// When it got a place at the server.
    started: Option<Instant>,
    progress: Progress,
    /// At `SyncDone`.
    traffic: Traffic,
    waiting: Vec<oneshot::Sender<DiffOutcome>>,
    snapshot: Option<Snapshot>,
}

/// What is compared, kept until the session has done with it and then dropped away from everything else: that
/// costs as much as was changed meanwhile.
#[derive(Debug)]
struct Snapshot(Tree);

impl Drop for Snapshot {
    fn drop(&mut self) {
        discard(std::mem::take(&mut self.0));
    }
}

fn discard(snapshot: impl Send + 'static) {
    if let Ok(runtime) = tokio::runtime::Handle::try_current() {
        runtime.spawn_blocking(move || drop(snapshot));
    }
}

/// The actor.
pub struct Client {
    config: Arc<ClientConfig>,
    access: Arc<dyn Access>,
    replica: Replica,
    middleman: Option<Addr<Middleman>>,
    /// Where the Middleman lives; on the Client's own arbiter if that is not said.
    arbiter: Option<ArbiterHandle>,
    /// Waits before a Middleman that failed is replaced.
    restarts: Backoff,
    restart: Option<Later>,
    /// The connection at hand; `None` while there is none.
    link: Option<(ConnectionId, Session)>,
    /// Where the table stood when the last connection ended; `None` if something was missing, or has
    /// been changed beside the server since the last diff began.
    position: Option<Position>,
    /// Why there is no connection.
    disconnected: Option<String>,
    /// The table was changed beside the server since the last diff began.
    changed: bool,
    /// What the sessions' time is counted from.
    born: Instant,
    budget: Budget,
    /// What is computed elsewhere, and what is to be behind it: the newest, for nobody waits for those before.
    work: BTreeMap<Kind, Option<(ConnectionId, Work)>>,
    timer: Option<Later>,
    /// The next one of those diffs that are from time to time.
    next_diff: Option<Later>,
    /// A diff is due.
    due: bool,
    /// The next one, be it due or asked for after a while, must compare full-width hashes.
    full: bool,
    /// Waits before a diff that is asked for again.
    retries: Backoff,
    retry: Option<Later>,
    running: Option<Running>,
    /// Who waits for the diff that is due, because the last one's roots are still compared.
    next: Vec<oneshot::Sender<DiffOutcome>>,
    waiters: Vec<Waiter>,
    events: broadcast::Sender<Event>,
    applied: u64,
    refused: u64,
    connects: u64,
    fell_behind: u64,
    /// The history that was followed last.
    followed: Option<Epoch>,
    verified: Option<Revision>,
    diverged: u64,
    last_diff: Option<DiffOutcome>,
    /// What the last diff could not heal, until one does.
    trouble: Option<Health>,
    /// What the store said when it refused something last.
    refusal: Option<Arc<StoreError>>,
    corrupt: u64,
    /// Keys that were changed behind this actor's back, and that the next diff puts right.
    repaired: Vec<Key>,
    /// A look through the store found as many keys as it puts right, and another one goes on.
    looks_again: bool,
    /// The next diff may delete what it likes.
    allowed: bool,
    /// The last diff was held, and is asked for once more.
    held_before: bool,
    way: Option<Way>,
    /// Of the connections before this one, and of this one.
    traffic: (Traffic, Traffic),
    stopping: bool,
}

impl Client {
    /// A follower with this table, of the server that `access` reaches. It connects when it is told
    /// that it is [`Ready`].
    pub fn new(replica: Replica, access: impl Access, config: ClientConfig) -> Self {
        Self {
            access: Arc::new(access),
            replica,
            middleman: None,
            arbiter: None,
            restarts: Backoff::new(config.backoff_min, config.backoff_max),
            restart: None,
            link: None,
            position: None,
            disconnected: None,
            changed: false,
            born: Instant::now(),
            budget: Budget::default(),
            work: BTreeMap::new(),
            timer: None,
            next_diff: None,
            due: false,
            full: false,
            retries: Backoff::new(config.backoff_min, config.backoff_max),
            retry: None,
            running: None,
            next: Vec::new(),
            waiters: Vec::new(),
            events: broadcast::channel(config.event_capacity.clamp(1, MAX_EVENTS)).0,
            applied: 0,
            refused: 0,
            connects: 0,
            fell_behind: 0,
            followed: None,
            verified: None,
            diverged: 0,
            last_diff: None,
            trouble: None,
            refusal: None,
            corrupt: 0,
            repaired: Vec::new(),
            looks_again: false,
            allowed: false,
            held_before: false,
            way: None,
            traffic: (Traffic::default(), Traffic::default()),
            stopping: false,
            config: Arc::new(config),
        }
    }

    /// Where the connection lives: on another arbiter than the Client, if its store may block.
    #[must_use]
    pub fn with_connection_on(mut self, arbiter: ArbiterHandle) -> Self {
        self.arbiter = Some(arbiter);
        self
    }

    fn now(&self) -> Duration {
        self.born.elapsed()
    }

    fn session(&mut self, connection: ConnectionId) -> Option<&mut Session> {
        let (at, session) = self.link.as_mut()?;
        (*at == connection).then_some(session)
    }

    /// Where the table stands; `None` while something may be missing, or without a connection.
    fn standing(&self) -> Option<Position> {
        self.link.as_ref().and_then(|(_, session)| session.position())
    }

    /// The table was changed beside the server, and no diff has come to its end since.
    fn is_changed(&self) -> bool {
        self.changed || self.running.as_ref().is_some_and(|diff| diff.changed)
    }

    /// It was resumed, and what it had missed is still coming.
    fn is_catching_up(&self) -> bool {
        self.link.as_ref().is_some_and(|(_, session)| session.is_catching_up())
    }

    fn tell(&self, command: Command) {
        if let Some(middleman) = &self.middleman {
            middleman.do_send(command);
        }
    }

    fn emit(&self, event: impl FnOnce() -> Event) {
        if self.events.receiver_count() > 0 {
            // No receiver any more is nobody's loss.
            self.events.send(event()).ok();
        }
    }

    fn start_middleman(&mut self, last: ConnectionId, ctx: &Context<Self>) {
        let (config, access) = (Arc::clone(&self.config), Arc::clone(&self.access));
        let middleman = Middleman::new(config, access, ctx.address(), last);
        let middleman = match &self.arbiter {
            Some(arbiter) => Middleman::start_in_arbiter(arbiter, move |_| middleman),
            None => middleman.start(),
        };
        middleman.do_send(Command::Connect);
        self.middleman = Some(middleman);
    }

    /// Does what the session says, in its order.
    fn drive(&mut self, ctx: &mut Context<Self>) {
        while let Some((connection, session)) = &mut self.link
            && let Some(output) = session.poll_output()
        {
            let connection = *connection;
            match output {
                Output::Send(message) => self.tell(Command::Send(connection, message)),
                Output::Connected(at, way) => self.connected(at, way),
                Output::Apply { first, changes } => {
                    self.follow((first.0..=u64::MAX).map(Revision), changes, ctx);
                }
                Output::CatchUp { revision, changes } => {
                    self.follow(std::iter::repeat(revision), changes, ctx);
                }
                Output::CaughtUp(revision) => debug!(%revision, "caught up"),
                Output::Repair { diff, changes } => self.repair(diff, changes),
                Output::Answer { diff, tree, query, max_bytes } => {
                    let work = Work::Answer { diff, tree, query, max_bytes };
                    self.compute(connection, work, ctx);
                }
                Output::Root(diff, tree) => {
                    self.compute(connection, Work::Root(RootOf::Diff(diff), tree), ctx);
                }
                Output::Snapshot(diff) => {
                    let tree = self.replica.tree().clone();
                    session.handle_snapshot(diff, tree.clone());
                    if let Some(running) = &mut self.running {
                        (running.at, running.snapshot) = (session.stream(), Some(Snapshot(tree)));
                        // What was changed while it waited is in it.
                        running.changed |= std::mem::take(&mut self.changed);
                    }
                }
                Output::Progress(progress) => self.progress(progress),
                Output::Held { writes, deletes, keys, .. } => {
                    self.held(writes, deletes, keys, ctx);
                }
                Output::Checkpoint(number) => {
                    let work = if self.config.scrub {
                        self.look(number)
                    } else {
                        Work::Root(RootOf::Checkpoint(number), self.replica.tree().clone())
                    };
                    self.compute(connection, work, ctx);
                }
                Output::Mark(revision) => {
                    let tree = self.replica.tree().clone();
                    self.compute(connection, Work::Root(RootOf::Mark(revision), tree), ctx);
                }
                Output::DiffDone { counts, revision, root, server_root, .. } => {
                    self.diff_done(counts, revision, root, server_root, ctx);
                }
                Output::Verified { revision, root, server_root } => {
                    self.verified(revision, root, server_root);
                }
                Output::DiffAborted { reason, .. } => {
                    self.diff_aborted(DiffAborted::Server(reason), ctx);
                }
                Output::FellBehind(revision) => {
                    info!(%revision, "fell behind");
                    self.fell_behind += 1;
                    metrics::fell_behind();
                    self.emit(|| Event::FellBehind(revision));
                    // One that waits for its place is of the table behind this; one whose roots are compared is not.
                    let waits = self.session(connection).is_some_and(|at| at.state() == "PreDiff");
                    if !waits {
                        self.want_diff(false);
                    }
                }
                Output::Close(close) => self.closed(connection, close, ctx),
            }
        }
        self.reach();
        self.begin_diff(ctx);
    }

    /// The handshake is through.
    fn connected(&mut self, at: Position, way: Way) {
        info!(epoch = %at.epoch, revision = %at.revision, %way, "connected");
        self.connects += 1;
        self.restarts.reset();
        metrics::connected(way);
        self.way = Some(way);
        self.emit(|| Event::Connected(at, way));
        let forked = matches!(way, Way::Ahead | Way::OtherChain);
        self.fail_waiters(at.epoch, forked);
        if self.followed.replace(at.epoch) != Some(at.epoch) || forked {
            // Of another history, whose revisions say nothing here.
            self.verified = None;
        }
        if !way.resumes() {
            self.want_diff(false);
        }
    }

    /// Computes this elsewhere, when what is computed of its kind is done.
    fn compute(&mut self, connection: ConnectionId, work: Work, ctx: &Context<Self>) {
        match self.work.entry(work.kind()) {
            Entry::Occupied(mut next) => discard(next.insert(Some((connection, work)))),
            Entry::Vacant(idle) => {
                idle.insert(None);
                begin(connection, work, ctx);
            }
        }
    }

    /// A look through the store: tree and entries are of this moment.
    fn look(&self, checkpoint: u64) -> Work {
        Work::Scrub(checkpoint, self.replica.tree().clone(), self.replica.reader().snapshot())
    }

    /// These keys have been changed behind this actor's back: the tree is told what is there now. That
    /// its root is not the server's leads to a diff. Whether it knows anything now that it did not.
    fn corrupted(&mut self, keys: Vec<Key>, ctx: &Context<Self>) -> bool {
        let Some(example) = keys.first().cloned() else { return false };
        warn!(keys = keys.len(), "the store has been changed behind the follower's back");
        self.changed = true;
        self.position = None;
        let mut learnt = false;
        for key in &keys {
            match self.replica.look_up(key) {
                Ok(other) => learnt |= other,
                Err(error) => {
                    self.refuse(error);
                    self.retry_diff(true, ctx);
                }
            }
        }
        self.corrupt += keys.len() as u64;
        metrics::corrupt(keys.len() as u64);
        self.emit(|| Event::Corrupt { keys: keys.len(), example });
        self.repaired.extend(keys.into_iter().take(MAX_REPAIRED));
        self.repaired.truncate(MAX_REPAIRED);
        learnt
    }

    /// What was put right must be there: a store that loses it would lose it for ever.
    fn look_at_repaired(&mut self) {
        let mut lost = None;
        for key in std::mem::take(&mut self.repaired) {
            let error = match self.replica.look_up(&key) {
                Ok(false) => continue,
                Ok(true) => {
                    let key = key.escape_ascii();
                    StoreError::new(format!("it does not keep what is written at key {key}"))
                }
                Err(error) => error,
            };
            lost.get_or_insert(error);
        }
        if let Some(error) = lost {
            self.changed = true;
            self.refuse(error);
            if let Some((_, session)) = &mut self.link {
                session.handle_refused();
            }
        }
    }

    fn scrubbed(
        &mut self,
        connection: ConnectionId,
        checkpoint: u64,
        scrubbed: Option<(Hash, Vec<Key>, Option<StoreError>)>,
        ctx: &Context<Self>,
    ) {
        let again = std::mem::take(&mut self.looks_again);
        let Some((root, keys, error)) = scrubbed else {
            if again {
                self.want_diff(true);
            }
            if let Some(session) = self.session(connection) {
                session.handle_close(Reason::Failed, "no root");
            }
            return;
        };
        let (found, all) = (again || !keys.is_empty(), keys.len() < SCRUBBED_KEYS);
        // Else the next one would find the same.
        self.looks_again = self.corrupted(keys, ctx) && !all;
        // What was not read is not verified; what was found is put right.
        let unread = error.is_some() || self.looks_again;
        if let Some(error) = error {
            self.refuse(error);
        }
        let compared = match self.session(connection) {
            Some(session) if unread => {
                session.handle_unread(checkpoint);
                false
            }
            Some(session) => {
                let compared = session.is_checking(checkpoint);
                session.handle_root(RootOf::Checkpoint(checkpoint), root);
                compared
            }
            None => false,
        };
        if found {
            // The table is known to be another one from here on, not when the server's root is there.
            if let Some((_, session)) = &mut self.link {
                session.handle_refused();
            }
            // What a diff compares that has begun does not know of it; and the server's root may never come.
            if self.looks_again {
                let look = self.look(checkpoint);
                self.compute(connection, look, ctx);
            } else if compared {
                self.retry_diff(true, ctx);
            } else {
                self.want_diff(true);
            }
        }
    }

    fn progress(&mut self, progress: Progress) {
        if let Some(running) = &mut self.running {
            running.progress = progress;
            if progress.phase != DiffPhase::Queued {
                running.started.get_or_insert_with(Instant::now);
            }
        }
        self.emit(|| Event::Progress(progress));
    }

    /// Live changes, or what was missed.
    fn follow(
        &mut self,
        revisions: impl Iterator<Item = Revision>,
        changes: Vec<(Change, Digest)>,
        ctx: &Context<Self>,
    ) {
        let before = self.applied;
        for (revision, (change, refused)) in revisions.zip(self.replica.apply_all(changes)) {
            match refused {
                None => {
                    self.applied += 1;
                    self.emit(|| Event::Change { change, revision, repair: false });
                }
                Some(error) => {
                    self.refuse(error);
                    if let Some((_, session)) = &mut self.link {
                        session.handle_refused();
                    }
                    self.retry_diff(false, ctx);
                }
            }
        }
        metrics::changes_applied(self.applied - before);
    }

    fn repair(&mut self, diff: DiffId, changes: Vec<(Change, Digest)>) {
        let at = self.link.as_ref().and_then(|(_, session)| session.stream());
        let revision = at.map_or(Revision::ZERO, |at| at.revision);
        let (mut writes, mut deletes) = (0, 0);
        let since = Instant::now();
        for (change, refused) in self.replica.apply_all(changes) {
            match refused {
                None => self.emit(|| Event::Change { change, revision, repair: true }),
                Some(error) => {
                    *if change.value().is_some() { &mut writes } else { &mut deletes } += 1;
                    self.refuse(error);
                }
            }
        }
        if let Some((_, session)) = &mut self.link {
            session.handle_repaired(diff, writes, deletes, since.elapsed());
        }
    }

    fn refuse(&mut self, error: StoreError) {
        warn!(%error, "a change was refused");
        self.refused += 1;
        metrics::change_refused();
        let error = Arc::new(error);
        self.refusal = Some(Arc::clone(&error));
        self.emit(|| Event::Refused(error));
    }

    // Diffs.

    /// A diff is due. Once it must be at full width, it stays so until it begins.
    fn want_diff(&mut self, full: bool) {
        self.due = true;
        self.full |= full;
    }

    /// Begins the diff that is due, if one can begin now.
    fn begin_diff(&mut self, ctx: &mut Context<Self>) {
        if self.due && self.ask_for_diff().is_ok() {
            self.drive(ctx);
        }
    }

    fn ask_for_diff(&mut self) -> Result<(), DiffError> {
        let (_, session) = self.link.as_mut().ok_or(DiffError::Disconnected)?;
        let tree = self.replica.tree().clone();
        let guard = self.config.mass_delete.filter(|_| !self.allowed);
        let max_deletes = guard.map_or(u64::MAX, |guard| guard.max_deletes(tree.len()));
        session.handle_diff(tree, self.full, max_deletes)?;
        self.due = false;
        if self.looks_again {
            // Its root does not know of all that is wrong.
            session.handle_refused();
        }
        let at = session.stream();
        self.refusal = None;
        self.running = Some(Running {
            since: Instant::now(),
            at,
            changed: std::mem::take(&mut self.changed),
            full: std::mem::take(&mut self.full),
            started: None,
            progress: Progress::default(),
            traffic: Traffic::default(),
            waiting: std::mem::take(&mut self.next),
            snapshot: None,
        });
        Ok(())
    }

    /// Asks for another diff after a while.
    fn retry_diff(&mut self, full: bool, ctx: &Context<Self>) {
        self.full |= full;
        if self.retry.is_none() {
            let wait = self.retries.next_wait();
            self.retry = Some(later(wait, Timer::Retry, ctx));
        }
    }

    fn diff_done(
        &mut self,
        counts: Counts,
        revision: Revision,
        root: Hash,
        server_root: Hash,
        ctx: &Context<Self>,
    ) {
        let Some(running) = self.running.take() else { return };
        let report = DiffReport {
            rounds: counts.rounds,
            bytes_sent: running.traffic.sent,
            bytes_received: running.traffic.received,
            written: counts.written,
            deleted: counts.deleted,
            suppressed: counts.suppressed,
            failed: counts.failed,
            waited: running.started.map_or(Duration::ZERO, |started| started - running.since),
            elapsed: running.since.elapsed(),
            revision,
            root,
            server_root,
        };
        self.look_at_repaired();
        // Equal at the mark; what was refused behind it is missing still.
        let whole = self.standing().is_some();
        metrics::diff_done(&report);
        (self.allowed, self.held_before) = (false, false);
        self.trouble = self.what_is_wrong(&report, whole);
        if report.equal() && whole {
            self.verified = Some(revision);
            self.retries.reset();
            self.full = false;
            self.retry = None;
            // What it was for while this one ran is healed.
            self.due &= !self.next.is_empty();
        } else if report.equal() {
            self.retry_diff(false, ctx);
        } else {
            warn!(%revision, %root, %server_root, "the table differs from the server's");
            self.retry_diff(true, ctx);
        }
        self.end_diff(DiffOutcome::Done(report), running.waiting);
    }

    /// What a diff that was done has not healed.
    fn what_is_wrong(&self, report: &DiffReport, whole: bool) -> Option<Health> {
        let DiffReport { failed, revision, root, server_root, .. } = report;
        let reason = match &self.refusal {
            _ if report.equal() && whole => return None,
            None if report.equal() && *failed == 0 => return None,
            Some(error) => format!("the store refuses: {error}"),
            None if *failed > 0 => format!("{failed} keys cannot be read at the server"),
            None => {
                format!("at revision {revision} the root is {root}, the server's {server_root}")
            }
        };
        Some(Health::Diverged { reason })
    }

    /// A diff would have deleted too much. It is not asked for by the clock again: each time the whole
    /// table would be walked.
    fn held(&mut self, writes: u64, deletes: u64, keys: u64, ctx: &Context<Self>) {
        // The server's snapshot may have been newer than this table: live deletes are not held.
        let moved = self.running.as_ref().is_some_and(|diff| {
            diff.at != self.link.as_ref().and_then(|(_, session)| session.stream())
        });
        if moved && !self.held_before {
            self.held_before = true;
            if let Some(running) = self.running.take() {
                self.want_diff(running.full);
                self.changed |= running.changed;
                self.next.extend(running.waiting);
            }
            return;
        }
        self.held_before = false;
        warn!(writes, deletes, keys, "a repair is held: it would delete too much");
        metrics::held();
        self.trouble = Some(Health::Held { writes, deletes, keys });
        self.emit(|| Event::Held { writes, deletes, keys });
        self.diff_aborted(DiffAborted::Held { deletes, keys }, ctx);
    }

    fn diff_aborted(&mut self, why: DiffAborted, ctx: &Context<Self>) {
        let Some(running) = self.running.take() else { return };
        self.changed |= running.changed;
        metrics::diff_aborted();
        match why {
            DiffAborted::Server(_) => self.retry_diff(running.full, ctx),
            // On the next connection.
            DiffAborted::Disconnected if running.full => self.want_diff(true),
            DiffAborted::Disconnected | DiffAborted::Held { .. } => {}
        }
        self.end_diff(DiffOutcome::Aborted(why), running.waiting);
    }

    fn end_diff(&mut self, outcome: DiffOutcome, waiting: Vec<oneshot::Sender<DiffOutcome>>) {
        info!(?outcome, "diff");
        self.last_diff = Some(outcome.clone());
        self.emit(|| Event::Diff(outcome.clone()));
        for waiter in waiting {
            // Nobody waits any more: it is in the status.
            waiter.send(outcome.clone()).ok();
        }
    }

    /// Tells those who wait for what has been reached.
    fn reach(&mut self) {
        let Some(at) = self.standing() else { return };
        // Resumed is not ready: what was missed is still coming.
        let ready = !self.is_catching_up();
        let reached = |waiting: &mut Waiter| {
            let followed = waiting.epoch.map_or(ready, |epoch| epoch == at.epoch);
            followed && waiting.revision <= at.revision
        };
        for Waiter { waiter, .. } in self.waiters.extract_if(.., reached) {
            // Who gave up does not wait any more.
            waiter.send(Ok(at)).ok();
        }
    }

    fn wait(
        &mut self,
        epoch: Option<Epoch>,
        revision: Revision,
        timeout: Duration,
    ) -> ResponseFuture<Result<Position, WaitError>> {
        let (waiter, reached) = oneshot::channel();
        // Those who gave up, most of all by a timeout of their own.
        self.waiters.retain(|waiting| !waiting.waiter.is_closed());
        self.waiters.push(Waiter { epoch, revision, waiter });
        self.reach();
        Box::pin(async move {
            match tokio::time::timeout(timeout, reached).await {
                Ok(reached) => reached.unwrap_or(Err(WaitError::Stopped)),
                Err(_) => Err(WaitError::Timeout(timeout)),
            }
        })
    }

    /// Another history began, or this one goes on otherwise: what was waited for before will not come.
    fn fail_waiters(&mut self, now: Epoch, forked: bool) {
        let lost = |waiting: &mut Waiter| waiting.epoch.is_some_and(|epoch| forked || epoch != now);
        for Waiter { epoch, waiter, .. } in self.waiters.extract_if(.., lost) {
            let same = epoch == Some(now);
            let why = if same { WaitError::Forked(now) } else { WaitError::NewEpoch(now) };
            waiter.send(Err(why)).ok();
        }
    }

    /// Roots were compared at a mark that no diff ended with.
    fn verified(&mut self, revision: Revision, root: Hash, server_root: Hash) {
        if root == server_root {
            self.verified = Some(revision);
            // A repair that was held is not needed any more.
            self.trouble = None;
            return;
        }
        warn!(%revision, %root, %server_root, "the table has diverged from the server's");
        self.diverged += 1;
        metrics::diverged();
        self.emit(|| Event::Diverged { revision, root, server_root });
        // At once; should that not heal it, the next ones are asked for more and more slowly.
        self.want_diff(true);
    }

    fn status(&self) -> ClientStatus {
        let session = self.link.as_ref().map(|(_, session)| session);
        let stream = session.and_then(Session::stream);
        let position = self.standing();
        let health = match &self.trouble {
            _ if stream.is_none() => Health::Disconnected,
            _ if position.is_some() && !self.is_catching_up() => Health::Ready,
            Some(trouble) => trouble.clone(),
            None => Health::Syncing,
        };
        let (before, now) = self.traffic;
        ClientStatus {
            name: self.config.name.clone(),
            server: self.access.address(),
            connected: stream.is_some(),
            disconnected: self.disconnected.as_ref().filter(|_| stream.is_none()).cloned(),
            state: session.map_or("Disconnected", Session::state).into(),
            health,
            way: self.way,
            stream,
            position: position.filter(|_| !self.is_changed()),
            keys: self.replica.tree().len(),
            applied: self.applied,
            refused: self.refused,
            corrupt: self.corrupt,
            connects: self.connects,
            fell_behind: self.fell_behind,
            verified: self.verified,
            diverged: self.diverged,
            progress: self.running.as_ref().map(|running| running.progress),
            last_diff: self.last_diff.clone(),
            bytes_sent: before.sent + now.sent,
            bytes_received: before.received + now.received,
        }
    }

    // The connection.

    fn closed(&mut self, connection: ConnectionId, close: Close, ctx: &Context<Self>) {
        let reason = close.to_string();
        if let (Close::Here { reason: Reason::Protocol, .. }, Some(running)) =
            (&close, &mut self.running)
        {
            // Short prefixes that cover several keys each, which somebody chose so, look like a server that deletes too much.
            running.full = true;
        }
        self.tell(Command::Close(connection, close));
        self.unlink(reason, ctx);
    }

    /// There is no connection any more.
    fn unlink(&mut self, reason: String, ctx: &Context<Self>) {
        let Some((_, session)) = self.link.take() else { return };
        self.diff_aborted(DiffAborted::Disconnected, ctx);
        // Whoever meant it meant that server, as did what was held.
        (self.allowed, self.held_before, self.trouble) = (false, false, None);
        let (before, last) = self.traffic;
        let total =
            Traffic { sent: before.sent + last.sent, received: before.received + last.received };
        self.traffic = (total, Traffic::default());
        if session.stream().is_some() {
            self.position = session.position().filter(|_| !self.changed);
        }
        self.timer = None;
        // What waits is for nobody.
        self.work.values_mut().for_each(|next| discard(next.take()));
        for waiter in std::mem::take(&mut self.next) {
            waiter.send(DiffOutcome::Aborted(DiffAborted::Disconnected)).ok();
        }
        if session.stream().is_some() {
            info!(reason, "disconnected");
        }
        self.disconnected = Some(reason.clone());
        self.emit(|| Event::Disconnected(reason));
    }

    /// In a time in which this end did not listen, the server was not silent.
    fn listens(&mut self) {
        let now = self.now();
        if let Some((_, session)) = &mut self.link {
            session.handle_part(now);
        }
    }

    fn set_timer(&mut self, ctx: &Context<Self>) {
        self.timer = None;
        let Some(at) = self.link.as_ref().and_then(|(_, session)| session.poll_timeout()) else {
            return;
        };
        // The session is right about when; a little later never is too early.
        // What is heard meanwhile may move it nearer.
        let wait = at.saturating_sub(self.now()).min(self.config.heartbeat.ping_after);
        let wait = wait.saturating_add(Duration::from_millis(1));
        self.timer = Some(later(wait, Timer::Session, ctx));
    }
}

/// Its result comes as a message.
fn begin(connection: ConnectionId, work: Work, ctx: &Context<Client>) {
    match work {
        Work::Root(of, tree) => {
            computed(root_of(tree), move |root| Computed::Root(connection, of, root), ctx);
        }
        Work::Answer { diff, tree, query, max_bytes } => {
            let answer = compute(move || answer(&tree, &query, max_bytes));
            computed(answer, move |answer| Computed::Answer(connection, diff, answer), ctx);
        }
        Work::Scrub(checkpoint, mut tree, entries) => {
            let scrub = move || {
                let (found, error) = scrub(&tree, entries, SCRUBBED_KEYS);
                let put_right = |found: Correction| found.put_into(&mut tree);
                let keys = found.into_iter().map(put_right).collect();
                (tree.root(), keys, error)
            };
            let message = move |scrubbed| Computed::Scrubbed(connection, checkpoint, scrubbed);
            computed(compute(scrub), message, ctx);
        }
    }
}

impl fmt::Debug for Client {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Client")
            .field("replica", &self.replica)
            .field("server", &self.access.address())
            .finish_non_exhaustive()
    }
}

impl Drop for Client {
    /// Also after a panic: a connection without its Client is of no use.
    fn drop(&mut self) {
        self.tell(Command::Stop(None));
        metrics::client_gone();
    }
}

impl Actor for Client {
    type Context = Context<Self>;

    fn started(&mut self, ctx: &mut Context<Self>) {
        ctx.set_mailbox_capacity(1024);
        let mut told = (0, 0);
        ctx.run_interval(metrics::EVERY, move |client, _| {
            let status = client.status();
            let traffic = (status.bytes_sent, status.bytes_received);
            metrics::client_traffic(traffic.0 - told.0, traffic.1 - told.1);
            told = traffic;
            metrics::client(&status);
        });
        if let Some(every) = self.config.diff_every {
            // The first one anywhere within the period.
            let wait = every.min(NEVER).mul_f64(fastrand::f64());
            self.next_diff = Some(later(wait, Timer::Diff(every), ctx));
        }
    }
}

impl Handler<Apply> for Client {
    type Result = Result<(), StoreError>;

    fn handle(&mut self, Apply(change): Apply, ctx: &mut Context<Self>) -> Self::Result {
        self.budget.spend(ctx);
        self.replica.apply(&change)?;
        self.changed = true;
        self.position = None;
        self.listens();
        Ok(())
    }
}

impl Handler<Ready> for Client {
    type Result = ();

    fn handle(&mut self, _: Ready, ctx: &mut Context<Self>) {
        if self.middleman.is_none() && !self.stopping {
            self.start_middleman(ConnectionId(0), ctx);
        }
    }
}

impl Handler<Diff> for Client {
    type Result = ResponseFuture<Result<DiffOutcome, DiffError>>;

    fn handle(&mut self, _: Diff, ctx: &mut Context<Self>) -> Self::Result {
        let (waiter, outcome) = oneshot::channel();
        let comparing = self.link.as_ref().is_some_and(|(_, session)| session.is_comparing());
        let soon = comparing || self.is_catching_up();
        let asked = if soon { Ok(()) } else { self.ask_for_diff() };
        match (asked, &mut self.running) {
            // One that is as good as done, or what was missed, comes first: nobody need be told to come
            // again.
            (Ok(()), _) if soon => {
                self.due = true;
                self.next.push(waiter);
            }
            (Ok(()), Some(running)) => {
                running.waiting.push(waiter);
                self.drive(ctx);
            }
            (Ok(()), None) | (Err(_), _) => {}
        }
        Box::pin(async move {
            asked?;
            outcome.await.map_err(|_| DiffError::Stopped)
        })
    }
}

impl Handler<WaitFor> for Client {
    type Result = ResponseFuture<Result<Position, WaitError>>;

    fn handle(&mut self, wait: WaitFor, _: &mut Context<Self>) -> Self::Result {
        let WaitFor { epoch, revision, timeout } = wait;
        self.wait(Some(epoch), revision, timeout)
    }
}

impl Handler<WaitReady> for Client {
    type Result = ResponseFuture<Result<Position, WaitError>>;

    fn handle(&mut self, WaitReady(timeout): WaitReady, _: &mut Context<Self>) -> Self::Result {
        self.wait(None, Revision::ZERO, timeout)
    }
}

impl Handler<GetStatus> for Client {
    type Result = MessageResult<GetStatus>;

    fn handle(&mut self, _: GetStatus, _: &mut Context<Self>) -> Self::Result {
        MessageResult(self.status())
    }
}

impl Handler<ContinueFrom> for Client {
    type Result = ();

    fn handle(&mut self, ContinueFrom(position): ContinueFrom, _: &mut Context<Self>) {
        if self.connects == 0 && self.link.is_none() && !self.changed {
            self.position = Some(position);
        }
    }
}

impl Handler<AllowMassDelete> for Client {
    type Result = Result<(), DiffError>;

    fn handle(&mut self, _: AllowMassDelete, ctx: &mut Context<Self>) -> Self::Result {
        let session = self.link.as_ref().map(|(_, session)| session);
        session.and_then(Session::stream).ok_or(DiffError::Disconnected)?;
        self.allowed = true;
        self.want_diff(false);
        self.begin_diff(ctx);
        Ok(())
    }
}

impl Handler<Subscribe> for Client {
    type Result = MessageResult<Subscribe>;

    fn handle(&mut self, _: Subscribe, _: &mut Context<Self>) -> Self::Result {
        MessageResult(self.events.subscribe())
    }
}

impl Handler<Stop> for Client {
    type Result = ResponseFuture<Option<Position>>;

    fn handle(&mut self, _: Stop, ctx: &mut Context<Self>) -> Self::Result {
        self.stopping = true;
        let connected = self.link.as_ref().is_some_and(|(_, session)| session.stream().is_some());
        let position = if connected { self.standing() } else { self.position };
        let position = position.filter(|_| !self.is_changed());
        if let Some((_, session)) = &mut self.link {
            session.handle_close(Reason::Stopping, "");
        }
        self.drive(ctx);
        let (told, ended) = oneshot::channel();
        self.tell(Command::Stop(Some(told)));
        self.waiters.clear();
        ctx.stop();
        Box::pin(async move {
            // Nothing is said, it is dropped. Its thread may be busy.
            tokio::time::timeout(LAST_WORDS, ended).await.ok();
            position
        })
    }
}

impl Handler<LinkUp> for Client {
    type Result = ();

    fn handle(&mut self, LinkUp(connection): LinkUp, ctx: &mut Context<Self>) {
        let ClientConfig { name, limits, heartbeat, .. } = &*self.config;
        let session = Session::new(name, *limits, *heartbeat, self.position, self.now());
        self.link = Some((connection, session));
        self.drive(ctx);
        self.set_timer(ctx);
    }
}

impl Handler<LinkDown> for Client {
    type Result = ();

    fn handle(&mut self, LinkDown(connection, reason): LinkDown, ctx: &mut Context<Self>) {
        if self.session(connection).is_some() {
            self.unlink(reason, ctx);
        }
    }
}

impl Handler<Unreached> for Client {
    type Result = ();

    fn handle(&mut self, Unreached(reason): Unreached, _: &mut Context<Self>) {
        // It is tried over and over.
        if self.disconnected.as_ref() != Some(&reason) {
            warn!(server = self.access.address(), reason, "no connection");
        }
        self.disconnected = Some(reason);
    }
}

impl Handler<Received> for Client {
    type Result = ();

    fn handle(&mut self, received: Received, ctx: &mut Context<Self>) {
        self.budget.spend(ctx);
        let Received { connection, message, bytes, traffic, total } = received;
        let now = self.now();
        self.tell(Command::Done(connection, bytes));
        if self.session(connection).is_none() {
            return;
        }
        self.traffic.1 = total;
        if matches!(message, ToClient::SyncDone { .. })
            && let Some(running) = &mut self.running
        {
            running.traffic = traffic;
        }
        if let Some(session) = self.session(connection) {
            session.handle_message(message, now);
        }
        self.drive(ctx);
        self.listens();
    }
}

impl Handler<Heard> for Client {
    type Result = ();

    fn handle(&mut self, Heard { connection, part }: Heard, _: &mut Context<Self>) {
        let now = self.now();
        self.tell(Command::Done(connection, HEARD_BYTES));
        if let Some(session) = self.session(connection) {
            if part {
                session.handle_part(now);
            } else {
                session.handle_heard(now);
            }
        }
    }
}

impl Handler<Timer> for Client {
    type Result = ();

    fn handle(&mut self, timer: Timer, ctx: &mut Context<Self>) {
        match timer {
            Timer::Session => {
                let now = self.now();
                if let Some((_, session)) = &mut self.link {
                    session.handle_timeout(now);
                }
                self.drive(ctx);
                self.set_timer(ctx);
            }
            Timer::Retry => {
                // Aborted too late otherwise.
                if self.retry.take().is_some() {
                    self.want_diff(false);
                    self.begin_diff(ctx);
                }
            }
            Timer::Diff(every) => {
                self.want_diff(false);
                self.begin_diff(ctx);
                let wait = every.min(NEVER).mul_f64(0.5 + fastrand::f64());
                self.next_diff = Some(later(wait, Timer::Diff(every), ctx));
            }
            Timer::Middleman(last) => {
                if !self.stopping {
                    self.start_middleman(last, ctx);
                }
            }
        }
    }
}

impl Handler<Malformed> for Client {
    type Result = ();

    fn handle(&mut self, Malformed(connection, error): Malformed, ctx: &mut Context<Self>) {
        if let Some(session) = self.session(connection) {
            if let AccessError::Decode(error) = error {
                session.handle_malformed(&error);
            } else {
                session.handle_close(Reason::Protocol, error.to_string());
            }
        }
        self.drive(ctx);
    }
}

impl Handler<MiddlemanFailed> for Client {
    type Result = ();

    fn handle(&mut self, failed: MiddlemanFailed, ctx: &mut Context<Self>) {
        let MiddlemanFailed(last) = failed;
        let wait = self.restarts.next_wait();
        self.restart = Some(later(wait, Timer::Middleman(last), ctx));
    }
}

impl Handler<Computed> for Client {
    type Result = ();

    fn handle(&mut self, computed: Computed, ctx: &mut Context<Self>) {
        if let Some(Some((connection, next))) = self.work.remove(&computed.kind()) {
            self.compute(connection, next, ctx);
        }
        match computed {
            Computed::Root(connection, of, root) => {
                if let Some(session) = self.session(connection) {
                    match root {
                        Some(root) => session.handle_root(of, root),
                        None => session.handle_close(Reason::Failed, "no root"),
                    }
                }
            }
            Computed::Scrubbed(connection, checkpoint, scrubbed) => {
                self.scrubbed(connection, checkpoint, scrubbed, ctx);
            }
            Computed::Answer(connection, diff, answer) => {
                if let Some(session) = self.session(connection) {
                    match answer {
                        Some(Ok(answer)) => session.handle_answer(diff, answer),
                        Some(Err(error)) => {
                            session.handle_close(Reason::Protocol, error.to_string());
                        }
                        None => session.handle_close(Reason::Failed, "no answer"),
                    }
                }
            }
        }
        self.drive(ctx);
        self.listens();
    }
}
