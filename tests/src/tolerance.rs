//! How far a tensor may be from its reference: the forms in which bundles write it, and which one is for which tensor.

use crate::bundle::Spec;

/// A bound on |difference|: a sum of terms over the reference `ref`.
#[derive(Clone, Copy, Debug, Default, PartialEq)]
pub struct Bound {
    /// By itself.
    pub constant: f64,
    /// Times max|ref| of the tensor.
    pub of_max: f64,
    /// Times max(1, max|ref|).
    pub of_floored_max: f64,
    /// Times |ref| of the element.
    pub of_element: f64,
    /// Times max(1, |ref|) of the element.
    pub of_floored_element: f64,
}

impl Bound {
    /// The bound for an element whose reference is `element` in a tensor whose largest |ref| is `max`.
    pub fn at(&self, max: f64, element: f64) -> f64 {
        let element = element.abs();
        self.constant
            + self.of_max * max
            + self.of_floored_max * max.max(1.0)
            + self.of_element * element
            + self.of_floored_element * element.max(1.0)
    }

    /// Parses a sum such as `1e-6 + 1e-4*max|ref|`, written without spaces.
    fn parse(text: &str, lr: Option<f64>) -> Option<Self> {
        let mut bound = Self::default();
        for term in text.split('+') {
            let (number, factor) = term.split_once('*').unwrap_or((term, ""));
            let number: f64 = number.parse().ok().filter(|n: &f64| n.is_finite() && *n >= 0.0)?;
            match factor {
                "" => bound.constant += number,
                "lr" => bound.constant += number * lr?,
                "max|ref|" => bound.of_max += number,
                "max(1,max|ref|)" => bound.of_floored_max += number,
                "|ref|" => bound.of_element += number,
                "max(1,|ref|)" => bound.of_floored_element += number,
                _ => return None,
            }
        }
        Some(bound)
    }
}

/// What a difference may be: a bound on every element, and perhaps one on the 99.9th percentile over a whole group of
/// tensors. Integers are always compared exactly.
#[derive(Clone, Copy, Debug, Default, PartialEq)]
pub struct Tolerance {
    /// For every element.
    pub max: Bound,
    /// For the 99.9th percentile of all elements of the group.
    pub p999: Option<Bound>,
}

impl Tolerance {
    /// An absolute bound.
    pub fn absolute(constant: f64) -> Self {
        Self { max: Bound { constant, ..Bound::default() }, p999: None }
    }

    /// Parses what bundles write: `2e-5 * max(1,max|ref|)`, `rel 2e-5`, `max 1e-6+0.05*lr, p99.9 <= 4e-7`,
    /// `per tensor max|d| <= 1e-6 + 1e-4*max|ref|`, `rel 1e-12 (float64) ; timestep_map exact`, … `None` when it is of
    /// another form.
    pub fn parse(text: &str, lr: Option<f64>) -> Option<Self> {
        let text = without_comments(text).replace(" and ", ";");
        let text: String = text.chars().filter(|c| !c.is_whitespace()).collect::<String>().replace(",p99.9", ";p99.9");
        let (mut max, mut p999) = (None, None);
        for clause in text.split(';').filter(|clause| !clause.is_empty() && !clause.ends_with("exact")) {
            let percentile =
                ["p99.9<=", "99.9thpercentileoverallelements<="].iter().find_map(|p| clause.strip_prefix(p));
            let (slot, bound) = match percentile {
                Some(bound) => (&mut p999, Bound::parse(bound, lr)?),
                None => (&mut max, parse_max(clause, lr)?),
            };
            if slot.replace(bound).is_some() {
                return None;
            }
        }
        Some(Self { max: max?, p999 })
    }
}

