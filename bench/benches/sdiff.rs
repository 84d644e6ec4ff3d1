//! sdiff's five questions: a write on the server, a write on the client, a connect, a stream of
//! 10,000 changes to one follower, and a diff of a table of 10,000 of which some are missing.

#![allow(
    missing_docs,
    clippy::unwrap_used,
    reason = "criterion's macros write no docs, and a failed measurement has nobody to tell but the terminal"
)]

use std::collections::VecDeque;
use std::time::{Duration, Instant};

use criterion::{BenchmarkId, Criterion, Throughput, criterion_group, criterion_main};
use tablecast::access::tcp::TcpAccess;
use tablecast::{
    Change, Client, ClientConfig, DiffOutcome, Event, Key, MemoryStore, Server, ServerConfig, Value,
};
use tablecast_actors::server::Write;
use tablecast_bench::{disturb, follow, keys, missing, serve, store};
use tokio::runtime::Runtime;

const KEYS: usize = 10_000;
const VALUE_BYTES: usize = 32;
const LONG: Duration = Duration::from_secs(60);

/// Writes that the stream does not wait for.
const IN_FLIGHT: usize = 256;

fn runtime() -> Runtime {
    tokio::runtime::Builder::new_current_thread().enable_all().build().unwrap()
}

async fn server() -> (Server, std::net::SocketAddr) {
    serve(ServerConfig::default(), store(&keys(KEYS), VALUE_BYTES), true).await.unwrap()
}

fn change(keys: &[[u8; 16]], number: u64) -> (Key, Value) {
    let key = keys.get(usize::try_from(number).unwrap() % keys.len()).unwrap();
    let mut value = vec![0; VALUE_BYTES];
    value.first_chunk_mut().map(|start| *start = number.to_be_bytes()).unwrap();
    (Key::copy_from_slice(key), value.into())
}

fn server_local_write(c: &mut Criterion) {
    let runtime = runtime();
    let keys = keys(KEYS);
    let (server, _) = runtime.block_on(server());
    c.bench_function("server_local_write", |b| {
        b.iter_custom(|iterations| {
            runtime.block_on(async {
                let start = Instant::now();
                for number in 0..iterations {
                    let (key, value) = change(&keys, number);
                    server.write(key, value).await.unwrap();
                }
                start.elapsed()
            })
        });
    });
    runtime.block_on(server.stop());
}

fn client_local_write(c: &mut Criterion) {
    let runtime = runtime();
    let keys = keys(KEYS);
    let access = TcpAccess::new("127.0.0.1:9");
    let client = Client::start(ClientConfig::default(), store(&keys, VALUE_BYTES), access).unwrap();
    c.bench_function("client_local_write", |b| {
        b.iter_custom(|iterations| {
            runtime.block_on(async {
                let start = Instant::now();
                for number in 0..iterations {
                    let (key, value) = change(&keys, number);
                    client.write(key, value).await.unwrap();
                }
                start.elapsed()
            })
        });
    });
    runtime.block_on(client.stop());
}

/// From `ready` to the end of the handshake. The tables play no part in that.
fn connect(c: &mut Criterion) {
    let runtime = runtime();
    let (server, address) = runtime.block_on(server());
    c.bench_function("connect", |b| {
        b.iter_custom(|iterations| {
            runtime.block_on(async {
                let mut total = Duration::ZERO;
                for _ in 0..iterations {
                    let access = TcpAccess::new(address.to_string());
                    let config = ClientConfig::default();
                    let client = Client::start(config, MemoryStore::new(), access).unwrap();
                    let mut events = client.events().await.unwrap();
                    let start = Instant::now();
                    client.ready().await.unwrap();
                    while !matches!(events.recv().await.unwrap(), Event::Connected(..)) {}
                    total += start.elapsed();
                    client.stop().await;
                }
                total
            })
        });
    });
    runtime.block_on(server.stop());
}

/// From the first write until the follower has the last of them in its table.
fn stream_10000(c: &mut Criterion) {
    let runtime = runtime();
    let keys = keys(KEYS);
    let (server, address) = runtime.block_on(server());
    let client = runtime.block_on(follow(address, store(&keys, VALUE_BYTES), true)).unwrap();
    let mut group = c.benchmark_group("stream");
    group.throughput(Throughput::Elements(10_000));
    group.bench_function("10000", |b| {
        b.iter(|| {
            runtime.block_on(async {
                let mut flying = VecDeque::with_capacity(IN_FLIGHT);
                let mut last = None;
                for number in 0..10_000 {
                    let (key, value) = change(&keys, number);
                    let write = Write(vec![Change::write(key, value)]);
                    flying.push_back(server.actor().send(write));
                    if flying.len() == IN_FLIGHT {
                        flying.pop_front().unwrap().await.unwrap().unwrap();
                    }
                }
                for write in flying {
                    last = write.await.unwrap().unwrap().position();
                }
                client.wait_for(last.unwrap(), LONG).await.unwrap();
            });
        });
    });
    group.finish();
    runtime.block_on(client.stop());
    runtime.block_on(server.stop());
}

/// From the asking to the verdict; the follower is made to differ outside of the time.
fn diff(c: &mut Criterion) {
    let runtime = runtime();
    let keys = keys(KEYS);
    let (server, address) = runtime.block_on(server());
    let client = runtime.block_on(follow(address, store(&keys, VALUE_BYTES), true)).unwrap();
    let mut round = 0;
    let mut group = c.benchmark_group("diff_10000_missing");
    for percent in [0, 1, 5, 10, 15] {
        let lacking = KEYS * percent / 100;
        group.bench_with_input(BenchmarkId::from_parameter(percent), &lacking, |b, &lacking| {
            b.iter_custom(|iterations| {
                runtime.block_on(async {
                    let mut total = Duration::ZERO;
                    for _ in 0..iterations {
                        round += 1;
                        disturb(&client, missing(&keys, lacking, round)).await.unwrap();
                        let start = Instant::now();
                        let outcome = client.diff().await.unwrap();
                        total += start.elapsed();
                        let DiffOutcome::Done(report) = outcome else { panic!("{outcome:?}") };
                        assert_eq!((report.written, report.equal()), (lacking as u64, true));
                    }
                    total
                })
            });
        });
    }
    group.finish();
    runtime.block_on(client.stop());
    runtime.block_on(server.stop());
}

criterion_group! {
    name = benches;
    config = Criterion::default()
        .sample_size(20)
        .warm_up_time(Duration::from_secs(1))
        .measurement_time(Duration::from_secs(4));
    targets = server_local_write, client_local_write, connect, stream_10000, diff
}
criterion_main!(benches);
