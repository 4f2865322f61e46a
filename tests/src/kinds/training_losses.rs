//! `training_losses`: the objective with all its parts, and gradients through the engine's segment-wise backward.

use super::{Kind, alone};
use crate::bundle::{Bundle, BundleError, Result, Spec};
use crate::dit;
use crate::pass::{LossOf, Pass};
use crate::report::Report;
use crate::tolerance::Tolerance;
use tch::{Device, Tensor};
use trainer::diffusion::{
    Gaussian, Noised, Objective, Prediction, Tables, Time, VarianceTerms, learned_log_variance, variational_bound,
};
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
    let buckets = dit::buckets(bundle, &model, 0)?;
    let prediction = prediction(&bundle.spec)?;
    let objective = Gaussian::new(dit::tables(&bundle.spec)?, prediction, model.learn_sigma());
    let x_start = dit::latents(bundle, "in/x_start", &model, -1)?;
    let n = x_start.size()[0];
    let noise = dit::latents(bundle, "in/noise", &model, n)?;
    let t = dit::timesteps(bundle, "in/t", n, objective.tables.timesteps())?;
    let y = dit::labels(bundle, "in/y", &model, n)?;
    let noised = objective.noised(x_start, Time::Steps(t), noise);
    let pass = Pass { model: &model, buckets: &buckets, input: [&noised.x_t, &noised.model_t, &y] };

    let output = pass.forward().output().detach();
    report.compare("out/x_t", &noised.x_t);
    report.compare("out/model_output", &output);
    let loose_bits = bundle.spec.text("description").and_then(|text| documented_bits(&text));
    let mut likelihood = Likelihood { t: noised.t.steps(), loose_bits, report };
    let posterior = Posterior::of(&objective, &noised, &output);
    compare_losses(bundle, &objective, &noised, &output, &posterior, &mut likelihood);
    compare_posteriors(bundle, &objective, &noised, &posterior, &mut likelihood);
    compare_gradients(bundle, &objective, &noised, &pass, report)
}

/// What the model predicts: eps, or x_start where the bundle says so as the official code's options do.
fn prediction(spec: &Spec) -> Result<Prediction> {
    match spec.text("predict_xstart").map(|text| text.to_lowercase()).as_deref() {
        None | Some("false") => Ok(Prediction::Eps),
        Some("true") => Ok(Prediction::XStart),
        Some(other) => {
            let (key, expected) = ("predict_xstart".to_owned(), "true or false".to_owned());
            Err(BundleError::Key { key, found: other.to_owned(), expected })
        }
    }
}

/// p(x_{t−1} | x_t) as the model has it, and its distance from the true posterior.
struct Posterior {
    pred_xstart: Tensor,
    log_variance: Tensor,
    bound: VarianceTerms,
}

impl Posterior {
    fn of(objective: &Gaussian, noised: &Noised, output: &Tensor) -> Self {
        let Noised { x_start, x_t, t, .. } = noised;
        let (tables, t, channels) = (&objective.tables, t.steps(), x_t.size()[1]);
        let pred_xstart = objective.prediction.x_start(tables, x_t, t, &output.narrow(1, 0, channels));
        let log_variance = if objective.learn_sigma {
            learned_log_variance(tables, t, &output.narrow(1, channels, channels))
        } else {
            // The official code's larger fixed variance: β, at t = 0 the posterior's at 1.
            let fixed =
                |(i, beta): (usize, &f64)| if i == 0 { tables.posterior_log_variance_clipped[0] } else { beta.ln() };
            let fixed: Vec<f64> = tables.betas.iter().enumerate().map(fixed).collect();
            Tables::gather(&fixed, t, x_t.device()).expand_as(x_t)
        };
        let bound = variational_bound(tables, x_start, x_t, t, &pred_xstart, &log_variance);
        Self { pred_xstart, log_variance, bound }
    }
}

/// Loss and parts per sample, for the model and for one whose output is zero, and the variants of the official code.
fn compare_losses(
    bundle: &Bundle,
    objective: &Gaussian,
    noised: &Noised,
    output: &Tensor,
    posterior: &Posterior,
    likelihood: &mut Likelihood,
) {
    let mut mse_of_model = None;
    for (of, output) in [("", output), ("zero_model/", &output.zeros_like())] {
        let (mse, vb) = objective.per_sample(output, noised);
        likelihood.report.compare(&format!("out/{of}mse"), &mse);
        match vb {
            None => likelihood.report.compare(&format!("out/{of}loss"), &mse),
            Some(vb) => {
                likelihood.compare(&format!("out/{of}vb"), &vb, 1.0);
                likelihood.compare(&format!("out/{of}loss"), &(&mse + &vb), 1.0);
            }
        }
        mse_of_model.get_or_insert(mse);
    }
    let mean = objective.loss(output, noised).total.view([1]);
    likelihood.compare("out/mean_loss", &mean, 1.0);

    // Rescaled: vb as if it were summed over the steps of this chain, in thousands. KL: vb alone, so summed.
    let (steps, vb) = (objective.tables.timesteps() as f64, &posterior.bound.bound_bits);
    let learned = objective.learn_sigma;
    if let Some(mse) = mse_of_model.filter(|_| learned || bundle.has("out/variant_rescaled_mse/loss")) {
        let scale = if learned { steps / 1000.0 } else { 0.0 };
        likelihood.compare("out/variant_rescaled_mse/loss", &(&mse + vb * scale), scale);
    }
    if learned || bundle.has("out/variant_kl/loss") {
        likelihood.compare("out/variant_kl/loss", &(vb * steps), steps);
    }
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
fn compare_posteriors(
    bundle: &Bundle,
    objective: &Gaussian,
    noised: &Noised,
    posterior: &Posterior,
    likelihood: &mut Likelihood,
) {
    let Noised { x_start, x_t, t, .. } = noised;
    let tables = &objective.tables;
    let report = &mut *likelihood.report;
    report.compare("out/q_mean", &tables.posterior_mean(x_start, x_t, t.steps()));
    let q_log_variance = Tables::gather(&tables.posterior_log_variance_clipped, t.steps(), Device::Cpu);
    report.compare("out/q_log_variance", &q_log_variance.expand_as(x_t));
    report.compare("out/p_mean", &posterior.bound.p_mean);
    report.compare("out/p_pred_xstart", &posterior.pred_xstart);
    // Without a learned variance the loss has no bound, and a bundle need not hold what belongs to it.
    let wanted = |name: &str| objective.learn_sigma || bundle.has(name);
    for (name, found) in [("out/p_log_variance", &posterior.log_variance), ("out/kl_bits", &posterior.bound.kl_bits)] {
        if wanted(name) {
            report.compare(name, found);
        }
    }
    if wanted("out/decoder_nll_bits") {
        likelihood.compare_likelihood("out/decoder_nll_bits", &posterior.bound.decoder_nll_bits);
    }
}

/// Gradients of the mean loss and of the mean vb.
fn compare_gradients(
    bundle: &Bundle,
    objective: &Gaussian,
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
