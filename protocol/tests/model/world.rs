//! A server and its followers as one value that can be cloned, compared and hashed: the real sessions, log,
//! tables and walks, joined by queues. What the actors do is done here in the smallest steps of which
//! another one may come between.

use std::collections::{BTreeMap, BTreeSet, VecDeque};
use std::sync::Arc;
use std::time::Duration;

use bytes::Bytes;
use tablecast_protocol::client::{self, Output, RootOf};
use tablecast_protocol::diff::{self, Answer, Query, Step, Walk, collect};
use tablecast_protocol::server::{self, Event, Reply, SessionConfig, Transmit};
use tablecast_protocol::wire::{self, HEADER_BYTES, Message};
use tablecast_protocol::{
    Chain, Change, DiffId, Digest, Epoch, FollowerId, Hash, HeartbeatConfig, Key, Limits, Log,
    MemoryStore, Missed, Mutation, Position, Replica, Revision, Shortened, Store, Table, ToClient,
    ToServer, Tree, Value, Way,
};

pub type Map = BTreeMap<Key, Value>;

/// Nothing here depends on time.
const NOW: Duration = Duration::ZERO;

/// The smallest answer that holds both keys.
const ANSWER_BYTES: usize = 500;

/// Most frames on their way to a follower.
const ROOM: usize = 2;

/// A storm is one more change than a catch-up of which it is worth to leave out some.
const STORM: u64 = 16;

/// What may happen at most, and how things are set.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub struct Bounds {
    pub followers: Vec<Start>,
    pub writes: u8,
    /// Batches of many changes of one key.
    pub storms: u8,
    /// Diffs beside those that a connection, a jump or an abort asks for.
    pub diffs: u8,
    pub cuts: u8,
    /// New histories.
    pub restarts: u8,
    /// The last change is lost at the server.
    pub restores: u8,
    pub checkpoints: u8,
    /// 1 is a log of one frame, so that a stream that stands still while two are written jumps.
    pub log_bytes: usize,
    /// 1 is a reading for every key.
    pub repair_bytes: usize,
    /// Most repairs that are not acknowledged.
    pub repair_window: u32,
    pub updated_keys: usize,
    /// Of how many keys that a walk found the entries are held at once.
    pub part_keys: usize,
    /// To repair what a live change brought is wrong though it do no harm.
    pub again: bool,
    /// Frames to the follower arrive at once, and what it computes elsewhere is there at once.
    pub rush: bool,
}

impl Default for Bounds {
    fn default() -> Self {
        Self {
            followers: vec![Start::Stale],
            writes: 1,
            storms: 0,
            diffs: 0,
            cuts: 0,
            restarts: 0,
            restores: 0,
            checkpoints: 0,
            log_bytes: 1 << 20,
            repair_bytes: 1 << 10,
            repair_window: 2,
            updated_keys: 100,
            part_keys: 100,
            again: true,
            rush: true,
        }
    }
}

/// How a follower begins.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Start {
    /// It has one key too many, and lacks one.
    Stale,
    /// It knows that it has what the server has.
    Equal,
}

/// One step. The number is that of a follower.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Action {
    Write(u8),
    Delete(u8),
    Storm,
    /// A mark for all, and the root there.
    Checkpoint,
    Root,
    Restart,
    Restore,
    Connect(usize),
    Cut(usize),
    /// Somebody asks for a diff.
    Want(usize),
    /// The follower takes a snapshot, and its diff begins.
    Diff(usize),
    /// A frame arrives at the server.
    ToServer(usize),
    /// The server takes the next request of this connection.
    Serve(usize),
    /// Its answer arrives there.
    Reply(usize),
    /// The Differ of this diff has made its next step.
    Differ(usize, DiffId),
    /// The socket has room.
    Transmit(usize),
    /// A frame arrives at the follower.
    ToClient(usize),
    /// Something computed elsewhere is there.
    Work(usize),
}

/// What must never be.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub enum Wrong {
    /// A follower has an older value after a newer one.
    Older(String),
    /// What a live change brought since `SyncStart` is repaired.
    Again(String),
    /// A follower's table is not the server's at the follower's position.
    Promise(String),
    /// All is quiet, and a follower has not what the server has, or does not know it.
    Unequal(String),
    /// One end takes the other for broken, or roots differ.
    Closed(String),
}

