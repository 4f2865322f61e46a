//! The entries of a zip file whose data are stored as they are, found through its central directory, zip64 included.

use std::collections::BTreeMap;
use std::fs::File;
use std::os::unix::fs::FileExt;

/// Longest central directory that is read.
const MAX_DIRECTORY_BYTES: u64 = 256 << 20;
/// The end record without its comment.
const END_BYTES: u64 = 22;
/// The zip64 locator, right before the end record.
const LOCATOR_BYTES: u64 = 20;

/// Where an entry's data lie in the file.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Entry {
    /// First byte, from the file's beginning.
    pub offset: u64,
    /// Length in bytes.
    pub bytes: u64,
    /// CRC-32 that the directory gives.
    pub crc32: u32,
}

/// What the end records say about the directory.
struct Directory {
    offset: u64,
    bytes: u64,
    entries: u64,
}

/// All entries by name, each checked to lie before the directory.
///
/// # Errors
/// What is wrong with the file, in words.
pub fn entries(file: &File) -> Result<BTreeMap<String, Entry>, String> {
    let file_bytes = file.metadata().map_err(|error| error.to_string())?.len();
    let directory = directory(file, file_bytes)?;
    if directory.bytes > MAX_DIRECTORY_BYTES {
        return Err(format!("a directory of {} bytes; at most {MAX_DIRECTORY_BYTES} are read", directory.bytes));
    }
    let bytes = read(file, directory.offset, directory.bytes as usize)?;
    let mut rest = &bytes[..];
    let mut entries = BTreeMap::new();
    for number in 0..directory.entries {
        let (name, local, mut entry, after) =
            header(rest).ok_or_else(|| format!("its directory breaks off at entry {number}"))??;
        entry.offset = data_offset(file, local).map_err(|error| format!("entry `{name}`: {error}"))?;
        if entry.offset.checked_add(entry.bytes).is_none_or(|end| end > directory.offset) {
            return Err(format!(
                "entry `{name}`: {} bytes from {} on run into the directory",
                entry.bytes, entry.offset
            ));
        }
        if entries.insert(name.clone(), entry).is_some() {
            return Err(format!("two entries `{name}`"));
        }
        rest = after;
    }
    Ok(entries)
}

fn read(file: &File, offset: u64, len: usize) -> Result<Vec<u8>, String> {
    let mut bytes = vec![0; len];
    file.read_exact_at(&mut bytes, offset).map_err(|error| format!("{len} bytes at {offset}: {error}"))?;
    Ok(bytes)
}

fn u16_at(bytes: &[u8], at: usize) -> Option<u64> {
    Some(u16::from_le_bytes(bytes.get(at..at + 2)?.try_into().ok()?).into())
}

fn u32_at(bytes: &[u8], at: usize) -> Option<u64> {
    Some(u32::from_le_bytes(bytes.get(at..at + 4)?.try_into().ok()?).into())
}

fn u64_at(bytes: &[u8], at: usize) -> Option<u64> {
    Some(u64::from_le_bytes(bytes.get(at..at + 8)?.try_into().ok()?))
}

