//! Whole tables in files.

use std::fs::File;
use std::io::{self, BufReader, BufWriter, ErrorKind, Write};
use std::path::{Path, PathBuf};
use std::time::Duration;

use anyhow::{Context as _, ensure};

use super::Failure;
use super::ndjson::{self, Found, LINE_BYTES, Lines};
use super::progress::Progress;
use crate::{Key, Limits, MemoryStore, Reader, Value};

const BUFFER_BYTES: usize = 256 << 10;

/// The table of a file, or an empty one without, as it is before the first dump to the same file. What cannot be
/// read is [`Failure::Input`].
pub(super) fn load(path: Option<&Path>, dump: Option<&Path>) -> Result<MemoryStore, Failure> {
    let absent = |path: &Path| {
        let there = path.symlink_metadata();
        dump == Some(path) && there.is_err_and(|error| error.kind() == ErrorKind::NotFound)
    };
    let Some(path) = path.filter(|path| !absent(path)) else { return Ok(MemoryStore::new()) };
    let entries = Entries::open(path).map_err(Failure::Input)?;
    entries.collect::<anyhow::Result<_>>().map_err(Failure::Input)
}

/// The entries of a file, in its order.
struct Entries<'a> {
    path: &'a Path,
    lines: Lines<BufReader<File>>,
    limits: Limits,
    progress: Progress,
}

impl<'a> Entries<'a> {
    fn open(path: &'a Path) -> anyhow::Result<Self> {
        let opened = File::open(path).and_then(|file| Ok((file.metadata()?.len(), file)));
        let (bytes, file) = opened.with_context(|| format!("cannot read {}", path.display()))?;
        Ok(Self {
            path,
            lines: Lines::new(BufReader::with_capacity(BUFFER_BYTES, file)),
            limits: Limits::default(),
            progress: Progress::of_bytes("loading", bytes),
        })
    }

    /// The next entry; `None` at the end. The error does not say where.
    fn read(&mut self) -> anyhow::Result<Option<(Key, Value)>> {
        loop {
            let line = match self.lines.next().context("cannot read")? {
                Found::Line(line) => line,
                Found::TooLong => {
                    anyhow::bail!("line of more than {LINE_BYTES} bytes, which is the limit")
                }
                Found::End => return Ok(None),
            };
            self.progress.advance(line.len() as u64 + 1);
            if let Some(entry) = ndjson::parse_entry(line, &self.limits)? {
                return Ok(Some(entry));
            }
        }
    }
}

impl Iterator for Entries<'_> {
    type Item = anyhow::Result<(Key, Value)>;

    fn next(&mut self) -> Option<Self::Item> {
        let read = self.read();
        let place = || format!("{}:{}", self.path.display(), self.lines.number());
        read.with_context(place).transpose()
    }
}

/// How much of a file's name is in that of one that is not complete: together they are a name still.
const NAME_CHARS: usize = 48;

/// How long a file that is not complete is left alone.
const LEFT: Duration = Duration::from_secs(60);

/// Where a file is to be written when all is done.
#[derive(Debug)]
pub(super) struct Dump {
    path: PathBuf,
    /// The file itself, behind every link.
    target: PathBuf,
    directory: PathBuf,
    /// What the names of files begin with that are not complete.
    prefix: String,
}

impl Dump {
    /// Sees to it that there is a place for the file, before anything is done.
    pub(super) fn at(path: &Path) -> anyhow::Result<Self> {
        let place = || -> anyhow::Result<_> {
            let target = if path.exists() { path.canonicalize()? } else { path.to_owned() };
            ensure!(!target.exists() || target.is_file(), "not a file");
            ensure!(target.exists() || !target.is_symlink(), "a link to what is not there");
            let name = target.file_name().context("not the name of a file")?.to_string_lossy();
            let directory = directory_of(&target).to_owned();
            ensure!(directory.is_dir(), "no directory {}", directory.display());
            let prefix =
                format!(".tablecast-{}-", name.chars().take(NAME_CHARS).collect::<String>());
            // It is written beside the old one, and put in its place.
            let beside = tempfile::Builder::new().prefix(&prefix).tempfile_in(&directory);
            beside.with_context(|| format!("no file can be made in {}", directory.display()))?;
            Ok((target, directory, prefix))
        };
        let (target, directory, prefix) =
            place().with_context(|| format!("cannot write {}", path.display()))?;
        let dump = Self { path: path.to_owned(), target, directory, prefix };
        // That they are there is no reason not to go on.
        dump.remove_left().ok();
        Ok(dump)
    }

