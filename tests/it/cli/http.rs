//! What `serve` and `follow` answer over HTTP, and the subcommands that ask.

use std::net::TcpStream;
use std::time::Instant;

use tablecast::Limits;
use tablecast_actors::protocol::{Reason, ToClient, ToServer, wire};
use tokio::io::AsyncWriteExt as _;

use super::*;
use crate::limits::read_message;

/// An answer.
#[derive(Debug)]
struct Answer {
    status: u16,
    head: String,
    body: Vec<u8>,
}

impl Answer {
    fn text(&self) -> &str {
        std::str::from_utf8(&self.body).unwrap()
    }

    fn json(&self) -> Value {
        assert_eq!(self.status, 200, "{self:?}");
        serde_json::from_slice(&self.body).unwrap()
    }
}

/// Sends these bytes as they are behind a request's first line.
fn send(address: &str, line: &str, rest: &[u8]) -> Answer {
    send_to("localhost", address, line, rest)
}

/// The same, under a name.
fn send_to(host: &str, address: &str, line: &str, rest: &[u8]) -> Answer {
    let mut stream = TcpStream::connect(address).unwrap();
    stream.set_read_timeout(Some(LONG)).unwrap();
    write!(stream, "{line} HTTP/1.1\r\nHost: {host}\r\nConnection: close\r\n").unwrap();
    stream.write_all(rest).unwrap();
    let mut answer = Vec::new();
    stream.read_to_end(&mut answer).unwrap();
    let end = answer.windows(4).position(|four| four == b"\r\n\r\n").unwrap();
    let head = String::from_utf8(answer[..end].to_vec()).unwrap();
    let status = head.split(' ').nth(1).unwrap().parse().unwrap();
    Answer { status, head, body: answer[end + 4..].to_vec() }
}

fn get(address: &str, path: &str) -> Answer {
    send(address, &format!("GET {path}"), b"\r\n")
}

/// What a metric is, if it is told yet.
pub(super) fn metric(address: &str, name: &str) -> Option<f64> {
    let metrics = get(address, "/metrics");
    let value = metrics.text().lines().find_map(|line| line.strip_prefix(name));
    value.map(|value| value.parse().unwrap())
}

fn put(address: &str, path: &str, value: &[u8]) -> Answer {
    let length = format!("Content-Length: {}\r\n\r\n", value.len());
    send(address, &format!("PUT {path}"), &[length.as_bytes(), value].concat())
}

fn delete(address: &str, path: &str) -> Answer {
    send(address, &format!("DELETE {path}"), b"\r\n")
}

/// A server that answers HTTP; where it listens, and where it answers.
fn serve_http() -> (Program, String, String) {
    serve_http_with(&[])
}

pub(super) fn serve_http_with(options: &[&str]) -> (Program, String, String) {
    let args = ["serve", "--listen", "127.0.0.1:0", "--http", "127.0.0.1:0", "--json"];
    let program = Program::start_with(&[&args, options].concat(), &[]);
    let ready = program.expect("ready");
    let text = |field: &str| ready[field].as_str().unwrap().to_owned();
    let (listen, http) = (text("listen"), text("http"));
    (program, listen, http)
}

/// A follower that answers HTTP, and where.
fn follow_http(listen: &str) -> (Program, String) {
    let program = Program::start([
        "follow",
        "--connect",
        listen,
        "--http",
        "127.0.0.1:0",
        "--name",
        "edge 1",
        "--print",
        "--json",
    ]);
    let http = program.expect("started")["http"].as_str().unwrap().to_owned();
    (program, http)
}

/// Runs a command to its end, with this on stdin.
fn ask<const N: usize>(args: [&str; N], input: &[u8]) -> (Option<i32>, Vec<u8>, String) {
    let mut child = Command::new(env!("CARGO_BIN_EXE_tablecast"))
        .args(args)
        .env("http_proxy", "http://127.0.0.1:1")
        .stdin(Stdio::piped())
        .stdout(Stdio::piped())
        .stderr(Stdio::piped())
        .spawn()
        .unwrap();
    // It need not be read.
    drop(child.stdin.take().unwrap().write_all(input));
    let output = child.wait_with_output().unwrap();
    (output.status.code(), output.stdout, String::from_utf8(output.stderr).unwrap())
}

