//! What a transport must give: streams of bytes, in order, both ways.
//!
//! Frames are put around them here (`codec.rs`), so that a transport needs to know nothing of the
//! protocol. There are two: [`tcp`], and [`memory`] within a process, which is also the smallest
//! example of one. `tls` (with the feature of that name) is a layer over either, or any other.

pub(crate) mod codec;
pub mod memory;
pub mod tcp;
#[cfg(feature = "tls")]
pub mod tls;

use std::fmt;
use std::io;

use bytes::Bytes;
use futures_util::FutureExt;
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

impl Access for Box<dyn Access> {
    fn connect(&self) -> BoxFuture<'static, io::Result<Box<dyn Stream>>> {
        (**self).connect()
    }

    fn address(&self) -> String {
        (**self).address()
    }
}

/// How a server is reached.
pub trait Listener: Send + 'static {
    /// Waits for the next connection. Dropping the future loses none.
    fn accept(&mut self) -> BoxFuture<'_, io::Result<Incoming>>;

    /// Where it listens, for logs.
    fn address(&self) -> String;
}

/// What a stream has become, and the certificate that the follower has shown, DER.
pub type Handshaken = (Box<dyn Stream>, Option<Bytes>);

/// A connection that was accepted, and is opened on the thread that is going to serve it.
pub struct Incoming {
    /// Who, for logs.
    pub peer: String,
    open: Box<dyn FnOnce() -> BoxFuture<'static, io::Result<Handshaken>> + Send>,
}

impl Incoming {
    /// A connection from `peer`; `open` is called once, within the runtime that will poll it.
    pub fn new(
        peer: String,
        open: impl FnOnce() -> io::Result<Box<dyn Stream>> + Send + 'static,
    ) -> Self {
        let open = || async { Ok((open()?, None)) }.boxed();
        Self { peer, open: Box::new(open) }
    }

    /// The same connection with a handshake ahead of what is served. The handshake may take as long as
    /// [`ServerConfig::handshake_timeout`](crate::ServerConfig::handshake_timeout), and holds up nobody else.
    #[must_use]
    pub fn with_handshake<F>(
        self,
        handshake: impl FnOnce(Box<dyn Stream>) -> F + Send + 'static,
    ) -> Self
    where
        F: Future<Output = io::Result<Handshaken>> + Send + 'static,
    {
        let before = self.open;
        let open = || async { handshake(before().await?.0).await }.boxed();
        Self { peer: self.peer, open: Box::new(open) }
    }

    /// Opens it, on the thread that serves it.
    pub(crate) async fn open(self) -> io::Result<Handshaken> {
        (self.open)().await
    }
}

impl fmt::Debug for Incoming {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Incoming").field("peer", &self.peer).finish_non_exhaustive()
    }
}
