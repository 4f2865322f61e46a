//! Cross-attention conditioning: the embeddings of time and label are a context of two tokens, to which a third branch
//! of each block attends, between self-attention and MLP.

use super::embedders::Embedded;
use super::final_layer::{self, AffineFinal};
use super::layers::{
    affine_norm, apply_norm, attention_and_mlp, attention_and_mlp_macs, cross_attention, linear, mlp, self_attention,
};
use super::{Design, DitConfig};
use crate::model::{Flow, ParamSpec, Probe, Segment, Weights};
use tch::Tensor;

/// Tokens of the context.
const CONTEXT_TOKENS: i64 = 2;

pub(super) const DESIGN: Design = Design {
    enter,
    block: |config, prefix| Box::new(Block { config, prefix }),
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

/// x += attention(norm x); x += cross_attention(norm x, context); x += mlp(norm x).
struct Block {
    config: DitConfig,
    prefix: String,
}

impl Segment for Block {
    fn prefix(&self) -> &str {
        &self.prefix
    }

    fn params(&self) -> Vec<ParamSpec> {
        let d = self.config.hidden_size;
        let groups = [
            affine_norm("norm1", d),
            affine_norm("norm_cross", d),
            affine_norm("norm2", d),
            linear("cross_attn.q", d, d),
            linear("cross_attn.kv", 2 * d, d),
            linear("cross_attn.proj", d, d),
        ];
        groups.into_iter().flatten().chain(attention_and_mlp(&self.config)).collect()
    }

    fn forward(&self, w: &Weights, input: &Flow, probe: Probe) -> Flow {
        let (x, context) = (&input.state[0], &input.context[0]); // [N, T, D], [N, 2, D]
        let heads = self.config.num_heads;
        let mut see = |name: &str, tensor: &_| probe(&format!("{}{name}", self.prefix), tensor);
        let norm1 = apply_norm(w, "norm1", x);
        let attention = self_attention(w, heads, &norm1, &mut see);
        let x = x + &attention;
        let cross = cross_attention(w, heads, &apply_norm(w, "norm_cross", &x), context);
        let x = x + &cross;
        let (mlp, activated) = mlp(w, &apply_norm(w, "norm2", &x));
        let x = x + &mlp;

        see("norm1", &norm1);
        see("attn", &attention);
        see("cross_attn", &cross);
        see("mlp_act", &activated);
        see("mlp", &mlp);
        see("", &x);
        Flow { state: vec![x], context: Vec::new() }
    }
}
