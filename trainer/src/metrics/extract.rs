//! Features of many pictures, computed by all ranks together.

use super::ImageSet;
use super::inception::{Features, Inception, POOL_FEATURES, SPATIAL_FEATURES};
use crate::engine::share::{Parcel, share_out};
use anyhow::{Context, Result, ensure};
use collective::Collective;
use std::ops::Range;
use std::sync::mpsc::sync_channel;
use tch::{Device, Tensor};

/// Batches that are read ahead of the network.
const AHEAD: usize = 2;

/// Computes features; every rank of the world has one over the same weights.
pub struct Extractor<'a> {
    inception: &'a Inception,
    collective: &'a dyn Collective,
    /// Pictures that pass through the network at once.
    batch: usize,
}

/// Gives pictures number `range` as uint8 `[N, 3, H, W]`.
pub type Pictures<'a> = &'a mut dyn FnMut(Range<usize>) -> Result<Tensor>;
/// Takes the features of the next pictures.
pub type Sink<'a> = &'a mut dyn FnMut(Features) -> Result<()>;

impl<'a> Extractor<'a> {
    /// An extractor for this rank.
    pub fn new(inception: &'a Inception, collective: &'a dyn Collective, batch: usize) -> Self {
        Self { inception, collective, batch: batch.max(1) }
    }

    /// The network.
    pub fn inception(&self) -> &Inception {
        self.inception
    }

    /// Whether this is the rank that the features go to.
    pub fn collects(&self) -> bool {
        self.collective.rank() == 0
    }

    /// Features of `count` pictures: batches are dealt out to the ranks, and `sink` of rank 0 gets them in order, the same
    /// whatever the number of ranks. All ranks call it together; each asks `pictures` for its own ranges only.
    ///
    /// # Errors
    /// [`crate::engine::agree::Agreed`] when a rank fails; what the collective reports concerns this rank alone.
    pub fn run(&self, count: usize, pictures: Pictures, sink: Sink) -> Result<()> {
        let mut make = |number: usize| {
            let range = number * self.batch..count.min((number + 1) * self.batch);
            Ok(self.inception.features(&pictures(range)?)?)
        };
        share_out(self.collective, count.div_ceil(self.batch), &mut make, sink)
    }

    /// [`Self::run`] over a set; a thread reads ahead while the network computes. `progress` is told how many pictures a batch
    /// had when it arrives.
    ///
    /// # Errors
    /// As [`Self::run`].
    pub fn run_set(&self, set: &ImageSet, progress: &dyn Fn(usize), sink: Sink) -> Result<()> {
        let count = set.count();
        let starts = (self.collective.rank() * self.batch..count).step_by(self.collective.world_size() * self.batch);
        let ranges: Vec<Range<usize>> = starts.map(|start| start..count.min(start + self.batch)).collect();
        std::thread::scope(|scope| {
            let (sender, receiver) = sync_channel(AHEAD);
            scope.spawn(move || {
                let batches = set.reader().map(|mut reader| ranges.into_iter().map(move |range| reader.read(range)));
                match batches {
                    // Refused when the other side has given up.
                    Ok(mut batches) => drop(batches.try_for_each(|batch| sender.send(batch))),
                    Err(error) => drop(sender.send(Err(error))),
                }
            });
            let mut next = |_| Ok(receiver.recv().context("the thread that reads pictures ended early")??);
            self.run(count, &mut next, &mut |features| {
                progress(features.pool.size()[0] as usize);
                sink(features)
            })
        })
    }
}

impl Parcel for Features {
    fn pack(self) -> Result<([usize; 4], Vec<u8>)> {
        let both = Tensor::f_cat(&[self.pool, self.spatial], 1)?.f_to_device(Device::Cpu)?;
        let rows = both.size()[0] as usize;
        let values = Vec::<f32>::try_from(both.f_contiguous()?.f_view([-1])?)?;
        Ok(([rows, 0, 0, 0], values.into_iter().flat_map(f32::to_le_bytes).collect()))
    }

    fn unpack([rows, ..]: [usize; 4], bytes: Vec<u8>) -> Result<Self> {
        let values: Vec<f32> = bytes.as_chunks().0.iter().map(|value| f32::from_le_bytes(*value)).collect();
        let row = POOL_FEATURES + SPATIAL_FEATURES;
        ensure!(values.len() == rows * row as usize, "{} values of features for {rows} pictures", values.len());
        let both = Tensor::f_from_slice(&values)?.f_view([-1, row])?;
        Ok(Features {
            pool: both.f_narrow(1, 0, POOL_FEATURES)?,
            spatial: both.f_narrow(1, POOL_FEATURES, SPATIAL_FEATURES)?,
        })
    }
}
