//! DiT (Peebles & Xie 2023, section 3.2) with each of the paper's four conditioning designs. adaLN-Zero has the parameter
//! names, ranges and initialisation of the official code; of the others there is only the paper.

mod adaln;
mod adaln_zero;
mod block;
mod cross_attention;
mod embedders;
mod final_layer;
mod in_context;
mod layers;
mod numerics;
pub mod refit;

use super::{Flow, Model, Probe, Segment};
pub use configs::Conditioning;
pub use numerics::Numerics;

use block::{BlockPart, Parts};
use embedders::{Embedded, Embedders};
use serde::{Deserialize, Serialize};
use tch::Tensor;

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
    /// How time and label reach the blocks.
    #[serde(default, skip_serializing_if = "configs::is_default")]
    pub conditioning: Conditioning,
    /// Constants that are not the official code's, of a model that was trained elsewhere.
    #[serde(default, skip_serializing_if = "Numerics::is_default")]
    pub numerics: Numerics,
}

/// What makes a conditioning design: how the embedders' work enters the chain, its block and its final layer.
struct Design {
    enter: fn(Embedded, Probe) -> Flow,
    block: Parts,
    final_layer: fn(DitConfig) -> Box<dyn Segment>,
    block_macs: fn(&DitConfig) -> i64,
    final_macs: fn(&DitConfig) -> i64,
}

impl DitConfig {
    fn design(&self) -> &'static Design {
        match self.conditioning {
            Conditioning::AdaLnZero => &adaln_zero::DESIGN,
            Conditioning::AdaLn => &adaln::DESIGN,
            Conditioning::CrossAttention => &cross_attention::DESIGN,
            Conditioning::InContext => &in_context::DESIGN,
        }
    }
    fn out_channels(&self) -> i64 {
        if self.learn_sigma { 2 * self.in_channels } else { self.in_channels }
    }
    fn grid(&self) -> i64 {
        self.input_size / self.patch_size
    }
    fn tokens(&self) -> i64 {
        self.grid() * self.grid()
    }
    fn patch_inputs(&self) -> i64 {
        self.in_channels * self.patch_size * self.patch_size
    }
    fn patch_outputs(&self) -> i64 {
        self.out_channels() * self.patch_size * self.patch_size
    }
    /// Rows of the label table: one more than classes where labels are dropped.
    fn label_rows(&self) -> i64 {
        self.num_classes + i64::from(self.class_dropout_prob > 0.0)
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
        let Numerics { freq_shift, mlp_norm_eps } = self.numerics;
        require(
            (0.0..=1.0).contains(&freq_shift) && mlp_norm_eps > 0.0 && mlp_norm_eps < 1.0,
            format!("numerics.freq_shift {freq_shift} or numerics.mlp_norm_eps {mlp_norm_eps} is out of range"),
        );
        require(
            self.numerics.is_default() || self.conditioning == Conditioning::AdaLnZero,
            "only adaln-zero models come with numerics other than the official code's".to_owned(),
        );
        problems
    }
}

/// Dimensions that do not fit together.
#[derive(Debug, thiserror::Error)]
#[error("this DiT cannot be built: {0}")]
pub struct DitConfigError(String);

/// A DiT: embedders, `depth` blocks of three segments each, final layer.
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
            segments.extend(BlockPart::of_block(&config, index));
        }
        segments.push((config.design().final_layer)(config.clone()));
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
        let (c, design) = (&self.config, self.config.design());
        (Embedders::macs(c) + c.depth * (design.block_macs)(c) + (design.final_macs)(c)) as u64
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Name, parameters with and without the position table, billion multiply-adds, for 32×32×4 latents.
    const SIZES: [(&str, usize, usize, f64); 12] = [
        ("DiT-S/2", 32_963_360, 32_865_056, 6.0581),
        ("DiT-S/4", 32_945_024, 32_920_448, 1.4132),
        ("DiT-S/8", 33_148_160, 33_142_016, 0.3581),
        ("DiT-B/2", 130_512_416, 130_315_808, 23.0100),
        ("DiT-B/4", 130_475_648, 130_426_496, 5.5664),
        ("DiT-B/8", 130_881_536, 130_869_248, 1.4179),
        ("DiT-L/2", 458_102_816, 457_840_672, 80.7105),
        ("DiT-L/4", 458_053_760, 457_988_224, 19.6989),
        ("DiT-L/8", 458_594_816, 458_578_432, 5.0122),
        ("DiT-XL/2", 675_129_632, 674_834_720, 118.6382),
        ("DiT-XL/4", 675_074_432, 675_000_704, 29.0479),
        ("DiT-XL/8", 675_683_072, 675_664_640, 7.3935),
    ];

    /// The paper's table 4, for XL/2: million trainable parameters, billion multiply-adds. Of the parameters, the affine
    /// parts of the norms of in-context and cross-attention conditioning (0.2 million) are our reading.
    const DESIGNS: [(Conditioning, f64, f64); 4] = [
        (Conditioning::InContext, 449.0, 119.37),
        (Conditioning::CrossAttention, 598.0, 137.62),
        (Conditioning::AdaLn, 600.0, 118.56),
        (Conditioning::AdaLnZero, 675.0, 118.64),
    ];

    fn preset(name: &str, conditioning: Conditioning) -> Dit {
        let preset = configs::presets::by_name(name).expect(name);
        let config = DitConfig {
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
            conditioning,
            numerics: Default::default(),
        };
        Dit::new(config).expect(name)
    }

    fn trainable(dit: &Dit) -> usize {
        dit.named_params().iter().filter(|(_, spec)| spec.trainable).map(|(_, spec)| spec.numel()).sum()
    }

    #[test]
    fn all_twelve_presets_have_the_official_parameter_and_flop_counts() {
        assert_eq!(configs::presets::ALL.len(), SIZES.len());
        for (name, params, of_them_trainable, giga_macs) in SIZES {
            let dit = preset(name, Conditioning::AdaLnZero);
            assert_eq!((dit.numel(), trainable(&dit)), (params, of_them_trainable), "{name}");
            let found = dit.macs_per_sample() as f64 / 1e9;
            assert!((found - giga_macs).abs() < 0.000_051, "{name}: {found} billion multiply-adds");
        }
    }

    #[test]
    fn all_four_designs_have_the_papers_parameter_and_flop_counts() {
        for (conditioning, mega_params, giga_macs) in DESIGNS {
            let dit = preset("DiT-XL/2", conditioning);
            let (params, macs) = (trainable(&dit) as f64 / 1e6, dit.macs_per_sample() as f64 / 1e9);
            assert_eq!(params.round(), mega_params, "{conditioning:?}: {params} million parameters");
            assert!((macs - giga_macs).abs() <= 0.02, "{conditioning:?}: {macs} billion multiply-adds");
        }
    }

    #[test]
    fn without_label_dropout_there_is_no_null_row() {
        for (conditioning, ..) in DESIGNS {
            let mut config = preset("DiT-S/8", conditioning).config().clone();
            config.class_dropout_prob = 0.0;
            let dit = Dit::new(config).expect("it fits");
            assert_eq!((dit.null_label(), dit.label_dropout()), (None, 0.0));
            let params = dit.named_params();
            let (_, table) = params.iter().find(|(name, _)| name.starts_with("y_embedder")).expect("a label table");
            assert_eq!(table.shape, [1000, 384]);
        }
    }
}
