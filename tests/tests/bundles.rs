//! `verify-bundle` on the recorded bundles, and on damaged copies of them.
#![allow(clippy::unwrap_used)]

use safetensors::tensor::TensorView;
use safetensors::{Dtype, SafeTensors};
use serde_json::Value;
use std::collections::{BTreeMap, HashMap};
use std::path::{Path, PathBuf};
use std::process::Command;

fn bundles() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("bundles")
}

/// Runs the binary: whether it exited with 0, and what it printed.
fn verify(files: &[PathBuf]) -> (bool, String) {
    let output = Command::new(env!("CARGO_BIN_EXE_verify-bundle")).args(files).output().unwrap();
    let code = output.status.code().unwrap();
    assert!(code == 0 || code == 1, "exit code {code}: {}", String::from_utf8_lossy(&output.stderr));
    (code == 0, String::from_utf8(output.stdout).unwrap())
}

#[test]
fn every_recorded_tensor_is_reproduced() {
    let entries = std::fs::read_dir(bundles()).unwrap().map(|entry| entry.unwrap().path());
    let mut files: Vec<PathBuf> = entries.filter(|path| path.extension().is_some_and(|e| e == "safetensors")).collect();
    files.sort();
    assert!(files.len() >= 18, "{files:?}");
    let (ok, text) = verify(&files);
    assert!(ok && !text.contains("FAIL"), "{text}");
    for file in &files {
        assert!(text.contains(&format!("{}: ok", file.display())), "{text}");
    }
}

/// A bundle taken apart.
struct Parts {
    tensors: BTreeMap<String, (Dtype, Vec<usize>, Vec<u8>)>,
    spec: Value,
}

impl Parts {
    fn read(path: &Path) -> Self {
        let bytes = std::fs::read(path).unwrap();
        let file = SafeTensors::deserialize(&bytes).unwrap();
        let part = |(name, view): (&str, TensorView)| {
            (name.to_owned(), (view.dtype(), view.shape().to_vec(), view.data().to_vec()))
        };
        let tensors = file.iter().map(part).collect();
        let (_, header) = SafeTensors::read_metadata(&bytes).unwrap();
        let spec = serde_json::from_str(&header.metadata().as_ref().unwrap()["spec"]).unwrap();
        Self { tensors, spec }
    }

    fn write(&self, path: &Path) {
        let view = |(dtype, shape, data): &'_ (Dtype, Vec<usize>, Vec<u8>)| (*dtype, shape.clone(), data.clone());
        let parts: Vec<_> = self.tensors.iter().map(|(name, part)| (name.clone(), view(part))).collect();
        let views = parts
            .iter()
            .map(|(name, (dtype, shape, data))| (name.clone(), TensorView::new(*dtype, shape.clone(), data).unwrap()));
        let metadata = HashMap::from([("spec".to_owned(), self.spec.to_string())]);
        std::fs::write(path, safetensors::serialize(views, Some(metadata)).unwrap()).unwrap();
    }

    /// Changes one float of a tensor.
    fn change(&mut self, name: &str, element: usize, change: impl Fn(f64) -> f64) {
        let (dtype, _, data) = self.tensors.get_mut(name).unwrap_or_else(|| panic!("{name}"));
        match dtype {
            Dtype::F32 => {
                let at = element * 4..element * 4 + 4;
                let value = f32::from_le_bytes(data[at.clone()].try_into().unwrap());
                data[at].copy_from_slice(&(change(f64::from(value)) as f32).to_le_bytes());
            }
            Dtype::F64 => {
                let at = element * 8..element * 8 + 8;
                let value = f64::from_le_bytes(data[at.clone()].try_into().unwrap());
                data[at].copy_from_slice(&change(value).to_le_bytes());
            }
            other => panic!("{name} is {other:?}"),
        }
    }
}

/// A folder with one damaged bundle, and its undamaged partner where it has one.
fn damaged(folder: &Path, file: &str, damage: &dyn Fn(&mut Parts)) -> PathBuf {
    std::fs::create_dir_all(folder).unwrap();
    for partner in [file.replace("_ema", ""), file.replace("_legacy_names", "")] {
        if partner != file {
            std::fs::copy(bundles().join(&partner), folder.join(&partner)).unwrap();
        }
    }
    let mut parts = Parts::read(&bundles().join(file));
    damage(&mut parts);
    let path = folder.join(file);
    parts.write(&path);
    path
}

