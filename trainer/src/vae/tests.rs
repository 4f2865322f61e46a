#![allow(clippy::unwrap_used)]
//! Against tensors recorded from diffusers (tests/bundles/vae*.safetensors) and against damaged folders.

use std::collections::HashMap;
use std::path::PathBuf;

use tch::{Device, Kind, Tensor};

use super::*;

const CONFIG: &str = r#"{"in_channels": 3, "out_channels": 3, "layers_per_block": 1, "latent_channels": 4,
    "down_block_types": ["DownEncoderBlock2D", "DownEncoderBlock2D"],
    "up_block_types": ["UpDecoderBlock2D", "UpDecoderBlock2D"],
    "block_out_channels": [16, 32], "norm_num_groups": 8, "sample_size": 32}"#;

fn config() -> VaeConfig {
    VaeConfig::from_json(CONFIG, "test").unwrap()
}

fn bundle(name: &str) -> HashMap<String, Tensor> {
    let path = PathBuf::from(env!("CARGO_MANIFEST_DIR")).join("../tests/bundles").join(name);
    Tensor::read_safetensors(path).unwrap().into_iter().collect()
}

fn weights_of(bundle: &HashMap<String, Tensor>) -> HashMap<String, Tensor> {
    bundle
        .iter()
        .filter_map(|(name, t)| Some((name.strip_prefix("weights/")?.to_string(), t.shallow_clone())))
        .collect()
}

/// Fails unless `found` is within 2e-5 · max(1, max|expected|) of the recorded tensor.
fn assert_close(name: &str, found: &Tensor, expected: &Tensor) {
    assert_eq!(found.size(), expected.size(), "{name}");
    let error = (found - expected).abs().max().double_value(&[]);
    let tolerance = 2e-5 * expected.abs().max().double_value(&[]).max(1.0);
    assert!(error <= tolerance, "{name}: error {error} > {tolerance}");
}

fn check_against_recording(vae: &AutoencoderKl) {
    let recorded = bundle("vae.safetensors");
    let expected = |name: &str| &recorded[&format!("out/{name}")];
    let mut seen = Vec::new();
    let mut probe = |name: &str, found: &Tensor| {
        if let Some(expected) = recorded.get(&format!("out/{name}")) {
            assert_close(name, found, expected);
            seen.push(name.to_string());
        }
    };
    let moments = vae.encode_traced(&recorded["in/image"], &mut probe).unwrap();
    let image = vae.decode_traced(&vae.unscale(&recorded["in/latent_scaled"]).unwrap(), &mut probe).unwrap();
    let sample = moments.sample(&recorded["in/eps"]).unwrap();
    assert_close("mean", &moments.mean, expected("mean"));
    assert_close("logvar", &moments.logvar, expected("logvar"));
    assert_close("sample", &sample, expected("sample"));
    assert_close("latent_scaled", &vae.scale(&sample).unwrap(), expected("latent_scaled"));
    assert_close("image_from_latent", &image, expected("image_from_latent"));
    let intermediates = recorded.keys().filter(|n| n.starts_with("out/enc/") || n.starts_with("out/dec/"));
    for name in intermediates {
        assert!(seen.iter().any(|s| format!("out/{s}") == *name), "{name} was never reported");
    }
}

#[test]
fn every_recorded_intermediate_is_reproduced() {
    let vae = AutoencoderKl::from_weights(config(), weights_of(&bundle("vae.safetensors"))).unwrap();
    check_against_recording(&vae);
}

#[test]
fn legacy_attention_names_and_one_by_one_convolutions_give_the_same_outputs() {
    let mut weights = bundle("vae_legacy_names.safetensors");
    for (name, tensor) in &mut weights {
        if name.contains(".attentions.") && tensor.dim() == 2 {
            *tensor = tensor.unsqueeze(-1).unsqueeze(-1);
        }
    }
    check_against_recording(&AutoencoderKl::from_weights(config(), weights).unwrap());
}

#[test]
fn all_tensors_that_do_not_match_are_listed_at_once() {
    let mut weights = weights_of(&bundle("vae.safetensors"));
    weights.remove("encoder.conv_in.bias");
    weights.insert("quant_conv.bias".into(), Tensor::zeros([7], (Kind::Float, Device::Cpu)));
    weights.insert("loss.logvar".into(), Tensor::zeros([1], (Kind::Float, Device::Cpu)));
    let message = AutoencoderKl::from_weights(config(), weights).err().unwrap().to_string();
    for part in [
        "3 tensors",
        "encoder.conv_in.bias: missing, expected shape [16]",
        "quant_conv.bias: shape [7], expected [8]",
        "loss.logvar: not part of this config",
    ] {
        assert!(message.contains(part), "{message}");
    }
}

