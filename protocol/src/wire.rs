//! Messages as bytes: MessagePack behind a length.
//!
//! ```text
//! frame   = length payload        length: 4 bytes, big endian, of the payload alone
//! payload = [tag, field ...]      one MessagePack array; docs/protocol.md has the tags
//! ```
//!
//! A reader is strict about what could hurt it: unknown tags, missing or surplus fields, anything
//! behind the message, text or arrays where raw bytes belong, nesting. Nothing is allocated that
//! is not there: a declared length that the frame cannot hold is an error, and a count of changes
//! above [`MAX_CHANGES`] too.

use std::fmt;

use bytes::{BufMut, Bytes, BytesMut};
use rmp::Marker;
use serde::de::{
    self, Deserialize, DeserializeOwned, Deserializer, IgnoredAny, SeqAccess, Visitor,
};
use serde::{Serialize, Serializer};

use crate::change::Change;
use crate::error::DecodeError;
use crate::limits::{Limits, MAX_CHANGES};
use crate::message::{ToClient, clip};
use crate::position::{Chain, Revision};

/// The version of messages and sessions. Two ends with different ones refuse each other.
pub const VERSION: u16 = 1;

/// The length header of a frame, in bytes.
pub const HEADER_BYTES: usize = 4;

/// Deeper nesting than any message has: the root array, a list in it, a position.
const MAX_DEPTH: usize = 8;

/// A message that has a wire form: [`ToServer`](crate::ToServer) and [`ToClient`].
pub trait Message: Serialize + DeserializeOwned {
    /// Its name, as in docs/protocol.md.
    fn name(&self) -> &'static str;

    /// Whether what it carries is within the limits.
    ///
    /// # Errors
    /// Names the value and the limit.
    fn check(&self, limits: &Limits) -> Result<(), crate::LimitError>;

    /// The version that this first message of a connection names, if it is one.
    #[doc(hidden)]
    fn is_first(tag: u8) -> bool;
}

/// A message as one whole frame, length header included.
///
/// # Panics
/// Never: writing to memory does not fail.
pub fn encode<M: Message>(message: &M) -> Bytes {
    // Most messages are short: one piece of memory will do.
    let mut frame = BytesMut::with_capacity(128);
    frame.put_bytes(0, HEADER_BYTES);
    let mut frame = frame.writer();
    rmp_serde::encode::write(&mut frame, message).expect("a message can be written to memory");
    with_header(frame.into_inner())
}

/// The message in a frame's payload (without the length header).
///
/// ```
/// use tablecast_protocol::{Limits, ToServer, wire};
///
/// let frame = wire::encode(&ToServer::Ping {});
/// assert_eq!(&frame[..], [0, 0, 0, 2, 0x91, 5]);
/// assert_eq!(wire::decode::<ToServer>(&frame[4..], &Limits::default()), Ok(ToServer::Ping {}));
/// ```
///
/// # Errors
/// If it is no message of this version, or holds something above a limit.
pub fn decode<M: Message>(payload: &[u8], limits: &Limits) -> Result<M, DecodeError> {
    let bytes = payload.len();
    let malformed = |why: String| DecodeError::Malformed { bytes, why };
    if bytes > LONGEST_TEXT && has_long_text(payload) {
        return Err(malformed(format!("a text is above {LONGEST_TEXT} bytes")));
    }
    let mut decoder = rmp_serde::Deserializer::from_read_ref(payload);
    decoder.set_max_depth(MAX_DEPTH);
    let message = M::deserialize(&mut decoder).map_err(|error| {
        other_version::<M>(payload)
            .unwrap_or_else(|| malformed(clip(&error.to_string(), WHY_BYTES).to_owned()))
    })?;
    // Only where there is no further byte does the decoder miss the marker of a truth value: it looks
    // into nothing that is longer.
    match bool::deserialize(&mut decoder) {
        Err(rmp_serde::decode::Error::InvalidMarkerRead(_)) => {}
        Ok(_) | Err(_) => {
            return Err(other_version::<M>(payload).unwrap_or(DecodeError::Trailing { bytes }));
        }
    }
    message.check(limits)?;
    Ok(message)
}

