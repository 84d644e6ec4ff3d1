//! The client's Middleman: one connection after the other.
//!
//! The Client starts it, on an arbiter of its own as a rule, so that a store that blocks the Client
//! does not make it look dead. It connects, decodes what comes and hands it over, writes what it is
//! given, and connects again after a while when the connection ends. It decides nothing: the session
//! is the Client's, so that what is applied and what is answered are decided in one turn.

use std::fmt;
use std::pin::Pin;
use std::sync::Arc;
use std::task::{self, Poll};
use std::time::Duration;

use actix::prelude::*;
use tablecast_protocol::server::Close;
use tablecast_protocol::{SMALL_FRAME_BYTES, ToClient, ToServer, wire};
use tokio::sync::oneshot;
use tokio::time::Instant;
use tracing::{debug, info, warn};

use super::backoff::Backoff;
use super::{
    Client, Heard, LinkDown, LinkUp, Malformed, MiddlemanFailed, Received, Traffic, Unreached,
};
use crate::access::codec::{Framed, LAST_WORDS};
use crate::access::{Access, Stream};
use crate::config::ClientConfig;
use crate::error::AccessError;

/// How long nothing is read before that is worth a word when the connection ends.
const LONG_PAUSE: Duration = Duration::from_secs(1);

/// What [`Heard`] counts for among bytes that wait.
pub(crate) const HEARD_BYTES: usize = 1;

/// What a message takes in the Client's mailbox beside its frame's bytes, and what each of its changes takes.
const MESSAGE_BYTES: usize = 256;
const CHANGE_BYTES: usize = 128;

/// How many frames are read before others on this arbiter have their turn.
const TURNS: usize = 32;

/// The number of a connection of this client. What an old one left behind is dropped by it.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, PartialOrd, Ord)]
pub(crate) struct ConnectionId(pub(crate) u64);

/// What the Client says.
#[derive(Debug, Message)]
#[rtype(result = "()")]
pub(crate) enum Command {
    /// Connect, and stay connected.
    Connect,
    /// Send this.
    Send(ConnectionId, ToServer),
    /// So many bytes of messages have been worked off.
    Done(ConnectionId, usize),
    /// The connection ends; what was to be sent goes out first.
    Close(ConnectionId, Close),
    /// End for good, in the same way. This is dropped then.
    Stop(Option<oneshot::Sender<()>>),
}

/// The actor.
pub struct Middleman {
    config: Arc<ClientConfig>,
    access: Arc<dyn Access>,
    client: Addr<Client>,
    backoff: Backoff,
    connection: ConnectionId,
    link: Option<Link>,
    /// The wait before the last attempt.
    waited: Duration,
    stopping: bool,
    /// Who waits for the end.
    told: Option<oneshot::Sender<()>>,
}

struct Link {
    framed: Framed,
    /// When the handshake was through.
    welcomed: Option<Instant>,
    /// Bytes of messages that the Client has not worked off.
    waiting: usize,
    /// Where the last Pong ends in all that is written.
    pong: u64,
    /// When the last whole frame came, or the server was told that this end hears parts of one.
    whole: Instant,
    /// Both directions, when the last `SyncReq` was queued.
    base: (u64, u64),
    /// Since when nothing is read, because the table does not keep up.
    paused: Option<Instant>,
    /// What came is no message: the Client has been told, and nothing more is read.
    malformed: bool,
    /// The session has ended: close when all is written.
    closing: bool,
}

impl Link {
    /// A server that asks and does not read is not read from either.
    fn is_unread(&self, config: &ClientConfig) -> bool {
        self.framed.queued() > config.inbox_bytes.saturating_add(config.limits.answer_bytes)
    }

    /// Says that this end is alive. One is enough for however many were asked.
    fn pong(&mut self) {
        if self.framed.sent >= self.pong {
            self.framed.queue(wire::encode(&ToServer::Pong {}));
            self.pong = self.framed.end();
        }
    }

    /// A frame that is long on its way stands in front of a `Ping`.
    fn hears_part(&mut self, ping_after: Duration) {
        if self.welcomed.is_some() && self.whole.elapsed() >= ping_after {
            self.whole = Instant::now();
            self.pong();
        }
    }

    /// Tells the Client that the server is alive: not, if it has something of this connection to work off,
    /// which says so too when it comes to it.
    fn heard(&mut self, heard: Heard, client: &Addr<Client>) {
        if self.waiting == 0 {
            self.waiting = HEARD_BYTES;
            client.do_send(heard);
        }
    }
}

