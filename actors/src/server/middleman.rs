//! A Middleman of the server: one connection, its session, and the only writer of its socket.
//!
//! The listener starts it for every connection that is accepted. It asks the Server for what the
//! session wants, starts a Differ for each diff, and ends with the connection; its end, a panic
//! included, is told to the Server as it is dropped.
//!
//! All input and output is one permanent future (`Pump`) that runs whenever the mailbox has been
//! emptied or the socket is ready: it reads what came, lets the session decide what goes out, and
//! writes as much in one call as the socket takes. No handler touches the socket. Timers and
//! futures of this actor come through the mailbox too, or the pump would not run behind them.

use std::fmt;
use std::pin::Pin;
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use std::sync::{Arc, Mutex, PoisonError};
use std::task::{self, Poll};
use std::time::Duration;

use actix::prelude::*;
use actix_rt::ArbiterHandle;
use bytes::Bytes;
use tablecast_protocol::diff::collect;
use tablecast_protocol::server::{Event, Reply, Served, Session, SessionConfig, Transmit};
use tablecast_protocol::{
    AbortReason, DiffId, FollowerId, Missed, Position, Reason, Revision, Shortened, ToServer, wire,
};
use tokio::sync::Semaphore;
use tokio::time::Instant;
use tokio_util::sync::CancellationToken;
use tracing::{debug, info, warn};

use super::differ::{Abandon, Answered, Differ, Order};
use super::endpoint::{Place, spawn_on};
use super::held::Held;
use super::{Ask, Connect, Gone, Question, Server, SharedLog, root_of};
use crate::access::Stream;
use crate::access::codec::{Framed, LAST_WORDS};
use crate::authorize::{Applicant, Token};
use crate::budget::computed;
use crate::config::ServerConfig;
use crate::error::AccessError;
use crate::metrics;
use crate::status::{FollowerStatus, ServedDiff, Verified};

/// How many frames are read, and how often everything that is pending is written, before others on this
/// arbiter have their turn.
const TURNS: usize = 32;

/// How often in its turn a diff says that it goes on: eight times as often as one gives way that does not.
const STEPS: u32 = 64;

/// What the Server, the Differ or the clock says.
#[derive(Debug, Message)]
#[rtype(result = "()")]
pub(crate) enum Command {
    /// The log grew. The pump looks at it.
    Grown,
    /// It is time to look at the clock.
    Timeout,
    /// For the session.
    Reply(Reply),
    /// The server stops: what is in the log goes out first, for a while.
    Stop,
    /// Nobody is let in any more. The Server tells those who are.
    Unserved,
}

impl From<Reply> for Command {
    fn from(reply: Reply) -> Self {
        Self::Reply(reply)
    }
}

/// What is answered when this is dropped, even if that is because the work for it was never done.
struct Answer(Addr<Middleman>, Option<Reply>);

impl Drop for Answer {
    fn drop(&mut self) {
        if let Some(reply) = self.1.take() {
            self.0.do_send(reply.into());
        }
    }
}

/// What all Middlemen of a server share.
#[derive(Clone, Debug)]
pub(crate) struct Shared {
    pub(crate) config: Arc<ServerConfig>,
    pub(crate) server: Addr<Server>,
    pub(crate) log: SharedLog,
    /// Where Differs run.
    pub(crate) differs: Arc<[ArbiterHandle]>,
    /// The server stops.
    pub(crate) stopping: CancellationToken,
    /// Places for followers of which it is found out what counts of what they missed.
    pub(crate) shortening: Arc<Semaphore>,
    /// Bytes that wait for followers and that the log no longer has.
    pub(crate) held: Arc<AtomicUsize>,
}

/// What is known of a connection that is not subscribed.
pub(crate) struct Stranger {
    pub(crate) address: String,
    pub(crate) certificate: Option<Bytes>,
}

