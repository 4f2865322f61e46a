//! What scores need to know of a set of pictures, from the pictures or from a file of statistics.

use super::extract::{Extractor, Pictures};
use super::gaussian::{Gaussian, Moments};
use super::inception::{Features, POOL_FEATURES, SPATIAL_FEATURES};
use super::npz::NpzFile;
use super::{ImageSet, MetricsError};
use crate::images::AtomicFile;
use npyz::WriterBuilder;
use npyz::npz::NpzWriter;
use npyz::zip::{CompressionMethod, DateTime, write::FileOptions};
use std::path::Path;
use tch::{Device, Kind, Tensor};

/// Features of a set, as far as the scores need them; f64 and f32 on the CPU.
pub struct Statistics {
    /// Of the pool features.
    pub pool: Gaussian,
    /// Of the spatial features, where they are known.
    pub spatial: Option<Gaussian>,
    /// Pool features of single pictures, f32 `[N, 2048]`: all of them or an even choice; empty where only the Gaussians are
    /// known.
    pub features: Tensor,
}

/// What is taken from the pictures.
#[derive(Clone, Copy, Debug)]
pub struct Wanted {
    /// Also the Gaussian of the spatial features.
    pub spatial: bool,
    /// At most so many pictures' own features, evenly spread over the set.
    pub features: usize,
}

/// Whether picture `index` of `count` is among `chosen` evenly spread ones.
fn is_chosen(index: usize, count: usize, chosen: usize) -> bool {
    chosen >= count || index * chosen / count != (index + 1) * chosen / count
}

/// Collects features on rank 0.
struct Collector {
    pool: Moments,
    spatial: Option<Moments>,
    kept: Vec<Tensor>,
    seen: usize,
    count: usize,
    wanted: Wanted,
}

impl Collector {
    fn new(count: usize, wanted: Wanted) -> Self {
        Self {
            pool: Moments::new(POOL_FEATURES),
            spatial: wanted.spatial.then(|| Moments::new(SPATIAL_FEATURES)),
            kept: Vec::new(),
            seen: 0,
            count,
            wanted,
        }
    }

    fn take(&mut self, features: Features) -> Result<(), MetricsError> {
        let rows = features.pool.size()[0] as usize;
        let chosen: Vec<i64> = (0..rows)
            .filter(|row| is_chosen(self.seen + row, self.count, self.wanted.features))
            .map(|row| row as i64)
            .collect();
        let pool = features.pool.f_to_device(Device::Cpu)?;
        self.kept.push(pool.f_index_select(0, &Tensor::from_slice(&chosen))?);
        self.pool.add(&pool)?;
        if let Some(spatial) = &mut self.spatial {
            spatial.add(&features.spatial)?;
        }
        self.seen += rows;
        Ok(())
    }

    fn finish(self) -> Result<Statistics, MetricsError> {
        Ok(Statistics {
            pool: self.pool.finish("FID")?,
            spatial: self.spatial.map(|spatial| spatial.finish("sFID")).transpose()?,
            features: Tensor::f_cat(&self.kept, 0)?,
        })
    }
}

impl Statistics {
    /// Of pictures that `pictures` makes; all ranks call it together, rank 0 gets the result.
    ///
    /// # Errors
    /// As [`Extractor::run`].
    pub fn of_pictures(
        extractor: &Extractor,
        count: usize,
        wanted: Wanted,
        pictures: Pictures,
    ) -> anyhow::Result<Option<Self>> {
        let mut collector = Collector::new(count, wanted);
        extractor.run(count, pictures, &mut |features| Ok(collector.take(features)?))?;
        Ok(extractor.collects().then(|| collector.finish()).transpose()?)
    }

    /// Of a set; all ranks call it together, rank 0 gets the result.
    ///
    /// # Errors
    /// As [`Extractor::run_set`].
    pub fn of_set(
        extractor: &Extractor,
        set: &ImageSet,
        wanted: Wanted,
        progress: &dyn Fn(usize),
    ) -> anyhow::Result<Option<Self>> {
        let mut collector = Collector::new(set.count(), wanted);
        extractor.run_set(set, progress, &mut |features| Ok(collector.take(features)?))?;
        Ok(extractor.collects().then(|| collector.finish()).transpose()?)
    }

