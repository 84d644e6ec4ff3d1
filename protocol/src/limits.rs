//! How large things may be. Arguments, never globals: each end states its own in the handshake.

/// The largest frame, key, value and answer that an end sends or accepts, in bytes.
///
/// ```
/// use tablecast_protocol::{Change, Limits};
///
/// let limits = Limits { value_bytes: 4, ..Limits::default() };
/// let error = limits.check(&Change::write("key", "value")).unwrap_err();
/// assert_eq!(error.to_string(), "value of 5 bytes is above the limit of 4");
/// ```
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct Limits {
    /// Largest frame without its length header, 16 KiB at the least, or walks take more rounds, and below 4 GiB. A
    /// peer that declares a longer one is cut off before memory is spent. 9 MiB: a value and a key at
    /// their limits and a few bytes.
    pub frame_bytes: usize,
    /// Largest key: 64 KiB. A change with a longer one is refused at `write`.
    pub key_bytes: usize,
    /// Largest value: 8 MiB. A change with a longer one is refused at `write`.
    pub value_bytes: usize,
    /// Where an answer of the walk stops; what is left is asked for again. 8 MiB: the differing
    /// parts of a table of a million with every tenth key changed.
    pub answer_bytes: usize,
}

/// Largest frame before the handshake is through, and of a follower that owes a server no answer: whoever connects can have no
/// more reserved.
pub const SMALL_FRAME_BYTES: usize = 4 * 1024;

/// Most changes in one frame. One costs 80 bytes of memory and may be 3 on the wire, so that it
/// is the count, not the bytes, that bounds what a frame can grow to.
pub const MAX_CHANGES: usize = 65_536;

/// What a frame holds beside the keys and values of its changes: array headers, tag, first
/// revision, chain, and at most 10 bytes of headers a change.
pub(crate) const FRAME_OVERHEAD: usize = 64;
pub(crate) const CHANGE_OVERHEAD: usize = 10;

/// A change or batch that is too large. Names the value and the limit.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
#[non_exhaustive]
pub enum LimitError {
    /// The key is too long.
    #[error("key of {bytes} bytes is above the limit of {limit}")]
    Key {
        /// Its length.
        bytes: usize,
        /// [`Limits::key_bytes`].
        limit: usize,
    },
    /// The value is too long.
    #[error("value of {bytes} bytes is above the limit of {limit}")]
    Value {
        /// Its length.
        bytes: usize,
        /// [`Limits::value_bytes`].
        limit: usize,
    },
    /// The batch does not fit one frame.
    #[error("batch of {bytes} bytes is above the frame limit of {limit}")]
    Batch {
        /// Its length on the wire, at most.
        bytes: usize,
        /// [`Limits::frame_bytes`].
        limit: usize,
    },
    /// The batch has too many changes.
    #[error("batch of {changes} changes is above the limit of {limit}")]
    Changes {
        /// How many.
        changes: usize,
        /// [`MAX_CHANGES`].
        limit: usize,
    },
}

impl Default for Limits {
    fn default() -> Self {
        Self {
            frame_bytes: 9 << 20,
            key_bytes: 64 << 10,
            value_bytes: 8 << 20,
            answer_bytes: 8 << 20,
        }
    }
}

impl Limits {
    /// Whether one change may be written.
    ///
    /// # Errors
    /// If its key or its value is too long.
    pub fn check(&self, change: &crate::Change) -> Result<(), LimitError> {
        self.check_key(change.key().len())?;
        self.check_value(change.value().map_or(0, bytes::Bytes::len))
    }

    pub(crate) fn check_entry(
        &self,
        key: &crate::Key,
        value: &crate::Value,
    ) -> Result<(), LimitError> {
        self.check_key(key.len())?;
        self.check_value(value.len())?;
        self.check_frame(FRAME_OVERHEAD + CHANGE_OVERHEAD + key.len() + value.len()).map(drop)
    }

    fn check_frame(&self, bytes: usize) -> Result<usize, LimitError> {
        // Its length is told in four bytes.
        let limit = self.frame_bytes.min(u32::MAX as usize);
        if bytes > limit { Err(LimitError::Batch { bytes, limit }) } else { Ok(bytes) }
    }

    pub(crate) fn check_key(&self, bytes: usize) -> Result<(), LimitError> {
        let limit = self.key_bytes;
        if bytes > limit { Err(LimitError::Key { bytes, limit }) } else { Ok(()) }
    }

    pub(crate) fn check_value(&self, bytes: usize) -> Result<(), LimitError> {
        let limit = self.value_bytes;
        if bytes > limit { Err(LimitError::Value { bytes, limit }) } else { Ok(()) }
    }

    /// Whether these changes may be written as one unit, and how large they are on the wire at most.
    ///
    /// # Errors
    /// If one of them is too large, if there are too many, or if they do not fit one frame.
    pub fn check_batch(&self, changes: &[crate::Change]) -> Result<usize, LimitError> {
        if changes.len() > MAX_CHANGES {
            return Err(LimitError::Changes { changes: changes.len(), limit: MAX_CHANGES });
        }
        let mut bytes = FRAME_OVERHEAD;
        for change in changes {
            self.check(change)?;
            let value = change.value().map_or(0, bytes::Bytes::len);
            bytes += CHANGE_OVERHEAD + change.key().len() + value;
        }
        self.check_frame(bytes)
    }

    /// Whether an end with these limits can be sent whatever an end with `other` accepts to write.
    pub fn covers(&self, other: &Self) -> bool {
        self.frame_bytes >= other.frame_bytes
            && self.key_bytes >= other.key_bytes
            && self.value_bytes >= other.value_bytes
    }
}
