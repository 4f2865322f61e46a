//! Which rows lane `l` reads at step `s`: pure arithmetic over `(seed, lanes, micro_batch, row groups)`.
//!
//! An epoch is a seeded permutation of the *ranges* (row groups cut into pieces of at most `range_rows`), read one after
//! the other as a virtual sequence of `N` rows. With `steps_per_epoch = ⌊N / (lanes · micro_batch)⌋` and
//! `n = steps_per_epoch · micro_batch`, lane `l` owns virtual rows `[l·n, (l+1)·n)` and shuffles them inside windows of
//! `shuffle_window_rows`. Ranks do not appear: a rank asks for the lanes it executes.
//!
//! # Epoch boundary
//! A step never straddles two epochs: step `s` belongs to epoch `⌊s / steps_per_epoch⌋`. The `N − lanes · n` rows at the
//! end of the virtual sequence (fewer than `lanes · micro_batch`) are not read in that epoch; the permutation of the next
//! epoch puts other rows there. Where `lanes · micro_batch` divides `N`, every row is read exactly once per epoch.
//! Windows restart with each epoch; a lane's last window may be shorter.

use std::ops::Range;
use std::sync::Arc;

use crate::DataError;
use crate::draws::{Key, Purpose, shuffle};

/// What a schedule is a function of, besides the row groups.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct ScheduleOptions {
    /// The experiment's seed.
    pub seed: u64,
    /// Logical data-parallel workers, 1 ..= 65536.
    pub lanes: usize,
    /// Rows of one lane at one step, ≥ 1.
    pub micro_batch: usize,
    /// Longest run of neighbouring rows that is dealt as one piece, ≥ 1.
    pub range_rows: usize,
    /// Rows inside which a lane shuffles, ≥ 1. A rank holds about one window of stored latents per lane in memory.
    pub shuffle_window_rows: usize,
}

/// A run of neighbouring rows of the data set.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct RowRun {
    /// Number of the first row in the data set.
    pub first_row: u64,
    /// Rows in the run.
    pub rows: u64,
}

/// The deal of rows to lanes. Cheap to clone.
#[derive(Clone, Debug)]
pub struct LaneSchedule {
    options: ScheduleOptions,
    ranges: Arc<[RowRun]>,
    rows: u64,
    steps_per_epoch: u64,
}

impl LaneSchedule {
    /// Deals the rows of a data set whose row groups have `row_group_rows` rows, in data set order.
    ///
    /// # Errors
    /// If an option is out of range, or there are fewer rows than one step needs.
    pub fn new(options: ScheduleOptions, row_group_rows: &[u64]) -> Result<Self, DataError> {
        let ScheduleOptions { lanes, micro_batch, range_rows, shuffle_window_rows, .. } = options;
        for (name, value, most) in [
            ("train.lanes", lanes, 65_536),
            ("train.micro_batch", micro_batch, u32::MAX as usize),
            ("data.range_rows", range_rows, u32::MAX as usize),
            ("data.shuffle_window_rows", shuffle_window_rows, u32::MAX as usize),
        ] {
            if value == 0 || value > most {
                return Err(DataError::Schedule(format!("`{name}` = {value}; expected 1 to {most}")));
            }
        }
        let mut ranges = Vec::new();
        let mut rows = 0u64;
        for &group_rows in row_group_rows {
            let end = rows + group_rows;
            while rows < end {
                let piece = (end - rows).min(range_rows as u64);
                ranges.push(RowRun { first_row: rows, rows: piece });
                rows += piece;
            }
        }
        let steps_per_epoch = rows / (lanes as u64 * micro_batch as u64);
        if steps_per_epoch == 0 {
            return Err(DataError::Schedule(format!(
                "the data set has {rows} rows, but one step reads `train.lanes` × `train.micro_batch` = {lanes} × {micro_batch} = {} rows; \
                 use fewer lanes, a smaller micro-batch, or more data",
                lanes as u64 * micro_batch as u64
            )));
        }
        Ok(Self { options, ranges: ranges.into(), rows, steps_per_epoch })
    }

