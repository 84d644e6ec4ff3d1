//! `diff`: a server and a follower over TCP, equal but for some keys; and the same walk once more
//! without sockets, to tell its bytes and times apart from the repairs'.

use std::time::{Duration, Instant};

use anyhow::Context;
use clap::ArgAction;
use serde_json::json;
use tablecast::{ClientConfig, DiffOutcome, DiffReport, MemoryStore, ServerConfig};
use tablecast_bench::{KEY_BYTES, differences, disturb, follow, keys, median, serve, store};
use tablecast_protocol::diff::{Found, Step, Walk, answer};
use tablecast_protocol::server::SessionConfig;
use tablecast_protocol::wire::{self, Raw};
use tablecast_protocol::{
    Chain, Change, DiffId, Revision, Store, ToClient, ToServer, Tree, tree::Entry,
};

use crate::report::{Report, rounded};

pub(crate) const VALUE_BYTES: usize = 32;

#[derive(Debug, clap::Args)]
pub(crate) struct Args {
    /// Keys in the server's table, of 16 bytes each, with values of 32.
    #[arg(long, default_value_t = 1_000_000)]
    keys: usize,
    /// Keys in which the follower differs: a third changed, a third missing, a third extra.
    #[arg(long, default_value_t = 1000)]
    differ: usize,
    /// Diffs, each with other keys. Figures are medians.
    #[arg(long, default_value_t = 5, value_parser = clap::value_parser!(u64).range(1..))]
    runs: u64,
    /// Whether TCP_NODELAY is set on both ends.
    #[arg(long, default_value_t = true, action = ArgAction::Set)]
    nodelay: bool,
    /// One JSON object instead of lines.
    #[arg(long)]
    pub(crate) json: bool,
}

/// One diff without sockets.
#[derive(Default)]
pub(crate) struct Walked {
    pub(crate) rounds: u32,
    pub(crate) bytes: usize,
    root: Duration,
    server: Duration,
    follower: Duration,
}

pub(crate) async fn run(args: &Args) -> anyhow::Result<Report> {
    let keys = keys(args.keys);
    let walks = walks(&keys, args)?;
    let diffs = diffs(&keys, args).await?;

    let ms = |times: Vec<Duration>| {
        rounded(median(times.into_iter().map(|time| time.as_secs_f64() * 1e3).collect()))
    };
    let of_walks = |time: fn(&Walked) -> Duration| ms(walks.iter().map(time).collect());
    let of_diffs = |figure: fn(&DiffReport) -> u64| {
        median(diffs.iter().map(|(report, _)| figure(report)).collect())
    };
    let walk_bytes = median(walks.iter().map(|walk| walk.bytes).collect());
    let walk_rounds = median(walks.iter().map(|walk| walk.rounds).collect());
    Ok(Report::of("diff")
        .with("keys", args.keys)
        .with("differ", args.differ)
        .with("runs", args.runs)
        .with("nodelay", args.nodelay)
        .with("rounds", of_diffs(|report| u64::from(report.rounds)))
        .with("bytes_to_server", of_diffs(|report| report.bytes_sent))
        .with("bytes_to_follower", of_diffs(|report| report.bytes_received))
        .with("repaired", of_diffs(|report| report.written + report.deleted))
        .with("total_ms", ms(diffs.iter().map(|(_, total)| *total).collect()))
        .with("walk_rounds", walk_rounds)
        .with("walk_bytes", walk_bytes)
        .with(
            "walk_ms",
            json!({
                "server": of_walks(|walk| walk.server),
                "follower": of_walks(|walk| walk.follower),
            }),
        )
        .with("follower_root_ms", of_walks(|walk| walk.root)))
}

/// One diff of a connected follower that differs in so many of these keys.
pub(crate) async fn once(
    keys: &[[u8; KEY_BYTES]],
    differ: usize,
) -> anyhow::Result<(DiffReport, Duration)> {
    let args = Args { keys: keys.len(), differ, runs: 1, nodelay: true, json: false };
    diffs(keys, &args).await?.pop().context("one was asked for")
}

