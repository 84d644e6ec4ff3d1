//! The Server: the one place where the canonical table changes.
//!
//! It owns the table ([`tablecast_protocol::Table`]), the writing end of the log, the followers'
//! list, and the places at which diffs run. Whoever embeds it starts it; it tells its Middlemen
//! that the log grew, and answers what they ask. It ends when it is told to, and then every
//! connection has been told farewell.
//!
//! | message | answer | from |
//! |---|---|---|
//! | [`Write`] | the position behind it, or why not | user |
//! | [`Ready`], [`ContinueFrom`], [`Await`] | the position at which the history began | user |
//! | [`GetStatus`], [`GetFollowers`], [`Snapshot`], [`Subscribe`] | what is asked for | user |
//! | [`Stop`] | when the last connection is closed | user |
//! | `Connect`, `Ask`, `Gone` | a [`Reply`], later | Middleman |

pub mod differ;
mod endpoint;
mod held;
pub mod middleman;
mod places;

use std::collections::BTreeMap;
use std::pin::Pin;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::task::{self, Poll};
use std::time::Duration;

use actix::prelude::*;
use tablecast_protocol::diff::Difference;
use tablecast_protocol::server::Reply;
use tablecast_protocol::{
    Change, DiffId, Epoch, FollowerId, Hash, Log, Position, Reason, Revision, Table, Tree, Way,
    WriteError,
};
use tokio::sync::{broadcast, oneshot};
use tokio::time::Instant;
use tokio_util::sync::CancellationToken;

use crate::budget::{Budget, computed, every};
use crate::compute::compute;
use crate::config::{MAX_EVENTS, ServerConfig};
use crate::metrics;
use crate::status::{FollowerStatus, ServerStatus};
pub use endpoint::{Arbiters, Endpoint};
use middleman::{Command, Middleman};
use places::{Places, Turn};

/// Changes, as one unit: all or nothing, consecutive revisions, one frame.
#[derive(Debug, Message)]
#[rtype(result = "Result<Written, WriteError>")]
pub struct Write(pub Vec<Change>);

/// Where a write went.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Written {
    /// Before `ready`: the table is being filled, and there are no revisions.
    Filled,
    /// The position behind the last change of the batch.
    At(Position),
}

impl Written {
    /// The position; `None` before `ready`.
    pub fn position(&self) -> Option<Position> {
        match self {
            Self::Filled => None,
            Self::At(position) => Some(*position),
        }
    }
}

/// The table is filled: begin a history, and let followers in. The second time it does nothing.
#[derive(Debug, Message)]
#[rtype(result = "Position")]
pub struct Ready(pub Epoch);

/// The table is as it was at this position: go on from there, and let followers in. Followers of that
/// history are resumed as far as the log, which begins here, reaches. Does nothing behind [`Ready`].
#[derive(Debug, Message)]
#[rtype(result = "Position")]
pub struct ContinueFrom(pub Position);

/// Waits until the server is ready; `None` if it is stopped before.
#[derive(Debug, Message)]
#[rtype(result = "Option<Position>")]
pub struct Await;

/// The tree as it is, and where.
#[derive(Debug, Message)]
#[rtype(result = "(Option<Position>, Tree)")]
pub struct Snapshot;

/// A subscription to changes as they are applied.
#[derive(Debug, Message)]
#[rtype(result = "broadcast::Receiver<Applied>")]
pub struct Subscribe;

/// A change that was applied to the canonical table.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Applied {
    /// The change.
    pub change: Change,
    /// Its revision; `None` before `ready`.
    pub revision: Option<Revision>,
}

/// How the server is.
#[derive(Debug, Message)]
#[rtype(result = "ServerStatus")]
pub struct GetStatus;

/// Who follows.
#[derive(Debug, Message)]
#[rtype(result = "Vec<FollowerStatus>")]
pub struct GetFollowers;

/// Sends every follower what it lacks, as far as it reads that within
/// [`ServerConfig::drain_timeout`], and a farewell, and ends. Answered when the last connection is closed.
#[derive(Debug, Message)]
#[rtype(result = "()")]
pub struct Stop;

