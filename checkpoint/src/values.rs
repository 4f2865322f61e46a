//! Float32 values as the bytes of a shard, without a copy.

use bytes::Bytes;
use std::{ops::Range, sync::Arc};

#[cfg(target_endian = "big")]
compile_error!("shards hold little-endian values, which are written from memory as they are");

/// Float32 values that an upload can hold on to while it runs.
#[derive(Debug, Clone)]
pub struct F32Bytes(Bytes);

/// A range of someone's values.
struct Held<T> {
    owner: Arc<T>,
    range: Range<usize>,
}

impl<T: AsRef<[f32]>> AsRef<[u8]> for Held<T> {
    fn as_ref(&self) -> &[u8] {
        bytemuck::cast_slice(&(*self.owner).as_ref()[self.range.clone()])
    }
}

impl F32Bytes {
    /// `range` of the owner's values. The owner is let go when the last upload of them has ended, so that its memory can be
    /// used again once `Arc::get_mut` succeeds.
    ///
    /// # Panics
    /// When `range` is beyond the owner's values.
    pub fn shared<T: AsRef<[f32]> + Send + Sync + 'static>(owner: &Arc<T>, range: Range<usize>) -> Self {
        let held = Held { owner: Arc::clone(owner), range };
        Self(Bytes::from_owner(held))
    }

    /// Values.
    pub fn numel(&self) -> usize {
        self.0.len() / size_of::<f32>()
    }

    pub(crate) fn bytes(&self, range: Range<usize>) -> Bytes {
        self.0.slice(range.start * size_of::<f32>()..range.end * size_of::<f32>())
    }
}

/// Copies.
impl From<&[f32]> for F32Bytes {
    fn from(values: &[f32]) -> Self {
        Self(Bytes::copy_from_slice(bytemuck::cast_slice(values)))
    }
}
