//! A server and its followers in one thread: real tables, logs, sessions and walks, joined by queues
//! whose delivery the test chooses.
//!
//! What the actors do is done here in small steps, any of which may be late: a request of a Middleman to
//! the Server, the answer, a step of a Differ, a frame on its way, a hash computed elsewhere.

use std::collections::{BTreeSet, VecDeque};
use std::time::Duration;

use bytes::Bytes;
use imbl::OrdMap;
use tablecast_protocol::client::{self, Output, RootOf};
use tablecast_protocol::diff::{self, Answer, Query, Walk, collect};
use tablecast_protocol::server::{self, Event, Reply, SessionConfig, Transmit};
use tablecast_protocol::wire::{self, HEADER_BYTES};
use tablecast_protocol::{
    AbortReason, Chain, Change, DiffId, Digest, Epoch, FollowerId, Hash, HeartbeatConfig, Key,
    Limits, Log, MemoryStore, Missed, Mutation, Position, Reader, Replica, Revision, Shortened,
    Store, StoreError, Table, ToClient, ToServer, Tree, Value, Way,
};

pub type Map = OrdMap<Key, Value>;

/// Of how many keys that a walk found the entries are held at once.
const PART_KEYS: usize = 3;

/// What a property says when it does not hold.
pub type Checked = Result<(), String>;

/// Most frames on their way to a follower: its socket takes no more.
const ROOM: usize = 6;

#[derive(Clone, Debug)]
pub struct WorldConfig {
    pub followers: usize,
    pub log_bytes: usize,
    pub updated_keys: usize,
    pub repair_bytes: usize,
    pub diffs_at_once: usize,
    pub shorten_changes: usize,
    /// How many keys a diff may delete before somebody says that it is meant.
    pub max_deletes: u64,
    pub mutation: Option<Mutation>,
}

impl Default for WorldConfig {
    fn default() -> Self {
        Self {
            followers: 3,
            log_bytes: 1200,
            updated_keys: 12,
            repair_bytes: 40,
            diffs_at_once: 2,
            shorten_changes: 1000,
            max_deletes: u64::MAX,
            mutation: None,
        }
    }
}

/// One thing that happens. Numbers are taken modulo what there is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Action {
    Write {
        key: u8,
        keys: u8,
        delete: bool,
    },
    Seal,
    /// The Server sets a checkpoint, or has the root at the last one.
    Checkpoint,
    /// The Server takes the next request of this Middleman.
    Serve(u8),
    /// This Middleman takes the next answer of the Server, or step of a Differ.
    Answer(u8),
    /// A Differ of this Middleman works.
    Differ(u8, u8),
    /// The socket has room for a frame.
    Transmit(u8),
    ToServer(u8),
    ToClient(u8),
    /// Something computed elsewhere is there.
    Work(u8),
    Diff(u8),
    Cut(u8),
    Connect(u8),
    Restart,
    /// The server comes back as it was some revisions ago, and does not know it.
    Restore(u8),
    /// Somebody changes a follower's table behind its back, while it is not connected.
    Spoil(u8, u8),
}

/// What has happened, so that a test can show that it does happen.
#[derive(Clone, Copy, Debug, Default)]
pub struct Stats {
    pub diffs: u64,
    pub repaired: u64,
    pub suppressed: u64,
    pub jumps: u64,
    pub aborts: u64,
    /// Diffs that were asked for before a jump.
    pub stale: u64,
    pub overflows: u64,
    pub queued: u64,
    pub cuts: u64,
    /// Roots that were compared from time to time.
    pub verified: u64,
    /// How often each way was taken, by its code.
    pub ways: [u64; 7],
    /// Shortened catch-ups that came to their end, and changes that they brought.
    pub caught_up: u64,
    pub shortened: u64,
    /// Repairs that would have deleted too much.
    pub held: u64,
}

