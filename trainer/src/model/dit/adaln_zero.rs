//! adaLN-Zero, the official design: shift, scale and gate of both branches come from the conditioning vector, and all
//! are zero at first, so that every block begins as the identity.

use super::block::{Part, Parts};
use super::embedders::Embedded;
use super::final_layer::{self, AdaLnFinal};
use super::layers::{
    apply_linear, attention_and_mlp_macs, attention_params, fc1, fc1_params, fc2, fc2_params, layer_norm,
    layer_norm_eps, linear_from, modulate, self_attention,
};
use super::{Design, DitConfig};
use crate::model::{Flow, Init, ParamSpec, Probe, Weights};
use tch::Tensor;

pub(super) const DESIGN: Design = Design {
    enter,
    block: Parts {
        attention: Part { params: attention_part_params, forward: attention_part },
        fc1: Part { params: fc1_params, forward: fc1_part },
        fc2: Part { params: fc2_params, forward: fc2_part },
    },
    final_layer: |config| Box::new(AdaLnFinal { config, modulation: Init::Zeros }),
    block_macs: |c| {
        let (d, tokens) = (c.hidden_size, c.tokens());
        attention_and_mlp_macs(c, tokens) + 6 * d * d + 2 * tokens * d
    },
    final_macs: |c| final_layer::macs(c) + 2 * c.hidden_size * c.hidden_size,
};

/// Tokens as state, the conditioning vector c = t + y as context.
pub(super) fn enter(embedded: Embedded, probe: Probe) -> Flow {
    let Embedded { tokens, t_emb, y_emb } = embedded;
    let condition = t_emb + y_emb; // [N, D]
    probe("c", &condition);
    Flow { state: vec![tokens], context: vec![condition] }
}

/// The official block declares the modulation last, though its first part computes it.
pub(super) fn last(modulation: ParamSpec) -> ParamSpec {
    ParamSpec { last_of_prefix: true, ..modulation }
}

fn attention_part_params(config: &DitConfig) -> Vec<ParamSpec> {
    let d = config.hidden_size;
    let modulation = linear_from("adaLN_modulation.1", 6 * d, d, Init::Zeros);
    attention_params(config).into_iter().chain(modulation.map(last)).collect()
}

/// x += gate·attention(modulate(norm x)), and the MLP's part of the modulation.
fn attention_part(config: &DitConfig, w: &Weights, input: &Flow, see: Probe) -> Vec<Tensor> {
    let (x, condition) = (&input.state[0], &input.context[0]); // [N, T, D], [N, D]
    let ada = apply_linear(w, "adaLN_modulation.1", &condition.silu()); // [N, 6D]
    see("ada", &ada);
    let halves = ada.chunk(2, -1);
    let [shift, scale, gate] = shift_scale_gate(&halves[0]);
    let norm1 = layer_norm(x);
    see("norm1", &norm1);
    let attention = self_attention(w, config.num_heads, &modulate(&norm1, &shift, &scale), see);
    vec![x + gate.unsqueeze(1) * attention, halves[1].shallow_clone()] // [N, T, D], [N, 3D]
}

/// x, the gate, and fc1(modulate(norm x)).
fn fc1_part(config: &DitConfig, w: &Weights, input: &Flow, see: Probe) -> Vec<Tensor> {
    let [x, modulation] = &input.state[..] else { panic!("fc1 takes tokens and modulation") };
    let [shift, scale, gate] = shift_scale_gate(modulation);
    let norm2 = layer_norm_eps(x, config.numerics.mlp_norm_eps);
    let hidden = fc1(w, &modulate(&norm2, &shift, &scale), see);
    vec![x.shallow_clone(), gate, hidden] // [N, T, D], [N, D], [N, T, mlp_hidden]
}

/// x += gate·fc2(hidden).
fn fc2_part(_: &DitConfig, w: &Weights, input: &Flow, see: Probe) -> Vec<Tensor> {
    let [x, gate, hidden] = &input.state[..] else { panic!("fc2 takes tokens, gate and the MLP's middle") };
    vec![x + gate.unsqueeze(1) * fc2(w, hidden, see)]
}

/// [N, 3D] → three of [N, D].
fn shift_scale_gate(modulation: &Tensor) -> [Tensor; 3] {
    let width = modulation.size()[1] / 3;
    std::array::from_fn(|part| modulation.narrow(1, part as i64 * width, width))
}