#[test]
fn keys_of_any_bytes_are_written_read_and_deleted() {
    let (mut server, listen, http) = serve_http();
    let (mut follower, theirs) = follow_http(&listen);
    follower.wait("diff");
    let keys = [
        ("/keys/", ""),
        ("/keys/a/b", "YS9i"),
        ("/keys/%2F", "Lw=="),
        ("/keys/%25", "JQ=="),
        ("/keys/%FF%00%0A", "/wAK"),
        ("/keys/%C3%A9", "w6k="),
        ("/keys/%2E%2E", "Li4="),
        ("/keys/+", "Kw=="),
    ];
    for (revision, (path, _)) in (1..).zip(keys) {
        assert_eq!(get(&http, path).status, 404, "{path}");
        let position = put(&http, path, &[b"value\0\xff of ", path.as_bytes()].concat()).json();
        assert_eq!(fields(&position), ["chain", "epoch", "revision"]);
        assert_eq!(position["revision"], revision);
        let event = follower.wait("change");
        assert_eq!(event["revision"], revision);
    }
    for (path, base64) in keys {
        for address in [&http, &theirs] {
            let answer = get(address, path);
            assert_eq!(answer.status, 200, "{path}");
            assert!(answer.head.contains("content-type: application/octet-stream"), "{answer:?}");
            assert!(answer.head.contains("x-content-type-options: nosniff"), "{answer:?}");
            assert!(answer.head.contains("cross-origin-resource-policy: same-origin"));
            assert_eq!(answer.body, [b"value\0\xff of ", path.as_bytes()].concat());
            let (code, stdout, _) = ask(["get", base64, "--key-base64", "--http", address], b"");
            assert_eq!((code, stdout), (Some(0), answer.body));
        }
    }
    assert_eq!(get(&http, "/keys/a%2fb").status, 200);
    assert_eq!(delete(&http, "/keys/%FF%00%0A").json()["revision"], 9);
    assert_eq!(follower.wait("change")["op"], "delete");
    for address in [&http, &theirs] {
        let answer = get(address, "/keys/%FF%00%0A");
        assert_eq!((answer.status, answer.text()), (404, "no such key"));
    }
    follower.signal("TERM");
    assert_eq!(follower.end().code, Some(0));
    server.signal("TERM");
    assert_eq!(server.end().code, Some(0));
}

/// A page may lead a name of its own here, and read what it asks for.
#[test]
fn a_name_that_is_not_of_this_machine_is_refused() {
    let (_server, _, http) = serve_http();
    for host in ["localhost", "LOCALHOST:80", "127.0.0.1", "127.0.0.1:80", "[::1]", "[::1]:80"] {
        assert_eq!(send_to(host, &http, "GET /healthz", b"\r\n").status, 200, "{host}");
    }
    for host in
        ["evil.example", "evil.example:80", "localhost.evil.example", "127.0.0.1.evil.example"]
    {
        let answer = send_to(host, &http, "GET /healthz", b"\r\n");
        assert_eq!(answer.status, 421, "{host}");
        assert!(answer.text().starts_with(&format!("{host} is a name")), "{answer:?}");
        let written = send_to(host, &http, "PUT /keys/k", b"Content-Length: 1\r\n\r\nv");
        assert_eq!(written.status, 421, "{host}");
    }
    assert_eq!(get(&http, "/keys/k").status, 404);
    let (_server, _, http) = serve_http_with(&["--insecure"]);
    assert_eq!(send_to("table.example", &http, "GET /healthz", b"\r\n").status, 200);
}

