//! A server by hand: what it does is done with the other end of the connection.

use std::io;

use futures_util::FutureExt;
use futures_util::future::BoxFuture;
use tablecast_actors::access::{Access, Stream};
use tablecast_actors::protocol::wire::{self, Message};
use tablecast_actors::protocol::{
    Chain, Epoch, Limits, Position, Revision, ToClient, ToServer, Way,
};
use tokio::io::{AsyncRead, AsyncReadExt, AsyncWriteExt, DuplexStream};
use tokio::sync::mpsc;

/// How it is reached.
pub(crate) struct ByHand(mpsc::UnboundedSender<DuplexStream>);

impl Access for ByHand {
    fn connect(&self) -> BoxFuture<'static, io::Result<Box<dyn Stream>>> {
        let (theirs, ours) = tokio::io::duplex(64 << 10);
        let refused = |_| io::Error::from(io::ErrorKind::ConnectionRefused);
        let sent = self.0.send(ours).map_err(refused);
        async { sent.map(|()| Box::new(theirs) as Box<dyn Stream>) }.boxed()
    }

    fn address(&self) -> String {
        "by hand".to_owned()
    }
}

/// It, and the connections that come.
pub(crate) fn by_hand() -> (ByHand, mpsc::UnboundedReceiver<DuplexStream>) {
    let (sender, connected) = mpsc::unbounded_channel();
    (ByHand(sender), connected)
}

pub(crate) async fn write(stream: &mut DuplexStream, message: &ToClient) {
    stream.write_all(&wire::encode(message)).await.unwrap();
}

/// The next message, at either end.
pub(crate) async fn read<M: Message>(stream: &mut (impl AsyncRead + Unpin)) -> M {
    let length = usize::try_from(stream.read_u32().await.unwrap()).unwrap();
    let mut payload = vec![0; length];
    stream.read_exact(&mut payload).await.unwrap();
    wire::decode(&payload, &Limits::default()).unwrap()
}

/// The next follower that connects, at the beginning of a history. It asks for a diff next.
pub(crate) async fn welcome(connected: &mut mpsc::UnboundedReceiver<DuplexStream>) -> DuplexStream {
    let mut stream = connected.recv().await.unwrap();
    let hello = read(&mut stream).await;
    assert!(matches!(hello, ToServer::Hello { .. }), "{hello:?}");
    let epoch = Epoch::from_bytes([1; 16]);
    let at = Position { epoch, revision: Revision::ZERO, chain: Chain::START };
    write(&mut stream, &ToClient::welcome(at, Way::NoPosition, &Limits::default())).await;
    stream
}
