//! Where a rank computes, and the collective that reaches that memory.

use super::agree::{Agreed, agree};
use crate::ffi;
use anyhow::{Context, Result, bail};
use collective::Collective;
use collective::nccl::{NcclCollective, NcclOptions};
use std::sync::Arc;
use tch::Device;

/// Where this rank computes.
///
/// # Errors
/// A GPU is demanded and there is none for this rank.
pub fn choose_device(wanted: configs::Device, collective: &dyn Collective) -> Result<Device> {
    let cuda = match wanted {
        configs::Device::Cpu => return Ok(Device::Cpu),
        configs::Device::Auto | configs::Device::Cuda => ffi::load_cuda().map(|()| tch::Cuda::device_count()),
    };
    match (cuda, wanted) {
        (Ok(count), _) if count > 0 => gpu_of(collective.local_rank(), count as usize),
        (_, configs::Device::Auto) => Ok(Device::Cpu),
        (Ok(_), _) => bail!("`train.device` = \"cuda\", but the driver shows no GPU; use \"auto\" or \"cpu\""),
        (Err(error), _) => bail!("`train.device` = \"cuda\": {error}; use \"auto\" or \"cpu\""),
    }
}

/// An engine may show each rank its own GPU only, as the first.
fn gpu_of(local_rank: usize, gpus: usize) -> Result<Device> {
    match local_rank {
        _ if gpus == 1 => Ok(Device::Cuda(0)),
        _ if local_rank < gpus => Ok(Device::Cuda(local_rank)),
        _ => {
            bail!("there is no GPU for rank {local_rank} of this node, the driver shows {gpus}; start one rank per GPU")
        }
    }
}

/// The collective that reaches the memory of `device`, with `control` for the rest; all ranks call it together.
///
/// # Errors
/// [`Agreed`] when ranks compute on different kinds of devices or their GPUs cannot be connected; what `control` reports.
pub fn connect(control: Arc<dyn Collective>, device: Device) -> Result<Arc<dyn Collective>> {
    if control.world_size() == 1 {
        return Ok(control);
    }
    let on_gpu = control.gather_values(vec![u8::from(device.is_cuda())]).context("agreeing on devices")?;
    if let Some(rank) = on_gpu.iter().position(|here| *here != on_gpu[0]) {
        let reason =
            "it computes on another kind of device than rank 0; set train.device, or look at the GPUs of its node";
        return Err(Agreed { rank, reason: reason.to_owned() }.into());
    }
    let Device::Cuda(ordinal) = device else { return Ok(control) };
    let caller_stream = Arc::new(move || ffi::current_stream(ordinal).map_err(|error| error.to_string()));
    let options = NcclOptions { caller_stream, ..NcclOptions::new(ordinal, control.deadline()) };
    let connected = NcclCollective::init(control.clone(), options);
    Ok(Arc::new(agree(&*control, connected.map_err(Into::into))?))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn each_rank_of_a_node_has_a_gpu_of_its_own_or_is_told_that_there_is_none() {
        assert_eq!(gpu_of(3, 8).unwrap(), Device::Cuda(3));
        assert_eq!(gpu_of(3, 1).unwrap(), Device::Cuda(0), "the engine shows each rank its own");
        assert!(gpu_of(2, 2).unwrap_err().to_string().contains("no GPU for rank 2 of this node, the driver shows 2"));
    }
}
