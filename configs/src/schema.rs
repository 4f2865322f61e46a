//! The config as types: one struct per section, field names are the TOML keys.
//!
//! Values of these types have been checked by [`RunConfig::load`]; ranges are given with each field.

use std::path::PathBuf;

use serde::{Deserialize, Serialize};

use crate::cache::CacheConfig;
use crate::cluster::ClusterConfig;
use crate::data::DataConfig;
use crate::diffusion::DiffusionConfig;
use crate::divergence::DivergenceConfig;
use crate::fid::FidConfig;
use crate::sampler::{GuidedChannels, Sampler};
use crate::urls::Urls;
use crate::validation::ValidationConfig;

/// Everything that a run needs to know.
#[derive(Debug, Clone, PartialEq, Serialize)]
pub struct RunConfig {
    /// Where the run lives.
    pub run: RunLocation,
    /// Seed of every random draw of the run. 0 to i64::MAX.
    pub seed: u64,
    /// How partial gradient sums of lanes are combined.
    pub reduction: Reduction,
    /// With [`Reduction::Fast`], in what numbers gradients cross the wire.
    #[serde(skip_serializing_if = "is_default")]
    pub reduction_dtype: ReductionDtype,
    /// Where samples come from and how they are dealt to the lanes.
    pub data: DataConfig,
    /// Where bytes of remote data sets are kept; `None` without `cache.bytes`.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub cache: Option<CacheConfig>,
    /// The model's dimensions.
    pub model: ModelConfig,
    /// The diffusion process and the training objective.
    pub diffusion: DiffusionConfig,
    /// AdamW and its learning-rate schedule.
    pub optimizer: OptimizerConfig,
    /// The moving average of the weights.
    pub ema: EmaConfig,
    /// Length and batch geometry of the run.
    pub train: TrainConfig,
    /// What becomes of a step that diverges.
    #[serde(skip_serializing_if = "is_default")]
    pub divergence: DivergenceConfig,
    /// Where the first weights come from; `None`: drawn from the seed.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub init: Option<InitConfig>,
    /// Train low-rank adapters in place of the weights.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub lora: Option<LoraConfig>,
    /// When checkpoints are written and how many are kept.
    pub checkpoint: CheckpointConfig,
    /// Held-out loss; `None` without `validation.url`.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub validation: Option<ValidationConfig>,
    /// Fréchet distance of samples during training; `None` without `fid.reference`.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub fid: Option<FidConfig>,
    /// Sample grids during training, and defaults of `trainer sample`.
    pub sample: SampleConfig,
    /// Logging.
    pub log: LogConfig,
    /// Communication between ranks.
    pub collective: CollectiveConfig,
    /// Where the ranks run.
    pub cluster: ClusterConfig,
}

/// `[run]`
#[derive(Debug, Clone, PartialEq, Serialize)]
pub struct RunLocation {
    /// Absolute URL of the run folder; required. May hold credentials: show it through [`crate::location::redact`].
    pub url: String,
}

/// `reduction`: how the partial gradient sums of lanes are combined.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize)]
#[serde(rename_all = "lowercase")]
pub enum Reduction {
    /// Along the canonical tree: the same bits on any number of ranks.
    Invariant,
    /// Each rank's lanes one after the other, then the ranks in the backend's order: the same bits only on the same number of
    /// ranks. Needs no power of two.
    Fast,
}

/// `reduction_dtype`: the numbers in which gradients cross the wire.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize)]
#[serde(rename_all = "lowercase")]
pub enum ReductionDtype {
    /// As they were computed.
    #[default]
    Fp32,
    /// Each rank's sum is rounded, and so is every addition: half the bytes.
    Bf16,
}

/// `[model]`: dimensions, with the preset already applied.
#[derive(Debug, Clone, PartialEq, Serialize)]
pub struct ModelConfig {
    /// Name of the preset that the dimensions were taken from, for display; explicit dimensions win over it.
    pub preset: Option<String>,
    /// Width of a token; a multiple of 4 and of `num_heads`.
    pub hidden_size: usize,
    /// Number of blocks, at least 1.
    pub depth: usize,
    /// Attention heads per block, at least 1.
    pub num_heads: usize,
    /// Side of a square patch in latent pixels, at least 1; divides `input_size`.
    pub patch_size: usize,
    /// Hidden width of a block's MLP over `hidden_size`. Above 0.
    pub mlp_ratio: f64,
    /// Probability that a label is replaced by the null class in training. 0 to 1; 0 means that there is no null class.
    pub class_dropout_prob: f64,
    /// The model also predicts the variance (twice the output channels).
    pub learn_sigma: bool,
    /// How time and label reach the blocks.
    #[serde(skip_serializing_if = "is_default")]
    pub conditioning: Conditioning,
    /// Whose constants the model computes with; only adaln-zero models have others than the official code's.
    #[serde(skip_serializing_if = "is_default")]
    pub numerics: Numerics,
    /// Number of classes; `None`: as the data set's metadata says.
    pub num_classes: Option<usize>,
    /// Side of the square latent; `None`: as the data set's metadata says.
    pub input_size: Option<usize>,
    /// Channels of the latent; `None`: as the data set's metadata says.
    pub in_channels: Option<usize>,
}

