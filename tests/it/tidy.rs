//! What holds the shape up, checked by reading the files.

use std::fs;
use std::path::{Path, PathBuf};

fn root() -> PathBuf {
    PathBuf::from(env!("CARGO_MANIFEST_DIR"))
}

fn read(path: impl AsRef<Path>) -> String {
    let path = root().join(path);
    fs::read_to_string(&path).unwrap_or_else(|error| panic!("{}: {error}", path.display()))
}

/// The names under a heading of a manifest.
fn dependencies(manifest: &str, heading: &str) -> Vec<String> {
    read(manifest)
        .lines()
        .skip_while(|line| *line != heading)
        .skip(1)
        .take_while(|line| !line.starts_with('['))
        .filter_map(|line| line.split(['.', ' ', '=']).next())
        .filter(|name| !name.is_empty() && !name.starts_with('#'))
        .map(str::to_owned)
        .collect()
}

fn sources(folder: &str) -> Vec<PathBuf> {
    let mut found = Vec::new();
    let mut folders = vec![root().join(folder)];
    while let Some(folder) = folders.pop() {
        for entry in fs::read_dir(folder).unwrap() {
            let path = entry.unwrap().path();
            if path.is_dir() {
                folders.push(path);
            } else if path.extension().is_some_and(|extension| extension == "rs") {
                found.push(path);
            }
        }
    }
    found
}

#[test]
fn the_protocol_is_pure() {
    let allowed = [
        "blake3",
        "bytes",
        "equivalent",
        "imbl",
        "rmp",
        "rmp-serde",
        "serde",
        "serde_bytes",
        "thiserror",
    ];
    assert_eq!(dependencies("protocol/Cargo.toml", "[dependencies]"), allowed);
    for path in sources("protocol/src") {
        let text = fs::read_to_string(&path).unwrap();
        for word in ["std::net", "std::fs", "std::thread", "Instant", "SystemTime", "async fn"] {
            // Threads that end in the function that starts them are how it computes. (clippy.toml
            // keeps `spawn` out of there, too.)
            let forks = word == "std::thread" && path.ends_with("protocol/src/tree/build.rs");
            assert!(forks || !text.contains(word), "{} has {word}", path.display());
        }
    }
}

#[test]
fn crates_depend_in_one_direction() {
    let ours = |manifest| {
        let mut names = dependencies(manifest, "[dependencies]");
        names.retain(|name| name.starts_with("tablecast"));
        names
    };
    assert_eq!(ours("protocol/Cargo.toml"), [""; 0]);
    assert_eq!(ours("protocol/simulator/Cargo.toml"), ["tablecast-protocol"]);
    assert_eq!(ours("actors/Cargo.toml"), ["tablecast-protocol"]);
    assert_eq!(ours("Cargo.toml"), ["tablecast-actors"]);
    assert_eq!(ours("demo/Cargo.toml"), ["tablecast"]);
}

#[test]
fn what_is_depended_on_is_used() {
    for folder in ["", "protocol/", "protocol/simulator/", "actors/", "demo/", "bench/"] {
        let texts = sources(&format!("{folder}src")).into_iter();
        let text: String = texts.map(|path| fs::read_to_string(path).unwrap()).collect();
        for name in dependencies(&format!("{folder}Cargo.toml"), "[dependencies]") {
            let path = format!("{}::", name.replace('-', "_"));
            assert!(text.contains(&path), "{folder}src does not use {name}");
        }
    }
}

#[test]
fn the_changelog_names_the_version() {
    let version = env!("CARGO_PKG_VERSION");
    assert!(read("CHANGELOG.md").contains(&format!("\n## {version}")));
}

#[test]
fn what_ci_runs_is_what_contributing_and_readme_say() {
    let ci = read(".ci/run");
    let contributing = read("CONTRIBUTING.md");
    let commands = contributing.split("```sh\n").nth(1).unwrap().split("```").next().unwrap();
    for command in commands.lines() {
        assert!(ci.contains(command), ".ci/run does not run {command:?}");
    }
    for command in ["cargo run --release -p tablecast-demo", "cargo test --workspace"] {
        assert!(read("README.md").contains(command) && commands.contains(command));
    }
}

#[test]
fn readmes_name_files_that_exist() {
    for page in ["README.md", "demo/README.md", "ARCHITECTURE.md", "CONTRIBUTING.md"] {
        let folder = root().join(page).parent().unwrap().to_owned();
        let text = read(page);
        for link in text.split("](").skip(1).filter_map(|rest| rest.split(')').next()) {
            assert!(folder.join(link).exists(), "{page} links to {link}");
        }
    }
    let code_map = read("ARCHITECTURE.md");
    for name in code_map.split('`').filter(|name| name.starts_with("protocol/src/")) {
        assert!(root().join(name).exists(), "ARCHITECTURE.md names {name}");
    }
}
