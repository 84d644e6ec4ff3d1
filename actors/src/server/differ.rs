//! A Differ: one walk over one snapshot.
//!
//! A Middleman starts it on an arbiter for such work, and gives it the answers of its follower; it
//! says its steps. It ends with the walk, when it is told to, or by a panic; whichever of these
//! comes first, the Middleman hears of it.

use actix::prelude::*;
use tablecast_protocol::diff::{Answer, Step, Walk};
use tablecast_protocol::server::Reply;
use tablecast_protocol::{DiffId, Hash, Tree};

use super::middleman::Middleman;

/// What the follower has at the nodes of the last query.
#[derive(Debug, Message)]
#[rtype(result = "()")]
pub(crate) struct Answered(pub(crate) Answer);

/// Nobody waits for the walk any more.
#[derive(Debug, Message)]
#[rtype(result = "()")]
pub(crate) struct Abandon;

/// What to walk.
#[derive(Debug)]
pub(crate) struct Order {
    pub(crate) diff: DiffId,
    pub(crate) tree: Tree,
    pub(crate) root: Option<Hash>,
    pub(crate) len: u64,
    pub(crate) full: bool,
    pub(crate) max_bytes: usize,
    pub(crate) part_keys: usize,
}

/// The actor.
#[derive(Debug)]
pub struct Differ {
    diff: DiffId,
    middleman: Addr<Middleman>,
    order: Option<Order>,
    walk: Option<Walk>,
    /// The Middleman knows how the walk ended, or does not want to.
    told: bool,
}

impl Differ {
    pub(crate) fn new(order: Order, middleman: Addr<Middleman>) -> Self {
        Self { diff: order.diff, middleman, order: Some(order), walk: None, told: false }
    }

    fn say(&mut self, step: Step, ctx: &mut Context<Self>) {
        if matches!(step, Step::Done(_)) {
            self.told = true;
            ctx.stop();
        }
        self.middleman.do_send(Reply::Step(self.diff, step).into());
    }
}

impl Actor for Differ {
    type Context = Context<Self>;

    fn started(&mut self, ctx: &mut Context<Self>) {
        // Others have been walked meanwhile; and a place is given back by whoever is gone.
        if !self.middleman.connected() {
            ctx.stop();
        } else if let Some(order) = self.order.take() {
            let Order { tree, root, len, full, max_bytes, part_keys, .. } = order;
            let (walk, step) = Walk::new(tree, root, len, full, max_bytes, part_keys);
            self.walk = Some(walk);
            self.say(step, ctx);
        }
    }
}

impl Drop for Differ {
    /// Also after a panic, which ends this actor and nothing else.
    fn drop(&mut self) {
        if !self.told {
            self.middleman.do_send(Reply::WalkFailed(self.diff).into());
        }
    }
}

impl Handler<Answered> for Differ {
    type Result = ();

    fn handle(&mut self, Answered(answer): Answered, ctx: &mut Context<Self>) {
        #[cfg(test)]
        tests::panic_if_told();
        match self.walk.as_mut().map(|walk| walk.handle_answer(&answer)) {
            Some(Ok(step)) => self.say(step, ctx),
            Some(Err(error)) => {
                self.told = true;
                self.middleman.do_send(Reply::BadAnswer(self.diff, error).into());
                ctx.stop();
            }
            None => ctx.stop(),
        }
    }
}

impl Handler<Abandon> for Differ {
    type Result = ();

    fn handle(&mut self, _: Abandon, ctx: &mut Context<Self>) {
        self.told = true;
        ctx.stop();
    }
}

#[cfg(test)]
mod tests {
    use std::cell::Cell;
    use std::time::Duration;

    use tablecast_protocol::{AbortReason, Epoch, Limits, MemoryStore, Replica, Table, Value};

    use super::*;
    use crate::access::memory;
    use crate::client::{self, Client, Event};
    use crate::server::{Endpoint, GetStatus, Ready};
    use crate::{ClientConfig, DiffAborted, DiffOutcome, ServerConfig};

    thread_local! {
        /// The next walk on this thread panics in its middle.
        static PANICS: Cell<bool> = const { Cell::new(false) };
    }

    pub(super) fn panic_if_told() {
        if PANICS.take() {
            // Without the hook's text on stderr.
            std::panic::resume_unwind(Box::new("as told"));
        }
    }

    fn filled(keys: usize) -> MemoryStore {
        (0..keys).map(|key| (format!("{key}").into(), Value::from("value"))).collect()
    }

    #[actix_rt::test]
    async fn a_walk_that_panics_ends_its_diff_and_no_more() {
        let table = Table::open(filled(1000), Limits::default()).unwrap();
        let config = ServerConfig { diffs_at_once: 1, ..ServerConfig::default() };
        let endpoint = Endpoint::start_here(table, config);
        let (listener, access) = memory::pair();
        endpoint.listen(listener);
        let server = endpoint.server();
        server.send(Ready(Epoch::from_bytes([1; 16]))).await.unwrap();
        let (replica, config) = (Replica::open(filled(500)).unwrap(), ClientConfig::default());
        let client = Client::new(replica, access, config).start();
        let mut events = client.send(client::Subscribe).await.unwrap();
        PANICS.set(true);
        client.send(client::Ready).await.unwrap();
        let outcomes = async {
            let mut outcomes = Vec::new();
            while outcomes.len() < 2 {
                if let Event::Diff(outcome) = events.recv().await.unwrap() {
                    outcomes.push(outcome);
                }
            }
            outcomes
        };
        let outcomes = tokio::time::timeout(Duration::from_secs(60), outcomes).await.unwrap();
        let panicked = DiffAborted::Server(AbortReason::Walk);
        assert_eq!(outcomes.first(), Some(&DiffOutcome::Aborted(panicked)));
        // On the same connection, and at the only place for diffs.
        let Some(DiffOutcome::Done(report)) = outcomes.last() else { panic!("{outcomes:?}") };
        assert!(report.equal() && report.written == 500, "{report:?}");
        assert_eq!(client.send(client::GetStatus).await.unwrap().connects, 1);
        let status = server.send(GetStatus).await.unwrap();
        assert_eq!((status.followers, status.diffs_waiting), (1, 0));
    }
}
