//! `[fid]`.

use std::path::Path;

use super::validation::check_sections;
use super::{ANY, COUNT, read_path};
use crate::fid::FidConfig;
use crate::reader::Reader;
use crate::schema::RunConfig;

/// Every key but the reference, without which they mean nothing.
const KEYS: [&str; 4] = ["fid.inception", "fid.every_steps", "fid.num", "fid.weights"];

pub(super) fn read(r: &mut Reader, base: &Path) -> Option<FidConfig> {
    let reference = read_path(r, "fid.reference", base, "file or folder");
    let inception = read_path(r, "fid.inception", base, "file");
    let default = FidConfig::of(reference.unwrap_or_default(), inception.unwrap_or_default());
    let weights = r.text_list("fid.weights");
    let config = FidConfig {
        every_steps: r.integer("fid.every_steps", 1..=ANY, default.every_steps),
        num: r.integer("fid.num", 2..=COUNT, default.num as u64) as usize,
        weights: if r.given("fid.weights") { weights } else { default.weights },
        reference: default.reference,
        inception: default.inception,
    };
    r.given("fid.reference").then_some(config)
}

pub(super) fn check(r: &mut Reader, c: &RunConfig) {
    let Some(fid) = &c.fid else {
        if let Some(key) = KEYS.into_iter().find(|key| r.given(key)) {
            let problem = format!("is missing, which `{key}` means nothing without");
            r.refuse(
                "fid.reference",
                problem,
                "set it to an .npz file or a folder of pictures to compare samples with",
            );
        }
        return;
    };
    check_sections(r, c, "fid.weights", &fid.weights);
    if !r.given("fid.inception") {
        r.refuse(
            "fid.inception",
            "is missing",
            "set it to the file of Inception weights; docs/EVALUATION.md tells which",
        );
    }
    if r.sound(&["sample.vae"]) && c.sample.vae.is_none() {
        r.refuse(
            "fid.reference",
            "asks for samples, but there is no sample.vae to decode them",
            "set sample.vae to an AutoencoderKL folder, or leave out [fid]",
        );
    }
}