pub struct World {
    config: WorldConfig,
    table: Table,
    store: MemoryStore,
    log: Log,
    epoch: u8,
    /// The table at every revision of this epoch.
    history: Vec<Map>,
    /// The chain at every revision.
    chains: Vec<Chain>,
    /// A checkpoint whose root is being computed.
    hashing: Option<(u64, Tree)>,
    running: Vec<(usize, u64, DiffId)>,
    waiting: VecDeque<(usize, u64, DiffId)>,
    pub followers: Vec<Follower>,
    connections: u64,
    pub stats: Stats,
    /// Why a server's session closed last.
    closed: Option<String>,
    writes: u64,
    /// Frames that servers have sent.
    transmitted: u64,
}

pub struct Follower {
    replica: Replica,
    store: RefusingStore,
    link: Option<Link>,
    /// Where the table stood when the last connection ended.
    position: Option<Position>,
    /// When each key was last written or deleted by a live change or repair of this epoch.
    seen: OrdMap<Key, Revision>,
    wants_diff: bool,
    /// A repair was held: the next diff may delete what it likes.
    allows: bool,
    pub last_diff: Option<(Hash, Hash, client::Counts)>,
}

struct Link {
    id: u64,
    server: server::Session,
    client: client::Session,
    to_server: VecDeque<Bytes>,
    to_client: VecDeque<Bytes>,
    /// From the Middleman to the Server.
    requests: VecDeque<Event>,
    /// From the Server and the Differs to the Middleman.
    replies: VecDeque<Reply>,
    differs: Vec<Differ>,
    work: VecDeque<Work>,
    /// It is caught up one change a key.
    shortened: bool,
    /// Keys of live changes since `SyncStart`, as the follower sees them.
    updated: BTreeSet<Key>,
}

struct Differ {
    diff: DiffId,
    walk: Option<Walk>,
    tree: Tree,
    root: Option<Hash>,
    len: u64,
    full: bool,
    answers: VecDeque<Answer>,
    /// Told to stop: it still works off what it has.
    stopping: bool,
}

enum Work {
    Root(RootOf, Tree),
    Answer(DiffId, Tree, Query),
}

/// A store that refuses some keys while it is told to.
#[derive(Clone, Default)]
pub struct RefusingStore {
    pub inner: MemoryStore,
    pub refused: std::sync::Arc<std::sync::Mutex<BTreeSet<Key>>>,
}

impl Store for RefusingStore {
    fn apply(&mut self, changes: &[Change]) -> Result<(), StoreError> {
        let refused = self.refused.lock().unwrap();
        match changes.iter().find(|change| refused.contains(change.key())) {
            Some(change) => Err(StoreError::new(format!("{:?} is refused", change.key()))),
            None => self.inner.apply(changes),
        }
    }

    fn reader(&self) -> std::sync::Arc<dyn Reader> {
        self.inner.reader()
    }
}

/// The revision of the write that a value is of: it says so itself.
fn written_at(value: &Value) -> Revision {
    let text = std::str::from_utf8(value).unwrap();
    Revision(text.split(' ').next().unwrap().parse().unwrap())
}

fn check(holds: bool, why: impl FnOnce() -> String) -> Checked {
    if holds { Ok(()) } else { Err(why()) }
}

fn contents(store: &impl Store) -> Map {
    store.reader().snapshot().map(Result::unwrap).collect()
}

pub fn key(number: u8) -> Key {
    match number % 24 {
        0 => Key::new(),
        number => Bytes::from(vec![b'k', number]),
    }
}

impl World {
    /// Tables that differ: every follower begins with its own part of the keys.
    pub fn new(config: WorldConfig) -> Self {
        let filled = |follower: u8, number: u8| -> (Key, Value) {
            let stale = (number + follower).is_multiple_of(3);
            (key(number), Bytes::from(format!("0 {}", if stale { follower } else { 0 })))
        };
        let store: MemoryStore = (0..16).map(|number| filled(0, number)).collect();
        let followers = (1..=config.followers as u8).map(|follower| {
            let keys = (follower % 4 * 4)..20;
            let inner: MemoryStore = keys.map(|number| filled(follower, number)).collect();
            let store = RefusingStore { inner, ..RefusingStore::default() };
            Follower {
                replica: Replica::open(store.clone()).unwrap(),
                store,
                link: None,
                position: None,
                seen: OrdMap::new(),
                wants_diff: false,
                allows: false,
                last_diff: None,
            }
        });
        let mut world = Self {
            followers: followers.collect(),
            table: Table::open(store.clone(), Limits::default()).unwrap(),
            log: Log::new(0, Revision::ZERO, Chain::START),
            store,
            config,
            epoch: 0,
            history: Vec::new(),
            chains: Vec::new(),
            hashing: None,
            running: Vec::new(),
            waiting: VecDeque::new(),
            connections: 0,
            stats: Stats::default(),
            closed: None,
            writes: 0,
            transmitted: 0,
        };
        world.ready();
        world
    }

