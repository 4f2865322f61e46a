//! Improved precision and recall.

use super::MetricsError;
use tch::{Kind, Tensor};

/// Whose distance is the radius of an image's ball: the third nearest neighbour, the image itself not counted.
const NEIGHBOUR: i64 = 3;
/// Rows and columns of a block of distances: 64 MiB in f32, whatever the number of images.
const BLOCK: i64 = 4096;

/// Precision (share of samples that lie in the ball of some reference image) and recall (share of reference images that lie
/// in the ball of some sample); a ball reaches to the third nearest neighbour within the own set. Blocks bound the memory
/// beyond the features themselves.
///
/// # Shapes
/// f32 `[N, D]` and `[M, D]` on the same device; N and M may differ.
///
/// # Errors
/// Fewer than four images of a kind.
///
/// # Source
/// Kynkäänniemi et al., arXiv:1904.06991, with k = 3 as the evaluator of guided-diffusion takes it.
pub fn precision_recall(reference: &Tensor, samples: &Tensor) -> Result<(f64, f64), MetricsError> {
    in_blocks(reference, samples, BLOCK)
}

fn in_blocks(reference: &Tensor, samples: &Tensor, block: i64) -> Result<(f64, f64), MetricsError> {
    let _no_grad = tch::no_grad_guard();
    let reference_radii = radii(reference, block)?;
    let sample_radii = radii(samples, block)?;
    let precision = share_inside(samples, reference, &reference_radii, block)?;
    let recall = share_inside(reference, samples, &sample_radii, block)?;
    Ok((precision, recall))
}

/// First row and number of rows of each block.
fn blocks(of: &Tensor, block: i64) -> impl Iterator<Item = (i64, i64)> + use<> {
    let count = of.size()[0];
    (0..count).step_by(block as usize).map(move |first| (first, block.min(count - first)))
}

/// Squared Euclidean distances `[n, m]`.
fn squared_distances(a: &Tensor, b: &Tensor) -> Result<Tensor, MetricsError> {
    let norm = |x: &Tensor| x.f_square()?.f_sum_dim_intlist([1i64].as_slice(), true, Kind::Float);
    let products = a.f_matmul(&b.f_tr()?)?;
    Ok(((products * -2.0).f_add(&norm(a)?)?.f_add(&norm(b)?.f_tr()?)?).f_clamp_min_(0.0)?)
}

/// The squared radius of each row's ball: `[N]`.
fn radii(features: &Tensor, block: i64) -> Result<Tensor, MetricsError> {
    let count = features.size()[0];
    if count <= NEIGHBOUR {
        let reason = format!("{count} images, expected at least {}", NEIGHBOUR + 1);
        return Err(MetricsError::Undefined { metric: "precision and recall", reason });
    }
    let mut found = Vec::new();
    for (first, rows) in blocks(features, block) {
        let rows = features.f_narrow(0, first, rows)?;
        let mut nearest: Option<Tensor> = None;
        for (first, columns) in blocks(features, block) {
            let distances = squared_distances(&rows, &features.f_narrow(0, first, columns)?)?;
            let candidates = match nearest {
                Some(nearest) => Tensor::f_cat(&[nearest, distances], 1)?,
                None => distances,
            };
            let keep = (NEIGHBOUR + 1).min(candidates.size()[1]);
            nearest = Some(candidates.f_topk(keep, 1, false, true)?.0);
        }
        // Sorted; the first is the image itself.
        found.extend(nearest.map(|nearest| nearest.f_select(1, NEIGHBOUR)).transpose()?);
    }
    Ok(Tensor::f_cat(&found, 0)?)
}

