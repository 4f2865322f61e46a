//! Averages of any width after the fact: a power-function profile as the best linear combination of stored ones
//! (Karras et al. 2024, "Analyzing and Improving the Training Dynamics of Diffusion Models", section 3.2).

use crate::ffi::TorchError;
use tch::Tensor;

/// How much each update weighs in a power-function average: p(τ) = (γ+1)·τ^γ / t^(γ+1) for 0 < τ ≤ t.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Profile {
    /// t: updates that the average has seen. Above 0.
    pub updates: f64,
    /// γ ≥ 0.
    pub gamma: f64,
}

impl Profile {
    /// ∫ p·q dτ.
    pub fn dot(self, other: Self) -> f64 {
        let (early, late) = if self.updates <= other.updates { (self, other) } else { (other, self) };
        // The product ends with the earlier one: powers of the two lengths but for one cancel.
        let overlap = (early.updates / late.updates).powf(late.gamma) / late.updates;
        (early.gamma + 1.0) * (late.gamma + 1.0) / (early.gamma + late.gamma + 1.0) * overlap
    }
}

/// A profile as a combination of others.
#[derive(Clone, Debug)]
pub struct Fit {
    /// Of each given profile.
    pub coefficients: Vec<f64>,
    /// ‖wanted − combination‖ / ‖wanted‖, in the sense of [`Profile::dot`].
    pub relative_error: f64,
}

/// The least-squares combination of `stored` that comes nearest to `wanted`; one of them alone where it is the very same.
///
/// # Errors
/// What libtorch reports of a system of equations without a unique solution (two equal profiles).
pub fn fit(stored: &[Profile], wanted: Profile) -> Result<Fit, TorchError> {
    if let Some(index) = stored.iter().position(|profile| *profile == wanted) {
        let coefficients = (0..stored.len()).map(|i| f64::from(u8::from(i == index))).collect();
        return Ok(Fit { coefficients, relative_error: 0.0 });
    }
    // Profiles of unit norm, so that long and short averages count alike in rounding.
    let norm = |profile: Profile| profile.dot(profile).sqrt();
    let cosine = |a: Profile, b: Profile| a.dot(b) / (norm(a) * norm(b));
    let torch = |error: tch::TchError| TorchError(error.to_string());
    let n = stored.len() as i64;
    let gram: Vec<f64> = stored.iter().flat_map(|a| stored.iter().map(|b| cosine(*a, *b))).collect();
    let gram = Tensor::from_slice(&gram).view([n, n]);
    let aims = Tensor::from_slice(&stored.iter().map(|profile| cosine(*profile, wanted)).collect::<Vec<f64>>());
    let solution = Tensor::f_linalg_solve(&gram, &aims, true).map_err(torch)?;
    // |w − Σ x p|² / |w|², in which the cross term is twice the explained part but for rounding.
    let explained = solution.dot(&(2.0 * &aims - gram.mv(&solution))).double_value(&[]);
    let unit: Vec<f64> = Vec::try_from(&solution).map_err(torch)?;
    Ok(Fit {
        coefficients: unit.iter().zip(stored).map(|(x, profile)| x * norm(wanted) / norm(*profile)).collect(),
        relative_error: (1.0 - explained).max(0.0).sqrt(),
    })
}

#[cfg(test)]
mod tests {
    use super::super::{Rule, gamma_of};
    use super::*;

    fn profile(updates: u64, sigma_rel: f64) -> Profile {
        Profile { updates: updates as f64, gamma: gamma_of(sigma_rel) }
    }

    #[test]
    fn the_product_is_the_integral() {
        let (a, b) = (profile(30, 0.1), profile(50, 0.2));
        let density = |p: Profile, tau: f64| {
            if tau > p.updates { 0.0 } else { (p.gamma + 1.0) * (tau / p.updates).powf(p.gamma) / p.updates }
        };
        let pieces = 200_000;
        let width = 50.0 / f64::from(pieces);
        let middle = |i: i32| (f64::from(i) + 0.5) * width;
        let integral: f64 = (0..pieces).map(|i| density(a, middle(i)) * density(b, middle(i)) * width).sum();
        assert!((a.dot(b) / integral - 1.0).abs() < 1e-5 && a.dot(b) == b.dot(a), "{} {integral}", a.dot(b));
    }

    #[test]
    fn a_stored_average_is_taken_as_it_is() {
        let stored = [profile(50, 0.05), profile(100, 0.05), profile(100, 0.1)];
        let fit = fit(&stored, profile(100, 0.05)).unwrap();
        assert_eq!((&fit.coefficients[..], fit.relative_error), (&[0.0, 1.0, 0.0][..], 0.0));
    }

    /// A weight that wanders, its averages of two widths stored now and then, and the average of a third width tracked
    /// all along: the combination comes as near to it as the fit says that its profile does.
    #[test]
    fn an_average_that_was_not_tracked_is_reconstructed_from_stored_ones() {
        const UPDATES: u64 = 4000;
        let weight = |k: u64| (k as f64 / 700.0).sin() + (k as f64 / 90.0).cos() * 0.2 + k as f64 / 4000.0;
        let tracked = |sigma_rel: f64, until: u64| {
            let rule = Rule::Power { gamma: gamma_of(sigma_rel) };
            (1..=until).fold(0.0, |average, k| average + (1.0 - rule.decay_at(k)) * (weight(k) - average))
        };
        let mut last_error = 1.0;
        for every in [2000, 500, 125] {
            let times = (1..=UPDATES / every).map(|i| i * every);
            let stored: Vec<(u64, f64)> = times.flat_map(|t| [(t, 0.05), (t, 0.1)]).collect();
            let profiles: Vec<Profile> = stored.iter().map(|&(t, sigma_rel)| profile(t, sigma_rel)).collect();
            for sigma_rel in [0.07, 0.15] {
                let fit = fit(&profiles, profile(UPDATES, sigma_rel)).unwrap();
                let values = stored.iter().map(|&(t, sigma_rel)| tracked(sigma_rel, t));
                let combined: f64 = values.zip(&fit.coefficients).map(|(value, x)| value * x).sum();
                let error = (combined - tracked(sigma_rel, UPDATES)).abs();
                assert!(
                    error < 2.0 * fit.relative_error + 1e-4,
                    "{every} {sigma_rel}: {error}, {}",
                    fit.relative_error
                );
                if sigma_rel == 0.15 {
                    assert!(fit.relative_error < 0.5 * last_error, "more snapshots fit better");
                    last_error = fit.relative_error;
                }
            }
        }
        assert!(last_error < 3e-3, "{last_error}");
    }
}
