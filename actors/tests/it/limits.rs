//! How large things may be, as a server and a follower tell each other.

use tablecast_actors::ServerConfig;
use tablecast_actors::access::{Access, memory};
use tablecast_actors::protocol::{
    Epoch, Limits, MemoryStore, Reason, Table, ToClient, ToServer, wire,
};
use tablecast_actors::server::{Endpoint, Ready};
use tokio::io::AsyncWriteExt;

use crate::by_hand::read;

#[actix_rt::test]
async fn a_follower_that_could_not_be_sent_what_the_table_accepts_is_refused() {
    let small = Limits { value_bytes: 1000, ..Limits::default() };
    let mut config = ServerConfig::default();
    config.session.limits = small;
    let table = Table::open(MemoryStore::new(), Limits::default()).unwrap();
    let endpoint = Endpoint::start_here(table, config);
    let (listener, access) = memory::pair();
    endpoint.listen(listener);
    endpoint.server().send(Ready(Epoch::from_bytes([1; 16]))).await.unwrap();

    let mut stream = access.connect().await.unwrap();
    stream.write_all(&wire::encode(&ToServer::hello("", &small, None))).await.unwrap();
    let message = read(&mut stream).await;
    let ToClient::Refuse { reason, text } = message else { panic!("{message:?}") };
    assert_eq!(reason, Reason::Limits);
    assert!(text.contains("1000"), "{text}");
}
