//! From a TOML file and overrides to a checked [`RunConfig`], or to the list of all mistakes.

use std::ops::Bound::{Excluded, Included, Unbounded};
use std::path::{Path, PathBuf};

use toml::Table;

use crate::data::{Columns, DataConfig, DataSource, Flip, OnBroken};
use crate::diffusion::Objective;
use crate::error::ConfigError;
use crate::lanes::MAX_LANES;
use crate::reader::Reader;
use crate::sampler::{GuidedChannels, Sampler};
use crate::schema::*;
use crate::urls::Urls;
use crate::validation::loss_metric;
use crate::{location, overrides, presets};

mod cache;
mod cluster;
mod diffusion;
mod divergence;
mod fid;
mod finetune;
mod optimizer;
mod validation;

/// Upper end of integers without a natural one: TOML's integers are i64.
const ANY: u64 = i64::MAX as u64;
/// Upper end of counts that things are allocated by; a bound for typing errors, not for machines.
const COUNT: u64 = 1 << 31;

const POSITIVE: (std::ops::Bound<f64>, std::ops::Bound<f64>) = (Excluded(0.0), Unbounded);
const BELOW_ONE: (std::ops::Bound<f64>, std::ops::Bound<f64>) = (Included(0.0), Excluded(1.0));

impl RunConfig {
    /// Reads `path`, applies `overrides` (each `key=value`) and checks everything.
    ///
    /// Relative paths, those of overrides included, are taken from the folder of the file, so that a config means the
    /// same wherever it is used from.
    ///
    /// # Errors
    /// The file cannot be read, is not TOML, or has mistakes: all of them in one error.
    pub fn load(path: &Path, overrides: &[String]) -> Result<RunConfig, ConfigError> {
        let read = |source| ConfigError::Read { path: path.to_owned(), source };
        let text = std::fs::read_to_string(path).map_err(read)?;
        let absolute = std::path::absolute(path).map_err(read)?;
        let folder = absolute.parent().unwrap_or(Path::new("/"));
        // Links in the folder's path are followed, as the operating system would for `..`; a link to the file itself is not.
        let folder = folder.canonicalize().map_err(read)?;
        parse(path, &text, &folder, overrides)
    }
}

/// `path` is for messages only; `base` is the absolute folder for relative paths.
fn parse(path: &Path, text: &str, base: &Path, overrides: &[String]) -> Result<RunConfig, ConfigError> {
    let mut root: Table = toml::from_str(text).map_err(|error| {
        let (line, column) = position(text, error.span().map_or(0, |span| span.start));
        ConfigError::Syntax { path: path.to_owned(), line, column, message: error.message().to_owned() }
    })?;
    let mut mistakes = Vec::new();
    let applied = overrides::apply(&mut root, overrides, &mut mistakes);
    let mut reader = Reader::new(path.display().to_string(), &root, &applied, mistakes);
    let config = read(&mut reader, base);
    check(&mut reader, &config);
    let mistakes = reader.finish();
    if mistakes.is_empty() { Ok(config) } else { Err(ConfigError::Invalid { path: path.to_owned(), mistakes }) }
}

fn position(text: &str, offset: usize) -> (usize, usize) {
    let before = text.get(..offset).unwrap_or(text);
    let line_start = before.rfind('\n').map_or(0, |end| end + 1);
    (before.matches('\n').count() + 1, before[line_start..].chars().count() + 1)
}

