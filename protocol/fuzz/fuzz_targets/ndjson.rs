#![no_main]

use tablecast_protocol::{Change, Key, Limits, Value};

// By its file: the command with all that it needs would take minutes to build.
#[allow(dead_code, unreachable_pub, reason = "the command uses more of it")]
#[path = "../../../src/cli/ndjson.rs"]
mod ndjson;

libfuzzer_sys::fuzz_target!(|input: &[u8]| ndjson::check_any(input));
