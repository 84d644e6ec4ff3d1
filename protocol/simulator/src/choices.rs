//! What a run draws from: a seed, or bytes that somebody else chose.

use std::ops::{Deref, DerefMut};

/// Random numbers of a seed; or each one from a seed of a byte, while there are bytes: so that a fuzzer
/// that changes a byte changes one decision.
pub(crate) struct Choices<'a> {
    bytes: &'a [u8],
    rng: fastrand::Rng,
}

impl<'a> Choices<'a> {
    pub(crate) fn of_seed(seed: u64) -> Self {
        Self { bytes: &[], rng: fastrand::Rng::with_seed(seed) }
    }

    pub(crate) fn of_bytes(bytes: &'a [u8]) -> Self {
        Self { bytes, rng: fastrand::Rng::with_seed(0) }
    }
}

impl Deref for Choices<'_> {
    type Target = fastrand::Rng;

    fn deref(&self) -> &fastrand::Rng {
        &self.rng
    }
}

impl DerefMut for Choices<'_> {
    fn deref_mut(&mut self) -> &mut fastrand::Rng {
        if let Some((byte, rest)) = self.bytes.split_first() {
            self.bytes = rest;
            self.rng.seed(u64::from(*byte));
        }
        &mut self.rng
    }
}
