//! Moving averages of the weights: which ones a run keeps, and how much of the old average each update leaves.
//!
//! [`posthoc`] makes averages of other widths out of stored power-function averages.

pub mod posthoc;

use configs::EmaConfig;

pub use configs::validation::EMA_SECTION as MAIN;

const POWER_PREFIX: &str = "ema_power_";

/// One moving average of the weights.
#[derive(Clone, Debug, PartialEq)]
pub struct Average {
    /// Its section in checkpoints, without the slash: `ema`, `ema_0.999`, `ema_power_0.05`.
    pub section: String,
    /// How it forgets.
    pub rule: Rule,
}

/// θ' ← β_k·θ' + (1 − β_k)·θ after update k, which counts from 1.
#[derive(Clone, Copy, Debug, PartialEq)]
pub enum Rule {
    /// β_k = `decay`, with warm-up at most (1 + k) / (10 + k) (as TensorFlow's ExponentialMovingAverage).
    Exponential {
        /// In [0, 1).
        decay: f64,
        /// Whether early updates forget faster.
        warmup: bool,
    },
    /// β_k = (1 − 1/k)^(γ+1): update i has weight i^(γ+1) − (i−1)^(γ+1), whenever one looks (Karras et al. 2024, "Analyzing
    /// and Improving the Training Dynamics of Diffusion Models", section 3.1). The first update forgets the initial weights.
    Power {
        /// γ ≥ 0.
        gamma: f64,
    },
}

impl Average {
    /// The main average with this decay and no warm-up.
    pub fn main(decay: f64) -> Self {
        Self { section: MAIN.to_owned(), rule: Rule::Exponential { decay, warmup: false } }
    }

    /// All that a config asks for, the main one first.
    pub fn of_config(config: &EmaConfig) -> Vec<Self> {
        let exponential = |decay| Rule::Exponential { decay, warmup: config.warmup };
        let further = config.further_decays.iter().map(|&decay| exponential(decay));
        let power = config.power.iter().map(|&sigma_rel| Rule::Power { gamma: gamma_of(sigma_rel) });
        let rules = std::iter::once(exponential(config.decay)).chain(further).chain(power);
        config.sections().into_iter().zip(rules).map(|(section, rule)| Self { section, rule }).collect()
    }
}

impl Rule {
    /// β of update `update`, which counts from 1.
    pub fn decay_at(self, update: u64) -> f64 {
        let k = update as f64;
        match self {
            Rule::Exponential { decay, warmup: false } => decay,
            Rule::Exponential { decay, warmup: true } => decay.min((1.0 + k) / (10.0 + k)),
            Rule::Power { gamma } => (1.0 - 1.0 / k).powf(gamma + 1.0),
        }
    }
}

/// The σ_rel that a section's name tells, if it is that of a power-function average.
pub fn sigma_rel_of_section(section: &str) -> Option<f64> {
    section.strip_prefix(POWER_PREFIX)?.parse().ok().filter(|sigma_rel| (0.0..0.3).contains(sigma_rel))
}

/// The relative width of the power-function profile of exponent γ: its standard deviation over the length of training.
///
/// # Source
/// Karras et al. 2024, appendix C: σ_rel = (γ + 1)^½ (γ + 2)^−1 (γ + 3)^−½.
pub fn sigma_rel_of(gamma: f64) -> f64 {
    (gamma + 1.0).sqrt() / ((gamma + 2.0) * (gamma + 3.0).sqrt())
}

/// The exponent γ ≥ 0 whose profile has relative width `sigma_rel`, above 0 and at most 12^−½ = 0.2887.
pub fn gamma_of(sigma_rel: f64) -> f64 {
    // The width falls strictly from γ = 0 on, and is below 1/γ.
    let (mut low, mut high) = (0.0, 1.0 / sigma_rel);
    loop {
        let middle = 0.5 * (low + high);
        if middle <= low || middle >= high {
            return middle;
        }
        if sigma_rel_of(middle) > sigma_rel { low = middle } else { high = middle }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn gamma_solves_its_equation() {
        // The published pairs: σ_rel 0.05 and 0.10 are γ = 16.97 and 6.94.
        assert!((gamma_of(0.05) - 16.97).abs() < 0.005 && (gamma_of(0.1) - 6.94).abs() < 0.005);
        for sigma_rel in [1e-4, 0.01, 0.08, 0.2, 0.28] {
            assert!((sigma_rel_of(gamma_of(sigma_rel)) / sigma_rel - 1.0).abs() < 1e-12, "{sigma_rel}");
        }
        assert!(gamma_of(12f64.powf(-0.5)) < 1e-6);
    }

    #[test]
    fn the_warm_up_bounds_the_decay() {
        let rule = |warmup| Rule::Exponential { decay: 0.99, warmup };
        assert_eq!(rule(true).decay_at(1), 2.0 / 11.0);
        assert_eq!((rule(true).decay_at(889), rule(true).decay_at(10_000)), (890.0 / 899.0, 0.99));
        assert_eq!(rule(false).decay_at(1), 0.99);
    }

    #[test]
    fn a_power_average_weighs_updates_by_their_power() {
        let gamma = 2.5;
        let rule = Rule::Power { gamma };
        // The average of a weight that is 1 at update 3 alone, and of one that was 1 before the first update.
        let (mut third, mut initial) = (0.0, 1.0);
        for k in 1..=10u64 {
            let beta = rule.decay_at(k);
            third = beta * third + (1.0 - beta) * f64::from(u8::from(k == 3));
            initial *= beta;
        }
        let power = |k: f64| k.powf(gamma + 1.0);
        assert!((third - (power(3.0) - power(2.0)) / power(10.0)).abs() < 1e-15, "{third}");
        assert_eq!(initial, 0.0);
    }

    #[test]
    fn sections_are_named_by_decay_and_width() {
        let config = EmaConfig { decay: 0.9999, further_decays: vec![0.999], warmup: true, power: vec![0.05, 0.1] };
        let averages = Average::of_config(&config);
        let sections: Vec<&str> = averages.iter().map(|average| average.section.as_str()).collect();
        assert_eq!(sections, ["ema", "ema_0.999", "ema_power_0.05", "ema_power_0.1"]);
        assert_eq!(averages[1].rule, Rule::Exponential { decay: 0.999, warmup: true });
        let widths: Vec<Option<f64>> = sections.iter().map(|section| sigma_rel_of_section(section)).collect();
        assert_eq!(widths, [None, None, Some(0.05), Some(0.1)]);
    }
}
