//! Who decides what happens next: one seed, and nothing else.

use std::sync::atomic::Ordering::Relaxed;
use std::time::Duration;

use tablecast_protocol::{Reason, Tree};

use crate::fault::Fault;
use crate::history::KEYS;
use crate::world::{Connection, World, kind};
use crate::{Checked, check};

/// Most steps from the last fault until nothing is left to do.
const SETTLED_WITHIN: u64 = 20_000;

impl World<'_> {
    /// Things happen, in some order, until so many messages have been delivered.
    pub(crate) fn run(&mut self) -> Checked {
        for follower in 0..self.followers.len() {
            self.connect(follower)?;
        }
        let most = self.config.deliveries * 40;
        while self.delivered < self.config.deliveries && self.steps < most {
            self.steps += 1;
            let dice = self.rng.u16(..1000);
            if dice < self.config.fault_rate || self.next_fault.is_some() {
                let any = Fault::ALL[self.rng.usize(..Fault::ALL.len())];
                let fault = self.next_fault.take().unwrap_or(any);
                self.inject(fault)?;
                self.any_changed = true;
            } else if dice < self.config.fault_rate + self.config.write_rate
                || !self.step(self.config.slow)?
            {
                self.live()?;
                self.any_changed = true;
            }
            self.reap();
            self.expire();
        }
        Ok(())
    }

    /// Something that can be done for some connection. Answers whether there was anything.
    fn step(&mut self, slow: u8) -> Result<bool, String> {
        if std::mem::take(&mut self.any_changed) {
            (0..self.connections.len()).for_each(|at| self.renew(at));
        }
        debug_assert!(self.connections.iter().all(|link| link.ready == self.ready_for(link)));
        let count = self.connections.len();
        let (begin, kind) = (self.rng.usize(..count.max(1)), self.rng.u32(..8));
        // What is slow is passed over most of the time.
        let slow = if self.rng.u8(..16) == 0 { 0 } else { slow };
        for passed_over in [slow, 0] {
            for at in (begin..count).chain(0..begin) {
                let link = &self.connections[at];
                let held = if self.steps < link.held_until { link.held } else { 0 };
                let ready = link.ready & !held & !passed_over;
                if ready != 0 {
                    let nth = ready.rotate_right(kind).trailing_zeros() + kind;
                    return self.go_on(at, 1 << (nth % 8)).map(|()| true);
                }
            }
        }
        Ok(false)
    }

    /// Does one thing for a connection, and often more of the same: so do actors, which have more than one
    /// message in their mailboxes and write all that is pending.
    fn go_on(&mut self, at: usize, kind: u8) -> Checked {
        loop {
            self.act(at, kind)?;
            self.renew(at);
            if self.connections[at].ready & kind == 0 || self.rng.u8(..4) == 0 {
                return Ok(());
            }
            self.steps += 1;
        }
    }

    /// Looks again what can be done for a connection.
    fn renew(&mut self, at: usize) {
        self.connections[at].ready = self.ready_for(&self.connections[at]);
    }

    /// What also happens when nothing goes wrong.
    fn live(&mut self) -> Checked {
        match self.rng.u8(..32) {
            0..4 => {
                self.checkpoint();
                Ok(())
            }
            4..13 => match self.away() {
                Some(follower) => self.connect(follower),
                None => self.ask(),
            },
            13..16 => {
                let time = self.rng.u64(1..900);
                self.pass(Duration::from_millis(time))
            }
            16..18 => {
                let follower = self.rng.usize(..self.followers.len());
                self.save(follower);
                Ok(())
            }
            18..24 => self.ask(),
            _ => self.publish(),
        }
    }

    /// Somebody asks for a diff.
    fn ask(&mut self) -> Checked {
        let follower = self.rng.usize(..self.followers.len());
        self.followers[follower].want_diff(false);
        match self.followers[follower].link.and_then(|id| self.place(id)) {
            Some(at) => self.begin_diff(at),
            None => Ok(()),
        }
    }

    /// A few changes. Most of them are a frame of their own: a run is about frames, and most of what a change
    /// costs is hashes.
    fn publish(&mut self) -> Checked {
        let batch = self.batch();
        self.write(&batch);
        if self.rng.u8(..4) != 0 {
            self.seal();
        }
        Ok(())
    }

    /// A follower without a connection.
    fn away(&mut self) -> Option<usize> {
        let begin = self.rng.usize(..self.followers.len());
        let mut order = (begin..self.followers.len()).chain(0..begin);
        order.find(|follower| self.followers[*follower].link.is_none())
    }

    fn batch(&mut self) -> Vec<(usize, bool)> {
        let count = if self.rng.u8(..4) != 0 { 1 } else { self.rng.usize(1..4) };
        self.changes(count, KEYS)
    }

    /// Changes of some keys that are next to each other.
    fn changes(&mut self, count: usize, keys: usize) -> Vec<(usize, bool)> {
        let first = self.rng.usize(..self.config.keys);
        let deletes = self.rng.bool();
        let change = |_| {
            let key = (first + self.rng.usize(..keys)) % self.config.keys;
            (key, deletes && self.rng.bool())
        };
        (0..count).map(change).collect()
    }

    /// More changes of few keys than a follower that is away will want one by one.
    fn burst(&mut self) {
        for _ in 0..self.rng.u8(2..5) {
            let batch = self.changes(6, 3);
            self.write(&batch);
            self.seal();
        }
    }

    /// Something goes wrong, of what may go wrong in this run.
    fn inject(&mut self, fault: Fault) -> Checked {
        if !self.config.allows(fault) {
            return Ok(());
        }
        let index = self.rng.usize(..self.followers.len());
        let number = self.rng.usize(..self.config.keys);
        match fault {
            Fault::CutBeforeHandshake
            | Fault::CutInHandshake
            | Fault::CutInRelay
            | Fault::CutBeforeDiff
            | Fault::CutInWalk
            | Fault::CutInRepairs
            | Fault::CutInCatchUp
            | Fault::CutWithMarkOpen
            | Fault::CutLate
            | Fault::Vanished => self.cut(fault),
            Fault::ServerContinued
            | Fault::ServerRestarted
            | Fault::ServerRestored
            | Fault::ServerEmptied => {
                // As rare as all of the others together make sense of.
                if self.rng.u8(..4) == 0 {
                    let late = self.rng.bool();
                    self.restart(fault, late);
                    self.fault(fault);
                }
            }
            Fault::ServerStopped => return self.stop_server(),
            Fault::FollowerStopped
            | Fault::FollowerRestarted
            | Fault::FollowerRestored
            | Fault::StalePosition => {
                if self.restart_follower(index, fault)? {
                    self.fault(fault);
                }
            }
            Fault::Failed => return self.fail(),
            Fault::SlowReader
            | Fault::StalledReader
            | Fault::LateReply
            | Fault::LateDiffer
            | Fault::DelayedAcks
            | Fault::Reordered => self.hold(fault),
            Fault::RefusedKey => self.refuse_keys(index, fault, 1 << number),
            Fault::RefusedAll | Fault::RefusedShortly => self.refuse_keys(index, fault, u64::MAX),
            Fault::RefusedWrite => {
                let batch = self.batch();
                self.fault(fault);
                return self.refuse_write(&batch);
            }
            Fault::UnreadStore => {
                let unread = self.rng.bool();
                self.followers[index].store.unread.store(unread, Relaxed);
            }
            Fault::FlippedValue | Fault::RemovedKey | Fault::ExtraKey | Fault::OwnWrite => {
                if self.spoil(index, number, fault) {
                    self.fault(fault);
                }
            }
            Fault::FlippedServerValue => {
                if self.flip_server(number) {
                    self.fault(fault);
                }
            }
            Fault::TimeLeap => {
                let time = Duration::from_secs(self.rng.u64(5..32));
                self.fault(fault);
                return self.pass(time);
            }
            Fault::TurnEnded => self.end_turn(),
            Fault::BitToServer | Fault::BitToClient => self.flip_bit(fault),
            // An old connection is still there, if the last one vanished.
            Fault::DuplicateConnection => return self.connect(index),
            // Done where it happens, or follow from others.
            Fault::RefusedConnection
            | Fault::LostDiffer
            | Fault::FellBehind
            | Fault::StaleDiffer
            | Fault::Busy
            | Fault::UpdatedOverflow
            | Fault::DiffStalled
            | Fault::HelloTimeout
            | Fault::Silence
            | Fault::HeldDelete => {}
        }
        Ok(())
    }

    /// Cuts a connection that is at the place that this kind of cut is about, if there is one.
    fn cut(&mut self, fault: Fault) {
        let stage = |at: usize| {
            let link = &self.connections[at];
            let (Some(server), Some(client)) = (&link.server, &link.client) else { return None };
            let comparing = client.session.is_comparing();
            Some(match (server.session.state(), client.session.state()) {
                ("Hello", "Hello") => Fault::CutBeforeHandshake,
                (_, "Hello") => Fault::CutInHandshake,
                (_, "CatchUp") => Fault::CutInCatchUp,
                (_, "PreDiff") => Fault::CutBeforeDiff,
                (_, "Diff") => Fault::CutInWalk,
                (_, "PostDiff") if server.session.phase() == Some("Mark") => Fault::CutWithMarkOpen,
                (_, "PostDiff") => Fault::CutInRepairs,
                (_, "Relay") if comparing => Fault::CutWithMarkOpen,
                _ => Fault::CutInRelay,
            })
        };
        let any = matches!(fault, Fault::CutLate | Fault::Vanished);
        let fits = |at: &usize| stage(*at).is_some_and(|stage| any || stage == fault);
        let begin = self.rng.usize(..self.connections.len().max(1));
        let order = (begin..self.connections.len()).chain(0..begin);
        let Some(at) = order.into_iter().find(fits) else { return };
        self.fault(fault);
        let first = self.rng.bool();
        match fault {
            Fault::CutLate if first => self.drop_server(at, true),
            Fault::CutLate => self.drop_client(at, true),
            Fault::Vanished if first => {
                self.connections[at].to_client.frames.clear();
                self.drop_server(at, false);
            }
            Fault::Vanished => {
                self.connections[at].to_server.frames.clear();
                self.drop_client(at, false);
            }
            _ => {
                self.drop_client(at, true);
                self.drop_server(at, true);
            }
        }
        // What it misses is sent one change a key, when it comes back.
        if self.rng.u8(..3) == 0 {
            self.burst();
        }
    }

    /// One end says that it has failed.
    fn fail(&mut self) -> Checked {
        let Some(at) = self.connections.len().checked_sub(1) else { return Ok(()) };
        let at = self.rng.usize(..=at);
        let first = self.rng.bool();
        let link = &mut self.connections[at];
        match (&mut link.server, &mut link.client) {
            (Some(server), _) if first && server.session.state() != "Closed" => {
                server.session.handle_close(Reason::Failed, "");
                self.fault(Fault::Failed);
                self.drain_server(at)
            }
            (_, Some(client)) if client.session.state() != "Closed" => {
                client.session.handle_close(Reason::Failed, "");
                self.fault(Fault::Failed);
                self.drain_client(at)
            }
            _ => Ok(()),
        }
    }

    fn hold(&mut self, fault: Fault) {
        if self.connections.is_empty() {
            return;
        }
        // One that has missed much is where a stall is worth most, and there seldom is one.
        let catches_up = |link: &Connection| {
            link.client.as_ref().is_some_and(|client| client.session.state() == "CatchUp")
        };
        let any = self.rng.usize(..self.connections.len());
        let behind = self.connections.iter().position(catches_up);
        let at = behind.filter(|_| fault == Fault::StalledReader).unwrap_or(any);
        let steps = match fault {
            Fault::StalledReader => self.rng.u64(100..600),
            _ => self.rng.u64(20..150),
        };
        let (until, first) = (self.steps + steps, self.rng.bool());
        let kinds = match fault {
            Fault::SlowReader => {
                self.connections[at].room = 1;
                0
            }
            // The log moves on meanwhile.
            Fault::StalledReader => {
                // What is caught up with is long, and so is what makes it fall out of the log.
                let bursts = if behind.is_some() { 12 } else { 2 };
                (0..bursts).for_each(|_| self.burst());
                if first { kind::TO_CLIENT } else { kind::TO_CLIENT | kind::TRANSMIT }
            }
            Fault::LateReply => kind::REPLY,
            Fault::LateDiffer => kind::DIFFER,
            Fault::DelayedAcks => kind::TO_SERVER,
            _ => u8::MAX,
        };
        let mut waits = fault == Fault::SlowReader;
        for (other, link) in self.connections.iter_mut().enumerate() {
            if (other == at) != (fault == Fault::Reordered) {
                (link.held, link.held_until) = (kinds, until);
                waits |= link.ready & kinds != 0;
            }
        }
        if waits {
            self.fault(fault);
        }
    }

    fn refuse_keys(&mut self, index: usize, fault: Fault, keys: u64) {
        let refused = self.followers[index].store.refused.load(Relaxed);
        let keys = if refused != 0 { 0 } else { keys };
        if keys != 0 {
            self.fault(fault);
        }
        self.refuse(index, keys);
        self.followers[index].refuses_until =
            if fault == Fault::RefusedShortly { self.steps + 40 } else { u64::MAX };
    }

    /// A bit of what is on its way.
    fn flip_bit(&mut self, fault: Fault) {
        let to_server = fault == Fault::BitToServer;
        let flipped = self.connections.iter_mut().find_map(|link| {
            let there = link.server.is_some() && link.client.is_some();
            let rng = Some(&mut self.rng).filter(|_| there)?;
            let bit = if to_server { link.to_server.flip(rng) } else { link.to_client.flip(rng) }?;
            link.tainted = true;
            Some((link.id, bit))
        });
        if let Some((id, bit)) = flipped {
            self.fault(fault);
            self.note(|| format!("{id}: bit {bit}"));
        }
    }

    /// Everybody is told that the server stops; then it comes back.
    fn stop_server(&mut self) -> Checked {
        for at in 0..self.connections.len() {
            if let Some(server) = &mut self.connections[at].server {
                server.session.handle_stop();
                server.dry = false;
                self.drain_server(at)?;
            }
        }
        self.any_changed = true;
        // Nothing is waited for: what is not said by then is cut off.
        for _ in 0..self.rng.u32(..60) {
            self.steps += 1;
            self.step(0)?;
        }
        let fault = if self.rng.bool() { Fault::ServerContinued } else { Fault::ServerRestarted };
        self.restart(fault, true);
        self.fault(Fault::ServerStopped);
        Ok(())
    }

    // The end.

    /// Nothing goes wrong any more.
    fn quiet(&mut self) -> Checked {
        self.any_changed = true;
        self.quiet = true;
        self.config.faults = 0;
        self.config.answer_bytes = self.config.answer_bytes.max(200);
        for follower in 0..self.followers.len() {
            self.refuse(follower, 0);
            self.followers[follower].store.unread.store(false, Relaxed);
        }
        for at in 0..self.connections.len() {
            let link = &mut self.connections[at];
            (link.held, link.held_until) = (0, 0);
            // A network that loses bits is no connection.
            if link.tainted {
                self.drop_client(at, true);
                self.drop_server(at, true);
            }
        }
        self.reap();
        // Somebody notices what cannot be read, and writes it again.
        let flipped: Vec<_> =
            (0..KEYS).filter(|key| self.flipped >> key & 1 == 1).map(|key| (key, false)).collect();
        if !flipped.is_empty() {
            self.write(&flipped);
        }
        self.seal();
        Ok(())
    }

    /// Until nothing is left to do, time included. So many steps are enough, or there is a deadlock.
    fn settle(&mut self) -> Checked {
        for _ in 0..SETTLED_WITHIN {
            self.steps += 1;
            for follower in 0..self.followers.len() {
                if self.followers[follower].link.is_none() {
                    self.connect(follower)?;
                    self.any_changed = true;
                }
            }
            if !self.step(0)? {
                if self.is_quiet() {
                    return Ok(());
                }
                let next = self.next_timeout().ok_or("nobody waits for anything")?;
                self.pass(next.saturating_sub(self.now))?;
                self.any_changed = true;
            }
            self.reap();
        }
        Err(format!("no end after {SETTLED_WITHIN} steps: {}", self.states()))
    }

    fn states(&self) -> String {
        let state = |link: &Connection| {
            let server = link.server.as_ref().map(|end| (end.session.state(), end.session.phase()));
            let client = link.client.as_ref().map(|end| end.session.state());
            format!(
                "{}: {server:?} {client:?} due {:?}; ",
                link.id, self.followers[link.follower].due
            )
        };
        self.connections.iter().map(state).collect()
    }

    fn is_quiet(&self) -> bool {
        self.connections.len() == self.followers.len()
            && self.followers.iter().all(|follower| {
                follower.link.is_some() && follower.due.is_none() && follower.retry.is_none()
            })
            && self.connections.iter().all(|link| {
                let server = link.server.as_ref().map(|end| end.session.state());
                let client = link.client.as_ref();
                server == Some("Relay")
                    && client.is_some_and(|end| {
                        end.session.state() == "Relay"
                            && !end.session.is_comparing()
                            && !end.session.is_catching_up()
                    })
            })
    }

    /// After quiet, and roots compared once to find what is wrong and once to find that nothing is, all
    /// tables are equal. Nobody asks for a diff that the protocol does not want itself.
    pub(crate) fn converge(&mut self) -> Checked {
        self.quiet()?;
        self.settle()?;
        self.hashing = None;
        for _ in 0..2 {
            self.verified = 0;
            for _ in 0..2 {
                self.checkpoint();
                self.settle()?;
            }
        }
        let expected = Self::contents(&self.store);
        // From the entries alone: nothing that was hashed before counts.
        let root = Tree::build(expected.iter().map(|(key, value)| (key, value))).root();
        check(self.table.tree().root() == root, || {
            "in the end the server's tree is not that of its store".to_owned()
        })?;
        let marks = self.log.marks();
        check(marks == 0, || format!("in the end there are {marks} marks of no diff"))?;
        let position = self.table.position();
        for (index, follower) in self.followers.iter().enumerate() {
            let found = Self::contents(&follower.store);
            check(found == expected, || {
                format!("in the end follower {index} has {found:?}, not {expected:?}")
            })?;
            check(follower.replica.tree().root() == root, || {
                format!("in the end the tree of follower {index} is not that of its store")
            })?;
            check(follower.wrong | follower.hidden == 0 && follower.cells == self.cells, || {
                format!("the oracle has lost count of follower {index}")
            })?;
        }
        for link in &self.connections {
            let at = link.client.as_ref().and_then(|client| client.session.position());
            let follower = link.follower;
            check(at == position, || {
                format!("follower {follower} is at {at:?}, not {position:?}")
            })?;
        }
        let (verified, all) = (self.verified, self.followers.len() as u64);
        check(verified >= all, || format!("{verified} of {all} have compared roots"))
    }

    /// Refusals that are over.
    pub(crate) fn expire(&mut self) {
        for follower in 0..self.followers.len() {
            if self.followers[follower].refuses_until < self.steps {
                self.refuse(follower, 0);
                self.followers[follower].refuses_until = u64::MAX;
            }
        }
    }
}
