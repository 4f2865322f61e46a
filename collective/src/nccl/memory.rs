//! Device memory for those who have no tensors: the conformance suite.

use super::driver::{Device, DeviceBuffer, download, upload};
use crate::conformance::Memory;
use crate::{CollectiveError, Place, Region};
use std::sync::Arc;

/// Allocates memory of one GPU.
pub struct DeviceMemory {
    rank: usize,
    device: Arc<Device>,
}

impl DeviceMemory {
    pub(super) fn new(rank: usize, device: Arc<Device>) -> Self {
        Self { rank, device }
    }

    fn failed(&self, reason: String) -> CollectiveError {
        CollectiveError::Backend { rank: self.rank, op: "copy", reason }
    }
}

impl Memory for DeviceMemory {
    fn put(&self, host: Region) -> Result<Region, CollectiveError> {
        let buffer = DeviceBuffer::new(&self.device, host.len_bytes()).map_err(|reason| self.failed(reason))?;
        let pointer = buffer.as_ptr();
        // SAFETY: the buffer has the size of the region, and lives in the new one.
        unsafe {
            if host.numel() > 0 {
                upload(&self.device, host.as_ptr(), pointer, host.len_bytes()).map_err(|reason| self.failed(reason))?;
            }
            let place = Place::Device(self.device.ordinal);
            Ok(Region::from_raw(pointer, host.numel(), host.dtype(), place, Box::new(buffer)))
        }
    }

    fn get(&self, region: Region) -> Result<Region, CollectiveError> {
        let host = Region::zeros(region.dtype(), region.numel());
        if region.numel() > 0 {
            // SAFETY: both regions have one size.
            unsafe { download(&self.device, region.as_ptr(), host.as_ptr(), region.len_bytes()) }
                .map_err(|reason| self.failed(reason))?;
        }
        Ok(host)
    }
}
