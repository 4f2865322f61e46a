//! The kinds of bundles. A new kind is one more file here and one more line in [`KINDS`].

mod cfg;
mod diffusers_dit;
mod diffusion_tables;
mod dit_ablation;
mod dit_forward;
mod sampling;
mod sit;
mod sit_sampling;
mod train_steps;
mod training_losses;
mod vae;

use crate::bundle::{Bundle, Result};
use crate::report::Report;

/// How bundles of one kind are run.
pub struct Kind {
    /// As the specification names it.
    pub name: &'static str,
    /// (Pattern, tolerance) as the documentation of the kind states them, for where a bundle states none that is
    /// understood. They cover every output.
    pub tolerances: &'static [(&'static str, &'static str)],
    /// The file beside it that it needs, if it needs one.
    pub partner: fn(&Bundle) -> Result<Option<Bundle>>,
    /// Whether the expected outputs are in the partner, not in the bundle itself.
    pub references_in_partner: bool,
    /// Runs the bundle and compares every tensor that a bundle of this kind has; missing ones are failures. An error
    /// ends the bundle and is a failure.
    pub run: fn(&Bundle, Option<&Bundle>, &mut Report) -> Result<()>,
}

/// All kinds.
pub const KINDS: &[Kind] = &[
    dit_forward::KIND,
    dit_ablation::KIND,
    cfg::KIND,
    diffusion_tables::KIND,
    training_losses::KIND,
    train_steps::STEPS,
    train_steps::EMA,
    sampling::KIND,
    sit::KIND,
    diffusers_dit::KIND,
    vae::KIND,
    vae::LEGACY_NAMES,
];

/// Most kinds stand alone.
fn alone(_: &Bundle) -> Result<Option<Bundle>> {
    Ok(None)
}
