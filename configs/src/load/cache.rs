//! `[cache]`.

use std::path::Path;

use super::{ANY, read_folder};
use crate::cache::CacheConfig;
use crate::reader::Reader;

/// The least that is of use: blocks of several requests.
const LEAST_BYTES: u64 = 64 << 20;

pub(super) fn read(r: &mut Reader, base: &Path) -> Option<CacheConfig> {
    let dir = read_folder(r, "cache.dir", base);
    match r.optional_integer("cache.bytes", LEAST_BYTES..=ANY) {
        Some(bytes) => Some(CacheConfig { dir, bytes }),
        None => {
            if r.given("cache.dir") && !r.given("cache.bytes") {
                let problem = "is missing, which `cache.dir` means nothing without";
                r.refuse("cache.bytes", problem, "set it to the most bytes that the cache may take");
            }
            None
        }
    }
}
