//! What is written is read back, by anyone, and nothing counts before its manifest.

use crate::world::*;
use checkpoint::{CheckpointError, F32Bytes, RunStore, ShardId, Slice, StoreOptions, digest};
use safetensors::SafeTensors;
use std::{fs, ops::Range};

#[test]
fn any_number_of_ranks_writes_what_any_other_reads() {
    let file = file_run();
    for store in [&memory_run(), &file.store] {
        let attempt = claim(store, None);
        for (step, world_size) in [(1, 1), (2, 2), (4, 4), (8, 8)] {
            let shards = write_all(store, attempt, step, world_size, TENSORS);
            let written = store.commit(content(attempt, step, shards)).unwrap();
            let (manifest, damaged) = store.newest_valid().unwrap().unwrap();
            assert_eq!((&manifest, damaged.len()), (&written, 0));
            assert_eq!((manifest.step, manifest.optimizer_step, manifest.world_size), (step, step, world_size));
            assert_eq!(manifest.config["optimizer"]["lr"], 1e-4);
            assert_eq!(manifest.decision_log[0]["step"], 3);
            assert_holds(&store.read(&manifest), TENSORS, step);
        }
    }
}

#[test]
fn ranges_that_cross_slices_and_chunks_are_read_in_one_go() {
    let folder = file_run();
    for store in [&memory_run(), &folder.store] {
        let attempt = claim(store, None);
        let manifest = store.commit(content(attempt, 5, write_all(store, attempt, 5, 4, TENSORS))).unwrap();
        assert!(manifest.tensors["model/big"].slices.len() > 2, "the test wants a tensor in several shards");
        let reader = store.read(&manifest);
        for readers in [1, 3, 5] {
            for rank in 0..readers {
                let own = share(1500 * 1501, rank, readers);
                // Some of it twice, and some of nothing.
                let ranges = [("model/big", own.clone()), ("model/blocks.0.b", 4..7), ("model/none", 0..0)];
                let again = ("model/big", own.start + 5..own.end - 1);
                let found = read_ranges(&reader, &[&ranges[..], std::slice::from_ref(&again)].concat()).unwrap();
                let expected = |range: Range<usize>| range.map(|element| value(1, element, 5)).collect::<Vec<_>>();
                assert!(found[0] == expected(own) && found[3] == expected(again.1));
                assert_eq!(found[1], [4, 5, 6].map(|element| value(2, element, 5)));
                assert!(found[2].is_empty());
            }
        }
    }
}

#[test]
fn bad_reads_name_tensor_and_range() {
    let store = memory_run();
    let attempt = claim(&store, None);
    let reader = store.read(&save(&store, attempt, 1));
    let past = reader.read_f32("model/blocks.0.b", 5..8).unwrap_err().to_string();
    assert!(past.contains("`model/blocks.0.b`") && past.contains("5..8") && past.contains('7'), "{past}");
    #[allow(clippy::reversed_empty_ranges)]
    let reversed = reader.read_f32("model/blocks.0.b", 5..4);
    assert!(matches!(reversed, Err(CheckpointError::BadRead { .. })));
    assert!(matches!(reader.read_f32("model/x", 0..0), Err(CheckpointError::BadRead { .. })));
}

#[test]
fn shards_without_a_manifest_are_no_checkpoint() {
    for store in [memory_run(), file_run().store] {
        let attempt = claim(&store, None);
        write_all(&store, attempt, 10, 2, &small());
        assert_eq!(store.committed().unwrap(), []);
        assert_eq!(newest(&store), (None, vec![]));
    }
}

#[test]
fn a_killed_writers_temporary_file_is_in_nobodys_way() {
    let run = file_run();
    let attempt = claim(&run.store, None);
    let folder = run.path.join("checkpoints/step-000000010/attempt-0001");
    fs::create_dir_all(&folder).unwrap();
    fs::write(folder.join("shard-00000-of-00002.safetensors#1"), b"half").unwrap();
    save(&run.store, attempt, 10);
    assert_eq!(newest(&run.store), (Some(10), vec![]));
}

#[test]
fn a_run_folder_may_be_copied() {
    let run = file_run();
    let attempt = claim(&run.store, None);
    save(&run.store, attempt, 10);
    let moved = run.path.with_file_name("elsewhere");
    fs::rename(&run.path, &moved).unwrap();
    let copy = RunStore::open_existing(&format!("file://{}", moved.display())).unwrap();
    let (manifest, _) = copy.newest_valid().unwrap().unwrap();
    assert_holds(&copy.read(&manifest), &small(), 10);
}

