//! The `tablecast` command, as a process: its events, files, signals and exit codes.

mod follow;
mod http;
mod network;
mod resume;
mod verify;
mod watch;

use std::io::{BufRead, BufReader, Read, Write};
use std::net::TcpListener;
use std::path::{Path, PathBuf};
use std::process::{Child, ChildStdin, ChildStdout, Command, Stdio};
use std::sync::mpsc::{self, Receiver, RecvTimeoutError};
use std::time::Instant;

use serde_json::{Value, json};
use tempfile::TempDir;

use crate::harness::LONG;

/// A running command. Killed if the test ends before it does.
struct Program {
    child: Child,
    stdin: Option<ChildStdin>,
    stdout: Receiver<String>,
    stderr: Receiver<String>,
}

/// What a command left behind.
struct Ended {
    code: Option<i32>,
    /// Lines that nobody had waited for.
    stdout: Vec<String>,
    stderr: String,
}

fn lines(from: impl Read + Send + 'static) -> Receiver<String> {
    let (sender, lines) = mpsc::channel();
    std::thread::spawn(move || {
        for line in BufReader::new(from).lines() {
            if sender.send(line.unwrap()).is_err() {
                return;
            }
        }
    });
    lines
}

fn drain(lines: &Receiver<String>) -> Vec<String> {
    let mut all = Vec::new();
    loop {
        match lines.recv_timeout(LONG) {
            Ok(line) => all.push(line),
            Err(RecvTimeoutError::Disconnected) => return all,
            Err(RecvTimeoutError::Timeout) => panic!("it does not end after {all:?}"),
        }
    }
}

impl Program {
    fn start<const N: usize>(args: [&str; N]) -> Self {
        let (mut program, stdout) = Self::start_unread(args);
        program.stdout = lines(stdout);
        program
    }

    fn start_with(args: &[&str], variables: &[(&str, &str)]) -> Self {
        let (mut program, stdout) = Self::spawn(args, variables);
        program.stdout = lines(stdout);
        program
    }

    /// Its stdout is the caller's to read.
    fn start_unread<const N: usize>(args: [&str; N]) -> (Self, ChildStdout) {
        Self::spawn(&args, &[])
    }

    fn spawn(args: &[&str], variables: &[(&str, &str)]) -> (Self, ChildStdout) {
        let mut command = Command::new(env!("CARGO_BIN_EXE_tablecast"));
        command.args(args);
        Self::spawn_command(command, variables)
    }

    fn spawn_command(mut command: Command, variables: &[(&str, &str)]) -> (Self, ChildStdout) {
        let mut child = command
            .env_remove("RUST_LOG")
            .envs(variables.iter().copied())
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .stderr(Stdio::piped())
            .spawn()
            .unwrap();
        let stdin = child.stdin.take();
        let stdout = child.stdout.take().unwrap();
        let stderr = lines(child.stderr.take().unwrap());
        (Self { child, stdin, stdout: mpsc::channel().1, stderr }, stdout)
    }

    fn line(&self) -> String {
        match self.stdout.recv_timeout(LONG) {
            Ok(line) => line,
            Err(error) => {
                panic!("{error}; stderr: {:?}", self.stderr.try_iter().collect::<Vec<_>>())
            }
        }
    }

    /// The next event, how far a diff is included.
    fn any_event(&self) -> Value {
        let line = self.line();
        serde_json::from_str(&line).unwrap_or_else(|error| panic!("{error}: {line}"))
    }

    /// The next event that does not say how far a diff is.
    fn event(&self) -> Value {
        loop {
            let event = self.any_event();
            if event["event"] != "progress" {
                return event;
            }
        }
    }

    /// The next event, which must be this one.
    fn expect(&self, name: &str) -> Value {
        let event = self.event();
        assert_eq!(event["event"], name, "{event}");
        event
    }

    /// The next event of this name, whatever comes before it.
    fn wait(&self, name: &str) -> Value {
        loop {
            let event = self.event();
            if event["event"] == name {
                return event;
            }
        }
    }

    fn input(&mut self, lines: &[u8]) {
        let stdin = self.stdin.as_mut().unwrap();
        stdin.write_all(lines).unwrap();
        stdin.flush().unwrap();
    }

    fn signal(&self, name: &str) {
        let id = self.child.id().to_string();
        assert!(Command::new("kill").args(["-s", name, &id]).status().unwrap().success());
    }

    /// As `timeout` does: the process, and its group.
    fn signal_twice(&self, name: &str) {
        let id = self.child.id().to_string();
        assert!(Command::new("kill").args(["-s", name, &id, &id]).status().unwrap().success());
    }

