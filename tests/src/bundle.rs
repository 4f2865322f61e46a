//! A bundle file: named tensors and the specification in its metadata.

use safetensors::{Dtype, SafeTensors};
use serde_json::{Map, Value};
use std::cell::RefCell;
use std::collections::{BTreeMap, BTreeSet, HashMap};
use std::path::{Path, PathBuf};
use std::str::FromStr;
use tch::{Kind, Tensor};

/// Why a bundle cannot be verified.
#[derive(Debug, thiserror::Error)]
#[allow(missing_docs)]
pub enum BundleError {
    #[error("cannot read it: {0}")]
    Read(#[from] std::io::Error),
    #[error("not a readable safetensors file ({reason}; {found_bytes} bytes found); copy or record it again")]
    Format { reason: String, found_bytes: usize },
    #[error("metadata `spec`: {0}; expected a JSON object that names the `kind`")]
    Spec(String),
    #[error("metadata `spec`: kind `{found}` is unknown; known are {known}")]
    UnknownKind { found: String, known: String },
    #[error("metadata `spec`: `{key}` = {found}, expected {expected}")]
    Key { key: String, found: String, expected: String },
    #[error("tensor `{name}` is missing; a bundle of this kind has it")]
    Missing { name: String },
    #[error("tensor `{name}`: found {found}, expected {expected}")]
    Tensor { name: String, found: String, expected: String },
    #[error("needs a file beside it: {0}")]
    Partner(String),
    #[error("{0}")]
    Run(String),
}

/// The result of reading or running a bundle.
pub type Result<T> = std::result::Result<T, BundleError>;

/// The specification of a bundle: a JSON object, mostly of strings.
#[derive(Clone, Debug, Default)]
pub struct Spec(pub Map<String, Value>);

impl Spec {
    /// What decides how the bundle is run: `kind`, or for bundles of the video and text models their `system`.
    pub fn kind(&self) -> Result<String> {
        let kind = self.text("kind").or_else(|| self.text("system"));
        kind.ok_or_else(|| BundleError::Spec("neither `kind` nor `system` is there".to_owned()))
    }

    /// The value of `key` as text; numbers, booleans, lists and objects as their JSON.
    pub fn text(&self, key: &str) -> Option<String> {
        self.0.get(key).map(|value| value.as_str().map_or_else(|| value.to_string(), str::to_owned))
    }

    /// The value of `key`.
    ///
    /// # Errors
    /// When it is missing or not `expected`, which describes a `T`.
    pub fn parse<T: FromStr>(&self, key: &str, expected: &str) -> Result<T> {
        let refuse = |found: &str| BundleError::Key { key: key.into(), found: found.into(), expected: expected.into() };
        let text = self.text(key).ok_or_else(|| refuse("nothing"))?;
        text.trim().parse().map_err(|_| refuse(&text))
    }
}

/// A bundle in memory. It remembers which tensors were read or compared, so that none is overlooked.
pub struct Bundle {
    /// Where it was read from.
    pub path: PathBuf,
    /// What it holds.
    pub spec: Spec,
    tensors: BTreeMap<String, Tensor>,
    used: RefCell<BTreeSet<String>>,
}

impl Bundle {
    /// Reads the file.
    ///
    /// # Errors
    /// An unreadable or truncated file, a missing or malformed specification, a tensor of an unknown dtype, and a NaN
    /// or infinity in any tensor.
    pub fn load(path: &Path) -> Result<Self> {
        let bytes = std::fs::read(path)?;
        let format = |reason: String| BundleError::Format { reason, found_bytes: bytes.len() };
        let file = SafeTensors::deserialize(&bytes).map_err(|error| format(error.to_string()))?;
        let mut tensors = BTreeMap::new();
        for (name, view) in file.iter() {
            let tensor = tensor_of(view.data(), view.shape(), view.dtype()).map_err(|found| BundleError::Tensor {
                name: name.to_owned(),
                found,
                expected: "a float or integer tensor".to_owned(),
            })?;
            if let Some(index) = values(&tensor).iter().position(|value| !value.is_finite()) {
                let found = format!("{} at element {index}", values(&tensor)[index]);
                return Err(BundleError::Tensor { name: name.to_owned(), found, expected: "finite values".to_owned() });
            }
            tensors.insert(name.to_owned(), tensor);
        }
        let (_, header) = SafeTensors::read_metadata(&bytes).map_err(|error| format(error.to_string()))?;
        let spec = header.metadata().as_ref().and_then(|metadata| metadata.get("spec"));
        let spec = spec.ok_or_else(|| BundleError::Spec("missing".to_owned()))?;
        let spec = serde_json::from_str(spec).map_err(|error| BundleError::Spec(error.to_string()))?;
        Ok(Self { path: path.to_owned(), spec: Spec(spec), tensors, used: RefCell::default() })
    }

    /// Names of all tensors, sorted.
    pub fn names(&self) -> impl Iterator<Item = &str> {
        self.tensors.keys().map(String::as_str)
    }

