//! The yardstick: a fan-out with nothing but tokio, in the fewest lines. Every change is encoded
//! once, and a task for each follower writes the same bytes. No table, no tree, no repair.

use bytes::{BufMut, Bytes, BytesMut};
use tablecast_bench::KEY_BYTES;
use tokio::io::{AsyncBufReadExt, AsyncWriteExt, BufReader};
use tokio::net::TcpListener;
use tokio::sync::broadcast;

use super::load::Fixed;
use super::system::now_ns;
use crate::stream::server::{Order, Wrote};

#[derive(Debug, clap::Args)]
pub(crate) struct Args {
    #[arg(long)]
    value_bytes: usize,
}

/// A length, a key and a value, the time in its first eight bytes.
pub(crate) fn message(value_bytes: usize) -> Fixed {
    Fixed::new(b'=', 1 + KEY_BYTES + value_bytes, 1 + KEY_BYTES)
}

pub(crate) fn run(args: &Args) -> anyhow::Result<()> {
    let runtime = tokio::runtime::Builder::new_multi_thread().enable_all().build()?;
    runtime.block_on(serve(args.value_bytes))
}

async fn serve(value_bytes: usize) -> anyhow::Result<()> {
    let listener = TcpListener::bind("127.0.0.1:0").await?;
    println!("{}", listener.local_addr()?);
    let (changes, _) = broadcast::channel::<Bytes>(1 << 16);
    let subscribe = changes.clone();
    tokio::spawn(async move {
        while let Ok((mut stream, _)) = listener.accept().await {
            let mut changes = subscribe.subscribe();
            tokio::spawn(async move {
                stream.set_nodelay(true)?;
                stream.write_all(b"+\n").await?;
                while let Ok(change) = changes.recv().await {
                    stream.write_all(&change).await?;
                }
                Ok::<_, std::io::Error>(())
            });
        }
    });
    let mut lines = BufReader::new(tokio::io::stdin()).lines();
    while let Some(line) = lines.next_line().await? {
        let Order::Pace { writes, rate } = serde_json::from_str(&line)? else {
            anyhow::bail!("a plain fan-out is only paced")
        };
        let mut ticks =
            tokio::time::interval(std::time::Duration::from_secs(1) / u32::try_from(rate)?);
        for _ in 0..writes {
            ticks.tick().await;
            let mut message = BytesMut::with_capacity(1 + KEY_BYTES + value_bytes);
            message.put_u8(b'=');
            message.put_bytes(0, KEY_BYTES);
            message.put_u64(now_ns()?);
            message.put_bytes(0, value_bytes - 8);
            // Nobody may follow.
            changes.send(message.freeze()).ok();
        }
        println!("{}", serde_json::to_string(&Wrote { writes, ..Wrote::default() })?);
    }
    Ok(())
}
