//! Means and covariances of features, and the Fréchet distance between them.

use super::MetricsError;
use tch::{Device, Kind, Tensor};

/// Mean and covariance of feature vectors; f64 on the CPU.
#[derive(Debug)]
pub struct Gaussian {
    /// `[D]`
    pub mean: Tensor,
    /// `[D, D]`, divided by N − 1.
    pub covariance: Tensor,
    /// `[N, D]` with factorᵀ · factor = covariance, where it is known and N ≤ D.
    pub factor: Option<Tensor>,
}

/// Accumulates a [`Gaussian`] batch by batch. The result depends on the order and size of the batches (in the last bits),
/// so they must be the same whoever computed the features.
pub struct Moments {
    count: i64,
    mean: Tensor,
    /// Σ (x − mean)(x − mean)ᵀ
    scatter: Tensor,
    /// All vectors, as long as there are no more than values in one.
    vectors: Option<Vec<Tensor>>,
}

impl Moments {
    /// Of nothing yet, for vectors of `size` values.
    pub fn new(size: i64) -> Self {
        let options = (Kind::Double, Device::Cpu);
        let (mean, scatter) = (Tensor::zeros([size], options), Tensor::zeros([size, size], options));
        Self { count: 0, mean, scatter, vectors: Some(Vec::new()) }
    }

    /// Adds a batch.
    ///
    /// # Shapes
    /// `features`: `[N, D]`, any device and floating kind.
    ///
    /// # Errors
    /// A refusal by libtorch (another D).
    ///
    /// # Source
    /// The pairwise update of Chan, Golub and LeVeque (1979).
    pub fn add(&mut self, features: &Tensor) -> Result<(), MetricsError> {
        let added = features.size()[0];
        if added == 0 {
            return Ok(());
        }
        let features = features.f_to_device(Device::Cpu)?.f_to_kind(Kind::Double)?;
        let mean = features.f_mean_dim([0i64].as_slice(), false, Kind::Double)?;
        let delta = mean.f_sub(&self.mean)?;
        let total = self.count + added;
        let share = added as f64 / total as f64;
        let between = (&delta * (self.count as f64 * share).sqrt()).f_unsqueeze(0)?;
        let rows = Tensor::f_cat(&[features.f_sub(&mean)?, between], 0)?;
        let _ = self.scatter.f_addmm_(&rows.f_tr()?, &rows)?;
        self.mean = self.mean.f_add(&(delta * share))?;
        self.count = total;
        match &mut self.vectors {
            Some(vectors) if total <= self.mean.size()[0] => vectors.push(features),
            _ => self.vectors = None,
        }
        Ok(())
    }

    /// How many vectors were added.
    pub fn count(&self) -> i64 {
        self.count
    }

    /// The Gaussian.
    ///
    /// # Errors
    /// Fewer than two vectors, or values that are not finite.
    pub fn finish(self, metric: &'static str) -> Result<Gaussian, MetricsError> {
        if self.count < 2 {
            let reason = format!("{} images, expected at least 2 for a covariance", self.count);
            return Err(MetricsError::Undefined { metric, reason });
        }
        let divisor = (self.count - 1) as f64;
        let covariance = self.scatter / divisor;
        if !covariance.sum(Kind::Double).double_value(&[]).is_finite() {
            let reason = "features that are not finite; are these the right Inception weights?".to_owned();
            return Err(MetricsError::Undefined { metric, reason });
        }
        let centred = |vectors: Vec<Tensor>| Tensor::f_cat(&vectors, 0)?.f_sub(&self.mean);
        let factor = self.vectors.map(centred).transpose()?.map(|centred| centred / divisor.sqrt());
        Ok(Gaussian { mean: self.mean, covariance, factor })
    }
}

