//! Starts a Server on its arbiters, and a Middleman for every connection that comes.

use std::future::poll_fn;
use std::pin::pin;
use std::sync::Arc;
use std::sync::atomic::{AtomicU32, AtomicU64, Ordering};
use std::time::Duration;

use actix::prelude::*;
use actix_rt::ArbiterHandle;
use tablecast_protocol::{FollowerId, Table};
use tokio::sync::{Mutex, OwnedSemaphorePermit, Semaphore};
use tokio::time::Instant;
use tokio_util::task::TaskTracker;
use tracing::{debug, info, warn};

use super::middleman::{Middleman, Shared, Stranger};
use super::{Await, Server};
use crate::access::{Incoming, Listener};
use crate::config::{NEVER, ServerConfig};
use crate::metrics;

/// How long the listener waits after an accept that failed: out of files, most of all.
const ACCEPT_PAUSE: Duration = Duration::from_millis(50);

/// How long that is not said again.
const SAID_AGAIN: Duration = Duration::from_secs(10);

/// The shortest pause for strangers that ended. A timer is late by up to a millisecond: in pauses of one, a third fewer were let in than
/// are to be, and newcomers waited for twice as long.
const LEAST_PAUSE: Duration = Duration::from_millis(8);

/// For which part of its handshake a stranger is paused for once more. With pauses of 2 ms, what they compute takes a twentieth of a
/// processor, as long as it is no more than [`HANDSHAKES`] of these.
const HANDSHAKE: Duration = Duration::from_micros(100);

/// For how many parts of a handshake is paused at the most. A signature by RSA takes ten and more; but newcomers wait behind all the
/// strangers that are there, and no longer than they have patience.
const HANDSHAKES: u32 = 4;

/// Of how many followers at a time it is found out what counts of what they missed: each takes up to 10 MB
/// for some milliseconds.
const SHORTENING: usize = 8;

/// Where a server's actors live.
#[derive(Clone, Debug)]
pub struct Arbiters {
    /// The Server alone.
    pub server: ArbiterHandle,
    /// Connections, spread evenly. At least one.
    pub connections: Vec<ArbiterHandle>,
    /// Differs. At least one.
    pub differs: Vec<ArbiterHandle>,
}

/// How many pauses are due.
#[derive(Debug, Default)]
struct Due {
    /// For connections that ended and never were subscribed, or were for a moment.
    ended: AtomicU32,
    /// For what the handshakes of the former took.
    handshakes: AtomicU32,
}

impl Due {
    /// How long is paused for all of them, which are not due then any more.
    fn take(&self, config: &ServerConfig) -> Duration {
        // More end at once when a network fails for a moment, and all of them are honest: for those above it is not paused.
        let strangers = u32::try_from(config.strangers).unwrap_or(u32::MAX);
        let pauses = |count| config.stranger_pause.saturating_mul(count);
        let bounded = |count, most| pauses(count).min(pauses(most).max(LEAST_PAUSE));
        let [ended, handshakes] =
            [&self.ended, &self.handshakes].map(|due| due.load(Ordering::Relaxed));
        let pause = bounded(ended, strangers)
            .saturating_add(bounded(handshakes, strangers.saturating_mul(HANDSHAKES)));
        if pause < LEAST_PAUSE {
            return Duration::ZERO;
        }
        self.ended.fetch_sub(ended, Ordering::Relaxed);
        self.handshakes.fetch_sub(handshakes, Ordering::Relaxed);
        pause
    }
}

/// A Server and what is needed to let followers in.
#[derive(Clone, Debug)]
pub struct Endpoint {
    server: Addr<Server>,
    shared: Shared,
    connections: Arc<[ArbiterHandle]>,
    next: Arc<AtomicU64>,
    /// Places for connections that are not subscribed yet.
    strangers: Arc<Semaphore>,
    due: Arc<Due>,
    /// Held by the listener that pauses: all of them let in as many together as one would alone.
    pausing: Arc<Mutex<()>>,
    listeners: TaskTracker,
}

