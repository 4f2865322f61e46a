//! libcuda and libnccl, found and checked at run time, when GPUs are asked for and not before.

use cudarc::{driver, nccl};
use std::fmt::Debug;

/// The oldest libnccl whose configuration structure is the one that this program was built with.
const OLDEST_NCCL: i32 = 22900;

/// Everything that is called. cudarc looks a function up when it is first called and panics when there is none, so all of them
/// are looked up before.
const DRIVER_FUNCTIONS: &[&str] = &[
    "cuCtxPopCurrent_v2",
    "cuCtxPushCurrent_v2",
    "cuDeviceGet",
    "cuDeviceGetCount",
    "cuDeviceGetPCIBusId",
    "cuDevicePrimaryCtxRelease_v2",
    "cuDevicePrimaryCtxRetain",
    "cuEventCreate",
    "cuEventDestroy_v2",
    "cuEventQuery",
    "cuEventRecord",
    "cuGetErrorName",
    "cuInit",
    "cuMemAlloc_v2",
    "cuMemFree_v2",
    "cuMemcpyDtoH_v2",
    "cuMemcpyHtoD_v2",
    "cuStreamCreate",
    "cuStreamDestroy_v2",
    "cuStreamWaitEvent",
];
const NCCL_FUNCTIONS: &[&str] = &[
    "ncclAllGather",
    "ncclAllReduce",
    "ncclBroadcast",
    "ncclCommAbort",
    "ncclCommDestroy",
    "ncclCommFinalize",
    "ncclCommGetAsyncError",
    "ncclCommInitRankConfig",
    "ncclCommSplit",
    "ncclGetErrorString",
    "ncclGetLastError",
    "ncclGetUniqueId",
    "ncclGetVersion",
    "ncclGroupEnd",
    "ncclGroupStart",
    "ncclRecv",
    "ncclReduce",
    "ncclReduceScatter",
    "ncclSend",
];

/// Loads both libraries and gives libnccl's version (22907 for 2.29.7), or says what is missing and what to do.
pub(super) fn load() -> Result<i32, String> {
    load_driver()?;
    load_nccl()
}

fn load_driver() -> Result<(), String> {
    // SAFETY: loading runs the library's initialisers, which any program that computes on GPUs does.
    if !unsafe { driver::sys::is_culib_present() } {
        return Err("the loader finds no CUDA driver (libcuda.so.1) on this machine; install NVIDIA's driver, or use \
                    train.device = \"cpu\""
            .to_owned());
    }
    // SAFETY: present, as just seen, so there is no panic; a symbol is looked up, not called.
    let lacks = |name: &&&str| unsafe { driver::sys::culib().get::<unsafe extern "C" fn()>(name.as_bytes()).is_err() };
    missing("libcuda.so.1", DRIVER_FUNCTIONS.iter().filter(lacks).collect())
}

fn load_nccl() -> Result<i32, String> {
    // SAFETY: as above.
    if !unsafe { nccl::sys::is_culib_present() } {
        return Err("the loader finds no libnccl.so; ./dev setup links the one that comes with PyTorch. Elsewhere put the folder \
                    of a libnccl.so into LD_LIBRARY_PATH; beside a libnccl.so.2 alone make a link of that name"
            .to_owned());
    }
    // SAFETY: as above.
    let lacks = |name: &&&str| unsafe { nccl::sys::culib().get::<unsafe extern "C" fn()>(name.as_bytes()).is_err() };
    missing("libnccl.so", NCCL_FUNCTIONS.iter().filter(lacks).collect())?;
    let version =
        nccl::result::get_nccl_version().map_err(|error| format!("libnccl.so: ncclGetVersion: {:?}", error.0))?;
    if !(OLDEST_NCCL..30000).contains(&version) {
        return Err(format!(
            "libnccl.so is version {}; expected 2.29 or a later 2.x: use the one that comes with PyTorch (./dev setup)",
            version_text(version)
        ));
    }
    Ok(version)
}

fn missing(library: &str, names: Vec<&impl Debug>) -> Result<(), String> {
    if names.is_empty() {
        return Ok(());
    }
    Err(format!("{library} has no {names:?}; it is too old for this program"))
}

/// `2.29.7` of 22907.
pub(super) fn version_text(version: i32) -> String {
    format!("{}.{}.{}", version / 10000, version / 100 % 100, version % 100)
}

#[cfg(test)]
mod tests {
    use super::*;

    /// NVIDIA's own library, which answers this much without a GPU.
    #[test]
    fn the_libnccl_that_comes_with_pytorch_is_found_and_has_every_function_that_is_called() {
        let version = load_nccl().expect("./dev setup links it");
        assert!(version_text(version).starts_with("2."), "{version}");
        assert_eq!(version_text(22907), "2.29.7");
    }
}
