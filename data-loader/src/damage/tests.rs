#![allow(clippy::unwrap_used)]
use std::path::Path;

use super::*;
use crate::testing::{Mode, faulty_dataset, samples, write};
use crate::{
    CaptionMeta, CaptionOptions, Columns, Dtype, Flip, MicroBatchStream, PlainMemory, ScheduleOptions, StreamOptions,
    StreamSource, WriterOptions,
};

const ROWS: usize = 150;

/// 150 rows in row groups of 16; those of `broken` have a flipped bit, or a number that is none.
fn data_set(folder: &Path, broken: &[usize]) -> Arc<LatentDataset> {
    damaged(folder, broken, "latent", None)
}

/// The same in a column of choice, with captions if wanted.
fn damaged(folder: &Path, broken: &[usize], column: &str, captions: Option<CaptionMeta>) -> Arc<LatentDataset> {
    let options = WriterOptions { moments: false, captions, row_group_rows: 16, ..WriterOptions::new(vec![1, 2, 2]) };
    let path = folder.join("a.parquet");
    write(&path, options.clone(), &samples(ROWS, &options));
    let sound = open(folder);
    let mut bytes = std::fs::read(&path).unwrap();
    for group in broken {
        // The data page begins with its header; what is changed lies behind it.
        let columns = sound.files[0].metadata.metadata().row_group(*group).columns();
        let chunk = columns.iter().find(|chunk| chunk.column_path().parts()[0] == column).unwrap();
        let (start, length) = chunk.byte_range();
        let (start, length) = (start as usize, length as usize);
        if group % 2 == 0 {
            bytes[start..start + 8].fill(0xff);
        } else {
            // f16 infinity.
            bytes[start + length - 8..start + length - 6].copy_from_slice(&0x7c00u16.to_le_bytes());
        }
    }
    std::fs::write(&path, bytes).unwrap();
    open(folder)
}

fn open(folder: &Path) -> Arc<LatentDataset> {
    Arc::new(LatentDataset::open(folder.to_str().unwrap(), &Columns::default()).unwrap())
}

type Read = Vec<(u64, usize, Vec<u64>, Vec<f32>, Vec<usize>)>;

/// What lanes read at steps: rows, latents and the broken row groups that they had to do with.
fn read(
    dataset: &Arc<LatentDataset>,
    lanes: std::ops::Range<usize>,
    steps: std::ops::Range<u64>,
    damage: &Arc<Damage>,
) -> Result<Read, DataError> {
    read_with(dataset, lanes, steps, damage, None)
}

/// The same, with captions if wanted.
fn read_with(
    dataset: &Arc<LatentDataset>,
    lanes: std::ops::Range<usize>,
    steps: std::ops::Range<u64>,
    damage: &Arc<Damage>,
    captions: Option<CaptionOptions>,
) -> Result<Read, DataError> {
    let options = ScheduleOptions { seed: 5, lanes: 4, micro_batch: 4, range_rows: 8, shuffle_window_rows: 12 };
    let of_stream = StreamOptions {
        prefetch_bytes: 1 << 20,
        flip: Flip::Never,
        num_classes: Some(10),
        threads: 2,
        captions,
        allocator: &PlainMemory,
    };
    let sources = vec![StreamSource { dataset: dataset.clone(), scaling_factor: 1.0 }];
    let order = dataset.schedule(options).unwrap();
    let count = lanes.len() * (steps.end - steps.start) as usize;
    let mut stream =
        MicroBatchStream::start_skipping(sources, order, lanes, steps, of_stream, Some(damage.clone())).unwrap();
    let mut next = || {
        let batch = stream.next()?;
        let broken = batch.broken.iter().map(|broken| broken.group).collect();
        Ok((batch.step, batch.lane, batch.rows.clone(), batch.x_start.to_f32(), broken))
    };
    (0..count).map(|_| next()).collect()
}

fn fresh(budget_rows: u64) -> Arc<Damage> {
    Arc::new(Damage::new(5, Some(budget_rows), []))
}

#[test]
fn rows_of_broken_row_groups_are_replaced_alike_on_every_rank_and_after_every_resume() {
    let folder = tempfile::tempdir().unwrap();
    let sound = read(&data_set(folder.path(), &[]), 0..4, 0..30, &fresh(0)).unwrap();
    let dataset = data_set(folder.path(), &[2, 5]);
    let whole = read(&dataset, 0..4, 0..30, &fresh(32)).unwrap();
    let is_broken = |row: u64| [2, 5].contains(&dataset.group_of(row));
    let mut replaced = 0;
    for ((step, lane, rows, latents, broken), sound) in whole.iter().zip(&sound) {
        assert_eq!((step, lane), (&sound.0, &sound.1));
        for (i, (row, planned)) in rows.iter().zip(&sound.2).enumerate() {
            assert!(!is_broken(*row));
            assert!(is_broken(*planned) || row == planned);
            assert!(!is_broken(*planned) || broken.contains(&dataset.group_of(*planned)));
            replaced += usize::from(is_broken(*planned));
            if !is_broken(*planned) {
                assert_eq!(latents[i * 4..][..4], sound.3[i * 4..][..4]);
            }
        }
        assert!(!broken.is_empty() || *rows == sound.2);
    }
    // Four epochs or so of 32 rows of 150.
    assert!((80..150).contains(&replaced), "{replaced}");
    for (lanes, first) in [(0..1, 0), (2..4, 0), (0..4, 7), (3..4, 23)] {
        let expected: Read = whole.iter().filter(|r| lanes.contains(&r.1) && r.0 >= first).cloned().collect();
        assert_eq!(read(&dataset, lanes, first..30, &fresh(32)).unwrap(), expected);
    }
    // A repaired file makes no difference to a run that has agreed.
    let known: Vec<BrokenGroup> = fresh_broken(&dataset);
    let repaired = data_set(folder.path(), &[]);
    for budget in [Some(32), None] {
        let damage = Arc::new(Damage::new(5, budget, known.clone()));
        assert_eq!(read(&repaired, 0..4, 0..30, &damage).unwrap(), whole);
    }
}