    fn ready(&mut self) {
        self.epoch += 1;
        self.table.ready(Epoch::from_bytes([self.epoch; 16]));
        let at = self.table.position().unwrap();
        self.log = self.new_log(at.revision, at.chain);
        self.history = vec![contents(&self.store)];
        self.chains = vec![at.chain];
    }

    fn new_log(&self, revision: Revision, chain: Chain) -> Log {
        let mut log = Log::new(self.config.log_bytes, revision, chain);
        if let Some(mutation) = self.config.mutation {
            log.mutate(mutation);
        }
        log
    }

    pub fn act(&mut self, action: Action) -> Checked {
        let count = self.followers.len();
        let of = |number: u8| usize::from(number) % count;
        match action {
            Action::Write { key: first, keys, delete } => self.write(first, keys, delete),
            Action::Seal => self.seal(),
            Action::Checkpoint => self.checkpoint(),
            Action::Serve(f) => self.serve(of(f)),
            Action::Answer(f) => self.reply(of(f)),
            Action::Differ(f, which) => self.differ(of(f), which),
            Action::Transmit(f) => self.transmit(of(f)),
            Action::ToServer(f) => self.to_server(of(f))?,
            Action::ToClient(f) => self.to_client(of(f))?,
            Action::Work(f) => self.work(of(f))?,
            Action::Diff(f) => {
                self.followers[of(f)].wants_diff = true;
                self.begin_diff(of(f))?;
            }
            Action::Cut(f) => self.cut(of(f)),
            Action::Connect(f) => self.connect(of(f))?,
            Action::Restart => self.restart(),
            Action::Restore(back) => self.restore(back),
            Action::Spoil(f, number) => self.spoil(of(f), number),
        }
        self.check()
    }

    /// A position is a promise: the table is the server's at that revision.
    fn check(&self) -> Checked {
        for (index, follower) in self.followers.iter().enumerate() {
            let Some(position) = follower.link.as_ref().and_then(|link| link.client.position())
            else {
                continue;
            };
            let expected = &self.history[position.revision.0 as usize];
            let found = contents(&follower.store);
            check(&found == expected, || {
                format!("follower {index} at {position:?} has {found:?}, not {expected:?}")
            })?;
        }
        Ok(())
    }

    fn write(&mut self, first: u8, keys: u8, delete: bool) {
        // Few as a rule, and sometimes more than the follower that is away will want one by one.
        let more = if keys > 215 { 29 } else { keys % 4 };
        let changes: Vec<Change> = (0..=more)
            .map(|number| {
                self.writes += 1;
                let revision = self.table.position().unwrap().revision.0 + u64::from(number) + 1;
                let key = key(first.wrapping_add((number % 6).wrapping_mul(7)));
                if delete && number % 2 == 0 {
                    Change::Delete { key }
                } else {
                    Change::write(key, format!("{revision} {}", self.writes))
                }
            })
            .collect();
        self.table.write(&changes).unwrap();
        for change in changes {
            let chain = self.chains.last().unwrap().fold(&Digest::of(&change));
            self.chains.push(chain);
            let mut map = self.history.last().unwrap().clone();
            match change {
                Change::Write { key, value } => map.insert(key, value),
                Change::Delete { key } => map.remove(&key),
            };
            self.history.push(map);
        }
    }

    fn seal(&mut self) {
        self.table.seal();
        while let Some((chunk, chain)) = self.table.next_chunk() {
            self.log.push(chunk, chain, Duration::ZERO);
        }
    }

