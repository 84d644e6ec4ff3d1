//! The three promises that `server.rs` argues, under any interleaving; and that the tests can fail.

use proptest::prelude::*;
use proptest::test_runner::{Config, RngAlgorithm, TestRng, TestRunner};
use tablecast_protocol::{Change, Mutation, Store, Way};

use crate::pair::{Action, Checked, World, WorldConfig, key};

fn action() -> impl Strategy<Value = Action> {
    let f = 0_u8..3;
    prop_oneof![
        8 => (any::<u8>(), any::<u8>(), any::<bool>())
            .prop_map(|(key, keys, delete)| Action::Write { key, keys, delete }),
        6 => Just(Action::Seal),
        3 => Just(Action::Checkpoint),
        12 => f.clone().prop_map(Action::Serve),
        12 => f.clone().prop_map(Action::Answer),
        12 => (f.clone(), any::<u8>()).prop_map(|(f, which)| Action::Differ(f, which)),
        20 => f.clone().prop_map(Action::Transmit),
        14 => f.clone().prop_map(Action::ToServer),
        20 => f.clone().prop_map(Action::ToClient),
        12 => f.clone().prop_map(Action::Work),
        2 => f.clone().prop_map(Action::Diff),
        1 => f.clone().prop_map(Action::Cut),
        4 => f.clone().prop_map(Action::Connect),
        1 => (f, any::<u8>()).prop_map(|(f, number)| Action::Spoil(f, number)),
    ]
}

fn actions() -> impl Strategy<Value = Vec<Action>> {
    proptest::collection::vec(action(), 50..600)
}

fn config() -> impl Strategy<Value = WorldConfig> {
    let most = prop_oneof![Just(1_u64), Just(u64::MAX)];
    let shorten = prop_oneof![Just(0_usize), Just(1000)];
    let log = prop_oneof![2 => 300_usize..2000, 1 => 9000_usize..24_000];
    (1_usize..=3, log, 2_usize..40, 8_usize..200, (1_usize..=2, shorten, most)).prop_map(
        |(followers, log_bytes, updated_keys, repair_bytes, rest)| WorldConfig {
            followers,
            log_bytes,
            updated_keys,
            repair_bytes,
            diffs_at_once: rest.0,
            shorten_changes: rest.1,
            max_deletes: rest.2,
            mutation: None,
        },
    )
}

/// What happens until the server comes back: as a new one, or as it was so many revisions ago.
fn lives() -> impl Strategy<Value = Vec<(Vec<Action>, u8)>> {
    proptest::collection::vec((proptest::collection::vec(action(), 30..200), 0_u8..20), 2..4)
}

fn run(config: WorldConfig, actions: &[Action]) -> Result<World, String> {
    let mut world = World::new(config);
    for follower in 0..3 {
        world.act(Action::Connect(follower))?;
    }
    actions.iter().try_for_each(|action| world.act(*action))?;
    world.converge()?;
    Ok(world)
}

/// Servers that come and go, then a run on the last of them.
fn live(
    config: WorldConfig,
    lives: Vec<(Vec<Action>, u8)>,
    actions: &[Action],
) -> Result<World, String> {
    let mut world = World::new(config);
    for (life, restore) in lives {
        life.iter().try_for_each(|action| world.act(*action))?;
        // Half of the time everybody has what was written.
        if restore % 2 == 0 {
            world.converge()?;
            miss(&mut world, restore)?;
            world.settle()?;
        }
        world.act(if restore > 3 { Action::Restore(restore - 4) } else { Action::Restart })?;
    }
    actions.iter().try_for_each(|action| world.act(*action))?;
    world.converge()?;
    Ok(world)
}

/// One comes back to more changes than keys, and may be cut off again while it gets them.
fn miss(world: &mut World, f: u8) -> Checked {
    world.act(Action::Cut(f))?;
    world.act(Action::Write { key: f, keys: 255, delete: f.is_multiple_of(3) })?;
    world.act(Action::Seal)?;
    for action in [
        Action::Connect(f),
        Action::ToServer(f),
        Action::Serve(f),
        Action::Answer(f),
        Action::Answer(f),
        Action::Transmit(f),
        Action::Transmit(f),
        Action::ToClient(f),
        Action::ToClient(f),
    ] {
        world.act(action)?;
    }
    if f.is_multiple_of(4) { world.act(Action::Cut(f)) } else { Ok(()) }
}

