#![allow(clippy::unwrap_used)]

use super::*;
use crate::interop::values::Dtype;
use crate::interop::{InteropError, NamedWeights, safetensors};
use crate::model::dit::{Conditioning, Dit, DitConfig, Numerics};
use crate::model::{Init, Model};
use crate::recipe::Recipe;
use std::collections::BTreeMap;
use std::path::{Path, PathBuf};
use tch::{Device, Kind, Tensor};

fn recipe(num_classes: i64) -> Recipe {
    let vae_digest = "acb9ddd90b84b3f86f3dfcf83a4ebb2d2cd1999decd0fb8c2a60348e1c5765e1";
    let record = serde_json::json!({
        "model": {
            "input_size": 8, "in_channels": 4, "patch_size": 2, "hidden_size": 16, "depth": 3, "num_heads": 2,
            "mlp_ratio": 4.0, "class_dropout_prob": 0.2, "num_classes": num_classes, "learn_sigma": true
        },
        "diffusion": { "objective": "eps", "schedule": "linear", "timesteps": 1000 },
        "dataset": { "rows": 1, "latent_shape": [4, 8, 8], "scaling_factor": 1.25, "vae_digest": vae_digest },
        "sample": { "vae": null }
    });
    Recipe::of_manifest(&record).unwrap()
}

fn weights(model: &DitConfig) -> BTreeMap<String, Tensor> {
    let named = Dit::new(model.clone()).unwrap().named_params().into_iter();
    named
        .map(|(name, spec)| match spec.init {
            Init::Table(values) => (name, Tensor::from_slice(&values).view(spec.shape.as_slice())),
            _ => (name, Tensor::randn(spec.shape.as_slice(), (Kind::Float, Device::Cpu))),
        })
        .collect()
}

fn assert_same(found: &BTreeMap<String, Tensor>, expected: &BTreeMap<String, Tensor>) {
    assert_eq!(found.keys().collect::<Vec<_>>(), expected.keys().collect::<Vec<_>>());
    for (name, tensor) in expected {
        assert!(found[name].equal(tensor), "{name}");
    }
}

fn vae() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("../assets/vae/fashion-kl-f4")
}

/// Writes a pipeline of random weights into `folder`.
fn export(folder: &Path, recipe: &Recipe) -> (BTreeMap<String, Tensor>, Vec<String>) {
    let weights = weights(&recipe.model);
    let pipeline = Pipeline { weights: &weights, recipe, vae: Some(&vae()), class_names: None };
    let notes = pipeline.write(folder).unwrap();
    (weights, notes)
}

fn json(path: &Path) -> serde_json::Value {
    serde_json::from_str(&std::fs::read_to_string(path).unwrap()).unwrap()
}

#[test]
fn a_pipeline_reads_back_bit_for_bit_however_many_classes() {
    for classes in [1, 2, 10, 998, 999, 1000, 1001] {
        let folder = tempfile::tempdir().unwrap();
        let recipe = recipe(classes);
        let (written, notes) = export(folder.path(), &recipe);
        let back = read(folder.path()).unwrap();
        assert_same(&back.tensors, &written);
        assert_eq!(back.model.as_ref(), Some(&recipe.model), "{classes}");
        assert!(notes.iter().any(|note| note.contains(PATCH)), "{notes:?}");
        assert_eq!(notes.iter().any(|note| note.starts_with("WARNING")), classes > 1000, "{notes:?}");
        // The null label of the pipeline is this model's.
        if classes <= 1000 {
            let file = folder.path().join("transformer/diffusion_pytorch_model.safetensors");
            let raw = crate::interop::read_weights(file.to_str().unwrap(), Default::default()).unwrap().tensors;
            let table = &raw["transformer_blocks.2.norm1.emb.class_embedder.embedding_table.weight"];
            let null = &written["y_embedder.embedding_table.weight"].get(classes);
            assert!(table.get(1000).equal(null) && table.get(classes).equal(null), "{classes}");
        }
        // diffusers drops what it does not know when it saves a model: the number of classes still shows.
        let config = folder.path().join("transformer/config.json");
        let mut json = json(&config);
        json.as_object_mut().unwrap().remove("_ditharos");
        std::fs::write(&config, json.to_string()).unwrap();
        let back = read(&folder.path().join("transformer")).unwrap();
        assert_same(&back.tensors, &written);
        assert_eq!(back.model.unwrap(), DitConfig { class_dropout_prob: 0.1, ..recipe.model });
    }
}

