//! Micro-batches in the order in which a rank computes them, read ahead on background threads.
//!
//! Threads take *jobs* in turn: the micro-batches of one lane at a few consecutive steps, filled together so that rows that
//! are neighbours in a file are read in one request. What a job reads does not depend on who does it or when.
//!
//! # Memory
//! At most `prefetch_bytes` of micro-batches that are being filled or wait (one is always allowed), plus those that the
//! consumer holds; their buffers are used again and again. For each lane of the rank, and each data set or shape, one shuffle
//! window (two where a job straddles them): 28 bytes a row where latents are read directly from local files, else the window's latents as
//! stored. One micro-batch of scratch memory a thread where posteriors are sampled.

use std::ops::Range;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::sync::{Arc, Mutex, PoisonError};
use std::thread::JoinHandle;

use configs::spans::{Track::Data, span};
use tokio::sync::watch;

use crate::captions::check_options;
use crate::{BrokenGroup, CaptionBatch, CaptionOptions, Damage, DataError, Flip, LatentDataset, RowOrder};

mod buffers;
mod fill;
mod plan;
mod queue;
mod window;

pub use buffers::{HostAllocator, HostMemory, Latents, PlainMemory};
use fill::Filler;
use plan::Planner;
use queue::Queue;

/// One data set that a stream reads from.
#[derive(Clone, Debug)]
pub struct StreamSource {
    /// The rows.
    pub dataset: Arc<LatentDataset>,
    /// What latents are multiplied by; see [`LatentDataset::scaling_factor`].
    pub scaling_factor: f64,
}

/// How latents become `x_start`, and how far to read ahead.
#[derive(Clone)]
pub struct StreamOptions {
    /// Most bytes of micro-batches that are being filled or wait to be taken; one may always be there.
    pub prefetch_bytes: usize,
    /// Take the mirrored latent with probability 0.5.
    pub flip: Flip,
    /// Labels must lie in `0..num_classes`; `None` takes the metadata's number.
    pub num_classes: Option<usize>,
    /// Threads that read and decode, at least 1.
    pub threads: usize,
    /// What captions micro-batches bring; `None`: captions are not read.
    pub captions: Option<CaptionOptions>,
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
    /// A caption of each row, where [`StreamOptions::captions`] asks for them.
    pub captions: Option<CaptionBatch>,
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
        Self {
            step,
            lane,
            x_start: x_start.into(),
            latent_shape,
            labels,
            captions: None,
            rows,
            sources,
            broken: Vec::new(),
        }
    }
}

impl MicroBatch {
    fn bytes(&self) -> usize {
        let captions = self.captions.as_ref().map_or(0, |captions| caption_bytes(captions.tokens, captions.dim));
        self.x_start.bytes().len() + self.rows.len() * (ROW_BYTES + captions)
    }
}

/// Bytes of a row of a micro-batch beside its latent: label, row and source.
const ROW_BYTES: usize = size_of::<i64>() + size_of::<u64>() + size_of::<u32>();

/// Bytes of a padded caption and its mask.
fn caption_bytes(tokens: usize, dim: usize) -> usize {
    tokens * (dim * size_of::<f32>() + size_of::<bool>())
}

/// What all threads of a stream know.
struct Context {
    sources: Vec<StreamSource>,
    order: RowOrder,
    lanes: Vec<usize>,
    steps: Range<u64>,
    options: StreamOptions,
    damage: Option<Arc<Damage>>,
    queue: Queue,
}

/// The micro-batches of a rank's lanes, step by step, in the order in which the lanes were given.
///
/// Dropping it stops and joins the threads, also in the middle of a request.
pub struct MicroBatchStream {
    context: Arc<Context>,
    stop: watch::Sender<bool>,
    threads: Vec<JoinHandle<()>>,
}

