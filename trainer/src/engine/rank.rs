//! Sets up one rank: the only place of construction order.

use super::agree::{agree, decided_by_rank_0};
use super::between::BetweenSteps;
use super::bucket::Buckets;
use super::data::{Data, damage_policy, open_data, row_order, skip_budget, warnings};
use super::decisions::DecisionLog;
use super::device::{choose_device, connect};
use super::divergence::Guard;
use super::drawer::Drawer;
use super::due::Timetable;
use super::fid::Fid;
use super::grid::SampleGrid;
use super::mesh::Mesh;
use super::optimizer::Optimizer;
use super::preflight;
use super::requests::Requests;
use super::saver::{SaveOptions, Saver};
use super::start::{Initialised, load_initial, record_origin, record_world_size, resume};
use super::stepper::{Experiment, Stepper};
use super::stop::{Grace, StopFlag};
use super::validation::Validation;
use super::wire::Summation;
use crate::ffi;
use crate::model::precision::in_precision;
use crate::recipe::Recipe;
use crate::telemetry::Journal;
use crate::validation::metric;
use anyhow::{Context, Result};
use checkpoint::{AttemptInfo, Retention, RunStore, StoreOptions};
use collective::Collective;
use configs::RunConfig;
use data_loader::{Damage, MicroBatchStream, StreamSource};
use serde_json::Value;
use std::sync::Arc;
use std::time::Duration;
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
    /// What micro-batches are made from.
    pub data: Data,
    /// What this rank knows about damaged data; `None` where damage ends the run.
    pub damage: Option<Arc<Damage>>,
    /// Where this rank computes.
    pub device: Device,
    /// This rank's micro-batches.
    pub batches: MicroBatchStream,
    /// Weights and the step.
    pub stepper: Stepper,
    /// Checkpoints.
    pub saver: Saver,
    /// When they are due.
    pub timetable: Timetable,
    /// What people see; rank 0 only.
    pub journal: Option<Journal>,
    /// Whether the stop that this start continues from has put off what was due between two steps.
    pub put_off: bool,
    /// What is done between steps, in this order.
    pub between: Vec<Box<dyn BetweenSteps>>,
    /// Stop requests.
    pub stop: StopFlag,
    /// How long the checkpoint after one may take, if that is limited.
    pub grace: Option<Grace>,
}

/// What a rank finds out alone, before the first collective.
struct Prepared {
    recipe: Recipe,
    device: Device,
    sources: Vec<StreamSource>,
    mesh: Mesh,
    store: RunStore,
}

impl Rank {
    /// Sets up this rank, which `stop` asks to stop; all ranks call it together. What was `decided` before the run was rolled back
    /// holds beside what the checkpoint says. Reads from the data set its metadata only, and allocates nothing
    /// before config, data set and checkpoint are known to fit together.
    ///
    /// # Errors
    /// [`Agreed`](super::agree::Agreed) where all ranks know it, so that one of them can say it; others concern this rank alone.
    pub fn set_up(
        config: RunConfig,
        collective: Arc<dyn Collective>,
        stop: StopFlag,
        decided: &DecisionLog,
    ) -> Result<Self> {
        let grace = limit_stop(&config, &stop, &collective)?;
        preflight::same_programs(&*collective, Some(&config))?;
        let node_ranks = match config.collective.node_ranks {
            Some(ranks) => ranks,
            None => collective.ranks_per_node().context("looking for the ranks of this node")?,
        };
        let prepared = agree(&*collective, Prepared::new(&config, &*collective, node_ranks))?;
        let Prepared { recipe, device, sources, mesh, store } = prepared;
        let collective = connect(collective, device)?;
        let mut record = recipe.record(&config);
        preflight::same_experiment(&*collective, &config, &record, device)?;
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
        let averages = optimizer.averages.len();
        let zeroed = || Buckets::zeroed(&*model, &mesh, averages, device);
        let resumed = resume(&config, &record, &store, &*collective, &optimizer.averages, zeroed)?;
        let (manifest, buckets) = resumed.unzip();
        let resumed_from = manifest.as_ref().map(|manifest| manifest.step);
        let (initial, initialised) = match &manifest {
            None => load_initial(&config, &recipe, &*model, &*collective)?,
            Some(_) => Default::default(),
        };
        record_origin(&mut record, manifest.as_ref(), initialised.as_ref());
        record_world_size(&mut record, manifest.as_ref(), &config, &*collective);
        let attempt = decided_by_rank_0(&*collective, || {
            let details = decided.as_details();
            let info = AttemptInfo { resumed_from, world_size: collective.world_size(), details };
            store.claim_attempt(&info).context("claiming an attempt")
        })?;

        if let Some(manifest) = &manifest {
            optimizer.updates = manifest.optimizer_step;
        }
        let fresh = || Buckets::initialise(&*model, &mesh, averages, config.seed, &initial.tensors, device);
        let buckets = buckets.map_or_else(fresh, Ok)?;
        drop(initial);
        let recompute_every = config.train.activation_checkpointing;
        let experiment =
            Experiment { seed: config.seed, mesh, device, summation: Summation::of_config(&config), recompute_every };
        let objective = recipe.build_objective();
        let model = in_precision(model, config.train.precision);
        let mut stepper = Stepper::new(model, objective, buckets, optimizer, collective.clone(), experiment)?;
        if manifest.is_some() {
            stepper.publish_weights()?;
        }

        let done = resumed_from.unwrap_or(0);
        let log = DecisionLog::read(manifest.as_ref().map(|manifest| &manifest.decision_log), skip_budget(&config));
        stepper.decisions = agree(&*collective, log)?;
        stepper.decisions.merge(decided);
        stepper.guard = Guard::of(&config.divergence, manifest.as_ref());
        let damage = damage_policy(&config, &stepper.decisions);
        let order = agree(&*collective, row_order(&config, &sources))?;
        let data = Data { sources, order, num_classes: recipe.model.num_classes as usize, experiment };
        let batches = agree(&*collective, data.open_stream(&config, damage.clone(), done))?;
        let is_first = collective.rank() == 0;
        let options = SaveOptions {
            attempt,
            retention: retention(&config),
            upload_timeout: Duration::from_secs(config.checkpoint.upload_timeout_s),
            stop: stop.clone(),
        };
        let saver = agree(&*collective, Saver::start(collective.clone(), store.clone(), &stepper, options))?;
        let requests = is_first.then(|| Requests::watch(store)).transpose();
        let timetable = Timetable::new(&config.checkpoint, config.train.steps, agree(&*collective, requests)?);
        let journal =
            is_first.then(|| Journal::open(&config.run.url, attempt, done, config.log.tensorboard)).transpose();
        let journal = agree(&*collective, journal.map_err(Into::into))?;
        Ok(Self {
            config,
            recipe,
            record,
            collective,
            attempt,
            resumed_from,
            initialised,
            data,
            damage,
            device,
            batches,
            stepper,
            saver,
            timetable,
            journal,
            put_off: manifest.as_ref().is_some_and(|manifest| manifest.put_off),
            between,
            stop,
            grace,
        })
    }
}