#[test]
fn a_model_with_the_numerics_of_stock_diffusers_keeps_them_and_needs_no_patch() {
    let folder = tempfile::tempdir().unwrap();
    let mut recipe = recipe(3);
    recipe.model.numerics = Numerics::STOCK_DIFFUSERS;
    let (_, notes) = export(folder.path(), &recipe);
    assert!(!notes.iter().any(|note| note.contains(PATCH)), "{notes:?}");
    assert_eq!(json(&folder.path().join("transformer/config.json"))["norm_eps"], 1e-5);
    assert_eq!(read(folder.path()).unwrap().model, Some(recipe.model));
}

#[test]
fn the_folder_says_what_the_pipeline_needs() {
    let folder = tempfile::tempdir().unwrap();
    let root = folder.path().join("new/pipeline");
    let names: Vec<String> = ["T-shirt", "Trouser"].map(str::to_owned).into();
    let recipe = recipe(2);
    let weights = weights(&recipe.model);
    Pipeline { weights: &weights, recipe: &recipe, vae: Some(&vae()), class_names: Some(&names) }.write(&root).unwrap();
    let index = json(&root.join("model_index.json"));
    assert_eq!(index["id2label"], serde_json::json!({"0": "T-shirt", "1": "Trouser"}));
    let transformer = json(&root.join("transformer/config.json"));
    for (key, value) in
        [("num_embeds_ada_norm", 1000), ("out_channels", 8), ("sample_size", 8), ("attention_head_dim", 8)]
    {
        assert_eq!(transformer[key], value, "{key}");
    }
    assert_eq!(transformer["norm_eps"], 1e-6);
    // What the latents were multiplied by, not what this VAE's config says.
    assert_eq!(json(&root.join("vae/config.json"))["scaling_factor"], 1.25);
    let found = std::fs::read(root.join("vae/diffusion_pytorch_model.safetensors")).unwrap();
    assert!(found == std::fs::read(vae().join("diffusion_pytorch_model.safetensors")).unwrap());
    let scheduler = json(&root.join("scheduler/scheduler_config.json"));
    assert_eq!((&scheduler["beta_schedule"], &scheduler["clip_sample"]), (&"linear".into(), &false.into()));

    let again = Pipeline { weights: &weights, recipe: &recipe, vae: None, class_names: None }.write(&root);
    assert!(again.unwrap_err().to_string().contains("something already"));
    let few = Pipeline { weights: &weights, recipe: &recipe, vae: None, class_names: Some(&names[..1]) }
        .write(&folder.path().join("few"));
    assert!(few.unwrap_err().to_string().contains("2 classes"));
    let left: Vec<_> = folder.path().join("new").read_dir().unwrap().collect();
    assert_eq!(left.len(), 1, "{left:?}");
}