    fn checkpoint(&mut self) {
        match self.hashing.take() {
            Some((number, tree)) => self.log.set_root(number, tree.root()),
            None => {
                self.seal();
                let number = self.log.set_checkpoint();
                self.hashing = Some((number, self.table.tree().clone()));
            }
        }
    }

    fn restart(&mut self) {
        self.hashing = None;
        for index in 0..self.followers.len() {
            self.cut(index);
            self.followers[index].seen = OrdMap::new();
        }
        self.table = Table::open(self.store.clone(), Limits::default()).unwrap();
        self.ready();
    }

    /// The same history, cut short; what is written next forks it.
    fn restore(&mut self, back: u8) {
        self.hashing = None;
        for index in 0..self.followers.len() {
            self.cut(index);
            self.followers[index].seen = OrdMap::new();
        }
        let revision = (self.history.len() - 1).saturating_sub(usize::from(back));
        self.history.truncate(revision + 1);
        self.chains.truncate(revision + 1);
        let epoch = self.table.position().unwrap().epoch;
        self.store = self.history[revision].clone().into_iter().collect();
        self.table = Table::open(self.store.clone(), Limits::default()).unwrap();
        let (revision, chain) = (Revision(revision as u64), self.chains[revision]);
        self.table.continue_from(Position { epoch, revision, chain });
        self.log = self.new_log(revision, chain);
    }

    fn spoil(&mut self, index: usize, number: u8) {
        let follower = &mut self.followers[index];
        if follower.link.is_none() {
            let change = match number % 3 {
                0 => Change::delete(key(number)),
                _ => Change::write(key(number), "0 spoilt"),
            };
            // Through its own `write`, as sdiff's demo does: the tree knows.
            let _ = follower.replica.apply(&change);
            follower.position = None;
        }
    }

    // The connection.

    fn connect(&mut self, index: usize) -> Checked {
        if self.followers[index].link.is_some() {
            return Ok(());
        }
        self.connections += 1;
        let heartbeat = HeartbeatConfig::default();
        let config = SessionConfig {
            repair_bytes: self.config.repair_bytes,
            updated_keys: self.config.updated_keys,
            part_keys: PART_KEYS,
            shorten_changes: self.config.shorten_changes,
            missed_bytes: 2 * self.config.repair_bytes,
            ..SessionConfig::default()
        };
        let mut server = server::Session::new(config, FollowerId(self.connections), Duration::ZERO);
        if let Some(mutation) = self.config.mutation {
            server.mutate(mutation);
        }
        let limits = Limits::default();
        let position = self.followers[index].position;
        let mut client = client::Session::new("", limits, heartbeat, position, Duration::ZERO);
        if let Some(mutation) = self.config.mutation {
            client.mutate(mutation);
        }
        self.followers[index].link = Some(Link {
            id: self.connections,
            server,
            client,
            to_server: VecDeque::new(),
            to_client: VecDeque::new(),
            requests: VecDeque::new(),
            replies: VecDeque::new(),
            differs: Vec::new(),
            work: VecDeque::new(),
            shortened: false,
            updated: BTreeSet::new(),
        });
        self.drain_client(index)
    }

    fn cut(&mut self, index: usize) {
        let follower = &mut self.followers[index];
        if let Some(link) = follower.link.take() {
            self.stats.cuts += 1;
            if link.client.stream().is_some() {
                follower.position = link.client.position();
            }
            self.running.retain(|(_, connection, _)| *connection != link.id);
            self.waiting.retain(|(_, connection, _)| *connection != link.id);
            self.admit();
        }
    }

    fn transmit(&mut self, index: usize) {
        let Some(link) = &mut self.followers[index].link else { return };
        if link.to_client.len() < ROOM
            && let Some(transmit) = link.server.poll_transmit(&self.log)
        {
            self.transmitted += 1;
            link.to_client.push_back(match transmit {
                Transmit::Live(frame) => frame,
                Transmit::Message(message) => wire::encode(&message),
                Transmit::Joined(joined) => joined.frame(),
                Transmit::Part(part) => wire::encode(&part.message(&Limits::default())),
            });
        }
        self.drain_server(index);
    }