/// The broken row groups of a data set, as a run finds them.
fn fresh_broken(dataset: &Arc<LatentDataset>) -> Vec<BrokenGroup> {
    let damage = fresh(ROWS as u64);
    read(dataset, 0..4, 0..30, &damage).unwrap();
    let verdicts = damage.lock();
    let broken = |verdict: &Verdict| match verdict {
        Verdict::Broken(broken) => Some((**broken).clone()),
        Verdict::Sound => None,
    };
    verdicts.values().filter_map(broken).collect()
}

#[test]
fn what_is_wrong_is_told_and_the_budget_holds() {
    let folder = tempfile::tempdir().unwrap();
    let dataset = data_set(folder.path(), &[2, 5]);
    let found = fresh_broken(&dataset);
    let told: Vec<_> = found.iter().map(|group| (group.group, group.row_group, group.rows)).collect();
    assert_eq!(told, [(2, 2, 16), (5, 5, 16)]);
    assert!(found.iter().all(|group| group.file.ends_with("a.parquet")));
    assert!(found[1].reason.contains("inf at position"), "{}", found[1].reason);
    let error = read(&dataset, 0..4, 0..30, &fresh(31)).unwrap_err().to_string();
    assert!(error.contains("32 rows") && error.contains("row group 2") && error.contains("row group 5"), "{error}");
    assert!(error.contains("data.skip_budget_rows"), "{error}");
    // Without a budget nothing is judged: what cannot be decoded is an error.
    let error = read(&dataset, 0..4, 0..30, &Arc::new(Damage::new(5, None, []))).unwrap_err().to_string();
    assert!(error.contains("row group 2"), "{error}");
}

#[test]
fn captions_are_judged_where_they_are_read() {
    let folder = tempfile::tempdir().unwrap();
    // A number at the end of the page lies in the last row's second caption.
    let meta = CaptionMeta { dim: 3, most_tokens: None, per_row: None, dtype: Dtype::F16, masked: true };
    let captions = || Some(CaptionOptions { tokens: 4, weights: Vec::new() });
    let sound = damaged(folder.path(), &[], "latent", Some(meta));
    let expected = read_with(&sound, 0..4, 0..30, &fresh(0), captions()).unwrap();
    for (column, broken) in [("caption_embedding", &[0, 5][..]), ("caption_mask", &[4])] {
        let dataset = damaged(folder.path(), broken, column, Some(meta));
        let rows = 16 * broken.len() as u64;
        let read = read_with(&dataset, 0..4, 0..30, &fresh(rows), captions()).unwrap();
        let is_broken = |row: u64| broken.contains(&dataset.group_of(row));
        for (found, planned) in read.iter().zip(&expected) {
            for (row, planned) in found.2.iter().zip(&planned.2) {
                assert!(!is_broken(*row) && (row == planned || is_broken(*planned)), "{column}");
            }
        }
        assert_eq!(read_with(&dataset, 2..4, 7..30, &fresh(rows), captions()).unwrap(), {
            let is_there = |read: &&(u64, usize, Vec<u64>, Vec<f32>, Vec<usize>)| read.1 >= 2 && read.0 >= 7;
            read.iter().filter(is_there).cloned().collect::<Read>()
        });
        let error = read_with(&dataset, 0..4, 0..30, &fresh(rows - 1), captions()).unwrap_err().to_string();
        assert!(error.contains(&format!("row group {}", broken[0])), "{error}");
        // Nobody looks at captions that are not read.
        assert_eq!(read_with(&dataset, 0..4, 0..30, &fresh(0), None).unwrap(), expected, "{column}");
    }
}

#[test]
fn errors_of_the_store_are_no_damage() {
    let (store, dataset) = faulty_dataset();
    store.tamper.mode.store(Mode::Fail as u8, std::sync::atomic::Ordering::SeqCst);
    let damage = fresh(1000);
    let error = read(&dataset, 0..4, 0..3, &damage).unwrap_err();
    assert!(!error.is_damage(), "{error}");
    assert!(damage.lock().is_empty());
    let folder = tempfile::tempdir().unwrap();
    let local = data_set(folder.path(), &[]);
    std::fs::remove_file(folder.path().join("a.parquet")).unwrap();
    let error = read(&local, 0..4, 0..3, &damage).unwrap_err();
    assert!(!error.is_damage(), "{error}");
}

#[test]
fn what_others_found_is_taken_over_and_a_contradiction_is_told() {
    let folder = tempfile::tempdir().unwrap();
    let dataset = data_set(folder.path(), &[]);
    let group =
        |group| BrokenGroup { source: 0, group, file: "f".into(), row_group: group, rows: 16, reason: "r".into() };
    let damage = fresh(1000);
    assert!(damage.adopt([group(3)]));
    assert!(damage.adopt([group(3)]), "known");
    let rows = read(&dataset, 0..4, 0..9, &damage).unwrap();
    assert!(rows.iter().all(|read| read.2.iter().all(|row| dataset.group_of(*row) != 3)));
    assert!(!damage.adopt([group(4)]), "its rows were read as sound");
}
