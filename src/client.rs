//! The handle of a follower.

use std::sync::Arc;
use std::time::Duration;

use actix::{Actor, Addr};
use tablecast_actors::access::Access;
use tablecast_actors::client::{self as actors, Event};
use tablecast_actors::{ClientConfig, ClientStatus, DiffOutcome, protocol};
use tokio::sync::broadcast;

use crate::runtime::Runtime;
use crate::{Change, Error, Key, Position, Reader, Store, Value};

/// A follower: a table that is kept identical to the server's.
///
/// A handle: clone it and use it from any thread, within an actix System or without one. The
/// actors end with [`Client::stop`], or abruptly with the last handle.
///
/// ```
/// use std::time::Duration;
/// use tablecast::{Client, ClientConfig, MemoryStore, Server, ServerConfig, access::memory};
///
/// # actix_rt::System::new().block_on(async {
/// let (listener, access) = memory::pair();
/// let server = Server::start(ServerConfig::default(), MemoryStore::new())?;
/// server.listen_on(listener);
/// server.ready().await?;
///
/// let client = Client::start(ClientConfig::default(), MemoryStore::new(), access)?;
/// client.ready().await?;
/// let written = server.write("colour", "blue").await?;
/// client.wait_for(written.position().unwrap(), Duration::from_secs(10)).await?;
/// assert_eq!(client.reader().get(b"colour")?.as_deref(), Some(&b"blue"[..]));
/// client.stop().await;
/// server.stop().await;
/// # Ok::<(), tablecast::Error>(())
/// # }).unwrap();
/// ```
#[derive(Clone)]
pub struct Client {
    actor: Addr<actors::Client>,
    reader: Arc<dyn Reader>,
    /// Keeps the threads.
    _runtime: Arc<Runtime>,
}

impl Client {
    /// Starts a follower with what the store holds. Builds its tree first, in the calling thread: about
    /// half a microsecond a key. It connects with [`Client::ready`].
    ///
    /// # Errors
    /// If the store cannot be read, or no thread can be started.
    pub fn start(
        config: ClientConfig,
        store: impl Store,
        access: impl Access,
    ) -> Result<Self, Error> {
        let replica = protocol::Replica::open(store)?;
        let reader = replica.reader();
        let runtime = Runtime::start(2, 0)?;
        let [arbiter, connection] = runtime.arbiters() else { return Err(Error::Stopped) };
        let connection = connection.clone();
        let actor = actors::Client::start_in_arbiter(arbiter, move |_| {
            actors::Client::new(replica, access, config).with_connection_on(connection)
        });
        Ok(Self { actor, reader, _runtime: Arc::new(runtime) })
    }

    /// Writes a key of the follower's own table: to fill it before [`Client::ready`], or to make it differ
    /// in a test. The server does not hear of it; a diff takes it back.
    ///
    /// # Errors
    /// If the store refuses.
    pub async fn write(&self, key: impl Into<Key>, value: impl Into<Value>) -> Result<(), Error> {
        Ok(self.actor.send(actors::Apply(Change::write(key, value))).await??)
    }

    /// Deletes a key of the follower's own table; see [`Client::write`].
    ///
    /// # Errors
    /// If the store refuses.
    pub async fn delete(&self, key: impl Into<Key>) -> Result<(), Error> {
        Ok(self.actor.send(actors::Apply(Change::delete(key))).await??)
    }

    /// The store holds the table as it was at this position, which an earlier [`Client::stop`] answered: it is
    /// presented to the server, and if that still has what came since, there is no diff. Before
    /// [`Client::ready`]; of no effect once the table has been changed here. A position that is not the
    /// store's is noticed when roots are compared.
    ///
    /// # Errors
    /// If the follower has been stopped.
    pub async fn continue_from(&self, position: Position) -> Result<(), Error> {
        Ok(self.actor.send(actors::ContinueFrom(position)).await?)
    }

    /// Connects, and stays connected. A diff follows, unless the server still has all that was missed.
    ///
    /// # Errors
    /// If the follower has been stopped.
    pub async fn ready(&self) -> Result<(), Error> {
        Ok(self.actor.send(actors::Ready).await?)
    }

    /// Compares the table with the server's, repairs it, and says what was found. Live changes go on
    /// meanwhile. Diffs also happen by themselves whenever something may be missing; their reports
    /// are events.
    ///
    /// # Errors
    /// If a diff is under way already, or there is no connection.
    pub async fn diff(&self) -> Result<DiffOutcome, Error> {
        Ok(self.actor.send(actors::Diff).await??)
    }

    /// The repair that is held ([`Event::Held`]) is meant: a diff begins, and deletes whatever it finds. One
    /// that follows is held again.
    ///
    /// # Errors
    /// If the follower has been stopped, or is not connected: the next server may be another one.
    pub async fn allow_mass_delete(&self) -> Result<(), Error> {
        Ok(self.actor.send(actors::AllowMassDelete).await??)
    }

    /// Waits until the table holds every change up to a position, such as that of a write: then whoever
    /// wrote reads it here, or something newer. Answers where the table stands then.
    ///
    /// # Errors
    /// If that takes longer than `timeout`, the follower goes over to another history, or connects to a server whose history has
    /// gone on from before where this table stands, this write's perhaps among what it has: wait again. A follower that has no position
    /// when it connects, or one that the server's log has no more, cannot notice the latter.
    pub async fn wait_for(&self, at: Position, timeout: Duration) -> Result<Position, Error> {
        let Position { epoch, revision, .. } = at;
        Ok(self.actor.send(actors::WaitFor { epoch, revision, timeout }).await??)
    }

    /// Waits until nothing is known to be missing: the table has been equal to the server's since the
    /// connect at hand. Answers where it stands then.
    ///
    /// # Errors
    /// If that takes longer than `timeout`.
    pub async fn wait_ready(&self, timeout: Duration) -> Result<Position, Error> {
        Ok(self.actor.send(actors::WaitReady(timeout)).await??)
    }

    /// How the follower is.
    ///
    /// # Errors
    /// If it has been stopped.
    pub async fn status(&self) -> Result<ClientStatus, Error> {
        Ok(self.actor.send(actors::GetStatus).await?)
    }

    /// What happens from here on: connections, changes, diffs. A subscriber that lags by more than
    /// [`ClientConfig::event_capacity`] is told how many it missed.
    ///
    /// # Errors
    /// If the follower has been stopped.
    pub async fn events(&self) -> Result<broadcast::Receiver<Event>, Error> {
        Ok(self.actor.send(actors::Subscribe).await?)
    }

    /// Reads the table, from any thread, without asking the follower.
    pub fn reader(&self) -> &Arc<dyn Reader> {
        &self.reader
    }

    /// The actor, to be sent messages.
    pub fn actor(&self) -> &Addr<actors::Client> {
        &self.actor
    }

    /// Says farewell to the server and ends. Answers when the server has heard it, or a second later at the latest, where the
    /// table stands, for [`Client::continue_from`]; `None` if something may be missing.
    pub async fn stop(self) -> Option<Position> {
        // It has stopped before if nobody answers.
        self.actor.send(actors::Stop).await.ok().flatten()
    }
}

impl std::fmt::Debug for Client {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Client").field("actor", &self.actor).finish_non_exhaustive()
    }
}
