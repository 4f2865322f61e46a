//! Hands the tensors of a weight file to the layers and checks them as a whole.

use super::MetricsError;
use crate::interop::{WeightsSection, read_weights};
use sha2::{Digest, Sha256};
use std::collections::BTreeMap;
use std::io::Read;
use std::path::Path;
use tch::{Device, Kind, Tensor};

/// Tensors that files may carry and the features do not need: the evaluators' Inception Score leaves the bias out.
fn is_needless(name: &str) -> bool {
    name == "fc.bias" || name.ends_with(".bn.num_batches_tracked")
}

/// The tensors of a weight file and the SHA-256 of its bytes in hex.
pub(super) fn read(path: &Path) -> Result<(BTreeMap<String, Tensor>, String), MetricsError> {
    let digest = digest(path).map_err(|error| {
        let advice = "give pytorch-fid's pt_inception-2015-12-05-6726825d.pth or a safetensors file of its tensors";
        MetricsError::file(path, format!("cannot read the Inception weights: {error}; {advice}"))
    })?;
    let source = path.to_str().ok_or_else(|| MetricsError::file(path, "the path is not valid UTF-8; rename it"))?;
    let weights = read_weights(source, WeightsSection::Ema).map_err(Box::new)?;
    Ok((weights.tensors, digest))
}

fn digest(path: &Path) -> std::io::Result<String> {
    let (mut file, mut hash, mut buffer) = (std::fs::File::open(path)?, Sha256::new(), vec![0; 1 << 20]);
    loop {
        match file.read(&mut buffer)? {
            0 => return Ok(hash.finalize().iter().map(|byte| format!("{byte:02x}")).collect()),
            bytes => hash.update(&buffer[..bytes]),
        }
    }
}

/// Collects every disagreement, so that one error can list all of them.
pub(super) struct InceptionWeights {
    tensors: BTreeMap<String, Tensor>,
    device: Device,
    problems: Vec<String>,
}

impl InceptionWeights {
    pub(super) fn new(tensors: BTreeMap<String, Tensor>, device: Device) -> Self {
        Self { tensors, device, problems: Vec::new() }
    }

    /// Takes tensor `name` in f32 on the device. A missing or wrong-shaped one is noted and replaced by zeros;
    /// [`Self::finish`] then fails.
    pub(super) fn take(&mut self, name: &str, shape: &[i64]) -> Result<Tensor, MetricsError> {
        let problem = match self.tensors.remove(name) {
            Some(tensor) if tensor.size() == shape => {
                return Ok(tensor.f_to_device(self.device)?.f_to_kind(Kind::Float)?.f_detach()?);
            }
            Some(tensor) => format!("{name}: shape {:?}, expected {shape:?}", tensor.size()),
            None => format!("{name}: missing, expected shape {shape:?}"),
        };
        self.problems.push(problem);
        Ok(Tensor::f_zeros(shape, (Kind::Float, self.device))?)
    }

    /// Fails when anything was missing, misshapen or left over; `origin` names the tensors' file.
    pub(super) fn finish(mut self, origin: &str) -> Result<(), MetricsError> {
        let left = self.tensors.iter().filter(|(name, _)| !is_needless(name));
        self.problems.extend(left.map(|(name, t)| format!("{name}: not part of the network (shape {:?})", t.size())));
        if self.problems.is_empty() {
            return Ok(());
        }
        self.problems.sort();
        Err(MetricsError::Weights { origin: origin.into(), problems: self.problems })
    }
}
