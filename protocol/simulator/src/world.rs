//! The server and its followers, and everything between them. Each step is small, and may be late.
//!
//! What the actors do around the pure core is done here in the same order: requests of a Middleman to the
//! Server, its answers, steps of Differs, frames on their way, hashes computed elsewhere.

use std::collections::{BTreeSet, VecDeque};
use std::sync::atomic::Ordering::Relaxed;
use std::time::Duration;

use tablecast_protocol::client::{self, RootOf};
use tablecast_protocol::diff::{Answer, Query, Walk, collect};
use tablecast_protocol::server::{self, Event, Reply, SessionConfig, Transmit};
use tablecast_protocol::wire::Changes;
use tablecast_protocol::{
    AbortReason, Chain, Change, DiffId, Epoch, FollowerId, Hash, HeartbeatConfig, Limits, Log,
    Missed, Position, Reason, Replica, Revision, SMALL_FRAME_BYTES, Shortened, Store, Table,
    ToClient, ToServer, Tree, Way,
};

use crate::choices::Choices;
use crate::fault::Fault;
use crate::history::{Cells, History, Id, KEYS, key, value};
use crate::pipe::{Frame, Pipe};
use crate::store::FaultyStore;
use crate::{Checked, Config, Totals, check};

/// Most messages in any of the queues between a Middleman and its neighbours.
const MAX_QUEUE: usize = 24;

/// Most that is on its way to a server: an end asks again only when it was answered.
const MAX_TO_SERVER: usize = 24;

/// Most repairs that are sent and not acknowledged.
const REPAIR_WINDOW: u32 = 2;

/// What can be done for a connection, a bit each.
pub(crate) mod kind {
    pub(crate) const SERVE: u8 = 1;
    pub(crate) const REPLY: u8 = 2;
    pub(crate) const DIFFER: u8 = 4;
    pub(crate) const TRANSMIT: u8 = 8;
    pub(crate) const TO_SERVER: u8 = 16;
    pub(crate) const TO_CLIENT: u8 = 32;
    pub(crate) const WORK: u8 = 64;
    pub(crate) const CLOSE: u8 = 128;
}

pub(crate) struct World<'a> {
    pub(crate) config: Config,
    pub(crate) rng: Choices<'a>,
    pub(crate) totals: &'a mut Totals,
    /// What has been done, if somebody wants to know.
    pub(crate) trace: Option<Vec<String>>,
    pub(crate) now: Duration,
    pub(crate) steps: u64,
    pub(crate) delivered: u64,
    pub(crate) table: Table,
    pub(crate) store: FaultyStore,
    pub(crate) log: Log,
    /// What the log's frames say, with the revision of the last change of each.
    live: Vec<(Revision, ToClient)>,
    /// What was written since the last of them.
    unsealed: Vec<Change>,
    pub(crate) epoch: u8,
    /// All that there were; the server continues the last.
    pub(crate) histories: Vec<History>,
    /// The table at its head.
    pub(crate) cells: Cells,
    writes: Id,
    /// Keys whose value in the server's store is not what the tree says.
    pub(crate) flipped: u64,
    /// The same, of all times.
    pub(crate) ever_flipped: u64,
    /// A checkpoint whose root is being computed.
    pub(crate) hashing: Option<(u64, Tree)>,
    running: Vec<(u64, DiffId)>,
    waiting: VecDeque<(u64, DiffId)>,
    pub(crate) followers: Vec<Follower>,
    pub(crate) connections: Vec<Connection>,
    last_connection: u64,
    /// Something has happened to others than the connection of the last step.
    pub(crate) any_changed: bool,
    /// Nothing goes wrong any more: nobody may wait in vain for an end that is there.
    pub(crate) quiet: bool,
    /// What goes wrong next, while a shortened catch-up runs.
    pub(crate) next_fault: Option<Fault>,
    /// Roots that were compared from time to time.
    pub(crate) verified: u64,
}