/// Every key by itself: type, range, default.
fn read(r: &mut Reader, base: &Path) -> RunConfig {
    RunConfig {
        run: RunLocation { url: required_url(r, "run.url", base, "set it to the folder or URL of the run") },
        seed: r.integer("seed", 0..=ANY, 0),
        reduction: r.choice(
            "reduction",
            &[("invariant", Reduction::Invariant), ("fast", Reduction::Fast)],
            Reduction::Invariant,
        ),
        reduction_dtype: r.choice(
            "reduction_dtype",
            &[("fp32", ReductionDtype::Fp32), ("bf16", ReductionDtype::Bf16)],
            ReductionDtype::Fp32,
        ),
        data: read_data(r, base),
        cache: cache::read(r, base),
        model: read_model(r),
        diffusion: diffusion::read(r),
        optimizer: optimizer::read(r),
        ema: optimizer::read_ema(r),
        train: TrainConfig {
            steps: r.required_integer(
                "train.steps",
                1..=ANY,
                "set it to the number of optimizer steps of the whole run",
            ),
            lanes: r.required_integer(
                "train.lanes",
                1..=MAX_LANES as u64,
                "set it to a power of two; global batch = lanes × micro_batch",
            ) as usize,
            micro_batch: r.required_integer(
                "train.micro_batch",
                1..=COUNT,
                "set it to the samples of one lane per step",
            ) as usize,
            threads_per_rank: r.integer("train.threads_per_rank", 1..=1024, 1) as usize,
            device: r.choice(
                "train.device",
                &[("auto", Device::Auto), ("cpu", Device::Cpu), ("cuda", Device::Cuda)],
                Device::Auto,
            ),
            precision: r.choice(
                "train.precision",
                &[("fp32", Precision::Fp32), ("bf16", Precision::Bf16)],
                Precision::default(),
            ),
            tf32: r.boolean("train.tf32", false),
            activation_checkpointing: r.integer("train.activation_checkpointing", 0..=COUNT, 0) as usize,
            sharding: Sharding::ALL[r.integer("train.sharding", 0..=3, 1) as usize],
            sharding_ranks: r
                .optional_integer("train.sharding_ranks", 1..=MAX_LANES as u64)
                .map(|ranks| ranks as usize),
            freeze: r.text_list("train.freeze"),
        },
        divergence: divergence::read(r),
        init: finetune::read_init(r, base),
        lora: finetune::read_lora(r),
        checkpoint: CheckpointConfig {
            every_steps: r.integer("checkpoint.every_steps", 0..=ANY, 1000),
            every_minutes: r.float("checkpoint.every_minutes", 0.0..=1e6, 0.0),
            when_busy: r.choice(
                "checkpoint.when_busy",
                &[("wait", WhenBusy::Wait), ("skip", WhenBusy::Skip)],
                WhenBusy::Wait,
            ),
            upload_timeout_s: r.integer("checkpoint.upload_timeout_s", 1..=604_800, 3600),
            grace_s: r.integer("checkpoint.grace_s", 0..=604_800, 0),
            keep_last: r.integer("checkpoint.keep_last", 2..=COUNT, 3) as usize,
            keep_every: r.integer("checkpoint.keep_every", 0..=ANY, 0),
            keep_best: r.integer("checkpoint.keep_best", 0..=COUNT, 0) as usize,
            best_metric: r.text("checkpoint.best_metric", &loss_metric("ema")),
            on_damaged: r.choice(
                "checkpoint.on_damaged",
                &[("fallback", OnDamaged::Fallback), ("fail", OnDamaged::Fail)],
                OnDamaged::Fallback,
            ),
        },
        validation: validation::read(r, base),
        fid: fid::read(r, base),
        sample: SampleConfig {
            every_steps: r.integer("sample.every_steps", 0..=ANY, 0),
            num: r.integer("sample.num", 1..=COUNT, 40) as usize,
            sampler: read_sampler(r),
            steps: r.integer("sample.steps", 1..=100_000, 50) as usize,
            cfg_scale: r.float("sample.cfg_scale", 0.0.., 1.5),
            cfg_interval: r.float_pair("sample.cfg_interval", 0.0..=1.0, [0.0, 1.0]),
            cfg_channels: r.choice(
                "sample.cfg_channels",
                &[("all", GuidedChannels::All), ("first-three", GuidedChannels::FirstThree)],
                GuidedChannels::All,
            ),
            eta: r.float("sample.eta", 0.0..=1.0, 0.0),
            clip_denoised: r.boolean("sample.clip_denoised", false),
            batch: r.integer("sample.batch", 1..=COUNT, 10) as usize,
            vae: read_folder(r, "sample.vae", base),
            seed: r.integer("sample.seed", 0..=ANY, 0),
        },
        log: LogConfig {
            every_steps: r.integer("log.every_steps", 1..=ANY, 10),
            tensorboard: r.boolean("log.tensorboard", true),
        },
        collective: CollectiveConfig {
            timeout_s: r.integer("collective.timeout_s", 1..=604_800, 600),
            node_ranks: r.optional_integer("collective.node_ranks", 1..=MAX_LANES as u64).map(|ranks| ranks as usize),
        },
        cluster: cluster::read(r),
    }
}