#[test]
fn what_is_wrong_is_refused_and_says_why() {
    let (_server, listen, http) = serve_http();
    let (follower, theirs) = follow_http(&listen);
    follower.wait("diff");
    for (answer, status, why) in [
        (get(&http, "/keys/a?b"), 400, "a ? in a key is %3F"),
        (get(&http, "/keys/%zz"), 400, "a % that is not followed by two hexadecimal digits"),
        (get(&http, "/nowhere"), 404, "no GET /nowhere"),
        (get(&theirs, "/followers"), 404, "a follower has no followers"),
        (put(&theirs, "/keys/k", b"v"), 405, "a follower's table is written at its server"),
        (delete(&theirs, "/keys/k"), 405, "a follower's table is written at its server"),
        (send(&http, "POST /keys/k", b"\r\n"), 405, "GET, HEAD, PUT or DELETE"),
        (
            send(&http, "DELETE /keys/k", b"If-Match: \"1\"\r\n\r\n"),
            501,
            "a write has no conditions",
        ),
    ] {
        assert_eq!(answer.status, status, "{answer:?}");
        assert!(answer.text().starts_with(why), "{answer:?}");
    }
    let answer = send(&http, "DELETE /keys/k", b"Origin: http://localhost\r\n\r\n");
    assert_eq!(answer.status, 403);
    assert!(answer.text().contains("--http-writes-from-anywhere"), "{answer:?}");
    let (_anybody, _, http_of_anybody) = serve_http_with(&["--http-writes-from-anywhere"]);
    let answer = send(&http_of_anybody, "DELETE /keys/k", b"Origin: http://localhost\r\n\r\n");
    assert_eq!(answer.status, 200, "{answer:?}");
    // Nothing of it has been sent, so nothing has been read.
    let answer = send(&http, "PUT /keys/k", b"Content-Length: 8388609\r\n\r\n");
    let why = "value of 8388609 bytes is above the limit of 8388608";
    assert_eq!((answer.status, answer.text()), (413, why));
    let mut chunked = b"Transfer-Encoding: chunked\r\n\r\n800001\r\n".to_vec();
    chunked.resize(chunked.len() + 0x80_0001, b'v');
    chunked.extend(b"\r\n0\r\n\r\n");
    let answer = send(&http, "PUT /keys/k", &chunked);
    let why = "value of more than 8388608 bytes, which is the limit";
    assert_eq!((answer.status, answer.text()), (413, why));
    assert_eq!(get(&http, "/keys/k").status, 404);
    // At the limit.
    assert_eq!(put(&http, "/keys/k", &vec![0; 8 << 20]).json()["revision"], 1);
    assert_eq!(get(&http, "/keys/k").body.len(), 8 << 20);
}