pub(crate) struct Follower {
    pub(crate) replica: Replica,
    pub(crate) store: FaultyStore,
    /// What the store holds.
    pub(crate) cells: Cells,
    /// Of which history it saw something last.
    pub(crate) history: usize,
    /// When each key was last changed by a live change or a repair of this history.
    pub(crate) seen: [u64; KEYS],
    /// Keys that are not as they were at the server where the stream stands.
    pub(crate) wrong: u64,
    /// Keys that may be wrong without the protocol being to blame: changed by somebody else.
    pub(crate) excused: u64,
    /// Keys that may be wrong because the store refused them: the session knows, and has no position.
    pub(crate) refused: u64,
    /// Keys that were changed behind its back, and of which its tree does not know.
    pub(crate) hidden: u64,
    pub(crate) strangers: BTreeSet<tablecast_protocol::Key>,
    /// Where the table stood when the last connection ended.
    pub(crate) position: Option<Position>,
    /// The table was changed beside the server since the last diff began.
    pub(crate) changed: bool,
    /// A diff runs: whether it was changed before that, and whether it is one at full width.
    pub(crate) running: Option<(bool, bool)>,
    /// A diff is due; `true` at full width.
    pub(crate) due: Option<bool>,
    /// A diff is asked for again then; `true` at full width.
    pub(crate) retry: Option<(Duration, bool)>,
    /// The next diff may delete what it likes.
    pub(crate) allows: bool,
    /// The connection at hand.
    pub(crate) link: Option<u64>,
    /// The table and its position at some earlier time.
    pub(crate) saved: Option<(Cells, Position)>,
    /// The position is older than the table.
    pub(crate) stale: bool,
    /// Its store refuses something until this step.
    pub(crate) refuses_until: u64,
    pub(crate) works: Works,
    /// What was wrong at the last mark of a diff, of which the tree does not know, and at the last one from time to time.
    pub(crate) at_mark: u64,
    pub(crate) hidden_at_mark: u64,
    pub(crate) at_checkpoint: u64,
}

pub(crate) struct Connection {
    pub(crate) id: u64,
    pub(crate) follower: usize,
    pub(crate) history: usize,
    pub(crate) server: Option<ServerEnd>,
    pub(crate) client: Option<ClientEnd>,
    pub(crate) to_server: Pipe<ToServer>,
    pub(crate) to_client: Pipe<ToClient>,
    /// A bit has flipped: nothing that either end says is to be relied on.
    pub(crate) tainted: bool,
    /// Most frames on their way to the follower.
    pub(crate) room: usize,
    /// Kinds of steps that can be done, as of the last look.
    pub(crate) ready: u8,
    /// Kinds of steps that wait, and until when.
    pub(crate) held: u8,
    pub(crate) held_until: u64,
}

pub(crate) struct ServerEnd {
    pub(crate) session: server::Session,
    /// There was nothing to send.
    pub(crate) dry: bool,
    /// The last diff that was asked for.
    diff: DiffId,
    /// Repairs on their way, and acknowledgements.
    unacknowledged: u32,
    /// From the Middleman to the Server.
    pub(crate) requests: VecDeque<Event>,
    /// From the Server and the Differs to the Middleman.
    pub(crate) replies: VecDeque<Reply>,
    /// The same, computed elsewhere: each is there when it is there.
    computed: Vec<Reply>,
    pub(crate) differs: Vec<Differ>,
}

pub(crate) struct ClientEnd {
    pub(crate) session: client::Session,
    /// Keys of live changes since `SyncStart`, as the follower sees them.
    pub(crate) updated: u64,
}

pub(crate) struct Differ {
    pub(crate) diff: DiffId,
    walk: Option<Walk>,
    tree: Tree,
    root: Option<Hash>,
    len: u64,
    full: bool,
    answers: VecDeque<Answer>,
    /// Told to stop: it still works off what it has.
    stopping: bool,
}

impl Differ {
    fn has_work(&self) -> bool {
        self.walk.is_none() || !self.answers.is_empty() || self.stopping
    }
}

pub(crate) enum Work {
    Root(RootOf, Tree),
    Answer(DiffId, Tree, Query),
    Scrub(u64, Tree, Box<dyn Iterator<Item = Scrubbed> + Send>),
}

impl Work {
    fn kind(&self) -> usize {
        match self {
            Self::Root(RootOf::Diff(_), _) => 0,
            Self::Root(RootOf::Mark(_), _) => 1,
            Self::Root(RootOf::Checkpoint(_), _) | Self::Scrub(..) => 2,
            Self::Answer(..) => 3,
        }
    }
}

/// What a follower computes elsewhere, for which connection. Of each kind one goes on, whoever waits for it, and then
/// comes the newest of those behind it.
#[derive(Default)]
pub(crate) struct Works {
    running: [Option<(u64, Work)>; 4],
    next: [Option<(u64, Work)>; 4],
}

impl Works {
    pub(crate) fn add(&mut self, connection: u64, work: Work) {
        let kind = work.kind();
        let place = if self.running[kind].is_some() { &mut self.next } else { &mut self.running };
        place[kind] = Some((connection, work));
    }

    /// Nobody waits for what has not begun.
    pub(crate) fn forget(&mut self) {
        self.next = Default::default();
    }

    pub(crate) fn is_empty(&self) -> bool {
        self.running.iter().all(Option::is_none)
    }

    /// One that is done.
    pub(crate) fn take(&mut self, rng: &mut fastrand::Rng) -> Option<(u64, Work)> {
        let running = self.running.iter().filter(|work| work.is_some()).count();
        let nth = if running > 1 { rng.usize(..running) } else { 0 };
        let mut kinds = (0..4).filter(|kind| self.running[*kind].is_some());
        let kind = kinds.nth(nth)?;
        std::mem::replace(&mut self.running[kind], self.next[kind].take())
    }
}

