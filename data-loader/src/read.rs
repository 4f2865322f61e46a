//! Reading rows of an opened data set by number.

use std::collections::BTreeMap;
use std::future::Future;
use std::ops::Range;
use std::panic::AssertUnwindSafe;
use std::sync::Arc;

use arrow::array::{ArrayRef, RecordBatch};
use futures::{FutureExt, StreamExt, TryStreamExt};
use parquet::arrow::arrow_reader::RowSelection;
use parquet::arrow::{ParquetRecordBatchStreamBuilder, ProjectionMask};
use tokio::runtime::Runtime;

use crate::access::out_of_parquet;
use crate::block::Extents;
use crate::bounds::BoundedReader;
use crate::decode::{self, BadRow, Dims, Flat};
use crate::footer::Label;
use crate::source::ObjectReader;
use crate::{DataError, LatentDataset, RowBlock, RowGroup, RowRun, RowShapes};

/// Row groups that are fetched at the same time for one read.
const ROW_GROUPS_AT_ONCE: usize = 8;
/// Rows that the parquet reader hands over at a time.
const BATCH_ROWS: usize = 1024;

/// Which columns a read wants.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Want {
    /// Latents and labels.
    All,
    /// Names as well.
    WithIds,
    /// All but latents.
    Rest,
}

/// The wanted parts of each row group, and the data set row of each place.
type Wanted = (BTreeMap<usize, Vec<Piece>>, Vec<u64>);

/// A part of a row group that a read wants, and where it goes.
struct Piece {
    first_in_group: u64,
    rows: u64,
    to: usize,
}

impl LatentDataset {
    /// Reads rows, in the order of `runs`, which must not overlap.
    ///
    /// # Errors
    /// If a row does not exist, cannot be read, is null or has the wrong length, or its label is no class.
    pub fn read(&self, runs: &[RowRun]) -> Result<RowBlock, DataError> {
        let block = self.io.block_on(self.read_runs(runs, Want::All))?;
        self.check_labels(&block, None)?;
        Ok(block)
    }

    /// Reads one row group with the ids (if the column is there) and without checking the label's range.
    pub(crate) fn read_row_group(&self, group: &RowGroup) -> Result<RowBlock, DataError> {
        let with_ids = self.files[group.file].metadata.schema().column_with_name(&self.columns().id).is_some();
        let want = if with_ids { Want::WithIds } else { Want::All };
        self.io.block_on(self.read_runs(&[RowRun { first_row: group.first_row, rows: group.rows }], want))
    }

    /// The first row of the data set: its latents and their shape, its captions.
    pub(crate) fn first_row(&self, latents: bool, captions: bool) -> Result<RecordBatch, DataError> {
        // `open_at` has seen that there is a row.
        let at = self.group_of(0);
        let of_captions = self.files[self.row_groups()[at].file].captions.iter().map(|(name, _)| name.as_str());
        let of_latents = self.latent_names(at).chain([self.columns().shape.as_str()]).filter(|_| latents);
        let names = of_latents.chain(of_captions.filter(|_| captions));
        let batches = self.io.block_on(self.fetch(at, &[Piece { first_in_group: 0, rows: 1, to: 0 }], names))?;
        batches.into_iter().next().ok_or_else(|| DataError::NoData {
            url: self.name().to_owned(),
            what: "the parquet files have no row".into(),
        })
    }

    /// One column of a whole row group, in batches.
    pub(crate) async fn fetch_group(&self, at: usize, column: &str) -> Result<Vec<ArrayRef>, DataError> {
        let group = self.row_groups()[at];
        if group.rows == 0 {
            return Ok(Vec::new());
        }
        let all = Piece { first_in_group: 0, rows: group.rows, to: 0 };
        let batches = self.fetch(at, &[all], [column].into_iter()).await?;
        batches.iter().map(|batch| self.column(at, batch, column).cloned()).collect()
    }

