//! `trainer inspect`: what is in a checkpoint or in a file of weights.

use crate::interop::summary::{SectionSummary, Summary, TensorSummary};
use anyhow::Result;
use serde_json::Value;

/// Options of `trainer inspect`.
#[derive(clap::Args)]
pub struct InspectArgs {
    /// A run folder (its newest valid checkpoint), one checkpoint of it, a torch.save or safetensors file, or a diffusers
    /// folder.
    source: String,
    /// One JSON object.
    #[arg(long)]
    json: bool,
    /// Every tensor, too.
    #[arg(long)]
    tensors: bool,
}

/// Prints the facts, the sections and with `--tensors` every tensor.
///
/// # Errors
/// Nothing readable there, or damage.
pub fn inspect(args: &InspectArgs) -> Result<()> {
    let mut summary = Summary::of(&args.source)?;
    if !args.tensors {
        summary.tensors.clear();
    }
    if args.json {
        println!("{}", serde_json::to_string_pretty(&summary)?);
        return Ok(());
    }
    println!("{}: {}", summary.source, summary.kind);
    print_facts("", &summary.facts);
    println!(
        "\n{:<24} {:>8} {:>14} {:>14} {:>13} {:>11}",
        "section", "tensors", "elements", "bytes", "l2 norm", "non-finite"
    );
    for SectionSummary { name, tensors, numel, bytes, l2_norm, non_finite } in &summary.sections {
        let name = if name.is_empty() { "(none)" } else { name };
        println!("{name:<24} {tensors:>8} {numel:>14} {bytes:>14} {l2_norm:>13.6e} {non_finite:>11}");
    }
    if !summary.tensors.is_empty() {
        let width = summary.tensors.iter().map(|tensor| tensor.name.len()).max().unwrap_or_default();
        let columns = format!("{:>13} {:>13} {:>13} {:>13} {:>11}", "l2 norm", "min", "max", "mean", "non-finite");
        println!("\n{:<width$} {:<5} {:<20} {columns}", "tensor", "dtype", "shape");
        for TensorSummary { name, dtype, shape, stats, .. } in &summary.tensors {
            let shape = format!("{shape:?}");
            let numbers =
                [stats.l2_norm, stats.min, stats.max, stats.mean].map(|number| format!("{number:>13.6e}")).join(" ");
            println!("{name:<width$} {dtype:<5} {shape:<20} {numbers} {:>11}", stats.non_finite);
        }
    }
    Ok(())
}

/// One line a fact; the members of an object follow each other on its line, those of objects in it have lines of their own.
fn print_facts(name: &str, value: &Value) {
    let Value::Object(members) = value else {
        println!("{name:<24} {}", shown(value));
        return;
    };
    let is_object =
        |value: &Value| value.is_object() || value.as_array().is_some_and(|items| items.iter().any(Value::is_object));
    let plain: Vec<String> = members
        .iter()
        .filter(|(_, value)| !is_object(value) && !value.is_null())
        .map(|(key, value)| format!("{key}={}", shown(value)))
        .collect();
    if !plain.is_empty() {
        println!("{:<24} {}", if name.is_empty() { "facts" } else { name }, plain.join(" "));
    }
    for (key, value) in members.iter().filter(|(_, value)| is_object(value)) {
        let name = if name.is_empty() { key.clone() } else { format!("{name}.{key}") };
        match value {
            Value::Array(items) => items.iter().for_each(|item| print_facts(&name, item)),
            value => print_facts(&name, value),
        }
    }
}

/// Strings without quotes; lists of many numbers by their length.
fn shown(value: &Value) -> String {
    match value {
        Value::String(text) => text.clone(),
        Value::Array(items) if items.len() > 8 => format!("[{} items]", items.len()),
        value => value.to_string(),
    }
}