/// What a message takes while it waits. Small ones are many times as large as on the wire.
fn waiting_bytes(frame: usize, message: &ToClient) -> usize {
    let changes = if let ToClient::Live { changes, .. }
    | ToClient::CatchUp { changes, .. }
    | ToClient::Repair { writes: changes, .. } = message
    {
        changes.0.len()
    } else {
        0
    };
    frame + MESSAGE_BYTES + changes * CHANGE_BYTES
}

impl Middleman {
    pub(crate) fn new(
        config: Arc<ClientConfig>,
        access: Arc<dyn Access>,
        client: Addr<Client>,
        last: ConnectionId,
    ) -> Self {
        let backoff = Backoff::new(config.backoff_min, config.backoff_max);
        let waited = Duration::ZERO;
        let (connection, link, stopping, told) = (last, None, false, None);
        Self { config, access, client, backoff, connection, link, waited, stopping, told }
    }

    fn connect(&self, ctx: &mut Context<Self>) {
        let limit = self.config.connect_timeout;
        let connecting = tokio::time::timeout(limit, self.access.connect()).into_actor(self);
        ctx.spawn(connecting.map(move |result, middleman, ctx| {
            let what = "connection";
            match result {
                _ if middleman.stopping => {}
                Ok(Ok(stream)) => middleman.up(stream),
                Ok(Err(error)) => middleman.unreached(&error.into(), ctx),
                Err(_) => {
                    let seconds = limit.as_secs_f32();
                    middleman.unreached(&AccessError::Timeout { what, seconds }, ctx);
                }
            }
        }));
    }

    fn up(&mut self, stream: Box<dyn Stream>) {
        self.connection.0 += 1;
        debug!(server = self.access.address(), "connected");
        let mut framed = Framed::new(stream, SMALL_FRAME_BYTES);
        if let Some(token) = &self.config.token {
            framed.queue(token.frame());
        }
        self.link = Some(Link {
            framed,
            welcomed: None,
            waiting: 0,
            pong: 0,
            whole: Instant::now(),
            base: (0, 0),
            paused: None,
            malformed: false,
            closing: false,
        });
        self.client.do_send(LinkUp(self.connection));
    }

    /// The connection is over, for this reason.
    fn down(&mut self, error: &AccessError, ctx: &mut Context<Self>) {
        if let Some(link) = self.link.take() {
            // One that ends soon each time is no reason to come back soon.
            if link.welcomed.is_some_and(|since| since.elapsed() >= self.waited) {
                self.backoff.reset();
            }
            let mut reason = error.to_string();
            // A server that gave up on a full socket could not say so.
            if let Some(paused) = link.paused.map(|since| since.elapsed())
                && paused >= LONG_PAUSE
            {
                let seconds = paused.as_secs_f32();
                reason += &format!("; this end had read nothing for {seconds} s");
                warn!(server = self.access.address(), reason, "the table did not keep up");
            }
            self.client.do_send(LinkDown(self.connection, reason));
            if self.stopping {
                ctx.stop();
            } else {
                self.retry(error, ctx);
            }
        }
    }

    /// There was no connection at all.
    fn unreached(&mut self, error: &AccessError, ctx: &mut Context<Self>) {
        self.client.do_send(Unreached(error.to_string()));
        self.retry(error, ctx);
    }

    fn retry(&mut self, error: &AccessError, ctx: &mut Context<Self>) {
        let wait = self.backoff.next_wait();
        self.waited = wait;
        info!(server = self.access.address(), %error, ?wait, "not connected");
        ctx.run_later(wait, |middleman, ctx| {
            if middleman.link.is_none() && !middleman.stopping {
                middleman.connect(ctx);
            }
        });
    }

    /// The connection that is meant, unless it is over.
    fn link(&mut self, connection: ConnectionId) -> Option<&mut Link> {
        self.link.as_mut().filter(|_| self.connection == connection)
    }

