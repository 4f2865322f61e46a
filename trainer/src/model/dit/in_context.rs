//! In-context conditioning: the embeddings of time and label are two more tokens behind those of the image; the blocks
//! are those of a plain ViT.

use super::block::{Part, Parts, UNGATED_FC2};
use super::cross_attention::AFFINE_FC1;
use super::embedders::Embedded;
use super::final_layer::{self, AffineFinal};
use super::layers::{affine_norm, apply_norm, attention_and_mlp_macs, attention_params, self_attention};
use super::{Design, DitConfig};
use crate::model::{Flow, ParamSpec, Probe, Weights};
use tch::Tensor;

/// Tokens behind those of the image.
const EXTRA_TOKENS: i64 = 2;

pub(super) const DESIGN: Design = Design {
    enter,
    block: Parts {
        attention: Part { params: attention_part_params, forward: attention_part },
        fc1: AFFINE_FC1,
        fc2: UNGATED_FC2,
    },
    final_layer: |config| Box::new(AffineFinal { config }),
    block_macs: |c| {
        let tokens = c.tokens() + EXTRA_TOKENS;
        attention_and_mlp_macs(c, tokens) + 2 * tokens * c.hidden_size
    },
    final_macs: final_layer::macs,
};

fn enter(embedded: Embedded, _: Probe) -> Flow {
    let Embedded { tokens, t_emb, y_emb } = embedded;
    let joined = Tensor::cat(&[tokens, t_emb.unsqueeze(1), y_emb.unsqueeze(1)], 1); // [N, T + 2, D]
    Flow { state: vec![joined], context: Vec::new() }
}

fn attention_part_params(config: &DitConfig) -> Vec<ParamSpec> {
    affine_norm("norm1", config.hidden_size).into_iter().chain(attention_params(config)).collect()
}

/// x += attention(norm x).
fn attention_part(config: &DitConfig, w: &Weights, input: &Flow, see: Probe) -> Vec<Tensor> {
    let x = &input.state[0]; // [N, T + 2, D]
    let norm1 = apply_norm(w, "norm1", x);
    see("norm1", &norm1);
    vec![x + self_attention(w, config.num_heads, &norm1, see)]
}
