//! Inputs of a target that are kept in the project.

use std::path::Path;

/// Gives every input of `corpus/TARGET` to `run`, and checks that the `accepted` ones are.
pub fn replay(target: &str, accepted: &[&str], run: impl Fn(&[u8]) -> bool) {
    let folder = Path::new(env!("CARGO_MANIFEST_DIR")).join("../fuzz/corpus").join(target);
    let mut inputs: Vec<_> = std::fs::read_dir(&folder)
        .unwrap_or_else(|error| panic!("{}: {error}", folder.display()))
        .map(|entry| entry.expect("a folder of the project can be listed").path())
        .collect();
    inputs.sort();
    let mut left: Vec<&str> = accepted.to_vec();
    for input in inputs {
        let bytes = std::fs::read(&input).unwrap_or_else(|error| panic!("{}: {error}", input.display()));
        let name = input.file_name().unwrap_or_default().to_string_lossy().into_owned();
        if run(&bytes) {
            left.retain(|expected| *expected != name);
        }
    }
    assert!(left.is_empty(), "{target}: these inputs are refused, so that fuzzing starts from nothing: {left:?}");
}
