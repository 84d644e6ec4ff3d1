//! The live stream: every change behind the connect reaches every follower, in order.

use tablecast::{Change, Event, MemoryStore, Server, ServerConfig};

use crate::harness::{
    LONG, assert_converges, connect, event, filled, follower, quick, serve, within,
};

#[actix_rt::test]
async fn followers_see_every_change_in_order() {
    let (server, address) = serve(ServerConfig::default(), filled(100)).await;
    let client = follower(address, MemoryStore::new());
    let report = connect(&client).await;
    assert_eq!((report.written, report.rounds, report.equal()), (100, 1, true));
    let mut events = client.events().await.unwrap();
    for number in 0..500 {
        match number % 5 {
            0 => server.delete(format!("key-{:06}", number / 5)).await.unwrap(),
            1 => {
                let batch =
                    vec![Change::write("a", "1"), Change::delete("b"), Change::write("", "")];
                server.batch(batch).await.unwrap()
            }
            _ => server.write(format!("new-{number}"), vec![0; number]).await.unwrap(),
        };
    }
    let mut seen = Vec::new();
    while seen.len() < 700 {
        seen.push(
            event(&mut events, |event| match event {
                Event::Change { revision, repair: false, .. } => Some(revision.0),
                _ => None,
            })
            .await,
        );
    }
    assert_eq!(seen, (1..=700).collect::<Vec<_>>());
    assert_converges(&server, &client).await;
    client.stop().await;
    within(server.stop()).await;
}

#[actix_rt::test]
async fn connected_means_subscribed() {
    // The original lost 33 of 50 such writes.
    let (server, address) = serve(ServerConfig::default(), MemoryStore::new()).await;
    for number in 0..50 {
        let client = follower(address, MemoryStore::new());
        let mut events = client.events().await.unwrap();
        client.ready().await.unwrap();
        event(&mut events, |event| matches!(event, Event::Connected(..)).then_some(())).await;
        let written = server.write("key", format!("{number}")).await.unwrap();
        let revision = written.position().unwrap().revision;
        let live = event(&mut events, |event| match event {
            Event::Change { revision, repair: false, .. } => Some(*revision),
            _ => None,
        });
        assert_eq!(live.await, revision);
        client.stop().await;
    }
    within(server.stop()).await;
}

#[actix_rt::test]
async fn nobody_is_accepted_before_the_server_is_ready() {
    let server = Server::start(ServerConfig::default(), filled(3)).unwrap();
    let address = server.listen("127.0.0.1:0").unwrap();
    let client = follower(address, MemoryStore::new());
    let mut events = client.events().await.unwrap();
    client.ready().await.unwrap();
    server.write("key-000001", "filled later").await.unwrap();
    assert_eq!(server.followers().await.unwrap().len(), 0);
    let waiting = server.clone();
    let waiting = actix_rt::spawn(async move { waiting.wait_ready().await.unwrap() });
    let position = server.ready().await.unwrap();
    assert_eq!(within(waiting).await.unwrap(), position);
    let connected = event(&mut events, |event| match event {
        Event::Connected(at, _) => Some(*at),
        _ => None,
    });
    assert_eq!(connected.await, position);
    client.wait_for(position, LONG).await.unwrap();
    assert_converges(&server, &client).await;
}

#[test]
fn handles_work_without_an_actix_system() {
    let (server, client) =
        tokio::runtime::Builder::new_current_thread().enable_all().build().unwrap().block_on(
            async {
                let (server, address) = serve(ServerConfig::default(), filled(10)).await;
                let client = tablecast::Client::start(
                    quick(),
                    MemoryStore::new(),
                    tablecast::access::tcp::TcpAccess::new(address.to_string()),
                )
                .unwrap();
                client.ready().await.unwrap();
                let written = server.write("k", "v").await.unwrap().position().unwrap();
                client.wait_for(written, LONG).await.unwrap();
                (server, client)
            },
        );
    assert_eq!(client.reader().len().unwrap(), 11);
    drop((server, client));
}
