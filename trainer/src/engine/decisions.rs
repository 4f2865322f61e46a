//! The decision log: exceptions that all ranks have agreed on, recorded in every manifest, so that a resume repeats them.

use super::divergence::Counts;
use anyhow::{Context, Result};
use data_loader::BrokenGroup;
use serde::{Deserialize, Serialize};
use serde_json::Value;
use std::sync::Arc;

/// How a row that stands in is drawn; see [`data_loader::Damage`]. A log with another rule cannot be repeated.
const RULE: &str = "keyed draw 19";

/// One exception.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(tag = "kind", rename_all = "snake_case")]
pub enum Decision {
    /// Other rows are read in place of a row group's.
    RowGroupReplaced {
        /// The first step that it made a difference to.
        step: u64,
        /// How the other rows are drawn.
        rule: String,
        /// Which row group, and why.
        #[serde(flatten)]
        group: BrokenGroup,
    },
    /// A step is made without an update.
    StepSkipped {
        /// Which.
        step: u64,
        /// Why.
        reason: String,
    },
    /// Lanes are left out of the mean over lanes.
    LanesLeftOut {
        /// Of which step.
        step: u64,
        /// Which.
        lanes: Vec<usize>,
        /// Why.
        reason: String,
    },
}

/// What was agreed so far, in the order of steps.
#[derive(Clone, Debug, Default)]
pub struct DecisionLog {
    entries: Vec<Decision>,
    /// Most rows of broken row groups; `None`: as many as there are.
    budget_rows: Option<u64>,
}

impl DecisionLog {
    /// The log of a manifest (an array), or an empty one.
    ///
    /// # Errors
    /// Entries that this version does not know or cannot repeat.
    pub fn read(recorded: Option<&Value>, budget_rows: Option<u64>) -> Result<Self> {
        let entries: Vec<Decision> = match recorded {
            Some(entries) => Deserialize::deserialize(entries).context(
                "the checkpoint's decision log cannot be read; it was written by another version of the trainer",
            )?,
            None => Vec::new(),
        };
        for entry in &entries {
            let Decision::RowGroupReplaced { rule, step, .. } = entry else { continue };
            anyhow::ensure!(
                rule == RULE,
                "the checkpoint's decision log (step {step}) replaces rows by \"{rule}\", which this version of the trainer cannot repeat; use the one that wrote it"
            );
        }
        Ok(Self { entries, budget_rows })
    }

    /// The log as manifests record it.
    pub fn to_json(&self) -> Value {
        // Strings and integers always serialise.
        serde_json::to_value(&self.entries).unwrap_or_default()
    }

    /// What an attempt that goes on with decisions of the one before says of itself, for people.
    pub(super) fn as_details(&self) -> Value {
        if self.entries.is_empty() { Value::Null } else { serde_json::json!({ "decided": self.to_json() }) }
    }

    /// The row groups whose rows are replaced.
    pub fn broken(&self) -> impl Iterator<Item = &BrokenGroup> + Clone {
        self.entries.iter().filter_map(|entry| match entry {
            Decision::RowGroupReplaced { group, .. } => Some(group),
            _ => None,
        })
    }

    /// Adds what another log of this run has and this one has not.
    pub(super) fn merge(&mut self, other: &Self) {
        let new: Vec<Decision> = other.entries.iter().filter(|entry| !self.entries.contains(entry)).cloned().collect();
        self.entries.extend(new);
    }

    /// Records that `step` is made without an update.
    pub(super) fn skip(&mut self, step: u64, reason: &str) {
        self.entries.push(Decision::StepSkipped { step, reason: reason.to_owned() });
    }

    /// Records that `lanes` are left out of the mean of `step`.
    pub(super) fn leave_out(&mut self, step: u64, lanes: Vec<usize>, reason: &str) {
        self.entries.push(Decision::LanesLeftOut { step, lanes, reason: reason.to_owned() });
    }

    /// Whether `step` is made without an update.
    pub(super) fn skips(&self, step: u64) -> bool {
        self.entries.iter().any(|entry| matches!(entry, Decision::StepSkipped { step: of, .. } if *of == step))
    }

    /// Whether `lane` counts in the mean of `step`.
    pub(super) fn counts(&self, step: u64, lane: usize) -> Counts {
        let leaves_out = |entry: &Decision| matches!(entry, Decision::LanesLeftOut { step: of, lanes, .. } if *of == step && lanes.contains(&lane));
        Counts(!self.entries.iter().any(leaves_out))
    }

