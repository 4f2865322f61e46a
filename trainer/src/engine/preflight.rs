//! What has to be the same on every rank, compared before anything is allocated: a node that has another build, config, data set or
//! kind of processor would otherwise change bits without a word.
//!
//! Ranks compare digests; only if these differ they tell each other everything, so that one message can say what differs where.

use super::agree::Agreed;
use crate::ffi;
use anyhow::{Context, Result};
use collective::Collective;
use configs::{Reduction, RunConfig};
use serde::{Deserialize, Serialize};
use serde_json::Value;
use sha2::{Digest, Sha256};
use std::collections::BTreeMap;
use tch::Device;

/// Variables by which people choose kernels, and with them bits.
const KERNEL_VARIABLES: [&str; 6] = [
    "ATEN_CPU_CAPABILITY",
    "DNNL_MAX_CPU_ISA",
    "MKL_CBWR",
    "MKL_ENABLE_INSTRUCTIONS",
    "NVIDIA_TF32_OVERRIDE",
    "ONEDNN_MAX_CPU_ISA",
];
/// Differences that one message tells.
const TOLD: usize = 3;

/// What a rank knows of itself, by name.
type Facts = BTreeMap<String, String>;

/// A rank's facts with the name of its machine.
#[derive(Serialize, Deserialize)]
struct Identity {
    host: String,
    facts: Facts,
}

/// Refuses ranks of different builds of this program or of libtorch, and of different configs. All ranks call it together.
///
/// # Errors
/// [`Agreed`]: which rank differs, on which machine, in what.
pub fn same_programs(collective: &dyn Collective, config: Option<&RunConfig>) -> Result<()> {
    let mut facts = config.map(|config| leaves(&config.to_json())).unwrap_or_default();
    facts.insert("the trainer".to_owned(), ffi::identity(None));
    facts.insert("libtorch".to_owned(), ffi::identity(Some("libtorch_cpu.so")));
    let advice = "give every node the same files, for example a folder that ./dev bundle made, and the same config";
    same(collective, facts, advice)
}

/// Refuses ranks that have found different data sets, and processors that would give different bits. All ranks call it together.
///
/// # Errors
/// As [`same_programs`].
pub fn same_experiment(collective: &dyn Collective, config: &RunConfig, record: &Value, device: Device) -> Result<()> {
    let advice = "every node has to see the same files; are they still being written?";
    same(collective, leaves(record), advice)?;
    let choices = same(
        collective,
        kernel_choices(),
        "use nodes with one kind of processor and the same variables, or reduction = \"fast\", which does not promise the same bits",
    );
    // Sums of one step then come from different kernels, which only `invariant` promises not to happen; GPUs compute by their own.
    let is_promised = config.reduction == Reduction::Invariant && device == Device::Cpu;
    let warning = match choices {
        Err(error) if is_promised || !error.is::<Agreed>() => return Err(error),
        Err(error) => Some(format!("{error:#}")),
        Ok(()) => {
            let model = Facts::from([("the processor".to_owned(), processor())]);
            let advice = "it has the same vector instructions, but libraries may choose other kernels: the same bits are promised on one \
                          kind of processor only";
            match same(collective, model, advice) {
                Err(error) if error.is::<Agreed>() => Some(format!("{error:#}")),
                other => return other,
            }
        }
    };
    for warning in warning.iter().filter(|_| collective.rank() == 0) {
        eprintln!("trainer: warning: {warning}");
    }
    Ok(())
}

/// Which kernels libtorch and its libraries choose.
fn kernel_choices() -> Facts {
    let capability = ("the CPU capability that libtorch uses".to_owned(), ffi::cpu_capability());
    let value = |name: &str| std::env::var(name).unwrap_or_else(|_| "not set".to_owned());
    KERNEL_VARIABLES.iter().map(|name| (format!("the variable {name}"), value(name))).chain([capability]).collect()
}

fn processor() -> String {
    let text = std::fs::read_to_string("/proc/cpuinfo").unwrap_or_default();
    let model = text.lines().find_map(|line| line.strip_prefix("model name")?.split_once(':'));
    model.map_or_else(|| std::env::consts::ARCH.to_owned(), |(_, name)| name.trim().to_owned())
}