#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub struct World {
    bounds: Arc<Bounds>,
    mutation: Option<Mutation>,
    /// What may still happen.
    left: Left,
    server: Arc<Server>,
    followers: Vec<Arc<Follower>>,
    pub wrong: Option<Wrong>,
}

#[derive(Clone, Debug, PartialEq, Eq, Hash)]
struct Left {
    writes: u8,
    storms: u8,
    diffs: u8,
    cuts: u8,
    restarts: u8,
    restores: u8,
    checkpoints: u8,
}

#[derive(Clone, Debug, PartialEq, Eq, Hash)]
struct Server {
    epoch: u8,
    /// The table at every revision of this history, and the chain there.
    history: Vec<(Map, Chain)>,
    log: Log,
    /// A checkpoint whose root is being computed.
    hashing: Option<(u64, Hash)>,
    /// One diff runs at a time.
    running: Option<(usize, DiffId)>,
    waiting: VecDeque<(usize, DiffId)>,
    connections: u64,
}

#[derive(Clone, Debug, PartialEq, Eq, Hash)]
struct Follower {
    map: Map,
    /// Where the table stood when the last connection ended.
    position: Option<Position>,
    /// When each key that was brought in this history was written or deleted.
    seen: BTreeMap<Key, Revision>,
    /// Keys of live changes since `SyncStart`.
    updated: BTreeSet<Key>,
    wants_diff: bool,
    link: Option<Link>,
}

#[derive(Clone, Debug, PartialEq, Eq, Hash)]
struct Link {
    id: FollowerId,
    server: server::Session,
    client: client::Session,
    to_server: VecDeque<ToServer>,
    to_client: VecDeque<ToClient>,
    /// From the Middleman to the Server, and back.
    requests: VecDeque<Event>,
    replies: VecDeque<Reply>,
    differs: Vec<Differ>,
    work: VecDeque<Work>,
}

#[derive(Clone, Debug, PartialEq, Eq, Hash)]
struct Differ {
    diff: DiffId,
    walk: Option<Walk>,
    /// Of the walk that has not begun, or the answer that has not been looked at.
    input: Option<Input>,
}

#[derive(Clone, Debug, PartialEq, Eq, Hash)]
enum Input {
    Begin { tree: Tree, root: Option<Hash>, len: u64, full: bool },
    Answer(Answer),
}

#[derive(Clone, Debug, PartialEq, Eq, Hash)]
enum Work {
    Root(RootOf, Tree),
    Answer(DiffId, Tree, Query),
}

fn key(number: u8) -> Key {
    Bytes::copy_from_slice(&[b'a' + number])
}

/// A value says of which revision it is.
fn value(revision: Revision) -> Value {
    revision.0.to_string().into()
}

fn written_at(value: &Value) -> Revision {
    Revision(std::str::from_utf8(value).unwrap().parse().unwrap())
}

fn store(map: &Map) -> MemoryStore {
    map.clone().into_iter().collect()
}

fn contents(store: &impl Store) -> Map {
    store.reader().snapshot().map(Result::unwrap).collect()
}

impl Server {
    fn new(bounds: &Bounds, epoch: u8, map: Map) -> Self {
        Self {
            epoch,
            history: vec![(map, Chain::START)],
            log: Log::new(bounds.log_bytes, Revision::ZERO, Chain::START),
            hashing: None,
            running: None,
            waiting: VecDeque::new(),
            connections: 0,
        }
    }

    fn now(&self) -> &Map {
        &self.history.last().unwrap().0
    }

    fn position(&self) -> Position {
        let epoch = Epoch::from_bytes([self.epoch; 16]);
        let (_, chain) = self.history.last().unwrap();
        Position { epoch, revision: Revision(self.history.len() as u64 - 1), chain: *chain }
    }

    /// The real table is made anew whenever it is needed: all of it is what it holds, and where it stands,
    /// as every write is sealed in the turn in which it comes.
    fn table(&self) -> (Table, MemoryStore) {
        let store = store(self.now());
        let mut table = Table::open(store.clone(), Limits::default()).unwrap();
        table.continue_from(self.position());
        (table, store)
    }

