#![allow(clippy::unwrap_used)]
use std::sync::atomic::Ordering;

use super::*;
use crate::testing::{FaultyStore, Mode, samples, write};
use crate::{Columns, Dtype, RowRun, ScheduleOptions, WriterOptions};

const OPTIONS: StreamOptions = StreamOptions {
    prefetch_bytes: 1 << 20,
    flip: true,
    scaling_factor: 1.25,
    num_classes: Some(10),
    allocator: &PlainMemory,
};

/// What a micro-batch says, to compare.
#[derive(Clone, Debug, PartialEq)]
struct Said {
    step: u64,
    lane: usize,
    x_start: Vec<f32>,
    labels: Vec<i64>,
    rows: Vec<u64>,
}

impl Said {
    fn by(batch: &MicroBatch) -> Self {
        let MicroBatch { step, lane, x_start, labels, rows } = batch;
        Self { step: *step, lane: *lane, x_start: x_start.to_f32(), labels: labels.clone(), rows: rows.clone() }
    }
}

/// 150 rows in row groups of 40, four numbers each, with moments and mirrored moments.
fn dataset(folder: &tempfile::TempDir) -> Arc<LatentDataset> {
    let options =
        WriterOptions { dtype: Dtype::F16, flipped: true, row_group_rows: 40, ..WriterOptions::new(vec![1, 2, 2]) };
    write(&folder.path().join("a.parquet"), options.clone(), &samples(150, &options));
    Arc::new(LatentDataset::open(folder.path().to_str().unwrap(), &Columns::default()).unwrap())
}

/// Windows of 10 rows, which micro-batches of 4 straddle; 9 steps an epoch.
fn schedule(dataset: &LatentDataset) -> LaneSchedule {
    dataset
        .schedule(ScheduleOptions { seed: 5, lanes: 4, micro_batch: 4, range_rows: 16, shuffle_window_rows: 10 })
        .unwrap()
}

fn take(dataset: &Arc<LatentDataset>, lanes: Range<usize>, steps: Range<u64>, options: StreamOptions) -> Vec<Said> {
    let count = lanes.len() * (steps.end - steps.start) as usize;
    let mut stream =
        MicroBatchStream::start(dataset.clone(), schedule(dataset), lanes, steps.start, steps.end, options).unwrap();
    let batches = (0..count)
        .map(|_| {
            let batch = stream.next().unwrap();
            let said = Said::by(&batch);
            stream.recycle(batch);
            said
        })
        .collect();
    assert!(matches!(stream.next(), Err(DataError::EndOfStream { end_step }) if end_step == steps.end));
    batches
}

#[test]
fn micro_batches_are_what_the_schedule_and_the_draws_say() {
    let folder = tempfile::tempdir().unwrap();
    let dataset = dataset(&folder);
    let schedule = schedule(&dataset);
    let batches = take(&dataset, 0..4, 0..30, OPTIONS);
    let mut flips_seen = [0; 2];
    for (index, batch) in batches.iter().enumerate() {
        assert_eq!((batch.step, batch.lane), (index as u64 / 4, index % 4));
        assert_eq!(batch.rows, schedule.rows_of(batch.step, batch.lane));
        let mut eps = [0f32; 16];
        fill_normal(Key::new(5, Purpose::Posterior, batch.step).lane(batch.lane), &mut eps);
        let mut flips = Key::new(5, Purpose::Flip, batch.step).lane(batch.lane).rng();
        for i in 0..4 {
            let row = dataset.read(&[RowRun { first_row: batch.rows[i], rows: 1 }]).unwrap();
            assert_eq!(batch.labels[i], row.labels()[0]);
            let flipped = flips.next_u32() >= 1 << 31;
            flips_seen[usize::from(flipped)] += 1;
            let (mut mean, mut logvar) = ([0f32; 4], [0f32; 4]);
            row.latent(if flipped { 2 } else { 0 }, 0, &mut mean);
            row.latent(if flipped { 3 } else { 1 }, 0, &mut logvar);
            for at in 0..4 {
                let expected = (mean[at] + (0.5 * logvar[at].clamp(-30.0, 20.0)).exp() * eps[i * 4 + at]) * 1.25;
                assert_eq!(
                    batch.x_start[i * 4 + at].to_bits(),
                    expected.to_bits(),
                    "step {} lane {} row {i}",
                    batch.step,
                    batch.lane
                );
            }
        }
    }
    assert!(flips_seen.iter().all(|&seen| seen > 150), "{flips_seen:?} of 480");
}