    fn end(&mut self) -> Ended {
        let stdout = drain(&self.stdout);
        let stderr = drain(&self.stderr).join("\n");
        let since = Instant::now();
        // Both are closed: it is on its last steps.
        let code = loop {
            if let Some(status) = self.child.try_wait().unwrap() {
                break status.code();
            }
            assert!(since.elapsed() < LONG, "it does not end");
            std::thread::yield_now();
        };
        Ended { code, stdout, stderr }
    }
}

impl Drop for Program {
    fn drop(&mut self) {
        // It has ended by itself in most cases.
        drop(self.child.kill());
        drop(self.child.wait());
    }
}

/// A directory of files.
struct Files(TempDir);

impl Files {
    fn new() -> Self {
        Self(tempfile::tempdir().unwrap())
    }

    fn path(&self, name: &str) -> String {
        self.0.path().join(name).to_str().unwrap().to_owned()
    }

    fn write(&self, name: &str, lines: impl AsRef<[u8]>) -> String {
        let path = self.path(name);
        std::fs::write(&path, lines).unwrap();
        path
    }

    fn read(&self, name: &str) -> String {
        std::fs::read_to_string(self.path(name)).unwrap()
    }

    fn has(&self, name: &str) -> bool {
        Path::new(&self.path(name)).exists()
    }

    /// A table of these keys, each with its number and something as its value.
    fn table(&self, name: &str, keys: impl Iterator<Item = usize>, value: &str) -> String {
        let line = |key| json!({ "key": format!("k{key:05}"), "value": format!("{key} {value}") });
        let lines: Vec<_> = keys.map(|key| format!("{}\n", line(key))).collect();
        self.write(name, lines.concat())
    }
}

/// A server that is ready, and where.
fn serve<const N: usize>(args: [&str; N]) -> (Program, String) {
    let program = Program::start(args);
    let listen = program.expect("ready")["listen"].as_str().unwrap().to_owned();
    (program, listen)
}

/// Where nobody answers.
fn silent() -> (TcpListener, String) {
    let silent = TcpListener::bind("127.0.0.1:0").unwrap();
    let address = silent.local_addr().unwrap().to_string();
    (silent, address)
}

/// Where the server listens whose first event this is. Nothing more is read.
fn listens(stdout: impl Read) -> String {
    let mut ready = String::new();
    BufReader::new(stdout).read_line(&mut ready).unwrap();
    let ready: Value = serde_json::from_str(&ready).unwrap();
    ready["listen"].as_str().unwrap().to_owned()
}

fn serve_file(path: &str) -> (Program, String) {
    serve(["serve", "--listen", "127.0.0.1:0", "--load", path, "--json"])
}

fn fields(event: &Value) -> Vec<&str> {
    event.as_object().unwrap().keys().map(String::as_str).collect()
}

/// 24 bytes in hexadecimal.
fn is_root(root: &Value) -> bool {
    root.as_str()
        .is_some_and(|root| root.len() == 48 && root.bytes().all(|b| b.is_ascii_hexdigit()))
}

const MIXED: &str = r#"{"key":"b","value":"first"}
{"value":"text\nof \"two\" lines é","key":"c"}

{"key_base64":"/wA=","value_base64":"gP8="}
{"key":"","value":""}
{"key_base64":"YQ==","value":"plain"}
{"key":"b","value":"the last counts"}"#;

const MIXED_DUMPED: &str = r#"{"key":"","value":""}
{"key":"a","value":"plain"}
{"key":"b","value":"the last counts"}
{"key":"c","value":"text\nof \"two\" lines é"}
{"key_base64":"/wA=","value_base64":"gP8="}
"#;

#[test]
fn once_dumps_the_servers_table() {
    let files = Files::new();
    let server = Program::start([
        "serve",
        "--listen",
        "127.0.0.1:0",
        "--load",
        &files.write("t", MIXED),
        "--json",
    ]);
    let ready = server.expect("ready");
    assert_eq!(fields(&ready), ["event", "keys", "listen", "revision", "root"]);
    assert_eq!((&ready["keys"], &ready["revision"]), (&json!(5), &json!(0)));
    assert!(is_root(&ready["root"]), "{ready}");
    let listen = ready["listen"].as_str().unwrap();
    assert!(!listen.ends_with(":0"), "{listen}");

    let dump = files.path("dump");
    let mut follower =
        Program::start(["follow", "--connect", listen, "--once", "--dump", &dump, "--json"]);
    let connected = follower.expect("connected");
    assert_eq!(fields(&connected), ["epoch", "event", "revision", "way"]);
    let diff = follower.expect("diff");
    assert_eq!((&diff["root"], &diff["equal"]), (&ready["root"], &json!(true)));
    let ended = follower.end();
    assert_eq!((ended.code, ended.stdout, &*ended.stderr), (Some(0), vec![], ""));
    assert_eq!(files.read("dump"), MIXED_DUMPED);

    // What was dumped is equal when it is loaded again, and is replaced by itself.
    let mut follower = Program::start([
        "follow",
        "--connect",
        listen,
        "--once",
        "--load",
        &dump,
        "--dump",
        &dump,
        "--json",
    ]);
    let diff = follower.wait("diff");
    assert_eq!(
        (&diff["written"], &diff["deleted"], &diff["rounds"]),
        (&json!(0), &json!(0), &json!(1))
    );
    assert_eq!(follower.end().code, Some(0));
    assert_eq!(files.read("dump"), MIXED_DUMPED);
}

