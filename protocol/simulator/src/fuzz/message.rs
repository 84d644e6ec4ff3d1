//! Messages out of bytes: any that can be said, and often enough one that fits where the session is.

use arbitrary::{Result, Unstructured};
use bytes::Bytes;
use tablecast_protocol::diff::{Query, Widths};
use tablecast_protocol::tree::TREE_VERSION;
use tablecast_protocol::wire::{Changes, Raw, VERSION};
use tablecast_protocol::{
    AbortReason, Chain, Change, DiffId, Epoch, Hash, Key, Limits, Position, Reason, Revision,
    ToClient, ToServer, Way,
};

/// What an end that listens would say: numbers, hashes and an answer that fit.
pub(super) struct Fitting {
    pub(super) position: Position,
    /// How far a shortened catch-up is.
    pub(super) caught_up: Revision,
    pub(super) diff: DiffId,
    pub(super) jumps: u32,
    pub(super) root: Hash,
    pub(super) len: u64,
    pub(super) answer: Bytes,
}

impl Default for Fitting {
    fn default() -> Self {
        Self {
            position: Position {
                epoch: Epoch::from_bytes([1; 16]),
                revision: Revision::ZERO,
                chain: Chain::START,
            },
            caught_up: Revision::ZERO,
            diff: DiffId(1),
            jumps: 0,
            root: Hash::from_bytes([2; 24]),
            len: 3,
            answer: Bytes::new(),
        }
    }
}

pub(super) fn to_server(u: &mut Unstructured<'_>, fitting: &Fitting) -> Result<ToServer> {
    let Limits { frame_bytes, key_bytes, value_bytes, .. } = Limits::default();
    let revision = fitting.position.revision.0;
    Ok(match u.int_in_range(0..=7_u8)? {
        0 => ToServer::Hello {
            version: near(u, VERSION.into())? as u16,
            tree: near(u, TREE_VERSION.into())? as u8,
            frame_bytes: near(u, frame_bytes as u64)?,
            key_bytes: near(u, key_bytes as u64)?,
            value_bytes: near(u, value_bytes as u64)?,
            name: u.arbitrary()?,
            position: position(u, fitting)?,
        },
        1 => ToServer::SyncReq {
            diff: DiffId(near(u, u64::from(fitting.diff.0) + 1)? as u32),
            jumps: near(u, fitting.jumps.into())? as u32,
            full: u.arbitrary()?,
            root: hash(u, fitting)?,
            len: near(u, fitting.len)?,
            max_deletes: if u.arbitrary()? { u64::MAX } else { near(u, 2)? },
        },
        2 => ToServer::SyncResponse { diff: diff(u, fitting)?, answer: Raw(answer(u, fitting)?) },
        3 => ToServer::RepairAck {
            diff: diff(u, fitting)?,
            failed: near(u, 0)? as u32,
            micros: u.arbitrary()?,
        },
        4 => ToServer::Verified { revision: Revision(near(u, revision)?), root: hash(u, fitting)? },
        5 => ToServer::Ping {},
        6 => ToServer::Pong {},
        _ => ToServer::Farewell { reason: reason(u)?, text: u.arbitrary()? },
    })
}

pub(super) fn to_client(u: &mut Unstructured<'_>, fitting: &Fitting) -> Result<ToClient> {
    let Limits { frame_bytes, key_bytes, value_bytes, .. } = Limits::default();
    let Position { revision: Revision(revision), chain, .. } = fitting.position;
    let so_far = revision.max(fitting.caught_up.0);
    let tag = chain.tag();
    Ok(match u.int_in_range(0..=16_u8)? {
        0 => {
            let at = position(u, fitting)?.unwrap_or(fitting.position);
            ToClient::Welcome {
                version: near(u, VERSION.into())? as u16,
                tree: near(u, TREE_VERSION.into())? as u8,
                epoch: at.epoch,
                revision: at.revision,
                chain: at.chain,
                frame_bytes: near(u, frame_bytes as u64)?,
                key_bytes: near(u, key_bytes as u64)?,
                value_bytes: near(u, value_bytes as u64)?,
                way: *u.choose(Way::ALL)?,
            }
        }
        1 => ToClient::Refuse { reason: reason(u)?, text: u.arbitrary()? },
        2 => ToClient::Farewell { reason: reason(u)?, text: u.arbitrary()? },
        3 => ToClient::Live {
            first: Revision(near(u, revision.wrapping_add(1))?),
            before: if u.ratio(7, 8)? { tag } else { Chain::from_bytes(u.arbitrary()?).tag() },
            changes: changes(u)?,
        },
        4 => ToClient::FellBehind {
            jumps: near(u, u64::from(fitting.jumps) + 1)? as u32,
            revision: Revision(near(u, revision.wrapping_add(1))?),
            chain: Chain::from_bytes(u.arbitrary()?),
        },
        5 => ToClient::SyncStart { diff: diff(u, fitting)? },
        6 => ToClient::SyncRequest { diff: diff(u, fitting)?, query: query(u)? },
        7 => {
            ToClient::SyncSeq { diff: diff(u, fitting)?, writes: near(u, 4)?, deletes: near(u, 4)? }
        }
        8 => ToClient::Repair {
            diff: diff(u, fitting)?,
            writes: changes(u)?,
            prefix_bytes: near(u, 1)? as u8,
            deletes: Raw(raw(u, 64)?),
        },
        9 => ToClient::SyncDone {
            diff: diff(u, fitting)?,
            revision: Revision(near(u, revision)?),
            chain: tag,
            suppressed: near(u, 0)?,
            failed: near(u, 0)?,
        },
        10 => ToClient::SyncAbort { diff: diff(u, fitting)?, reason: *u.choose(AbortReason::ALL)? },
        11 => ToClient::Verify { revision: Revision(near(u, revision)?), root: hash(u, fitting)? },
        12 => ToClient::Ping {},
        13 => ToClient::Pong {},
        14 => ToClient::Mark { revision: Revision(near(u, revision)?) },
        15 => ToClient::CatchUp {
            revision: Revision(near(u, so_far.wrapping_add(1))?),
            changes: changes(u)?,
        },
        _ => ToClient::CaughtUp { revision: Revision(near(u, so_far)?), chain },
    })
}

