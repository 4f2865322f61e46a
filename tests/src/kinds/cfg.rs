//! `dit_cfg`: classifier-free guidance, case by case and scale by scale.

use super::{Kind, alone};
use crate::bundle::{Bundle, BundleError, Result};
use crate::dit;
use crate::report::Report;
use std::collections::BTreeSet;
use tch::Tensor;
use trainer::model::no_probe;
use trainer::sampling::{GuidedChannels, forward_with_cfg};

pub(super) const KIND: Kind = Kind {
    name: "dit_cfg",
    tolerances: &[("out/*", "2e-5*max(1,max|ref|)")],
    partner: alone,
    references_in_partner: false,
    run,
};

fn run(bundle: &Bundle, _: Option<&Bundle>, report: &mut Report) -> Result<()> {
    let _no_grad = tch::no_grad_guard();
    let model = dit::model(bundle)?;
    let weights = dit::weights(bundle, &model)?;
    // Names are in/CASE/x and out/CASE/OUTPUT; every case has the outputs that any case has.
    let split = |name: &str, top: &str| {
        let (case, output) = name.strip_prefix(top)?.split_once('/')?;
        Some((case.to_owned(), output.to_owned()))
    };
    let outputs_of_cases: Vec<(String, String)> = bundle.names().filter_map(|name| split(name, "out/")).collect();
    let inputs = bundle.names().filter_map(|name| split(name, "in/"));
    let cases: BTreeSet<String> = inputs.chain(outputs_of_cases.clone()).map(|(case, _)| case).collect();
    let mut outputs: BTreeSet<String> = outputs_of_cases.into_iter().map(|(_, output)| output).collect();
    outputs.insert("model_out_combined".to_owned());
    if cases.is_empty() || outputs.len() < 2 {
        report.problem("there is no `out/CASE/cfgSCALE` in it".to_owned());
    }
    for case in cases {
        let x = dit::latents(bundle, &format!("in/{case}/x"), &model, -1)?;
        let n = x.size()[0];
        let t = dit::raw_timesteps(bundle, &format!("in/{case}/t"), n)?;
        let y = dit::labels(bundle, &format!("in/{case}/y"), &model, n)?;
        if n == 0 || n % 2 == 1 {
            let (found, expected) = (format!("{n} rows"), "two halves".to_owned());
            return Err(BundleError::Tensor { name: format!("in/{case}/x"), found, expected });
        }
        for output in &outputs {
            let name = format!("out/{case}/{output}");
            let found = if output == "model_out_combined" {
                let half = x.narrow(0, 0, n / 2);
                weights.forward(&model, &Tensor::cat(&[&half, &half], 0), &t, &y, &mut no_probe)
            } else {
                let (scale, channels) = guidance(&name, output)?;
                forward_with_cfg(&model, &weights, &x, &t, &y, scale, channels)
            };
            report.compare(&name, &found);
        }
    }
    Ok(())
}

/// `cfg4.0` guides the first three channels, `cfg4.0_allchannels` all.
fn guidance(name: &str, output: &str) -> Result<(f64, GuidedChannels)> {
    let (scale, channels) = match output.strip_suffix("_allchannels") {
        Some(scale) => (scale, GuidedChannels::All),
        None => (output, GuidedChannels::FirstThree),
    };
    let scale = scale.strip_prefix("cfg").and_then(|scale| scale.parse::<f64>().ok());
    let scale = scale.ok_or_else(|| BundleError::Tensor {
        name: name.to_owned(),
        found: format!("the output `{output}`"),
        expected: "`cfgSCALE`, `cfgSCALE_allchannels` or `model_out_combined`".to_owned(),
    })?;
    Ok((scale, channels))
}