    fn to_server(&mut self, index: usize) -> Checked {
        let Some(link) = &mut self.followers[index].link else { return Ok(()) };
        if let Some(frame) = link.to_server.pop_front() {
            let message: ToServer =
                wire::decode(&frame[HEADER_BYTES..], &Limits::default()).unwrap();
            link.server.handle_message(message, Duration::ZERO);
        }
        self.drain_server(index);
        let link = self.followers[index].link.as_ref();
        check(link.is_none_or(|link| link.server.state() != "Closed"), || {
            format!("the server closes the connection of follower {index}: {:?}", self.closed)
        })
    }

    fn to_client(&mut self, index: usize) -> Checked {
        let Some(link) = &mut self.followers[index].link else { return Ok(()) };
        if let Some(frame) = link.to_client.pop_front() {
            let message: ToClient =
                wire::decode(&frame[HEADER_BYTES..], &Limits::default()).unwrap();
            if let ToClient::SyncStart { .. } = message {
                link.updated.clear();
            }
            link.client.handle_message(message, Duration::ZERO);
        }
        self.drain_client(index)
    }

    // The server's side.

    fn drain_server(&mut self, index: usize) {
        let Some(link) = &mut self.followers[index].link else { return };
        while let Some(event) = link.server.poll_event() {
            match event {
                Event::Walk { diff, tree, root, len, full } => {
                    self.stats.stale += u64::from(root.is_none());
                    link.differs.push(Differ {
                        diff,
                        walk: None,
                        tree,
                        root,
                        len,
                        full,
                        answers: VecDeque::new(),
                        stopping: false,
                    });
                }
                Event::Answer(diff, answer) => {
                    if let Some(differ) = link.differs.iter_mut().find(|d| d.diff == diff) {
                        differ.answers.push_back(answer);
                    }
                }
                Event::Collect { diff, tree, mut rest, most } => {
                    let writes = collect(&tree, &mut rest, most);
                    link.replies.push_back(Reply::Collected(diff, writes, rest));
                }
                Event::Root(revision, tree) => {
                    link.replies.push_back(Reply::Root(revision, tree.root()));
                }
                Event::EndDiff { diff, aborted, served } => {
                    link.differs.iter_mut().filter(|d| d.diff == diff).for_each(|differ| {
                        differ.stopping = true;
                    });
                    match aborted {
                        Some(AbortReason::Updated) => self.stats.overflows += 1,
                        Some(_) => self.stats.aborts += 1,
                        None => {}
                    }
                    // Behind the request for a place, which may not have been read yet.
                    link.requests.push_back(Event::EndDiff { diff, aborted, served });
                }
                Event::FellBehind(_) => self.stats.jumps += 1,
                Event::Shorten(behind, head) => {
                    let missed = Missed::collect(behind, head, |from, chunks| {
                        self.log.keys_from(from, chunks.min(2))
                    });
                    let shortened = missed.as_ref().map(Shortened::of);
                    link.replies.push_back(Reply::Shortened(shortened));
                }
                Event::Verified { .. } => {}
                Event::Close(close) => self.closed = Some(close.to_string()),
                request @ (Event::Subscribe { .. }
                | Event::Admit(_)
                | Event::Snapshot(_)
                | Event::Read { .. }
                | Event::Mark(_)) => link.requests.push_back(request),
            }
        }
    }