    /// What the schedule was made from.
    pub fn options(&self) -> &ScheduleOptions {
        &self.options
    }

    /// Rows of the data set.
    pub fn rows(&self) -> u64 {
        self.rows
    }

    /// Steps that one epoch gives, ≥ 1.
    pub fn steps_per_epoch(&self) -> u64 {
        self.steps_per_epoch
    }

    /// The epoch that a step belongs to.
    pub fn epoch_of(&self, step: u64) -> u64 {
        step / self.steps_per_epoch
    }

    /// Rows that one lane reads in an epoch.
    pub fn lane_rows(&self) -> u64 {
        self.steps_per_epoch * self.options.micro_batch as u64
    }

    /// The virtual row sequence of an epoch.
    pub fn epoch_order(&self, epoch: u64) -> EpochOrder {
        let mut runs = self.ranges.to_vec();
        shuffle(Key::new(self.options.seed, Purpose::EpochOrder, epoch), &mut runs);
        let starts = runs
            .iter()
            .scan(0u64, |next, run| {
                let start = *next;
                *next += run.rows;
                Some(start)
            })
            .collect();
        EpochOrder { epoch, runs, starts }
    }

    /// The rows that `lane` reads at `step`, in order, as positions in the lane's own part of the epoch: `[0, lane_rows)`.
    pub(crate) fn positions(&self, step: u64) -> Range<u64> {
        let first = (step % self.steps_per_epoch) * self.options.micro_batch as u64;
        first..first + self.options.micro_batch as u64
    }

    /// The window that holds a position of a lane, and the positions of that window.
    pub(crate) fn window_of(&self, position: u64) -> (u64, Range<u64>) {
        let length = self.options.shuffle_window_rows as u64;
        let window = position / length;
        (window, window * length..((window + 1) * length).min(self.lane_rows()))
    }

    /// The virtual rows that a lane's positions stand for before its windows are shuffled.
    pub(crate) fn virtual_rows(&self, lane: usize, positions: &Range<u64>) -> Range<u64> {
        let first = lane as u64 * self.lane_rows();
        first + positions.start..first + positions.end
    }

    /// The order inside a window: position `window.start + i` reads virtual row `first virtual row of the window + order[i]`.
    pub(crate) fn window_order(&self, epoch: u64, lane: usize, window: u64, rows: u64) -> Vec<u32> {
        // A window has at most u32::MAX rows: checked in `new`.
        let mut order: Vec<u32> = (0..rows as u32).collect();
        shuffle(Key::new(self.options.seed, Purpose::Window, epoch).lane(lane).index(window), &mut order);
        order
    }

    /// The data set rows that `lane` reads at `step`, in the order of the micro-batch.
    ///
    /// Made from nothing each time; [`crate::MicroBatchStream`] keeps the permutations instead.
    ///
    /// # Panics
    /// If `lane` is not one of the schedule's lanes.
    pub fn rows_of(&self, step: u64, lane: usize) -> Vec<u64> {
        assert!(lane < self.options.lanes, "lane {lane} of {}", self.options.lanes);
        let epoch = self.epoch_of(step);
        let order = self.epoch_order(epoch);
        let mut rows = Vec::with_capacity(self.options.micro_batch);
        let positions = self.positions(step);
        let mut position = positions.start;
        while position < positions.end {
            let (window, range) = self.window_of(position);
            let first_virtual = self.virtual_rows(lane, &range).start;
            let inside = self.window_order(epoch, lane, window, range.end - range.start);
            let end = positions.end.min(range.end);
            rows.extend(
                (position..end).map(|p| order.row(first_virtual + u64::from(inside[(p - range.start) as usize]))),
            );
            position = end;
        }
        rows
    }
}

