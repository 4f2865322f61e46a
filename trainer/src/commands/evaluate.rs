//! `trainer evaluate`: the field's scores of a set of samples.

use super::ranks::{ConfigArgs, together};
use crate::device::DeviceChoice;
use crate::engine::agree::agree;
use crate::ffi;
use crate::metrics::{Extractor, Fit, ImageSet, Inception, Reference, Scores, Statistics, Wanted};
use anyhow::{Context, Result, bail};
use collective::Collective;
use configs::RunConfig;
use indicatif::{ProgressBar, ProgressStyle};
use std::cell::Cell;
use std::io::IsTerminal;
use std::path::PathBuf;
use std::time::{Duration, Instant};

/// Options of `trainer evaluate`.
#[derive(clap::Args)]
pub struct EvaluateArgs {
    #[command(flatten)]
    run: ConfigArgs,
    /// The samples: FILE.npz (arr_0, uint8 [N, H, W, 3]), a folder of images, or idx:DIR[:train|test], folder:DIR, tar:GLOB.
    #[arg(long, value_name = "FILE.npz|DIR")]
    samples: Option<String>,
    /// What they are compared with: the same forms, or an .npz with mu, sigma, mu_s, sigma_s (and arr_0 or pool for precision
    /// and recall).
    #[arg(long, value_name = "FILE.npz|DIR")]
    reference: Option<String>,
    /// Inception weights: pt_inception-2015-12-05-6726825d.pth of pytorch-fid, or its tensors as safetensors.
    #[arg(long, value_name = "FILE")]
    inception: Option<PathBuf>,
    /// Keeps the reference's statistics: given as --reference, the file spares the next evaluation all work on the reference.
    #[arg(long, value_name = "FILE.npz")]
    save_stats: Option<PathBuf>,
    /// Crops the images of folders and other sources (not of .npz files) to centred squares of N, as ADM crops.
    #[arg(long, value_name = "N", value_parser = clap::value_parser!(u64).range(1..))]
    image_size: Option<u64>,
    /// With --image-size: puts smaller images into the middle of a black square instead.
    #[arg(long, requires = "image_size")]
    pad: bool,
    /// Reference images that precision and recall take, evenly spread over the set.
    #[arg(long, value_name = "N", default_value_t = 10_000, value_parser = clap::value_parser!(u64).range(4..))]
    reference_num: u64,
    /// Images that pass through the network at once.
    #[arg(long, value_name = "N", default_value_t = 64, value_parser = clap::value_parser!(u64).range(1..))]
    batch: u64,
    /// Prints one JSON object.
    #[arg(long)]
    json: bool,
    /// Writes that object to a file, too.
    #[arg(long, value_name = "FILE.json")]
    out: Option<PathBuf>,
    /// CPU threads of this process [default: all cores; with --config its train.threads_per_rank].
    #[arg(long, value_parser = clap::value_parser!(i32).range(1..))]
    threads: Option<i32>,
    /// Where to compute.
    #[arg(long, value_enum, default_value_t = DeviceChoice::Auto)]
    device: DeviceChoice,
}

/// How long ranks wait for each other at least: rank 0 alone computes the scores from the features.
const PATIENCE: Duration = Duration::from_secs(1800);

/// Evaluates, together with the other ranks of the world where there are any, and gives the exit code.
///
/// # Errors
/// A config that cannot be used. Later failures are reported here, by one rank, because the others must be ended too.
pub fn evaluate(args: &EvaluateArgs) -> Result<i32> {
    together(&args.run, PATIENCE, |config, collective| run(args, config, collective))
}

fn run(args: &EvaluateArgs, config: Option<&RunConfig>, collective: &dyn Collective) -> Result<()> {
    let Prepared { samples, reference, inception } = agree(collective, Prepared::new(args, config, collective))?;
    let extractor = Extractor::new(&inception, collective, args.batch as usize);
    let wanted = Wanted { spatial: true, features: args.reference_num as usize };
    let bar = Progress::of("reference", reference.needed(wanted).map(|(images, _)| images), &extractor);
    let reference = reference.statistics(wanted, &extractor, &|images| bar.add(images))?;
    drop(bar);
    if let Some(path) = &args.save_stats {
        let saved = reference.as_ref().map_or(Ok(()), |reference| reference.save(path, inception.digest()));
        agree(collective, saved.context("--save-stats"))?;
    }
    let Some(samples) = samples else { return Ok(()) };
    let count = samples.count();
    let wanted = Wanted { spatial: reference.as_ref().is_none_or(|of| of.spatial.is_some()), features: count };
    let bar = Progress::of("samples", Some(&samples), &extractor);
    let samples = Statistics::of_set(&extractor, &samples, wanted, &|images| bar.add(images))?;
    drop(bar);
    let scores = match (reference, samples) {
        (Some(reference), Some(samples)) => Scores::compute(&inception, &samples, &reference).map(Some),
        _ => Ok(None),
    };
    let reported = scores
        .map_err(Into::into)
        .and_then(|scores| scores.map_or(Ok(()), |scores| report(args, count, &inception, &scores)));
    agree(collective, reported)
}

