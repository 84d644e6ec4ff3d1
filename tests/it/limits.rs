//! Bad input ends its own connection, with a reason, and nothing else.

use std::net::SocketAddr;
use std::time::{Duration, Instant};

use tablecast::{AbortReason, Change, Hash, Limits, MemoryStore, Server, ServerConfig, Value};
use tablecast_actors::protocol::{DiffId, Reason, ToClient, ToServer, wire};
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::TcpStream;

use crate::harness::{LONG, assert_converges, connect, filled, follower, serve, within};

pub async fn read_message(stream: &mut TcpStream) -> Option<ToClient> {
    let length = within(stream.read_u32()).await.ok()?;
    let mut payload = vec![0; length as usize];
    within(stream.read_exact(&mut payload)).await.ok()?;
    Some(wire::decode(&payload, &Limits::default()).unwrap())
}

pub async fn hello(address: SocketAddr) -> TcpStream {
    let mut stream = TcpStream::connect(address).await.unwrap();
    let hello = wire::encode(&ToServer::hello("raw", &Limits::default(), None));
    stream.write_all(&hello).await.unwrap();
    let welcome = read_message(&mut stream).await.unwrap();
    assert!(matches!(welcome, ToClient::Welcome { .. }), "{welcome:?}");
    stream
}

/// What the server says last, then the end of the stream.
pub async fn last_words(stream: &mut TcpStream) -> (Reason, String) {
    let said = match read_message(stream).await.unwrap() {
        ToClient::Refuse { reason, text } | ToClient::Farewell { reason, text } => (reason, text),
        other => panic!("{other:?}"),
    };
    assert!(read_message(stream).await.is_none(), "it goes on");
    said
}

#[actix_rt::test]
async fn garbage_and_oversized_frames_end_their_own_connection() {
    let (server, address) = serve(ServerConfig::default(), filled(100)).await;
    let honest = follower(address, MemoryStore::new());
    assert!(connect(&honest).await.equal());

    let mut stream = TcpStream::connect(address).await.unwrap();
    stream.write_all(b"GET / HTTP/1.1\r\n\r\n").await.unwrap();
    let (reason, text) = last_words(&mut stream).await;
    assert_eq!(reason, Reason::Protocol);
    assert_eq!(text, "frame of 1195725856 bytes is above the limit of 4096");

    let mut stream = TcpStream::connect(address).await.unwrap();
    stream.write_all(&[0, 0, 0, 3, 0xc1, 0xc1, 0xc1]).await.unwrap();
    let (reason, text) = last_words(&mut stream).await;
    assert_eq!(reason, Reason::Protocol);
    assert!(text.starts_with("malformed message of 3 bytes"), "{text}");

    let mut stream = TcpStream::connect(address).await.unwrap();
    // A Hello of version 9.
    stream.write_all(&[0, 0, 0, 4, 0x93, 0, 9, 0xc0]).await.unwrap();
    let (reason, text) = last_words(&mut stream).await;
    assert_eq!(reason, Reason::Version);
    assert_eq!(text, "peer speaks version 9, this end speaks version 1");

    let mut stream = hello(address).await;
    stream.write_all(&u32::MAX.to_be_bytes()).await.unwrap();
    let (reason, text) = last_words(&mut stream).await;
    assert_eq!(reason, Reason::Protocol);
    assert_eq!(text, "frame of 4294967295 bytes is above the limit of 4096");

    let mut stream = hello(address).await;
    let never = ToServer::RepairAck { diff: Default::default(), failed: 0, micros: 0 };
    stream.write_all(&wire::encode(&never)).await.unwrap();
    let (reason, text) = last_words(&mut stream).await;
    assert_eq!(reason, Reason::Protocol);
    assert_eq!(text, "RepairAck must not come in state Relay");

    // Half a frame, and then the end.
    let mut stream = hello(address).await;
    stream.write_all(&[0, 0, 0, 200, 0x92]).await.unwrap();
    stream.shutdown().await.unwrap();
    assert!(read_message(&mut stream).await.is_none());

    server.write("still", "here").await.unwrap();
    assert_converges(&server, &honest).await;
    within(async { while server.followers().await.unwrap().len() > 1 {} }).await;
}

