//! Whole runs over a store in which 10–30% of all operations go wrong, by schedules drawn from a seed.

use crate::world::*;
use async_trait::async_trait;
use checkpoint::{Activity, AttemptInfo, CheckpointError, Retention, RunStore, StoreOptions};
use futures::{StreamExt, TryStreamExt, stream::BoxStream};
use object_store::{
    Error, GetOptions, GetResult, GetResultPayload, ObjectMeta, ObjectStore, PutOptions, PutPayload, PutResult, Result,
    memory::InMemory, path::Path,
};
use rand::{RngExt, SeedableRng};
use rand_chacha::ChaCha8Rng;
use std::{
    collections::VecDeque,
    sync::{Arc, Mutex, PoisonError},
    time::Duration,
};
use stores::testing::{Tamper, Tampered};

/// Runs drawn by the default test; `DITHAROS_FAULT_SCHEDULES` asks for more.
const SCHEDULES: u64 = 20;

/// Makes a share of the operations go wrong.
#[derive(Debug)]
struct Faulty(Mutex<State>);

#[derive(Debug)]
struct State {
    rng: ChaCha8Rng,
    /// Share of the operations that fail.
    share: f64,
    /// Whether listings may lack what was written last, and writes may leave half an object.
    unfaithful: bool,
    written: VecDeque<Path>,
}

/// What becomes of a put.
enum PutFault {
    None,
    ServerErrorNothingLanded,
    ServerErrorThoughLanded,
    RefusedNothingLanded,
    RefusedThoughLanded,
    HalfLanded,
    Slow,
}

fn server_error() -> Error {
    Error::Generic { store: "test", source: "503 Slow Down".into() }
}

impl Faulty {
    fn state(&self) -> std::sync::MutexGuard<'_, State> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// None when this operation goes well, else a number below `kinds`.
    fn fault(&self, kinds: u32) -> Option<u32> {
        let state = &mut *self.state();
        let share = state.share;
        state.rng.random_bool(share).then(|| state.rng.random_range(0..kinds))
    }

    fn stop_failing(&self) {
        let state = &mut *self.state();
        (state.share, state.unfaithful) = (0.0, false);
    }
}

#[async_trait]
impl Tamper for Faulty {
    async fn put(&self, inner: &InMemory, location: &Path, payload: PutPayload, opts: PutOptions) -> Result<PutResult> {
        let unfaithful = self.state().unfaithful;
        let fault = match self.fault(6) {
            None => PutFault::None,
            Some(0) => PutFault::ServerErrorNothingLanded,
            Some(1) => PutFault::ServerErrorThoughLanded,
            Some(2) => PutFault::RefusedNothingLanded,
            Some(3) => PutFault::RefusedThoughLanded,
            Some(4) if unfaithful => PutFault::HalfLanded,
            Some(_) => PutFault::Slow,
        };
        let exists = || Error::AlreadyExists { path: location.to_string(), source: "409".into() };
        let land = async |payload| {
            let landed = inner.put_opts(location, payload, opts).await;
            if landed.is_ok() {
                self.state().written.push_back(location.clone());
            }
            landed
        };
        match fault {
            PutFault::None => land(payload).await,
            PutFault::ServerErrorNothingLanded => Err(server_error()),
            PutFault::ServerErrorThoughLanded => land(payload).await.and(Err(server_error())),
            PutFault::RefusedNothingLanded => Err(exists()),
            PutFault::RefusedThoughLanded => land(payload).await.and(Err(exists())),
            PutFault::HalfLanded => {
                let bytes = bytes::Bytes::from(payload);
                land(bytes.slice(..bytes.len() / 2).into()).await.and(Err(server_error()))
            }
            PutFault::Slow => {
                tokio::time::sleep(Duration::from_millis(3)).await;
                land(payload).await
            }
        }
    }

    async fn get(&self, inner: &InMemory, location: &Path, options: GetOptions) -> Result<GetResult> {
        let head = options.head;
        let result = inner.get_opts(location, options).await;
        match self.fault(3) {
            None => result,
            Some(0) if !head => {
                // The body ends early, as it does when a connection breaks behind a careless proxy.
                let result = result?;
                let (meta, range, attributes) = (result.meta.clone(), result.range.clone(), result.attributes.clone());
                let body = result.bytes().await?;
                let short = body.slice(..body.len() / 2);
                let payload = GetResultPayload::Stream(futures::stream::iter([Ok(short)]).boxed());
                Ok(GetResult { payload, meta, range, attributes, extensions: Default::default() })
            }
            Some(1) => {
                tokio::time::sleep(Duration::from_millis(3)).await;
                result
            }
            Some(_) => Err(server_error()),
        }
    }