#[test]
fn shards_are_safetensors_files_with_deterministic_bytes() {
    let run = file_run();
    let attempt = claim(&run.store, None);
    let (w, b) = (values(0, &[6, 7], 1), values(2, &[7], 1));
    let whole = Slice { name: "model/w", shape: &[6, 7], start_numel: 0, data: F32Bytes::from(&w[..]) };
    let cut = Slice { name: "model/\"b\"", shape: &[100], start_numel: 20, data: F32Bytes::from(&b[..]) };
    let id = |step, rank| ShardId { attempt, step, rank, world_size: 2 };
    let record = run.store.write_shard(&id(1, 0), &[whole.clone(), cut.clone()]).unwrap();
    let other = run.store.write_shard(&id(2, 1), &[cut, whole]).unwrap();
    let bytes = fs::read(run.path.join(&record.parts[0].key)).unwrap();
    assert_eq!(bytes, fs::read(run.path.join(&other.parts[0].key)).unwrap());
    assert_eq!((record.parts[0].bytes, &record.parts[0].chunks), (bytes.len() as u64, &other.parts[0].chunks));

    let file = SafeTensors::deserialize(&bytes).unwrap();
    let le = |values: &[f32]| values.iter().flat_map(|v| v.to_le_bytes()).collect::<Vec<u8>>();
    let tensor = file.tensor("model/w").unwrap();
    assert_eq!((tensor.shape(), tensor.data()), (&[6usize, 7][..], &le(&w)[..]));
    let tensor = file.tensor("model/\"b\"[20:27]").unwrap();
    assert_eq!((tensor.shape(), tensor.data()), (&[7usize][..], &le(&b)[..]));
    for slice in &record.parts[0].tensors {
        assert_eq!(slice.offset_bytes % 4, 0);
    }
    assert_eq!((bytes.len() - le(&w).len() - le(&b).len()) % 64, 0, "the data starts aligned");
}

#[test]
fn a_shard_may_be_empty() {
    let store = memory_run();
    let attempt = claim(&store, None);
    let data = [1.0, 2.0];
    let full = [Slice { name: "model/w", shape: &[2], start_numel: 0, data: F32Bytes::from(&data[..]) }];
    let shards = [(0, &full[..]), (1, &[][..])]
        .map(|(rank, slices)| store.write_shard(&ShardId { attempt, step: 1, rank, world_size: 2 }, slices).unwrap());
    let manifest = store.commit(content(attempt, 1, shards.to_vec())).unwrap();
    store.verify(&manifest).unwrap();
    assert_eq!(store.read(&manifest).read_all_f32("model/w").unwrap(), data);
}

#[test]
fn digests_do_not_depend_on_the_layout() {
    let store = memory_run();
    let attempt = claim(&store, None);
    let of = |world_size: usize, tensors: &[(&str, &[usize])]| {
        // Same step, hence same values; attempts differ, since a step of an attempt is written once.
        let attempt = if world_size == 1 { attempt } else { claim(&store, Some(7)) };
        let manifest = store.commit(content(attempt, 7, write_all(&store, attempt, 7, world_size, tensors))).unwrap();
        digest::all_digests(&store.read(&manifest)).unwrap()
    };
    let (sections, tensors) = of(1, TENSORS);
    assert_eq!(of(4, TENSORS), (sections.clone(), tensors.clone()));
    assert_eq!(sections.keys().collect::<Vec<_>>(), ["adamw", "ema", "model"]);
    let ema: Vec<u8> = values(5, &[6, 7], 7).iter().flat_map(|v| v.to_le_bytes()).collect();
    assert_eq!(sections["ema"], checkpoint::Digest::sha256(&ema));
    let adamw: Vec<u8> = [6, 7].iter().flat_map(|&i| values(i, &[6, 7], 7)).flat_map(f32::to_le_bytes).collect();
    assert_eq!(sections["adamw"], checkpoint::Digest::sha256(&adamw));
    assert_eq!(tensors.len(), TENSORS.len());
    let other = store.read(&save(&store, claim(&store, Some(7)), 8));
    assert_ne!(digest::section_digests(&other).unwrap()["ema"], sections["ema"]);
}

#[test]
fn incomplete_checkpoints_are_not_committed() {
    let store = memory_run();
    let attempt = claim(&store, None);
    let data = [0f32; 8];
    let slice =
        |name, shape, start_numel, len: usize| Slice { name, shape, start_numel, data: F32Bytes::from(&data[..len]) };
    let refused = |step, by_rank: [Vec<Slice<'_>>; 2], word: &str| {
        let shards = [0, 1]
            .map(|rank| store.write_shard(&ShardId { attempt, step, rank, world_size: 2 }, &by_rank[rank]).unwrap());
        let error = store.commit(content(attempt, step, shards.to_vec())).unwrap_err();
        assert!(matches!(error, CheckpointError::Incomplete { .. }) && error.to_string().contains(word), "{error}");
    };
    refused(
        1,
        [vec![slice("model/w", &[8], 0, 3)], vec![slice("model/w", &[8], 4, 4)]],
        "elements 3 to 4 of tensor `model/w`",
    );
    refused(
        2,
        [vec![slice("model/w", &[8], 0, 4)], vec![slice("model/w", &[8], 4, 3)]],
        "elements 7 to 8 of tensor `model/w`",
    );
    refused(3, [vec![slice("model/w", &[8], 0, 5)], vec![slice("model/w", &[8], 4, 4)]], "overlap");
    refused(4, [vec![slice("model/w", &[8], 0, 4)], vec![slice("model/w", &[2, 4], 4, 4)]], "rank 1");

    let shards = write_all(&store, attempt, 5, 2, &small());
    let error = store.commit(content(attempt, 5, shards[..1].to_vec())).unwrap_err();
    assert!(error.to_string().contains("one of each of 2 ranks"), "{error}");
    let error = store.commit(content(attempt, 6, shards.clone())).unwrap_err();
    assert!(matches!(error, CheckpointError::Incomplete { .. }), "shards of another step: {error}");
    let error = store.commit(content(attempt, 5, vec![shards[0].clone(), shards[0].clone()])).unwrap_err();
    assert!(matches!(error, CheckpointError::Incomplete { .. }), "one rank twice: {error}");
    assert_eq!(store.committed().unwrap(), []);
    store.commit(content(attempt, 5, shards)).unwrap();
}

