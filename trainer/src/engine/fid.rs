//! Fréchet distance and Inception Score while training: samples drawn and judged by all ranks together, between two steps.

use super::agree::{Agreed, agree};
use super::between::BetweenSteps;
use super::drawer::Drawer;
use super::rank::Rank;
use crate::metrics::{Extractor, Fit, Inception, Reference, Statistics, Wanted, inception_score};
use crate::model::WeightSet;
use anyhow::{Context, Result, ensure};
use collective::Collective;
use configs::events::{Event, now};
use configs::{FidConfig, RunConfig};
use std::collections::BTreeMap;
use std::ops::Range;
use std::rc::Rc;
use tch::Device;

/// Judges samples of the weights that the config names, again and again as they change.
pub struct Fid {
    config: FidConfig,
    drawer: Rc<Drawer>,
    inception: Inception,
    /// Of the reference; rank 0 only.
    reference: Option<Statistics>,
}

impl Fid {
    /// What the config asks for, on all ranks together; `None` when it asks for nothing. A reference of pictures goes through
    /// the network here, once a start.
    ///
    /// # Errors
    /// [`Agreed`] when a rank cannot use the Inception weights or the reference.
    pub fn from_config(
        config: &RunConfig,
        drawer: Option<&Rc<Drawer>>,
        device: Device,
        collective: &dyn Collective,
    ) -> Result<Option<Self>> {
        let (Some(fid), Some(drawer)) = (&config.fid, drawer) else { return Ok(None) };
        let opened = || {
            let inception = Inception::load(&fid.inception, device).context("`fid.inception`")?;
            let spec = fid.reference.to_str().context("`fid.reference`: the path is not valid UTF-8")?;
            let reference = Reference::open(spec, Fit::default(), inception.digest()).context("`fid.reference`")?;
            Ok((inception, reference))
        };
        let (inception, reference) = agree(collective, opened())?;
        let extractor = Extractor::new(&inception, collective, drawer.batch);
        let wanted = Wanted { spatial: false, features: 0 };
        if let Some((images, _)) = reference.needed(wanted).filter(|_| extractor.collects()) {
            eprintln!(
                "trainer: warning: `fid.reference`: the statistics of {} pictures are computed at every start; \
                 `trainer evaluate --reference … --save-stats FILE.npz` keeps them",
                images.count()
            );
        }
        let reference = reference.statistics(wanted, &extractor, &|_| {})?;
        let (config, drawer) = (fid.clone(), drawer.clone());
        Ok(Some(Self { config, drawer, inception, reference }))
    }

    /// The scores by [`FidConfig::METRICS`], the same on every rank.
    fn scores(&self, weights: &WeightSet, collective: &dyn Collective) -> Result<BTreeMap<String, f64>> {
        let extractor = Extractor::new(&self.inception, collective, self.drawer.batch);
        let mut pictures = |range: Range<usize>| Ok(self.drawer.draw(weights, range)?.to_rgb_tensor()?);
        let num = self.config.num;
        let wanted = Wanted { spatial: false, features: num };
        let samples = Statistics::of_pictures(&extractor, num, wanted, &mut pictures)?;
        let judged = || {
            let (Some(samples), Some(reference)) = (&samples, &self.reference) else { return Ok([0.0; 2]) };
            let fid = samples.pool.frechet_distance(&reference.pool, "FID")?;
            let (score, _) = inception_score(&self.inception.log_probabilities(&samples.features)?)?;
            Ok([fid, score])
        };
        let judged = agree(collective, judged())?;
        let all = collective.gather_values(judged.map(f64::to_bits).map(u64::cast_signed).to_vec())?;
        let of_rank_0 = all.iter().take(judged.len()).map(|bits| f64::from_bits(bits.cast_unsigned()));
        ensure!(all.len() >= judged.len(), "the scores of rank 0 did not come");
        Ok(FidConfig::METRICS.map(str::to_owned).into_iter().zip(of_rank_0).collect())
    }
}

impl BetweenSteps for Fid {
    fn every_steps(&self) -> u64 {
        self.config.every_steps
    }

    /// A measurement that fails is left out with a warning.
    fn look(&self, rank: &mut Rank, step: u64) -> Result<BTreeMap<String, f64>> {
        let mut metrics = BTreeMap::new();
        for section in &self.config.weights {
            let weights = rank.stepper.gather_section(section)?;
            let scores = match self.scores(&weights, &*rank.collective) {
                Ok(scores) => scores,
                Err(error) if error.is::<Agreed>() || rank.collective.world_size() == 1 => {
                    if rank.collective.rank() == 0 {
                        eprintln!(
                            "trainer: warning: FID of step {step}, weights `{section}`: {error:#}; it is left out"
                        );
                    }
                    continue;
                }
                Err(error) => return Err(error.context(format!("step {step}, phase FID, weights `{section}`"))),
            };
            metrics.extend(scores.iter().map(|(name, score)| (format!("{name}/{section}"), *score)));
            let weights = section.clone();
            rank.tell(|_| Event::Scores { step, weights, scores, time: now() })?;
        }
        Ok(metrics)
    }
}