/// `model.conditioning`: how time and label reach the blocks.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Conditioning {
    /// Modulated norms and gated branches, all zero at first.
    #[default]
    #[serde(rename = "adaln-zero")]
    AdaLnZero,
    /// Modulated norms.
    #[serde(rename = "adaln")]
    AdaLn,
    /// A third branch that attends to the two embeddings.
    CrossAttention,
    /// The two embeddings as further tokens.
    InContext,
}

/// `model.numerics`: constants that leave no trace in the weights.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Numerics {
    /// Those of the official code.
    #[default]
    Official,
    /// Those of diffusers' DiTTransformer2DModel as it is shipped, for weights that were trained in it.
    StockDiffusers,
}

/// `optimizer.decay`: the learning rate after the warm-up.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize)]
#[serde(rename_all = "lowercase")]
pub enum Decay {
    /// `lr` for ever.
    Constant,
    /// Half a cosine from `lr` to `final_lr` at `train.steps`.
    Cosine,
    /// A straight line from `lr` to `final_lr` at `train.steps`.
    Linear,
}

/// `[optimizer]`: AdamW.
#[derive(Debug, Clone, PartialEq, Serialize)]
pub struct OptimizerConfig {
    /// Learning rate after the warm-up. Above 0.
    pub lr: f64,
    /// Decay rates of the two moments, each in [0, 1).
    pub betas: [f64; 2],
    /// Added to the root of the second moment. Above 0.
    pub eps: f64,
    /// Decoupled weight decay. At least 0.
    pub weight_decay: f64,
    /// Steps over which the learning rate rises linearly to `lr`; below `train.steps` if a decay follows.
    pub warmup_steps: u64,
    /// The learning rate after the warm-up.
    pub decay: Decay,
    /// Learning rate at `train.steps` when `decay` is not constant. At least 0.
    pub final_lr: f64,
    /// Largest norm of the mean gradient over all parameters; a longer one is scaled down to it. Above 0.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub clip_grad_norm: Option<f64>,
    /// Parameters that are updated otherwise than the rest; the first group that matches a parameter has it.
    #[serde(skip_serializing_if = "Vec::is_empty")]
    pub groups: Vec<ParamGroup>,
}

/// `[[optimizer.groups]]`: parameters with settings of their own.
#[derive(Debug, Clone, PartialEq, Serialize)]
pub struct ParamGroup {
    /// `match`: glob patterns over parameter names, at least one.
    #[serde(rename = "match")]
    pub patterns: Vec<String>,
    /// In place of `optimizer.weight_decay`. At least 0.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub weight_decay: Option<f64>,
    /// Multiplies the learning rate of every step. At least 0.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub lr_scale: Option<f64>,
}

/// `[ema]`
#[derive(Debug, Clone, PartialEq, Serialize)]
pub struct EmaConfig {
    /// Weight of the old average at each step, in [0, 1).
    pub decay: f64,
    /// Decays of further averages, each in [0, 1); none equal to `decay`.
    #[serde(skip_serializing_if = "Vec::is_empty")]
    pub further_decays: Vec<f64>,
    /// No decay is above (1 + k) / (10 + k) at update k.
    #[serde(skip_serializing_if = "std::ops::Not::not")]
    pub warmup: bool,
    /// Relative widths of power-function averages, each above 0 and at most 0.28.
    #[serde(skip_serializing_if = "Vec::is_empty")]
    pub power: Vec<f64>,
}

/// `train.precision`
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize)]
#[serde(rename_all = "lowercase")]
pub enum Precision {
    /// float32.
    #[default]
    Fp32,
    /// bfloat16.
    Bf16,
}

/// `train.sharding`: what is shared out among ranks, each level with all before it.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, PartialOrd, Ord, Serialize)]
#[serde(into = "u8")]
pub enum Sharding {
    /// `0`: nothing; every rank makes the whole update.
    Nothing,
    /// `1`: moments and moving averages.
    #[default]
    Optimizer,
    /// `2`: sums of gradients.
    Gradients,
    /// `3`: weights; those of a segment are gathered for as long as it computes.
    Weights,
}

impl Sharding {
    /// In the order of their numbers.
    pub const ALL: [Self; 4] = [Self::Nothing, Self::Optimizer, Self::Gradients, Self::Weights];
}

