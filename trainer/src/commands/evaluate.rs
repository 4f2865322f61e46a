//! `trainer evaluate`: the field's scores of a set of samples.

use crate::ffi;
use crate::metrics::{Extractor, Fit, ImageSet, Inception, MetricsError, Scores, Statistics, Wanted};
use anyhow::{Context, Result, bail};
use collective::Collective;
use configs::exit;
use indicatif::{ProgressBar, ProgressStyle};
use std::path::{Path, PathBuf};
use std::time::Duration;
use tch::Device;

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

#[derive(Clone, Copy, PartialEq, Eq, clap::ValueEnum)]
enum DeviceChoice {
    Auto,
    Cpu,
    Cuda,
}

/// How long ranks wait for each other: for the slowest batch, and for the reading of statistics.
const DEADLINE: Duration = Duration::from_secs(1800);

/// Evaluates, on all ranks of an MPI world together where there is one, and gives the process's exit code.
///
/// # Errors
/// Options, images or weights that cannot be used. With several ranks, failures are reported here, because the other ranks
/// must be ended too.
pub fn evaluate(args: &EvaluateArgs) -> Result<i32> {
    let collective = collective::from_environment(DEADLINE)?;
    match run(args, &*collective) {
        Ok(()) => Ok(exit::OK),
        Err(error) if collective.world_size() == 1 => Err(error),
        Err(error) => {
            // An error of all ranks is said once.
            if !matches!(error.downcast_ref(), Some(MetricsError::Rank { .. })) || collective.rank() == 0 {
                eprintln!("trainer: error: rank {}: {error:#}", collective.rank());
            }
            collective.abort(exit::FAILED)
        }
    }
}

fn run(args: &EvaluateArgs, collective: &dyn Collective) -> Result<()> {
    if args.samples.is_none() && args.save_stats.is_none() {
        bail!("nothing to do: give --samples, or --reference with --save-stats FILE.npz");
    }
    let Some(reference) = &args.reference else {
        bail!("--reference is missing: FID, precision and recall compare the samples with it");
    };
    if let Some(threads) = args.threads {
        tch::set_num_threads(threads);
    }
    ffi::set_deterministic()?;
    let device = device(args.device, collective)?;
    let fit = Fit { image_size: args.image_size.map(|size| size as usize), pad: args.pad };
    let samples = args.samples.as_ref().map(|samples| ImageSet::open(samples, fit).context("--samples")).transpose()?;
    let inception = Inception::load(&args.inception, device).context("--inception")?;
    let extractor = Extractor::new(&inception, collective, args.batch as usize);

    let reference = of_reference(reference, fit, args.reference_num as usize, &extractor).context("--reference")?;
    if let (Some(reference), Some(path)) = (&reference, &args.save_stats) {
        reference.save(path, inception.digest()).context("--save-stats")?;
        eprintln!("statistics of the reference: {}", path.display());
    }
    let Some(samples) = samples else { return Ok(()) };
    let count = samples.count();
    let wanted = Wanted { spatial: reference.as_ref().is_none_or(|of| of.spatial.is_some()), features: count };
    let samples = with_progress("samples", &samples, wanted, &extractor).context("--samples")?;
    if let (Some(reference), Some(samples)) = (reference, samples) {
        print(args, count, &inception, &Scores::compute(&inception, &samples, &reference)?);
    }
    Ok(())
}

/// Statistics from the file where it has them, else from the images; only rank 0 gets them.
fn of_reference(spec: &str, fit: Fit, num: usize, extractor: &Extractor) -> Result<Option<Statistics>> {
    let mut wanted = Wanted { spatial: true, features: num };
    let known = match Path::new(spec) {
        path if path.is_file() => Statistics::read(path, extractor.inception().digest())?,
        _ => None,
    };
    let images = match (ImageSet::open(spec, fit), &known) {
        (Ok(images), _) => images,
        // Statistics alone are enough.
        (Err(_), Some(_)) => return Ok(known.filter(|_| extractor.collects())),
        (Err(error), None) => return Err(error.into()),
    };
    let Some(mut known) = known else { return Ok(with_progress("reference", &images, wanted, extractor)?) };
    if known.features.size()[0] == 0 {
        wanted.spatial = false;
        let found = with_progress("reference", &images, wanted, extractor)?;
        return Ok(found.map(|found| {
            known.features = found.features;
            known
        }));
    }
    Ok(extractor.collects().then_some(known))
}

fn with_progress(
    what: &str,
    images: &ImageSet,
    wanted: Wanted,
    extractor: &Extractor,
) -> Result<Option<Statistics>, MetricsError> {
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

fn device(choice: DeviceChoice, collective: &dyn Collective) -> Result<Device> {
    match (choice, ffi::load_cuda().map(|()| tch::Cuda::device_count().max(0) as usize)) {
        (DeviceChoice::Cpu, _) => Ok(Device::Cpu),
        (_, Ok(count)) if count > 0 => Ok(Device::Cuda(collective.local_rank() % count)),
        (DeviceChoice::Auto, _) => Ok(Device::Cpu),
        (DeviceChoice::Cuda, Ok(_)) => bail!("--device cuda: the driver shows no GPU; use --device cpu"),
        (DeviceChoice::Cuda, Err(error)) => bail!("--device cuda: {error}; use --device cpu"),
    }
}