/// The names of columns under a prefix; `$names` are those that are not given.
macro_rules! columns {
    ($r:expr, $prefix:literal, $names:expr) => {
        Columns {
            latent: $r.text(concat!($prefix, "latent"), &$names.latent),
            latent_mean: $r.text(concat!($prefix, "latent_mean"), &$names.latent_mean),
            latent_logvar: $r.text(concat!($prefix, "latent_logvar"), &$names.latent_logvar),
            latent_flipped: $r.text(concat!($prefix, "latent_flipped"), &$names.latent_flipped),
            label: $r.text(concat!($prefix, "label"), &$names.label),
            id: $r.text(concat!($prefix, "id"), &$names.id),
            shape: $r.text(concat!($prefix, "shape"), &$names.shape),
            caption: $r.text(concat!($prefix, "caption"), &$names.caption),
            caption_mask: $r.text(concat!($prefix, "caption_mask"), &$names.caption_mask),
        }
    };
}

fn read_data(r: &mut Reader, base: &Path) -> DataConfig {
    let columns = columns!(r, "data.columns.", Columns::default());
    let scaling_factor = r.optional_float("data.scaling_factor", POSITIVE);
    DataConfig {
        url: optional_urls(r, "data.url", base),
        mix: r.tables("data.mix", |r| DataSource {
            url: required_urls(r, "url", base, "set it to a parquet file or a folder of them"),
            weight: r.required_float("weight", POSITIVE, "set it to the data set's part of all rows"),
            columns: columns!(r, "columns.", columns),
            scaling_factor: r.optional_float("scaling_factor", POSITIVE).or(scaling_factor),
        }),
        range_rows: r.integer("data.range_rows", 1..=COUNT, 256),
        shuffle_window_rows: r.integer("data.shuffle_window_rows", 1..=COUNT, 4096),
        prefetch_bytes: r.integer("data.prefetch_bytes", 1..=ANY, 64 << 20),
        threads: r.integer("data.threads", 1..=256, 2),
        flip: r.flag_or_choice("data.flip", [Flip::Never, Flip::Stored], &[("latent", Flip::Latent)]),
        columns,
        on_broken: r.choice(
            "data.on_broken",
            &[("fail", OnBroken::Fail), ("skip", OnBroken::Skip)],
            OnBroken::default(),
        ),
        skip_budget_rows: r.optional_integer("data.skip_budget_rows", 1..=ANY),
        caption_tokens: r.optional_integer("data.caption_tokens", 1..=65_536).map(|tokens| tokens as usize),
        caption_weights: r.floats("data.caption_weights", 0.0..),
        scaling_factor,
    }
}

/// One data set or several.
fn check_data(r: &mut Reader, data: &DataConfig) {
    let skips = data.on_broken == OnBroken::Skip;
    if skips && data.skip_budget_rows.is_none() && r.sound(&["data.skip_budget_rows"]) {
        r.refuse(
            "data.on_broken",
            "has no budget",
            "set data.skip_budget_rows to the most rows that may lie in broken row groups",
        );
    } else if !skips && r.given("data.skip_budget_rows") && r.sound(&["data.on_broken", "data.skip_budget_rows"]) {
        r.refuse(
            "data.skip_budget_rows",
            "means nothing where a broken row group ends the run",
            "set data.on_broken = \"skip\", or remove it",
        );
    }
    if r.given("data.caption_weights") && r.sound(&["data.caption_weights", "data.caption_tokens"]) {
        if data.caption_tokens.is_none() {
            r.refuse(
                "data.caption_weights",
                "means nothing where captions are not read",
                "set data.caption_tokens to the tokens of a caption, or remove it",
            );
        } else if !data.caption_weights.iter().any(|weight| *weight > 0.0) {
            r.refuse(
                "data.caption_weights",
                "leaves no caption",
                "give at least one a weight above 0, as in [0.95, 0.05]",
            );
        }
    }
    match (r.given("data.url"), r.given("data.mix")) {
        (false, false) => r.require(
            "data.url",
            "set it to a parquet file or a folder of them, or give several data sets as [[data.mix]]",
        ),
        (true, true) => r.refuse("data.mix", "is given beside data.url", "keep one of the two"),
        _ => {}
    }
}

