//! How long an actor may go on with its mailbox while everything else on its thread waits.
//!
//! actix works a mailbox off until it is empty, and polls the actor's futures and timers then; and a task that does not return
//! keeps all others of its thread waiting. An actor that is sent messages faster than it handles them would come to neither: a
//! Server with a store that takes a millisecond published nothing for seconds, beside writers without a pause. So it has a
//! budget, as tokio's own tasks do (cooperative scheduling), in time, since one message may be a large batch.
//!
//! Where a budget is spent, actix polls one of the actor's futures, and not always another one. So an actor with a budget has one
//! at the most, and what it waits for beside comes through its mailbox, in its turn: [`later`], [`every`], [`computed`].

use std::time::Duration;

use actix::fut::wrap_future;
use actix::prelude::*;
use tokio::task::JoinHandle;
use tokio::time::Instant;

/// Longer than a full frame takes to be filled by a store in memory, so that frames are full where all are busy.
const BUDGET: Duration = Duration::from_millis(5);

#[derive(Debug, Default)]
pub(crate) struct Budget {
    /// When the first message was handled since it was renewed, or spent.
    since: Option<Instant>,
}

impl Budget {
    /// The mailbox is empty.
    pub(crate) fn renew(&mut self) {
        self.since = None;
    }

    /// A message is handled. If the budget is spent, then behind it everything else on this thread has a turn.
    pub(crate) fn spend<A: Actor<Context = Context<A>>>(&mut self, ctx: &mut Context<A>) {
        if self.since.get_or_insert_with(Instant::now).elapsed() >= BUDGET {
            self.since = None;
            ctx.wait(wrap_future::<_, A>(tokio::task::yield_now()));
        }
    }
}

/// A message that is to be sent; not, once this is dropped. Then it may be in the mailbox, though.
#[derive(Debug)]
pub(crate) struct Later(JoinHandle<()>);

impl Drop for Later {
    fn drop(&mut self) {
        self.0.abort();
    }
}

/// Sends a message after a while.
#[must_use]
pub(crate) fn later<A, M>(wait: Duration, message: M, ctx: &Context<A>) -> Later
where
    A: Actor<Context = Context<A>> + Handler<M>,
    M: Message<Result = ()> + Send + 'static,
{
    let actor = ctx.address().downgrade();
    Later(actix_rt::spawn(async move {
        tokio::time::sleep(wait).await;
        if let Some(actor) = actor.upgrade() {
            actor.do_send(message);
        }
    }))
}

/// Sends a message from time to time, as long as the actor is there.
pub(crate) fn every<A, M>(period: Duration, message: M, ctx: &Context<A>)
where
    A: Actor<Context = Context<A>> + Handler<M>,
    M: Message<Result = ()> + Clone + Send + 'static,
{
    let actor = ctx.address().downgrade();
    actix_rt::spawn(async move {
        loop {
            // Any period will do: a sum of times may be more than a clock holds.
            tokio::time::sleep(period).await;
            let Some(actor) = actor.upgrade() else { return };
            actor.do_send(message.clone());
        }
    });
}

/// Sends what comes of a future, as a message.
pub(crate) fn computed<A, M, F>(
    work: F,
    message: impl FnOnce(F::Output) -> M + 'static,
    ctx: &Context<A>,
) where
    A: Actor<Context = Context<A>> + Handler<M>,
    M: Message<Result = ()> + Send + 'static,
    F: Future + 'static,
{
    let actor = ctx.address();
    actix_rt::spawn(async move { actor.do_send(message(work.await)) });
}
