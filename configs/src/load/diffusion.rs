//! `[diffusion]`: its keys by themselves, and against each other.

use super::POSITIVE;
use crate::diffusion::{DiffusionConfig, Objective, Schedule, TimestepSampling};
use crate::reader::Reader;
use std::ops::Bound::{self, Excluded};

const INSIDE_ONE: (Bound<f64>, Bound<f64>) = (Excluded(0.0), Excluded(1.0));

pub(super) fn read(r: &mut Reader) -> DiffusionConfig {
    let usual = DiffusionConfig::default();
    let objectives =
        [("eps", Objective::Eps), ("x_start", Objective::XStart), ("v", Objective::V), ("flow", Objective::Flow)];
    let schedules = [
        ("linear", Schedule::Linear),
        ("squared-cosine", Schedule::SquaredCosine),
        ("scaled-linear", Schedule::ScaledLinear),
        // What the official code and diffusers call them.
        ("squaredcos_cap_v2", Schedule::SquaredCosine),
        ("scaled_linear", Schedule::ScaledLinear),
    ];
    let samplings = [("uniform", TimestepSampling::Uniform), ("logit-normal", TimestepSampling::LogitNormal)];
    DiffusionConfig {
        objective: r.choice("diffusion.objective", &objectives, usual.objective),
        schedule: r.choice("diffusion.schedule", &schedules, usual.schedule),
        timesteps: r.integer("diffusion.timesteps", 21..=100_000, usual.timesteps as u64) as usize,
        beta_start: r.optional_float("diffusion.beta_start", INSIDE_ONE),
        beta_end: r.optional_float("diffusion.beta_end", INSIDE_ONE),
        zero_terminal_snr: r.boolean("diffusion.zero_terminal_snr", usual.zero_terminal_snr),
        min_snr_gamma: r.optional_float("diffusion.min_snr_gamma", POSITIVE),
        timestep_sampling: r.choice("diffusion.timestep_sampling", &samplings, usual.timestep_sampling),
        logit_mean: r.float("diffusion.logit_mean", -20.0..=20.0, usual.logit_mean),
        logit_std: r.float("diffusion.logit_std", POSITIVE, usual.logit_std),
    }
}

/// A key that already has a mistake is left out of it.
pub(super) fn check(r: &mut Reader, diffusion: &DiffusionConfig) {
    if !r.sound(&["diffusion.objective"]) {
        return;
    }
    match diffusion.objective {
        Objective::Flow => {
            check_flow(r, diffusion);
            return;
        }
        Objective::Eps if diffusion.zero_terminal_snr => r.refuse(
            "diffusion.zero_terminal_snr",
            "does not fit diffusion.objective = \"eps\": at the last timestep x_t is nothing but the noise, so a predicted eps says nothing about x_start",
            "use diffusion.objective = \"v\" or \"x_start\"",
        ),
        Objective::Eps | Objective::XStart | Objective::V => {}
    }
    for key in ["diffusion.timestep_sampling", "diffusion.logit_mean", "diffusion.logit_std"] {
        if r.given(key) && r.sound(&[key]) {
            let advice = "remove it (timesteps are drawn uniformly), or use diffusion.objective = \"flow\"";
            r.refuse(key, "is for flow matching only", advice);
        }
    }
    check_beta_ends(r, diffusion);
}

fn check_flow(r: &mut Reader, diffusion: &DiffusionConfig) {
    let discrete = ["schedule", "timesteps", "beta_start", "beta_end", "zero_terminal_snr", "min_snr_gamma"];
    for key in discrete.map(|key| format!("diffusion.{key}")) {
        if r.given(&key) && r.sound(&[&key]) {
            r.refuse(
                &key,
                "has no meaning with diffusion.objective = \"flow\", whose path is straight and whose time is continuous",
                "remove it, or use diffusion.objective = \"eps\", \"x_start\" or \"v\"",
            );
        }
    }
    let logit_normal = diffusion.timestep_sampling == TimestepSampling::LogitNormal;
    for key in ["diffusion.logit_mean", "diffusion.logit_std"] {
        if !logit_normal && r.given(key) && r.sound(&[key, "diffusion.timestep_sampling"]) {
            let advice = "set diffusion.timestep_sampling = \"logit-normal\", or remove it";
            r.refuse(key, "has no meaning with uniform timesteps", advice);
        }
    }
}

fn check_beta_ends(r: &mut Reader, diffusion: &DiffusionConfig) {
    const ENDS: [&str; 2] = ["diffusion.beta_start", "diffusion.beta_end"];
    if !r.sound(&ENDS) || !r.sound(&["diffusion.schedule"]) {
        return;
    }
    let squared_cosine = diffusion.schedule == Schedule::SquaredCosine;
    for key in ENDS.into_iter().filter(|_| squared_cosine) {
        if r.given(key) {
            let advice = "remove it, or use diffusion.schedule = \"linear\" or \"scaled-linear\"";
            r.refuse(key, "has no meaning with the squared-cosine schedule, which has no ends to choose", advice);
        }
    }
    match (diffusion.beta_start, diffusion.beta_end) {
        _ if squared_cosine => {}
        (Some(start), Some(end)) if start > end => r.refuse(
            "diffusion.beta_start",
            format!("is above diffusion.beta_end = {end}: noise has to grow with the timestep"),
            "exchange the two",
        ),
        (Some(_), None) => r.refuse(ENDS[0], "is given without diffusion.beta_end", "give both or neither"),
        (None, Some(_)) => r.refuse(ENDS[1], "is given without diffusion.beta_start", "give both or neither"),
        _ => {}
    }
}
