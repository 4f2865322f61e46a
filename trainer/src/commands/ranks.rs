//! What commands that run as several ranks share.

use super::source;
use crate::engine::agree::{Agreed, agree};
use crate::model::{Model, WeightSet};
use anyhow::{Context, Result, bail};
use checkpoint::CheckpointReader;
use collective::Collective;
use configs::{RunConfig, exit};
use std::collections::{BTreeSet, HashMap};
use std::path::PathBuf;
use std::time::Duration;
use tch::{Device, Tensor};

/// The run's config, as the launcher gives it to its ranks.
#[derive(clap::Args)]
pub struct ConfigArgs {
    /// A run's config, for what is not given here and for how long ranks wait for each other. The launcher gives it.
    #[arg(long, value_name = "FILE")]
    config: Option<PathBuf>,
    /// Overrides of config keys.
    #[arg(long = "set", value_name = "KEY=VALUE", requires = "config")]
    overrides: Vec<String>,
}

/// Lets the kernel end this process together with its parent: a rank whose launcher is gone must not go on.
pub fn end_with_parent() {
    // SAFETY: prctl with these arguments only sets a flag of this process.
    unsafe { libc::prctl(libc::PR_SET_PDEATHSIG, libc::SIGKILL) };
}

/// Runs `work` as one rank of the world that the environment describes, mostly of one, and gives the exit code. A config makes
/// it a rank of the launcher's, which must not outlive it. Ranks wait for each other as long as the config says (ten
/// minutes without one), and at least for `at_least`.
///
/// # Errors
/// A config that cannot be used. Later failures are reported here, by one rank, because the others must be ended too.
pub fn together(
    args: &ConfigArgs,
    at_least: Duration,
    work: impl FnOnce(Option<&RunConfig>, &dyn Collective) -> Result<()>,
) -> Result<i32> {
    let config = args.config.as_ref().map(|path| RunConfig::load(path, &args.overrides)).transpose()?;
    if config.is_some() {
        end_with_parent();
    }
    let deadline = Duration::from_secs(config.as_ref().map_or(600, |config| config.collective.timeout_s));
    let collective = collective::from_environment(deadline.max(at_least))?;
    match work(config.as_ref(), &*collective) {
        Ok(()) => Ok(exit::OK),
        Err(error) => Ok(conclude(&*collective, &error, error.is::<Agreed>())),
    }
}

/// Says an error and gives the exit code. Where every rank has this very error, one speaks and each can end by itself;
/// otherwise the others may be waiting for this one, and all are ended.
pub fn conclude(collective: &dyn Collective, error: &anyhow::Error, is_agreed: bool) -> i32 {
    let alone = collective.world_size() == 1;
    if is_agreed || alone {
        if collective.rank() == 0 {
            eprintln!("trainer: error: {error:#}");
        }
        return exit::FAILED;
    }
    eprintln!("trainer: error: rank {}: {error:#}", collective.rank());
    collective.abort(exit::FAILED)
}

/// Opens the checkpoint at `url` on all ranks together: the one that rank 0 finds, since a run may commit or remove
/// others meanwhile.
///
/// # Errors
/// No such run or checkpoint, or it is damaged; all ranks agree on it.
pub fn open_together(url: &str, collective: &dyn Collective) -> Result<CheckpointReader> {
    let found = match collective.rank() {
        0 => source::reader(url).map(Some),
        _ => Ok(None),
    };
    let found = agree(collective, found.map_err(Into::into))?;
    let manifest = found.as_ref().map(|reader| serde_json::to_vec(reader.manifest())).transpose()?;
    let manifests = collective.gather_bytes(&manifest.unwrap_or_default())?;
    let reader = match found {
        Some(reader) => Ok(reader),
        None => serde_json::from_slice(&manifests[0])
            .context("the manifest that rank 0 found")
            .and_then(|manifest| Ok(source::reader_of(url, &manifest)?)),
    };
    agree(collective, reader)
}

/// The weights of one section of a checkpoint, without touching the others.
///
/// # Errors
/// No such section, or tensors of another model.
pub fn load_weights(reader: &CheckpointReader, model: &dyn Model, section: &str, device: Device) -> Result<WeightSet> {
    let prefix = format!("{section}/");
    let mut tensors = HashMap::new();
    for name in reader.names().filter(|name| name.starts_with(&prefix)) {
        let shape: Vec<i64> = reader.shape(name).unwrap_or_default().iter().map(|&side| side as i64).collect();
        let values = Tensor::from_slice(&reader.read_all_f32(name)?).view(shape.as_slice()).to_device(device);
        tensors.insert(name[prefix.len()..].to_owned(), values);
    }
    if tensors.is_empty() {
        let sections: BTreeSet<&str> = reader.names().filter_map(|name| Some(name.split_once('/')?.0)).collect();
        let sections: Vec<&str> = sections.into_iter().filter(|section| *section != "adamw").collect();
        bail!("--weights {section}: the checkpoint has no such section; it has {}", sections.join(", "));
    }
    Ok(WeightSet::from_named(model, tensors)?)
}
