//! `sit`: flow matching as SiT trains it, and its samplers.

use super::{Kind, alone, sit_sampling};
use crate::bundle::{Bundle, BundleError, Result, values};
use crate::dit;
use crate::pass::Pass;
use crate::report::Report;
use tch::Tensor;
use trainer::diffusion::{FlowMatching, Objective, Time, TimestepSampling};

pub(super) const KIND: Kind = Kind {
    name: "sit",
    tolerances: &[
        ("out/loss,mean_loss", "rel 2e-5"),
        ("out/*", "2e-5*max(1,max|ref|)"),
        // Step sizes are chosen by an error estimate that amplifies rounding: the reference is as good as any accurate solver.
        ("out/ode_dopri5*", "2e-2"),
        ("grad", "1e-5+1e-4*max|ref|"),
    ],
    partner: alone,
    references_in_partner: false,
    run,
};

fn run(bundle: &Bundle, _: Option<&Bundle>, report: &mut Report) -> Result<()> {
    let model = dit::model(bundle)?;
    let weights = dit::weights(bundle, &model)?;
    let buckets = dit::buckets(bundle, &model, 0)?;
    let data = dit::latents(bundle, "in/x1", &model, -1)?;
    let n = data.size()[0];
    let noise = dit::latents(bundle, "in/x0", &model, n)?;
    let y = dit::labels(bundle, "in/y", &model, n)?;
    let t = times(bundle, n)?;

    let objective = FlowMatching { sampling: TimestepSampling::Uniform };
    let noised = objective.noised(data, Time::Continuous(t), noise);
    report.compare("out/x_t", &noised.x_t);
    report.compare("out/u_t", &noised.velocity());
    tch::no_grad(|| {
        let mut see = |name: &str, tensor: &Tensor| {
            if name == "t_emb" {
                report.compare("out/t_emb", tensor);
            }
        };
        let output = weights.forward(&model, &noised.x_t, &noised.model_t, &y, &mut see);
        report.compare("out/pred", &output.narrow(1, 0, noised.x_t.size()[1]));
        report.compare("out/loss", &objective.losses(&output, &noised).total());
        report.compare("out/mean_loss", &objective.loss(&output, &noised).total.view([1]));
    });
    let pass = Pass { model: &model, buckets: &buckets, input: [&noised.x_t, &noised.model_t, &y] };
    for (name, gradient) in pass.gradients(&|output| objective.loss(output, &noised).total)? {
        report.compare_in("grad", &format!("grad/{name}"), &gradient);
    }
    sit_sampling::compare(bundle, &model, &weights, report)
}

/// `in/t`: points of the path, all of them in [0, 1].
fn times(bundle: &Bundle, n: i64) -> Result<Vec<f32>> {
    let t: Vec<f32> = values(&bundle.floats("in/t", &[n])?).into_iter().map(|t| t as f32).collect();
    match t.iter().find(|t| !(0.0..=1.0).contains(*t)) {
        None => Ok(t),
        Some(t) => Err(BundleError::Tensor {
            name: "in/t".to_owned(),
            found: format!("the value {t}"),
            expected: "values from 0 to 1".to_owned(),
        }),
    }
}
