//! `tablecast follow`: how far a diff is, and repairs that are held.

use super::*;

#[test]
fn how_far_a_diff_is() {
    let files = Files::new();
    let (_server, listen) = serve_file(&files.table("t", 0..5_000, "something"));
    let mut follower = Program::start(["follow", "--connect", &listen, "--once", "--json"]);
    follower.expect("connected");
    let mut phases = Vec::new();
    let mut last = Value::Null;
    let diff = loop {
        let event = follower.any_event();
        if event["event"] != "progress" {
            break event;
        }
        assert_eq!(fields(&event), ["done", "event", "phase", "rounds", "total"]);
        phases.push(event["phase"].as_str().unwrap().to_owned());
        last = event;
    };
    phases.dedup();
    assert_eq!(phases, ["queued", "walk", "repair", "compare"]);
    assert_eq!((&last["done"], &last["total"]), (&json!(5_000), &json!(5_000)));
    assert_eq!((&diff["event"], &diff["written"]), (&json!("diff"), &json!(5_000)));
    assert_eq!(follower.end().code, Some(0));
}

#[test]
fn a_repair_that_deletes_too_much_is_held_until_it_is_meant() {
    let files = Files::new();
    let old = files.table("old", 0..2_000, "something");
    let (_server, listen) = serve_file(&files.table("t", 0..10, "something"));
    let dump = files.path("dump");
    let args = ["follow", "--connect", &listen, "--load", &old, "--once", "--dump", &dump];
    let mut follower = Program::start(args);
    assert!(follower.line().starts_with("connected to "));
    assert_eq!(
        follower.line(),
        "held: a repair would write 0 keys and delete 1990 of 2000; --allow-mass-delete lets it"
    );
    let ended = follower.end();
    assert_eq!((ended.code, ended.stdout), (Some(1), vec![]));
    assert!(!files.has("dump"));

    let follower = Program::start([
        "follow",
        "--connect",
        &listen,
        "--load",
        &old,
        "--json",
        "--http",
        "127.0.0.1:0",
    ]);
    let http = follower.expect("started")["http"].as_str().unwrap().to_owned();
    follower.expect("connected");
    let held = json!({ "event": "held", "writes": 0, "deletes": 1990, "keys": 2000 });
    assert_eq!(follower.event(), held);
    let mut ready = std::net::TcpStream::connect(http).unwrap();
    ready
        .write_all(b"GET /readyz HTTP/1.1\r\nHost: localhost\r\nConnection: close\r\n\r\n")
        .unwrap();
    let mut answer = String::new();
    ready.read_to_string(&mut answer).unwrap();
    assert!(answer.starts_with("HTTP/1.1 503 "), "{answer}");
    assert!(
        answer.ends_with("held: a repair would write 0 keys and delete 1990 of 2000"),
        "{answer}"
    );

    let mut follower = Program::start([
        "follow",
        "--connect",
        &listen,
        "--load",
        &old,
        "--once",
        "--dump",
        &dump,
        "--allow-mass-delete",
        "--no-scrub",
        "--json",
    ]);
    assert_eq!(follower.wait("diff")["deleted"], 1_990);
    assert_eq!(follower.end().code, Some(0));
    assert_eq!(files.read("dump"), files.read("t"));
}
