//! What the fuzzer found worth keeping holds, as what it is looking for must: `protocol/fuzz/corpus` has a folder of
//! inputs for each target.

#![allow(clippy::unwrap_used, reason = "a test fails by panicking")]

use std::path::Path;

use tablecast_simulator::fuzz;

fn run(target: &str, body: fn(&[u8])) {
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
    run("server", fuzz::server);
}

#[test]
fn a_follower_and_any_server() {
    run("client", fuzz::client);
}

#[test]
fn both_ends() {
    run("pair", fuzz::pair);
}