type Scrubbed =
    Result<(tablecast_protocol::Key, tablecast_protocol::Value), tablecast_protocol::StoreError>;

/// A store that holds these cells.
pub(crate) fn filled(cells: &Cells) -> FaultyStore {
    let entries = cells.iter().enumerate().filter(|(_, id)| **id != 0);
    let inner = entries.map(|(number, id)| (key(number), value(*id))).collect();
    FaultyStore { inner, ..FaultyStore::default() }
}

impl<'a> World<'a> {
    /// Tables that differ: every follower begins with its own part of the keys.
    pub(crate) fn new(config: Config, rng: Choices<'a>, totals: &'a mut Totals) -> Self {
        let keys = config.keys;
        let mut cells = [0; KEYS];
        (0..keys * 2 / 3).for_each(|key| cells[key] = key as Id + 1);
        let mut writes = keys as Id + 1;
        let store = filled(&cells);
        let followers = (0..config.followers).map(|follower| {
            let mut cells = [0; KEYS];
            let own = cells.iter_mut().enumerate().take(keys * 5 / 6).skip(follower * keys / 6);
            for (key, cell) in own {
                let stale = (key + follower) % 3 == 0;
                writes += 1;
                *cell = if stale { writes } else { key as Id + 1 };
            }
            Follower::new(cells)
        });
        let followers = followers.collect();
        let mut world = Self {
            table: Table::open(store.clone(), Limits::default()).unwrap(),
            log: Log::new(0, Revision::ZERO, Chain::START),
            live: Vec::new(),
            unsealed: Vec::new(),
            rng,
            totals,
            trace: None,
            now: Duration::ZERO,
            steps: 0,
            delivered: 0,
            store,
            epoch: 0,
            histories: Vec::new(),
            cells,
            writes,
            flipped: 0,
            ever_flipped: 0,
            hashing: None,
            running: Vec::new(),
            waiting: VecDeque::new(),
            followers,
            connections: Vec::new(),
            last_connection: 0,
            any_changed: true,
            quiet: false,
            next_fault: None,
            verified: 0,
            config,
        };
        world.ready();
        world
    }

    /// The server begins a new history with what is in its store.
    fn ready(&mut self) {
        self.epoch += 1;
        let epoch = Epoch::from_bytes([self.epoch; 16]);
        self.table.ready(epoch);
        let at = self.table.position().unwrap();
        self.begin_log(at.revision, at.chain);
        self.histories.push(History::new(epoch, &self.cells[..self.config.keys]));
    }

    fn begin_log(&mut self, head: Revision, chain: Chain) {
        self.log = Log::new(self.config.log_bytes, head, chain);
        self.live.clear();
        self.unsealed.clear();
        #[cfg(feature = "mutations")]
        if let Some(mutation) = self.config.mutation {
            self.log.mutate(mutation);
        }
    }

    pub(crate) fn history(&mut self) -> &mut History {
        self.histories.last_mut().unwrap()
    }

    pub(crate) fn fault(&mut self, fault: Fault) {
        self.totals.faults[fault as usize] += 1;
        self.note(|| format!("! {fault:?}"));
    }

    pub(crate) fn note(&mut self, what: impl FnOnce() -> String) {
        if let Some(trace) = &mut self.trace {
            let line = format!("{:6} {}", self.steps, what());
            trace.push(line);
        }
    }

    // The server's table.

    /// A batch of changes that begins at this key. Answers whether the store took it.
    pub(crate) fn write(&mut self, changed: &[(usize, bool)]) -> bool {
        let before = self.writes;
        let batch: Vec<(usize, Id, Change)> = changed
            .iter()
            .map(|(number, delete)| {
                if *delete {
                    return (*number, 0, Change::Delete { key: key(*number) });
                }
                self.writes += 1;
                let id = self.writes;
                (*number, id, Change::Write { key: key(*number), value: value(id) })
            })
            .collect();
        let changes: Vec<Change> = batch.iter().map(|(.., change)| change.clone()).collect();
        if self.table.write(&changes).is_err() {
            self.writes = before;
            return false;
        }
        let history = self.histories.last_mut().unwrap();
        for (number, id, _) in batch {
            history.push(number, id);
            self.cells[number] = id;
            self.flipped &= !(1 << number);
        }
        history.end(self.table.position().unwrap().chain);
        self.unsealed.extend(changes);
        true
    }

