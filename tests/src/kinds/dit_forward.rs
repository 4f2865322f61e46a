//! `dit_forward`: one forward pass with all its intermediates, and the embeddings by themselves.

use super::{Kind, alone};
use crate::bundle::{Bundle, BundleError, Result};
use crate::dit;
use crate::report::Report;
use std::collections::HashMap;
use tch::Tensor;
use trainer::model::{sin_cos_2d, timestep_embedding};

pub(super) const KIND: Kind = Kind {
    name: "dit_forward",
    tolerances: &[
        ("out/t_freq*", "1.5e-4"),
        ("out/pos_embed", "1e-6"),
        ("out/pos_embed_d*", "1e-12"),
        ("out/*", "2e-5*max(1,max|ref|)"),
    ],
    partner: alone,
    references_in_partner: false,
    run,
};

/// Features of the timestep embedding before its MLP.
const FREQUENCY_DIM: i64 = 256;

/// Intermediates that every bundle of this kind has, with `block{i}` of every block.
const REQUIRED: [&str; 17] = [
    "x_embed",
    "pos_embed",
    "tokens_in",
    "t_freq",
    "t_emb",
    "y_emb",
    "c",
    "block0_ada",
    "block0_norm1",
    "block0_qkv",
    "block0_attn",
    "block0_mlp_act",
    "block0_mlp",
    "final_ada",
    "final_tokens",
    "output",
    "t_freq_fractional",
];

fn run(bundle: &Bundle, _: Option<&Bundle>, report: &mut Report) -> Result<()> {
    let _no_grad = tch::no_grad_guard();
    let model = dit::model(bundle)?;
    let weights = dit::weights(bundle, &model)?;
    let x = dit::latents(bundle, "in/x", &model, -1)?;
    let n = x.size()[0];
    let t = dit::raw_timesteps(bundle, "in/t", n)?;
    let y = dit::labels(bundle, "in/y", &model, n)?;
    let t_fractional = bundle.floats("in/t_fractional", &[-1])?;

    let mut found: HashMap<String, Tensor> = HashMap::new();
    let mut see = |name: &str, tensor: &Tensor| {
        found.insert(dit::recorded_name(name), tensor.shallow_clone());
    };
    let output = weights.forward(&model, &x, &t, &y, &mut see);
    found.insert("output".to_owned(), output);
    // Recorded is the table that a new model has, which need not be the one among the weights.
    let c = model.config();
    found.insert("pos_embed".to_owned(), position_table(c.hidden_size, c.input_size / c.patch_size).unsqueeze(0));
    found.insert("t_freq_fractional".to_owned(), timestep_embedding(&t_fractional, FREQUENCY_DIM));
    let recorded: Vec<String> =
        bundle.names().filter_map(|name| name.strip_prefix("out/")).map(str::to_owned).collect();
    let mut odd_features = 0;
    let mut tables = 0;
    for name in &recorded {
        if let Some(dim) = name.strip_prefix("t_freq_dim") {
            found.insert(name.clone(), timestep_embedding(&t, number(name, dim)?));
            odd_features += 1;
        } else if let Some((dim, grid)) = name.strip_prefix("pos_embed_d").and_then(|rest| rest.split_once("_g")) {
            let (dim, grid) = (number(name, dim)?, number(name, grid.trim_end_matches("_f64"))?);
            found.insert(name.clone(), position_table(dim, grid));
            tables += 1;
        }
    }
    if odd_features == 0 {
        report.problem("`out/t_freq_dimN` (timestep features of another width) is missing".to_owned());
    }
    if tables == 0 {
        report.problem("`out/pos_embed_dN_gN_f64` (the position table in float64) is missing".to_owned());
    }

    let blocks = (0..model.config().depth).map(|i| format!("block{i}"));
    let required: Vec<String> = REQUIRED.iter().map(|&name| name.to_owned()).chain(blocks).collect();
    let further = recorded.into_iter().filter(|name| !required.contains(name) && found.contains_key(name));
    for name in required.iter().cloned().chain(further) {
        report.compare(&format!("out/{name}"), &found[&name]);
    }
    Ok(())
}

fn position_table(dim: i64, grid: i64) -> Tensor {
    Tensor::from_slice(&sin_cos_2d(dim, grid)).view([grid * grid, dim])
}

fn number(name: &str, digits: &str) -> Result<i64> {
    let positive = digits.parse().ok().filter(|&n: &i64| n > 0 && n <= 1 << 16);
    positive.ok_or_else(|| BundleError::Tensor {
        name: format!("out/{name}"),
        found: format!("`{digits}` in its name"),
        expected: "a positive number there".to_owned(),
    })
}
