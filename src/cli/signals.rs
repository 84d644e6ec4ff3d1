//! What tells the command to end: SIGINT, SIGTERM and (on Linux) SIGHUP, or Ctrl-C where there are no signals.

use std::io;
#[cfg(unix)]
use std::sync::mpsc as std_mpsc;
#[cfg(unix)]
use std::time::{Duration, Instant};

#[cfg(unix)]
use signal_hook::{consts, iterator, low_level};
#[cfg(unix)]
use tokio::sync::mpsc;

#[cfg(unix)]
use super::events::complain;

/// How long behind the first signal a second one is meant: `timeout` and supervisors tell a process and its group, which is two of
/// them at once.
#[cfg(unix)]
const AGAIN: Duration = Duration::from_millis(500);

/// How long the last word may take.
#[cfg(unix)]
const LAST_WORD: Duration = Duration::from_millis(100);

/// From its making on, the first of these signals does not end the process by itself. A second one that comes a while later does, with
/// exit code 1, whatever the process is at.
#[cfg(unix)]
pub(super) struct Signals(mpsc::UnboundedReceiver<()>);

#[cfg(unix)]
impl Signals {
    pub(super) fn new() -> io::Result<Self> {
        let mut counting = vec![consts::SIGINT, consts::SIGTERM];
        counting.extend(hang_up_counts().then_some(consts::SIGHUP));
        let mut signals = iterator::Signals::new(counting)?;
        let (tell, told) = mpsc::unbounded_channel();
        let thread = std::thread::Builder::new().name("signals".to_owned());
        thread.spawn(move || {
            let mut first = None;
            for signal in signals.forever() {
                // A terminal that is closed says so twice, some time apart, and what was its session is told to end behind that.
                if signal != consts::SIGHUP
                    && first.get_or_insert_with(Instant::now).elapsed() >= AGAIN
                {
                    end_at_once();
                }
                // Nobody waits for another one.
                tell.send(()).ok();
            }
        })?;
        Ok(Self(told))
    }

    /// Waits for the next one.
    pub(super) async fn recv(&mut self) {
        // The thread does not end.
        self.0.recv().await;
    }
}

/// Says so, if somebody reads it, and ends.
#[cfg(unix)]
fn end_at_once() {
    let (tell, said) = std_mpsc::channel();
    let speaks = std::thread::Builder::new().spawn(move || {
        complain("ended at once by a second signal; nothing more is written");
        tell.send(()).ok();
    });
    if speaks.is_ok() {
        said.recv_timeout(LAST_WORD).ok();
    }
    low_level::exit(1);
}

/// Whether a terminal that is closed ends it: not under nohup, which has it ignored. Where that cannot be asked, it is left
/// as it is.
#[cfg(unix)]
fn hang_up_counts() -> bool {
    let status = std::fs::read_to_string("/proc/self/status").unwrap_or_default();
    let ignored = status.lines().find_map(|line| line.strip_prefix("SigIgn:"));
    let ignored = ignored.and_then(|mask| u64::from_str_radix(mask.trim(), 16).ok());
    ignored.is_some_and(|mask| mask >> (consts::SIGHUP - 1) & 1 == 0)
}

/// Ctrl-C.
#[cfg(not(unix))]
pub(super) struct Signals;

#[cfg(not(unix))]
impl Signals {
    #[expect(clippy::unnecessary_wraps, reason = "the same face as where it can fail")]
    pub(super) fn new() -> io::Result<Self> {
        Ok(Self)
    }

    /// Waits for the next one; forever, if it cannot be waited for.
    pub(super) async fn recv(&mut self) {
        if tokio::signal::ctrl_c().await.is_err() {
            std::future::pending::<()>().await;
        }
    }
}
