//! `serve` and its followers over a network that others use too.

use std::time::Duration;

use super::*;
use crate::authorize::Authority;

#[test]
fn an_address_that_others_reach_needs_a_reason() {
    let files = Files::new();
    let token = files.write("token", "secret\n");
    let listen = ["serve", "--listen", "0.0.0.0:0"];
    let ended = Program::start(listen).end();
    assert_eq!((ended.code, ended.stdout), (Some(2), vec![]));
    assert!(ended.stderr.contains("--token-file") && ended.stderr.contains("--insecure"));
    for reason in [&["--insecure"][..], &["--token-file", &token]] {
        let args: Vec<&str> = listen.iter().chain(reason).copied().collect();
        let mut server = Program::start_with(&args, &[]);
        assert!(server.line().starts_with("ready at 0.0.0.0:"));
        server.signal("TERM");
        let ended = server.end();
        assert_eq!((ended.code, &*ended.stderr), (Some(0), ""));
    }
}

#[test]
fn http_that_others_reach_needs_a_reason() {
    let listen = ["serve", "--listen", "127.0.0.1:0", "--http", "0.0.0.0:0"];
    let follow = ["follow", "--connect", "127.0.0.1:1", "--http", "0.0.0.0:0"];
    // A token is nothing to it.
    let files = Files::new();
    let token = files.write("token", "secret\n");
    let shown = [&listen[..], &["--token-file", &token]].concat();
    for args in [&listen[..], &follow, &shown] {
        let ended = Program::start_with(args, &[]).end();
        assert_eq!((ended.code, ended.stdout), (Some(2), vec![]));
        assert!(ended.stderr.contains("HTTP") && ended.stderr.contains("--insecure"));
        let args: Vec<&str> = args.iter().copied().chain(["--insecure"]).collect();
        let mut program = Program::start_with(&args, &[]);
        let line = program.line();
        assert!(line.contains("HTTP at 0.0.0.0:"), "{line}");
        program.signal("TERM");
        assert_eq!(program.end().code, Some(0));
    }
}

#[test]
fn files_that_are_not_what_they_should_be() {
    let files = Files::new();
    let (empty, long) =
        (files.write("empty", " \r\n\n"), files.write("long", "s3cret!".repeat(40)));
    let (absent, table) = (files.path("absent"), files.write("t", ""));
    for (option, path, why) in [
        ("--token-file", &empty, "token of 0 bytes; it must have 1 to 255"),
        ("--token-file", &long, "token of 280 bytes; it must have 1 to 255"),
        ("--token-file", &absent, "cannot read "),
        ("--tls-ca", &empty, "empty: no certificate found"),
    ] {
        let address = "127.0.0.1:1";
        for args in [
            &["follow", "--connect", address, option, path][..],
            &["watch", "--connect", address, option, path],
            &["verify", "--connect", address, "--load", &table, option, path],
            &["serve", "--listen", "127.0.0.1:0", option, path],
        ] {
            let ended = Program::start_with(args, &[]).end();
            assert_eq!((ended.code, ended.stdout), (Some(2), vec![]), "{args:?}");
            // A server's CA is not read without a certificate.
            let read = args[0] != "serve" || option != "--tls-ca";
            assert!(!read || ended.stderr.contains(why), "{args:?}: {}", ended.stderr);
            assert!(!ended.stderr.contains("s3cret"));
        }
    }
}

/// Everything on, from both ends, with all that can be logged: the token is nowhere.
#[test]
fn token_and_certificates_for_every_follower() {
    let files = Files::new();
    let table = files.table("t", 0..10, "");
    let (secret, wrong) = ("correct-horse-battery", "battery-horse-staple");
    let token = files.write("token", format!("{secret}\r\n"));
    let other = files.write("other", wrong);
    let ca = Authority::new("ours");
    let identity = |name: &str| {
        let (certificate, key) = ca.issue(name);
        (files.write(&format!("{name}.pem"), certificate), files.write(&format!("{name}.key"), key))
    };
    let (server_cert, server_key) = identity("localhost");
    let (cert, key) = identity("edge");
    let ca = files.write("ca.pem", ca.pem());
    let everything = [("RUST_LOG", "trace")];
    let mut server = Program::start_with(
        &[
            "serve",
            "--listen",
            "localhost:0",
            "--load",
            &table,
            "--json",
            "--token-file",
            &token,
            "--tls-cert",
            &server_cert,
            "--tls-key",
            &server_key,
            "--tls-ca",
            &ca,
        ],
        &everything,
    );
    let ready = server.expect("ready");
    let port = ready["listen"].as_str().unwrap().rsplit_once(':').unwrap().1;
    let address = format!("localhost:{port}");
    let all = ["--tls-ca", &ca, "--tls-cert", &cert, "--tls-key", &key, "--token-file"];
    let mut said = Vec::new();
    let mut run = |args: &[&str], rest: &[&str]| {
        let args: Vec<&str> =
            args.iter().chain(&["--connect", &address]).chain(rest).copied().collect();
        let ended = Program::start_with(&args, &everything).end();
        said.push(ended.stderr.clone());
        said.extend(ended.stdout.clone());
        ended
    };
    let with = |token| [&all[..], &[token]].concat();
    assert_eq!(run(&["follow", "--once"], &with(&token)).code, Some(0));
    assert_eq!(run(&["verify", "--load", &table], &with(&token)).code, Some(0));
    let soon = ["--timeout", "2"];
    let ended = run(&["follow", "--once"], &[&soon[..], &with(&other)].concat());
    assert_eq!(ended.code, Some(1));
    assert!(ended.stderr.contains("refused: wrong token"), "{}", ended.stderr);
    let ended = run(&["follow", "--once"], &[&soon[..], &all[..6]].concat());
    assert!(ended.stderr.contains("refused: no token"), "{}", ended.stderr);
    let without = [&soon[..], &["--tls-ca", &ca, "--token-file", &token]].concat();
    let ended = run(&["verify", "--load", &table], &without);
    assert_eq!(ended.code, Some(1));
    assert!(ended.stderr.contains("CertificateRequired"), "{}", ended.stderr);

    let args = [&["watch", "--connect", &address, "--json"], &with(&token)[..]].concat();
    let mut watch = Program::start_with(&args, &everything);
    watch.wait("diff");
    watch.signal("TERM");
    let ended = watch.end();
    assert_eq!(ended.code, Some(0));
    said.push(ended.stderr);
    server.signal("TERM");
    let ended = server.end();
    assert_eq!(ended.code, Some(0));
    assert!(ended.stderr.contains("refused"), "there is no log");
    said.push(ended.stderr);
    for text in said {
        assert!(!text.contains(secret) && !text.contains(wrong), "{text}");
    }
}

