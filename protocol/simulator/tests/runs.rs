//! Some thousand runs hold, reach what they are there for, and can fail.

#![allow(clippy::unwrap_used, reason = "a test fails by panicking")]

use tablecast_protocol::Mutation;
use tablecast_simulator::{Fault, Run, Totals, run};

/// Of each run in these tests.
const DELIVERIES: u64 = 400;

/// So many that every cell is reached, some of them a few times.
const SEEDS: u64 = 6000;

#[test]
fn everything_is_kept_and_everything_is_reached() {
    let mut totals = Totals::default();
    for seed in 0..SEEDS {
        run(seed, DELIVERIES, &mut totals).unwrap_or_else(|failure| panic!("{failure}"));
    }
    for (fault, count) in Fault::ALL.iter().zip(&totals.faults) {
        assert!(*count > 0, "no {fault:?}");
    }
    assert_eq!((totals.server.missing(), totals.client.missing()), (Vec::new(), Vec::new()));
    assert_eq!((totals.server.wrong(), totals.client.wrong()), (Vec::new(), Vec::new()));
    for (what, count) in [
        ("diffs", totals.diffs),
        ("aborts", totals.aborts),
        ("repairs", totals.repaired),
        ("comparisons", totals.verified),
        ("corruptions found", totals.found),
        ("catch-ups", totals.caught_up),
    ] {
        assert!(count >= 100, "only {count} {what}");
    }
    for (way, count) in totals.ways.iter().enumerate() {
        assert!(*count > 0, "no follower came by way {way}");
    }
}

#[test]
fn one_seed_is_one_run() {
    for seed in 0..20 {
        let [one, two] = [(); 2].map(|()| {
            let mut totals = Totals::default();
            run(seed, DELIVERIES, &mut totals).unwrap();
            totals
        });
        assert_eq!(
            (one.delivered, one.steps, &one.faults),
            (two.delivered, two.steps, &two.faults)
        );
        assert!(one.server.cells().eq(two.server.cells()));
        assert!(one.client.cells().eq(two.client.cells()));
    }
}

/// Looks for a run in which a broken rule is noticed, among so many.
fn caught(mutation: Mutation, seeds: u64) -> String {
    let mut totals = Totals::default();
    for seed in 0..seeds {
        let broken = Run { seed, deliveries: DELIVERIES, mutation: Some(mutation), trace: false };
        if let Err(failure) = broken.run(&mut totals) {
            eprintln!("{mutation:?}: {failure}");
            return failure.why;
        }
    }
    panic!("nobody notices {mutation:?} in {seeds} runs");
}

#[test]
fn notices_a_missing_suppression() {
    caught(Mutation::NoSuppression, 1000);
}

#[test]
fn notices_recording_that_begins_after_the_snapshot() {
    caught(Mutation::RecordAfterSnapshot, 1000);
}

#[test]
fn notices_recording_that_ends_with_the_walk() {
    caught(Mutation::RecordingEndsWithWalk, 1000);
}

#[test]
fn notices_a_missing_hold() {
    caught(Mutation::NoHold, 1000);
}

#[test]
fn notices_a_differ_of_an_earlier_diff() {
    caught(Mutation::StaleDiffer, 1000);
}

#[test]
fn notices_a_jump_that_does_not_abort() {
    caught(Mutation::JumpKeepsDiff, 1000);
}

#[test]
fn notices_a_position_kept_in_a_shortened_catch_up() {
    caught(Mutation::CatchUpKeepsPosition, 1000);
}

#[test]
fn notices_a_position_of_a_table_that_is_another() {
    for mutation in [
        Mutation::ResumeAtHead,
        Mutation::CaughtUpEarly,
        Mutation::NewcomerHasPosition,
        Mutation::JumpKeepsPosition,
        Mutation::PositionBeforeRepairs,
        Mutation::FailedKeepsPosition,
        Mutation::RefusedKeepsPosition,
        Mutation::RefusalForgotten,
        Mutation::UnequalKeepsPosition,
        Mutation::ResumeAnyChain,
        Mutation::ResumeAnyEpoch,
    ] {
        caught(mutation, 1000);
    }
}

#[test]
fn notices_most_other_mutations() {
    for mutation in [
        Mutation::NoDeleteSuppression,
        Mutation::SuppressAtReading,
        Mutation::PartCutShort,
        Mutation::EndMarkOvertakes,
        Mutation::LivePassesMark,
        Mutation::UpdatedUnbounded,
        Mutation::NoWindow,
        Mutation::HeldRepairsSent,
        Mutation::MarkAnywhere,
        Mutation::HeldRepairsTaken,
        Mutation::VerifyAnyMark,
        Mutation::MarkWhileMissing,
    ] {
        caught(mutation, 1000);
    }
}