/// Longest text in a message. The decoder repeats one that stands where none belongs, each of its bytes as up to six.
const LONGEST_TEXT: usize = 4096;

/// How much of what the decoder says is kept.
const WHY_BYTES: usize = 256;

/// Whether any of the values in a payload is a longer text: from marker to marker, whatever they mean.
fn has_long_text(payload: &[u8]) -> bool {
    let mut left = payload;
    while let Some((first, behind)) = left.split_first() {
        // The length that is told in so many bytes.
        let told = |count: usize| {
            let told = behind.get(..count).unwrap_or_default();
            (count, told.iter().fold(0_usize, |length, byte| length << 8 | usize::from(*byte)))
        };
        let marker = Marker::from_u8(*first);
        let (of_length, length) = match marker {
            Marker::FixStr(length) => (0, length.into()),
            Marker::Str8 | Marker::Bin8 => told(1),
            Marker::Str16 | Marker::Bin16 => told(2),
            Marker::Str32 | Marker::Bin32 => told(4),
            Marker::U8 | Marker::I8 => (1, 0),
            Marker::U16 | Marker::I16 | Marker::Array16 | Marker::Map16 => (2, 0),
            Marker::U32 | Marker::I32 | Marker::F32 | Marker::Array32 | Marker::Map32 => (4, 0),
            Marker::U64 | Marker::I64 | Marker::F64 => (8, 0),
            Marker::FixPos(_)
            | Marker::FixNeg(_)
            | Marker::Null
            | Marker::True
            | Marker::False
            | Marker::FixArray(_)
            | Marker::FixMap(_) => (0, 0),
            // In no message.
            Marker::FixExt1
            | Marker::FixExt2
            | Marker::FixExt4
            | Marker::FixExt8
            | Marker::FixExt16
            | Marker::Ext8
            | Marker::Ext16
            | Marker::Ext32
            | Marker::Reserved => return false,
        };
        let text = matches!(marker, Marker::Str8 | Marker::Str16 | Marker::Str32);
        if text && length > LONGEST_TEXT {
            return true;
        }
        left = behind.get(of_length.saturating_add(length)..).unwrap_or_default();
    }
    false
}

/// Hands on what is there, whatever is expected: a list is an array then. MessagePack's decoder takes raw bytes for a list of numbers.
pub(crate) struct AsIs<D>(pub(crate) D);

impl<'de, D: Deserializer<'de>> Deserializer<'de> for AsIs<D> {
    type Error = D::Error;

    fn deserialize_any<V: Visitor<'de>>(self, visitor: V) -> Result<V::Value, D::Error> {
        self.0.deserialize_any(visitor)
    }

    serde::forward_to_deserialize_any! {
        bool i8 i16 i32 i64 i128 u8 u16 u32 u64 u128 f32 f64 char str string bytes byte_buf option unit
        unit_struct newtype_struct seq tuple tuple_struct map struct enum identifier ignored_any
    }
}

/// What is the same in every version: the first message begins with its tag and its version.
fn other_version<M: Message>(payload: &[u8]) -> Option<DecodeError> {
    struct Peek(u8, u16);

    impl<'de> Deserialize<'de> for Peek {
        fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
            struct Seq;
            impl<'de> Visitor<'de> for Seq {
                type Value = Peek;

                fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                    f.write_str("a tag and a version")
                }

                fn visit_seq<A: SeqAccess<'de>>(self, mut seq: A) -> Result<Peek, A::Error> {
                    let peek = Peek(field(&mut seq, "tag")?, field(&mut seq, "version")?);
                    while seq.next_element::<IgnoredAny>()?.is_some() {}
                    Ok(peek)
                }
            }
            deserializer.deserialize_any(Seq)
        }
    }

    let mut decoder = rmp_serde::Deserializer::from_read_ref(payload);
    decoder.set_max_depth(MAX_DEPTH);
    let Peek(tag, theirs) = Peek::deserialize(&mut decoder).ok()?;
    (M::is_first(tag) && theirs != VERSION)
        .then_some(DecodeError::Version { theirs, ours: VERSION })
}

