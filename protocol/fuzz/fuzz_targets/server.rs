#![no_main]

libfuzzer_sys::fuzz_target!(|input: &[u8]| drop(tablecast_simulator::fuzz::server(input)));
