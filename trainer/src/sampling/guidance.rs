use crate::model::{Model, WeightSet, no_probe};
use tch::Tensor;

/// Which output channels classifier-free guidance acts on.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum GuidedChannels {
    /// All channels of eps.
    All,
    /// The first three, as the official DiT does for reproducibility.
    FirstThree,
}

/// The model's output under classifier-free guidance: eps = uncond + scale·(cond − uncond) on the guided channels of
/// both halves; everything else stays as each half has it.
///
/// # Shapes
/// `x` [2N, C, H, W], of which the first half is used, twice; `t` [2N]; `labels` [2N], conditions first, then null
/// labels. Returns [2N, C or 2C, H, W].
///
/// # Source
/// Ho & Salimans 2021; halves and channels as the official DiT's `forward_with_cfg`.
pub fn forward_with_cfg(
    model: &dyn Model,
    weights: &WeightSet,
    x: &Tensor,
    t: &Tensor,
    labels: &Tensor,
    scale: f64,
    channels: GuidedChannels,
) -> Tensor {
    let half = x.narrow(0, 0, x.size()[0] / 2);
    let output = weights.forward(model, &Tensor::cat(&[&half, &half], 0), t, labels, &mut no_probe);
    let in_channels = x.size()[1];
    let guided = match channels {
        GuidedChannels::All => in_channels,
        GuidedChannels::FirstThree => in_channels.min(3),
    };
    let eps = output.narrow(1, 0, guided);
    let rest = output.narrow(1, guided, output.size()[1] - guided);
    let halves = eps.chunk(2, 0);
    let (cond, uncond) = (&halves[0], &halves[1]);
    let mixed = uncond + (cond - uncond) * scale;
    Tensor::cat(&[Tensor::cat(&[&mixed, &mixed], 0), rest], 1)
}
