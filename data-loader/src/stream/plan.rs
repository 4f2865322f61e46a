//! What is to be read next, and into which memory.

use std::collections::VecDeque;
use std::sync::Arc;

use super::window::Window;
use super::{Context, Latents, MicroBatch, ROW_BYTES, caption_bytes};
use crate::order::{Memo, Pick};
use crate::{DataError, Dtype};

/// Micro-batches of one lane at consecutive steps, to be filled together.
pub(super) struct Job {
    /// Number of the first in the queue.
    pub first: u64,
    pub batches: Vec<MicroBatch>,
    /// The windows that their rows are in.
    pub windows: Vec<Arc<Window>>,
    /// Where each row is, micro-batch after micro-batch.
    pub slots: Vec<Slot>,
}

/// A row of a job.
#[derive(Clone, Copy)]
pub(super) struct Slot {
    /// The window in [`Job::windows`].
    pub window: u32,
    /// The position in the window.
    pub at: u32,
}

/// Deals jobs, in the order in which their micro-batches are taken: a few steps of the first lane, the same of the next, …
pub(super) struct Planner {
    context: Arc<Context>,
    memo: Memo,
    picks: Vec<Pick>,
    /// Windows that are not used up yet, of each lane and part.
    windows: Vec<Vec<VecDeque<Arc<Window>>>>,
    /// The steps that are being dealt, and the next lane's number.
    round: std::ops::Range<u64>,
    lane: usize,
}

impl Context {
    /// Tokens and dim of the captions that micro-batches bring.
    pub fn caption_form(&self) -> Option<(usize, usize)> {
        let dim = self.sources[0].dataset.meta().captions?.dim;
        Some((self.options.captions.as_ref()?.tokens, dim))
    }

    /// The number type of a micro-batch and what its numbers are still to be multiplied by, where latents are used as
    /// stored: all sources have the same, and no posterior.
    pub fn stored_form(&self) -> Option<(Dtype, f32)> {
        let mut forms = self.sources.iter().flat_map(|source| {
            let scale = source.scaling_factor as f32;
            source.dataset.stored.iter().map(move |column| (column.dtype, scale))
        });
        let first = forms.next()?;
        let moments = self.sources.iter().any(|source| source.dataset.meta().moments);
        (!moments && forms.all(|form| form == first)).then_some(first)
    }
}

impl Planner {
    pub fn new(context: Arc<Context>) -> Self {
        let windows = || (0..context.order.parts()).map(|_| VecDeque::new()).collect();
        let windows = context.lanes.iter().map(|_| windows()).collect();
        let round = context.steps.start..context.steps.start;
        Self { context, memo: Memo::default(), picks: Vec::new(), windows, round, lane: 0 }
    }

    /// The next job, once there is room for it; `None` after the last one or if nobody wants it.
    ///
    /// # Errors
    /// If there is no memory for it.
    pub fn next(&mut self) -> Result<Option<Job>, DataError> {
        let context = self.context.clone();
        let lanes = context.lanes.len();
        let new_round = self.lane == 0;
        if new_round {
            self.round = self.round.end..self.round.end;
        }
        let first = (self.round.start - context.steps.start) * lanes as u64 + self.lane as u64;
        let mut job = Job { first, batches: Vec::new(), windows: Vec::new(), slots: Vec::new() };
        let (mut most_steps, mut shape) = (1, Vec::new());
        let mut step = self.round.start;
        while if new_round {
            step < context.steps.end && step - self.round.start < most_steps
        } else {
            step < self.round.end
        } {
            context.order.picks(&mut self.memo, step, context.lanes[self.lane], &mut self.picks);
            if new_round && step > self.round.start && self.opens_window() {
                break;
            }
            self.place(&mut job);
            if step == self.round.start {
                shape = self.shape(&job)?;
                most_steps = self.most_steps(&shape);
            }
            step += 1;
        }
        if new_round {
            self.round.end = step;
        }
        if self.round.is_empty() {
            return Ok(None);
        }
        let steps = self.round.clone();
        if !context.queue.claim((steps.end - steps.start) as usize * self.bytes(&shape)) {
            return Ok(None);
        }
        let lane = context.lanes[self.lane];
        job.batches = steps.map(|step| self.memory(step, lane, &shape)).collect::<Result<_, _>>()?;
        self.lane = (self.lane + 1) % lanes;
        Ok(Some(job))
    }

