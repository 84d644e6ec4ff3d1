//! Connections over the simulated network.

use std::io;

use futures_util::FutureExt;
use futures_util::future::BoxFuture;
use tablecast_actors::access::{Access, Incoming, Listener, Stream};
use turmoil::net::{TcpListener, TcpStream};

const PORT: u16 = 7420;

/// Reaches the host `server`.
pub struct SimAccess;

impl Access for SimAccess {
    fn connect(&self) -> BoxFuture<'static, io::Result<Box<dyn Stream>>> {
        let stream = TcpStream::connect(("server", PORT));
        async { Ok(Box::new(stream.await?) as Box<dyn Stream>) }.boxed()
    }

    fn address(&self) -> String {
        "server".to_owned()
    }
}

pub struct SimListener(TcpListener);

impl SimListener {
    pub async fn bind() -> io::Result<Self> {
        Ok(Self(TcpListener::bind(("0.0.0.0", PORT)).await?))
    }
}

impl Listener for SimListener {
    fn accept(&mut self) -> BoxFuture<'_, io::Result<Incoming>> {
        async {
            let (stream, peer) = self.0.accept().await?;
            let stream = Box::new(stream) as Box<dyn Stream>;
            Ok(Incoming::new(peer.to_string(), || Ok(stream)))
        }
        .boxed()
    }

    fn address(&self) -> String {
        "server".to_owned()
    }
}