impl Endpoint {
    /// Starts a Server of this table, whose limits are the server's, whatever `config.session` says.
    ///
    /// ```
    /// use actix::prelude::*;
    /// use tablecast_actors::server::{Arbiters, Endpoint, GetStatus};
    /// use tablecast_actors::{ServerConfig, access::memory};
    /// use tablecast_actors::protocol::{Limits, MemoryStore, Table};
    ///
    /// System::new().block_on(async {
    ///     let here = Arbiter::current();
    ///     let table = Table::open(MemoryStore::new(), Limits::default()).unwrap();
    ///     let arbiters = Arbiters {
    ///         server: here.clone(),
    ///         connections: vec![here.clone()],
    ///         differs: vec![here],
    ///     };
    ///     let endpoint = Endpoint::start(table, ServerConfig::default(), &arbiters);
    ///     endpoint.listen(memory::pair().0);
    ///     assert_eq!(endpoint.server().send(GetStatus).await.unwrap().keys, 0);
    /// });
    /// ```
    pub fn start(table: Table, config: ServerConfig, arbiters: &Arbiters) -> Self {
        let Arbiters { server, connections, differs } = arbiters;
        let start = |actor| Server::start_in_arbiter(server, move |_| actor);
        Self::new(table, config, connections, differs, start)
    }

    /// The same with all actors on the thread that calls, which must be one that runs a `LocalSet`: an arbiter's, or that of
    /// a simulated host.
    pub fn start_here(table: Table, config: ServerConfig) -> Self {
        Self::new(table, config, &[], &[], Actor::start)
    }

    fn new(
        table: Table,
        mut config: ServerConfig,
        connections: &[ArbiterHandle],
        differs: &[ArbiterHandle],
        start: impl FnOnce(Server) -> Addr<Server>,
    ) -> Self {
        config.session.limits = table.limits();
        let server = Server::new(table, config.clone());
        let (log, stopping) = (server.log(), server.serving());
        let server = start(server);
        let strangers = config.strangers.clamp(1, Semaphore::MAX_PERMITS);
        let shared = Shared {
            config: Arc::new(config),
            server: server.clone(),
            log,
            differs: differs.into(),
            shortening: Arc::new(Semaphore::new(SHORTENING)),
            held: Arc::default(),
            stopping,
        };
        Self {
            server,
            shared,
            connections: connections.into(),
            next: Arc::new(AtomicU64::new(1)),
            strangers: Arc::new(Semaphore::new(strangers)),
            due: Arc::default(),
            pausing: Arc::default(),
            listeners: TaskTracker::new(),
        }
    }

    /// The Server, to be sent messages.
    pub fn server(&self) -> &Addr<Server> {
        &self.server
    }

    /// Accepts connections from here on, as soon as the server is ready.
    pub fn listen(&self, listener: impl Listener) {
        let this = self.clone();
        let stopping = self.shared.stopping.clone();
        let listening = self.listeners.track_future(async move {
            tokio::select! {
                biased;
                () = stopping.cancelled() => {}
                () = this.accept(listener) => {}
            }
        });
        spawn_on(self.connections.first(), listening);
    }

    /// Accepts no more connections, and closes those that are not subscribed yet; done when nobody listens any more. Followers are told
    /// by [`Stop`](super::Stop).
    pub async fn close(&self) {
        self.shared.stopping.cancel();
        self.listeners.close();
        self.listeners.wait().await;
    }

