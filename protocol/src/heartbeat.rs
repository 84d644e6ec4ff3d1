//! When to ask whether the peer is there, and when to give it up.

use std::time::Duration;

/// Two intervals. Time is whatever the caller counts from, the same for all calls of a session.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct HeartbeatConfig {
    /// An end that has not heard anything for so long asks.
    pub ping_after: Duration,
    /// An end that has not heard anything for so long closes. Above `ping_after` by more than a
    /// round trip.
    pub dead_after: Duration,
}

impl Default for HeartbeatConfig {
    /// 5 s and 15 s: a dead peer is noticed before most people look at a dashboard, and an idle
    /// follower costs a packet of 6 bytes each way every 5 s.
    fn default() -> Self {
        Self { ping_after: Duration::from_secs(5), dead_after: Duration::from_secs(15) }
    }
}

#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub(crate) struct Heartbeat {
    config: HeartbeatConfig,
    heard: Duration,
    /// A ping is out since then; one at a time.
    asked: Option<Duration>,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Beat {
    Quiet,
    Ping,
    Dead,
}

impl Heartbeat {
    pub(crate) fn new(config: HeartbeatConfig, now: Duration) -> Self {
        Self { config, heard: now, asked: None }
    }

    pub(crate) fn heard(&mut self, now: Duration) {
        self.heard = now;
        self.asked = None;
    }

    /// When to call [`Heartbeat::beat`] next.
    pub(crate) fn next(&self) -> Duration {
        let HeartbeatConfig { ping_after, dead_after } = self.config;
        let wait = if self.asked.is_some() { dead_after } else { ping_after.min(dead_after) };
        self.heard.saturating_add(wait)
    }

    pub(crate) fn beat(&mut self, now: Duration) -> Beat {
        let silence = now.saturating_sub(self.heard);
        if silence >= self.config.dead_after {
            Beat::Dead
        } else if silence >= self.config.ping_after && self.asked.is_none() {
            self.asked = Some(now);
            Beat::Ping
        } else {
            Beat::Quiet
        }
    }
}
