//! Manifests that are intact by their digest and still not to be trusted, and manifests from the future.

use crate::world::*;
use checkpoint::{CheckpointError, Digest};
use serde_json::{Value, json};
use std::fs;

/// Saves steps 10 and 20, rewrites the newer manifest with a correct digest, and asks for the newest.
fn with_manifest(edit: impl FnOnce(&mut Value)) -> Result<(Option<u64>, String), CheckpointError> {
    let run = file_run();
    let attempt = claim(&run.store, None);
    save(&run.store, attempt, 10);
    let path = run.path.join(save(&run.store, attempt, 20).key());
    let mut manifest: Value = serde_json::from_slice(&fs::read(&path).unwrap()).unwrap();
    edit(&mut manifest);
    fs::write(&path, sealed(manifest)).unwrap();
    run.store.newest_valid().map(|found| {
        let (manifest, damaged) = found.unwrap();
        (Some(manifest.step), damaged.first().map(|d| d.reason.clone()).unwrap_or_default())
    })
}

fn sealed(mut object: Value) -> String {
    object.as_object_mut().unwrap().remove("sha256");
    let mut text = object.to_string();
    text.pop();
    format!("{text},\"sha256\":\"{}\"}}\n", Digest::sha256(text.as_bytes()))
}

#[test]
fn the_test_itself_makes_manifests_that_are_accepted() {
    assert_eq!(with_manifest(|_| {}).unwrap(), (Some(20), String::new()));
    // Members that this version does not know are passed over.
    assert_eq!(with_manifest(|m| m["remark"] = json!("hello")).unwrap().0, Some(20));
}

#[test]
fn checkpoints_of_format_version_1_are_read() {
    let run = file_run();
    let attempt = claim(&run.store, None);
    let path = run.path.join(save(&run.store, attempt, 10).key());
    let mut manifest: Value = serde_json::from_slice(&fs::read(&path).unwrap()).unwrap();
    assert_eq!(manifest["version"], 2);
    manifest["version"] = json!(1);
    for shard in manifest["shards"].as_array_mut().unwrap() {
        let bytes = fs::read(run.path.join(shard["key"].as_str().unwrap())).unwrap();
        let chunks: Vec<String> = bytes.chunks(4 << 20).map(|chunk| Digest::sha256(chunk).to_string()).collect();
        shard.as_object_mut().unwrap().remove("blake3");
        shard["sha256"] = json!(chunks);
    }
    fs::write(&path, sealed(manifest.clone())).unwrap();
    let (found, damaged) = run.store.newest_valid().unwrap().unwrap();
    assert!(damaged.is_empty(), "{damaged:?}");
    assert_holds(&run.store.read(&found), &small(), 10);
    let all = read_ranges(&run.store.read(&found), &[("ema/blocks.0.w", 0..42)]).unwrap();
    let index = small().iter().position(|(name, _)| *name == "ema/blocks.0.w").unwrap();
    assert_eq!(all[0], values(index, &[6, 7], 10));
    manifest["shards"][0]["sha256"][0] = json!(Digest::sha256(b"other").to_string());
    fs::write(&path, sealed(manifest)).unwrap();
    assert!(
        run.store.verify(&run.store.manifest(&run.store.committed().unwrap()[0]).unwrap()).unwrap_err().is_damage()
    );
}

