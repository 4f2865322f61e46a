//! `verify-bundle FILE…`: runs Ditharos on recorded bundles and tells how far it is from them.

use clap::Parser;
use ditharos_tests::verify::verify;
use std::path::PathBuf;
use std::process::ExitCode;

/// Runs Ditharos on numeric reference bundles (safetensors with weights, inputs and expected outputs) and prints one
/// line per tensor group: name, error, tolerance, ok or FAIL. Exit code 0 only when every tensor of every file is
/// within its tolerance.
#[derive(Parser)]
#[command(name = "verify-bundle", version)]
struct Arguments {
    /// Bundles to verify.
    #[arg(required = true, value_name = "FILE")]
    files: Vec<PathBuf>,
    /// Threads of libtorch.
    #[arg(long, default_value_t = 1, value_parser = clap::value_parser!(u16).range(1..))]
    threads: u16,
}

fn main() -> ExitCode {
    let arguments = Arguments::parse();
    tch::set_num_threads(i32::from(arguments.threads));
    // Verified with the kernels that training uses.
    if let Err(error) = trainer::ffi::set_deterministic(false) {
        eprintln!("verify-bundle: cannot ask libtorch for deterministic kernels: {error}");
        return ExitCode::FAILURE;
    }
    let mut failed = 0;
    for file in &arguments.files {
        let verdict = verify(file);
        let findings = &verdict.findings;
        println!("{}: {}", file.display(), verdict.kind.as_deref().unwrap_or("kind unknown"));
        for line in &findings.lines {
            println!("{line}");
        }
        let end = if findings.ok { "ok" } else { "FAIL" };
        println!("{}: {end} (largest error over tolerance {:.2})\n", file.display(), findings.worst_ratio);
        failed += usize::from(!findings.ok);
    }
    println!("{} of {} bundles ok", arguments.files.len() - failed, arguments.files.len());
    if failed == 0 { ExitCode::SUCCESS } else { ExitCode::FAILURE }
}
