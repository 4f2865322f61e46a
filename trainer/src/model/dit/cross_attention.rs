//! Cross-attention conditioning: the embeddings of time and label are a context of two tokens, to which a third branch
//! of each block attends, between self-attention and MLP.

use super::block::{Part, Parts, UNGATED_FC2};
use super::embedders::Embedded;
use super::final_layer::{self, AffineFinal};
use super::layers::{
    affine_norm, apply_norm, attention_and_mlp_macs, attention_params, cross_attention, fc1, fc1_params, linear,
    self_attention,
};
use super::{Design, DitConfig};
use crate::model::{Flow, ParamSpec, Probe, Weights};
use tch::Tensor;

/// Tokens of the context.
const CONTEXT_TOKENS: i64 = 2;

pub(super) const DESIGN: Design = Design {
    enter,
    block: Parts {
        attention: Part { params: attention_part_params, forward: attention_part },
        fc1: AFFINE_FC1,
        fc2: UNGATED_FC2,
    },
    final_layer: |config| Box::new(AffineFinal { config }),
    block_macs: |c| {
        let (d, tokens) = (c.hidden_size, c.tokens());
        let projections = 2 * tokens * d * d + CONTEXT_TOKENS * 2 * d * d;
        attention_and_mlp_macs(c, tokens) + projections + 2 * tokens * CONTEXT_TOKENS * d + 3 * tokens * d
    },
    final_macs: final_layer::macs,
};

fn enter(embedded: Embedded, _: Probe) -> Flow {
    let Embedded { tokens, t_emb, y_emb } = embedded;
    Flow { state: vec![tokens], context: vec![Tensor::stack(&[t_emb, y_emb], 1)] } // [N, T, D], [N, 2, D]
}

fn attention_part_params(config: &DitConfig) -> Vec<ParamSpec> {
    let d = config.hidden_size;
    let groups = [
        affine_norm("norm1", d),
        affine_norm("norm_cross", d),
        linear("cross_attn.q", d, d),
        linear("cross_attn.kv", 2 * d, d),
        linear("cross_attn.proj", d, d),
    ];
    groups.into_iter().flatten().chain(attention_params(config)).collect()
}

/// x += attention(norm x); x += cross_attention(norm x, context).
fn attention_part(config: &DitConfig, w: &Weights, input: &Flow, see: Probe) -> Vec<Tensor> {
    let (x, context) = (&input.state[0], &input.context[0]); // [N, T, D], [N, 2, D]
    let norm1 = apply_norm(w, "norm1", x);
    see("norm1", &norm1);
    let x = x + self_attention(w, config.num_heads, &norm1, see);
    let cross = cross_attention(w, config.num_heads, &apply_norm(w, "norm_cross", &x), context);
    see("cross_attn", &cross);
    vec![x + cross]
}

/// x and fc1(norm x), as the plain ViT has it.
pub(super) const AFFINE_FC1: Part = Part {
    params: |config| affine_norm("norm2", config.hidden_size).into_iter().chain(fc1_params(config)).collect(),
    forward: |_, w, input, see| {
        let x = &input.state[0];
        vec![x.shallow_clone(), fc1(w, &apply_norm(w, "norm2", x), see)] // [N, T, D], [N, T, mlp_hidden]
    },
};
