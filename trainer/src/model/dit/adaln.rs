//! adaLN: as adaLN-Zero without gates. The modulation starts like any other linear layer (the paper does not say).

use super::adaln_zero::enter;
use super::final_layer::{self, AdaLnFinal};
use super::layers::{
    apply_linear, attention_and_mlp, attention_and_mlp_macs, layer_norm, linear, mlp, modulate, self_attention,
};
use super::{Design, DitConfig};
use crate::model::{Flow, Init, ParamSpec, Probe, Segment, Weights};

pub(super) const DESIGN: Design = Design {
    enter,
    block: |config, prefix| Box::new(Block { config, prefix }),
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

/// x += attention(modulate(norm x)); x += mlp(modulate(norm x)).
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
        attention_and_mlp(&self.config).into_iter().chain(linear("adaLN_modulation.1", 4 * d, d)).collect()
    }

    fn forward(&self, w: &Weights, input: &Flow, probe: Probe) -> Flow {
        let (x, condition) = (&input.state[0], &input.context[0]); // [N, T, D], [N, D]
        let ada = apply_linear(w, "adaLN_modulation.1", &condition.silu()); // [N, 4D]
        let chunks = ada.chunk(4, -1);
        let [shift_msa, scale_msa, shift_mlp, scale_mlp] = &chunks[..] else { panic!("chunk(4) gives four tensors") };
        let mut see = |name: &str, tensor: &_| probe(&format!("{}{name}", self.prefix), tensor);

        let norm1 = layer_norm(x);
        let attention = self_attention(w, self.config.num_heads, &modulate(&norm1, shift_msa, scale_msa), &mut see);
        let x = x + &attention;
        let (mlp, activated) = mlp(w, &modulate(&layer_norm(&x), shift_mlp, scale_mlp));
        let x = x + &mlp;

        see("ada", &ada);
        see("norm1", &norm1);
        see("attn", &attention);
        see("mlp_act", &activated);
        see("mlp", &mlp);
        see("", &x);
        Flow { state: vec![x], context: Vec::new() }
    }
}