    pub(crate) fn seal(&mut self) {
        self.table.seal();
        while let Some((chunk, chain)) = self.table.next_chunk() {
            let (first, before) = (chunk.first, chunk.before.tag());
            let changes = Changes(std::mem::take(&mut self.unsealed));
            let last = Revision(chunk.end().0 - 1);
            self.live.push((last, ToClient::Live { first, before, changes }));
            self.log.push(chunk, chain, self.now);
            self.wake();
        }
    }

    fn wake(&mut self) {
        self.any_changed = true;
        for server in self.connections.iter_mut().filter_map(|link| link.server.as_mut()) {
            server.dry = false;
        }
    }

    pub(crate) fn checkpoint(&mut self) {
        match self.hashing.take() {
            Some((number, tree)) => self.log.set_root(number, tree.root()),
            None => {
                self.seal();
                let number = self.log.set_checkpoint();
                self.hashing = Some((number, hashed(self.table.tree())));
            }
        }
        self.wake();
    }

    /// The server comes back. `late`: what it said last still arrives.
    pub(crate) fn restart(&mut self, fault: Fault, late: bool) {
        self.flipped = 0;
        self.hashing = None;
        for at in 0..self.connections.len() {
            if self.connections[at].server.is_some() {
                self.drop_server(at, true);
                if !late {
                    self.connections[at].to_client.frames.clear();
                }
            }
        }
        let head = self.history().head();
        if fault == Fault::ServerContinued || fault == Fault::ServerRestored {
            let back = if fault == Fault::ServerRestored { self.rng.u64(0..20) } else { 0 };
            let (revision, chain) = self.history().last_end(head.saturating_sub(back));
            if fault == Fault::ServerRestored {
                let older = self.history().until(revision);
                self.cells = older.cells(revision);
                self.histories.push(older);
            }
            let epoch = self.history().epoch;
            self.store = filled(&self.cells);
            self.table = Table::open(self.store.clone(), Limits::default()).unwrap();
            let revision = Revision(revision);
            self.table.continue_from(Position { epoch, revision, chain });
            self.begin_log(revision, chain);
        } else {
            if fault == Fault::ServerEmptied {
                self.cells = [0; KEYS];
            }
            self.store = filled(&self.cells);
            self.table = Table::open(self.store.clone(), Limits::default()).unwrap();
            self.ready();
        }
    }

    // Connections.

    /// Where the connection of this number is now.
    pub(crate) fn place(&self, id: u64) -> Option<usize> {
        self.connections.iter().position(|link| link.id == id)
    }

    pub(crate) fn connect(&mut self, follower: usize) -> Checked {
        if self.followers[follower].link.is_some() {
            return Ok(());
        }
        let old = |link: &Connection| link.follower == follower && link.server.is_some();
        if self.connections.iter().any(old) {
            self.fault(Fault::DuplicateConnection);
        }
        // What was begun for the last one may be done before this one begins.
        if self.rng.bool() {
            self.work(follower)?;
        }
        self.last_connection += 1;
        let id = self.last_connection;
        let heartbeat = HeartbeatConfig::default();
        let config = SessionConfig {
            repair_bytes: self.config.repair_bytes,
            updated_keys: self.config.updated_keys,
            part_keys: self.config.part_keys,
            shorten_changes: self.config.shorten_changes,
            missed_bytes: 2 * self.config.repair_bytes,
            repair_window: REPAIR_WINDOW,
            ..SessionConfig::default()
        };
        let server = server::Session::new(config, FollowerId(id), self.now);
        let position = self.followers[follower].position;
        let client = client::Session::new("", Limits::default(), heartbeat, position, self.now);
        #[cfg(feature = "mutations")]
        let (server, client) = {
            let (mut server, mut client) = (server, client);
            if let Some(mutation) = self.config.mutation {
                server.mutate(mutation);
                client.mutate(mutation);
            }
            (server, client)
        };
        self.followers[follower].link = Some(id);
        self.connections.push(Connection {
            id,
            follower,
            history: self.histories.len() - 1,
            server: Some(ServerEnd {
                session: server,
                dry: true,
                diff: DiffId(0),
                unacknowledged: 0,
                requests: VecDeque::new(),
                replies: VecDeque::new(),
                computed: Vec::new(),
                differs: Vec::new(),
            }),
            client: Some(ClientEnd { session: client, updated: 0 }),
            to_server: Pipe::new(),
            to_client: Pipe::new(),
            tainted: false,
            room: self.config.room,
            ready: 0,
            held: 0,
            held_until: 0,
        });
        self.note(|| format!("follower {follower} connects as {id} with {position:?}"));
        self.drain_client(self.connections.len() - 1)
    }

    /// The server's end is gone; the other one is told or not.
    pub(crate) fn drop_server(&mut self, at: usize, told: bool) {
        let link = &mut self.connections[at];
        if link.server.take().is_none() {
            return;
        }
        link.to_server.frames.clear();
        link.to_client.ended = told;
        let id = link.id;
        self.end_diffs(|connection, _| connection == id);
    }