/// What a run over many files says of one of them.
fn section<'a>(text: &'a str, path: &Path) -> &'a str {
    let start = text.find(&format!("{}: ", path.display())).unwrap_or_else(|| panic!("{} in {text}", path.display()));
    text[start..].split("\n\n").next().unwrap()
}

/// A bundle, what its failure must name, and the damage.
type Case<'a> = (&'a str, &'a str, &'a dyn Fn(&mut Parts));

/// Damages files, verifies them in one run, and looks for a line with FAIL and the given text in each one's section.
fn assert_all_fail(cases: &[Case]) {
    let folder = tempfile::tempdir().unwrap();
    let path = |(index, (file, _, damage)): (usize, &Case)| {
        damaged(&folder.path().join(index.to_string()), &format!("{file}.safetensors"), damage)
    };
    let files: Vec<PathBuf> = cases.iter().enumerate().map(path).collect();
    let (ok, text) = verify(&files);
    assert!(!ok, "{text}");
    for (file, (_, expected, _)) in files.iter().zip(cases) {
        let section = section(&text, file);
        assert!(section.contains(&format!("{}: FAIL", file.display())), "{section}");
        let named = section.lines().any(|line| line.contains("FAIL") && line.contains(expected));
        assert!(named, "no failure names `{expected}`: {section}");
    }
    let (ok, text) = verify(&files[..1]);
    assert!(!ok, "{text}");
}