impl MicroBatchStream {
    /// As [`MicroBatchStream::start_skipping`], where damage is an error.
    ///
    /// # Errors
    /// As there.
    pub fn start(
        sources: Vec<StreamSource>,
        order: impl Into<RowOrder>,
        lanes: impl IntoIterator<Item = usize>,
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
        lanes: impl IntoIterator<Item = usize>,
        steps: Range<u64>,
        options: StreamOptions,
        damage: Option<Arc<Damage>>,
    ) -> Result<Self, DataError> {
        let order = order.into();
        let lanes: Vec<usize> = lanes.into_iter().collect();
        check(&sources, &order, &lanes, &options)?;
        let names: Vec<&str> = sources.iter().map(|source| source.dataset.name()).collect();
        let name = names.join(", ");
        let (stop, stopped) = watch::channel(false);
        let threads = options.threads.max(1);
        let queue = Queue::new(options.prefetch_bytes, threads);
        let context = Arc::new(Context { sources, order, lanes, steps, options, damage, queue });
        let planner = Arc::new(Mutex::new(Planner::new(context.clone())));
        let mut stream = Self { context, stop, threads: Vec::with_capacity(threads) };
        for _ in 0..threads {
            let (context, planner, stopped) = (stream.context.clone(), planner.clone(), stopped.clone());
            let at = name.clone();
            let work = move || {
                let outcome = catch_unwind(AssertUnwindSafe(|| work(&context, &planner, stopped)));
                drop(planner);
                context.queue.leave(outcome.unwrap_or_else(|payload| Err(DataError::panicked(at, &*payload))));
            };
            let thread = std::thread::Builder::new().name("latents-reader".into()).spawn(work);
            // What was started before ends when the stream is dropped.
            stream.threads.push(thread.map_err(|error| DataError::Request {
                url: name.clone(),
                reason: format!("a reader thread cannot be started: {error}"),
            })?);
        }
        Ok(stream)
    }

    /// The next micro-batch; waits for it if need be.
    ///
    /// # Errors
    /// What went wrong in reading, once; after that [`DataError::Stopped`]. [`DataError::EndOfStream`] after the last one.
    // Not an Iterator: an endless run never sees the end, and an error must not look like one.
    #[allow(clippy::should_implement_trait)]
    pub fn next(&mut self) -> Result<MicroBatch, DataError> {
        self.context.queue.take().unwrap_or(Err(DataError::EndOfStream { end_step: self.context.steps.end }))
    }

    /// Gives a used micro-batch's memory back for a later one.
    pub fn recycle(&mut self, batch: MicroBatch) {
        self.context.queue.recycle(batch);
    }
}

impl std::fmt::Debug for MicroBatchStream {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("MicroBatchStream").field("lanes", &self.context.lanes).finish_non_exhaustive()
    }
}

impl Drop for MicroBatchStream {
    fn drop(&mut self) {
        self.context.queue.stop();
        self.stop.send_replace(true);
        for thread in self.threads.drain(..) {
            // The threads catch their own panics, and nobody is left to tell.
            let _ = thread.join();
        }
    }
}

/// A reader thread: does jobs until there are no more, or nobody wants them.
fn work(context: &Context, planner: &Mutex<Planner>, stopped: watch::Receiver<bool>) -> Result<(), DataError> {
    let mut filler = Filler::default();
    loop {
        // After a panic under the lock the queue is closed, and the planner not asked again.
        let job = planner.lock().unwrap_or_else(PoisonError::into_inner).next()?;
        let Some(mut job) = job else { return Ok(()) };
        for window in &job.windows {
            let _loading = span(Data, "load a window", None);
            if window.load(context, &stopped)?.is_none() {
                return Ok(());
            }
        }
        {
            let _filling = span(Data, "fill micro-batches", job.first);
            filler.fill(context, &mut job)?;
        }
        context.queue.deliver(job.first, context.lanes.len(), job.batches);
    }
}

/// Refuses what cannot be streamed, before anything is read.
fn check(
    sources: &[StreamSource],
    order: &RowOrder,
    lanes: &[usize],
    options: &StreamOptions,
) -> Result<(), DataError> {
    let Some(first) = sources.first().filter(|_| sources.len() == order.sources()) else {
        let reason = format!("{} data sets were given; the order is of {}", sources.len(), order.sources());
        return Err(DataError::Schedule(reason));
    };
    if let Some(captions) = &options.captions {
        let datasets: Vec<&LatentDataset> = sources.iter().map(|source| &*source.dataset).collect();
        check_options(captions, &datasets)?;
    }
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
        if lanes.is_empty() || lanes.iter().any(|lane| *lane >= order.options().lanes) {
            return refuse(format!("lanes {lanes:?} were asked for; there are {}", order.options().lanes));
        }
    }
    Ok(())
}

#[cfg(test)]
mod tests;
