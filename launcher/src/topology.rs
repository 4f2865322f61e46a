//! Which network interface is nearest to which GPU, as `/sys` of this machine tells it. Nothing is said where there is nothing to tell.

use std::fs;
use std::path::Path;

use serde::Serialize;

/// A GPU with the rank that has it and what lies next to it.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
pub struct GpuPlace {
    /// The rank's number on its node, which is the GPU's in the order of the bus.
    pub local_rank: usize,
    /// PCI address.
    pub address: String,
    /// Node of memory and cores.
    pub numa_node: Option<i64>,
    /// Cores of that node, as Linux writes them: `0-31,64-95`.
    pub cores: Option<String>,
    /// The nearest network interface: on the same switch before the same memory node before any.
    pub nic: Option<String>,
}

/// An InfiniBand or RoCE device, or where there is none a network card.
struct Nic {
    name: String,
    path: String,
    numa_node: Option<i64>,
}

/// The GPUs of a machine whose `/sys` is at `root`, in the order in which CUDA numbers them with CUDA_DEVICE_ORDER=PCI_BUS_ID.
pub fn gpus(root: &Path) -> Vec<GpuPlace> {
    let nics = nics(root);
    let mut gpus: Vec<(String, String, Option<i64>)> = Vec::new();
    for entry in entries(&root.join("bus/pci/devices")) {
        let device = root.join("bus/pci/devices").join(&entry);
        // Display controllers and 3D controllers of NVIDIA.
        let is_gpu = read(&device.join("class")).is_some_and(|class| class.starts_with("0x030"));
        if is_gpu && read(&device.join("vendor")).as_deref() == Some("0x10de") {
            gpus.push((entry, path_of(&device), numa_node(&device)));
        }
    }
    gpus.sort();
    let near = |path: &str, node: Option<i64>, local_rank: usize| {
        let closeness = |nic: &&Nic| (shared_switches(path, &nic.path), nic.numa_node == node);
        let best = nics.iter().map(|nic| closeness(&nic)).max()?;
        // Of equally near ones they take turns.
        let equals: Vec<&Nic> = nics.iter().filter(|nic| closeness(nic) == best).collect();
        equals.get(local_rank % equals.len().max(1)).map(|nic| nic.name.clone())
    };
    let place = |(local_rank, (address, path, numa_node)): (usize, (String, String, Option<i64>))| GpuPlace {
        local_rank,
        nic: near(&path, numa_node, local_rank),
        cores: numa_node.and_then(|node| read(&root.join(format!("devices/system/node/node{node}/cpulist")))),
        address,
        numa_node,
    };
    gpus.into_iter().enumerate().map(place).collect()
}

fn nics(root: &Path) -> Vec<Nic> {
    let of = |class: &str| {
        let folder = root.join("class").join(class);
        let nic = |name: String| {
            let device = folder.join(&name).join("device");
            // What has no device behind it (lo, bridges) is no card.
            device.exists().then(|| Nic { name, path: path_of(&device), numa_node: numa_node(&device) })
        };
        entries(&folder).into_iter().filter_map(nic).collect::<Vec<_>>()
    };
    let fast = of("infiniband");
    if fast.is_empty() { of("net") } else { fast }
}

fn entries(folder: &Path) -> Vec<String> {
    let entries = fs::read_dir(folder).into_iter().flatten().flatten();
    let mut names: Vec<String> = entries.filter_map(|entry| entry.file_name().into_string().ok()).collect();
    names.sort();
    names
}

fn read(file: &Path) -> Option<String> {
    fs::read_to_string(file).ok().map(|text| text.trim().to_owned())
}

/// −1 stands for none.
fn numa_node(device: &Path) -> Option<i64> {
    read(&device.join("numa_node"))?.parse().ok().filter(|node| *node >= 0)
}

/// Where the device is in the tree of buses.
fn path_of(device: &Path) -> String {
    fs::canonicalize(device).map_or_else(|_| String::new(), |path| path.to_string_lossy().into_owned())
}

/// Bridges that two devices have in common below their root complexes.
fn shared_switches(a: &str, b: &str) -> usize {
    let buses = |path: &str| {
        let after = path.split_once("/pci").map(|(_, rest)| rest.to_owned()).unwrap_or_default();
        after.split('/').map(str::to_owned).collect::<Vec<_>>()
    };
    let (a, b) = (buses(a), buses(b));
    if a.len() < 2 || b.len() < 2 { 0 } else { a.iter().zip(&b).take_while(|(a, b)| a == b).count() }
}

