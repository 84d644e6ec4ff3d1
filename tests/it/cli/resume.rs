//! `--resume`: what a file's position is good for.

use super::*;

const RESUMED: &str = "resumed where the follower's position stands";

/// Follows until it has been compared, and leaves a dump and a position.
fn follow_once(listen: &str, file: &str) -> (Value, Value) {
    let args = ["--load", file, "--dump", file, "--resume", "--once", "--json"];
    let [a, b, c, d, e, f, g] = args;
    let mut follower = Program::start(["follow", "--connect", listen, a, b, c, d, e, f, g]);
    let mut first = follower.event();
    if first["event"] == "warning" {
        let warning = first["message"].as_str().unwrap();
        assert!(warning.contains(&format!("{file}.position does not count")), "{warning}");
        first = follower.event();
    }
    assert_eq!(first["event"], "connected");
    let diff = follower.wait("diff");
    assert_eq!(follower.end().code, Some(0));
    (first["way"].clone(), diff)
}

#[test]
fn a_follower_resumes_where_its_dump_stands() {
    let files = Files::new();
    let (mut server, listen) = serve(["serve", "--listen", "127.0.0.1:0", "--stdin", "--json"]);
    let table = files.write("f", "");
    let (way, _) = follow_once(&listen, &table);
    assert_ne!(way, RESUMED);
    let position: Value = serde_json::from_str(&files.read("f.position")).unwrap();
    assert_eq!(fields(&position), ["keys", "position", "root"]);

    let follower = Program::start(["follow", "--connect", &listen, "--print", "--json"]);
    follower.wait("diff");
    server.input(b"{\"key\":\"a\",\"value\":\"1\"}\n{\"key\":\"b\",\"value\":\"2\"}\n");
    follower.wait("change");
    follower.wait("change");

    let (way, diff) = follow_once(&listen, &table);
    assert_eq!(way, RESUMED);
    // What was missed came without a repair.
    assert_eq!((&diff["written"], &diff["equal"]), (&json!(0), &json!(true)));
    let dumped = "{\"key\":\"a\",\"value\":\"1\"}\n{\"key\":\"b\",\"value\":\"2\"}\n";
    assert_eq!(files.read("f"), dumped);

    files.write("f", "{\"key\":\"a\",\"value\":\"tampered\"}\n");
    let (way, diff) = follow_once(&listen, &table);
    assert_ne!(way, RESUMED);
    assert_eq!((&diff["written"], &diff["equal"]), (&json!(2), &json!(true)));
    assert_eq!(files.read("f"), dumped);

    files.write("f.position", "nonsense");
    let (way, _) = follow_once(&listen, &table);
    assert_ne!(way, RESUMED);
    let (way, _) = follow_once(&listen, &table);
    assert_eq!(way, RESUMED);
}

#[test]
fn a_position_that_is_void_is_forgotten() {
    let files = Files::new();
    let (_server, listen) = serve_file(&files.table("t", 0..10, ""));
    let old = files.table("f", 0..2_000, "");
    files.write("f.position", "old");
    let [a, b, c, d, e, f] = ["--load", &old, "--dump", &old, "--resume", "--json"];
    let mut follower = Program::start(["follow", "--connect", &listen, a, b, c, d, e, f]);
    follower.wait("held");
    follower.signal("TERM");
    // It may lack something: what is there stays.
    assert_eq!(follower.end().code, Some(1));
    assert_eq!(files.read("f.position"), "old");

    // Written as it was loaded, it stands nowhere.
    let (silent, listen) = silent();
    let mut follower = Program::start(["follow", "--connect", &listen, a, b, c, d, e, f]);
    let _connection = silent.accept().unwrap();
    follower.signal("TERM");
    assert_eq!(follower.end().code, Some(0));
    assert!(files.has("f") && !files.has("f.position"));
}

#[test]
fn a_server_goes_on_where_its_dump_stands() {
    let files = Files::new();
    let table = files.write("s", "{\"key\":\"a\",\"value\":\"1\"}\n");
    let start = |listen: &str| {
        let args = ["--load", &table, "--dump", &table, "--resume", "--stdin", "--json"];
        let [a, b, c, d, e, f, g] = args;
        Program::start(["serve", "--listen", listen, a, b, c, d, e, f, g])
    };
    let mut server = start("127.0.0.1:0");
    let listen = server.expect("ready")["listen"].as_str().unwrap().to_owned();
    let mut follower = Program::start(["follow", "--connect", &listen, "--print", "--json"]);
    let first = follower.expect("connected");
    follower.wait("diff");
    server.input(b"{\"key\":\"b\",\"value\":\"2\"}\n");
    follower.wait("change");
    server.signal("TERM");
    assert_eq!(server.end().code, Some(0));
    follower.wait("disconnected");
    assert_eq!(
        files.read("s"),
        "{\"key\":\"a\",\"value\":\"1\"}\n{\"key\":\"b\",\"value\":\"2\"}\n"
    );

    let mut server = start(&listen);
    assert_eq!(server.expect("ready")["revision"], 1);
    // It is used once: were this server killed, the next one would begin a new history.
    assert!(!files.has("s.position"));
    let second = follower.wait("connected");
    assert_eq!((&second["epoch"], &second["way"]), (&first["epoch"], &json!(RESUMED)));
    server.input(b"{\"op\":\"delete\",\"key\":\"a\"}\n");
    assert_eq!(follower.wait("change")["revision"], 2);
    server.signal("TERM");
    assert_eq!(server.end().code, Some(0));
    follower.signal("TERM");
    assert_eq!(follower.end().code, Some(0));

    // A start that comes to nothing does not use it up.
    let taken = TcpListener::bind("127.0.0.1:0").unwrap();
    let address = taken.local_addr().unwrap().to_string();
    for [listen, http] in [[&*address, "127.0.0.1:0"], ["127.0.0.1:0", &address]] {
        let args = ["serve", "--listen", listen, "--http", http, "--load", &table, "--resume"];
        assert_eq!(Program::start(args).end().code, Some(1));
        assert!(files.has("s.position"));
    }

    // Not with another table.
    files.write("s", "");
    let server = start("127.0.0.1:0");
    let warning = server.expect("warning")["message"].as_str().unwrap().to_owned();
    assert!(warning.starts_with("a new history begins: "), "{warning}");
    assert_eq!(server.expect("ready")["revision"], 0);
}

#[cfg(unix)]
#[test]
fn a_position_that_is_no_file_is_not_waited_for() {
    let files = Files::new();
    let (_server, listen) = serve_file(&files.table("t", 0..10, ""));
    let old = files.table("f", 0..10, "");
    assert!(Command::new("mkfifo").arg(files.path("f.position")).status().unwrap().success());
    let follow = ["follow", "--connect", &listen, "--once", "--json"];
    let [a, b, c, d, e] = ["--load", &old, "--dump", &old, "--resume"];
    let mut follower = Program::start_with(&[&follow[..], &[a, b, c, d, e]].concat(), &[]);
    let warning = follower.expect("warning");
    assert!(warning["message"].as_str().unwrap().contains("not a file"), "{warning}");
    follower.end();
}