    fn serve(&mut self, index: usize) {
        let Some(link) = &mut self.followers[index].link else { return };
        let Some(request) = link.requests.pop_front() else { return };
        let link_id = link.id;
        let reply = match request {
            Event::Subscribe { position, .. } => {
                self.seal();
                let head = self.table.position().unwrap();
                let way = self.log.way(head.epoch, position.as_ref());
                let at = position.filter(|_| way == Way::Resumed).unwrap_or(head);
                Reply::Subscribed(at, way, head)
            }
            Event::Admit(diff) => {
                self.waiting.push_back((index, link.id, diff));
                self.stats.queued += u64::from(self.running.len() >= self.config.diffs_at_once);
                self.admit();
                return;
            }
            Event::EndDiff { diff, .. } => {
                let over = (index, link.id, diff);
                self.log.unmark(FollowerId(link.id), diff);
                self.running.retain(|running| *running != over);
                self.waiting.retain(|waiting| *waiting != over);
                self.admit();
                return;
            }
            Event::Snapshot(diff) => Reply::Snapshot(diff, self.table.tree().clone()),
            Event::Read { diff, found, from, max_bytes } => {
                let values = self.table.read(&found, from, max_bytes);
                self.seal();
                Reply::Values(diff, values)
            }
            Event::Mark(diff) => {
                self.seal();
                self.log.mark(FollowerId(link_id), diff);
                Reply::Mark(diff, self.log.head(), self.table.tree().clone())
            }
            other => unreachable!("{other:?} is no request"),
        };
        if let Some(link) = &mut self.followers[index].link {
            link.replies.push_back(reply);
        }
    }

    fn admit(&mut self) {
        while self.running.len() < self.config.diffs_at_once {
            let Some(next) = self.waiting.pop_front() else { return };
            let (index, connection, diff) = next;
            if let Some(link) = &mut self.followers[index].link
                && link.id == connection
            {
                self.running.push(next);
                link.replies.push_back(Reply::Admitted(diff));
            }
        }
    }

    fn reply(&mut self, index: usize) {
        let Some(link) = &mut self.followers[index].link else { return };
        if let Some(reply) = link.replies.pop_front() {
            link.server.handle_reply(reply);
        }
        self.drain_server(index);
    }

    fn differ(&mut self, index: usize, which: u8) {
        let Some(link) = &mut self.followers[index].link else { return };
        if link.differs.is_empty() {
            return;
        }
        let at = usize::from(which) % link.differs.len();
        let differ = &mut link.differs[at];
        let step = match &mut differ.walk {
            None => {
                let Differ { tree, root, len, full, .. } = differ;
                let (walk, step) = Walk::new(tree.clone(), *root, *len, *full, 60, PART_KEYS);
                differ.walk = Some(walk);
                Some(step)
            }
            Some(walk) => {
                // A stale answer may have reached a Differ through a broken session.
                differ.answers.pop_front().and_then(|answer| walk.handle_answer(&answer).ok())
            }
        };
        match step {
            Some(step) => link.replies.push_back(Reply::Step(differ.diff, step)),
            None if differ.stopping => {
                link.differs.remove(at);
            }
            None => {}
        }
    }

    // The follower's side.

    fn begin_diff(&mut self, index: usize) -> Checked {
        let follower = &mut self.followers[index];
        if let Some(link) = &mut follower.link
            && follower.wants_diff
            && link
                .client
                .handle_diff(
                    follower.replica.tree().clone(),
                    false,
                    if follower.allows { u64::MAX } else { self.config.max_deletes },
                )
                .is_ok()
        {
            follower.wants_diff = false;
            return self.drain_client(index);
        }
        Ok(())
    }

    fn work(&mut self, index: usize) -> Checked {
        let Some(link) = &mut self.followers[index].link else { return Ok(()) };
        match link.work.pop_front() {
            None => {}
            Some(Work::Root(of, tree)) => link.client.handle_root(of, tree.root()),
            Some(Work::Answer(id, tree, query)) => {
                let answer = diff::answer(&tree, &query, 500).map_err(|error| error.to_string())?;
                link.client.handle_answer(id, answer);
            }
        }
        self.drain_client(index)
    }