/// A folder in the diffusers layout whose weights have `kind`.
fn folder(file: &str, kind: Kind) -> tempfile::TempDir {
    let dir = tempfile::tempdir().unwrap();
    let weights: Vec<(String, Tensor)> =
        weights_of(&bundle("vae.safetensors")).into_iter().map(|(name, tensor)| (name, tensor.to_kind(kind))).collect();
    Tensor::write_safetensors(&weights, dir.path().join(file)).unwrap();
    std::fs::write(dir.path().join("config.json"), CONFIG).unwrap();
    dir
}

#[test]
fn a_folder_loads_with_the_digest_of_its_weight_file() {
    let dir = folder("diffusion_pytorch_model.safetensors", Kind::Float);
    let vae = AutoencoderKl::load(dir.path(), Device::Cpu).unwrap();
    check_against_recording(&vae);
    let again = AutoencoderKl::load(dir.path(), Device::Cpu).unwrap();
    assert_eq!(vae.digest(), again.digest());
    let other = folder("diffusion_pytorch_model.fp16.safetensors", Kind::Half);
    let half = AutoencoderKl::load(other.path(), Device::Cpu).unwrap();
    assert_ne!(vae.digest(), half.digest());
    // Half-precision weights are computed with in f32: close to the recording, but not within its tolerance.
    let image = &bundle("vae.safetensors")["in/image"];
    let (found, expected) = (half.encode(image).unwrap().mean, vae.encode(image).unwrap().mean);
    assert_eq!(found.kind(), Kind::Float);
    assert!((found - expected).abs().max().double_value(&[]) < 1e-2);
}

#[test]
fn a_truncated_or_missing_file_is_named() {
    let dir = folder("diffusion_pytorch_model.safetensors", Kind::Float);
    let path = dir.path().join("diffusion_pytorch_model.safetensors");
    let bytes = std::fs::read(&path).unwrap();
    let load = || AutoencoderKl::load(dir.path(), Device::Cpu).err().unwrap().to_string();
    for length in [0, 5, 100, bytes.len() / 2, bytes.len() - 1] {
        std::fs::write(&path, &bytes[..length]).unwrap();
        let message = load();
        assert!(
            message.contains(&path.display().to_string()) && message.contains(&format!("{length} bytes")),
            "{message}"
        );
    }
    std::fs::remove_file(&path).unwrap();
    assert!(load().contains("diffusion_pytorch_model.safetensors: cannot read it"), "{}", load());
    std::fs::remove_file(dir.path().join("config.json")).unwrap();
    assert!(load().contains("config.json: cannot read it"), "{}", load());
}

#[test]
fn shapes_that_the_network_cannot_take_are_refused() {
    let vae = AutoencoderKl::from_weights(config(), weights_of(&bundle("vae.safetensors"))).unwrap();
    let zeros = |shape: &[i64]| Tensor::zeros(shape, (Kind::Float, Device::Cpu));
    for shape in [&[1, 3, 31, 32][..], &[1, 1, 32, 32], &[3, 32, 32]] {
        let message = vae.encode(&zeros(shape)).unwrap_err().to_string();
        assert!(message.contains(&format!("{shape:?}")) && message.contains("multiples of 2"), "{message}");
    }
    assert!(vae.decode(&zeros(&[1, 3, 8, 8])).unwrap_err().to_string().contains("expected [B, 4, h, w]"));
}

#[test]
fn configs_without_attention_and_quant_convolutions_have_fewer_tensors_but_run() {
    let config = VaeConfig {
        use_quant_conv: false,
        use_post_quant_conv: false,
        mid_block_add_attention: false,
        shift_factor: Some(0.5),
        ..config()
    };
    let mut weights = weights_of(&bundle("vae.safetensors"));
    weights.retain(|name, _| !name.contains("attentions") && !name.contains("quant_conv"));
    let vae = AutoencoderKl::from_weights(config, weights).unwrap();
    let latent = vae.encode(&bundle("vae.safetensors")["in/image"]).unwrap().mean;
    let scaled = vae.scale(&latent).unwrap();
    assert_close("scale", &scaled, &((&latent - 0.5) * 0.18215));
    assert_eq!(vae.decode(&vae.unscale(&scaled).unwrap()).unwrap().size(), [1, 3, 32, 32]);
}

#[test]
fn the_quickstarts_vae_is_whole() {
    let dir = PathBuf::from(env!("CARGO_MANIFEST_DIR")).join("../assets/vae/fashion-kl-f4");
    let vae = AutoencoderKl::load(&dir, Device::Cpu).unwrap();
    // Its data sets carry this digest; another file would make them refuse to be sampled with it.
    assert_eq!(vae.digest(), Some("acb9ddd90b84b3f86f3dfcf83a4ebb2d2cd1999decd0fb8c2a60348e1c5765e1"));
    assert_eq!((vae.config().factor(), vae.config().latent_shape(32)), (4, [4, 8, 8]));
    // A black image is the commonest background of the data: it survives the round trip.
    let black = Tensor::full([1, 1, 32, 32], -1.0, (Kind::Float, Device::Cpu));
    let again = vae.decode(&vae.encode(&black).unwrap().mean).unwrap();
    assert!((again - black).abs().mean(Kind::Float).double_value(&[]) < 0.1);
}