#[test]
fn a_lane_reads_the_same_on_any_rank_and_after_any_resume() {
    let folder = tempfile::tempdir().unwrap();
    let dataset = dataset(&folder);
    let whole = take(&dataset, 0..4, 0..25, OPTIONS);
    for (lanes, first_step) in [(0..1, 0), (2..4, 0), (0..4, 7), (1..2, 9), (3..4, 23)] {
        let expected: Vec<_> =
            whole.iter().filter(|batch| lanes.contains(&batch.lane) && batch.step >= first_step).cloned().collect();
        assert_eq!(
            take(&dataset, lanes.clone(), first_step..25, OPTIONS),
            expected,
            "lanes {lanes:?} from {first_step}"
        );
    }
    let plain = take(&dataset, 0..4, 0..25, StreamOptions { flip: false, ..OPTIONS });
    assert!(plain.iter().zip(&whole).all(|(plain, flipped)| plain.rows == flipped.rows));
    assert_ne!(plain, whole);
}

#[test]
fn the_queue_holds_no_more_bytes_than_allowed_but_always_one() {
    let folder = tempfile::tempdir().unwrap();
    let dataset = dataset(&folder);
    let one = 4 * 4 * 4 + 4 * 8 + 4 * 8;
    for (prefetch_bytes, most) in [(3 * one, 3), (0, 1)] {
        let options = StreamOptions { prefetch_bytes, ..OPTIONS };
        let mut stream =
            MicroBatchStream::start(dataset.clone(), schedule(&dataset), 0..4, 0, u64::MAX, options).unwrap();
        for _ in 0..200 {
            // Only the producer fills, so this ends once it has caught up.
            while stream.shared.lock().ready.len() < most {
                std::thread::yield_now();
            }
            assert_eq!(stream.shared.lock().ready.len(), most);
            stream.next().unwrap();
        }
    }
}

#[test]
fn a_label_that_is_no_class_comes_out_of_next_with_its_row_and_ends_the_stream() {
    let folder = tempfile::tempdir().unwrap();
    let dataset = dataset(&folder);
    let options = StreamOptions { num_classes: Some(9), ..OPTIONS };
    let mut stream = MicroBatchStream::start(dataset.clone(), schedule(&dataset), 0..4, 0, 9, options).unwrap();
    let error = std::iter::repeat_with(|| stream.next()).find_map(Result::err).unwrap().to_string();
    assert!(error.contains("a.parquet") && error.contains("`label` is 9") && error.contains("0..9"), "{error}");
    assert!(matches!(stream.next(), Err(DataError::Stopped)));
}

#[test]
fn store_errors_and_panics_come_out_of_next() {
    for (mode, words) in [(Mode::Fail, "injected failure"), (Mode::Panic, "injected panic")] {
        let (store, dataset) = FaultyStore::dataset();
        store.mode.store(mode as u8, Ordering::SeqCst);
        let mut stream = MicroBatchStream::start(
            dataset.clone(),
            schedule(&dataset),
            0..4,
            0,
            9,
            StreamOptions { flip: false, ..OPTIONS },
        )
        .unwrap();
        let error = stream.next().unwrap_err().to_string();
        assert!(error.contains(words) && error.contains("set/a.parquet"), "{error}");
        assert!(matches!(stream.next(), Err(DataError::Stopped)));
    }
}

#[test]
fn dropping_the_stream_does_not_wait_for_a_request_that_hangs() {
    let (store, dataset) = FaultyStore::dataset();
    store.mode.store(Mode::Hang as u8, Ordering::SeqCst);
    let stream = MicroBatchStream::start(
        dataset.clone(),
        schedule(&dataset),
        0..4,
        0,
        9,
        StreamOptions { flip: false, ..OPTIONS },
    )
    .unwrap();
    while store.hanging.load(Ordering::SeqCst) == 0 {
        std::thread::yield_now();
    }
    drop(stream);
    assert_eq!(Arc::strong_count(&dataset), 1, "the thread has gone and let go of the data set");
}

#[test]
fn requests_that_cannot_be_met_are_refused_at_the_start() {
    let (_, plain) = FaultyStore::dataset();
    let start = |lanes, options| {
        MicroBatchStream::start(plain.clone(), schedule(&plain), lanes, 0, 9, options).unwrap_err().to_string()
    };
    assert!(start(0..4, OPTIONS).contains("data.flip"));
    let options = StreamOptions { flip: false, ..OPTIONS };
    assert!(start(3..5, options).contains("lanes 3..5"));
    assert!(start(0..4, StreamOptions { scaling_factor: f64::NAN, ..options }).contains("NaN"));
    let folder = tempfile::tempdir().unwrap();
    let other = LaneSchedule::new(*schedule(&plain).options(), &[64]).unwrap();
    let error = MicroBatchStream::start(dataset(&folder), other, 0..4, 0, 9, options).unwrap_err().to_string();
    assert!(error.contains("64 rows") && error.contains("150"), "{error}");
}
