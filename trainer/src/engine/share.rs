//! Image batches shared out over the ranks.

use super::agree::agree;
use crate::images::ImageBatch;
use anyhow::{Context, Result};
use collective::{Collective, Region};

/// Lets the ranks draw `batches` batches, dealt round by round, and hands them to rank 0 in the order of their numbers,
/// whatever the number of ranks. No rank holds more than two batches at a time. All ranks call it together.
///
/// # Errors
/// [`super::agree::Agreed`] when a rank cannot draw its batch or rank 0 cannot take one; no further round begins then.
/// What the collective reports concerns this rank alone.
pub fn share_out(
    collective: &dyn Collective,
    batches: usize,
    draw: &mut dyn FnMut(usize) -> Result<ImageBatch>,
    take: &mut dyn FnMut(ImageBatch) -> Result<()>,
) -> Result<()> {
    let (rank, world_size) = (collective.rank(), collective.world_size());
    let mut taken = Ok(());
    for first in (0..batches).step_by(world_size) {
        let mine = std::mem::replace(&mut taken, Ok(()))
            .and_then(|()| (first + rank < batches).then(|| draw(first + rank)).transpose());
        let mine = agree(collective, mine)?;
        let shape = |batch: &ImageBatch| [batch.count, batch.channels, batch.height, batch.width].map(|n| n as i64);
        let shapes = collective.gather_values(mine.as_ref().map_or([0; 4], shape).to_vec())?;
        let mut pixels = mine.map(|batch| batch.pixels).unwrap_or_default();
        for (source, shape) in shapes.as_chunks::<4>().0.iter().enumerate().take(batches - first) {
            let shape = shape.map(|n| n as usize);
            let buffer = match source == rank {
                true => std::mem::take(&mut pixels),
                false => vec![0; shape.iter().product()],
            };
            let sent = collective.broadcast(Region::from_vec(buffer), source)?.wait(collective.deadline());
            let pixels = sent.context("sending samples to rank 0")?.into_vec::<u8>()?;
            if rank == 0 && taken.is_ok() {
                taken = ImageBatch::new(shape, pixels).map_err(Into::into).and_then(&mut *take);
            }
        }
    }
    agree(collective, taken)
}
