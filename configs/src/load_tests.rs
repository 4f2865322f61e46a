#![allow(clippy::unwrap_used)]

use super::*;
use crate::{
    CacheConfig, DiffusionConfig, DivergenceConfig, Mistake, OnDivergence, Schedule, TimestepSampling, ValidationConfig,
};

const SMALL: &str = r#"
run.url = "../runs/a"
data.url = "/data/a"
model = { preset = "DiT-S/2" }
[train]
steps = 10
lanes = 4
micro_batch = 32
"#;

fn load(text: &str, overrides: &[&str]) -> Result<RunConfig, Vec<Mistake>> {
    let overrides: Vec<String> = overrides.iter().map(|text| text.to_string()).collect();
    match parse(Path::new("x.toml"), text, Path::new("/home/ada/configs"), &overrides) {
        Ok(config) => Ok(config),
        Err(ConfigError::Invalid { mistakes, .. }) => Err(mistakes),
        Err(other) => panic!("{other}"),
    }
}

/// The only mistake that these overrides of the small config make.
fn mistake(overrides: &[&str]) -> Mistake {
    let mut mistakes = load(SMALL, overrides).unwrap_err();
    assert_eq!(mistakes.len(), 1, "{mistakes:#?}");
    mistakes.remove(0)
}

#[test]
fn what_is_left_out_takes_the_documented_default() {
    let config = load(SMALL, &[]).unwrap();
    assert_eq!(config.run.url, "file:///home/ada/runs/a");
    assert_eq!(config.data.url.as_ref().unwrap().iter().collect::<Vec<_>>(), ["file:///data/a"]);
    assert_eq!((config.seed, config.reduction), (0, Reduction::Invariant));
    assert_eq!(
        (config.data.range_rows, config.data.shuffle_window_rows, config.data.prefetch_bytes, config.data.threads),
        (256, 4096, 67_108_864, 2)
    );
    assert_eq!((config.model.mlp_ratio, config.model.class_dropout_prob, config.model.learn_sigma), (4.0, 0.1, true));
    assert_eq!((config.model.num_classes, config.model.input_size, config.model.in_channels), (None, None, None));
    assert_eq!((config.optimizer.lr, config.optimizer.betas, config.optimizer.eps), (1e-4, [0.9, 0.999], 1e-8));
    assert_eq!((config.optimizer.weight_decay, config.optimizer.warmup_steps), (0.0, 0));
    assert_eq!((config.ema.decay, config.diffusion.timesteps), (0.9999, 1000));
    assert_eq!((config.train.threads_per_rank, config.train.device), (1, Device::Auto));
    let train = &config.train;
    assert_eq!((train.precision, train.tf32), (Precision::Fp32, false));
    assert!(["precision", "tf32"].iter().all(|key| config.to_json()["train"].get(key).is_none()));
    assert_eq!((train.activation_checkpointing, train.sharding, train.sharding_ranks), (0, Sharding::Optimizer, None));
    assert_eq!((config.checkpoint.every_steps, config.checkpoint.keep_last), (1000, 3));
    assert_eq!(
        (config.sample.every_steps, config.sample.num, config.sample.steps, config.sample.cfg_scale),
        (0, 40, 50, 1.5)
    );
    assert_eq!((config.collective.timeout_s, config.cluster.nodes, config.cluster.procs_per_node), (600, 1, None));
    assert_eq!(config.cluster.silence_s, 30);
    assert_eq!(config.global_batch(), 128);
}

#[test]
fn a_cache_is_asked_for_by_its_bytes() {
    let cache = |overrides: &[&str]| load(SMALL, overrides).unwrap().cache;
    assert_eq!(cache(&[]), None);
    assert_eq!(cache(&["cache.bytes=100000000"]), Some(CacheConfig { dir: None, bytes: 100_000_000 }));
    let dir = cache(&["cache.bytes=100000000", "cache.dir=/scratch/../fast"]).unwrap().dir;
    assert_eq!(dir, Some(PathBuf::from("/fast")));
    assert_eq!(mistake(&["cache.dir=/fast"]).key, "cache.bytes");
    assert_eq!(mistake(&["cache.bytes=1000"]).key, "cache.bytes");
    assert_eq!(mistake(&["cache.bytes=100000000", "cache.dir=s3://bucket/x"]).key, "cache.dir");
}