    /// From `mu`, `sigma`, and where present `mu_s`, `sigma_s` (as the field's reference batches have them) and `pool` (single
    /// pictures' features, as [`Self::save`] writes them); `None` when the file has no `mu`.
    ///
    /// # Errors
    /// A damaged file, statistics of other features, or of other Inception weights than those with the SHA-256 `digest`.
    pub fn read(path: &Path, digest: Option<&str>) -> Result<Option<Self>, MetricsError> {
        let mut file = NpzFile::open(path)?;
        if !file.has("mu") {
            return Ok(None);
        }
        if file.has(WEIGHTS) {
            let mut array = file.array(WEIGHTS)?;
            let found: String = array.read(32)?.iter().map(|byte| format!("{byte:02x}")).collect();
            if let Some(digest) = digest.filter(|digest| *digest != found) {
                return Err(array.refuse(format!(
                    "the statistics were made with Inception weights {found}, not with those given ({digest}); make them again"
                )));
            }
        }
        let mut gaussian = |mean: &str, covariance: &str, size: i64| {
            let size = size as usize;
            let mean = Tensor::from_slice(&file.array(mean)?.into_f64(&[size])?);
            let covariance = Tensor::from_slice(&file.array(covariance)?.into_f64(&[size, size])?);
            let covariance = covariance.f_view([size as i64, size as i64])?;
            Ok::<_, MetricsError>(Gaussian { mean, covariance, factor: None })
        };
        let pool = gaussian("mu", "sigma", POOL_FEATURES)?;
        let has_spatial = NpzFile::open(path)?.has("mu_s");
        let spatial = has_spatial.then(|| gaussian("mu_s", "sigma_s", SPATIAL_FEATURES)).transpose()?;
        let features = if file.has("pool") {
            let array = file.array("pool")?;
            let &[count, size] = array.shape() else { return Err(array.refuse("expected shape [N, 2048]")) };
            if size != POOL_FEATURES as usize {
                return Err(array.refuse(format!("shape {:?}, expected [N, {POOL_FEATURES}]", array.shape())));
            }
            let values = array.into_f64(&[count, size])?;
            Tensor::from_slice(&values).f_view([count as i64, POOL_FEATURES])?.f_to_kind(Kind::Float)?
        } else {
            Tensor::f_zeros([0, POOL_FEATURES], (Kind::Float, Device::Cpu))?
        };
        Ok(Some(Self { pool, spatial, features }))
    }

    /// Writes what [`Self::read`] reads. The field's evaluators take `mu`, `sigma`, `mu_s` and `sigma_s` from it, too.
    ///
    /// # Errors
    /// Those of the file system.
    pub fn save(&self, path: &Path, digest: Option<&str>) -> Result<(), MetricsError> {
        let unwritable = |error: std::io::Error| MetricsError::file(path, format!("cannot write it: {error}"));
        let mut npz = NpzWriter::new(AtomicFile::create(path).map_err(unwritable)?);
        let mut gaussian = |names: [&str; 2], gaussian: &Gaussian| {
            write_array::<f64>(&mut npz, names[0], &gaussian.mean, path)?;
            write_array::<f64>(&mut npz, names[1], &gaussian.covariance, path)
        };
        gaussian(["mu", "sigma"], &self.pool)?;
        if let Some(spatial) = &self.spatial {
            gaussian(["mu_s", "sigma_s"], spatial)?;
        }
        write_array::<f32>(&mut npz, "pool", &self.features, path)?;
        let bytes: Option<Vec<u8>> = digest.and_then(|digest| {
            let pairs = digest.as_bytes().chunks(2).map(|pair| std::str::from_utf8(pair).ok());
            pairs.map(|pair| u8::from_str_radix(pair?, 16).ok()).collect()
        });
        if let Some(bytes) = bytes {
            write_array::<u8>(&mut npz, WEIGHTS, &Tensor::from_slice(&bytes), path)?;
        }
        let file = npz.zip_writer().finish().map_err(|error| unwritable(error.into()))?;
        file.commit().map_err(unwritable)
    }
}

/// SHA-256 of the weight file that the features were computed with.
const WEIGHTS: &str = "inception_sha256";

fn write_array<T>(npz: &mut NpzWriter<AtomicFile>, name: &str, tensor: &Tensor, path: &Path) -> Result<(), MetricsError>
where
    T: npyz::AutoSerialize + tch::kind::Element + Copy,
    Vec<T>: TryFrom<Tensor, Error = tch::TchError>,
{
    let values = Vec::<T>::try_from(tensor.f_contiguous()?.f_view([-1])?)?;
    let shape: Vec<u64> = tensor.size().iter().map(|&side| side as u64).collect();
    let options =
        FileOptions::default().compression_method(CompressionMethod::Stored).last_modified_time(DateTime::default());
    let mut write = || {
        let mut writer = npz.array::<T>(name, options)?.default_dtype().shape(&shape).begin_nd()?;
        writer.extend(values.iter().copied())?;
        writer.finish()
    };
    write().map_err(|error| MetricsError::file(path, format!("cannot write it: {error}")))
}
