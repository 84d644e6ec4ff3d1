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
fn soak() {
    let answer = ask("soak --seconds 5 --seed 3 --followers 3 --json");
    assert_positive(&answer, &["times_all_equal", "writes", "changes", "verified"]);
    let faults = answer["faults"].as_object().unwrap();
    assert!(faults.keys().any(|fault| fault.contains("killed")), "{answer}");
    assert!(answer["seen"]["keys repaired"].as_u64().unwrap() > 0, "{answer}");
}

#[test]
fn hostile() {
    let asked = "hostile --connections 18 --followers 5 --keys 1000 --seconds 6 --turns 1 --json";
    let answer = ask(asked);
    let delivered = ["quiet_delivered_per_s", "hostile_delivered_per_s", "ratio"];
    assert_positive(&answer, &delivered);
    // Every kind has done something.
    assert_eq!(answer["done_in_last_turn"].as_object().unwrap().len(), 9, "{answer}");
}

#[test]
fn simulate() {
    let answer = ask("simulate --seconds 1 --threads 1 --from 5 --json");
    assert_positive(&answer, &["runs", "runs_per_s", "delivered_per_run", "diffs"]);
    assert!(answer["faults"]["CutInWalk"].as_u64().unwrap() > 0, "{answer}");
    assert_eq!(ask("simulate --seed 7 --json")["runs"], 1);
}

#[test]
fn stream() {
    let answer =
        ask("stream --followers 3 --writes 5000 --keys 100 --paced-writes 50 --sampled 2 --json");
    let figures = ["delivered_per_s", "writes_per_s", "p50_us", "p99_us", "rss_bytes"];
    assert_positive(&answer, &figures);
    assert!(answer["server_cpu_s_per_million"].is_number());
}

#[test]
fn every_row_of_the_comparison() {
    let folder = tempfile::tempdir().unwrap();
    let file = folder.path().join("compare.json");
    let mut command = Command::new(env!("CARGO_BIN_EXE_tablecast-bench"));
    command.args(["compare", "--quick", "--alone", "--runs", "1", "--json"]).arg(&file);
    let output = command.output().unwrap();
    assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
    let answer: Value = serde_json::from_slice(&std::fs::read(&file).unwrap()).unwrap();
    let lines = answer["lines"].as_array().unwrap();
    let mut rows: Vec<_> = lines.iter().map(|line| line["row"].as_str().unwrap()).collect();
    rows.dedup();
    assert_eq!(rows.len(), 12, "{rows:?}");
    // A quick repair may be over before a change comes, and a few followers may fit into memory at hand.
    for line in lines.iter().filter(|line| line["row"] != "repair" && line["row"] != "memory") {
        assert_positive(line, &["ours"]);
    }
    assert_eq!(answer["conditions"]["quick"], true);
}

/// Not the counts: whether every piece of counted work can be done.
#[test]
fn counted_work() {
    for what in ["insert", "root", "walk", "fan-out"] {
        for idle in [&[][..], &["--idle"]] {
            let mut command = Command::new(env!("CARGO_BIN_EXE_tablecast-bench"));
            let output = command.args(["instructions-work", "--what", what]).args(idle).output();
            assert!(output.unwrap().status.success(), "{what}");
        }
    }
}

#[test]
fn growth() {
    let folder = tempfile::tempdir().unwrap();
    let mut command = Command::new(env!("CARGO_BIN_EXE_tablecast-bench"));
    let output = command.args(["grow", "--quick", "--folder"]).arg(folder.path()).output().unwrap();
    assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
    let page = std::fs::read_to_string(folder.path().join("README.md")).unwrap();
    for name in ["keys", "followers", "differing", "values"] {
        let plot = std::fs::read_to_string(folder.path().join(format!("{name}.svg"))).unwrap();
        assert!(plot.contains("</svg>") && page.contains(&format!("({name}.svg)")), "{name}");
    }
}
