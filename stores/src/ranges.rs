//! Ranges of an object's bytes: few large requests, each bounded in time, tried again, checked.

use crate::cache::{BLOCK_BYTES, BlockCache, BlockKey, Claim};
use crate::plan;
use crate::retry::Trouble;
use crate::{Object, ReadError, ReadOptions};
use bytes::{Bytes, BytesMut};
use futures::{StreamExt, TryStreamExt};
use object_store::{GetOptions, ObjectMeta, ObjectStore, ObjectStoreExt, path::Path};
use std::collections::{BTreeMap, BTreeSet};
use std::ops::Range;
use std::sync::Arc;
use tokio::sync::Semaphore;

/// Reads objects of one store. Its futures need a tokio runtime with time.
#[derive(Debug)]
pub struct RangeReader {
    store: Arc<dyn ObjectStore>,
    options: ReadOptions,
    cache: Option<Arc<BlockCache>>,
    permits: Semaphore,
}

impl RangeReader {
    /// A reader of `store`; with a cache, whole blocks are read and kept.
    pub fn new(store: Arc<dyn ObjectStore>, options: ReadOptions, cache: Option<Arc<BlockCache>>) -> Self {
        Self { store, options, cache, permits: Semaphore::new(options.requests_at_once.max(1)) }
    }

    /// What the store says of an object; `name` is its URL.
    ///
    /// # Errors
    /// [`ReadError::Missing`], [`ReadError::Failed`].
    pub async fn look_up(&self, path: &Path, name: &str) -> Result<ObjectMeta, ReadError> {
        let work = || async { Ok(self.store.head(path).await?) };
        self.options.tried(name, || "look up".to_owned(), 0, work).await
    }

    /// All objects below `folder`, whose URL is `name`.
    ///
    /// # Errors
    /// [`ReadError::Failed`].
    pub async fn list(&self, folder: &Path, name: &str) -> Result<Vec<ObjectMeta>, ReadError> {
        // A listing has no length to go by; a thousand names a page come in well under a second.
        const ALLOWED_BYTES: u64 = 256 << 20;
        let work = || async { Ok(self.store.list(Some(folder)).try_collect().await?) };
        self.options.tried(name, || "list".to_owned(), ALLOWED_BYTES, work).await
    }

    /// The bytes of `ranges`, in their order. All come from the object as it was when `object` was made.
    ///
    /// # Errors
    /// [`ReadError`]; none of the ranges is given then.
    pub async fn read(&self, object: &Object, ranges: &[Range<u64>]) -> Result<Vec<Bytes>, ReadError> {
        if let Some(beyond) = ranges.iter().find(|range| range.start > range.end || range.end > object.bytes) {
            return Err(ReadError::Failed {
                object: object.name.clone(),
                operation: describe(beyond),
                tries: 0,
                most_tries: self.options.tries,
                reason: format!("it has {} bytes", object.bytes),
            });
        }
        let identity = object.identity();
        let parts = match (&self.cache, &identity) {
            (Some(cache), Some(identity)) => {
                self.blocks(cache, object, |index| BlockKey::new(identity, index), ranges).await?
            }
            _ => {
                let requests = plan::requests(ranges, self.options.gap_bytes, self.options.request_bytes);
                self.fetch_all(object, requests).try_collect().await?
            }
        };
        Ok(ranges.iter().map(|range| plan::cut(&parts, range)).collect())
    }

    /// The blocks that cover `ranges`: from the cache, from whoever is fetching them, or from the store.
    async fn blocks(
        &self,
        cache: &Arc<BlockCache>,
        object: &Object,
        key: impl Fn(u64) -> BlockKey,
        ranges: &[Range<u64>],
    ) -> Result<Vec<(u64, Bytes)>, ReadError> {
        let place = |index: u64| index * BLOCK_BYTES..object.bytes.min((index + 1) * BLOCK_BYTES);
        let mut wanted: BTreeSet<u64> = ranges
            .iter()
            .filter(|range| !range.is_empty())
            .flat_map(|range| range.start / BLOCK_BYTES..range.end.div_ceil(BLOCK_BYTES))
            .collect();
        let mut found: BTreeMap<u64, Bytes> = BTreeMap::new();
        while !wanted.is_empty() {
            // Claims that are dropped unfulfilled, by an error or because nobody waits for this future any more, are free again.
            let (mut claims, mut awaited) = (BTreeMap::new(), Vec::new());
            for &index in &wanted {
                match cache.claim(key(index)) {
                    Claim::Ours(ticket) => _ = claims.insert(index, ticket),
                    Claim::Theirs(answer) => awaited.push((index, answer)),
                }
            }
            let looked_up: Vec<(u64, Option<Bytes>)> =
                futures::stream::iter(claims.keys().copied().collect::<Vec<_>>())
                    .map(|index| {
                        let (cache, key, bytes) = (cache.clone(), key(index), place(index));
                        async move { (index, cache.clone().load(key, bytes.end - bytes.start).await) }
                    })
                    .buffered(LOOKUPS)
                    .collect()
                    .await;
            let mut missing = Vec::new();
            for (index, block) in looked_up {
                match (block, claims.remove(&index)) {
                    (Some(block), Some(ticket)) => {
                        ticket.fulfil(block.clone());
                        found.insert(index, block);
                    }
                    (_, Some(ticket)) => missing.push((index, ticket)),
                    (_, None) => {}
                }
            }
            // Whole blocks to a request, so that each is in one answer.
            let most = (self.options.request_bytes / BLOCK_BYTES).max(1) * BLOCK_BYTES;
            let places: Vec<Range<u64>> = missing.iter().map(|(index, _)| place(*index)).collect();
            let requests = runs(&places, most);
            let mut fetched = std::pin::pin!(self.fetch_all(object, requests));
            let mut tickets: BTreeMap<u64, _> = missing.into_iter().collect();
            while let Some((start, bytes)) = fetched.try_next().await? {
                let blocks: Vec<(u64, Bytes)> = (start / BLOCK_BYTES..)
                    .zip((0..bytes.len()).step_by(BLOCK_BYTES as usize))
                    .map(|(index, at)| (index, bytes.slice(at..bytes.len().min(at + BLOCK_BYTES as usize))))
                    .collect();
                for (index, block) in blocks {
                    cache.store(key(index), block.clone()).await;
                    if let Some(ticket) = tickets.remove(&index) {
                        ticket.fulfil(block.clone());
                    }
                    found.insert(index, block);
                }
            }
            for (index, mut answer) in awaited {
                // Whoever was fetching it has failed or gone if there is no answer: it is ours to fetch then.
                if let Ok(block) = answer.wait_for(Option::is_some).await
                    && let Some(block) = &*block
                {
                    found.insert(index, block.clone());
                }
            }
            wanted.retain(|index| !found.contains_key(index));
        }
        Ok(found.into_iter().map(|(index, block)| (index * BLOCK_BYTES, block)).collect())
    }