    fn write(&mut self, changes: &[Change]) {
        let (mut table, _) = self.table();
        table.write(changes).unwrap();
        table.seal();
        let (chunk, chain) = table.next_chunk().unwrap();
        self.log.push(chunk, chain, NOW);
        for change in changes {
            let (mut map, chain) = self.history.last().unwrap().clone();
            match change {
                Change::Write { key, value } => map.insert(key.clone(), value.clone()),
                Change::Delete { key } => map.remove(key),
            };
            self.history.push((map, chain.fold(&Digest::of(change))));
        }
        assert_eq!(table.position(), Some(self.position()));
    }
}

impl World {
    /// The server has `a`; a stale follower lacks it, and has `b`.
    pub fn new(bounds: &Bounds, mutation: Option<Mutation>) -> Self {
        let map = Map::from([(key(0), value(Revision::ZERO))]);
        let mut server = Server::new(bounds, 1, map);
        if let Some(mutation) = mutation {
            server.log.mutate(mutation);
        }
        let followers = bounds.followers.iter().map(|start| {
            let equal = *start == Start::Equal;
            Arc::new(Follower {
                map: match start {
                    Start::Equal => server.now().clone(),
                    Start::Stale => Map::from([(key(1), value(Revision::ZERO))]),
                },
                position: equal.then(|| server.position()),
                seen: BTreeMap::new(),
                updated: BTreeSet::new(),
                wants_diff: false,
                link: None,
            })
        });
        Self {
            left: Left {
                writes: bounds.writes,
                storms: bounds.storms,
                diffs: bounds.diffs,
                cuts: bounds.cuts,
                restarts: bounds.restarts,
                restores: bounds.restores,
                checkpoints: bounds.checkpoints,
            },
            bounds: Arc::new(bounds.clone()),
            mutation,
            followers: followers.collect(),
            server: Arc::new(server),
            wrong: None,
        }
    }

    /// What may happen now.
    pub fn actions(&self, actions: &mut Vec<Action>) {
        if self.wrong.is_some() {
            return;
        }
        let left = &self.left;
        if left.writes > 0 {
            actions.extend([0, 1].map(Action::Write));
            let there =
                [0, 1].into_iter().filter(|number| self.server.now().contains_key(&key(*number)));
            actions.extend(there.map(Action::Delete));
        }
        let mut also = |holds: bool, action| actions.extend(holds.then_some(action));
        also(left.storms > 0, Action::Storm);
        also(left.restarts > 0, Action::Restart);
        also(left.restores > 0 && self.server.history.len() > 1, Action::Restore);
        also(left.checkpoints > 0 && self.server.hashing.is_none(), Action::Checkpoint);
        also(self.server.hashing.is_some(), Action::Root);
        for (f, follower) in self.followers.iter().enumerate() {
            if follower.link.is_none() {
                also(true, Action::Connect(f));
                continue;
            }
            also(left.cuts > 0, Action::Cut(f));
            also(left.diffs > 0 && !follower.wants_diff, Action::Want(f));
        }
        for f in 0..self.followers.len() {
            self.moves(f, actions);
        }
    }

    /// What happens by itself.
    fn moves(&self, f: usize, actions: &mut Vec<Action>) {
        let follower = &self.followers[f];
        let Some(link) = &follower.link else { return };
        let mut also = |holds: bool, action| actions.extend(holds.then_some(action));
        also(follower.can_diff(), Action::Diff(f));
        also(!link.to_server.is_empty(), Action::ToServer(f));
        also(!link.requests.is_empty(), Action::Serve(f));
        also(!link.replies.is_empty(), Action::Reply(f));
        for differ in link.differs.iter().filter(|differ| differ.input.is_some()) {
            also(true, Action::Differ(f, differ.diff));
        }
        also(!link.to_client.is_empty(), Action::ToClient(f));
        also(!link.work.is_empty(), Action::Work(f));
        also(link.to_client.len() < ROOM && self.sends(link), Action::Transmit(f));
    }

