//! Data sets whose rows have shapes of their own: which shape the lanes read at a step.
//!
//! Each shape is a *bucket* whose rows are dealt to the lanes as those of a data set are. An epoch has as many steps of a
//! bucket as its rows fill; a keyed shuffle of the epoch says in which order they come. All lanes of a step read one
//! bucket, so that a step costs the same on every rank. An epoch ends for all buckets together.

use crate::draws::{Key, Purpose, shuffle};
use crate::mix::{Turn, count_turns};

/// The steps that each bucket has in an epoch.
#[derive(Clone, Debug)]
pub(crate) struct Buckets {
    seed: u64,
    steps: Vec<u64>,
}

impl Buckets {
    pub fn new(seed: u64, steps: Vec<u64>) -> Self {
        Self { seed, steps }
    }

    /// Steps of an epoch.
    pub fn steps_per_epoch(&self) -> u64 {
        self.steps.iter().sum()
    }

    /// Steps of one bucket in an epoch.
    pub fn steps_of(&self, bucket: usize) -> u64 {
        self.steps[bucket]
    }

    /// The bucket of every step of an epoch.
    pub fn turns(&self, epoch: u64) -> Vec<Turn> {
        let mut turns = Vec::with_capacity(self.steps_per_epoch() as usize);
        for (bucket, &steps) in self.steps.iter().enumerate() {
            turns.extend((0..steps).map(|_| Turn { source: bucket as u32, ordinal: 0 }));
        }
        shuffle(Key::new(self.seed, Purpose::Bucket, epoch), &mut turns);
        count_turns(&mut turns, self.steps.len());
        turns
    }
}
