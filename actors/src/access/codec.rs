//! Frames over a stream of bytes.

use std::collections::VecDeque;
use std::io::{self, IoSlice};
use std::mem::MaybeUninit;
use std::pin::Pin;
use std::task::{Context, Poll, ready};
use std::time::Duration;

use bytes::{Buf, Bytes, BytesMut};
use tablecast_protocol::wire::HEADER_BYTES;
use tokio::io::ReadBuf;
use tokio_util::codec::{Decoder, LengthDelimitedCodec};

use super::Stream;
use crate::error::AccessError;

/// How much one read takes at most. On the stack: a connection on which nothing comes keeps no
/// buffer.
const READ_BYTES: usize = 32 << 10;

/// How long a connection that is to end may take to send its last words.
pub(crate) const LAST_WORDS: Duration = Duration::from_secs(1);

/// How often is read before others have their turn, from a peer that is not listened to any more.
const DRAIN_READS: usize = 8;

/// How often a frame that comes in many parts is read on at once. A long one takes milliseconds, in
/// which nothing would be written: tokio gives a task 128 calls a turn, and those of reading would be all.
const READS: usize = 8;

/// How many frames one write takes at most.
const WRITE_FRAMES: usize = 64;

/// One connection: whole frames in, whole frames out. It never waits: what cannot be done now is
/// `Pending`, and the task is woken.
pub(crate) struct Framed {
    stream: Box<dyn Stream>,
    codec: LengthDelimitedCodec,
    inbox: BytesMut,
    outbox: VecDeque<Bytes>,
    /// Bytes in the outbox.
    queued: usize,
    /// The stream holds nothing back of what it was given, as TLS may.
    flushed: bool,
    /// The stream had no room when it was written to last.
    full: bool,
    /// It has taken something since.
    took: bool,
    /// Bytes that came, and bytes that went, headers included.
    pub(crate) received: u64,
    pub(crate) sent: u64,
}

impl Framed {
    pub(crate) fn new(stream: Box<dyn Stream>, max_frame_bytes: usize) -> Self {
        let codec = LengthDelimitedCodec::builder()
            .length_field_length(HEADER_BYTES)
            .max_frame_length(max_frame_bytes)
            .new_codec();
        Self {
            stream,
            codec,
            inbox: BytesMut::new(),
            outbox: VecDeque::new(),
            queued: 0,
            flushed: true,
            full: false,
            took: false,
            received: 0,
            sent: 0,
        }
    }

    /// A longer frame from now on is an error, as soon as its header is there.
    pub(crate) fn set_max_frame_bytes(&mut self, bytes: usize) {
        self.codec.set_max_frame_length(bytes);
    }

    /// The payload of the next frame; `Ok(None)` at the end of the stream. Of a long frame only a part is read
    /// in one call.
    pub(crate) fn poll_frame(
        &mut self,
        cx: &mut Context<'_>,
    ) -> Poll<Result<Option<BytesMut>, AccessError>> {
        let limit = self.codec.max_frame_length();
        let too_long = |bytes| Poll::Ready(Err(AccessError::FrameTooLong { bytes, limit }));
        for _ in 0..READS {
            let header = self.inbox.first_chunk().copied();
            match self.codec.decode(&mut self.inbox) {
                Ok(Some(frame)) => {
                    // What is behind a long one would keep its memory.
                    if self.inbox.is_empty() || frame.len() > READ_BYTES {
                        self.inbox = BytesMut::from(&*self.inbox);
                    }
                    return Poll::Ready(Ok(Some(frame)));
                }
                // It began when more was allowed.
                Ok(None) if self.inbox.len() > limit + HEADER_BYTES => {
                    return too_long(u32::try_from(self.inbox.len()).unwrap_or(u32::MAX));
                }
                Ok(None) => {}
                Err(_) => return too_long(header.map_or(0, u32::from_be_bytes)),
            }
            let mut scratch = [const { MaybeUninit::uninit() }; READ_BYTES];
            let mut scratch = ReadBuf::uninit(&mut scratch);
            ready!(Pin::new(&mut *self.stream).poll_read(cx, &mut scratch))?;
            let read = scratch.filled();
            if read.is_empty() {
                return Poll::Ready(match self.inbox.len() {
                    0 => Ok(None),
                    bytes => Err(AccessError::CutOff { bytes }),
                });
            }
            self.received += read.len() as u64;
            self.inbox.extend_from_slice(read);
        }
        cx.waker().wake_by_ref();
        Poll::Pending
    }

