//! How long to wait before the next attempt.

use std::time::Duration;

use backon::{BackoffBuilder, ExponentialBackoff, ExponentialBuilder};

/// Waits that double, each with up to as much again by chance, so that a thousand followers of a
/// server that restarts do not come back at one moment.
#[derive(Debug)]
pub(crate) struct Backoff {
    builder: ExponentialBuilder,
    waits: ExponentialBackoff,
    max: Duration,
}

impl Backoff {
    pub(crate) fn new(min: Duration, max: Duration) -> Self {
        let builder = ExponentialBuilder::default()
            .with_min_delay(min)
            // Jitter comes on top of this.
            .with_max_delay(max / 2)
            .with_jitter()
            .without_max_times();
        Self { builder, waits: builder.build(), max }
    }

    pub(crate) fn next_wait(&mut self) -> Duration {
        self.waits.next().unwrap_or(self.max).min(self.max)
    }

    /// It went well: the next wait is a short one again.
    pub(crate) fn reset(&mut self) {
        self.waits = self.builder.build();
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn waits_double_up_to_the_cap_and_begin_anew() {
        let (min, max) = (Duration::from_millis(100), Duration::from_secs(10));
        let mut backoff = Backoff::new(min, max);
        let mut floor = min;
        for _ in 0..30 {
            let wait = backoff.next_wait();
            assert!(wait >= floor && wait <= (floor * 2).min(max), "{wait:?}");
            floor = (floor * 2).min(max / 2);
        }
        backoff.reset();
        assert!(backoff.next_wait() <= min * 2);
    }
}