#[test]
fn a_divergence_ends_the_run_unless_the_config_says_otherwise() {
    let of = |overrides: &[&str]| load(SMALL, overrides).unwrap().divergence;
    assert_eq!((of(&[]).policy, of(&[]).loss_spike), (OnDivergence::Stop, None));
    assert!(load(SMALL, &[]).unwrap().to_json().get("divergence").is_none());
    let leaps =
        ["divergence.policy=rollback", "divergence.loss_spike=2.5", "divergence.window=9", "divergence.budget=2"];
    let expected = DivergenceConfig { policy: OnDivergence::Rollback, loss_spike: Some(2.5), window: 9, budget: 2 };
    assert_eq!(of(&leaps), expected);
    assert_eq!(of(&leaps[1..3]).policy, OnDivergence::Stop);
    assert_eq!(mistake(&["divergence.loss_spike=1.0"]).problem, "is out of range");
    for idle in ["divergence.budget=2", "divergence.window=9"] {
        let Mistake { key, problem, .. } = mistake(&[idle]);
        assert!(idle.starts_with(&key) && problem.starts_with("means nothing"), "{key} {problem}");
    }
    let mistakes = load(SMALL, &["divergence.policy=skipp", "divergence.budget=0", "divergence.widow=3"]).unwrap_err();
    assert_eq!(mistakes.len(), 3, "{mistakes:#?}");
}

#[test]
fn explicit_dimensions_win_over_the_preset() {
    let model = load(SMALL, &["model.depth=3"]).unwrap().model;
    assert_eq!((model.hidden_size, model.depth, model.num_heads, model.patch_size), (384, 3, 6, 2));
}