    /// Whether a session that is asked for a frame has one, or something to do instead.
    fn sends(&self, link: &Link) -> bool {
        let mut session = link.server.clone();
        session.poll_transmit(&self.server.log).is_some() || session.poll_event().is_some()
    }

    /// What becomes of it.
    pub fn after(&self, action: Action) -> Self {
        let mut next = self.clone();
        next.wrong = next.act(action).and_then(|()| next.check()).err();
        next
    }

    fn act(&mut self, action: Action) -> Result<(), Wrong> {
        match action {
            Action::Write(number) => {
                self.left.writes -= 1;
                let revision = self.server.position().revision.next();
                self.server_mut().write(&[Change::write(key(number), value(revision))]);
            }
            Action::Delete(number) => {
                self.left.writes -= 1;
                self.server_mut().write(&[Change::delete(key(number))]);
            }
            Action::Storm => {
                self.left.storms -= 1;
                let first = self.server.position().revision.next();
                let changes: Vec<_> = (0..STORM)
                    .map(|n| Change::write(key(u8::from(n + 1 == STORM)), value(first.plus(n))))
                    .collect();
                self.server_mut().write(&changes);
            }
            Action::Checkpoint => {
                self.left.checkpoints -= 1;
                let root = self.server.table().0.tree().root();
                let server = self.server_mut();
                server.hashing = Some((server.log.set_checkpoint(), root));
            }
            Action::Root => {
                let server = self.server_mut();
                let (number, root) = server.hashing.take().unwrap();
                server.log.set_root(number, root);
            }
            Action::Restart => {
                self.left.restarts -= 1;
                let map = self.server.now().clone();
                self.restart(Server::new(&self.bounds, self.server.epoch + 1, map));
            }
            Action::Restore => {
                self.left.restores -= 1;
                let mut server = (*self.server).clone();
                server.history.pop();
                let at = server.position();
                server.log = Log::new(self.bounds.log_bytes, at.revision, at.chain);
                (server.hashing, server.running) = (None, None);
                server.waiting.clear();
                self.restart(server);
            }
            Action::Connect(f) => self.connect(f)?,
            Action::Cut(f) => {
                self.left.cuts -= 1;
                self.cut(f);
            }
            Action::Want(f) => {
                self.left.diffs -= 1;
                self.follower(f).wants_diff = true;
            }
            Action::Diff(f) => {
                self.follower(f).begin_diff();
                self.drain_client(f)?;
            }
            Action::ToServer(f) => {
                let link = self.link(f);
                let message = link.to_server.pop_front().unwrap();
                link.server.handle_message(message, NOW);
                self.drain_server(f)?;
            }
            Action::Serve(f) => {
                self.serve(f);
                self.drain_server(f)?;
            }
            Action::Reply(f) => {
                self.reply(f);
                self.drain_server(f)?;
            }
            Action::Differ(f, diff) => {
                self.step(f, diff);
                self.drain_server(f)?;
            }
            Action::Transmit(f) => self.transmit(f)?,
            Action::ToClient(f) => self.to_client(f)?,
            Action::Work(f) => self.work(f)?,
        }
        Ok(())
    }

    fn server_mut(&mut self) -> &mut Server {
        Arc::make_mut(&mut self.server)
    }

    fn follower(&mut self, f: usize) -> &mut Follower {
        Arc::make_mut(&mut self.followers[f])
    }

    fn link(&mut self, f: usize) -> &mut Link {
        self.follower(f).link.as_mut().unwrap()
    }

    /// Everybody is cut off, and what was seen was of a history that is over.
    fn restart(&mut self, mut server: Server) {
        for f in 0..self.followers.len() {
            self.cut(f);
            self.follower(f).seen.clear();
        }
        if let Some(mutation) = self.mutation {
            server.log.mutate(mutation);
        }
        server.connections = self.server.connections;
        self.server = Arc::new(server);
    }

