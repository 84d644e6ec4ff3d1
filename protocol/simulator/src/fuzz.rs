//! What must hold for any input, whoever made it: the bodies of the fuzz targets in `protocol/fuzz`.
//!
//! `tests/corpora.rs` runs them as ordinary tests with the inputs that are kept there. What does not hold is a
//! panic, which is what a fuzzer looks for.

mod client;
mod message;
mod server;

use std::fmt::Debug;

use arbitrary::{Result, Unstructured};
use bytes::BytesMut;
pub use client::client;
pub use server::server;
use tablecast_protocol::wire::{self, HEADER_BYTES, Message};
use tablecast_protocol::{Limits, SMALL_FRAME_BYTES, ToClient, ToServer};
use tokio_util::codec::{Decoder, LengthDelimitedCodec};

use crate::{Totals, run_choices};

/// Bytes of a connection are the same frames however they are cut up, and each of them is an error or a
/// message. The first byte says how they are cut. Takes no more memory than the longest frame and what came at once.
pub fn frames(input: &[u8]) {
    let Some((size, bytes)) = input.split_first() else { return };
    let frames = cut_up(bytes, 1 + usize::from(*size));
    assert_eq!(cut_up(bytes, bytes.len().max(1)), frames);
    for frame in &frames.0 {
        decode::<ToServer>(frame);
        decode::<ToClient>(frame);
    }
}

/// The payloads of frames, and whether what follows them is none. As `Framed` of tablecast-actors reads them.
fn cut_up(bytes: &[u8], at_once: usize) -> (Vec<BytesMut>, bool) {
    let mut codec = LengthDelimitedCodec::builder()
        .length_field_length(HEADER_BYTES)
        .max_frame_length(SMALL_FRAME_BYTES)
        .new_codec();
    let (mut inbox, mut frames) = (BytesMut::new(), Vec::new());
    for part in bytes.chunks(at_once) {
        inbox.extend_from_slice(part);
        loop {
            match codec.decode(&mut inbox) {
                Ok(Some(frame)) => frames.push(frame),
                Ok(None) => break,
                Err(_) => return (frames, true),
            }
        }
        assert!(inbox.capacity() <= 2 * (HEADER_BYTES + SMALL_FRAME_BYTES + at_once));
    }
    (frames, false)
}

/// Any bytes are an error or a message, and any message is read as it was written.
pub fn messages(input: &[u8]) {
    decode::<ToServer>(input);
    decode::<ToClient>(input);
    ran_out(write_and_read(&mut Unstructured::new(input)));
}

fn write_and_read(u: &mut Unstructured<'_>) -> Result<()> {
    while !u.is_empty() {
        let (to_server, to_client) = (
            message::to_server(u, &Default::default())?,
            message::to_client(u, &Default::default())?,
        );
        assert_eq!(decode(&wire::encode(&to_server)[HEADER_BYTES..]), Some(to_server));
        assert_eq!(decode(&wire::encode(&to_client)[HEADER_BYTES..]), Some(to_client));
    }
    Ok(())
}

/// What is read is written as hardly more bytes, and read again as the same.
fn decode<M: Message + Debug + PartialEq>(payload: &[u8]) -> Option<M> {
    let limits = Limits::default();
    let message: M = wire::decode(payload, &limits).ok()?;
    let again = wire::encode(&message);
    // A reason that is not known becomes 255, which is a byte longer than most. Raw bytes may have come as a
    // string that is not UTF-8, with a header of one byte and at least another behind it.
    assert!(again.len() <= HEADER_BYTES + payload.len() * 3 / 2 + 1);
    assert_eq!(wire::decode(&again[HEADER_BYTES..], &limits).as_ref(), Ok(&message));
    Some(message)
}

/// A run of the simulator whose decisions are these bytes holds what every run holds.
pub fn pair(input: &[u8]) {
    run_choices(input, &mut Totals::default()).unwrap_or_else(|why| panic!("{why}"));
}

/// Bytes that are used up end a run, and are no error.
fn ran_out(result: Result<()>) {
    assert!(matches!(result, Ok(()) | Err(arbitrary::Error::NotEnoughData)), "{result:?}");
}