/// The order in words, a line for each GPU.
pub fn lines(gpus: &[GpuPlace]) -> Vec<String> {
    let line = |gpu: &GpuPlace| {
        let node = gpu.numa_node.map_or_else(String::new, |node| format!(", memory node {node}"));
        let cores = gpu.cores.as_ref().map_or_else(String::new, |cores| format!(" (cores {cores})"));
        let nic = gpu.nic.as_ref().map_or_else(String::new, |nic| format!(", nearest NIC {nic}"));
        format!("local rank {}: GPU {}{node}{cores}{nic}", gpu.local_rank, gpu.address)
    };
    gpus.iter().map(line).collect()
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use super::*;
    use std::os::unix::fs::symlink;

    /// Adds a device to a made-up `/sys`.
    fn device(root: &Path, bus: &str, address: &str, files: &[(&str, &str)]) -> std::path::PathBuf {
        let folder = root.join("devices").join(bus).join(address);
        fs::create_dir_all(&folder).unwrap();
        for (name, text) in files {
            fs::write(folder.join(name), format!("{text}\n")).unwrap();
        }
        let list = root.join("bus/pci/devices");
        fs::create_dir_all(&list).unwrap();
        symlink(&folder, list.join(address)).unwrap();
        folder
    }

    fn gpu(root: &Path, bus: &str, address: &str, node: &str) {
        device(root, bus, address, &[("class", "0x030200"), ("vendor", "0x10de"), ("numa_node", node)]);
    }

    fn nic(root: &Path, class: &str, name: &str, bus: &str, address: &str, node: &str) {
        let folder = device(root, bus, address, &[("class", "0x020700"), ("vendor", "0x15b3"), ("numa_node", node)]);
        let named = root.join("class").join(class).join(name);
        fs::create_dir_all(&named).unwrap();
        symlink(folder, named.join("device")).unwrap();
    }

    #[test]
    fn the_nearest_nic_is_on_the_same_switch_or_else_on_the_same_memory_node() {
        let folder = tempfile::tempdir().unwrap();
        let root = folder.path();
        gpu(root, "pci0000:00/0000:00:01.0/0000:01:00.0", "0000:02:00.0", "0");
        gpu(root, "pci0000:00/0000:00:02.0/0000:03:00.0", "0000:04:00.0", "0");
        gpu(root, "pci0000:80/0000:80:01.0", "0000:81:00.0", "1");
        nic(root, "infiniband", "mlx5_0", "pci0000:00/0000:00:02.0/0000:03:00.0", "0000:05:00.0", "0");
        nic(root, "infiniband", "mlx5_1", "pci0000:00/0000:00:01.0/0000:01:00.0", "0000:06:00.0", "0");
        nic(root, "infiniband", "mlx5_2", "pci0000:a0/0000:a0:01.0", "0000:a1:00.0", "1");
        nic(root, "net", "eth0", "pci0000:00/0000:00:1f.0", "0000:07:00.0", "0");
        fs::create_dir_all(root.join("devices/system/node/node1")).unwrap();
        fs::write(root.join("devices/system/node/node1/cpulist"), "32-63\n").unwrap();
        let found = gpus(root);
        let nics: Vec<_> = found.iter().map(|gpu| (gpu.local_rank, gpu.nic.as_deref().unwrap())).collect();
        assert_eq!(nics, [(0, "mlx5_1"), (1, "mlx5_0"), (2, "mlx5_2")]);
        assert_eq!(lines(&found)[2], "local rank 2: GPU 0000:81:00.0, memory node 1 (cores 32-63), nearest NIC mlx5_2");
    }

    #[test]
    fn equally_near_cards_take_turns_and_a_machine_without_gpus_says_nothing() {
        let folder = tempfile::tempdir().unwrap();
        let root = folder.path();
        nic(root, "net", "eth0", "pci0000:00/0000:00:1f.0", "0000:07:00.0", "-1");
        nic(root, "net", "eth1", "pci0000:00/0000:00:1f.1", "0000:08:00.0", "-1");
        fs::create_dir_all(root.join("class/net/lo")).unwrap();
        assert!(gpus(root).is_empty());
        gpu(root, "pci0000:40/0000:40:01.0", "0000:41:00.0", "-1");
        gpu(root, "pci0000:60/0000:60:01.0", "0000:61:00.0", "-1");
        let nics: Vec<_> = gpus(root).into_iter().map(|gpu| (gpu.numa_node, gpu.nic)).collect();
        assert_eq!(nics, [(None, Some("eth0".to_owned())), (None, Some("eth1".to_owned()))]);
        assert!(gpus(&root.join("nowhere")).is_empty());
    }
}
