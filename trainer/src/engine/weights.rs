//! Where a segment's weights come from when it computes, and what happens to them after an update.

use super::bucket::{Bucket, slice};
use super::ranks::Ranks;
use super::turns::Turns;
use crate::ffi::{TorchError, region};
use collective::{CollectiveError, Pending};
use std::sync::Arc;

/// Sees to it that the weights of a bucket are whole on this rank while its segment computes. All ranks make the same calls
/// in the same order: that of [`Turns::uses`], lane by lane, then one update.
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

    /// Every rank has updated its part of bucket `index`, which no segment uses any more in this step.
    ///
    /// # Errors
    /// As [`WeightSource::acquire`].
    fn publish(&mut self, buckets: &[Bucket], index: usize) -> Result<(), WeightsError>;

    /// Waits for everything that [`WeightSource::publish`] has started.
    ///
    /// # Errors
    /// What the collective reports.
    fn settle(&mut self, buckets: &[Bucket]) -> Result<(), CollectiveError>;
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
pub fn source(ranks: Arc<Ranks>, turns: &Turns) -> Box<dyn WeightSource> {
    let buckets = 0..turns.keeps.len();
    match ranks.mesh.shares_out_weights() {
        true => {
            let buckets = buckets.map(|_| Presence::Absent).collect();
            Box::new(OnDemand { ranks, buckets, order: turns.uses(), uses: 0 })
        }
        false => Box::new(Resident { ranks, gathers: buckets.map(|_| Gather::Done).collect() }),
    }
}

/// All weights stay on every rank. After an update they come back in the order of the next forward pass, which waits for
/// each bucket only when it needs it.
struct Resident {
    ranks: Arc<Ranks>,
    gathers: Vec<Gather>,
}

/// How far the weights of a bucket have come.
enum Gather {
    /// This rank's part of them comes from its peers on other nodes.
    AmongPeers(Pending),
    /// All of them come, from the ranks of the group.
    InGroup(Pending),
    Done,
}

impl Resident {
    /// Sends what has come from other nodes round in this one.
    fn descend(&mut self, buckets: &[Bucket], index: usize) -> Result<(), CollectiveError> {
        match std::mem::replace(&mut self.gathers[index], Gather::Done) {
            Gather::AmongPeers(pending) => {
                self.ranks.finish(Some(pending), "gather between nodes", index)?;
                let gather = self.ranks.group().all_gather(None, region(&buckets[index].params))?;
                self.gathers[index] = Gather::InGroup(gather);
            }
            other => self.gathers[index] = other,
        }
        Ok(())
    }

    fn finish(&mut self, buckets: &[Bucket], index: usize) -> Result<(), CollectiveError> {
        self.descend(buckets, index)?;
        if index + 1 < buckets.len() {
            self.descend(buckets, index + 1)?;
        }
        match std::mem::replace(&mut self.gathers[index], Gather::Done) {
            Gather::InGroup(pending) => self.ranks.finish(Some(pending), "gather", index),
            _ => Ok(()),
        }
    }
}

impl WeightSource for Resident {
    fn acquire(&mut self, buckets: &[Bucket], index: usize) -> Result<(), WeightsError> {
        Ok(self.finish(buckets, index)?)
    }

    fn release(&mut self, _: &[Bucket], _: usize) -> Result<(), WeightsError> {
        Ok(())
    }

    fn publish(&mut self, buckets: &[Bucket], index: usize) -> Result<(), WeightsError> {
        let (mesh, bucket) = (self.ranks.mesh, &buckets[index]);
        if mesh.over_all {
            let part = slice(&bucket.params, &bucket.layout.shard(mesh.part()));
            self.gathers[index] = Gather::AmongPeers(self.ranks.peers().all_gather(None, region(&part))?);
        } else if mesh.shards > 1 {
            self.gathers[index] = Gather::InGroup(self.ranks.group().all_gather(None, region(&bucket.params))?);
        }
        Ok(())
    }

    fn settle(&mut self, buckets: &[Bucket]) -> Result<(), CollectiveError> {
        (0..buckets.len()).try_for_each(|index| self.finish(buckets, index))
    }
}

/// A rank keeps its part. The weights of a segment are gathered one turn ahead of their use and let go after it, unless [`Turns::uses`]
/// has them stay for the next.
struct OnDemand {
    ranks: Arc<Ranks>,
    buckets: Vec<Presence>,
    /// See [`Turns::uses`].
    order: Vec<(usize, bool)>,
    /// How many have computed since the last update.
    uses: usize,
}

enum Presence {
    Absent,
    Coming(Pending),
    Here,
}

impl OnDemand {
    /// A use's segment, and whether its weights stay.
    fn of_use(&self, uses: usize) -> (usize, bool) {
        self.order[uses % self.order.len()]
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
        assert_eq!(index, self.of_use(self.uses).0, "segments compute in their order");
        self.gather(buckets, index)?;
        if let Presence::Coming(gather) = std::mem::replace(&mut self.buckets[index], Presence::Here) {
            self.ranks.finish(Some(gather), "gather", index)?;
        }
        let (next, _) = self.of_use(self.uses + 1);
        self.gather(buckets, next)
    }

    fn release(&mut self, buckets: &[Bucket], index: usize) -> Result<(), WeightsError> {
        let (_, stays) = self.of_use(self.uses);
        self.uses += 1;
        if stays { Ok(()) } else { self.let_go(buckets, index) }
    }

    fn publish(&mut self, buckets: &[Bucket], index: usize) -> Result<(), WeightsError> {
        self.uses = 0;
        // What is here was gathered before the update.
        self.let_go(buckets, index)
    }

    fn settle(&mut self, _: &[Bucket]) -> Result<(), CollectiveError> {
        Ok(())
    }
}
