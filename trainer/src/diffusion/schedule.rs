/// How noise grows over the original timesteps of a Gaussian diffusion.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Schedule {
    /// β in equal steps (Ho et al. 2020).
    Linear,
    /// ᾱ_t = f(t)/f(0), f(t) = cos²((t/T + 0.008)/1.008·π/2), β at most 0.999 (Nichol & Dhariwal 2021, equation 17;
    /// `squaredcos_cap_v2` in the official code).
    SquaredCosine,
    /// √β in equal steps (Rombach et al. 2022; `scaled_linear` in diffusers).
    ScaledLinear,
}

/// Where squared cosine stops: the last β would be 1.
const MAX_COSINE_BETA: f64 = 0.999;

impl Schedule {
    /// First and last β that are usual: for [`Schedule::Linear`] 0.1/T and 20/T (1e-4 and 0.02 at T = 1000), for
    /// [`Schedule::ScaledLinear`] 0.00085 and 0.012 at any T; squared cosine has none to choose.
    fn usual_ends(self, timesteps: usize) -> (f64, f64) {
        let scale = 1000.0 / timesteps as f64;
        match self {
            Schedule::Linear => (scale * 1e-4, scale * 0.02),
            Schedule::ScaledLinear | Schedule::SquaredCosine => (0.00085, 0.012),
        }
    }

    /// The usual β of every one of `timesteps` original timesteps.
    pub fn betas(self, timesteps: usize) -> Vec<f64> {
        self.betas_between(self.usual_ends(timesteps), timesteps)
    }

    /// β of every one of `timesteps` original timesteps, from `start` to `end`, which squared cosine does not heed.
    pub fn betas_between(self, (start, end): (f64, f64), timesteps: usize) -> Vec<f64> {
        match self {
            Schedule::Linear => equal_steps(start, end, timesteps),
            Schedule::ScaledLinear => {
                equal_steps(start.sqrt(), end.sqrt(), timesteps).into_iter().map(|root| root * root).collect()
            }
            Schedule::SquaredCosine => {
                let level = |i: usize| {
                    let cos = ((i as f64 / timesteps as f64 + 0.008) / 1.008 * std::f64::consts::PI / 2.0).cos();
                    cos * cos
                };
                (0..timesteps).map(|i| (1.0 - level(i + 1) / level(i)).min(MAX_COSINE_BETA)).collect()
            }
        }
    }
}

/// `count` numbers from `start` to `end`, rounded as numpy's linspace does.
fn equal_steps(start: f64, end: f64, count: usize) -> Vec<f64> {
    let step = (end - start) / (count.max(2) - 1) as f64;
    (0..count).map(|i| if i + 1 == count { end } else { i as f64 * step + start }).collect()
}

/// β of the same schedule with √ᾱ shifted and scaled so that it is 0 at the last timestep and as before at the first: the
/// model learns to begin from pure noise, as sampling does. The last β becomes 1.
///
/// # Source
/// Lin et al. 2024, algorithm 1.
pub fn zero_terminal_snr(betas: &[f64]) -> Vec<f64> {
    let products = betas.iter().scan(1.0, |product, beta| {
        *product *= 1.0 - beta;
        Some(*product)
    });
    let roots: Vec<f64> = products.map(f64::sqrt).collect();
    let (Some(&first), Some(&last)) = (roots.first(), roots.last()) else { return Vec::new() };
    let mut before = 1.0;
    let rescaled = roots.iter().map(|root| {
        let level = ((root - last) * (first / (first - last))).powi(2);
        let beta = 1.0 - level / before;
        before = level;
        beta
    });
    rescaled.collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Expected: β at 0, 500, 999 and √ᾱ at 0, 500, 998, 999 of 1000, computed with numpy in float64.
    fn check(betas: &[f64], expected_betas: [f64; 3], expected_roots: [f64; 4]) {
        let roots: Vec<f64> = betas
            .iter()
            .scan(1.0, |product, beta| {
                *product *= 1.0 - beta;
                Some(f64::sqrt(*product))
            })
            .collect();
        let close = |found: f64, expected: f64| {
            assert!((found - expected).abs() <= 1e-11 * expected, "{found:e}, expected {expected:e}");
        };
        [0, 500, 999].into_iter().zip(expected_betas).for_each(|(i, expected)| close(betas[i], expected));
        [0, 500, 998, 999].into_iter().zip(expected_roots).for_each(|(i, expected)| close(roots[i], expected));
    }

    #[test]
    fn schedules_have_the_values_of_their_formulas() {
        // numpy.linspace(1e-4, 0.02, 1000)
        let linear = Schedule::Linear.betas(1000);
        check(
            &linear,
            [1e-4, 1.005995995995996e-2, 2e-2],
            [9.999499987499375e-1, 2.789205233843933e-1, 6.417315356236161e-3, 6.352818087570016e-3],
        );
        // numpy.linspace(0.00085**0.5, 0.012**0.5, 1000)**2
        let scaled = Schedule::ScaledLinear.betas(1000);
        check(
            &scaled,
            [8.5e-4, 4.81495414171188e-3, 1.2e-2],
            [9.995749096490968e-1, 5.256735525237831e-1, 6.867822726218076e-2, 6.82649142171675e-2],
        );
        // min(1 - f((i + 1)/1000)/f(i/1000), 0.999), f(t) = cos((t + 0.008)/1.008·pi/2)**2
        check(
            &Schedule::SquaredCosine.betas(1000),
            [4.128422482196914e-5, 3.155691441585007e-3, 0.999],
            [9.999793576745362e-1, 7.016303673935465e-1, 1.558450161870714e-3, 4.928252131369555e-5],
        );
        // r = sqrt(cumprod(1 - betas)); r = (r - r[-1])·r[0]/(r[0] - r[-1]); 1 - r[1:]²/r[:-1]²
        check(
            &zero_terminal_snr(&linear),
            [9.999999999998899e-5, 1.029261742639209e-2, 1.0],
            [9.999499987499375e-1, 2.743104367397032e-1, 6.490964847453783e-5, 0.0],
        );
        check(
            &zero_terminal_snr(&scaled),
            [8.500000000000174e-4, 5.530567784482576e-3, 1.0],
            [9.995749096490968e-1, 4.909366382307556e-1, 4.436088430837794e-4, 0.0],
        );
    }

    #[test]
    fn chosen_ends_are_taken_as_they_are() {
        for schedule in [Schedule::Linear, Schedule::ScaledLinear] {
            let betas = schedule.betas_between((0.001, 0.3), 50);
            assert_eq!(betas.len(), 50);
            assert!((betas[0] - 0.001).abs() < 1e-17 && (betas[49] - 0.3).abs() < 1e-15, "{betas:?}");
            assert!(betas.is_sorted());
        }
        // The usual ends of the linear schedule follow the number of timesteps.
        assert_eq!(Schedule::Linear.betas(500)[499], 0.04);
        assert_eq!(Schedule::ScaledLinear.betas(500)[499], Schedule::ScaledLinear.betas(1000)[999]);
    }
}
