//! What is counted, through the `metrics` facade: whoever installs a recorder sees it, nobody else pays.
//!
//! Several servers or followers of one process share the numbers. What is a state is told once a
//! second, what happens is counted when it does.

use std::time::Duration;

use metrics::{
    SharedString, Unit, counter, describe_counter, describe_gauge, describe_histogram, gauge,
    histogram,
};
use tablecast_protocol::Way;

use crate::status::{ClientStatus, DiffReport, Health, ServerStatus};

/// How often states are told.
pub(crate) const EVERY: Duration = Duration::from_secs(1);

/// Says what each metric is. Once, after a recorder has been installed.
pub fn describe() {
    for (name, what) in [
        ("tablecast_server_changes_total", "Changes applied to the canonical table."),
        ("tablecast_server_refused_total", "Writes refused, by a limit or by the store."),
        ("tablecast_server_connections_total", "Followers that were subscribed, by the way taken."),
        ("tablecast_server_ended_total", "Connections that ended, by why."),
        ("tablecast_server_fell_behind_total", "Followers that fell off the log."),
        ("tablecast_server_diffs_total", "Diffs that ended, by how."),
        ("tablecast_server_verifications_total", "Roots compared with followers, by result."),
        ("tablecast_server_stalled_total", "Followers closed because their socket took nothing."),
        ("tablecast_server_refused_followers_total", "Followers that may not connect."),
        ("tablecast_server_sent_bytes_total", "Bytes sent to followers."),
        ("tablecast_server_received_bytes_total", "Bytes that came from followers."),
        ("tablecast_client_changes_total", "Live changes applied by the follower."),
        ("tablecast_client_refused_total", "Changes that the follower's store refused."),
        ("tablecast_client_corrupt_total", "Keys found changed behind the follower's back."),
        ("tablecast_client_connects_total", "Handshakes that went through, by the way taken."),
        ("tablecast_client_fell_behind_total", "Times that the follower fell off the log."),
        ("tablecast_client_diverged_total", "Roots that differed where nothing was missing."),
        ("tablecast_client_diffs_total", "Diffs that ended, by how."),
        ("tablecast_client_repaired_total", "Keys written or deleted by repairs."),
        ("tablecast_client_held_total", "Repairs held because they would delete too much."),
        ("tablecast_client_sent_bytes_total", "Bytes sent to the server."),
        ("tablecast_client_received_bytes_total", "Bytes that came from the server."),
    ] {
        describe_counter!(name, what);
    }
    for (name, what) in [
        ("tablecast_server_revision", "The revision of the newest change."),
        ("tablecast_server_keys", "Keys of the canonical table."),
        ("tablecast_server_followers", "Followers that are subscribed."),
        ("tablecast_server_diffs_running", "Diffs that run."),
        ("tablecast_server_diffs_waiting", "Diffs that wait for a place."),
        ("tablecast_server_log_bytes", "Bytes of history kept for followers that lag."),
        ("tablecast_server_lag_changes", "The largest lag of a follower, in changes."),
        ("tablecast_server_lag_seconds", "The largest lag of a follower, in seconds."),
        ("tablecast_client_connected", "1 while the handshake is through."),
        ("tablecast_client_ready", "1 while nothing is known to be missing."),
        ("tablecast_client_revision", "The revision up to which changes have come."),
        ("tablecast_client_verified_revision", "Where its root was last known to be the server's."),
        ("tablecast_client_keys", "Keys of the follower's table."),
    ] {
        describe_gauge!(name, what);
    }
    let what = "Time from asking for a diff to its verdict.";
    describe_histogram!("tablecast_client_diff_seconds", Unit::Seconds, what);
}

/// Numbers as a recorder takes them: exact up to 2^53.
#[expect(clippy::cast_precision_loss, reason = "a gauge is a double")]
fn number(n: u64) -> f64 {
    n as f64
}

pub(crate) fn server(status: &ServerStatus, lag: u64, lag_time: Duration) {
    let revision = status.position.map_or(0, |at| at.revision.0);
    gauge!("tablecast_server_revision").set(number(revision));
    gauge!("tablecast_server_keys").set(number(status.keys as u64));
    gauge!("tablecast_server_followers").set(number(status.followers as u64));
    gauge!("tablecast_server_diffs_running").set(number(status.diffs_running as u64));
    gauge!("tablecast_server_diffs_waiting").set(number(status.diffs_waiting as u64));
    gauge!("tablecast_server_log_bytes").set(number(status.log_bytes as u64));
    gauge!("tablecast_server_lag_changes").set(number(lag));
    gauge!("tablecast_server_lag_seconds").set(lag_time.as_secs_f64());
}