    /// The latent columns of a row group's file.
    fn latent_names(&self, at: usize) -> impl Iterator<Item = &str> {
        self.files[self.row_groups()[at].file].latents.iter().map(|(name, _)| name.as_str())
    }

    pub(crate) fn column<'a>(&self, at: usize, batch: &'a RecordBatch, name: &str) -> Result<&'a ArrayRef, DataError> {
        let group = &self.row_groups()[at];
        batch.column_by_name(name).ok_or_else(|| DataError::RowGroup {
            file: self.files[group.file].file.name.clone(),
            row_group: group.index_in_file,
            reason: format!("column `{name}` did not come out"),
        })
    }

    /// Reads rows; of each row group only the pages that hold them, where the file has an offset index.
    pub(crate) async fn read_runs(&self, runs: &[RowRun], want: Want) -> Result<RowBlock, DataError> {
        let (mut wanted, rows) = self.pieces(runs)?;
        let shapes = self.load_shapes().await?;
        let latents = if want == Want::Rest { &self.stored[..0] } else { &self.stored[..] };
        let mut block = RowBlock::zeros(latents, shapes, rows, self.meta().labels, want == Want::WithIds);
        if want == Want::Rest {
            let groups: Vec<usize> = wanted.keys().copied().collect();
            for at in groups {
                let Some(labels) = self.group_labels(at).await else { continue };
                for piece in wanted.remove(&at).into_iter().flatten() {
                    let of_piece = &labels[piece.first_in_group as usize..][..piece.rows as usize];
                    block.labels[piece.to..][..of_piece.len()].copy_from_slice(of_piece);
                }
            }
        }
        let mut fetched = futures::stream::iter(&wanted)
            .map(|(&at, pieces)| async move {
                let (latents, ids) = (want != Want::Rest, want == Want::WithIds);
                let names = self
                    .latent_names(at)
                    .filter(|_| latents)
                    .chain([self.columns().label.as_str()])
                    .chain(ids.then_some(self.columns().id.as_str()));
                (at, pieces, self.fetch(at, pieces, names).await)
            })
            .buffer_unordered(ROW_GROUPS_AT_ONCE);
        while let Some((at, pieces, batches)) = fetched.next().await {
            self.place_rows(at, pieces, &batches?, shapes, &mut block)?;
        }
        Ok(block)
    }

    /// Which row groups hold the rows of `runs`, and which rows these are.
    fn pieces(&self, runs: &[RowRun]) -> Result<Wanted, DataError> {
        let mut wanted: BTreeMap<usize, Vec<Piece>> = BTreeMap::new();
        let mut rows = Vec::new();
        for run in runs {
            if run.first_row.checked_add(run.rows).is_none_or(|end| end > self.meta().rows) {
                let reason = format!(
                    "rows {} to {} were asked for; there are {}",
                    run.first_row,
                    run.first_row.saturating_add(run.rows),
                    self.meta().rows
                );
                return Err(DataError::Request { url: self.name().to_owned(), reason });
            }
            let (mut next, end) = (run.first_row, run.first_row + run.rows);
            while next < end {
                let at = self.group_of(next);
                let group = &self.row_groups()[at];
                let until = end.min(group.first_row + group.rows);
                wanted.entry(at).or_default().push(Piece {
                    first_in_group: next - group.first_row,
                    rows: until - next,
                    to: rows.len(),
                });
                rows.extend(next..until);
                next = until;
            }
        }
        for (at, pieces) in &mut wanted {
            pieces.sort_by_key(|piece| piece.first_in_group);
            if let Some(pair) =
                pieces.windows(2).find(|pair| pair[0].first_in_group + pair[0].rows > pair[1].first_in_group)
            {
                let reason = format!(
                    "row {} was asked for twice in one read",
                    self.row_groups()[*at].first_row + pair[1].first_in_group
                );
                return Err(DataError::Request { url: self.name().to_owned(), reason });
            }
        }
        Ok((wanted, rows))
    }

    /// Fetches columns of the rows of `runs` and hands over batch by batch: the number of the row group, the batch, and for each of
    /// its rows the place in `runs` and the data set row.
    pub(crate) async fn each_batch(
        &self,
        runs: &[RowRun],
        names: &[&str],
        mut take: impl FnMut(usize, &RecordBatch, &[(usize, u64)]) -> Result<(), DataError>,
    ) -> Result<(), DataError> {
        let (wanted, rows) = self.pieces(runs)?;
        let mut fetched = futures::stream::iter(&wanted)
            .map(|(&at, pieces)| async move { (at, pieces, self.fetch(at, pieces, names.iter().copied()).await) })
            .buffer_unordered(ROW_GROUPS_AT_ONCE);
        while let Some((at, pieces, batches)) = fetched.next().await {
            let mut first = 0;
            for batch in batches? {
                let targets = targets(pieces, first..first + batch.num_rows());
                let places = targets.iter().flat_map(|(rows, to)| *to..to + rows.len());
                let places: Vec<(usize, u64)> = places.map(|place| (place, rows[place])).collect();
                take(at, &batch, &places)?;
                first += batch.num_rows();
            }
        }
        Ok(())
    }

    /// Fetches and decodes pieces of one row group: those of the named columns that there are. A panic of the parquet library, which
    /// some damaged pages lead to, is an error.
    async fn fetch(
        &self,
        at: usize,
        pieces: &[Piece],
        names: impl Iterator<Item = &str>,
    ) -> Result<Vec<RecordBatch>, DataError> {
        let fetched = AssertUnwindSafe(self.decode(at, pieces, names)).catch_unwind().await;
        let file = &self.files[self.row_groups()[at].file].file.name;
        fetched.unwrap_or_else(|payload| Err(DataError::panicked(file, &*payload)))
    }

    async fn decode(
        &self,
        at: usize,
        pieces: &[Piece],
        names: impl Iterator<Item = &str>,
    ) -> Result<Vec<RecordBatch>, DataError> {
        let group = &self.row_groups()[at];
        let footer = &self.files[group.file];
        let roots: Vec<usize> = names.filter_map(|name| footer.metadata.schema().index_of(name).ok()).collect();
        let selection = RowSelection::from_consecutive_ranges(
            pieces.iter().map(|piece| piece.first_in_group as usize..(piece.first_in_group + piece.rows) as usize),
            group.rows as usize,
        );
        let rows: u64 = pieces.iter().map(|piece| piece.rows).sum();
        let builder = ParquetRecordBatchStreamBuilder::new_with_metadata(
            BoundedReader(ObjectReader(footer.file.clone())),
            footer.metadata.clone(),
        );
        let projection = ProjectionMask::roots(builder.parquet_schema(), roots);
        let stream = builder
            .with_projection(projection)
            .with_row_groups(vec![group.index_in_file])
            .with_row_selection(selection)
            .with_batch_size(BATCH_ROWS.min(rows as usize))
            .build();
        let failed = |reason: String| DataError::RowGroup {
            file: footer.file.name.clone(),
            row_group: group.index_in_file,
            reason,
        };
        let batches: Vec<RecordBatch> = match stream {
            Ok(stream) => {
                stream.try_collect().await.map_err(|error| out_of_parquet(error, &footer.file.name, failed))?
            }
            Err(error) => return Err(out_of_parquet(error, &footer.file.name, failed)),
        };
        let found: usize = batches.iter().map(RecordBatch::num_rows).sum();
        if found as u64 != rows {
            return Err(failed(format!("{found} rows came out; expected {rows}")));
        }
        Ok(batches)
    }

    /// Checks decoded batches and copies their rows to where the pieces want them.
    fn place_rows(
        &self,
        at: usize,
        pieces: &[Piece],
        batches: &[RecordBatch],
        shapes: &Arc<RowShapes>,
        block: &mut RowBlock,
    ) -> Result<(), DataError> {
        let mut first = 0;
        for batch in batches {
            let targets = targets(pieces, first..first + batch.num_rows());
            let bad = |column: &str, bad: BadRow| {
                let to = targets
                    .iter()
                    .find(|(rows, _)| rows.contains(&bad.row))
                    .map_or(0, |(rows, to)| to + bad.row - rows.start);
                self.row_error(block.rows[to], column, bad.found, bad.expected)
            };
            let column = |name: &str| self.column(at, batch, name);
            // The rows of pieces come out one after the other, so the targets are in the batch's order.
            let rows: Vec<u64> =
                targets.iter().flat_map(|(rows, to)| &block.rows[*to..to + rows.len()]).copied().collect();
            // Where each row's numbers begin in the batch.
            let from = Extents::of(shapes, &rows);
            let mut flats = Vec::with_capacity(self.stored.len());
            for stored in &self.stored[..block.latents.len()] {
                let dims = match shapes.same() {
                    Some(shape) => Dims::Same(stored.dims_of(shape)),
                    None => Dims::Each(rows.iter().map(|row| stored.dims_of(shapes.of(*row))).collect()),
                };
                flats.push(Flat::of(column(&stored.name)?, stored, &dims).map_err(|error| bad(&stored.name, error))?);
            }
            let labels = match self.files[self.row_groups()[at].file].label {
                Label::Absent => None,
                Label::Folder(label) => Some(vec![label; batch.num_rows()]),
                Label::Column => {
                    let name = &self.columns().label;
                    Some(decode::labels(column(name)?).map_err(|error| bad(name, error))?)
                }
            };
            let ids = if block.ids.is_empty() {
                None
            } else {
                Some(decode::ids(column(&self.columns().id)?).map_err(|error| bad(&self.columns().id, error))?)
            };
            for (rows, to) in &targets {
                let (first, end) = (from.offset(rows.start), from.offset(rows.end));
                for (flat, out) in flats.iter().zip(&mut block.latents) {
                    flat.copy(first, end - first, out, block.extents.offset(*to));
                }
                if let Some(labels) = &labels {
                    block.labels[*to..to + rows.len()].copy_from_slice(&labels[rows.clone()]);
                }
                if let Some(ids) = &ids {
                    block.ids[*to..to + rows.len()].clone_from_slice(&ids[rows.clone()]);
                }
            }
            first += batch.num_rows();
        }
        Ok(())
    }
}

