//! DiT with adaLN-Zero conditioning (Peebles & Xie 2023, section 3.2), with the parameter names, ranges and
//! initialisation of the official code.

use super::{Flow, Init, Model, ParamSpec, Probe, Segment, Weights, sin_cos_2d, timestep_embedding};
use serde::{Deserialize, Serialize};
use tch::Tensor;

/// Features of the timestep embedding before its MLP.
const FREQUENCY_DIM: i64 = 256;
/// Epsilon of every LayerNorm; none has an affine part.
const NORM_EPS: f64 = 1e-6;

/// Dimensions of a DiT.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct DitConfig {
    /// Side of the (square) latent.
    pub input_size: i64,
    /// Channels of the latent.
    pub in_channels: i64,
    /// Side of a patch; divides `input_size`.
    pub patch_size: i64,
    /// Width; a multiple of 4 and of `num_heads`.
    pub hidden_size: i64,
    /// Blocks.
    pub depth: i64,
    /// Attention heads.
    pub num_heads: i64,
    /// MLP width over hidden width.
    pub mlp_ratio: f64,
    /// Share of labels replaced by the null label in training; above 0 the label table has one more row.
    pub class_dropout_prob: f64,
    /// Classes.
    pub num_classes: i64,
    /// Whether the output has a second half of channels for the variance.
    pub learn_sigma: bool,
}

impl DitConfig {
    fn out_channels(&self) -> i64 {
        if self.learn_sigma { 2 * self.in_channels } else { self.in_channels }
    }
    fn grid(&self) -> i64 {
        self.input_size / self.patch_size
    }
    fn mlp_hidden(&self) -> i64 {
        (self.hidden_size as f64 * self.mlp_ratio) as i64
    }

    fn problems(&self) -> Vec<String> {
        let mut problems = Vec::new();
        let mut require = |fine: bool, problem: String| {
            if !fine {
                problems.push(problem);
            }
        };
        let Self { input_size, patch_size, hidden_size, num_heads, .. } = *self;
        require(
            patch_size > 0 && input_size > 0 && input_size % patch_size.max(1) == 0,
            format!("patch_size {patch_size} does not divide the latent's side {input_size}"),
        );
        require(
            num_heads > 0 && hidden_size > 0 && hidden_size % num_heads.max(1) == 0,
            format!("num_heads {num_heads} does not divide hidden_size {hidden_size}"),
        );
        require(hidden_size % 4 == 0, format!("hidden_size {hidden_size} is not a multiple of 4"));
        require(self.depth > 0 && self.in_channels > 0, "depth and in_channels must be positive".to_owned());
        let mlp_hidden = self.mlp_hidden();
        let sane = (1..=1 << 24).contains(&mlp_hidden);
        require(sane, format!("mlp_ratio {} gives an MLP {mlp_hidden} wide", self.mlp_ratio));
        require(self.num_classes > 0, "num_classes must be positive".to_owned());
        require(
            (0.0..=1.0).contains(&self.class_dropout_prob),
            format!("class_dropout_prob {} is not in 0..=1", self.class_dropout_prob),
        );
        problems
    }
}

/// Dimensions that do not fit together.
#[derive(Debug, thiserror::Error)]
#[error("this DiT cannot be built: {0}")]
pub struct DitConfigError(String);

/// A DiT: embedders, `depth` blocks, final layer.
pub struct Dit {
    config: DitConfig,
    segments: Vec<Box<dyn Segment>>,
    latent_shape: [i64; 3],
}

impl Dit {
    /// A DiT of these dimensions.
    ///
    /// # Errors
    /// [`DitConfigError`] lists everything that does not fit.
    pub fn new(config: DitConfig) -> Result<Self, DitConfigError> {
        let problems = config.problems();
        if !problems.is_empty() {
            return Err(DitConfigError(problems.join("; ")));
        }
        let mut segments: Vec<Box<dyn Segment>> = vec![Box::new(Embedders { config: config.clone() })];
        for index in 0..config.depth {
            segments.push(Box::new(Block { config: config.clone(), prefix: format!("blocks.{index}.") }));
        }
        segments.push(Box::new(FinalLayer { config: config.clone() }));
        let latent_shape = [config.in_channels, config.input_size, config.input_size];
        Ok(Self { config, segments, latent_shape })
    }

    /// Its dimensions.
    pub fn config(&self) -> &DitConfig {
        &self.config
    }
}