    /// Removes what those who were killed while they wrote this file left.
    fn remove_left(&self) -> io::Result<()> {
        for entry in self.directory.read_dir()? {
            let entry = entry?;
            let named = entry.file_name().to_string_lossy().starts_with(&self.prefix);
            let age = || entry.metadata().and_then(|there| there.modified()).ok()?.elapsed().ok();
            // Whoever writes one holds it.
            let held = || File::open(entry.path()).map_or(true, |file| file.try_lock().is_err());
            if named && age().is_some_and(|age| age >= LEFT) && !held() {
                std::fs::remove_file(entry.path())?;
            }
        }
        Ok(())
    }

    /// Whether this is the file that is replaced, or would be a new one.
    pub(super) fn replaces(&self, path: &Path) -> bool {
        !self.target.exists() || path.canonicalize().is_ok_and(|path| path == self.target)
    }

    /// Writes the table as it is, sorted by the keys' bytes. The file is as it was if that fails.
    pub(super) fn write(&self, table: &dyn Reader) -> anyhow::Result<()> {
        self.replace(|out| {
            for entry in table.snapshot() {
                let (key, value) = entry.map_err(io::Error::other)?;
                ndjson::write_entry(out, &key, &value)?;
            }
            Ok(())
        })
    }

    /// Writes whatever is to be in the file. It is as it was if that fails.
    pub(super) fn replace(
        &self,
        write: impl FnOnce(&mut dyn Write) -> io::Result<()>,
    ) -> anyhow::Result<()> {
        self.try_replace(write).with_context(|| format!("cannot write {}", self.path.display()))
    }

    fn try_replace(
        &self,
        write: impl FnOnce(&mut dyn Write) -> io::Result<()>,
    ) -> anyhow::Result<()> {
        let old = self.target.metadata().ok();
        let mut builder = tempfile::Builder::new();
        builder.prefix(&self.prefix);
        // Like any new file, if it is one: the umask takes from it. Until all is in it nobody else reads one that
        // is to be as private as the old one.
        #[cfg(unix)]
        if old.is_none() {
            builder.permissions(std::os::unix::fs::PermissionsExt::from_mode(0o666));
        }
        let file = builder.tempfile_in(&self.directory)?;
        // Where files cannot be held, they are left.
        file.as_file().lock().ok();
        let mut out = BufWriter::with_capacity(BUFFER_BYTES, file);
        write(&mut out)?;
        out.flush()?;
        let file = out.into_inner()?;
        if let Some(old) = old {
            #[cfg(unix)]
            keep_owner(file.as_file(), &old);
            file.as_file().set_permissions(old.permissions())?;
        }
        file.as_file().sync_all()?;
        file.persist(&self.target).map_err(|error| error.error)?;
        sync(&self.directory);
        Ok(())
    }
}

/// Whoever could read the old file can read the new one, as far as that may be decided here.
#[cfg(unix)]
fn keep_owner(file: &File, old: &std::fs::Metadata) {
    use std::os::unix::fs::{MetadataExt as _, fchown};
    let new = file.metadata().map(|new| (new.uid(), new.gid()));
    let (uid, gid) = (old.uid(), old.gid());
    if new.is_ok_and(|new| new != (uid, gid))
        && let Err(error) = fchown(file, Some(uid), Some(gid))
    {
        // Who may not give it away may leave it to the group.
        fchown(file, None, Some(gid)).ok();
        tracing::warn!(uid, gid, %error, "a dump has another owner than the file that it replaces");
    }
}

/// Where a file is.
pub(super) fn directory_of(path: &Path) -> &Path {
    let parent = path.parent().filter(|parent| *parent != Path::new(""));
    parent.unwrap_or(Path::new("."))
}

