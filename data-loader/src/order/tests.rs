#![allow(clippy::unwrap_used)]
use std::collections::{HashMap, HashSet};

use proptest::prelude::*;

use super::*;
use crate::properties::{cases, options};

fn mix(options: ScheduleOptions, sources: &[(f64, Vec<u64>)]) -> Result<RowOrder, DataError> {
    let source = |(weight, groups): &(f64, Vec<u64>)| MixedSource { weight: *weight, row_group_rows: groups.clone() };
    RowOrder::mixed(options, &sources.iter().map(source).collect::<Vec<_>>())
}

/// Every lane's rows of `steps`, read as a stream reads them: one memo, a window kept until it is used up.
fn walk(order: &RowOrder, lanes: Range<usize>, steps: Range<u64>) -> HashMap<(u64, usize), Vec<(usize, u64)>> {
    let (mut memo, mut picks, mut read) = (Memo::default(), Vec::new(), HashMap::new());
    let mut windows: HashMap<(usize, usize), WindowRows> = HashMap::new();
    for step in steps {
        for lane in lanes.clone() {
            order.picks(&mut memo, step, lane, &mut picks);
            let mut row = |pick: &Pick| {
                let window = windows.entry((lane, pick.part)).or_insert_with(|| order.window(&mut memo, lane, *pick));
                if !window.positions.contains(&pick.position) {
                    *window = order.window(&mut memo, lane, *pick);
                }
                (order.part(pick.part).source, window.rows[(pick.position - window.positions.start) as usize])
            };
            read.insert((step, lane), picks.iter().map(&mut row).collect());
        }
    }
    read
}

proptest! {
    #![proptest_config(cases(96))]

    #[test]
    fn a_mix_reads_each_source_by_its_share_and_each_row_once_an_epoch_of_its_source(
        options in options(),
        sources in prop::collection::vec((0.05..4.0f64, prop::collection::vec(0..40u64, 1..5)), 1..4),
        steps in 1..120u64,
    ) {
        let enough = sources.iter().all(|(_, groups)| groups.iter().sum::<u64>() >= options.lanes as u64);
        let order = match mix(options, &sources) {
            Ok(order) => order,
            Err(error) => {
                prop_assert!(!enough, "{}", error);
                return Ok(());
            }
        };
        let read = walk(&order, 0..options.lanes, 0..steps);
        let mut counts = vec![0u64; sources.len()];
        // Passes of every lane over its part of every source.
        let mut seen: HashMap<(usize, usize, u64), HashSet<u64>> = HashMap::new();
        let mut taken: HashMap<(usize, usize), u64> = HashMap::new();
        for step in 0..steps {
            for lane in 0..options.lanes {
                prop_assert_eq!(read[&(step, lane)].len(), options.micro_batch);
                for &(source, row) in &read[&(step, lane)] {
                    let rows: u64 = sources[source].1.iter().sum();
                    let position = taken.entry((source, lane)).or_default();
                    let epoch = *position / (rows / options.lanes as u64);
                    *position += 1;
                    counts[source] += 1;
                    prop_assert!(row < rows);
                    prop_assert!(seen.entry((source, usize::MAX, epoch)).or_default().insert(row), "row {} twice", row);
                }
            }
        }
        prop_assert_eq!(&order.rows_read(steps), &counts);
        let total: f64 = sources.iter().map(|source| source.0).sum();
        for (source, (weight, _)) in sources.iter().enumerate() {
            // Within a block a lane may run ahead of its share.
            let expected = (steps * options.micro_batch as u64) as f64 * options.lanes as f64 * weight / total;
            let slack = 257.0 * options.lanes as f64;
            prop_assert!((counts[source] as f64 - expected).abs() <= slack, "{:?} rows, {} expected", counts, expected);
        }
    }

    #[test]
    fn a_mix_is_the_same_on_every_rank_after_every_resume_and_from_nothing(
        options in options(),
        sources in prop::collection::vec((0.05..4.0f64, prop::collection::vec(20..40u64, 1..5)), 2..4),
        resume in 0..200u64,
    ) {
        let order = mix(options, &sources).unwrap();
        let whole = walk(&order, 0..options.lanes, resume.saturating_sub(7)..resume + 5);
        for ranks_log2 in 0..=options.lanes.ilog2() {
            let lanes_of_rank = options.lanes >> ranks_log2;
            for first in (0..options.lanes).step_by(lanes_of_rank) {
                for (at, rows) in walk(&order, first..first + lanes_of_rank, resume..resume + 5) {
                    prop_assert_eq!(&rows, &whole[&at]);
                    if at.0 == resume {
                        prop_assert_eq!(&rows, &order.rows_of(at.0, at.1));
                    }
                }
            }
        }
    }

    #[test]
    fn buckets_have_one_shape_a_step_and_each_row_once_an_epoch(
        options in options(),
        groups in prop::collection::vec(0..60u64, 1..6),
        shapes in prop::collection::vec(0..4usize, 300),
        epoch in 0..50u64,
    ) {
        let shape_of = |row: u64| shapes[row as usize];
        let rows: u64 = groups.iter().sum();
        let global_batch = (options.lanes * options.micro_batch) as u64;
        let counts: Vec<u64> = (0..4).map(|shape| (0..rows).filter(|row| shape_of(*row) == shape).count() as u64).collect();
        let order = match RowOrder::bucketed(options, &groups, 4, shape_of) {
            Ok(order) => order,
            Err(error) => {
                prop_assert!(counts.iter().all(|count| *count < global_batch), "{}", error);
                return Ok(());
            }
        };
        let steps = order.steps_per_epoch();
        prop_assert_eq!(steps, counts.iter().map(|count| count / global_batch).sum::<u64>());
        let read = walk(&order, 0..options.lanes, epoch * steps..(epoch + 1) * steps);
        let mut seen = HashSet::new();
        for ((step, _), rows) in &read {
            let shape = order.shape_at(*step);
            prop_assert!(rows.iter().all(|(_, row)| shape_of(*row) == shape));
            prop_assert!(rows.iter().all(|(_, row)| seen.insert(*row)));
        }
        prop_assert_eq!(seen.len() as u64, steps * global_batch);
        let resume = epoch * steps + steps / 2;
        for lane in 0..options.lanes {
            let resumed = walk(&order, lane..lane + 1, resume..(epoch + 1) * steps);
            prop_assert!(resumed.iter().all(|(at, rows)| *rows == read[at]));
            prop_assert_eq!(&order.rows_of(resume, lane), &read[&(resume, lane)]);
        }
        let left_out: Vec<_> = counts.iter().copied().enumerate().filter(|(_, count)| *count < global_batch).collect();
        prop_assert_eq!(order.left_out(), &left_out[..]);
    }

    #[test]
    fn one_data_set_is_read_as_its_schedule_says(
        options in options(), groups in prop::collection::vec(0..50u64, 1..6), step in 0..500u64,
    ) {
        let Ok(schedule) = LaneSchedule::new(options, &groups) else { return Ok(()) };
        let order = RowOrder::from(schedule.clone());
        prop_assert_eq!(order.steps_per_epoch(), schedule.steps_per_epoch());
        for lane in 0..options.lanes {
            let rows: Vec<u64> = order.rows_of(step, lane).into_iter().map(|(_, row)| row).collect();
            prop_assert_eq!(rows, schedule.rows_of(step, lane));
        }
    }
}