/// A follower that says Hello and reads nothing.
fn stuck(listen: &str) -> std::net::TcpStream {
    use tablecast_actors::protocol::{Limits, ToServer, wire};
    let mut stream = std::net::TcpStream::connect(listen).unwrap();
    let hello = wire::encode(&ToServer::hello("stuck", &Limits::default(), None));
    stream.write_all(&hello).unwrap();
    // Of Welcome: it is subscribed.
    stream.read_exact(&mut [0]).unwrap();
    stream
}

fn fill(server: &mut Program) {
    // More than sockets hold.
    let line = json!({ "key": "large", "value": "v".repeat(1 << 20) }).to_string() + "\n";
    for _ in 0..32 {
        server.input(line.as_bytes());
    }
    // It has been written when what is behind it has been refused.
    server.input(b"nonsense\n");
    server.expect("error");
}

fn until_deaf(listen: &str) {
    let since = Instant::now();
    while std::net::TcpStream::connect(listen).is_ok() {
        assert!(since.elapsed() < LONG, "it still accepts");
        std::thread::yield_now();
    }
}

#[test]
fn a_signal_lets_followers_read_what_is_left() {
    let args = ["serve", "--listen", "127.0.0.1:0", "--stdin", "--json", "--drain-timeout", "60"];
    let (mut server, listen) = serve(args);
    let mut stream = stuck(&listen);
    fill(&mut server);
    server.signal("TERM");
    until_deaf(&listen);
    assert!(server.child.try_wait().unwrap().is_none(), "it did not wait");
    let mut rest = Vec::new();
    stream.read_to_end(&mut rest).unwrap();
    // Farewell, reason 4, no text.
    assert!(rest.len() > 32 << 20 && rest.ends_with(&[0, 0, 0, 4, 0x93, 2, 4, 0xa0]));
    drop(stream);
    assert_eq!(server.end().code, Some(0));
}

#[test]
fn who_does_not_read_does_not_hold_up_the_end() {
    let args = ["serve", "--listen", "127.0.0.1:0", "--stdin", "--json", "--drain-timeout", "0.1"];
    let (mut server, listen) = serve(args);
    let _stream = stuck(&listen);
    fill(&mut server);
    server.signal("TERM");
    assert_eq!(server.end().code, Some(0));
}

#[test]
fn a_second_signal_ends_it_at_once() {
    let args = ["serve", "--listen", "127.0.0.1:0", "--stdin", "--json", "--drain-timeout", "600"];
    let (mut server, listen) = serve(args);
    let _stream = stuck(&listen);
    fill(&mut server);
    server.signal("TERM");
    until_deaf(&listen);
    // One that comes with the first is none.
    while let Err(RecvTimeoutError::Timeout) = server.stdout.recv_timeout(Duration::from_millis(50))
    {
        server.signal("INT");
    }
    let ended = server.end();
    assert_eq!(ended.code, Some(1));
    assert!(ended.stderr.contains("ended at once by a second signal"), "{}", ended.stderr);
}

/// What was its session is told to end behind it, which is no second time.
#[test]
fn a_closed_terminal_is_not_the_first_of_two() {
    let files = Files::new();
    let dump = files.path("dump");
    let (mut server, listen) = serve([
        "serve",
        "--listen",
        "127.0.0.1:0",
        "--stdin",
        "--json",
        "--dump",
        &dump,
        "--drain-timeout",
        "2",
    ]);
    let _stream = stuck(&listen);
    fill(&mut server);
    if hang_up_counts() {
        server.signal("HUP");
        until_deaf(&listen);
        // A second signal would count by then.
        let said = server.stdout.recv_timeout(Duration::from_millis(700));
        assert_eq!(said, Err(RecvTimeoutError::Timeout));
    }
    server.signal("TERM");
    assert_eq!(server.end().code, Some(0));
    assert!(files.has("dump"));
}

/// It tries over and over, and says why once.
#[test]
fn who_is_refused_says_so_once() {
    let files = Files::new();
    let [right, wrong] = ["secret", "other"].map(|token| files.write(token, token));
    let (_server, listen, http) = http::serve_http_with(&["--token-file", &right]);
    let mut follower =
        Program::start(["follow", "--connect", &listen, "--token-file", &wrong, "--json"]);
    assert_eq!(follower.expect("disconnected")["reason"], "peer left: refused: wrong token");
    let refused = || http::metric(&http, "tablecast_server_refused_followers_total ");
    let since = Instant::now();
    while refused().is_none_or(|times| times < 4.0) {
        assert!(since.elapsed() < LONG);
    }
    follower.signal("TERM");
    assert_eq!(follower.end().stdout, [""; 0]);
}
