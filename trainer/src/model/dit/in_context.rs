//! In-context conditioning: the embeddings of time and label are two more tokens behind those of the image; the blocks
//! are those of a plain ViT.

use super::embedders::Embedded;
use super::final_layer::{self, AffineFinal};
use super::layers::{affine_norm, apply_norm, attention_and_mlp, attention_and_mlp_macs, mlp, self_attention};
use super::{Design, DitConfig};
use crate::model::{Flow, ParamSpec, Probe, Weights};
use tch::Tensor;

/// Tokens behind those of the image.
const EXTRA_TOKENS: i64 = 2;

pub(super) const DESIGN: Design = Design {
    enter,
    block_params,
    block,
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

fn block_params(config: &DitConfig) -> Vec<ParamSpec> {
    let d = config.hidden_size;
    let norms = [affine_norm("norm1", d), affine_norm("norm2", d)];
    norms.into_iter().flatten().chain(attention_and_mlp(config)).collect()
}

/// x += attention(norm x); x += mlp(norm x).
fn block(config: &DitConfig, w: &Weights, input: &Flow, see: Probe) -> Tensor {
    let x = &input.state[0]; // [N, T + 2, D]
    let norm1 = apply_norm(w, "norm1", x);
    see("norm1", &norm1);
    let x = x + self_attention(w, config.num_heads, &norm1, see);
    let mlp = mlp(w, &apply_norm(w, "norm2", &x), see);
    x + mlp
}
