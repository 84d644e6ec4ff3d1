//! Entries and changes as lines of JSON, and lines out of a stream of bytes.
//!
//! An entry is `{"key":"k","value":"v"}`. A change is the same with `"op":"write"` (the default), or
//! `{"op":"delete","key":"k"}`. What is not UTF-8 stands as `key_base64` and `value_base64`, in the
//! standard alphabet with padding; both forms of one thing, other fields, and fields that come
//! twice are errors. Lines of nothing but blanks say nothing, and a byte-order mark ahead of the first one does not, either. A line has at
//! most [`LINE_BYTES`].

use std::io::{self, BufRead, Read as _, Write};

use anyhow::{Context as _, bail, ensure};
use base64::Engine as _;
use base64::engine::general_purpose::STANDARD;
use serde::{Deserialize, Serialize};

use crate::{Change, Key, Limits, Value};

/// The longest line that is read: key and value at their limits with every byte escaped as
/// `\u00XX`, and 1 KiB for the rest. A longer one is an error, and takes no more memory than this.
pub(super) const LINE_BYTES: u64 = 6 * ((64 << 10) + (8 << 20)) + 1024;

/// Some editors begin a file with it.
const BYTE_ORDER_MARK: &[u8] = "\u{feff}".as_bytes();

/// What the line's buffer keeps from one line to the next.
const BUFFER_BYTES: usize = 64 << 10;

#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
enum Op {
    Write,
    Delete,
}

/// A line as it is read.
#[derive(Debug, Deserialize)]
#[serde(deny_unknown_fields)]
struct Line {
    op: Option<Op>,
    key: Option<String>,
    key_base64: Option<String>,
    value: Option<String>,
    value_base64: Option<String>,
}

/// Entry or change as it is written: of the two forms of a thing one is there at most.
#[derive(Debug, Serialize)]
pub(super) struct Fields<'a> {
    #[serde(skip_serializing_if = "Option::is_none")]
    op: Option<Op>,
    #[serde(skip_serializing_if = "Option::is_none")]
    key: Option<&'a str>,
    #[serde(skip_serializing_if = "Option::is_none")]
    key_base64: Option<String>,
    #[serde(skip_serializing_if = "Option::is_none")]
    value: Option<&'a str>,
    #[serde(skip_serializing_if = "Option::is_none")]
    value_base64: Option<String>,
}

impl<'a> Fields<'a> {
    fn new(op: Option<Op>, key: &'a [u8], value: Option<&'a [u8]>) -> Self {
        let text = |bytes: &'a [u8]| match std::str::from_utf8(bytes) {
            Ok(text) => (Some(text), None),
            Err(_) => (None, Some(STANDARD.encode(bytes))),
        };
        let (key, key_base64) = text(key);
        let (value, value_base64) = value.map_or((None, None), text);
        Self { op, key, key_base64, value, value_base64 }
    }

    pub(super) fn of_key(key: &'a [u8]) -> Self {
        Self::new(None, key, None)
    }

    pub(super) fn of_change(change: &'a Change) -> Self {
        match change {
            Change::Write { key, value } => Self::new(Some(Op::Write), key, Some(value)),
            Change::Delete { key } => Self::new(Some(Op::Delete), key, None),
        }
    }
}

/// Writes one entry and the end of its line.
pub(super) fn write_entry(
    out: &mut (impl Write + ?Sized),
    key: &[u8],
    value: &[u8],
) -> io::Result<()> {
    serde_json::to_writer(&mut *out, &Fields::new(None, key, Some(value)))?;
    out.write_all(b"\n")
}

/// The entry of a line; `None` if it is empty.
pub(super) fn parse_entry(line: &[u8], limits: &Limits) -> anyhow::Result<Option<(Key, Value)>> {
    let Some(line) = parse(line)? else { return Ok(None) };
    ensure!(line.op.is_none(), "op in a line that is no change");
    match line.into_change(limits)? {
        Change::Write { key, value } => Ok(Some((key, value))),
        Change::Delete { .. } => bail!("delete in a line that is no change"),
    }
}

/// The change of a line; `None` if it is empty.
pub(super) fn parse_change(line: &[u8], limits: &Limits) -> anyhow::Result<Option<Change>> {
    parse(line)?.map(|line| line.into_change(limits)).transpose()
}

