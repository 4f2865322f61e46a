//! Sets up one rank: the only place of construction order.

use super::agree::{Agreed, agree, decided_by_rank_0};
use super::between::BetweenSteps;
use super::bucket::Buckets;
use super::cache::open_options;
use super::drawer::Drawer;
use super::fid::Fid;
use super::grid::SampleGrid;
use super::optimizer::Optimizer;
use super::saver::Saver;
use super::snapshot::restore;
use super::start::{Initialised, find_checkpoint, load_initial, record_origin};
use super::stepper::{Experiment, Stepper};
use super::stop::StopFlag;
use super::validation::Validation;
use crate::ffi::{self, batch_memory};
use crate::recipe::Recipe;
use crate::telemetry::Journal;
use crate::validation::metric;
use anyhow::{Context, Result, bail};
use checkpoint::{AttemptInfo, Retention, RunStore};
use collective::Collective;
use configs::RunConfig;
use configs::lanes::LaneBlock;
use data_loader::{LatentDataset, MicroBatchStream, ScheduleOptions, StreamOptions, StreamSource};
use serde_json::Value;
use std::sync::Arc;
use tch::Device;

/// One rank, ready for its first step.
pub struct Rank {
    /// The run's config.
    pub config: RunConfig,
    /// What is computed.
    pub recipe: Recipe,
    /// Config and recipe as every manifest records them.
    pub record: Value,
    /// The ranks.
    pub collective: Arc<dyn Collective>,
    /// Number of this start of the run.
    pub attempt: u32,
    /// Step of the checkpoint that this start continues.
    pub resumed_from: Option<u64>,
    /// Where this start took its first weights from, and what is not as it was there.
    pub initialised: Option<Initialised>,
    /// Steps of one pass over the data set.
    pub steps_per_epoch: u64,
    /// Where this rank computes.
    pub device: Device,
    /// This rank's micro-batches.
    pub batches: MicroBatchStream,
    /// Weights and the step.
    pub stepper: Stepper,
    /// Checkpoints.
    pub saver: Saver,
    /// What people see; rank 0 only.
    pub journal: Option<Journal>,
    /// What is done between steps, in this order.
    pub between: Vec<Box<dyn BetweenSteps>>,
    /// Stop requests.
    pub stop: StopFlag,
}

/// What a rank finds out alone, before the first collective.
struct Prepared {
    recipe: Recipe,
    device: Device,
    dataset: Arc<LatentDataset>,
    block: LaneBlock,
    store: RunStore,
}

impl Rank {
    /// Sets up this rank; all ranks call it together. Reads from the data set its metadata only, and allocates nothing
    /// before config, data set and checkpoint are known to fit together.
    ///
    /// # Errors
    /// [`Agreed`] where all ranks know it, so that one of them can say it; others concern this rank alone.
    pub fn set_up(config: RunConfig, collective: Arc<dyn Collective>) -> Result<Self> {
        let stop = StopFlag::install().context("installing signal handlers")?;
        let prepared = agree(&*collective, Prepared::new(&config, &*collective))?;
        let Prepared { recipe, device, dataset, block, store } = prepared;
        let mut record = recipe.record(&config);
        compare_records(&*collective, &record)?;
        let model = agree(&*collective, recipe.build_model().map_err(Into::into))?;
        let mut optimizer = agree(&*collective, Optimizer::of_config(&config, &*model).map_err(Into::into))?;
        let drawer = agree(&*collective, Drawer::from_config(&config, &recipe, model.clone(), device))?;
        let mut between: Vec<Box<dyn BetweenSteps>> = Vec::new();
        if let Some(grid) = SampleGrid::from_config(&config, drawer.as_ref(), model.clone(), device) {
            between.push(Box::new(grid));
        }
        if let Some(validation) = Validation::from_config(&config, &recipe, &model, device, &*collective)? {
            between.push(Box::new(validation));
        }
        if let Some(fid) = Fid::from_config(&config, drawer.as_ref(), device, &*collective)? {
            between.push(Box::new(fid));
        }
        let manifest = decided_by_rank_0(&*collective, || find_checkpoint(&config, &record, &store))?;
        let resumed_from = manifest.as_ref().map(|manifest| manifest.step);
        let (initial, initialised) = match &manifest {
            None => load_initial(&config, &recipe, &*model, &*collective)?,
            Some(_) => Default::default(),
        };
        record_origin(&mut record, manifest.as_ref(), initialised.as_ref());
        let attempt = decided_by_rank_0(&*collective, || {
            let info = AttemptInfo { resumed_from, world_size: collective.world_size(), ..Default::default() };
            store.claim_attempt(&info).context("claiming an attempt")
        })?;

        let lanes = config.train.lanes;
        let averages = optimizer.averages.len();
        let buckets = match &manifest {
            None => Ok(Buckets::initialise(&*model, lanes, block, averages, config.seed, &initial.tensors, device)),
            Some(manifest) => {
                optimizer.updates = manifest.optimizer_step;
                let buckets = Buckets::zeroed(&*model, lanes, block, averages, device);
                restore(&store, manifest, &buckets, &optimizer.averages).map(|()| buckets)
            }
        };
        drop(initial);
        let buckets = agree(&*collective, buckets)?;
        let experiment = Experiment { seed: config.seed, lanes, block, device };
        let objective = recipe.build_objective();
        let mut stepper = Stepper::new(model, objective, buckets, optimizer, collective.clone(), experiment);
        if manifest.is_some() {
            stepper.gather_weights()?;
        }

        let done = resumed_from.unwrap_or(0);
        let data = open_stream(&config, &recipe, dataset, &experiment, done);
        let (batches, steps_per_epoch) = agree(&*collective, data)?;
        let saver = Saver::start(collective.clone(), store, attempt, retention(&config))?;
        let journal = match collective.rank() {
            0 => Journal::open(&config.run.url, attempt, done, config.log.tensorboard).map(Some),
            _ => Ok(None),
        };
        let journal = agree(&*collective, journal.map_err(Into::into))?;
        Ok(Self {
            config,
            recipe,
            record,
            collective,
            attempt,
            resumed_from,
            initialised,
            steps_per_epoch,
            device,
            batches,
            stepper,
            saver,
            journal,
            between,
            stop,
        })
    }
}