    fn delete(
        &self,
        inner: &InMemory,
        locations: BoxStream<'static, Result<Path>>,
    ) -> BoxStream<'static, Result<Path>> {
        match self.fault(2) {
            None => inner.delete_stream(locations),
            Some(0) => futures::stream::iter([Err(server_error())]).boxed(),
            // Deleted, and the answer is lost.
            Some(_) => inner.delete_stream(locations).map(|result| result.and(Err(server_error()))).boxed(),
        }
    }

    fn list(&self, inner: &InMemory, prefix: Option<&Path>) -> BoxStream<'static, Result<ObjectMeta>> {
        let hidden: Vec<Path> = {
            let state = self.state();
            if state.unfaithful { state.written.iter().rev().take(3).cloned().collect() } else { Vec::new() }
        };
        match self.fault(2) {
            None => inner.list(prefix),
            Some(0) => futures::stream::iter([Err(server_error())]).boxed(),
            Some(_) => {
                inner.list(prefix).try_filter(move |meta| std::future::ready(!hidden.contains(&meta.location))).boxed()
            }
        }
    }
}

/// One life of a process: finds where to go on, claims an attempt, saves until something fails or it is killed.
/// Returns what it resumed from and what the store acknowledged, once it had claimed its attempt.
fn live(store: &RunStore, rng: &mut ChaCha8Rng) -> Option<(Option<u64>, Option<u64>)> {
    let found = store.newest_valid().ok()?;
    let resumed_from = found.map(|(manifest, _)| manifest.step);
    let attempt = store.claim_attempt(&AttemptInfo { resumed_from, world_size: 2, ..AttemptInfo::default() }).ok()?;
    let mut acknowledged = None;
    for number in 1..=rng.random_range(1..4u64) {
        let step = resumed_from.unwrap_or(0) + 10 * number;
        if try_save(store, attempt, step).is_err() {
            break;
        }
        acknowledged = Some(step);
        if rng.random_bool(0.3) && store.retain(&Retention::last(2)).is_err() {
            break;
        }
    }
    Some((resumed_from, acknowledged))
}

/// A valid commit or no commit, whatever goes wrong, and always a run that can be continued.
fn run_schedule(seed: u64, unfaithful: bool) {
    let mut rng = ChaCha8Rng::seed_from_u64(seed);
    let share = rng.random_range(0.1..0.3);
    let state = State { rng: ChaCha8Rng::seed_from_u64(!seed), share, unfaithful, written: VecDeque::new() };
    let faulty = Arc::new(Tampered::new(Faulty(Mutex::new(state))));
    let options = StoreOptions { retry_pause: Duration::from_micros(20), ..StoreOptions::default() };
    let store = RunStore::over(faulty.clone(), "run", "test://bucket/run", options).unwrap();

    let mut newest_acknowledged = None;
    let mut last_life = None;
    for _ in 0..12 {
        if let Some((resumed_from, acknowledged)) = live(&store, &mut rng) {
            newest_acknowledged = newest_acknowledged.max(acknowledged);
            last_life = Some(acknowledged.max(resumed_from));
        }
    }
    faulty.tamper.stop_failing();

    let context = format!("seed {seed}, {:.0}% faults, unfaithful {unfaithful}", share * 100.0);
    let found = match store.newest_valid() {
        // The one commit that there was is half an object. It may have been whole once, so only its owner can say that it goes.
        Err(CheckpointError::AllDamaged { damaged, .. }) if unfaithful => {
            damaged.iter().for_each(|damaged| _ = store.remove(damaged.step).unwrap());
            store.newest_valid().unwrap()
        }
        found => found.unwrap_or_else(|e| panic!("{context}: {e}")),
    };
    let newest = found.as_ref().map(|(manifest, _)| manifest.step);
    // A listing that hides the newest commit makes a later life fork from before it, which is lawful; nothing else loses one.
    let at_least = if unfaithful { last_life.flatten() } else { newest_acknowledged };
    assert!(newest >= at_least, "{context}: newest {newest:?}, acknowledged {at_least:?}");
    if let Some((manifest, damaged)) = &found {
        assert!(unfaithful || damaged.is_empty(), "{context}: {damaged:?}");
        assert_holds(&store.read(manifest), &small(), manifest.step);
    }
    for commit in store.committed().unwrap() {
        match store.manifest(&commit).and_then(|manifest| store.verify(&manifest).map(|()| manifest)) {
            Ok(manifest) => assert_holds(&store.read(&manifest), &small(), commit.step),
            Err(error) => assert!(unfaithful, "{context}: {} is committed and unreadable: {error}", commit.key),
        }
    }
    let next = newest.unwrap_or(0) + 10;
    save(&store, claim(&store, newest), next);
    assert_eq!(crate::world::newest(&store), (Some(next), vec![]), "{context}");
    store.collect_garbage(Activity::Stopped).unwrap();
    assert_eq!(store.garbage(Activity::Stopped).unwrap(), [], "{context}");
    assert_eq!(crate::world::newest(&store), (Some(next), vec![]), "{context}");
}

fn schedules() -> std::ops::Range<u64> {
    0..std::env::var("DITHAROS_FAULT_SCHEDULES").ok().and_then(|count| count.parse().ok()).unwrap_or(SCHEDULES)
}

#[test]
fn a_store_with_failing_operations_has_valid_commits_or_none() {
    schedules().for_each(|seed| run_schedule(seed, false));
}

#[test]
fn a_store_with_stale_listings_and_half_written_objects_has_them_too() {
    schedules().for_each(|seed| run_schedule(seed, true));
}
