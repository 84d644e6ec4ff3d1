//! One direction of a connection: frames in their order, until a bit flips in one of their headers.

use std::collections::VecDeque;

use bytes::Bytes;
use tablecast_protocol::DecodeError;
use tablecast_protocol::wire::HEADER_BYTES;

#[derive(Debug, Default)]
pub(crate) struct Pipe {
    pub(crate) frames: VecDeque<Bytes>,
    /// A header is wrong: from here on frames have to be looked for in the bytes.
    pub(crate) torn: bool,
    /// The first of `frames` is a part of one, and more is waited for.
    starved: bool,
    /// Nothing comes behind `frames`, and the reader is told.
    pub(crate) ended: bool,
}

impl Pipe {
    pub(crate) fn is_readable(&self) -> bool {
        self.frames.len() > usize::from(self.starved) || self.ended
    }

    /// The next payload; `Ok(None)` if it is not there as a whole.
    pub(crate) fn next(&mut self, max: usize) -> Result<Option<Bytes>, DecodeError> {
        let Some(mut frame) = self.frames.pop_front() else { return Ok(None) };
        if !self.torn {
            return Ok(Some(frame.slice(HEADER_BYTES..)));
        }
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
                        self.frames.push_front(rest);
                    }
                    return Ok(Some(frame.slice(HEADER_BYTES..)));
                }
            }
            match self.frames.pop_front() {
                Some(next) => frame = [frame, next].concat().into(),
                None => {
                    self.starved = true;
                    self.frames.push_front(frame);
                    return Ok(None);
                }
            }
        }
    }
}