#[test]
fn an_old_table_is_repaired() {
    let files = Files::new();
    let (_server, listen) = serve_file(&files.table("new", 0..2_000, "new"));
    let old = files.table("old", 10..2_005, "new");
    let changed = files.table("changed", (10..2_000).step_by(200), "old");
    let old =
        files.write("old", [std::fs::read(old).unwrap(), std::fs::read(changed).unwrap()].concat());
    let dump = files.path("dump");
    let mut follower = Program::start([
        "follow",
        "--connect",
        &listen,
        "--load",
        &old,
        "--once",
        "--dump",
        &dump,
        "--json",
        "--print",
    ]);
    follower.expect("connected");
    let (mut written, mut deleted) = (0, 0);
    let diff = loop {
        let event = follower.event();
        if event["event"] != "change" {
            break event;
        }
        assert_eq!((&event["repair"], &event["revision"]), (&json!(true), &json!(0)), "{event}");
        match event["op"].as_str().unwrap() {
            "write" => written += 1,
            "delete" => deleted += 1,
            op => panic!("{op}"),
        }
    };
    assert_eq!((written, deleted), (20, 5));
    assert_eq!(
        fields(&diff),
        [
            "bytes_received",
            "bytes_sent",
            "deleted",
            "elapsed_ms",
            "equal",
            "event",
            "failed",
            "revision",
            "root",
            "rounds",
            "server_root",
            "suppressed",
            "waited_ms",
            "written",
        ]
    );
    for (field, value) in [("written", 20), ("deleted", 5), ("suppressed", 0), ("failed", 0)] {
        assert_eq!(diff[field], value, "{diff}");
    }
    assert_eq!((&diff["event"], &diff["equal"]), (&json!("diff"), &json!(true)));
    assert!(is_root(&diff["root"]) && diff["root"] == diff["server_root"], "{diff}");
    assert!(diff["rounds"].as_u64().unwrap() >= 1 && diff["elapsed_ms"].is_u64(), "{diff}");
    assert!(diff["bytes_sent"].as_u64().unwrap() > 0, "{diff}");
    assert!(diff["bytes_received"].as_u64().unwrap() > 0, "{diff}");
    assert_eq!(follower.end().code, Some(0));
    assert_eq!(files.read("dump"), files.read("new"));
}

