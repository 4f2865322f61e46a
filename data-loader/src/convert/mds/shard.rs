//! Shards: rows behind a table of offsets, checked against the digests of the index when they are first read.

use std::collections::VecDeque;
use std::io::Read;
use std::sync::{Arc, Mutex, PoisonError};

use bytes::Bytes;
use md5::Md5;
use sha1::Sha1;
use sha2::{Digest, Sha256, Sha512};

use super::index::{Compression, FileEntry, Index, ShardEntry};
use crate::DataError;
use crate::convert::files::Place;

/// Decompressed shards that are kept: as many as threads read at the same time, and some.
const KEPT: usize = 8;
/// A shard's offsets have 32 bits.
const MOST_BYTES: u64 = u32::MAX as u64;

/// The shards of a data set.
pub(super) struct Shards {
    folder: Place,
    index: Index,
    /// The row after each shard's last.
    ends: Vec<usize>,
    /// Shards whose digests were right.
    checked: Vec<Mutex<bool>>,
    kept: Mutex<VecDeque<(usize, Arc<Bytes>)>>,
}

/// A shard's bytes: in memory, or in its file.
enum Contents {
    Memory(Arc<Bytes>),
    File(Place),
}

impl Shards {
    pub fn new(folder: Place, index: Index) -> Self {
        let mut end = 0;
        let ends: Vec<usize> = index
            .shards
            .iter()
            .map(|shard| {
                end += shard.samples;
                end
            })
            .collect();
        let checked = ends.iter().map(|_| Mutex::new(false)).collect();
        Self { folder, index, ends, checked, kept: Mutex::new(VecDeque::new()) }
    }

    pub fn rows(&self) -> usize {
        self.ends.last().copied().unwrap_or(0)
    }

    /// Shard and row in it.
    fn find(&self, row: usize) -> (usize, usize) {
        let shard = self.ends.partition_point(|&end| end <= row);
        (shard, row - (self.ends[shard] - self.index.shards[shard].samples))
    }

    pub fn place(&self, row: usize) -> String {
        let (shard, row) = self.find(row);
        format!("{}: row {row}", self.folder.join(&self.index.shards[shard].raw_data.basename).name())
    }

    /// Gives the columns of each of `rows` to `take`.
    ///
    /// # Errors
    /// Those of `take`, or what is wrong with a shard.
    pub fn each(
        &self,
        rows: &[usize],
        mut take: impl FnMut(usize, &[&[u8]]) -> Result<(), DataError>,
    ) -> Result<(), DataError> {
        for run in rows.chunk_by(|&a, &b| self.find(a).0 == self.find(b).0) {
            let (shard, _) = self.find(run[0]);
            let contents = self.contents(shard)?;
            let refuse = |row: usize, reason: String| DataError::source(self.place(row), reason);
            let pairs: Vec<_> = run
                .iter()
                .map(|&row| {
                    let start = (1 + self.find(row).1 as u64) * 4;
                    start..start + 8
                })
                .collect();
            let shard_bytes = self.index.shards[shard].raw_data.bytes;
            let mut ranges = Vec::with_capacity(run.len());
            for (pair, &row) in contents.read(&pairs)?.iter().zip(run) {
                let offset =
                    |at: usize| pair[at..at + 4].first_chunk().map_or(0, |b| u64::from(u32::from_le_bytes(*b)));
                let (start, end) = (offset(0), offset(4));
                if start > end || end > shard_bytes {
                    let reason = format!("lies at bytes {start} to {end} of a shard of {shard_bytes}");
                    return Err(refuse(row, reason));
                }
                ranges.push(start..end);
            }
            for (bytes, &row) in contents.read(&ranges)?.iter().zip(run) {
                let columns = self.columns(bytes).ok_or_else(|| {
                    refuse(row, format!("its {} bytes do not hold the columns of the index", bytes.len()))
                })?;
                take(row, &columns)?;
            }
        }
        Ok(())
    }

