//! Which rows of which data set a lane reads at a step: one data set, several mixed by weight, or one in buckets of shapes.
//!
//! The rows of a source, or of a bucket, are a *part* with a [`LaneSchedule`] of its own. A lane walks through its stretch of a
//! part, epoch after epoch, by an endless count of *positions*; what differs is whose turn it is.
//!
//! # Epoch boundaries
//! Of one data set as [`LaneSchedule`] says. In a mix each source has epochs of its own: where a lane has read its
//! `⌊rows / lanes⌋` rows of a source it goes on with that source's next permutation, in the middle of a micro-batch if it so
//! happens. With buckets an epoch ends for all of them together; the rows that fill no whole step of their bucket are
//! left out of that epoch.

use std::collections::{HashMap, VecDeque};
use std::ops::Range;
use std::sync::Arc;

use rand::Rng;

use crate::buckets::Buckets;
use crate::draws::{Key, Purpose};
use crate::mix::{Shares, Turn};
use crate::schedule::EpochOrder;
use crate::{DataError, LaneSchedule, ScheduleOptions};

/// One source of a mix.
#[derive(Clone, Debug)]
pub struct MixedSource {
    /// Its share of the rows over the sum of all weights. Above 0.
    pub weight: f64,
    /// Rows of its row groups, in data set order.
    pub row_group_rows: Vec<u64>,
}

/// The order of rows of an experiment. Cheap to clone.
#[derive(Clone, Debug)]
pub struct RowOrder {
    options: ScheduleOptions,
    parts: Arc<[Part]>,
    turns: Turns,
    left_out: Arc<[(usize, u64)]>,
}

#[derive(Clone, Debug)]
enum Turns {
    One,
    Mix(Shares),
    Buckets(Buckets),
}

/// Rows that the lanes walk through.
#[derive(Clone, Debug)]
pub(crate) struct Part {
    /// The data set.
    pub source: usize,
    /// The shape, with buckets.
    pub shape: usize,
    pub schedule: LaneSchedule,
    /// The data set's row for each of the schedule's; `None`: the same.
    rows: Option<Arc<[u64]>>,
}

/// One row of a micro-batch: a part, and a position in the lane's walk through it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Pick {
    pub part: usize,
    pub position: u64,
}

/// Turns and permutations that are kept from call to call; never more than the last few.
#[derive(Debug, Default)]
pub(crate) struct Memo {
    lanes: HashMap<usize, (u64, Vec<Turn>)>,
    epoch: Option<(u64, Vec<Turn>)>,
    orders: VecDeque<(usize, EpochOrder)>,
}

impl From<LaneSchedule> for RowOrder {
    fn from(schedule: LaneSchedule) -> Self {
        let options = *schedule.options();
        let part = Part { source: 0, shape: 0, schedule, rows: None };
        Self { options, parts: [part].into(), turns: Turns::One, left_out: [].into() }
    }
}

impl RowOrder {
    /// Mixes sources by weight.
    ///
    /// # Errors
    /// If a weight gives no share, or a source has fewer rows than there are lanes.
    pub fn mixed(options: ScheduleOptions, sources: &[MixedSource]) -> Result<Self, DataError> {
        let weights: Vec<f64> = sources.iter().map(|source| source.weight).collect();
        let shares = Shares::new(options.seed, &weights)
            .map_err(|(at, reason)| DataError::Schedule(format!("`data.mix[{at}].weight` {reason}")))?;
        let mut parts = Vec::with_capacity(sources.len());
        for (source, MixedSource { row_group_rows, .. }) in sources.iter().enumerate() {
            let rows: u64 = row_group_rows.iter().sum();
            if rows < options.lanes as u64 {
                return Err(DataError::Schedule(format!(
                    "`data.mix[{source}]` has {rows} rows for {} lanes; expected one for each lane at least",
                    options.lanes
                )));
            }
            // How many rows a step takes of a source varies: its positions are counted row by row.
            let own = ScheduleOptions { seed: own_seed(options.seed, Purpose::Mix, source), micro_batch: 1, ..options };
            parts.push(Part { source, shape: 0, schedule: LaneSchedule::new(own, row_group_rows)?, rows: None });
        }
        Ok(Self { options, parts: parts.into(), turns: Turns::Mix(shares), left_out: [].into() })
    }