    /// The follower's end is gone; the other one is told or not.
    pub(crate) fn drop_client(&mut self, at: usize, told: bool) {
        self.unlink(at);
        let link = &mut self.connections[at];
        link.client = None;
        link.to_client.frames.clear();
        link.to_server.ended = told;
    }

    /// Forgets connections of which nothing is left.
    pub(crate) fn reap(&mut self) {
        self.connections.retain(|link| link.server.is_some() || link.client.is_some());
    }

    pub(crate) fn act(&mut self, at: usize, kind: u8) -> Checked {
        if self.trace.is_some() {
            let id = self.connections[at].id;
            let name = match kind {
                kind::SERVE => "serve",
                kind::REPLY => "reply",
                kind::DIFFER => "differ",
                kind::TRANSMIT => "transmit",
                kind::TO_SERVER => "to server",
                kind::TO_CLIENT => "to client",
                kind::WORK => "work",
                _ => "close",
            };
            self.note(|| format!("{id}: {name}"));
        }
        match kind {
            kind::SERVE => self.serve(at),
            kind::REPLY => self.reply(at),
            kind::DIFFER => self.differ(at),
            kind::TRANSMIT => self.transmit(at),
            kind::TO_SERVER => self.hear_client(at),
            kind::TO_CLIENT => self.hear_server(at),
            kind::WORK => self.work(self.connections[at].follower),
            _ => {
                let closed = |client: &ClientEnd| client.session.state() == "Closed";
                if self.connections[at].client.as_ref().is_some_and(closed) {
                    self.drop_client(at, true);
                } else {
                    self.drop_server(at, true);
                }
                Ok(())
            }
        }?;
        self.check(at)
    }

    /// What holds after every step.
    pub(crate) fn check(&self, at: usize) -> Checked {
        let link = &self.connections[at];
        let follower = &self.followers[link.follower];
        if let Some(server) = &link.server {
            let queued = server.requests.len().max(server.replies.len() + server.computed.len());
            check(queued <= MAX_QUEUE && server.differs.len() <= MAX_QUEUE, || {
                format!("{queued} messages wait, and {} Differs", server.differs.len())
            })?;
            let repairs = server.unacknowledged;
            check(repairs <= REPAIR_WINDOW, || format!("{repairs} repairs are on their way"))?;
        }
        check(link.to_server.frames.len() <= MAX_TO_SERVER, || "too much for the server".into())?;
        if follower.link == Some(link.id)
            && let Some(client) = &link.client
            && follower.wrong & !follower.excused != 0
            && !link.tainted
            && let Some(position) = client.session.position()
        {
            // A position is a promise: the table is the server's at that revision.
            let wrong = follower.wrong & !follower.excused;
            return Err(format!("follower {} is not at {position:?}: {wrong:b}", link.follower));
        }
        Ok(())
    }

    // The server's side of a connection.

    fn transmit(&mut self, at: usize) -> Checked {
        let link = &mut self.connections[at];
        let Some(server) = &mut link.server else { return Ok(()) };
        let sent = server.session.poll_transmit(&self.log);
        server.dry = sent.is_none();
        let over = sent.is_none() && server.session.state() == "Closed";
        if let Some(transmit) = sent {
            let as_bytes = self.config.as_bytes;
            let pipe = &mut link.to_client;
            match transmit {
                Transmit::Live(frame) if as_bytes => pipe.frames.push_back(Frame::Bytes(frame)),
                Transmit::Live(_) => {
                    let sent = server.session.sent();
                    let at = self.live.partition_point(|(end, _)| *end < sent);
                    pipe.send(self.live[at].1.clone(), false);
                }
                Transmit::Message(message) => {
                    server.unacknowledged += u32::from(matches!(message, ToClient::Repair { .. }));
                    pipe.send(message, as_bytes);
                }
                Transmit::Joined(joined) => pipe.frames.push_back(Frame::Bytes(joined.frame())),
                Transmit::Part(part) => pipe.send(part.message(&Limits::default()), as_bytes),
            }
        }
        self.drain_server(at)?;
        if over {
            self.drop_server(at, true);
        }
        Ok(())
    }