#[test]
fn shards_and_half_precision_files_are_read() {
    let folder = tempfile::tempdir().unwrap();
    let (mut written, _) = export(folder.path(), &recipe(3));
    let transformer = folder.path().join("transformer");
    let whole = transformer.join("diffusion_pytorch_model.safetensors");
    let all = crate::interop::read_weights(whole.to_str().unwrap(), Default::default()).unwrap().tensors;
    std::fs::remove_file(&whole).unwrap();
    let mut shards = [BTreeMap::new(), BTreeMap::new()];
    let mut map = BTreeMap::new();
    for (number, (name, tensor)) in all.into_iter().enumerate() {
        map.insert(name.clone(), format!("shard-{}.safetensors", number % 2));
        shards[number % 2].insert(name, tensor);
    }
    let [first, second] = shards.map(|tensors| NamedWeights { tensors, model: None });
    safetensors::write_weights(&transformer.join("shard-0.safetensors"), &first, Dtype::F16).unwrap();
    safetensors::write_weights(&transformer.join("shard-1.safetensors"), &second, Dtype::F16).unwrap();
    let index = transformer.join("diffusion_pytorch_model.safetensors.index.fp16.json");
    std::fs::write(&index, serde_json::json!({"metadata": {}, "weight_map": map}).to_string()).unwrap();

    let positions = written.remove("pos_embed").unwrap();
    let mut back = read(&transformer).unwrap().tensors;
    assert!(back.remove("pos_embed").unwrap().equal(&positions));
    let half = |tensor: &Tensor| tensor.to_kind(Kind::Half).to_kind(Kind::Float);
    assert_same(&back, &written.iter().map(|(name, tensor)| (name.clone(), half(tensor))).collect());

    map.insert("absent".to_owned(), "shard-1.safetensors".to_owned());
    std::fs::write(&index, serde_json::json!({"weight_map": map}).to_string()).unwrap();
    let error = read(&transformer).unwrap_err().to_string();
    assert!(error.contains("`absent` should be in shard-1.safetensors"), "{error}");
}

#[test]
fn copies_that_training_moved_apart_are_refused_by_name() {
    let folder = tempfile::tempdir().unwrap();
    export(folder.path(), &recipe(3));
    let file = folder.path().join("transformer/diffusion_pytorch_model.safetensors");
    let mut weights = crate::interop::read_weights(file.to_str().unwrap(), Default::default()).unwrap();
    let name = "transformer_blocks.2.norm1.emb.timestep_embedder.linear_1.bias";
    let moved = &weights.tensors[name] + 0.5;
    weights.tensors.insert(name.to_owned(), moved);
    safetensors::write_weights(&file, &weights, Dtype::F32).unwrap();
    let error = read(folder.path()).unwrap_err().to_string();
    assert!(error.contains(name) && error.contains("5.0e-1") && error.contains("block 2"), "{error}");
}

#[test]
fn folders_that_hold_no_dit_are_refused_with_the_reason() {
    let folder = tempfile::tempdir().unwrap();
    export(folder.path(), &recipe(3));
    let path = folder.path().join("transformer/config.json");
    let config = json(&path);
    for (key, value, says) in [
        ("_class_name", "PixArtTransformer2DModel".into(), "PixArtTransformer2DModel"),
        ("norm_type", "ada_norm_single".into(), "`norm_type` = \"ada_norm_single\""),
        ("num_layers", serde_json::json!(4), "transformer_blocks.3.attn1.to_k.bias: missing"),
        ("num_layers", serde_json::json!(2), "transformer_blocks.2.attn1.to_k.bias: no part of this config"),
        (
            "patch_size",
            serde_json::json!(4),
            "pos_embed.proj.weight: shape [16, 4, 2, 2], expected shape [16, 4, 4, 4]",
        ),
        ("patch_size", serde_json::json!(3), "patch_size 3 does not divide"),
        ("out_channels", serde_json::json!(5), "`out_channels` = 5"),
        ("cross_attention_dim", serde_json::json!(1152), "cross_attention_dim"),
        ("num_attention_heads", serde_json::json!("two"), "config.json: not the config"),
    ] {
        let mut changed = config.clone();
        changed[key] = value;
        std::fs::write(&path, changed.to_string()).unwrap();
        let error = read(folder.path()).unwrap_err().to_string();
        assert!(error.contains(says) && error.contains("transformer"), "{key}: {error}");
    }
    std::fs::write(&path, config.to_string()).unwrap();
    std::fs::remove_file(folder.path().join("transformer/diffusion_pytorch_model.safetensors")).unwrap();
    let error = read(folder.path()).unwrap_err().to_string();
    assert!(error.contains("no diffusion_pytorch_model.safetensors"), "{error}");
    std::fs::remove_file(path).unwrap();
    assert!(matches!(read(folder.path()), Err(InteropError::Diffusers(DiffusersError::Folder { .. }))));
}

