//! In-context conditioning: the embeddings of time and label are two more tokens behind those of the image; the blocks
//! are those of a plain ViT.

use super::embedders::Embedded;
use super::final_layer::{self, AffineFinal};
use super::layers::{affine_norm, apply_norm, attention_and_mlp, attention_and_mlp_macs, mlp, self_attention};
use super::{Design, DitConfig};
use crate::model::{Flow, ParamSpec, Probe, Segment, Weights};
use tch::Tensor;

/// Tokens behind those of the image.
const EXTRA_TOKENS: i64 = 2;

pub(super) const DESIGN: Design = Design {
    enter,
    block: |config, prefix| Box::new(Block { config, prefix }),
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

/// x += attention(norm x); x += mlp(norm x).
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
        let norms = [affine_norm("norm1", d), affine_norm("norm2", d)];
        norms.into_iter().flatten().chain(attention_and_mlp(&self.config)).collect()
    }

    fn forward(&self, w: &Weights, input: &Flow, probe: Probe) -> Flow {
        let x = &input.state[0]; // [N, T + 2, D]
        let mut see = |name: &str, tensor: &_| probe(&format!("{}{name}", self.prefix), tensor);
        let norm1 = apply_norm(w, "norm1", x);
        let attention = self_attention(w, self.config.num_heads, &norm1, &mut see);
        let x = x + &attention;
        let (mlp, activated) = mlp(w, &apply_norm(w, "norm2", &x));
        let x = x + &mlp;

        see("norm1", &norm1);
        see("attn", &attention);
        see("mlp_act", &activated);
        see("mlp", &mlp);
        see("", &x);
        Flow { state: vec![x], context: Vec::new() }
    }
}
