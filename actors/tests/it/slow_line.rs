//! What is long on its way is no sign of death, and is not begun anew: it would take as long again.

use std::io;
use std::time::Duration;

use actix::prelude::*;
use futures_util::FutureExt;
use futures_util::future::{BoxFuture, join_all};
use tablecast_actors::access::memory::MemoryAccess;
use tablecast_actors::access::{Access, Stream};
use tablecast_actors::client::{self, Client, GetStatus, WaitReady};
use tablecast_actors::protocol::{Change, Key, MemoryStore, Value};
use tablecast_actors::server::Write;
use tablecast_actors::{ClientConfig, ClientStatus, DiffOutcome, ServerConfig, compute_here};
use tokio::io::{AsyncReadExt, AsyncWriteExt, DuplexStream, ReadHalf, WriteHalf, split};

use crate::connection::{follow, serve, serve_filled};
use crate::filled;

/// What a line holds, whichever way.
const ON_THE_WAY_BYTES: usize = 16 << 10;

const FAST: u32 = 1 << 30;

/// So much takes a minute and more over a slow line.
const LARGE: usize = 6 << 20;
const SLOW: u32 = 80 << 10;

const LONG: Duration = Duration::from_secs(3600);

/// So many bytes a second go to the server and to the follower.
#[derive(Clone)]
struct SlowLine {
    server: MemoryAccess,
    up: u32,
    down: u32,
}

async fn carry(mut from: ReadHalf<impl Stream>, mut to: WriteHalf<impl Stream>, a_second: u32) {
    let mut part = [0; 4 << 10];
    while let Ok(bytes @ 1..) = from.read(&mut part).await {
        tokio::time::sleep(Duration::from_secs(1) * u32::try_from(bytes).unwrap() / a_second).await;
        if to.write_all(&part[..bytes]).await.is_err() {
            break;
        }
    }
    // Whoever is there sees the end.
    to.shutdown().await.ok();
}

impl Access for SlowLine {
    fn connect(&self) -> BoxFuture<'static, io::Result<Box<dyn Stream>>> {
        let Self { server, up, down } = self.clone();
        async move {
            let (from_server, to_server) = split(server.connect().await?);
            let (theirs, ours): (_, DuplexStream) = tokio::io::duplex(ON_THE_WAY_BYTES);
            let (from_client, to_client) = split(ours);
            actix_rt::spawn(carry(from_client, to_server, up));
            actix_rt::spawn(carry(from_server, to_client, down));
            Ok(Box::new(theirs) as Box<dyn Stream>)
        }
        .boxed()
    }

    fn address(&self) -> String {
        "over a slow line".to_owned()
    }
}

/// A minute is over as soon as there is nothing else to do.
fn pause() {
    tokio::time::pause();
    compute_here();
}

async fn over(line: SlowLine, store: MemoryStore) -> Addr<Client> {
    follow(line, store, ClientConfig { mass_delete: None, ..ClientConfig::default() }).await
}

/// How it is when nothing is missing any more.
async fn ready(client: &Addr<Client>) -> ClientStatus {
    let ready = client.send(WaitReady(LONG)).await.unwrap();
    let status = client.send(GetStatus).await.unwrap();
    assert!(ready.is_ok() && status.connects == 1, "{status:?}");
    let Some(DiffOutcome::Done(diff)) = &status.last_diff else { panic!("{status:?}") };
    assert!(diff.equal());
    status
}

#[actix_rt::test]
async fn a_large_value_comes_live_and_by_a_repair() {
    pause();
    let large = |byte| Value::from(vec![byte; LARGE]);
    let store = [(Key::from("large"), large(0))].into_iter().collect();
    let (endpoint, server) = serve_filled(store, ServerConfig::default()).await;
    let client = over(SlowLine { server, up: FAST, down: SLOW }, MemoryStore::new()).await;
    assert_eq!(ready(&client).await.keys, 1);
    let written = endpoint.server().send(Write(vec![Change::write("live", large(1))])).await;
    let at = written.unwrap().unwrap().position().unwrap();
    let wait = client::WaitFor { epoch: at.epoch, revision: at.revision, timeout: LONG };
    client.send(wait).await.unwrap().unwrap();
    assert_eq!(ready(&client).await.keys, 2);
}

/// What the line holds is on its way for longer than a silent peer is waited for.
#[actix_rt::test]
async fn what_is_on_its_way_is_waited_for_when_all_is_written() {
    pause();
    let large = Value::from(vec![0; 1 << 20]);
    let store = [(Key::from("large"), large)].into_iter().collect();
    let (_endpoint, server) = serve_filled(store, ServerConfig::default()).await;
    let client = over(SlowLine { server, up: FAST, down: 8 << 10 }, MemoryStore::new()).await;
    assert_eq!(ready(&client).await.keys, 1);
}

/// One answer of the walk takes half a minute, the others nothing.
#[actix_rt::test]
async fn a_large_answer_is_waited_for_though_others_wait_for_the_place() {
    pause();
    let config = ServerConfig { diffs_at_once: 1, ..ServerConfig::default() };
    let (_endpoint, server) = serve(config).await;
    let line = SlowLine { server, up: 8 << 10, down: FAST };
    let clients = join_all((0..3).map(|_| over(line.clone(), filled(20_000)))).await;
    for status in join_all(clients.iter().map(ready)).await {
        assert_eq!(status.keys, 0);
        let Some(DiffOutcome::Done(diff)) = status.last_diff else { panic!() };
        assert!(diff.elapsed - diff.waited > Duration::from_secs(20), "{diff:?}");
    }
}