#[test]
fn sentences_are_for_people() {
    let files = Files::new();
    let table = files.write("t", "{\"key\":\"k\",\"value_base64\":\"/w==\"}\n");
    let mut server = Program::start(["serve", "--listen", "127.0.0.1:0", "--load", &table]);
    let ready = server.line();
    let (listen, rest) = ready.strip_prefix("ready at ").unwrap().split_once(": ").unwrap();
    assert!(rest.starts_with("1 keys at revision 0, root "), "{ready}");
    let mut follower = Program::start(["follow", "--connect", listen, "--once", "--print"]);
    assert!(follower.line().starts_with("connected to history "));
    assert_eq!(follower.line(), r#"repaired at revision 0: "k" is now b"\xff""#);
    assert!(follower.line().starts_with("equal at revision 0, root "));
    assert_eq!(follower.end().code, Some(0));
    server.signal("TERM");
    let ended = server.end();
    assert_eq!((ended.code, ended.stdout, &*ended.stderr), (Some(0), vec![], ""));
}

#[test]
fn nobody_answers() {
    let files = Files::new();
    // The kernel takes connections, nobody else does.
    let silent = TcpListener::bind("127.0.0.1:0").unwrap();
    let closed = TcpListener::bind("127.0.0.1:0").unwrap().local_addr().unwrap();
    for address in [silent.local_addr().unwrap(), closed].map(|address| address.to_string()) {
        let dump = files.path("dump");
        let args = ["follow", "--connect", &address, "--once", "--timeout", "1", "--dump", &dump];
        let mut follower = Program::start(args);
        let ended = follower.end();
        assert_eq!((ended.code, ended.stdout), (Some(1), vec![]));
        let expected = format!("error: no diff with {address} was done within 1s");
        assert!(ended.stderr.contains(&expected), "{}", ended.stderr);
        // Why is said when it is known, and once.
        let refused = ended.stderr.matches("no connection").count();
        assert_eq!(refused, usize::from(address == closed.to_string()), "{}", ended.stderr);
        assert!(!files.has("dump"));
        let args = ["follow", "--connect", &address, "--once", "--timeout", "0.2", "--json"];
        let mut follower = Program::start(args);
        let error = follower.wait("error");
        let expected = format!("no diff with {address} was done within 200ms");
        assert!(error["message"].as_str().unwrap().starts_with(&expected), "{error}");
        assert_eq!(follower.end().code, Some(1));
    }
}

#[test]
fn wrong_usage_is_exit_code_2() {
    for args in [
        &["unknown"][..],
        &[],
        &["serve"],
        &["serve", "--listen", "nowhere"],
        &["serve", "--listen", "127.0.0.1:0", "--once"],
        &["follow"],
        &["follow", "--connect", "127.0.0.1:99999"],
        &["follow", "--connect", "127.0.0.1:1", "--timeout", "soon"],
        &["follow", "--connect", "127.0.0.1:1", "--diff-every", "0"],
        &["follow", "--connect", "127.0.0.1:1", "--resume"],
        &["follow", "--connect", "127.0.0.1:1", "--name", &"n".repeat(256)],
        &["serve", "--listen", "127.0.0.1:0", "--http-writes-from-anywhere"],
        &["serve", "--listen", "127.0.0.1:0", "--tls-cert", "c"],
        &["serve", "--listen", "127.0.0.1:0", "--tls-ca", "c"],
        &["follow", "--connect", "127.0.0.1:1", "--tls-cert", "c", "--tls-key", "k"],
        &["verify", "--connect", "127.0.0.1:1"],
        &["put", "key", "value"],
        &["get", "not base64", "--key-base64", "--http", "127.0.0.1:1"],
        &["put", &"/".repeat(30_000), "", "--http", "127.0.0.1:1"],
    ] {
        let output = Command::new(env!("CARGO_BIN_EXE_tablecast")).args(args).output().unwrap();
        assert_eq!(output.status.code(), Some(2), "{args:?}");
        assert!(output.stdout.is_empty() && !output.stderr.is_empty(), "{args:?}");
    }
    for command in
        ["serve", "follow", "watch", "verify", "status", "followers", "put", "get", "delete"]
    {
        let args = [command, "--help"];
        let output = Command::new(env!("CARGO_BIN_EXE_tablecast")).args(args).output().unwrap();
        assert_eq!(output.status.code(), Some(0), "{args:?}");
    }
    for args in [&["--help"][..], &["--version"]] {
        let output = Command::new(env!("CARGO_BIN_EXE_tablecast")).args(args).output().unwrap();
        assert_eq!(output.status.code(), Some(0), "{args:?}");
    }
}

#[test]
fn unreadable_input_is_exit_code_2_and_names_its_place() {
    let files = Files::new();
    let good = "{\"key\":\"k\",\"value\":\"v\"}\n";
    let long = "v".repeat((8 << 20) + 1);
    let cases = [
        (files.write("json", format!("{good}\n{{\"key\":")), ":3: malformed JSON at column 7"),
        (files.write("field", format!("{good}{{\"key\":\"k\"}}\n")), ":2: no value"),
        (files.write("op", "{\"op\":\"write\",\"key\":\"k\",\"value\":\"v\"}"), ":1: op in a line"),
        (
            files.write("long", format!("{good}{good}{{\"key\":\"k\",\"value\":\"{long}\"}}\n")),
            ":3: value of 8388609 bytes is above the limit of 8388608",
        ),
        (files.path("missing"), ": "),
        (files.path("."), ":1: "),
    ];
    for (path, why) in &cases {
        let serve = ["serve", "--listen", "127.0.0.1:0", "--load", path];
        let follow = ["follow", "--connect", "127.0.0.1:1", "--load", path];
        for mut program in [Program::start(serve), Program::start(follow)] {
            let ended = program.end();
            assert_eq!((ended.code, ended.stdout), (Some(2), vec![]), "{path}");
            assert!(ended.stderr.contains(&format!("{path}{why}")), "{}", ended.stderr);
        }
    }
    let (path, why) = &cases[0];
    let mut program =
        Program::start(["follow", "--connect", "127.0.0.1:1", "--load", path, "--json"]);
    let error = program.expect("error");
    assert!(error["message"].as_str().unwrap().contains(&format!("{path}{why}")), "{error}");
    assert_eq!(program.end().code, Some(2));
}

#[test]
fn an_address_that_is_taken_is_exit_code_1() {
    let taken = TcpListener::bind("127.0.0.1:0").unwrap();
    let address = taken.local_addr().unwrap().to_string();
    let mut server = Program::start(["serve", "--listen", &address]);
    let ended = server.end();
    assert_eq!((ended.code, ended.stdout), (Some(1), vec![]));
    let expected = format!("error: cannot listen at {address}: ");
    assert!(ended.stderr.starts_with(&expected), "{}", ended.stderr);
}

#[test]
fn a_dump_that_fails_is_exit_code_1() {
    let files = Files::new();
    let (_server, listen) = serve_file(&files.write("t", MIXED));
    let path = files.path("absent/dump");
    let mut follower = Program::start(["follow", "--connect", &listen, "--once", "--dump", &path]);
    let ended = follower.end();
    assert_eq!(ended.code, Some(1));
    assert!(ended.stderr.contains(&format!("cannot write {path}: ")), "{}", ended.stderr);

    // Gone since the beginning.
    std::fs::create_dir(files.path("absent")).unwrap();
    let mut follower = Program::start(["follow", "--connect", &listen, "--dump", &path, "--json"]);
    follower.wait("diff");
    std::fs::remove_dir(files.path("absent")).unwrap();
    follower.signal("TERM");
    let error = follower.expect("error")["message"].as_str().unwrap().to_owned();
    assert!(error.starts_with(&format!("cannot write {path}: ")), "{error}");
    assert_eq!(follower.end().code, Some(1));
}

#[test]
fn changes_on_stdin_reach_a_follower() {
    let (mut server, listen) = serve(["serve", "--listen", "127.0.0.1:0", "--stdin", "--json"]);
    let dumps = Files::new();
    let dump = dumps.path("dump");
    let mut follower =
        Program::start(["follow", "--connect", &listen, "--print", "--json", "--dump", &dump]);
    follower.wait("diff");
    server.input(
        br#"{"key":"a","value":"1"}
{"op":"write","key_base64":"/w==","value_base64":"/v8="}
nonsense

{"op":"delete","key":"a"}
{"op":"delete","key":"a","value":"1"}
"#,
    );
    server.input(b"{\"key\":\"\xff\",\"value\":\"\"}\n");
    let long = "k".repeat((64 << 10) + 1);
    server.input(format!("{{\"key\":\"{long}\",\"value\":\"\"}}\n").as_bytes());
    server.input(br#"{"key":"","value":""}"#);
    // The end of input ends its last line, and nothing else.
    server.stdin = None;
    for (revision, expected) in [
        json!({ "op": "write", "key": "a", "value": "1" }),
        json!({ "op": "write", "key_base64": "/w==", "value_base64": "/v8=" }),
        json!({ "op": "delete", "key": "a" }),
        json!({ "op": "write", "key": "", "value": "" }),
    ]
    .into_iter()
    .enumerate()
    {
        let mut expected = expected;
        expected["event"] = json!("change");
        expected["revision"] = json!(revision + 1);
        expected["repair"] = json!(false);
        assert_eq!(follower.event(), expected);
    }
    for why in [
        "stdin:3: not a JSON object",
        "stdin:6: a delete with a value",
        "stdin:7: malformed JSON",
        "stdin:8: key of 65537 bytes is above the limit of 65536",
    ] {
        let error = server.expect("error");
        assert!(error["message"].as_str().unwrap().starts_with(why), "{error}");
    }

    // It still serves.
    let mut late = Program::start(["follow", "--connect", &listen, "--once", "--json"]);
    assert_eq!(late.wait("diff")["written"], 2);
    assert_eq!(late.end().code, Some(0));
    server.signal("INT");
    assert_eq!(server.end().code, Some(0));
    follower.wait("disconnected");
    follower.signal("INT");
    assert_eq!(follower.end().code, Some(0));
    let expected =
        "{\"key\":\"\",\"value\":\"\"}\n{\"key_base64\":\"/w==\",\"value_base64\":\"/v8=\"}\n";
    assert_eq!(dumps.read("dump"), expected);
}

#[test]
fn signals_end_both_in_an_orderly_way() {
    let files = Files::new();
    let table = files.table("t", 0..100, "");
    for signal in ["TERM", "INT"] {
        // Its stdin stays open, in the middle of a read.
        let (mut server, listen) =
            serve(["serve", "--listen", "127.0.0.1:0", "--load", &table, "--stdin", "--json"]);
        let dump = files.path(signal);
        let mut follower =
            Program::start(["follow", "--connect", &listen, "--dump", &dump, "--json"]);
        follower.wait("diff");
        follower.signal_twice(signal);
        let ended = follower.end();
        assert_eq!((ended.code, &*ended.stderr), (Some(0), ""));
        assert_eq!(files.read(signal), files.read("t"));
        server.signal_twice(signal);
        let ended = server.end();
        assert_eq!((ended.code, &*ended.stderr), (Some(0), ""));
    }
}

#[test]
fn without_a_server_a_signal_still_dumps() {
    let files = Files::new();
    let (silent, address) = silent();
    let (table, dump) = (files.write("t", MIXED), files.path("dump"));
    let mut follower =
        Program::start(["follow", "--connect", &address, "--load", &table, "--dump", &dump]);
    // It connects when all is set up.
    let _connection = silent.accept().unwrap();
    follower.signal("TERM");
    assert_eq!(follower.end().code, Some(0));
    assert_eq!(files.read("dump"), MIXED_DUMPED);

    // With --once that is no success: nothing was compared.
    let mut follower =
        Program::start(["follow", "--connect", &address, "--once", "--dump", &table]);
    let _connection = silent.accept().unwrap();
    follower.signal("TERM");
    let ended = follower.end();
    assert_eq!(ended.code, Some(1));
    assert!(ended.stderr.contains("told to end before a diff"), "{}", ended.stderr);
    assert_eq!(files.read("t"), MIXED);
}

/// What was loaded from elsewhere may be older.
#[test]
fn what_was_loaded_is_not_dumped_over_another_table() {
    let files = Files::new();
    let (silent, address) = silent();
    let (seed, dump) = (files.table("seed", 0..1, "old"), files.write("dump", MIXED));
    let args = ["follow", "--connect", &address, "--load", &seed, "--dump", &dump, "--resume"];
    let mut follower = Program::start(args);
    let _connection = silent.accept().unwrap();
    follower.signal("TERM");
    let ended = follower.end();
    assert_eq!(ended.code, Some(1));
    assert!(ended.stderr.contains("is as it was"), "{}", ended.stderr);
    assert_eq!(files.read("dump"), MIXED);
}

#[cfg(unix)]
#[test]
fn a_dump_that_could_not_be_written_is_noticed_before_anything_is_done() {
    let files = Files::new();
    let link = files.path("link");
    std::os::unix::fs::symlink(files.path("absent"), &link).unwrap();
    let ended = Program::start(["serve", "--listen", "127.0.0.1:0", "--dump", &link]).end();
    assert_eq!((ended.code, ended.stdout), (Some(1), vec![]));
    assert!(ended.stderr.contains("a link to what is not there"), "{}", ended.stderr);

    // To root nothing is forbidden.
    let folder = files.path("folder");
    std::fs::create_dir(&folder).unwrap();
    let mode = std::os::unix::fs::PermissionsExt::from_mode(0o555);
    std::fs::set_permissions(&folder, mode).unwrap();
    if std::fs::write(files.path("folder/file"), "").is_err() {
        let dump = files.path("folder/dump");
        let ended = Program::start(["serve", "--listen", "127.0.0.1:0", "--dump", &dump]).end();
        assert_eq!((ended.code, ended.stdout), (Some(1), vec![]));
        assert!(ended.stderr.contains("no file can be made in"), "{}", ended.stderr);
    }
}

#[test]
fn who_does_not_read_what_is_wrong_stops_nothing() {
    let args = ["serve", "--listen", "127.0.0.1:0", "--stdin", "--json"];
    let (mut server, mut stdout) = Program::start_unread(args);
    let listen = listens(&mut stdout);
    server.input(&b"nonsense\n".repeat(20_000));
    server.input(b"{\"key\":\"k\",\"value\":\"v\"}\n");
    let follower = Program::start(["follow", "--connect", &listen, "--print", "--json"]);
    assert_eq!(follower.wait("change")["key"], "k");
    // It is read to the end here, so that it can end.
    server.stdout = lines(stdout);
    server.signal("TERM");
    assert_eq!(server.end().code, Some(0));
}

#[cfg(target_os = "linux")]
#[test]
fn what_is_wrong_is_said_though_stdout_be_full() {
    let mut server = Command::new(env!("CARGO_BIN_EXE_tablecast"))
        .args(["serve", "--listen", "127.0.0.1:0", "--stdin"])
        .env_remove("RUST_LOG")
        .stdin(Stdio::piped())
        .stdout(std::fs::File::options().write(true).open("/dev/full").unwrap())
        .stderr(Stdio::piped())
        .spawn()
        .unwrap();
    let said = lines(server.stderr.take().unwrap());
    let mut stdin = server.stdin.take().unwrap();
    for number in 1..3 {
        stdin.write_all(b"nonsense\n").unwrap();
        let line = said.recv_timeout(LONG).unwrap();
        assert!(line.contains(&format!("stdin:{number}:")), "{line}");
    }
    let id = server.id().to_string();
    assert!(Command::new("kill").args(["-s", "TERM", &id]).status().unwrap().success());
    assert!(said.recv_timeout(LONG).unwrap().contains("cannot write to stdout"));
    assert!(!server.wait().unwrap().success());
}

/// The last whole table that there was is worth more than none.
#[test]
fn what_may_lack_something_is_not_dumped() {
    let files = Files::new();
    let (silent, address) = silent();
    let dump = files.write("t", MIXED);
    let mut follower = Program::start(["follow", "--connect", &address, "--dump", &dump]);
    let _connection = silent.accept().unwrap();
    follower.signal("TERM");
    let ended = follower.end();
    assert_eq!(ended.code, Some(1));
    assert!(ended.stderr.contains("is as it was: the table may lack"), "{}", ended.stderr);
    assert_eq!(files.read("t"), MIXED);
}

#[test]
fn one_command_line_starts_it_the_first_time_too() {
    let files = Files::new();
    let (_server, listen) = serve_file(&files.write("t", MIXED));
    let table = files.path("kept");
    for way in ["diff: the follower presents no position", "resumed"] {
        let mut follower = Program::start([
            "follow",
            "--connect",
            &listen,
            "--load",
            &table,
            "--dump",
            &table,
            "--resume",
            "--json",
        ]);
        let connected = follower.expect("connected");
        assert!(connected["way"].as_str().unwrap().starts_with(way), "{connected}");
        if way != "resumed" {
            follower.wait("diff");
        }
        follower.signal("TERM");
        assert_eq!(follower.end().code, Some(0));
        assert_eq!(files.read("kept"), MIXED_DUMPED);
    }
}

#[test]
fn a_server_that_nobody_listens_to_serves_on() {
    let files = Files::new();
    let dump = files.path("dump");
    let args = ["serve", "--listen", "127.0.0.1:0", "--stdin", "--dump", &dump, "--json"];
    let (mut server, stdout) = Program::start_unread(args);
    let listen = listens(stdout);
    // Each is said to be wrong, to nobody.
    server.input(&b"wrong\n".repeat(10));
    server.input(b"{\"key\":\"k\",\"value\":\"v\"}\n");
    let mut follower = Program::start(["follow", "--connect", &listen, "--print", "--json"]);
    loop {
        let event = follower.event();
        if event["event"] == "change" {
            assert_eq!(event["key"], "k", "{event}");
            break;
        }
    }
    // A terminal that is closed loses nothing. It comes twice as a rule.
    for signal in if hang_up_counts() { &["HUP", "HUP"][..] } else { &["TERM"] } {
        server.signal(signal);
    }
    assert_eq!(server.end().code, Some(0));
    assert_eq!(files.read("dump"), "{\"key\":\"k\",\"value\":\"v\"}\n");
    follower.signal("TERM");
    assert_eq!(follower.end().code, Some(0));
}

/// Where that cannot be known, or is ignored here already, a terminal that is closed ends nothing.
fn hang_up_counts() -> bool {
    let status = std::fs::read_to_string("/proc/self/status").unwrap_or_default();
    let ignored = status.lines().find_map(|line| line.strip_prefix("SigIgn:"));
    ignored.is_some_and(|mask| mask.trim().ends_with(['0', '2', '4', '6', '8', 'a', 'c', 'e']))
}

/// As under nohup.
#[cfg(target_os = "linux")]
#[test]
fn a_closed_terminal_that_is_ignored_ends_nothing() {
    let tablecast = env!("CARGO_BIN_EXE_tablecast");
    let command = format!("trap '' HUP; exec {tablecast} serve --listen 127.0.0.1:0 --json");
    let mut shell = Command::new("sh");
    let mut server = shell.args(["-c", &command]).stdout(Stdio::piped()).spawn().unwrap();
    let listen = listens(server.stdout.as_mut().unwrap());
    let kill =
        |signal| Command::new("kill").args(["-s", signal, &server.id().to_string()]).status();
    assert!(kill("HUP").unwrap().success());
    let follower = ["follow", "--connect", &listen, "--once"];
    assert_eq!(Program::start(follower).end().code, Some(0));
    assert!(kill("TERM").unwrap().success());
    assert_eq!(server.wait().unwrap().code(), Some(0));
}

#[test]
fn diffs_come_regularly_if_asked_for() {
    let files = Files::new();
    let (_server, listen) = serve_file(&files.write("t", MIXED));
    let follower =
        Program::start(["follow", "--connect", &listen, "--diff-every", "0.05", "--json"]);
    follower.expect("connected");
    for _ in 0..3 {
        assert_eq!(follower.expect("diff")["equal"], true);
    }
}

#[test]
fn a_follower_comes_back_to_a_server_that_was_restarted() {
    let files = Files::new();
    let (mut server, listen) = serve_file(&files.table("t", 0..10, "old"));
    let mut follower = Program::start(["follow", "--connect", &listen, "--json"]);
    let first = follower.expect("connected");
    assert_eq!(follower.expect("diff")["written"], 10);
    server.signal("TERM");
    assert_eq!(server.end().code, Some(0));
    let disconnected = follower.expect("disconnected");
    assert_eq!(fields(&disconnected), ["event", "reason"]);
    let table = files.table("t", 5..15, "new");
    let (_server, _) = serve(["serve", "--listen", &listen, "--load", &table, "--json"]);
    let second = follower.wait("connected");
    assert_ne!(first["epoch"], second["epoch"]);
    let diff = follower.expect("diff");
    assert_eq!((&diff["written"], &diff["deleted"]), (&json!(10), &json!(5)));
    follower.signal("TERM");
    assert_eq!(follower.end().code, Some(0));
}

#[test]
fn a_reader_that_goes_away_ends_it_quietly() {
    let files = Files::new();
    let (mut server, listen) = serve(["serve", "--listen", "127.0.0.1:0", "--stdin", "--json"]);
    let dump = files.path("dump");
    let (mut follower, stdout) = Program::start_unread([
        "follow",
        "--connect",
        &listen,
        "--print",
        "--json",
        "--dump",
        &dump,
    ]);
    let mut stdout = BufReader::new(stdout);
    let mut line = String::new();
    while !line.contains("\"diff\"") {
        line.clear();
        assert_ne!(stdout.read_line(&mut line).unwrap(), 0);
    }
    drop(stdout);
    // The first is written into the void, the next one notices.
    let mut ended = None;
    for number in 0.. {
        server.input(format!("{{\"key\":\"{number}\",\"value\":\"\"}}\n").as_bytes());
        ended = follower.child.try_wait().unwrap();
        if ended.is_some() {
            break;
        }
        std::thread::yield_now();
    }
    assert_eq!(ended.unwrap().code(), Some(0));
    assert_eq!(drain(&follower.stderr), Vec::<String>::new());
    assert!(files.has("dump"));
}

#[test]
fn a_reader_that_does_not_read_does_not_hinder_the_end() {
    let files = Files::new();
    let (_server, listen) = serve_file(&files.table("t", 0..20_000, "something"));
    let dump = files.path("dump");
    let (mut follower, stdout) = Program::start_unread([
        "follow",
        "--connect",
        &listen,
        "--print",
        "--json",
        "--dump",
        &dump,
    ]);
    let mut stdout = BufReader::with_capacity(16, stdout);
    let mut line = String::new();
    while !line.contains("\"change\"") {
        line.clear();
        assert_ne!(stdout.read_line(&mut line).unwrap(), 0);
    }
    follower.signal("TERM");
    // All of stderr: until it has ended. The diff may be done by now.
    let stderr = drain(&follower.stderr);
    let whole = files.has("dump");
    // It may be said in the log, and once more if it is not known whether that was so.
    let lacks = stderr.iter().all(|line| line.contains("the table may lack something"));
    assert!(whole == stderr.is_empty() && lacks, "{stderr:?}");
    assert_eq!(follower.child.wait().unwrap().code(), Some(i32::from(!whole)));
    drop(stdout);
}

#[test]
fn nothing_is_left_beside_a_dump() {
    let files = Files::new();
    let (_server, listen) = serve_file(&files.write("t", MIXED));
    let dump = files.write("dump", "old");
    let mut follower = Program::start(["follow", "--connect", &listen, "--once", "--dump", &dump]);
    assert_eq!(follower.end().code, Some(0));
    let mut names: Vec<PathBuf> =
        std::fs::read_dir(files.path(".")).unwrap().map(|entry| entry.unwrap().path()).collect();
    names.sort();
    assert_eq!(names.len(), 2, "{names:?}");
    assert_eq!(files.read("dump"), MIXED_DUMPED);
}