impl Model for Dit {
    fn segments(&self) -> &[Box<dyn Segment>] {
        &self.segments
    }

    fn input(&self, x_t: &Tensor, t: &Tensor, labels: &Tensor) -> Flow {
        Flow { state: vec![x_t.shallow_clone(), t.shallow_clone(), labels.shallow_clone()], context: Vec::new() }
    }

    fn latent_shape(&self) -> &[i64] {
        &self.latent_shape
    }

    fn null_label(&self) -> Option<i64> {
        (self.config.class_dropout_prob > 0.0).then_some(self.config.num_classes)
    }

    fn label_dropout(&self) -> f64 {
        self.config.class_dropout_prob
    }

    fn learn_sigma(&self) -> bool {
        self.config.learn_sigma
    }

    fn macs_per_sample(&self) -> u64 {
        let c = &self.config;
        let (d, tokens, patch) = (c.hidden_size, c.grid() * c.grid(), c.patch_size * c.patch_size);
        let attention_and_mlp = (4 * d * d + 2 * d * c.mlp_hidden()) * tokens + 2 * tokens * tokens * d;
        let block = attention_and_mlp + 6 * d * d;
        let embedders = tokens * patch * c.in_channels * d + FREQUENCY_DIM * d + d * d;
        let final_layer = 2 * d * d + tokens * d * patch * c.out_channels();
        (c.depth * block + embedders + final_layer) as u64
    }
}

/// Weight and bias of a linear layer with the ViT initialisation: Xavier-uniform, zero bias.
fn linear(name: &str, out_features: i64, in_features: i64) -> [ParamSpec; 2] {
    let weight = Init::XavierUniform { fan_in: in_features, fan_out: out_features };
    linear_from(name, out_features, in_features, weight)
}

fn linear_from(name: &str, out_features: i64, in_features: i64, weight: Init) -> [ParamSpec; 2] {
    [
        ParamSpec::new(&format!("{name}.weight"), &[out_features, in_features], weight),
        ParamSpec::new(&format!("{name}.bias"), &[out_features], Init::Zeros),
    ]
}

fn apply_linear(weights: &Weights, name: &str, input: &Tensor) -> Tensor {
    input.linear(&weights[&format!("{name}.weight")], Some(&weights[&format!("{name}.bias")]))
}

/// LayerNorm without affine part over the last dimension.
fn layer_norm(x: &Tensor) -> Tensor {
    let width = x.size().last().copied().unwrap_or(1);
    x.layer_norm([width], None::<&Tensor>, None::<&Tensor>, NORM_EPS, false)
}

/// x·(1 + scale) + shift, one shift and scale for all tokens of a sample.
///
/// # Shapes
/// `x` [N, T, D]; `shift`, `scale` [N, D].
fn modulate(x: &Tensor, shift: &Tensor, scale: &Tensor) -> Tensor {
    x * (scale.unsqueeze(1) + 1.0) + shift.unsqueeze(1)
}

/// Patch, timestep and label embedders, and the fixed position table. Context: the conditioning vector c.
struct Embedders {
    config: DitConfig,
}

impl Segment for Embedders {
    fn prefix(&self) -> &str {
        ""
    }

    fn params(&self) -> Vec<ParamSpec> {
        let c = &self.config;
        let (d, grid) = (c.hidden_size, c.grid());
        let patch_inputs = c.in_channels * c.patch_size * c.patch_size;
        let table = sin_cos_2d(d, grid).into_iter().map(|v| v as f32).collect();
        let pos_embed =
            ParamSpec { trainable: false, ..ParamSpec::new("pos_embed", &[1, grid * grid, d], Init::Table(table)) };
        let normal = || Init::Normal { std: 0.02 };
        let mut params = vec![
            pos_embed,
            ParamSpec::new(
                "x_embedder.proj.weight",
                &[d, c.in_channels, c.patch_size, c.patch_size],
                Init::XavierUniform { fan_in: patch_inputs, fan_out: d },
            ),
            ParamSpec::new("x_embedder.proj.bias", &[d], Init::Zeros),
        ];
        params.extend(linear_from("t_embedder.mlp.0", d, FREQUENCY_DIM, normal()));
        params.extend(linear_from("t_embedder.mlp.2", d, d, normal()));
        let rows = c.num_classes + i64::from(c.class_dropout_prob > 0.0);
        params.push(ParamSpec::new("y_embedder.embedding_table.weight", &[rows, d], normal()));
        params
    }

