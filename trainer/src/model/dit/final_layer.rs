//! The last segment, in the two forms that the designs end with: a modulated norm or one with an affine part, then a
//! linear layer to patches, zero at first.

use super::DitConfig;
use super::layers::{affine_norm, apply_linear, apply_norm, layer_norm, linear_from, modulate};
use crate::model::{Flow, Init, ParamSpec, Probe, Segment, Weights};
use tch::Tensor;

/// Multiply-adds of the linear layer and elements of the norm before it.
pub(super) fn macs(config: &DitConfig) -> i64 {
    let (tokens, d) = (config.tokens(), config.hidden_size);
    tokens * d * config.patch_outputs() + tokens * d
}

fn to_patches(config: &DitConfig) -> [ParamSpec; 2] {
    linear_from("linear", config.patch_outputs(), config.hidden_size, Init::Zeros)
}

/// Linear layer and unpatchify with the channel fastest: [N, T, D] → [N, C, H, W].
fn image(config: &DitConfig, w: &Weights, normed: &Tensor, probe: Probe) -> Flow {
    let (p, grid, channels) = (config.patch_size, config.grid(), config.out_channels());
    let tokens = apply_linear(w, "linear", normed); // [N, T, p·p·C]
    probe("final_tokens", &tokens);
    let image = tokens.view([-1, grid, grid, p, p, channels]).permute([0, 5, 1, 3, 2, 4]);
    Flow { state: vec![image.reshape([-1, channels, grid * p, grid * p])], context: Vec::new() }
}

/// The norm is modulated by the conditioning vector.
pub(super) struct AdaLnFinal {
    pub config: DitConfig,
    /// First values of the modulation's weight.
    pub modulation: Init,
}

impl Segment for AdaLnFinal {
    fn prefix(&self) -> &str {
        "final_layer."
    }

    fn params(&self) -> Vec<ParamSpec> {
        let d = self.config.hidden_size;
        let modulation = linear_from("adaLN_modulation.1", 2 * d, d, self.modulation.clone());
        to_patches(&self.config).into_iter().chain(modulation).collect()
    }

    fn forward(&self, w: &Weights, input: &Flow, probe: Probe) -> Flow {
        let (x, condition) = (&input.state[0], &input.context[0]);
        let ada = apply_linear(w, "adaLN_modulation.1", &condition.silu()); // [N, 2D]
        probe("final_ada", &ada);
        let chunks = ada.chunk(2, -1);
        image(&self.config, w, &modulate(&layer_norm(x), &chunks[0], &chunks[1]), probe)
    }
}

/// The norm has an affine part; tokens behind those of the image (in-context conditioning) are dropped.
pub(super) struct AffineFinal {
    pub config: DitConfig,
}

impl Segment for AffineFinal {
    fn prefix(&self) -> &str {
        "final_layer."
    }

    fn params(&self) -> Vec<ParamSpec> {
        affine_norm("norm_final", self.config.hidden_size).into_iter().chain(to_patches(&self.config)).collect()
    }

    fn forward(&self, w: &Weights, input: &Flow, probe: Probe) -> Flow {
        let of_image = input.state[0].narrow(1, 0, self.config.tokens());
        image(&self.config, w, &apply_norm(w, "norm_final", &of_image), probe)
    }
}
