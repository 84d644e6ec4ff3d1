//! What tells the command to end: SIGINT, SIGTERM and (on Linux) SIGHUP, or Ctrl-C where there are no signals.

use std::io;
#[cfg(unix)]
use std::sync::Arc;
#[cfg(unix)]
use std::sync::atomic::AtomicBool;

#[cfg(unix)]
use signal_hook::{consts, flag};

#[cfg(unix)]
use tokio::signal::unix::{Signal, SignalKind, signal};

/// From its making on, the first of these signals does not end the process by itself. The second one does, with
/// exit code 1, whatever the process is at.
#[cfg(unix)]
pub(super) struct Signals {
    interrupt: Signal,
    terminate: Signal,
    /// It may come twice by itself, from the shell and from the system: so the second one ends nothing.
    hang_up: Option<Signal>,
}

#[cfg(unix)]
impl Signals {
    pub(super) fn new() -> io::Result<Self> {
        let told = Arc::new(AtomicBool::new(false));
        for signal in [consts::SIGINT, consts::SIGTERM] {
            // What is registered first is done first.
            flag::register_conditional_shutdown(signal, 1, Arc::clone(&told))?;
            flag::register(signal, Arc::clone(&told))?;
        }
        Ok(Self {
            interrupt: signal(SignalKind::interrupt())?,
            terminate: signal(SignalKind::terminate())?,
            hang_up: hang_up_counts().then(|| signal(SignalKind::hangup())).transpose()?,
        })
    }

    /// Waits for the next one.
    pub(super) async fn recv(&mut self) {
        let hang_up = async {
            match &mut self.hang_up {
                Some(signal) => drop(signal.recv().await),
                None => std::future::pending().await,
            }
        };
        tokio::select! {
            _ = self.interrupt.recv() => {}
            _ = self.terminate.recv() => {}
            () = hang_up => {}
        }
    }
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
