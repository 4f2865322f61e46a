//! Where the rows of a row group's latents are in the file.

use std::fs::File;
use std::io;
use std::os::unix::fs::FileExt;

use super::levels::Expected;
use crate::pages::{Layout, Levels, Page, header};

/// Bytes that are read to see a page's header and levels.
const PEEK_BYTES: usize = 8 << 10;
/// A header with statistics may be longer, but not longer than this.
const MOST_HEADER_BYTES: usize = 64 << 10;
/// Levels that take more than this are left to the general path.
const MOST_LEVEL_BYTES: usize = 64 << 20;

/// A column chunk as the footer describes it.
#[derive(Clone, Debug)]
pub(super) struct Chunk {
    /// Its first byte.
    pub start: u64,
    /// The byte after its last page.
    pub end: u64,
    pub rows: u64,
    pub row_bytes: usize,
    pub levels: Expected,
}

/// Rows that lie one behind the other.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Stretch {
    /// The first, counted in the row group.
    pub first_row: u64,
    /// Its first byte in the file.
    pub offset: u64,
}

/// Walks through the pages of a chunk. `None` if anything about them is not plain: then another reader has to say what.
///
/// # Errors
/// If the file cannot be read, or ends too early.
pub(super) fn map(file: &File, chunk: &Chunk) -> io::Result<Option<Vec<Stretch>>> {
    let mut peek = Peek { file, end: chunk.end, start: 0, bytes: Vec::new() };
    let mut stretches = Vec::new();
    let (mut first_row, mut at) = (0, chunk.start);
    while first_row < chunk.rows {
        let Some((page, body)) = peek.page(at)? else { return Ok(None) };
        let Some(values) = values_of(&mut peek, &page, body, chunk)? else { return Ok(None) };
        let rows = (page.values / chunk.levels.values()) as u64;
        if !crc_holds(file, &page, body)? {
            return Ok(None);
        }
        if rows > 0 {
            stretches.push(Stretch { first_row, offset: values });
        }
        first_row += rows;
        at = body + page.bytes as u64;
    }
    Ok((first_row == chunk.rows).then_some(stretches))
}

/// The first byte of a page's values, if the page holds whole rows and nothing is missing.
fn values_of(peek: &mut Peek, page: &Page, body: u64, chunk: &Chunk) -> io::Result<Option<u64>> {
    let (expected, count) = (&chunk.levels, page.values);
    let Some(Layout { plain: true, levels }) = page.layout else { return Ok(None) };
    if page.bytes != page.decoded_bytes || !count.is_multiple_of(expected.values()) {
        return Ok(None);
    }
    let end = body + page.bytes as u64;
    let mut at = body;
    let most_repetition = expected.dims.len();
    for repetition in [true, false] {
        let has_levels = if repetition { most_repetition > 0 } else { expected.most_definition > 0 };
        let length = match levels {
            Levels::Sized { repetition_bytes, definition_bytes } => {
                if repetition {
                    repetition_bytes
                } else {
                    definition_bytes
                }
            }
            Levels::Prefixed { .. } if !has_levels => 0,
            Levels::Prefixed { rle: false } => return Ok(None),
            Levels::Prefixed { rle: true } => {
                if end - at < 4 {
                    return Ok(None);
                }
                let length = peek.bytes(at, 4)?.iter().rev().fold(0, |length, byte| length << 8 | usize::from(*byte));
                at += 4;
                length
            }
        };
        if length as u64 > end - at || length > MOST_LEVEL_BYTES {
            return Ok(None);
        }
        if has_levels {
            let levels = peek.bytes(at, length)?;
            let good =
                if repetition { expected.repetition_is(levels, count) } else { expected.definition_is(levels, count) };
            if !good {
                return Ok(None);
            }
        }
        at += length as u64;
    }
    let bytes = (count / expected.values()).checked_mul(chunk.row_bytes);
    Ok((bytes.is_some_and(|bytes| bytes as u64 == end - at)).then_some(at))
}

/// Whether the page's bytes are those that were written, as far as the writer left a checksum.
fn crc_holds(file: &File, page: &Page, body: u64) -> io::Result<bool> {
    let Some(crc) = page.crc else { return Ok(true) };
    let (mut hasher, mut done) = (crc32fast::Hasher::new(), 0);
    let mut bytes = vec![0; page.bytes.min(1 << 20)];
    while done < page.bytes {
        let length = bytes.len().min(page.bytes - done);
        file.read_exact_at(&mut bytes[..length], body + done as u64)?;
        hasher.update(&bytes[..length]);
        done += length;
    }
    Ok(hasher.finalize() == crc)
}

/// The bytes around the place in a chunk that is being looked at.
struct Peek<'a> {
    file: &'a File,
    end: u64,
    start: u64,
    bytes: Vec<u8>,
}

impl Peek<'_> {
    /// The data page whose header is at `at`, and where its body begins.
    fn page(&mut self, at: u64) -> io::Result<Option<(Page, u64)>> {
        for most in [PEEK_BYTES, MOST_HEADER_BYTES] {
            let length = most.min(self.end.saturating_sub(at) as usize);
            if let Some(page) = header(self.bytes(at, length)?) {
                let body = at + page.start as u64;
                return Ok((page.bytes as u64 <= self.end - body).then_some((page, body)));
            }
        }
        Ok(None)
    }

    /// `length` bytes from `at` on, all of them inside the chunk.
    fn bytes(&mut self, at: u64, length: usize) -> io::Result<&[u8]> {
        let inside = at >= self.start && at + length as u64 <= self.start + self.bytes.len() as u64;
        if !inside {
            let length = length.max(PEEK_BYTES.min((self.end - at) as usize));
            self.bytes.resize(length, 0);
            self.start = at;
            if let Err(error) = self.file.read_exact_at(&mut self.bytes, at) {
                self.bytes.clear();
                return Err(error);
            }
        }
        let from = (at - self.start) as usize;
        Ok(&self.bytes[from..from + length])
    }
}
