//! The canonical table beside its sessions.

use tablecast_protocol::{
    Chain, Change, Epoch, Limits, Log, MemoryStore, Position, Reader, Revision, Table, WriteError,
};

fn continued(revision: u64) -> (MemoryStore, Table) {
    let store = MemoryStore::new();
    let mut table = Table::open(store.clone(), Limits::default()).unwrap();
    let epoch = Epoch::from_bytes([1; 16]);
    let chain = Chain::from_bytes([2; 24]);
    table.continue_from(Position { epoch, revision: Revision(revision), chain });
    (store, table)
}

#[test]
fn nothing_is_written_behind_the_last_revision() {
    let (store, mut table) = continued(u64::MAX - 2);
    let two = [Change::write("a", "1"), Change::write("b", "1")];
    let error = table.write(&two).unwrap_err();
    assert!(matches!(error, WriteError::LastRevision { .. }));
    assert_eq!(
        error.to_string(),
        "2 changes are more than come behind revision 18446744073709551613"
    );
    assert_eq!((store.len().unwrap(), table.tree().len()), (0, 0));
    table.write(&two[..1]).unwrap();
    assert_eq!(table.position().unwrap().revision, Revision(u64::MAX - 1));
    table.write(&two[1..]).unwrap_err();
    assert_eq!(Reader::get(&store, b"b").unwrap(), None);
}

#[test]
fn a_log_begins_where_the_chunks_do() {
    let (_, mut table) = continued(100);
    assert_eq!(table.taken(), (Revision(100), Chain::from_bytes([2; 24])));
    table.write(&[Change::write("a", "1")]).unwrap();
    table.seal();
    table.write(&[Change::write("b", "1")]).unwrap();
    for revision in [100, 101] {
        let (at, chain) = table.taken();
        assert_eq!(at, Revision(revision));
        table.seal();
        let (chunk, behind) = table.next_chunk().unwrap();
        let mut log = Log::new(1 << 20, at, chain);
        log.push(chunk, behind, std::time::Duration::ZERO);
        assert_eq!((log.head(), log.chain()), (at.next(), behind));
    }
    assert_eq!(table.taken().0, table.position().unwrap().revision);
}
