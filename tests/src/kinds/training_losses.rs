//! `training_losses`: the objective with all its parts, and gradients through the engine's segment-wise backward.

use super::{Kind, alone};
use crate::bundle::{Bundle, Result};
use crate::dit;
use crate::pass::{LossOf, Pass};
use crate::report::Report;
use crate::tolerance::Tolerance;
use tch::{Device, Tensor};
use trainer::diffusion::{Noised, Objective, Tables, VariationalEps, variational_bound};
use trainer::model::Model;

pub(super) const KIND: Kind = Kind {
    name: "training_losses",
    tolerances: &[
        ("out/loss,mse,vb,mean_loss,kl_bits,decoder_nll_bits", "rel 2e-5"),
        ("out/*", "2e-5*max(1,max|ref|)"),
        ("grad", "1e-6+1e-4*max|ref|"),
        ("grad_vb", "1e-6+1e-4*max|ref|"),
    ],
    partner: alone,
    references_in_partner: false,
    run,
};

fn run(bundle: &Bundle, _: Option<&Bundle>, report: &mut Report) -> Result<()> {
    let model = dit::model(bundle)?;
    let buckets = dit::buckets(bundle, &model, 1)?;
    let objective = VariationalEps { tables: dit::tables(&bundle.spec)?, learn_sigma: model.learn_sigma() };
    let x_start = dit::latents(bundle, "in/x_start", &model, -1)?;
    let n = x_start.size()[0];
    let noise = dit::latents(bundle, "in/noise", &model, n)?;
    let t = dit::timesteps(bundle, "in/t", n, objective.tables.timesteps())?;
    let y = dit::labels(bundle, "in/y", &model, n)?;
    let noised = objective.noise_with(x_start, t, noise);
    let pass = Pass { model: &model, buckets: &buckets, input: [&noised.x_t, &noised.model_t, &y] };

    let output = pass.forward().output().detach();
    report.compare("out/x_t", &noised.x_t);
    report.compare("out/model_output", &output);
    let loose_bits = bundle.spec.text("description").and_then(|text| documented_bits(&text));
    let mut likelihood = Likelihood { t: &noised.t, loose_bits, report };
    compare_losses(&objective, &noised, &output, &mut likelihood);
    compare_variational_parts(&objective, &noised, &output, &mut likelihood);
    compare_gradients(bundle, &objective, &noised, &pass, report)
}

/// Loss and parts per sample, for the model and for one whose output is zero, and the variants of the official code.
fn compare_losses(objective: &VariationalEps, noised: &Noised, output: &Tensor, likelihood: &mut Likelihood) {
    for (of, output) in [("", output), ("zero_model/", &output.zeros_like())] {
        let (mse, vb) = objective.per_sample(output, noised);
        likelihood.report.compare(&format!("out/{of}mse"), &mse);
        let Some(vb) = vb else {
            likelihood.report.compare(&format!("out/{of}loss"), &mse);
            continue;
        };
        likelihood.compare(&format!("out/{of}vb"), &vb, 1.0);
        likelihood.compare(&format!("out/{of}loss"), &(&mse + &vb), 1.0);
        if of.is_empty() {
            // Rescaled: vb as if it were summed over the steps of this chain, in thousands. KL: vb alone, so summed.
            let steps = objective.tables.timesteps() as f64;
            likelihood.compare("out/variant_rescaled_mse/loss", &(&mse + &vb * (steps / 1000.0)), steps / 1000.0);
            likelihood.compare("out/variant_kl/loss", &(&vb * steps), steps);
        }
    }
    let mean = objective.loss(output, noised).total.view([1]);
    likelihood.compare("out/mean_loss", &mean, 1.0);
}

/// Compares what contains the discretised likelihood of t = 0. Where a bundle says that it is ill conditioned there,
/// those rows only have to agree within the bits it allows.
struct Likelihood<'r, 'b> {
    t: &'r [usize],
    loose_bits: Option<f64>,
    report: &'r mut Report<'b>,
}

impl Likelihood<'_, '_> {
    /// `found` holds one value a sample, or the mean of all; `scale` is by what its likelihood part is multiplied.
    fn compare(&mut self, name: &str, found: &Tensor, scale: f64) {
        let Some((expected, mut tolerance)) = self.report.reference(name, &found.size()) else { return };
        tolerance.max.constant *= scale;
        let Some(bits) = self.loose_bits else {
            self.report.within(name, name, found, &expected, tolerance);
            return;
        };
        let of_mean = found.size()[0] != self.t.len() as i64;
        let has_likelihood = |row: usize| if of_mean { self.t.contains(&0) } else { self.t[row] == 0 };
        let (loose, tight) = (0..found.size()[0]).partition(|&row| has_likelihood(row as usize));
        for (rows, tolerance) in [(tight, tolerance), (loose, Tolerance::absolute(bits * scale))] {
            self.within_rows(name, rows, found, &expected, tolerance);
        }
    }

