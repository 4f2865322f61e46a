//! The cache of `[cache]`, for every data set that a rank opens.

use anyhow::{Context, Result};
use configs::RunConfig;
use data_loader::{BlockCache, OpenOptions};
use std::sync::Arc;

/// How a run's data sets are opened; with its cache, if it asks for one and some URL is remote.
///
/// # Errors
/// A folder that cannot hold a cache.
pub fn open_options<'a>(config: &RunConfig, urls: impl IntoIterator<Item = &'a str>) -> Result<OpenOptions> {
    let options = OpenOptions::of(&config.data.columns);
    let remote = urls.into_iter().any(|url| configs::location::local_path(url).is_none());
    let Some(wanted) = config.cache.as_ref().filter(|_| remote) else { return Ok(options) };
    let dir = wanted.dir.clone().or_else(BlockCache::default_dir);
    let dir =
        dir.context("`cache.dir` is not set, and neither XDG_CACHE_HOME nor HOME tells a folder to take instead")?;
    let warn = |warning: &str| eprintln!("trainer: warning: `cache.dir`: {warning}");
    let cache = BlockCache::open(&dir, wanted.bytes, warn).context("`cache.dir`")?;
    Ok(OpenOptions { cache: Some(Arc::new(cache)), ..options })
}
