//! `trainer evaluate`: the field's scores of a set of samples.

use super::ranks::conclude;
use crate::device::DeviceChoice;
use crate::engine::agree::{Agreed, agree};
use crate::ffi;
use crate::metrics::{Extractor, Fit, ImageSet, Inception, MetricsError, Scores, Statistics, Wanted};
use anyhow::{Context, Result, bail};
use collective::Collective;
use configs::exit;
use indicatif::{ProgressBar, ProgressStyle};
use std::path::{Path, PathBuf};
use std::time::Duration;

/// Options of `trainer evaluate`.
#[derive(clap::Args)]
pub struct EvaluateArgs {
    /// The samples: FILE.npz (arr_0, uint8 [N, H, W, 3]), a folder of images, or idx:DIR[:train|test], folder:DIR, tar:GLOB.
    #[arg(long, value_name = "FILE.npz|DIR")]
    samples: Option<String>,
    /// What they are compared with: the same forms, or an .npz with mu, sigma, mu_s, sigma_s (and arr_0 or pool for precision
    /// and recall).
    #[arg(long, value_name = "FILE.npz|DIR")]
    reference: Option<String>,
    /// Inception weights: pt_inception-2015-12-05-6726825d.pth of pytorch-fid, or its tensors as safetensors.
    #[arg(long, value_name = "FILE")]
    inception: PathBuf,
    /// Keeps the reference's statistics: given as --reference, the file spares the next evaluation all work on the reference.
    #[arg(long, value_name = "FILE.npz", requires = "reference")]
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
    /// CPU threads of this process; all cores when not given.
    #[arg(long, value_parser = clap::value_parser!(i32).range(1..))]
    threads: Option<i32>,
    /// Where to compute.
    #[arg(long, value_enum, default_value_t = DeviceChoice::Auto)]
    device: DeviceChoice,
}

/// How long ranks wait for each other: for the slowest batch, and for the reading of statistics.
const DEADLINE: Duration = Duration::from_secs(1800);

/// Evaluates, together with the other ranks of the world where there are any, and gives the exit code.
///
/// # Errors
/// No world. Later failures are reported here, by one rank, because the others must be ended too.
pub fn evaluate(args: &EvaluateArgs) -> Result<i32> {
    let collective = collective::from_environment(DEADLINE)?;
    match run(args, &*collective) {
        Ok(()) => Ok(exit::OK),
        Err(error) => Ok(conclude(&*collective, &error, error.is::<Agreed>())),
    }
}

fn run(args: &EvaluateArgs, collective: &dyn Collective) -> Result<()> {
    let Prepared { samples, reference, inception } = agree(collective, Prepared::new(args, collective))?;
    let extractor = Extractor::new(&inception, collective, args.batch as usize);
    let reference = reference.statistics(args.reference_num as usize, &extractor)?;
    if let Some(path) = &args.save_stats {
        let saved = reference.as_ref().map_or(Ok(()), |reference| reference.save(path, inception.digest()));
        agree(collective, saved.context("--save-stats"))?;
    }
    let Some(samples) = samples else { return Ok(()) };
    let count = samples.count();
    let wanted = Wanted { spatial: reference.as_ref().is_none_or(|of| of.spatial.is_some()), features: count };
    let samples = with_progress("samples", &samples, wanted, &extractor)?;
    let scores = match (reference, samples) {
        (Some(reference), Some(samples)) => Scores::compute(&inception, &samples, &reference).map(Some),
        _ => Ok(None),
    };
    if let Some(scores) = agree(collective, scores.map_err(Into::into))? {
        print(args, count, &inception, &scores);
    }
    Ok(())
}

/// What a rank has before it computes.
struct Prepared {
    samples: Option<ImageSet>,
    reference: Reference,
    inception: Inception,
}

/// What is known of the reference.
struct Reference {
    images: Option<ImageSet>,
    statistics: Option<Statistics>,
}

impl Prepared {
    fn new(args: &EvaluateArgs, collective: &dyn Collective) -> Result<Self> {
        if args.samples.is_none() && args.save_stats.is_none() {
            bail!("nothing to do: give --samples, or --reference with --save-stats FILE.npz");
        }
        let reference = args.reference.as_ref();
        let reference =
            reference.context("--reference is missing: FID, precision and recall compare the samples with it")?;
        if let Some(threads) = args.threads {
            tch::set_num_threads(threads);
        }
        ffi::set_deterministic()?;
        let device = args.device.device(collective.local_rank())?;
        let fit = Fit { image_size: args.image_size.map(|size| size as usize), pad: args.pad };
        let samples = args.samples.as_ref().map(|samples| ImageSet::open(samples, fit)).transpose();
        let samples = samples.context("--samples")?;
        let inception = Inception::load(&args.inception, device).context("--inception")?;
        let reference = Reference::open(reference, fit, inception.digest()).context("--reference")?;
        Ok(Self { samples, reference, inception })
    }
}

impl Reference {
    /// `digest` is that of the Inception weights.
    fn open(spec: &str, fit: Fit, digest: Option<&str>) -> Result<Self, MetricsError> {
        let path = Path::new(spec);
        let statistics = if path.is_file() { Statistics::read(path, digest)? } else { None };
        let images = match ImageSet::open(spec, fit) {
            Ok(images) => Some(images),
            // Statistics alone are enough.
            Err(_) if statistics.is_some() => None,
            Err(error) => return Err(error),
        };
        Ok(Self { images, statistics })
    }

    /// The statistics that the file has, the rest from the images. All ranks call it together, rank 0 gets the result.
    fn statistics(self, features: usize, extractor: &Extractor) -> Result<Option<Statistics>> {
        match (self.statistics, self.images) {
            (None, Some(images)) => with_progress("reference", &images, Wanted { spatial: true, features }, extractor),
            (Some(mut known), Some(images)) if known.features.size()[0] == 0 => {
                let found = with_progress("reference", &images, Wanted { spatial: false, features }, extractor)?;
                Ok(found.map(|found| {
                    known.features = found.features;
                    known
                }))
            }
            (known, _) => Ok(known.filter(|_| extractor.collects())),
        }
    }
}

fn with_progress(what: &str, images: &ImageSet, wanted: Wanted, extractor: &Extractor) -> Result<Option<Statistics>> {
    let bar = match extractor.collects() {
        true => ProgressBar::new(images.count() as u64),
        false => ProgressBar::hidden(),
    };
    let template = format!("{what:9} {{bar:40}} {{pos}}/{{len}} images  {{per_sec}}  eta {{eta}}");
    if let Ok(style) = ProgressStyle::with_template(&template) {
        bar.set_style(style);
    }
    let statistics = Statistics::of_set(extractor, images, wanted, &|images| bar.inc(images as u64));
    bar.finish_and_clear();
    statistics
}

fn print(args: &EvaluateArgs, count: usize, inception: &Inception, scores: &Scores) {
    if args.json {
        let mut report = serde_json::json!(scores);
        report["samples"] = count.into();
        report["inception_sha256"] = inception.digest().into();
        println!("{report}");
        return;
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
            "trainer: note: {count} samples; published scores are of 50,000, and FID falls with the number of samples"
        );
    }
}