fn read_model(r: &mut Reader) -> ModelConfig {
    let preset = read_preset(r);
    let mut dimension = |key, of: fn(&presets::Preset) -> usize| match &preset {
        Some(preset) => r.integer(key, 1..=COUNT, of(preset) as u64) as usize,
        // A preset that is given but wrong is one mistake, not five.
        None if r.given("model.preset") => r.integer(key, 1..=COUNT, 1) as usize,
        None => r.required_integer(key, 1..=COUNT, "set it, or choose a model.preset such as \"DiT-S/2\"") as usize,
    };
    ModelConfig {
        hidden_size: dimension("model.hidden_size", |preset| preset.hidden_size),
        depth: dimension("model.depth", |preset| preset.depth),
        num_heads: dimension("model.num_heads", |preset| preset.num_heads),
        patch_size: dimension("model.patch_size", |preset| preset.patch_size),
        preset: preset.map(|preset| preset.name.to_owned()),
        mlp_ratio: r.float("model.mlp_ratio", POSITIVE, 4.0),
        class_dropout_prob: r.float("model.class_dropout_prob", 0.0..=1.0, 0.1),
        learn_sigma: r.boolean("model.learn_sigma", true),
        conditioning: r.choice(
            "model.conditioning",
            &[
                ("adaln-zero", Conditioning::AdaLnZero),
                ("adaln", Conditioning::AdaLn),
                ("cross-attention", Conditioning::CrossAttention),
                ("in-context", Conditioning::InContext),
            ],
            Conditioning::default(),
        ),
        numerics: r.choice(
            "model.numerics",
            &[("official", Numerics::Official), ("stock-diffusers", Numerics::StockDiffusers)],
            Numerics::default(),
        ),
        num_classes: r.optional_integer("model.num_classes", 1..=COUNT).map(|count| count as usize),
        input_size: r.optional_integer("model.input_size", 1..=65_536).map(|side| side as usize),
        in_channels: r.optional_integer("model.in_channels", 1..=65_536).map(|count| count as usize),
    }
}

fn read_sampler(r: &mut Reader) -> Option<Sampler> {
    let name = r.optional_text("sample.sampler")?;
    let sampler = Sampler::by_name(&name);
    if sampler.is_none() {
        let names: Vec<String> = Sampler::all().map(|sampler| format!("\"{sampler}\"")).collect();
        r.refuse("sample.sampler", "is not one of the choices", format!("use {}", names.join(", ")));
    }
    sampler
}

fn read_preset(r: &mut Reader) -> Option<presets::Preset> {
    let name = r.optional_text("model.preset")?;
    let preset = presets::by_name(&name);
    if preset.is_none() {
        let names: Vec<&str> = presets::ALL.iter().map(|preset| preset.name).collect();
        r.refuse("model.preset", "is not a known preset", format!("use one of {}", names.join(", ")));
    }
    preset
}

fn required_url(r: &mut Reader, key: &'static str, base: &Path, advice: &str) -> String {
    r.require(key, advice);
    optional_url(r, key, base).unwrap_or_default()
}

fn required_urls(r: &mut Reader, key: &'static str, base: &Path, advice: &str) -> Urls {
    r.require(key, advice);
    optional_urls(r, key, base).unwrap_or_else(|| Urls::new(Vec::new()))
}

