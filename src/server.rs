//! The handle of a server.

use std::net::{SocketAddr, ToSocketAddrs};
use std::sync::Arc;

use actix::Addr;
use tablecast_actors::access::Listener;
use tablecast_actors::access::tcp::TcpListener;
use tablecast_actors::server::{
    self as actors, Applied, Arbiters, Endpoint, GetFollowers, GetStatus, Written,
};
use tablecast_actors::{FollowerStatus, ServerConfig, ServerStatus, protocol};
use tokio::sync::{broadcast, oneshot};

use crate::runtime::Runtime;
use crate::{Change, Epoch, Error, Hash, Key, Position, Reader, Store, Value};

/// How many threads serve connections, and how many walk: on few cores more gain nothing.
const CONNECTION_THREADS: usize = 2;
const DIFFER_THREADS: usize = 1;

/// The canonical table, and the followers that it is kept identical on.
///
/// A handle: clone it and use it from any thread, within an actix System or without one. The
/// actors end with [`Server::stop`], or abruptly with the last handle.
///
/// ```
/// use tablecast::{MemoryStore, Server, ServerConfig};
///
/// # actix_rt::System::new().block_on(async {
/// let server = Server::start(ServerConfig::default(), MemoryStore::new())?;
/// server.write("filled", "before anybody sees it").await?;
/// let address = server.listen("127.0.0.1:0")?;
/// server.ready().await?;
/// let written = server.write("colour", "blue").await?;
/// assert_eq!(written.position().unwrap().revision.0, 1);
/// assert_eq!(server.reader().get(b"colour")?.as_deref(), Some(&b"blue"[..]));
/// server.stop().await;
/// # Ok::<(), tablecast::Error>(())
/// # }).unwrap();
/// ```
#[derive(Clone)]
pub struct Server {
    endpoint: Endpoint,
    reader: Arc<dyn Reader>,
    runtime: Arc<Runtime>,
}

impl Server {
    /// Starts a server of what the store holds. Builds its tree first, in the calling thread: about
    /// half a microsecond a key.
    ///
    /// # Errors
    /// If the store cannot be read, or no thread can be started.
    pub fn start(config: ServerConfig, store: impl Store) -> Result<Self, Error> {
        let table = protocol::Table::open(store, config.session.limits)?;
        let reader = table.reader();
        let runtime = Runtime::start(1 + CONNECTION_THREADS + DIFFER_THREADS, DIFFER_THREADS)?;
        let [server, others @ ..] = runtime.arbiters() else { return Err(Error::Stopped) };
        let (connections, differs) = others.split_at(CONNECTION_THREADS);
        let arbiters = Arbiters {
            server: server.clone(),
            connections: connections.to_vec(),
            differs: differs.to_vec(),
        };
        let endpoint = Endpoint::start(table, config, &arbiters);
        Ok(Self { endpoint, reader, runtime: Arc::new(runtime) })
    }

    /// Listens for followers over TCP; where, with the port that it got. Nobody is accepted before
    /// the server is ready.
    ///
    /// # Errors
    /// If the address cannot be listened at.
    pub fn listen(&self, address: impl ToSocketAddrs) -> Result<SocketAddr, Error> {
        let listener = TcpListener::bind(address)?;
        let address = listener.local_address();
        self.listen_on(listener);
        Ok(address)
    }

    /// Listens for followers on any transport.
    pub fn listen_on(&self, listener: impl Listener) {
        self.endpoint.listen(listener);
    }

    /// Writes a key. Before [`Server::ready`] that fills the table; behind it, every follower is sent
    /// it.
    ///
    /// # Errors
    /// If key or value are too large, or the store refuses.
    pub async fn write(
        &self,
        key: impl Into<Key>,
        value: impl Into<Value>,
    ) -> Result<Written, Error> {
        self.batch(vec![Change::write(key, value)]).await
    }

    /// Deletes a key, which need not be there.
    ///
    /// # Errors
    /// If the key is too large, or the store refuses.
    pub async fn delete(&self, key: impl Into<Key>) -> Result<Written, Error> {
        self.batch(vec![Change::delete(key)]).await
    }

