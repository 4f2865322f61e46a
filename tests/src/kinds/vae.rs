//! `vae`: encoder and decoder of an AutoencoderKL; `vae_legacy_names`: its weights under their older names.

use super::{Kind, alone};
use crate::bundle::{Bundle, BundleError, Result};
use crate::report::Report;
use serde_json::Value;
use std::collections::HashMap;
use tch::Tensor;
use trainer::vae::{AutoencoderKl, VaeConfig};

const TOLERANCES: &[(&str, &str)] = &[("out/*", "2e-5*max(1,max|ref|)")];

pub(super) const KIND: Kind = Kind {
    name: "vae",
    tolerances: TOLERANCES,
    partner: alone,
    references_in_partner: false,
    run: |bundle, _, report| run(bundle, bundle.weights("weights/"), report),
};

pub(super) const LEGACY_NAMES: Kind = Kind {
    name: "vae_legacy_names",
    tolerances: TOLERANCES,
    partner: |bundle| partner(bundle).map(Some),
    references_in_partner: true,
    run: |bundle, recorded, report| {
        let recorded = recorded.ok_or_else(|| BundleError::Partner("none was given".to_owned()))?;
        run(recorded, bundle.weights(""), report)
    },
};

/// Encodes and decodes what `bundle` recorded, with the network of `weights`.
fn run(bundle: &Bundle, weights: HashMap<String, Tensor>, report: &mut Report) -> Result<()> {
    let _no_grad = tch::no_grad_guard();
    let failed = |error: trainer::vae::VaeError| BundleError::Run(error.to_string());
    let text = bundle.spec.parse::<String>("vae_config", "the config of an AutoencoderKL")?;
    let mut config = VaeConfig::from_json(&text, "spec `vae_config`").map_err(failed)?;
    if bundle.spec.text("scaling_factor").is_some() {
        config.scaling_factor = bundle.spec.parse("scaling_factor", "a number")?;
    }
    let vae = AutoencoderKl::from_weights(config, weights).map_err(failed)?;
    let config = vae.config();
    let image = bundle.floats("in/image", &[-1, config.in_channels, -1, -1])?;
    let latent = bundle.floats("in/latent_scaled", &[-1, config.latent_channels, -1, -1])?;

    let mut found: Vec<(String, Tensor)> = Vec::new();
    let mut see = |name: &str, tensor: &Tensor| found.push((format!("out/{name}"), tensor.shallow_clone()));
    let moments = vae.encode_traced(&image, &mut see).map_err(failed)?;
    let decoded = vae.decode_traced(&vae.unscale(&latent).map_err(failed)?, &mut see).map_err(failed)?;
    let eps = bundle.floats("in/eps", &moments.mean.size())?;
    let sample = moments.sample(&eps).map_err(failed)?;

    // A recording has these intermediates at least, of the first two levels; others are compared where it has them.
    let levels = config.block_out_channels.len().min(2);
    let mut required: Vec<String> = (0..levels).flat_map(|i| [format!("enc/down{i}"), format!("dec/up{i}")]).collect();
    let others = [
        "enc/conv_in",
        "enc/down0_resnet0",
        "enc/mid",
        "enc/conv_out",
        "enc/moments",
        "dec/conv_in",
        "dec/mid",
        "dec/post_quant",
    ];
    required.extend(others.map(str::to_owned));
    if config.mid_block_add_attention {
        required.push("enc/mid_attn".to_owned());
    }
    for (name, tensor) in &found {
        if bundle.has(name) || required.iter().any(|required| name.strip_prefix("out/") == Some(required)) {
            report.compare(name, tensor);
        }
    }
    report.compare("out/mean", &moments.mean);
    report.compare("out/logvar", &moments.logvar);
    report.compare("out/std", &(&moments.logvar * 0.5).exp());
    report.compare("out/sample", &sample);
    report.compare("out/latent_scaled", &vae.scale(&sample).map_err(failed)?);
    report.compare("out/image_from_latent", &decoded);
    Ok(())
}

/// The `vae` bundle in the same folder with the same config: the one named by `inputs_from`, else the one whose name is
/// this file's without `_legacy_names`, else the only one.
fn partner(bundle: &Bundle) -> Result<Bundle> {
    if let Some(named) = bundle.spec.text("inputs_from") {
        return bundle.sibling(&named);
    }
    let config =
        |bundle: &Bundle| bundle.spec.text("vae_config").and_then(|text| serde_json::from_str::<Value>(&text).ok());
    let fits = |other: &Bundle| other.spec.kind().is_ok_and(|kind| kind == "vae") && config(other) == config(bundle);
    let file_name = bundle.path.file_name().and_then(|name| name.to_str()).unwrap_or_default();
    let usual = file_name.replace("_legacy_names", "");
    if usual != file_name && bundle.path.with_file_name(&usual).exists() {
        let other = bundle.sibling(&usual)?;
        if fits(&other) {
            return Ok(other);
        }
    }
    let folder = bundle.path.parent().filter(|folder| !folder.as_os_str().is_empty()).unwrap_or_else(|| ".".as_ref());
    let mut fitting = Vec::new();
    for entry in std::fs::read_dir(folder)? {
        let path = entry?.path();
        if path.extension().is_some_and(|extension| extension == "safetensors")
            && let Ok(other) = Bundle::load(&path)
            && fits(&other)
        {
            fitting.push(other);
        }
    }
    match fitting.len() {
        1 => Ok(fitting.swap_remove(0)),
        0 => Err(BundleError::Partner(format!(
            "no bundle of kind `vae` with the same `vae_config` in {}",
            folder.display()
        ))),
        _ => {
            let names: Vec<String> = fitting.iter().map(|other| other.path.display().to_string()).collect();
            Err(BundleError::Partner(format!("{} fit; name one as `inputs_from` in the spec", names.join(", "))))
        }
    }
}