#[test]
fn without_a_preset_all_four_dimensions_are_required() {
    let text = SMALL.replace(r#"preset = "DiT-S/2""#, "depth = 6");
    let keys: Vec<String> = load(&text, &[]).unwrap_err().into_iter().map(|mistake| mistake.key).collect();
    assert_eq!(keys, ["model.hidden_size", "model.num_heads", "model.patch_size"]);
}

#[test]
fn all_mistakes_come_at_once() {
    let text = SMALL.replace("lanes = 4", "lanes = 12\nlane = 3").replace("steps = 10", "steps = \"ten\"");
    let mistakes = load(&text, &["ema.decay=1.0", "sample.vea=x"]).unwrap_err();
    let keys: Vec<&str> = mistakes.iter().map(|mistake| mistake.key.as_str()).collect();
    assert_eq!(keys, ["ema.decay", "train.steps", "train.lanes", "sample.vea", "train.lane"]);
    let error = ConfigError::Invalid { path: "x.toml".into(), mistakes };
    assert_eq!(error.to_string().lines().count(), 6, "{error}");
}

#[test]
fn a_mistake_says_where_what_and_what_to_do() {
    let text = SMALL.replace("lanes = 4", "lanes = 12");
    let mistakes = load(&text, &[]).unwrap_err();
    assert_eq!(
        mistakes[0].to_string(),
        "x.toml: `train.lanes` = 12 is not a power of two; use 8 or 16 (global batch 256 or 512), or reduction = \"fast\""
    );
    assert_eq!(mistake(&["train.lanes=12"]).origin, "--set");
}

#[test]
fn unknown_keys_are_refused_with_the_nearest_name() {
    for (given, meant) in [
        ("train.lane=1", "train.lanes"),
        ("train.microbatch=1", "train.micro_batch"),
        ("lanes=4", "train.lanes"),
        ("optimiser.lr=1", "optimizer"),
        ("data.columns.lable=x", "data.columns.label"),
        ("data.column.label=x", "data.columns"),
        ("model.hiden_size=4", "model.hidden_size"),
        ("checkpoint.keep=4", "checkpoint.keep_last"),
    ] {
        let mistake = mistake(&[given]);
        assert_eq!(mistake.advice, format!("did you mean `{meant}`?"), "{given}");
    }
    assert!(!mistake(&["zebra.crossing=1"]).advice.contains("did you mean"));
}

#[test]
fn wrong_types_and_ranges_are_refused() {
    for (given, problem) in [
        ("train.steps=0", "out of range"),
        ("train.steps=-5", "out of range"),
        ("train.steps=1.5", "is a float, not an integer"),
        ("seed=-1", "out of range"),
        ("optimizer.lr=0", "out of range"),
        ("optimizer.lr=nan", "out of range"),
        ("optimizer.lr=inf", "out of range"),
        ("optimizer.betas=[0.9]", "not a pair"),
        ("optimizer.betas=0.9", "not an array of numbers"),
        ("optimizer.betas=[0.9, 1]", "out of range"),
        ("ema.decay=1", "out of range"),
        ("ema.further_decays=0.9", "not an array of numbers"),
        ("ema.further_decays=[0.9, 1]", "out of range"),
        ("ema.further_decays=[0.9, 0.99, 0.9]", "twice"),
        ("ema.further_decays=[0.9, 0.9999]", "repeats ema.decay = 0.9999"),
        ("ema.power=[0.3]", "out of range"),
        ("optimizer.clip_grad_norm=0", "out of range"),
        ("optimizer.groups=[1]", "not an array of tables"),
        ("model.class_dropout_prob=1.5", "out of range"),
        ("model.learn_sigma=yes", "is a string, not true or false"),
        ("checkpoint.keep_last=1", "out of range"),
        ("checkpoint.every_minutes=-1", "out of range"),
        ("checkpoint.upload_timeout_s=0", "out of range"),
        ("checkpoint.when_busy=fail", "not one of the choices"),
        ("sample.sampler=plms", "not one of the choices"),
        ("sample.cfg_interval=[0, 1.5]", "out of range"),
        ("sample.cfg_channels=three", "not one of the choices"),
        ("sample.eta=2", "out of range"),
        ("data.columns.id=", "is empty"),
        ("data.flip=sometimes", "not one of the choices"),
        ("run.url=", "is empty"),
        ("data.url=http://[::1/x", "not a valid URL"),
        ("sample.vae=s3://bucket/vae", "not a folder on this machine"),
        ("reduction=fastest", "not one of the choices"),
        ("reduction_dtype=bf16", "would round at the borders of ranks"),
        ("model.preset=DiT-M/2", "not a known preset"),
        ("model.conditioning=film", "not one of the choices"),
        ("train.lanes=131072", "out of range"),
        ("train.sharding=4", "out of range"),
        ("train.precision=fp16", "not one of the choices"),
        ("train.tf32=yes", "not true or false"),
        ("train.sharding_ranks=6", "not a power of two"),
        ("collective.node_ranks=3", "not a power of two"),
    ] {
        let mistakes = load(SMALL, &[given]).unwrap_err();
        assert!(mistakes[0].problem.contains(problem), "{given}: {mistakes:#?}");
    }
}

#[test]
fn fast_sums_take_any_number_of_lanes_and_bf16() {
    let config = load(SMALL, &["reduction=fast", "train.lanes=12", "reduction_dtype=bf16"]).unwrap();
    assert_eq!((config.reduction, config.reduction_dtype), (Reduction::Fast, ReductionDtype::Bf16));
    let recorded = config.to_json();
    assert_eq!((&recorded["reduction"], &recorded["reduction_dtype"]), (&"fast".into(), &"bf16".into()));
    // Records of earlier versions have no such key.
    assert_eq!(load(SMALL, &["reduction=fast"]).unwrap().to_json().get("reduction_dtype"), None);
    assert!(mistake(&["train.lanes=12"]).advice.contains("or reduction = \"fast\""));
}

#[test]
fn sharding_is_a_number_and_may_be_within_groups_of_ranks() {
    let config = load(SMALL, &["train.sharding=3", "train.sharding_ranks=8"]).unwrap();
    assert_eq!((config.train.sharding, config.train.sharding_ranks), (Sharding::Weights, Some(8)));
    assert_eq!(config.to_json()["train"]["sharding"], 3);
    let refused = mistake(&["train.sharding=0", "train.sharding_ranks=8"]);
    assert!(refused.problem.contains("means nothing"), "{refused:?}");
}

#[test]
fn flips_are_off_stored_or_of_the_latent() {
    for (given, flip, recorded) in [
        (&[][..], Flip::Never, serde_json::json!(false)),
        (&["data.flip=true"], Flip::Stored, serde_json::json!(true)),
        (&["data.flip=latent"], Flip::Latent, serde_json::json!("latent")),
    ] {
        let config = load(SMALL, given).unwrap();
        assert_eq!((config.data.flip, &config.to_json()["data"]["flip"]), (flip, &recorded));
    }
}

#[test]
fn a_mix_takes_the_place_of_one_data_set() {
    let mix = r#"
data.columns.label = "class"
data.scaling_factor = 0.5
[[data.mix]]
url = "../a"
weight = 3
[[data.mix]]
url = "s3://key:hunter2@bucket/b"
weight = 0.5
columns.latent = "z"
scaling_factor = 0.25
"#;
    let alone = SMALL.replace("data.url = \"/data/a\"\n", "");
    let (root, tables) = mix.split_at(mix.find("[[").unwrap());
    let text = format!("{root}{alone}{tables}");
    let config = load(&text, &[]).unwrap();
    let [first, second] = &config.data.sources()[..] else { panic!("{:?}", config.data.mix) };
    assert_eq!(first.url.iter().collect::<Vec<_>>(), ["file:///home/ada/a"]);
    assert_eq!((first.weight, first.scaling_factor), (3.0, Some(0.5)));
    assert_eq!((&first.columns.latent[..], &first.columns.label[..]), ("latent", "class"));
    assert_eq!((&second.columns.latent[..], &second.columns.label[..]), ("z", "class"));
    assert_eq!((second.weight, second.scaling_factor), (0.5, Some(0.25)));
    assert!(!config.to_json().to_string().contains("hunter2"));
    assert_eq!(config.to_json()["data"]["mix"][1]["url"], "s3://bucket/b");

    let keys = |text: &str, overrides: &[&str]| -> Vec<String> {
        load(text, overrides).unwrap_err().into_iter().map(|mistake| mistake.key).collect()
    };
    assert_eq!(keys(&text, &["data.url=/data/a"]), ["data.mix"]);
    assert_eq!(keys(&alone, &[]), ["data.url"]);
    assert_eq!(
        keys(&alone, &["data.mix=[{weight = 0}, {url = \"http://[::1/x\", weight = 1, wieght = 2}]"]),
        ["data.mix[0].url", "data.mix[0].weight", "data.mix[1].url", "data.mix[1].wieght"]
    );
    let shown = format!("{:?}", load(&alone, &["data.mix=[\"s3://key:hunter2@bucket/b\"]"]).unwrap_err());
    assert!(!shown.contains("hunter2"), "{shown}");
}

#[test]
fn skipping_needs_a_budget_and_a_budget_skipping() {
    let data = load(SMALL, &["data.on_broken=skip", "data.skip_budget_rows=100"]).unwrap().data;
    assert_eq!((data.on_broken, data.skip_budget_rows), (OnBroken::Skip, Some(100)));
    assert!(load(SMALL, &[]).unwrap().to_json()["data"].get("on_broken").is_none());
    assert!(mistake(&["data.on_broken=skip"]).advice.contains("data.skip_budget_rows"));
    assert_eq!(mistake(&["data.skip_budget_rows=5"]).key, "data.skip_budget_rows");
    assert_eq!(mistake(&["data.on_broken=skip", "data.skip_budget_rows=0"]).problem, "is out of range");
}

#[test]
fn captions_are_weighed_where_they_are_read() {
    let data = load(SMALL, &["data.caption_tokens=77", "data.caption_weights=[0.95, 0.05]"]).unwrap().data;
    assert_eq!((data.caption_tokens, &data.caption_weights[..]), (Some(77), &[0.95, 0.05][..]));
    let recorded = load(SMALL, &[]).unwrap().to_json()["data"].clone();
    assert!(recorded.get("caption_tokens").is_none() && recorded.get("caption_weights").is_none());
    assert!(mistake(&["data.caption_weights=[1.0]"]).advice.contains("data.caption_tokens"));
    for (weights, problem) in [
        ("[]", "leaves no caption"),
        ("[0, 0.0]", "leaves no caption"),
        ("[1, -1]", "is out of range"),
        ("[nan]", "is out of range"),
        ("0.5", "is not an array of numbers"),
    ] {
        let mistake = mistake(&["data.caption_tokens=77", &format!("data.caption_weights={weights}")]);
        assert_eq!((mistake.key.as_str(), mistake.problem.as_str()), ("data.caption_weights", problem), "{weights}");
    }
    assert_eq!(mistake(&["data.caption_tokens=0"]).problem, "is out of range");
}

#[test]
fn groups_are_read_one_by_one_and_their_mistakes_are_named_by_number() {
    let groups = r#"
[[optimizer.groups]]
match = ["*.bias", "y_embedder.*"]
weight_decay = 0
[[optimizer.groups]]
match = ["blocks.0.*"]
lr_scale = 0.1
"#;
    let config = load(&format!("{SMALL}{groups}"), &[]).unwrap();
    let [first, second] = &config.optimizer.groups[..] else { panic!("{:?}", config.optimizer.groups) };
    assert_eq!(
        (&first.patterns[..], first.weight_decay),
        (&["*.bias".to_owned(), "y_embedder.*".into()][..], Some(0.0))
    );
    assert_eq!((second.weight_decay, second.lr_scale), (None, Some(0.1)));
    let recorded = config.to_json();
    assert_eq!(recorded["optimizer"]["groups"][1], serde_json::json!({"match": ["blocks.0.*"], "lr_scale": 0.1}));

    assert_eq!(mistake(&["optimizer.groups=[{match = [\"*\"], lrscale = 1}]"]).advice, "did you mean `lr_scale`?");
    for (group, key, problem) in [
        ("{weight_decay = 0}", "optimizer.groups[0].match", "is missing"),
        ("{match = []}", "optimizer.groups[0].match", "is empty"),
        ("{match = \"*\"}", "optimizer.groups[0].match", "is not an array of names"),
        ("{match = [\"*\"], lr_scale = -1}", "optimizer.groups[0].lr_scale", "is out of range"),
    ] {
        let mistake = mistake(&[&format!("optimizer.groups=[{group}]")]);
        assert_eq!((&mistake.key[..], &mistake.problem[..], &mistake.origin[..]), (key, problem, "--set"), "{group}");
    }
}

#[test]
fn keys_left_at_their_default_are_not_recorded() {
    // Runs recorded before these keys existed stay resumable.
    let recorded = load(SMALL, &[]).unwrap().to_json();
    assert_eq!(recorded["ema"], serde_json::json!({"decay": 0.9999}));
    for key in ["clip_grad_norm", "groups"] {
        assert_eq!(recorded["optimizer"].get(key), None, "{key}");
    }
}

#[test]
fn a_value_in_place_of_a_section_is_said_to_be_one() {
    assert_eq!(mistake(&["optimizer=5"]).problem, "is an integer, not a section");
}

#[test]
fn contradictions_are_refused() {
    for (given, key) in [
        (&["model.num_heads=5"][..], "model.num_heads"),
        (&["model.hidden_size=388"], "model.hidden_size"),
        (&["model.hidden_size=6", "model.num_heads=1"], "model.hidden_size"),
        (&["model.input_size=9"], "model.input_size"),
        (&["sample.steps=30", "diffusion.timesteps=25"], "sample.steps"),
        (&["sample.sampler=euler"], "sample.sampler"),
        (&["sample.sampler=ddim", "diffusion.objective=flow"], "sample.sampler"),
        (&["sample.sampler=ddpm", "sample.eta=0.5"], "sample.eta"),
        (&["sample.cfg_interval=[0.7, 0.3]"], "sample.cfg_interval"),
        (&["sample.every_steps=5"], "sample.every_steps"),
        (&["sample.every_steps=5", "sample.vae=/v", "model.class_dropout_prob=0"], "model.class_dropout_prob"),
        (&["optimizer.decay=cosine", "optimizer.warmup_steps=10"], "optimizer.warmup_steps"),
        (&["diffusion.zero_terminal_snr=true"], "diffusion.zero_terminal_snr"),
        (&["diffusion.objective=flow", "diffusion.schedule=linear"], "diffusion.schedule"),
        (&["diffusion.objective=flow", "diffusion.timesteps=500"], "diffusion.timesteps"),
        (&["diffusion.objective=flow", "diffusion.min_snr_gamma=5"], "diffusion.min_snr_gamma"),
        (&["diffusion.objective=flow", "diffusion.logit_std=2"], "diffusion.logit_std"),
        (&["diffusion.timestep_sampling=logit-normal"], "diffusion.timestep_sampling"),
        (&["diffusion.logit_mean=0.5"], "diffusion.logit_mean"),
        (&["diffusion.beta_start=0.001"], "diffusion.beta_start"),
        (&["diffusion.beta_end=0.02"], "diffusion.beta_end"),
        (&["diffusion.beta_start=0.1", "diffusion.beta_end=0.02"], "diffusion.beta_start"),
        (&["diffusion.schedule=squared-cosine", "diffusion.beta_end=0.02"], "diffusion.beta_end"),
    ] {
        assert_eq!(mistake(given).key, key, "{given:?}");
    }
    assert!(
        load(SMALL, &["sample.every_steps=5", "sample.vae=/v", "model.class_dropout_prob=0", "sample.cfg_scale=1"])
            .is_ok()
    );
    assert!(load(SMALL, &["optimizer.warmup_steps=10"]).is_ok());
}

#[test]
fn every_objective_and_schedule_has_its_keys() {
    let diffusion = |overrides: &[&str]| load(SMALL, overrides).unwrap().diffusion;
    let v = diffusion(&[
        "diffusion.objective=v",
        "diffusion.schedule=scaled_linear",
        "diffusion.beta_start=0.001",
        "diffusion.beta_end=0.01",
        "diffusion.zero_terminal_snr=true",
        "diffusion.min_snr_gamma=5",
    ]);
    assert_eq!((v.objective, v.schedule), (Objective::V, Schedule::ScaledLinear));
    assert_eq!((v.beta_start, v.beta_end, v.zero_terminal_snr), (Some(0.001), Some(0.01), true));
    assert_eq!(v.min_snr_gamma, Some(5.0));
    let x_start = diffusion(&["diffusion.objective=x_start", "diffusion.schedule=squaredcos_cap_v2"]);
    assert_eq!((x_start.objective, x_start.schedule), (Objective::XStart, Schedule::SquaredCosine));
    let sampling = ["diffusion.timestep_sampling=logit-normal", "diffusion.logit_mean=-0.5"];
    let flow = diffusion(&["diffusion.objective=flow", sampling[0], sampling[1], "sample.steps=2000"]);
    assert_eq!((flow.timestep_sampling, flow.logit_mean, flow.logit_std), (TimestepSampling::LogitNormal, -0.5, 1.0));
}

#[test]
fn keys_of_the_diffusion_are_recorded_where_they_say_something() {
    let record = |overrides: &[&str]| load(SMALL, overrides).unwrap().to_json()["diffusion"].clone();
    // As recorded before the further keys existed, so that those runs can go on.
    assert_eq!(record(&[]), serde_json::json!({"objective": "eps", "schedule": "linear", "timesteps": 1000}));
    let recorded = record(&["diffusion.objective=flow", "diffusion.timestep_sampling=logit-normal"]);
    assert_eq!(recorded["timestep_sampling"], "logit-normal");
    for overrides in [&["diffusion.objective=v", "diffusion.zero_terminal_snr=true"][..], &[]] {
        let read: DiffusionConfig = serde_json::from_value(record(overrides)).unwrap();
        assert_eq!(read, load(SMALL, overrides).unwrap().diffusion);
    }
}

#[test]
fn validation_is_there_with_its_url_and_says_what_it_measures() {
    let config = load(SMALL, &[]).unwrap();
    assert!(config.validation.is_none() && config.metrics().is_empty());
    assert_eq!(config.to_json()["validation"], serde_json::Value::Null);
    let config = load(SMALL, &["validation.url=../val", "checkpoint.keep_best=2"]).unwrap();
    let validation = config.validation.clone().unwrap();
    assert_eq!(validation, ValidationConfig::of("file:///home/ada/val".to_owned()));
    assert_eq!(config.metrics(), ["val_loss/ema", "val_loss/model"]);
    let read: ValidationConfig = serde_json::from_value(config.to_json()["validation"].clone()).unwrap();
    assert_eq!(read, validation);
    let config = load(SMALL, &["validation.url=/v", "validation.every_steps=0"]).unwrap();
    assert!(config.metrics().is_empty());
}

#[test]
fn validation_and_best_checkpoints_must_fit_together() {
    for (given, key) in [
        (&["validation.every_steps=5"][..], "validation.url"),
        (&["validation.weights=[\"ema\"]"], "validation.url"),
        (&["validation.url=/v", "validation.rows=9"], "validation.bins"),
        (&["validation.url=/v", "validation.weights=[]"], "validation.weights"),
        (&["validation.url=/v", "validation.weights=[\"ema\", \"emma\"]"], "validation.weights"),
        (&["validation.url=/v", "validation.weights=[\"ema\", \"ema\"]"], "validation.weights"),
        (&["checkpoint.keep_best=1"], "checkpoint.keep_best"),
        (&["checkpoint.best_metric=val_loss/ema"], "checkpoint.best_metric"),
        (&["checkpoint.keep_best=1", "validation.url=/v", "validation.every_steps=0"], "checkpoint.keep_best"),
        (&["checkpoint.keep_best=1", "validation.url=/v", "validation.weights=[\"model\"]"], "checkpoint.keep_best"),
        (&["checkpoint.best_metric=fid/ema", "validation.url=/v"], "checkpoint.best_metric"),
        (&["checkpoint.keep_every=1500"], "checkpoint.keep_every"),
        (&["checkpoint.every_steps=0"], "checkpoint.every_steps"),
        (
            &["checkpoint.every_steps=0", "checkpoint.every_minutes=5", "checkpoint.keep_every=5"],
            "checkpoint.keep_every",
        ),
    ] {
        assert_eq!(mistake(given).key, key, "{given:?}");
    }
    let refused = mistake(&["checkpoint.best_metric=fid/ema", "validation.url=/v"]);
    assert!(refused.advice.contains("\"val_loss/ema\" or \"val_loss/model\""), "{refused}");
    assert!(load(SMALL, &["validation.every_steps=0"]).is_ok());
    assert!(load(SMALL, &["checkpoint.every_steps=0", "checkpoint.every_minutes=30"]).is_ok());
    let fitting = ["checkpoint.keep_best=1", "checkpoint.best_metric=val_loss/model", "checkpoint.keep_every=5000"];
    assert!(load(SMALL, &[&fitting[..], &["validation.url=/v", "validation.every_steps=500"]].concat()).is_ok());
    assert!(load(SMALL, &["validation.url=/v", "validation.rows=5", "validation.draws=2"]).is_ok());
}

#[test]
fn fid_needs_a_reference_weights_and_a_vae_and_can_choose_the_best_checkpoint() {
    let given = ["fid.reference=../ref.npz", "fid.inception=/i.pth", "sample.vae=/vae", "fid.every_steps=500"];
    let with = |more: &[&'static str]| [&given[..], more].concat();
    let config = load(SMALL, &with(&["checkpoint.best_metric=fid/ema", "checkpoint.keep_best=1"])).unwrap();
    let fid = config.fid.clone().unwrap();
    assert_eq!((fid.reference.to_str(), fid.num), (Some("/home/ada/ref.npz"), 10_000));
    assert_eq!(config.metrics(), ["fid/ema", "inception_score/ema"]);
    assert!(load(SMALL, &[]).unwrap().to_json().get("fid").is_none());
    for (given, key) in [
        (vec!["fid.num=5"], "fid.reference"),
        (vec!["fid.reference=/r.npz", "sample.vae=/vae"], "fid.inception"),
        (vec!["fid.reference=/r.npz", "fid.inception=/i.pth"], "fid.reference"),
        (with(&["fid.weights=[\"emma\"]"]), "fid.weights"),
        (with(&["fid.num=1"]), "fid.num"),
        (with(&["model.class_dropout_prob=0"]), "model.class_dropout_prob"),
        (with(&["checkpoint.best_metric=sfid/ema"]), "checkpoint.best_metric"),
    ] {
        assert_eq!(mistake(&given).key, key, "{given:?}");
    }
}

#[test]
fn a_key_with_a_mistake_is_not_blamed_twice() {
    assert_eq!(mistake(&["model.num_heads=0"]).key, "model.num_heads");
    assert_eq!(mistake(&["model.preset=DiT-M/2", "model.input_size=9"]).key, "model.preset");
}

#[test]
fn an_override_of_a_text_key_is_taken_by_its_text() {
    assert_eq!(load(SMALL, &["data.columns.id=5"]).unwrap().data.columns.id, "5");
    assert_eq!(load(SMALL, &["run.url=2024"]).unwrap().run.url, "file:///home/ada/configs/2024");
    assert_eq!(load(SMALL, &["sample.vae=../vae"]).unwrap().sample.vae, Some(PathBuf::from("/home/ada/vae")));
}

#[test]
fn secrets_are_in_no_message_and_in_no_json() {
    let secret = "s3://key:hunter2@bucket/run?sig=hunter2";
    let config = load(SMALL, &[&format!("run.url={secret}")]).unwrap();
    assert_eq!(config.run.url, secret);
    assert!(!config.to_json().to_string().contains("hunter2"));
    let config = load(SMALL, &[&format!("validation.url={secret}")]).unwrap();
    assert!(!config.to_json().to_string().contains("hunter2"));
    let shown = mistake(&["data.url=http://key:hunter2@[::1/x"]).to_string();
    assert!(!shown.contains("hunter2"), "{shown}");
    let shown = parse(Path::new("x.toml"), "a = 1\nrun.url = \"s3://key:hunter2@b\n", Path::new("/"), &[])
        .unwrap_err()
        .to_string();
    assert!(shown.starts_with("x.toml:2:") && !shown.contains("hunter2"), "{shown}");
}

#[test]
fn json_is_nested_by_section_and_reads_like_the_file() {
    let json = load(SMALL, &[]).unwrap().to_json();
    assert_eq!(json.pointer("/train/lanes"), Some(&serde_json::json!(4)));
    assert_eq!(json.pointer("/data/columns/id"), Some(&serde_json::json!("id")));
    assert_eq!(json.pointer("/optimizer/decay"), Some(&serde_json::json!("constant")));
    assert_eq!(json.pointer("/seed"), Some(&serde_json::json!(0)));
}

const FINE_TUNING: &str = r#"
[init]
from = "../runs/base"
classes = "new"
positions = "interpolate"
[lora]
rank = 8
also_train = ["y_embedder.*"]
"#;

#[test]
fn fine_tuning_has_its_sections() {
    let config = load(SMALL, &[]).unwrap();
    assert_eq!((&config.init, &config.lora, config.train.freeze.is_empty()), (&None, &None, true));
    let json = config.to_json();
    assert!(json.get("init").is_none() && json.get("lora").is_none() && json["train"].get("freeze").is_none());

    let config = load(&format!("{SMALL}{FINE_TUNING}"), &["train.freeze=[\"blocks.0.*\"]"]).unwrap();
    let (init, lora) = (config.init.clone().unwrap(), config.lora.clone().unwrap());
    assert_eq!((init.from.as_str(), init.weights.as_str()), ("file:///home/ada/runs/base", "ema"));
    assert_eq!((init.classes, init.positions), (InitClasses::New, Some(InitPositions::Interpolate)));
    assert_eq!((init.null_class, init.learn_sigma), (Adapt::Keep, Adapt::Keep));
    assert_eq!((lora.rank, lora.alpha, lora.scale()), (8, 8.0, 1.0));
    assert_eq!(lora.targets, ["attn.qkv", "attn.proj", "mlp.fc1", "mlp.fc2"]);
    assert_eq!(config.train.freeze, ["blocks.0.*"]);
    let recorded: LoraConfig = serde_json::from_value(config.to_json()["lora"].clone()).unwrap();
    assert_eq!(recorded, lora);
    let secret = load(&format!("{SMALL}{FINE_TUNING}"), &["init.from=s3://key:hunter2@bucket/run"]).unwrap();
    assert!(!secret.to_json().to_string().contains("hunter2"));
}

#[test]
fn fine_tuning_keys_without_what_they_belong_to_are_refused() {
    for (given, key) in [
        ("init.classes=new", "init.from"),
        ("lora.alpha=2", "lora.rank"),
        ("init.from=", "init.from"),
        ("train.freeze=blocks", "train.freeze"),
        ("train.freeze=[1]", "train.freeze"),
    ] {
        assert_eq!(mistake(&[given]).key, key, "{given}");
    }
    let mistakes = load(&format!("{SMALL}{FINE_TUNING}"), &["lora.targets=[]", "init.positions=stretch"]).unwrap_err();
    let keys: Vec<&str> = mistakes.iter().map(|mistake| mistake.key.as_str()).collect();
    assert_eq!(keys, ["init.positions", "lora.targets"]);
}

#[test]
fn a_key_younger_than_recorded_runs_is_recorded_only_where_it_says_something() {
    for (key, default, others) in [
        ("conditioning", "adaln-zero", &["adaln", "cross-attention", "in-context"][..]),
        ("numerics", "official", &["stock-diffusers"]),
    ] {
        let recorded =
            |given: &[&str]| load(SMALL, given).unwrap().to_json().pointer(&format!("/model/{key}")).cloned();
        assert_eq!(recorded(&[]), None);
        assert_eq!(recorded(&[&format!("model.{key}={default}")]), None);
        for other in others {
            assert_eq!(recorded(&[&format!("model.{key}={other}")]), Some(serde_json::json!(other)));
        }
    }
}

#[test]
fn a_file_that_is_not_there_is_named() {
    let error = RunConfig::load(Path::new("/no/such/file.toml"), &[]).unwrap_err().to_string();
    assert!(error.contains("/no/such/file.toml"), "{error}");
}

#[test]
fn the_shipped_configs_load() {
    let folder = Path::new(env!("CARGO_MANIFEST_DIR"));
    let quickstart = RunConfig::load(&folder.join("quickstart.toml"), &[]).unwrap();
    let root = folder.canonicalize().unwrap().parent().unwrap().to_owned();
    assert_eq!(
        quickstart.data.url.as_ref().unwrap().iter().map(location::local_path).collect::<Vec<_>>(),
        [Some(root.join("data/quickstart"))]
    );
    assert_eq!(quickstart.sample.vae, Some(root.join("assets/vae/fashion-kl-f4")));
    let paper = RunConfig::load(&folder.join("dit-xl-2.toml"), &[]).unwrap();
    assert_eq!((paper.global_batch(), paper.model.hidden_size, paper.optimizer.lr), (256, 1152, 1e-4));
}

#[test]
fn several_data_urls_are_a_list_whose_secrets_are_not_shown() {
    let config = load(SMALL, &["data.url=[\"a/x-*.parquet\", \"s3://b/part-{00..07}.parquet\"]"]).unwrap();
    let urls: Vec<&str> = config.data.url.iter().flat_map(|urls| urls.iter()).collect();
    assert!(urls[0].starts_with("file:///") && urls[0].ends_with("/a/x-*.parquet"), "{urls:?}");
    assert_eq!(urls[1], "s3://b/part-{00..07}.parquet");
    assert_eq!(config.to_json()["data"]["url"].as_array().map(Vec::len), Some(2));
    let shown = mistake(&["data.url=[\"s3://key:hunter2@b/x\", 3]"]).to_string();
    assert!(shown.contains("array of strings") && !shown.contains("hunter2"), "{shown}");
    assert!(mistake(&["data.url=[]"]).to_string().contains("array of strings"));
}
