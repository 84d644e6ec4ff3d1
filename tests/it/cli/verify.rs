//! `tablecast verify`.

use super::*;

#[test]
fn equal_tables() {
    let files = Files::new();
    let table = files.write("t", MIXED);
    let (_server, listen) = serve_file(&table);
    let mut verify = Program::start(["verify", "--connect", &listen, "--load", &table]);
    assert!(verify.line().starts_with("equal at revision 0, root "));
    let ended = verify.end();
    assert_eq!((ended.code, ended.stdout, &*ended.stderr), (Some(0), vec![], ""));
    let mut verify = Program::start(["verify", "--connect", &listen, "--load", &table, "--json"]);
    let verdict = verify.expect("verified");
    assert_eq!(
        fields(&verdict),
        [
            "changed_meanwhile",
            "different",
            "equal",
            "event",
            "keys",
            "missing_in_the_file",
            "not_at_the_server",
            "revision",
            "server_root",
        ]
    );
    assert_eq!(verdict["equal"], true);
    assert!(is_root(&verdict["server_root"]), "{verdict}");
    assert_eq!(verify.end().code, Some(0));
    assert_eq!(files.read("t"), MIXED);
}

#[test]
fn different_tables() {
    let files = Files::new();
    let (_server, listen) = serve_file(&files.table("t", 0..10, "new"));
    // More than a repair may delete without being asked.
    let file = files.table("file", (2..5).chain(20..3_000), "new");
    let other = files.table("other", 3..5, "old");
    let both = [std::fs::read(&file).unwrap(), std::fs::read(&other).unwrap()].concat();
    let file = files.write("file", both);
    let args = ["verify", "--connect", &listen, "--load", &file, "--keys", "8"];
    let mut verify = Program::start(args);
    let ended = verify.end();
    assert_eq!((ended.code, &*ended.stderr), (Some(1), ""));
    assert_eq!(
        ended.stdout,
        [
            "differs: 7 missing in the file, 2 different, 2980 not at the server",
            "missing in the file: \"k00000\"",
            "missing in the file: \"k00001\"",
            "different: \"k00003\"",
            "different: \"k00004\"",
            "missing in the file: \"k00005\"",
            "missing in the file: \"k00006\"",
            "missing in the file: \"k00007\"",
            "missing in the file: \"k00008\"",
        ]
    );
    let mut verify = Program::start(["verify", "--connect", &listen, "--load", &file, "--json"]);
    let verdict = verify.expect("verified");
    assert_eq!((&verdict["equal"], &verdict["different"]), (&json!(false), &json!(2)));
    assert_eq!(verdict["keys"].as_array().unwrap().len(), 10);
    assert_eq!(verdict["keys"][2], json!({ "key": "k00003", "what": "different" }));
    assert_eq!(verify.end().code, Some(1));
}

#[test]
fn no_verdict() {
    let files = Files::new();
    let table = files.write("t", MIXED);
    let (_silent, address) = silent();
    let args = ["verify", "--connect", &address, "--load", &table, "--timeout", "0.3"];
    let mut verify = Program::start(args);
    let ended = verify.end();
    assert_eq!((ended.code, ended.stdout), (Some(1), vec![]));
    let expected = format!("error: no verdict from {address}");
    assert!(ended.stderr.starts_with(&expected), "{}", ended.stderr);
    assert!(ended.stderr.ends_with("not compared within 300ms"), "{}", ended.stderr);
    let missing = files.path("missing");
    let mut verify = Program::start(["verify", "--connect", &address, "--load", &missing]);
    assert_eq!(verify.end().code, Some(2));
}
