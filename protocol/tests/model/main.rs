//! The heart of the protocol, explored exhaustively within bounds: whatever comes between whatever, the promises
//! hold. And broken on purpose: the shortest way to where they do not, as docs/model.md has it.

#![allow(
    clippy::unwrap_used,
    clippy::indexing_slicing,
    clippy::cast_possible_truncation,
    clippy::too_many_lines,
    clippy::wildcard_enum_match_arm,
    clippy::wrong_self_convention,
    clippy::disallowed_methods,
    clippy::disallowed_types,
    unreachable_pub,
    missing_docs,
    reason = "a test fails by panicking, and its numbers are small"
)]

mod world;

use std::fmt::Write;
use std::time::Instant;

use stateright::{Checker, HasDiscoveries, Model, Property};
use tablecast_protocol::Mutation;

use crate::world::{Action, Bounds, Start, World, Wrong};

const PAGE: &str = include_str!("../../../docs/model.md");
const MUTATIONS: &str = include_str!("../../src/mutation.rs");

struct Heart {
    bounds: Bounds,
    mutation: Option<Mutation>,
}

/// One property, so that the first state that is found is one of the nearest; [`World::wrong`] says which
/// promise it breaks.
const PROMISES: &str = "the promises hold";

impl Model for Heart {
    type State = World;
    type Action = Action;

    fn init_states(&self) -> Vec<World> {
        vec![World::new(&self.bounds, self.mutation)]
    }

    fn actions(&self, world: &World, actions: &mut Vec<Action>) {
        world.actions(actions);
    }

    fn next_state(&self, world: &World, action: Action) -> Option<World> {
        Some(world.after(action))
    }

    fn properties(&self) -> Vec<Property<Self>> {
        vec![Property::always(PROMISES, |_, world: &World| world.wrong.is_none())]
    }
}

/// Breadth first: what goes wrong, and a shortest way there.
fn explore(bounds: Bounds, mutation: Option<Mutation>) -> Option<(Wrong, Vec<String>)> {
    let begun = Instant::now();
    let told = format!("{mutation:?} {bounds:?}");
    let heart = Heart { bounds, mutation };
    let checker = heart.checker().finish_when(HasDiscoveries::AnyFailures).spawn_bfs().join();
    let (states, depth) = (checker.unique_state_count(), checker.max_depth());
    println!("{states} states, {depth} deep, {:?}: {told}", begun.elapsed());
    checker.discovery(PROMISES).map(|path| {
        let steps = path.into_vec();
        let trace = steps.iter().filter_map(|(world, action)| Some(world.explain((*action)?)));
        let trace = trace.collect();
        (steps.last().unwrap().0.wrong.clone().unwrap(), trace)
    })
}

fn holds(bounds: Bounds) {
    if let Some((wrong, trace)) = explore(bounds, None) {
        panic!("{wrong:?} after\n{}", trace.join("\n"));
    }
}

fn one() -> Bounds {
    Bounds { repair_bytes: 1, ..Bounds::default() }
}

/// It comes back, and has what there was.
fn back() -> Bounds {
    Bounds { followers: vec![Start::Equal], ..one() }
}

#[test]
fn one_follower_in_a_diff() {
    holds(Bounds { writes: 3, ..one() });
    holds(Bounds { writes: 2, repair_window: 1, diffs: 1, ..one() });
    holds(Bounds { writes: 3, part_keys: 1, ..one() });
}

#[test]
fn one_follower_that_is_cut_off_and_falls_behind() {
    holds(Bounds { writes: 2, cuts: 1, log_bytes: 1, updated_keys: 1, ..one() });
    holds(Bounds { writes: 3, diffs: 1, log_bytes: 1, ..back() });
}

#[test]
fn one_follower_that_comes_back() {
    holds(Bounds { writes: 1, storms: 1, cuts: 1, ..back() });
    holds(Bounds { writes: 2, restores: 1, ..back() });
    holds(Bounds { writes: 2, restarts: 1, ..back() });
}

#[test]
fn one_follower_and_checkpoints() {
    holds(Bounds { writes: 1, checkpoints: 2, ..one() });
    holds(Bounds { writes: 1, cuts: 1, checkpoints: 2, ..back() });
}

#[test]
fn one_follower_every_step_alone() {
    holds(Bounds { writes: 2, log_bytes: 1, rush: false, ..one() });
    holds(Bounds { writes: 1, cuts: 1, rush: false, ..one() });
}

#[test]
fn two_followers() {
    let followers = vec![Start::Stale, Start::Equal];
    holds(Bounds { followers, writes: 1, cuts: 1, ..Bounds::default() });
    let followers = vec![Start::Stale, Start::Stale];
    holds(Bounds { followers, writes: 1, log_bytes: 1, ..Bounds::default() });
}

