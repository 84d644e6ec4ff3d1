//! What the fuzzer found worth keeping holds, as what it is looking for must: `protocol/fuzz/corpus` has a folder of
//! inputs for each target.

#![allow(clippy::unwrap_used, reason = "a test fails by panicking")]

use std::path::Path;

use tablecast_simulator::{Coverage, fuzz};

fn run(target: &str, mut body: impl FnMut(&[u8])) {
    let corpus = Path::new(env!("CARGO_MANIFEST_DIR")).join("../fuzz/corpus").join(target);
    let mut inputs = 0;
    for file in std::fs::read_dir(corpus).unwrap() {
        let path = file.unwrap().path();
        eprintln!("{}", path.display());
        body(&std::fs::read(path).unwrap());
        inputs += 1;
    }
    assert!(inputs > 0);
}

#[test]
fn frames() {
    run("frames", fuzz::frames);
}

#[test]
fn messages() {
    run("messages", fuzz::messages);
}

#[test]
fn a_server_and_any_follower() {
    let mut all = Coverage::server();
    run("server", |input| all.add(&fuzz::server(input)));
    assert_eq!(unreached(&all), [("", ""); 0]);
}

#[test]
fn a_follower_and_any_server() {
    let mut all = Coverage::client();
    run("client", |input| all.add(&fuzz::client(input)));
    assert_eq!(unreached(&all), [("", ""); 0]);
}

/// Whoever says anything says everything everywhere.
fn unreached(coverage: &Coverage) -> Vec<(&'static str, &'static str)> {
    let unreached = coverage.cells().filter(|(.., count)| *count == 0);
    unreached.map(|(state, message, _)| (state, message)).collect()
}

#[test]
fn both_ends() {
    run("pair", fuzz::pair);
}
