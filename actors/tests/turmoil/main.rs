//! The actors over turmoil's simulated network, which loses, delays, holds back and cuts, on hosts that crash and come
//! back, with time that is counted and not waited for. One seed is one run.
//!
//! `TURMOIL_SEEDS=1000..5000 cargo test -p tablecast-actors --test turmoil` runs others, `TURMOIL_SEEDS=7` prints what
//! happens in one.

#![allow(
    missing_docs,
    unreachable_pub,
    clippy::unwrap_used,
    clippy::indexing_slicing,
    clippy::wildcard_enum_match_arm,
    reason = "tests may panic"
)]

mod history;
mod net;
mod world;

use world::run;

#[test]
fn after_quiet_all_are_equal() {
    let seeds = std::env::var("TURMOIL_SEEDS").unwrap_or_else(|_| "0..40".to_owned());
    let number = |text: &str| text.parse::<u64>().expect("TURMOIL_SEEDS is a seed, or FROM..TO");
    let (range, print) = match seeds.split_once("..") {
        Some((from, to)) => (number(from)..number(to), false),
        None => (number(&seeds)..number(&seeds) + 1, true),
    };
    let mut failed = Vec::new();
    for seed in range {
        let run = run(seed, false);
        if print {
            println!("{}", run.trace.join("\n"));
        }
        if let Some(why) = run.failed {
            println!("seed {seed}: {why}");
            failed.push(seed);
        }
    }
    assert!(failed.is_empty(), "seeds {failed:?} fail; TURMOIL_SEEDS={} shows one", failed[0]);
}

#[test]
fn one_seed_is_one_run() {
    for seed in 0..8 {
        let [first, second] = [(); 2].map(|()| run(seed, false).trace);
        let differ = first.iter().zip(&second).find(|(first, second)| first != second);
        assert_eq!(differ, None, "seed {seed}");
        assert!(first.len() == second.len() && first.len() > 100, "seed {seed}");
    }
}

#[test]
fn a_panic_of_an_actor_fails_the_run() {
    let why = run(5, true).failed.expect("the run fails");
    assert!(why.contains("the store panics"), "{why}");
}
