//! What this machine can run: cores and GPUs.

/// Cores and GPUs that ranks may use. Every node of a cluster is taken to be like this one.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Machine {
    /// Cores that this process may run on (affinity and control groups counted in).
    pub cores: usize,
    /// NVIDIA GPUs that are visible.
    pub gpus: usize,
}

impl Machine {
    /// Looks at this host; asks no driver.
    pub fn this_host() -> Machine {
        let devices = std::fs::read_dir("/dev").into_iter().flatten().flatten();
        let present = devices.filter(|entry| is_gpu(&entry.file_name().to_string_lossy())).count();
        let visible = std::env::var("CUDA_VISIBLE_DEVICES").ok();
        Machine {
            cores: std::thread::available_parallelism().map_or(1, usize::from),
            gpus: gpus(present, visible.as_deref()),
        }
    }
}

/// `nvidia0`, `nvidia1` …, but not `nvidiactl` or `nvidia-uvm`.
fn is_gpu(device: &str) -> bool {
    device.strip_prefix("nvidia").is_some_and(|number| !number.is_empty() && number.chars().all(|c| c.is_ascii_digit()))
}

/// CUDA uses the listed devices up to the first invalid entry; an empty list hides all.
fn gpus(present: usize, visible: Option<&str>) -> usize {
    match visible {
        None => present,
        Some(list) => {
            list.split(',').take_while(|entry| !entry.trim().is_empty() && entry.trim() != "-1").count().min(present)
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn gpus_are_the_numbered_devices_that_cuda_would_show() {
        assert!(is_gpu("nvidia0") && is_gpu("nvidia12"));
        assert!(!is_gpu("nvidiactl") && !is_gpu("nvidia-uvm") && !is_gpu("nvidia"));
        assert_eq!(gpus(8, None), 8);
        assert_eq!(gpus(8, Some("")), 0);
        assert_eq!(gpus(8, Some("-1")), 0);
        assert_eq!(gpus(8, Some("3,1,GPU-af0e")), 3);
        assert_eq!(gpus(2, Some("0,1,2,3")), 2);
        assert_eq!(gpus(8, Some("0,-1,2")), 1);
    }
}
