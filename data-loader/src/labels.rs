//! Labels of whole row groups, kept: where latents go straight from the file to the micro-batch, decoding the labels of every
//! range anew would be a good part of the work.

use std::collections::{HashMap, VecDeque};
use std::sync::{Arc, Mutex, PoisonError};

use crate::decode;
use crate::footer::Label;
use crate::{DataError, LatentDataset};

/// Most bytes of labels that a data set keeps.
const MOST_BYTES: usize = 64 << 20;

/// The labels of some row groups; the first that came go first.
#[derive(Debug, Default)]
pub(crate) struct LabelCache(Mutex<Kept>);

#[derive(Debug, Default)]
struct Kept {
    labels: HashMap<usize, Arc<[i64]>>,
    order: VecDeque<usize>,
    bytes: usize,
}

impl LabelCache {
    fn get(&self, group: usize) -> Option<Arc<[i64]>> {
        // Nothing panics under the lock.
        self.0.lock().unwrap_or_else(PoisonError::into_inner).labels.get(&group).cloned()
    }

    fn keep(&self, group: usize, labels: Arc<[i64]>, most_bytes: usize) {
        let kept = &mut *self.0.lock().unwrap_or_else(PoisonError::into_inner);
        let bytes = size_of_val(&*labels);
        if bytes > most_bytes || kept.labels.contains_key(&group) {
            return;
        }
        while kept.bytes + bytes > most_bytes {
            let gone = kept.order.pop_front().and_then(|group| kept.labels.remove(&group));
            kept.bytes -= gone.map_or(kept.bytes, |labels| size_of_val(&*labels));
        }
        kept.bytes += bytes;
        kept.order.push_back(group);
        kept.labels.insert(group, labels);
    }
}

impl LatentDataset {
    /// The labels of a row group; `None` where there is no column of them, they are too many to keep, or one cannot be read: then
    /// those that are wanted are read by themselves, and what is wrong with them is told.
    pub(crate) async fn group_labels(&self, group: usize) -> Option<Arc<[i64]>> {
        let found = self.row_groups()[group];
        let few = found.rows <= (MOST_BYTES / size_of::<i64>()) as u64;
        if !few || self.files[found.file].label != Label::Column {
            return None;
        }
        if let Some(labels) = self.labels.get(group) {
            return Some(labels);
        }
        let labels = self.read_group_labels(group).await.ok().flatten()?;
        self.labels.keep(group, labels.clone(), MOST_BYTES);
        Some(labels)
    }

    async fn read_group_labels(&self, group: usize) -> Result<Option<Arc<[i64]>>, DataError> {
        let mut labels = Vec::new();
        for array in self.fetch_group(group, &self.columns().label).await? {
            let Ok(decoded) = decode::labels(&array) else { return Ok(None) };
            labels.extend(decoded);
        }
        Ok((labels.len() as u64 == self.row_groups()[group].rows).then(|| labels.into()))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_is_kept_is_bounded_and_the_first_goes_first() {
        let cache = LabelCache::default();
        let labels = |group: usize| -> Arc<[i64]> { vec![group as i64; 10].into() };
        for group in [3, 1, 2, 1] {
            cache.keep(group, labels(group), 200);
        }
        let there = |groups: [usize; 3]| groups.map(|group| cache.get(group) == Some(labels(group)));
        assert_eq!(there([1, 2, 3]), [true, true, false]);
        cache.keep(4, vec![4; 26].into(), 200);
        assert_eq!((there([1, 2, 3]), cache.get(4)), ([true, true, false], None));
        cache.keep(5, vec![5; 25].into(), 200);
        assert_eq!((there([1, 2, 3]), cache.get(5)), ([false; 3], Some(vec![5; 25].into())));
    }
}
