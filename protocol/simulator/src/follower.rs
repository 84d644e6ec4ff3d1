//! The follower's side: what its session says is done, and each change held against the history.

use std::collections::VecDeque;
use std::sync::atomic::Ordering::Relaxed;
use std::time::Duration;

use bytes::Bytes;
use tablecast_protocol::client::Output;
use tablecast_protocol::client::RootOf;
use tablecast_protocol::server::Close;
use tablecast_protocol::{
    Change, DiffId, Digest, Hash, Key, Reason, Replica, Revision, Store, ToClient, Way, diff, scrub,
};

use crate::fault::Fault;
use crate::history::{Cells, FORGED, History, Id, KEYS, STRANGERS, id, is, key, number, value};
use crate::world::{Connection, Follower, Work, Works, World, filled, flip, hashed};
use crate::{Checked, check};

/// Most keys that are looked up after a look through the store.
const SCRUBBED_KEYS: usize = 1000;

/// How long a diff that failed is not asked for again.
const RETRY: Duration = Duration::from_millis(300);

impl Follower {
    pub(crate) fn new(cells: Cells) -> Self {
        let store = filled(&cells);
        Self {
            replica: Replica::open(store.clone()).unwrap(),
            store,
            cells,
            history: 0,
            seen: [0; KEYS],
            wrong: 0,
            excused: 0,
            refused: 0,
            hidden: 0,
            strangers: Default::default(),
            position: None,
            changed: false,
            running: None,
            due: None,
            allows: false,
            link: None,
            saved: None,
            stale: false,
            refuses_until: u64::MAX,
            retry: None,
            works: Works::default(),
            at_mark: 0,
            hidden_at_mark: 0,
            at_checkpoint: 0,
        }
    }

    /// A diff is due. Once it must be at full width, it stays so until it begins.
    pub(crate) fn want_diff(&mut self, full: bool) {
        self.due = Some(full || self.due.unwrap_or(false));
    }

    /// The diff that ran has changed nothing for good. Answers whether it was one at full width.
    fn came_to_nothing(&mut self) -> bool {
        let (changed, full) = self.running.take().unwrap_or_default();
        self.changed |= changed;
        full
    }

    /// Asks for another diff after a while.
    fn retry_diff(&mut self, full: bool, at: Duration) {
        let (at, before) = self.retry.unwrap_or((at, false));
        self.retry = Some((at, full || before));
    }

    /// Holds all keys against what they were at the server at a revision.
    fn compare(&mut self, history: &History, revision: Revision) {
        self.wrong = if self.strangers.is_empty() { 0 } else { STRANGERS };
        for (number, cell) in self.cells.iter().enumerate() {
            self.wrong |= u64::from(*cell != history.at(number, revision.0)) << number;
        }
        self.excused = self.excused & self.wrong | self.hidden;
        self.refused &= self.wrong;
    }

    /// A key of the store has this value now, and its tree knows.
    fn set(&mut self, number: usize, id: Id, history: &History, place: Revision) {
        self.cells[number] = id;
        let bit = 1 << number;
        let wrong = id != history.at(number, place.0);
        self.wrong = if wrong { self.wrong | bit } else { self.wrong & !bit };
        self.excused &= !bit;
        self.refused &= !bit;
        self.hidden &= !bit;
    }

    /// A change that a flipped bit may have made.
    fn set_forged(&mut self, change: &Change) {
        match number(change.key()) {
            Some(number) => {
                self.cells[number] = id(change.value());
                self.hidden &= !(1 << number);
            }
            None if change.value().is_some() => {
                self.strangers.insert(change.key().clone());
            }
            None => {
                self.strangers.remove(change.key());
            }
        }
    }

    /// Restarts it, with what its store holds.
    fn reopen(&mut self) {
        self.store.unread.store(false, Relaxed);
        self.replica = Replica::open(self.store.clone()).unwrap();
        self.works = Works::default();
        self.hidden = 0;
        self.changed = false;
        (self.due, self.retry) = (None, None);
        self.allows = false;
    }
}

