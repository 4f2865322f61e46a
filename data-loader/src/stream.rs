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

use crate::decode::RowBlock;
use crate::draws::{Key, Purpose, fill_normal};
use crate::schedule::EpochOrder;
use crate::{DataError, LaneSchedule, LatentDataset};

/// Buffers that are kept for reuse.
const SPARE_BUFFERS: usize = 4;

/// How latents become `x_start`, and how far to read ahead.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct StreamOptions {
    /// Most bytes of finished micro-batches that wait to be taken; one may always wait.
    pub prefetch_bytes: usize,
    /// Take the stored mirrored latent with probability 0.5.
    pub flip: bool,
    /// What latents are multiplied by; see [`LatentDataset::scaling_factor`].
    pub scaling_factor: f64,
    /// Labels must lie in `0..num_classes`; `None` takes the metadata's number.
    pub num_classes: Option<usize>,
}

/// What one lane reads at one step.
#[derive(Clone, Debug, PartialEq)]
pub struct MicroBatch {
    /// The step.
    pub step: u64,
    /// The lane.
    pub lane: usize,
    /// Latents `[micro_batch, latent_shape…]`: flip and posterior sample drawn, scaled.
    pub x_start: Vec<f32>,
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
    spare: Vec<Vec<f32>>,
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
            return refuse(format!("the schedule deals {} rows; the data set has {}", schedule.rows(), dataset.meta().rows));
        }
        if lanes.is_empty() || lanes.end > schedule.options().lanes {
            return refuse(format!("lanes {lanes:?} were asked for; there are {}", schedule.options().lanes));
        }
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
        let producer = Producer { dataset, schedule, readers, options, shared: shared.clone(), stopped, epoch: None, noise: Vec::new() };
        let thread = std::thread::Builder::new().name("latents-reader".into()).spawn({
            let (shared, name) = (shared.clone(), name.clone());
            move || {
                let outcome = catch_unwind(AssertUnwindSafe(move || producer.run(first_step..end_step)));
                finish(&shared, outcome, &name);
            }
        });
        match thread {
            Ok(thread) => Ok(Self { shared, stop, thread: Some(thread), end_step }),
            Err(error) => Err(DataError::Request { url: name, reason: format!("the reader thread cannot be started: {error}") }),
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
                None if state.ended => return Err(DataError::EndOfStream { end_step: self.end_step }),
                None => state = self.shared.changed.wait(state).unwrap_or_else(PoisonError::into_inner),
            }
        }
    }

    /// Gives a used micro-batch's memory back for a later one.
    pub fn recycle(&mut self, batch: MicroBatch) {
        let mut state = self.shared.lock();
        if state.spare.len() < SPARE_BUFFERS {
            state.spare.push(batch.x_start);
        }
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
    size_of_val(&batch.x_start[..]) + size_of_val(&batch.labels[..]) + size_of_val(&batch.rows[..])
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
                let batch = self.assemble(step, reader);
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
            let block = dataset.io().block_on(async {
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

    /// Makes a micro-batch of loaded rows: a pure function of the rows, the seed, the step and the lane.
    fn assemble(&mut self, step: u64, reader: usize) -> MicroBatch {
        let LaneReader { lane, windows } = &self.readers[reader];
        let (numel, micro_batch, meta) = (self.dataset.latent_numel(), self.schedule.options().micro_batch, self.dataset.meta());
        let key = |purpose| Key::new(self.schedule.options().seed, purpose, step).lane(*lane);
        let scale = self.options.scaling_factor as f32;
        let mut x_start = self.shared.lock().spare.pop().unwrap_or_default();
        // A recycled buffer's numbers are all overwritten below.
        x_start.resize(micro_batch * numel, 0.0);
        let mut eps = std::mem::take(&mut self.noise);
        if meta.moments {
            eps.resize(micro_batch * numel, 0.0);
            fill_normal(key(Purpose::Posterior), &mut eps);
        }
        let mut flips = key(Purpose::Flip).rng();
        let mut logvar = vec![0f32; if meta.moments { numel } else { 0 }];
        let columns_per_image = if meta.moments { 2 } else { 1 };
        let (mut labels, mut rows) = (Vec::with_capacity(micro_batch), Vec::with_capacity(micro_batch));
        for (i, position) in self.schedule.positions(step).enumerate() {
            // `load` has brought the window of every position of this step.
            let Some(window) = windows.iter().find(|window| window.positions.contains(&position)) else { unreachable!("window loaded") };
            let at = window.order[(position - window.positions.start) as usize] as usize;
            let flipped = self.options.flip && flips.next_u32() >> 31 == 1;
            let column = if flipped { columns_per_image } else { 0 };
            let x = &mut x_start[i * numel..(i + 1) * numel];
            window.block.latent(column, at, x);
            if meta.moments {
                window.block.latent(column + 1, at, &mut logvar);
                for ((x, logvar), eps) in x.iter_mut().zip(&logvar).zip(&eps[i * numel..]) {
                    *x += (0.5 * logvar.clamp(-30.0, 20.0)).exp() * eps;
                }
            }
            x.iter_mut().for_each(|x| *x *= scale);
            labels.push(window.block.labels()[at]);
            rows.push(window.block.rows()[at]);
        }
        let lane = *lane;
        self.noise = eps;
        MicroBatch { step, lane, x_start, labels, rows }
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
mod tests {
    #![allow(clippy::unwrap_used)]
    use std::sync::atomic::Ordering;

    use super::*;
    use crate::testing::{FaultyStore, Mode, samples, write};
    use crate::{Columns, Dtype, RowRun, ScheduleOptions, WriterOptions};

    const OPTIONS: StreamOptions = StreamOptions { prefetch_bytes: 1 << 20, flip: true, scaling_factor: 1.25, num_classes: Some(10) };

    /// 150 rows in row groups of 40, four numbers each, with moments and mirrored moments.
    fn dataset(folder: &tempfile::TempDir) -> Arc<LatentDataset> {
        let options = WriterOptions { dtype: Dtype::F16, flipped: true, row_group_rows: 40, ..WriterOptions::new(vec![1, 2, 2]) };
        write(&folder.path().join("a.parquet"), options.clone(), &samples(150, &options));
        Arc::new(LatentDataset::open(folder.path().to_str().unwrap(), &Columns::default()).unwrap())
    }

    /// Windows of 10 rows, which micro-batches of 4 straddle; 9 steps an epoch.
    fn schedule(dataset: &LatentDataset) -> LaneSchedule {
        dataset.schedule(ScheduleOptions { seed: 5, lanes: 4, micro_batch: 4, range_rows: 16, shuffle_window_rows: 10 }).unwrap()
    }

    fn take(dataset: &Arc<LatentDataset>, lanes: Range<usize>, steps: Range<u64>, options: StreamOptions) -> Vec<MicroBatch> {
        let count = lanes.len() * (steps.end - steps.start) as usize;
        let mut stream = MicroBatchStream::start(dataset.clone(), schedule(dataset), lanes, steps.start, steps.end, options).unwrap();
        let batches = (0..count)
            .map(|_| {
                let batch = stream.next().unwrap();
                stream.recycle(batch.clone());
                batch
            })
            .collect();
        assert!(matches!(stream.next(), Err(DataError::EndOfStream { end_step }) if end_step == steps.end));
        batches
    }

    #[test]
    fn micro_batches_are_what_the_schedule_and_the_draws_say() {
        let folder = tempfile::tempdir().unwrap();
        let dataset = dataset(&folder);
        let schedule = schedule(&dataset);
        let batches = take(&dataset, 0..4, 0..30, OPTIONS);
        let mut flips_seen = [0; 2];
        for (index, batch) in batches.iter().enumerate() {
            assert_eq!((batch.step, batch.lane), (index as u64 / 4, index % 4));
            assert_eq!(batch.rows, schedule.rows_of(batch.step, batch.lane));
            let mut eps = [0f32; 16];
            fill_normal(Key::new(5, Purpose::Posterior, batch.step).lane(batch.lane), &mut eps);
            let mut flips = Key::new(5, Purpose::Flip, batch.step).lane(batch.lane).rng();
            for i in 0..4 {
                let row = dataset.read(&[RowRun { first_row: batch.rows[i], rows: 1 }]).unwrap();
                assert_eq!(batch.labels[i], row.labels()[0]);
                let flipped = flips.next_u32() >= 1 << 31;
                flips_seen[usize::from(flipped)] += 1;
                let (mut mean, mut logvar) = ([0f32; 4], [0f32; 4]);
                row.latent(if flipped { 2 } else { 0 }, 0, &mut mean);
                row.latent(if flipped { 3 } else { 1 }, 0, &mut logvar);
                for at in 0..4 {
                    let expected = (mean[at] + (0.5 * logvar[at].clamp(-30.0, 20.0)).exp() * eps[i * 4 + at]) * 1.25;
                    assert_eq!(batch.x_start[i * 4 + at].to_bits(), expected.to_bits(), "step {} lane {} row {i}", batch.step, batch.lane);
                }
            }
        }
        assert!(flips_seen.iter().all(|&seen| seen > 150), "{flips_seen:?} of 480");
    }

    #[test]
    fn a_lane_reads_the_same_on_any_rank_and_after_any_resume() {
        let folder = tempfile::tempdir().unwrap();
        let dataset = dataset(&folder);
        let whole = take(&dataset, 0..4, 0..25, OPTIONS);
        for (lanes, first_step) in [(0..1, 0), (2..4, 0), (0..4, 7), (1..2, 9), (3..4, 23)] {
            let expected: Vec<_> = whole.iter().filter(|batch| lanes.contains(&batch.lane) && batch.step >= first_step).cloned().collect();
            assert_eq!(take(&dataset, lanes.clone(), first_step..25, OPTIONS), expected, "lanes {lanes:?} from {first_step}");
        }
        let plain = take(&dataset, 0..4, 0..25, StreamOptions { flip: false, ..OPTIONS });
        assert!(plain.iter().zip(&whole).all(|(plain, flipped)| plain.rows == flipped.rows));
        assert_ne!(plain, whole);
    }

    #[test]
    fn the_queue_holds_no_more_bytes_than_allowed_but_always_one() {
        let folder = tempfile::tempdir().unwrap();
        let dataset = dataset(&folder);
        let one = 4 * 4 * 4 + 4 * 8 + 4 * 8;
        for (prefetch_bytes, most) in [(3 * one, 3), (0, 1)] {
            let options = StreamOptions { prefetch_bytes, ..OPTIONS };
            let mut stream = MicroBatchStream::start(dataset.clone(), schedule(&dataset), 0..4, 0, u64::MAX, options).unwrap();
            for _ in 0..200 {
                // Only the producer fills, so this ends once it has caught up.
                while stream.shared.lock().ready.len() < most {
                    std::thread::yield_now();
                }
                assert_eq!(stream.shared.lock().ready.len(), most);
                stream.next().unwrap();
            }
        }
    }

    #[test]
    fn a_label_that_is_no_class_comes_out_of_next_with_its_row_and_ends_the_stream() {
        let folder = tempfile::tempdir().unwrap();
        let dataset = dataset(&folder);
        let options = StreamOptions { num_classes: Some(9), ..OPTIONS };
        let mut stream = MicroBatchStream::start(dataset.clone(), schedule(&dataset), 0..4, 0, 9, options).unwrap();
        let error = std::iter::repeat_with(|| stream.next()).find_map(Result::err).unwrap().to_string();
        assert!(error.contains("a.parquet") && error.contains("`label` is 9") && error.contains("0..9"), "{error}");
        assert!(matches!(stream.next(), Err(DataError::Stopped)));
    }

    #[test]
    fn store_errors_and_panics_come_out_of_next() {
        for (mode, words) in [(Mode::Fail, "injected failure"), (Mode::Panic, "injected panic")] {
            let (store, dataset) = FaultyStore::dataset();
            store.mode.store(mode as u8, Ordering::SeqCst);
            let mut stream = MicroBatchStream::start(dataset.clone(), schedule(&dataset), 0..4, 0, 9, StreamOptions { flip: false, ..OPTIONS }).unwrap();
            let error = stream.next().unwrap_err().to_string();
            assert!(error.contains(words) && error.contains("set/a.parquet"), "{error}");
            assert!(matches!(stream.next(), Err(DataError::Stopped)));
        }
    }

    #[test]
    fn dropping_the_stream_does_not_wait_for_a_request_that_hangs() {
        let (store, dataset) = FaultyStore::dataset();
        store.mode.store(Mode::Hang as u8, Ordering::SeqCst);
        let stream = MicroBatchStream::start(dataset.clone(), schedule(&dataset), 0..4, 0, 9, StreamOptions { flip: false, ..OPTIONS }).unwrap();
        while store.hanging.load(Ordering::SeqCst) == 0 {
            std::thread::yield_now();
        }
        drop(stream);
        assert_eq!(Arc::strong_count(&dataset), 1, "the thread has gone and let go of the data set");
    }

    #[test]
    fn requests_that_cannot_be_met_are_refused_at_the_start() {
        let (_, plain) = FaultyStore::dataset();
        let start = |lanes, options| MicroBatchStream::start(plain.clone(), schedule(&plain), lanes, 0, 9, options).unwrap_err().to_string();
        assert!(start(0..4, OPTIONS).contains("data.flip"));
        let options = StreamOptions { flip: false, ..OPTIONS };
        assert!(start(3..5, options).contains("lanes 3..5"));
        assert!(start(0..4, StreamOptions { scaling_factor: f64::NAN, ..options }).contains("NaN"));
        let folder = tempfile::tempdir().unwrap();
        let other = LaneSchedule::new(*schedule(&plain).options(), &[64]).unwrap();
        let error = MicroBatchStream::start(dataset(&folder), other, 0..4, 0, 9, options).unwrap_err().to_string();
        assert!(error.contains("64 rows") && error.contains("150"), "{error}");
    }
}