/// One URL, or a list of them.
fn optional_urls(r: &mut Reader, key: &'static str, base: &Path) -> Option<Urls> {
    let texts = r.one_or_more_texts(key)?;
    if let Some(problem) = texts.iter().find_map(|text| location::defect(text)).filter(|_| r.sound(&[key])) {
        r.refuse(key, problem, "give a path, or a URL such as s3://bucket/folder");
    }
    Some(Urls::new(texts.iter().map(|text| location::resolve(base, text)).collect()))
}

fn optional_url(r: &mut Reader, key: &'static str, base: &Path) -> Option<String> {
    let text = r.optional_text(key)?;
    if let Some(problem) = location::defect(&text).filter(|_| r.sound(&[key])) {
        r.refuse(key, problem, "give a path, or a URL such as s3://bucket/folder");
    }
    Some(location::resolve(base, &text))
}

fn read_folder(r: &mut Reader, key: &'static str, base: &Path) -> Option<PathBuf> {
    read_path(r, key, base, "folder")
}

/// A local path; `what` it leads to.
fn read_path(r: &mut Reader, key: &'static str, base: &Path, what: &str) -> Option<PathBuf> {
    let text = r.optional_text(key)?;
    let path = match location::defect(&text) {
        None => location::local_path(&location::resolve(base, &text)),
        Some(_) => None,
    };
    if path.is_none() {
        r.refuse(key, format!("is not a {what} on this machine"), format!("give the path of a local {what}"));
    }
    path
}

/// Keys against each other. A key that already has a mistake is left out of it.
fn check(r: &mut Reader, c: &RunConfig) {
    let invariant = c.reduction == Reduction::Invariant;
    if r.sound(&["reduction", "reduction_dtype"]) && invariant && c.reduction_dtype == ReductionDtype::Bf16 {
        r.refuse(
            "reduction_dtype",
            "would round at the borders of ranks, so that bits depend on their number",
            "remove it, or use reduction = \"fast\"",
        );
    }
    check_data(r, &c.data);
    check_model(r, &c.model);
    diffusion::check(r, &c.diffusion);
    if r.sound(&["train.lanes", "reduction"]) && invariant && !c.train.lanes.is_power_of_two() {
        let above = c.train.lanes.next_power_of_two();
        let batches = if r.sound(&["train.micro_batch"]) {
            format!(" (global batch {} or {})", above / 2 * c.train.micro_batch, above * c.train.micro_batch)
        } else {
            String::new()
        };
        r.refuse(
            "train.lanes",
            "is not a power of two",
            format!("use {} or {above}{batches}, or reduction = \"fast\"", above / 2),
        );
    }
    check_sharding(r, &c.train);
    if let Some(ranks) = c.collective.node_ranks.filter(|_| r.sound(&["collective.node_ranks"])) {
        refuse_other_than_a_power_of_two(r, "collective.node_ranks", ranks);
    }
    divergence::check(r, &c.divergence);
    optimizer::check(r, c);
    validation::check(r, c);
    fid::check(r, c);
    check_sampling(r, c);
}

fn refuse_other_than_a_power_of_two(r: &mut Reader, key: &str, ranks: usize) {
    if !ranks.is_power_of_two() {
        let above = ranks.next_power_of_two();
        r.refuse(key, "is not a power of two", format!("use {} or {above}", above / 2));
    }
}

fn check_sharding(r: &mut Reader, train: &TrainConfig) {
    let Some(ranks) = train.sharding_ranks.filter(|_| r.sound(&["train.sharding", "train.sharding_ranks"])) else {
        return;
    };
    refuse_other_than_a_power_of_two(r, "train.sharding_ranks", ranks);
    if train.sharding == Sharding::Nothing {
        r.refuse(
            "train.sharding_ranks",
            "means nothing where every rank holds everything",
            "remove it, or set train.sharding to 1, 2 or 3",
        );
    }
}