/// A connection has said Hello.
#[derive(Debug, Message)]
#[rtype(result = "()")]
pub(crate) struct Connect {
    pub(crate) follower: FollowerId,
    /// Where it says that its table stands.
    pub(crate) position: Option<Position>,
    pub(crate) middleman: Addr<Middleman>,
    pub(crate) woken: Arc<AtomicBool>,
    pub(crate) status: Arc<Mutex<FollowerStatus>>,
}

/// A Middleman asks something for its diff.
#[derive(Debug, Message)]
#[rtype(result = "()")]
pub(crate) struct Ask {
    pub(crate) follower: FollowerId,
    pub(crate) diff: DiffId,
    pub(crate) question: Question,
    /// When.
    pub(crate) at: Instant,
}

#[derive(Debug)]
pub(crate) enum Question {
    Admit,
    Snapshot,
    /// None: it goes on.
    Step,
    Read {
        found: Arc<Difference>,
        from: usize,
        max_bytes: usize,
    },
    Mark,
    End,
}

/// A second is over.
#[derive(Clone, Debug, Message)]
#[rtype(result = "()")]
struct Second;

/// It is time to compare roots.
#[derive(Clone, Debug, Message)]
#[rtype(result = "()")]
struct SetCheckpoint;

/// The root at a checkpoint.
#[derive(Debug, Message)]
#[rtype(result = "()")]
struct SetRoot(u64, Option<Hash>);

/// A connection has ended, however.
#[derive(Debug, Message)]
#[rtype(result = "()")]
pub(crate) struct Gone(pub(crate) FollowerId);

/// The log, as Server and Middlemen share it. Locked for as long as it takes to append a chunk, or to copy
/// some pointers to chunks, and take out of a repair what was updated.
#[derive(Clone, Debug)]
pub(crate) struct SharedLog(Arc<Mutex<Log>>);

impl SharedLog {
    pub(crate) fn lock(&self) -> MutexGuard<'_, Log> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// The actor. Start it on an arbiter of its own: it works through its mailbox for milliseconds at a time.
#[derive(Debug)]
pub struct Server {
    config: ServerConfig,
    table: Table,
    log: SharedLog,
    followers: BTreeMap<FollowerId, Follower>,
    /// Where diffs run, `diffs_at_once` of them.
    places: Places,
    awaiting: Vec<oneshot::Sender<Option<Position>>>,
    changes: broadcast::Sender<Applied>,
    refused: u64,
    /// There is something in the log that the Middlemen have not been told of.
    grown: bool,
    /// The root at the newest checkpoint is being computed.
    hashing: bool,
    /// What the log's time is counted from.
    born: Instant,
    budget: Budget,
    /// Cancelled when this actor ends, however: nobody is let in any more.
    serving: CancellationToken,
    /// Told to stop: who waits for the last connection to end.
    stopping: Option<Vec<oneshot::Sender<()>>>,
}

#[derive(Debug)]
struct Follower {
    middleman: Addr<Middleman>,
    /// When a diff of it is next.
    turn: Turn,
    /// Set when the Middleman has been told that the log grew, and has not looked yet: a mailbox
    /// holds one such message at most.
    woken: Arc<AtomicBool>,
    status: Arc<Mutex<FollowerStatus>>,
}

impl Server {
    /// A server of this table.
    pub fn new(table: Table, config: ServerConfig) -> Self {
        let (revision, chain) = table.taken();
        let log = Log::new(config.log_bytes, revision, chain);
        Self {
            table,
            log: SharedLog(Arc::new(Mutex::new(log))),
            followers: BTreeMap::new(),
            places: Places::new(config.diffs_at_once, config.diff_rest),
            awaiting: Vec::new(),
            changes: broadcast::channel(config.event_capacity.clamp(1, MAX_EVENTS)).0,
            refused: 0,
            grown: false,
            hashing: false,
            born: Instant::now(),
            budget: Budget::default(),
            serving: CancellationToken::new(),
            stopping: None,
            config,
        }
    }

