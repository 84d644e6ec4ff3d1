//! A server on this thread, and the follower's end of a connection by hand.

use tablecast_actors::ServerConfig;
use tablecast_actors::access::memory::{self, MemoryAccess};
use tablecast_actors::access::{Access, Stream};
use tablecast_actors::protocol::wire;
use tablecast_actors::protocol::{Epoch, Limits, MemoryStore, Table, ToClient, ToServer};
use tablecast_actors::server::{Endpoint, Ready};
use tokio::io::AsyncWriteExt;

use crate::by_hand::read;

/// A server of an empty table that is ready.
pub(crate) async fn serve(config: ServerConfig) -> (Endpoint, MemoryAccess) {
    serve_filled(MemoryStore::new(), config).await
}

pub(crate) async fn serve_filled(
    store: MemoryStore,
    config: ServerConfig,
) -> (Endpoint, MemoryAccess) {
    let table = Table::open(store, Limits::default()).unwrap();
    let endpoint = Endpoint::start_here(table, config);
    let (listener, access) = memory::pair();
    endpoint.listen(listener);
    endpoint.server().send(Ready(Epoch::from_bytes([1; 16]))).await.unwrap();
    (endpoint, access)
}

pub(crate) async fn subscribe(access: &impl Access) -> Box<dyn Stream> {
    let mut stream = access.connect().await.unwrap();
    let hello = ToServer::hello("", &Limits::default(), None);
    stream.write_all(&wire::encode(&hello)).await.unwrap();
    let message = read(&mut stream).await;
    assert!(matches!(message, ToClient::Welcome { .. }), "{message:?}");
    stream
}