#[test]
fn mixes_and_buckets_are_fixed_for_ever() {
    // A checkpoint resumed with a newer build must read the rows that the older one would have read.
    let options = ScheduleOptions { seed: 11, lanes: 2, micro_batch: 4, range_rows: 8, shuffle_window_rows: 16 };
    let mixed = mix(options, &[(3.0, vec![40, 24]), (1.0, vec![64])]).unwrap();
    assert_eq!([mixed.rows_of(0, 0), mixed.rows_of(70, 1)].concat(), EXPECTED_MIX);
    let bucketed = RowOrder::bucketed(options, &[40, 24], 2, |row| (row % 3 == 0) as usize).unwrap();
    assert_eq!([bucketed.rows_of(0, 0), bucketed.rows_of(9, 1)].concat(), EXPECTED_BUCKETS);
}

const EXPECTED_MIX: [(usize, u64); 8] = [(0, 6), (0, 63), (0, 61), (1, 20), (1, 35), (0, 18), (0, 19), (0, 28)];
const EXPECTED_BUCKETS: [(usize, u64); 8] = [(0, 16), (0, 17), (0, 5), (0, 20), (0, 51), (0, 54), (0, 60), (0, 63)];

#[test]
fn equal_sources_are_not_read_in_step() {
    let options = ScheduleOptions { seed: 1, lanes: 1, micro_batch: 64, range_rows: 8, shuffle_window_rows: 64 };
    let order = mix(options, &[(1.0, vec![64]), (1.0, vec![64])]).unwrap();
    let of = |source| {
        order.rows_of(0, 0).into_iter().filter(|(s, _)| *s == source).map(|(_, row)| row).take(20).collect::<Vec<_>>()
    };
    assert_ne!(of(0), of(1));
}

#[test]
fn impossible_mixes_are_refused_with_the_key() {
    let options = ScheduleOptions { seed: 1, lanes: 8, micro_batch: 1, range_rows: 8, shuffle_window_rows: 8 };
    let error = mix(options, &[(1.0, vec![64]), (0.0, vec![64])]).unwrap_err().to_string();
    assert!(error.contains("data.mix[1].weight"), "{error}");
    let error = mix(options, &[(1.0, vec![64]), (1.0, vec![3, 4])]).unwrap_err().to_string();
    assert!(error.contains("data.mix[1]") && error.contains("7 rows for 8 lanes"), "{error}");
    let error = RowOrder::bucketed(options, &[14], 2, |row| row as usize % 2).unwrap_err().to_string();
    assert!(error.contains("none of the 2 shapes") && error.contains("8 rows"), "{error}");
}
