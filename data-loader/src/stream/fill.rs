//! Fills micro-batches: a pure function of the rows, the seed, the step and the lane.

use bytemuck::cast_slice_mut;
use rand::Rng;

use super::buffers::widen;
use super::plan::{Job, Slot};
use super::window::{Loaded, Window};
use super::{Context, MicroBatch};
use crate::captions;
use crate::direct::Wanted;
use crate::draws::{Key, Purpose, fill_normal};
use crate::fixed::add_posterior_noise;
use crate::{DataError, Flip};

/// Memory that a thread keeps from job to job.
#[derive(Default)]
pub(super) struct Filler {
    /// Whether each row of a job is mirrored.
    flipped: Vec<bool>,
    eps: Vec<f32>,
    logvar: Vec<f32>,
    /// Moments as stored, where they are read directly.
    stored: Vec<f32>,
}

impl Filler {
    /// Fills the micro-batches of a job whose windows are loaded.
    ///
    /// # Errors
    /// If a file cannot be read.
    pub fn fill(&mut self, context: &Context, job: &mut Job) -> Result<(), DataError> {
        let Job { batches, windows, slots, .. } = job;
        let windows: Vec<(&Window, &Loaded)> = windows.iter().map(|window| (&**window, window.loaded())).collect();
        let micro_batch = slots.len() / batches.len();
        self.flipped.clear();
        for (batch, slots) in batches.iter_mut().zip(slots.chunks(micro_batch)) {
            self.draw_flips(context, batch, slots.len());
            let mut choices = key(context, batch, Purpose::Caption).rng();
            let weights = context.options.captions.as_ref().map_or(&[][..], |captions| &captions.weights);
            for slot in slots {
                let (window, loaded) = windows[slot.window as usize];
                let (block, row) = loaded.place(slot.at);
                batch.labels.extend(block.labels().get(row));
                if let Some((batch, (stored, row))) = batch.captions.as_mut().zip(loaded.captions(slot.at)) {
                    batch.push(stored, row, captions::choose(&mut choices, weights, stored.count(row)));
                }
                batch.rows.push(loaded.row(slot.at));
                batch.sources.push(window.source as u32);
                for broken in loaded.broken(slot.at) {
                    if !batch.broken.contains(broken) {
                        batch.broken.push(broken.clone());
                    }
                }
            }
        }
        if context.stored_form().is_some() {
            return self.copy(context, batches, &windows, slots);
        }
        for (number, (batch, slots)) in batches.iter_mut().zip(slots.chunks(micro_batch)).enumerate() {
            self.sample(context, batch, &windows, slots, number * micro_batch)?;
        }
        Ok(())
    }

    fn draw_flips(&mut self, context: &Context, batch: &MicroBatch, rows: usize) {
        if context.options.flip == Flip::Never {
            self.flipped.resize(self.flipped.len() + rows, false);
            return;
        }
        let mut flips = key(context, batch, Purpose::Flip).rng();
        self.flipped.extend((0..rows).map(|_| flips.next_u32() >> 31 == 1));
    }

    /// Latents as stored, straight into the micro-batches.
    fn copy(
        &self,
        context: &Context,
        batches: &mut [MicroBatch],
        windows: &[(&Window, &Loaded)],
        slots: &[Slot],
    ) -> Result<(), DataError> {
        let (row_bytes, number_bytes, width) = {
            let batch = &batches[0];
            let width = batch.latent_shape.last().copied().unwrap_or(1);
            (batch.x_start.bytes().len() / batch.rows.len(), batch.x_start.dtype().bytes(), width)
        };
        let mut wanted: Vec<Vec<Wanted>> = context.sources.iter().map(|_| Vec::new()).collect();
        let rows = batches.iter_mut().flat_map(|batch| batch.x_start.bytes_mut().chunks_exact_mut(row_bytes));
        for ((out, slot), &flipped) in rows.zip(slots).zip(&self.flipped) {
            let (window, loaded) = windows[slot.window as usize];
            let column = usize::from(flipped && context.options.flip == Flip::Stored);
            if loaded.direct {
                wanted[window.source].push(Wanted { row: loaded.row(slot.at), column, out });
            } else {
                let (block, row) = loaded.place(slot.at);
                block.copy_stored(column, row, out);
            }
        }
        for (source, wanted) in context.sources.iter().zip(wanted) {
            source.dataset.read_directly(wanted)?;
        }
        if context.options.flip == Flip::Latent {
            let rows = batches.iter_mut().flat_map(|batch| batch.x_start.bytes_mut().chunks_exact_mut(row_bytes));
            let flipped = rows.zip(&self.flipped).filter(|(_, flipped)| **flipped);
            flipped.for_each(|(row, _)| mirror_bytes(row, width, number_bytes));
        }
        Ok(())
    }