    /// Requests several ranges at a time; gives (start, bytes) in order.
    fn fetch_all<'a>(
        &'a self,
        object: &'a Object,
        requests: Vec<Range<u64>>,
    ) -> impl futures::Stream<Item = Result<(u64, Bytes), ReadError>> + 'a {
        futures::stream::iter(requests)
            .map(move |range| async move { Ok((range.start, self.fetch(object, range).await?)) })
            .buffered(self.options.requests_at_once.max(1))
    }

    /// One range, by one request if all goes well.
    async fn fetch(&self, object: &Object, range: Range<u64>) -> Result<Bytes, ReadError> {
        // The semaphore is never closed.
        let _permit = self.permits.acquire().await;
        let work = || self.request(object, &range);
        let result = self.options.tried(&object.name, || describe(&range), range.end - range.start, work).await;
        let Err(ReadError::Failed { .. }) = &result else { return result };
        // A range beyond the end of an object that has become shorter fails in as many ways as there are stores.
        match tokio::time::timeout(self.options.try_timeout, self.store.head(&object.path)).await {
            Ok(Ok(meta)) => match object.difference(&meta) {
                Some(what) => Err(ReadError::Changed { object: object.name.clone(), what }),
                None => result,
            },
            _ => result,
        }
    }

    async fn request(&self, object: &Object, range: &Range<u64>) -> Result<Bytes, Trouble> {
        let wanted = range.end - range.start;
        let result = self.store.get_opts(&object.path, GetOptions::new().with_range(Some(range.clone()))).await?;
        if let Some(what) = object.difference(&result.meta) {
            return Err(Trouble::Final(ReadError::Changed { object: object.name.clone(), what }));
        }
        if result.range != *range {
            return Err(Trouble::Passing(format!("the store sent bytes {:?}", result.range)));
        }
        let mut stream = result.into_stream();
        let mut body: Vec<Bytes> = Vec::new();
        let mut found = 0;
        loop {
            match tokio::time::timeout(self.options.silence, stream.try_next()).await {
                Ok(chunk) => match chunk? {
                    Some(chunk) => {
                        found += chunk.len() as u64;
                        body.push(chunk);
                    }
                    None if found == wanted => break,
                    None => return Err(Trouble::Passing(format!("the body ended after {found} of {wanted} bytes"))),
                },
                Err(_) => {
                    let silence = self.options.silence.as_secs_f64();
                    return Err(Trouble::Passing(format!(
                        "silence for {silence:.1} s after {found} of {wanted} bytes"
                    )));
                }
            }
            if found > wanted {
                return Err(Trouble::Passing(format!("the body has more than {wanted} bytes")));
            }
        }
        if body.len() == 1 {
            return Ok(body.swap_remove(0));
        }
        let mut joined = BytesMut::with_capacity(found as usize);
        body.iter().for_each(|chunk| joined.extend_from_slice(chunk));
        Ok(joined.freeze())
    }
}

/// Blocks of one read that are looked up on disk at the same time.
const LOOKUPS: usize = 4;

/// Neighbouring blocks as requests of at most `most` bytes, cut at blocks.
fn runs(places: &[Range<u64>], most: u64) -> Vec<Range<u64>> {
    let mut runs: Vec<Range<u64>> = Vec::new();
    for place in places {
        match runs.last_mut() {
            Some(last) if last.end == place.start && place.end - last.start <= most => last.end = place.end,
            _ => runs.push(place.clone()),
        }
    }
    runs
}

fn describe(range: &Range<u64>) -> String {
    format!("read bytes {} to {}", range.start, range.end)
}

#[cfg(test)]
mod tests;
