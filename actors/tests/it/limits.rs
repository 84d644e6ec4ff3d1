//! How large things may be, as a server and a follower tell each other.

use tablecast_actors::ServerConfig;
use tablecast_actors::access::Access;
use tablecast_actors::protocol::{Limits, Reason, ToClient, ToServer, wire};
use tokio::io::AsyncWriteExt;

use crate::by_hand::read;
use crate::connection::serve;

#[actix_rt::test]
async fn a_follower_that_could_not_be_sent_what_the_table_accepts_is_refused() {
    let small = Limits { value_bytes: 1000, ..Limits::default() };
    let mut config = ServerConfig::default();
    config.session.limits = small;
    let (_endpoint, access) = serve(config).await;
    let mut stream = access.connect().await.unwrap();
    stream.write_all(&wire::encode(&ToServer::hello("", &small, None))).await.unwrap();
    let message = read(&mut stream).await;
    let ToClient::Refuse { reason, text } = message else { panic!("{message:?}") };
    assert_eq!(reason, Reason::Limits);
    assert!(text.contains("1000"), "{text}");
}