    /// Makes several changes as one unit: all or nothing, with consecutive revisions.
    ///
    /// # Errors
    /// If the batch does not fit one frame or holds something too large, or the store refuses.
    pub async fn batch(&self, changes: Vec<Change>) -> Result<Written, Error> {
        Ok(self.actor().send(actors::Write(changes)).await??)
    }

    /// The table is filled: a history begins, and followers are let in. The second time it does
    /// nothing. Answers where the history stands.
    ///
    /// # Errors
    /// If the server has been stopped, or there is no randomness to name the history by.
    pub async fn ready(&self) -> Result<Position, Error> {
        let mut epoch = [0; 16];
        getrandom::fill(&mut epoch).map_err(Error::Random)?;
        Ok(self.actor().send(actors::Ready(Epoch::from_bytes(epoch))).await?)
    }

    /// The table is filled as it was at this position (of [`Server::ready`], a write, or the status of a server
    /// before this one): the history goes on from there, and its followers are resumed. Whoever says so
    /// knows that the store is that old; a wrong one is noticed only where roots are compared.
    ///
    /// # Errors
    /// If the server has been stopped.
    pub async fn continue_from(&self, position: Position) -> Result<Position, Error> {
        Ok(self.actor().send(actors::ContinueFrom(position)).await?)
    }

    /// Waits until somebody said [`Server::ready`].
    ///
    /// # Errors
    /// If the server is stopped before.
    pub async fn wait_ready(&self) -> Result<Position, Error> {
        self.actor().send(actors::Await).await?.ok_or(Error::Stopped)
    }

    /// How the server is.
    ///
    /// # Errors
    /// If it has been stopped.
    pub async fn status(&self) -> Result<ServerStatus, Error> {
        Ok(self.actor().send(GetStatus).await?)
    }

    /// Who follows, and how far each is.
    ///
    /// # Errors
    /// If the server has been stopped.
    pub async fn followers(&self) -> Result<Vec<FollowerStatus>, Error> {
        Ok(self.actor().send(GetFollowers).await?)
    }

    /// The root of the table, and where it is that; the position is `None` before
    /// [`Server::ready`]. Hashes what changed since the last time, on a thread for such work.
    ///
    /// # Errors
    /// If the server has been stopped.
    pub async fn root(&self) -> Result<(Option<Position>, Hash), Error> {
        let (position, tree) = self.actor().send(actors::Snapshot).await?;
        let (sender, root) = oneshot::channel();
        let arbiter = self.runtime.arbiters().last().ok_or(Error::Stopped)?;
        arbiter.spawn_fn(move || {
            // Nobody waits any more if it fails.
            sender.send(tree.root()).ok();
        });
        Ok((position, root.await.map_err(|_| Error::Stopped)?))
    }

    /// Changes as they are applied from here on. A subscriber that lags by more than
    /// [`ServerConfig::event_capacity`] is told how many it missed.
    ///
    /// # Errors
    /// If the server has been stopped.
    pub async fn changes(&self) -> Result<broadcast::Receiver<Applied>, Error> {
        Ok(self.actor().send(actors::Subscribe).await?)
    }

    /// Reads the table, from any thread, without asking the server.
    pub fn reader(&self) -> &Arc<dyn Reader> {
        &self.reader
    }

    /// The actor, to be sent messages.
    pub fn actor(&self) -> &Addr<actors::Server> {
        self.endpoint.server()
    }

    /// Accepts nobody any more, sends every follower what it lacks (as far as it reads that within
    /// [`ServerConfig::drain_timeout`]) and a farewell, and ends when all connections have. The address is
    /// free then.
    pub async fn stop(self) {
        self.endpoint.close().await;
        // It has stopped before if nobody answers.
        self.actor().send(actors::Stop).await.ok();
    }
}

impl std::fmt::Debug for Server {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Server").field("endpoint", &self.endpoint).finish_non_exhaustive()
    }
}