    /// Whether the first row of the picks is in none of the lane's windows.
    fn opens_window(&self) -> bool {
        let pick = self.picks[0];
        !self.windows[self.lane][pick.part].iter().any(|window| window.positions.contains(&pick.position))
    }

    /// Adds the picks of a step to a job, with new windows where they begin.
    fn place(&mut self, job: &mut Job) {
        let windows = &mut self.windows[self.lane];
        let mut first_of_part = vec![true; windows.len()];
        for &pick in &self.picks {
            let windows = &mut windows[pick.part];
            if std::mem::take(&mut first_of_part[pick.part]) {
                windows.retain(|window| window.positions.end > pick.position);
            }
            let found = windows.iter().find(|window| window.positions.contains(&pick.position));
            let window = found.cloned().unwrap_or_else(|| {
                let lane = self.context.lanes[self.lane];
                let rows = self.context.order.window(&mut self.memo, lane, pick);
                let window = Arc::new(Window::new(&self.context.order, pick.part, rows));
                windows.push_back(window.clone());
                window
            });
            let at = (pick.position - window.positions.start) as u32;
            let number = job.windows.iter().rposition(|other| Arc::ptr_eq(other, &window)).unwrap_or_else(|| {
                job.windows.push(window);
                job.windows.len() - 1
            });
            job.slots.push(Slot { window: number as u32, at });
        }
    }

    /// The shape of the latents of a job.
    fn shape(&self, job: &Job) -> Result<Vec<usize>, DataError> {
        let slot = job.slots[0];
        let window = &job.windows[slot.window as usize];
        let dataset = &self.context.sources[window.source].dataset;
        Ok(dataset.row_shapes()?.of(window.rows[slot.at as usize]).to_vec())
    }

    fn form(&self) -> (Dtype, f32) {
        self.context.stored_form().unwrap_or((Dtype::F32, 1.0))
    }

    fn bytes(&self, shape: &[usize]) -> usize {
        let latent = shape.iter().product::<usize>() * self.form().0.bytes();
        let caption = self.context.caption_form().map_or(0, |(tokens, dim)| caption_bytes(tokens, dim));
        self.context.order.options().micro_batch * (latent + ROW_BYTES + caption)
    }

    /// Steps that are read together: so many that all lanes can have two jobs under way, where latents go from the file to
    /// the micro-batch without a detour. The more of a window is read at once, the more neighbours there are.
    fn most_steps(&self, shape: &[usize]) -> u64 {
        let Context { lanes, options, sources, order, .. } = &*self.context;
        let direct = sources.iter().all(|source| source.dataset.direct.is_some());
        if !direct || self.context.stored_form().is_none() {
            return 1;
        }
        let window = order.options().shuffle_window_rows.div_ceil(order.options().micro_batch);
        let room = options.prefetch_bytes / (options.threads.max(2) * lanes.len() * self.bytes(shape)).max(1);
        room.clamp(1, window) as u64
    }

    /// Memory for a micro-batch: one that was given back, or new.
    fn memory(&self, step: u64, lane: usize, shape: &[usize]) -> Result<MicroBatch, DataError> {
        let Context { order, options, queue, sources, .. } = &*self.context;
        let numel = order.options().micro_batch * shape.iter().product::<usize>();
        let (dtype, scale) = self.form();
        let (memory, (mut labels, mut rows, mut numbers, mut latent_shape, captions)) = match queue.spare() {
            Some(MicroBatch { x_start, labels, rows, sources, latent_shape, captions, .. }) => {
                (x_start.reuse(dtype, numel, scale), (labels, rows, sources, latent_shape, captions))
            }
            None => Default::default(),
        };
        let x_start =
            memory.map_or_else(|| Latents::allocate(options.allocator, dtype, numel, scale), Ok).map_err(|reason| {
                DataError::Request {
                    url: sources[0].dataset.name().to_owned(),
                    reason: format!("no memory for a micro-batch: {reason}"),
                }
            })?;
        labels.clear();
        rows.clear();
        numbers.clear();
        latent_shape.clear();
        latent_shape.extend_from_slice(shape);
        let captions =
            self.context.caption_form().map(|(tokens, dim)| captions.unwrap_or_default().emptied(tokens, dim));
        let broken = Vec::new();
        Ok(MicroBatch { step, lane, x_start, latent_shape, labels, captions, rows, sources: numbers, broken })
    }
}
