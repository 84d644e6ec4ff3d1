//! What the actors are set to.

use std::sync::Arc;
use std::time::Duration;

use tablecast_protocol::server::SessionConfig;
use tablecast_protocol::{HeartbeatConfig, Limits};

use crate::authorize::{AllowAll, Authorize, Token};

/// More events than these are not kept for a subscriber, whatever is asked for: room for them is made at once.
pub(crate) const MAX_EVENTS: usize = 1 << 20;

/// No wait is longer: half a millennium. A time that far off can be said, and none beyond all of them.
pub(crate) const NEVER: Duration = Duration::from_secs(1 << 34);

/// What a server is set to. Every bound has a name here, and says what happens at it.
#[derive(Clone, Debug)]
pub struct ServerConfig {
    /// Largest things, repairs, heartbeats.
    pub session: SessionConfig,
    /// Who may follow: everybody, which is fit for an address that only this machine reaches.
    pub authorize: Arc<dyn Authorize>,
    /// How much of the recent history is kept for followers that lag: 64 MiB. A follower that lags by
    /// more is told that it fell behind, and is repaired by a diff.
    pub log_bytes: usize,
    /// How many diffs run at once: 4. Others wait: whose last diff, or connect, is longest ago is next, so that
    /// a follower that asks over and over holds up nobody who does not. While what the Server is asked waits for
    /// more than 2 ms, they begin one after the other: a second behind the last one, or, when one has ended, when it is over
    /// for as long as it took. One of a follower that asks over and over (`diff_rest`) begins when the last such one is over for eight
    /// times as long, too, 8 s at the most.
    pub diffs_at_once: usize,
    /// How long a diff keeps its place while others wait: 60 s, and an eighth of that in which nothing happens in it. Then it
    /// is aborted as `Busy`, and asked for again behind the others; what it has repaired stays. Looked at once a
    /// second. A follower whose walk alone takes longer, over a line of less than 1 Mbit/s with a large table, is repaired when nobody
    /// else waits. (A diff in which nothing happens ends with `SessionConfig::diff_stall`, whether others wait or not.)
    pub diff_turn: Duration,
    /// How long a follower whose diff has ended rests: 10 s. If it asks for another one before that, it waits for the one
    /// place that all who do so share; the others stay free for those that need them.
    pub diff_rest: Duration,
    /// How many diffs wait at most: 10,000. One more is aborted as `Busy`, and asked for again. With 0 there are none.
    pub diffs_waiting: usize,
    /// How often all followers that lack nothing compare their roots with the server's: every 60 s.
    /// `None` is after diffs only.
    pub verify_every: Option<Duration>,
    /// How many followers there are at most: 10,000. One more is refused as `Full`.
    pub followers: usize,
    /// How many connections may be on their way to become followers, their TLS handshake included: 1,000,
    /// one at the least. The next ones wait in the listener's queue.
    pub strangers: usize,
    /// How long nobody is let in for each connection that ended without becoming a follower, or within `handshake_timeout`: 2 ms,
    /// and on Linux once more for each 0.1 ms of a processor, 0.4 at the most, that the TLS handshake took of one that was no follower.
    /// So those that come and go, over and over, take a small share of the server's time, however many there are. What is due at once
    /// is as much as for `strangers` of them; for those above it is not waited.
    pub stranger_pause: Duration,
    /// How long a connection may take to say who it is, its TLS handshake included: 10 s. Then it is
    /// closed.
    pub handshake_timeout: Duration,
    /// How long a follower's socket may take nothing while something is to be sent: 30 s. Then it is
    /// closed. Looked at as often, so up to twice as long passes.
    pub stall_timeout: Duration,
    /// How long followers of a server that stops have to read what is in the log: 5 s. Then they are told where
    /// it ends, and closed.
    pub drain_timeout: Duration,
    /// How many bytes are handed to a socket at once: 256 KiB. More leaves the processor's cache.
    pub flush_bytes: usize,
    /// How many changes a subscriber to them may lag behind: 1,024, and 1 Mi at the most. Then it is told how many it missed.
    pub event_capacity: usize,
}

