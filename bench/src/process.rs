//! What Linux says of a process.

use std::fs;
use std::time::{Duration, SystemTime};

use anyhow::Context;

/// Clock ticks a second in /proc: 100 on every Linux that one meets.
const TICKS: f64 = 100.0;

/// Resident memory, in bytes. `process` is a number or `self`.
pub(crate) fn rss_bytes(process: &str) -> anyhow::Result<u64> {
    let status = fs::read_to_string(format!("/proc/{process}/status"))?;
    let line = status.lines().find_map(|line| line.strip_prefix("VmRSS:"));
    let kilobytes = line.and_then(|line| line.trim().strip_suffix(" kB"));
    Ok(kilobytes.context("a process has a VmRSS")?.trim().parse::<u64>()? * 1024)
}

/// Seconds of processor time of all its threads, the kernel's share included; to 10 ms.
pub(crate) fn cpu_s(process: &str) -> anyhow::Result<f64> {
    let stat = fs::read_to_string(format!("/proc/{process}/stat"))?;
    // The name may hold anything but ends with the last bracket; utime and stime are the 14th and
    // 15th field, 12th and 13th behind it.
    let (_, fields) = stat.rsplit_once(')').context("a process has a name")?;
    let ticks = fields.split_whitespace().skip(11).take(2);
    Ok(ticks.map(str::parse::<f64>).sum::<Result<f64, _>>()? / TICKS)
}

/// The time of day: what two processes on one machine have in common.
pub(crate) fn now() -> Duration {
    SystemTime::now().duration_since(SystemTime::UNIX_EPOCH).unwrap_or_default()
}