/// The virtual row sequence of one epoch: the ranges in the order in which they are dealt.
#[derive(Clone, Debug)]
pub struct EpochOrder {
    epoch: u64,
    runs: Vec<RowRun>,
    /// Virtual row at which each run starts.
    starts: Vec<u64>,
}

impl EpochOrder {
    /// The epoch that this is the order of.
    pub fn epoch(&self) -> u64 {
        self.epoch
    }

    /// The data set row of a virtual row, which must be less than the number of rows.
    pub fn row(&self, virtual_row: u64) -> u64 {
        let at = self.run_of(virtual_row);
        self.runs[at].first_row + (virtual_row - self.starts[at])
    }

    /// The data set rows of a stretch of the virtual sequence, as runs in its order.
    pub fn runs(&self, virtual_rows: Range<u64>) -> Vec<RowRun> {
        let mut runs = Vec::new();
        let mut next = virtual_rows.start;
        while next < virtual_rows.end {
            let at = self.run_of(next);
            let (run, start) = (self.runs[at], self.starts[at]);
            let end = virtual_rows.end.min(start + run.rows);
            runs.push(RowRun { first_row: run.first_row + (next - start), rows: end - next });
            next = end;
        }
        runs
    }

    fn run_of(&self, virtual_row: u64) -> usize {
        self.starts.partition_point(|&start| start <= virtual_row) - 1
    }
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]
    use std::collections::HashSet;

    use super::*;

    fn options(lanes: usize, micro_batch: usize, range_rows: usize, shuffle_window_rows: usize) -> ScheduleOptions {
        ScheduleOptions { seed: 11, lanes, micro_batch, range_rows, shuffle_window_rows }
    }

    /// Every combination of row groups, lanes, micro-batch, range and window that makes at least one step.
    fn grid() -> impl Iterator<Item = LaneSchedule> {
        let groups: [&[u64]; 4] = [&[64], &[10, 7, 1, 0, 30], &[33, 33, 33], &[128, 128]];
        groups.into_iter().flat_map(|groups| {
            let mut schedules = Vec::new();
            for lanes in [1, 2, 8] {
                for micro_batch in [1, 3, 4] {
                    for range_rows in [1, 8, 1000] {
                        for window in [1, 5, 16, 1000] {
                            schedules
                                .extend(LaneSchedule::new(options(lanes, micro_batch, range_rows, window), groups));
                        }
                    }
                }
            }
            schedules
        })
    }

    fn epoch_rows(schedule: &LaneSchedule, epoch: u64) -> Vec<u64> {
        let steps = schedule.steps_per_epoch();
        (epoch * steps..(epoch + 1) * steps)
            .flat_map(|step| (0..schedule.options().lanes).flat_map(move |lane| schedule.rows_of(step, lane)))
            .collect()
    }

    #[test]
    fn a_row_comes_at_most_once_per_epoch_and_exactly_once_where_the_counts_divide() {
        let mut dividing = 0;
        for schedule in grid() {
            let global_batch = (schedule.options().lanes * schedule.options().micro_batch) as u64;
            for epoch in [0, 1, 5] {
                let rows = epoch_rows(&schedule, epoch);
                let distinct: HashSet<u64> = rows.iter().copied().collect();
                assert_eq!(distinct.len(), rows.len(), "{:?}", schedule.options());
                assert!(rows.iter().all(|&row| row < schedule.rows()));
                assert_eq!(rows.len() as u64, schedule.rows() / global_batch * global_batch);
            }
            dividing += usize::from(schedule.rows().is_multiple_of(global_batch));
        }
        assert!(dividing > 20, "the grid should hold cases that divide; it has {dividing}");
    }

    #[test]
    fn a_lane_shuffles_only_inside_its_windows_of_its_own_stretch() {
        for schedule in grid() {
            let order = schedule.epoch_order(2);
            let first_step = 2 * schedule.steps_per_epoch();
            for lane in 0..schedule.options().lanes {
                let read: Vec<u64> = (first_step..first_step + schedule.steps_per_epoch())
                    .flat_map(|step| schedule.rows_of(step, lane))
                    .collect();
                let own: Vec<u64> =
                    schedule.virtual_rows(lane, &(0..schedule.lane_rows())).map(|v| order.row(v)).collect();
                let window = schedule.options().shuffle_window_rows;
                for (read, own) in read.chunks(window).zip(own.chunks(window)) {
                    let (mut read, mut own) = (read.to_vec(), own.to_vec());
                    read.sort_unstable();
                    own.sort_unstable();
                    assert_eq!(read, own, "{:?} lane {lane}", schedule.options());
                }
            }
        }
    }

    #[test]
    fn the_runs_of_a_stretch_are_its_rows() {
        for schedule in grid() {
            let order = schedule.epoch_order(1);
            for (start, end) in [(0, schedule.rows()), (3, 20), (7, 7), (schedule.rows() - 1, schedule.rows())] {
                let rows: Vec<u64> =
                    order.runs(start..end).iter().flat_map(|run| run.first_row..run.first_row + run.rows).collect();
                assert_eq!(rows, (start..end).map(|v| order.row(v)).collect::<Vec<_>>());
            }
        }
    }

    #[test]
    fn the_order_depends_on_seed_epoch_and_lane_count_and_on_nothing_that_was_asked_before() {
        let schedule = LaneSchedule::new(options(4, 4, 8, 16), &[256]).unwrap();
        let same = LaneSchedule::new(options(4, 4, 8, 16), &[256]).unwrap();
        let _ = same.rows_of(40, 3);
        assert_eq!(schedule.rows_of(9, 1), same.rows_of(9, 1));
        assert_ne!(epoch_rows(&schedule, 0), epoch_rows(&schedule, 1));
        let reseeded = LaneSchedule::new(ScheduleOptions { seed: 12, ..options(4, 4, 8, 16) }, &[256]).unwrap();
        assert_ne!(epoch_rows(&schedule, 0), epoch_rows(&reseeded, 0));
        assert_eq!(schedule.epoch_of(schedule.steps_per_epoch() - 1), 0);
        assert_eq!(schedule.epoch_of(schedule.steps_per_epoch()), 1);
    }

    #[test]
    fn the_dropped_tail_is_not_the_same_rows_each_epoch() {
        let schedule = LaneSchedule::new(options(2, 4, 4, 16), &[61]).unwrap();
        let dropped = |epoch| {
            let read: HashSet<u64> = epoch_rows(&schedule, epoch).into_iter().collect();
            (0..61).filter(|row| !read.contains(row)).collect::<Vec<u64>>()
        };
        assert_eq!(dropped(0).len(), 5);
        assert!((1..5).any(|epoch| dropped(epoch) != dropped(0)));
    }

    #[test]
    fn the_order_is_fixed_for_ever() {
        // A checkpoint resumed with a newer build must read the rows that the older one would have read.
        let schedule = LaneSchedule::new(options(2, 4, 8, 16), &[40, 24]).unwrap();
        assert_eq!([schedule.rows_of(0, 0), schedule.rows_of(3, 1), schedule.rows_of(9, 0)], EXPECTED_ROWS);
    }

    const EXPECTED_ROWS: [[u64; 4]; 3] = [[10, 11, 12, 2], [55, 39, 48, 33], [50, 6, 7, 51]];

    #[test]
    fn impossible_options_are_refused_with_the_key() {
        let error = LaneSchedule::new(options(8, 16, 8, 16), &[100]).unwrap_err().to_string();
        assert!(error.contains("100 rows") && error.contains("128"), "{error}");
        for (bad, key) in [
            (options(0, 1, 1, 1), "train.lanes"),
            (options(1, 0, 1, 1), "train.micro_batch"),
            (options(1, 1, 0, 1), "data.range_rows"),
            (options(1, 1, 1, 0), "data.shuffle_window_rows"),
        ] {
            assert!(LaneSchedule::new(bad, &[10]).unwrap_err().to_string().contains(key));
        }
    }
}
