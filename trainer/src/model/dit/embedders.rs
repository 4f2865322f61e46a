//! The first segment: latents, time and label become tokens and whatever the design conditions the blocks with.

use super::DitConfig;
use super::layers::{apply_linear, linear_from};
use crate::model::{Flow, Init, ParamSpec, Probe, Segment, Weights, shifted_timestep_embedding, sin_cos_2d};
use tch::Tensor;

/// Features of the timestep embedding before its MLP.
const FREQUENCY_DIM: i64 = 256;

/// What the embedders make of one micro-batch.
pub(super) struct Embedded {
    /// Patches with their positions, [N, T, D].
    pub tokens: Tensor,
    /// Of the timestep, [N, D].
    pub t_emb: Tensor,
    /// Of the label, [N, D].
    pub y_emb: Tensor,
}

/// Patch, timestep and label embedders, and the fixed position table.
pub(super) struct Embedders {
    pub config: DitConfig,
}

impl Embedders {
    pub(super) fn macs(config: &DitConfig) -> i64 {
        let d = config.hidden_size;
        config.tokens() * config.patch_inputs() * d + FREQUENCY_DIM * d + d * d
    }
}

impl Segment for Embedders {
    fn prefix(&self) -> &str {
        ""
    }

    fn params(&self) -> Vec<ParamSpec> {
        let c = &self.config;
        let (d, grid) = (c.hidden_size, c.grid());
        let table = sin_cos_2d(d, grid).into_iter().map(|v| v as f32).collect();
        let pos_embed =
            ParamSpec { trainable: false, ..ParamSpec::new("pos_embed", &[1, grid * grid, d], Init::Table(table)) };
        let normal = || Init::Normal { std: 0.02 };
        let mut params = vec![
            pos_embed,
            ParamSpec::new(
                "x_embedder.proj.weight",
                &[d, c.in_channels, c.patch_size, c.patch_size],
                Init::XavierUniform { fan_in: c.patch_inputs(), fan_out: d },
            ),
            ParamSpec::new("x_embedder.proj.bias", &[d], Init::Zeros),
        ];
        params.extend(linear_from("t_embedder.mlp.0", d, FREQUENCY_DIM, normal()));
        params.extend(linear_from("t_embedder.mlp.2", d, d, normal()));
        params.push(ParamSpec::new("y_embedder.embedding_table.weight", &[c.label_rows(), d], normal()));
        params
    }

    fn forward(&self, w: &Weights, input: &Flow, probe: Probe) -> Flow {
        let [x_t, t, labels] = &input.state[..] else { panic!("the first segment takes x_t, t and labels") };
        let c = &self.config;
        let (n, p, grid) = (x_t.size()[0], c.patch_size, c.grid());
        // A patch embedding is a linear layer over patches: [N, C, G, p, G, p] → [N, G, G, C, p, p] → [N, T, C·p·p].
        let patches = x_t.view([n, c.in_channels, grid, p, grid, p]).permute([0, 2, 4, 1, 3, 5]);
        let patches = patches.reshape([n, grid * grid, c.patch_inputs()]);
        let kernel = w["x_embedder.proj.weight"].view([c.hidden_size, -1]);
        let x_embed = patches.linear(&kernel, Some(&w["x_embedder.proj.bias"])); // [N, T, D]
        let tokens = &x_embed + &w["pos_embed"];

        let t_freq = shifted_timestep_embedding(t, FREQUENCY_DIM, c.numerics.freq_shift); // [N, 256]
        let t_emb = apply_linear(w, "t_embedder.mlp.2", &apply_linear(w, "t_embedder.mlp.0", &t_freq).silu());
        let y_emb = Tensor::embedding(&w["y_embedder.embedding_table.weight"], labels, -1, false, false);

        probe("x_embed", &x_embed);
        probe("pos_embed", &w["pos_embed"]);
        probe("tokens_in", &tokens);
        probe("t_freq", &t_freq);
        probe("t_emb", &t_emb);
        probe("y_emb", &y_emb);
        (c.design().enter)(Embedded { tokens, t_emb, y_emb }, probe)
    }
}