/// Where the rows of a batch go: rows of the batch, and the place of the first of them in the block. `selected` counts the
/// batch's rows among all rows of the pieces.
fn targets(pieces: &[Piece], selected: Range<usize>) -> Vec<(Range<usize>, usize)> {
    let mut targets = Vec::new();
    let mut piece_start = 0;
    for piece in pieces {
        let piece_end = piece_start + piece.rows as usize;
        let (start, end) = (piece_start.max(selected.start), piece_end.min(selected.end));
        if start < end {
            targets.push((start - selected.start..end - selected.start, piece.to + (start - piece_start)));
        }
        piece_start = piece_end;
    }
    targets
}

/// The thread that fetches, behind the blocking calls.
pub(crate) struct Io(Option<Runtime>);

impl Io {
    pub fn new(name: &str) -> Result<Self, DataError> {
        let runtime = tokio::runtime::Builder::new_multi_thread()
            .worker_threads(1)
            .thread_name("latents-io")
            .enable_all()
            .build();
        match runtime {
            Ok(runtime) => Ok(Self(Some(runtime))),
            Err(error) => Err(DataError::Request {
                url: name.into(),
                reason: format!("the I/O thread cannot be started: {error}"),
            }),
        }
    }

    pub fn block_on<F: Future>(&self, future: F) -> F::Output {
        match &self.0 {
            Some(runtime) => runtime.block_on(future),
            None => unreachable!("the runtime is taken only in drop"),
        }
    }
}

impl Drop for Io {
    /// Does not wait for a request that hangs.
    fn drop(&mut self) {
        if let Some(runtime) = self.0.take() {
            runtime.shutdown_background();
        }
    }
}
