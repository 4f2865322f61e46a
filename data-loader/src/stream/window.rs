//! Shuffle windows: which rows they have, and what of them is in memory.

use std::ops::Range;
use std::sync::{Arc, Mutex, OnceLock, PoisonError};

use tokio::sync::watch;

use super::Context;
use crate::damage::Used;
use crate::order::WindowRows;
use crate::read::Want;
use crate::{BrokenGroup, CaptionBlock, DataError, LatentDataset, RowBlock, RowOrder, RowRun};

/// What is left to read of a lane's shuffle window.
pub(super) struct Window {
    part: usize,
    /// The data set.
    pub source: usize,
    epoch: u64,
    /// Positions in the lane's walk.
    pub positions: Range<u64>,
    /// The data set row of each position, as the order says.
    pub rows: Arc<Vec<u64>>,
    loaded: OnceLock<Loaded>,
    loading: Mutex<()>,
}

/// The rows of a window, in memory.
pub(super) struct Loaded {
    blocks: Vec<RowBlock>,
    /// Of the same rows; none where captions are not asked for.
    captions: Vec<CaptionBlock>,
    /// The block and its row, of each position.
    places: Vec<(u32, u32)>,
    /// The rows that are read: some in place of those of broken row groups.
    rows: Arc<Vec<u64>>,
    /// Positions of rows that stand in for others, ascending, each with a broken row group because of which.
    replaced: Vec<(u32, Arc<BrokenGroup>)>,
    /// Latents are not in the blocks: they are read directly.
    pub direct: bool,
}

impl Loaded {
    /// The block that position number `at` of the window is in, and its row in it.
    pub fn place(&self, at: u32) -> (&RowBlock, usize) {
        let (block, row) = self.places[at as usize];
        (&self.blocks[block as usize], row as usize)
    }

    /// The captions that position number `at` of the window has, and its row in them.
    pub fn captions(&self, at: u32) -> Option<(&CaptionBlock, usize)> {
        let (block, row) = self.places[at as usize];
        Some((self.captions.get(block as usize)?, row as usize))
    }

    /// The data set row of a position.
    pub fn row(&self, at: u32) -> u64 {
        self.rows[at as usize]
    }

    /// The broken row groups because of which another row is at a position.
    pub fn broken(&self, at: u32) -> impl Iterator<Item = &Arc<BrokenGroup>> {
        let first = self.replaced.partition_point(|(of, _)| *of < at);
        self.replaced[first..].iter().take_while(move |(of, _)| *of == at).map(|(_, broken)| broken)
    }
}

impl Window {
    /// Of a part of the order.
    pub fn new(order: &RowOrder, part: usize, WindowRows { epoch, positions, rows }: WindowRows) -> Self {
        let (source, rows) = (order.part(part).source, Arc::new(rows));
        Self { part, source, epoch, positions, rows, loaded: OnceLock::new(), loading: Mutex::new(()) }
    }

    /// What is in memory, once [`Window::load`] has been here.
    pub fn loaded(&self) -> &Loaded {
        self.loaded.get().unwrap_or_else(|| unreachable!("a job's windows are loaded first"))
    }

    /// Brings the window into memory, if no other thread has; `None` if the consumer has gone meanwhile.
    ///
    /// # Errors
    /// What reading reports; labels that are no class.
    pub fn load(&self, context: &Context, stopped: &watch::Receiver<bool>) -> Result<Option<()>, DataError> {
        let _alone = self.loading.lock().unwrap_or_else(PoisonError::into_inner);
        if self.loaded.get().is_some() {
            return Ok(Some(()));
        }
        let dataset = &*context.sources[self.source].dataset;
        let Some((rows, replaced)) = self.settle(context, stopped)? else { return Ok(None) };
        let mut order: Vec<u32> = (0..rows.len() as u32).collect();
        order.sort_unstable_by_key(|at| rows[*at as usize]);
        let threads = context.options.threads.max(1);
        let part_rows = rows.len().div_ceil((threads / context.lanes.len()).max(1));
        let mut places = vec![(0, 0); rows.len()];
        let runs =
            order.chunks(part_rows).enumerate().map(|(block, order)| runs(&rows, block as u32, order, &mut places));
        let runs: Vec<Vec<RowRun>> = runs.collect();
        runs.iter().for_each(|runs| dataset.advise(runs));
        let mapped = runs.iter().map(|runs| dataset.map_rows(runs)).collect::<Result<Vec<bool>, _>>()?;
        let direct = mapped.into_iter().all(|mapped| mapped);
        let want = if direct { Want::Rest } else { Want::All };
        let Some(blocks) = read(dataset, &runs, want, stopped)? else { return Ok(None) };
        for block in &blocks {
            dataset.check_labels(block, context.options.num_classes)?;
        }
        let mut captions = Vec::new();
        if let Some(options) = &context.options.captions {
            for runs in &runs {
                let Some(read) = wait_for(dataset, stopped, dataset.caption_runs(runs)) else { return Ok(None) };
                let read = read?;
                dataset.check_weights(&read, runs, &options.weights)?;
                captions.push(read);
            }
        }
        let _ = self.loaded.set(Loaded { blocks, captions, places, rows, replaced, direct });
        Ok(Some(()))
    }