    fn read(&mut self, cx: &mut task::Context<'_>) -> Result<bool, AccessError> {
        let connection = self.connection;
        let Some(link) = &mut self.link else { return Ok(false) };
        let before = link.framed.received;
        for _ in 0..TURNS {
            // One message at the least, however few bytes may wait.
            let full =
                link.waiting >= self.config.inbox_bytes.max(1) || link.is_unread(&self.config);
            if link.closing || link.malformed || full {
                if full {
                    link.paused.get_or_insert_with(Instant::now);
                }
                return Ok(false);
            }
            link.paused = None;
            let Poll::Ready(frame) = link.framed.poll_frame(cx) else {
                if link.framed.received > before {
                    link.heard(Heard { connection, part: true }, &self.client);
                    link.hears_part(self.config.heartbeat.ping_after);
                }
                return Ok(false);
            };
            link.whole = Instant::now();
            let decoded = match frame {
                Err(error @ AccessError::FrameTooLong { .. }) => Err(error),
                frame => {
                    let frame = frame?.ok_or(AccessError::Closed)?;
                    let message = wire::decode::<ToClient>(&frame, &self.config.limits);
                    message.map(|message| (message, frame.len())).map_err(AccessError::from)
                }
            };
            match decoded {
                // Answered here: the Client may be busy applying, and is alive all the same.
                Ok((ToClient::Ping {}, _)) => {
                    link.pong();
                    link.heard(Heard { connection, part: false }, &self.client);
                }
                Ok((ToClient::Pong {}, _)) => {
                    link.heard(Heard { connection, part: false }, &self.client);
                }
                Ok((message, frame)) => {
                    if matches!(message, ToClient::Welcome { .. }) {
                        link.framed.set_max_frame_bytes(self.config.limits.frame_bytes);
                        link.welcomed = Some(Instant::now());
                    }
                    let bytes = waiting_bytes(frame, &message);
                    link.waiting += bytes;
                    let (sent, received) = link.base;
                    let traffic = Traffic {
                        sent: link.framed.sent.saturating_sub(sent),
                        received: link.framed.decoded().saturating_sub(received),
                    };
                    let total = Traffic { sent: link.framed.sent, received: link.framed.decoded() };
                    let received = Received { connection, message, bytes, traffic, total };
                    self.client.do_send(received);
                }
                Err(error) => {
                    // The session says goodbye, and why.
                    link.malformed = true;
                    self.client.do_send(Malformed(connection, error));
                    return Ok(false);
                }
            }
        }
        Ok(true)
    }

    fn pump(&mut self, cx: &mut task::Context<'_>) -> Result<(), AccessError> {
        if self.read(cx)? {
            cx.waker().wake_by_ref();
        }
        let Some(link) = &mut self.link else { return Ok(()) };
        let unread = link.is_unread(&self.config);
        let flushed = link.framed.poll_flush(cx);
        if link.framed.has_taken() {
            link.heard(Heard { connection: self.connection, part: true }, &self.client);
        }
        if let Poll::Ready(result) = flushed {
            result?;
            if unread {
                // What was not read because of that can be, and nothing else says so.
                cx.waker().wake_by_ref();
            }
            // A server that has heard the last words closes, too.
            if link.closing
                && link.framed.poll_shutdown(cx).is_ready()
                && link.framed.poll_drain(cx).is_ready()
            {
                return Err(AccessError::Closed);
            }
        }
        Ok(())
    }
}

impl fmt::Debug for Middleman {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Middleman")
            .field("server", &self.access.address())
            .field("connection", &self.connection)
            .field("up", &self.link.is_some())
            .finish_non_exhaustive()
    }
}

impl Actor for Middleman {
    type Context = Context<Self>;

    fn started(&mut self, ctx: &mut Context<Self>) {
        ctx.spawn(Pump);
    }
}

impl Drop for Middleman {
    /// Also after a panic: the Client must not wait for a connection that is no more.
    fn drop(&mut self) {
        if self.link.is_some() {
            self.client.do_send(LinkDown(self.connection, "the connection failed".to_owned()));
        }
        if !self.stopping {
            self.client.do_send(MiddlemanFailed(self.connection));
        }
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
        if let Err(error) = middleman.pump(cx) {
            middleman.down(&error, ctx);
        }
        Poll::Pending
    }
}

impl Handler<Command> for Middleman {
    type Result = ();

    fn handle(&mut self, command: Command, ctx: &mut Context<Self>) {
        match command {
            Command::Connect => {
                if self.link.is_none() {
                    self.connect(ctx);
                }
            }
            Command::Send(connection, message) => {
                if let Some(link) = self.link(connection) {
                    if matches!(message, ToServer::SyncReq { .. }) {
                        link.base = (link.framed.end(), link.framed.decoded());
                    }
                    link.framed.queue(wire::encode(&message));
                }
            }
            Command::Done(connection, bytes) => {
                if let Some(link) = self.link(connection) {
                    link.waiting = link.waiting.saturating_sub(bytes);
                }
            }
            Command::Close(connection, close) => {
                if let Some(link) = self.link(connection) {
                    link.closing = true;
                    let error = AccessError::from(close);
                    ctx.run_later(LAST_WORDS, move |middleman, ctx| {
                        if middleman.connection == connection {
                            middleman.down(&error, ctx);
                        }
                    });
                }
            }
            Command::Stop(told) => {
                self.stopping = true;
                self.told = self.told.take().or(told);
                match &mut self.link {
                    // The Client has said farewell before.
                    Some(link) => link.closing = true,
                    None => ctx.stop(),
                }
                ctx.run_later(LAST_WORDS, |_, ctx| ctx.stop());
            }
        }
    }
}