impl From<Sharding> for u8 {
    fn from(level: Sharding) -> u8 {
        level as u8
    }
}

/// `train.device`
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize)]
#[serde(rename_all = "lowercase")]
pub enum Device {
    /// CUDA where the machine has it, else the CPU.
    Auto,
    /// The CPU.
    Cpu,
    /// CUDA; an error where there is none.
    Cuda,
}

/// `[train]`
#[derive(Debug, Clone, PartialEq, Serialize)]
pub struct TrainConfig {
    /// Optimizer steps of the whole run; required, at least 1.
    pub steps: u64,
    /// Logical data-parallel workers; required, a power of two up to [`crate::lanes::MAX_LANES`].
    pub lanes: usize,
    /// Samples that a lane processes per step; required, at least 1.
    pub micro_batch: usize,
    /// CPU threads of each rank; part of the experiment, because sums depend on it. At least 1.
    pub threads_per_rank: usize,
    /// Where a rank computes.
    pub device: Device,
    /// What attention and MLPs compute in; weights, moments, averages and sums stay float32.
    #[serde(skip_serializing_if = "is_default")]
    pub precision: Precision,
    /// GPUs may round the inputs of float32 products to TF32.
    #[serde(skip_serializing_if = "is_default")]
    pub tf32: bool,
    /// Of every so many segments one keeps no activations and computes them anew in backward; 0 = none. The same bits.
    pub activation_checkpointing: usize,
    /// What is shared out among ranks. The same bits.
    pub sharding: Sharding,
    /// Consecutive ranks that together hold one copy of what is shared out, a power of two; `None`: all ranks.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub sharding_ranks: Option<usize>,
    /// Glob patterns over the names of parameters that are not trained; each matches at least one.
    #[serde(skip_serializing_if = "Vec::is_empty")]
    pub freeze: Vec<String>,
}

/// `[init]`: the first start of a run takes its weights from elsewhere. A resume ignores it.
#[derive(Debug, Clone, PartialEq, Serialize)]
pub struct InitConfig {
    /// Absolute URL of a run, a checkpoint, a file or a diffusers folder; required. May hold credentials.
    pub from: String,
    /// Which weights, where the source has several: `ema` or `model`, or another section of a checkpoint.
    pub weights: String,
    /// The rows of the label table that stand for classes.
    pub classes: InitClasses,
    /// The row of the null class, where only one of source and model has it.
    pub null_class: Adapt,
    /// The position table, where the grid of tokens differs; `None`: refused then.
    pub positions: Option<InitPositions>,
    /// The output channels of the variance, where only one of source and model has them.
    pub learn_sigma: Adapt,
}

/// `init.classes`
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize)]
#[serde(rename_all = "lowercase")]
pub enum InitClasses {
    /// Those of the source; it must have as many.
    Keep,
    /// Freshly initialised.
    New,
}

/// What becomes of a part that only one of source and model has.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize)]
#[serde(rename_all = "lowercase")]
pub enum Adapt {
    /// Refuse: both must have it or neither.
    Keep,
    /// Freshly initialised where the source lacks it, left out where the model lacks it.
    Adapt,
}

/// `init.positions`: where the source's grid of tokens has another side.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize)]
#[serde(rename_all = "lowercase")]
pub enum InitPositions {
    /// The new grid covers what the old one did: token i lies at i·(old side / new side).
    Interpolate,
    /// Tokens keep their distance of 1; the new grid covers more or less than the old one.
    Extend,
}

/// `[lora]`: low-rank adapters.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct LoraConfig {
    /// Inner dimension, at least 1.
    pub rank: usize,
    /// The adapters count alpha / rank. Above 0.
    pub alpha: f64,
    /// Linear layers with an adapter, by the end of their path; `*` and `?` as in patterns. At least one.
    pub targets: Vec<String>,
    /// Glob patterns over further parameters that are trained as they are.
    #[serde(default)]
    pub also_train: Vec<String>,
}

impl LoraConfig {
    /// What B·A is multiplied with.
    pub fn scale(&self) -> f64 {
        self.alpha / self.rank as f64
    }
}

/// `checkpoint.on_damaged`: what a resume does when the newest checkpoint fails its verification.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize)]
#[serde(rename_all = "lowercase")]
pub enum OnDamaged {
    /// Take the newest valid one and say which were damaged.
    Fallback,
    /// Stop.
    Fail,
}

/// `checkpoint.when_busy`: what happens to a checkpoint that comes due before the one before it is committed.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize)]
#[serde(rename_all = "lowercase")]
pub enum WhenBusy {
    /// The step loop waits for the earlier one.
    Wait,
    /// It is left out, unless it is the last one, or was asked for.
    Skip,
}

