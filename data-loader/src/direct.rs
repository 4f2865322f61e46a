//! The short way to latents in local files: where a file stores them plainly (not compressed, no dictionary), rows go from the
//! page cache to where they are wanted by `pread`, without a decoder and without a copy in between.
//!
//! Nothing is taken on trust: once per row group every page header is read, every level checked (so a null or a list of another
//! length is found), and every page checksum compared, where the writer left one. What is not plain is left to the general
//! path, which also says what is wrong with it.

mod handles;
mod levels;
mod map;

use std::fs::File;
use std::io::{self, ErrorKind, IoSliceMut};
use std::os::unix::fs::FileExt;
use std::sync::{Arc, OnceLock};

use nix::fcntl::{PosixFadviseAdvice, posix_fadvise};
use nix::sys::uio::preadv;
use parquet::basic::{Compression, Encoding, Type};

use crate::footer::Footer;
use crate::form::{Dtype, Stored};
use crate::{DataError, LatentDataset, RowGroup, RowRun};
use handles::Handles;
use levels::Expected;
use map::{Chunk, Stretch, map};

/// Rows that one request reads at most; the kernel takes 1,024.
const MOST_ROWS_AT_ONCE: usize = 256;

/// Knows where each latent of a data set is. Takes 16 bytes of memory per page.
pub(crate) struct Direct {
    handles: Handles,
    /// `None` inside: not plain after all.
    groups: Vec<OnceLock<Option<Vec<Vec<Stretch>>>>>,
}

/// A latent to be read, and where to.
pub(crate) struct Wanted<'a> {
    /// Data set row.
    pub row: u64,
    /// Latent column.
    pub column: usize,
    /// As long as a stored latent.
    pub out: &'a mut [u8],
}

impl Direct {
    /// If all latents of all files may be stored plainly, as far as footers tell.
    pub fn of(files: &[Footer], row_groups: usize, stored: &[Stored]) -> Option<Self> {
        let one_type = stored.iter().all(|column| column.numel > 0 && column.dtype == stored[0].dtype);
        if cfg!(target_endian = "big") || !one_type {
            return None;
        }
        let plain = |footer: &Footer| {
            let groups = 0..footer.metadata.metadata().num_row_groups();
            groups.into_iter().all(|group| stored.iter().all(|column| chunk(footer, group, column).is_some()))
        };
        if !files.iter().all(plain) {
            return None;
        }
        let files = files.iter().map(|footer| footer.file.local.clone()).collect::<Option<Vec<_>>>()?;
        let handles = Handles::new(files);
        Some(Self { handles, groups: (0..row_groups).map(|_| OnceLock::new()).collect() })
    }
}

/// A column of a row group that can be mapped.
fn chunk(footer: &Footer, row_group: usize, column: &Stored) -> Option<Chunk> {
    let group = footer.metadata.metadata().row_group(row_group);
    let mut leaves = group.columns().iter().filter(|leaf| leaf.column_path().parts().first() == Some(&column.name));
    let (leaf, others) = (leaves.next()?, leaves.next());
    let (about, row_bytes) = (leaf.column_descr(), column.numel * column.dtype.bytes());
    let value_bytes = if column.levels == 0 { row_bytes } else { column.dtype.bytes() };
    let as_stored = match (about.physical_type(), column.levels) {
        (Type::FLOAT, 1..) => column.dtype == Dtype::F32,
        (Type::FIXED_LEN_BYTE_ARRAY, 1..) => column.dtype == Dtype::F16 && about.type_length() == 2,
        (Type::FIXED_LEN_BYTE_ARRAY, 0) => usize::try_from(about.type_length()).ok() == Some(value_bytes),
        _ => false,
    };
    let plain = others.is_none()
        && as_stored
        && leaf.compression() == Compression::UNCOMPRESSED
        && leaf.dictionary_page_offset().is_none()
        && leaf.encodings().all(|encoding| matches!(encoding, Encoding::PLAIN | Encoding::RLE))
        && usize::try_from(about.max_rep_level()).ok() == Some(column.levels);
    // `Footer::read` has checked that both are inside of the file.
    let (start, length) = (leaf.data_page_offset() as u64, leaf.compressed_size() as u64);
    plain.then(|| Chunk {
        start,
        end: start + length,
        rows: group.num_rows() as u64,
        row_bytes,
        levels: Expected { dims: column.dims.clone(), most_definition: about.max_def_level() as u16 },
    })
}

