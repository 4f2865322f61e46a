//! Row groups that cannot be used, and the rows that stand in for theirs (`data.on_broken = "skip"`).
//!
//! A row group is judged as a whole, before any of its rows is used for the first time: every page decodes, every number is
//! finite, every label is a class; where captions are read, those too. What stands in for a row is a keyed draw from the rows of its source (with buckets: of its
//! shape), drawn again until it lies in a sound row group. So which row is read in place of which depends on the files alone:
//! not on who reads, when, or on how many ranks.
//!
//! Only damage counts: an error of the store is never taken for it.

use std::collections::BTreeMap;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use rand::Rng;
use serde::{Deserialize, Serialize};

use crate::draws::{Key, Purpose};
use crate::order::{Part, WindowRows};
use crate::read::Want;
use crate::{DataError, LatentDataset, RowRun};

/// Bytes of latents and captions that are decoded at a time to judge a row group.
const JUDGED_BYTES: u64 = 64 << 20;
/// Draws for one row before the search is given up: even with nine rows of ten broken that does not happen.
const MOST_DRAWS: usize = 10_000;

/// A row group that is not used.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct BrokenGroup {
    /// The number of the data set in the mix, else 0.
    pub source: usize,
    /// The row group's number in the data set.
    pub group: usize,
    /// The file, redacted.
    pub file: String,
    /// The row group's number in the file.
    pub row_group: usize,
    /// Its rows.
    pub rows: u64,
    /// What is wrong with it.
    pub reason: String,
}

/// What one rank knows about damage. Shared by its stream and whoever agrees with the other ranks.
#[derive(Debug)]
pub struct Damage {
    seed: u64,
    /// Most rows that may lie in broken row groups; `None`: no row group is judged, only known ones are passed over.
    budget_rows: Option<u64>,
    /// Of row groups, by source and number.
    verdicts: Mutex<BTreeMap<(usize, usize), Verdict>>,
}

/// What of a row group is used, and so judged.
#[derive(Clone, Copy)]
pub(crate) struct Used {
    /// Labels must lie in `0..num_classes`; `None` takes the metadata's number.
    pub num_classes: Option<usize>,
    /// Whether captions are read.
    pub captions: bool,
}

#[derive(Clone, Debug)]
enum Verdict {
    Sound,
    Broken(Arc<BrokenGroup>),
}

impl Damage {
    /// `known` are the row groups that this run has agreed on before, sound by now or not. With `None` for a budget a new one
    /// is an error like any other.
    pub fn new(seed: u64, budget_rows: Option<u64>, known: impl IntoIterator<Item = BrokenGroup>) -> Self {
        let damage = Self { seed, budget_rows, verdicts: Mutex::default() };
        damage.adopt(known);
        damage
    }

    /// Takes over what other ranks have found. `false` if this rank may have used rows of one as sound.
    pub fn adopt(&self, broken: impl IntoIterator<Item = BrokenGroup>) -> bool {
        let mut verdicts = self.lock();
        let mut agrees = true;
        for group in broken {
            let at = (group.source, group.group);
            match verdicts.get(&at) {
                Some(Verdict::Broken(_)) => {}
                earlier => {
                    agrees &= earlier.is_none();
                    verdicts.insert(at, Verdict::Broken(Arc::new(group)));
                }
            }
        }
        agrees
    }

    fn lock(&self) -> MutexGuard<'_, BTreeMap<(usize, usize), Verdict>> {
        // The map is valid between statements, so a poisoned lock is still good.
        self.verdicts.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Puts sound rows in the places of a window's others. Gives those places with the broken row groups because of which
    /// another row is read there.
    ///
    /// # Errors
    /// Whatever is not damage; too much damage.
    pub(crate) async fn settle(
        &self,
        dataset: &LatentDataset,
        number: usize,
        part: &Part,
        used: Used,
        window: &mut WindowRows,
    ) -> Result<Vec<(u32, Arc<BrokenGroup>)>, DataError> {
        let mut replaced = Vec::new();
        for (at, place) in window.rows.iter_mut().enumerate() {
            let row = *place;
            let key = Key::new(self.seed, Purpose::Replacement, window.epoch).lane(number).index(row);
            let (mut rng, mut draws) = (key.rng(), 0);
            while let Some(broken) = self.broken(dataset, part.source, *place, used).await? {
                draws += 1;
                if draws > MOST_DRAWS {
                    let reason = format!(
                        "no sound row was found in place of row {row}; too few rows of its kind are sound: {} (row group {}): {}",
                        broken.file, broken.row_group, broken.reason
                    );
                    return Err(DataError::Request { url: dataset.name().to_owned(), reason });
                }
                // No u32 runs over: windows have at most u32::MAX rows.
                replaced.push((at as u32, broken));
                let drawn = (u128::from(rng.next_u64()) * u128::from(part.schedule.rows())) >> 64;
                *place = part.row(drawn as u64);
            }
        }
        replaced.dedup_by(|(at, group), (other, of_other)| at == other && Arc::ptr_eq(group, of_other));
        Ok(replaced)
    }

