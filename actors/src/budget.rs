//! How long an actor may go on with its mailbox while whatever else it has waits.
//!
//! actix works a mailbox off until it is empty, and polls the actor's futures and timers then; and a task that does not return
//! keeps all others of its thread waiting. An actor that is sent messages faster than it handles them would come to neither: a
//! Server with a store that takes a millisecond published nothing for seconds, beside writers without a pause. So it has a
//! budget, as tokio's own tasks do (cooperative scheduling), in time, since one message may be a large batch.

use std::time::Duration;

use actix::fut::wrap_future;
use actix::prelude::*;
use tokio::time::Instant;

/// Longer than a full frame takes to be filled by a store in memory, so that frames are full where all are busy.
const BUDGET: Duration = Duration::from_millis(5);

#[derive(Debug, Default)]
pub(crate) struct Budget {
    /// When the first message was handled since the mailbox was left.
    since: Option<Instant>,
}

impl Budget {
    /// The actor has come to the rest of what it has.
    pub(crate) fn renew(&mut self) {
        self.since = None;
    }

    /// A message is handled. If the budget is spent, then behind it everything else on this thread has a turn.
    pub(crate) fn spend<A: Actor<Context = Context<A>>>(&mut self, ctx: &mut Context<A>) {
        if self.since.get_or_insert_with(Instant::now).elapsed() >= BUDGET {
            self.renew();
            ctx.wait(wrap_future::<_, A>(tokio::task::yield_now()));
        }
    }
}