fn with_header(mut frame: BytesMut) -> Bytes {
    let length = frame.len().saturating_sub(HEADER_BYTES);
    let length = u32::try_from(length).expect("no frame is as long as 4 GiB");
    if let Some(header) = frame.first_chunk_mut() {
        *header = length.to_be_bytes();
    }
    frame.freeze()
}

/// The next element of a message's array.
pub(crate) fn field<'de, A: SeqAccess<'de>, T: Deserialize<'de>>(
    seq: &mut A,
    name: &'static str,
) -> Result<T, A::Error> {
    seq.next_element()?.ok_or_else(|| de::Error::missing_field(name))
}

/// Raw bytes of one length. No text, no array.
pub(crate) fn fixed_bytes<'de, D: Deserializer<'de>, const N: usize>(
    deserializer: D,
) -> Result<[u8; N], D::Error> {
    struct Fixed<const N: usize>;
    impl<const N: usize> Visitor<'_> for Fixed<N> {
        type Value = [u8; N];

        fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
            write!(f, "{N} raw bytes")
        }

        fn visit_bytes<E: de::Error>(self, bytes: &[u8]) -> Result<[u8; N], E> {
            bytes.try_into().map_err(|_| E::invalid_length(bytes.len(), &self))
        }
    }
    deserializer.deserialize_bytes(Fixed::<N>)
}

/// Raw bytes of any length, in memory of their own: a value must not keep its frame alive.
struct Bin(Bytes);

impl<'de> Deserialize<'de> for Bin {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        bin::deserialize(deserializer).map(Self)
    }
}

/// `#[serde(with)]` for fields of raw bytes.
pub(crate) mod bin {
    use super::{Bytes, Deserializer, Serializer, Visitor, de, fmt};

    pub(crate) fn serialize<S: Serializer>(
        bytes: &Bytes,
        serializer: S,
    ) -> Result<S::Ok, S::Error> {
        serializer.serialize_bytes(bytes)
    }

    pub(crate) fn deserialize<'de, D: Deserializer<'de>>(
        deserializer: D,
    ) -> Result<Bytes, D::Error> {
        struct Raw;
        impl Visitor<'_> for Raw {
            type Value = Bytes;

            fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                f.write_str("raw bytes")
            }

            fn visit_bytes<E: de::Error>(self, bytes: &[u8]) -> Result<Bytes, E> {
                Ok(Bytes::copy_from_slice(bytes))
            }
        }
        deserializer.deserialize_bytes(Raw)
    }
}

/// Raw bytes as a field of a message.
#[derive(Clone, Debug, Default, PartialEq, Eq, Hash)]
pub struct Raw(pub Bytes);

impl Serialize for Raw {
    fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        bin::serialize(&self.0, serializer)
    }
}

impl<'de> Deserialize<'de> for Raw {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        bin::deserialize(deserializer).map(Self)
    }
}

/// Changes as they cross the wire: one flat array, key and value by turns, nil for a delete.
///
/// Flat because a pair would cost a byte a change more, a map with names eight.
#[derive(Clone, Debug, Default, PartialEq, Eq, Hash)]
pub struct Changes(pub Vec<Change>);

impl Serialize for Changes {
    fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        serializer.collect_seq(self.0.iter().flat_map(|change| {
            [
                Some(serde_bytes::Bytes::new(change.key())),
                change.value().map(|v| serde_bytes::Bytes::new(v)),
            ]
        }))
    }
}

impl<'de> Deserialize<'de> for Changes {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        struct Flat;
        impl<'de> Visitor<'de> for Flat {
            type Value = Changes;

            fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                write!(f, "at most {MAX_CHANGES} keys, each with a value or nil behind it")
            }

            fn visit_seq<A: SeqAccess<'de>>(self, mut seq: A) -> Result<Changes, A::Error> {
                // The length is declared by the peer: it is checked, and memory grows by what is there.
                let declared = seq.size_hint().unwrap_or(0);
                if !declared.is_multiple_of(2) || declared / 2 > MAX_CHANGES {
                    return Err(de::Error::invalid_length(declared, &self));
                }
                let mut changes = Vec::new();
                while let Some(Bin(key)) = seq.next_element()? {
                    changes.push(match field::<_, Option<Bin>>(&mut seq, "value")? {
                        Some(Bin(value)) => Change::Write { key, value },
                        None => Change::Delete { key },
                    });
                }
                Ok(Changes(changes))
            }
        }
        deserializer.deserialize_any(Flat)
    }
}

/// Room that a [`LiveFrame`] keeps for the next one.
const KEPT_BYTES: usize = 128 << 10;

/// Puts live changes together into a frame, so that each is encoded once for all followers.
///
/// The same bytes as [`encode`] gives for the same [`ToClient::Live`].
#[derive(Clone, Debug, Default, PartialEq, Eq, Hash)]
pub struct LiveFrame {
    /// The flat pairs, without the array's header: that depends on their number.
    body: Vec<u8>,
    changes: u32,
}

impl LiveFrame {
    /// Adds a change.
    pub fn push(&mut self, change: &Change) {
        self.changes += 1;
        let mut put = |bytes: Option<&[u8]>| match bytes {
            Some(bytes) => {
                let length = u32::try_from(bytes.len()).expect("limits are far below 4 GiB");
                rmp::encode::write_bin_len(&mut self.body, length)?;
                self.body.extend_from_slice(bytes);
                Ok(())
            }
            None => rmp::encode::write_nil(&mut self.body)
                .map_err(rmp::encode::ValueWriteError::InvalidMarkerWrite),
        };
        put(Some(change.key()))
            .and_then(|()| put(change.value().map(|value| &value[..])))
            .expect("a change can be written to memory");
    }

    /// Adds the changes of a frame that was made here, as they stand in it behind its header.
    pub(crate) fn append(&mut self, body: &[u8], changes: usize) {
        self.changes += u32::try_from(changes).expect("a frame holds far fewer than 2^32 changes");
        self.body.extend_from_slice(body);
    }

    /// How many bytes there are, without the header.
    pub fn bytes(&self) -> usize {
        self.body.len()
    }

    /// How many changes there are.
    pub fn changes(&self) -> usize {
        self.changes as usize
    }

    /// The frame; the builder is empty again.
    pub fn take(&mut self, first: Revision, before: &Chain) -> Bytes {
        let mut frame = BytesMut::with_capacity(HEADER_BYTES + self.body.len() + 32);
        frame.put_bytes(0, HEADER_BYTES);
        let mut writer = frame.writer();
        let written = rmp::encode::write_array_len(&mut writer, 4)
            .and_then(|_| rmp::encode::write_uint(&mut writer, u64::from(ToClient::LIVE)))
            .and_then(|_| rmp::encode::write_uint(&mut writer, first.0))
            .and_then(|_| rmp::encode::write_bin(&mut writer, before.tag().as_bytes()))
            .and_then(|()| rmp::encode::write_array_len(&mut writer, 2 * self.changes));
        written.expect("a header can be written to memory");
        let mut frame = writer.into_inner();
        frame.put_slice(&self.body);
        self.body.clear();
        // One large value must not keep its room for ever.
        self.body.shrink_to(KEPT_BYTES);
        self.changes = 0;
        with_header(frame)
    }
}

/// Keys and values as a repair carries them.
pub(crate) fn check_pairs(pairs: &[Change], limits: &Limits) -> Result<(), crate::LimitError> {
    pairs.iter().try_for_each(|change| limits.check(change))
}