fn parse(line: &[u8]) -> anyhow::Result<Option<Line>> {
    // The decoder takes a list of fields as well.
    match line.trim_ascii_start().first() {
        None => return Ok(None),
        Some(b'{') => {}
        Some(_) => bail!("not a JSON object"),
    }
    match serde_json::from_slice(line) {
        Ok(line) => Ok(Some(line)),
        Err(error) => {
            // Which line it is, we know better.
            let (text, column) = (error.to_string(), error.column());
            let place = format!(" at line {} column {column}", error.line());
            let text = text.strip_suffix(&place).unwrap_or(&text);
            // A name that it quotes may hold anything, and this goes to a terminal.
            bail!(
                "malformed JSON at column {column}: {}",
                text.replace(char::is_control, "\u{fffd}")
            )
        }
    }
}

impl Line {
    fn into_change(self, limits: &Limits) -> anyhow::Result<Change> {
        let key = bytes("key", self.key, self.key_base64)?.context("no key and no key_base64")?;
        let value = bytes("value", self.value, self.value_base64)?;
        let change = match self.op.unwrap_or(Op::Write) {
            Op::Write => Change::write(key, value.context("no value and no value_base64")?),
            Op::Delete => {
                ensure!(value.is_none(), "a delete with a value");
                Change::delete(key)
            }
        };
        limits.check(&change)?;
        Ok(change)
    }
}

fn bytes(
    what: &str,
    text: Option<String>,
    base64: Option<String>,
) -> anyhow::Result<Option<Vec<u8>>> {
    match (text, base64) {
        (Some(_), Some(_)) => bail!("both {what} and {what}_base64"),
        (Some(text), None) => Ok(Some(text.into_bytes())),
        (None, Some(base64)) => {
            Ok(Some(STANDARD.decode(base64).with_context(|| format!("{what}_base64"))?))
        }
        (None, None) => Ok(None),
    }
}

/// Lines of a stream, with their numbers, in bounded memory.
#[derive(Debug)]
pub(super) struct Lines<R> {
    input: R,
    line: Vec<u8>,
    /// The number of the line that was read last, from 1.
    number: u64,
    /// The last line was too long, and its rest has not been read.
    within: bool,
}

/// What [`Lines`] found.
#[derive(Debug, PartialEq, Eq)]
pub(super) enum Found<'a> {
    /// A line without its end.
    Line(&'a [u8]),
    /// A line above [`LINE_BYTES`], whatever it holds.
    TooLong,
    /// The end.
    End,
}

impl<R: BufRead> Lines<R> {
    pub(super) fn new(input: R) -> Self {
        Self { input, line: Vec::new(), number: 0, within: false }
    }

    /// The number of the line that was asked for last, from 1.
    pub(super) fn number(&self) -> u64 {
        self.number
    }

    /// Reads the next line. After an error there is no next one.
    pub(super) fn next(&mut self) -> io::Result<Found<'_>> {
        if std::mem::take(&mut self.within) {
            self.input.skip_until(b'\n')?;
        }
        self.line.clear();
        self.line.shrink_to(BUFFER_BYTES);
        self.number += 1;
        let read = (&mut self.input).take(LINE_BYTES + 1).read_until(b'\n', &mut self.line)?;
        let ended = self.line.pop_if(|last| *last == b'\n').is_some();
        if !ended && read as u64 > LINE_BYTES {
            self.within = true;
            return Ok(Found::TooLong);
        }
        let mark = if self.number == 1 { BYTE_ORDER_MARK } else { b"" };
        let line = self.line.strip_prefix(mark).unwrap_or(&self.line);
        Ok(if read == 0 { Found::End } else { Found::Line(line) })
    }
}