    fn drain_client(&mut self, index: usize) -> Checked {
        loop {
            let follower = &mut self.followers[index];
            let Some(link) = &mut follower.link else { return Ok(()) };
            let Some(output) = link.client.poll_output() else { break };
            match output {
                Output::Send(message) => link.to_server.push_back(wire::encode(&message)),
                Output::Connected(_, way) => {
                    self.stats.ways[way as usize] += 1;
                    link.shortened = way == Way::Shortened;
                    follower.wants_diff |= !way.resumes();
                }
                Output::FellBehind(_) => follower.wants_diff = true,
                Output::Apply { first, changes } => self.apply(index, first, &changes)?,
                Output::CatchUp { changes, .. } => {
                    self.stats.shortened += changes.len() as u64;
                    self.catch_up(index, &changes)?;
                }
                Output::CaughtUp(_) => self.stats.caught_up += u64::from(link.shortened),
                Output::Repair { diff, changes } => self.repair(index, diff, &changes)?,
                Output::Answer { diff, tree, query, .. } => {
                    link.work.push_back(Work::Answer(diff, tree, query));
                }
                Output::Root(diff, tree) => {
                    link.work.push_back(Work::Root(RootOf::Diff(diff), tree));
                }
                Output::Progress(progress) => {
                    check(progress.done <= progress.total, || format!("{progress:?}"))?;
                }
                Output::Held { deletes, .. } => {
                    check(deletes > self.config.max_deletes, || format!("{deletes} are held"))?;
                    self.stats.held += 1;
                    follower.allows = true;
                    follower.wants_diff = true;
                }
                Output::Snapshot(diff) => {
                    link.client.handle_snapshot(diff, follower.replica.tree().clone());
                }
                Output::Mark(revision) => {
                    let tree = follower.replica.tree().clone();
                    link.work.push_back(Work::Root(RootOf::Mark(revision), tree));
                }
                Output::Checkpoint(number) => {
                    let tree = follower.replica.tree().clone();
                    link.work.push_back(Work::Root(RootOf::Checkpoint(number), tree));
                }
                Output::DiffDone { counts, root, server_root, .. } => {
                    follower.last_diff = Some((root, server_root, counts));
                    self.stats.diffs += 1;
                    let most = if follower.allows { u64::MAX } else { self.config.max_deletes };
                    check(counts.deleted <= most, || format!("{counts:?}, {most} are allowed"))?;
                    follower.allows = false;
                    self.stats.repaired += counts.written + counts.deleted;
                    self.stats.suppressed += counts.suppressed;
                    let refuses = !follower.store.refused.lock().unwrap().is_empty();
                    check(root == server_root || refuses, || {
                        format!("follower {index} differs after a diff: {counts:?}")
                    })?;
                }
                Output::Verified { revision, root, server_root } => {
                    self.stats.verified += 1;
                    check(root == server_root, || {
                        format!("follower {index} has diverged at {revision}")
                    })?;
                }
                Output::DiffAborted { .. } => follower.wants_diff = true,
                Output::Close(close) => {
                    return Err(format!("follower {index} closes: {close}"));
                }
            }
        }
        self.begin_diff(index)
    }

    fn apply(&mut self, index: usize, first: Revision, changes: &[(Change, Digest)]) -> Checked {
        let follower = &mut self.followers[index];
        for (revision, (change, _)) in (first.0..).zip(changes) {
            let now = self.history[revision as usize].get(change.key());
            check(now == change.value(), || {
                format!("follower {index} is sent {change:?} at {revision}, which was {now:?}")
            })?;
            follower.seen.insert(change.key().clone(), Revision(revision));
            follower.link.as_mut().unwrap().updated.insert(change.key().clone());
        }
        for _ in
            follower.replica.apply_all(changes.to_vec()).filter(|(_, refused)| refused.is_some())
        {
            follower.link.as_mut().unwrap().client.handle_refused();
        }
        Ok(())
    }

    /// Changes one a key: none is older than what the follower has seen.
    fn catch_up(&mut self, index: usize, changes: &[(Change, Digest)]) -> Checked {
        let follower = &mut self.followers[index];
        for (change, _) in changes {
            let seen = follower.seen.get(change.key()).copied().unwrap_or_default();
            let brought = change.value().map_or(Revision(u64::MAX), written_at);
            check(brought > seen, || {
                format!("follower {index}: {change:?} takes the key back from {seen}")
            })?;
            if change.value().is_some() {
                follower.seen.insert(change.key().clone(), brought);
            }
        }
        for _ in
            follower.replica.apply_all(changes.to_vec()).filter(|(_, refused)| refused.is_some())
        {
            follower.link.as_mut().unwrap().client.handle_refused();
        }
        Ok(())
    }