fn parse_max(clause: &str, lr: Option<f64>) -> Option<Bound> {
    let clause = clause.strip_prefix("pertensor").unwrap_or(clause);
    if let Some(relative) = clause.strip_prefix("rel") {
        let Bound { constant, .. } = Bound::parse(relative, None)?;
        return Some(Bound { of_element: constant, ..Bound::default() });
    }
    let clause = clause.strip_suffix("abs").unwrap_or(clause);
    let clause = clause.strip_prefix("max|d|<=").unwrap_or(clause);
    // "max 1e-6+…" says that the bound is for the maximum; "max|ref|" and "max(…)" only follow a factor.
    Bound::parse(clause.strip_prefix("max").unwrap_or(clause), lr)
}

/// Drops remarks in parentheses; those of `max(…)` stay.
fn without_comments(text: &str) -> String {
    let mut kept = String::new();
    let mut depth = 0;
    for c in text.chars() {
        match c {
            '(' if depth > 0 || !kept.ends_with("max") => depth += 1,
            ')' if depth > 0 => depth -= 1,
            _ if depth > 0 => {}
            _ => kept.push(c),
        }
    }
    kept
}

/// The tolerances of one bundle: those that its specification states, and behind them the documented ones of its kind.
pub struct Tolerances {
    stated: Vec<(String, Option<Tolerance>)>,
    of_kind: Vec<(String, Option<Tolerance>)>,
}

impl Tolerances {
    /// From the `tol.…` keys of `spec` and the kind's own (pattern, text) pairs.
    pub fn new(spec: &Spec, of_kind: &[(&str, &str)]) -> Self {
        let lr: Option<f64> = spec.text("lr").and_then(|lr| lr.parse().ok());
        let stated = spec.0.keys().filter_map(|key| Some((key.strip_prefix("tol.")?, spec.text(key)?)));
        let entries = |(patterns, text): (&str, &str)| {
            let tolerance = Tolerance::parse(text, lr);
            alternatives(patterns).into_iter().map(|pattern| (pattern, tolerance)).collect::<Vec<_>>()
        };
        Self {
            stated: stated.flat_map(|(patterns, text)| entries((patterns, &text))).collect(),
            of_kind: of_kind.iter().flat_map(|&pair| entries(pair)).collect(),
        }
    }

    /// The tolerance of the tensor called `name`: the most specific stated one, else (also when its text is of an
    /// unknown form) the kind's.
    pub fn of(&self, name: &str) -> Option<Tolerance> {
        let best = |entries: &[(String, Option<Tolerance>)]| {
            let matching = entries.iter().filter(|(pattern, _)| matches(pattern, name));
            matching.max_by_key(|(pattern, _)| pattern.len()).and_then(|(_, tolerance)| *tolerance)
        };
        best(&self.stated).or_else(|| best(&self.of_kind))
    }
}

/// `out/loss,mse` names `out/loss` and `out/mse`.
fn alternatives(patterns: &str) -> Vec<String> {
    let folder = patterns.split(',').next().and_then(|first| first.rfind('/').map(|at| &first[..=at])).unwrap_or("");
    let complete = |pattern: &str| match pattern.contains('/') {
        true => pattern.to_owned(),
        false => format!("{folder}{pattern}"),
    };
    patterns.split(',').map(|pattern| complete(pattern.trim())).collect()
}