    fn connect(&mut self, f: usize) -> Result<(), Wrong> {
        let server = self.server_mut();
        server.connections += 1;
        let id = FollowerId(server.connections);
        let config = SessionConfig {
            repair_bytes: self.bounds.repair_bytes,
            repair_window: self.bounds.repair_window,
            updated_keys: self.bounds.updated_keys,
            part_keys: self.bounds.part_keys,
            ..SessionConfig::default()
        };
        let mut server = server::Session::new(config, id, NOW);
        let heartbeat = HeartbeatConfig::default();
        let position = self.followers[f].position;
        let mut client = client::Session::new("", Limits::default(), heartbeat, position, NOW);
        if let Some(mutation) = self.mutation {
            server.mutate(mutation);
            client.mutate(mutation);
        }
        let follower = self.follower(f);
        follower.wants_diff = false;
        follower.link = Some(Link {
            id,
            server,
            client,
            to_server: VecDeque::new(),
            to_client: VecDeque::new(),
            requests: VecDeque::new(),
            replies: VecDeque::new(),
            differs: Vec::new(),
            work: VecDeque::new(),
        });
        self.drain_client(f)?;
        // Nobody else sees a Hello on its way, nor does anything else happen to its reader.
        self.act(Action::ToServer(f))
    }

    /// What is on its way in either direction is lost.
    fn cut(&mut self, f: usize) {
        let follower = self.follower(f);
        let Some(link) = follower.link.take() else { return };
        follower.updated.clear();
        if link.client.stream().is_some() {
            follower.position = link.client.position();
        }
        let server = self.server_mut();
        if let Some((_, diff)) = server.running.filter(|(of, _)| *of == f) {
            server.log.unmark(link.id, diff);
            server.running = None;
        }
        server.waiting.retain(|(of, _)| *of != f);
        self.admit();
    }

    fn transmit(&mut self, f: usize) -> Result<(), Wrong> {
        let server = Arc::clone(&self.server);
        let link = self.link(f);
        let transmit = link.server.poll_transmit(&server.log);
        if let Some(transmit) = transmit {
            let limits = Limits::default();
            let decode = |frame: Bytes| wire::decode(&frame[HEADER_BYTES..], &limits).unwrap();
            link.to_client.push_back(match transmit {
                Transmit::Message(message) => message,
                Transmit::Live(frame) => decode(frame),
                Transmit::Joined(joined) => decode(joined.frame()),
                Transmit::Part(part) => part.message(&limits),
            });
            if self.bounds.rush {
                self.to_client(f)?;
            }
        }
        self.drain_server(f)
    }

    fn to_client(&mut self, f: usize) -> Result<(), Wrong> {
        let link = self.link(f);
        let message = link.to_client.pop_front().unwrap();
        if let ToClient::SyncStart { .. } = message {
            self.follower(f).updated.clear();
        }
        self.link(f).client.handle_message(message, NOW);
        self.drain_client(f)
    }

    // The server's side.

    fn drain_server(&mut self, f: usize) -> Result<(), Wrong> {
        while let Some(event) = self.link(f).server.poll_event() {
            let server = Arc::clone(&self.server);
            let link = self.link(f);
            match event {
                Event::Admit(diff) => {
                    self.server_mut().waiting.push_back((f, diff));
                    self.admit();
                }
                Event::Walk { diff, tree, root, len, full } => {
                    let input = Some(Input::Begin { tree, root, len, full });
                    link.differs.push(Differ { diff, walk: None, input });
                }
                Event::Answer(diff, answer) => {
                    if let Some(differ) = link.differs.iter_mut().find(|d| d.diff == diff) {
                        differ.input = Some(Input::Answer(answer));
                    }
                }
                Event::Collect { diff, tree, mut rest, most } => {
                    let writes = collect(&tree, &mut rest, most);
                    link.replies.push_back(Reply::Collected(diff, writes, rest));
                }
                Event::Root(revision, tree) => {
                    link.replies.push_back(Reply::Root(revision, tree.root()));
                }
                Event::Shorten(behind, head) => {
                    let missed =
                        Missed::collect(behind, head, |from, n| server.log.keys_from(from, n));
                    link.replies.push_back(Reply::Shortened(missed.as_ref().map(Shortened::of)));
                }
                Event::EndDiff { diff, aborted, served } => {
                    // Told to stop: it still works off what it has.
                    link.differs.retain(|differ| differ.diff != diff || differ.input.is_some());
                    link.requests.push_back(Event::EndDiff { diff, aborted, served });
                }
                Event::FellBehind(_) | Event::Verified { equal: true, .. } => {}
                Event::Verified { revision, .. } => {
                    return Err(Wrong::Closed(format!("roots differ at {revision}")));
                }
                Event::Close(close) => return Err(Wrong::Closed(format!("the server: {close}"))),
                request @ (Event::Subscribe { .. }
                | Event::Snapshot(_)
                | Event::Read { .. }
                | Event::Mark(_)) => link.requests.push_back(request),
            }
        }
        // Nobody waits for it but who wants the place.
        while let Some(Event::EndDiff { .. }) = self.link(f).requests.front() {
            self.serve(f);
        }
        Ok(())
    }

