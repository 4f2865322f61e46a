//! Named tensors: read from a folder, handed out to the layers one by one, and checked as a whole.

use std::collections::HashMap;
use std::path::{Path, PathBuf};

use safetensors::{Dtype, SafeTensors};
use sha2::{Digest, Sha256};
use tch::{Device, Kind, Tensor};

use super::VaeError;

/// File names that a diffusers folder may use, in order of preference.
const FILE_NAMES: [&str; 2] = ["diffusion_pytorch_model.safetensors", "diffusion_pytorch_model.fp16.safetensors"];

/// Attention projections: the current name and the one used before diffusers 0.15
/// (`stabilityai/sd-vae-ft-*` still has it).
const LEGACY_NAMES: [(&str, &str); 4] =
    [("to_q", "query"), ("to_k", "key"), ("to_v", "value"), ("to_out.0", "proj_attn")];

/// Reads the weight file of the folder `dir`: its path, its tensors and the SHA-256 of its bytes in hex.
pub(super) fn read_folder(dir: &Path) -> Result<(PathBuf, HashMap<String, Tensor>, String), VaeError> {
    let path = FILE_NAMES
        .iter()
        .map(|name| dir.join(name))
        .find(|path| path.exists())
        .unwrap_or_else(|| dir.join(FILE_NAMES[0]));
    let bytes = std::fs::read(&path).map_err(|reason| VaeError::Read { path: path.clone(), reason })?;
    let format = |reason: String| VaeError::Format { path: path.clone(), reason, found_bytes: bytes.len() };
    let file = SafeTensors::deserialize(&bytes).map_err(|e| format(e.to_string()))?;
    let mut tensors = HashMap::with_capacity(file.len());
    for (name, view) in file.tensors() {
        let kind = match view.dtype() {
            Dtype::F64 => Kind::Double,
            Dtype::F32 => Kind::Float,
            Dtype::F16 => Kind::Half,
            Dtype::BF16 => Kind::BFloat16,
            // Old checkpoints carry integer counters; they end up among the unexpected tensors.
            Dtype::I64 => Kind::Int64,
            other => return Err(format(format!("tensor {name} has dtype {other:?}, expected F32, F16 or BF16"))),
        };
        let shape: Vec<i64> = view.shape().iter().map(|&n| n as i64).collect();
        tensors.insert(name, Tensor::f_from_data_size(view.data(), &shape, kind)?);
    }
    let digest = Sha256::digest(&bytes).iter().map(|byte| format!("{byte:02x}")).collect();
    Ok((path, tensors, digest))
}

/// Hands tensors to the layers and collects every disagreement, so that one error can list all of them.
pub(super) struct Weights {
    tensors: HashMap<String, Tensor>,
    device: Device,
    problems: Vec<String>,
}

impl Weights {
    /// Renames legacy attention tensors to their current names.
    pub(super) fn new(tensors: HashMap<String, Tensor>, device: Device) -> Self {
        let tensors = tensors.into_iter().map(|(name, tensor)| (current_name(&name), tensor)).collect();
        Self { tensors, device, problems: Vec::new() }
    }

    /// Takes tensor `name` in f32 on the device. A missing or wrong-shaped one is noted and replaced by zeros;
    /// [`Self::finish`] then fails.
    pub(super) fn take(&mut self, name: &str, shape: &[i64]) -> Result<Tensor, VaeError> {
        let Some(tensor) = self.tensors.remove(name) else {
            self.problems.push(format!("{name}: missing, expected shape {shape:?}"));
            return Ok(Tensor::f_zeros(shape, (Kind::Float, self.device))?);
        };
        let found = tensor.size();
        // A linear layer saved as 1×1 convolution has two further dimensions of one.
        let as_conv = shape.len() == 2 && found == [shape[0], shape[1], 1, 1];
        if found != shape && !as_conv {
            self.problems.push(format!("{name}: shape {found:?}, expected {shape:?}"));
            return Ok(Tensor::f_zeros(shape, (Kind::Float, self.device))?);
        }
        Ok(tensor.f_reshape(shape)?.f_to_device(self.device)?.f_to_kind(Kind::Float)?.f_detach()?)
    }

    /// Fails when anything was missing, misshapen or left over; `origin` names the tensors' file.
    pub(super) fn finish(mut self, origin: &str) -> Result<(), VaeError> {
        self.problems.extend(
            self.tensors.iter().map(|(name, t)| format!("{name}: not part of this config (shape {:?})", t.size())),
        );
        if self.problems.is_empty() {
            return Ok(());
        }
        self.problems.sort();
        Err(VaeError::Weights { origin: origin.into(), problems: self.problems })
    }
}

fn current_name(name: &str) -> String {
    if let Some((prefix, rest)) = name.split_once(".attentions.") {
        for (current, legacy) in LEGACY_NAMES {
            if let Some((index, leaf)) = rest.split_once(&format!(".{legacy}.")) {
                return format!("{prefix}.attentions.{index}.{current}.{leaf}");
            }
        }
    }
    name.to_string()
}
