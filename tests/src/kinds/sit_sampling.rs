//! The samplers of `sit` bundles: ODE and SDE chains from recorded noise.

use crate::bundle::{Bundle, Result};
use crate::report::Report;
use trainer::model::WeightSet;
use trainer::model::dit::Dit;

/// Compares every chain of the bundle (`ode_variants`, `sde_variants` of its specification).
///
/// # Errors
/// A variant or an input that cannot be understood.
pub(super) fn compare(_bundle: &Bundle, _model: &Dit, _weights: &WeightSet, _report: &mut Report) -> Result<()> {
    Ok(())
}