impl World<'_> {
    pub(crate) fn hear_server(&mut self, at: usize) -> Checked {
        let now = self.now;
        let link = &mut self.connections[at];
        let Some(client) = &mut link.client else { return Ok(()) };
        match link.to_client.next(client.session.max_frame_bytes()) {
            Ok(Some(message)) => {
                self.delivered += 1;
                if !link.tainted {
                    self.totals.client.count(client.session.state(), message.tag());
                }
                if let ToClient::SyncStart { .. } = message {
                    client.updated = 0;
                }
                client.session.handle_message(message, now);
            }
            Ok(None) if link.to_client.ended => {
                self.drop_client(at, true);
                return Ok(());
            }
            Ok(None) => client.session.handle_part(now),
            Err(error) if link.tainted => client.session.handle_malformed(&error),
            Err(error) => return Err(format!("a follower cannot read: {error}")),
        }
        self.drain_client(at)?;
        // Whatever is wrong now is the flipped bit's doing.
        let link = &self.connections[at];
        if link.tainted
            && let Some(stream) = link.client.as_ref().and_then(|client| client.session.stream())
        {
            let follower = &mut self.followers[link.follower];
            if follower.link == Some(link.id) {
                follower.compare(&self.histories[link.history], stream.revision);
                follower.excused |= follower.wrong;
            }
        }
        Ok(())
    }

    /// There is no connection any more, as far as the follower is concerned.
    pub(crate) fn unlink(&mut self, at: usize) {
        let link = &self.connections[at];
        let follower = &mut self.followers[link.follower];
        if follower.link != Some(link.id) {
            return;
        }
        follower.link = None;
        follower.works.forget();
        if follower.came_to_nothing() {
            follower.want_diff(true);
        }
        follower.allows = false;
        if let Some(client) = &link.client
            && client.session.stream().is_some()
        {
            follower.position = client.session.position().filter(|_| !follower.changed);
        }
    }

    pub(crate) fn begin_diff(&mut self, at: usize) -> Checked {
        let link = &mut self.connections[at];
        let follower = &mut self.followers[link.follower];
        if follower.link == Some(link.id)
            && let Some(full) = follower.due
            && let Some(client) = &mut link.client
        {
            let most = if follower.allows { u64::MAX } else { self.config.max_deletes };
            let tree = match client.session.state() {
                "Relay" => hashed(follower.replica.tree()),
                _ => follower.replica.tree().clone(),
            };
            let full = full || follower.retry.is_some_and(|(_, full)| full);
            if client.session.handle_diff(tree, full, most).is_ok() {
                follower.due = None;
                follower.retry = follower.retry.map(|(at, _)| (at, false));
                follower.running = Some((std::mem::take(&mut follower.changed), full));
                return self.drain_client(at);
            }
        }
        Ok(())
    }

    /// Something that a follower computes elsewhere is there.
    pub(crate) fn work(&mut self, index: usize) -> Checked {
        let follower = &mut self.followers[index];
        let Some((id, work)) = follower.works.take(&mut self.rng) else { return Ok(()) };
        let waits = follower.link == Some(id);
        let at = follower.link.and_then(|id| self.place(id));
        if let Work::Scrub(number, mut tree, entries) = work {
            let (found, error) = scrub(&tree, entries, SCRUBBED_KEYS);
            let keys = found.into_iter().map(|found| found.put_into(&mut tree)).collect();
            let root = (error.is_none() && waits).then(|| tree.root());
            self.scrubbed(index, number, root, keys, waits);
        } else if let Some(at) = at.filter(|_| waits)
            && let Some(client) = &mut self.connections[at].client
        {
            match work {
                Work::Root(of, tree) => client.session.handle_root(of, tree.root()),
                Work::Answer(id, tree, query) => {
                    match diff::answer(&tree, &query, self.config.answer_bytes) {
                        Ok(answer) => client.session.handle_answer(id, answer),
                        Err(error) => {
                            client.session.handle_close(Reason::Protocol, error.to_string());
                        }
                    }
                }
                Work::Scrub(..) => {}
            }
        }
        match at {
            Some(at) => self.drain_client(at),
            None => Ok(()),
        }
    }

    /// A look through the store, `waits` if it is for the connection at hand; no root if the store cannot be read.
    fn scrubbed(
        &mut self,
        index: usize,
        mark: u64,
        root: Option<Hash>,
        keys: Vec<Key>,
        waits: bool,
    ) {
        let at = self.followers[index].link.and_then(|id| self.place(id));
        let follower = &mut self.followers[index];
        for key in &keys {
            follower.changed = true;
            follower.position = None;
            follower.replica.look_up(key).unwrap();
            let bit = number(key).map_or(STRANGERS, |number| 1 << number);
            follower.hidden &= !bit;
            // From here on there is no position without it.
            follower.excused &= !bit;
            follower.refused |= bit & follower.wrong;
            self.totals.found += 1;
        }
        let session = at.and_then(|at| self.connections[at].client.as_mut());
        let Some(session) = session.map(|client| &mut client.session) else {
            if !keys.is_empty() {
                follower.want_diff(true);
            }
            return;
        };
        let mut compared = false;
        match root {
            _ if !waits => {}
            None => {
                session.handle_unread(mark);
                self.totals.faults[Fault::UnreadStore as usize] += 1;
            }
            Some(root) => {
                compared = session.is_checking(mark);
                session.handle_root(RootOf::Checkpoint(mark), root);
            }
        }
        if !keys.is_empty() {
            session.handle_refused();
            if compared {
                follower.retry_diff(true, self.now + RETRY);
            } else {
                follower.want_diff(true);
            }
        }
    }

    pub(crate) fn drain_client(&mut self, at: usize) -> Checked {
        loop {
            let link = &mut self.connections[at];
            let Some(client) = &mut link.client else { return Ok(()) };
            let Some(output) = client.session.poll_output() else { break };
            let follower = &mut self.followers[link.follower];
            let here = client.session.stream().map(|stream| stream.revision).unwrap_or_default();
            match output {
                Output::Send(message) if link.server.is_some() => {
                    link.to_server.send(message, self.config.as_bytes);
                }
                Output::Send(_) | Output::Progress(_) => {}
                Output::Connected(_, way) => {
                    if link.history != follower.history {
                        (follower.history, follower.seen) = (link.history, [0; KEYS]);
                    }
                    follower.compare(&self.histories[link.history], here);
                    if std::mem::take(&mut follower.stale) {
                        follower.excused |= follower.wrong;
                    }
                    if !way.resumes() {
                        follower.want_diff(false);
                    }
                    self.totals.ways[way as usize] += 1;
                    if way == Way::Shortened && self.config.faults != 0 && self.rng.bool() {
                        // Few runs are here often enough for chance to find it.
                        self.next_fault = Some(match self.rng.u8(..5) {
                            0 => Fault::TimeLeap,
                            1 => Fault::FollowerStopped,
                            2 => Fault::Failed,
                            3 => Fault::CutInCatchUp,
                            _ => Fault::StalledReader,
                        });
                    }
                }
                Output::FellBehind(revision) => {
                    follower.compare(&self.histories[link.history], revision);
                    follower.want_diff(false);
                }
                Output::CaughtUp(revision) => {
                    follower.compare(&self.histories[link.history], revision);
                    self.totals.caught_up += 1;
                }
                Output::Apply { first, changes } => {
                    self.follow(at, first.0.., changes, false)?;
                }
                Output::CatchUp { revision, changes } => {
                    self.follow(at, std::iter::repeat(revision.0), changes, true)?;
                }
                Output::Repair { diff, changes } => self.repair(at, diff, changes)?,
                Output::Answer { diff, tree, query, .. } => {
                    follower.works.add(link.id, Work::Answer(diff, tree, query));
                }
                Output::Root(diff, tree) => {
                    follower.works.add(link.id, Work::Root(RootOf::Diff(diff), tree));
                }
                Output::Snapshot(diff) => {
                    client.session.handle_snapshot(diff, follower.replica.tree().clone());
                }
                Output::Mark(revision) => {
                    let tree = hashed(follower.replica.tree());
                    follower.works.add(link.id, Work::Root(RootOf::Mark(revision), tree));
                    follower.at_mark = follower.wrong | follower.hidden;
                    follower.hidden_at_mark = follower.hidden;
                    let excused = follower.excused | follower.refused | self.ever_flipped;
                    let wrong = follower.wrong & !excused;
                    let index = link.follower;
                    check(wrong == 0 || link.tainted, || {
                        format!("follower {index} differs after a diff: {wrong:b}")
                    })?;
                }
                Output::Checkpoint(number) => {
                    let tree = hashed(follower.replica.tree());
                    let entries = follower.replica.reader().snapshot();
                    follower.works.add(link.id, Work::Scrub(number, tree, entries));
                    // Where a repair was held, live changes may have made it needless.
                    let (index, whole) = (link.follower, client.session.position().is_some());
                    check(whole || follower.allows, || {
                        format!(
                            "follower {index} compares roots, and knows that it misses something"
                        )
                    })?;
                    follower.at_checkpoint = follower.wrong;
                }
                Output::Held { deletes, .. } => {
                    let most = if follower.allows { u64::MAX } else { self.config.max_deletes };
                    check(deletes > most, || format!("{deletes} are held"))?;
                    follower.came_to_nothing();
                    follower.allows = true;
                    // Whoever is to say that it is meant may take a while.
                    if self.rng.bool() {
                        follower.want_diff(false);
                    } else {
                        follower.retry_diff(false, self.now + RETRY);
                    }
                    self.fault(Fault::HeldDelete);
                }
                Output::DiffDone { root, server_root, .. } => {
                    follower.running = None;
                    follower.allows = false;
                    let (equal, wrong, index) =
                        (root == server_root, follower.at_mark, link.follower);
                    check(equal || wrong != 0 || link.tainted, || {
                        format!(
                            "follower {index} is right at the end of a diff, and told it is not"
                        )
                    })?;
                    let known = wrong & !follower.hidden_at_mark;
                    check(!equal || known == 0 || link.tainted, || {
                        format!("follower {index} has an equal root after a diff: {known:b} differ")
                    })?;
                    let position = client.session.position();
                    check(equal || position.is_none(), || {
                        format!(
                            "follower {index} is at {position:?} after a diff, with another root"
                        )
                    })?;
                    if equal && position.is_some() {
                        (follower.retry, follower.due) = (None, None);
                    } else {
                        follower.retry_diff(!equal, self.now + RETRY);
                    }
                    self.totals.diffs += 1;
                }
                Output::Verified { root, server_root, revision } => {
                    let (equal, wrong) = (root == server_root, follower.at_checkpoint);
                    let index = link.follower;
                    // The store was looked through, so equal roots mean equal tables.
                    check(equal == (wrong == 0) || link.tainted, || {
                        format!(
                            "follower {index} at {revision}: equal is {equal}, {wrong:b} differ"
                        )
                    })?;
                    if !equal {
                        follower.want_diff(true);
                    }
                    let position = client.session.position();
                    check(equal || position.is_none(), || {
                        format!("follower {index} is at {position:?} with another root")
                    })?;
                    self.verified += 1;
                    self.totals.verified += 1;
                }
                Output::DiffAborted { .. } => {
                    let full = follower.came_to_nothing();
                    follower.retry_diff(full, self.now + RETRY);
                    self.totals.aborts += 1;
                }
                Output::Close(close) => self.client_closes(at, &close)?,
            }
        }
        self.begin_diff(at)
    }

    fn client_closes(&mut self, at: usize, close: &Close) -> Checked {
        self.unlink(at);
        let link = &mut self.connections[at];
        let (id, tainted, there) = (link.id, link.tainted, link.server.is_some());
        if let Some(client) = &link.client {
            let waits = client.session.stream().is_none();
            if let Close::Here { reason: Reason::Silent, .. } = close {
                self.fault(if waits { Fault::HelloTimeout } else { Fault::Silence });
            }
        }
        self.note(|| format!("{id}: the follower closes: {close}"));
        let (Close::Peer { reason, .. } | Close::Here { reason, .. }) = close;
        let here = matches!(close, Close::Here { reason: Reason::Silent, .. });
        let hangs = self.quiet && there && here;
        check(tainted || *reason != Reason::Protocol && !hangs, || {
            format!("the follower closes connection {id}: {close}")
        })
    }

    /// Live changes, or those of a shortened catch-up.
    fn follow(
        &mut self,
        at: usize,
        revisions: impl Iterator<Item = u64>,
        changes: Vec<(Change, Digest)>,
        catch_up: bool,
    ) -> Checked {
        let index = self.connections[at].follower;
        let applied = self.followers[index].replica.apply_all(changes);
        for (revision, (change, refused)) in revisions.zip(applied) {
            let link = &mut self.connections[at];
            let Connection { client: Some(client), history, tainted, .. } = link else { break };
            let follower = &mut self.followers[index];
            let history = &self.histories[*history];
            let place = client.session.stream().map(|at| at.revision).unwrap_or_default();
            let was = number(change.key()).map(|number| (number, history.last(number, revision)));
            let right = |(number, (last, id)): (usize, (u64, Id))| {
                (is(change.value(), id) && revision <= history.head()).then_some((number, last, id))
            };
            let taken = refused.is_none();
            if !taken {
                client.session.handle_refused();
                follower.retry_diff(false, self.now + RETRY);
            }
            let Some((number, last, id)) = was.and_then(right) else {
                check(*tainted, || {
                    format!("follower {index} is sent {change:?} at {revision}, which was {was:?}")
                })?;
                if taken {
                    follower.set_forged(&change);
                }
                continue;
            };
            let seen = follower.seen[number];
            check(*tainted || last > seen && (catch_up || last == revision), || {
                format!("follower {index}: {change:?} of {last} takes the key back from {seen}")
            })?;
            follower.seen[number] = last.max(seen);
            client.updated |= 1 << number;
            if taken {
                follower.set(number, id, history, place);
            } else {
                let wrong = follower.cells[number] != history.at(number, place.0);
                let bit = 1 << number;
                follower.wrong = follower.wrong & !bit | u64::from(wrong) << number;
                follower.refused |= bit;
            }
        }
        Ok(())
    }

    fn repair(&mut self, at: usize, diff: DiffId, changes: Vec<(Change, Digest)>) -> Checked {
        let link = &mut self.connections[at];
        let (index, tainted) = (link.follower, link.tainted);
        let follower = &mut self.followers[index];
        let history = &self.histories[link.history];
        let Some(client) = &mut link.client else { return Ok(()) };
        let place = client.session.stream().map(|at| at.revision).unwrap_or_default();
        let updated = client.updated.count_ones() as usize;
        check(tainted || updated <= self.config.updated_keys * 17 / 16, || {
            format!("follower {index} is repaired beside {updated} updated keys")
        })?;
        let (mut writes, mut deletes) = (0, 0);
        for (change, refused) in follower.replica.apply_all(changes) {
            let taken = refused.is_none();
            if !taken {
                *if change.value().is_some() { &mut writes } else { &mut deletes } += 1;
            }
            let at = number(change.key());
            if let Some(number) = at
                && let (last, id) = history.last(number, place.0)
                && is(change.value(), id)
            {
                check(tainted || client.updated >> number & 1 == 0, || {
                    format!("follower {index}: {change:?} is repaired, and was updated mid-diff")
                })?;
                follower.seen[number] = last.max(follower.seen[number]);
                if taken {
                    follower.set(number, id, history, place);
                } else {
                    follower.refused |= 1 << number;
                }
            } else {
                // What nobody has written is deleted again.
                check(tainted || at.is_none() && change.value().is_none(), || {
                    format!("follower {index} at {place}: {change:?} is no repair")
                })?;
                if taken {
                    follower.set_forged(&change);
                    if follower.strangers.is_empty() {
                        follower.wrong &= !STRANGERS;
                        follower.excused &= !STRANGERS;
                    }
                }
            }
            self.totals.repaired += 1;
        }
        let took = Duration::from_micros(self.rng.u64(0..600));
        client.session.handle_repaired(diff, writes, deletes, took);
        Ok(())
    }

    // What is done to a follower.

    /// A value, a missing key or a key too many, behind its back; 0 if it cannot be had.
    pub(crate) fn spoil(&mut self, index: usize, number: usize, fault: Fault) -> bool {
        let place = self.followers[index].link.and_then(|id| self.place(id));
        let follower = &mut self.followers[index];
        let (there, bit) = (follower.cells[number] != 0, 1 << number);
        let forged = follower.cells[number] == FORGED;
        if follower.hidden & bit != 0 || forged || there == (fault == Fault::ExtraKey) {
            return false;
        }
        let key = key(number);
        let change = match fault {
            Fault::RemovedKey => Change::delete(key),
            Fault::ExtraKey => Change::write(key, "extra"),
            _ => Change::write(key, flip(&value(follower.cells[number]), self.rng.usize(..))),
        };
        let id = id(change.value());
        if fault == Fault::OwnWrite {
            // Through its own `write`: the tree knows.
            if follower.replica.apply(&change).is_err() {
                return false;
            }
            follower.changed = true;
            follower.position = None;
        } else {
            follower.store.inner.apply(&[change]).unwrap();
            follower.hidden |= bit;
        }
        follower.cells[number] = id;
        follower.excused |= bit;
        follower.saved = None;
        if let Some(at) = place
            && let Some(client) = &self.connections[at].client
            && let Some(stream) = client.session.stream()
        {
            let history = &self.histories[self.connections[at].history];
            let wrong = id != history.at(number, stream.revision.0);
            let follower = &mut self.followers[index];
            follower.wrong = follower.wrong & !bit | u64::from(wrong) << number;
        }
        true
    }

    /// Remembers the table as it is, if it is one of the server's.
    pub(crate) fn save(&mut self, index: usize) {
        let Some(at) = self.followers[index].link.and_then(|id| self.place(id)) else { return };
        let link = &self.connections[at];
        let follower = &mut self.followers[index];
        if let Some(client) = &link.client
            && let Some(position) = client.session.position()
            && follower.wrong == 0
            && !link.tainted
        {
            follower.saved = Some((follower.cells, position));
        }
    }

    /// The follower's process ends, and another one takes its place.
    pub(crate) fn restart_follower(&mut self, index: usize, fault: Fault) -> Result<bool, String> {
        let saved = self.followers[index].saved;
        if saved.is_none() && matches!(fault, Fault::FollowerRestored | Fault::StalePosition) {
            return Ok(false);
        }
        let at = self.followers[index].link.and_then(|id| self.place(id));
        if let Some(at) = at {
            if fault == Fault::FollowerStopped
                && let Some(client) = &mut self.connections[at].client
            {
                client.session.handle_close(Reason::Stopping, "");
                // Says farewell, and is unlinked with its position.
                self.drain_client(at)?;
            } else {
                self.drop_client(at, true);
            }
        }
        let follower = &mut self.followers[index];
        let changed = follower.changed;
        match (fault, saved) {
            (Fault::FollowerRestored, Some((cells, position))) => {
                follower.store = filled(&cells);
                (follower.cells, follower.position) = (cells, Some(position));
                (follower.wrong, follower.excused) = (0, 0);
                follower.strangers.clear();
            }
            (Fault::StalePosition, Some((_, position))) => {
                (follower.position, follower.stale) = (Some(position), true);
            }
            (Fault::FollowerStopped, _) if !changed => {}
            _ => follower.position = None,
        }
        // What it has seen, it has forgotten: an older table, or an older place.
        if fault == Fault::FollowerRestored || fault == Fault::StalePosition {
            follower.seen = [0; KEYS];
        }
        follower.reopen();
        Ok(true)
    }

    /// Keys that a follower's store refuses, a bit each.
    pub(crate) fn refuse(&self, index: usize, keys: u64) {
        self.followers[index].store.refused.store(keys, Relaxed);
    }

    /// What a follower's store holds in the end, to the last byte.
    pub(crate) fn contents(store: &impl Store) -> VecDeque<(Key, Bytes)> {
        store.reader().snapshot().map(Result::unwrap).collect()
    }
}
