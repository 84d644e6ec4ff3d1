//! Who runs a diff, and who is next.

use std::collections::BTreeMap;
use std::time::Duration;

use tablecast_protocol::{DiffId, FollowerId};
use tokio::time::Instant;

/// The places at which diffs run, and those that wait for one.
///
/// The follower whose last diff, or connect, is longest ago is next. Those whose last diff ended just now share one
/// place, so that however many ask over and over leave the others to whoever needs them.
///
/// While the server is busy diffs begin one after the other: [`BUSY_PAUSE`] behind the beginning of the last one, or, when one has
/// ended, when it is over for as long as it took. (So one that takes long, of a follower behind a slow line, holds up
/// nobody.) Who shares a place is behind the others then, and begins when the last one of those who do is over for [`BUSY_REST`]
/// times as long. Busy is a server whose questions wait in its mailbox: what tells a queue that stands from one that comes and goes
/// is how long things are in it (CoDel, RFC 8289).
#[derive(Debug)]
pub(super) struct Places {
    places: usize,
    /// For how long behind a diff its follower is one of those that share a place.
    rest: Duration,
    /// How long a question waits in the mailbox, smoothed.
    waited: Duration,
    /// When the next diff may begin beside a busy server.
    next: Instant,
    /// When the next one of those that share a place may, too.
    next_again: Instant,
    running: Vec<Running>,
    /// By the number of their turn: the lowest is next.
    waiting: BTreeMap<u64, (FollowerId, DiffId)>,
    /// Those that share a place, or did when they came, and when their last diff ended.
    waiting_again: BTreeMap<u64, (FollowerId, DiffId, Instant)>,
    last_turn: u64,
}

/// Questions that wait for so long wait behind others. One that wakes the server up waits for microseconds.
const BUSY_WAIT: Duration = Duration::from_millis(2);

/// How long no other diff begins behind the beginning of one, beside a busy server. One of 100,000 keys takes less.
const BUSY_PAUSE: Duration = Duration::from_secs(1);

/// How many times as long as a diff of one who asks over and over took, [`BUSY_PAUSE`] at the most, no other one of those begins
/// behind its end.
const BUSY_REST: u32 = 8;

/// When a follower is next: given to it when it connects, and when a diff of it ends.
#[derive(Clone, Copy, Debug)]
pub(super) struct Turn {
    number: u64,
    /// When its last diff ended.
    ended: Option<Instant>,
}

#[derive(Debug)]
struct Running {
    follower: FollowerId,
    diff: DiffId,
    since: Instant,
    /// When something was asked for it last.
    step: Instant,
    again: bool,
}

/// A diff for which nothing is asked for so large a part of its turn is over while others wait: a follower that does not answer
/// would have its place for as long as one that is repaired.
const STEPS: u32 = 8;

impl Places {
    /// So many, one at the least.
    pub(super) fn new(places: usize, rest: Duration) -> Self {
        Self {
            places: places.max(1),
            rest,
            waited: Duration::ZERO,
            next: Instant::now(),
            next_again: Instant::now(),
            running: Vec::new(),
            waiting: BTreeMap::new(),
            waiting_again: BTreeMap::new(),
            last_turn: 0,
        }
    }

    /// A question of a diff was so long in the mailbox.
    pub(super) fn waited(&mut self, wait: Duration) {
        // As round trips are smoothed (RFC 6298). A long one tells no more than that there was one: a process may have been stopped.
        let wait = wait.min(4 * BUSY_WAIT);
        self.waited = (self.waited * 7 + wait) / 8;
    }

    fn is_busy(&self) -> bool {
        self.waited > BUSY_WAIT
    }

    /// How many diffs run.
    pub(super) fn running(&self) -> usize {
        self.running.len()
    }

    /// How many wait.
    pub(super) fn waiting(&self) -> usize {
        self.waiting.len() + self.waiting_again.len()
    }

    /// The turn of a follower that connects, or of one whose diff ended now.
    pub(super) fn turn(&mut self, ended: Option<Instant>) -> Turn {
        self.last_turn += 1;
        Turn { number: self.last_turn, ended }
    }

    /// A diff wants a place.
    pub(super) fn wait(&mut self, follower: FollowerId, diff: DiffId, turn: Turn) {
        if let Some(ended) = turn.ended {
            self.waiting_again.insert(turn.number, (follower, diff, ended));
        } else {
            self.waiting.insert(turn.number, (follower, diff));
        }
    }

