//! Features of many pictures, computed by all ranks together.

use super::inception::{Features, Inception, POOL_FEATURES, SPATIAL_FEATURES};
use super::{ImageSet, MetricsError};
use collective::Collective;
use std::ops::Range;
use std::sync::mpsc::{Receiver, sync_channel};
use tch::Tensor;

/// Batches that are read ahead of the network.
const AHEAD: usize = 2;

/// Computes features; every rank of the world has one over the same weights.
pub struct Extractor<'a> {
    inception: &'a Inception,
    collective: &'a dyn Collective,
    /// Pictures that pass through the network at once.
    batch: usize,
}

/// Gives pictures number `range` as uint8 `[N, 3, H, W]`.
pub type Pictures<'a> = &'a mut dyn FnMut(Range<usize>) -> Result<Tensor, MetricsError>;
/// Takes the features of the next pictures.
pub type Sink<'a> = &'a mut dyn FnMut(Features) -> Result<(), MetricsError>;

impl<'a> Extractor<'a> {
    /// An extractor for this rank.
    pub fn new(inception: &'a Inception, collective: &'a dyn Collective, batch: usize) -> Self {
        Self { inception, collective, batch: batch.max(1) }
    }

    /// The network.
    pub fn inception(&self) -> &Inception {
        self.inception
    }

    /// Whether this is the rank that the features go to.
    pub fn collects(&self) -> bool {
        self.collective.rank() == 0
    }

    /// Features of `count` pictures: batches are dealt out to the ranks, and `sink` of rank 0 gets them in order, the same
    /// whatever the number of ranks. All ranks call it together; those of other ranks ask `pictures` for their own ranges only.
    ///
    /// # Errors
    /// [`MetricsError::Rank`] on all ranks when one of them failed; what `sink` or the collective reports on one alone.
    pub fn run(&self, count: usize, pictures: Pictures, sink: Sink) -> Result<(), MetricsError> {
        let (mine, world_size) = (self.collective.rank(), self.collective.world_size());
        let batches = count.div_ceil(self.batch);
        let range = |number: usize| number * self.batch..count.min((number + 1) * self.batch);
        for first in (0..batches).step_by(world_size) {
            let number = first + mine;
            let features = match number < batches {
                true => pictures(range(number)).and_then(|pictures| self.inception.features(&pictures)).map(Some),
                false => Ok(None),
            };
            if world_size == 1 {
                features?.map_or(Ok(()), &mut *sink)?;
                continue;
            }
            let message = match features.and_then(|features| features.as_ref().map(encode).transpose()) {
                Ok(values) => values.unwrap_or_default(),
                Err(error) => failure(&error),
            };
            let all = self.collective.gather_bytes(&message)?;
            if let Some((rank, reason)) = all.iter().enumerate().find_map(|(rank, m)| Some((rank, reason_in(m)?))) {
                return Err(MetricsError::Rank { rank, reason });
            }
            if mine == 0 {
                for message in all.iter().take(batches - first) {
                    sink(decode(message)?)?;
                }
            }
        }
        Ok(())
    }

    /// [`Self::run`] over a set; a thread reads ahead while the network computes. `progress` is told the number of pictures
    /// after each batch that arrives.
    ///
    /// # Errors
    /// As [`Self::run`].
    pub fn run_set(&self, set: &ImageSet, progress: &dyn Fn(usize), sink: Sink) -> Result<(), MetricsError> {
        let (mine, world_size) = (self.collective.rank(), self.collective.world_size());
        let count = set.count();
        let starts = (mine * self.batch..count).step_by(world_size * self.batch);
        let ranges: Vec<Range<usize>> = starts.map(|start| start..count.min(start + self.batch)).collect();
        std::thread::scope(|scope| {
            let (sender, receiver) = sync_channel(AHEAD);
            scope.spawn(move || {
                let mut reader = set.reader();
                for range in ranges {
                    let batch = match &mut reader {
                        Ok(reader) => reader.read(range),
                        Err(error) => Err(MetricsError::file(std::path::Path::new(set.spec()), &*error)),
                    };
                    // Refused when the other side has given up.
                    if sender.send(batch).is_err() {
                        return;
                    }
                }
            });
            self.run(count, &mut |_| next(&receiver), &mut |features| {
                progress(features.pool.size()[0] as usize);
                sink(features)
            })
        })
    }
}

fn next(receiver: &Receiver<Result<Tensor, MetricsError>>) -> Result<Tensor, MetricsError> {
    receiver.recv().unwrap_or_else(|_| {
        Err(MetricsError::Undefined { metric: "reading ahead", reason: "the reading thread ended early".into() })
    })
}

/// What a message of features begins with.
const FEATURES: u8 = 0;
/// What a message of a failure begins with.
const FAILURE: u8 = 1;

fn encode(features: &Features) -> Result<Vec<u8>, MetricsError> {
    let both = Tensor::f_cat(&[&features.pool, &features.spatial], 1)?.f_to_device(tch::Device::Cpu)?;
    let values = Vec::<f32>::try_from(both.f_contiguous()?.f_view([-1])?)?;
    Ok(std::iter::once(FEATURES).chain(values.into_iter().flat_map(f32::to_le_bytes)).collect())
}

fn decode(message: &[u8]) -> Result<Features, MetricsError> {
    let values: Vec<f32> =
        message.get(1..).unwrap_or_default().as_chunks().0.iter().map(|v| f32::from_le_bytes(*v)).collect();
    let both = Tensor::f_from_slice(&values)?.f_view([-1, POOL_FEATURES + SPATIAL_FEATURES])?;
    Ok(Features {
        pool: both.f_narrow(1, 0, POOL_FEATURES)?,
        spatial: both.f_narrow(1, POOL_FEATURES, SPATIAL_FEATURES)?,
    })
}

fn failure(error: &MetricsError) -> Vec<u8> {
    std::iter::once(FAILURE).chain(error.to_string().into_bytes()).collect()
}

fn reason_in(message: &[u8]) -> Option<String> {
    message.strip_prefix(&[FAILURE]).map(|reason| String::from_utf8_lossy(reason).into_owned())
}
