//! The demo does what its README says.

#![allow(clippy::unwrap_used, missing_docs, reason = "a test fails by panicking")]

use std::process::Command;

fn run(arguments: &[&str]) -> (bool, String) {
    let output = Command::new(env!("CARGO_BIN_EXE_demo")).args(arguments).output().unwrap();
    let text = [output.stdout, output.stderr].concat();
    (output.status.success(), String::from_utf8(text).unwrap())
}

#[test]
fn both_acts_end_with_equal_tables() {
    let (success, output) = run(&["--keys", "3000", "--differ", "300", "--seed", "7"]);
    assert!(success, "{output}");
    let readme = include_str!("../README.md");
    let act_one = readme.split("```text\n").nth(1).and_then(|text| text.split("```").next());
    assert!(output.starts_with(act_one.unwrap()), "README has another act one than\n{output}");
    for line in ["rounds", "bytes", "written", "deleted", "suppressed", "failed", "time", "root"] {
        assert!(output.contains(&format!("\n    {line} ")), "{line} is missing in\n{output}");
    }
    assert!(output.ends_with("entries of both tables are equal\n"), "{output}");
}

#[test]
fn small_tables_and_wrong_arguments() {
    let (success, output) = run(&["--keys", "0", "--differ", "0"]);
    assert!(success, "{output}");
    let (success, output) = run(&["--keys", "3", "--differ", "4"]);
    assert!(!success && output.contains("--differ 4 is above --keys 3"), "{output}");
}
