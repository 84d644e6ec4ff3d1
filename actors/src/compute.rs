//! Work that takes long, away from the actors.

use std::cell::Cell;

thread_local! {
    static HERE: Cell<bool> = const { Cell::new(false) };
}

/// From now on, what actors of this thread leave to threads for blocking work is done on this one, at once.
///
/// For simulations: when another thread is done with something is the one thing that a seed does not decide.
pub fn compute_here() {
    HERE.set(true);
}

/// What comes of `work`, which is done on a thread that may block; `None` if it panics.
pub(crate) async fn compute<T: Send + 'static>(
    work: impl FnOnce() -> T + Send + 'static,
) -> Option<T> {
    if HERE.get() { Some(work()) } else { actix_rt::task::spawn_blocking(work).await.ok() }
}
