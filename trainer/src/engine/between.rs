//! What all ranks do together between two steps: look at the weights, never change them.

use super::rank::Rank;
use anyhow::Result;
use std::collections::BTreeMap;

/// Something that is done every so many steps.
pub trait BetweenSteps {
    /// Steps from one time to the next, above 0; the last step is always one.
    fn every_steps(&self) -> u64;

    /// Does it on all ranks together and tells the journal; gives what it measured of the weights, by name. A checkpoint
    /// of the same step records that.
    ///
    /// # Errors
    /// What ends the run.
    fn look(&self, rank: &mut Rank, step: u64) -> Result<BTreeMap<String, f64>>;
}