    /// The row group of a row, if it is broken.
    async fn broken(
        &self,
        dataset: &LatentDataset,
        source: usize,
        row: u64,
        used: Used,
    ) -> Result<Option<Arc<BrokenGroup>>, DataError> {
        let group = dataset.group_of(row);
        let known = self.lock().get(&(source, group)).cloned();
        let verdict = match (known, self.budget_rows) {
            (Some(verdict), _) => verdict,
            (None, None) => Verdict::Sound,
            (None, Some(budget_rows)) => {
                let verdict = judge(dataset, source, group, used).await?;
                self.lock().insert((source, group), verdict.clone());
                self.check_budget(budget_rows)?;
                verdict
            }
        };
        Ok(match verdict {
            Verdict::Sound => None,
            Verdict::Broken(broken) => Some(broken),
        })
    }

    fn check_budget(&self, budget_rows: u64) -> Result<(), DataError> {
        let verdicts = self.lock();
        let broken = verdicts.values().filter_map(|verdict| match verdict {
            Verdict::Broken(broken) => Some(&**broken),
            Verdict::Sound => None,
        });
        check_budget(budget_rows, broken)
    }
}

/// Refuses more rows in broken row groups than the budget allows.
///
/// # Errors
/// [`DataError::TooMuchDamage`] with the evidence.
pub fn check_budget<'a>(
    budget_rows: u64,
    broken: impl Iterator<Item = &'a BrokenGroup> + Clone,
) -> Result<(), DataError> {
    let rows: u64 = broken.clone().map(|group| group.rows).sum();
    if rows <= budget_rows {
        return Ok(());
    }
    let evidence = broken.map(|BrokenGroup { file, row_group, rows, reason, .. }| {
        format!("{file} (row group {row_group}, {rows} rows): {reason}")
    });
    Err(DataError::TooMuchDamage { rows, budget_rows, evidence: evidence.collect() })
}

async fn judge(dataset: &LatentDataset, source: usize, group: usize, used: Used) -> Result<Verdict, DataError> {
    let found = dataset.row_groups()[group];
    let meta = dataset.meta();
    let of_captions = meta.captions.filter(|_| used.captions).map_or(0, |captions| captions.row_bytes());
    let rows_at_once = (JUDGED_BYTES / (meta.row_bytes + of_captions).max(1) as u64).max(1);
    let end = found.first_row + found.rows;
    let mut first_row = found.first_row;
    while first_row < end {
        let rows = (end - first_row).min(rows_at_once);
        let run = RowRun { first_row, rows };
        let read = dataset.read_runs(&[run], Want::All).await;
        let mut checked = read.and_then(|block| {
            dataset.check_labels(&block, used.num_classes)?;
            dataset.check_finite(&block)
        });
        if checked.is_ok() && used.captions {
            let read = dataset.caption_runs(&[run]).await;
            checked = read.and_then(|block| dataset.bad_captions(run, &block).next().map_or(Ok(()), Err));
        }
        match checked {
            Ok(()) => first_row += rows,
            Err(error) if error.is_damage() => {
                let file = dataset.files[found.file].file.name.clone();
                let (row_group, reason) = (found.index_in_file, error.to_string());
                return Ok(Verdict::Broken(Arc::new(BrokenGroup {
                    source,
                    group,
                    file,
                    row_group,
                    rows: found.rows,
                    reason,
                })));
            }
            Err(error) => return Err(error),
        }
    }
    Ok(Verdict::Sound)
}

#[cfg(test)]
mod tests;