    /// The log, for the Middlemen of this server.
    pub(crate) fn log(&self) -> SharedLog {
        self.log.clone()
    }

    /// Cancelled when it ends, or by whoever lets nobody in any more.
    pub(crate) fn serving(&self) -> CancellationToken {
        self.serving.clone()
    }

    /// Puts what was written into the log. Whoever is answered behind it finds it there; the others are told by [`Publish`]: were
    /// they woken for each part of a diff of one of them, a busy server would write less at a time for all.
    fn append(&mut self) {
        self.table.seal();
        while let Some((chunk, chain)) = self.table.next_chunk() {
            metrics::changes_written(chunk.keys.len() as u64);
            self.log.lock().push(chunk, chain, self.born.elapsed());
            self.grown = true;
        }
    }

    /// Puts what was written into the log, and wakes the Middlemen that do not know yet.
    fn publish(&mut self) {
        self.append();
        if std::mem::take(&mut self.grown) {
            self.wake();
        }
    }

    /// Wakes the Middlemen that do not know yet that there is something new in the log.
    fn wake(&self) {
        for follower in self.followers.values() {
            if !follower.woken.swap(true, Ordering::AcqRel) {
                follower.middleman.do_send(Command::Grown);
            }
        }
    }

    fn reply(&self, follower: FollowerId, reply: Reply) {
        if let Some(follower) = self.followers.get(&follower) {
            follower.middleman.do_send(reply.into());
        }
    }

    /// Lets waiting diffs run while there are places.
    fn admit(&mut self) {
        while let Some((follower, diff)) = self.places.admit() {
            self.reply(follower, Reply::Admitted(diff));
        }
    }

    /// The diff of a follower is over, or whichever it has.
    fn end_diff(&mut self, follower: FollowerId, diff: Option<DiffId>, turn: Turn) {
        if let Some(diff) = self.places.end(follower, diff, turn) {
            self.log.lock().unmark(follower, diff);
            if let Some(follower) = self.followers.get_mut(&follower) {
                follower.turn = self.places.turn(Some(Instant::now()));
            }
        }
        self.admit();
    }

    /// Takes the places of diffs that have had theirs for long, as many as others wait for.
    fn end_turns(&mut self) {
        let overdue: Vec<_> = self.places.overdue(self.config.diff_turn).collect();
        for (follower, diff) in overdue {
            self.reply(follower, Reply::Busy(diff));
        }
    }

    fn tell_changes(&self, changes: Vec<Change>, end: Option<Revision>) {
        if self.changes.receiver_count() == 0 {
            return;
        }
        let count = changes.len() as u64;
        for (change, number) in changes.into_iter().zip(1..) {
            let revision = end.map(|end| Revision(end.0 - count + number));
            // No receiver any more is nobody's loss.
            self.changes.send(Applied { change, revision }).ok();
        }
    }

    /// Tells those who wait for it that the history has begun, and where it stands.
    fn begun(&mut self) -> Position {
        let position = self.table.position().expect("a table that is ready has a position");
        for waiter in self.awaiting.drain(..) {
            waiter.send(Some(position)).ok();
        }
        position
    }

    fn status(&self) -> ServerStatus {
        let log = self.log.lock();
        ServerStatus {
            position: self.table.position(),
            keys: self.table.tree().len(),
            followers: self.followers.len(),
            diffs_running: self.places.running(),
            diffs_waiting: self.places.waiting(),
            log_bytes: log.bytes(),
            log_tail: log.tail(),
            refused: self.refused,
        }
    }

    fn head(&self) -> Revision {
        self.table.position().map_or(Revision::ZERO, |position| position.revision)
    }

    /// How far a follower that was sent this is behind the head, in changes and in time.
    fn lag(&self, head: Revision, sent: Revision) -> (u64, Duration) {
        let since = self.log.lock().waiting_since(sent.next());
        let waited = since.map_or(Duration::ZERO, |at| self.born.elapsed().saturating_sub(at));
        (head.0.saturating_sub(sent.0), waited)
    }