impl LatentDataset {
    /// Whether the rows of `runs` can be read by [`LatentDataset::read_directly`]. Looks at every row group among them that was
    /// not looked at before.
    ///
    /// # Errors
    /// If a file cannot be read or has changed.
    pub(crate) fn map_rows(&self, runs: &[RowRun]) -> Result<bool, DataError> {
        let Some(direct) = &self.direct else { return Ok(false) };
        let mut file = None;
        for at in runs.iter().flat_map(|run| self.groups_of(run)) {
            let group = &self.row_groups()[at];
            let failed = |error: io::Error| self.group_error(group, &error);
            if file != Some(group.file) {
                direct.handles.check(group.file).map_err(failed)?;
                file = Some(group.file);
            }
            if direct.groups[at].get().is_none() {
                let mapped = self.map_group(direct, group).map_err(failed)?;
                // Another thread may have been faster, to the same end.
                let _ = direct.groups[at].set(mapped);
            }
            if !matches!(direct.groups[at].get(), Some(Some(_))) {
                return Ok(false);
            }
        }
        Ok(true)
    }

    fn map_group(&self, direct: &Direct, group: &RowGroup) -> io::Result<Option<Vec<Vec<Stretch>>>> {
        let file = direct.handles.get(group.file)?;
        let footer = &self.files[group.file];
        let mut columns = Vec::with_capacity(self.stored.len());
        for column in &self.stored {
            let Some(chunk) = chunk(footer, group.index_in_file, column) else { return Ok(None) };
            let Some(stretches) = map(&file, &chunk)? else { return Ok(None) };
            columns.push(stretches);
        }
        Ok(Some(columns))
    }

    /// Tells the kernel that rows will be read soon: what is not in the page cache is fetched in the background.
    pub(crate) fn advise(&self, runs: &[RowRun]) {
        let Some(direct) = &self.direct else { return };
        for run in runs {
            for at in self.groups_of(run) {
                let group = &self.row_groups()[at];
                let (first, end) = self.part_of(run, group);
                let Ok(file) = direct.handles.get(group.file) else { return };
                for column in &self.stored {
                    let Some(chunk) = chunk(&self.files[group.file], group.index_in_file, column) else { return };
                    // Headers and levels between pages make the rows begin a little later than this.
                    let at = |row: u64| {
                        chunk.start
                            + ((chunk.end - chunk.start) as u128 * u128::from(row) / u128::from(chunk.rows)) as u64
                    };
                    let (start, length) = (at(first), at(end) - at(first));
                    // Only advice; a file system that takes none is read all the same.
                    let _ = posix_fadvise(&file, start as i64, length as i64, PosixFadviseAdvice::POSIX_FADV_WILLNEED);
                }
            }
        }
    }