impl Prepared {
    fn new(config: &RunConfig, collective: &dyn Collective, node_ranks: usize) -> Result<Self> {
        let (train, [rank, world_size]) = (&config.train, [collective.rank(), collective.world_size()]);
        let group = train.sharding_ranks;
        let mesh = Mesh::under(config.reduction, rank, world_size, train.lanes, train.sharding, group)?;
        let mesh = mesh.over_nodes(node_ranks);
        tch::set_num_threads(config.train.threads_per_rank as i32);
        // libtorch takes this once, and a rank may be set up again after a rollback.
        if tch::get_num_interop_threads() != 1 {
            tch::set_num_interop_threads(1);
        }
        ffi::set_deterministic(config.train.tf32)?;
        let device = choose_device(config.train.device, collective)?;
        let (sources, recipe) = open_data(config)?;
        for warning in warnings(config, &sources).iter().filter(|_| collective.rank() == 0) {
            eprintln!("trainer: warning: {warning}");
        }
        let upload_timeout = Duration::from_secs(config.checkpoint.upload_timeout_s);
        let options = StoreOptions { upload_timeout, ..StoreOptions::default() };
        let store = RunStore::open_with(&config.run.url, options).context("`run.url`")?;
        Ok(Self { recipe, device, sources, mesh, store })
    }
}

/// Ends the run when a stop request is not answered by a committed checkpoint in time: the scheduler would, without a word.
/// Every rank looks at its own clock, for any of them may hang.
fn limit_stop(config: &RunConfig, stop: &StopFlag, collective: &Arc<dyn Collective>) -> Result<Option<Grace>> {
    let grace_s = config.checkpoint.grace_s;
    if grace_s == 0 {
        return Ok(None);
    }
    // The thread must not keep what the main thread has let go: the last to let go of MPI finalises it.
    let collective = Arc::downgrade(collective);
    let give_up = move || {
        let Some(collective) = collective.upgrade() else { return };
        eprintln!(
            "trainer: error: rank {}: asked to stop, but the checkpoint was not committed within checkpoint.grace_s = {grace_s} s; \
             the run resumes from the last one that was",
            collective.rank()
        );
        collective.abort(configs::exit::FAILED)
    };
    stop.limit(Duration::from_secs(grace_s), give_up).map(Some)
}

fn retention(config: &RunConfig) -> Retention {
    let checkpoint = &config.checkpoint;
    Retention {
        keep_last: checkpoint.keep_last,
        keep_every: checkpoint.keep_every,
        keep_best: (checkpoint.keep_best > 0).then(|| (checkpoint.keep_best, metric(&checkpoint.best_metric))),
    }
}
