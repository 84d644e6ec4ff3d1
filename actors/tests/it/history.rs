//! A history that began before its Server.

use actix::prelude::*;
use tablecast_actors::access::memory;
use tablecast_actors::client::{self, Client, GetStatus, WaitFor};
use tablecast_actors::protocol::{
    Chain, Change, Epoch, Limits, MemoryStore, Position, Replica, Revision, Table,
};
use tablecast_actors::server::{Endpoint, Write};
use tablecast_actors::{ClientConfig, ServerConfig};

use crate::LONG;

#[actix_rt::test]
async fn it_goes_on_where_the_table_was_continued() {
    let (epoch, chain) = (Epoch::from_bytes([1; 16]), Chain::from_bytes([2; 24]));
    for written in [false, true] {
        let mut table = Table::open(MemoryStore::new(), Limits::default()).unwrap();
        table.continue_from(Position { epoch, revision: Revision(100), chain });
        if written {
            table.write(&[Change::write("early", "1")]).unwrap();
        }
        let endpoint = Endpoint::start_here(table, ServerConfig::default());
        let (listener, access) = memory::pair();
        endpoint.listen(listener);
        let replica = Replica::open(MemoryStore::new()).unwrap();
        let client = Client::new(replica, access, ClientConfig::default()).start();
        client.send(client::Ready).await.unwrap();
        let write = Write(vec![Change::write("live", "2")]);
        let at = endpoint.server().send(write).await.unwrap().unwrap().position().unwrap();
        assert_eq!(at.revision, Revision(101 + u64::from(written)));
        let wait = WaitFor { epoch, revision: at.revision, timeout: LONG };
        assert_eq!(client.send(wait).await.unwrap().unwrap(), at);
        assert_eq!(client.send(GetStatus).await.unwrap().keys, 1 + usize::from(written));
    }
}