fn check_model(r: &mut Reader, model: &ModelConfig) {
    let ModelConfig { hidden_size, num_heads, patch_size, .. } = *model;
    let sized = r.sound(&["model.hidden_size", "model.preset"]);
    if sized && hidden_size % 4 != 0 {
        let near = hidden_size.next_multiple_of(4);
        r.refuse(
            "model.hidden_size",
            format!(
                "{} not a multiple of 4, which the two-dimensional sine-cosine positions need",
                is(r, "model.hidden_size", hidden_size)
            ),
            format!("use {near}"),
        );
    } else if sized && r.sound(&["model.num_heads"]) && hidden_size % num_heads != 0 {
        let fitting: Vec<String> = (1..=hidden_size)
            .filter(|heads| hidden_size % heads == 0)
            .take(12)
            .map(|heads| heads.to_string())
            .collect();
        // At whichever of the two was written down.
        let key = if r.given("model.num_heads") { "model.num_heads" } else { "model.hidden_size" };
        r.refuse(
            key,
            format!("does not fit: hidden_size {hidden_size} is not a multiple of num_heads {num_heads}"),
            format!("use a num_heads that divides {hidden_size}, such as {}", fitting.join(", ")),
        );
    }
    if let Some(input_size) = model.input_size
        && r.sound(&["model.input_size", "model.patch_size", "model.preset"])
        && input_size % patch_size != 0
    {
        r.refuse(
            "model.input_size",
            format!("is not a multiple of patch_size {patch_size}"),
            format!("use {}, or another patch_size", input_size.next_multiple_of(patch_size)),
        );
    }
}

/// "is", or where the value is not written in the file (it comes from a preset) "(here 1152) is".
fn is(r: &Reader, key: &str, value: usize) -> String {
    if r.given(key) { "is".to_owned() } else { format!("(here {value}) is") }
}

fn check_sampling(r: &mut Reader, c: &RunConfig) {
    let discrete = c.diffusion.objective != Objective::Flow;
    if discrete && r.sound(&["sample.steps", "diffusion.timesteps"]) && c.sample.steps > c.diffusion.timesteps {
        let timesteps = c.diffusion.timesteps;
        r.refuse(
            "sample.steps",
            format!("is more than diffusion.timesteps = {timesteps}"),
            format!("use at most {timesteps}"),
        );
    }
    let sampler = c.sample.sampler.unwrap_or(Sampler::default_of_grids(!discrete));
    if r.sound(&["sample.sampler", "diffusion.objective"]) && sampler.is_for_flow() == discrete {
        let fitting: Vec<String> = Sampler::that_fit(!discrete).map(|sampler| format!("\"{sampler}\"")).collect();
        r.refuse(
            "sample.sampler",
            format!("does not reverse {}", if discrete { "a Gaussian diffusion" } else { "a flow" }),
            format!("use {}, or another diffusion.objective", fitting.join(", ")),
        );
    }
    if r.sound(&["sample.sampler", "sample.eta"]) && c.sample.eta != 0.0 && sampler != Sampler::Ddim {
        r.refuse("sample.eta", format!("means nothing to the sampler {sampler}"), "remove it, or use \"ddim\"");
    }
    let [low, high] = c.sample.cfg_interval;
    if r.sound(&["sample.cfg_interval"]) && low > high {
        r.refuse("sample.cfg_interval", "ends before it begins", format!("use [{high:?}, {low:?}]"));
    }
    if c.sample.every_steps == 0 && c.fid.is_none() {
        return;
    }
    if r.sound(&["sample.vae"]) && c.sample.vae.is_none() && c.sample.every_steps > 0 {
        r.refuse(
            "sample.every_steps",
            "asks for sample images, but there is no sample.vae to decode them",
            "set sample.vae to an AutoencoderKL folder, or sample.every_steps to 0",
        );
    }
    if r.sound(&["sample.cfg_scale", "model.class_dropout_prob"])
        && c.sample.cfg_scale != 1.0
        && c.model.class_dropout_prob == 0.0
    {
        r.refuse(
            "model.class_dropout_prob",
            format!("leaves no null class, which guidance with sample.cfg_scale = {} needs", c.sample.cfg_scale),
            "use a probability above 0 (the paper: 0.1), or sample.cfg_scale = 1",
        );
    }
}

#[cfg(test)]
#[path = "load_tests.rs"]
mod tests;