#[test]
fn a_changed_value_fails_and_is_named() {
    let off = |value: f64| value + 0.01;
    assert_all_fail(&[
        ("dit_forward", "`out/block1`", &|parts| parts.change("weights/blocks.1.mlp.fc2.weight", 7, off)),
        ("dit_forward_lneps", "`out/tokens_in`", &|parts| parts.change("weights/pos_embed", 3, off)),
        ("dit_forward_alt", "`out/block0_qkv`", &|parts| parts.change("out/block0_qkv", 100, off)),
        ("dit_forward", "`out/pos_embed_d24_g7_f64`", &|parts| {
            parts.change("out/pos_embed_d24_g7_f64", 30, |v| v + 1e-11)
        }),
        ("dit_ablation_adaln", "`out/block0_ada`", &|parts| {
            parts.change("weights/blocks.0.adaLN_modulation.1.bias", 7, off)
        }),
        ("dit_ablation_cross_attention", "`grad/blocks.0.norm_cross.weight`", &|parts| {
            parts.change("grad/blocks.0.norm_cross.weight", 3, off)
        }),
        ("dit_ablation_in_context", "`out/loss`", &|parts| parts.change("in/noise", 17, |v| v + 0.5)),
        ("dit_cfg", "`out/b/cfg4.0`", &|parts| parts.change("in/b/x", 0, |v| v + 0.1)),
        ("diffusion_tables", "`out/linear/ddim50/betas`", &|parts| {
            parts.change("out/linear/ddim50/betas", 3, |v| v * (1.0 + 1e-10))
        }),
        ("training_losses", "`out/vb`", &|parts| parts.change("out/vb", 4, |v| v * 1.001)),
        ("training_losses", "`grad/blocks.0.attn.proj.weight`", &|parts| {
            parts.change("grad/blocks.0.attn.proj.weight", 5, off)
        }),
        ("training_losses", "`grad_vb/final_layer.linear.bias`", &|parts| {
            parts.change("grad_vb/final_layer.linear.bias", 5, off)
        }),
        ("training_losses_respaced", "`out/zero_model/vb`", &|parts| parts.change("in/noise", 17, |v| v + 0.5)),
        ("training_losses_t0hard", "`out/p_mean`", &|parts| {
            parts.change("weights/t_embedder.mlp.2.bias", 1, |v| v + 0.1)
        }),
        ("training_losses_t0hard", "`out/decoder_nll_bits", &|parts| {
            parts.change("out/decoder_nll_bits", 1, |v| v + 1.1)
        }),
        ("train_lr1e-3", "`final/blocks.1.attn.qkv.bias", &|parts| {
            parts.change("final/blocks.1.attn.qkv.bias", 0, off)
        }),
        ("train_lr1e-3", "`final/blocks.1.attn.qkv.bias (keys)`", &|parts| {
            parts.change("final/blocks.1.attn.qkv.bias", 40, off)
        }),
        ("train_lr1e-4", "`adam_v/pos_embed`", &|parts| {
            let part = parts.tensors["final/pos_embed"].clone();
            parts.tensors.insert("adam_v/pos_embed".to_owned(), part);
        }),
        ("train_lr1e-4", "`out/vb_per_sample`", &|parts| parts.change("out/vb_per_sample", 11, off)),
        ("train_lr1e-4", "in/step3/y_eff", &|parts| {
            parts.change("in/step3/drop_u", 2, |v| if v < 0.1 { 0.5 } else { 0.05 })
        }),
        ("train_lr1e-4_ema", "`emazero0.9999/x_embedder.proj.weight`", &|parts| {
            parts.change("emazero0.9999/x_embedder.proj.weight", 2, |v| v + 1e-6)
        }),
        ("train_lr1e-3_ema", "`ema0.99/pos_embed`", &|parts| parts.change("ema0.99/pos_embed", 2, off)),
        ("sampling", "`out/ddim10_nocfg/samples`", &|parts| parts.change("in/z", 0, |v| v + 0.1)),
        ("sampling", "`out/p10_nocfg_clip/x_steps`", &|parts| parts.change("in/p10_nocfg_clip/noises", 0, |v| v + 0.1)),
        ("sampling", "`out/p10_cfg1.5/x_steps (null half)`", &|parts| {
            parts.change("out/p10_cfg1.5/x_steps", 5 * 256 + 1, |v| v + 1.0)
        }),
        ("sit", "`out/ode_heun2_11_cfgnone/x_points`", &|parts| parts.change("in/z", 0, |v| v + 0.1)),
        ("sit", "`out/ode_dopri5_5_cfgnone/samples`", &|parts| {
            parts.change("out/ode_dopri5_5_cfgnone/samples", 7, |v| v + 0.1)
        }),
        ("sit", "`out/sde_Euler_sigma_Mean_10/x_steps`", &|parts| {
            parts.change("in/sde_Euler_sigma_Mean_10/noises", 0, |v| v + 0.1)
        }),
        ("diffusers_dit", "`blocks.1.attn.qkv.bias`", &|parts| {
            parts.change("diffusers/transformer_blocks.1.attn1.to_v.bias", 2, off)
        }),
        ("diffusers_dit", "`transformer_blocks.1.norm1.emb.timestep_embedder.linear_2.bias` differs", &|parts| {
            parts.change("diffusers/transformer_blocks.1.norm1.emb.timestep_embedder.linear_2.bias", 2, off)
        }),
        ("diffusers_dit", "`out/diffusers_stock`", &|parts| parts.change("out/diffusers_stock", 9, off)),
        ("diffusers_dit", "`out/diffusers_freqshift0`", &|parts| parts.change("out/diffusers_freqshift0", 9, off)),
        ("sit", "`out/u_t`", &|parts| parts.change("in/x0", 3, off)),
        ("sit", "`out/t_emb`", &|parts| parts.change("in/t", 1, |t| t / 2.0)),
        ("sit", "`out/mean_loss`", &|parts| parts.change("out/mean_loss", 0, |v| v * 1.001)),
        ("sit", "`grad/final_layer.linear.bias`", &|parts| parts.change("grad/final_layer.linear.bias", 5, off)),
        ("vae", "`out/dec/up1`", &|parts| parts.change("weights/decoder.up_blocks.1.resnets.0.conv1.weight", 2, off)),
        ("vae_legacy_names", "`out/enc/mid_attn`", &|parts| {
            parts.change("encoder.mid_block.attentions.0.query.weight", 2, |v| v + 1.0)
        }),
    ]);
}