#[test]
fn a_shard_that_is_not_in_the_store_prevents_the_commit() {
    let run = file_run();
    let attempt = claim(&run.store, None);
    let shards = write_all(&run.store, attempt, 5, 2, &small());
    fs::remove_file(run.path.join(&shards[1].parts[0].key)).unwrap();
    let error = run.store.commit(content(attempt, 5, shards.clone())).unwrap_err();
    assert!(error.to_string().contains(&shards[1].parts[0].key), "{error}");
    assert_eq!(run.store.committed().unwrap(), []);
}

#[test]
fn stores_that_cannot_be_used_say_why() {
    let folder = tempfile::tempdir().unwrap();
    let file = folder.path().join("file");
    fs::write(&file, "x").unwrap();
    let below_a_file = RunStore::open(file.join("run").to_str().unwrap()).unwrap_err();
    assert!(
        matches!(below_a_file, CheckpointError::Unwritable { .. }) && below_a_file.to_string().contains("file/run"),
        "{below_a_file}"
    );
    let absent = folder.path().join("typo");
    let error = RunStore::open_existing(absent.to_str().unwrap()).unwrap_err().to_string();
    assert!(error.contains("typo") && !absent.exists(), "{error}");
    let error = RunStore::open("ftp://host/run").unwrap_err().to_string();
    assert!(error.contains("ftp://host/run") && error.contains("s3://"), "{error}");
}

#[test]
fn calls_are_allowed_inside_another_runtime() {
    let other = tokio::runtime::Builder::new_current_thread().build().unwrap();
    other.block_on(async {
        let store = memory_run();
        let attempt = claim(&store, None);
        save(&store, attempt, 1);
        assert_eq!(newest(&store), (Some(1), vec![]));
    });
}

#[test]
fn a_large_shard_is_several_objects_that_read_like_one() {
    let folder = tempfile::tempdir().unwrap();
    let options = StoreOptions { part_bytes: 1 << 20, ..StoreOptions::default() };
    let store = RunStore::open_with(folder.path().to_str().unwrap(), options).unwrap();
    let attempt = claim(&store, None);
    let shards = write_all(&store, attempt, 3, 2, TENSORS);
    assert!(shards.iter().all(|shard| shard.parts.len() == 5), "{}", shards[0].parts.len());
    for part in shards.iter().flat_map(|shard| &shard.parts) {
        let bytes = fs::read(folder.path().join(&part.key)).unwrap();
        assert!(bytes.len() < (1 << 20) + 4096);
        SafeTensors::deserialize(&bytes).unwrap();
    }
    let manifest = store.commit(content(attempt, 3, shards)).unwrap();
    assert_eq!(manifest.shards.len(), 10);
    store.verify(&manifest).unwrap();
    assert_holds(&store.read(&manifest), TENSORS, 3);
    // The values are the same wherever they are cut.
    let whole = memory_run();
    let attempt = claim(&whole, None);
    let one = whole.commit(content(attempt, 3, write_all(&whole, attempt, 3, 1, TENSORS))).unwrap();
    let digests = |store: &RunStore, manifest| digest::section_digests(&store.read(manifest)).unwrap();
    assert_eq!(digests(&store, &manifest), digests(&whole, &one));
}

#[test]
fn an_upload_holds_its_values_until_it_has_ended() {
    let store = memory_run();
    let attempt = claim(&store, None);
    let mut values = std::sync::Arc::new(vec![1f32, 2.0, 3.0, 4.0]);
    let data = F32Bytes::shared(&values, 1..3);
    assert!(std::sync::Arc::get_mut(&mut values).is_none());
    let slices = [Slice { name: "model/w", shape: &[2], start_numel: 0, data }];
    let shard = store.write_shard(&ShardId { attempt, step: 1, rank: 0, world_size: 1 }, &slices).unwrap();
    drop(slices);
    let manifest = store.commit(content(attempt, 1, vec![shard])).unwrap();
    assert_eq!(store.read(&manifest).read_all_f32("model/w").unwrap(), [2.0, 3.0]);
}
