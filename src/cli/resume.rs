//! Where a table that is in a file stood: FILE.position, beside it.
//!
//! It counts only together with the table: it holds the table's root, and a table whose root is
//! another one has been changed since, or is older than it.

use std::fs::File;
use std::io::{ErrorKind, Read as _};
use std::path::{Path, PathBuf};

use anyhow::{Context as _, ensure};
use serde::{Deserialize, Serialize};
use tablecast_actors::protocol::Replica;

use super::file::{self, Dump};
use crate::{Hash, MemoryStore, Position};

/// More than what is written here ever has.
const FILE_BYTES: u64 = 4096;

#[derive(Debug, Serialize, Deserialize)]
struct Saved {
    position: Position,
    root: Hash,
    keys: usize,
}

fn beside(file: &Path) -> PathBuf {
    let mut path = file.as_os_str().to_owned();
    path.push(".position");
    path.into()
}

/// Where the table of a file stood; `None` if nobody has said so.
///
/// # Errors
/// If that cannot be read, or is not of this table.
pub(super) fn load(
    file: &Path,
    root_of: impl FnOnce() -> anyhow::Result<(Hash, usize)>,
) -> anyhow::Result<Option<Position>> {
    let path = beside(file);
    // One of another kind may never end.
    let other = path.metadata().is_ok_and(|there| !there.is_file());
    ensure!(!other, "cannot read {}: not a file", path.display());
    let mut text = Vec::new();
    match File::open(&path).and_then(|from| from.take(FILE_BYTES).read_to_end(&mut text)) {
        Ok(_) => {}
        Err(error) if error.kind() == ErrorKind::NotFound => return Ok(None),
        Err(error) => return Err(error).with_context(|| format!("cannot read {}", path.display())),
    }
    let context = || format!("{} does not count", path.display());
    let saved: Saved = serde_json::from_slice(&text).with_context(context)?;
    root_of().and_then(|table| matches(&saved, table)).with_context(context)?;
    Ok(Some(saved.position))
}

fn matches(saved: &Saved, (root, keys): (Hash, usize)) -> anyhow::Result<()> {
    ensure!(
        (saved.root, saved.keys) == (root, keys),
        "it is of {} keys with root {}, the table has {keys} with root {root}",
        saved.keys,
        saved.root
    );
    Ok(())
}

/// Forgets where the table of a file stood. Whether it was known until now: of two who forget it at once, for one of them.
pub(super) fn forget(file: &Path) -> anyhow::Result<bool> {
    let path = beside(file);
    match std::fs::remove_file(&path) {
        Ok(()) => {
            file::sync(file::directory_of(&path));
            Ok(true)
        }
        Err(error) if error.kind() == ErrorKind::NotFound => Ok(false),
        Err(error) => Err(error).with_context(|| format!("cannot remove {}", path.display())),
    }
}

/// Keeps where a table that has just been written to a file stands; forgets what was there if that is
/// not known. The root is that of the table at the position: should the file hold another table, the
/// position will not count.
pub(super) fn save(
    file: &Path,
    position: Option<Position>,
    root: Hash,
    keys: usize,
) -> anyhow::Result<()> {
    let Some(position) = position else { return forget(file).map(drop) };
    let saved = Saved { position, root, keys };
    Dump::at(&beside(file))?.replace(|out| {
        serde_json::to_writer(&mut *out, &saved)?;
        writeln!(out)
    })
}

/// The root of a table, and how many keys it has. Hashes every value.
pub(super) fn root_of(table: &MemoryStore) -> anyhow::Result<(Hash, usize)> {
    let replica = Replica::open(table.clone())?;
    Ok((replica.tree().root(), replica.tree().len()))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::{Chain, Epoch, Key, Revision, Value};

    #[test]
    fn a_position_counts_with_its_table_only() {
        let directory = tempfile::tempdir().unwrap();
        let file = directory.path().join("table");
        let table =
            |value| -> MemoryStore { [(Key::from("k"), Value::from(value))].into_iter().collect() };
        let (table, other) = (table("1"), table("2"));
        assert_eq!(load(&file, || root_of(&table)).unwrap(), None);
        let position = Position {
            epoch: Epoch::from_bytes([7; 16]),
            revision: Revision(3),
            chain: Chain::START,
        };
        let (root, keys) = root_of(&table).unwrap();
        save(&file, Some(position), root, keys).unwrap();
        assert_eq!(load(&file, || root_of(&table)).unwrap(), Some(position));
        // Two servers may have read it by then.
        assert_eq!([(); 2].map(|()| forget(&file).unwrap()), [true, false]);
        save(&file, Some(position), root, keys).unwrap();
        let error = format!("{:#}", load(&file, || root_of(&other)).unwrap_err());
        assert!(error.contains("table.position does not count: it is of 1 keys"), "{error}");
        std::fs::write(beside(&file), "{").unwrap();
        assert!(load(&file, || root_of(&table)).is_err());
        save(&file, None, root, keys).unwrap();
        assert_eq!(load(&file, || root_of(&table)).unwrap(), None);
        assert_eq!(std::fs::read_dir(directory.path()).unwrap().count(), 0);
    }
}
