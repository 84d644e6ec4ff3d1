//! Random sequences of commands over real actors and real TCP, against a plain map.

use std::collections::BTreeMap;

use proptest::prelude::*;
use proptest::test_runner::Config;
use tablecast::{Change, Client, DiffOutcome, Key, MemoryStore, Server, ServerConfig, Value};

use crate::harness::{Gate, Proxy, assert_converges, connect, entries, follower, serve, within};

#[derive(Clone, Debug)]
enum Command {
    Write(u8, u8),
    Delete(u8),
    Batch(Vec<(u8, Option<u8>)>),
    /// Breaks a follower's own table.
    Break(usize, u8, Option<u8>),
    Diff(usize),
    Stop(usize),
    Cut(usize),
    Open(usize),
}

fn command() -> impl Strategy<Value = Command> {
    let f = 0_usize..2;
    prop_oneof![
        10 => (any::<u8>(), any::<u8>()).prop_map(|(key, value)| Command::Write(key, value)),
        6 => any::<u8>().prop_map(Command::Delete),
        6 => proptest::collection::vec((any::<u8>(), any::<Option<u8>>()), 0..30)
            .prop_map(Command::Batch),
        4 => (f.clone(), any::<u8>(), any::<Option<u8>>())
            .prop_map(|(f, key, value)| Command::Break(f, key, value)),
        4 => f.clone().prop_map(Command::Diff),
        2 => f.clone().prop_map(Command::Stop),
        2 => f.clone().prop_map(Command::Cut),
        4 => f.prop_map(Command::Open),
    ]
}

fn key(number: u8) -> Key {
    vec![number; usize::from(number % 40)].into()
}

fn value(number: u8) -> Value {
    vec![number; usize::from(number) * 9].into()
}

struct World {
    server: Server,
    followers: Vec<(Client, Proxy)>,
    model: BTreeMap<Key, Value>,
}

impl World {
    async fn start() -> Self {
        // A log of a few frames: who is stopped for a while falls behind.
        let config = ServerConfig { log_bytes: 20_000, diffs_at_once: 1, ..Default::default() };
        let (server, address) = serve(config, MemoryStore::new()).await;
        let mut followers = Vec::new();
        for _ in 0..2 {
            let proxy = Proxy::start(address).await;
            let client = follower(proxy.address, MemoryStore::new());
            connect(&client).await;
            followers.push((client, proxy));
        }
        Self { server, followers, model: BTreeMap::new() }
    }

    async fn batch(&mut self, changes: Vec<Change>) {
        self.server.batch(changes.clone()).await.unwrap();
        for change in changes {
            match change {
                Change::Write { key, value } => self.model.insert(key, value),
                Change::Delete { key } => self.model.remove(&key),
            };
        }
    }

    async fn run(&mut self, command: Command) {
        let change = |key_: u8, value_: Option<u8>| match value_ {
            Some(number) => Change::write(key(key_), value(number)),
            None => Change::delete(key(key_)),
        };
        match command {
            Command::Write(key, value) => self.batch(vec![change(key, Some(value))]).await,
            Command::Delete(key) => self.batch(vec![change(key, None)]).await,
            Command::Batch(pairs) => {
                self.batch(pairs.into_iter().map(|(key, value)| change(key, value)).collect())
                    .await;
            }
            Command::Break(follower, number, None) => {
                self.followers[follower].0.delete(key(number)).await.unwrap();
            }
            Command::Break(follower, number, Some(other)) => {
                self.followers[follower].0.write(key(number), value(other)).await.unwrap();
            }
            Command::Diff(follower) => {
                // Nobody waits for it: it may be cut, or refused because one runs.
                let client = self.followers[follower].0.clone();
                actix_rt::spawn(async move { drop(client.diff().await) });
            }
            Command::Stop(follower) => self.followers[follower].1.set(Gate::Stopped),
            Command::Cut(follower) => self.followers[follower].1.set(Gate::Cut),
            Command::Open(follower) => self.followers[follower].1.set(Gate::Open),
        }
    }

    async fn converge(self) {
        let model: Vec<_> = self.model.into_iter().collect();
        assert!(entries(&**self.server.reader()) == model, "the server lost something");
        // All of them first: one that is stopped keeps the place in which its diff runs.
        self.followers.iter().for_each(|(_, proxy)| proxy.set(Gate::Open));
        for (client, _) in &self.followers {
            // Until one diff is done that began after everything.
            within(async {
                loop {
                    match client.diff().await {
                        Ok(DiffOutcome::Done(report)) if report.equal() => return,
                        Ok(_) | Err(_) => tokio::task::yield_now().await,
                    }
                }
            })
            .await;
            assert_converges(&self.server, client).await;
        }
    }
}

proptest! {
    #![proptest_config(Config { cases: 24, ..Config::default() })]

    #[test]
    fn followers_equal_the_model(
        commands in proptest::collection::vec(command(), 1..120),
    ) {
        actix_rt::System::new().block_on(async {
            let mut world = World::start().await;
            for command in commands {
                world.run(command).await;
            }
            within(world.converge()).await;
        });
    }
}