    /// Deals the rows of one data set in micro-batches of one shape each; `shape_of` gives the number of a row's shape, below
    /// `shapes`.
    ///
    /// # Errors
    /// As [`LaneSchedule::new`]; if no shape has rows enough for one step.
    pub fn bucketed(
        options: ScheduleOptions,
        row_group_rows: &[u64],
        shapes: usize,
        shape_of: impl Fn(u64) -> usize,
    ) -> Result<Self, DataError> {
        let mut rows_of: Vec<Vec<u64>> = vec![Vec::new(); shapes];
        let mut groups_of: Vec<Vec<u64>> = vec![Vec::with_capacity(row_group_rows.len()); shapes];
        let mut first = 0;
        for &group in row_group_rows {
            let had: Vec<usize> = rows_of.iter().map(Vec::len).collect();
            (first..first + group).for_each(|row| rows_of[shape_of(row)].push(row));
            first += group;
            for shape in 0..shapes {
                groups_of[shape].push((rows_of[shape].len() - had[shape]) as u64);
            }
        }
        let global_batch = (options.lanes * options.micro_batch) as u64;
        let (mut parts, mut left_out, mut steps) = (Vec::new(), Vec::new(), Vec::new());
        for (shape, (rows, groups)) in rows_of.into_iter().zip(groups_of).enumerate() {
            if (rows.len() as u64) < global_batch {
                left_out.push((shape, rows.len() as u64));
                continue;
            }
            let own = ScheduleOptions { seed: own_seed(options.seed, Purpose::Bucket, shape), ..options };
            let schedule = LaneSchedule::new(own, &groups)?;
            steps.push(schedule.steps_per_epoch());
            parts.push(Part { source: 0, shape, schedule, rows: Some(rows.into()) });
        }
        if parts.is_empty() {
            // The same words as for one shape where there is nothing at all, and every option is checked.
            LaneSchedule::new(options, row_group_rows)?;
            return Err(DataError::Schedule(format!(
                "none of the {shapes} shapes of latents has the {global_batch} rows that one step reads (`train.lanes` × `train.micro_batch` = {} × {}); \
                 use fewer lanes, a smaller micro-batch, fewer shapes or more data",
                options.lanes, options.micro_batch
            )));
        }
        let turns = Turns::Buckets(Buckets::new(options.seed, steps));
        Ok(Self { options, parts: parts.into(), turns, left_out: left_out.into() })
    }

    /// What the order was made from.
    pub fn options(&self) -> &ScheduleOptions {
        &self.options
    }

    /// Shapes (by number) that have fewer rows than one step reads, with their rows: they are never read.
    pub fn left_out(&self) -> &[(usize, u64)] {
        &self.left_out
    }

    /// Sources, at least 1.
    pub fn sources(&self) -> usize {
        self.parts.last().map_or(1, |part| part.source + 1)
    }

    /// Rows of a source, with those of shapes that are left out.
    pub fn source_rows(&self, source: usize) -> u64 {
        let dealt: u64 = self.parts.iter().filter(|part| part.source == source).map(|part| part.schedule.rows()).sum();
        dealt + self.left_out.iter().map(|(_, rows)| rows).sum::<u64>()
    }

    /// Whether rows have shapes of their own.
    pub fn has_buckets(&self) -> bool {
        matches!(self.turns, Turns::Buckets(_))
    }

    /// Steps of an epoch, at least 1; in a mix those that read as many rows as all sources have.
    pub fn steps_per_epoch(&self) -> u64 {
        match &self.turns {
            Turns::One => self.parts[0].schedule.steps_per_epoch(),
            Turns::Buckets(buckets) => buckets.steps_per_epoch(),
            Turns::Mix(_) => {
                let rows: u64 = self.parts.iter().map(|part| part.schedule.rows()).sum();
                (rows / (self.options.lanes * self.options.micro_batch) as u64).max(1)
            }
        }
    }

    /// The number of the shape that all lanes read at a step; 0 without buckets.
    pub fn shape_at(&self, step: u64) -> usize {
        let mut picks = Vec::new();
        self.picks(&mut Memo::default(), step, 0, &mut picks);
        self.parts[picks[0].part].shape
    }

    /// Rows that all lanes together read of each source in the first `steps` steps.
    pub fn rows_read(&self, steps: u64) -> Vec<u64> {
        let (lanes, micro_batch) = (self.options.lanes, self.options.micro_batch as u64);
        let Turns::Mix(shares) = &self.turns else { return vec![steps * lanes as u64 * micro_batch] };
        let (blocks, rest) = (steps * micro_batch / shares.block(), steps * micro_batch % shares.block());
        let mut read: Vec<u64> =
            (0..self.parts.len()).map(|source| lanes as u64 * shares.before(source, blocks)).collect();
        for lane in (0..lanes).filter(|_| rest > 0) {
            shares.turns(lane, blocks)[..rest as usize].iter().for_each(|turn| read[turn.source as usize] += 1);
        }
        read
    }