impl Default for ServerConfig {
    fn default() -> Self {
        Self {
            session: SessionConfig::default(),
            authorize: Arc::new(AllowAll),
            log_bytes: 64 << 20,
            diffs_at_once: 4,
            diff_turn: Duration::from_secs(60),
            diff_rest: Duration::from_secs(10),
            diffs_waiting: 10_000,
            verify_every: Some(Duration::from_secs(60)),
            followers: 10_000,
            strangers: 1000,
            stranger_pause: Duration::from_millis(2),
            handshake_timeout: Duration::from_secs(10),
            stall_timeout: Duration::from_secs(30),
            drain_timeout: Duration::from_secs(5),
            flush_bytes: 256 << 10,
            event_capacity: 1024,
        }
    }
}

/// What a follower is set to.
#[derive(Clone, Debug)]
pub struct ClientConfig {
    /// What the server's people see: up to 255 bytes, the rest is cut off.
    pub name: String,
    /// What the server is shown before anything else; `None` is nothing.
    pub token: Option<Token>,
    /// Largest things. A server whose limits are above these is refused.
    pub limits: Limits,
    /// When the server is asked whether it is there, and given up.
    pub heartbeat: HeartbeatConfig,
    /// How long connecting may take: 10 s.
    pub connect_timeout: Duration,
    /// How long the first wait before the next attempt is: 100 ms. Each next one is twice as long,
    /// with up to as much again by chance. A connection that lasts longer than the wait before it begins anew.
    pub backoff_min: Duration,
    /// The longest wait before the next attempt: 10 s.
    pub backoff_max: Duration,
    /// Ask for a diff about so often, spread over half the time more and less, so that a thousand
    /// followers that began together do not ask together; `None` (the default) is only when there is
    /// a reason.
    pub diff_every: Option<Duration>,
    /// Which repairs are held until somebody says that they are meant: those that would delete more than
    /// half of the keys and more than 1,000. `None` holds none. Live deletes are never held.
    pub mass_delete: Option<MassDelete>,
    /// Whether the whole store is read, and compared with the tree, whenever roots are compared from
    /// time to time, so that what was changed behind the follower's back is found: yes. It costs a hash of
    /// every value, on a thread of its own.
    pub scrub: bool,
    /// About how many bytes of messages may wait to be applied, as they are in memory: 4 MiB, which is 1.4 MiB of changes of 64 bytes. Then
    /// nothing more is read.
    pub inbox_bytes: usize,
    /// How many events a subscriber may lag behind: 1,024, and 1 Mi at the most. Then it is told how many it missed.
    pub event_capacity: usize,
}

impl Default for ClientConfig {
    fn default() -> Self {
        Self {
            name: String::new(),
            token: None,
            limits: Limits::default(),
            heartbeat: HeartbeatConfig::default(),
            connect_timeout: Duration::from_secs(10),
            backoff_min: Duration::from_millis(100),
            backoff_max: Duration::from_secs(10),
            diff_every: None,
            mass_delete: Some(MassDelete::default()),
            scrub: true,
            inbox_bytes: 4 << 20,
            event_capacity: 1024,
        }
    }
}

/// A repair deletes too much if it deletes more than this share of the keys, and more than this number.
///
/// A server that came up empty, or with a part of its table, would otherwise empty every follower.
///
/// ```
/// use tablecast_actors::MassDelete;
///
/// let guard = MassDelete::default();
/// assert_eq!((guard.max_deletes(100), guard.max_deletes(10_000)), (1000, 5000));
/// ```
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct MassDelete {
    /// From 0 to 1: half.
    pub share: f64,
    /// However small the table: 1,000.
    pub keys: u64,
}

impl Default for MassDelete {
    fn default() -> Self {
        Self { share: 0.5, keys: 1000 }
    }
}

impl MassDelete {
    /// The most keys that a repair of a table of `keys` keys may delete.
    #[expect(
        clippy::cast_precision_loss,
        clippy::cast_possible_truncation,
        clippy::cast_sign_loss,
        reason = "no table has as many keys as a double counts exactly, and a cast saturates"
    )]
    pub fn max_deletes(&self, keys: usize) -> u64 {
        ((keys as f64 * self.share) as u64).max(self.keys)
    }
}