/// What a rank has before it computes.
struct Prepared {
    samples: Option<ImageSet>,
    reference: Reference,
    inception: Inception,
}

impl Prepared {
    fn new(args: &EvaluateArgs, config: Option<&RunConfig>, collective: &dyn Collective) -> Result<Self> {
        if args.samples.is_none() && args.save_stats.is_none() {
            bail!("nothing to do: give --samples, or --reference with --save-stats FILE.npz");
        }
        let of_config = config.and_then(|config| config.fid.as_ref());
        let reference = args.reference.as_deref().or(of_config.and_then(|fid| fid.reference.to_str()));
        let reference = reference.context("--reference is missing: what the samples are compared with")?;
        let inception = args.inception.as_ref().or(of_config.map(|fid| &fid.inception));
        let inception = inception.context("--inception is missing: the file of Inception weights")?;
        if let Some(threads) = args.threads.or(config.map(|config| config.train.threads_per_rank as i32)) {
            tch::set_num_threads(threads);
            tch::set_num_interop_threads(1);
        }
        ffi::set_deterministic(false)?;
        let device = args.device.device(collective.local_rank())?;
        let fit = Fit { image_size: args.image_size.map(|size| size as usize), pad: args.pad };
        let samples = args.samples.as_ref().map(|samples| ImageSet::open(samples, fit)).transpose();
        let samples = samples.context("--samples")?;
        let inception = Inception::load(inception, device).context("--inception")?;
        let reference = Reference::open(reference, fit, inception.digest()).context("--reference")?;
        Ok(Self { samples, reference, inception })
    }
}

/// Shows on rank 0 how many pictures are done: a bar, or a line now and then where nobody looks at a terminal.
struct Progress {
    bar: ProgressBar,
    what: &'static str,
    said: Cell<Instant>,
}

/// Between two lines.
const PAUSE: Duration = Duration::from_secs(30);

impl Progress {
    fn of(what: &'static str, images: Option<&ImageSet>, extractor: &Extractor) -> Self {
        let bar = match images.filter(|_| extractor.collects()) {
            Some(images) => ProgressBar::new(images.count() as u64),
            None => ProgressBar::hidden(),
        };
        let template = format!("{what:9} {{bar:40}} {{pos}}/{{len}} images  {{per_sec}}  eta {{eta}}");
        if let Ok(style) = ProgressStyle::with_template(&template) {
            bar.set_style(style);
        }
        Self { bar, what, said: Cell::new(Instant::now()) }
    }

    fn add(&self, images: usize) {
        self.bar.inc(images as u64);
        if !std::io::stderr().is_terminal() && self.said.get().elapsed() >= PAUSE {
            self.said.set(Instant::now());
            eprintln!("{}: {}/{} images", self.what, self.bar.position(), self.bar.length().unwrap_or_default());
        }
    }
}

impl Drop for Progress {
    fn drop(&mut self) {
        self.bar.finish_and_clear();
    }
}

fn report(args: &EvaluateArgs, count: usize, inception: &Inception, scores: &Scores) -> Result<()> {
    let mut report = serde_json::json!(scores);
    report["samples"] = count.into();
    report["inception_sha256"] = inception.digest().into();
    if let Some(path) = &args.out {
        std::fs::write(path, format!("{report}\n")).with_context(|| format!("--out {}", path.display()))?;
    }
    if args.json {
        println!("{report}");
        return Ok(());
    }
    let line = |name: &str, score: Option<f64>| match score {
        Some(score) => println!("{name:16} {score:.4}"),
        None => println!("{name:16} not known: the reference has no data for it"),
    };
    println!("{:16} {:.4} ± {:.4}", "Inception Score", scores.inception_score, scores.inception_score_std);
    line("FID", Some(scores.fid));
    line("sFID", scores.sfid);
    line("Precision", scores.precision);
    line("Recall", scores.recall);
    if count < 50_000 {
        eprintln!(
            "trainer: warning: {count} samples; published scores are of 50,000, and FID falls with the number of samples"
        );
    }
    Ok(())
}