#[actix_rt::test]
async fn a_frame_may_come_byte_by_byte() {
    let (server, address) = serve(ServerConfig::default(), filled(10)).await;
    let mut stream = TcpStream::connect(address).await.unwrap();
    stream.set_nodelay(true).unwrap();
    let hello = wire::encode(&ToServer::hello("drip", &Limits::default(), None));
    let mut ticks = tokio::time::interval(Duration::from_millis(20));
    for byte in hello.iter() {
        // The rate is what is tested.
        ticks.tick().await;
        stream.write_all(&[*byte]).await.unwrap();
    }
    assert!(matches!(read_message(&mut stream).await, Some(ToClient::Welcome { .. })));
    let ping = wire::encode(&ToServer::Ping {});
    for byte in ping.iter() {
        ticks.tick().await;
        stream.write_all(&[*byte]).await.unwrap();
    }
    assert_eq!(read_message(&mut stream).await, Some(ToClient::Pong {}));
    assert_eq!(server.followers().await.unwrap()[0].name, "drip");
}

#[actix_rt::test]
async fn who_does_not_say_hello_in_time_is_closed() {
    let config =
        ServerConfig { handshake_timeout: Duration::from_millis(50), ..ServerConfig::default() };
    let (_server, address) = serve(config, filled(10)).await;
    let mut stream = TcpStream::connect(address).await.unwrap();
    stream.write_all(&[0, 0]).await.unwrap();
    let (reason, text) = last_words(&mut stream).await;
    assert_eq!((reason, &text[..]), (Reason::Silent, "no handshake within 0.05 s"));
}

#[actix_rt::test]
async fn one_follower_more_than_allowed_is_refused() {
    let config = ServerConfig { followers: 1, ..ServerConfig::default() };
    let (_server, address) = serve(config, filled(10)).await;
    let _first = hello(address).await;
    let mut second = TcpStream::connect(address).await.unwrap();
    let hello = wire::encode(&ToServer::hello("raw", &Limits::default(), None));
    second.write_all(&hello).await.unwrap();
    let (reason, text) = last_words(&mut second).await;
    assert_eq!(reason, Reason::Full);
    assert_eq!(text, "there are 1 followers, which is the limit");
}

#[actix_rt::test]
async fn what_is_too_large_is_refused_at_write() {
    let (server, address) = serve(ServerConfig::default(), MemoryStore::new()).await;
    let client = follower(address, MemoryStore::new());
    assert!(connect(&client).await.equal());
    let limit = Limits::default().value_bytes;
    let error = server.write("key", vec![0; limit + 1]).await.unwrap_err();
    assert_eq!(error.to_string(), "value of 8388609 bytes is above the limit of 8388608");
    let error = server.write(vec![0; 65_537], "value").await.unwrap_err();
    assert_eq!(error.to_string(), "key of 65537 bytes is above the limit of 65536");
    let two = vec![Change::write("a", vec![0; limit]), Change::write("b", vec![0; limit])];
    let error = server.batch(two).await.unwrap_err();
    assert!(error.to_string().ends_with("above the frame limit of 9437184"), "{error}");
    assert_eq!(server.status().await.unwrap().refused, 3);
    assert_eq!(server.reader().len().unwrap(), 0);

    // At the limit it goes through: live, and as a repair.
    let largest: Value = (0..limit).map(|n| n as u8).collect::<Vec<_>>().into();
    let written = server.write(vec![1; 65_536], largest.clone()).await.unwrap();
    client.wait_for(written.position().unwrap(), LONG).await.unwrap();
    assert_eq!(client.reader().get(&[1; 65_536]).unwrap(), Some(largest));
    let empty = follower(address, MemoryStore::new());
    assert_eq!(connect(&empty).await.written, 1);
    assert_converges(&server, &empty).await;
}

#[actix_rt::test]
async fn a_follower_that_accepts_less_is_refused() {
    let (_server, address) = serve(ServerConfig::default(), MemoryStore::new()).await;
    let mut stream = TcpStream::connect(address).await.unwrap();
    let limits = Limits { value_bytes: 1000, ..Limits::default() };
    let hello = wire::encode(&ToServer::hello("small", &limits, None));
    stream.write_all(&hello).await.unwrap();
    let (reason, text) = last_words(&mut stream).await;
    assert_eq!(reason, Reason::Limits);
    assert!(text.contains("1000") && text.contains("8388608"), "{text}");
}