/// Diffs of a connected follower that is made to differ anew before each.
async fn diffs(
    keys: &[[u8; KEY_BYTES]],
    args: &Args,
) -> anyhow::Result<Vec<(DiffReport, Duration)>> {
    let config = ServerConfig::default();
    let (server, address) = serve(config, store(keys, VALUE_BYTES), args.nodelay).await?;
    let client = follow(address, store(keys, VALUE_BYTES), args.nodelay).await?;
    let mut diffs = Vec::new();
    for round in 0..args.runs {
        disturb(&client, differences(keys, args.differ, VALUE_BYTES, round)).await?;
        let start = Instant::now();
        let outcome = client.diff().await?;
        let total = start.elapsed();
        let DiffOutcome::Done(report) = outcome else { anyhow::bail!("{outcome:?}") };
        anyhow::ensure!(report.equal(), "the roots differ behind the diff: {report:?}");
        diffs.push((report, total));
    }
    client.stop().await;
    server.stop().await;
    Ok(diffs)
}

fn walks(keys: &[[u8; KEY_BYTES]], args: &Args) -> anyhow::Result<Vec<Walked>> {
    let server = tree_of(&store(keys, VALUE_BYTES))?;
    let follower = tree_of(&store(keys, VALUE_BYTES))?;
    server.root();
    follower.root();
    (0..args.runs)
        .map(|round| {
            let mut follower = follower.clone();
            for change in differences(keys, args.differ, VALUE_BYTES, round) {
                match change {
                    Change::Write { key, value } => follower.insert(&key, &value),
                    Change::Delete { key } => follower.remove(&key),
                };
            }
            let (walked, found) = walk(&server, &follower)?;
            anyhow::ensure!(found.len() == args.differ as u64, "the walk found {}", found.len());
            Ok(walked)
        })
        .collect()
}

pub(crate) fn tree_of(store: &MemoryStore) -> anyhow::Result<Tree> {
    let entries = store.reader().snapshot();
    Ok(entries.map(|entry| entry.map(|(k, v)| Entry::new(&k, &v))).collect::<Result<_, _>>()?)
}

/// Every frame of a diff but the repairs and their acknowledgements, as the sessions would send them.
pub(crate) fn walk(server: &Tree, follower: &Tree) -> anyhow::Result<(Walked, Found)> {
    let (diff, revision) = (DiffId(1), Revision(1));
    let mut walked = Walked::default();
    let root = timed(&mut walked.root, || follower.root());
    let len = follower.len() as u64;
    let asking =
        ToServer::SyncReq { diff, jumps: 0, full: false, root, len, max_deletes: u64::MAX };
    walked.bytes += wire::encode(&asking).len();
    walked.bytes += wire::encode(&ToClient::SyncStart { diff }).len();

    let mut step = None;
    let mut walk = None;
    timed(&mut walked.server, || {
        let (begun, first) = Walk::new(
            server.clone(),
            Some(root),
            len,
            false,
            1 << 20,
            SessionConfig::default().part_keys,
        );
        (walk, step) = (Some(begun), Some(first));
    });
    let max_bytes = ClientConfig::default().limits.answer_bytes;
    let found = loop {
        match (step.take(), &mut walk) {
            (Some(Step::Ask(query)), Some(walk)) => {
                let answer = timed(&mut walked.follower, || answer(follower, &query, max_bytes))?;
                walked.bytes += wire::encode(&ToClient::SyncRequest { diff, query }).len();
                let message = ToServer::SyncResponse { diff, answer: Raw(answer.clone()) };
                walked.bytes += wire::encode(&message).len();
                step = Some(timed(&mut walked.server, || walk.handle_answer(&answer))?);
                walked.rounds += 1;
            }
            (Some(Step::Done(found)), _) => break found,
            (None, _) | (_, None) => anyhow::bail!("the walk ended without a step"),
        }
    };
    // As the follower counts: what came with the asking was waited for, too.
    walked.rounds = walked.rounds.max(1);
    let (writes, deletes) = (found.writes, found.first.deletes.len() as u64);
    walked.bytes += wire::encode(&ToClient::SyncSeq { diff, writes, deletes }).len();
    let chain = Chain::START.tag();
    let done = ToClient::SyncDone { diff, revision, chain, suppressed: 0, failed: 0 };
    walked.bytes += wire::encode(&done).len();
    Ok((walked, found))
}

fn timed<T>(total: &mut Duration, work: impl FnOnce() -> T) -> T {
    let start = Instant::now();
    let result = work();
    *total += start.elapsed();
    result
}