    fn hear_client(&mut self, at: usize) -> Checked {
        let now = self.now;
        let link = &mut self.connections[at];
        let Some(server) = &mut link.server else { return Ok(()) };
        match link.to_server.next(server.session.max_frame_bytes()) {
            Ok(Some(message)) => {
                self.delivered += 1;
                if !link.tainted {
                    self.totals.server.count(server.session.state(), message.tag());
                }
                match &message {
                    ToServer::RepairAck { .. } => {
                        server.unacknowledged = server.unacknowledged.saturating_sub(1);
                    }
                    ToServer::SyncResponse { diff, .. }
                        if *diff == server.diff && server.session.phase() == Some("Walk") =>
                    {
                        let most = server.session.max_frame_bytes();
                        check(link.tainted || most > SMALL_FRAME_BYTES, || {
                            format!("an answer of more than {most} bytes would not be read")
                        })?;
                    }
                    _ => {}
                }
                server.session.handle_message(message, now);
            }
            Ok(None) if link.to_server.ended => self.drop_server(at, true),
            Ok(None) => server.session.handle_part(now),
            Err(error) if link.tainted => server.session.handle_malformed(&error),
            Err(error) => return Err(format!("the server cannot read: {error}")),
        }
        self.drain_server(at)
    }

    pub(crate) fn drain_server(&mut self, at: usize) -> Checked {
        loop {
            let link = &mut self.connections[at];
            let Some(server) = &mut link.server else { return Ok(()) };
            let Some(event) = server.session.poll_event() else { return Ok(()) };
            server.dry = false;
            match event {
                Event::Walk { diff, tree, root, len, full } => server.differs.push(Differ {
                    diff,
                    walk: None,
                    tree,
                    root,
                    len,
                    full,
                    answers: VecDeque::new(),
                    stopping: false,
                }),
                Event::Answer(diff, answer) => {
                    if let Some(differ) = server.differs.iter_mut().find(|d| d.diff == diff) {
                        differ.answers.push_back(answer);
                    }
                }
                Event::Collect { diff, tree, mut rest, most } => {
                    let lost = self.config.allows(Fault::LostDiffer) && self.rng.u8(..) < 8;
                    let reply = if lost {
                        Reply::WalkFailed(diff)
                    } else {
                        let writes = collect(&tree, &mut rest, most);
                        Reply::Collected(diff, writes, rest)
                    };
                    server.computed.push(reply);
                    if lost {
                        self.fault(Fault::LostDiffer);
                    }
                }
                Event::Root(revision, tree) => {
                    server.computed.push(Reply::Root(revision, tree.root()));
                }
                Event::EndDiff { diff, aborted, served } => {
                    let hangs = self.quiet && aborted == Some(AbortReason::Stalled);
                    check(!hangs || link.client.is_none(), || {
                        format!("{diff:?} of connection {} hangs", link.id)
                    })?;
                    server.differs.iter_mut().filter(|d| d.diff == diff).for_each(|differ| {
                        differ.stopping = true;
                    });
                    // Behind the request for a place, which may not have been read yet.
                    server.requests.push_back(Event::EndDiff { diff, aborted, served });
                    match aborted {
                        Some(AbortReason::Updated) => self.fault(Fault::UpdatedOverflow),
                        Some(AbortReason::Stalled) => self.fault(Fault::DiffStalled),
                        Some(_) | None => {}
                    }
                }
                Event::FellBehind(_) => self.fault(Fault::FellBehind),
                Event::Shorten(behind, head) => {
                    let missed = Missed::collect(behind, head, |from, chunks| {
                        self.log.keys_from(from, chunks.min(2))
                    });
                    let shortened = missed.as_ref().map(Shortened::of);
                    server.computed.push(Reply::Shortened(shortened));
                }
                Event::Verified { .. } => {}
                Event::Close(close) => self.server_closes(at, &close)?,
                request @ (Event::Subscribe { .. }
                | Event::Admit(_)
                | Event::Snapshot(_)
                | Event::Read { .. }
                | Event::Mark(_)) => server.requests.push_back(request),
            }
        }
    }

    fn server_closes(&mut self, at: usize, close: &server::Close) -> Checked {
        let (quiet, link) = (self.quiet, &mut self.connections[at]);
        let id = link.id;
        let tainted = link.tainted;
        let there = link.client.is_some();
        // The Middleman is told that it ends, and asks nothing any more.
        if let Some(server) = &mut link.server {
            server.requests.clear();
            server.replies.clear();
            server.computed.clear();
            server.differs.clear();
            let waits = server.session.way().is_none();
            if let server::Close::Here { reason: Reason::Silent, .. } = close {
                self.fault(if waits { Fault::HelloTimeout } else { Fault::Silence });
            }
        }
        self.end_diffs(|connection, _| connection == id);
        self.note(|| format!("{id}: the server closes: {close}"));
        let (server::Close::Peer { reason, .. } | server::Close::Here { reason, .. }) = close;
        let here = matches!(close, server::Close::Here { reason: Reason::Silent, .. });
        let hangs = quiet && there && here;
        check(tainted || *reason != Reason::Protocol && !hangs, || {
            format!("the server closes connection {id}: {close}")
        })
    }

