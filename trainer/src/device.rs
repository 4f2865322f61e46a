//! Where a command computes.

use crate::ffi;
use tch::Device;

/// What `--device` says.
#[derive(Clone, Copy, Debug, PartialEq, Eq, clap::ValueEnum)]
pub enum DeviceChoice {
    /// A GPU if libtorch sees one, else the CPU.
    Auto,
    /// The CPU.
    Cpu,
    /// A GPU; an error if there is none.
    Cuda,
}

/// `--device cuda` where there is no GPU.
#[derive(Debug, thiserror::Error)]
#[error("--device cuda: {0}; use --device cpu")]
pub struct NoGpu(String);

impl DeviceChoice {
    /// The device of the process that is number `local_rank` on its machine: ranks of a machine share its GPUs out.
    ///
    /// # Errors
    /// [`NoGpu`].
    pub fn device(self, local_rank: usize) -> Result<Device, NoGpu> {
        if self == Self::Cpu {
            return Ok(Device::Cpu);
        }
        let gpus = ffi::load_cuda().map(|()| tch::Cuda::device_count().max(0) as usize);
        match (gpus, self) {
            (Ok(count), _) if count > 0 => Ok(Device::Cuda(local_rank % count)),
            (_, Self::Auto | Self::Cpu) => Ok(Device::Cpu),
            (Ok(_), Self::Cuda) => Err(NoGpu("the driver shows no GPU".to_owned())),
            (Err(error), Self::Cuda) => Err(NoGpu(error.to_string())),
        }
    }
}
