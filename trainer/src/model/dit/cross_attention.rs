//! Cross-attention conditioning: the embeddings of time and label are a context of two tokens, to which a third branch
//! of each block attends, between self-attention and MLP.

use super::embedders::Embedded;
use super::final_layer::{self, AffineFinal};
use super::layers::{
    affine_norm, apply_norm, attention_and_mlp, attention_and_mlp_macs, cross_attention, linear, mlp, self_attention,
};
use super::{Design, DitConfig};
use crate::model::{Flow, ParamSpec, Probe, Weights};
use tch::Tensor;

/// Tokens of the context.
const CONTEXT_TOKENS: i64 = 2;

pub(super) const DESIGN: Design = Design {
    enter,
    block_params,
    block,
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

fn block_params(config: &DitConfig) -> Vec<ParamSpec> {
    let d = config.hidden_size;
    let groups = [
        affine_norm("norm1", d),
        affine_norm("norm_cross", d),
        affine_norm("norm2", d),
        linear("cross_attn.q", d, d),
        linear("cross_attn.kv", 2 * d, d),
        linear("cross_attn.proj", d, d),
    ];
    groups.into_iter().flatten().chain(attention_and_mlp(config)).collect()
}

/// x += attention(norm x); x += cross_attention(norm x, context); x += mlp(norm x).
fn block(config: &DitConfig, w: &Weights, input: &Flow, see: Probe) -> Tensor {
    let (x, context) = (&input.state[0], &input.context[0]); // [N, T, D], [N, 2, D]
    let norm1 = apply_norm(w, "norm1", x);
    see("norm1", &norm1);
    let x = x + self_attention(w, config.num_heads, &norm1, see);
    let cross = cross_attention(w, config.num_heads, &apply_norm(w, "norm_cross", &x), context);
    see("cross_attn", &cross);
    let x = x + cross;
    let mlp = mlp(w, &apply_norm(w, "norm2", &x), see);
    x + mlp
}
