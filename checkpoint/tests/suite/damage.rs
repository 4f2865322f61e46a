//! Whatever happens to an object of a checkpoint, it is noticed, named, and the older checkpoint serves.

use crate::world::*;
use checkpoint::{CheckpointError, Manifest, RunStore, StoreOptions};
use std::{fs, time::Duration};

fn objects(manifest: &Manifest) -> Vec<String> {
    manifest.shards.iter().map(|shard| shard.key.clone()).chain([manifest.key()]).collect()
}

/// Runs `damage` on each object of the newest of two checkpoints in turn and restores it afterwards; with shards of one
/// object and of many.
fn each_object_in_turn(damage: impl Fn(&std::path::Path, &[u8])) {
    for part_bytes in [256 << 20, 60] {
        each_object_of(&file_run_of(part_bytes), &damage);
    }
}

fn each_object_of(run: &FileRun, damage: impl Fn(&std::path::Path, &[u8])) {
    let attempt = claim(&run.store, None);
    save(&run.store, attempt, 10);
    for key in objects(&save(&run.store, attempt, 20)) {
        let path = run.path.join(&key);
        let original = fs::read(&path).unwrap();
        damage(&path, &original);
        // A manifest that is not there is no commit at all: the one case in which nothing was damaged.
        let gone = key.contains("manifest") && !path.exists();
        let (manifest, damaged) = run.store.newest_valid().unwrap().unwrap();
        assert_eq!(manifest.step, 10, "{key}");
        match gone {
            true => assert_eq!(damaged, []),
            false => assert!(
                damaged.len() == 1 && damaged[0].step == 20 && damaged[0].reason.contains(&key),
                "{key}: {damaged:?}"
            ),
        }
        assert_holds(&run.store.read(&manifest), &small(), 10);
        // A rank's load notices by itself: it reads nothing that was not verified.
        let committed = run.store.committed().unwrap();
        if let (20, Ok(manifest)) = (committed[0].step, run.store.manifest(&committed[0])) {
            let reader = run.store.read(&manifest);
            let named = |error: checkpoint::CheckpointError| error.is_damage() && error.to_string().contains(&key);
            let read = small().iter().find_map(|(name, _)| reader.read_all_f32(name).err());
            assert!(read.or_else(|| reader.verify_others(|_| true, (0, 1)).err()).is_some_and(named), "{key}");
        }
        fs::write(&path, original).unwrap();
        assert_eq!(newest(&run.store), (Some(20), vec![]));
    }
}

#[test]
fn a_flipped_bit() {
    for at in [0.0, 0.3, 0.999] {
        each_object_in_turn(|path, bytes| {
            let mut bytes = bytes.to_vec();
            let at = (bytes.len() as f64 * at) as usize;
            bytes[at] ^= 0x10;
            fs::write(path, bytes).unwrap();
        });
    }
}

#[test]
fn a_truncated_object() {
    each_object_in_turn(|path, bytes| fs::write(path, &bytes[..bytes.len() / 2]).unwrap());
    each_object_in_turn(|path, bytes| fs::write(path, &bytes[..bytes.len() - 1]).unwrap());
    each_object_in_turn(|path, _| fs::write(path, b"").unwrap());
}

#[test]
fn a_deleted_object() {
    each_object_in_turn(|path, _| fs::remove_file(path).unwrap());
}

#[test]
fn an_object_that_grew() {
    each_object_in_turn(|path, bytes| fs::write(path, [bytes, b"\n"].concat()).unwrap());
}

#[test]
fn a_manifest_in_the_place_of_another() {
    let run = file_run();
    let attempt = claim(&run.store, None);
    let older = save(&run.store, attempt, 10).key();
    let newer = save(&run.store, attempt, 20).key();
    fs::copy(run.path.join(&older), run.path.join(&newer)).unwrap();
    assert_eq!(newest(&run.store), (Some(10), vec![20]));
}

#[test]
fn when_all_are_damaged_the_run_does_not_start_from_nothing() {
    let run = file_run();
    let attempt = claim(&run.store, None);
    for step in [10, 20] {
        let manifest = save(&run.store, attempt, step);
        fs::remove_file(run.path.join(&manifest.shards[1].key)).unwrap();
    }
    let error = run.store.newest_valid().unwrap_err();
    assert!(matches!(&error, CheckpointError::AllDamaged { damaged, .. } if damaged.len() == 2), "{error}");
    assert!(error.to_string().contains("step 20") && error.to_string().contains("shard-00001-of-00002"), "{error}");
}

