//! A history that began before its Server.

use tablecast_actors::client::{GetStatus, WaitFor};
use tablecast_actors::protocol::{
    Chain, Change, Epoch, Limits, MemoryStore, Position, Revision, Table,
};
use tablecast_actors::server::Write;
use tablecast_actors::{ClientConfig, ServerConfig};

use crate::LONG;
use crate::connection::{follow, serve_table};

#[actix_rt::test]
async fn it_goes_on_where_the_table_was_continued() {
    let (epoch, chain) = (Epoch::from_bytes([1; 16]), Chain::from_bytes([2; 24]));
    for written in [false, true] {
        let mut table = Table::open(MemoryStore::new(), Limits::default()).unwrap();
        table.continue_from(Position { epoch, revision: Revision(100), chain });
        if written {
            table.write(&[Change::write("early", "1")]).unwrap();
        }
        let (endpoint, access) = serve_table(table, ServerConfig::default()).await;
        let client = follow(access, MemoryStore::new(), ClientConfig::default()).await;
        let write = Write(vec![Change::write("live", "2")]);
        let at = endpoint.server().send(write).await.unwrap().unwrap().position().unwrap();
        assert_eq!(at.revision, Revision(101 + u64::from(written)));
        let wait = WaitFor { epoch, revision: at.revision, timeout: LONG };
        assert_eq!(client.send(wait).await.unwrap().unwrap(), at);
        assert_eq!(client.send(GetStatus).await.unwrap().keys, 1 + usize::from(written));
    }
}
