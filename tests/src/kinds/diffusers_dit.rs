//! `diffusers_dit`: the same weights under official names and under those of diffusers' `DiTTransformer2DModel`, and what
//! both implementations make of the same input.

use super::{Kind, alone};
use crate::bundle::{Bundle, BundleError, Result};
use crate::dit;
use crate::report::Report;
use crate::tolerance::Tolerance;
use std::collections::{BTreeMap, HashMap};
use tch::Tensor;
use trainer::interop::diffusers::{DiffusersError, TransformerConfig, from_diffusers, to_diffusers};
use trainer::model::dit::{Dit, DitConfig, Numerics};
use trainer::model::{WeightSet, no_probe};

pub(super) const KIND: Kind = Kind {
    name: "diffusers_dit",
    tolerances: &[("out/*", "2e-5*max(1,max|ref|)")],
    partner: alone,
    references_in_partner: false,
    run,
};

/// Outputs that every bundle of this kind has.
const REQUIRED: [&str; 5] = [
    "out/official",
    "out/diffusers_stock",
    "out/diffusers_freqshift0",
    "out/diffusers_normeps1e-6",
    "out/diffusers_normeps1e-6_freqshift0",
];

/// The position table of official weights, which diffusers computes.
const POSITIONS: &str = "pos_embed";
const POSITIONS_TOLERANCE: f64 = 1e-6;

fn run(bundle: &Bundle, _: Option<&Bundle>, report: &mut Report) -> Result<()> {
    let _no_grad = tch::no_grad_guard();
    let failed = |error: DiffusersError| BundleError::Run(error.to_string());
    let model = dit::model(bundle)?;
    let weights = dit::weights(bundle, &model)?;
    let text = bundle.spec.parse::<String>("diffusers_config", "the config of a DiTTransformer2DModel")?;
    let config = TransformerConfig::from_json(&text, "spec `diffusers_config`").map_err(failed)?;

    // The names, both ways, bit for bit.
    let official: BTreeMap<String, Tensor> = bundle.weights("weights/").into_iter().collect();
    let theirs: BTreeMap<String, Tensor> = bundle.weights("diffusers/").into_iter().collect();
    let label_rows = config.num_embeds_ada_norm.unwrap_or_default() + 1;
    let exported = to_diffusers(&official, model.config(), label_rows).map_err(failed)?;
    compare(report, "diffusers/*", &exported, &theirs);
    let (imported, found) = from_diffusers(theirs, &config, "diffusers/*").map_err(failed)?;
    compare(report, "weights/*", &imported, &official);
    let expected = model.config();
    // diffusers has no key for the share of dropped labels.
    let found = DitConfig { class_dropout_prob: expected.class_dropout_prob, ..found };
    if found != *expected {
        report.problem(format!("`diffusers_config` is read as {found:?}, but `model.*` say {expected:?}"));
    }

    let x = dit::latents(bundle, "in/x", &model, -1)?;
    let n = x.size()[0];
    let t = dit::raw_timesteps(bundle, "in/t", n)?;
    let y = dit::labels(bundle, "in/y", &model, n)?;
    let recorded = bundle.names().filter(|name| name.starts_with("out/")).map(str::to_owned);
    let mut outputs: Vec<String> = REQUIRED.map(str::to_owned).into();
    outputs.extend(recorded.filter(|name| !REQUIRED.contains(&name.as_str())));
    for name in outputs {
        let with = DitConfig { numerics: numerics(&name, config.norm_eps)?, ..expected.clone() };
        let with = Dit::new(with).map_err(|error| BundleError::Run(format!("`{name}`: {error}")))?;
        report.compare(&name, &weights.forward(&with, &x, &t, &y, &mut no_probe));
        if name == REQUIRED[0] {
            let tensors: HashMap<String, Tensor> =
                imported.iter().map(|(name, tensor)| (name.clone(), tensor.shallow_clone())).collect();
            let imported =
                WeightSet::from_named(&with, tensors).map_err(|error| BundleError::Run(error.to_string()))?;
            report.compare_in(
                "out/official from diffusers/*",
                &name,
                &imported.forward(&with, &x, &t, &y, &mut no_probe),
            );
        }
    }
    Ok(())
}

/// Equality of whole state dicts.
fn compare(report: &mut Report, group: &str, found: &BTreeMap<String, Tensor>, expected: &BTreeMap<String, Tensor>) {
    for name in expected.keys().filter(|name| !found.contains_key(*name)) {
        report.problem(format!("{group}: `{name}` is not what any of the other names leads to"));
    }
    for (name, tensor) in found {
        match expected.get(name) {
            None => report.problem(format!("{group}: `{name}` {:?} is missing", tensor.size())),
            Some(recorded) if recorded.size() != tensor.size() => {
                report.problem(format!(
                    "{group}: `{name}` has shape {:?}, expected {:?}",
                    recorded.size(),
                    tensor.size()
                ));
            }
            Some(recorded) => {
                let mut tolerance = Tolerance::default();
                if name == POSITIONS {
                    tolerance.max.constant = POSITIONS_TOLERANCE;
                }
                report.within(group, name, tensor, recorded, tolerance);
            }
        }
    }
}

/// What the name of an output says about how it was computed: `diffusers_stock` is as shipped, `freqshiftN` and `normepsX`
/// change it; `official` is the official code.
fn numerics(output: &str, norm_eps: f64) -> Result<Numerics> {
    let name = output.strip_prefix("out/").unwrap_or(output);
    if name == "official" {
        return Ok(Numerics::default());
    }
    let unknown = || BundleError::Tensor {
        name: output.to_owned(),
        found: "that name".to_owned(),
        expected: "`out/official`, or `out/diffusers_` with `stock`, `freqshiftN` and `normepsX` joined by `_`"
            .to_owned(),
    };
    let mut numerics = Numerics { mlp_norm_eps: norm_eps, ..Numerics::STOCK_DIFFUSERS };
    for part in name.strip_prefix("diffusers_").ok_or_else(unknown)?.split('_') {
        if let Some(shift) = part.strip_prefix("freqshift") {
            numerics.freq_shift = shift.parse().map_err(|_| unknown())?;
        } else if let Some(eps) = part.strip_prefix("normeps") {
            numerics.mlp_norm_eps = eps.parse().map_err(|_| unknown())?;
        } else if part != "stock" {
            return Err(unknown());
        }
    }
    Ok(numerics)
}