#[test]
fn a_missing_or_superfluous_tensor_fails_and_is_named() {
    let without = |name: &'static str| move |parts: &mut Parts| assert!(parts.tensors.remove(name).is_some(), "{name}");
    let surplus = |parts: &mut Parts| {
        let part = parts.tensors["in/y"].clone();
        parts.tensors.insert("out/extra".to_owned(), part);
    };
    assert_all_fail(&[
        ("dit_forward", "`blocks.0.attn.qkv.bias` [96] is missing", &without("weights/blocks.0.attn.qkv.bias")),
        ("dit_forward", "`in/t_fractional`", &without("in/t_fractional")),
        ("dit_forward", "`out/block1`", &without("out/block1")),
        ("dit_forward", "`out/t_freq_dim", &without("out/t_freq_dim7")),
        ("dit_forward", "`out/extra`", &surplus),
        ("dit_ablation_in_context", "`out/block1`", &without("out/block1")),
        ("dit_ablation_adaln", "`out/final_ada`", &without("out/final_ada")),
        (
            "dit_ablation_cross_attention",
            "`grad/blocks.1.cross_attn.kv.bias`",
            &without("grad/blocks.1.cross_attn.kv.bias"),
        ),
        ("dit_cfg", "`out/a/cfg1.5`", &without("out/a/cfg1.5")),
        ("dit_cfg", "`in/b/t`", &without("in/b/t")),
        ("diffusion_tables", "`out/linear/7/betas`", &without("out/linear/7/betas")),
        ("training_losses", "`out/variant_kl/loss`", &without("out/variant_kl/loss")),
        ("training_losses", "`grad_vb/blocks.1.mlp.fc1.bias`", &without("grad_vb/blocks.1.mlp.fc1.bias")),
        ("training_losses_respaced", "`grad/`", &without("grad/final_layer.linear.weight")),
        ("train_lr1e-3", "`adam_m/x_embedder.proj.bias`", &without("adam_m/x_embedder.proj.bias")),
        ("train_lr1e-3", "`in/step7/noise`", &without("in/step7/noise")),
        ("train_lr1e-3_ema", "`ema0.99/pos_embed`", &without("ema0.99/pos_embed")),
        ("sampling", "`in/p10_cfg1.5/noises`", &without("in/p10_cfg1.5/noises")),
        ("sampling", "`out/ddim10_cfg1.5/pred_xstart_steps`", &without("out/ddim10_cfg1.5/pred_xstart_steps")),
        ("sit", "`in/sde_Euler_sigma_Mean_10/noises`", &without("in/sde_Euler_sigma_Mean_10/noises")),
        ("sit", "`out/ode_rk4_6_cfgnone/x_points`", &without("out/ode_rk4_6_cfgnone/x_points")),
        ("diffusers_dit", "proj_out_2.bias: missing", &without("diffusers/proj_out_2.bias")),
        ("diffusers_dit", "`out/diffusers_normeps1e-6`", &without("out/diffusers_normeps1e-6")),
        ("sit", "`in/x1`", &without("in/x1")),
        ("sit", "`out/pred`", &without("out/pred")),
        ("sit", "`grad/blocks.0.attn.proj.bias`", &without("grad/blocks.0.attn.proj.bias")),
        ("vae", "`out/enc/down0`", &without("out/enc/down0")),
        ("vae", "quant_conv.bias", &without("weights/quant_conv.bias")),
        ("vae_legacy_names", "decoder.conv_out.bias", &without("decoder.conv_out.bias")),
    ]);
}

#[test]
fn a_number_that_is_none_fails_and_is_named() {
    let nan = |name: &'static str| move |parts: &mut Parts| parts.change(name, 1, |_| f64::NAN);
    assert_all_fail(&[
        ("dit_forward", "`weights/blocks.0.attn.qkv.bias`", &nan("weights/blocks.0.attn.qkv.bias")),
        ("dit_cfg", "`in/a/x`", &nan("in/a/x")),
        ("sampling", "`out/p10_nocfg/samples`", &nan("out/p10_nocfg/samples")),
        ("vae_legacy_names", "`decoder.conv_out.bias`", &nan("decoder.conv_out.bias")),
        ("training_losses", "`out/decoder_nll_bits`", &|parts| {
            parts.change("out/decoder_nll_bits", 7, |_| f64::INFINITY)
        }),
    ]);
}