#[test]
fn health_status_and_metrics() {
    // The port is kept from others until it is needed.
    let (silent, listen) = silent();
    let (follower, theirs) = follow_http(&listen);
    assert_eq!(get(&theirs, "/healthz").status, 200);
    let answer = get(&theirs, "/readyz");
    let why = format!("not connected to {listen}");
    assert_eq!((answer.status, answer.text()), (503, &*why));
    drop(silent);
    let mut server = Program::start([
        "serve",
        "--listen",
        &listen,
        "--http",
        "127.0.0.1:0",
        "--json",
        "--verify-every",
        "0.1",
    ]);
    let http = server.expect("ready")["http"].as_str().unwrap().to_owned();
    follower.wait("diff");
    for address in [&http, &theirs] {
        for path in ["/healthz", "/readyz"] {
            assert_eq!(get(address, path).status, 200, "{path}");
            let head = send(address, &format!("HEAD {path}"), b"\r\n");
            assert_eq!((head.status, head.text()), (200, ""), "{path}");
        }
    }
    put(&http, "/keys/k", b"v").json();
    follower.wait("change");
    TcpStream::connect(&listen).unwrap().write_all(&[0xff; 100]).unwrap();
    let status = get(&http, "/status").json();
    assert_eq!((&status["keys"], &status["position"]["revision"]), (&json!(1), &json!(1)));
    let status = get(&theirs, "/status").json();
    assert_eq!((&status["name"], &status["health"]), (&json!("edge 1"), &json!("Ready")));
    let followers = get(&http, "/followers").json();
    assert_eq!(followers[0]["name"], "edge 1");
    for (address, metric) in [
        (&http, "tablecast_server_changes_total 1"),
        (&http, "tablecast_server_connections_total{way=\"NoPosition\"} 1"),
        (&theirs, "tablecast_client_changes_total 1"),
        (&theirs, "tablecast_client_diff_seconds_bucket{le=\"+Inf\"} 1"),
    ] {
        let metrics = get(address, "/metrics");
        assert!(metrics.text().lines().any(|line| line == metric), "{}", metrics.text());
    }
    // Told once a second at the follower.
    for (address, metric) in [
        (&http, "tablecast_server_sent_bytes_total "),
        (&http, "tablecast_server_received_bytes_total "),
        (&http, "tablecast_server_ended_total{why=\"Protocol\"} "),
        (&theirs, "tablecast_client_sent_bytes_total "),
        (&theirs, "tablecast_client_received_bytes_total "),
        // Roots are compared behind the write, too.
        (&theirs, "tablecast_client_verified_revision "),
    ] {
        let since = Instant::now();
        while self::metric(address, metric).is_none_or(|value| value <= 0.0) {
            assert!(since.elapsed() < LONG, "{metric}");
        }
    }

    let (code, stdout, _) = ask(["status", "--http", &http], b"");
    let text = String::from_utf8(stdout).unwrap();
    assert!(code == Some(0) && text.starts_with("position   revision 1 of history "), "{text}");
    let (_, stdout, _) = ask(["status", "--http", &theirs], b"");
    let text = String::from_utf8(stdout).unwrap();
    assert!(text.contains("\nhealth     ready\n"), "{text}");
    let (_, stdout, _) = ask(["status", "--http", &http, "--json"], b"");
    assert_eq!(serde_json::from_slice::<Value>(&stdout).unwrap()["keys"], 1);
    let (_, stdout, _) = ask(["followers", "--http", &http, "--json"], b"");
    assert_eq!(serde_json::from_slice::<Value>(&stdout).unwrap()[0]["name"], "edge 1");
    let (_, stdout, _) = ask(["followers", "--http", &http], b"");
    let text = String::from_utf8(stdout).unwrap();
    let lines: Vec<_> = text.lines().collect();
    assert!(lines.len() == 2 && lines[0].starts_with("NAME    ADDRESS  "), "{text}");
    assert!(lines[1].starts_with("edge 1  127.0.0.1:"), "{text}");

    server.signal("TERM");
    assert_eq!(server.end().code, Some(0));
    follower.wait("disconnected");
    let (_, stdout, _) = ask(["status", "--http", &theirs], b"");
    let text = String::from_utf8(stdout).unwrap();
    assert!(text.contains("\nhealth     disconnected: "), "{text}");
}