    /// Whether it has that tensor.
    pub fn has(&self, name: &str) -> bool {
        self.tensors.contains_key(name)
    }

    /// The tensor called `name`, which thereby counts as used.
    ///
    /// # Errors
    /// When it is missing.
    pub fn tensor(&self, name: &str) -> Result<&Tensor> {
        let tensor = self.tensors.get(name).ok_or_else(|| BundleError::Missing { name: name.to_owned() })?;
        self.used.borrow_mut().insert(name.to_owned());
        Ok(tensor)
    }

    /// A float input as float32.
    ///
    /// # Errors
    /// When it is missing, not of floats, or not of this shape (`-1` stands for any extent).
    pub fn floats(&self, name: &str, shape: &[i64]) -> Result<Tensor> {
        let tensor = self.shaped(name, shape)?;
        if !tensor.is_floating_point() {
            return Err(wrong(name, format!("{:?}", tensor.kind()), "a float tensor".to_owned()));
        }
        Ok(tensor.to_kind(Kind::Float))
    }

    /// An integer input, every value of it in `0..limit`.
    ///
    /// # Errors
    /// When it is missing, not of integers, not of this shape (`-1` stands for any extent) or out of range.
    pub fn integers(&self, name: &str, shape: &[i64], limit: i64) -> Result<Tensor> {
        let tensor = self.shaped(name, shape)?;
        if tensor.is_floating_point() {
            return Err(wrong(name, format!("{:?}", tensor.kind()), "an integer tensor".to_owned()));
        }
        if let Some(value) = values(tensor).into_iter().find(|value| !(0.0..limit as f64).contains(value)) {
            return Err(wrong(name, format!("the value {value}"), format!("values from 0 to {}", limit - 1)));
        }
        Ok(tensor.to_kind(Kind::Int64))
    }

    /// All tensors below `prefix` (their names without it) in float32; they count as used.
    pub fn weights(&self, prefix: &str) -> HashMap<String, Tensor> {
        let below = self.tensors.iter().filter_map(|(name, tensor)| Some((name, name.strip_prefix(prefix)?, tensor)));
        below
            .map(|(name, short, tensor)| {
                self.used.borrow_mut().insert(name.clone());
                (short.to_owned(), tensor.to_kind(Kind::Float))
            })
            .collect()
    }

    /// Names of the tensors that nobody asked for.
    pub fn unused(&self) -> Vec<String> {
        let used = self.used.borrow();
        self.tensors.keys().filter(|name| !used.contains(*name)).cloned().collect()
    }

    /// The bundle called `file_name` in the same folder.
    ///
    /// # Errors
    /// When it is not a mere file name, or cannot be loaded.
    pub fn sibling(&self, file_name: &str) -> Result<Bundle> {
        if Path::new(file_name).file_name() != Some(file_name.as_ref()) {
            return Err(BundleError::Partner(format!("`{file_name}` is not the name of a file in the same folder")));
        }
        let path = self.path.with_file_name(file_name);
        Bundle::load(&path).map_err(|error| BundleError::Partner(format!("{}: {error}", path.display())))
    }

    fn shaped(&self, name: &str, shape: &[i64]) -> Result<&Tensor> {
        let tensor = self.tensor(name)?;
        let found = tensor.size();
        let fits = found.len() == shape.len() && found.iter().zip(shape).all(|(a, b)| a == b || *b == -1);
        if fits { Ok(tensor) } else { Err(wrong(name, format!("shape {found:?}"), format!("shape {shape:?}"))) }
    }
}

fn wrong(name: &str, found: String, expected: String) -> BundleError {
    BundleError::Tensor { name: name.to_owned(), found, expected }
}

/// Every value as float64, in row-major order. Integers up to 2^53 are exact.
pub fn values(tensor: &Tensor) -> Vec<f64> {
    let flat = tensor.detach().to_kind(Kind::Double).reshape([-1]).contiguous();
    let mut values = vec![0.0; flat.numel()];
    flat.copy_data(&mut values, flat.numel());
    values
}

fn tensor_of(data: &[u8], shape: &[usize], dtype: Dtype) -> std::result::Result<Tensor, String> {
    let kind = match dtype {
        Dtype::F64 => Kind::Double,
        Dtype::F32 => Kind::Float,
        Dtype::F16 => Kind::Half,
        Dtype::BF16 => Kind::BFloat16,
        Dtype::I64 => Kind::Int64,
        Dtype::I32 => Kind::Int,
        Dtype::I16 => Kind::Int16,
        Dtype::I8 => Kind::Int8,
        Dtype::U8 => Kind::Uint8,
        Dtype::BOOL => Kind::Bool,
        other => return Err(format!("dtype {other:?}")),
    };
    let shape: Vec<i64> = shape.iter().map(|&extent| extent as i64).collect();
    if shape.iter().product::<i64>() == 0 {
        return Ok(Tensor::zeros(&shape, (kind, tch::Device::Cpu)));
    }
    Tensor::f_from_data_size(data, &shape, kind).map_err(|error| error.to_string())
}