pub(crate) fn client(status: &ClientStatus) {
    let ready = u8::from(status.health == Health::Ready);
    let revision = status.stream.map_or(0, |at| at.revision.0);
    gauge!("tablecast_client_connected").set(u8::from(status.connected));
    gauge!("tablecast_client_ready").set(ready);
    gauge!("tablecast_client_revision").set(number(revision));
    let verified = status.verified.map_or(0, |revision| revision.0);
    gauge!("tablecast_client_verified_revision").set(number(verified));
    gauge!("tablecast_client_keys").set(number(status.keys as u64));
}

/// The server is there no more.
pub(crate) fn server_gone() {
    for name in ["followers", "diffs_running", "diffs_waiting", "lag_changes", "lag_seconds"] {
        gauge!(format!("tablecast_server_{name}")).set(0.0);
    }
}

/// The follower is there no more, and nobody may think that it follows.
pub(crate) fn client_gone() {
    gauge!("tablecast_client_connected").set(0.0);
    gauge!("tablecast_client_ready").set(0.0);
}

pub(crate) fn changes_written(changes: u64) {
    counter!("tablecast_server_changes_total").increment(changes);
}

pub(crate) fn server_traffic(sent: u64, received: u64) {
    if (sent, received) == (0, 0) {
        return;
    }
    counter!("tablecast_server_sent_bytes_total").increment(sent);
    counter!("tablecast_server_received_bytes_total").increment(received);
}

pub(crate) fn client_traffic(sent: u64, received: u64) {
    counter!("tablecast_client_sent_bytes_total").increment(sent);
    counter!("tablecast_client_received_bytes_total").increment(received);
}

pub(crate) fn write_refused() {
    counter!("tablecast_server_refused_total").increment(1);
}

pub(crate) fn subscribed(way: Way) {
    counter!("tablecast_server_connections_total", "way" => format!("{way:?}")).increment(1);
}

pub(crate) fn connection_ended(why: impl Into<SharedString>) {
    counter!("tablecast_server_ended_total", "why" => why.into()).increment(1);
}

pub(crate) fn follower_fell_behind() {
    counter!("tablecast_server_fell_behind_total").increment(1);
}

pub(crate) fn follower_stalled() {
    counter!("tablecast_server_stalled_total").increment(1);
}

pub(crate) fn follower_refused() {
    counter!("tablecast_server_refused_followers_total").increment(1);
}

pub(crate) fn diff_served(outcome: String) {
    counter!("tablecast_server_diffs_total", "outcome" => outcome).increment(1);
}

pub(crate) fn follower_verified(equal: bool) {
    let result = if equal { "equal" } else { "different" };
    counter!("tablecast_server_verifications_total", "result" => result).increment(1);
}

pub(crate) fn changes_applied(changes: u64) {
    counter!("tablecast_client_changes_total").increment(changes);
}

pub(crate) fn change_refused() {
    counter!("tablecast_client_refused_total").increment(1);
}

pub(crate) fn corrupt(keys: u64) {
    counter!("tablecast_client_corrupt_total").increment(keys);
}

pub(crate) fn connected(way: Way) {
    counter!("tablecast_client_connects_total", "way" => format!("{way:?}")).increment(1);
}

pub(crate) fn fell_behind() {
    counter!("tablecast_client_fell_behind_total").increment(1);
}

pub(crate) fn diverged() {
    counter!("tablecast_client_diverged_total").increment(1);
}

pub(crate) fn held() {
    counter!("tablecast_client_held_total").increment(1);
}

pub(crate) fn diff_done(report: &DiffReport) {
    let outcome = if report.equal() { "equal" } else { "different" };
    counter!("tablecast_client_diffs_total", "outcome" => outcome).increment(1);
    let repaired = report.written.saturating_add(report.deleted);
    counter!("tablecast_client_repaired_total").increment(repaired);
    histogram!("tablecast_client_diff_seconds").record(report.elapsed.as_secs_f64());
}

pub(crate) fn diff_aborted() {
    counter!("tablecast_client_diffs_total", "outcome" => "aborted").increment(1);
}