impl Gaussian {
    /// F with Fᵀ · F = covariance, if Cholesky's method finds one: not where the covariance is singular.
    fn cholesky(&self) -> Result<Option<Tensor>, MetricsError> {
        let (upper, failed_at) = self.covariance.f_linalg_cholesky_ex(true, false)?;
        Ok((failed_at.f_int64_value(&[])? == 0).then_some(upper))
    }

    /// F with Fᵀ · F = covariance from the eigenvectors; eigenvalues that rounding has made negative count as 0.
    fn root(&self) -> Result<Tensor, MetricsError> {
        let (values, vectors) = self.covariance.f_linalg_eigh("L")?;
        Ok(vectors.f_mul(&values.f_clamp_min(0.0)?.f_sqrt()?)?.f_tr()?)
    }

    /// ‖μ₁ − μ₂‖² + tr(Σ₁ + Σ₂ − 2 (Σ₁Σ₂)^½), never below 0. The last trace is Σ √λ over the eigenvalues of F Σ₂ Fᵀ for any
    /// F with FᵀF = Σ₁: a symmetric matrix, so they are real and not negative also where fewer images than features leave
    /// the covariances singular. A general matrix root fails there.
    ///
    /// # Errors
    /// Gaussians of different sizes, or a refusal by libtorch.
    ///
    /// # Source
    /// Dowson and Landau (1982); Heusel et al., arXiv:1706.08500, eq. 6.
    pub fn frechet_distance(&self, other: &Self, metric: &'static str) -> Result<f64, MetricsError> {
        if self.mean.size() != other.mean.size() {
            let reason = format!("features of {} and {} values", self.mean.numel(), other.mean.numel());
            return Err(MetricsError::Undefined { metric, reason });
        }
        let _no_grad = tch::no_grad_guard();
        // The cheapest factor of one; the distance is symmetric.
        let known =
            [(self, other), (other, self)].map(|(one, other)| Some((one.factor.as_ref()?.shallow_clone(), other)));
        let (factor, counterpart) = match known.into_iter().flatten().min_by_key(|(factor, _)| factor.size()[0]) {
            Some(found) => found,
            None => match (self.cholesky()?, other.cholesky()?) {
                (Some(factor), _) => (factor, other),
                (None, Some(factor)) => (factor, self),
                (None, None) => (self.root()?, other),
            },
        };
        let product = factor.f_matmul(&counterpart.covariance)?.f_matmul(&factor.f_tr()?)?;
        let product = (&product + product.f_tr()?) / 2.0;
        let shared = product.f_linalg_eigvalsh("L")?.f_clamp_min(0.0)?.f_sqrt()?.f_sum(Kind::Double)?;
        let trace = |of: &Self| of.covariance.trace();
        let apart = self.mean.f_sub(&other.mean)?.f_square()?.f_sum(Kind::Double)?;
        let distance = apart + trace(self) + trace(other) - shared * 2.0;
        Ok(distance.f_double_value(&[])?.max(0.0))
    }
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]
    use super::*;

    fn gaussian(mean: &[f64], covariance: &[f64]) -> Gaussian {
        let size = mean.len() as i64;
        Gaussian {
            mean: Tensor::from_slice(mean),
            covariance: Tensor::from_slice(covariance).view([size, size]),
            factor: None,
        }
    }

    fn close(found: f64, expected: f64) {
        assert!((found - expected).abs() <= 1e-9 * expected.abs().max(1.0), "found {found}, expected {expected}");
    }

    #[test]
    fn distances_of_known_gaussians() {
        let distance = |a: &Gaussian, b: &Gaussian| a.frechet_distance(b, "FID").unwrap();
        // Diagonal: (1−4)² + (2−0)² + (√9−√4)² + (√1−√16)².
        let (a, b) = (gaussian(&[1., 2.], &[9., 0., 0., 1.]), gaussian(&[4., 0.], &[4., 0., 0., 16.]));
        close(distance(&a, &b), 9. + 4. + 1. + 9.);
        close(distance(&b, &a), 23.);
        // tr √(Σ₁Σ₂) of 2 × 2 matrices is √(tr Σ₁Σ₂ + 2 √det Σ₁Σ₂): here √(7 + 2·3) with 2,1;1,2 and 2,0.5;0.5,1.25.
        let (a, b) = (gaussian(&[0., 0.], &[2., 1., 1., 2.]), gaussian(&[0., 0.], &[2., 0.5, 0.5, 1.25]));
        let determinants: f64 = (2. * 2. - 1.) * (2. * 1.25 - 0.25);
        close(distance(&a, &b), 4. + 3.25 - 2. * (4. + 1. + 2.5 + 2. * determinants.sqrt()).sqrt());
        close(distance(&a, &a), 0.);
        // Singular ones: rank 1 along the same and along orthogonal axes.
        let (x, y) = (gaussian(&[0., 0.], &[4., 0., 0., 0.]), gaussian(&[0., 0.], &[0., 0., 0., 9.]));
        close(distance(&x, &y), 13.);
        close(distance(&x, &gaussian(&[0., 0.], &[9., 0., 0., 0.])), 1.);
        // The same from fewer vectors than values, with their factor and without.
        let of_rows = |rows: &[f64]| {
            let mut moments = Moments::new(4);
            moments.add(&Tensor::from_slice(rows).view([-1, 4])).unwrap();
            moments.finish("FID").unwrap()
        };
        let without = |of: &Gaussian| Gaussian {
            mean: of.mean.shallow_clone(),
            covariance: of.covariance.shallow_clone(),
            factor: None,
        };
        let (few, many) = (
            of_rows(&[1., 2., 3., 5., 8., 1., 0., 2., -1., 4., 2., 2.]),
            of_rows(&[1., 0., 0., 2., 0., 1., 3., 0., 2., 2., 0., 1., 5., 0., 1., 1., 0., 4., 1., 2., 7., 1., 1., 0.]),
        );
        assert!(few.factor.is_some() && many.factor.is_none());
        // Eigenvalues that are 0 come out as rounding errors, whose roots are 1e-8.
        let apart = distance(&few, &many) - distance(&without(&many), &without(&few));
        assert!(distance(&few, &many) > 10.0 && apart.abs() < 1e-6, "{apart}");
        let error = a.frechet_distance(&gaussian(&[0.], &[1.]), "FID").unwrap_err().to_string();
        assert!(error.contains("FID: features of 2 and 1 values"), "{error}");
    }

    #[test]
    fn moments_of_batches_are_those_of_the_whole() {
        // Far from the origin, where Σ x² − n·mean² would lose all digits.
        let rows = Tensor::from_slice(&[1., 2., 3., 5., 8., 13., 21., 34., 55., 89., 144., 233.]).view([6, 2]) + 1e8;
        let mut moments = Moments::new(2);
        for (first, count) in [(0, 1), (1, 3), (4, 0), (4, 2)] {
            moments.add(&rows.narrow(0, first, count)).unwrap();
        }
        assert_eq!(moments.count(), 6);
        let found = moments.finish("FID").unwrap();
        let covariance = (rows.tr()).cov(1, None::<&Tensor>, None::<&Tensor>);
        assert!(found.mean.allclose(&rows.mean_dim([0i64].as_slice(), false, Kind::Double), 1e-15, 0.0, false));
        assert!(found.covariance.allclose(&covariance, 1e-9, 0.0, false), "{:?}", found.covariance);
    }

    #[test]
    fn too_few_or_broken_features_are_refused() {
        let mut one = Moments::new(2);
        one.add(&Tensor::from_slice(&[1.0f32, 2.0]).view([1, 2])).unwrap();
        assert!(one.finish("FID").unwrap_err().to_string().contains("1 images, expected at least 2"));
        let mut broken = Moments::new(1);
        broken.add(&Tensor::from_slice(&[1.0, f64::NAN]).view([2, 1])).unwrap();
        assert!(broken.finish("sFID").unwrap_err().to_string().contains("not finite"));
    }
}