    /// Bytes of the frames that have been given out, headers included: of what came, without what is
    /// still to be decoded.
    pub(crate) fn decoded(&self) -> u64 {
        self.received - self.inbox.len() as u64
    }

    /// Puts a whole frame, header included, behind what is to be written.
    pub(crate) fn queue(&mut self, frame: Bytes) {
        self.queued += frame.len();
        self.outbox.push_back(frame);
    }

    /// Where in all that is written the next frame will begin.
    pub(crate) fn end(&self) -> u64 {
        self.sent + self.queued as u64
    }

    /// Bytes that are queued and not written yet.
    pub(crate) fn queued(&self) -> usize {
        self.queued
    }

    /// Whether all that was queued has left this end.
    pub(crate) fn is_flushed(&self) -> bool {
        self.queued == 0 && self.flushed
    }

    /// Writes everything that is queued, in as few calls as the stream takes.
    pub(crate) fn poll_flush(&mut self, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        while self.queued > 0 {
            let mut slices = [IoSlice::new(&[]); WRITE_FRAMES];
            let mut filled = 0;
            for (slice, frame) in slices.iter_mut().zip(&self.outbox) {
                *slice = IoSlice::new(frame);
                filled += 1;
            }
            let slices = slices.get(..filled).unwrap_or_default();
            let Poll::Ready(written) = Pin::new(&mut *self.stream).poll_write_vectored(cx, slices)
            else {
                self.full = true;
                return Poll::Pending;
            };
            let written = written?;
            if written == 0 {
                return Poll::Ready(Err(io::ErrorKind::WriteZero.into()));
            }
            self.took |= std::mem::take(&mut self.full);
            self.flushed = false;
            self.advance(written);
        }
        ready!(Pin::new(&mut *self.stream).poll_flush(cx))?;
        self.flushed = true;
        Poll::Ready(Ok(()))
    }

    /// Whether a stream that was full has taken something since this was asked last. Only a peer that is there makes room.
    pub(crate) fn has_taken(&mut self) -> bool {
        std::mem::take(&mut self.took)
    }

    /// Says to the peer that nothing more comes.
    pub(crate) fn poll_shutdown(&mut self, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut *self.stream).poll_shutdown(cx)
    }

    /// Throws away what still comes, until the peer has closed too. A socket that is closed while something
    /// is unread takes what was written last with it.
    pub(crate) fn poll_drain(&mut self, cx: &mut Context<'_>) -> Poll<()> {
        for _ in 0..DRAIN_READS {
            let mut scratch = [const { MaybeUninit::uninit() }; READ_BYTES];
            let mut scratch = ReadBuf::uninit(&mut scratch);
            match ready!(Pin::new(&mut *self.stream).poll_read(cx, &mut scratch)) {
                Ok(()) if !scratch.filled().is_empty() => {}
                Ok(()) | Err(_) => return Poll::Ready(()),
            }
        }
        cx.waker().wake_by_ref();
        Poll::Pending
    }

    fn advance(&mut self, written: usize) {
        self.queued -= written;
        self.sent += written as u64;
        let mut left = written;
        while let Some(frame) = self.outbox.front_mut() {
            if left < frame.len() {
                frame.advance(left);
                return;
            }
            left -= frame.len();
            self.outbox.pop_front();
        }
    }
}
