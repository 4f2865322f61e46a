#![allow(clippy::unwrap_used)]
use std::sync::atomic::Ordering;

use rand::Rng;

use super::*;
use crate::draws::{Key, Purpose, fill_normal};
use crate::testing::{Mode, captions, faulty_dataset, samples, write};
use crate::{CaptionMeta, Columns, Dtype, LaneSchedule, MixedSource, RowRun, ScheduleOptions, WriterOptions};

const OPTIONS: StreamOptions = StreamOptions {
    prefetch_bytes: 1 << 20,
    flip: Flip::Stored,
    num_classes: Some(10),
    threads: 2,
    captions: None,
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
        let MicroBatch { step, lane, x_start, labels, rows, .. } = batch;
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

fn sources(dataset: &Arc<LatentDataset>) -> Vec<StreamSource> {
    vec![StreamSource { dataset: dataset.clone(), scaling_factor: 1.25 }]
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
        MicroBatchStream::start(sources(dataset), schedule(dataset), lanes, steps.start, steps.end, options).unwrap();
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
    let plain = take(&dataset, 0..4, 0..25, StreamOptions { flip: Flip::Never, ..OPTIONS });
    assert!(plain.iter().zip(&whole).all(|(plain, flipped)| plain.rows == flipped.rows));
    assert_ne!(plain, whole);
}

#[test]
fn the_queue_holds_no_more_bytes_than_allowed_but_always_one() {
    let folder = tempfile::tempdir().unwrap();
    let dataset = dataset(&folder);
    let one = 4 * 4 * 4 + 4 * ROW_BYTES;
    for (prefetch_bytes, most) in [(3 * one, 3), (0, 1)] {
        let options = StreamOptions { prefetch_bytes, ..OPTIONS };
        let mut stream =
            MicroBatchStream::start(sources(&dataset), schedule(&dataset), 0..4, 0, u64::MAX, options).unwrap();
        for _ in 0..200 {
            // Only the producer fills, so this ends once it has caught up.
            while stream.context.queue.ready() < most {
                std::thread::yield_now();
            }
            assert_eq!(stream.context.queue.ready(), most);
            stream.next().unwrap();
        }
    }
}

#[test]
fn a_label_that_is_no_class_comes_out_of_next_with_its_row_and_ends_the_stream() {
    let folder = tempfile::tempdir().unwrap();
    let dataset = dataset(&folder);
    let options = StreamOptions { num_classes: Some(9), ..OPTIONS };
    let mut stream = MicroBatchStream::start(sources(&dataset), schedule(&dataset), 0..4, 0, 9, options).unwrap();
    let error = std::iter::repeat_with(|| stream.next()).find_map(Result::err).unwrap().to_string();
    assert!(error.contains("a.parquet") && error.contains("`label` is 9") && error.contains("0..9"), "{error}");
    assert!(matches!(stream.next(), Err(DataError::Stopped)));
}

#[test]
fn store_errors_and_panics_come_out_of_next() {
    for (mode, words) in [(Mode::Fail, "injected failure"), (Mode::Panic, "injected panic")] {
        let (store, dataset) = faulty_dataset();
        store.tamper.mode.store(mode as u8, Ordering::SeqCst);
        let mut stream = MicroBatchStream::start(
            sources(&dataset),
            schedule(&dataset),
            0..4,
            0,
            9,
            StreamOptions { flip: Flip::Never, ..OPTIONS },
        )
        .unwrap();
        let error = stream.next().unwrap_err().to_string();
        assert!(error.contains(words) && error.contains("set/a.parquet"), "{error}");
        assert!(matches!(stream.next(), Err(DataError::Stopped)));
    }
}

#[test]
fn dropping_the_stream_does_not_wait_for_a_request_that_hangs() {
    let (store, dataset) = faulty_dataset();
    store.tamper.mode.store(Mode::Hang as u8, Ordering::SeqCst);
    let stream = MicroBatchStream::start(
        sources(&dataset),
        schedule(&dataset),
        0..4,
        0,
        9,
        StreamOptions { flip: Flip::Never, ..OPTIONS },
    )
    .unwrap();
    while store.tamper.hanging.load(Ordering::SeqCst) == 0 {
        std::thread::yield_now();
    }
    drop(stream);
    assert_eq!(Arc::strong_count(&dataset), 1, "the thread has gone and let go of the data set");
}

#[test]
fn requests_that_cannot_be_met_are_refused_at_the_start() {
    let (_, plain) = faulty_dataset();
    let start = |sources, lanes, options| {
        MicroBatchStream::start(sources, schedule(&plain), lanes, 0, 9, options).unwrap_err().to_string()
    };
    assert!(start(sources(&plain), 0..4, OPTIONS).contains("data.flip"));
    let options = StreamOptions { flip: Flip::Never, ..OPTIONS };
    assert!(start(sources(&plain), 3..5, options.clone()).contains("lanes [3, 4]"));
    let unscaled = StreamSource { dataset: plain.clone(), scaling_factor: f64::NAN };
    assert!(start(vec![unscaled], 0..4, options.clone()).contains("NaN"));
    assert!(start([sources(&plain), sources(&plain)].concat(), 0..4, options.clone()).contains("2 data sets"));
    let folder = tempfile::tempdir().unwrap();
    let other = LaneSchedule::new(*schedule(&plain).options(), &[64]).unwrap();
    let started = MicroBatchStream::start(sources(&dataset(&folder)), other, 0..4, 0, 9, options);
    let error = started.unwrap_err().to_string();
    assert!(error.contains("64 rows") && error.contains("150"), "{error}");
}

#[test]
fn a_latent_that_is_mirrored_itself_has_the_flips_of_a_stored_one() {
    for moments in [true, false] {
        let folder = tempfile::tempdir().unwrap();
        let options = WriterOptions { moments, row_group_rows: 40, ..WriterOptions::new(vec![1, 2, 3]) };
        write(&folder.path().join("a.parquet"), options.clone(), &samples(150, &options));
        let dataset = Arc::new(LatentDataset::open(folder.path().to_str().unwrap(), &Columns::default()).unwrap());
        let plain = take(&dataset, 0..4, 0..9, StreamOptions { flip: Flip::Never, ..OPTIONS });
        let flipped = take(&dataset, 0..4, 0..9, StreamOptions { flip: Flip::Latent, ..OPTIONS });
        let mut mirrored = 0;
        for (plain, flipped) in plain.iter().zip(&flipped) {
            let mut flips = Key::new(5, Purpose::Flip, plain.step).lane(plain.lane).rng();
            let mut eps = [0f32; 24];
            fill_normal(Key::new(5, Purpose::Posterior, plain.step).lane(plain.lane), &mut eps);
            for i in 0..4 {
                let flip = flips.next_u32() >> 31 == 1;
                mirrored += u32::from(flip);
                let row = dataset.read(&[RowRun { first_row: plain.rows[i], rows: 1 }]).unwrap();
                let (mut mean, mut logvar) = ([0f32; 6], [0f32; 6]);
                row.latent(0, 0, &mut mean);
                if moments {
                    row.latent(1, 0, &mut logvar);
                }
                for at in 0..6 {
                    let from = if flip { at / 3 * 3 + 2 - at % 3 } else { at };
                    let noise = if moments { (0.5 * logvar[from]).exp() * eps[i * 6 + at] } else { 0.0 };
                    assert_eq!(flipped.x_start[i * 6 + at], (mean[from] + noise) * 1.25);
                }
            }
        }
        assert!((40..104).contains(&mirrored), "{mirrored} of 144");
    }
}

/// Row `row` of source `source` of the mixes below.
fn mixed_latent(source: usize, row: u64, options: &WriterOptions) -> Vec<f32> {
    samples(row as usize + 1, options)[row as usize].latents[0].iter().map(|x| x + source as f32 * 0.25).collect()
}

#[test]
fn a_mix_gives_each_row_with_the_factor_of_its_source_on_any_rank_and_after_any_resume() {
    let folder = tempfile::tempdir().unwrap();
    let rows = [61u64, 40, 23];
    // Differing number types and factors; equal ones go to the device as they are stored.
    for (dtypes, factors, stored) in [
        ([Dtype::F16, Dtype::F32, Dtype::F16], [1.0f64, 0.5, 0.125], Dtype::F32),
        ([Dtype::F16; 3], [0.5; 3], Dtype::F16),
    ] {
        let mut sources = Vec::new();
        let mut mixed = Vec::new();
        for (number, dtype) in dtypes.into_iter().enumerate() {
            let options =
                WriterOptions { dtype, moments: false, row_group_rows: 16, ..WriterOptions::new(vec![1, 2, 2]) };
            let mut samples = samples(rows[number] as usize, &options);
            samples.iter_mut().for_each(|sample| sample.latents[0].iter_mut().for_each(|x| *x += number as f32 * 0.25));
            let path = folder.path().join(format!("{number}-{dtype}.parquet"));
            write(&path, options, &samples);
            let dataset = Arc::new(LatentDataset::open(path.to_str().unwrap(), &Columns::default()).unwrap());
            let row_group_rows = dataset.row_groups().iter().map(|group| group.rows).collect();
            mixed.push(MixedSource { weight: [0.6, 0.3, 0.1][number], row_group_rows });
            sources.push(StreamSource { dataset, scaling_factor: factors[number] });
        }
        let options = ScheduleOptions { seed: 5, lanes: 4, micro_batch: 4, range_rows: 16, shuffle_window_rows: 10 };
        let order = RowOrder::mixed(options, &mixed).unwrap();
        let of_writer = WriterOptions::new(vec![1, 2, 2]);
        for (lanes, steps) in [(0..4, 0..40), (2..4, 17..40), (1..2, 39..40)] {
            let plain = StreamOptions { flip: Flip::Never, ..OPTIONS };
            let mut stream =
                MicroBatchStream::start(sources.clone(), order.clone(), lanes.clone(), steps.start, steps.end, plain)
                    .unwrap();
            for (step, lane) in steps.flat_map(|step| lanes.clone().map(move |lane| (step, lane))) {
                let batch = stream.next().unwrap();
                assert_eq!((batch.step, batch.lane, batch.x_start.dtype()), (step, lane, stored));
                let read: Vec<_> =
                    batch.sources.iter().map(|source| *source as usize).zip(batch.rows.clone()).collect();
                assert_eq!(read, order.rows_of(step, lane));
                let latents = batch.x_start.to_f32();
                for ((source, row), latent) in read.into_iter().zip(latents.chunks(4)) {
                    let stored = mixed_latent(source, row, &of_writer);
                    let expected: Vec<f32> = stored.iter().map(|x| x * factors[source] as f32).collect();
                    assert_eq!(latent, expected, "source {source} row {row}");
                }
            }
        }
    }
}

#[test]
fn rows_of_many_shapes_come_in_micro_batches_of_one() {
    let folder = tempfile::tempdir().unwrap();
    // One row of a shape that no micro-batch can be made of.
    let shape = |row: usize| match (row, row % 7) {
        (50, _) => [1, 1, 1],
        (_, 0 | 2 | 5) => [1, 2, 2],
        (_, 1 | 4) => [1, 1, 3],
        _ => [1, 3, 1],
    };
    let path = folder.path().join("a.parquet");
    let options = WriterOptions { row_shapes: true, moments: false, row_group_rows: 16, ..WriterOptions::new(vec![1]) };
    let mut writer = crate::LatentWriter::create(&path, options).unwrap();
    for row in 0..150 {
        let latent: Vec<f32> = (0..shape(row).iter().product()).map(|i| (row * 4 + i) as f32).collect();
        writer
            .push_row(crate::Row {
                latents: &[&latent],
                shape: Some(&shape(row)),
                captions: &[],
                label: Some(1),
                id: &row.to_string(),
            })
            .unwrap();
    }
    writer.finish().unwrap();
    let dataset = Arc::new(LatentDataset::open(path.to_str().unwrap(), &Columns::default()).unwrap());
    let options = ScheduleOptions { seed: 5, lanes: 2, micro_batch: 3, range_rows: 16, shuffle_window_rows: 10 };
    let order = dataset.order(options).unwrap();
    assert_eq!(order.left_out().len(), 1);
    let plain = StreamOptions { flip: Flip::Latent, ..OPTIONS };
    let mut seen = std::collections::HashSet::new();
    for (lanes, first) in [(0..2, 0), (1..2, 13)] {
        let sources = vec![StreamSource { dataset: dataset.clone(), scaling_factor: 1.0 }];
        let mut stream =
            MicroBatchStream::start(sources, order.clone(), lanes.clone(), first, 40, plain.clone()).unwrap();
        for (step, lane) in (first..40).flat_map(|step| lanes.clone().map(move |lane| (step, lane))) {
            let batch = stream.next().unwrap();
            let rows: Vec<u64> = order.rows_of(step, lane).into_iter().map(|(_, row)| row).collect();
            assert_eq!((batch.step, batch.lane, &batch.rows), (step, lane, &rows));
            let mut flips = Key::new(5, Purpose::Flip, step).lane(lane).rng();
            for (row, latent) in rows.iter().zip(batch.x_start.to_f32().chunks(batch.latent_shape.iter().product())) {
                assert_eq!(batch.latent_shape, shape(*row as usize));
                let mut expected: Vec<f32> = (0..latent.len()).map(|i| (*row as usize * 4 + i) as f32).collect();
                if flips.next_u32() >> 31 == 1 {
                    expected.chunks_mut(batch.latent_shape[2]).for_each(<[f32]>::reverse);
                }
                assert_eq!(latent, expected);
            }
            seen.insert(batch.latent_shape.clone());
            stream.recycle(batch);
        }
    }
    assert_eq!(seen.len(), 3);
}

#[test]
fn the_way_of_reading_and_the_number_of_threads_change_no_bit() {
    for (moments, flip) in
        [(true, Flip::Stored), (true, Flip::Latent), (false, Flip::Stored), (false, Flip::Latent), (false, Flip::Never)]
    {
        let folders = [tempfile::tempdir().unwrap(), tempfile::tempdir().unwrap()];
        let open = |zstd: bool| {
            let path = folders[usize::from(zstd)].path().join("a.parquet");
            let options =
                WriterOptions { moments, flipped: true, zstd, row_group_rows: 40, ..WriterOptions::new(vec![1, 2, 3]) };
            write(&path, options.clone(), &samples(150, &options));
            Arc::new(LatentDataset::open(path.to_str().unwrap(), &Columns::default()).unwrap())
        };
        let (plain, compressed) = (open(false), open(true));
        assert!(plain.direct.is_some() && compressed.direct.is_none());
        let expected = take(&compressed, 0..4, 0..25, StreamOptions { flip, threads: 1, ..OPTIONS });
        for dataset in [&plain, &compressed] {
            for threads in [1, 2, 5] {
                // From one micro-batch at a time to whole windows.
                for prefetch_bytes in [0, 2000, 1 << 20] {
                    let options = StreamOptions { flip, threads, prefetch_bytes, ..OPTIONS };
                    assert_eq!(take(dataset, 0..4, 0..25, options.clone()), expected);
                    let some: Vec<Said> =
                        expected.iter().filter(|said| said.lane == 2 && said.step >= 7).cloned().collect();
                    assert_eq!(take(dataset, 2..3, 7..25, options), some);
                }
            }
        }
    }
}

#[test]
fn captions_are_those_of_their_rows_however_they_are_read() {
    let folder = tempfile::tempdir().unwrap();
    let of = |per_row, masked| CaptionMeta {
        dim: 3,
        most_tokens: Some(5),
        per_row: Some(per_row),
        dtype: Dtype::F16,
        masked,
    };
    let metas = [of(2, true), of(1, false)];
    let rows = [61usize, 40];
    let open = |number: usize, zstd: bool| {
        let path = folder.path().join(format!("{number}-{zstd}.parquet"));
        let captions = Some(metas[number]);
        let options =
            WriterOptions { moments: false, captions, zstd, row_group_rows: 16, ..WriterOptions::new(vec![1, 2, 2]) };
        write(&path, options.clone(), &samples(rows[number], &options));
        let dataset = Arc::new(LatentDataset::open(path.to_str().unwrap(), &Columns::default()).unwrap());
        assert_eq!(dataset.direct.is_none(), zstd);
        StreamSource { dataset, scaling_factor: 1.0 }
    };
    let [direct, general] = [false, true].map(|zstd| vec![open(0, zstd), open(1, zstd)]);
    let mixed = |source: &StreamSource| MixedSource {
        weight: 0.5,
        row_group_rows: source.dataset.row_groups().iter().map(|group| group.rows).collect(),
    };
    let options = ScheduleOptions { seed: 5, lanes: 4, micro_batch: 4, range_rows: 16, shuffle_window_rows: 10 };
    let order = RowOrder::mixed(options, &direct.iter().map(mixed).collect::<Vec<_>>()).unwrap();
    let take = |sources: &[StreamSource], lanes: Range<usize>, steps: Range<u64>, threads| {
        let count = lanes.len() * (steps.end - steps.start) as usize;
        let captions = Some(CaptionOptions { tokens: 4, weights: vec![0.75, 0.25] });
        let options = StreamOptions { flip: Flip::Never, threads, captions, ..OPTIONS };
        let mut stream =
            MicroBatchStream::start(sources.to_vec(), order.clone(), lanes, steps.start, steps.end, options).unwrap();
        let mut next = || {
            let batch = stream.next().unwrap();
            let said =
                (batch.step, batch.lane, batch.sources.clone(), batch.rows.clone(), batch.captions.clone().unwrap());
            stream.recycle(batch);
            said
        };
        (0..count).map(|_| next()).collect::<Vec<_>>()
    };
    let expected = take(&direct, 0..4, 0..30, 1);
    let mut chosen = [0; 2];
    for (_, _, sources, rows, batch) in &expected {
        assert_eq!((batch.tokens, batch.dim, batch.embeddings.len(), batch.mask.len()), (4, 3, 4 * 4 * 3, 4 * 4));
        for (i, (&source, &row)) in sources.iter().zip(rows).enumerate() {
            let found = (&batch.embeddings[i * 12..][..12], &batch.mask[i * 4..][..4]);
            let stored = captions(row as usize, &metas[source as usize]);
            let which = stored.iter().position(|(embeddings, mask)| {
                let (mut embeddings, mut mask) = (embeddings.clone(), mask.clone());
                embeddings.resize(12, 0.0);
                mask.resize(4, false);
                found == (&embeddings[..], &mask[..])
            });
            let which = which.unwrap_or_else(|| panic!("source {source} row {row}: {found:?}"));
            chosen[which] += usize::from(source == 0);
        }
    }
    // Of 240 rows.
    assert!(chosen[1] > 30 && chosen[0] > 2 * chosen[1], "{chosen:?}");
    for sources in [&direct, &general] {
        for threads in [1, 3] {
            assert_eq!(take(sources, 0..4, 0..30, threads), expected);
            let some: Vec<_> = expected.iter().filter(|said| said.1 >= 2 && said.0 >= 7).cloned().collect();
            assert_eq!(take(sources, 2..4, 7..30, threads), some);
        }
    }
}

#[test]
fn memory_is_used_again() {
    let folder = tempfile::tempdir().unwrap();
    let dataset = dataset(&folder);
    let one = 4 * 4 * 4 + 4 * ROW_BYTES;
    let options = StreamOptions { prefetch_bytes: 3 * one, ..OPTIONS };
    let mut stream =
        MicroBatchStream::start(sources(&dataset), schedule(&dataset), 0..4, 0, u64::MAX, options).unwrap();
    let mut seen = std::collections::HashSet::new();
    for _ in 0..500 {
        let batch = stream.next().unwrap();
        seen.insert((batch.x_start.bytes().as_ptr(), batch.labels.as_ptr() as usize, batch.rows.as_ptr() as usize));
        stream.recycle(batch);
    }
    assert!(seen.len() <= 4, "{} sets of buffers for at most three that wait and one in use", seen.len());
}

#[test]
fn a_file_that_is_cut_while_it_is_read_ends_the_stream_with_its_name() {
    let folder = tempfile::tempdir().unwrap();
    let dataset = dataset(&folder);
    let options = StreamOptions { prefetch_bytes: 0, ..OPTIONS };
    let mut stream =
        MicroBatchStream::start(sources(&dataset), schedule(&dataset), 0..4, 0, u64::MAX, options).unwrap();
    stream.next().unwrap();
    let path = folder.path().join("a.parquet");
    std::fs::OpenOptions::new().write(true).open(path).unwrap().set_len(1000).unwrap();
    let error = std::iter::repeat_with(|| stream.next()).find_map(Result::err).unwrap().to_string();
    // Which read meets the cut first, that of a row group's values or of its pages' places, is a matter of time.
    assert!(error.contains("a.parquet"), "{error}");
    assert!(matches!(stream.next(), Err(DataError::Stopped)));
}
