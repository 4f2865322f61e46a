//! Where a segment's weights come from when it computes, and what happens to them after an update.

use super::bucket::Bucket;
use super::ranks::Ranks;
use crate::ffi::{TorchError, region};
use collective::{CollectiveError, Pending};
use std::sync::Arc;

/// Sees to it that the weights of a bucket are whole on this rank while its segment computes. All ranks make the same calls
/// in the same order: the chain forwards, then backwards, lane by lane, then one update.
pub trait WeightSource {
    /// Waits until the weights of bucket `index` are whole.
    ///
    /// # Errors
    /// What the collective or libtorch reports.
    fn acquire(&mut self, buckets: &[Bucket], index: usize) -> Result<(), WeightsError>;

    /// The segment has computed.
    ///
    /// # Errors
    /// What libtorch reports.
    fn release(&mut self, buckets: &[Bucket], index: usize) -> Result<(), WeightsError>;

    /// Every rank has updated its part.
    ///
    /// # Errors
    /// As [`WeightSource::acquire`].
    fn publish(&mut self, buckets: &[Bucket]) -> Result<(), WeightsError>;

    /// Waits for everything that [`WeightSource::publish`] has started.
    ///
    /// # Errors
    /// What the collective reports.
    fn settle(&mut self) -> Result<(), CollectiveError>;
}

/// Weights that cannot be had.
#[derive(Debug, thiserror::Error)]
pub enum WeightsError {
    /// They did not come.
    #[error(transparent)]
    Collective(#[from] CollectiveError),
    /// There is no memory for them.
    #[error(transparent)]
    Torch(#[from] TorchError),
}

/// The source for these ranks.
pub fn source(ranks: Arc<Ranks>, buckets: usize) -> Box<dyn WeightSource> {
    match ranks.mesh.shares_out_weights() {
        true => Box::new(OnDemand { ranks, buckets: (0..buckets).map(|_| Presence::Absent).collect(), uses: 0 }),
        false => Box::new(Resident { ranks, gathers: (0..buckets).map(|_| None).collect() }),
    }
}

/// All weights stay on every rank. After an update they come back in the order of the next forward pass, which waits for
/// each bucket only when it needs it.
struct Resident {
    ranks: Arc<Ranks>,
    gathers: Vec<Option<Pending>>,
}

impl WeightSource for Resident {
    fn acquire(&mut self, _: &[Bucket], index: usize) -> Result<(), WeightsError> {
        Ok(self.ranks.finish(self.gathers[index].take(), "gather", index)?)
    }

    fn release(&mut self, _: &[Bucket], _: usize) -> Result<(), WeightsError> {
        Ok(())
    }

    fn publish(&mut self, buckets: &[Bucket]) -> Result<(), WeightsError> {
        if self.ranks.mesh.shards > 1 {
            for (bucket, gather) in buckets.iter().zip(&mut self.gathers) {
                *gather = Some(self.ranks.group().all_gather(None, region(&bucket.params))?);
            }
        }
        Ok(())
    }

    fn settle(&mut self) -> Result<(), CollectiveError> {
        let mut gathers = self.gathers.iter_mut().enumerate();
        gathers.try_for_each(|(index, gather)| self.ranks.finish(gather.take(), "gather", index))
    }
}

/// A rank keeps its part. The weights of a segment are gathered one segment ahead of their use and let go after it, unless the
/// same segment is the next one: at the end of the chain and at its beginning.
struct OnDemand {
    ranks: Arc<Ranks>,
    buckets: Vec<Presence>,
    /// Segments that have computed since the last update.
    uses: usize,
}

enum Presence {
    Absent,
    Coming(Pending),
    Here,
}

impl OnDemand {
    /// The segment of a use: the chain forwards, backwards, and again.
    fn segment_of(&self, uses: usize) -> usize {
        let (segments, at) = (self.buckets.len(), uses % (2 * self.buckets.len()));
        if at < segments { at } else { 2 * segments - 1 - at }
    }

    fn gather(&mut self, buckets: &[Bucket], index: usize) -> Result<(), WeightsError> {
        if matches!(self.buckets[index], Presence::Absent) {
            let bucket = &buckets[index];
            bucket.make_room()?;
            let gather = self.ranks.group().all_gather(Some(region(&bucket.held)), region(&bucket.params))?;
            self.buckets[index] = Presence::Coming(gather);
        }
        Ok(())
    }

    fn let_go(&mut self, buckets: &[Bucket], index: usize) -> Result<(), WeightsError> {
        if matches!(self.buckets[index], Presence::Here) {
            self.buckets[index] = Presence::Absent;
            buckets[index].free_room()?;
        }
        Ok(())
    }
}

impl WeightSource for OnDemand {
    fn acquire(&mut self, buckets: &[Bucket], index: usize) -> Result<(), WeightsError> {
        assert_eq!(index, self.segment_of(self.uses), "the chain runs forwards, then backwards");
        self.gather(buckets, index)?;
        if let Presence::Coming(gather) = std::mem::replace(&mut self.buckets[index], Presence::Here) {
            self.ranks.finish(Some(gather), "gather", index)?;
        }
        let next = self.segment_of(self.uses + 1);
        self.gather(buckets, next)
    }

    fn release(&mut self, buckets: &[Bucket], index: usize) -> Result<(), WeightsError> {
        self.uses += 1;
        if self.segment_of(self.uses) == index { Ok(()) } else { self.let_go(buckets, index) }
    }

    fn publish(&mut self, buckets: &[Bucket]) -> Result<(), WeightsError> {
        self.uses = 0;
        // What is here was gathered before the update.
        (0..buckets.len()).try_for_each(|index| self.let_go(buckets, index))
    }

    fn settle(&mut self) -> Result<(), CollectiveError> {
        Ok(())
    }
}
