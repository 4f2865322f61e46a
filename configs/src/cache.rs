//! `[cache]`: where bytes of remote data sets are kept.

use serde::Serialize;
use std::path::PathBuf;

/// `[cache]`: blocks of remote data sets on a local disk, shared by all ranks and runs of a machine that name the same folder.
#[derive(Debug, Clone, PartialEq, Serialize)]
pub struct CacheConfig {
    /// Absolute path of the folder; `None`: `ditharos/blocks` in the user's cache folder.
    pub dir: Option<PathBuf>,
    /// Most bytes of all files in it.
    pub bytes: u64,
}