#[test]
fn put_get_and_delete() {
    let (_server, _, http) = serve_http();
    let (code, stdout, stderr) = ask(["put", "k", "a value", "--http", &http], b"unread");
    assert_eq!((code, &*stderr), (Some(0), ""));
    let text = String::from_utf8(stdout).unwrap();
    assert!(text.starts_with("written at revision 1 of history "), "{text}");
    assert_eq!(ask(["get", "k", "--http", &http], b"").1, b"a value");
    let args = ["put", "/wA=", "--key-base64", "--json", "--http", &http];
    let (code, stdout, _) = ask(args, b"\xff\n");
    assert_eq!(code, Some(0));
    assert_eq!(serde_json::from_slice::<Value>(&stdout).unwrap()["revision"], 2);
    let args = ["get", "/wA=", "--key-base64", "--http", &http];
    assert_eq!(ask(args, b"").1, b"\xff\n");
    let (code, stdout, _) = ask(["delete", "k", "--http", &http], b"");
    assert!(code == Some(0) && stdout.starts_with(b"deleted at revision 3 of "), "{stdout:?}");
    let (code, stdout, stderr) = ask(["get", "k", "--http", &http], b"");
    assert_eq!((code, stdout), (Some(1), vec![]));
    assert_eq!(stderr, format!("error: {http} answers 404: no such key\n"));

    let large = vec![0; (8 << 20) + 1];
    let (code, _, stderr) = ask(["put", "k", "--http", &http], &large);
    assert_eq!(code, Some(2));
    assert_eq!(stderr, "error: value of more than 8388608 bytes, which is the limit\n");
    let closed = TcpListener::bind("127.0.0.1:0").unwrap().local_addr().unwrap().to_string();
    let (code, _, stderr) = ask(["status", "--http", &closed], b"");
    assert_eq!(code, Some(1));
    assert!(stderr.starts_with(&format!("error: cannot reach {closed}: ")), "{stderr}");
}

#[test]
fn an_http_address_that_is_taken_is_exit_code_1() {
    let taken = TcpListener::bind("127.0.0.1:0").unwrap();
    let address = taken.local_addr().unwrap().to_string();
    let mut server = Program::start(["serve", "--listen", "127.0.0.1:0", "--http", &address]);
    let ended = server.end();
    assert_eq!((ended.code, ended.stdout), (Some(1), vec![]));
    let expected = format!("error: cannot answer HTTP at {address}: ");
    assert!(ended.stderr.starts_with(&expected), "{}", ended.stderr);
}

/// Who asks how it is has an answer, and who is one too many hears that.
#[cfg(target_os = "linux")]
#[actix_rt::test]
async fn where_few_files_may_be_open_there_are_few_followers() {
    let mut command = Command::new("sh");
    let limited = "ulimit -n 300; exec \"$0\" serve --listen 127.0.0.1:0 --http 127.0.0.1:0 --json";
    command.args(["-c", limited, env!("CARGO_BIN_EXE_tablecast")]);
    let (mut server, stdout) = Program::spawn_command(command, &[]);
    server.stdout = lines(stdout);
    let ready = server.expect("ready");
    let [listen, http] = ["listen", "http"].map(|field| ready[field].as_str().unwrap());
    let warned = server.stderr.recv_timeout(LONG).unwrap();
    assert!(warned.contains("followers=132") && warned.contains("files=300"), "{warned}");
    let hello = wire::encode(&ToServer::hello("", &Limits::default(), None));
    let mut connected = Vec::new();
    for _ in 0..200 {
        let mut stream = tokio::net::TcpStream::connect(listen).await.unwrap();
        stream.write_all(&hello).await.unwrap();
        match read_message(&mut stream).await.unwrap() {
            ToClient::Welcome { .. } => connected.push(stream),
            ToClient::Refuse { reason, .. } => {
                assert_eq!(reason, Reason::Full);
                break;
            }
            other => panic!("{other:?}"),
        }
    }
    assert_eq!(connected.len(), 132);
    assert_eq!(get(http, "/healthz").status, 200);
    assert_eq!(get(http, "/status").json()["followers"], 132);
}

#[test]
fn who_does_not_answer_is_not_waited_for_for_ever() {
    let (_silent, address) = silent();
    let at = ["--http", &address, "--timeout", "0.1"];
    let (code, _, stderr) = ask(["get", "k", at[0], at[1], at[2], at[3]], b"");
    assert!(code == Some(1) && stderr.contains("timeout"), "{stderr}");
    assert!(!stderr.contains("written"), "{stderr}");
    for args in [&["put", "k", "v"][..], &["delete", "k"]] {
        let args = [args, &at].concat();
        let ended = Command::new(env!("CARGO_BIN_EXE_tablecast")).args(args).output().unwrap();
        let stderr = String::from_utf8(ended.stderr).unwrap();
        assert!(stderr.contains("it may be written all the same"), "{stderr}");
    }
}
