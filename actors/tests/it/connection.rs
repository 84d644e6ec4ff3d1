//! The follower's end of a connection, by hand.

use tablecast_actors::access::{Access, Stream};
use tablecast_actors::protocol::wire::{self, HEADER_BYTES};
use tablecast_actors::protocol::{Limits, ToClient, ToServer};
use tokio::io::{AsyncReadExt, AsyncWriteExt};

pub(crate) async fn subscribe(access: &impl Access) -> Box<dyn Stream> {
    let mut stream = access.connect().await.unwrap();
    let hello = ToServer::hello("", &Limits::default(), None);
    stream.write_all(&wire::encode(&hello)).await.unwrap();
    let message = read(&mut stream).await;
    assert!(matches!(message, ToClient::Welcome { .. }), "{message:?}");
    stream
}

pub(crate) async fn read(stream: &mut Box<dyn Stream>) -> ToClient {
    let mut header = [0; HEADER_BYTES];
    stream.read_exact(&mut header).await.unwrap();
    let mut payload = vec![0; u32::from_be_bytes(header) as usize];
    stream.read_exact(&mut payload).await.unwrap();
    wire::decode(&payload, &Limits::default()).unwrap()
}
