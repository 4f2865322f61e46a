//! `dit_ablation`: a conditioning design of the paper: forward with intermediates, the loss, and every gradient.

use super::{Kind, alone};
use crate::bundle::{Bundle, Result};
use crate::dit;
use crate::pass::Pass;
use crate::report::Report;
use std::collections::HashMap;
use tch::Tensor;
use trainer::diffusion::{Gaussian, Objective, Prediction, Time};
use trainer::model::Model;

pub(super) const KIND: Kind = Kind {
    name: "dit_ablation",
    tolerances: &[("out/*", "2e-5*max(1,max|ref|)"), ("grad", "1e-6+1e-4*max|ref|")],
    partner: alone,
    references_in_partner: false,
    run,
};

/// Intermediates that every bundle of this kind has, with `block{i}` of every block.
const REQUIRED: [&str; 8] = ["x_embed", "tokens_in", "t_emb", "y_emb", "c", "final_tokens", "output", "loss"];

/// Further ones of the designs that modulate their norms.
const OF_MODULATION: [&str; 4] = ["block0_ada", "block0_attn", "block0_mlp", "final_ada"];

fn run(bundle: &Bundle, _: Option<&Bundle>, report: &mut Report) -> Result<()> {
    bundle.spec.parse::<String>("variant", "a conditioning design")?;
    let model = dit::model(bundle)?;
    let weights = dit::weights(bundle, &model)?;
    let x = dit::latents(bundle, "in/x", &model, -1)?;
    let n = x.size()[0];
    let t = dit::raw_timesteps(bundle, "in/t", n)?;
    let y = dit::labels(bundle, "in/y", &model, n)?;

    let mut found: HashMap<String, Tensor> = HashMap::new();
    let mut see = |name: &str, tensor: &Tensor| {
        found.insert(dit::recorded_name(name), tensor.shallow_clone());
    };
    let output = tch::no_grad(|| weights.forward(&model, &x, &t, &y, &mut see));
    // Recorded for every design; ours compute it only where something reads it.
    let condition = &found["t_emb"] + &found["y_emb"];
    found.entry("c".to_owned()).or_insert(condition);

    // The loss is that of noised latents (in/x as x_start), while the recorded intermediates are of in/x itself.
    let objective = Gaussian::new(dit::tables(&bundle.spec)?, Prediction::Eps, model.learn_sigma());
    let noise = dit::latents(bundle, "in/noise", &model, n)?;
    let steps = dit::timesteps(bundle, "in/t", n, objective.tables.timesteps())?;
    let noised = objective.noised(x, Time::Steps(steps), noise);
    let buckets = dit::buckets(bundle, &model, 0)?;
    let pass = Pass { model: &model, buckets: &buckets, input: [&noised.x_t, &noised.model_t, &y] };
    let loss = |output: &Tensor| objective.losses(output, &noised).total();
    found.insert("output".to_owned(), output);
    found.insert("loss".to_owned(), loss(&pass.forward().output().detach()));

    let of_modulation = if found.contains_key("final_ada") { &OF_MODULATION[..] } else { &[] };
    let blocks = (0..model.config().depth).map(|i| format!("block{i}"));
    let required: Vec<String> =
        REQUIRED.iter().chain(of_modulation).map(|&name| name.to_owned()).chain(blocks).collect();
    let recorded: Vec<String> =
        bundle.names().filter_map(|name| name.strip_prefix("out/")).map(str::to_owned).collect();
    let further = recorded.into_iter().filter(|name| !required.contains(name) && found.contains_key(name));
    for name in required.iter().cloned().chain(further) {
        report.compare(&format!("out/{name}"), &found[&name]);
    }
    for (name, gradient) in pass.gradients(&|output| loss(output).mean(None))? {
        report.compare_in("grad", &format!("grad/{name}"), &gradient);
    }
    Ok(())
}
