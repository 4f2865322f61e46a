#![no_main]

libfuzzer_sys::fuzz_target!(init: fuzz::watch_own_panics(), |data: &[u8]| {
    fuzz::shard_header::run(data);
});
