//! `tablecast watch`.

use super::*;

#[test]
fn live_changes_of_the_keys_that_are_watched() {
    let files = Files::new();
    let table = files.table("t", 0..10, "old");
    let (mut server, listen) =
        serve(["serve", "--listen", "127.0.0.1:0", "--load", &table, "--stdin", "--json"]);
    let mut all = Program::start(["watch", "--connect", &listen, "--json"]);
    let args = ["watch", "--connect", &listen, "--key", "b", "--key", "k00003", "--prefix", "aa"];
    let mut some = Program::start(args);
    // How the table was is not printed.
    all.expect("connected");
    assert_eq!(all.expect("diff")["written"], 10);
    assert!(some.line().starts_with("connected to "));
    assert!(some.line().starts_with("equal at revision 0, "));
    for key in ["a", "aa", "aab", "b", "bb", "k00003"] {
        server.input(format!("{{\"key\":\"{key}\",\"value\":\"1\"}}\n").as_bytes());
        let change = all.expect("change");
        assert_eq!((&change["key"], &change["repair"]), (&json!(key), &json!(false)));
    }
    assert_eq!(some.line(), r#"changed at revision 2: "aa" is now "1""#);
    assert_eq!(some.line(), r#"changed at revision 3: "aab" is now "1""#);
    assert_eq!(some.line(), r#"changed at revision 4: "b" is now "1""#);
    assert_eq!(some.line(), r#"changed at revision 6: "k00003" is now "1""#);

    // What changes behind its back is repaired, and printed.
    server.signal("TERM");
    assert_eq!(server.end().code, Some(0));
    all.wait("disconnected");
    let table = files.write("t", "{\"key\":\"b\",\"value\":\"2\"}\n");
    let (_server, _) = serve(["serve", "--listen", &listen, "--load", &table, "--json"]);
    let mut repairs = 0;
    while all.event()["event"] != "diff" {
        repairs += 1;
    }
    // 14 deleted, 1 written, and the connection.
    assert_eq!(repairs, 16);
    for watch in [&mut all, &mut some] {
        watch.signal("TERM");
        let ended = watch.end();
        assert_eq!((ended.code, &*ended.stderr), (Some(0), ""));
    }
}