/// That number most of the time.
pub(super) fn near(u: &mut Unstructured<'_>, number: u64) -> Result<u64> {
    Ok(match u.int_in_range(0..=15_u8)? {
        12 => number.wrapping_add(1),
        13 => number.wrapping_sub(1),
        14 => u64::MAX,
        15 => u.arbitrary()?,
        _ => number,
    })
}

fn raw(u: &mut Unstructured<'_>, max: usize) -> Result<Bytes> {
    let len = u.int_in_range(0..=max)?.min(u.len());
    u.bytes(len).map(Bytes::copy_from_slice)
}

/// One of a few, or any.
pub(super) fn key(u: &mut Unstructured<'_>) -> Result<Key> {
    match u.arbitrary::<u8>()? {
        255 => raw(u, 16),
        number => Ok(Key::copy_from_slice(&[number])),
    }
}

pub(super) fn changes(u: &mut Unstructured<'_>) -> Result<Changes> {
    let count = u.int_in_range(0..=6_u8)?;
    let change = |_| {
        let (key, deletes) = (key(u)?, u.ratio(1, 4)?);
        Ok(if deletes { Change::delete(key) } else { Change::write(key, raw(u, 8)?) })
    };
    (0..count).map(change).collect::<Result<_>>().map(Changes)
}

fn diff(u: &mut Unstructured<'_>, fitting: &Fitting) -> Result<DiffId> {
    near(u, fitting.diff.0.into()).map(|diff| DiffId(diff as u32))
}

fn hash(u: &mut Unstructured<'_>, fitting: &Fitting) -> Result<Hash> {
    Ok(if u.ratio(3, 4)? { fitting.root } else { Hash::from_bytes(u.arbitrary()?) })
}

fn position(u: &mut Unstructured<'_>, fitting: &Fitting) -> Result<Option<Position>> {
    let Position { epoch, revision, chain } = fitting.position;
    Ok(match u.int_in_range(0..=3_u8)? {
        0 => None,
        1 => Some(Position {
            epoch: if u.arbitrary()? { epoch } else { Epoch::from_bytes(u.arbitrary()?) },
            revision: Revision(near(u, revision.0)?),
            chain: if u.arbitrary()? { chain } else { Chain::from_bytes(u.arbitrary()?) },
        }),
        _ => Some(fitting.position),
    })
}

/// The right one, all of it or not, with a byte of it changed or not; or any bytes.
fn answer(u: &mut Unstructured<'_>, fitting: &Fitting) -> Result<Bytes> {
    let mut answer = fitting.answer.to_vec();
    match u.int_in_range(0..=3_u8)? {
        0 => answer.truncate(u.int_in_range(0..=answer.len())?),
        1 if !answer.is_empty() => {
            let at = u.choose_index(answer.len())?;
            answer[at] = u.arbitrary()?;
        }
        2 => return raw(u, 128),
        _ => {}
    }
    Ok(answer.into())
}

fn query(u: &mut Unstructured<'_>) -> Result<Query> {
    let depth = *u.choose(&[0, 1, 2, 3, 31, 32, 33])?;
    let widths = match u.int_in_range(0..=3_u8)? {
        0 => Widths { node: u.arbitrary()?, key: u.arbitrary()?, entry: u.arbitrary()? },
        1 => Widths::FULL,
        _ => Widths::SHORT,
    };
    let nodes = if depth == 0 && u.ratio(7, 8)? { Bytes::new() } else { raw(u, 64)? };
    let small = near(u, 4)? as u32;
    Ok(Query { depth, levels: near(u, 2)? as u8, small, widths, nodes })
}

fn reason(u: &mut Unstructured<'_>) -> Result<Reason> {
    u.choose(Reason::ALL).copied()
}