    fn admit(&mut self) {
        if self.server.running.is_none()
            && let Some((f, diff)) = self.server_mut().waiting.pop_front()
        {
            self.server_mut().running = Some((f, diff));
            self.link(f).replies.push_back(Reply::Admitted(diff));
        }
    }

    fn serve(&mut self, f: usize) {
        let link = self.link(f);
        let (id, request) = (link.id, link.requests.pop_front().unwrap());
        let (mut table, _) = self.server.table();
        let server = self.server_mut();
        let reply = match request {
            Event::Subscribe { position, .. } => {
                let head = server.position();
                let way = server.log.way(head.epoch, position.as_ref());
                let at = position.filter(|_| way == Way::Resumed).unwrap_or(head);
                Reply::Subscribed(at, way, head)
            }
            Event::Snapshot(diff) => Reply::Snapshot(diff, table.tree().clone()),
            Event::Read { diff, found, from, max_bytes } => {
                Reply::Values(diff, table.read(&found, from, max_bytes))
            }
            Event::Mark(diff) => {
                server.log.mark(id, diff);
                Reply::Mark(diff, server.log.head(), table.tree().clone())
            }
            Event::EndDiff { diff, .. } => {
                server.log.unmark(id, diff);
                server.running = server.running.filter(|running| *running != (f, diff));
                server.waiting.retain(|waiting| *waiting != (f, diff));
                return self.admit();
            }
            other => unreachable!("{other:?} is no request"),
        };
        self.link(f).replies.push_back(reply);
    }

    fn reply(&mut self, f: usize) {
        let link = self.link(f);
        let reply = link.replies.pop_front().unwrap();
        link.server.handle_reply(reply);
    }

    fn step(&mut self, f: usize, diff: DiffId) {
        let part_keys = self.bounds.part_keys;
        let link = self.link(f);
        let at = link.differs.iter().position(|differ| differ.diff == diff).unwrap();
        let differ = &mut link.differs[at];
        let step = match (differ.input.take().unwrap(), &mut differ.walk) {
            (Input::Begin { tree, root, len, full }, walk) => {
                let (begun, step) = Walk::new(tree, root, len, full, ANSWER_BYTES, part_keys);
                *walk = Some(begun);
                Ok(step)
            }
            (Input::Answer(answer), Some(walk)) => walk.handle_answer(&answer),
            (Input::Answer(_), None) => return,
        };
        let running = link.server.phase() == Some("Walk");
        if !running || matches!(step, Ok(Step::Done(_)) | Err(_)) {
            link.differs.remove(at);
        }
        match step {
            Ok(step) => link.server.handle_step(diff, step),
            Err(error) => link.server.handle_bad_answer(diff, &error),
        }
    }

    // The follower's side.

    fn work(&mut self, f: usize) -> Result<(), Wrong> {
        let link = self.link(f);
        match link.work.pop_front().unwrap() {
            Work::Root(of, tree) => link.client.handle_root(of, tree.root()),
            Work::Answer(id, tree, query) => {
                let answer = diff::answer(&tree, &query, ANSWER_BYTES).unwrap();
                link.client.handle_answer(id, answer);
            }
        }
        self.drain_client(f)
    }

