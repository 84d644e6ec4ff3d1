//! Connections that do not become followers.

use std::time::Duration;

use tablecast_actors::ServerConfig;
use tablecast_actors::access::{Access, memory};
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::time::Instant;

use crate::connection::{serve, subscribe};

const PAUSE: Duration = Duration::from_secs(3600);

#[actix_rt::test]
async fn who_comes_behind_them_waits_a_moment() {
    // An hour is over as soon as there is nothing else to do.
    tokio::time::pause();
    let config = ServerConfig { stranger_pause: PAUSE, ..ServerConfig::default() };
    let (_endpoint, access) = serve(config).await;

    let stays = ServerConfig::default().handshake_timeout;
    // Who stays for as long as it might have been a stranger is none.
    let waited = async || {
        let start = Instant::now();
        let stream = subscribe(&access).await;
        let waited = start.elapsed();
        tokio::time::sleep(stays).await;
        drop(stream);
        waited
    };
    assert!(waited().await < PAUSE);
    for _ in 0..2 {
        let mut stranger = access.connect().await.unwrap();
        stranger.write_all(&[0xff; 100]).await.unwrap();
        stranger.read_to_end(&mut Vec::new()).await.unwrap();
    }
    // Once for each of them.
    for _ in 0..2 {
        assert!((PAUSE - stays..2 * PAUSE).contains(&waited().await));
    }
    assert!(waited().await < PAUSE);
    drop(subscribe(&access).await);
    // That it has gone is known when it is read from.
    tokio::time::sleep(Duration::from_millis(1)).await;
    // The next one had its place by then.
    assert!(waited().await < PAUSE - stays);
    assert!((PAUSE - stays..2 * PAUSE).contains(&waited().await));
}

/// However few may be there at once, and wherever they come.
#[actix_rt::test]
async fn many_in_a_row_are_paused_for() {
    tokio::time::pause();
    let config = ServerConfig { strangers: 2, ..ServerConfig::default() };
    let pause = config.stranger_pause;
    let (endpoint, access) = serve(config).await;
    let (listener, other) = memory::pair();
    endpoint.listen(listener);
    let start = Instant::now();
    let many = async |access: memory::MemoryAccess| {
        for _ in 0..200 {
            let mut stranger = access.connect().await.unwrap();
            stranger.write_all(&[0xff; 100]).await.unwrap();
            stranger.read_to_end(&mut Vec::new()).await.unwrap();
        }
    };
    tokio::join!(many(access), many(other));
    assert!(start.elapsed() >= pause * 390, "{:?}", start.elapsed());
}

#[cfg(target_os = "linux")]
mod handshakes {
    use std::io;
    use std::sync::Arc;
    use std::time::Duration;

    use futures_util::FutureExt;
    use futures_util::future::BoxFuture;
    use rustix::time::{ClockId, clock_gettime};
    use tablecast_actors::ServerConfig;
    use tablecast_actors::access::{Access, Incoming, Listener, memory};
    use tokio::io::AsyncReadExt;
    use tokio::sync::RwLock;
    use tokio::time::Instant;

    use crate::connection::serve;

    /// What this thread has had of a processor.
    fn busy() -> Duration {
        clock_gettime(ClockId::ThreadCPUTime).try_into().unwrap()
    }

    /// A listener whose handshakes take a millisecond of a processor, and come to nothing; when this is no longer held.
    struct Refusing(memory::MemoryListener, Arc<RwLock<()>>);

    impl Listener for Refusing {
        fn accept(&mut self) -> BoxFuture<'_, io::Result<Incoming>> {
            let (accepting, held) = (self.0.accept(), Arc::clone(&self.1));
            async move {
                Ok(accepting.await?.with_handshake(async move |_| {
                    let start = busy();
                    while busy() - start < Duration::from_millis(1) {}
                    drop(held.read().await);
                    Err(io::Error::other("refused"))
                }))
            }
            .boxed()
        }

        fn address(&self) -> String {
            self.0.address()
        }
    }

    /// As if there had been more of them.
    #[actix_rt::test]
    async fn what_they_take_is_paused_for() {
        tokio::time::pause();
        let config = ServerConfig::default();
        let pause = config.stranger_pause;
        let (endpoint, _) = serve(config).await;
        let (listener, access) = memory::pair();
        endpoint.listen(Refusing(listener, Arc::default()));
        let start = Instant::now();
        for _ in 0..100 {
            let mut stranger = access.connect().await.unwrap();
            stranger.read_to_end(&mut Vec::new()).await.unwrap();
        }
        // Once for each, and four times for its handshake: not ten times.
        assert!(
            (95 * 5 * pause..130 * 5 * pause).contains(&start.elapsed()),
            "{:?}",
            start.elapsed()
        );
    }

    /// As long, but for as many at once as may be there.
    #[actix_rt::test]
    async fn so_is_what_they_take_that_end_together() {
        tokio::time::pause();
        let strangers = 20;
        let config = ServerConfig { strangers, ..ServerConfig::default() };
        let pause = config.stranger_pause;
        let (endpoint, _) = serve(config).await;
        let (listener, access) = memory::pair();
        let held = Arc::<RwLock<()>>::default();
        let holding = held.write().await;
        endpoint.listen(Refusing(listener, Arc::clone(&held)));
        let mut connected = Vec::new();
        for _ in 0..strangers {
            connected.push(access.connect().await.unwrap());
        }
        // They are there when it has nothing else to do.
        tokio::time::sleep(Duration::from_millis(1)).await;
        drop(holding);
        for mut stranger in connected {
            stranger.read_to_end(&mut Vec::new()).await.unwrap();
        }
        let start = Instant::now();
        for _ in 0..2 {
            let mut stranger = access.connect().await.unwrap();
            stranger.read_to_end(&mut Vec::new()).await.unwrap();
        }
        let due = 5 * pause * u32::try_from(strangers).unwrap();
        assert!((due..due + 15 * pause).contains(&start.elapsed()), "{:?}", start.elapsed());
    }
}