#[test]
fn what_diffusers_cannot_hold_is_refused_before_anything_is_written() {
    let folder = tempfile::tempdir().unwrap();
    let target = folder.path().join("pipeline");
    let refused = |change: &dyn Fn(&mut Recipe, &mut BTreeMap<String, Tensor>)| {
        let mut recipe = recipe(3);
        let mut weights = weights(&recipe.model);
        change(&mut recipe, &mut weights);
        let outcome = Pipeline { weights: &weights, recipe: &recipe, vae: None, class_names: None }.write(&target);
        assert!(!target.exists());
        outcome.unwrap_err().to_string()
    };
    assert!(refused(&|recipe, _| recipe.model.mlp_ratio = 2.0).contains("mlp_ratio"));
    assert!(refused(&|recipe, _| recipe.model.conditioning = Conditioning::InContext).contains("InContext"));
    assert!(refused(&|recipe, _| recipe.model.class_dropout_prob = 0.0).contains("class_dropout_prob"));
    let interpolated = refused(&|_, weights| {
        let moved = &weights["pos_embed"] * 0.5;
        weights.insert("pos_embed".to_owned(), moved);
    });
    assert!(interpolated.contains("position table"), "{interpolated}");
    assert!(refused(&|_, weights| drop(weights.insert("lora".to_owned(), Tensor::from(1f32)))).contains("`lora`"));
}

#[test]
fn schedules_have_the_names_that_diffusers_gives_them() {
    let config = |diffusion: serde_json::Value| {
        let mut recipe = recipe(3);
        recipe.diffusion = serde_json::from_value(diffusion).unwrap();
        scheduler::config_of(&recipe)
    };
    for (diffusion, expected) in [
        (
            serde_json::json!({"objective": "v", "schedule": "linear", "timesteps": 500}),
            serde_json::json!({
                "beta_schedule": "linear", "beta_start": 2e-4, "beta_end": 0.04, "num_train_timesteps": 500,
                "prediction_type": "v_prediction", "rescale_betas_zero_snr": false, "timestep_spacing": "leading"
            }),
        ),
        (
            serde_json::json!({"objective": "eps", "schedule": "scaled-linear", "timesteps": 1000}),
            serde_json::json!({"beta_schedule": "scaled_linear", "beta_start": 0.00085, "beta_end": 0.012, "prediction_type": "epsilon"}),
        ),
        (
            serde_json::json!({
                "objective": "x_start", "schedule": "linear", "timesteps": 1000, "beta_start": 1e-3, "beta_end": 0.03,
                "zero_terminal_snr": true
            }),
            serde_json::json!({
                "beta_start": 1e-3, "beta_end": 0.03, "prediction_type": "sample", "rescale_betas_zero_snr": true,
                "timestep_spacing": "trailing"
            }),
        ),
        (
            serde_json::json!({"objective": "eps", "schedule": "squared-cosine", "timesteps": 1000}),
            serde_json::json!({"beta_schedule": "squaredcos_cap_v2"}),
        ),
    ] {
        let found = config(diffusion).unwrap();
        for (key, value) in expected.as_object().unwrap() {
            assert_eq!(&found[key], value, "{key} of {found}");
        }
    }
    let flow = config(serde_json::json!({"objective": "flow", "schedule": "linear", "timesteps": 1000}));
    assert!(flow.unwrap_err().to_string().contains("flow-matching"));
}
