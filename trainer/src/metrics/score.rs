//! The Inception Score.

use super::MetricsError;
use tch::{Kind, Tensor};

/// Images of a split.
pub const SPLIT: i64 = 5000;

/// exp E KL(p(y|x) ‖ p(y)) of each split of 5000 images in order, the last one shorter: mean and population standard
/// deviation over the splits. It lies between 1 and the number of classes.
///
/// # Shapes
/// `log_probabilities`: f64 `[N, classes]`, natural logarithms.
///
/// # Errors
/// No images.
///
/// # Source
/// Salimans et al., arXiv:1606.03498; splits as the evaluator of guided-diffusion makes them.
pub fn inception_score(log_probabilities: &Tensor) -> Result<(f64, f64), MetricsError> {
    let count = log_probabilities.size()[0];
    if count == 0 {
        return Err(MetricsError::Undefined { metric: "Inception Score", reason: "no images".into() });
    }
    let mut scores = Vec::new();
    for first in (0..count).step_by(SPLIT as usize) {
        let of_images = log_probabilities.f_narrow(0, first, SPLIT.min(count - first))?;
        let probabilities = of_images.f_exp()?;
        let of_classes = probabilities.f_mean_dim([0i64].as_slice(), true, Kind::Double)?.f_log()?;
        // 0 · log 0 is 0: a class that no image of the split has adds nothing.
        let terms = (&probabilities * (of_images - of_classes)).f_nan_to_num(0.0, None, None)?;
        let divergence = terms.f_sum_dim_intlist([1i64].as_slice(), false, Kind::Double)?.f_mean(Kind::Double)?;
        scores.push(divergence.f_double_value(&[])?.exp());
    }
    let mean = scores.iter().sum::<f64>() / scores.len() as f64;
    let variance = scores.iter().map(|score| (score - mean).powi(2)).sum::<f64>() / scores.len() as f64;
    Ok((mean, variance.sqrt()))
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]
    use super::*;

    fn score(rows: &[f64], classes: i64) -> (f64, f64) {
        inception_score(&Tensor::from_slice(rows).view([-1, classes]).log()).unwrap()
    }

    #[test]
    fn known_distributions() {
        let near = |found: (f64, f64), expected: (f64, f64)| {
            assert!((found.0 - expected.0).abs() < 1e-12 && (found.1 - expected.1).abs() < 1e-12, "{found:?}");
        };
        // Certain and evenly spread over the classes: their number. All alike: 1, also with classes that never occur.
        near(score(&[1., 0., 0., 0., 1., 0., 0., 0., 1.], 3), (3., 0.));
        near(score(&[0.5, 0.5, 0., 0.5, 0.5, 0.], 3), (1., 0.));
        // By hand: rows (0.9, 0.1) and (0.1, 0.9) against (0.5, 0.5).
        near(score(&[0.9, 0.1, 0.1, 0.9], 2), ((0.9f64 * 1.8f64.ln() + 0.1 * 0.2f64.ln()).exp(), 0.));
    }

    #[test]
    fn splits_of_5000_in_order() {
        // The first split alternates between two classes (score 2), the second has one image (score 1).
        let rows: Vec<f64> = (0..5001).flat_map(|i| if i % 2 == 0 { [1., 0.] } else { [0., 1.] }).collect();
        let (mean, deviation) = score(&rows, 2);
        assert!((mean - 1.5).abs() < 1e-12 && (deviation - 0.5).abs() < 1e-12, "{mean} {deviation}");
        assert!(inception_score(&Tensor::zeros([0, 2], (Kind::Double, tch::Device::Cpu))).is_err());
    }
}
