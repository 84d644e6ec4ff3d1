//! What a table is made of: keys, values, and the changes between two states of it.

use bytes::Bytes;

/// A key: any bytes, the empty key included, up to [`Limits::key_bytes`](crate::Limits).
pub type Key = Bytes;

/// A value: any bytes, the empty value included, up to [`Limits::value_bytes`](crate::Limits).
pub type Value = Bytes;

/// One change of a table.
///
/// ```
/// use tablecast_protocol::Change;
///
/// let write = Change::write("colour", "blue");
/// assert_eq!(write.value().map(|value| &value[..]), Some(&b"blue"[..]));
/// let delete = Change::delete("colour");
/// assert_eq!(delete.key(), write.key());
/// ```
#[derive(Debug, Clone, PartialEq, Eq, Hash)]
pub enum Change {
    /// The key has this value from now on.
    Write {
        /// The key.
        key: Key,
        /// Its new value.
        value: Value,
    },
    /// The key is absent from now on. Deleting an absent key is a change too: it takes a revision.
    Delete {
        /// The key.
        key: Key,
    },
}

impl Change {
    /// A write of `value` at `key`.
    pub fn write(key: impl Into<Key>, value: impl Into<Value>) -> Self {
        Self::Write { key: key.into(), value: value.into() }
    }

    /// A delete of `key`.
    pub fn delete(key: impl Into<Key>) -> Self {
        Self::Delete { key: key.into() }
    }

    /// The key that is changed.
    pub fn key(&self) -> &Key {
        match self {
            Self::Write { key, .. } | Self::Delete { key } => key,
        }
    }

    /// The new value; `None` for a delete.
    pub fn value(&self) -> Option<&Value> {
        match self {
            Self::Write { value, .. } => Some(value),
            Self::Delete { .. } => None,
        }
    }
}