    /// Tells the recorder of metrics how things stand.
    fn record(&self) {
        let sent = |follower: &Follower| {
            follower.status.lock().unwrap_or_else(PoisonError::into_inner).sent
        };
        let head = self.head();
        let slowest = self.followers.values().map(sent).min().unwrap_or(head);
        let (lag, lag_time) = self.lag(head, slowest);
        metrics::server(&self.status(), lag, lag_time);
    }

    fn stop_if_alone(&mut self, ctx: &mut Context<Self>) {
        if self.followers.is_empty()
            && let Some(waiting) = self.stopping.take()
        {
            for waiter in waiting {
                // Nobody waits any more: that is as well.
                waiter.send(()).ok();
            }
            ctx.stop();
        }
    }
}

impl Drop for Server {
    /// Also after a panic, of a store most of all: nobody may think that it is still served.
    fn drop(&mut self) {
        self.serving.cancel();
        metrics::server_gone();
        for follower in self.followers.values() {
            follower
                .middleman
                .do_send(Reply::Close(Reason::Failed, "the server failed".to_owned()).into());
        }
    }
}

impl Actor for Server {
    type Context = Context<Self>;

    fn started(&mut self, ctx: &mut Context<Self>) {
        // The default, 16, would make writers wait for each other's wake-ups.
        ctx.set_mailbox_capacity(1024);
        ctx.spawn(Publish);
        every(metrics::EVERY, Second, ctx);
        if let Some(period) = self.config.verify_every {
            every(period, SetCheckpoint, ctx);
        }
    }
}

/// Runs after every emptied mailbox, for ever, and when a budget is spent: whatever came in one go is one batch on the wire, and
/// diffs begin of which the time has come.
struct Publish;

impl ActorFuture<Server> for Publish {
    type Output = ();

    fn poll(
        self: Pin<&mut Self>,
        server: &mut Server,
        _: &mut Context<Server>,
        _: &mut task::Context<'_>,
    ) -> Poll<()> {
        server.budget.renew();
        server.publish();
        server.admit();
        Poll::Pending
    }
}

impl Handler<Write> for Server {
    type Result = Result<Written, WriteError>;

    fn handle(&mut self, Write(changes): Write, ctx: &mut Context<Self>) -> Self::Result {
        self.budget.spend(ctx);
        if let Err(error) = self.table.write(&changes) {
            self.refused += 1;
            metrics::write_refused();
            return Err(error);
        }
        let position = self.table.position();
        self.tell_changes(changes, position.map(|position| position.revision));
        // A writer without a pause must not keep the others waiting.
        if self.table.has_chunk() {
            self.publish();
        }
        Ok(position.map_or(Written::Filled, Written::At))
    }
}

impl Handler<Ready> for Server {
    type Result = MessageResult<Ready>;

    fn handle(&mut self, Ready(epoch): Ready, _: &mut Context<Self>) -> Self::Result {
        self.table.ready(epoch);
        MessageResult(self.begun())
    }
}

impl Handler<ContinueFrom> for Server {
    type Result = MessageResult<ContinueFrom>;

    fn handle(&mut self, ContinueFrom(at): ContinueFrom, _: &mut Context<Self>) -> Self::Result {
        if self.table.position().is_none() {
            self.table.continue_from(at);
            *self.log.lock() = Log::new(self.config.log_bytes, at.revision, at.chain);
        }
        MessageResult(self.begun())
    }
}

impl Handler<Await> for Server {
    type Result = ResponseFuture<Option<Position>>;

    fn handle(&mut self, _: Await, _: &mut Context<Self>) -> Self::Result {
        let position = self.table.position();
        let (waiter, ready) = oneshot::channel();
        if position.is_none() {
            // Those who gave up.
            self.awaiting.retain(|waiter| !waiter.is_closed());
            self.awaiting.push(waiter);
        }
        Box::pin(async move {
            match position {
                Some(position) => Some(position),
                None => ready.await.ok().flatten(),
            }
        })
    }
}

impl Handler<Snapshot> for Server {
    type Result = MessageResult<Snapshot>;

