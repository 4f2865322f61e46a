use super::Tables;
use std::f64::consts::{LN_2, PI};
use tch::Tensor;

/// The variational bound of one step, per sample.
pub struct VarianceTerms {
    /// KL(q ‖ p) in bits, `[N]`.
    pub kl_bits: Tensor,
    /// Discretised negative log-likelihood of x_start in bits, `[N]`; the bound of t = 0.
    pub decoder_nll_bits: Tensor,
    /// `decoder_nll_bits` where t = 0, else `kl_bits`.
    pub bound_bits: Tensor,
    /// Mean of p(x_{t−1} | x_t).
    pub p_mean: Tensor,
}

/// The variational bound of step t for a model that predicts `pred_xstart` (not clipped) and the log-variance of
/// p(x_{t−1} | x_t).
///
/// # Shapes
/// `x_start`, `x_t`, `pred_xstart` [N, C, H, W], `p_log_variance` likewise or [N, 1, 1, 1]; `t` N indices.
///
/// # Source
/// Nichol & Dhariwal 2021, equations 4, 15; Ho et al. 2020, equation 13. In bits, averaged over C·H·W.
pub fn variational_bound(
    tables: &Tables,
    x_start: &Tensor,
    x_t: &Tensor,
    t: &[usize],
    pred_xstart: &Tensor,
    p_log_variance: &Tensor,
) -> VarianceTerms {
    let q_mean = tables.posterior_mean(x_start, x_t, t);
    let q_log_variance = Tables::gather(&tables.posterior_log_variance_clipped, t, x_t.device());
    let p_mean = tables.posterior_mean(pred_xstart, x_t, t);

    let kl = ((p_log_variance - &q_log_variance) - 1.0
        + (&q_log_variance - p_log_variance).exp()
        + (&q_mean - &p_mean).square() * (-p_log_variance).exp())
        * 0.5;
    let kl_bits = sample_mean(&kl) / LN_2;
    let log_likelihood = discretised_log_likelihood(x_start, &p_mean, &(p_log_variance * 0.5));
    let decoder_nll_bits = -sample_mean(&log_likelihood) / LN_2;
    let at_zero: Vec<bool> = t.iter().map(|&t| t == 0).collect();
    let at_zero = Tensor::from_slice(&at_zero).to_device(x_t.device());
    let bound_bits = decoder_nll_bits.where_self(&at_zero, &kl_bits);
    VarianceTerms { kl_bits, decoder_nll_bits, bound_bits, p_mean }
}

/// Log-variance between the clipped posterior's (variance = −1) and log β (variance = 1).
///
/// # Shapes
/// `variance` [N, C, H, W], the second half of an output; `t` N indices.
pub fn learned_log_variance(tables: &Tables, t: &[usize], variance: &Tensor) -> Tensor {
    let gather = |table: &[f64]| Tables::gather(table, t, variance.device());
    let fraction = (variance + 1.0) / 2.0;
    &fraction * gather(&tables.log_betas) + (1.0 - &fraction) * gather(&tables.posterior_log_variance_clipped)
}

/// Mean over everything but the batch: [N, …] → `[N]`.
pub(crate) fn sample_mean(x: &Tensor) -> Tensor {
    x.flatten(1, -1).mean_dim(1, false, None)
}

/// Log-probability of `x` in bins of width 2/255 under a Gaussian; the outermost bins are open.
fn discretised_log_likelihood(x: &Tensor, mean: &Tensor, log_scale: &Tensor) -> Tensor {
    let centered = x - mean;
    let inverse = (-log_scale).exp();
    let cdf_plus = normal_cdf(&(&inverse * (&centered + 1.0 / 255.0)));
    let cdf_min = normal_cdf(&(&inverse * (&centered - 1.0 / 255.0)));
    let floor = 1e-12;
    let inside = (&cdf_plus - &cdf_min).clamp_min(floor).log();
    let upper = (-&cdf_min + 1.0).clamp_min(floor).log();
    let lower = cdf_plus.clamp_min(floor).log();
    lower.where_self(&x.lt(-0.999), &upper.where_self(&x.gt(0.999), &inside))
}

/// The tanh approximation of the standard normal's distribution function.
fn normal_cdf(z: &Tensor) -> Tensor {
    ((z + z.pow_tensor_scalar(3) * 0.044715) * (2.0 / PI).sqrt()).tanh() * 0.5 + 0.5
}