/// The actor.
pub struct Middleman {
    shared: Shared,
    follower: FollowerId,
    session: Session,
    framed: Framed,
    held: Held,
    /// Until it is subscribed.
    stranger: Option<Stranger>,
    place: Place,
    /// What came ahead of Hello.
    token: Option<Token>,
    /// The Server does not wake us while this is set; cleared before the log is read.
    woken: Arc<AtomicBool>,
    status: Arc<Mutex<FollowerStatus>>,
    differ: Option<Addr<Differ>>,
    /// When the diff was asked for, and when it got its place.
    diff_since: (Instant, Option<Instant>),
    /// How far diffs were when the Server was told last that one goes on, and when.
    stepped: (u64, Instant),
    /// What the session's time is counted from.
    born: Instant,
    /// What had been written when something was left to be written, and since when it is no more.
    stalled: Option<(u64, Instant)>,
    /// To be closed when everything is written.
    closing: bool,
    /// The server stops, and there is time to write it.
    draining: bool,
    /// It is closed soon, whatever is not written.
    parting: bool,
    timer: Option<SpawnHandle>,
}

impl Middleman {
    pub(crate) fn new(
        shared: Shared,
        follower: FollowerId,
        stream: Box<dyn Stream>,
        stranger: Stranger,
        place: Place,
    ) -> Self {
        let session = Session::new(shared.config.session, follower, Duration::ZERO);
        let address = stranger.address.clone();
        let status = FollowerStatus { id: follower.0, address, ..FollowerStatus::default() };
        Self {
            framed: Framed::new(stream, session.max_frame_bytes()),
            held: Held::new(Arc::clone(&shared.held)),
            shared,
            follower,
            session,
            stranger: Some(stranger),
            place,
            token: None,
            woken: Arc::new(AtomicBool::new(false)),
            status: Arc::new(Mutex::new(status)),
            differ: None,
            diff_since: (Instant::now(), None),
            stepped: (0, Instant::now()),
            born: Instant::now(),
            stalled: None,
            closing: false,
            draining: false,
            parting: false,
            timer: None,
        }
    }

    fn now(&self) -> Duration {
        self.born.elapsed()
    }

    fn ask(&self, diff: DiffId, question: Question) {
        let at = Instant::now();
        self.shared.server.do_send(Ask { follower: self.follower, diff, question, at });
    }

    fn update_status(&self, update: impl FnOnce(&mut FollowerStatus)) {
        update(&mut self.status.lock().unwrap_or_else(PoisonError::into_inner));
    }

    /// Does what the session says.
    fn drive(&mut self, ctx: &mut Context<Self>) {
        while let Some(event) = self.session.poll_event() {
            match event {
                Event::Subscribe { name, position } => self.subscribe(name, position, ctx),
                Event::Shorten(behind, head) => self.shorten(behind, head, ctx),
                Event::Admit(diff) => {
                    self.diff_since = (Instant::now(), None);
                    self.ask(diff, Question::Admit);
                }
                Event::Snapshot(diff) => self.ask(diff, Question::Snapshot),
                Event::Walk { diff, tree, root, len, full } => {
                    // A follower that accepts less than this end has been refused.
                    let SessionConfig { limits, part_keys, .. } = self.shared.config.session;
                    let max_bytes = limits.frame_bytes / 2;
                    let order = Order { diff, tree, root, len, full, max_bytes, part_keys };
                    self.start_differ(order, ctx);
                }
                Event::Answer(_, answer) => {
                    if let Some(differ) = &self.differ {
                        differ.do_send(Answered(answer));
                    }
                }
                Event::Collect { diff, tree, mut rest, most } => {
                    let failed = Answer(ctx.address(), Some(Reply::WalkFailed(diff)));
                    spawn_on(self.differ_arbiter(), async move {
                        let mut answer = failed;
                        if answer.0.connected() {
                            let writes = collect(&tree, &mut rest, most);
                            answer.1 = Some(Reply::Collected(diff, writes, rest));
                        }
                    });
                }
                Event::Read { diff, found, from, max_bytes } => {
                    self.ask(diff, Question::Read { found, from, max_bytes });
                }
                Event::Mark(diff) => self.ask(diff, Question::Mark),
                Event::EndDiff { diff, aborted, served } => {
                    self.abandon();
                    self.ask(diff, Question::End);
                    self.diff_ended(aborted, served);
                }
                Event::Root(revision, tree) => {
                    let reply = move |root| match root {
                        Some(root) => Reply::Root(revision, root),
                        None => Reply::Close(Reason::Failed, "no root".to_owned()),
                    };
                    computed(root_of(tree), move |root| Command::from(reply(root)), ctx);
                }
                Event::Verified { revision, equal } => {
                    if !equal {
                        warn!(follower = self.follower.0, %revision, "the follower differs");
                    }
                    metrics::follower_verified(equal);
                    let verified = Verified { revision, equal };
                    self.update_status(|status| status.verified = Some(verified));
                }
                Event::FellBehind(revision) => {
                    info!(follower = self.follower.0, %revision, "the follower fell behind");
                    metrics::follower_fell_behind();
                }
                Event::Close(close) => {
                    self.ends(&close.into());
                    self.close(ctx);
                }
            }
        }
        self.framed.set_max_frame_bytes(self.session.max_frame_bytes());
    }