    /// The rows that `lane` reads at `step`, in the order of the micro-batch, each with its source.
    ///
    /// Made from nothing each time; [`crate::MicroBatchStream`] keeps the permutations instead.
    ///
    /// # Panics
    /// If `lane` is not one of the lanes.
    pub fn rows_of(&self, step: u64, lane: usize) -> Vec<(usize, u64)> {
        let mut memo = Memo::default();
        let mut picks = Vec::new();
        self.picks(&mut memo, step, lane, &mut picks);
        let row = |pick: &Pick| {
            let window = self.window(&mut memo, lane, *pick);
            (self.parts[pick.part].source, window.rows[0])
        };
        picks.iter().map(row).collect()
    }

    pub(crate) fn parts(&self) -> usize {
        self.parts.len()
    }

    pub(crate) fn part(&self, part: usize) -> &Part {
        &self.parts[part]
    }

    /// The rows of a micro-batch.
    pub(crate) fn picks(&self, memo: &mut Memo, step: u64, lane: usize, picks: &mut Vec<Pick>) {
        assert!(lane < self.options.lanes, "lane {lane} of {}", self.options.lanes);
        picks.clear();
        let micro_batch = self.options.micro_batch as u64;
        let positions = step * micro_batch..(step + 1) * micro_batch;
        match &self.turns {
            Turns::One => picks.extend(positions.map(|position| Pick { part: 0, position })),
            Turns::Buckets(buckets) => {
                let (epoch, at) = (step / buckets.steps_per_epoch(), (step % buckets.steps_per_epoch()) as usize);
                if memo.epoch.as_ref().is_none_or(|(of, _)| *of != epoch) {
                    memo.epoch = Some((epoch, buckets.turns(epoch)));
                }
                let Some((_, turns)) = &memo.epoch else { unreachable!("set above") };
                let part = turns[at].source as usize;
                let first = (epoch * buckets.steps_of(part) + u64::from(turns[at].ordinal)) * micro_batch;
                picks.extend((first..first + micro_batch).map(|position| Pick { part, position }));
            }
            Turns::Mix(shares) => picks.extend(positions.map(|row| {
                let (block, at) = (row / shares.block(), (row % shares.block()) as usize);
                let kept = memo.lanes.entry(lane).or_insert_with(|| (block, shares.turns(lane, block)));
                if kept.0 != block {
                    *kept = (block, shares.turns(lane, block));
                }
                let Turn { source, ordinal } = kept.1[at];
                let part = source as usize;
                Pick { part, position: shares.before(part, block) + u64::from(ordinal) }
            })),
        }
    }

    /// The rest of the shuffle window that a pick is in, from the pick on: what has been read of it is left out.
    pub(crate) fn window(&self, memo: &mut Memo, lane: usize, pick: Pick) -> WindowRows {
        let part = &self.parts[pick.part];
        let schedule = &part.schedule;
        let (epoch, position) = (pick.position / schedule.lane_rows(), pick.position % schedule.lane_rows());
        let (number, window) = schedule.window_of(position);
        let inside = schedule.window_order(epoch, lane, number, window.end - window.start);
        let first = schedule.virtual_rows(lane, &window).start;
        let order = memo.epoch_order(pick.part, part, epoch);
        let row = |inside: &u32| part.row(order.row(first + u64::from(*inside)));
        let rows = inside[(position - window.start) as usize..].iter().map(row).collect();
        WindowRows { epoch, positions: pick.position..pick.position + (window.end - position), rows }
    }
}

/// Rows of a shuffle window in the order in which they are read.
#[derive(Debug)]
pub(crate) struct WindowRows {
    /// The part's epoch.
    pub epoch: u64,
    /// Positions in the lane's walk.
    pub positions: Range<u64>,
    /// The data set row of each.
    pub rows: Vec<u64>,
}

impl Part {
    /// The data set row of one of the schedule's.
    pub fn row(&self, of_schedule: u64) -> u64 {
        self.rows.as_ref().map_or(of_schedule, |rows| rows[of_schedule as usize])
    }
}

impl Memo {
    /// Lanes pass a boundary one after the other, so two epochs of each part are wanted at a time.
    fn epoch_order(&mut self, number: usize, part: &Part, epoch: u64) -> &EpochOrder {
        let found = self.orders.iter().position(|(of, order)| *of == number && order.epoch() == epoch);
        let found = found.unwrap_or_else(|| {
            let newest = self.orders.iter().filter(|(of, _)| *of == number).map(|(_, order)| order.epoch()).max();
            self.orders.retain(|(of, order)| *of != number || Some(order.epoch()) == newest);
            self.orders.push_back((number, part.schedule.epoch_order(epoch)));
            self.orders.len() - 1
        });
        &self.orders[found].1
    }
}

/// The seed of a part's own order, so that equal data sets are not read in step.
fn own_seed(seed: u64, purpose: Purpose, part: usize) -> u64 {
    Key::new(seed, purpose, part as u64).index(1).rng().next_u64()
}

#[cfg(test)]
mod tests;
