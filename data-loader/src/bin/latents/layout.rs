//! The arguments of commands that write a data set.

use std::sync::Mutex;
use std::time::{Duration, Instant};

use anyhow::Context;
use clap::{Args, ValueEnum};
use data_loader::Dtype;
use data_loader::convert::{Converted, FileSize, Names, Order, Progress};

/// How the rows are cut into files and in which order.
#[derive(Args)]
pub struct LayoutArgs {
    /// Number type of the stored latents [default: the source's].
    #[arg(long, value_enum)]
    pub dtype: Option<StoredDtype>,
    /// Upper bound on the rows of a file; rows are spread evenly over the files.
    #[arg(long, value_name = "N", value_parser = positive, conflicts_with = "file_bytes")]
    file_rows: Option<usize>,
    /// About how many bytes of numbers a file holds at most, as 512MiB or 2e9.
    #[arg(long, value_name = "BYTES", value_parser = bytes, default_value = "512MiB")]
    file_bytes: u64,
    /// Rows of a row group of parquet.
    #[arg(long, value_name = "N", default_value_t = 4096, value_parser = positive)]
    pub row_group_rows: usize,
    /// Compress parquet with zstd. Latents are mostly noise: this saves little and costs reading speed.
    #[arg(long)]
    pub zstd: bool,
    /// Sort the rows.
    #[arg(long, value_enum, conflicts_with = "shuffle")]
    sort: Option<SortKey>,
    /// Shuffle the rows, keyed by a seed.
    #[arg(long, value_name = "SEED")]
    shuffle: Option<u64>,
    /// Threads that read and write [default: the number of cores].
    #[arg(long, value_name = "N", value_parser = positive)]
    threads: Option<usize>,
}

/// Number type of the stored latents.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
pub enum StoredDtype {
    /// IEEE half precision.
    F16,
    /// The upper half of a single.
    Bf16,
    /// IEEE single precision.
    F32,
}

impl From<StoredDtype> for Dtype {
    fn from(dtype: StoredDtype) -> Self {
        match dtype {
            StoredDtype::F16 => Self::F16,
            StoredDtype::Bf16 => Self::Bf16,
            StoredDtype::F32 => Self::F32,
        }
    }
}

/// What rows are sorted by.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
enum SortKey {
    /// The class.
    Label,
    /// The name.
    Id,
}

impl LayoutArgs {
    /// The order of the rows.
    pub fn order(&self) -> Order {
        match (self.sort, self.shuffle) {
            (Some(SortKey::Label), _) => Order::ByLabel,
            (Some(SortKey::Id), _) => Order::ById,
            (None, Some(seed)) => Order::Shuffled(seed),
            (None, None) => Order::Source,
        }
    }

    /// How large a file becomes.
    pub fn file_size(&self) -> FileSize {
        self.file_rows.map_or(FileSize::Bytes(self.file_bytes), FileSize::Rows)
    }

    /// Threads that read and write.
    pub fn threads(&self) -> usize {
        self.threads.unwrap_or_else(|| std::thread::available_parallelism().map_or(1, usize::from))
    }
}

/// What a source's columns, tensors or members are called.
#[derive(Args)]
pub struct NameArgs {
    /// Name of a column, tensor or member, as `latent=vae.npy`; keys: latent, moments, latent_mean, latent_logvar,
    /// latent_flipped, label, id, shape, caption, caption_mask. In WebDataset a field of the JSON member is `label=json:class`.
    #[arg(long = "column", value_name = "KEY=NAME")]
    columns: Vec<String>,
}

impl NameArgs {
    /// The names that are given.
    pub fn names(&self) -> anyhow::Result<Names> {
        let mut names = Names::default();
        for text in &self.columns {
            let (key, name) = text.split_once('=').with_context(|| format!("--column {text}: expected KEY=NAME"))?;
            let place = match key {
                "latent" => &mut names.latent,
                "moments" => &mut names.moments,
                "latent_mean" => &mut names.latent_mean,
                "latent_logvar" => &mut names.latent_logvar,
                "latent_flipped" => &mut names.latent_flipped,
                "label" => &mut names.label,
                "id" => &mut names.id,
                "shape" => &mut names.shape,
                "caption" => &mut names.caption,
                "caption_mask" => &mut names.caption_mask,
                _ => anyhow::bail!(
                    "--column {text}: unknown key `{key}`; expected latent, moments, latent_mean, latent_logvar, latent_flipped, label, id, shape, caption or caption_mask"
                ),
            };
            *place = Some(name.to_owned());
        }
        Ok(names)
    }
}

/// Tells on stderr how far a conversion is, every few seconds.
pub struct Told {
    started: Instant,
    last: Mutex<Instant>,
}

impl Told {
    /// Starts the clock.
    pub fn new() -> Self {
        Self { started: Instant::now(), last: Mutex::new(Instant::now()) }
    }

    /// Takes a report; most are passed over.
    pub fn report(&self, progress: Progress) {
        const EVERY: Duration = Duration::from_secs(5);
        let Ok(mut last) = self.last.try_lock() else { return };
        if last.elapsed() < EVERY {
            return;
        }
        *last = Instant::now();
        let percent = progress.rows * 100 / progress.of_rows.max(1);
        eprintln!("{} of {} rows {} ({percent}%)", progress.rows, progress.of_rows, progress.phase);
    }

    /// Tells what was written.
    pub fn done(&self, converted: &Converted, to: &str) {
        let seconds = self.started.elapsed().as_secs_f64();
        let mb = converted.latent_bytes as f64 / 1e6;
        eprintln!(
            "{to}: {} rows in {} files, {mb:.1} MB of latents; {seconds:.1} s, {:.1} MB/s",
            converted.rows,
            converted.files,
            mb / seconds.max(1e-9)
        );
        let factor = converted.scaling_factor.map_or("not known".into(), |factor| factor.to_string());
        let classes = converted.num_classes.map_or("not known".into(), |classes| classes.to_string());
        eprintln!("scaling factor {factor}, classes {classes}");
    }
}

/// A whole number, 1 or more.
pub fn positive(text: &str) -> Result<usize, String> {
    text.parse().ok().filter(|&n| n > 0).ok_or_else(|| "expected a whole number, 1 or more".into())
}

fn bytes(text: &str) -> Result<u64, String> {
    let units = [
        ("KiB", 1u64 << 10),
        ("MiB", 1 << 20),
        ("GiB", 1 << 30),
        ("kB", 1000),
        ("MB", 1_000_000),
        ("GB", 1_000_000_000),
    ];
    let (number, unit) = units
        .iter()
        .find_map(|(name, unit)| Some((text.strip_suffix(name)?, *unit)))
        .unwrap_or((text.trim_end_matches('B'), 1));
    let bytes = number.trim().parse::<f64>().ok().map(|number| number * unit as f64);
    bytes
        .filter(|bytes| *bytes >= 1.0 && *bytes < 1e18)
        .map(|bytes| bytes as u64)
        .ok_or_else(|| "expected a number of bytes such as 512MiB, 2GB or 2e9".into())
}