    fn forward(&self, w: &Weights, input: &Flow, probe: Probe) -> Flow {
        let [x_t, t, labels] = &input.state[..] else { panic!("the first segment takes x_t, t and labels") };
        let c = &self.config;
        let (n, p, grid) = (x_t.size()[0], c.patch_size, c.grid());
        // A patch embedding is a linear layer over patches: [N, C, G, p, G, p] → [N, G, G, C, p, p] → [N, T, C·p·p].
        let patches = x_t.view([n, c.in_channels, grid, p, grid, p]).permute([0, 2, 4, 1, 3, 5]);
        let patches = patches.reshape([n, grid * grid, c.in_channels * p * p]);
        let kernel = w["x_embedder.proj.weight"].view([c.hidden_size, -1]);
        let x_embed = patches.linear(&kernel, Some(&w["x_embedder.proj.bias"])); // [N, T, D]
        let tokens = &x_embed + &w["pos_embed"];

        let t_freq = timestep_embedding(t, FREQUENCY_DIM); // [N, 256]
        let t_emb = apply_linear(w, "t_embedder.mlp.2", &apply_linear(w, "t_embedder.mlp.0", &t_freq).silu());
        let y_emb = Tensor::embedding(&w["y_embedder.embedding_table.weight"], labels, -1, false, false);
        let condition = &t_emb + &y_emb; // [N, D]

        probe("x_embed", &x_embed);
        probe("pos_embed", &w["pos_embed"]);
        probe("tokens_in", &tokens);
        probe("t_freq", &t_freq);
        probe("t_emb", &t_emb);
        probe("y_emb", &y_emb);
        probe("c", &condition);
        Flow { state: vec![tokens], context: vec![condition] }
    }
}

/// A transformer block with adaLN-Zero: x += gate·attention(modulate(norm x)); x += gate·mlp(modulate(norm x)).
struct Block {
    config: DitConfig,
    prefix: String,
}

impl Segment for Block {
    fn prefix(&self) -> &str {
        &self.prefix
    }

    fn params(&self) -> Vec<ParamSpec> {
        let (d, mlp) = (self.config.hidden_size, self.config.mlp_hidden());
        let groups = [
            linear("attn.qkv", 3 * d, d),
            linear("attn.proj", d, d),
            linear("mlp.fc1", mlp, d),
            linear("mlp.fc2", d, mlp),
            linear_from("adaLN_modulation.1", 6 * d, d, Init::Zeros),
        ];
        groups.into_iter().flatten().collect()
    }

    fn forward(&self, w: &Weights, input: &Flow, probe: Probe) -> Flow {
        let (x, condition) = (&input.state[0], &input.context[0]); // [N, T, D], [N, D]
        let ada = apply_linear(w, "adaLN_modulation.1", &condition.silu()); // [N, 6D]
        let chunks = ada.chunk(6, -1);
        let [shift_msa, scale_msa, gate_msa, shift_mlp, scale_mlp, gate_mlp] = &chunks[..] else {
            panic!("chunk(6) gives six tensors")
        };
        let mut see = |name: &str, tensor: &Tensor| probe(&format!("{}{name}", self.prefix), tensor);

        let norm1 = layer_norm(x);
        let attention = self.attention(w, &modulate(&norm1, shift_msa, scale_msa), &mut see);
        let x = x + gate_msa.unsqueeze(1) * &attention;
        let hidden = apply_linear(w, "mlp.fc1", &modulate(&layer_norm(&x), shift_mlp, scale_mlp));
        let activated = hidden.gelu("tanh");
        let mlp = apply_linear(w, "mlp.fc2", &activated);
        let x = x + gate_mlp.unsqueeze(1) * &mlp;

        see("ada", &ada);
        see("norm1", &norm1);
        see("attn", &attention);
        see("mlp_act", &activated);
        see("mlp", &mlp);
        see("", &x);
        Flow { state: vec![x], context: Vec::new() }
    }
}

