//! Everything that may cross the wire. Direction is in the type, so that [`ToServer::SyncReq`]
//! (may I have a diff?) and [`ToClient::SyncRequest`] (what is at these nodes?) never meet in one
//! match.
//!
//! A message is an array of its tag and its fields, in the order in which they stand here.

use std::fmt;

use serde::de::{self, Deserialize, Deserializer, SeqAccess, Visitor};
use serde::ser::SerializeTuple;
use serde::{Serialize, Serializer};

use crate::diff::Query;
use crate::limits::{LimitError, Limits};
use crate::position::{Chain, ChainTag, Epoch, Position, Revision};
use crate::tree::Hash;
use crate::wire::{Changes, Message, Raw, check_pairs, field};

/// The number of a diff on its connection, chosen by the follower: 1, 2, 3 ... A message of an
/// earlier diff is never listened to.
#[derive(
    Clone, Copy, Debug, Default, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, serde::Deserialize,
)]
#[serde(transparent)]
pub struct DiffId(pub u32);

impl fmt::Display for DiffId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.0.fmt(f)
    }
}

macro_rules! messages {
    ($(#[$doc:meta])* $name:ident { $(
        $(#[$variant_doc:meta])*
        $tag:literal $variant:ident { $( $(#[$field_doc:meta])* $field:ident: $type:ty, )* }
    )* }) => {
        $(#[$doc])*
        #[derive(Clone, Debug, PartialEq, Eq, Hash)]
        pub enum $name { $(
            $(#[$variant_doc])*
            $variant { $( $(#[$field_doc])* $field: $type, )* },
        )* }

        impl $name {
            /// Tag and name of every message, in the order of their tags.
            pub const TAGS: &'static [(u8, &'static str)] = &[$(($tag, stringify!($variant))),*];

            /// Its tag on the wire.
            pub fn tag(&self) -> u8 {
                match self { $( Self::$variant { .. } => $tag, )* }
            }

            fn named(&self) -> &'static str {
                match self { $( Self::$variant { .. } => stringify!($variant), )* }
            }
        }

        impl Serialize for $name {
            fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
                match self { $(
                    Self::$variant { $($field),* } => {
                        const FIELDS: &[&str] = &[$(stringify!($field)),*];
                        let mut array = serializer.serialize_tuple(1 + FIELDS.len())?;
                        array.serialize_element::<u8>(&$tag)?;
                        $( array.serialize_element($field)?; )*
                        array.end()
                    }
                )* }
            }
        }

        impl<'de> Deserialize<'de> for $name {
            fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
                struct Tagged;
                impl<'de> Visitor<'de> for Tagged {
                    type Value = $name;

                    fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                        f.write_str(concat!("a message ", stringify!($name)))
                    }

                    fn visit_seq<A: SeqAccess<'de>>(self, mut seq: A) -> Result<$name, A::Error> {
                        let length = seq.size_hint().unwrap_or(0);
                        match field::<A, u8>(&mut seq, "tag")? {
                            $( $tag => {
                                const FIELDS: &[&str] = &[$(stringify!($field)),*];
                                if length != 1 + FIELDS.len() {
                                    return Err(de::Error::invalid_length(length, &self));
                                }
                                $( let $field = field(&mut seq, stringify!($field))?; )*
                                Ok($name::$variant { $($field),* })
                            } )*
                            tag => Err(de::Error::custom(format_args!("unknown tag {tag}"))),
                        }
                    }
                }
                deserializer.deserialize_any(Tagged)
            }
        }
    };
}

messages! {
    /// What a follower may send.
    ToServer {
        /// The first message: who I am, what I accept, where I stand.
        0 Hello {
            /// [`wire::VERSION`](crate::wire::VERSION). The first field in every version.
            version: u16,
            /// [`TREE_VERSION`](crate::tree::TREE_VERSION).
            tree: u8,
            /// Largest frame that I accept, in bytes.
            frame_bytes: u64,
            /// Largest key.
            key_bytes: u64,
            /// Largest value.
            value_bytes: u64,
            /// What the server's people call this follower; may be empty.
            name: String,
            /// Where my table stands; nil if it is void or has never followed.
            position: Option<Position>,
        }
        /// May I have a diff?
        1 SyncReq {
            /// Its number: higher than any before it on this connection.
            diff: DiffId,
            /// How many `FellBehind` I had seen when my table had this root.
            jumps: u32,
            /// Compare full-width hashes: short ones may have been fooled.
            full: bool,
            /// The root of my table.
            root: Hash,
            /// How many keys it had.
            len: u64,
            /// Abort as `Held` what would delete more keys than these.
            max_deletes: u64,
        }
        /// What is at the nodes of the last `SyncRequest`, or at the first of them.
        2 SyncResponse {
            /// Of which diff.
            diff: DiffId,
            /// See [`diff`](crate::diff).
            answer: Raw,
        }
        /// The oldest repair that was not acknowledged yet has been applied.
        3 RepairAck {
            /// Of which diff.
            diff: DiffId,
            /// How many of its keys my store refused.
            failed: u32,
            /// How long applying it took, in microseconds: what a live change behind it had to wait.
            micros: u32,
        }
        /// My root at the mark that a `Verify` named.
        4 Verified {
            /// The mark.
            revision: Revision,
            /// My root there.
            root: Hash,
        }
        /// Are you there?
        5 Ping {}
        /// I am.
        6 Pong {}
        /// I close this connection.
        7 Farewell {
            /// Why.
            reason: Reason,
            /// More for a log; may be empty.
            text: String,
        }
    }
}

messages! {
    /// What a server may send.
    ToClient {
        /// You are subscribed: you will see every change behind this position.
        0 Welcome {
            /// [`wire::VERSION`](crate::wire::VERSION). The first field in every version.
            version: u16,
            /// [`TREE_VERSION`](crate::tree::TREE_VERSION).
            tree: u8,
            /// The history.
            epoch: Epoch,
            /// Live changes begin behind this revision.
            revision: Revision,
            /// The chain there.
            chain: Chain,
            /// Largest frame that I accept, and that I may send, in bytes.
            frame_bytes: u64,
            /// Largest key that I may send.
            key_bytes: u64,
            /// Largest value that I may send.
            value_bytes: u64,
            /// Whether that is where your position stands, or why not.
            way: Way,
        }
        /// I do not serve you, and close this connection. The same shape in every version.
        1 Refuse {
            /// Why.
            reason: Reason,
            /// More for a log; may be empty.
            text: String,
        }
        /// I close this connection.
        2 Farewell {
            /// Why.
            reason: Reason,
            /// More for a log; may be empty.
            text: String,
        }
        /// Consecutive changes, as they were written: whole batches. A reader gets all of them or none.
        3 Live {
            /// The revision of the first.
            first: Revision,
            /// The chain before the first.
            before: ChainTag,
            /// The changes.
            changes: Changes,
        }
        /// Changes that you were not sent are no longer in the log; the stream goes on behind
        /// this place. Your position is void until a `SyncDone`.
        4 FellBehind {
            /// How often this happened on this connection.
            jumps: u32,
            /// Live changes go on behind this revision.
            revision: Revision,
            /// The chain there.
            chain: Chain,
        }
        /// The diff begins, of your table as it is here: keys that you are sent live from here on are suppressed from it.
        5 SyncStart {
            /// Which.
            diff: DiffId,
        }
        /// What do you have at these nodes?
        6 SyncRequest {
            /// Of which diff.
            diff: DiffId,
            /// See [`diff`](crate::diff).
            query: Query,
        }
        /// The walk is done; repairs follow. At most so many: keys updated since are left out.
        7 SyncSeq {
            /// Of which diff.
            diff: DiffId,
            /// Keys to write.
            writes: u64,
            /// Prefixes of key hashes to delete at.
            deletes: u64,
        }
        /// Some of the keys that differ, as they are in the table where the stream stands.
        8 Repair {
            /// Of which diff.
            diff: DiffId,
            /// Writes only.
            writes: Changes,
            /// The length of each prefix in `deletes`, 1 to 16 bytes.
            prefix_bytes: u8,
            /// Prefixes of key hashes, one behind the other: delete what the snapshot that was
            /// walked has there.
            deletes: Raw,
        }
        /// All repairs have been sent. The stream stands exactly at this revision, here is a mark.
        9 SyncDone {
            /// Of which diff.
            diff: DiffId,
            /// Where the stream stands.
            revision: Revision,
            /// The chain there.
            chain: ChainTag,
            /// Keys that were left out because they were updated meanwhile.
            suppressed: u64,
            /// Keys whose value could not be read.
            failed: u64,
        }
        /// The diff ends here, with what was repaired so far.
        10 SyncAbort {
            /// Of which diff.
            diff: DiffId,
            /// Why.
            reason: AbortReason,
        }
        /// My root at a mark that you passed. Not every mark is followed by one.
        11 Verify {
            /// The mark.
            revision: Revision,
            /// My root there.
            root: Hash,
        }
        /// Are you there?
        12 Ping {}
        /// I am.
        13 Pong {}
        /// The stream stands exactly at this revision: take a snapshot, to compare its root with that of
        /// the `Verify` that follows.
        14 Mark {
            /// Where the stream stands.
            revision: Revision,
        }
        /// What you missed, one change a key: of the changes up to this revision those that come next
        /// and whose key does not change again before `CaughtUp`.
        15 CatchUp {
            /// The last of the changes that this frame is about.
            revision: Revision,
            /// Those of them that count.
            changes: Changes,
        }
        /// That was all that you missed, one change a key or as it was: the stream stands here, and goes on
        /// live.
        16 CaughtUp {
            /// Where the stream stands.
            revision: Revision,
            /// The chain there.
            chain: Chain,
        }
    }
}

macro_rules! codes {
    ($(#[$doc:meta])* $name:ident, $unknown:expr, {
        $( #[doc = $text:literal] $code:literal $variant:ident )*
    }) => {
        $(#[$doc])*
        #[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
        pub enum $name { $( #[doc = $text] $variant, )* }

        impl $name {
            /// All of them, in the order of their codes.
            pub const ALL: &'static [Self] = &[$( Self::$variant, )*];
        }

        impl Serialize for $name {
            fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
                // Where people read it, in JSON most of all, it is its name.
                if serializer.is_human_readable() {
                    return serializer.serialize_str(match self {
                        $( Self::$variant => stringify!($variant), )*
                    });
                }
                serializer.serialize_u8(match self { $( Self::$variant => $code, )* })
            }
        }

        impl<'de> Deserialize<'de> for $name {
            fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
                if deserializer.is_human_readable() {
                    let name = String::deserialize(deserializer)?;
                    return match name.as_str() {
                        $( stringify!($variant) => Ok(Self::$variant), )*
                        other => Err(de::Error::custom(format_args!(
                            concat!("unknown ", stringify!($name), " {:?}"), other
                        ))),
                    };
                }
                match u8::deserialize(deserializer)? {
                    $( $code => Ok(Self::$variant), )*
                    code => {
                        let unknown: Option<Self> = $unknown;
                        unknown.ok_or_else(|| de::Error::custom(format_args!(
                            concat!("unknown ", stringify!($name), " {}"), code
                        )))
                    }
                }
            }
        }

        impl fmt::Display for $name {
            fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                f.write_str(match self { $( Self::$variant => $text.trim_ascii(), )* })
            }
        }
    };
}

codes! {
    /// Why an end closes a connection or does not accept one. A code that this version does not
    /// know is [`Reason::Other`], so that a refusal by a later one is heard.
    Reason, Some(Self::Other), {
        /// other version
        0 Version
        /// other tree version
        1 Tree
        /// limits do not fit
        2 Limits
        /// too many connections
        3 Full
        /// shutting down
        4 Stopping
        /// the peer broke the protocol
        5 Protocol
        /// nothing heard for too long
        6 Silent
        /// internal failure
        7 Failed
        /// refused
        8 Refused
        /// other reason
        255 Other
    }
}

codes! {
    /// Why a diff ended early.
    AbortReason, None, {
        /// the follower fell behind
        0 FellBehind
        /// more keys were updated meanwhile than the server remembers
        2 Updated
        /// the walk failed
        3 Walk
        /// the server has too many diffs waiting
        4 Busy
        /// nothing happened in the diff for too long
        5 Stalled
        /// the repair would delete more keys than the follower allows
        6 Held
    }
}

/// Longest name that a follower gives itself, in bytes: Hello fits the frames of a handshake.
pub const NAME_BYTES: usize = 255;

/// Longest text of a refusal or farewell, in bytes.
pub(crate) const TEXT_BYTES: usize = 1024;

/// The first `max` bytes of a text, less if that is within a character.
pub(crate) fn clip(text: &str, max: usize) -> &str {
    text.get(..text.floor_char_boundary(max)).unwrap_or(text)
}

/// A peer's text as it is kept: cut off, and without what would do something to a terminal or forge a line in a log.
pub(crate) fn said(text: &str) -> String {
    let line = |char: char| if char.is_control() { ' ' } else { char };
    clip(text, TEXT_BYTES).chars().map(line).collect()
}

codes! {
    /// How a follower is brought to where the server is: by what it missed, or by a diff, and why.
    Way, None, {
        /// resumed where the follower's position stands
        0 Resumed
        /// diff: the follower presents no position
        1 NoPosition
        /// diff: the position is of another history
        2 OtherEpoch
        /// diff: the log does not reach back to the position
        3 NotInLog
        /// diff: the position's chain is not that of this history
        4 OtherChain
        /// diff: the position is ahead of this history
        5 Ahead
        /// resumed where the follower's position stands, with one change a key
        6 Shortened
    }
}

impl Way {
    /// Whether it begins where the follower's position stands, so that no diff is needed.
    pub fn resumes(self) -> bool {
        matches!(self, Self::Resumed | Self::Shortened)
    }
}

impl ToServer {
    /// The root, limits and place of a first message of this version.
    pub fn hello(name: &str, limits: &Limits, position: Option<Position>) -> Self {
        Self::Hello {
            version: crate::wire::VERSION,
            tree: crate::tree::TREE_VERSION,
            frame_bytes: limits.frame_bytes as u64,
            key_bytes: limits.key_bytes as u64,
            value_bytes: limits.value_bytes as u64,
            name: name.to_owned(),
            position,
        }
    }
}

impl ToClient {
    /// The answer to a first message, of this version: the follower is at this position, and is brought on in this way.
    pub fn welcome(at: Position, way: Way, limits: &Limits) -> Self {
        Self::Welcome {
            version: crate::wire::VERSION,
            tree: crate::tree::TREE_VERSION,
            epoch: at.epoch,
            revision: at.revision,
            chain: at.chain,
            frame_bytes: limits.frame_bytes as u64,
            key_bytes: limits.key_bytes as u64,
            value_bytes: limits.value_bytes as u64,
            way,
        }
    }

    /// The tag of `Live`, whose frames [`LiveFrame`](crate::wire::LiveFrame) builds by hand.
    pub const LIVE: u8 = 3;
}

impl Message for ToServer {
    fn name(&self) -> &'static str {
        self.named()
    }

    fn check(&self, _: &Limits) -> Result<(), LimitError> {
        Ok(())
    }

    fn is_first(tag: u8) -> bool {
        tag == 0
    }
}

impl Message for ToClient {
    fn name(&self) -> &'static str {
        self.named()
    }

    fn check(&self, limits: &Limits) -> Result<(), LimitError> {
        match self {
            Self::Live { changes, .. } => check_pairs(&changes.0, limits),
            Self::Repair { writes, .. } => check_pairs(&writes.0, limits),
            Self::CatchUp { changes, .. } => check_pairs(&changes.0, limits),
            Self::Welcome { .. }
            | Self::Refuse { .. }
            | Self::Farewell { .. }
            | Self::FellBehind { .. }
            | Self::SyncStart { .. }
            | Self::SyncRequest { .. }
            | Self::SyncSeq { .. }
            | Self::SyncDone { .. }
            | Self::SyncAbort { .. }
            | Self::Verify { .. }
            | Self::Mark { .. }
            | Self::CaughtUp { .. }
            | Self::Ping {}
            | Self::Pong {} => Ok(()),
        }
    }

    fn is_first(tag: u8) -> bool {
        tag == 0
    }
}
