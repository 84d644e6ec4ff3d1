//! One direction of a connection: frames in their order, until a bit flips in one of their headers.

use std::collections::VecDeque;

use bytes::Bytes;
use fastrand::Rng;
use tablecast_protocol::wire::{self, HEADER_BYTES, Message};
use tablecast_protocol::{DecodeError, Limits};

use crate::world::flip;

#[derive(Debug)]
pub(crate) struct Pipe<M> {
    pub(crate) frames: VecDeque<Frame<M>>,
    /// A header is wrong: from here on frames have to be looked for in the bytes.
    torn: bool,
    /// The first of `frames` is a part of one, and more is waited for.
    starved: bool,
    /// Nothing comes behind `frames`, and the reader is told.
    pub(crate) ended: bool,
}

/// A frame on its way: its bytes, or in most runs what they say, since reading and writing bytes takes
/// as long as all the rest.
#[derive(Debug)]
pub(crate) enum Frame<M> {
    Bytes(Bytes),
    Message(M),
}

impl<M: Message> Frame<M> {
    fn bytes(&self) -> Bytes {
        match self {
            Self::Bytes(bytes) => bytes.clone(),
            Self::Message(message) => wire::encode(message),
        }
    }
}

impl<M: Message> Pipe<M> {
    pub(crate) fn new() -> Self {
        Self { frames: VecDeque::new(), torn: false, starved: false, ended: false }
    }

    /// Sends a message, as its bytes if these are what the run is about.
    pub(crate) fn send(&mut self, message: M, as_bytes: bool) {
        let frame = Frame::Message(message);
        self.frames.push_back(if as_bytes { Frame::Bytes(frame.bytes()) } else { frame });
    }

    pub(crate) fn is_readable(&self) -> bool {
        self.frames.len() > usize::from(self.starved) || self.ended
    }

    /// The next message; `Ok(None)` if it is not there as a whole.
    pub(crate) fn next(&mut self, max: usize) -> Result<Option<M>, DecodeError> {
        let decode = |payload: &[u8]| wire::decode(payload, &Limits::default()).map(Some);
        let Some(frame) = self.frames.pop_front() else { return Ok(None) };
        let mut frame = match frame {
            Frame::Message(message) if !self.torn => return Ok(Some(message)),
            Frame::Bytes(bytes) if !self.torn => return decode(&bytes[HEADER_BYTES..]),
            torn => torn.bytes(),
        };
        self.starved = false;
        loop {
            if let Some(header) = frame.first_chunk() {
                let bytes = u32::from_be_bytes(*header) as usize;
                if bytes > max {
                    return Err(DecodeError::Malformed { bytes, why: "too long".to_owned() });
                }
                if frame.len() >= HEADER_BYTES + bytes {
                    let rest = frame.split_off(HEADER_BYTES + bytes);
                    if !rest.is_empty() {
                        self.frames.push_front(Frame::Bytes(rest));
                    }
                    return decode(&frame[HEADER_BYTES..]);
                }
            }
            match self.frames.pop_front() {
                Some(next) => frame = [frame, next.bytes()].concat().into(),
                None => {
                    self.starved = true;
                    self.frames.push_front(Frame::Bytes(frame));
                    return Ok(None);
                }
            }
        }
    }

    /// Flips a bit of the last frame; which one, if there is a frame.
    pub(crate) fn flip(&mut self, rng: &mut Rng) -> Option<usize> {
        let frame = self.frames.back_mut()?;
        let bytes = frame.bytes();
        let bit = rng.usize(..8 * bytes.len());
        self.torn |= bit < 32;
        *frame = Frame::Bytes(flip(&bytes, bit));
        Some(bit)
    }
}
