//! `latents verify`.

use std::process::ExitCode;

use clap::Args;
use data_loader::{DataError, Verification, VerifyOptions};

use crate::place::Place;
use crate::progress;

#[derive(Args)]
pub struct VerifyArgs {
    /// Print one JSON object.
    #[arg(long)]
    json: bool,
    /// Row groups that are checked at a time.
    #[arg(long, value_name = "N", default_value_t = 2, value_parser = clap::value_parser!(u16).range(1..=1024))]
    threads: u16,
    /// Problems that are named; the others are counted.
    #[arg(long, value_name = "N", default_value_t = 100)]
    max_problems: usize,
    /// Labels must lie in 0..N, whatever the metadata says.
    #[arg(long, value_name = "N")]
    num_classes: Option<usize>,
    #[command(flatten)]
    place: Place,
}

pub fn run(args: &VerifyArgs) -> anyhow::Result<ExitCode> {
    let report = match args.place.open_sound() {
        Ok((dataset, errors)) => {
            let options = VerifyOptions {
                threads: args.threads.into(),
                // A data set with a problem must not pass for want of room to name it.
                max_problems: args.max_problems.max(1),
                num_classes: args.num_classes,
            };
            let bar = progress::bar(dataset.meta().rows);
            let report = data_loader::verify_with(&dataset, &options, &mut |rows| bar.set_position(rows));
            bar.finish_and_clear();
            report.with_errors_of_files(errors)
        }
        // That nothing can be opened is a finding too.
        Err(error) => Verification { url: args.place.url(), ..Verification::default() }
            .with_errors_of_files(vec![error.downcast::<DataError>()?]),
    };
    if args.json {
        println!("{}", serde_json::to_string(&report)?);
    } else {
        print(&report);
    }
    Ok(if report.is_good() { ExitCode::SUCCESS } else { ExitCode::from(configs::exit::FAILED as u8) })
}

fn print(report: &Verification) {
    for problem in &report.problems {
        eprintln!("{}", problem.message);
    }
    if report.more_problems > 0 {
        eprintln!("… and {} more", report.more_problems);
    }
    let Verification { url, rows, row_groups, files, pages, pages_without_checksum, ids, .. } = report;
    let total = report.problems.len() as u64 + report.more_problems;
    let verdict = if total == 0 { "good".to_owned() } else { format!("{total} problems") };
    println!("{url}: {verdict}: {rows} rows in {row_groups} row groups of {files} files");
    if *pages > 0 {
        let checksums = match pages_without_checksum {
            0 => "all with checksums".to_owned(),
            without => format!("{without} without a checksum, where a changed bit may go unnoticed"),
        };
        println!(
            "  {pages} pages, {checksums}; {}",
            match ids {
                0 => "no column of ids".to_owned(),
                ids => format!("{ids} ids compared"),
            }
        );
    }
    if report.captions > 0 {
        println!("  {} captions", report.captions);
    }
}
