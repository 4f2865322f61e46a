//! The ranks as the engine sees them: all of them, those of this rank's group, and those with its number in other groups.

use super::mesh::Mesh;
use super::wire::{Summation, WireClock, WireTime};
use collective::single::SingleCollective;
use collective::{Collective, CollectiveError, Pending};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

/// All ranks of a run and the two groups that state and sums are shared in.
pub struct Ranks {
    /// All of them.
    pub all: Arc<dyn Collective>,
    /// This rank's place.
    pub mesh: Mesh,
    /// How sums of several ranks become one.
    pub summation: Summation,
    group: Arc<dyn Collective>,
    peers: Arc<dyn Collective>,
    clock: Mutex<WireClock>,
}

impl Ranks {
    /// Makes the groups; all ranks call it together.
    ///
    /// # Errors
    /// See [`Collective::split`].
    pub fn connect(all: Arc<dyn Collective>, mesh: Mesh, summation: Summation) -> Result<Self, CollectiveError> {
        let alone = || Arc::new(SingleCollective::new(all.deadline())) as Arc<dyn Collective>;
        let (group, peers) = match (mesh.shards, mesh.replicas) {
            (_, 1) => (all.clone(), alone()),
            (1, _) => (alone(), all.clone()),
            _ => (all.split(mesh.replica, mesh.shard)?.into(), all.split(mesh.shard, mesh.replica)?.into()),
        };
        Ok(Self { all, mesh, summation, group, peers, clock: Mutex::default() })
    }

    /// Those that hold one copy together with this rank.
    pub fn group(&self) -> &dyn Collective {
        &*self.group
    }

    /// Those that hold what this rank holds, one of each group.
    pub fn peers(&self) -> &dyn Collective {
        &*self.peers
    }

    /// Waits for an operation on bucket `index`, if there is one; a trace calls it `name`.
    ///
    /// # Errors
    /// See [`Pending::wait`].
    pub fn finish(&self, pending: Option<Pending>, name: &'static str, index: usize) -> Result<(), CollectiveError> {
        pending.map_or(Ok(()), |pending| self.clock().wait(pending, self.all.deadline(), name, index))
    }

    /// What was on the wire since this was last asked.
    pub fn wire_time(&self) -> WireTime {
        self.clock().take()
    }

    fn clock(&self) -> MutexGuard<'_, WireClock> {
        self.clock.lock().unwrap_or_else(PoisonError::into_inner)
    }
}