    fn serve(&mut self, at: usize) -> Checked {
        let link = &mut self.connections[at];
        let Some(server) = &mut link.server else { return Ok(()) };
        let Some(request) = server.requests.pop_front() else { return Ok(()) };
        let id = link.id;
        let reply = match request {
            Event::Subscribe { position, .. } => {
                self.seal();
                let head = self.table.position().unwrap();
                let way = self.log.way(head.epoch, position.as_ref());
                let at = position.filter(|_| way == Way::Resumed).unwrap_or(head);
                if self.config.allows(Fault::RefusedConnection) && self.rng.u8(..) < 16 {
                    self.fault(Fault::RefusedConnection);
                    Reply::Close(Reason::Full, String::new())
                } else {
                    Reply::Subscribed(at, way, head)
                }
            }
            Event::Admit(diff) if self.waiting.len() >= self.config.diffs_waiting => {
                self.fault(Fault::Busy);
                Reply::Busy(diff)
            }
            Event::Admit(diff) => {
                server.diff = diff;
                self.waiting.push_back((id, diff));
                self.admit();
                return Ok(());
            }
            Event::EndDiff { diff, .. } => {
                self.end_diffs(|connection, running| (connection, running) == (id, diff));
                return Ok(());
            }
            Event::Snapshot(diff) => Reply::Snapshot(diff, hashed(self.table.tree())),
            Event::Read { diff, found, from, max_bytes } => {
                let values = self.table.read(&found, from, max_bytes);
                self.seal();
                Reply::Values(diff, values)
            }
            Event::Mark(diff) => {
                self.seal();
                self.log.mark(FollowerId(id), diff);
                self.wake();
                Reply::Mark(diff, self.log.head(), hashed(self.table.tree()))
            }
            other => unreachable!("{other:?} is no request"),
        };
        if let Some(server) = &mut self.connections[at].server {
            server.replies.push_back(reply);
        }
        Ok(())
    }

    fn admit(&mut self) {
        while self.running.len() < self.config.diffs_at_once {
            let Some((id, diff)) = self.waiting.pop_front() else { return };
            if let Some(at) = self.place(id)
                && let Some(server) = &mut self.connections[at].server
            {
                server.replies.push_back(Reply::Admitted(diff));
                self.running.push((id, diff));
                self.any_changed = true;
            }
        }
    }

    /// Others want the place of a diff that has had it for long.
    pub(crate) fn end_turn(&mut self) {
        let Some(last) = self.running.len().checked_sub(1) else { return };
        let (id, diff) = self.running[self.rng.usize(..=last)];
        if let Some(at) = self.place(id)
            && let Some(server) = &mut self.connections[at].server
        {
            server.replies.push_back(Reply::Busy(diff));
            self.fault(Fault::TurnEnded);
        }
    }

    fn end_diffs(&mut self, over: impl Fn(u64, DiffId) -> bool) {
        for (id, diff) in self.running.extract_if(.., |(id, diff)| over(*id, *diff)) {
            self.log.unmark(FollowerId(id), diff);
        }
        self.waiting.retain(|(id, diff)| !over(*id, *diff));
        self.admit();
    }

    fn reply(&mut self, at: usize) -> Checked {
        let link = &mut self.connections[at];
        let Some(server) = &mut link.server else { return Ok(()) };
        let waiting = server.computed.len();
        let reply = if waiting > 0 && (server.replies.is_empty() || self.rng.bool()) {
            server.computed.swap_remove(if waiting > 1 { self.rng.usize(..waiting) } else { 0 })
        } else {
            let Some(reply) = server.replies.pop_front() else { return Ok(()) };
            reply
        };
        let session = &mut server.session;
        server.dry = false;
        let stale = matches!(&reply, Reply::Step(diff, _) if *diff != server.diff)
            && session.phase().is_some();
        session.handle_reply(reply);
        if stale {
            self.fault(Fault::StaleDiffer);
        }
        self.drain_server(at)
    }

    fn differ(&mut self, at: usize) -> Checked {
        let Config { query_bytes, part_keys, .. } = self.config;
        let link = &mut self.connections[at];
        let Some(server) = &mut link.server else { return Ok(()) };
        let begin = self.rng.usize(0..server.differs.len());
        let order = (begin..server.differs.len()).chain(0..begin);
        let Some(which) = order.into_iter().find(|at| server.differs[*at].has_work()) else {
            return Ok(());
        };
        let differ = &mut server.differs[which];
        let lost = self.config.allows(Fault::LostDiffer) && self.rng.u8(..) < 8;
        let reply = match &mut differ.walk {
            None => {
                let Differ { tree, root, len, full, .. } = differ;
                let (walk, step) =
                    Walk::new(tree.clone(), *root, *len, *full, query_bytes, part_keys);
                differ.walk = Some(walk);
                Some(Reply::Step(differ.diff, step))
            }
            Some(walk) => differ.answers.pop_front().map(|answer| {
                walk.handle_answer(&answer).map_or_else(
                    |error| Reply::BadAnswer(differ.diff, error),
                    |step| Reply::Step(differ.diff, step),
                )
            }),
        };
        let diff = differ.diff;
        match reply {
            Some(_) if lost => {
                server.differs.remove(which);
                server.replies.push_back(Reply::WalkFailed(diff));
                self.fault(Fault::LostDiffer);
            }
            Some(reply) => server.replies.push_back(reply),
            None => drop(server.differs.remove(which)),
        }
        Ok(())
    }