    fn subscribe(&mut self, name: String, position: Option<Position>, ctx: &Context<Self>) {
        let Some(stranger) = &self.stranger else { return };
        let token = self.token.take();
        let follower = Applicant {
            address: &stranger.address,
            name: &name,
            token: token.as_ref(),
            certificate: stranger.certificate.as_deref(),
        };
        if let Err(why) = self.shared.config.authorize.authorize(&follower) {
            info!(follower = self.follower.0, address = stranger.address, why, "refused");
            metrics::follower_refused();
            self.session.handle_close(Reason::Refused, why);
            return;
        }
        self.update_status(|status| status.name = name);
        self.shared.server.do_send(Connect {
            follower: self.follower,
            position,
            middleman: ctx.address(),
            woken: Arc::clone(&self.woken),
            status: Arc::clone(&self.status),
        });
    }

    /// Where Differs run, and for a few followers at a time: when many come back at once, the others get all
    /// that they missed rather than wait for their turn.
    fn shorten(&self, behind: Revision, head: Position, ctx: &Context<Self>) {
        let this = ctx.address();
        let place = Arc::clone(&self.shared.shortening).try_acquire_owned();
        let Ok(place) = place else {
            this.do_send(Reply::Shortened(None).into());
            return;
        };
        let log = self.shared.log.clone();
        let answer = Answer(this, Some(Reply::Shortened(None)));
        spawn_on(self.differ_arbiter(), async move {
            let (mut answer, _place) = (answer, place);
            if answer.0.connected() {
                let keys_from = |first, chunks| log.lock().keys_from(first, chunks);
                let missed = Missed::collect(behind, head, keys_from);
                answer.1 = Some(Reply::Shortened(missed.as_ref().map(Shortened::of)));
            }
        });
    }

    fn diff_ended(&self, aborted: Option<AbortReason>, served: Served) {
        let (since, started) = self.diff_since;
        let waited = started.map_or_else(|| since.elapsed(), |at| at - since);
        let last = ServedDiff { aborted, served, waited, elapsed: since.elapsed() };
        if let Some(reason) = aborted {
            debug!(follower = self.follower.0, %reason, "diff ended");
        }
        metrics::diff_served(aborted.map_or("Done".to_owned(), |reason| format!("{reason:?}")));
        self.update_status(|status| {
            status.diffs += u64::from(aborted.is_none());
            status.last_diff = Some(last);
        });
    }

    fn differ_arbiter(&self) -> Option<&ArbiterHandle> {
        let arbiters = &self.shared.differs;
        let number = self.follower.0 % arbiters.len().max(1) as u64;
        usize::try_from(number).ok().and_then(|n| arbiters.get(n))
    }

