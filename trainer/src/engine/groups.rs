//! Parameter groups: settings of the update that differ from parameter to parameter.

use crate::model::Model;
use crate::model::patterns::{ParamPatterns, PatternError};
use std::collections::HashMap;

/// How the parameters of one group are updated.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Group {
    /// Decoupled weight decay.
    pub weight_decay: f64,
    /// Multiplies the learning rate.
    pub lr_scale: f64,
}

/// Which parameter is in which group.
#[derive(Clone, Debug)]
pub struct ParamGroups {
    /// The default group first.
    groups: Vec<Group>,
    /// Of parameters that are not in the default group.
    of_param: HashMap<String, usize>,
}

impl ParamGroups {
    /// Every parameter in one group.
    pub fn uniform(weight_decay: f64) -> Self {
        Self { groups: vec![Group { weight_decay, lr_scale: 1.0 }], of_param: HashMap::new() }
    }

    /// The groups that `optimizer.groups` declares for `model`; the first that matches a parameter has it, and what none
    /// matches is updated with `weight_decay` and the whole learning rate.
    ///
    /// # Errors
    /// [`PatternError`] for the first group with a pattern that is malformed or matches no parameter.
    pub fn of_config(
        declared: &[configs::ParamGroup],
        weight_decay: f64,
        model: &dyn Model,
    ) -> Result<Self, PatternError> {
        let mut result = Self::uniform(weight_decay);
        for (index, group) in declared.iter().enumerate() {
            let key = format!("optimizer.groups[{index}].match");
            let patterns = ParamPatterns::new(&key, &group.patterns, model)?;
            let number = result.groups.len();
            for (name, _) in model.named_params().into_iter().filter(|(name, _)| patterns.matches(name)) {
                result.of_param.entry(name).or_insert(number);
            }
            result.groups.push(Group {
                weight_decay: group.weight_decay.unwrap_or(weight_decay),
                lr_scale: group.lr_scale.unwrap_or(1.0),
            });
        }
        Ok(result)
    }

    /// All groups; [`ParamGroups::of`] gives indices into them.
    pub fn groups(&self) -> &[Group] {
        &self.groups
    }

    /// The group of a parameter, by its full name.
    pub fn of(&self, name: &str) -> usize {
        self.of_param.get(name).copied().unwrap_or(0)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::model::testing::tiny_dit;

    fn group(pattern: &str, weight_decay: Option<f64>, lr_scale: Option<f64>) -> configs::ParamGroup {
        configs::ParamGroup { patterns: vec![pattern.to_owned()], weight_decay, lr_scale }
    }

    #[test]
    fn the_first_group_that_matches_has_the_parameter() {
        let declared = [group("*.bias", Some(0.0), None), group("blocks.0.*", None, Some(0.5))];
        let groups = ParamGroups::of_config(&declared, 0.1, &tiny_dit()).unwrap();
        let settings = |name: &str| {
            let Group { weight_decay, lr_scale } = groups.groups()[groups.of(name)];
            (weight_decay, lr_scale)
        };
        assert_eq!(settings("blocks.0.attn.qkv.bias"), (0.0, 1.0));
        assert_eq!(settings("blocks.0.attn.qkv.weight"), (0.1, 0.5));
        assert_eq!(settings("blocks.1.attn.qkv.weight"), (0.1, 1.0));
    }

    #[test]
    fn a_pattern_that_matches_nothing_is_named_with_its_group() {
        let declared = [group("*.bias", None, None), group("block.0.*", None, None)];
        let error = ParamGroups::of_config(&declared, 0.1, &tiny_dit()).unwrap_err().to_string();
        assert!(
            error.contains("`optimizer.groups[1].match`: \"block.0.*\"") && error.contains("`blocks.0."),
            "{error}"
        );
    }
}