fn failed(why: String) -> TestCaseError {
    TestCaseError::fail(why)
}

proptest! {
    // PROPTEST_CASES asks for more.
    #![proptest_config(Config { cases: Config::default().cases.max(400), ..Config::default() })]

    #[test]
    fn one_quiet_diff_makes_all_tables_equal(config in config(), actions in actions()) {
        run(config, &actions).map_err(failed)?;
    }

    #[test]
    fn also_across_restarts_of_the_server(
        config in config(),
        lives in lives(),
        actions in actions(),
    ) {
        live(config, lives, &actions).map_err(failed)?;
    }
}

/// The generated runs reach what they are there for.
#[test]
fn the_runs_are_not_idle() {
    let mut runner = runner(100);
    let total = std::cell::RefCell::new(crate::pair::Stats::default());
    runner
        .run(&(config(), lives(), actions()), |(config, lives, actions)| {
            let stats = live(config, lives, &actions).map_err(failed)?.stats;
            let mut total = total.borrow_mut();
            total.repaired += stats.repaired;
            total.suppressed += stats.suppressed;
            total.jumps += stats.jumps;
            total.aborts += stats.aborts;
            total.stale += stats.stale;
            total.overflows += stats.overflows;
            total.queued += stats.queued;
            total.cuts += stats.cuts;
            total.verified += stats.verified;
            total.caught_up += stats.caught_up;
            total.shortened += stats.shortened;
            total.held += stats.held;
            for (all, way) in total.ways.iter_mut().zip(stats.ways) {
                *all += way;
            }
            Ok(())
        })
        .unwrap();
    let total = total.into_inner();
    for (count, what) in [
        (total.repaired, "repairs"),
        (total.suppressed, "suppressed keys"),
        (total.jumps, "jumps"),
        (total.aborts, "aborts"),
        (total.stale, "diffs asked for before a jump"),
        (total.overflows, "overflows"),
        (total.queued, "queued diffs"),
        (total.cuts, "cuts"),
        (total.verified, "verifications"),
        (total.caught_up, "shortened catch-ups"),
        (total.shortened, "changes of shortened catch-ups"),
        (total.held, "held repairs"),
        (total.ways[Way::Resumed as usize], "resumed"),
        (total.ways[Way::NoPosition as usize], "without a position"),
        (total.ways[Way::OtherEpoch as usize], "of another epoch"),
        (total.ways[Way::NotInLog as usize], "behind the log"),
        (total.ways[Way::OtherChain as usize], "of another chain"),
        (total.ways[Way::Ahead as usize], "ahead"),
        (total.ways[Way::Shortened as usize], "shortened"),
        // Cut off in the middle, or fallen behind there.
        (total.ways[Way::Shortened as usize] - total.caught_up, "interrupted catch-ups"),
    ] {
        assert!(count >= 10, "only {count} {what} in 100 runs: {total:?}");
    }
}

fn runner(cases: u32) -> TestRunner {
    let rng = TestRng::from_seed(RngAlgorithm::ChaCha, &[7; 32]);
    let config =
        Config { cases, failure_persistence: None, max_shrink_iters: 0, ..Config::default() };
    TestRunner::new_with_rng(config, rng)
}

/// How a broken protocol is noticed: what the first run that fails says.
fn caught(mutation: Mutation) -> String {
    let found = std::cell::RefCell::new(None);
    let result = runner(3000).run(&(config(), actions()), |(config, actions)| {
        let config = WorldConfig { mutation: Some(mutation), ..config };
        run(config, &actions).map(drop).map_err(|why| {
            found.borrow_mut().get_or_insert(why.clone());
            failed(why)
        })
    });
    assert!(result.is_err(), "nobody notices {mutation:?}");
    found.into_inner().unwrap()
}