    fn repair(&mut self, index: usize, diff: DiffId, changes: &[(Change, Digest)]) -> Checked {
        let follower = &mut self.followers[index];
        let link = follower.link.as_mut().unwrap();
        let here = link.client.stream().unwrap().revision;
        let (mut writes, mut deletes) = (0, 0);
        for (change, _) in changes {
            check(!link.updated.contains(change.key()), || {
                format!("follower {index}: {change:?} is repaired, and was updated mid-diff")
            })?;
            let now = self.history[here.0 as usize].get(change.key());
            check(now == change.value(), || {
                format!("follower {index} at {here}: repaired by {change:?}, which is {now:?}")
            })?;
            if let Some(value) = change.value() {
                let seen = follower.seen.get(change.key()).copied().unwrap_or_default();
                check(written_at(value) >= seen, || {
                    format!("follower {index}: {change:?} takes the key back from {seen}")
                })?;
            }
        }
        for (change, refused) in follower.replica.apply_all(changes.to_vec()) {
            if refused.is_some() {
                *if change.value().is_some() { &mut writes } else { &mut deletes } += 1;
            }
        }
        link.client.handle_repaired(diff, writes, deletes, Duration::ZERO);
        Ok(())
    }

    // The end.

    /// Everything that is on its way arrives.
    pub fn settle(&mut self) -> Checked {
        self.seal();
        for _ in 0..20_000 {
            let before = self.transmitted;
            for index in 0..self.followers.len() {
                let f = index as u8;
                for action in [
                    Action::Connect(f),
                    Action::ToServer(f),
                    Action::Serve(f),
                    Action::Answer(f),
                    Action::Differ(f, 0),
                    Action::Differ(f, 1),
                    Action::Transmit(f),
                    Action::ToClient(f),
                    Action::Work(f),
                ] {
                    self.act(action)?;
                }
            }
            // What a session has yet to say is seen by its being said.
            if before == self.transmitted && self.is_quiet() {
                return Ok(());
            }
        }
        Err(format!("no end after 20,000 rounds: {:?}", self.stats))
    }

    fn is_quiet(&self) -> bool {
        self.followers.iter().all(|follower| {
            !follower.wants_diff
                && follower.link.as_ref().is_some_and(|link| {
                    link.to_client.is_empty()
                        && link.to_server.is_empty()
                        && link.requests.is_empty()
                        && link.replies.is_empty()
                        && link.work.is_empty()
                        && link.client.state() == "Relay"
                        && link.server.state() == "Relay"
                })
        })
    }

    /// One quiet diff for everyone; then all tables are equal.
    pub fn converge(&mut self) -> Checked {
        self.settle()?;
        for index in 0..self.followers.len() {
            self.followers[index].last_diff = None;
            self.act(Action::Diff(index as u8))?;
        }
        self.settle()?;
        let expected = contents(&self.store);
        for (index, follower) in self.followers.iter().enumerate() {
            let found = contents(&follower.store);
            check(found == expected, || {
                format!("after a quiet diff follower {index} has {found:?}, not {expected:?}")
            })?;
            let tree = Tree::build(expected.iter());
            let (root, server_root, _) = follower.last_diff.ok_or("no diff was done")?;
            check(root == tree.root() && server_root == root, || "roots differ".to_owned())?;
        }
        // Everybody is whole now, so everybody compares roots at the next checkpoint.
        let before = self.stats.verified;
        self.hashing = None;
        for _ in 0..2 {
            self.act(Action::Checkpoint)?;
            self.settle()?;
        }
        let verified = self.stats.verified - before;
        check(verified == self.followers.len() as u64, || format!("only {verified} verified"))
    }

    /// Keys that a follower's store refuses from now on.
    pub fn refuse(&self, index: usize, keys: impl IntoIterator<Item = Key>) {
        *self.followers[index].store.refused.lock().unwrap() = keys.into_iter().collect();
    }

    /// The server's store, to change it behind its back.
    pub fn server_store(&self) -> MemoryStore {
        self.store.clone()
    }
}