    /// Those that have rested share no place any more.
    fn end_rests(&mut self) {
        // Whose last diff ended first is first.
        while let Some(first) = self.waiting_again.first_entry()
            && first.get().2.elapsed() >= self.rest
        {
            let (number, (follower, diff, _)) = first.remove_entry();
            self.waiting.insert(number, (follower, diff));
        }
    }

    /// Gives a place to the diff that is next, if there is one.
    pub(super) fn admit(&mut self) -> Option<(FollowerId, DiffId)> {
        if self.running.len() >= self.places || self.waiting() == 0 {
            return None;
        }
        let (now, busy) = (Instant::now(), self.is_busy());
        self.end_rests();
        if busy && self.next > now {
            return None;
        }
        let free =
            !self.running.iter().any(|running| running.again) && (!busy || self.next_again <= now);
        let shared = self.waiting_again.first_key_value().filter(|_| free);
        let first = self.waiting.first_key_value();
        let again = shared
            .is_some_and(|(shared, _)| first.is_none_or(|(first, _)| shared < first && !busy));
        let (follower, diff) = if again {
            let (_, (follower, diff, _)) = self.waiting_again.pop_first()?;
            (follower, diff)
        } else {
            self.waiting.pop_first()?.1
        };
        self.running.push(Running { follower, diff, since: now, step: now, again });
        self.next = now + BUSY_PAUSE;
        Some((follower, diff))
    }

    /// The diff of a follower is over, or whichever it has: it had this turn when it came. Answers which, if it ran.
    pub(super) fn end(
        &mut self,
        follower: FollowerId,
        diff: Option<DiffId>,
        turn: Turn,
    ) -> Option<DiffId> {
        let over = |other: DiffId| diff.is_none_or(|diff| diff == other);
        if self.waiting.get(&turn.number).is_some_and(|(_, diff)| over(*diff)) {
            self.waiting.remove(&turn.number);
        }
        if self.waiting_again.get(&turn.number).is_some_and(|(_, diff, _)| over(*diff)) {
            self.waiting_again.remove(&turn.number);
        }
        let ran = |running: &Running| running.follower == follower && over(running.diff);
        let at = self.running.iter().position(ran)?;
        let running = self.running.remove(at);
        let now = Instant::now();
        let took = (now - running.since).min(BUSY_PAUSE);
        self.next = now + took;
        if running.again {
            self.next_again = now + BUSY_REST * took;
        }
        Some(running.diff)
    }

    /// Something is asked for a diff that runs.
    pub(super) fn step(&mut self, follower: FollowerId) {
        let runs = self.running.iter_mut().find(|running| running.follower == follower);
        if let Some(running) = runs {
            running.step = Instant::now();
        }
    }