    /// Reads latents as stored, in the order in which they lie in the files, neighbours in one request. All rows must have been
    /// mapped.
    ///
    /// # Errors
    /// If a file cannot be read, has changed, or ends too early.
    pub(crate) fn read_directly<'a>(&self, wanted: Vec<Wanted<'a>>) -> Result<(), DataError> {
        if wanted.is_empty() {
            return Ok(());
        }
        let Some(direct) = &self.direct else { unreachable!("rows have been mapped") };
        let mut slots: Vec<Slot<'a>> = wanted.into_iter().map(|wanted| self.locate(direct, wanted)).collect();
        slots.sort_unstable_by_key(|slot| (slot.file, slot.offset));
        let mut left = &mut slots[..];
        let mut open: Option<(usize, Arc<File>)> = None;
        while let Some(first) = left.first() {
            let index = first.file;
            let neighbours = left.windows(2).take(MOST_ROWS_AT_ONCE - 1);
            let count =
                1 + neighbours.take_while(|pair| pair[1].file == index && pair[1].offset == pair[0].end()).count();
            let (now, rest) = left.split_at_mut(count);
            left = rest;
            if open.as_ref().is_none_or(|(file, _)| *file != index) {
                let file = direct.handles.get(index);
                open = Some((index, file.map_err(|error| self.slot_error(&now[0], &error))?));
            }
            let Some((_, file)) = &open else { unreachable!("set above") };
            read(file, now).map_err(|(at, error)| self.slot_error(&now[at], &error))?;
        }
        Ok(())
    }

    fn locate<'a>(&self, direct: &Direct, Wanted { row, column, out }: Wanted<'a>) -> Slot<'a> {
        let at = self.group_of(row);
        let group = &self.row_groups()[at];
        let Some(Some(columns)) = direct.groups[at].get() else { unreachable!("rows have been mapped") };
        let row_in_group = row - group.first_row;
        let after = columns[column].partition_point(|stretch| stretch.first_row <= row_in_group);
        // The first stretch begins with row 0.
        let stretch = columns[column][after - 1];
        let offset = stretch.offset + (row_in_group - stretch.first_row) * out.len() as u64;
        Slot { file: group.file, offset, row, column, out }
    }

    fn groups_of(&self, run: &RowRun) -> std::ops::Range<usize> {
        self.group_of(run.first_row)..self.group_of((run.first_row + run.rows).max(1) - 1) + 1
    }

    /// The rows of a run that are in a group, counted in it.
    fn part_of(&self, run: &RowRun, group: &RowGroup) -> (u64, u64) {
        let end = (run.first_row + run.rows).min(group.first_row + group.rows);
        (run.first_row.max(group.first_row) - group.first_row, end - group.first_row)
    }

    fn group_error(&self, group: &RowGroup, error: &io::Error) -> DataError {
        DataError::RowGroup {
            file: self.files[group.file].file.name.clone(),
            row_group: group.index_in_file,
            reason: in_words(error),
        }
    }

    fn slot_error(&self, slot: &Slot, error: &io::Error) -> DataError {
        let column = &self.stored[slot.column];
        let expected = format!("{} bytes at {}", slot.out.len(), slot.offset);
        self.row_error(slot.row, &column.name, format!("unreadable ({})", in_words(error)), expected)
    }
}

fn in_words(error: &io::Error) -> String {
    match error.kind() {
        ErrorKind::UnexpectedEof => "the file ends too early; it was cut short after the data set was opened".into(),
        _ => error.to_string(),
    }
}

/// A latent with its place.
struct Slot<'a> {
    file: usize,
    offset: u64,
    row: u64,
    column: usize,
    out: &'a mut [u8],
}

impl Slot<'_> {
    fn end(&self) -> u64 {
        self.offset + self.out.len() as u64
    }
}

/// Reads slots that lie one behind the other. `Err` with the number of the first that is not complete.
fn read(file: &File, slots: &mut [Slot]) -> Result<(), (usize, io::Error)> {
    let (mut offset, row_bytes) = (slots[0].offset, slots[0].out.len());
    if let [slot] = slots {
        return file.read_exact_at(slot.out, offset).map_err(|error| (0, error));
    }
    let (mut done, total) = (0, slots.len() * row_bytes);
    let mut pieces: Vec<IoSliceMut> = slots.iter_mut().map(|slot| IoSliceMut::new(slot.out)).collect();
    let mut pieces = &mut pieces[..];
    while done < total {
        match preadv(file, pieces, offset as i64) {
            Ok(0) => return Err((done / row_bytes, ErrorKind::UnexpectedEof.into())),
            Ok(read) => {
                done += read;
                offset += read as u64;
                IoSliceMut::advance_slices(&mut pieces, read);
            }
            Err(nix::errno::Errno::EINTR) => {}
            Err(error) => return Err((done / row_bytes, error.into())),
        }
    }
    Ok(())
}

#[cfg(test)]
mod tests;
