//! Connections of which one end is done by hand, and the other one is on this thread.

use actix::prelude::*;
use tablecast_actors::access::memory::{self, MemoryAccess};
use tablecast_actors::access::{Access, Stream};
use tablecast_actors::client::{self, Client};
use tablecast_actors::protocol::wire;
use tablecast_actors::protocol::{
    Epoch, Limits, MemoryStore, Replica, Store, Table, ToClient, ToServer,
};
use tablecast_actors::server::{Endpoint, Ready};
use tablecast_actors::{ClientConfig, ServerConfig};
use tokio::io::{AsyncWriteExt, DuplexStream};
use tokio::sync::mpsc;

use crate::by_hand::{by_hand, read, welcome};

/// A server of an empty table that is ready.
pub(crate) async fn serve(config: ServerConfig) -> (Endpoint, MemoryAccess) {
    serve_filled(MemoryStore::new(), config).await
}

pub(crate) async fn serve_filled(
    store: MemoryStore,
    config: ServerConfig,
) -> (Endpoint, MemoryAccess) {
    serve_table(Table::open(store, Limits::default()).unwrap(), config).await
}

/// Its history begins here, if it has not begun.
pub(crate) async fn serve_table(table: Table, config: ServerConfig) -> (Endpoint, MemoryAccess) {
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

/// A follower, the connections that come of it, and the first of them, at the beginning of a history.
pub(crate) async fn follower(
    store: impl Store,
    config: ClientConfig,
) -> (Addr<Client>, mpsc::UnboundedReceiver<DuplexStream>, DuplexStream) {
    let (access, mut connected) = by_hand();
    let client = follow(access, store, config).await;
    let stream = welcome(&mut connected).await;
    (client, connected, stream)
}

/// A follower that connects.
pub(crate) async fn follow(
    access: impl Access,
    store: impl Store,
    config: ClientConfig,
) -> Addr<Client> {
    let client = Client::new(Replica::open(store).unwrap(), access, config).start();
    client.send(client::Ready).await.unwrap();
    client
}
