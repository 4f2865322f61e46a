//! Glob patterns over parameter names (`*.bias`, `blocks.?.attn.*`): how config keys name sets of parameters.

use super::Model;
use glob::Pattern;

/// Patterns of one config key.
#[derive(Clone, Debug)]
pub struct ParamPatterns(Vec<Pattern>);

/// Patterns that cannot be meant as they are written.
#[derive(Debug, thiserror::Error)]
#[error("{}", .0.join("; "))]
pub struct PatternError(Vec<String>);

impl ParamPatterns {
    /// Takes the patterns of config key `key`, each of which must match at least one parameter of `model`, frozen ones
    /// included. `*` stands for any characters, dots too, `?` for one, `[ab]` for one of these.
    ///
    /// # Errors
    /// Lists every pattern that is malformed or matches nothing, with the names that come nearest.
    pub fn new(key: &str, patterns: &[String], model: &dyn Model) -> Result<Self, PatternError> {
        let names: Vec<String> = model.named_params().into_iter().map(|(name, _)| name).collect();
        let (mut good, mut problems) = (Vec::with_capacity(patterns.len()), Vec::new());
        for text in patterns {
            match Pattern::new(text) {
                Err(error) => problems.push(format!("`{key}`: \"{text}\" is not a pattern: {}", error.msg)),
                Ok(pattern) if names.iter().any(|name| pattern.matches(name)) => good.push(pattern),
                Ok(_) => {
                    let near = nearest(text, &names).join(", ");
                    problems
                        .push(format!("`{key}`: \"{text}\" matches no parameter of this model; near it are {near}"));
                }
            }
        }
        if problems.is_empty() { Ok(Self(good)) } else { Err(PatternError(problems)) }
    }

    /// Whether any of the patterns matches a parameter's full name.
    pub fn matches(&self, name: &str) -> bool {
        self.0.iter().any(|pattern| pattern.matches(name))
    }
}

/// The three names most like a pattern; a `*` at its start may stand for any leading parts of a name.
fn nearest(pattern: &str, names: &[String]) -> Vec<String> {
    let text = pattern.replace(['*', '?'], "");
    let likeness = |name: &str| {
        let starts = std::iter::once(0).chain(name.match_indices('.').map(|(dot, _)| dot));
        let starts: Vec<usize> = if pattern.starts_with('*') { starts.collect() } else { vec![0] };
        starts.into_iter().map(|start| strsim::jaro_winkler(&text, &name[start..])).fold(0.0, f64::max)
    };
    let mut scored: Vec<(f64, &String)> = names.iter().map(|name| (likeness(name), name)).collect();
    scored.sort_by(|a, b| b.0.total_cmp(&a.0));
    scored.into_iter().take(3).map(|(_, name)| format!("`{name}`")).collect()
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::model::testing::tiny_dit;

    fn patterns(patterns: &[&str]) -> Result<ParamPatterns, PatternError> {
        let patterns: Vec<String> = patterns.iter().map(|text| text.to_string()).collect();
        ParamPatterns::new("some.key", &patterns, &tiny_dit())
    }

    #[test]
    fn a_star_crosses_dots_and_a_question_mark_is_one_character() {
        let found = patterns(&["*.bias", "blocks.?.attn.*"]).unwrap();
        assert!(found.matches("x_embedder.proj.bias") && found.matches("blocks.1.attn.qkv.weight"));
        assert!(!found.matches("x_embedder.proj.weight") && !found.matches("blocks.1.mlp.fc1.weight"));
    }

    #[test]
    fn patterns_that_match_nothing_are_all_named_with_near_names() {
        let problems = patterns(&["*.bais", "*.bias", "y_embeder.*", "a["]).unwrap_err().0;
        let [bais, embedder, malformed] = &problems[..] else { panic!("{problems:?}") };
        assert!(bais.contains("`some.key`: \"*.bais\"") && bais.contains(".bias`"), "{bais}");
        assert!(embedder.contains("`y_embedder.embedding_table.weight`"), "{embedder}");
        assert!(malformed.contains("\"a[\" is not a pattern"), "{malformed}");
    }
}