/// Whether a pattern is for a tensor: with `*` it is a glob; `out/loss` is for that tensor and for `out/VARIANT/loss`;
/// `grad` is for all below `grad/`.
fn matches(pattern: &str, name: &str) -> bool {
    if let Some((start, end)) = pattern.split_once('*') {
        return name.len() >= start.len() + end.len() && name.starts_with(start) && name.ends_with(end);
    }
    match pattern.rsplit_once('/') {
        None => name == pattern || name.strip_prefix(pattern).is_some_and(|rest| rest.starts_with('/')),
        Some((folder, last)) => {
            let rest = name.strip_prefix(folder).and_then(|rest| rest.strip_prefix('/'));
            rest.is_some_and(|rest| rest == last || rest.strip_suffix(last).is_some_and(|middle| middle.ends_with('/')))
        }
    }
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]
    use super::*;
    use serde_json::json;

    #[test]
    fn every_form_that_bundles_use_is_understood() {
        let at = |text: &str, max: f64, element: f64| Tolerance::parse(text, Some(1e-3)).unwrap().max.at(max, element);
        let close =
            |found: f64, expected: f64| assert!((found - expected).abs() < 1e-12 * expected, "{found} {expected}");
        close(at("2e-5 * max(1,max|ref|)", 0.5, 0.1), 2e-5);
        close(at("2e-5*max(1,max|ref|)", 3.0, 0.1), 6e-5);
        close(at("1.5e-4 abs (float32 exp/cos of arguments up to 999)", 9.0, 9.0), 1.5e-4);
        close(at("1e-6", 9.0, 9.0), 1e-6);
        close(at("rel 2e-5 ", 9.0, 0.5), 1e-5);
        close(at("rel 1e-12 (float64) ; timestep_map exact", 9.0, 2.0), 2e-12);
        close(at("per tensor max|d| <= 1e-6 + 1e-4*max|ref|", 2.0, 0.0), 2.01e-4);
        close(at("1e-10+2e-4*max|ref|", 1.0, 0.0), 2.000001e-4);
        close(at("5e-5 * max(1,|ref|)", 100.0, 3.0), 1.5e-4);
        close(at("max 1e-6 (weak: see emazero)", 1.0, 1.0), 1e-6);
        let ema = Tolerance::parse("max 1e-6+0.05*lr, p99.9 <= 4e-7", Some(1e-3)).unwrap();
        close(ema.max.at(0.0, 0.0), 5.1e-5);
        close(ema.p999.unwrap().at(0.0, 0.0), 4e-7);
        let text = "max|d| <= 0.5*lr and 99.9th percentile over all elements <= 2e-7 + 0.002*lr";
        let last = Tolerance::parse(text, Some(1e-3)).unwrap();
        close(last.max.at(0.0, 0.0), 5e-4);
        close(last.p999.unwrap().at(0.0, 0.0), 2.2e-6);
    }

    #[test]
    fn what_is_not_understood_is_not_guessed() {
        for text in ["", "tight", "2e-5 * mean|ref|", "2e-5*max(1,max|ref|); dopri5 2e-2", "-1e-3", "nan", "p99.9 <= 1"]
        {
            assert_eq!(Tolerance::parse(text, Some(1e-3)), None, "{text}");
        }
        assert_eq!(Tolerance::parse("0.5*lr", None), None);
    }

    #[test]
    fn the_most_specific_pattern_wins_and_the_kind_steps_in() {
        let spec = json!({"lr": "1e-4", "tol.out/*": "1", "tol.out/loss,mse": "2", "tol.out/t_freq*": "3",
            "tol.ema0.99": "4", "tol.final": "in words", "tol.note": "EXCLUDE"});
        let serde_json::Value::Object(map) = spec else { panic!() };
        let tolerances = Tolerances::new(&Spec(map), &[("final", "0.5*lr"), ("out/loss", "9"), ("grad", "5")]);
        let of = |name: &str| tolerances.of(name).map(|tolerance| tolerance.max.constant);
        assert_eq!(of("out/block0"), Some(1.0));
        assert_eq!(of("out/mse"), Some(2.0));
        assert_eq!(of("out/zero_model/loss"), Some(2.0));
        assert_eq!(of("out/loss_per_sample"), Some(1.0));
        assert_eq!(of("out/t_freq_dim7"), Some(3.0));
        assert_eq!(of("ema0.99/pos_embed"), Some(4.0));
        assert_eq!(of("ema0.9999/pos_embed"), None);
        assert_eq!(of("final/pos_embed"), Some(5e-5));
        assert_eq!(of("grad/x_embedder.proj.bias"), Some(5.0));
        assert_eq!(of("grad_vb/x_embedder.proj.bias"), None);
    }
}