    // Time.

    /// The clock moves on: both ends of all connections look at it.
    pub(crate) fn pass(&mut self, time: Duration) -> Checked {
        self.now += time;
        let now = self.now;
        for follower in &mut self.followers {
            if let Some((_, full)) = follower.retry.take_if(|(at, _)| *at <= now) {
                follower.want_diff(full);
            }
        }
        for at in 0..self.connections.len() {
            let due = |timeout: Option<Duration>| timeout.is_some_and(|timeout| timeout <= now);
            if let Some(server) = &mut self.connections[at].server
                && due(server.session.poll_timeout())
            {
                server.session.handle_timeout(now);
                server.dry = false;
                self.drain_server(at)?;
            }
            if let Some(client) = &mut self.connections[at].client
                && due(client.session.poll_timeout())
            {
                client.session.handle_timeout(now);
            }
            self.drain_client(at)?;
        }
        Ok(())
    }

    /// When somebody looks at the clock next.
    pub(crate) fn next_timeout(&self) -> Option<Duration> {
        let ends = self.connections.iter().flat_map(|link| {
            let server = link.server.as_ref().and_then(|end| end.session.poll_timeout());
            [server, link.client.as_ref().and_then(|end| end.session.poll_timeout())]
        });
        let retries = self.followers.iter().filter_map(|follower| Some(follower.retry?.0));
        ends.flatten().chain(retries).min()
    }

    /// Flips a bit of a stored value of the server.
    pub(crate) fn flip_server(&mut self, number: usize) -> bool {
        if self.cells[number] == 0 || self.flipped >> number & 1 == 1 {
            return false;
        }
        let flipped = flip(&value(self.cells[number]), self.rng.usize(..));
        self.store.inner.apply(&[Change::write(key(number), flipped)]).unwrap();
        self.flipped |= 1 << number;
        self.ever_flipped |= 1 << number;
        true
    }

    /// A batch that the server's store refuses: nothing has changed then.
    pub(crate) fn refuse_write(&mut self, changed: &[(usize, bool)]) -> Checked {
        let before = (self.table.position(), self.table.tree().root());
        self.store.refused.store(1 << changed.last().map_or(0, |(key, _)| *key), Relaxed);
        let taken = self.write(changed);
        self.store.refused.store(0, Relaxed);
        let after = (self.table.position(), self.table.tree().root());
        check(!taken && before == after, || "a refused batch has changed something".to_owned())
    }

    /// What can be done for a connection now, were none of it held.
    pub(crate) fn ready_for(&self, link: &Connection) -> u8 {
        let follower = &self.followers[link.follower];
        let mut ready = 0;
        let mut allow = |kind: u8, when: bool| ready |= if when { kind } else { 0 };
        if let Some(server) = &link.server {
            allow(kind::SERVE, !server.requests.is_empty());
            allow(kind::REPLY, !server.replies.is_empty() || !server.computed.is_empty());
            allow(kind::DIFFER, server.differs.iter().any(Differ::has_work));
            allow(kind::TRANSMIT, !server.dry && link.to_client.frames.len() < link.room);
            let reads = link.to_server.is_readable() && server.session.wants_input();
            allow(kind::TO_SERVER, reads);
            // Nobody reads its last words: they have their time, and no more.
            let full = link.to_client.frames.len() >= link.room;
            allow(kind::CLOSE, full && server.session.state() == "Closed");
        }
        if let Some(client) = &link.client {
            allow(kind::TO_CLIENT, link.to_client.is_readable());
            allow(kind::WORK, follower.link == Some(link.id) && !follower.works.is_empty());
            allow(kind::CLOSE, client.session.state() == "Closed");
        }
        ready
    }
}

/// A snapshot of a tree whose root somebody will ask for. It is computed before, so that the next snapshot has it,
/// too, if nothing has changed: most tables are one leaf here, which is hashed as a whole.
pub(crate) fn hashed(tree: &Tree) -> Tree {
    tree.root();
    tree.clone()
}

/// The same bytes but for one bit.
pub(crate) fn flip(bytes: &[u8], bit: usize) -> bytes::Bytes {
    let mut flipped = bytes.to_vec();
    let bit = bit % (8 * flipped.len());
    flipped[bit / 8] ^= 1 << (bit % 8);
    flipped.into()
}
