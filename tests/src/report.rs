//! What came out, held against what was recorded: one line a group of tensors.

use crate::bundle::{Bundle, values};
use crate::tolerance::{Bound, Tolerance, Tolerances};
use std::fmt::Write;
use tch::{Kind, Tensor};

/// Tensors of a group that are named one by one when they fail.
const NAMED_FAILURES: usize = 10;

/// What a purely relative tolerance leaves to a float32 reference near zero: sums of terms around 10 (a KL divergence)
/// carry that much rounding, however small they are.
const FLOAT32_NOISE: f64 = 1e-6;

/// Collects the comparisons of one bundle.
pub struct Report<'a> {
    references: &'a Bundle,
    tolerances: Tolerances,
    groups: Vec<Group>,
    problems: Vec<String>,
}

/// Tensors that share a line.
struct Group {
    name: String,
    tensors: usize,
    worst: Worst,
    failed: Vec<String>,
    /// Differences of all elements, kept when a percentile of them is bounded.
    differences: Vec<f64>,
    p999: Option<Bound>,
    largest_reference: f64,
}

/// The element with the largest error over tolerance.
#[derive(Clone, Debug, Default)]
struct Worst {
    error: f64,
    tolerance: f64,
    ratio: f64,
}

/// The lines of a report and how it ended.
pub struct Findings {
    /// One line a group, and one for everything that failed.
    pub lines: Vec<String>,
    /// Nothing failed.
    pub ok: bool,
    /// The largest error over its tolerance.
    pub worst_ratio: f64,
}

impl<'a> Report<'a> {
    /// A report on the recorded outputs in `references`.
    pub fn new(references: &'a Bundle, tolerances: Tolerances) -> Self {
        Self { references, tolerances, groups: Vec::new(), problems: Vec::new() }
    }

    /// Holds `found` against the tensor called `name`, on a line of its own.
    pub fn compare(&mut self, name: &str, found: &Tensor) {
        self.compare_in(name, name, found);
    }

    /// Holds `found` against the tensor called `name`, on the line of `group`.
    pub fn compare_in(&mut self, group: &str, name: &str, found: &Tensor) {
        if let Some((expected, tolerance)) = self.reference(name, &found.size()) {
            self.within(group, name, found, &expected, tolerance);
        }
    }

    /// The recorded tensor called `name` with its tolerance; it counts as compared. `None` (noted as a failure) when it is
    /// missing or not of that shape.
    pub fn reference(&mut self, name: &str, shape: &[i64]) -> Option<(Tensor, Tolerance)> {
        let expected = match self.references.tensor(name) {
            Ok(expected) => expected.shallow_clone(),
            Err(error) => {
                self.problem(error.to_string());
                return None;
            }
        };
        if expected.size() != shape {
            self.problem(format!("`{name}`: recorded with shape {:?}, computed with {shape:?}", expected.size()));
            return None;
        }
        if !expected.is_floating_point() {
            return Some((expected, Tolerance::default()));
        }
        let Some(mut tolerance) = self.tolerances.of(name) else {
            self.problem(format!("`{name}`: no tolerance is known for it; state one as `tol.{name}` in the spec"));
            return None;
        };
        if tolerance.max.of_element > 0.0 && expected.kind() != Kind::Double {
            tolerance.max.constant += FLOAT32_NOISE;
        }
        Some((expected, tolerance))
    }

    /// Notes on the line of `group` how far `found` is from `expected` (of the same shape); `label` names it in a failure.
    pub fn within(&mut self, group: &str, label: &str, found: &Tensor, expected: &Tensor, tolerance: Tolerance) {
        let (found, expected) = (values(found), values(expected));
        let largest = expected.iter().fold(0.0f64, |largest, value| largest.max(value.abs()));
        let mut worst = Worst::default();
        let mut differences = Vec::with_capacity(found.len());
        let mut at = 0;
        for (index, (found, expected)) in found.iter().zip(&expected).enumerate() {
            let difference = (found - expected).abs();
            let bound = tolerance.max.at(largest, *expected);
            let ratio = ratio(difference, bound);
            if index == 0 || ratio > worst.ratio {
                worst = Worst { error: difference, tolerance: bound, ratio };
                at = index;
            }
            differences.push(difference);
        }
        let position = self.groups.iter().position(|other| other.name == group).unwrap_or_else(|| {
            self.groups.push(Group::new(group));
            self.groups.len() - 1
        });
        let group = &mut self.groups[position];
        group.tensors += 1;
        group.largest_reference = group.largest_reference.max(largest);
        if let Some(bound) = tolerance.p999 {
            group.p999 = Some(bound);
            group.differences.append(&mut differences);
        }
        if worst.ratio > 1.0 {
            let Worst { error, tolerance, .. } = worst;
            let (found, expected) = (found[at], expected[at]);
            group.failed.push(format!(
                "`{label}` element {at}: computed {found:.9e}, recorded {expected:.9e}, error {error:.2e} > {tolerance:.2e}"
            ));
        }
        if group.tensors == 1 || worst.ratio > group.worst.ratio {
            group.worst = worst;
        }
    }