    /// Latents as float32, sampled from their posteriors where these are stored, scaled. `first` is the number of the first
    /// row in the job.
    fn sample(
        &mut self,
        context: &Context,
        batch: &mut MicroBatch,
        windows: &[(&Window, &Loaded)],
        slots: &[Slot],
        first: usize,
    ) -> Result<(), DataError> {
        let numel = batch.x_start.numel() / slots.len();
        let width = batch.latent_shape.last().copied().unwrap_or(1);
        let flipped = &self.flipped[first..first + slots.len()];
        let column_of = |moments: bool, flipped: bool| match flipped && context.options.flip == Flip::Stored {
            true => 1 + usize::from(moments),
            false => 0,
        };
        self.logvar.resize(numel, 0.0);
        if context.sources.iter().any(|source| source.dataset.meta().moments) {
            self.eps.resize(slots.len() * numel, 0.0);
            fill_normal(key(context, batch, Purpose::Posterior), &mut self.eps);
        }

        // A latent takes `numel` float32 of scratch memory at most.
        let mut wanted: Vec<Vec<Wanted>> = context.sources.iter().map(|_| Vec::new()).collect();
        let any_direct = windows.iter().any(|(_, loaded)| loaded.direct);
        self.stored.resize(if any_direct { slots.len() * 2 * numel } else { 0 }, 0.0);
        for ((scratch, slot), &flipped) in self.stored.chunks_exact_mut(2 * numel).zip(slots).zip(flipped) {
            let (window, loaded) = windows[slot.window as usize];
            if !loaded.direct {
                continue;
            }
            let dataset = &context.sources[window.source].dataset;
            let (moments, row) = (dataset.meta().moments, loaded.row(slot.at));
            let (mean, logvar) = scratch.split_at_mut(numel);
            for (column, out) in [mean, logvar].into_iter().enumerate().take(1 + usize::from(moments)) {
                let column = column_of(moments, flipped) + column;
                let row_bytes = numel * dataset.stored[column].dtype.bytes();
                wanted[window.source].push(Wanted { row, column, out: &mut cast_slice_mut(out)[..row_bytes] });
            }
        }
        for (source, wanted) in context.sources.iter().zip(wanted) {
            source.dataset.read_directly(wanted)?;
        }

        let x_start = batch.x_start.f32_mut().unwrap_or_else(|| unreachable!("not as stored"));
        for (i, ((x, slot), &flipped)) in x_start.chunks_exact_mut(numel).zip(slots).zip(flipped).enumerate() {
            let (window, loaded) = windows[slot.window as usize];
            let source = &context.sources[window.source];
            let moments = source.dataset.meta().moments;
            let mirror = flipped && context.options.flip == Flip::Latent;
            for number in 0..1 + usize::from(moments) {
                let column = column_of(moments, flipped) + number;
                let out: &mut [f32] = if number == 0 { x } else { &mut self.logvar };
                if loaded.direct {
                    let scratch = &self.stored[(2 * i + number) * numel..][..numel];
                    let dtype = source.dataset.stored[column].dtype;
                    widen(dtype, &bytemuck::cast_slice(scratch)[..numel * dtype.bytes()], out);
                } else {
                    let (block, row) = loaded.place(slot.at);
                    block.latent(column, row, out);
                }
                if mirror {
                    out.chunks_mut(width).for_each(<[f32]>::reverse);
                }
            }
            if moments {
                add_posterior_noise(x, &self.logvar, &self.eps[i * numel..]);
            }
            let scale = source.scaling_factor as f32;
            x.iter_mut().for_each(|x| *x *= scale);
        }
        Ok(())
    }
}

fn key(context: &Context, batch: &MicroBatch, purpose: Purpose) -> Key {
    Key::new(context.order.options().seed, purpose, batch.step).lane(batch.lane)
}

/// Mirrors lines of `width` numbers of `number_bytes` bytes.
fn mirror_bytes(bytes: &mut [u8], width: usize, number_bytes: usize) {
    for line in bytes.chunks_mut(width * number_bytes) {
        line.reverse();
        line.chunks_mut(number_bytes).for_each(<[u8]>::reverse);
    }
}
