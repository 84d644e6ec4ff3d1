//! Connections over TCP.
//!
//! `TCP_NODELAY` is set on both ends: what is written is written in as few calls as the socket
//! takes, so there is nothing for the kernel to collect, and a walk waits for every answer. What
//! it does is measured in bench/README.md.

use std::io;
use std::net::{IpAddr, SocketAddr, ToSocketAddrs};
use std::time::Duration;

use futures_util::future::BoxFuture;
use futures_util::stream::FuturesUnordered;
use futures_util::{FutureExt, StreamExt};
use socket2::SockRef;
use tokio::net::TcpStream;

use super::{Access, Incoming, Listener, Stream};

/// How many connections wait to be accepted; the system may allow fewer. One that finds no room tries again a second later, and
/// then two: that is how long a newcomer waited beside a thousand that come back whenever they are closed.
const BACKLOG: i32 = 4096;

/// Of how many bytes that were not sent yet a socket takes no more, where the system can say so: as many as are written at
/// once ([`ServerConfig::flush_bytes`](crate::ServerConfig)). Otherwise the kernel holds megabytes for each follower that
/// reads nothing, and a ping waits behind them on a slow line.
#[cfg(any(target_os = "android", target_os = "linux"))]
const UNSENT_BYTES: u32 = 256 << 10;

/// How long an address is waited for before the next one of its name is tried as well.
const STAGGER: Duration = Duration::from_millis(250);

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
            match listener.accept().await {
                // Whoever has gone again by now costs no more than this.
                Ok((stream, peer)) if matches!(stream.take_error(), Ok(None)) => {
                    break (stream, peer);
                }
                Ok(_) => {}
                Err(error) if is_gone(&error) => {}
                Err(error) => return Err(error),
            }
        };
        // Nor can it be set where nobody is there any more.
        stream.set_nodelay(self.nodelay).ok();
        bound_unsent(&stream);
        // Taken out of this thread's runtime, so that the thread that serves it polls it too.
        let stream = stream.into_std()?;
        let peer = match peer.ip().to_canonical() {
            // In the clothes of an IPv6 address.
            IpAddr::V4(ip) => SocketAddr::new(ip.into(), peer.port()),
            // It may have a scope.
            IpAddr::V6(_) => peer,
        };
        Ok(Incoming::new(peer.to_string(), move || {
            Ok(Box::new(TcpStream::from_std(stream)?) as Box<dyn Stream>)
        }))
    }
}

/// A system that does not know it keeps more, and that is all.
fn bound_unsent(stream: &TcpStream) {
    #[cfg(any(target_os = "android", target_os = "linux"))]
    SockRef::from(stream).set_tcp_notsent_lowat(UNSENT_BYTES).ok();
    #[cfg(not(any(target_os = "android", target_os = "linux")))]
    let _ = stream;
}

/// The connection that would be accepted is none any more; some systems say so.
fn is_gone(error: &io::Error) -> bool {
    matches!(error.kind(), io::ErrorKind::ConnectionAborted | io::ErrorKind::ConnectionReset)
}

/// Connects to the first of these that answers: one after the other is asked, and the next one with every [`STAGGER`] in which
/// nothing comes of those before it ("Happy Eyeballs", RFC 8305).
async fn connect_any(addresses: impl IntoIterator<Item = SocketAddr>) -> io::Result<TcpStream> {
    let mut addresses = addresses.into_iter().peekable();
    let mut attempts = FuturesUnordered::new();
    let mut failed = io::Error::new(io::ErrorKind::NotFound, "the name has no address");
    loop {
        attempts.extend(addresses.next().map(TcpStream::connect));
        let wait = if addresses.peek().is_some() { STAGGER } else { Duration::MAX };
        match tokio::time::timeout(wait, attempts.next()).await {
            Ok(Some(Ok(stream))) => return Ok(stream),
            Ok(Some(Err(error))) => failed = error,
            Ok(None) => return Err(failed),
            Err(_) => {}
        }
    }
}

impl TcpAccess {
    /// A server at `HOST:PORT`. The name is looked up at every attempt; of several addresses the first that answers is taken.
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
            let stream = connect_any(tokio::net::lookup_host(address).await?).await?;
            stream.set_nodelay(nodelay)?;
            bound_unsent(&stream);
            Ok(Box::new(stream) as Box<dyn Stream>)
        }
        .boxed()
    }

    fn address(&self) -> String {
        self.address.clone()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Where connections are neither taken nor refused: the queue is full.
    #[cfg(any(target_os = "android", target_os = "linux"))]
    async fn black_hole() -> (std::net::TcpListener, Vec<TcpStream>) {
        let listener = std::net::TcpListener::bind("127.0.0.1:0").unwrap();
        SockRef::from(&listener).listen(0).unwrap();
        let address = listener.local_addr().unwrap();
        let mut queued = Vec::new();
        while let Ok(stream) = tokio::time::timeout(4 * STAGGER, TcpStream::connect(address)).await
        {
            queued.push(stream.unwrap());
        }
        (listener, queued)
    }

    #[cfg(any(target_os = "android", target_os = "linux"))]
    #[tokio::test]
    async fn an_address_that_does_not_answer_does_not_stand_before_the_next() {
        let (hole, _queued) = black_hole().await;
        let open = std::net::TcpListener::bind("127.0.0.1:0").unwrap();
        let [hole, open] = [&hole, &open].map(|listener| listener.local_addr().unwrap());
        assert_eq!(connect_any([hole, open]).await.unwrap().peer_addr().unwrap(), open);
    }

    #[tokio::test]
    async fn of_addresses_the_first_that_answers_is_taken() {
        let bound = [(); 2].map(|()| std::net::TcpListener::bind("127.0.0.1:0").unwrap());
        let [open, closed] = bound.each_ref().map(|listener| listener.local_addr().unwrap());
        let [_open, taken] = bound;
        drop(taken);
        assert_eq!(connect_any([closed, open]).await.unwrap().peer_addr().unwrap(), open);
        let refused = connect_any([closed, closed]).await.unwrap_err();
        assert_eq!(refused.kind(), io::ErrorKind::ConnectionRefused);
        assert_eq!(connect_any([]).await.unwrap_err().kind(), io::ErrorKind::NotFound);
    }

    #[tokio::test]
    async fn an_address_is_said_in_its_own_form() {
        // A machine may have no IPv6.
        let Ok(mut listener) = TcpListener::bind("[::]:0") else { return };
        let port = listener.local_address().port();
        let connected = TcpStream::connect(("127.0.0.1", port)).await.unwrap();
        let incoming = listener.accept_tcp().await.unwrap();
        assert_eq!(incoming.peer, connected.local_addr().unwrap().to_string());
    }
}
