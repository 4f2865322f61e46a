//! `diffusion_tables`: everything that is tabulated over timesteps, per schedule and respacing.

use super::{Kind, alone};
use crate::bundle::{Bundle, Result};
use crate::dit;
use crate::report::Report;
use std::collections::BTreeSet;
use tch::Tensor;
use trainer::diffusion::Tables;

pub(super) const KIND: Kind = Kind {
    name: "diffusion_tables",
    tolerances: &[("*", "rel 1e-12")],
    partner: alone,
    references_in_partner: false,
    run,
};

fn run(bundle: &Bundle, _: Option<&Bundle>, report: &mut Report) -> Result<()> {
    // Names are out/SCHEDULE/RESPACING/TABLE, with `full` for no respacing; the spec lists SCHEDULE:RESPACING;….
    let listed = bundle.spec.text("respacings").unwrap_or_default();
    let listed = listed.split(';').filter_map(|entry| entry.split_once(':'));
    let mut chains: BTreeSet<(String, String)> =
        listed.map(|(schedule, respacing)| (schedule.trim().to_owned(), respacing.trim().to_owned())).collect();
    for name in bundle.names() {
        let chain = name.strip_prefix("out/").and_then(|rest| rest.split_once('/'));
        if let Some((schedule, (respacing, _))) = chain.and_then(|(s, rest)| Some((s, rest.rsplit_once('/')?))) {
            let respacing = if respacing == "full" { "" } else { respacing };
            chains.insert((schedule.to_owned(), respacing.to_owned()));
        }
    }
    for (schedule, respacing) in chains {
        let group = format!("out/{schedule}/{}", if respacing.is_empty() { "full" } else { &respacing });
        let tables = match dit::respaced(&schedule, &respacing) {
            Ok(tables) => tables,
            Err(error) => {
                report.problem(format!("{group}: {error}"));
                continue;
            }
        };
        for (name, table) in float_tables(&tables) {
            // The official code leaves the clipped logarithm of a chain of one step empty: it is never read.
            let unread = tables.timesteps() == 1 && name == "posterior_log_variance_clipped";
            let table = if unread { Tensor::from_slice::<f64>(&[]) } else { Tensor::from_slice(table) };
            report.compare_in(&group, &format!("{group}/{name}"), &table);
        }
        report.compare_in(&group, &format!("{group}/timestep_map"), &Tensor::from_slice(&tables.timestep_map));
    }
    Ok(())
}

fn float_tables(tables: &Tables) -> [(&'static str, &Vec<f64>); 14] {
    [
        ("betas", &tables.betas),
        ("log_betas", &tables.log_betas),
        ("alphas_cumprod", &tables.alphas_cumprod),
        ("alphas_cumprod_prev", &tables.alphas_cumprod_prev),
        ("alphas_cumprod_next", &tables.alphas_cumprod_next),
        ("sqrt_alphas_cumprod", &tables.sqrt_alphas_cumprod),
        ("sqrt_one_minus_alphas_cumprod", &tables.sqrt_one_minus_alphas_cumprod),
        ("log_one_minus_alphas_cumprod", &tables.log_one_minus_alphas_cumprod),
        ("sqrt_recip_alphas_cumprod", &tables.sqrt_recip_alphas_cumprod),
        ("sqrt_recipm1_alphas_cumprod", &tables.sqrt_recipm1_alphas_cumprod),
        ("posterior_variance", &tables.posterior_variance),
        ("posterior_log_variance_clipped", &tables.posterior_log_variance_clipped),
        ("posterior_mean_coef1", &tables.posterior_mean_coef1),
        ("posterior_mean_coef2", &tables.posterior_mean_coef2),
    ]
}