#[test]
fn a_specification_that_cannot_be_followed_fails_and_says_why() {
    let set = |key: &'static str, value: &'static str| move |parts: &mut Parts| parts.spec[key] = value.into();
    assert_all_fail(&[
        ("dit_forward", "kind `dit_backward` is unknown", &set("kind", "dit_backward")),
        ("dit_forward", "neither `kind` nor `system`", &|parts| {
            drop(parts.spec.as_object_mut().unwrap().remove("kind"))
        }),
        ("dit_forward", "`model.num_heads` = many", &set("model.num_heads", "many")),
        ("dit_forward", "num_heads 5 does not divide", &set("model.num_heads", "5")),
        ("dit_forward", "`pos_embed` has shape [1, 16, 32], expected [1, 64, 32]", &set("model.input_size", "16")),
        ("dit_forward", "`in/x`: found shape [5, 4, 4, 16]", &|parts| {
            parts.tensors.get_mut("in/x").unwrap().1 = vec![5, 4, 4, 16]
        }),
        ("dit_ablation_adaln", "`variant` = film", &set("variant", "film")),
        ("dit_ablation_in_context", "`blocks.0.norm1.weight` is unknown", &set("variant", "adaln")),
        ("training_losses", "`schedule` = squared", &set("schedule", "squared")),
        ("training_losses", "ddim64", &set("respacing", "ddim64")),
        ("train_lr1e-3", "final/", &set("lr", "2e-3")),
        ("train_lr1e-3", "`optimizer` = SGD", &set("optimizer", "SGD(lr=1)")),
        ("train_lr1e-3_ema", "`lr`", &set("lr", "2e-3")),
        ("train_lr1e-3_ema", "absent.safetensors", &set("inputs_from", "absent.safetensors")),
        ("train_lr1e-3_ema", "the same folder", &set("inputs_from", "../train_lr1e-3.safetensors")),
        ("sampling", "`variants` = p|p|10", &set("variants", "p|p|10")),
        ("sampling", "`out/p10_nocfg/model_t`", &set("variants", "p10_nocfg|p|ddim10|none|noclip|0")),
        ("sit", "`ode_variants` = adams|11|none", &set("ode_variants", "adams|11|none")),
        ("sit", "`sde_variants` = Euler|SBDM|Mean|10", &set("sde_variants", "Euler|SBDM|Mean|10")),
        ("sit", "`out/ode_euler_11_cfgnone/x_points` was compared with nothing", &set("ode_variants", "euler|10|1.5")),
        ("diffusers_dit", "DiTTransformer2DModel", &set("diffusers_config", "{\"num_layers\": \"two\"}")),
        (
            "diffusers_dit",
            "`norm_type` = \"ada_norm_single\"",
            &set("diffusers_config", "{\"norm_type\": \"ada_norm_single\"}"),
        ),
        ("vae", "AutoencoderKL", &set("vae_config", "{\"layers_per_block\": \"two\"}")),
        ("vae_legacy_names", "no bundle of kind `vae`", &set("vae_config", "{}")),
    ]);
}

#[test]
fn a_file_that_is_none_fails_and_is_named() {
    let folder = tempfile::tempdir().unwrap();
    let bytes = std::fs::read(bundles().join("dit_forward.safetensors")).unwrap();
    let mut files = vec![folder.path().join("absent.safetensors")];
    for length in [0, 7, 1000, bytes.len() / 2, bytes.len() - 1] {
        let path = folder.path().join(format!("{length}.safetensors"));
        std::fs::write(&path, &bytes[..length]).unwrap();
        files.push(path);
    }
    for file in &files {
        // A good file in the same run does not make up for it.
        let (ok, text) = verify(&[bundles().join("dit_cfg.safetensors"), file.clone()]);
        assert!(!ok && text.contains("dit_cfg.safetensors: ok"), "{text}");
        let section = section(&text, file);
        assert!(section.contains("  FAIL ") && section.contains(&format!("{}: FAIL", file.display())), "{section}");
    }
}

#[test]
fn partners_are_found_under_other_names_too() {
    let folder = tempfile::tempdir().unwrap();
    let copy = |from: &str, to: &str| {
        let to = folder.path().join(to);
        std::fs::copy(bundles().join(from), &to).unwrap();
        to
    };
    copy("vae.safetensors", "other.safetensors");
    copy("train_lr1e-3.safetensors", "train_lr1e-3.safetensors");
    let legacy = copy("vae_legacy_names.safetensors", "renamed.safetensors");
    let ema = copy("train_lr1e-3_ema.safetensors", "average.safetensors");
    let (ok, text) = verify(&[legacy, ema]);
    assert!(ok, "{text}");
}
