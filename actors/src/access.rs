//! What a transport must give: streams of bytes, in order, both ways.
//!
//! Frames are put around them here (`codec.rs`), so that a transport needs to know nothing of the
//! protocol. There are two: [`tcp`], and [`memory`] within a process, which is also the smallest
//! example of one.

pub(crate) mod codec;
pub mod memory;
pub mod tcp;

use std::fmt;
use std::io;

use futures_util::future::BoxFuture;
use tokio::io::{AsyncRead, AsyncWrite};

/// A connection, as bytes both ways.
pub trait Stream: AsyncRead + AsyncWrite + Send + Unpin {}

impl<T: AsyncRead + AsyncWrite + Send + Unpin> Stream for T {}

/// How a follower reaches its server.
pub trait Access: Send + Sync + 'static {
    /// Connects, once. Dropping the future gives up.
    fn connect(&self) -> BoxFuture<'static, io::Result<Box<dyn Stream>>>;

    /// Where to, for logs.
    fn address(&self) -> String;
}

/// How a server is reached.
pub trait Listener: Send + 'static {
    /// Waits for the next connection. Dropping the future loses none.
    fn accept(&mut self) -> BoxFuture<'_, io::Result<Incoming>>;

    /// Where it listens, for logs.
    fn address(&self) -> String;
}

/// A connection that was accepted, and is opened on the thread that is going to serve it.
pub struct Incoming {
    /// Who, for logs.
    pub peer: String,
    open: Box<dyn FnOnce() -> io::Result<Box<dyn Stream>> + Send>,
}

impl Incoming {
    /// A connection from `peer`; `open` is called once, within the runtime that will poll it.
    pub fn new(
        peer: String,
        open: impl FnOnce() -> io::Result<Box<dyn Stream>> + Send + 'static,
    ) -> Self {
        Self { peer, open: Box::new(open) }
    }

    /// Opens it, on the thread that serves it.
    pub(crate) fn open(self) -> io::Result<Box<dyn Stream>> {
        (self.open)()
    }
}

impl fmt::Debug for Incoming {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Incoming").field("peer", &self.peer).finish_non_exhaustive()
    }
}
