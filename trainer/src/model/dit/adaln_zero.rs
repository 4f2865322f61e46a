//! adaLN-Zero, the official design: shift, scale and gate of both branches come from the conditioning vector, and all
//! are zero at first, so that every block begins as the identity.

use super::embedders::Embedded;
use super::final_layer::{self, AdaLnFinal};
use super::layers::{
    apply_linear, attention_and_mlp, attention_and_mlp_macs, layer_norm, layer_norm_eps, linear_from, mlp, modulate,
    self_attention,
};
use super::{Design, DitConfig};
use crate::model::{Flow, Init, ParamSpec, Probe, Weights};
use tch::Tensor;

pub(super) const DESIGN: Design = Design {
    enter,
    block_params,
    block,
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

fn block_params(config: &DitConfig) -> Vec<ParamSpec> {
    let d = config.hidden_size;
    let modulation = linear_from("adaLN_modulation.1", 6 * d, d, Init::Zeros);
    attention_and_mlp(config).into_iter().chain(modulation).collect()
}

/// x += gate·attention(modulate(norm x)); x += gate·mlp(modulate(norm x)).
fn block(config: &DitConfig, w: &Weights, input: &Flow, see: Probe) -> Tensor {
    let (x, condition) = (&input.state[0], &input.context[0]); // [N, T, D], [N, D]
    let ada = apply_linear(w, "adaLN_modulation.1", &condition.silu()); // [N, 6D]
    see("ada", &ada);
    let chunks = ada.chunk(6, -1);
    let [shift_msa, scale_msa, gate_msa, shift_mlp, scale_mlp, gate_mlp] = &chunks[..] else {
        panic!("chunk(6) gives six tensors")
    };
    let norm1 = layer_norm(x);
    see("norm1", &norm1);
    let attention = self_attention(w, config.num_heads, &modulate(&norm1, shift_msa, scale_msa), see);
    let x = x + gate_msa.unsqueeze(1) * attention;
    let norm2 = layer_norm_eps(&x, config.numerics.mlp_norm_eps);
    let mlp = mlp(w, &modulate(&norm2, shift_mlp, scale_mlp), see);
    x + gate_mlp.unsqueeze(1) * mlp
}
