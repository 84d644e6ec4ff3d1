//! A progress bar for what takes long, on a stderr that is a terminal.

use std::time::{Duration, Instant};

use indicatif::{ProgressBar, ProgressStyle};

/// What is done sooner shows no bar.
const LONG: Duration = Duration::from_millis(500);

/// How far something is. Its bar goes away with it.
#[derive(Debug)]
pub(super) struct Progress {
    what: &'static str,
    /// How much there is to do, in bytes; `None` counts keys, and nobody knows how many.
    total: Option<u64>,
    done: u64,
    since: Instant,
    bar: Option<ProgressBar>,
}

impl Progress {
    pub(super) fn of_bytes(what: &'static str, total: u64) -> Self {
        Self { what, total: Some(total), done: 0, since: Instant::now(), bar: None }
    }

    pub(super) fn of_keys(what: &'static str) -> Self {
        Self { what, total: None, done: 0, since: Instant::now(), bar: None }
    }

    /// So much more is done.
    pub(super) fn advance(&mut self, by: u64) {
        self.done += by;
        if self.bar.is_none() && self.since.elapsed() > LONG {
            self.bar = Some(bar(self.what, self.total));
        }
        if let Some(bar) = &self.bar {
            bar.set_position(self.done);
        }
    }
}

impl Drop for Progress {
    fn drop(&mut self) {
        if let Some(bar) = &self.bar {
            bar.finish_and_clear();
        }
    }
}

/// Hidden where stderr is no terminal.
fn bar(what: &'static str, total: Option<u64>) -> ProgressBar {
    let (bar, template) = match total {
        Some(total) => (ProgressBar::new(total), "{msg} {wide_bar} {bytes} of {total_bytes}"),
        None => (ProgressBar::new_spinner(), "{spinner} {msg} {human_pos} keys, {per_sec}"),
    };
    if let Ok(style) = ProgressStyle::with_template(template) {
        bar.set_style(style);
    }
    bar.set_message(what);
    bar
}
