//! Batches shared out over the ranks.

use super::agree::agree;
use crate::images::ImageBatch;
use anyhow::{Context, Result};
use collective::{Collective, Region};

/// What a rank makes of a batch and rank 0 takes.
pub trait Parcel: Sized {
    /// Its values as bytes, and what is needed to read them.
    ///
    /// # Errors
    /// Values that cannot be taken from their device.
    fn pack(self) -> Result<([usize; 4], Vec<u8>)>;

    /// What was packed.
    ///
    /// # Errors
    /// Bytes that are not what the label says.
    fn unpack(label: [usize; 4], bytes: Vec<u8>) -> Result<Self>;
}

impl Parcel for ImageBatch {
    fn pack(self) -> Result<([usize; 4], Vec<u8>)> {
        Ok(([self.count, self.channels, self.height, self.width], self.pixels))
    }

    fn unpack(label: [usize; 4], bytes: Vec<u8>) -> Result<Self> {
        Ok(ImageBatch::new(label, bytes)?)
    }
}

/// Lets the ranks work on `batches` batches, dealt round by round, and hands what they make to rank 0 in the order of
/// the batches' numbers, whatever the number of ranks. No rank holds more than two batches at a time. All ranks call it
/// together.
///
/// # Errors
/// [`super::agree::Agreed`] when a rank cannot make its batch or rank 0 cannot take one; no further round begins then.
/// What the collective reports concerns this rank alone.
pub fn share_out<T: Parcel>(
    collective: &dyn Collective,
    batches: usize,
    make: &mut dyn FnMut(usize) -> Result<T>,
    take: &mut dyn FnMut(T) -> Result<()>,
) -> Result<()> {
    let (rank, world_size) = (collective.rank(), collective.world_size());
    if world_size == 1 {
        return (0..batches).try_for_each(|number| take(make(number)?));
    }
    let mut taken = Ok(());
    for first in (0..batches).step_by(world_size) {
        let mine = std::mem::replace(&mut taken, Ok(()))
            .and_then(|()| (first + rank < batches).then(|| make(first + rank)?.pack()).transpose());
        let (label, mut bytes) = agree(collective, mine)?.unwrap_or_default();
        let sizes = [[bytes.len()].as_slice(), &label].concat();
        let sizes = collective.gather_values(sizes.into_iter().map(|n| n as i64).collect())?;
        for (source, sizes) in sizes.as_chunks::<5>().0.iter().enumerate().take(batches - first) {
            let [length, label @ ..] = sizes.map(|n| n as usize);
            let buffer = if source == rank { std::mem::take(&mut bytes) } else { vec![0; length] };
            let sent = collective.broadcast(Region::from_vec(buffer), source)?.wait(collective.deadline());
            let bytes = sent.context("sending a batch to rank 0")?.into_vec::<u8>()?;
            if rank == 0 && taken.is_ok() {
                taken = T::unpack(label, bytes).and_then(&mut *take);
            }
        }
    }
    agree(collective, taken)
}