    fn handle(&mut self, _: Snapshot, _: &mut Context<Self>) -> Self::Result {
        MessageResult((self.table.position(), self.table.tree().clone()))
    }
}

impl Handler<Subscribe> for Server {
    type Result = MessageResult<Subscribe>;

    fn handle(&mut self, _: Subscribe, _: &mut Context<Self>) -> Self::Result {
        MessageResult(self.changes.subscribe())
    }
}

impl Handler<GetStatus> for Server {
    type Result = MessageResult<GetStatus>;

    fn handle(&mut self, _: GetStatus, ctx: &mut Context<Self>) -> Self::Result {
        self.budget.spend(ctx);
        MessageResult(self.status())
    }
}

impl Handler<GetFollowers> for Server {
    type Result = MessageResult<GetFollowers>;

    fn handle(&mut self, _: GetFollowers, ctx: &mut Context<Self>) -> Self::Result {
        self.budget.spend(ctx);
        let head = self.head();
        let of = |follower: &Follower| {
            let status = follower.status.lock().unwrap_or_else(PoisonError::into_inner).clone();
            let (lag, lag_time) = self.lag(head, status.sent);
            FollowerStatus { lag, lag_time, ..status }
        };
        MessageResult(self.followers.values().map(of).collect())
    }
}

impl Handler<Stop> for Server {
    type Result = ResponseFuture<()>;

    fn handle(&mut self, _: Stop, ctx: &mut Context<Self>) -> Self::Result {
        self.publish();
        let (waiter, stopped) = oneshot::channel();
        self.stopping.get_or_insert_default().push(waiter);
        self.awaiting.clear();
        for follower in self.followers.values() {
            follower.middleman.do_send(Command::Stop);
        }
        self.stop_if_alone(ctx);
        Box::pin(async move { drop(stopped.await) })
    }
}

impl Handler<Connect> for Server {
    type Result = ();

    fn handle(&mut self, connect: Connect, ctx: &mut Context<Self>) {
        self.budget.spend(ctx);
        let Connect { follower, position, middleman, woken, status } = connect;
        let Some(head) = self.table.position().filter(|_| self.stopping.is_none()) else {
            middleman.do_send(Reply::Close(Reason::Stopping, "not serving".to_owned()).into());
            return;
        };
        let limit = self.config.followers;
        if self.followers.len() >= limit {
            let text = format!("there are {limit} followers, which is the limit");
            middleman.do_send(Reply::Close(Reason::Full, text).into());
            return;
        }
        // What was written before is in the log before the follower's place is decided.
        self.append();
        let way = self.log.lock().way(head.epoch, position.as_ref());
        let at = position.filter(|_| way == Way::Resumed).unwrap_or(head);
        status.lock().unwrap_or_else(PoisonError::into_inner).sent = at.revision;
        middleman.do_send(Reply::Subscribed(at, way, head).into());
        let turn = self.places.turn(None);
        self.followers.insert(follower, Follower { middleman, turn, woken, status });
    }
}

impl Handler<Ask> for Server {
    type Result = ();

    fn handle(&mut self, ask: Ask, ctx: &mut Context<Self>) {
        self.budget.spend(ctx);
        let Ask { follower, diff, question, at } = ask;
        self.places.waited(at.elapsed());
        self.places.step(follower);
        let Some(Follower { turn, .. }) = self.followers.get(&follower) else { return };
        let turn = *turn;
        match question {
            Question::Admit if self.places.waiting() >= self.config.diffs_waiting => {
                self.reply(follower, Reply::Busy(diff));
            }
            Question::Admit => {
                self.places.wait(follower, diff, turn);
                self.admit();
            }
            Question::Snapshot => {
                self.reply(follower, Reply::Snapshot(diff, self.table.tree().clone()));
            }
            Question::Read { found, from, max_bytes } => {
                let values = self.table.read(&found, from, max_bytes);
                self.append();
                self.reply(follower, Reply::Values(diff, values));
            }
            Question::Mark => {
                self.append();
                let head = {
                    let mut log = self.log.lock();
                    log.mark(follower, diff);
                    log.head()
                };
                self.reply(follower, Reply::Mark(diff, head, self.table.tree().clone()));
            }
            Question::End => self.end_diff(follower, Some(diff), turn),
            Question::Step => {}
        }
    }
}

impl Handler<Second> for Server {
    type Result = ();

