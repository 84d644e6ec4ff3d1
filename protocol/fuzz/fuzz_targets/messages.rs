#![no_main]

libfuzzer_sys::fuzz_target!(|input: &[u8]| tablecast_simulator::fuzz::messages(input));