    async fn accept(self, mut listener: impl Listener) {
        if !matches!(self.server.send(Await).await, Ok(Some(_))) {
            return;
        }
        let mut said: Option<Instant> = None;
        loop {
            let pausing = self.pausing.lock().await;
            let pause = self.due.take(&self.shared.config);
            if !pause.is_zero() {
                tokio::time::sleep(pause).await;
            }
            drop(pausing);
            match listener.accept().await {
                Ok(incoming) => {
                    if self.strangers.available_permits() == 0 {
                        debug!(peer = incoming.peer, "waits for others to say who they are");
                    }
                    // It is never closed.
                    let Ok(place) = Arc::clone(&self.strangers).acquire_owned().await else {
                        return;
                    };
                    let until = Instant::now() + self.shared.config.handshake_timeout.min(NEVER);
                    let due = Arc::clone(&self.due);
                    let took = Duration::ZERO;
                    self.serve(incoming, Place { place: Some(place), due, took, until });
                }
                Err(error) => {
                    if said.is_none_or(|at| at.elapsed() >= SAID_AGAIN) {
                        said = Some(Instant::now());
                        warn!(address = listener.address(), %error, "cannot accept");
                    }
                    tokio::time::sleep(ACCEPT_PAUSE).await;
                }
            }
        }
    }

    fn serve(&self, incoming: Incoming, mut place: Place) {
        let number = self.next.fetch_add(1, Ordering::Relaxed);
        let arbiters = &self.connections;
        let index = usize::try_from(number).unwrap_or(0) % arbiters.len().max(1);
        let shared = self.shared.clone();
        let until = place.until;
        spawn_on(arbiters.get(index), async move {
            let address = incoming.peer.clone();
            debug!(follower = number, address, "connected");
            let mut opening = pin!(incoming.open());
            let opening = poll_fn(|cx| {
                let before = processor_time();
                let opened = opening.as_mut().poll(cx);
                place.took += processor_time().saturating_sub(before);
                opened
            });
            let opened = tokio::select! {
                biased;
                () = shared.stopping.cancelled() => return,
                opened = tokio::time::timeout_at(until, opening) => opened,
            };
            match opened {
                Ok(Ok((stream, certificate))) => {
                    let stranger = Stranger { address, certificate };
                    Middleman::new(shared, FollowerId(number), stream, stranger, place).start();
                }
                Ok(Err(error)) => {
                    info!(address, %error, "no handshake");
                    metrics::connection_ended("Handshake");
                }
                Err(_) => {
                    info!(address, "no handshake in time");
                    metrics::connection_ended("Handshake");
                }
            }
        });
    }
}

/// A place among the connections that are not subscribed yet, until [`Place::subscribed`]. If the connection ends before that, or
/// before it might have taken so long, somebody else is let in a little later: to connect over and over is no cheaper for the
/// server if Hello is said each time, nor if there is a handshake that it has to compute.
pub(crate) struct Place {
    place: Option<OwnedSemaphorePermit>,
    due: Arc<Due>,
    /// What its handshake took of a processor, where the system says so.
    took: Duration,
    /// When it is closed unless it is subscribed.
    pub(super) until: Instant,
}

impl Place {
    /// The place is for others.
    pub(super) fn subscribed(&mut self) {
        self.place = None;
    }
}

impl Drop for Place {
    fn drop(&mut self) {
        let handshakes = match self.place {
            Some(_) => self.took.as_micros() / HANDSHAKE.as_micros(),
            None if Instant::now() < self.until => 0,
            None => return,
        };
        let handshakes = u32::try_from(handshakes).unwrap_or(HANDSHAKES).min(HANDSHAKES);
        self.due.ended.fetch_add(1, Ordering::Relaxed);
        self.due.handshakes.fetch_add(handshakes, Ordering::Relaxed);
    }
}

/// What this thread has had of a processor so far. Not what time it was: beside busy threads a handshake of 0.1 ms lasts for several.
#[cfg(target_os = "linux")]
fn processor_time() -> Duration {
    let now = rustix::time::clock_gettime(rustix::time::ClockId::ThreadCPUTime);
    now.try_into().unwrap_or_default()
}

#[cfg(not(target_os = "linux"))]
fn processor_time() -> Duration {
    Duration::ZERO
}

/// Runs it on an arbiter, or without one on the thread that calls.
pub(super) fn spawn_on(
    arbiter: Option<&ArbiterHandle>,
    task: impl Future<Output = ()> + Send + 'static,
) {
    match arbiter {
        Some(arbiter) => {
            arbiter.spawn(task);
        }
        None => {
            actix_rt::spawn(task);
        }
    }
}
