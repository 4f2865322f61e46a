//! The names of the objects in a run folder. Only names that these functions could have made are recognised.

/// Folder of the attempt records.
pub(crate) const ATTEMPTS: &str = "attempts";
/// Folder of the checkpoints.
pub(crate) const CHECKPOINTS: &str = "checkpoints";
/// Folder of the requests for a checkpoint.
pub(crate) const REQUESTS: &str = "requests";
/// Folder of what [`probe`](crate::RunStore::probe) tries.
pub(crate) const PROBES: &str = "probes";

pub(crate) fn attempt(attempt: u32) -> String {
    format!("{ATTEMPTS}/{attempt:04}.json")
}

pub(crate) fn step_folder(step: u64) -> String {
    format!("{CHECKPOINTS}/step-{step:09}")
}

pub(crate) fn manifest(step: u64, attempt: u32) -> String {
    format!("{}/manifest-{attempt:04}.json", step_folder(step))
}

/// The objects of a rank's shard; the first part's name says nothing of parts.
pub(crate) fn shard(step: u64, attempt: u32, rank: usize, world_size: usize, part: usize) -> String {
    let part = if part == 0 { String::new() } else { format!(".part-{part:04}") };
    format!("{}/attempt-{attempt:04}/shard-{rank:05}-of-{world_size:05}{part}.safetensors", step_folder(step))
}

pub(crate) fn probe(nonce: u64) -> String {
    format!("{PROBES}/{nonce:016x}.json")
}

pub(crate) fn request(nonce: u64) -> String {
    format!("{REQUESTS}/{nonce:016x}.json")
}

pub(crate) fn parse_attempt(key: &str) -> Option<u32> {
    let number = key.strip_prefix(ATTEMPTS)?.strip_prefix('/')?.strip_suffix(".json")?.parse().ok()?;
    (attempt(number) == key).then_some(number)
}

/// The step of any object below `checkpoints/`.
pub(crate) fn parse_step(key: &str) -> Option<u64> {
    let folder = key.strip_prefix(CHECKPOINTS)?.strip_prefix('/')?.split('/').next()?;
    let step = folder.strip_prefix("step-")?.parse().ok()?;
    (step_folder(step).strip_prefix(CHECKPOINTS)?.strip_prefix('/')? == folder).then_some(step)
}

/// Step and attempt of a manifest.
pub(crate) fn parse_manifest(key: &str) -> Option<(u64, u32)> {
    let step = parse_step(key)?;
    let attempt = key.rsplit('/').next()?.strip_prefix("manifest-")?.strip_suffix(".json")?.parse().ok()?;
    (manifest(step, attempt) == key).then_some((step, attempt))
}

/// Step and attempt of any object below `checkpoints/`.
pub(crate) fn parse_object(key: &str) -> Option<(u64, u32)> {
    parse_manifest(key).or_else(|| {
        let step = parse_step(key)?;
        let (number, _) = key.strip_prefix(&step_folder(step))?.strip_prefix("/attempt-")?.split_once('/')?;
        let attempt = number.parse().ok()?;
        (number == format!("{attempt:04}")).then_some((step, attempt))
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_parse_back_and_nothing_else_does() {
        assert_eq!(parse_manifest(&manifest(1000, 3)), Some((1000, 3)));
        assert_eq!(parse_manifest("checkpoints/step-000001000/manifest-0003.json"), Some((1000, 3)));
        assert_eq!(parse_manifest(&manifest(12_345_678_901, 70_000)), Some((12_345_678_901, 70_000)));
        assert_eq!(parse_attempt(&attempt(7)), Some(7));
        assert_eq!(parse_step(&shard(5, 1, 0, 4, 2)), Some(5));
        assert_eq!(parse_object(&shard(5, 1, 0, 4, 2)), Some((5, 1)));
        assert_eq!(parse_object(&manifest(1000, 3)), Some((1000, 3)));
        for other in ["checkpoints/step-000001000/notes.txt", "checkpoints/step-000001000/attempt-3/x"] {
            assert_eq!(parse_object(other), None, "{other}");
        }
        for other in [
            "checkpoints/step-1000/manifest-0003.json",
            "checkpoints/step-000001000/manifest-3.json",
            "checkpoints/step-000001000/x/manifest-0003.json",
            "checkpoints/step-+00001000/manifest-0003.json",
            "checkpoints/step-000001000/manifest-0003.json#1",
            "checkpoints/manifest-0003.json",
        ] {
            assert_eq!(parse_manifest(other), None, "{other}");
        }
        assert_eq!(parse_attempt("attempts/+007.json"), None);
        assert_eq!(parse_attempt("attempts/7.json"), None);
    }
}