    fn start_differ(&mut self, order: Order, ctx: &Context<Self>) {
        let differ = Differ::new(order, ctx.address());
        self.differ = Some(match self.differ_arbiter() {
            Some(arbiter) => Differ::start_in_arbiter(arbiter, move |_| differ),
            None => differ.start(),
        });
    }

    fn abandon(&mut self) {
        if let Some(differ) = self.differ.take() {
            differ.do_send(Abandon);
        }
    }

    /// The session is closed: what it still has to say goes out, then the socket is closed.
    fn close(&mut self, ctx: &mut Context<Self>) {
        self.abandon();
        self.closing = true;
        // What is in front of the last words of a server that stops has its time.
        if !self.draining {
            self.part(ctx);
        }
    }

    /// Nothing but the last words is left to be written, or the time for it is over.
    fn part(&mut self, ctx: &mut Context<Self>) {
        if !std::mem::replace(&mut self.parting, true) {
            ctx.run_later(LAST_WORDS, |_, ctx| ctx.stop());
        }
    }

    fn fail(&self, error: &AccessError, ctx: &mut Context<Self>) {
        // What ends behind last words has been told.
        if !self.closing {
            self.ends(error);
        }
        ctx.stop();
    }

    /// Tells whoever looks after the server.
    fn ends(&self, why: &AccessError) {
        let status = self.status.lock().unwrap_or_else(PoisonError::into_inner);
        let FollowerStatus { name, address, .. } = &*status;
        info!(follower = self.follower.0, address, name, %why, "connection ends");
        metrics::connection_ended(why.name());
    }

    fn set_timer(&mut self, ctx: &mut Context<Self>) {
        if let Some(timer) = self.timer.take() {
            ctx.cancel_future(timer);
        }
        let ServerConfig { stall_timeout, session, .. } = &*self.shared.config;
        let wait = match self.session.poll_timeout() {
            // The session is right about when; a little later never is too early.
            Some(at) => {
                // What is heard meanwhile may move it nearer.
                let wait = at.saturating_sub(self.now()).min(session.heartbeat.ping_after);
                wait.saturating_add(Duration::from_millis(1)).min(*stall_timeout)
            }
            // It is over, and what it said last may be a while on its way.
            None if self.closing && !self.parting => *stall_timeout,
            None => return,
        };
        self.timer = Some(ctx.run_later(wait, |middleman, ctx| {
            middleman.timer = None;
            ctx.address().do_send(Command::Timeout);
        }));
    }

    /// Gives a follower up whose socket takes nothing for too long. It cannot be told: nothing would
    /// reach it.
    fn watch_socket(&mut self, ctx: &mut Context<Self>) {
        let limit = self.shared.config.stall_timeout;
        match self.stalled {
            _ if self.framed.is_flushed() => self.stalled = None,
            Some((sent, since)) if sent == self.framed.sent => {
                if since.elapsed() >= limit {
                    let seconds = limit.as_secs_f32();
                    metrics::follower_stalled();
                    self.fail(&AccessError::Timeout { what: "room in the socket", seconds }, ctx);
                }
            }
            _ => self.stalled = Some((self.framed.sent, Instant::now())),
        }
    }

    /// Reads what came. `Ok(true)` if there may be more.
    fn read(
        &mut self,
        ctx: &mut Context<Self>,
        cx: &mut task::Context<'_>,
    ) -> Result<bool, AccessError> {
        let before = self.framed.received;
        for _ in 0..TURNS {
            if self.closing || !self.session.wants_input() {
                return Ok(false);
            }
            let Poll::Ready(frame) = self.framed.poll_frame(cx) else {
                if self.framed.received > before.max(self.framed.decoded()) {
                    self.session.handle_part(self.now());
                }
                return Ok(false);
            };
            let frame = match frame {
                Ok(Some(frame)) => frame,
                Ok(None) => return Err(AccessError::Closed),
                Err(error @ AccessError::FrameTooLong { .. }) => {
                    self.session.handle_close(Reason::Protocol, error.to_string());
                    self.drive(ctx);
                    return Ok(false);
                }
                Err(error) => return Err(error),
            };
            // Ahead of Hello, once.
            if self.token.is_none()
                && self.session.state() == "Hello"
                && let Some(token) = Token::parse(&frame)
            {
                self.token = Some(token);
                continue;
            }
            let limits = &self.shared.config.session.limits;
            match wire::decode::<ToServer>(&frame, limits) {
                Ok(message) => self.session.handle_message(message, self.now()),
                Err(error) => self.session.handle_malformed(&error),
            }
            self.drive(ctx);
        }
        Ok(true)
    }