    /// The rows to read, with other ones for those of broken row groups where that is wanted; `None` if the consumer has gone.
    #[allow(clippy::type_complexity)]
    fn settle(
        &self,
        context: &Context,
        stopped: &watch::Receiver<bool>,
    ) -> Result<Option<(Arc<Vec<u64>>, Vec<(u32, Arc<BrokenGroup>)>)>, DataError> {
        let Some(damage) = &context.damage else { return Ok(Some((self.rows.clone(), Vec::new()))) };
        let (dataset, part) = (&*context.sources[self.source].dataset, context.order.part(self.part));
        let used = Used { num_classes: context.options.num_classes, captions: context.options.captions.is_some() };
        let (positions, rows) = (self.positions.clone(), self.rows.to_vec());
        let mut wanted = WindowRows { epoch: self.epoch, positions, rows };
        let settled = damage.settle(dataset, self.part, part, used, &mut wanted);
        let replaced = wait_for(dataset, stopped, settled).transpose()?;
        Ok(replaced.map(|replaced| (Arc::new(wanted.rows), replaced)))
    }
}

/// The rows at positions `order`, which are in ascending order of rows, as runs; says where each position's row is in the block
/// that is read from them.
fn runs(rows: &[u64], block: u32, order: &[u32], places: &mut [(u32, u32)]) -> Vec<RowRun> {
    let (mut runs, mut count): (Vec<RowRun>, u32) = (Vec::new(), 0);
    for &at in order {
        let row = rows[at as usize];
        match runs.last_mut() {
            // A row that comes twice.
            Some(run) if run.first_row + run.rows == row + 1 => count -= 1,
            Some(run) if run.first_row + run.rows == row => run.rows += 1,
            _ => runs.push(RowRun { first_row: row, rows: 1 }),
        }
        places[at as usize] = (block, count);
        count += 1;
    }
    runs
}

/// What a data set's I/O thread makes of a future; `None` if the consumer has gone meanwhile.
fn wait_for<T>(dataset: &LatentDataset, stopped: &watch::Receiver<bool>, future: impl Future<Output = T>) -> Option<T> {
    let mut stopped = stopped.clone();
    dataset.io.block_on(async {
        tokio::select! {
            output = future => Some(output),
            // Also when the sender is gone.
            _ = stopped.wait_for(|stop| *stop) => None,
        }
    })
}

/// Reads parts of a window side by side; `None` if the consumer has gone meanwhile.
fn read(
    dataset: &LatentDataset,
    parts: &[Vec<RowRun>],
    want: Want,
    stopped: &watch::Receiver<bool>,
) -> Result<Option<Vec<RowBlock>>, DataError> {
    let read_part = |runs: &[RowRun]| wait_for(dataset, stopped, dataset.read_runs(runs, want)).transpose();
    let [first, others @ ..] = parts else { return Ok(Some(Vec::new())) };
    std::thread::scope(|scope| {
        let others: Vec<_> = others.iter().map(|runs| scope.spawn(|| read_part(runs))).collect();
        let first = read_part(first);
        let others = others
            .into_iter()
            .map(|thread| thread.join().unwrap_or_else(|payload| Err(DataError::panicked(dataset.name(), &*payload))));
        std::iter::once(first).chain(others).collect()
    })
}