impl Block {
    /// Multi-head self-attention; rows of `qkv` are [q | k | v], each head-major.
    fn attention(&self, w: &Weights, x: &Tensor, see: Probe) -> Tensor {
        let (n, tokens, d) = x.size3().unwrap_or_else(|_| panic!("attention takes [N, T, D]"));
        let heads = self.config.num_heads;
        let qkv = apply_linear(w, "attn.qkv", x); // [N, T, 3D]
        see("qkv", &qkv);
        let split = qkv.view([n, tokens, 3, heads, d / heads]).permute([2, 0, 3, 1, 4]); // [3, N, heads, T, D/heads]
        let (q, k, v) = (split.get(0), split.get(1), split.get(2));
        let mixed = Tensor::scaled_dot_product_attention(&q, &k, &v, None::<&Tensor>, 0.0, false, None, false);
        apply_linear(w, "attn.proj", &mixed.transpose(1, 2).reshape([n, tokens, d]))
    }
}

/// Modulated norm and linear to patches; unpatchify with the channel fastest.
struct FinalLayer {
    config: DitConfig,
}

impl Segment for FinalLayer {
    fn prefix(&self) -> &str {
        "final_layer."
    }

    fn params(&self) -> Vec<ParamSpec> {
        let c = &self.config;
        let out = c.patch_size * c.patch_size * c.out_channels();
        let groups = [
            linear_from("linear", out, c.hidden_size, Init::Zeros),
            linear_from("adaLN_modulation.1", 2 * c.hidden_size, c.hidden_size, Init::Zeros),
        ];
        groups.into_iter().flatten().collect()
    }

    fn forward(&self, w: &Weights, input: &Flow, probe: Probe) -> Flow {
        let (x, condition) = (&input.state[0], &input.context[0]);
        let c = &self.config;
        let (p, grid, channels) = (c.patch_size, c.grid(), c.out_channels());
        let ada = apply_linear(w, "adaLN_modulation.1", &condition.silu()); // [N, 2D]
        let chunks = ada.chunk(2, -1);
        let tokens = apply_linear(w, "linear", &modulate(&layer_norm(x), &chunks[0], &chunks[1])); // [N, T, p·p·C]
        let image = tokens.view([-1, grid, grid, p, p, channels]).permute([0, 5, 1, 3, 2, 4]);
        let output = image.reshape([-1, channels, grid * p, grid * p]);
        probe("final_ada", &ada);
        probe("final_tokens", &tokens);
        Flow { state: vec![output], context: Vec::new() }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Name, parameters with and without the position table, multiply-adds in millions, for 32×32×4 latents.
    const SIZES: [(&str, usize, usize, f64); 12] = [
        ("DiT-S/2", 32_963_360, 32_865_056, 6055.7),
        ("DiT-S/4", 32_945_024, 32_920_448, 1412.6),
        ("DiT-S/8", 33_148_160, 33_142_016, 358.0),
        ("DiT-B/2", 130_512_416, 130_315_808, 23005.1),
        ("DiT-B/4", 130_475_648, 130_426_496, 5565.2),
        ("DiT-B/8", 130_881_536, 130_869_248, 1417.5),
        ("DiT-L/2", 458_102_816, 457_840_672, 80697.6),
        ("DiT-L/4", 458_053_760, 457_988_224, 19695.7),
        ("DiT-L/8", 458_594_816, 458_578_432, 5011.4),
        ("DiT-XL/2", 675_129_632, 674_834_720, 118_621.4),
        ("DiT-XL/4", 675_074_432, 675_000_704, 29043.7),
        ("DiT-XL/8", 675_683_072, 675_664_640, 7392.4),
    ];

    #[test]
    fn all_twelve_presets_have_the_official_parameter_and_flop_counts() {
        assert_eq!(configs::presets::ALL.len(), SIZES.len());
        for (name, params, trainable, mega_macs) in SIZES {
            let preset = configs::presets::by_name(name).expect(name);
            let dit = Dit::new(DitConfig {
                input_size: 32,
                in_channels: 4,
                patch_size: preset.patch_size as i64,
                hidden_size: preset.hidden_size as i64,
                depth: preset.depth as i64,
                num_heads: preset.num_heads as i64,
                mlp_ratio: 4.0,
                class_dropout_prob: 0.1,
                num_classes: 1000,
                learn_sigma: true,
            });
            let dit = dit.expect(name);
            assert_eq!(dit.numel(), params, "{name}");
            let found: usize = dit.named_params().iter().filter(|(_, s)| s.trainable).map(|(_, s)| s.numel()).sum();
            assert_eq!(found, trainable, "{name}");
            let found = dit.macs_per_sample() as f64 / 1e6;
            assert!((found - mega_macs).abs() < 0.051, "{name}: {found} million multiply-adds");
        }
    }
}
