//! What a figure was measured on.

use std::fs;
use std::process::Command;

use rustix::process::{Resource, Rlimit, getrlimit, setrlimit};
use rustix::time::{ClockId, clock_gettime};
use serde_json::{Value, json};

/// Processor, memory, system, compiler, commit and day.
pub(crate) fn describe() -> Value {
    let read = |path: &str| fs::read_to_string(path).unwrap_or_default();
    let field = |text: &str, name: &str| {
        let line = text.lines().find_map(|line| line.strip_prefix(name)).unwrap_or_default();
        line.trim_start_matches([' ', '\t', ':']).trim().to_owned()
    };
    json!({
        "day": said("date", &["-u", "+%F"]),
        "cores": std::thread::available_parallelism().map_or(1, usize::from),
        "processor": field(&read("/proc/cpuinfo"), "model name"),
        "memory": field(&read("/proc/meminfo"), "MemTotal"),
        "system": said("uname", &["-sr"]),
        "compiler": said("rustc", &["--version"]),
        "commit": said("git", &["rev-parse", "--short", "HEAD"]),
        "changed": !said("git", &["status", "--porcelain", "--untracked-files=no"]).is_empty(),
    })
}

/// The same in one sentence.
pub(crate) fn line() -> String {
    let machine = describe();
    let of = |name: &str| match machine.get(name) {
        Some(Value::String(text)) => text.clone(),
        other => other.map(Value::to_string).unwrap_or_default(),
    };
    let [day, cores, processor, memory, system, compiler, commit] =
        ["day", "cores", "processor", "memory", "system", "compiler", "commit"].map(of);
    format!("{day}, {cores} cores of {processor}, {memory}, {system}, {compiler}, commit {commit}.")
}

/// Raises the number of files that may be open as far as it may be; how many that is.
pub(crate) fn open_files() -> anyhow::Result<Option<u64>> {
    let limit = getrlimit(Resource::Nofile);
    setrlimit(Resource::Nofile, Rlimit { current: limit.maximum, ..limit })?;
    Ok(limit.maximum)
}

/// Processor time of this thread, in milliseconds.
pub(crate) fn cpu_ms() -> f64 {
    let time = clock_gettime(ClockId::ThreadCPUTime);
    time.tv_sec as f64 * 1e3 + time.tv_nsec as f64 / 1e6
}

/// What a program prints; nothing if it is not there.
pub(crate) fn said(program: &str, args: &[&str]) -> String {
    let output = Command::new(program).args(args).output();
    let text = output.map(|output| output.stdout).unwrap_or_default();
    String::from_utf8_lossy(&text).trim().to_owned()
}