    /// Steps that diverged after step `done`, and how.
    pub(super) fn exceptions_after(&self, done: u64) -> Vec<(u64, &str)> {
        let exceptions = self.entries.iter().filter_map(|entry| match entry {
            Decision::RowGroupReplaced { .. } => None,
            Decision::StepSkipped { step, reason } | Decision::LanesLeftOut { step, reason, .. } => {
                (*step > done).then_some((*step, reason.as_str()))
            }
        });
        exceptions.collect()
    }

    /// Those of `found` that are not in the log.
    pub(super) fn unknown(&self, found: &[Arc<BrokenGroup>]) -> Vec<BrokenGroup> {
        let is_known = |group: &BrokenGroup| self.broken().any(|known| at(known) == at(group));
        let mut unknown: Vec<BrokenGroup> =
            found.iter().filter(|group| !is_known(group)).map(|group| (**group).clone()).collect();
        unknown.sort_by_key(at);
        unknown.dedup_by_key(|group| at(group));
        unknown
    }

    /// Records what the ranks have found at `step`, in an order that does not depend on who found it; gives what is new.
    ///
    /// # Errors
    /// [`data_loader::DataError::TooMuchDamage`].
    pub(super) fn record(
        &mut self,
        step: u64,
        found: impl IntoIterator<Item = BrokenGroup>,
    ) -> Result<Vec<BrokenGroup>, data_loader::DataError> {
        let found: Vec<Arc<BrokenGroup>> = found.into_iter().map(Arc::new).collect();
        let new = self.unknown(&found);
        let entry =
            |group: &BrokenGroup| Decision::RowGroupReplaced { step, rule: RULE.to_owned(), group: group.clone() };
        self.entries.extend(new.iter().map(entry));
        if let Some(budget_rows) = self.budget_rows {
            data_loader::check_budget(budget_rows, self.broken())?;
        }
        Ok(new)
    }
}

fn at(group: &BrokenGroup) -> (usize, usize) {
    (group.source, group.group)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn group(group: usize) -> BrokenGroup {
        BrokenGroup { source: 0, group, file: "a.parquet".into(), row_group: group, rows: 10, reason: "bad".into() }
    }

    #[test]
    fn what_any_rank_found_is_recorded_once_and_read_back() {
        let mut log = DecisionLog::read(Some(&serde_json::json!([])), Some(30)).unwrap();
        assert_eq!(log.record(4, [group(7), group(2), group(7)]).unwrap(), [group(2), group(7)]);
        assert_eq!(log.record(5, [group(7)]).unwrap(), []);
        assert!(log.unknown(&[Arc::new(group(2))]).is_empty());
        let recorded = log.to_json();
        assert_eq!(recorded[1]["kind"], "row_group_replaced");
        assert_eq!((&recorded[1]["step"], &recorded[1]["group"]), (&4.into(), &7.into()));
        let mut read = DecisionLog::read(Some(&recorded), Some(30)).unwrap();
        assert_eq!(read.to_json(), recorded);
        read.record(9, [group(1)]).unwrap();
        let error = read.record(10, [group(3)]).unwrap_err().to_string();
        assert!(error.contains("40 rows") && error.contains("row group 3"), "{error}");
    }

    #[test]
    fn a_log_that_cannot_be_repeated_is_refused() {
        let mut log = DecisionLog::default();
        log.record(4, [group(7)]).unwrap();
        let mut recorded = log.to_json();
        recorded[0]["rule"] = "another".into();
        assert!(DecisionLog::read(Some(&recorded), None).unwrap_err().to_string().contains("another"));
        recorded[0]["kind"] = "lane_skipped".into();
        assert!(DecisionLog::read(Some(&recorded), None).is_err());
    }

    #[test]
    fn steps_and_lanes_that_are_left_out_are_read_back_and_merged() {
        let mut log = DecisionLog::default();
        log.record(2, [group(7)]).unwrap();
        let mut later = log.clone();
        later.skip(4, "a");
        later.leave_out(6, vec![1, 3], "b");
        let read = DecisionLog::read(Some(&later.to_json()), None).unwrap();
        assert_eq!(
            read.to_json()[2],
            serde_json::json!({"kind": "lanes_left_out", "step": 6, "lanes": [1, 3], "reason": "b"})
        );
        log.merge(&read);
        log.merge(&later);
        assert_eq!(log.to_json(), later.to_json());
        assert_eq!(log.exceptions_after(3), [(4, "a"), (6, "b")]);
        assert_eq!([0, 1, 2, 3].map(|lane| log.counts(6, lane).0), [true, false, true, false]);
        assert!(log.skips(4) && !log.skips(6) && log.counts(4, 1).0);
    }
}