#[test]
fn notices_a_missing_suppression() {
    assert!(caught(Mutation::NoSuppression).contains("updated mid-diff"));
}

#[test]
fn notices_recording_that_begins_after_the_snapshot() {
    assert!(caught(Mutation::RecordAfterSnapshot).contains("updated mid-diff"));
}

#[test]
fn notices_recording_that_ends_with_the_walk() {
    assert!(caught(Mutation::RecordingEndsWithWalk).contains("updated mid-diff"));
}

#[test]
fn notices_a_missing_hold() {
    assert!(caught(Mutation::NoHold).contains("repaired by"));
}

#[test]
fn notices_a_position_kept_in_a_shortened_catch_up() {
    caught(Mutation::CatchUpKeepsPosition);
}

#[test]
fn notices_a_jump_that_does_not_abort() {
    caught(Mutation::JumpKeepsDiff);
}

#[test]
fn notices_most_other_mutations() {
    for mutation in [
        Mutation::NoDeleteSuppression,
        Mutation::SuppressAtReading,
        Mutation::PartCutShort,
        Mutation::EndMarkOvertakes,
        Mutation::LivePassesMark,
        Mutation::HeldRepairsSent,
        Mutation::ResumeAtHead,
        Mutation::CaughtUpEarly,
        Mutation::MarkAnywhere,
        Mutation::NewcomerHasPosition,
        Mutation::JumpKeepsPosition,
        Mutation::PositionBeforeRepairs,
        Mutation::HeldRepairsTaken,
    ] {
        println!("{mutation:?}: {}", caught(mutation));
    }
}

/// Whatever the tests of the tests find, the same runs pass unbroken.
#[test]
fn the_same_runs_pass_unbroken() {
    runner(300)
        .run(&(config(), actions()), |(config, actions)| {
            run(config, &actions).map(drop).map_err(failed)
        })
        .unwrap();
}

#[test]
fn a_refused_key_is_reported_and_repaired_by_the_next_diff() -> Checked {
    let mut world = World::new(WorldConfig { followers: 1, ..WorldConfig::default() });
    world.refuse(0, [key(1), key(2)]);
    world.act(Action::Connect(0))?;
    world.settle()?;
    let (root, server_root, counts) = world.followers[0].last_diff.unwrap();
    assert_ne!(root, server_root);
    assert_eq!(counts.failed, 2);
    // A live change is refused as well: nothing else is lost.
    world.act(Action::Write { key: 1, keys: 2, delete: false })?;
    world.settle()?;
    world.refuse(0, []);
    world.act(Action::Diff(0))?;
    world.settle()?;
    let (root, server_root, counts) = world.followers[0].last_diff.unwrap();
    assert_eq!(root, server_root);
    assert_eq!((counts.written, counts.failed), (2, 0));
    world.converge()
}

#[test]
fn a_value_that_changed_behind_the_servers_back_is_not_sent() -> Checked {
    let mut world = World::new(WorldConfig { followers: 1, ..WorldConfig::default() });
    // Key 0 differs on no follower, key 3 on all of them.
    world.server_store().apply(&[Change::write(key(3), "forged")]).unwrap();
    world.act(Action::Connect(0))?;
    let result = world.settle();
    // The roots are equal as far as the trees know; the follower's lacks the key.
    let (root, server_root, counts) = world.followers[0].last_diff.ok_or("no diff")?;
    assert_eq!(counts.failed, 1, "{result:?}");
    assert_ne!(root, server_root);
    Ok(())
}

/// The first answer is on its way while the second mark could be set, on a quiet stream.
#[test]
fn one_revision_is_marked_once_at_a_time() -> Checked {
    let mut world = World::new(WorldConfig { followers: 1, ..WorldConfig::default() });
    world.converge()?;
    let mark = [Action::Checkpoint, Action::Transmit(0)];
    let hear = [Action::ToClient(0), Action::ToClient(0), Action::Work(0)];
    let answer = [Action::ToServer(0)];
    for action in [&mark[..], &mark, &hear, &mark, &mark, &answer, &hear, &answer].concat() {
        world.act(action)?;
    }
    world.converge()
}