/// `[checkpoint]`
#[derive(Debug, Clone, PartialEq, Serialize)]
pub struct CheckpointConfig {
    /// Steps between checkpoints; 0 = by time only. One more is written at the end and on a stop request.
    pub every_steps: u64,
    /// Minutes from the beginning of one checkpoint to the next; 0 = by steps only.
    pub every_minutes: f64,
    /// What happens to one that comes due too early.
    pub when_busy: WhenBusy,
    /// Seconds that a rank's upload may take, 1 to 604800.
    pub upload_timeout_s: u64,
    /// Seconds from a stop request to the committed checkpoint after which the run gives up; 0 = as long as it takes.
    pub grace_s: u64,
    /// Newest checkpoints that are kept, at least 2.
    pub keep_last: usize,
    /// Checkpoints of steps that are a multiple of this are kept for ever; 0 = none. A multiple of `every_steps`.
    pub keep_every: u64,
    /// Checkpoints with the best values of `best_metric` that are kept.
    pub keep_best: usize,
    /// A metric that the run measures, see [`RunConfig::metrics`]; checkpoints of steps at which it was not measured are no
    /// candidates.
    pub best_metric: String,
    /// What a resume does when the newest checkpoint is damaged.
    pub on_damaged: OnDamaged,
}

/// `[sample]`
#[derive(Debug, Clone, PartialEq, Serialize)]
pub struct SampleConfig {
    /// Steps between sample grids during training; 0 = never. Needs `vae`.
    pub every_steps: u64,
    /// Images in a grid, at least 1.
    pub num: usize,
    /// Which sampler; `None`: [`Sampler::default_of_grids`].
    pub sampler: Option<Sampler>,
    /// Sampling steps, at least 1; in a Gaussian diffusion at most `diffusion.timesteps`.
    pub steps: usize,
    /// Classifier-free guidance scale, at least 0; 1 = no guidance. Other scales need `model.class_dropout_prob` above 0.
    pub cfg_scale: f64,
    /// Noise levels, 0 (data) to 1 (noise), between which guidance acts, ends included; empty when both are equal.
    pub cfg_interval: [f64; 2],
    /// Output channels that guidance acts on.
    pub cfg_channels: GuidedChannels,
    /// Share of the ancestral noise in DDIM, 0 to 1.
    pub eta: f64,
    /// Clamp the predicted clean latent to −1..1 in the samplers of Gaussian diffusions.
    pub clip_denoised: bool,
    /// Images that are drawn at once, at least 1.
    pub batch: usize,
    /// Absolute path of an AutoencoderKL folder in the diffusers layout.
    pub vae: Option<PathBuf>,
    /// Seed of the fixed noise of the grids.
    pub seed: u64,
}

/// `[log]`
#[derive(Debug, Clone, PartialEq, Serialize)]
pub struct LogConfig {
    /// Steps between log lines, at least 1.
    pub every_steps: u64,
    /// Write TensorBoard event files.
    pub tensorboard: bool,
}

/// `[collective]`
#[derive(Debug, Clone, PartialEq, Serialize)]
pub struct CollectiveConfig {
    /// Seconds after which a rank gives up waiting for the others, 1 to 604800.
    pub timeout_s: u64,
    /// So many consecutive ranks, a power of two, exchange sums and weights among themselves before these go to other ranks. `None`: the
    /// ranks of each node.
    #[serde(skip_serializing_if = "is_default")]
    pub node_ranks: Option<usize>,
}

impl RunConfig {
    /// Samples per optimizer step.
    pub fn global_batch(&self) -> usize {
        self.train.lanes * self.train.micro_batch
    }

    /// The config nested by section, as it goes into manifests. URLs are redacted: no secret is in it.
    pub fn to_json(&self) -> serde_json::Value {
        let mut shown = self.clone();
        shown.run.url = crate::location::redact(&self.run.url);
        shown.data.url = self.data.url.as_ref().map(Urls::redacted);
        shown.data.mix.iter_mut().for_each(|source| source.url = source.url.redacted());
        if let Some(validation) = &mut shown.validation {
            validation.url = crate::location::redact(&validation.url);
        }
        if let Some(init) = &mut shown.init {
            init.from = crate::location::redact(&init.from);
        }
        // Serialising to a Value fails only for maps with non-string keys and a path that is not UTF-8; the config
        // has no map, and `load` takes `sample.vae` from a TOML string.
        serde_json::to_value(&shown).unwrap_or(serde_json::Value::Null)
    }
}

/// Whether a key is at its default. Keys younger than runs that are to stay resumable are recorded only where they say
/// something.
pub fn is_default<T: Default + PartialEq>(value: &T) -> bool {
    *value == T::default()
}
