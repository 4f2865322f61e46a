//! adaLN: as adaLN-Zero without gates. The modulation starts like any other linear layer (the paper does not say).

use super::adaln_zero::enter;
use super::final_layer::{self, AdaLnFinal};
use super::layers::{
    apply_linear, attention_and_mlp, attention_and_mlp_macs, layer_norm, linear, mlp, modulate, self_attention,
};
use super::{Design, DitConfig};
use crate::model::{Flow, Init, ParamSpec, Probe, Weights};
use tch::Tensor;

pub(super) const DESIGN: Design = Design {
    enter,
    block_params,
    block,
    final_layer: |config| {
        let d = config.hidden_size;
        Box::new(AdaLnFinal { config, modulation: Init::XavierUniform { fan_in: d, fan_out: 2 * d } })
    },
    block_macs: |c| {
        let (d, tokens) = (c.hidden_size, c.tokens());
        attention_and_mlp_macs(c, tokens) + 4 * d * d + 2 * tokens * d
    },
    final_macs: |c| final_layer::macs(c) + 2 * c.hidden_size * c.hidden_size,
};

fn block_params(config: &DitConfig) -> Vec<ParamSpec> {
    let d = config.hidden_size;
    attention_and_mlp(config).into_iter().chain(linear("adaLN_modulation.1", 4 * d, d)).collect()
}

/// x += attention(modulate(norm x)); x += mlp(modulate(norm x)).
fn block(config: &DitConfig, w: &Weights, input: &Flow, see: Probe) -> Tensor {
    let (x, condition) = (&input.state[0], &input.context[0]); // [N, T, D], [N, D]
    let ada = apply_linear(w, "adaLN_modulation.1", &condition.silu()); // [N, 4D]
    see("ada", &ada);
    let chunks = ada.chunk(4, -1);
    let [shift_msa, scale_msa, shift_mlp, scale_mlp] = &chunks[..] else { panic!("chunk(4) gives four tensors") };
    let norm1 = layer_norm(x);
    see("norm1", &norm1);
    let x = x + self_attention(w, config.num_heads, &modulate(&norm1, shift_msa, scale_msa), see);
    let mlp = mlp(w, &modulate(&layer_norm(&x), shift_mlp, scale_mlp), see);
    x + mlp
}
