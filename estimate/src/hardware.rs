//! What machines can do.

use std::collections::BTreeMap;
use std::path::Path;

use serde::{Deserialize, Serialize};

const BUILT_IN: &str = include_str!("hardware.toml");

/// What a rank's device and its node can do. Rates are makers' or measured; the `achieved` shares are assumptions.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Hardware {
    /// What it is.
    pub name: String,
    /// Memory of a device; of a CPU what the machine has.
    pub memory_bytes: Option<f64>,
    /// Products in float32, FLOP/s; of a CPU those of one thread.
    pub flops_fp32: f64,
    /// In float32 with inputs rounded to TF32.
    pub flops_tf32: f64,
    /// In bfloat16.
    pub flops_bf16: f64,
    /// Between the device and its memory.
    pub memory_bytes_per_s: f64,
    /// Between a rank and the others of its node, one direction.
    pub link_bytes_per_s: f64,
    /// Network interfaces of a node.
    pub nics_per_node: usize,
    /// Through each of them, one direction.
    pub nic_bytes_per_s: f64,
    /// Share of the rate of products that a step reaches.
    pub achieved_flops: f64,
    /// Share of the memory's rate.
    pub achieved_memory: f64,
    /// Share of the rates of links and interfaces.
    pub achieved_wire: f64,
    /// Seconds that one sample takes forward and backward, where it was measured on this machine.
    #[serde(skip_deserializing, skip_serializing_if = "Option::is_none")]
    pub measured_s_per_sample: Option<f64>,
}

/// A description that cannot be used.
#[derive(Debug, thiserror::Error)]
pub enum HardwareError {
    /// No such name, and no such file.
    #[error("--hardware {found}: neither a file nor one of {known}")]
    Unknown {
        /// What was asked for.
        found: String,
        /// What there is.
        known: String,
    },
    /// A file that cannot be read.
    #[error("--hardware {found}: {reason}")]
    Unreadable {
        /// The file.
        found: String,
        /// Why.
        reason: String,
    },
}

impl Hardware {
    /// The one that is called `name`, or that the file `name` describes by the same keys at its top.
    ///
    /// # Errors
    /// No such name or file; a file with other keys, or with rates that are not above 0.
    pub fn find(name: &str) -> Result<Hardware, HardwareError> {
        let unreadable = |reason: String| HardwareError::Unreadable { found: name.to_owned(), reason };
        let known: BTreeMap<String, Hardware> =
            toml::from_str(BUILT_IN).map_err(|error| unreadable(error.to_string()))?;
        let found = match known.get(name) {
            Some(found) => found.clone(),
            None if Path::new(name).is_file() => {
                let text = std::fs::read_to_string(name).map_err(|error| unreadable(error.to_string()))?;
                toml::from_str(&text).map_err(|error| unreadable(error.to_string()))?
            }
            None => {
                let known = known.into_keys().collect::<Vec<_>>().join(", ");
                return Err(HardwareError::Unknown { found: name.to_owned(), known });
            }
        };
        let Hardware { flops_fp32, flops_tf32, flops_bf16, memory_bytes_per_s, link_bytes_per_s, .. } = found;
        let Hardware { nic_bytes_per_s, achieved_flops, achieved_memory, achieved_wire, .. } = found;
        let rates = [flops_fp32, flops_tf32, flops_bf16, memory_bytes_per_s, link_bytes_per_s, nic_bytes_per_s];
        let shares = [achieved_flops, achieved_memory, achieved_wire];
        let is_fine = |rate: &f64| rate.is_finite() && *rate > 0.0;
        if !rates.iter().chain(&shares).all(is_fine)
            || shares.iter().any(|share| *share > 1.0)
            || found.nics_per_node == 0
        {
            return Err(unreadable(
                "rates must be above 0, achieved shares above 0 and at most 1, nics_per_node at least 1".to_owned(),
            ));
        }
        Ok(found)
    }
}
