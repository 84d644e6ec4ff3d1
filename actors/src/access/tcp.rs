//! Connections over TCP.
//!
//! `TCP_NODELAY` is set on both ends: what is written is written in as few calls as the socket
//! takes, so there is nothing for the kernel to collect, and a walk waits for every answer. What
//! it does is measured in bench/README.md.

use std::io;
use std::net::{SocketAddr, ToSocketAddrs};

use futures_util::FutureExt;
use futures_util::future::BoxFuture;
use socket2::SockRef;
use tokio::net::TcpStream;

use super::{Access, Incoming, Listener, Stream};

/// How many connections wait to be accepted; the system may allow fewer. One that finds no room tries again a second later, and
/// then two: that is how long a newcomer waited beside a thousand that come back whenever they are closed.
const BACKLOG: i32 = 4096;

/// Of how many bytes that were not sent yet a socket takes no more, where the system can say so: as many as are written at
/// once ([`ServerConfig::flush_bytes`](crate::ServerConfig)). Otherwise the kernel holds megabytes for each follower that
/// reads nothing.
#[cfg(any(target_os = "android", target_os = "linux"))]
const UNSENT_BYTES: u32 = 256 << 10;

/// Where a server listens.
#[derive(Debug)]
pub struct TcpListener {
    bound: Bound,
    address: SocketAddr,
    nodelay: bool,
}

/// A listener belongs to a runtime only once it accepts.
#[derive(Debug)]
enum Bound {
    Std(std::net::TcpListener),
    Tokio(tokio::net::TcpListener),
}

/// Where a follower's server is.
#[derive(Clone, Debug)]
pub struct TcpAccess {
    address: String,
    nodelay: bool,
}

impl TcpListener {
    /// Listens at an address; port 0 is one that is free.
    ///
    /// # Errors
    /// If the address is taken or no address at all.
    pub fn bind(address: impl ToSocketAddrs) -> io::Result<Self> {
        let listener = std::net::TcpListener::bind(address)?;
        // A second call changes the length of the queue: a thousand followers come back at once.
        SockRef::from(&listener).listen(BACKLOG).ok();
        listener.set_nonblocking(true)?;
        let address = listener.local_addr()?;
        Ok(Self { bound: Bound::Std(listener), address, nodelay: true })
    }

    /// Whether `TCP_NODELAY` is set on connections; it is unless one wants to measure what it does.
    #[must_use]
    pub fn with_nodelay(self, nodelay: bool) -> Self {
        Self { nodelay, ..self }
    }

    /// Where it listens, with the port that it got.
    pub fn local_address(&self) -> SocketAddr {
        self.address
    }

    async fn accept_tcp(&mut self) -> io::Result<Incoming> {
        if let Bound::Std(listener) = &self.bound {
            self.bound = Bound::Tokio(tokio::net::TcpListener::from_std(listener.try_clone()?)?);
        }
        let Bound::Tokio(listener) = &self.bound else {
            return Err(io::Error::other("the listener has no runtime"));
        };
        let (stream, peer) = loop {
            let (stream, peer) = listener.accept().await?;
            // Whoever has gone again by now costs no more than this.
            if stream.take_error()?.is_none() {
                break (stream, peer);
            }
        };
        stream.set_nodelay(self.nodelay)?;
        // A system that does not know it keeps more, and that is all.
        #[cfg(any(target_os = "android", target_os = "linux"))]
        SockRef::from(&stream).set_tcp_notsent_lowat(UNSENT_BYTES).ok();
        // Taken out of this thread's runtime, so that the thread that serves it polls it too.
        let stream = stream.into_std()?;
        Ok(Incoming::new(peer.to_string(), move || {
            Ok(Box::new(TcpStream::from_std(stream)?) as Box<dyn Stream>)
        }))
    }
}

impl TcpAccess {
    /// A server at `HOST:PORT`. The name is looked up at every attempt.
    pub fn new(address: impl Into<String>) -> Self {
        Self { address: address.into(), nodelay: true }
    }

    /// Whether `TCP_NODELAY` is set; it is unless one wants to measure what it does.
    #[must_use]
    pub fn with_nodelay(self, nodelay: bool) -> Self {
        Self { nodelay, ..self }
    }
}

impl Listener for TcpListener {
    fn accept(&mut self) -> BoxFuture<'_, io::Result<Incoming>> {
        self.accept_tcp().boxed()
    }

    fn address(&self) -> String {
        self.address.to_string()
    }
}

impl Access for TcpAccess {
    fn connect(&self) -> BoxFuture<'static, io::Result<Box<dyn Stream>>> {
        let Self { address, nodelay } = self.clone();
        async move {
            let stream = TcpStream::connect(address).await?;
            stream.set_nodelay(nodelay)?;
            Ok(Box::new(stream) as Box<dyn Stream>)
        }
        .boxed()
    }

    fn address(&self) -> String {
        self.address.clone()
    }
}