    /// Behind it [`Publish`] lets diffs begin, if the server is busy no more.
    fn handle(&mut self, _: Second, _: &mut Context<Self>) {
        self.record();
        self.end_turns();
    }
}

impl Handler<SetCheckpoint> for Server {
    type Result = ();

    fn handle(&mut self, _: SetCheckpoint, ctx: &mut Context<Self>) {
        if self.table.position().is_none() || self.followers.is_empty() || self.hashing {
            return;
        }
        self.publish();
        let number = self.log.lock().set_checkpoint();
        self.hashing = true;
        self.wake();
        let root = root_of(self.table.tree().clone());
        computed(root, move |root| SetRoot(number, root), ctx);
    }
}

impl Handler<SetRoot> for Server {
    type Result = ();

    fn handle(&mut self, SetRoot(number, root): SetRoot, _: &mut Context<Self>) {
        self.hashing = false;
        if let Some(root) = root {
            self.log.lock().set_root(number, root);
            self.wake();
        }
    }
}

impl Handler<Gone> for Server {
    type Result = ();

    fn handle(&mut self, Gone(follower): Gone, ctx: &mut Context<Self>) {
        self.budget.spend(ctx);
        if let Some(Follower { turn, .. }) = self.followers.remove(&follower) {
            self.end_diff(follower, None, turn);
        }
        self.stop_if_alone(ctx);
    }
}

/// The root of a tree, computed on a thread that may block.
pub(crate) async fn root_of(tree: Tree) -> Option<Hash> {
    compute(move || tree.root()).await
}

#[cfg(test)]
mod tests {
    use tablecast_protocol::{Epoch, Limits, MemoryStore, Replica, Value};

    use super::*;
    use crate::access::memory;
    use crate::client::{self, Client, Event};
    use crate::{ClientConfig, DiffOutcome};

    /// Else the root at a checkpoint would be that of a table with changes that are not in the log there.
    #[actix_rt::test]
    async fn what_is_written_is_in_the_log_before_a_checkpoint() {
        let store: MemoryStore = (0..9_u8).map(|n| (vec![n].into(), Value::from("v"))).collect();
        let table = Table::open(store, Limits::default()).unwrap();
        let config = ServerConfig { verify_every: None, ..ServerConfig::default() };
        let endpoint = Endpoint::start_here(table, config);
        let (listener, access) = memory::pair();
        endpoint.listen(listener);
        let server = endpoint.server();
        server.send(Ready(Epoch::from_bytes([1; 16]))).await.unwrap();
        let replica = Replica::open(MemoryStore::new()).unwrap();
        let client = Client::new(replica, access, ClientConfig::default()).start();
        let mut events = client.send(client::Subscribe).await.unwrap();
        client.send(client::Ready).await.unwrap();
        let repaired = |event: &Event| matches!(event, Event::Diff(DiffOutcome::Done(_)));
        while !repaired(&events.recv().await.unwrap()) {}

        for number in 0..5_u8 {
            // In one run of the mailbox.
            server.do_send(Write(vec![Change::write("a", vec![number])]));
            server.do_send(SetCheckpoint);
            server.do_send(Write(vec![Change::write("b", vec![number])]));
            let at = Revision(2 * u64::from(number) + 1);
            let verified = async {
                while client.send(client::GetStatus).await.unwrap().verified != Some(at) {
                    let event = events.try_recv().ok();
                    assert!(!matches!(event, Some(Event::Diverged { .. })), "{event:?}");
                }
            };
            tokio::time::timeout(Duration::from_secs(60), verified).await.unwrap();
        }
    }
}
