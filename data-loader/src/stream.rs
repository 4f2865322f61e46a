//! Micro-batches in the order in which a rank computes them, read ahead on a background thread.
//!
//! Memory: at most `prefetch_bytes` of finished micro-batches (one is always allowed), plus, for each lane of the rank, one
//! shuffle window of latents as stored (two while a micro-batch straddles them).

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
use crate::schedule::EpochOrder;
use crate::{DataError, Dtype, LaneSchedule, LatentDataset};

mod buffers;

pub use buffers::{HostAllocator, HostMemory, Latents, PlainMemory};

/// How latents become `x_start`, and how far to read ahead.
#[derive(Clone, Copy)]
pub struct StreamOptions {
    /// Most bytes of finished micro-batches that wait to be taken; one may always wait.
    pub prefetch_bytes: usize,
    /// Take the stored mirrored latent with probability 0.5.
    pub flip: bool,
    /// What latents are multiplied by; see [`LatentDataset::scaling_factor`].
    pub scaling_factor: f64,
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
    /// Classes `[micro_batch]`.
    pub labels: Vec<i64>,
    /// Data set row numbers `[micro_batch]`.
    pub rows: Vec<u64>,
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
    /// Starts to read the micro-batches of `lanes` for steps `first_step .. end_step`. Nothing of earlier steps is read.
    ///
    /// # Errors
    /// If the schedule is of another data set, a lane does not exist, or flips are asked for and not stored.
    pub fn start(
        dataset: Arc<LatentDataset>,
        schedule: LaneSchedule,
        lanes: Range<usize>,
        first_step: u64,
        end_step: u64,
        options: StreamOptions,
    ) -> Result<Self, DataError> {
        let refuse = |reason: String| Err(DataError::Request { url: dataset.name().to_owned(), reason });
        if schedule.rows() != dataset.meta().rows {
            return refuse(format!(
                "the schedule deals {} rows; the data set has {}",
                schedule.rows(),
                dataset.meta().rows
            ));
        }
        if lanes.is_empty() || lanes.end > schedule.options().lanes {
            return refuse(format!("lanes {lanes:?} were asked for; there are {}", schedule.options().lanes));
        }
        dataset.require_one_shape("a micro-batch")?;
        if options.flip && !dataset.meta().flipped {
            return refuse("`data.flip` = true, but the files have no latents of the mirrored images; encode with mirrored copies, or set it to false".into());
        }
        if !options.scaling_factor.is_finite() || options.scaling_factor <= 0.0 {
            return refuse(format!("the scaling factor is {}; expected a positive number", options.scaling_factor));
        }
        let shared = Arc::new(Shared::default());
        let (stop, stopped) = watch::channel(false);
        let name = dataset.name().to_owned();
        let readers = lanes.map(|lane| LaneReader { lane, windows: VecDeque::new() }).collect();
        let producer = Producer {
            dataset,
            schedule,
            readers,
            options,
            shared: shared.clone(),
            stopped,
            epoch: None,
            noise: Vec::new(),
            logvar: Vec::new(),
        };
        let thread = std::thread::Builder::new().name("latents-reader".into()).spawn({
            let (shared, name) = (shared.clone(), name.clone());
            move || {
                let outcome = catch_unwind(AssertUnwindSafe(move || producer.run(first_step..end_step)));
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
    batch.x_start.bytes().len() + size_of_val(&batch.labels[..]) + size_of_val(&batch.rows[..])
}

/// The background thread.
struct Producer {
    dataset: Arc<LatentDataset>,
    schedule: LaneSchedule,
    readers: Vec<LaneReader>,
    options: StreamOptions,
    shared: Arc<Shared>,
    stopped: watch::Receiver<bool>,
    epoch: Option<EpochOrder>,
    noise: Vec<f32>,
    logvar: Vec<f32>,
}

struct LaneReader {
    lane: usize,
    windows: VecDeque<Window>,
}

/// A shuffle window of a lane, in memory.
struct Window {
    epoch: u64,
    /// Positions in the lane.
    positions: Range<u64>,
    /// Position `positions.start + i` reads row `order[i]` of the block.
    order: Vec<u32>,
    block: RowBlock,
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
        let epoch = self.schedule.epoch_of(step);
        let lane = self.readers[reader].lane;
        let positions = self.schedule.positions(step);
        let windows = &mut self.readers[reader].windows;
        windows.retain(|window| window.epoch == epoch && window.positions.end > positions.start);
        let mut next = windows.back().map_or(positions.start, |window| window.positions.end);
        while next < positions.end {
            if self.epoch.as_ref().is_none_or(|order| order.epoch() != epoch) {
                self.epoch = Some(self.schedule.epoch_order(epoch));
            }
            let Some(order) = &self.epoch else { unreachable!("set above") };
            let (number, window) = self.schedule.window_of(next);
            let runs = order.runs(self.schedule.virtual_rows(lane, &window));
            let (dataset, stopped) = (&self.dataset, &mut self.stopped);
            let block = dataset.io.block_on(async {
                tokio::select! {
                    block = dataset.read_runs(&runs, false) => Some(block),
                    // Also when the sender is gone.
                    _ = stopped.wait_for(|stop| *stop) => None,
                }
            });
            let Some(block) = block else { return Ok(false) };
            let block = block?;
            dataset.check_labels(&block, self.options.num_classes)?;
            let order = self.schedule.window_order(epoch, lane, number, window.end - window.start);
            next = window.end;
            self.readers[reader].windows.push_back(Window { epoch, positions: window, order, block });
        }
        Ok(true)
    }

    /// Memory for a micro-batch: one that was given back, or new.
    fn buffer(&self, step: u64, lane: usize) -> Result<MicroBatch, DataError> {
        let meta = self.dataset.meta();
        let numel = self.schedule.options().micro_batch * self.dataset.latent_numel();
        let scale = self.options.scaling_factor as f32;
        let (dtype, scale) = if meta.moments { (Dtype::F32, 1.0) } else { (meta.dtype, scale) };
        let (spare, mut labels, mut rows) = match self.shared.lock().spare.pop() {
            Some(MicroBatch { x_start, labels, rows, .. }) => (x_start.reuse(dtype, numel, scale), labels, rows),
            None => (None, Vec::new(), Vec::new()),
        };
        labels.clear();
        rows.clear();
        let x_start = spare
            .map_or_else(|| Latents::allocate(self.options.allocator, dtype, numel, scale), Ok)
            .map_err(|reason| DataError::Request {
                url: self.dataset.name().to_owned(),
                reason: format!("no memory for a micro-batch: {reason}"),
            })?;
        Ok(MicroBatch { step, lane, x_start, labels, rows })
    }

    /// Makes a micro-batch of loaded rows: a pure function of the rows, the seed, the step and the lane.
    fn assemble(&mut self, step: u64, reader: usize) -> Result<MicroBatch, DataError> {
        let LaneReader { lane, windows } = &self.readers[reader];
        let mut batch = self.buffer(step, *lane)?;
        let (numel, micro_batch, meta) =
            (self.dataset.latent_numel(), self.schedule.options().micro_batch, self.dataset.meta());
        let key = |purpose| Key::new(self.schedule.options().seed, purpose, step).lane(*lane);
        let scale = self.options.scaling_factor as f32;
        let mut eps = std::mem::take(&mut self.noise);
        let mut logvar = std::mem::take(&mut self.logvar);
        if meta.moments {
            eps.resize(micro_batch * numel, 0.0);
            logvar.resize(numel, 0.0);
            fill_normal(key(Purpose::Posterior), &mut eps);
        }
        let mut flips = key(Purpose::Flip).rng();
        let columns_per_image = if meta.moments { 2 } else { 1 };
        let row_bytes = numel * batch.x_start.dtype().bytes();
        for (i, position) in self.schedule.positions(step).enumerate() {
            // `load` has brought the window of every position of this step.
            let Some(window) = windows.iter().find(|window| window.positions.contains(&position)) else {
                unreachable!("window loaded")
            };
            let at = window.order[(position - window.positions.start) as usize] as usize;
            let flipped = self.options.flip && flips.next_u32() >> 31 == 1;
            let column = if flipped { columns_per_image } else { 0 };
            match batch.x_start.f32_mut().filter(|_| meta.moments) {
                None => {
                    window.block.copy_stored(column, at, &mut batch.x_start.bytes_mut()[i * row_bytes..][..row_bytes])
                }
                Some(x_start) => {
                    let x = &mut x_start[i * numel..][..numel];
                    window.block.latent(column, at, x);
                    window.block.latent(column + 1, at, &mut logvar);
                    add_posterior_noise(x, &logvar, &eps[i * numel..]);
                    x.iter_mut().for_each(|x| *x *= scale);
                }
            }
            batch.labels.push(window.block.labels()[at]);
            batch.rows.push(window.block.rows()[at]);
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

#[cfg(test)]
mod tests;