/// The values of a config by dotted name.
fn leaves(value: &Value) -> Facts {
    fn collect(name: &str, value: &Value, facts: &mut Facts) {
        match value.as_object() {
            None => drop(facts.insert(format!("`{name}`"), value.to_string())),
            Some(section) => section.iter().for_each(|(key, value)| {
                let child = if name.is_empty() { key.clone() } else { format!("{name}.{key}") };
                collect(&child, value, facts);
            }),
        }
    }
    let mut facts = Facts::new();
    collect("", value, &mut facts);
    facts
}

/// Refuses ranks with other facts than rank 0. All ranks call it together.
fn same(collective: &dyn Collective, facts: Facts, advice: &str) -> Result<()> {
    let context = "comparing the ranks before the start";
    let text = serde_json::to_vec(&facts)?;
    let digests = collective.gather_bytes(&Sha256::digest(&text)).context(context)?;
    if digests.iter().all(|digest| *digest == digests[0]) {
        return Ok(());
    }
    let host = collective::host_name();
    let all = collective.gather_bytes(&serde_json::to_vec(&Identity { host, facts })?).context(context)?;
    let read = |message: &Vec<u8>| serde_json::from_slice::<Identity>(message).context(context);
    let all: Vec<Identity> = all.iter().map(read).collect::<Result<_>>()?;
    first_difference(&all, advice).map_or(Ok(()), |difference| Err(difference.into()))
}

/// In what the first rank that is unlike rank 0 differs from it.
fn first_difference(all: &[Identity], advice: &str) -> Option<Agreed> {
    let first = &all[0];
    let mut others = all.iter().enumerate().filter(|(_, other)| other.facts != first.facts);
    let (rank, other) = others.next()?;
    let of = |facts: &Facts, name: &str| facts.get(name).map_or("nothing".to_owned(), String::clone);
    let names: std::collections::BTreeSet<&String> = first.facts.keys().chain(other.facts.keys()).collect();
    let differing: Vec<String> = names
        .into_iter()
        .map(|name| (name, of(&other.facts, name), of(&first.facts, name)))
        .filter(|(_, found, expected)| found != expected)
        .map(|(name, found, expected)| format!("{name}: found {found}, expected {expected}"))
        .collect();
    let more = |count: usize, what: &str| if count > 0 { format!("; {count} more {what}") } else { String::new() };
    let reason = format!(
        "on {} it is unlike rank 0 on {}: {}{}{}; {advice}",
        other.host,
        first.host,
        differing[..differing.len().min(TOLD)].join("; "),
        more(differing.len().saturating_sub(TOLD), "difference(s)"),
        more(others.count(), "rank(s) differ from rank 0"),
    );
    Some(Agreed { rank, reason })
}

#[cfg(test)]
mod tests {
    use super::*;
    use serde_json::json;

    fn identity(host: &str, config: Value) -> Identity {
        Identity { host: host.to_owned(), facts: leaves(&config) }
    }

    #[test]
    fn the_first_rank_that_differs_is_named_with_host_and_values() {
        let right = json!({"train": {"lanes": 4, "micro_batch": 2}, "seed": 1});
        let wrong = json!({"train": {"lanes": 8, "micro_batch": 2, "freeze": ["x"]}, "seed": 1});
        let all = [identity("a", right.clone()), identity("a", right.clone()), identity("b", wrong), {
            identity("c", json!({"seed": 2}))
        }];
        let Agreed { rank, reason } = first_difference(&all, "mend it").unwrap();
        assert_eq!(rank, 2);
        assert_eq!(
            reason,
            "on b it is unlike rank 0 on a: `train.freeze`: found [\"x\"], expected nothing; `train.lanes`: found 8, expected 4; \
             1 more rank(s) differ from rank 0; mend it"
        );
        assert!(first_difference(&all[..2], "").is_none());
    }

    #[test]
    fn many_differences_are_counted() {
        let all = [identity("a", json!({})), identity("b", json!({"a": 1, "b": 1, "c": 1, "d": 1, "e": 1}))];
        let reason = first_difference(&all, "x").unwrap().reason;
        assert!(reason.ends_with("`c`: found 1, expected nothing; 2 more difference(s); x"), "{reason}");
    }
}
