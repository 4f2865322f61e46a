//! A run that begins from another run's weights: other classes, other image size, frozen parts, adapters.

use crate::experiment::{Experiment, binary, run, run_ok, write_latents};
use std::collections::BTreeMap;
use std::process::Command;
use tch::{Kind, Tensor};
use trainer::interop::{self, WeightsSection};
use trainer::model::{Model, WeightSet, no_probe};
use trainer::recipe::Recipe;

/// The experiment with a trained base run, and a data set of 5 classes and larger latents.
fn with_base() -> (Experiment, String) {
    let experiment = Experiment::new();
    experiment.train(2, "base", &["optimizer.lr=0.01"]);
    write_latents(&experiment.path("other"), 5, 8, |_, _| {});
    let data = format!("data.url={:?}", experiment.path("other").to_str().unwrap());
    (experiment, data)
}

fn from_base(experiment: &Experiment) -> String {
    format!("init.from={:?}", experiment.path("base").to_str().unwrap())
}

/// SHA-256 of every tensor of a run's newest checkpoint.
fn tensors(experiment: &Experiment, run: &str) -> BTreeMap<String, String> {
    let ran = run_ok(Command::new(binary("trainer")).args(["digest", "--tensors"]).arg(experiment.path(run)));
    let split = |line: &str| {
        let mut words = line.split(' ');
        (words.next().unwrap().to_owned(), words.next().unwrap().to_owned())
    };
    ran.stdout.lines().skip(4).map(split).collect()
}

#[test]
fn a_run_with_other_classes_another_size_frozen_parts_and_adapters_begins_from_another_run() {
    let (experiment, data) = with_base();
    let from = from_base(&experiment);
    let init = [from.as_str(), "init.classes=new", "init.positions=interpolate"];
    let tuning = [
        data.as_str(),
        "lora.rank=2",
        "lora.alpha=4",
        "lora.also_train=[\"y_embedder.*\"]",
        "train.freeze=[\"blocks.0.mlp.*\"]",
    ];
    let ran = experiment.train(1, "tuned", &[&init[..], &tuning].concat());
    for change in
        ["5 new rows of classes in place of the source's 3, its row of the null class kept", "from 2×2 to 4×4"]
    {
        assert!(ran.text().contains(change), "`{change}`: {}", ran.text());
    }
    let log = experiment.log("tuned");
    let event = log.iter().find(|event| event["event"] == "init").expect("an init event");
    let source = event["from"].as_str().unwrap();
    assert!(source.contains("/base/checkpoints/step-000000010/") && event["changes"].as_array().unwrap().len() == 2);
    let start = log.iter().find(|event| event["event"] == "start").unwrap();
    assert!(start["trainable"].as_u64().unwrap() * 5 < start["params"].as_u64().unwrap(), "{start}");

    // On two ranks, cut in two, the second half without [init]: the same bits, and the record of where it began.
    run_ok(&mut experiment.launcher(2, "halves", &[&init[..], &tuning, &["train.steps=4"]].concat()));
    experiment.train(1, "halves", &tuning);
    assert_eq!(experiment.digest("halves"), experiment.digest("tuned"));
    let config =
        |run: &str| interop::run::reader(experiment.path(run).to_str().unwrap()).unwrap().manifest().config.clone();
    assert_eq!(config("halves")["init"], config("tuned")["init"]);
    assert_eq!(config("tuned")["init"]["source"], source);

    let (base, tuned) = (tensors(&experiment, "base"), tensors(&experiment, "tuned"));
    let mut adapters = 0;
    for (name, digest) in tuned.iter().filter_map(|(name, digest)| Some((name.strip_prefix("model/")?, digest))) {
        let changed = base.get(&format!("ema/{name}")) != Some(digest);
        adapters += usize::from(name.contains("lora_"));
        let trained = name.contains("lora_") || name.starts_with("y_embedder");
        assert_eq!(changed, trained || name == "pos_embed", "{name}");
        let moments = tuned.contains_key(&format!("adamw/exp_avg/{name}"));
        assert_eq!(moments, trained && !name.starts_with("blocks.0.mlp."), "{name}");
    }
    assert_eq!(adapters, 2 * 2 * 4);

    let recipe = Recipe::of_manifest(&config("tuned")).unwrap();
    let merged = interop::read_weights(experiment.path("tuned").to_str().unwrap(), WeightsSection::Model).unwrap();
    let base_model = Recipe { lora: None, train: Default::default(), ..recipe.clone() }.build_model().unwrap();
    let with_adapters = forward(&*recipe.build_model().unwrap(), sections(&experiment, "tuned"));
    let difference = forward(&*base_model, merged.tensors.into_iter().collect()) - &with_adapters;
    let difference = difference.abs().max().double_value(&[]);
    assert!(difference <= 1e-6, "{difference}");
    assert!(with_adapters.abs().max().double_value(&[]) > 1e-3, "a model that was trained");

    export(&experiment, "tuned", "safetensors", "merged.safetensors");
    let bytes = std::fs::read(experiment.path("merged.safetensors")).unwrap();
    let exported = safetensors::SafeTensors::deserialize(&bytes).unwrap();
    let names: Vec<String> = base_model.named_params().into_iter().map(|(name, _)| name).collect();
    assert!(exported.len() == names.len() && names.iter().all(|name| exported.tensor(name).is_ok()));
    let mut command = Command::new(binary("trainer"));
    command.args(["export", "--format", "train-pt", "--checkpoint"]).arg(experiment.path("tuned"));
    let refused = run(command.arg("--out").arg(experiment.path("tuned.pt")));
    assert!(refused.code != Some(0) && refused.stderr.contains("adapters"), "{}", refused.text());
    let vae = std::path::Path::new(env!("CARGO_MANIFEST_DIR")).join("../assets/vae/fashion-kl-f4");
    let mut sample = Command::new(binary("trainer"));
    sample.args(["sample", "--num", "2", "--steps", "2", "--vae"]).arg(vae).arg("--checkpoint");
    run_ok(sample.arg(experiment.path("tuned")).arg("--out").arg(experiment.path("samples.npz")));
}

