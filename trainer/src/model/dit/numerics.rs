//! Constants that leave no trace in the weights, and in which the world's two DiT implementations differ.

use serde::{Deserialize, Serialize};

/// The official code's constants by default. A model has to be run with those that it was trained with.
#[derive(Clone, Copy, Debug, PartialEq, Serialize, Deserialize)]
pub struct Numerics {
    /// The timestep frequencies are 10000^(−i / (128 − `freq_shift`)).
    pub freq_shift: f64,
    /// Epsilon of the LayerNorm before the MLP of an adaLN-Zero block.
    pub mlp_norm_eps: f64,
}

impl Default for Numerics {
    fn default() -> Self {
        Self { freq_shift: 0.0, mlp_norm_eps: super::layers::NORM_EPS }
    }
}

impl Numerics {
    /// What `DiTTransformer2DModel` computes as it is shipped, with its default `norm_eps`.
    pub const STOCK_DIFFUSERS: Self = Self { freq_shift: 1.0, mlp_norm_eps: 1e-5 };

    pub(super) fn is_default(&self) -> bool {
        *self == Self::default()
    }
}