/// Finds the end record (a comment may follow it) and, where its numbers are too small, the zip64 one.
fn directory(file: &File, file_bytes: u64) -> Result<Directory, String> {
    let tail_bytes = file_bytes.min(END_BYTES + u64::from(u16::MAX));
    let tail_start = file_bytes - tail_bytes;
    let tail = read(file, tail_start, tail_bytes as usize)?;
    let is_end = |&at: &usize| {
        tail[at..].starts_with(b"PK\x05\x06") && u16_at(&tail, at + 20) == Some(tail_bytes - at as u64 - END_BYTES)
    };
    let last = tail_bytes.checked_sub(END_BYTES).ok_or("too short for a zip file")? as usize;
    let at = (0..=last).rev().find(is_end).ok_or("its end record is missing: the file is cut short")?;
    let field = |offset: usize, wide: bool| {
        let value = if wide { u32_at(&tail, at + offset) } else { u16_at(&tail, at + offset) };
        value.unwrap_or_default()
    };
    let (mut end, mut found) = (
        tail_start + at as u64,
        Directory { entries: field(10, false), bytes: field(12, true), offset: field(16, true) },
    );
    let narrow = u64::from(u32::MAX);
    if found.entries == u64::from(u16::MAX) || found.bytes == narrow || found.offset == narrow {
        let locator_at = end.checked_sub(LOCATOR_BYTES).ok_or("no room for its zip64 locator")?;
        let locator = read(file, locator_at, LOCATOR_BYTES as usize)?;
        // Exactly 65,535 entries fit without zip64.
        if locator.starts_with(b"PK\x06\x07") {
            end = u64_at(&locator, 8).unwrap_or_default();
            let record = read(file, end, 56)?;
            if !record.starts_with(b"PK\x06\x06") {
                return Err(format!("no zip64 end record at {end}"));
            }
            let field = |at| u64_at(&record, at).unwrap_or_default();
            found = Directory { entries: field(32), bytes: field(40), offset: field(48) };
        }
    }
    match found.offset.checked_add(found.bytes) {
        Some(directory_end) if directory_end <= end => Ok(found),
        _ => Err(format!("its directory of {} bytes at {} does not lie before its end", found.bytes, found.offset)),
    }
}

type Header<'a> = (String, u64, Entry, &'a [u8]);

/// One entry of the directory: name, place of its local header, length and CRC, and what follows. `None` where the bytes run out.
fn header(bytes: &[u8]) -> Option<Result<Header<'_>, String>> {
    if !bytes.starts_with(b"PK\x01\x02") {
        return None;
    }
    let (flags, method) = (u16_at(bytes, 8)?, u16_at(bytes, 10)?);
    let (crc32, mut packed, mut plain) = (u32_at(bytes, 16)? as u32, u32_at(bytes, 20)?, u32_at(bytes, 24)?);
    let [name_len, extra_len, comment_len] = [u16_at(bytes, 28)?, u16_at(bytes, 30)?, u16_at(bytes, 32)?];
    let mut local = u32_at(bytes, 42)?;
    let (name_end, extra_end) = (46 + name_len as usize, 46 + (name_len + extra_len) as usize);
    let name = String::from_utf8_lossy(bytes.get(46..name_end)?).into_owned();
    let mut extra = bytes.get(name_end..extra_end)?;
    let after = bytes.get(extra_end + comment_len as usize..)?;
    while let (Some(id), Some(len)) = (u16_at(extra, 0), u16_at(extra, 2)) {
        let Some(field) = extra.get(4..4 + len as usize) else { break };
        if id == 1 {
            // Only the numbers that do not fit above are here, in this order.
            let mut at = 0;
            for number in [&mut plain, &mut packed, &mut local] {
                if *number == u64::from(u32::MAX) {
                    *number = u64_at(field, at)?;
                    at += 8;
                }
            }
        }
        extra = &extra[4 + len as usize..];
    }
    if flags & 1 != 0 {
        return Some(Err(format!("entry `{name}` is encrypted")));
    }
    if method != 0 || packed != plain {
        return Some(Err(format!(
            "entry `{name}` is compressed (method {method}); torch.save stores entries as they are"
        )));
    }
    Some(Ok((name, local, Entry { offset: 0, bytes: plain, crc32 }, after)))
}

/// Where the data behind a local header begin.
fn data_offset(file: &File, local: u64) -> Result<u64, String> {
    let header = read(file, local, 30)?;
    match (u16_at(&header, 26), u16_at(&header, 28)) {
        (Some(name), Some(extra)) if header.starts_with(b"PK\x03\x04") => Ok(local + 30 + name + extra),
        _ => Err(format!("no local header at {local}")),
    }
}
