//! `latents verify`.

use std::process::ExitCode;

use clap::Args;

use crate::place::Place;

#[derive(Args)]
pub struct VerifyArgs {
    #[command(flatten)]
    place: Place,
}

pub fn run(args: &VerifyArgs) -> anyhow::Result<ExitCode> {
    let dataset = args.place.open()?;
    let problems = data_loader::verify(&dataset);
    for problem in &problems {
        eprintln!("{problem}");
    }
    let meta = dataset.meta();
    if problems.is_empty() {
        println!(
            "{}: good: {} rows in {} row groups of {} files",
            dataset.name(),
            meta.rows,
            meta.row_groups,
            meta.files
        );
        return Ok(ExitCode::SUCCESS);
    }
    eprintln!("{}: {} problems in {} rows", dataset.name(), problems.len(), meta.rows);
    Ok(ExitCode::from(configs::exit::FAILED as u8))
}