    /// Cuts a row into its columns: lengths of those that vary, then all values.
    fn columns<'a>(&self, row: &'a [u8]) -> Option<Vec<&'a [u8]>> {
        let varying = self.index.sizes.iter().filter(|size| size.is_none()).count();
        let (lengths, mut rest) = row.split_at_checked(varying * 4)?;
        let mut lengths = lengths.as_chunks::<4>().0.iter().map(|bytes| u32::from_le_bytes(*bytes) as usize);
        let mut columns = Vec::with_capacity(self.index.sizes.len());
        for size in &self.index.sizes {
            let (value, after) = rest.split_at_checked(match size {
                Some(size) => *size,
                None => lengths.next()?,
            })?;
            columns.push(value);
            rest = after;
        }
        rest.is_empty().then_some(columns)
    }

    /// A shard, checked.
    fn contents(&self, shard: usize) -> Result<Contents, DataError> {
        let entry = &self.index.shards[shard];
        let raw = self.folder.join(&entry.raw_data.basename);
        // The lock is held while checking, so that threads do not do the same work.
        let mut checked = self.checked[shard].lock().unwrap_or_else(PoisonError::into_inner);
        let Some(compression) = self.index.compression else {
            if !*checked {
                self.check_raw(&raw, entry)?;
                *checked = true;
            }
            return Ok(Contents::File(raw));
        };
        let mut kept = self.kept.lock().unwrap_or_else(PoisonError::into_inner);
        if let Some((_, bytes)) = kept.iter().find(|(other, _)| *other == shard) {
            return Ok(Contents::Memory(bytes.clone()));
        }
        drop(kept);
        let bytes = Arc::new(self.decompress(entry, compression)?);
        kept = self.kept.lock().unwrap_or_else(PoisonError::into_inner);
        kept.push_back((shard, bytes.clone()));
        if kept.len() > KEPT {
            kept.pop_front();
        }
        *checked = true;
        Ok(Contents::Memory(bytes))
    }

    fn check_raw(&self, place: &Place, entry: &ShardEntry) -> Result<(), DataError> {
        let found = place.bytes()?;
        if found != entry.raw_data.bytes {
            return Err(wrong_length(place, found, &entry.raw_data));
        }
        if entry.raw_data.hashes.is_empty() {
            return check_count(place, entry, &place.read_range(0..4.min(found))?);
        }
        let bytes = place.read(MOST_BYTES)?;
        check_digests(place, &bytes, &entry.raw_data)?;
        check_count(place, entry, &bytes)
    }

    fn decompress(&self, entry: &ShardEntry, compression: Compression) -> Result<Bytes, DataError> {
        // `index::read` has seen that it is there.
        let zip_entry = entry.zip_data.as_ref().unwrap_or(&entry.raw_data);
        let place = self.folder.join(&zip_entry.basename);
        let zipped = place.read(MOST_BYTES)?;
        if zipped.len() as u64 != zip_entry.bytes {
            return Err(wrong_length(&place, zipped.len() as u64, zip_entry));
        }
        check_digests(&place, &zipped, zip_entry)?;
        let expected = entry.raw_data.bytes;
        if expected > MOST_BYTES {
            return Err(DataError::source(
                place.name(),
                format!("unpacks to {expected} bytes; expected at most 4 GiB"),
            ));
        }
        let mut bytes = Vec::new();
        // One byte more shows that it is too long; no more is ever unpacked.
        let unpacked = match compression {
            Compression::Zstd => zstd::stream::read::Decoder::new(&zipped[..])
                .and_then(|reader| reader.take(expected + 1).read_to_end(&mut bytes)),
            Compression::Gzip => {
                flate2::read::MultiGzDecoder::new(&zipped[..]).take(expected + 1).read_to_end(&mut bytes)
            }
        };
        unpacked.map_err(|error| DataError::source(place.name(), format!("cannot be unpacked: {error}")))?;
        if bytes.len() as u64 != expected {
            let reason = format!("unpacks to {} bytes or more; the index tells of {expected}", bytes.len());
            return Err(DataError::source(place.name(), reason));
        }
        check_digests(&place, &bytes, &entry.raw_data)?;
        check_count(&place, entry, &bytes)?;
        Ok(bytes.into())
    }
}

impl Contents {
    fn read(&self, ranges: &[std::ops::Range<u64>]) -> Result<Vec<Bytes>, DataError> {
        match self {
            Self::File(place) => place.read_ranges(ranges),
            Self::Memory(bytes) => Ok(ranges
                .iter()
                .map(|range| {
                    let end = (range.end as usize).min(bytes.len());
                    bytes.slice((range.start as usize).min(end)..end)
                })
                .collect()),
        }
    }
}

fn wrong_length(place: &Place, found: u64, entry: &FileEntry) -> DataError {
    DataError::source(place.name(), format!("has {found} bytes; the index tells of {}: copy it again", entry.bytes))
}

/// A shard begins with its number of samples, and offsets of all of them follow.
fn check_count(place: &Place, entry: &ShardEntry, start: &[u8]) -> Result<(), DataError> {
    let found = start.first_chunk().map(|bytes| u32::from_le_bytes(*bytes) as usize);
    let table_bytes = (entry.samples as u64 + 2) * 4;
    if found == Some(entry.samples) && table_bytes <= entry.raw_data.bytes {
        return Ok(());
    }
    let reason = format!(
        "begins with the count {found:?} in {} bytes; the index tells of {}",
        entry.raw_data.bytes, entry.samples
    );
    Err(DataError::source(place.name(), reason))
}

/// Compares what the index tells of the bytes, as far as the algorithms are known.
fn check_digests(place: &Place, bytes: &[u8], entry: &FileEntry) -> Result<(), DataError> {
    let hex = |digest: &[u8]| digest.iter().map(|byte| format!("{byte:02x}")).collect::<String>();
    for (algorithm, expected) in &entry.hashes {
        let found = match algorithm.as_str() {
            "md5" => hex(&Md5::digest(bytes)),
            "sha1" => hex(&Sha1::digest(bytes)),
            "sha256" => hex(&Sha256::digest(bytes)),
            "sha512" => hex(&Sha512::digest(bytes)),
            "xxh64" => format!("{:016x}", twox_hash::XxHash64::oneshot(0, bytes)),
            "xxh3_64" => format!("{:016x}", twox_hash::XxHash3_64::oneshot(bytes)),
            "xxh3_128" | "xxh128" => format!("{:032x}", twox_hash::XxHash3_128::oneshot(bytes)),
            // Others are not compared; the manual says which are.
            _ => continue,
        };
        if found != *expected {
            let reason = format!(
                "has the {algorithm} {found}; the index tells of {expected}: the file is damaged, copy it again"
            );
            return Err(DataError::source(place.name(), reason));
        }
    }
    Ok(())
}
