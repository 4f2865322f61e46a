//! `[validation]`, and the metrics that the best checkpoints are chosen by.

use std::path::Path;

use super::{ANY, COUNT, optional_url};
use crate::reader::Reader;
use crate::schema::RunConfig;
use crate::validation::ValidationConfig;

/// Every key but the URL, without which they mean nothing.
const KEYS: [&str; 7] = [
    "validation.every_steps",
    "validation.rows",
    "validation.draws",
    "validation.bins",
    "validation.batch",
    "validation.weights",
    "validation.seed",
];

pub(super) fn read(r: &mut Reader, base: &Path) -> Option<ValidationConfig> {
    let url = optional_url(r, "validation.url", base);
    let given = r.given("validation.url");
    let default = ValidationConfig::of(url.unwrap_or_default());
    let weights = r.text_list("validation.weights");
    let config = ValidationConfig {
        every_steps: r.integer("validation.every_steps", 0..=ANY, default.every_steps),
        rows: r.integer("validation.rows", 1..=COUNT, default.rows as u64) as usize,
        draws: r.integer("validation.draws", 1..=COUNT, default.draws as u64) as usize,
        bins: r.integer("validation.bins", 1..=1000, default.bins as u64) as usize,
        batch: r.integer("validation.batch", 1..=COUNT, default.batch as u64) as usize,
        weights: if r.given("validation.weights") { weights } else { default.weights },
        seed: r.integer("validation.seed", 0..=ANY, default.seed),
        url: default.url,
    };
    if given {
        return Some(config);
    }
    // "Never" says nothing that needs a data set.
    let means_something = |key: &str| key != "validation.every_steps" || config.every_steps > 0;
    if let Some(key) = KEYS.into_iter().find(|key| r.given(key) && means_something(key)) {
        let problem = format!("is missing, which `{key}` means nothing without");
        r.refuse("validation.url", problem, "set it to a data set of rows that are not trained on");
    }
    None
}

pub(super) fn check(r: &mut Reader, c: &RunConfig) {
    if let Some(validation) = &c.validation {
        check_draws(r, validation);
        check_sections(r, c, "validation.weights", &validation.weights);
    }
    check_best(r, c);
    if r.sound(&["checkpoint.every_steps", "checkpoint.every_minutes"])
        && c.checkpoint.every_steps == 0
        && c.checkpoint.every_minutes == 0.0
    {
        let problem = "is 0, and so is checkpoint.every_minutes: a run that is killed would start from nothing";
        r.refuse("checkpoint.every_steps", problem, "set one of them");
    }
    let (keep_every, every_steps) = (c.checkpoint.keep_every, c.checkpoint.every_steps);
    if r.sound(&["checkpoint.keep_every", "checkpoint.every_steps"]) && !keep_every.is_multiple_of(every_steps) {
        r.refuse(
            "checkpoint.keep_every",
            format!(
                "is not a multiple of checkpoint.every_steps = {every_steps}, so that those steps have no checkpoint"
            ),
            match every_steps {
                0 => "set checkpoint.every_steps".to_owned(),
                _ => format!("use {}", keep_every.next_multiple_of(every_steps)),
            },
        );
    }
}

fn check_draws(r: &mut Reader, validation: &ValidationConfig) {
    let ValidationConfig { rows, draws, bins, .. } = validation;
    if r.sound(&["validation.rows", "validation.draws", "validation.bins"]) && rows.saturating_mul(*draws) < *bins {
        r.refuse(
            "validation.bins",
            format!("is more than validation.rows × validation.draws = {}, so that some have no draw", rows * draws),
            "use fewer bins, more rows or more draws",
        );
    }
}

/// `key` names some of the sections that checkpoints have, each once.
pub(super) fn check_sections(r: &mut Reader, c: &RunConfig, key: &'static str, weights: &[String]) {
    if !r.sound(&[key, "ema.further_decays", "ema.power"]) {
        return;
    }
    let sections = c.weight_sections();
    let names: Vec<String> = sections.iter().map(|name| format!("\"{name}\"")).collect();
    let advice = format!("use some of {}", names.join(", "));
    if weights.is_empty() {
        r.refuse(key, "names no weights", advice);
    } else if let Some(unknown) = weights.iter().find(|name| !sections.contains(name)) {
        r.refuse(key, format!("has \"{unknown}\", which no checkpoint of this run has"), advice);
    } else if (1..weights.len()).any(|index| weights[..index].contains(&weights[index])) {
        r.refuse(key, "names weights twice", advice);
    }
}

/// The metric that the best checkpoints are chosen by must be measured at all. Checkpoints of steps at which it is not are no
/// candidates.
fn check_best(r: &mut Reader, c: &RunConfig) {
    let (metric, keep_best) = (&c.checkpoint.best_metric, c.checkpoint.keep_best);
    let keys = ["checkpoint.best_metric", "checkpoint.keep_best"];
    let measured = [
        "validation.url",
        "validation.every_steps",
        "validation.weights",
        "fid.reference",
        "fid.every_steps",
        "fid.weights",
    ];
    let asked_for = keep_best > 0 || r.given("checkpoint.best_metric");
    let metrics = c.metrics();
    if !asked_for || !r.sound(&keys) || !r.sound(&measured) || metrics.contains(metric) {
        return;
    }
    let key = if r.given("checkpoint.best_metric") { "checkpoint.best_metric" } else { "checkpoint.keep_best" };
    let names: Vec<String> = metrics.iter().map(|name| format!("\"{name}\"")).collect();
    let advice = match names.is_empty() {
        true => "set validation.url and validation.every_steps, or fid.reference".to_owned(),
        false => format!("set checkpoint.best_metric to {}", names.join(" or ")),
    };
    r.refuse(key, format!("needs the metric \"{metric}\", which this run does not measure"), advice);
}
