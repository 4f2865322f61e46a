//! Properties of the order of rows over random row groups, lanes, ranks and resume points. `PROPTEST_CASES` sets how many.
#![allow(clippy::unwrap_used)]
use std::collections::HashSet;
use std::ops::Range;
use std::sync::Arc;

use object_store::path::Path;
use proptest::prelude::*;
use stores::testing::Tampered;

use crate::testing::{Faulty, put_bytes, samples, write};
use crate::{
    Columns, Flip, LaneSchedule, LatentDataset, MicroBatchStream, PlainMemory, ScheduleOptions, StreamOptions,
    StreamSource, WriterOptions,
};

/// `cases` unless the environment says otherwise; failures are printed with their input, not kept in files.
pub(crate) fn cases(cases: u32) -> ProptestConfig {
    let cases = std::env::var("PROPTEST_CASES").ok().and_then(|text| text.parse().ok()).unwrap_or(cases);
    ProptestConfig { cases, failure_persistence: None, ..ProptestConfig::default() }
}

pub(crate) fn options() -> impl Strategy<Value = ScheduleOptions> {
    (any::<u64>(), 0..4u32, 1..6usize, 1..24usize, 1..40usize).prop_map(
        |(seed, lanes_log2, micro_batch, range_rows, shuffle_window_rows)| ScheduleOptions {
            seed,
            lanes: 1 << lanes_log2,
            micro_batch,
            range_rows,
            shuffle_window_rows,
        },
    )
}

proptest! {
    #![proptest_config(cases(256))]

    #[test]
    fn a_row_comes_at_most_once_an_epoch_and_exactly_once_where_the_counts_divide(
        options in options(),
        groups in prop::collection::vec(0..50u64, 0..9),
        epoch in 0..1000u64,
    ) {
        let rows: u64 = groups.iter().sum();
        let global_batch = (options.lanes * options.micro_batch) as u64;
        let schedule = match LaneSchedule::new(options, &groups) {
            Ok(schedule) => schedule,
            Err(error) => {
                prop_assert!(rows < global_batch, "{error}");
                return Ok(());
            }
        };
        let steps = schedule.steps_per_epoch();
        prop_assert_eq!(steps, rows / global_batch);
        let mut read = HashSet::new();
        for step in epoch * steps..(epoch + 1) * steps {
            for lane in 0..options.lanes {
                for row in schedule.rows_of(step, lane) {
                    prop_assert!(row < rows && read.insert(row), "row {} at step {} lane {}", row, step, lane);
                }
            }
        }
        prop_assert_eq!(read.len() as u64, rows / global_batch * global_batch);
    }
}

/// Files in a store: the rows of each and the rows of its row groups.
fn files() -> impl Strategy<Value = Vec<(usize, usize)>> {
    prop::collection::vec((0..60usize, 1..30usize), 1..4)
}

fn store_of(files: &[(usize, usize)]) -> (Arc<Tampered<Faulty>>, Arc<LatentDataset>) {
    let store = Arc::new(Tampered::<Faulty>::default());
    let folder = tempfile::tempdir().unwrap();
    let mut rows = samples(files.iter().map(|file| file.0).sum(), &WriterOptions::new(vec![1, 1, 2]));
    for (number, &(count, row_group_rows)) in files.iter().enumerate() {
        let later = rows.split_off(count);
        let path = folder.path().join(format!("{number}.parquet"));
        write(&path, WriterOptions { row_group_rows, ..WriterOptions::new(vec![1, 1, 2]) }, &rows);
        put_bytes(&store.inner, &format!("set/{number}.parquet"), std::fs::read(&path).unwrap());
        rows = later;
    }
    let dataset = LatentDataset::open_in(store.clone(), Path::from("set"), &Columns::default()).unwrap();
    (store, Arc::new(dataset))
}

/// The row groups whose bytes were asked for.
fn groups_read(store: &Tampered<Faulty>, dataset: &LatentDataset) -> HashSet<usize> {
    let requests = store.tamper.take_requests();
    let asked = |(at, group): (usize, &crate::RowGroup)| {
        let footer = &dataset.files[group.file];
        let columns = footer.metadata.metadata().row_group(group.index_in_file).columns();
        let overlaps = |range: &Range<u64>| {
            columns.iter().any(|column| {
                let (start, length) = column.byte_range();
                range.start < start + length && start < range.end
            })
        };
        requests.iter().any(|(path, range)| *path == footer.file.path && overlaps(range)).then_some(at)
    };
    dataset.row_groups().iter().enumerate().filter_map(asked).collect()
}

proptest! {
    #![proptest_config(cases(48))]

    #[test]
    fn every_world_size_and_resume_reads_the_same_rows_and_only_the_row_groups_of_its_lanes(
        options in options(),
        files in files(),
        resume in 0..12u64,
        steps in 1..12u64,
    ) {
        prop_assume!(files.iter().any(|file| file.0 > 0));
        let (store, dataset) = store_of(&files);
        let Ok(schedule) = dataset.schedule(options) else { return Ok(()) };
        let end = resume + steps;
        let sources = vec![StreamSource { dataset: dataset.clone(), scaling_factor: 1.0 }];
        for ranks_log2 in 0..=options.lanes.ilog2() {
            let lanes_of_rank = options.lanes >> ranks_log2;
            for first_lane in (0..options.lanes).step_by(lanes_of_rank) {
                let lanes = first_lane..first_lane + lanes_of_rank;
                store.tamper.take_requests();
                let of_stream = StreamOptions {
                    threads: 2,
                    prefetch_bytes: 1 << 20, flip: Flip::Never, num_classes: Some(10), captions: None, allocator: &PlainMemory,
                };
                let mut stream =
                    MicroBatchStream::start(sources.clone(), schedule.clone(), lanes.clone(), resume, end, of_stream).unwrap();
                for step in resume..end {
                    for lane in lanes.clone() {
                        let batch = stream.next().unwrap();
                        prop_assert_eq!((batch.step, batch.lane), (step, lane));
                        prop_assert_eq!(&batch.rows, &schedule.rows_of(step, lane));
                    }
                }
                drop(stream);
                let mut allowed = HashSet::new();
                for lane in lanes {
                    allowed.extend(rows_left(&schedule, lane, resume..end).into_iter().map(|row| dataset.group_of(row)));
                }
                let read = groups_read(&store, &dataset);
                prop_assert!(read.is_subset(&allowed), "{:?} of {:?}", read, allowed);
            }
        }
    }
}

/// The rows from the first of `steps` to the end of the lane's window that the last is in.
fn rows_left(schedule: &LaneSchedule, lane: usize, steps: Range<u64>) -> Vec<u64> {
    let last = schedule.positions(steps.end - 1);
    let (_, window) = schedule.window_of(last.end - 1);
    let later = (window.end - last.end).div_ceil(last.end - last.start);
    (steps.start..steps.end + later).flat_map(|step| schedule.rows_of(step, lane)).collect()
}