    /// Notes something that is wrong with the bundle or the run.
    pub fn problem(&mut self, text: String) {
        self.problems.push(text);
    }

    /// Ends the report. Tensors of `bundle` that were neither used nor compared are failures; `cut_short` says why the
    /// run did not come to its end.
    pub fn finish(mut self, bundle: &Bundle, cut_short: Option<String>) -> Findings {
        let unused = bundle.unused();
        match cut_short {
            Some(reason) => self.problem(format!("{reason} ({} tensors were not looked at)", unused.len())),
            None => unused.iter().for_each(|name| {
                self.problem(format!("`{name}` was compared with nothing: this kind of bundle has no such tensor"));
            }),
        }
        if self.groups.is_empty() && self.problems.is_empty() {
            self.problem("there is nothing to compare in it".to_owned());
        }
        let mut findings = Findings { lines: Vec::new(), ok: true, worst_ratio: 0.0 };
        for group in &self.groups {
            findings.line(&group.name, group.tensors, &group.worst);
            for failed in group.failed.iter().take(NAMED_FAILURES) {
                findings.failure(failed);
            }
            if group.failed.len() > NAMED_FAILURES {
                findings.failure(&format!(
                    "{} further tensors of `{}`",
                    group.failed.len() - NAMED_FAILURES,
                    group.name
                ));
            }
            if let Some(bound) = group.p999 {
                let error = percentile_999(group.differences.clone());
                let tolerance = bound.at(group.largest_reference, 0.0);
                let ratio = ratio(error, tolerance);
                findings.line(&format!("{} p99.9", group.name), group.tensors, &Worst { error, tolerance, ratio });
            }
        }
        for problem in &self.problems {
            findings.failure(problem);
        }
        findings
    }
}

impl Group {
    fn new(name: &str) -> Self {
        Self {
            name: name.to_owned(),
            tensors: 0,
            worst: Worst::default(),
            failed: Vec::new(),
            differences: Vec::new(),
            p999: None,
            largest_reference: 0.0,
        }
    }
}

impl Findings {
    fn line(&mut self, name: &str, tensors: usize, worst: &Worst) {
        let Worst { error, tolerance, ratio } = *worst;
        let verdict = if ratio <= 1.0 { "ok" } else { "FAIL" };
        let mut line = format!("  {name:<44} error {error:>8.2e}  tolerance {tolerance:>8.2e}  {verdict}");
        if tensors > 1 {
            let _ = write!(line, "  ({tensors} tensors)");
        }
        self.lines.push(line);
        self.ok &= ratio <= 1.0;
        self.worst_ratio = self.worst_ratio.max(ratio);
    }

    /// Adds a failure, on one line.
    pub fn failure(&mut self, text: &str) {
        let text: Vec<&str> = text.lines().map(str::trim).collect();
        self.lines.push(format!("  FAIL {}", text.join(" ")));
        self.ok = false;
    }
}

/// Error over tolerance; infinite where a difference has no room or is not a number.
fn ratio(error: f64, tolerance: f64) -> f64 {
    match error <= tolerance {
        true if error == 0.0 => 0.0,
        true => error / tolerance,
        false if error > tolerance && tolerance > 0.0 => error / tolerance,
        false => f64::INFINITY,
    }
}

/// With linear interpolation, as numpy and torch have it.
fn percentile_999(mut values: Vec<f64>) -> f64 {
    values.sort_by(f64::total_cmp);
    let position = 0.999 * values.len().saturating_sub(1) as f64;
    let (low, share) = (position.floor() as usize, position.fract());
    match values.get(low..) {
        Some([value, next, ..]) => value + (next - value) * share,
        Some([value]) => *value,
        _ => 0.0,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn nothing_that_is_not_a_number_passes() {
        assert_eq!(ratio(f64::NAN, 1.0), f64::INFINITY);
        assert_eq!(ratio(0.0, f64::NAN), f64::INFINITY);
        assert_eq!(ratio(1e-9, 0.0), f64::INFINITY);
        assert_eq!(ratio(0.0, 0.0), 0.0);
        assert_eq!(ratio(3.0, 2.0), 1.5);
    }

    #[test]
    fn percentiles_interpolate() {
        assert_eq!(percentile_999((0..=1000).map(f64::from).collect()), 999.0);
        assert_eq!(percentile_999(vec![0.0, 1.0]), 0.999);
        assert!(percentile_999(vec![f64::NAN; 3]).is_nan());
    }
}