    /// Takes from the session what is to be written next, up to one flush.
    fn fill(&mut self, ctx: &mut Context<Self>) -> Result<(), AccessError> {
        let room = self.shared.config.flush_bytes.max(1);
        let (behind, end) = (self.session.sent(), self.framed.end());
        // Cleared first: what the Server appends from here on wakes us again.
        self.woken.store(false, Ordering::Release);
        let log = self.shared.log.lock();
        let transmit = loop {
            if self.framed.queued() >= room {
                break None;
            }
            match self.session.poll_transmit(&log) {
                Some(Transmit::Live(frame)) => self.framed.queue(frame),
                // Encoded without the lock, so what follows it must wait.
                transmit => break transmit,
            }
        };
        let tail = log.tail();
        drop(log);
        let message = match transmit {
            Some(Transmit::Message(message)) => Some(message),
            Some(Transmit::Joined(joined)) => {
                self.framed.queue(joined.frame());
                None
            }
            Some(Transmit::Part(part)) => Some(part.message(&self.shared.config.session.limits)),
            Some(Transmit::Live(_)) | None => None,
        };
        if let Some(message) = message {
            self.framed.queue(wire::encode(&message));
        }
        if self.framed.end() > end {
            self.held.queued(end, behind);
        }
        // One follower may be sent a frame, however long, behind what is handed to its socket at once.
        let ServerConfig { log_bytes, flush_bytes, session, .. } = &*self.shared.config;
        let frame = session.limits.frame_bytes.saturating_add(wire::HEADER_BYTES);
        let limit = *log_bytes.max(&frame.saturating_add(*flush_bytes));
        match self.held.count(self.framed.sent, self.framed.queued(), tail) {
            Some(bytes) if bytes > limit => return Err(AccessError::Held { bytes, limit }),
            _ => {}
        }
        self.drive(ctx);
        Ok(())
    }

    fn pump(
        &mut self,
        ctx: &mut Context<Self>,
        cx: &mut task::Context<'_>,
    ) -> Result<(), AccessError> {
        let mut more = self.read(ctx, cx)?;
        // What has come already is read on when the answers to what came before are out.
        let held = !self.session.wants_input();
        for turn in 0.. {
            self.fill(ctx)?;
            if self.framed.is_flushed() {
                break;
            }
            match self.framed.poll_flush(cx) {
                Poll::Ready(result) => result?,
                Poll::Pending => break,
            }
            if turn == TURNS {
                more = true;
                break;
            }
        }
        if self.framed.has_taken() {
            self.session.handle_room(self.now());
        }
        self.step();
        if self.closing && self.framed.is_flushed() {
            self.part(ctx);
            // The peer is told that this is the end, and closes when it has heard so.
            if self.framed.poll_shutdown(cx).is_ready() && self.framed.poll_drain(cx).is_ready() {
                ctx.stop();
            }
        } else if more || (held && self.session.wants_input()) {
            cx.waker().wake_by_ref();
        }
        Ok(())
    }

    /// Tells the Server from time to time that a diff goes on, of which it hears nothing while there is a walk, or a long frame is on
    /// its way.
    fn step(&mut self) {
        let Some((diff, progress)) = self.session.progress() else { return };
        let (counted, since) = self.stepped;
        if progress != counted && since.elapsed() >= self.shared.config.diff_turn / STEPS {
            self.stepped = (progress, Instant::now());
            self.ask(diff, Question::Step);
        }
    }