    /// Compares the likelihood itself: it is unused and saturated where t > 0, so only rows with t = 0 count.
    fn compare_likelihood(&mut self, name: &str, found: &Tensor) {
        let Some((expected, tolerance)) = self.report.reference(name, &found.size()) else { return };
        let rows = (0..self.t.len() as i64).filter(|&row| self.t[row as usize] == 0).collect();
        self.within_rows(name, rows, found, &expected, self.loose_bits.map_or(tolerance, Tolerance::absolute));
    }

    fn within_rows(&mut self, name: &str, rows: Vec<i64>, found: &Tensor, expected: &Tensor, tolerance: Tolerance) {
        if !rows.is_empty() {
            let label = format!("{name}, of rows {rows:?}");
            let rows = Tensor::from_slice(&rows);
            let (found, expected) = (found.index_select(0, &rows), expected.index_select(0, &rows));
            self.report.within(name, &label, &found, &expected, tolerance);
        }
    }
}

/// The bits that a description allows on an ill conditioned likelihood: "… allow abs 1.0 bit on vb …".
fn documented_bits(description: &str) -> Option<f64> {
    let (_, rest) = description.split_once("allow abs ")?;
    let (number, _) = rest.split_once(" bit")?;
    number.trim().parse().ok()
}

/// True posterior and the model's, and the two candidates for the bound.
fn compare_variational_parts(
    objective: &VariationalEps,
    noised: &Noised,
    output: &Tensor,
    likelihood: &mut Likelihood,
) {
    let Noised { x_start, x_t, t, .. } = noised;
    let tables = &objective.tables;
    let report = &mut *likelihood.report;
    report.compare("out/q_mean", &tables.posterior_mean(x_start, x_t, t));
    let q_log_variance = Tables::gather(&tables.posterior_log_variance_clipped, t, Device::Cpu);
    report.compare("out/q_log_variance", &q_log_variance.expand_as(x_t));
    if !objective.learn_sigma {
        let pred_xstart = tables.x_start_from_eps(x_t, t, output);
        report.compare("out/p_mean", &tables.posterior_mean(&pred_xstart, x_t, t));
        report.compare("out/p_pred_xstart", &pred_xstart);
        return;
    }
    let halves = output.chunk(2, 1);
    let bound = variational_bound(tables, x_start, x_t, t, &halves[0], &halves[1]);
    report.compare("out/p_mean", &bound.p_mean);
    report.compare("out/p_log_variance", &bound.p_log_variance);
    report.compare("out/p_pred_xstart", &bound.p_pred_xstart);
    report.compare("out/kl_bits", &bound.kl_bits);
    likelihood.compare_likelihood("out/decoder_nll_bits", &bound.decoder_nll_bits);
}

/// Gradients of the mean loss and of the mean vb.
fn compare_gradients(
    bundle: &Bundle,
    objective: &VariationalEps,
    noised: &Noised,
    pass: &Pass,
    report: &mut Report,
) -> Result<()> {
    let description = bundle.spec.text("description").unwrap_or_default();
    let mean_vb = |output: &Tensor| {
        let (mse, vb) = objective.per_sample(output, noised);
        vb.unwrap_or(mse).mean(None)
    };
    let mean_loss = |output: &Tensor| objective.loss(output, noised).total;
    let losses: [(&str, LossOf); 2] = [("grad", &mean_loss), ("grad_vb", &mean_vb)];
    for (group, loss) in losses {
        let recorded = bundle.names().filter(|name| name.starts_with(&format!("{group}/"))).count();
        if recorded == 0 || (group == "grad_vb" && !objective.learn_sigma) {
            continue;
        }
        let gradients = pass.gradients(loss)?;
        // A bundle may keep a selection of gradients; when it says of how many, it must have so many. One that keeps
        // most of them is not a selection: there a missing one is missing.
        let selection = recorded * 2 < gradients.len();
        if let Some(kept) = documented_selection(&description).filter(|&kept| selection && kept != recorded) {
            report.problem(format!("`{group}/`: {recorded} gradients, expected {kept} as the description says"));
        }
        for (name, gradient) in gradients {
            let name = format!("{group}/{name}");
            if !selection || bundle.has(&name) {
                report.compare_in(group, &name, &gradient);
            }
        }
    }
    Ok(())
}

/// How many gradients a description says are kept: "… only two gradients kept …".
fn documented_selection(description: &str) -> Option<usize> {
    const WORDS: [&str; 10] = ["one", "two", "three", "four", "five", "six", "seven", "eight", "nine", "ten"];
    let (before, _) = description.split_once(" gradients kept").or_else(|| description.split_once(" gradient kept"))?;
    let word = before.rsplit(' ').next()?;
    WORDS.iter().position(|w| *w == word).map(|at| at + 1).or_else(|| word.parse().ok())
}
