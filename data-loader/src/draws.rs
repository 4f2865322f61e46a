//! Counter-based random draws: every draw is a pure function of what it is for.
//!
//! The whole key goes into the ChaCha seed, so no state is carried from step to step and no two
//! purposes can collide. Lanes, not ranks, appear in a key: the same experiment draws the same
//! numbers on any number of ranks.

use rand::{Rng, SeedableRng};
use rand_chacha::ChaCha8Rng;

/// What a draw is for. The number is part of the key: never renumber, only append.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[repr(u32)]
pub enum Purpose {
    /// The order in which an epoch's row ranges are dealt; `counter` = epoch.
    EpochOrder = 1,
    /// The order inside a lane's shuffle window; `counter` = epoch, `index` = window.
    Window = 2,
    /// Which of the stored orientations of a latent is used; `counter` = step.
    Flip = 3,
    /// The Gaussian of the VAE posterior sample; `counter` = step.
    Posterior = 4,
    /// Diffusion timesteps; `counter` = step.
    Timestep = 5,
    /// Diffusion noise; `counter` = step.
    Noise = 6,
    /// Label dropout; `counter` = step.
    LabelDrop = 7,
    /// Initial weights; `counter` = a digest of the parameter's name.
    Init = 8,
    /// The starting noise of a sample; `counter` = the sample's number.
    SampleStart = 9,
    /// The noise that a stochastic sampler adds; `counter` = the sample's number, `index` = loop step.
    SampleStep = 10,
    /// Where a validation draw is inside its timestep bin; `counter` = row, `index` = draw. On lane 1 the order of the
    /// bins in a block of draws; `counter` = block.
    ValidationTimestep = 11,
    /// The diffusion noise of a validation draw; `counter` = row, `index` = draw.
    ValidationNoise = 12,
    /// The Gaussian of a validation row's posterior sample; `counter` = row.
    ValidationPosterior = 13,
    /// The label of a sample, where labels are drawn; `counter` = the sample's number.
    SampleLabel = 15,
    /// Which source of a mix a lane's rows come from; `counter` = block. With `index` 1 the seed of a source's own order;
    /// `counter` = source.
    Mix = 16,
    /// Which of several captions, row by row of a micro-batch; `counter` = step.
    Caption = 17,
    /// Which bucket of shapes the lanes read at the steps of an epoch; `counter` = epoch. With `index` 1 the seed of a
    /// bucket's own order; `counter` = bucket.
    Bucket = 18,
    /// The row that stands in for one of a broken row group; `counter` = epoch, `lane` = source or bucket, `index` = row.
    Replacement = 19,
}

/// The key of a stream of draws.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Key {
    /// The experiment's seed.
    pub seed: u64,
    /// What the draws are for.
    pub purpose: Purpose,
    /// Step, epoch or sample number, as the purpose says.
    pub counter: u64,
    /// The lane, 0 where the purpose has none.
    pub lane: u32,
    /// A further index where the purpose names one, else 0.
    pub index: u64,
}

impl Key {
    /// A key without lane and index.
    pub fn new(seed: u64, purpose: Purpose, counter: u64) -> Self {
        Self { seed, purpose, counter, lane: 0, index: 0 }
    }

    /// The same key for one lane.
    ///
    /// Lanes are limited to 65,536 by the config, so the cast is lossless.
    pub fn lane(self, lane: usize) -> Self {
        Self { lane: lane as u32, ..self }
    }

    /// The same key with a further index.
    pub fn index(self, index: u64) -> Self {
        Self { index, ..self }
    }

    /// The generator of this key's stream, always from its beginning.
    pub fn rng(&self) -> ChaCha8Rng {
        let mut seed = [0u8; 32];
        seed[0..8].copy_from_slice(&self.seed.to_le_bytes());
        seed[8..16].copy_from_slice(&self.counter.to_le_bytes());
        seed[16..24].copy_from_slice(&self.index.to_le_bytes());
        seed[24..28].copy_from_slice(&self.lane.to_le_bytes());
        seed[28..32].copy_from_slice(&(self.purpose as u32).to_le_bytes());
        ChaCha8Rng::from_seed(seed)
    }
}

/// Fills `out` with standard normal draws of `key`, in order.
pub fn fill_normal(key: Key, out: &mut [f32]) {
    use rand_distr::{Distribution, StandardNormal};
    let mut rng = key.rng();
    for value in out {
        *value = StandardNormal.sample(&mut rng);
    }
}

/// Fisher–Yates by a keyed stream. Written out, because the order is part of every experiment for ever, and a library may
/// change its algorithm.
pub fn shuffle<T>(key: Key, items: &mut [T]) {
    let mut rng = key.rng();
    for last in (1..items.len()).rev() {
        // Multiply-shift maps 64 random bits to 0 ..= last; its bias is below last / 2^64.
        let chosen = ((u128::from(rng.next_u64()) * (last as u128 + 1)) >> 64) as usize;
        items.swap(last, chosen);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_part_of_the_key_changes_the_stream_and_nothing_else_does() {
        let base = Key::new(7, Purpose::Noise, 3).lane(2).index(1);
        let first = |key: Key| key.rng().next_u64();
        assert_eq!(first(base), first(base));
        let others = [
            Key { seed: 8, ..base },
            Key { purpose: Purpose::Timestep, ..base },
            Key { counter: 4, ..base },
            Key { lane: 3, ..base },
            Key { index: 2, ..base },
        ];
        for other in others {
            assert_ne!(first(base), first(other), "{other:?}");
        }
    }

    #[test]
    fn the_stream_of_a_key_is_fixed_for_ever() {
        // A checkpoint resumed with a newer build must draw the numbers of the older one.
        let mut rng = Key::new(1, Purpose::Noise, 2).lane(3).rng();
        let words: Vec<u32> = (0..2).map(|_| rng.next_u32()).collect();
        let mut normals = [0f32; 3];
        fill_normal(Key::new(1, Purpose::Noise, 2).lane(3), &mut normals);
        assert_eq!(words, EXPECTED_WORDS);
        assert_eq!(normals.map(f32::to_bits), EXPECTED_NORMALS);
    }

    const EXPECTED_WORDS: [u32; 2] = [384_094_736, 1_598_817_916];
    const EXPECTED_NORMALS: [u32; 3] = [3_207_658_500, 1_069_869_315, 1_065_808_524];
}
