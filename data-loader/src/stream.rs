//! Micro-batches in the order in which a rank computes them, read ahead on a background thread.
//!
//! Memory: at most `prefetch_bytes` of finished micro-batches (one is always allowed), plus, for each lane of the rank, one
//! shuffle window of latents as stored of every data set or shape (two while a micro-batch straddles them).

use std::any::Any;
use std::collections::VecDeque;
use std::ops::Range;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};
use std::thread::JoinHandle;

use rand::Rng;
use tokio::sync::watch;

use crate::RowBlock;
use crate::draws::{Key, Purpose, fill_normal};
use crate::fixed::add_posterior_noise;
use crate::order::{Memo, Pick};
use crate::{BrokenGroup, Damage, DataError, Dtype, Flip, LatentDataset, RowOrder, RowRun};

mod buffers;

pub use buffers::{HostAllocator, HostMemory, Latents, PlainMemory};

/// One data set that a stream reads from.
#[derive(Clone, Debug)]
pub struct StreamSource {
    /// The rows.
    pub dataset: Arc<LatentDataset>,
    /// What latents are multiplied by; see [`LatentDataset::scaling_factor`].
    pub scaling_factor: f64,
}

/// How latents become `x_start`, and how far to read ahead.
#[derive(Clone, Copy)]
pub struct StreamOptions {
    /// Most bytes of finished micro-batches that wait to be taken; one may always wait.
    pub prefetch_bytes: usize,
    /// Take the mirrored latent with probability 0.5.
    pub flip: Flip,
    /// Labels must lie in `0..num_classes`; `None` takes the metadata's number.
    pub num_classes: Option<usize>,
    /// Where the memory of micro-batches comes from; [`PlainMemory`] unless a device wants page-locked memory.
    pub allocator: &'static dyn HostAllocator,
}

/// What one lane reads at one step.
#[derive(Debug)]
pub struct MicroBatch {
    /// The step.
    pub step: u64,
    /// The lane.
    pub lane: usize,
    /// Latents `[micro_batch, latent_shape…]`: flip and posterior sample drawn.
    pub x_start: Latents,
    /// The shape of each latent.
    pub latent_shape: Vec<usize>,
    /// Classes `[micro_batch]`; none where the data set has none.
    pub labels: Vec<i64>,
    /// Data set row numbers `[micro_batch]`.
    pub rows: Vec<u64>,
    /// The numbers of the sources of the rows `[micro_batch]`.
    pub sources: Vec<u32>,
    /// The broken row groups whose rows would be here, had they not been replaced.
    pub broken: Vec<Arc<BrokenGroup>>,
}

impl MicroBatch {
    /// A micro-batch that comes from no data set: latents `[labels.len(), …]` that are used as they are.
    pub fn of(step: u64, lane: usize, x_start: &[f32], labels: Vec<i64>) -> Self {
        let (rows, sources) = (vec![0; labels.len()], vec![0; labels.len()]);
        let latent_shape = vec![x_start.len() / labels.len().max(1)];
        Self { step, lane, x_start: x_start.into(), latent_shape, labels, rows, sources, broken: Vec::new() }
    }
}

/// The micro-batches of a rank's lanes, in order of (step, lane).
///
/// Dropping it stops and joins the thread, also in the middle of a request.
#[derive(Debug)]
pub struct MicroBatchStream {
    shared: Arc<Shared>,
    stop: watch::Sender<bool>,
    thread: Option<JoinHandle<()>>,
    end_step: u64,
}

#[derive(Debug, Default)]
struct Shared {
    state: Mutex<State>,
    changed: Condvar,
}

#[derive(Debug, Default)]
struct State {
    ready: VecDeque<Result<MicroBatch, DataError>>,
    ready_bytes: usize,
    /// Given back; never more than were in use at the same time.
    spare: Vec<MicroBatch>,
    /// The consumer has gone.
    stopped: bool,
    /// The producer has gone.
    ended: bool,
    /// `next` has handed out an error.
    failed: bool,
}