    /// How things stand, for whoever asks.
    fn tell(&self) {
        let Self { session, framed, .. } = self;
        self.update_status(|status| {
            if status.way.is_none()
                && let Some(way) = session.way()
            {
                metrics::subscribed(way);
                status.way = Some(way);
            }
            status.state = session.state().into();
            status.phase = session.phase().map(Into::into);
            if session.way().is_some() {
                status.sent = session.sent();
            }
            status.jumps = session.jumps();
            let (sent, received) = (status.bytes_sent, status.bytes_received);
            metrics::server_traffic(framed.sent - sent, framed.received - received);
            status.bytes_sent = framed.sent;
            status.bytes_received = framed.received;
        });
    }
}

impl fmt::Debug for Middleman {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Middleman")
            .field("follower", &self.follower)
            .field("state", &self.session.state())
            .finish_non_exhaustive()
    }
}

impl Actor for Middleman {
    type Context = Context<Self>;

    fn started(&mut self, ctx: &mut Context<Self>) {
        ctx.spawn(Pump);
        let (stopping, this) = (self.shared.stopping.clone(), ctx.address());
        let stop = async move {
            stopping.cancelled_owned().await;
            this.do_send(Command::Unserved);
        };
        ctx.spawn(stop.into_actor(self));
        self.set_timer(ctx);
        let limit = self.shared.config.handshake_timeout;
        ctx.run_later(self.place.until - Instant::now(), move |middleman, ctx| {
            // All that it missed, then: that others have what counts found out is not its fault.
            middleman.session.handle_shortened(None);
            ctx.address().do_send(
                if matches!(middleman.session.state(), "Hello" | "Subscribing") {
                    let error =
                        AccessError::Timeout { what: "handshake", seconds: limit.as_secs_f32() };
                    Reply::Close(Reason::Silent, error.to_string()).into()
                } else {
                    Command::Timeout
                },
            );
        });
    }
}

impl Drop for Middleman {
    /// Also after a panic, which ends this connection and nothing else.
    fn drop(&mut self) {
        self.abandon();
        self.shared.server.do_send(Gone(self.follower));
    }
}

struct Pump;

impl ActorFuture<Middleman> for Pump {
    type Output = ();

    fn poll(
        self: Pin<&mut Self>,
        middleman: &mut Middleman,
        ctx: &mut Context<Middleman>,
        cx: &mut task::Context<'_>,
    ) -> Poll<()> {
        let pumped = middleman.pump(ctx, cx);
        middleman.tell();
        if let Err(error) = pumped {
            middleman.fail(&error, ctx);
        }
        Poll::Pending
    }
}

impl Handler<Command> for Middleman {
    type Result = ();

    fn handle(&mut self, command: Command, ctx: &mut Context<Self>) {
        let session = &mut self.session;
        match command {
            Command::Grown => return,
            Command::Timeout => {
                session.handle_timeout(self.born.elapsed());
                self.watch_socket(ctx);
                self.set_timer(ctx);
            }
            Command::Reply(reply) => {
                if matches!(reply, Reply::Subscribed(..)) {
                    self.stranger = None;
                    self.place.subscribed();
                }
                if matches!(reply, Reply::Admitted(_)) {
                    self.diff_since.1 = Some(Instant::now());
                }
                session.handle_reply(reply);
            }
            Command::Unserved => {
                if !matches!(session.state(), "CatchUp" | "Relay" | "Diff") {
                    session.handle_stop();
                }
            }
            Command::Stop => {
                session.handle_stop();
                self.draining = true;
                ctx.run_later(self.shared.config.drain_timeout, |middleman, ctx| {
                    middleman.draining = false;
                    if middleman.closing {
                        middleman.part(ctx);
                    }
                    let (head, sent) =
                        (middleman.shared.log.lock().head(), middleman.session.sent());
                    let text = format!("the history ends at revision {head}, sent up to {sent}");
                    ctx.address().do_send(Reply::Close(Reason::Stopping, text).into());
                });
            }
        }
        self.drive(ctx);
    }
}