#[test]
fn untrusted_numbers_and_paths_are_refused_with_their_names() {
    type Edit = fn(&mut Value);
    let cases: &[(&str, Edit)] = &[
        ("leads elsewhere", |m| m["shards"][0]["key"] = json!("../../etc/passwd")),
        ("leads elsewhere", |m| m["shards"][0]["key"] = json!("/etc/passwd")),
        ("leads elsewhere", |m| m["shards"][0]["key"] = json!("checkpoints/step-000000020/../../secret")),
        ("leads elsewhere", |m| {
            m["shards"][0]["key"] = json!("checkpoints/step-000000010/attempt-0001/shard-00000-of-00002.safetensors")
        }),
        ("leads elsewhere", |m| m["shards"][0]["key"] = json!("checkpoints/step-000000020//x")),
        ("leads elsewhere", |m| m["shards"][0]["key"] = json!("checkpoints/step-000000020/a\\..\\b")),
        ("twice", |m| m["shards"][0]["key"] = m["shards"][1]["key"].clone()),
        ("chunk digests", |m| m["shards"][0]["bytes"] = json!(u64::MAX)),
        ("chunk digests", |m| m["shards"][0]["blake3"] = json!([])),
        ("chunk_bytes", |m| m["chunk_bytes"] = json!(0)),
        ("chunk_bytes", |m| m["chunk_bytes"] = json!(u64::MAX)),
        ("chunk_bytes", |m| m["chunk_bytes"] = json!(4097)),
        ("memory can address", |m| m["tensors"]["ema/blocks.0.w"]["shape"] = json!([u64::MAX, 2])),
        ("memory can address", |m| m["tensors"]["ema/blocks.0.w"]["shape"] = json!([1u64 << 62])),
        ("`ema/blocks.0.w`", |m| m["tensors"]["ema/blocks.0.w"]["shape"] = json!([43])),
        ("`ema/blocks.0.w`", |m| m["tensors"]["ema/blocks.0.w"]["shape"] = json!([41])),
        ("`ema/blocks.0.w`", |m| m["tensors"]["ema/blocks.0.w"]["slices"] = json!([])),
        ("`ema/blocks.0.w`", |m| m["tensors"]["ema/blocks.0.w"]["slices"][0]["offset_bytes"] = json!(u64::MAX - 3)),
        ("`ema/blocks.0.w`", |m| m["tensors"]["ema/blocks.0.w"]["slices"][0]["offset_bytes"] = json!(1)),
        ("`ema/blocks.0.w`", |m| m["tensors"]["ema/blocks.0.w"]["slices"][0]["offset_bytes"] = json!(1_000_000)),
        ("in shard 9", |m| m["tensors"]["ema/blocks.0.w"]["slices"][0]["shard"] = json!(9)),
        ("`ema/blocks.0.w`", |m| m["tensors"]["ema/blocks.0.w"]["slices"][0]["end_numel"] = json!(u64::MAX)),
        ("overlap", |m| {
            let slices = m["tensors"]["ema/blocks.0.w"]["slices"].as_array_mut().unwrap();
            slices.push(slices[0].clone());
        }),
        ("more than its bytes", |m| {
            // One element again and again: so a small store could make a reader allocate without end.
            let slice = m["tensors"]["model/scale"]["slices"][0].clone();
            let again = |i: u64| json!({"shard": slice["shard"], "offset_bytes": slice["offset_bytes"], "start_numel": i, "end_numel": i + 1});
            m["tensors"]["model/scale"] =
                json!({"dtype": "F32", "shape": [5000], "slices": (0..5000).map(again).collect::<Vec<_>>()});
        }),
        ("no shard holds elements 0 to 1", |m| m["tensors"]["ema/blocks.0.w"]["slices"][0]["start_numel"] = json!(1)),
        ("not a tensor name", |m| m["tensors"]["a\u{7}"] = m["tensors"]["ema/blocks.0.w"].clone()),
        ("JSON", |m| m["tensors"]["ema/blocks.0.w"]["dtype"] = json!("F33")),
        ("JSON", |m| m["tensors"]["ema/blocks.0.w"]["shape"] = json!([-1])),
        ("JSON", |m| m["shards"] = json!(7)),
        ("step 20", |m| m["step"] = json!(19)),
        ("format", |m| m["format"] = json!("another")),
    ];
    for (word, edit) in cases {
        match with_manifest(edit) {
            Ok((step, reason)) => {
                assert_eq!(step, Some(10), "{word}: accepted");
                let named = reason.contains(word) || *word == "step 20";
                assert!(named && reason.contains("manifest-0001.json"), "expected `{word}` in: {reason}");
            }
            Err(error) => panic!("{word}: {error}"),
        }
    }
}

#[test]
fn a_manifest_that_did_not_come_from_the_store_is_checked_too() {
    let store = memory_run();
    let attempt = claim(&store, None);
    let mut manifest = save(&store, attempt, 10);
    manifest.tensors.get_mut("ema/blocks.0.w").unwrap().slices[0].shard = 9;
    assert!(matches!(store.verify(&manifest), Err(CheckpointError::Damaged { .. })));
    assert!(matches!(store.read(&manifest).read_all_f32("ema/blocks.0.w"), Err(CheckpointError::Damaged { .. })));
}

#[test]
fn the_future_is_refused_politely_and_never_fallen_back_from() {
    let error = with_manifest(|m| *m = json!({"format": "ditharos-checkpoint", "version": 3, "tensors": "otherwise"}))
        .unwrap_err();
    assert!(matches!(error, CheckpointError::UnknownVersion { found: 3, supported: 2, .. }), "{error}");
    let text = error.to_string();
    assert!(text.contains("manifest-0001.json") && text.contains("newer"), "{text}");
}

#[test]
fn a_newer_attempt_record_stops_an_older_program() {
    let run = file_run();
    let attempt = claim(&run.store, None);
    save(&run.store, attempt, 10);
    fs::write(run.path.join("attempts/0002.json"), sealed(json!({"format": "ditharos-attempt", "version": 2})))
        .unwrap();
    assert!(matches!(run.store.committed(), Err(CheckpointError::UnknownVersion { .. })));
}