fn export(experiment: &Experiment, run: &str, format: &str, out: &str) {
    let mut command = Command::new(binary("trainer"));
    command.args(["export", "--format", format, "--checkpoint"]).arg(experiment.path(run));
    run_ok(command.arg("--out").arg(experiment.path(out)));
}

/// The model's weights of a run as they lie in its checkpoint.
fn sections(experiment: &Experiment, run: &str) -> std::collections::HashMap<String, Tensor> {
    let reader = interop::run::reader(experiment.path(run).to_str().unwrap()).unwrap();
    let names: Vec<String> = reader.names().filter(|name| name.starts_with("model/")).map(str::to_owned).collect();
    let tensor = |name: String| {
        let shape: Vec<i64> = reader.shape(&name).unwrap().iter().map(|&side| side as i64).collect();
        let values = Tensor::from_slice(&reader.read_all_f32(&name).unwrap()).view(shape.as_slice());
        (name["model/".len()..].to_owned(), values)
    };
    names.into_iter().map(tensor).collect()
}

fn forward(model: &dyn Model, weights: std::collections::HashMap<String, Tensor>) -> Tensor {
    let weights = WeightSet::from_named(model, weights).unwrap();
    let x = Tensor::arange(2 * 4 * 64, (Kind::Float, tch::Device::Cpu)).sin().view([2, 4, 8, 8]);
    let (t, y) = (Tensor::from_slice(&[3f32, 700.0]), Tensor::from_slice(&[1i64, 5]));
    tch::no_grad(|| weights.forward(model, &x, &t, &y, &mut no_probe))
}

#[test]
fn without_a_change_the_first_weights_are_the_sources_average() {
    let (experiment, _) = with_base();
    // A learning rate that changes nothing: what is saved is what the run began with.
    let still = ["optimizer.lr=1e-30", "optimizer.weight_decay=0", &from_base(&experiment)];
    experiment.train(1, "still", &still);
    experiment.train(2, "raw", &[&still[..], &["init.weights=model"]].concat());
    export(&experiment, "base", "safetensors", "base.safetensors");
    let file = format!("init.from={:?}", experiment.path("base.safetensors").to_str().unwrap());
    experiment.train(1, "of-file", &[&still[..2], &[&file]].concat());
    assert_eq!(experiment.digest("of-file"), experiment.digest("still"));
    let (base, still, raw) = (tensors(&experiment, "base"), tensors(&experiment, "still"), tensors(&experiment, "raw"));
    for (name, digest) in base.iter().filter_map(|(name, digest)| Some((name.strip_prefix("ema/")?, digest))) {
        assert_eq!(still[&format!("model/{name}")], *digest, "{name}");
        assert_eq!(raw[&format!("model/{name}")], base[&format!("model/{name}")], "{name}");
    }
}

#[test]
fn what_was_not_asked_for_is_refused_before_the_run_exists() {
    let (experiment, data) = with_base();
    let from = from_base(&experiment);
    let refuse = |overrides: &[&str], says: &[&str]| {
        let ran = run(&mut experiment.launcher(2, "refused", overrides));
        assert!(!matches!(ran.code, Some(0) | Some(75)) && !ran.text().contains("panicked"), "{}", ran.text());
        for text in says {
            assert!(ran.stderr.contains(text), "`{text}` is not said: {}", ran.text());
        }
        assert!(!experiment.path("refused/attempts").exists(), "no attempt is claimed: {}", ran.text());
    };
    refuse(&[&data, &from], &["`y_embedder.embedding_table.weight`", "init.classes", "`pos_embed`", "init.positions"]);
    refuse(
        &[&from, "model.depth=3"],
        &["`model.depth` is 3, but 2 in the source", "`blocks.2.attn.qkv.weight` [96, 32] is missing"],
    );
    refuse(&[&from, "model.num_heads=4"], &["`model.num_heads` is 4, but 2 in the source"]);
    refuse(&[&from, "init.weights=ema-0.5"], &["`ema-0.5`"]);
    refuse(&["init.from=/nonexistent/base"], &["init.from", "/nonexistent/base"]);
    refuse(&["lora.rank=2"], &["init.from"]);
    refuse(&[&from, "lora.rank=2", "lora.targets=[\"attn.q\"]"], &["\"attn.q\" is no linear layer", "`attn.qkv`"]);
    refuse(&["train.freeze=[\"block.*\"]"], &["`train.freeze`: \"block.*\"", "`blocks."]);
    refuse(&["train.freeze=[\"*\"]"], &["leaves nothing to train"]);
}