#[actix_rt::test]
async fn no_more_strangers_than_allowed() {
    let limit = Duration::from_millis(300);
    let config = ServerConfig { strangers: 1, handshake_timeout: limit, ..ServerConfig::default() };
    let (_server, address) = serve(config, filled(10)).await;
    let hello = wire::encode(&ToServer::hello("raw", &Limits::default(), None));
    // A follower is no stranger.
    let mut follower = TcpStream::connect(address).await.unwrap();
    follower.write_all(&hello).await.unwrap();
    assert!(matches!(read_message(&mut follower).await, Some(ToClient::Welcome { .. })));
    let since = Instant::now();
    let mut silent = TcpStream::connect(address).await.unwrap();
    let mut next = TcpStream::connect(address).await.unwrap();
    next.write_all(&hello).await.unwrap();
    assert!(matches!(read_message(&mut next).await, Some(ToClient::Welcome { .. })));
    assert!(since.elapsed() >= limit, "it was let in beside the other");
    assert_eq!(last_words(&mut silent).await.0, Reason::Silent);
}

/// Asks for a diff, the first one of this connection, and of a table that differs.
pub async fn ask_for_diff(stream: &mut TcpStream) {
    let request = ToServer::SyncReq {
        diff: DiffId(1),
        jumps: 0,
        full: false,
        root: Hash::of_entry(b"a", b"b"),
        len: 10_000,
        max_deletes: u64::MAX,
    };
    stream.write_all(&wire::encode(&request)).await.unwrap();
}

/// A connection whose diff has a place, and does nothing with it.
pub async fn hold_a_place(address: SocketAddr) -> TcpStream {
    let mut holds = hello(address).await;
    ask_for_diff(&mut holds).await;
    assert!(matches!(read_message(&mut holds).await, Some(ToClient::SyncStart { .. })));
    holds
}

async fn until_waiting(server: &Server, diffs: usize) {
    within(async { while server.status().await.unwrap().diffs_waiting != diffs {} }).await;
}

#[actix_rt::test]
async fn who_has_not_asked_for_longest_is_next() {
    let config = ServerConfig { diffs_at_once: 1, ..ServerConfig::default() };
    let (server, address) = serve(config, filled(10)).await;
    let holds = hold_a_place(address).await;
    let mut patient = hello(address).await;
    let mut hasty = hello(address).await;
    ask_for_diff(&mut hasty).await;
    until_waiting(&server, 1).await;
    ask_for_diff(&mut patient).await;
    until_waiting(&server, 2).await;
    drop(holds);
    assert!(matches!(read_message(&mut patient).await, Some(ToClient::SyncStart { .. })));
    until_waiting(&server, 1).await;
}

#[actix_rt::test]
async fn a_diff_that_takes_long_gives_way_to_others() {
    let config =
        ServerConfig { diffs_at_once: 1, diff_turn: Duration::ZERO, ..ServerConfig::default() };
    let (server, address) = serve(config, filled(10)).await;
    let mut holds = hold_a_place(address).await;
    assert!(matches!(read_message(&mut holds).await, Some(ToClient::SyncRequest { .. })));
    let other = follower(address, MemoryStore::new());
    assert_eq!(connect(&other).await.written, 10);
    let aborted = read_message(&mut holds).await;
    let reason = AbortReason::Busy;
    assert_eq!(aborted, Some(ToClient::SyncAbort { diff: DiffId(1), reason }));
    assert_eq!(server.followers().await.unwrap().len(), 2);
}

#[actix_rt::test]
async fn followers_that_do_not_read_hold_no_more_than_the_log_does() {
    let mut config = ServerConfig { log_bytes: 3 << 20, ..ServerConfig::default() };
    config.session.limits =
        Limits { frame_bytes: 2 << 20, value_bytes: 1 << 20, ..Limits::default() };
    let (server, address) = serve(config, MemoryStore::new()).await;
    let reader = follower(address, MemoryStore::new());
    assert!(connect(&reader).await.equal());
    let mut silent = Vec::new();
    for _ in 0..8 {
        silent.push(hello(address).await);
    }
    // What sockets hold goes first; then a part of a frame waits for each.
    let left = async || server.followers().await.unwrap().len() - 1;
    let mut written = 0;
    while left().await == silent.len() {
        assert!(written < 100, "they are all left");
        let at = server.write("large", vec![7; 1 << 20]).await.unwrap().position().unwrap();
        reader.wait_for(at, LONG).await.unwrap();
        written += 1;
    }
    // As many stay as are allowed to be held for.
    for _ in 0..10 {
        server.write("small", "value").await.unwrap();
    }
    assert!(left().await > 0);
    assert_eq!(reader.status().await.unwrap().connects, 1);
}