impl Prepared {
    fn new(config: &RunConfig, collective: &dyn Collective) -> Result<Self> {
        let block = LaneBlock::of(collective.rank(), collective.world_size(), config.train.lanes)?;
        tch::set_num_threads(config.train.threads_per_rank as i32);
        tch::set_num_interop_threads(1);
        ffi::set_deterministic()?;
        let device = choose_device(config.train.device, collective)?;
        let (dataset, recipe) = open_data(config)?;
        let store = RunStore::open(&config.run.url).context("`run.url`")?;
        Ok(Self { recipe, device, dataset: Arc::new(dataset), block, store })
    }
}

/// Opens the data set of a config, which reads its metadata only, and settles what the config leaves to it.
///
/// # Errors
/// A data set that cannot be read or contradicts the config.
pub fn open_data(config: &RunConfig) -> Result<(LatentDataset, Recipe)> {
    let options = open_options(config, config.data.url.iter())?;
    let dataset = LatentDataset::open_all(config.data.url.iter(), &options).context("`data.url`")?;
    let scaling_factor = dataset.scaling_factor(config.data.scaling_factor)?;
    let recipe = Recipe::resolve(config, &dataset, scaling_factor)?;
    Ok((dataset, recipe))
}

/// Refuses to start unless all ranks have read the same config and found the same files.
fn compare_records(collective: &dyn Collective, record: &Value) -> Result<()> {
    let all = collective.gather_bytes(record.to_string().as_bytes()).context("agreeing on the start")?;
    let Some(rank) = all.iter().position(|other| *other != all[0]) else { return Ok(()) };
    let reason = "it has read another config or found other data files than rank 0; are they still being written?";
    Err(Agreed { rank, reason: reason.to_owned() }.into())
}

fn choose_device(wanted: configs::Device, collective: &dyn Collective) -> Result<Device> {
    let cuda = match wanted {
        configs::Device::Cpu => return Ok(Device::Cpu),
        configs::Device::Auto | configs::Device::Cuda => ffi::load_cuda().map(|()| tch::Cuda::device_count()),
    };
    match (cuda, wanted) {
        (Ok(count), _) if count > 0 => {
            if collective.world_size() > 1 {
                bail!(
                    "`train.device`: several GPU ranks need the NCCL backend, which is not built yet; use one rank or train.device = \"cpu\""
                );
            }
            Ok(Device::Cuda(collective.local_rank()))
        }
        (_, configs::Device::Auto) => Ok(Device::Cpu),
        (Ok(_), _) => bail!("`train.device` = \"cuda\", but the driver shows no GPU; use \"auto\" or \"cpu\""),
        (Err(error), _) => bail!("`train.device` = \"cuda\": {error}; use \"auto\" or \"cpu\""),
    }
}

fn retention(config: &RunConfig) -> Retention {
    let checkpoint = &config.checkpoint;
    Retention {
        keep_last: checkpoint.keep_last,
        keep_every: checkpoint.keep_every,
        keep_best: (checkpoint.keep_best > 0).then(|| (checkpoint.keep_best, metric(&checkpoint.best_metric))),
    }
}

/// This rank's micro-batches from after step `done` on, and the steps of an epoch.
pub(crate) fn open_stream(
    config: &RunConfig,
    recipe: &Recipe,
    dataset: Arc<LatentDataset>,
    experiment: &Experiment,
    done: u64,
) -> Result<(MicroBatchStream, u64)> {
    let schedule = dataset.schedule(ScheduleOptions {
        seed: config.seed,
        lanes: config.train.lanes,
        micro_batch: config.train.micro_batch,
        range_rows: config.data.range_rows as usize,
        shuffle_window_rows: config.data.shuffle_window_rows as usize,
    })?;
    let steps_per_epoch = schedule.steps_per_epoch();
    let prefetch_bytes = config.data.prefetch_bytes as usize;
    let (scaling_factor, num_classes) = (recipe.dataset.scaling_factor, Some(recipe.model.num_classes as usize));
    let (flip, allocator) = (config.data.flip, batch_memory(experiment.device));
    let options = StreamOptions { prefetch_bytes, flip, num_classes, allocator };
    let sources = vec![StreamSource { dataset, scaling_factor }];
    let stream =
        MicroBatchStream::start(sources, schedule, experiment.block.range(), done, config.train.steps, options)?;
    Ok((stream, steps_per_epoch))
}
