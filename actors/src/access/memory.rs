//! Connections within a process: the tests' transport, and for a server and a follower in one.

use std::io;

use futures_util::FutureExt;
use futures_util::future::BoxFuture;
use tokio::sync::mpsc;

use super::{Access, Incoming, Listener, Stream};

/// Bytes that a connection holds each way before its writer waits.
const BUFFER_BYTES: usize = 256 << 10;

/// Connections that wait to be accepted; one more waits itself.
const BACKLOG: usize = 64;

/// Two ends that belong together.
///
/// ```
/// use tablecast_actors::access::{Access, Listener, memory};
///
/// # tokio::runtime::Builder::new_current_thread().build().unwrap().block_on(async {
/// let (mut listener, access) = memory::pair();
/// let (incoming, stream) = tokio::join!(listener.accept(), access.connect());
/// assert_eq!(incoming.unwrap().peer, "memory");
/// stream.unwrap();
/// # });
/// ```
pub fn pair() -> (MemoryListener, MemoryAccess) {
    let (sender, receiver) = mpsc::channel(BACKLOG);
    (MemoryListener { receiver }, MemoryAccess { sender })
}

/// The server's end of [`pair`].
#[derive(Debug)]
pub struct MemoryListener {
    receiver: mpsc::Receiver<tokio::io::DuplexStream>,
}

/// The followers' end of [`pair`]; any number of them may share it.
#[derive(Clone, Debug)]
pub struct MemoryAccess {
    sender: mpsc::Sender<tokio::io::DuplexStream>,
}

impl Listener for MemoryListener {
    fn accept(&mut self) -> BoxFuture<'_, io::Result<Incoming>> {
        async {
            match self.receiver.recv().await {
                Some(stream) => Ok(Incoming::new("memory".to_owned(), move || {
                    Ok(Box::new(stream) as Box<dyn Stream>)
                })),
                // Nobody can connect any more.
                None => std::future::pending().await,
            }
        }
        .boxed()
    }

    fn address(&self) -> String {
        "memory".to_owned()
    }
}

impl Access for MemoryAccess {
    fn connect(&self) -> BoxFuture<'static, io::Result<Box<dyn Stream>>> {
        let sender = self.sender.clone();
        async move {
            let (here, there) = tokio::io::duplex(BUFFER_BYTES);
            let refused = |_| io::Error::from(io::ErrorKind::ConnectionRefused);
            sender.send(there).await.map_err(refused)?;
            Ok(Box::new(here) as Box<dyn Stream>)
        }
        .boxed()
    }

    fn address(&self) -> String {
        "memory".to_owned()
    }
}