/// Minutes, and two gigabytes.
#[test]
#[ignore = "takes minutes"]
fn further() {
    holds(Bounds { writes: 3, cuts: 1, diffs: 1, ..one() });
    holds(Bounds { writes: 3, cuts: 1, log_bytes: 1, updated_keys: 1, ..one() });
    let followers = vec![Start::Stale, Start::Stale];
    holds(Bounds { followers, writes: 1, cuts: 1, log_bytes: 1, ..one() });
    let followers = vec![Start::Stale, Start::Equal];
    holds(Bounds { followers, writes: 2, cuts: 1, ..one() });
}

/// Where each broken rule is looked for.
fn hunts() -> Vec<(Mutation, Bounds)> {
    use Mutation as M;
    let jump = || Bounds { writes: 2, log_bytes: 1, ..one() };
    let two = || Bounds { writes: 2, ..one() };
    vec![
        (M::NoSuppression, one()),
        (M::RecordAfterSnapshot, one()),
        (M::RecordingEndsWithWalk, one()),
        (M::NoHold, two()),
        (M::StaleDiffer, jump()),
        (M::JumpKeepsDiff, jump()),
        (M::CatchUpKeepsPosition, Bounds { writes: 0, storms: 1, ..back() }),
        (M::NoDeleteSuppression, one()),
        (M::SuppressAtReading, Bounds { repair_window: 1, ..two() }),
        (M::EndMarkOvertakes, two()),
        (M::LivePassesMark, one()),
        (M::StaleRoot, Bounds { writes: 3, diffs: 1, log_bytes: 1, ..back() }),
        (M::ResumeAtHead, back()),
        (M::CaughtUpEarly, back()),
        (M::MarkAnywhere, Bounds { checkpoints: 1, ..one() }),
        (M::NewcomerHasPosition, one()),
        (M::JumpKeepsPosition, jump()),
        (M::PositionBeforeRepairs, one()),
        (M::VerifyAnyMark, Bounds { checkpoints: 2, ..one() }),
        (M::MarkWhileMissing, Bounds { checkpoints: 1, ..one() }),
        (M::ResumeAnyChain, Bounds { writes: 2, restores: 1, ..back() }),
        (M::ResumeAnyEpoch, Bounds { restarts: 1, ..back() }),
    ]
}

/// The rows of the page's table: mutation, what notices it, steps.
fn rows() -> Vec<(&'static str, &'static str, &'static str)> {
    let cells = |line: &'static str| -> Option<_> {
        let cells: Vec<_> = line.strip_prefix("| `")?.strip_suffix(" |")?.split(" | ").collect();
        let [name, _, by, steps] = cells[..] else { return None };
        Some((name.trim_end_matches('`'), by, steps.trim()))
    };
    PAGE.lines().filter_map(cells).collect()
}

#[test]
fn broken_rules_are_found() {
    let (mut page, mut wrong) = (String::new(), Vec::new());
    for (number, (mutation, bounds)) in hunts().into_iter().enumerate() {
        // What does harm is looked for, if there is any.
        let bounds = Bounds { again: mutation == Mutation::RecordAfterSnapshot, ..bounds };
        let (what, trace) = explore(bounds, Some(mutation)).expect("it is found");
        let name = format!("{mutation:?}");
        let steps = trace.len().to_string();
        if !rows().iter().any(|row| row.0 == name && row.1.contains("model") && row.2 == steps) {
            wrong.push(format!("{name}: {steps} steps"));
        }
        if number < 7 {
            writeln!(page, "### {name}\n\n```text\n{}\n```\n\n{what:?}\n", trace.join("\n"))
                .unwrap();
        }
    }
    println!("{page}");
    assert!(wrong.is_empty(), "the page's table does not say {wrong:#?}");
    assert!(PAGE.contains(page.trim_end()), "the page's traces are not these");
}

#[test]
fn every_mutation_is_on_the_page() {
    let variants =
        MUTATIONS.lines().filter_map(|line| line.strip_prefix("    ")?.strip_suffix(','));
    let variants: Vec<_> =
        variants.filter(|name| name.chars().all(char::is_alphanumeric)).collect();
    assert!(variants.len() >= 36);
    assert_eq!(variants, rows().iter().map(|row| row.0).collect::<Vec<_>>());
    let by_model = rows().iter().filter(|row| row.1.contains("model")).count();
    assert_eq!(by_model, hunts().len());
    for (who, tests) in [
        ("simulator", include_str!("../../simulator/tests/runs.rs")),
        ("runs", include_str!("../it/convergence.rs")),
        ("states", include_str!("../it/transitions.rs")),
    ] {
        let named: Vec<&str> = tests
            .split("::")
            .filter_map(|rest| rest.split(|next: char| !next.is_alphanumeric()).next())
            .collect();
        for (name, by, _) in rows() {
            assert_eq!(by.contains(who), named.contains(&name), "{name}: {who}");
        }
    }
}
