//! Parameters that training leaves alone.

use super::derived::{Derived, SharedSegment};
use super::patterns::{ParamPatterns, PatternError};
use super::{Flow, Model, ParamSpec, Probe, Segment, Weights};
use std::sync::Arc;

/// `model` with the parameters that `patterns` (of `train.freeze`) match frozen: they stay in checkpoints and averages,
/// but have no gradient, no moments and no weight decay.
///
/// # Errors
/// Lists every pattern that matches no parameter.
pub fn freeze(model: Arc<dyn Model>, patterns: &[String]) -> Result<Arc<dyn Model>, PatternError> {
    if patterns.is_empty() {
        return Ok(model);
    }
    let patterns = ParamPatterns::new("train.freeze", patterns, &*model)?;
    let wrap = |segment| Box::new(Frozen { segment, patterns: patterns.clone() }) as Box<dyn Segment>;
    Ok(Arc::new(Derived::new(model, wrap)))
}

struct Frozen {
    segment: SharedSegment,
    patterns: ParamPatterns,
}

impl Segment for Frozen {
    fn prefix(&self) -> &str {
        self.segment.prefix()
    }

    fn params(&self) -> Vec<ParamSpec> {
        let mut params = self.segment.params();
        for spec in &mut params {
            spec.trainable &= !self.patterns.matches(&format!("{}{}", self.prefix(), spec.name));
        }
        params
    }

    fn forward(&self, weights: &Weights, input: &Flow, probe: Probe) -> Flow {
        self.segment.forward(weights, input, probe)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::model::testing::tiny_dit;

    #[test]
    fn what_the_patterns_match_is_not_trainable_and_nothing_else_changes() {
        let base: Arc<dyn Model> = Arc::new(tiny_dit());
        let frozen = freeze(base.clone(), &["blocks.0.*".to_owned(), "*.bias".to_owned()]).unwrap();
        for ((name, spec), (base_name, base_spec)) in frozen.named_params().iter().zip(base.named_params()) {
            assert_eq!((name, &spec.shape), (&base_name, &base_spec.shape));
            let matched = name.starts_with("blocks.0.") || name.ends_with(".bias");
            assert_eq!(spec.trainable, base_spec.trainable && !matched, "{name}");
        }
        let error = freeze(base, &["block.0.*".to_owned()]).map(|_| ()).unwrap_err().to_string();
        assert!(error.contains("`train.freeze`: \"block.0.*\"") && error.contains("`blocks.0."), "{error}");
    }
}