/// Any input is lines, each with its number, and each of them an error that says something, or what is written as
/// a line and read again as the same. The body of a fuzz target (`protocol/fuzz`).
#[cfg(any(test, fuzzing))]
pub(super) fn check_any(input: &[u8]) {
    let limits = Limits { key_bytes: 64, value_bytes: 256, ..Limits::default() };
    let mut lines = Lines::new(input);
    let input = input.strip_prefix(BYTE_ORDER_MARK).unwrap_or(input);
    let mut read: u64 = 0;
    while let Found::Line(line) = lines.next().expect("memory can be read") {
        read += line.len() as u64 + 1;
        match parse_change(line, &limits) {
            Ok(None) => assert!(line.trim_ascii().is_empty()),
            Ok(Some(change)) => {
                limits.check(&change).expect("what is too large is an error");
                let again = serde_json::to_vec(&Fields::of_change(&change)).expect("memory");
                assert_eq!(
                    parse_change(&again, &limits).expect("what is written").as_ref(),
                    Some(&change)
                );
            }
            Err(error) => assert!(!format!("{error:#}").contains(char::is_control)),
        }
        match parse_entry(line, &limits) {
            Ok(Some((key, value))) => {
                let mut again = Vec::new();
                write_entry(&mut again, &key, &value).expect("memory");
                assert_eq!(
                    parse_entry(&again, &limits).expect("what is written"),
                    Some((key, value))
                );
            }
            Ok(None) => assert!(line.trim_ascii().is_empty()),
            Err(error) => assert!(!format!("{error:#}").contains(char::is_control)),
        }
    }
    // All of it; the last line may lack its end.
    assert!([0, 1].contains(&(read - input.len() as u64)) && lines.number() <= read + 1);
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn entry(line: &str) -> anyhow::Result<Option<(Key, Value)>> {
        parse_entry(line.as_bytes(), &Limits::default())
    }

    fn change(line: &str) -> anyhow::Result<Option<Change>> {
        parse_change(line.as_bytes(), &Limits::default())
    }

    #[test]
    fn lines_say_what_they_say() {
        let expected = Some((Key::from("k"), Value::from("v")));
        assert_eq!(entry(r#"{"key":"k","value":"v"}"#).unwrap(), expected);
        assert_eq!(
            entry(" {\"value_base64\":\"dg==\",\"key_base64\":\"aw==\"}\r").unwrap(),
            expected
        );
        assert_eq!(entry(r#"{"key":"","value":""}"#).unwrap(), Some((Key::new(), Value::new())));
        assert_eq!(entry("").unwrap(), None);
        assert_eq!(entry(" \t\r").unwrap(), None);
        let write = Some(Change::write("k", "v"));
        assert_eq!(change(r#"{"key":"k","value":"v"}"#).unwrap(), write);
        assert_eq!(change(r#"{"op":"write","key":"k","value":"v"}"#).unwrap(), write);
        assert_eq!(change(r#"{"op":"delete","key":"k"}"#).unwrap(), Some(Change::delete("k")));
        assert_eq!(change("\n").unwrap(), None);
    }

    #[test]
    fn bad_lines_are_errors_that_say_why() {
        for (line, why) in [
            ("nonsense", "not a JSON object"),
            (r#"["k","v"]"#, "not a JSON object"),
            (r#"[null,"k",null,"v",null]"#, "not a JSON object"),
            (r#"{"key":"k""#, "malformed JSON at column 10: EOF while parsing an object"),
            (r#"{"key":"k","value":"v"} x"#, "malformed JSON at column 25: trailing characters"),
            (r#"{"key":"k","value":1}"#, "invalid type: integer `1`, expected a string"),
            (r#"{"key":"k","value":"v","ttl":1}"#, "unknown field `ttl`"),
            (r#"{"key":"k","key":"l","value":"v"}"#, "duplicate field `key`"),
            (r#"{"a\n\u001bb":1}"#, "unknown field `a\u{fffd}\u{fffd}b`"),
            (r#"{"value":"v"}"#, "no key and no key_base64"),
            (r#"{"key":"k"}"#, "no value and no value_base64"),
            (r#"{"key":"k","key_base64":"","value":"v"}"#, "both key and key_base64"),
            (r#"{"key":"k","value":"v","value_base64":""}"#, "both value and value_base64"),
            (r#"{"key_base64":"a","value":"v"}"#, "key_base64: "),
            (r#"{"key":"\ud800","value":"v"}"#, "malformed JSON"),
            (r#"{"op":"write","key":"k","value":"v"}"#, "op in a line that is no change"),
        ] {
            let error = format!("{:#}", entry(line).unwrap_err());
            assert!(error.contains(why), "{line}: {error}");
        }
        for (line, why) in [
            (r#"{"op":"delete","key":"k","value":"v"}"#, "a delete with a value"),
            (r#"{"op":"merge","key":"k"}"#, "unknown variant `merge`"),
            (r#"{"op":"delete"}"#, "no key and no key_base64"),
        ] {
            let error = format!("{:#}", change(line).unwrap_err());
            assert!(error.contains(why), "{line}: {error}");
        }
        let bytes = [&b"{\"key\":\""[..], &[0xff], b"\",\"value\":\"\"}"].concat();
        assert!(parse_entry(&bytes, &Limits::default()).is_err());
    }

    #[test]
    fn limits_hold_for_lines() {
        let limits = Limits { key_bytes: 3, value_bytes: 4, ..Limits::default() };
        let error = parse_entry(br#"{"key":"abcd","value":"v"}"#, &limits).unwrap_err();
        assert_eq!(error.to_string(), "key of 4 bytes is above the limit of 3");
        let error = parse_change(br#"{"key":"abc","value":"vwxyz"}"#, &limits).unwrap_err();
        assert_eq!(error.to_string(), "value of 5 bytes is above the limit of 4");
    }

    #[test]
    fn inputs_of_the_fuzzer_are_answers() {
        let corpus = concat!(env!("CARGO_MANIFEST_DIR"), "/protocol/fuzz/corpus/ndjson");
        let mut inputs = 0;
        for file in std::fs::read_dir(corpus).unwrap() {
            check_any(&std::fs::read(file.unwrap().path()).unwrap());
            inputs += 1;
        }
        assert!(inputs > 0);
    }

    #[test]
    fn the_largest_entry_fits_a_line() {
        let Limits { key_bytes, value_bytes, .. } = Limits::default();
        let mut line = Vec::new();
        write_entry(&mut line, &vec![1; key_bytes], &vec![1; value_bytes]).unwrap();
        assert!(line.len() > 6 * (key_bytes + value_bytes));
        let mut lines = Lines::new(&line[..]);
        let Found::Line(line) = lines.next().unwrap() else { panic!("it does not fit") };
        let (key, value) = parse_entry(line, &Limits::default()).unwrap().unwrap();
        assert_eq!((key.len(), value.len()), (key_bytes, value_bytes));
    }

    #[test]
    fn lines_are_numbered_and_bounded() {
        let long = io::repeat(b'x').take(LINE_BYTES + 1_000);
        let input = b"one\n\n".chain(long).chain(&b"\nfour\nfive"[..]);
        let mut lines = Lines::new(io::BufReader::new(input));
        assert_eq!(lines.next().unwrap(), Found::Line(b"one"));
        assert_eq!(lines.next().unwrap(), Found::Line(b""));
        assert_eq!(lines.next().unwrap(), Found::TooLong);
        assert_eq!(lines.next().unwrap(), Found::Line(b"four"));
        assert_eq!(lines.number(), 4);
        assert_eq!(lines.next().unwrap(), Found::Line(b"five"));
        assert_eq!(lines.next().unwrap(), Found::End);
        // At the beginning, and nowhere else.
        let mut lines = Lines::new("\u{feff}one\n\u{feff}two".as_bytes());
        assert_eq!(lines.next().unwrap(), Found::Line(b"one"));
        assert_eq!(lines.next().unwrap(), Found::Line("\u{feff}two".as_bytes()));
        // The longest line, and one that is too long by its last byte.
        for (bytes, fits) in [(LINE_BYTES, true), (LINE_BYTES + 1, false)] {
            let input = io::BufReader::new(io::repeat(b'x').take(bytes).chain(&b"\n"[..]));
            let found = matches!(Lines::new(input).next().unwrap(), Found::Line(_));
            assert_eq!(found, fits);
        }
    }

    fn any_bytes() -> impl Strategy<Value = Vec<u8>> {
        prop_oneof![any::<Vec<u8>>(), any::<String>().prop_map(String::into_bytes)]
    }

    proptest! {
        #[test]
        fn what_is_written_is_read(key in any_bytes(), value in any_bytes()) {
            let mut line = Vec::new();
            write_entry(&mut line, &key, &value).unwrap();
            prop_assert_eq!(line.iter().filter(|byte| **byte == b'\n').count(), 1);
            let read = parse_entry(&line, &Limits::default()).unwrap();
            prop_assert_eq!(read, Some((Key::from(key.clone()), Value::from(value.clone()))));

            for change in [Change::write(key.clone(), value), Change::delete(key)] {
                let line = serde_json::to_vec(&Fields::of_change(&change)).unwrap();
                let read = parse_change(&line, &Limits::default()).unwrap();
                prop_assert_eq!(read, Some(change));
            }
        }

        #[test]
        fn any_bytes_are_an_answer(line in any_bytes()) {
            check_any(&line);
        }
    }
}