/// The share of `points` that lie in the ball of some centre.
fn share_inside(points: &Tensor, centres: &Tensor, squared_radii: &Tensor, block: i64) -> Result<f64, MetricsError> {
    let mut inside = 0;
    for (first, rows) in blocks(points, block) {
        let rows = points.f_narrow(0, first, rows)?;
        let mut any: Option<Tensor> = None;
        for (first, columns) in blocks(centres, block) {
            let distances = squared_distances(&rows, &centres.f_narrow(0, first, columns)?)?;
            let reach = squared_radii.f_narrow(0, first, columns)?;
            let within = distances.f_le_tensor(&reach)?.f_any_dim(1, false)?;
            any = Some(match any {
                Some(any) => any.f_logical_or(&within)?,
                None => within,
            });
        }
        inside += any.map_or(Ok(0), |any| any.f_sum(Kind::Int64)?.f_int64_value(&[]))?;
    }
    Ok(inside as f64 / points.size()[0] as f64)
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]
    use super::*;

    fn line(positions: impl IntoIterator<Item = f32>) -> Tensor {
        let positions: Vec<f32> = positions.into_iter().collect();
        Tensor::from_slice(&positions).view([-1, 1])
    }

    #[test]
    fn known_sets_on_a_line() {
        // Reference 0, 1, 2, 3: the third neighbours are 3, 2, 2, 3 away, so their balls cover [-3, 6].
        let reference = line([0., 1., 2., 3.]);
        // Samples 6, 7, 8, 20: third neighbours 14, 13, 12, 14 away: balls [-8, 20], [-6, 20], [-4, 20], [6, 34].
        let (precision, recall) = precision_recall(&reference, &line([6., 7., 8., 20.])).unwrap();
        assert_eq!((precision, recall), (0.25, 1.0));
        assert_eq!(precision_recall(&reference, &reference).unwrap(), (1.0, 1.0));
        // All samples alike: balls of radius 0 that cover one reference image.
        assert_eq!(precision_recall(&reference, &line([2.; 5])).unwrap(), (1.0, 0.25));
        assert_eq!(precision_recall(&reference, &line([100., 100.5, 101., 101.5])).unwrap(), (0.0, 0.0));
    }

    /// By the definition, in f64, one pair after another.
    fn by_definition(reference: &[[f64; 2]], samples: &[[f64; 2]]) -> (f64, f64) {
        let distance = |a: &[f64; 2], b: &[f64; 2]| (a[0] - b[0]).hypot(a[1] - b[1]);
        let inside = |points: &[[f64; 2]], centres: &[[f64; 2]]| {
            let covers = |centre: &[f64; 2], point: &[f64; 2]| {
                let mut within: Vec<f64> = centres.iter().map(|other| distance(centre, other)).collect();
                within.sort_by(f64::total_cmp);
                distance(centre, point) <= within[3]
            };
            let covered = points.iter().filter(|point| centres.iter().any(|centre| covers(centre, point)));
            covered.count() as f64 / points.len() as f64
        };
        (inside(samples, reference), inside(reference, samples))
    }

    #[test]
    fn any_block_size_agrees_with_the_definition() {
        let spiral = |count: usize, turn: f64, shift: f64| -> Vec<[f64; 2]> {
            let point = |i: usize| (i as f64 * turn, (i as f64 + 1.0).sqrt());
            (0..count).map(point).map(|(angle, radius)| [radius * angle.cos() + shift, radius * angle.sin()]).collect()
        };
        let (reference, samples) = (spiral(37, 2.399, 0.0), spiral(23, 1.1, 7.0));
        let tensor = |points: &[[f64; 2]]| Tensor::from_slice(&points.concat()).to_kind(Kind::Float).view([-1, 2]);
        let expected = by_definition(&reference, &samples);
        assert!(expected.0 > 0.1 && expected.0 < 0.9 && expected.1 > 0.1 && expected.1 < 0.9, "{expected:?}");
        for block in [1, 2, 7, 23, 37, BLOCK] {
            assert_eq!(in_blocks(&tensor(&reference), &tensor(&samples), block).unwrap(), expected, "block {block}");
        }
    }

    #[test]
    fn too_few_images_are_refused() {
        let error = precision_recall(&line([1., 2., 3.]), &line([1., 2., 3., 4.])).unwrap_err().to_string();
        assert!(error.contains("3 images, expected at least 4"), "{error}");
    }
}
