//! `trainer digest`: equal lines for equal values, whatever the number of ranks that wrote them.

use super::source;
use anyhow::{Context, Result};
use checkpoint::digest::all_digests;

/// Options of `trainer digest`.
#[derive(clap::Args)]
pub struct DigestArgs {
    /// A run folder (its newest valid checkpoint), or one checkpoint of it (`<run>/checkpoints/step-000001000`,
    /// `<run>/checkpoints/best`).
    url: String,
    /// One line for every tensor, too.
    #[arg(long)]
    tensors: bool,
}

/// Prints `model`, `ema` and `adamw` with the SHA-256 of their values in name order, and `step`; after these a line for
/// every further average (`ema_0.999 …`).
///
/// # Errors
/// No such checkpoint, or it is damaged.
pub fn digest(args: &DigestArgs) -> Result<()> {
    let reader = source::reader(&args.url)?;
    let (sections, tensors) = all_digests(&reader)?;
    let main = ["model", "ema", "adamw"];
    for section in main {
        let digest = sections.get(section).with_context(|| format!("the checkpoint has no section `{section}`"))?;
        println!("{section} {digest}");
    }
    println!("step {}", reader.manifest().step);
    for (section, digest) in sections.iter().filter(|(section, _)| !main.contains(&section.as_str())) {
        println!("{section} {digest}");
    }
    if args.tensors {
        for tensor in tensors {
            println!("{} {} {:?}", tensor.name, tensor.sha256, tensor.shape);
        }
    }
    Ok(())
}