    /// Diffs that have run for this long, or for an eighth of it without a step, as many as others wait that could begin then.
    pub(super) fn overdue(&mut self, long: Duration) -> impl Iterator<Item = (FollowerId, DiffId)> {
        self.end_rests();
        let most = if self.is_busy() { 1 } else { usize::MAX };
        // Where a place is free, it is not for want of one that anybody waits, but for that which some share.
        let full = self.running.len() >= self.places;
        let shared = self.running.iter().any(|running| running.again);
        let mut again = usize::from(!self.waiting_again.is_empty());
        let others = self.waiting.len() + if shared { 0 } else { again };
        let mut others = if full { others.min(most) } else { 0 };
        let gives_way = move |running: &&Running| {
            let late = running.since.elapsed() >= long || running.step.elapsed() >= long / STEPS;
            let left = if running.again && again > 0 { &mut again } else { &mut others };
            let gives_way = late && *left > 0;
            *left -= usize::from(gives_way);
            gives_way
        };
        let overdue = self.running.iter().filter(gives_way);
        overdue.map(|running| (running.follower, running.diff))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const DIFF: DiffId = DiffId(1);
    const LONG: Duration = Duration::MAX;

    fn admitted(places: &mut Places) -> Vec<u64> {
        std::iter::from_fn(|| places.admit()).map(|(follower, _)| follower.0).collect()
    }

    /// One that runs is over.
    fn end(places: &mut Places, follower: u64) -> Option<DiffId> {
        places.end(FollowerId(follower), None, Turn { number: 0, ended: None })
    }

    #[test]
    fn who_connected_or_was_repaired_longest_ago_is_next() {
        let mut places = Places::new(1, Duration::ZERO);
        let turns = [(); 3].map(|()| places.turn(None));
        for (follower, turn) in [(3, turns[2]), (1, turns[0]), (2, turns[1])] {
            places.wait(FollowerId(follower), DIFF, turn);
        }
        assert_eq!(admitted(&mut places), [1]);
        assert_eq!(places.end(FollowerId(1), Some(DiffId(2)), turns[0]), None);
        assert_eq!(places.end(FollowerId(1), Some(DIFF), turns[0]), Some(DIFF));
        let turn = places.turn(Some(Instant::now()));
        places.wait(FollowerId(1), DIFF, turn);
        assert_eq!(admitted(&mut places), [2]);
        assert_eq!((places.running(), places.waiting()), (1, 2));
        assert_eq!(places.end(FollowerId(3), Some(DiffId(2)), turns[2]), None);
        assert_eq!(places.waiting(), 2);
        assert_eq!(places.end(FollowerId(3), None, turns[2]), None);
        assert_eq!(places.waiting(), 1);
        end(&mut places, 2);
        assert_eq!(admitted(&mut places), [1]);
    }

    #[test]
    fn who_asks_over_and_over_shares_a_place() {
        let mut places = Places::new(3, LONG);
        for follower in 1..=5 {
            let turn = places.turn(Some(Instant::now()));
            places.wait(FollowerId(follower), DIFF, turn);
        }
        // The others' places are kept for whoever comes.
        assert_eq!(admitted(&mut places), [1]);
        for follower in 6..=9 {
            let turn = places.turn(None);
            places.wait(FollowerId(follower), DIFF, turn);
        }
        assert_eq!(admitted(&mut places), [6, 7]);
        end(&mut places, 6);
        assert_eq!(admitted(&mut places), [8]);
        // Who shares a place has waited longer than those who came last.
        end(&mut places, 1);
        assert_eq!(admitted(&mut places), [2]);
        end(&mut places, 2);
        assert_eq!(admitted(&mut places), [3]);
        assert_eq!((places.running(), places.waiting()), (3, 3));
    }

    #[tokio::test(start_paused = true)]
    async fn beside_a_busy_server_diffs_begin_one_after_the_other() {
        let tenth = BUSY_PAUSE / 10;
        let mut places = Places::new(3, LONG);
        let measured = |places: &mut Places, wait| (0..20).for_each(|_| places.waited(wait));
        let wait = |places: &mut Places, follower, ended| {
            let turn = places.turn(ended);
            places.wait(FollowerId(follower), DIFF, turn);
        };
        measured(&mut places, 2 * BUSY_WAIT);
        (1..=5).for_each(|follower| wait(&mut places, follower, None));
        assert_eq!(admitted(&mut places), [1]);
        // One that ends soon is over for as long as it took.
        tokio::time::advance(tenth).await;
        end(&mut places, 1);
        assert_eq!(admitted(&mut places), []);
        tokio::time::advance(tenth).await;
        assert_eq!(admitted(&mut places), [2]);
        // One that takes long holds up nobody, and is the only one to give way.
        tokio::time::advance(BUSY_PAUSE).await;
        assert_eq!(admitted(&mut places), [3]);
        // There is a place for those that wait.
        assert_eq!(places.overdue(Duration::ZERO).count(), 0);
        wait(&mut places, 6, None);
        tokio::time::advance(BUSY_PAUSE).await;
        assert_eq!(admitted(&mut places), [4]);
        assert_eq!(places.overdue(Duration::ZERO).count(), 1);
        // It is busy no more.
        measured(&mut places, Duration::ZERO);
        assert_eq!(places.overdue(Duration::ZERO).count(), 2);
        for follower in 2..=6 {
            assert_eq!(end(&mut places, follower), Some(DIFF));
            admitted(&mut places);
        }

        measured(&mut places, 2 * BUSY_WAIT);
        (1..=2).for_each(|follower| wait(&mut places, follower, Some(Instant::now())));
        tokio::time::advance(BUSY_PAUSE).await;
        assert_eq!(admitted(&mut places), [1]);
        tokio::time::advance(tenth).await;
        end(&mut places, 1);
        tokio::time::advance((BUSY_REST - 1) * tenth).await;
        assert_eq!(admitted(&mut places), []);
        // Who has just come does not wait for that, and is before those that ask over and over.
        wait(&mut places, 3, None);
        assert_eq!(admitted(&mut places), [3]);
        wait(&mut places, 4, None);
        tokio::time::advance(BUSY_PAUSE).await;
        assert_eq!(admitted(&mut places), [4]);
        tokio::time::advance(BUSY_PAUSE).await;
        assert_eq!(admitted(&mut places), [2]);
    }

    #[tokio::test(start_paused = true)]
    async fn who_asks_again_beside_a_busy_server_is_not_held_up_for_ever() {
        let rest = 10 * BUSY_PAUSE;
        let mut places = Places::new(3, rest);
        (0..20).for_each(|_| places.waited(2 * BUSY_WAIT));
        let wait = |places: &mut Places, follower, ended| {
            let turn = places.turn(ended);
            places.wait(FollowerId(follower), DIFF, turn);
        };
        wait(&mut places, 1, Some(Instant::now()));
        // One newcomer after the other, as many as the server bears.
        let mut begun = Vec::new();
        for follower in 2..20 {
            wait(&mut places, follower, None);
            begun.extend(admitted(&mut places));
            end(&mut places, follower);
            tokio::time::advance(BUSY_PAUSE).await;
        }
        // It has rested by then, and has waited for longer than they.
        assert_eq!(begun.iter().position(|follower| *follower == 1), Some(10));
        assert_eq!(begun.get(..3), Some(&[2, 3, 4][..]));
    }

    #[test]
    fn what_runs_for_long_is_overdue_if_others_wait() {
        let mut places = Places::new(0, LONG);
        let turns = [(); 2].map(|()| places.turn(None));
        places.wait(FollowerId(1), DIFF, turns[0]);
        assert_eq!(admitted(&mut places), [1]);
        assert_eq!(places.overdue(Duration::ZERO).count(), 0);
        places.wait(FollowerId(2), DIFF, turns[1]);
        assert_eq!(places.overdue(LONG).count(), 0);
        assert_eq!(places.overdue(Duration::ZERO).collect::<Vec<_>>(), [(FollowerId(1), DIFF)]);
    }

    #[test]
    fn those_that_share_a_place_end_nobody_elses_diff() {
        let mut places = Places::new(3, LONG);
        let wait = |places: &mut Places, follower, ended| {
            let turn = places.turn(ended);
            places.wait(FollowerId(follower), DIFF, turn);
        };
        wait(&mut places, 1, None);
        wait(&mut places, 2, Some(Instant::now()));
        assert_eq!(admitted(&mut places), [1, 2]);
        let overdue = |places: &mut Places| -> Vec<u64> {
            places.overdue(Duration::ZERO).map(|(follower, _)| follower.0).collect()
        };
        assert_eq!(overdue(&mut places), []);
        wait(&mut places, 3, Some(Instant::now()));
        assert_eq!(admitted(&mut places), []);
        assert_eq!(overdue(&mut places), [2]);
        // Nor is anybody else's ended for more of them.
        wait(&mut places, 4, Some(Instant::now()));
        assert_eq!(overdue(&mut places), [2]);
        // Who needs one has it, and the next one is waited for.
        wait(&mut places, 5, None);
        wait(&mut places, 6, None);
        assert_eq!(admitted(&mut places), [5]);
        assert_eq!(overdue(&mut places), [1, 2]);
    }

    #[tokio::test(start_paused = true)]
    async fn for_those_that_have_rested_others_give_way() {
        let mut places = Places::new(2, Duration::from_secs(10));
        let wait = |places: &mut Places, follower, ended| {
            let turn = places.turn(ended);
            places.wait(FollowerId(follower), DIFF, turn);
        };
        let ended = Instant::now();
        wait(&mut places, 1, None);
        assert_eq!(admitted(&mut places), [1]);
        tokio::time::advance(Duration::from_secs(40)).await;
        wait(&mut places, 2, Some(Instant::now()));
        assert_eq!(admitted(&mut places), [2]);
        wait(&mut places, 3, Some(ended));
        let overdue: Vec<_> = places.overdue(Duration::from_secs(30)).collect();
        assert_eq!(overdue, [(FollowerId(1), DIFF)]);
    }

    #[tokio::test(start_paused = true)]
    async fn so_is_what_does_nothing_for_an_eighth_of_that() {
        let long = Duration::from_secs(8);
        let mut places = Places::new(1, LONG);
        for follower in [1, 2] {
            let turn = places.turn(None);
            places.wait(FollowerId(follower), DIFF, turn);
        }
        assert_eq!(admitted(&mut places), [1]);
        let overdue = |places: &mut Places| places.overdue(long).count();
        for _ in 0..7 {
            tokio::time::advance(long / 8 - Duration::from_millis(1)).await;
            assert_eq!(overdue(&mut places), 0);
            places.step(FollowerId(1));
        }
        tokio::time::advance(long / 8).await;
        assert_eq!(overdue(&mut places), 1);
    }
}