    fn drain_client(&mut self, f: usize) -> Result<(), Wrong> {
        let (server, again) = (Arc::clone(&self.server), self.bounds.again);
        let follower = self.follower(f);
        while let Some(output) = follower.link.as_mut().unwrap().client.poll_output() {
            let link = follower.link.as_mut().unwrap();
            match output {
                Output::Send(message) => link.to_server.push_back(message),
                Output::Connected(_, way) => follower.wants_diff |= !way.resumes(),
                Output::FellBehind(_) | Output::DiffAborted { .. } => follower.wants_diff = true,
                Output::Apply { first, changes } => follower.applied(first, &changes)?,
                Output::CatchUp { changes, .. } => follower.caught_up(&changes)?,
                Output::Repair { diff, changes } => {
                    follower.repaired(&server.history, &changes, again)?;
                    follower.link.as_mut().unwrap().client.handle_repaired(
                        diff,
                        0,
                        0,
                        Duration::ZERO,
                    );
                }
                Output::Answer { diff, tree, query, .. } => {
                    link.work.push_back(Work::Answer(diff, tree, query));
                }
                Output::Root(diff, tree) => {
                    link.work.push_back(Work::Root(RootOf::Diff(diff), tree));
                }
                Output::Snapshot(diff) => {
                    let tree = follower.replica().0.tree().clone();
                    follower.link.as_mut().unwrap().client.handle_snapshot(diff, tree);
                }
                Output::Mark(revision) => {
                    let tree = follower.replica().0.tree().clone();
                    let work = Work::Root(RootOf::Mark(revision), tree);
                    follower.link.as_mut().unwrap().work.push_back(work);
                }
                Output::Checkpoint(number) => {
                    let tree = follower.replica().0.tree().clone();
                    let work = Work::Root(RootOf::Checkpoint(number), tree);
                    follower.link.as_mut().unwrap().work.push_back(work);
                }
                Output::CaughtUp(_) | Output::Progress(_) => {}
                Output::Held { .. } => unreachable!("it may delete what it likes"),
                Output::DiffDone { root, server_root, revision, .. }
                | Output::Verified { root, server_root, revision } => {
                    if root != server_root {
                        return Err(Wrong::Closed(format!("roots differ at {revision}")));
                    }
                }
                Output::Close(close) => {
                    return Err(Wrong::Closed(format!("the follower: {close}")));
                }
            }
        }
        self.follower(f).forget_updated();
        // Before a diff is asked for it may end.
        let rush =
            |work: &Work| self.bounds.rush && !matches!(work, Work::Root(RootOf::Diff(_), _));
        match self.followers[f].link.as_ref().and_then(|link| link.work.front()) {
            Some(work) if rush(work) => self.work(f),
            _ => Ok(()),
        }
    }

    // What must hold.

    /// A position is a promise, and whoever has nothing more to hear has everything.
    fn check(&self) -> Result<(), Wrong> {
        for (f, follower) in self.followers.iter().enumerate() {
            let here = follower.link.as_ref().and_then(|link| link.client.position());
            if let Some(at) = here
                && self.server.history.get(at.revision.0 as usize).map(|(map, _)| map)
                    != Some(&follower.map)
            {
                let what = format!("follower {f} at {} has {:?}", at.revision, follower.map);
                return Err(Wrong::Promise(what));
            }
        }
        let head = self.server.position();
        let equal = |follower: &Follower| {
            let link = follower.link.as_ref();
            follower.map == *self.server.now()
                && link.is_some_and(|link| {
                    link.client.position() == Some(head) && !link.client.is_comparing()
                })
        };
        if self.is_quiet() && !self.followers.iter().all(|follower| equal(follower)) {
            return Err(Wrong::Unequal(format!("the server has {:?}", self.server.now())));
        }
        Ok(())
    }

    /// Nothing happens unless somebody writes, asks, connects or cuts.
    fn is_quiet(&self) -> bool {
        let mut moves = Vec::new();
        (0..self.followers.len()).for_each(|f| self.moves(f, &mut moves));
        let connected = self.followers.iter().all(|follower| follower.link.is_some());
        connected && self.server.hashing.is_none() && moves.is_empty()
    }

