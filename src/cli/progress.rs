//! Progress bars for what takes long, on a stderr that is a terminal.

use std::time::Duration;

use indicatif::{ProgressBar, ProgressStyle};
use tokio::sync::broadcast;
use tokio::sync::broadcast::error::RecvError;
use tokio::time::Instant;

use crate::DiffPhase;

/// What is done sooner shows no bar.
const LONG: Duration = Duration::from_millis(500);

/// How often a bar moves that waits.
const TICK: Duration = Duration::from_millis(200);

/// How far something is, in bytes. Its bar goes away with it.
#[derive(Debug)]
pub(super) struct Progress {
    what: &'static str,
    total: u64,
    done: u64,
    since: Instant,
    bar: Option<ProgressBar>,
}

impl Progress {
    pub(super) fn of_bytes(what: &'static str, total: u64) -> Self {
        Self { what, total, done: 0, since: Instant::now(), bar: None }
    }

    /// So much more is done.
    pub(super) fn advance(&mut self, by: u64) {
        self.done += by;
        if self.bar.is_none() && self.since.elapsed() > LONG {
            let bar = ProgressBar::new(self.total).with_message(self.what);
            style(&bar, "{msg} {wide_bar} {bytes} of {total_bytes}");
            self.bar = Some(bar);
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

/// How far a diff is. Its bar goes away with the diff.
#[derive(Debug, Default)]
pub(super) struct DiffBar(Option<Shown>);

#[derive(Debug)]
struct Shown {
    since: Instant,
    progress: crate::Progress,
    bar: Option<ProgressBar>,
}

impl DiffBar {
    /// A diff is here now.
    pub(super) fn set(&mut self, progress: crate::Progress) {
        let Some(shown) = &mut self.0 else {
            self.0 = Some(Shown { since: Instant::now(), progress, bar: None });
            return;
        };
        let changed = shown.progress.phase != progress.phase;
        shown.progress = progress;
        if let Some(bar) = &shown.bar {
            draw(bar, progress, changed);
        }
    }

    /// When the diff has taken so long that a bar is due; never, if one is there or there is no diff.
    async fn due(&self) {
        match &self.0 {
            Some(Shown { since, bar: None, .. }) => tokio::time::sleep_until(*since + LONG).await,
            Some(_) | None => std::future::pending().await,
        }
    }

    /// The next event; shows the bar if it is due before that.
    pub(super) async fn next<T: Clone>(
        &mut self,
        events: &mut broadcast::Receiver<T>,
    ) -> Result<T, RecvError> {
        loop {
            tokio::select! {
                event = events.recv() => return event,
                () = self.due() => self.show(),
            }
        }
    }

    fn show(&mut self) {
        if let Some(shown) = &mut self.0 {
            let bar = ProgressBar::new(0);
            bar.enable_steady_tick(TICK);
            draw(&bar, shown.progress, true);
            shown.bar = Some(bar);
        }
    }

    /// There is no diff any more.
    pub(super) fn clear(&mut self) {
        if let Some(bar) = self.0.take().and_then(|shown| shown.bar) {
            bar.finish_and_clear();
        }
    }
}

impl Drop for DiffBar {
    fn drop(&mut self) {
        self.clear();
    }
}

fn draw(bar: &ProgressBar, progress: crate::Progress, changed: bool) {
    let repairs = progress.phase == DiffPhase::Repair;
    if changed && repairs {
        style(bar, "{msg} {wide_bar} {human_pos} of {human_len} keys");
    } else if changed {
        style(bar, "{spinner} {msg}");
    }
    bar.set_length(progress.total);
    bar.set_position(progress.done);
    bar.set_message(match progress.phase {
        DiffPhase::Queued => "waiting for a place at the server".to_owned(),
        DiffPhase::Walk => format!("looking for differences, round {}", progress.rounds),
        DiffPhase::Repair => "repairing".to_owned(),
        DiffPhase::Compare => "comparing roots".to_owned(),
    });
}

/// Hidden where stderr is no terminal.
fn style(bar: &ProgressBar, template: &str) {
    if let Ok(style) = ProgressStyle::with_template(template) {
        bar.set_style(style);
    }
}
