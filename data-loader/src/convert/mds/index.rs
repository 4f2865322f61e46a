//! `index.json`: the shards, their columns, lengths and digests.

use std::collections::BTreeMap;

use serde::{Deserialize, Serialize};

use crate::DataError;
use crate::convert::files::Place;

pub(super) const NAME: &str = "index.json";
const MOST_BYTES: u64 = 1 << 30;

/// An index whose shards all have the same columns.
pub(super) struct Index {
    /// Names and encodings.
    pub columns: Vec<(String, String)>,
    /// Bytes of the values of each column, where they are fixed.
    pub sizes: Vec<Option<usize>>,
    pub compression: Option<Compression>,
    pub shards: Vec<ShardEntry>,
}

/// How shards are compressed.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Compression {
    Zstd,
    Gzip,
}

/// A shard's entry.
#[derive(Clone, Debug, Deserialize, Serialize)]
pub(super) struct ShardEntry {
    pub column_encodings: Vec<String>,
    pub column_names: Vec<String>,
    pub column_sizes: Vec<Option<usize>>,
    pub compression: Option<String>,
    pub format: String,
    pub hashes: Vec<String>,
    pub raw_data: FileEntry,
    pub samples: usize,
    pub size_limit: Option<serde_json::Value>,
    pub version: u32,
    pub zip_data: Option<FileEntry>,
}

/// A file of a shard.
#[derive(Clone, Debug, Deserialize, Serialize)]
pub(super) struct FileEntry {
    pub basename: String,
    pub bytes: u64,
    /// Digests by name of the algorithm, in hexadecimal.
    pub hashes: BTreeMap<String, String>,
}

#[derive(Deserialize)]
struct RawIndex {
    version: u32,
    shards: Vec<ShardEntry>,
}

/// Reads a folder's index.
///
/// # Errors
/// If it is not of version 2 and format `mds`, or its shards have different columns.
pub(super) fn read(folder: &Place) -> Result<Index, DataError> {
    let place = folder.join(NAME);
    let bad = |reason: String| DataError::source(place.name(), reason);
    let raw: RawIndex = serde_json::from_slice(&place.read(MOST_BYTES)?)
        .map_err(|error| bad(format!("is no index of MDS shards: {error}")))?;
    let Some(first) = raw.shards.first().cloned() else {
        return Err(bad("names no shard".into()));
    };
    if raw.version != 2 || raw.shards.iter().any(|shard| shard.version != 2) {
        return Err(bad(format!("has version {}; expected 2", raw.version)));
    }
    for (at, shard) in raw.shards.iter().enumerate() {
        let name = &shard.raw_data.basename;
        if shard.format != "mds" {
            return Err(bad(format!("shard {at} ({name}) has the format {}; expected mds", shard.format)));
        }
        if shard.samples == 0 || shard.samples > u32::MAX as usize - 1 {
            return Err(bad(format!("shard {at} ({name}) has {} samples", shard.samples)));
        }
        if (&shard.column_names, &shard.column_encodings, &shard.column_sizes)
            != (&first.column_names, &first.column_encodings, &first.column_sizes)
            || family(shard) != family(&first)
        {
            return Err(bad(format!("shard {at} ({name}) has other columns or another compression than the first")));
        }
        let files = std::iter::once(&shard.raw_data).chain(&shard.zip_data);
        if let Some(file) =
            files.clone().find(|file| file.basename.split('/').any(|part| matches!(part, "" | "." | "..")))
        {
            return Err(bad(format!(
                "shard {at} has the file name `{}`, which leads out of the folder",
                file.basename
            )));
        }
    }
    let lengths = [first.column_names.len(), first.column_encodings.len(), first.column_sizes.len()];
    if lengths.iter().any(|length| *length != lengths[0]) {
        return Err(bad(format!("has {lengths:?} column names, encodings and sizes; expected as many of each")));
    }
    let compression = match family(&first) {
        None => None,
        Some("zstd") => Some(Compression::Zstd),
        Some("gz") => Some(Compression::Gzip),
        Some(other) => {
            return Err(bad(format!(
                "has shards compressed with {other}; expected none, zstd or gz: write them again with one of these"
            )));
        }
    };
    if compression.is_some() && raw.shards.iter().any(|shard| shard.zip_data.is_none()) {
        return Err(bad("has compressed shards without `zip_data`".into()));
    }
    Ok(Index {
        columns: first.column_names.iter().cloned().zip(first.column_encodings.iter().cloned()).collect(),
        sizes: first.column_sizes.clone(),
        compression,
        shards: raw.shards,
    })
}

/// `zstd` of `zstd:7`.
fn family(shard: &ShardEntry) -> Option<&str> {
    shard.compression.as_deref().map(|text| text.split(':').next().unwrap_or(text))
}
