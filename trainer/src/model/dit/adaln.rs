//! adaLN: as adaLN-Zero without gates. The modulation starts like any other linear layer (the paper does not say).

use super::adaln_zero::{enter, last};
use super::block::{Part, Parts, UNGATED_FC2};
use super::final_layer::{self, AdaLnFinal};
use super::layers::{
    apply_linear, attention_and_mlp_macs, attention_params, fc1, fc1_params, layer_norm, linear, modulate,
    self_attention,
};
use super::{Design, DitConfig};
use crate::model::{Flow, Init, ParamSpec, Probe, Weights};
use tch::Tensor;

pub(super) const DESIGN: Design = Design {
    enter,
    block: Parts {
        attention: Part { params: attention_part_params, forward: attention_part },
        fc1: Part { params: fc1_params, forward: fc1_part },
        fc2: UNGATED_FC2,
    },
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

fn attention_part_params(config: &DitConfig) -> Vec<ParamSpec> {
    let d = config.hidden_size;
    attention_params(config).into_iter().chain(linear("adaLN_modulation.1", 4 * d, d).map(last)).collect()
}

/// x += attention(modulate(norm x)), and the MLP's part of the modulation.
fn attention_part(config: &DitConfig, w: &Weights, input: &Flow, see: Probe) -> Vec<Tensor> {
    let (x, condition) = (&input.state[0], &input.context[0]); // [N, T, D], [N, D]
    let ada = apply_linear(w, "adaLN_modulation.1", &condition.silu()); // [N, 4D]
    see("ada", &ada);
    let halves = ada.chunk(2, -1);
    let norm1 = layer_norm(x);
    see("norm1", &norm1);
    let x = x + self_attention(w, config.num_heads, &shifted_and_scaled(&norm1, &halves[0]), see);
    vec![x, halves[1].shallow_clone()] // [N, T, D], [N, 2D]
}

/// x and fc1(modulate(norm x)).
fn fc1_part(_: &DitConfig, w: &Weights, input: &Flow, see: Probe) -> Vec<Tensor> {
    let [x, modulation] = &input.state[..] else { panic!("fc1 takes tokens and modulation") };
    vec![x.shallow_clone(), fc1(w, &shifted_and_scaled(&layer_norm(x), modulation), see)] // [N, T, D], [N, T, mlp_hidden]
}

/// `x` modulated by [N, 2D].
fn shifted_and_scaled(x: &Tensor, modulation: &Tensor) -> Tensor {
    let chunks = modulation.chunk(2, -1);
    modulate(x, &chunks[0], &chunks[1])
}