    /// What the action is about, for a trace.
    pub fn explain(&self, action: Action) -> String {
        let link = |f: usize| self.followers[f].link.as_ref().unwrap();
        let what = match action {
            Action::ToServer(f) => link(f).to_server[0].name().to_owned(),
            Action::ToClient(f) => link(f).to_client[0].name().to_owned(),
            Action::Serve(f) => name(&link(f).requests[0]),
            Action::Reply(f) => name(&link(f).replies[0]),
            Action::Work(f) => name(&link(f).work[0]),
            Action::Transmit(f) => match link(f).server.clone().poll_transmit(&self.server.log) {
                Some(Transmit::Message(message)) => message.name().to_owned(),
                Some(Transmit::Live(_) | Transmit::Joined(_)) => "Live".to_owned(),
                Some(Transmit::Part(_)) => "CatchUp".to_owned(),
                None => String::new(),
            },
            _ => String::new(),
        };
        format!("{action:?} {what}").trim_end().to_owned()
    }
}

/// The name of a variant.
fn name(what: &impl std::fmt::Debug) -> String {
    let text = format!("{what:?}");
    text.chars().take_while(char::is_ascii_alphanumeric).collect()
}

impl Follower {
    fn replica(&self) -> (Replica, MemoryStore) {
        let store = store(&self.map);
        (Replica::open(store.clone()).unwrap(), store)
    }

    fn apply(&mut self, changes: &[(Change, Digest)]) {
        let (mut replica, store) = self.replica();
        assert!(replica.apply_all(changes.to_vec()).all(|(_, refused)| refused.is_none()));
        self.map = contents(&store);
    }

    fn can_diff(&self) -> bool {
        let link = self.link.as_ref().unwrap();
        self.wants_diff
            && link.client.state() == "Relay"
            && !link.client.is_comparing()
            && !link.client.is_catching_up()
    }

    /// Of use from `SyncStart` to the end of its diff.
    fn forget_updated(&mut self) {
        if self.link.as_ref().is_none_or(|link| link.client.state() == "Relay") {
            self.updated.clear();
        }
    }

    fn begin_diff(&mut self) {
        let (replica, _) = self.replica();
        let client = &mut self.link.as_mut().unwrap().client;
        // What a diff may delete has tests of its own.
        client.handle_diff(replica.tree().clone(), false, u64::MAX).unwrap();
        self.wants_diff = false;
    }

    /// What is brought must not be older than what was.
    fn brings(&mut self, change: &Change, revision: Revision) -> Result<(), Wrong> {
        if let Some(seen) = self.seen.insert(change.key().clone(), revision)
            && seen > revision
        {
            return Err(Wrong::Older(format!("{change:?} of {revision} behind {seen}")));
        }
        Ok(())
    }

    fn applied(&mut self, first: Revision, changes: &[(Change, Digest)]) -> Result<(), Wrong> {
        for (revision, (change, _)) in (first.0..).zip(changes) {
            self.brings(change, Revision(revision))?;
            self.updated.insert(change.key().clone());
        }
        self.apply(changes);
        Ok(())
    }

    /// A delete does not say when it was; that it is not undone is for the promise.
    fn caught_up(&mut self, changes: &[(Change, Digest)]) -> Result<(), Wrong> {
        for (change, _) in changes {
            if let Some(value) = change.value() {
                self.brings(change, written_at(value))?;
            }
        }
        self.apply(changes);
        Ok(())
    }

    fn repaired(
        &mut self,
        history: &[(Map, Chain)],
        changes: &[(Change, Digest)],
        again: bool,
    ) -> Result<(), Wrong> {
        let here = self.link.as_ref().unwrap().client.stream().unwrap().revision;
        for (change, _) in changes {
            if let Some(value) = change.value() {
                self.brings(change, written_at(value))?;
            } else if let Some(value) = history[here.0 as usize].0.get(change.key()) {
                // It is there where the stream stands, so this is of before or behind that.
                if self.seen.get(change.key()).is_some_and(|seen| *seen >= written_at(value)) {
                    return Err(Wrong::Older(format!("{change:?} at {here}")));
                }
            }
            if again && self.updated.contains(change.key()) {
                return Err(Wrong::Again(format!("{change:?} at {here}")));
            }
        }
        self.apply(changes);
        Ok(())
    }
}
