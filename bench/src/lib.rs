//! Fixtures: tables of random keys, and followers that differ by a given amount.
//!
//! Everything is drawn from a fixed seed, so that two runs measure the same table.

use std::cmp::Ordering;
use std::collections::HashSet;
use std::net::SocketAddr;
use std::ops::{Add, Div};
use std::time::Duration;

use anyhow::Context;
use bytes::Bytes;
use tablecast::access::tcp::{TcpAccess, TcpListener};
use tablecast::{Change, Client, ClientConfig, Key, MemoryStore, Server, ServerConfig};

/// The length of every key, in bytes.
pub const KEY_BYTES: usize = 16;

/// The table's seed.
pub const SEED: u64 = 0x7ab1_eca5;

/// A random key.
pub fn random_key(random: &mut fastrand::Rng) -> [u8; KEY_BYTES] {
    random.u128(..).to_be_bytes()
}

/// Random bytes.
pub fn random_bytes(random: &mut fastrand::Rng, count: usize) -> Bytes {
    let mut bytes = vec![0; count];
    random.fill(&mut bytes);
    bytes.into()
}

/// So many keys, the same ones every time.
pub fn keys(count: usize) -> Vec<[u8; KEY_BYTES]> {
    let mut random = fastrand::Rng::with_seed(SEED);
    (0..count).map(|_| random_key(&mut random)).collect()
}

/// Those keys with values of `value_bytes`, in a store of their own.
pub fn store(keys: &[[u8; KEY_BYTES]], value_bytes: usize) -> MemoryStore {
    let mut random = fastrand::Rng::with_seed(SEED + 1);
    keys.iter()
        .map(|key| (Key::copy_from_slice(key), random_bytes(&mut random, value_bytes)))
        .collect()
}

/// What makes a table of these keys differ in `differ` keys: a third is changed, a third missing and the
/// rest extra. Another `round` draws other keys.
pub fn differences(
    keys: &[[u8; KEY_BYTES]],
    differ: usize,
    value_bytes: usize,
    round: u64,
) -> Vec<Change> {
    let mut random = fastrand::Rng::with_seed(SEED + 2 + round);
    let touched = (differ - differ.div_ceil(3)).min(keys.len());
    let mut chosen = HashSet::new();
    let mut changes = Vec::with_capacity(differ);
    while changes.len() < touched {
        let at = random.usize(..keys.len());
        if let Some(key) = keys.get(at).filter(|_| chosen.insert(at)) {
            let key = Key::copy_from_slice(key);
            changes.push(if changes.len() < touched / 2 {
                Change::write(key, random_bytes(&mut random, value_bytes))
            } else {
                Change::delete(key)
            });
        }
    }
    while changes.len() < differ {
        let key = Key::copy_from_slice(&random_key(&mut random));
        changes.push(Change::write(key, random_bytes(&mut random, value_bytes)));
    }
    changes
}

/// The first `missing` keys in a random order: what a follower lacks.
pub fn missing(
    keys: &[[u8; KEY_BYTES]],
    missing: usize,
    round: u64,
) -> impl Iterator<Item = Change> {
    let mut keys = keys.to_vec();
    fastrand::Rng::with_seed(SEED + round).shuffle(&mut keys);
    keys.into_iter().take(missing).map(|key| Change::delete(Key::copy_from_slice(&key)))
}

/// A server that is ready, listening over TCP on this machine, and where.
///
/// # Errors
/// If it cannot be started.
pub async fn serve(
    config: ServerConfig,
    store: MemoryStore,
    nodelay: bool,
) -> anyhow::Result<(Server, SocketAddr)> {
    let server = Server::start(config, store)?;
    let listener = TcpListener::bind("127.0.0.1:0")?.with_nodelay(nodelay);
    let address = listener.local_address();
    server.listen_on(listener);
    server.ready().await?;
    Ok((server, address))
}

/// A follower of that server, connected and through its first diff, which found `store` equal or
/// repaired it.
///
/// # Errors
/// If it cannot be started.
pub async fn follow(
    address: SocketAddr,
    store: MemoryStore,
    nodelay: bool,
) -> anyhow::Result<Client> {
    let access = TcpAccess::new(address.to_string()).with_nodelay(nodelay);
    let client = Client::start(ClientConfig::default(), store, access)?;
    client.ready().await?;
    client.wait_ready(Duration::from_secs(600)).await.context("the follower does not converge")?;
    Ok(client)
}

/// Makes a follower differ.
///
/// # Errors
/// If its store refuses.
pub async fn disturb(
    client: &Client,
    changes: impl IntoIterator<Item = Change>,
) -> anyhow::Result<()> {
    for change in changes {
        match change {
            Change::Write { key, value } => client.write(key, value).await?,
            Change::Delete { key } => client.delete(key).await?,
        }
    }
    Ok(())
}

/// The one in the middle, or the mean of the two there; 0 of nothing.
pub fn median<T>(mut figures: Vec<T>) -> T
where
    T: Copy + Default + PartialOrd + From<u8> + Add<Output = T> + Div<Output = T>,
{
    figures.sort_by(|a, b| a.partial_cmp(b).unwrap_or(Ordering::Equal));
    let upper = figures.get(figures.len() / 2).copied().unwrap_or_default();
    match figures.len().checked_sub(2) {
        Some(rest) if rest.is_multiple_of(2) => {
            let lower = figures.get(rest / 2).copied().unwrap_or_default();
            (lower + upper) / T::from(2)
        }
        _ => upper,
    }
}

/// The one that so many percent of the others are below; `None` of nothing. They must be in order.
pub fn percentile<T: Copy>(sorted: &[T], percent: usize) -> Option<T> {
    sorted.get(sorted.len() * percent / 100).copied()
}

#[cfg(test)]
mod tests {
    use super::{differences, keys, median};

    #[test]
    fn a_third_each() {
        let keys = keys(1000);
        let changes = differences(&keys, 300, 32, 0);
        let deletes = changes.iter().filter(|change| change.value().is_none()).count();
        let known = |key: &[u8]| keys.iter().any(|known| known == key);
        let extra = changes.iter().filter(|change| !known(change.key())).count();
        assert_eq!((changes.len(), deletes, extra), (300, 100, 100));
        assert_ne!(changes, differences(&keys, 300, 32, 1));
    }

    #[test]
    fn no_more_than_there_are() {
        assert_eq!(differences(&keys(2), 9, 8, 0).len(), 9);
        assert_eq!(differences(&[], 0, 8, 0).len(), 0);
        assert_eq!((median(vec![3_u64, 1, 2]), median::<u64>(Vec::new())), (2, 0));
        assert_eq!((median(vec![7_u64]), median(vec![9.0, 1.0, 4.0, 2.0])), (7, 3.0));
        assert_eq!(median(vec![2_u64, 4]), 3);
    }
}
