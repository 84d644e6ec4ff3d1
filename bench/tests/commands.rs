//! Every question can be asked, and answers what bench/README.md says. Small tables: nothing is
//! measured here.

#![allow(clippy::unwrap_used, reason = "what is not as it must be fails the test")]

use std::process::Command;

use serde_json::Value;

fn ask(arguments: &str) -> Value {
    let mut command = Command::new(env!("CARGO_BIN_EXE_tablecast-bench"));
    let output = command.args(arguments.split_whitespace()).output().unwrap();
    assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
    serde_json::from_slice(&output.stdout).unwrap()
}

fn assert_positive(answer: &Value, figures: &[&str]) {
    for figure in figures {
        assert!(answer[figure].as_f64().is_some_and(|it| it > 0.0), "{figure} in {answer}");
    }
}

#[test]
fn tree() {
    let answer = ask("tree --keys 2000 --json");
    assert_positive(&answer, &["build_ns_per_key", "root_after_1000_writes_ms"]);
    assert!(answer["bytes_per_key"]["built"].is_number());
}

#[test]
fn diff() {
    for nodelay in [true, false] {
        let asked = format!("diff --keys 5000 --differ 90 --runs 2 --nodelay {nodelay} --json");
        let answer = ask(&asked);
        assert_eq!(answer["repaired"], 90);
        assert_eq!(answer["rounds"], answer["walk_rounds"]);
        assert_positive(&answer, &["bytes_to_server", "bytes_to_follower", "total_ms"]);
        assert!(answer["walk_ms"]["server"].is_number());
        let both = answer["bytes_to_server"].as_f64().unwrap()
            + answer["bytes_to_follower"].as_f64().unwrap();
        assert!(answer["walk_bytes"].as_f64().unwrap() < both);
    }
}

#[test]
fn equal_tables() {
    let answer = ask("diff --keys 5000 --differ 0 --runs 1 --json");
    assert_eq!((&answer["rounds"], &answer["repaired"]), (&1.into(), &0.into()));
    assert!(answer["walk_bytes"].as_f64().unwrap() < 200.0, "{answer}");
}

#[test]
fn storm() {
    let answer = ask("storm --followers 20 --keys 100 --differ 10 --quiet-writes 10 --json");
    assert_positive(&answer, &["quiet_p99_ms", "storm_p99_ms", "repaired_all_ms"]);
    assert!(answer["most_diffs_running"].as_u64().unwrap() <= 4, "{answer}");
}

#[test]
fn stream() {
    let answer =
        ask("stream --followers 3 --writes 5000 --keys 100 --paced-writes 50 --sampled 2 --json");
    let figures = ["delivered_per_s", "writes_per_s", "p50_us", "p99_us", "rss_bytes"];
    assert_positive(&answer, &figures);
    assert!(answer["server_cpu_s_per_million"].is_number());
}