/// What has been renamed or removed in a directory is so after a power cut, too, where a directory can be opened and
/// the system can do that. It is done in any case.
pub(super) fn sync(directory: &Path) {
    File::open(directory).and_then(|directory| directory.sync_all()).ok();
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::{Change, Store as _};

    fn failure(result: Result<MemoryStore, Failure>) -> String {
        match result {
            Err(Failure::Input(error)) => format!("{error:#}"),
            other => panic!("{other:?}"),
        }
    }

    #[test]
    fn what_is_dumped_is_loaded() {
        let directory = tempfile::tempdir().unwrap();
        let path = directory.path().join("table");
        let table: MemoryStore =
            [("b", &b"2"[..]), ("", b""), ("a\n", &[0xff, 0]), ("c", "\u{2028}".as_bytes())]
                .into_iter()
                .map(|(key, value)| (Key::from(key), Value::from(value)))
                .collect();
        Dump::at(&path).unwrap().write(&*table.reader()).unwrap();
        let loaded = load(Some(&path), None).unwrap();
        let entries = |store: &MemoryStore| -> Vec<_> {
            store.reader().snapshot().map(Result::unwrap).collect()
        };
        assert_eq!(entries(&loaded), entries(&table));
        // Over the old file, and nothing else is left.
        Dump::at(&path).unwrap().write(&*MemoryStore::new().reader()).unwrap();
        assert_eq!(std::fs::read(&path).unwrap(), b"");
        assert_eq!(std::fs::read_dir(directory.path()).unwrap().count(), 1);
    }

    #[test]
    fn what_was_left_by_one_that_was_killed_is_removed() {
        let directory = tempfile::tempdir().unwrap();
        let dump = Dump::at(&directory.path().join("table")).unwrap();
        let file = |name: &str, age| {
            let file = File::create(directory.path().join(name)).unwrap();
            file.set_modified(std::time::SystemTime::now() - age).unwrap();
            file
        };
        let _young = file(".tablecast-table-young", LEFT / 2);
        let held = file(".tablecast-table-held", 2 * LEFT);
        held.lock().unwrap();
        let _other = file(".tablecast-table2-old", 2 * LEFT);
        drop(file(".tablecast-table-old", 2 * LEFT));
        drop(dump);
        Dump::at(&directory.path().join("table")).unwrap();
        let left = std::fs::read_dir(directory.path()).unwrap();
        let mut left: Vec<_> = left.map(|entry| entry.unwrap().file_name()).collect();
        left.sort();
        let names = [".tablecast-table-held", ".tablecast-table-young", ".tablecast-table2-old"];
        assert_eq!(left, names);
    }

    #[test]
    fn before_the_first_dump_there_is_nothing_to_load() {
        let directory = tempfile::tempdir().unwrap();
        let path = directory.path().join("table");
        assert_eq!(load(Some(&path), Some(&path)).unwrap().len().unwrap(), 0);
        failure(load(Some(&path), Some(directory.path())));
        std::fs::write(&path, "{").unwrap();
        failure(load(Some(&path), Some(&path)));
        // What is not there just now may be there again.
        #[cfg(unix)]
        {
            let link = directory.path().join("link");
            std::os::unix::fs::symlink(directory.path().join("unmounted/table"), &link).unwrap();
            failure(load(Some(&link), Some(&link)));
        }
    }

    #[cfg(unix)]
    #[test]
    fn a_private_file_stays_private() {
        use std::os::unix::fs::PermissionsExt as _;
        let directory = tempfile::tempdir().unwrap();
        let path = directory.path().join("table");
        let mode = || std::fs::metadata(&path).unwrap().permissions().mode() & 0o777;
        std::fs::write(&path, "").unwrap();
        std::fs::set_permissions(&path, std::fs::Permissions::from_mode(0o640)).unwrap();
        Dump::at(&path).unwrap().write(&*MemoryStore::new().reader()).unwrap();
        assert_eq!(mode(), 0o640);
    }

    #[test]
    fn the_last_of_equal_keys_counts() {
        let directory = tempfile::tempdir().unwrap();
        let path = directory.path().join("table");
        let lines = "{\"key\":\"k\",\"value\":\"1\"}\n\n{\"key_base64\":\"aw==\",\"value\":\"2\"}";
        std::fs::write(&path, lines).unwrap();
        let mut expected = MemoryStore::new();
        expected.apply(&[Change::write("k", "2")]).unwrap();
        let loaded = load(Some(&path), None).unwrap();
        assert_eq!(loaded.get(b"k").unwrap(), expected.get(b"k").unwrap());
        assert_eq!(loaded.len().unwrap(), 1);
    }

    #[test]
    fn errors_name_file_and_line() {
        let directory = tempfile::tempdir().unwrap();
        let path = directory.path().join("table");
        assert!(
            failure(load(Some(&path), None))
                .starts_with(&format!("cannot read {}: ", path.display()))
        );
        let name = format!("{}:1: ", directory.path().display());
        assert!(failure(load(Some(directory.path()), None)).starts_with(&name));
        let long = format!("{{\"key\":\"{}\",\"value\":\"\"}}\n", "k".repeat((64 << 10) + 1));
        std::fs::write(&path, format!("{{\"key\":\"k\",\"value\":\"1\"}}\n\n{long}")).unwrap();
        let why = "3: key of 65537 bytes is above the limit of 65536";
        assert_eq!(failure(load(Some(&path), None)), format!("{}:{why}", path.display()));
    }

    #[test]
    fn a_dump_that_cannot_be_is_known_early() {
        let directory = tempfile::tempdir().unwrap();
        for (path, why) in [
            (directory.path().to_owned(), "not a file"),
            (directory.path().join("absent/table"), "no directory"),
            (PathBuf::from(".."), "not a file"),
        ] {
            let error = format!("{:#}", Dump::at(&path).unwrap_err());
            assert!(
                error.starts_with(&format!("cannot write {}: {why}", path.display())),
                "{error}"
            );
        }
    }
}