impl Shared {
    /// The state is plain data that is valid between statements, so a poisoned lock is still good.
    fn lock(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl MicroBatchStream {
    /// As [`MicroBatchStream::start_skipping`], where damage is an error.
    ///
    /// # Errors
    /// As there.
    pub fn start(
        sources: Vec<StreamSource>,
        order: impl Into<RowOrder>,
        lanes: Range<usize>,
        first_step: u64,
        end_step: u64,
        options: StreamOptions,
    ) -> Result<Self, DataError> {
        Self::start_skipping(sources, order, lanes, first_step..end_step, options, None)
    }

    /// Starts to read the micro-batches of `lanes` for `steps`, with other rows for those of broken row groups where `damage` says
    /// how. Nothing that earlier steps read is read.
    ///
    /// # Errors
    /// If the order is of other data sets, the sources do not go together, a lane does not exist, or flips are asked for
    /// and not stored.
    pub fn start_skipping(
        sources: Vec<StreamSource>,
        order: impl Into<RowOrder>,
        lanes: Range<usize>,
        steps: Range<u64>,
        options: StreamOptions,
        damage: Option<Arc<Damage>>,
    ) -> Result<Self, DataError> {
        let (order, end_step) = (order.into(), steps.end);
        check(&sources, &order, &lanes, &options)?;
        let shared = Arc::new(Shared::default());
        let (stop, stopped) = watch::channel(false);
        let names: Vec<&str> = sources.iter().map(|source| source.dataset.name()).collect();
        let name = names.join(", ");
        let windows = || (0..order.parts()).map(|_| VecDeque::new()).collect();
        let readers = lanes.map(|lane| LaneReader { lane, windows: windows() }).collect();
        let producer = Producer {
            sources,
            order,
            readers,
            options,
            damage,
            shared: shared.clone(),
            stopped,
            memo: Memo::default(),
            picks: Vec::new(),
            noise: Vec::new(),
            logvar: Vec::new(),
        };
        let thread = std::thread::Builder::new().name("latents-reader".into()).spawn({
            let (shared, name) = (shared.clone(), name.clone());
            move || {
                let outcome = catch_unwind(AssertUnwindSafe(move || producer.run(steps)));
                finish(&shared, outcome, &name);
            }
        });
        match thread {
            Ok(thread) => Ok(Self { shared, stop, thread: Some(thread), end_step }),
            Err(error) => {
                Err(DataError::Request { url: name, reason: format!("the reader thread cannot be started: {error}") })
            }
        }
    }

    /// The next micro-batch; waits for it if need be.
    ///
    /// # Errors
    /// What went wrong in reading, once; after that [`DataError::Stopped`]. [`DataError::EndOfStream`] after the last one.
    // Not an Iterator: an endless run never sees the end, and an error must not look like one.
    #[allow(clippy::should_implement_trait)]
    pub fn next(&mut self) -> Result<MicroBatch, DataError> {
        let mut state = self.shared.lock();
        loop {
            match state.ready.pop_front() {
                Some(Ok(batch)) => {
                    state.ready_bytes -= bytes_of(&batch);
                    self.shared.changed.notify_all();
                    return Ok(batch);
                }
                Some(Err(error)) => {
                    state.failed = true;
                    return Err(error);
                }
                None if state.failed => return Err(DataError::Stopped),
                None if state.ended => {
                    return Err(DataError::EndOfStream { end_step: self.end_step });
                }
                None => state = self.shared.changed.wait(state).unwrap_or_else(PoisonError::into_inner),
            }
        }
    }

    /// Gives a used micro-batch's memory back for a later one.
    pub fn recycle(&mut self, batch: MicroBatch) {
        self.shared.lock().spare.push(batch);
    }
}

impl Drop for MicroBatchStream {
    fn drop(&mut self) {
        self.shared.lock().stopped = true;
        self.shared.changed.notify_all();
        self.stop.send_replace(true);
        if let Some(thread) = self.thread.take() {
            // The thread catches its own panics, and nobody is left to tell.
            let _ = thread.join();
        }
    }
}

fn finish(shared: &Shared, outcome: Result<Result<(), DataError>, Box<dyn Any + Send>>, name: &str) {
    let error = match outcome {
        Ok(Ok(())) => None,
        Ok(Err(error)) => Some(error),
        Err(payload) => Some(DataError::panicked(name, &*payload)),
    };
    let mut state = shared.lock();
    state.ready.extend(error.map(Err));
    state.ended = true;
    shared.changed.notify_all();
}

fn bytes_of(batch: &MicroBatch) -> usize {
    batch.x_start.bytes().len()
        + size_of_val(&batch.labels[..])
        + size_of_val(&batch.rows[..])
        + size_of_val(&batch.sources[..])
}

/// Refuses what cannot be streamed, before anything is read.
fn check(
    sources: &[StreamSource],
    order: &RowOrder,
    lanes: &Range<usize>,
    options: &StreamOptions,
) -> Result<(), DataError> {
    let Some(first) = sources.first().filter(|_| sources.len() == order.sources()) else {
        let reason = format!("{} data sets were given; the order is of {}", sources.len(), order.sources());
        return Err(DataError::Schedule(reason));
    };
    for (number, StreamSource { dataset, scaling_factor }) in sources.iter().enumerate() {
        let refuse = |reason: String| Err(DataError::Request { url: dataset.name().to_owned(), reason });
        let (found, expected) = (dataset.meta(), first.dataset.meta());
        let rows = order.source_rows(number);
        if rows != found.rows {
            return refuse(format!("the schedule deals {rows} rows; the data set has {}", found.rows));
        }
        if found.latent_shape != expected.latent_shape {
            return refuse(format!(
                "latents have shape {:?}, but those of {} have {:?}; data sets of one mix must agree",
                found.latent_shape,
                first.dataset.name(),
                expected.latent_shape
            ));
        }
        if found.labels != expected.labels {
            let has = |labels: bool| if labels { "have labels" } else { "have none" };
            return refuse(format!(
                "rows {}, but those of {} {}; data sets of one mix must agree",
                has(found.labels),
                first.dataset.name(),
                has(expected.labels)
            ));
        }
        if !order.has_buckets() {
            dataset.require_one_shape("a micro-batch")?;
        }
        if options.flip == Flip::Stored && !found.flipped {
            return refuse(
                "`data.flip` = true, but the files have no latents of the mirrored images; encode with mirrored copies, or set it to false, or to \"latent\" if the VAE allows it".into(),
            );
        }
        if !scaling_factor.is_finite() || *scaling_factor <= 0.0 {
            return refuse(format!("the scaling factor is {scaling_factor}; expected a positive number"));
        }
        if lanes.is_empty() || lanes.end > order.options().lanes {
            return refuse(format!("lanes {lanes:?} were asked for; there are {}", order.options().lanes));
        }
    }
    Ok(())
}

/// The background thread.
struct Producer {
    sources: Vec<StreamSource>,
    order: RowOrder,
    readers: Vec<LaneReader>,
    options: StreamOptions,
    damage: Option<Arc<Damage>>,
    shared: Arc<Shared>,
    stopped: watch::Receiver<bool>,
    memo: Memo,
    picks: Vec<Pick>,
    noise: Vec<f32>,
    logvar: Vec<f32>,
}

struct LaneReader {
    lane: usize,
    /// Of each part.
    windows: Vec<VecDeque<Window>>,
}

/// What is left to read of a lane's shuffle window of a part, in memory.
struct Window {
    /// Positions in the lane's walk.
    positions: Range<u64>,
    /// Position `positions.start + i` reads row `slots[i]` of the block.
    slots: Vec<u32>,
    block: RowBlock,
    /// Indices into `slots` of rows that stand in for those of broken row groups.
    replaced: Vec<(u32, Arc<BrokenGroup>)>,
}

impl Window {
    /// The row of the block at a position that the window has.
    fn slot(&self, position: u64) -> usize {
        self.slots[(position - self.positions.start) as usize] as usize
    }
}

impl Producer {
    fn run(mut self, steps: Range<u64>) -> Result<(), DataError> {
        for step in steps {
            for reader in 0..self.readers.len() {
                if !self.load(step, reader)? {
                    return Ok(());
                }
                let batch = self.assemble(step, reader)?;
                if !self.hand_over(batch) {
                    return Ok(());
                }
            }
        }
        Ok(())
    }

    /// Brings the windows that a lane needs at a step into memory; `false` if the consumer has gone meanwhile.
    fn load(&mut self, step: u64, reader: usize) -> Result<bool, DataError> {
        let LaneReader { lane, windows } = &mut self.readers[reader];
        self.order.picks(&mut self.memo, step, *lane, &mut self.picks);
        let mut first_of_part = vec![true; windows.len()];
        for &pick in &self.picks {
            let windows = &mut windows[pick.part];
            if std::mem::take(&mut first_of_part[pick.part]) {
                windows.retain(|window| window.positions.end > pick.position);
            }
            if windows.iter().any(|window| window.positions.contains(&pick.position)) {
                continue;
            }
            let mut wanted = self.order.window(&mut self.memo, *lane, pick);
            let part = self.order.part(pick.part);
            let (dataset, stopped) = (&self.sources[part.source].dataset, &mut self.stopped);
            let read = async {
                let replaced = match &self.damage {
                    Some(damage) => {
                        damage.settle(dataset, pick.part, part, self.options.num_classes, &mut wanted).await?
                    }
                    None => Vec::new(),
                };
                let (runs, slots) = gather(&wanted.rows);
                Ok::<_, DataError>((replaced, slots, dataset.read_runs(&runs, false).await?))
            };
            let read = dataset.io.block_on(async {
                tokio::select! {
                    read = read => Some(read),
                    // Also when the sender is gone.
                    _ = stopped.wait_for(|stop| *stop) => None,
                }
            });
            let Some(read) = read else { return Ok(false) };
            let (replaced, slots, block) = read?;
            dataset.check_labels(&block, self.options.num_classes)?;
            windows.push_back(Window { positions: wanted.positions, slots, block, replaced });
        }
        Ok(true)
    }

    /// The number type of a micro-batch, and what its numbers are still to be multiplied by: as stored where all sources
    /// have the same, else as the model takes them.
    fn stored_form(&self) -> Option<(Dtype, f32)> {
        let form = |source: &StreamSource| (source.dataset.meta().dtype, source.scaling_factor as f32);
        let first = form(&self.sources[0]);
        let plain = |source: &StreamSource| !source.dataset.meta().moments && form(source) == first;
        self.sources.iter().all(plain).then_some(first)
    }

    /// Memory for a micro-batch: one that was given back, or new.
    fn buffer(&self, step: u64, lane: usize, latent_shape: &[usize]) -> Result<MicroBatch, DataError> {
        let numel = self.order.options().micro_batch * latent_shape.iter().product::<usize>();
        let (dtype, scale) = self.stored_form().unwrap_or((Dtype::F32, 1.0));
        let spare = self.shared.lock().spare.pop();
        let (memory, mut batch) = match spare {
            Some(MicroBatch { x_start, labels, rows, sources, latent_shape, .. }) => {
                (x_start.reuse(dtype, numel, scale), (labels, rows, sources, latent_shape))
            }
            None => Default::default(),
        };
        let x_start = memory
            .map_or_else(|| Latents::allocate(self.options.allocator, dtype, numel, scale), Ok)
            .map_err(|reason| DataError::Request {
                url: self.sources[0].dataset.name().to_owned(),
                reason: format!("no memory for a micro-batch: {reason}"),
            })?;
        batch.0.clear();
        batch.1.clear();
        batch.2.clear();
        batch.3.clear();
        batch.3.extend_from_slice(latent_shape);
        let (labels, rows, sources, latent_shape) = batch;
        Ok(MicroBatch { step, lane, x_start, latent_shape, labels, rows, sources, broken: Vec::new() })
    }

    /// Makes a micro-batch of loaded rows: a pure function of the rows, the seed, the step and the lane.
    fn assemble(&mut self, step: u64, reader: usize) -> Result<MicroBatch, DataError> {
        let LaneReader { lane, windows } = &self.readers[reader];
        // `load` has brought the window of every row of this step.
        let window_of = |pick: &Pick| {
            let found = windows[pick.part].iter().find(|window| window.positions.contains(&pick.position));
            found.unwrap_or_else(|| unreachable!("window loaded"))
        };
        let first = window_of(&self.picks[0]);
        let shape = first.block.latent_shape(first.slot(self.picks[0].position));
        let mut batch = self.buffer(step, *lane, shape)?;
        let micro_batch = self.picks.len();
        let numel = batch.x_start.numel() / micro_batch;
        let width = shape.last().copied().unwrap_or(1);
        let key = |purpose| Key::new(self.order.options().seed, purpose, step).lane(*lane);
        let mut eps = std::mem::take(&mut self.noise);
        let mut logvar = std::mem::take(&mut self.logvar);
        if self.sources.iter().any(|source| source.dataset.meta().moments) {
            eps.resize(micro_batch * numel, 0.0);
            logvar.resize(numel, 0.0);
            fill_normal(key(Purpose::Posterior), &mut eps);
        }
        let mut flips = key(Purpose::Flip).rng();
        let as_stored = self.stored_form().is_some();
        let number_bytes = batch.x_start.dtype().bytes();
        for (i, pick) in self.picks.iter().enumerate() {
            let (window, number) = (window_of(pick), self.order.part(pick.part).source);
            let (at, block) = (window.slot(pick.position), &window.block);
            let StreamSource { dataset, scaling_factor } = &self.sources[number];
            let moments = dataset.meta().moments;
            let flipped = self.options.flip != Flip::Never && flips.next_u32() >> 31 == 1;
            let mirror = flipped && self.options.flip == Flip::Latent;
            let columns_per_image = if moments { 2 } else { 1 };
            let column = if flipped && !mirror { columns_per_image } else { 0 };
            match batch.x_start.f32_mut().filter(|_| !as_stored) {
                None => {
                    let bytes = &mut batch.x_start.bytes_mut()[i * numel * number_bytes..][..numel * number_bytes];
                    block.copy_stored(column, at, bytes);
                    if mirror {
                        mirror_bytes(bytes, width, number_bytes);
                    }
                }
                Some(x_start) => {
                    let x = &mut x_start[i * numel..][..numel];
                    block.latent(column, at, x);
                    if mirror {
                        x.chunks_mut(width).for_each(<[f32]>::reverse);
                    }
                    if moments {
                        block.latent(column + 1, at, &mut logvar);
                        if mirror {
                            logvar.chunks_mut(width).for_each(<[f32]>::reverse);
                        }
                        add_posterior_noise(x, &logvar, &eps[i * numel..]);
                    }
                    x.iter_mut().for_each(|x| *x *= *scaling_factor as f32);
                }
            }
            let of_row = |(of, _): &&(u32, _)| u64::from(*of) == pick.position - window.positions.start;
            for (_, broken) in window.replaced.iter().filter(of_row) {
                if !batch.broken.contains(broken) {
                    batch.broken.push(broken.clone());
                }
            }
            batch.labels.extend(block.labels().get(at));
            batch.rows.push(block.rows()[at]);
            batch.sources.push(number as u32);
        }
        (self.noise, self.logvar) = (eps, logvar);
        Ok(batch)
    }

    /// Queues a micro-batch once there is room; `false` if the consumer has gone.
    fn hand_over(&self, batch: MicroBatch) -> bool {
        let bytes = bytes_of(&batch);
        let mut state = self.shared.lock();
        while !state.stopped && !state.ready.is_empty() && state.ready_bytes + bytes > self.options.prefetch_bytes {
            state = self.shared.changed.wait(state).unwrap_or_else(PoisonError::into_inner);
        }
        if state.stopped {
            return false;
        }
        state.ready_bytes += bytes;
        state.ready.push_back(Ok(batch));
        self.shared.changed.notify_all();
        true
    }
}

/// The rows in ascending order, each once, as runs; and where each of `rows` lies among them.
fn gather(rows: &[u64]) -> (Vec<RowRun>, Vec<u32>) {
    let mut sorted = rows.to_vec();
    sorted.sort_unstable();
    sorted.dedup();
    let mut runs: Vec<RowRun> = Vec::new();
    for &row in &sorted {
        match runs.last_mut().filter(|run| run.first_row + run.rows == row) {
            Some(run) => run.rows += 1,
            None => runs.push(RowRun { first_row: row, rows: 1 }),
        }
    }
    // A window has at most u32::MAX rows.
    let slots = rows.iter().map(|row| sorted.partition_point(|other| other < row) as u32).collect();
    (runs, slots)
}

/// Mirrors lines of `width` numbers of `number_bytes` bytes.
fn mirror_bytes(bytes: &mut [u8], width: usize, number_bytes: usize) {
    for line in bytes.chunks_mut(width * number_bytes) {
        line.reverse();
        line.chunks_mut(number_bytes).for_each(<[u8]>::reverse);
    }
}

#[cfg(test)]
mod tests;