#[test]
fn reads_verify_every_chunk_they_touch_and_touch_no_other() {
    let run = file_run();
    let attempt = claim(&run.store, None);
    let manifest = run.store.commit(content(attempt, 5, write_all(&run.store, attempt, 5, 1, TENSORS))).unwrap();
    let key = &manifest.shards[0].key;
    let original = fs::read(run.path.join(key)).unwrap();
    let big = &manifest.tensors["model/big"].slices[0];
    assert_eq!(manifest.shards[0].chunks.count(), 3);
    // Elements whose bytes begin in each of the three chunks.
    let in_chunk = |chunk: u64| ((chunk << 22) + (1 << 20)).saturating_sub(big.offset_bytes) as usize / 4;
    for bad_chunk in 0..3u64 {
        let mut bytes = original.clone();
        // The chunk's last byte: in the last chunk, that is the end of a tensor nobody reads here.
        let at = bytes.len().min(((bad_chunk + 1) << 22) as usize) - 1;
        bytes[at] ^= 1;
        fs::write(run.path.join(key), bytes).unwrap();
        for chunk in 0..3u64 {
            let start = in_chunk(chunk).min(1500 * 1501 - 10);
            let reader = run.store.read(&manifest);
            let at_once = read_ranges(&reader, &[("model/big", start..start + 10)]).map(|mut found| found.remove(0));
            for result in [reader.read_f32("model/big", start..start + 10), at_once] {
                match result {
                    Err(error) => {
                        assert!(chunk == bad_chunk && error.is_damage() && error.to_string().contains(key), "{error}")
                    }
                    Ok(values) => {
                        assert_ne!(chunk, bad_chunk);
                        assert_eq!(values[3], value(1, start + 3, 5));
                    }
                }
            }
        }
    }
}

#[test]
fn a_read_that_never_ends_is_left_behind() {
    let run = file_run();
    let attempt = claim(&run.store, None);
    let manifest = save(&run.store, attempt, 5);
    // Whoever opens a pipe that nobody writes waits, as on a network disk that is gone.
    let shard = run.path.join(&manifest.shards[0].key);
    fs::remove_file(&shard).unwrap();
    assert!(std::process::Command::new("mkfifo").arg(&shard).status().unwrap().success());
    let options = StoreOptions { op_timeout: Duration::from_millis(300), ..StoreOptions::default() };
    let store = RunStore::open_with(run.path.to_str().unwrap(), options).unwrap();
    let error = read_ranges(&store.read(&manifest), &[("model/blocks.0.w", 0..1)]).unwrap_err();
    let first = &manifest.shards[0].key;
    assert!(matches!(&error, CheckpointError::Timeout { key, .. } if key == first), "{error}");
    // Lets the thread go on, to the end of an empty file.
    drop(fs::OpenOptions::new().write(true).open(&shard).unwrap());
}

#[test]
fn weights_are_read_though_the_optimizer_state_is_gone() {
    // Weights and optimizer state by different ranks, as any sharding by sections gives.
    let run = file_run();
    let attempt = claim(&run.store, None);
    let write = |rank, tensors: &[(&str, &[usize])]| {
        let data: Vec<Vec<f32>> = tensors.iter().enumerate().map(|(i, (_, shape))| values(i, shape, 5)).collect();
        let slices: Vec<_> = tensors
            .iter()
            .zip(&data)
            .map(|((name, shape), data)| checkpoint::Slice { name, shape, start_numel: 0, data: (&data[..]).into() })
            .collect();
        run.store.write_shard(&checkpoint::ShardId { attempt, step: 5, rank, world_size: 2 }, &slices).unwrap()
    };
    let (weights, optimizer): (Vec<_>, Vec<_>) = small().into_iter().partition(|(name, _)| !name.starts_with("adamw/"));
    let shards = vec![write(0, &weights), write(1, &optimizer)];
    let manifest = run.store.commit(content(attempt, 5, shards)).unwrap();
    fs::remove_file(run.path.join(&manifest.shards[1].key)).unwrap();
    let reader = run.store.read(&manifest);
    assert_holds(&reader, &weights, 5);
    assert!(
        matches!(reader.read_all_f32(optimizer[0].0), Err(CheckpointError::Missing { key, .. }) if key == manifest.shards[1].key)
    );
}

/// A thread reads several chunks of a file in a row.
#[test]
fn any_chunk_of_a_long_file() {
    let run = file_run();
    let attempt = claim(&run.store, None);
    let long: &[(&str, &[usize])] = &[("model/long", &[5_600_000])];
    let manifest = run.store.commit(content(attempt, 5, write_all(&run.store, attempt, 5, 1, long))).unwrap();
    let path = run.path.join(&manifest.shards[0].key);
    let bytes = fs::read(&path).unwrap();
    let read = || read_ranges(&run.store.read(&manifest), &[("model/long", 0..5_600_000)]);
    assert!(read().unwrap()[0] == values(0, &[5_600_000], 5));
    let chunks = manifest.shards[0].chunks.count();
    assert!(chunks > 4, "{chunks}");
    for chunk in 0..chunks {
        let mut damaged = bytes.clone();
        damaged[chunk * manifest.chunk_bytes as usize + 999] ^= 1;
        fs::write(&path, damaged).unwrap();
        let first_byte = format!("its bytes {} to", chunk as u64 * manifest.chunk_bytes);
        for error in [read().unwrap_err(), run.store.verify(&manifest).unwrap_err()] {
            assert!(error.is_damage() && error.to_string().contains(&first_byte), "{error}");
        }
    }
}
