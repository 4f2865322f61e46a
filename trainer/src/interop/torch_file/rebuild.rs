//! The functions and classes that a pickle of tensors may name, as descriptions; nothing else is let through.

use super::pickle::{Id, Node, Refusal};
use crate::interop::values::Dtype;

/// Most dimensions, as in PyTorch.
const MAX_RANK: usize = 64;

/// A function or class that a pickle may name.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Global {
    /// `collections.OrderedDict`
    OrderedDict,
    /// `argparse.Namespace`
    Namespace,
    /// `torch.Size`
    Size,
    /// `torch._utils._rebuild_tensor_v2`
    RebuildTensorV2,
    /// `torch._utils._rebuild_tensor_v3`, which also says the dtype
    RebuildTensorV3,
    /// `torch._utils._rebuild_parameter`
    RebuildParameter,
    /// `torch.FloatStorage` and its like
    TypedStorage(Dtype),
    /// `torch.storage.UntypedStorage`
    UntypedStorage,
}

/// The memory of tensors, as the pickle describes it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Storage {
    /// Its name in the file.
    pub key: String,
    /// Element type; `None`: bytes.
    pub dtype: Option<Dtype>,
    /// Elements.
    pub numel: u64,
}

/// A view of a storage; checked to lie inside it, as far as the pickle tells its length.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct TensorRef {
    /// Its memory.
    pub storage: Storage,
    /// Element type.
    pub dtype: Dtype,
    /// First element.
    pub offset: u64,
    /// Shape.
    pub shape: Vec<u64>,
    /// Elements from one index to the next, per dimension.
    pub stride: Vec<u64>,
}

impl TensorRef {
    /// Elements; not more than the storage has.
    pub fn numel(&self) -> u64 {
        self.shape.iter().product()
    }

    /// One past the last element of the storage that the view touches.
    pub fn end(&self) -> u64 {
        if self.numel() == 0 {
            return self.offset;
        }
        let reach: u64 = self.shape.iter().zip(&self.stride).map(|(&side, &stride)| (side - 1) * stride).sum();
        self.offset + reach + 1
    }

    /// Whether its elements lie one after the other in row-major order.
    pub fn is_contiguous(&self) -> bool {
        let mut expected = 1;
        self.numel() == 0
            || self.shape.iter().zip(&self.stride).rev().all(|(&side, &stride)| {
                let fits = side == 1 || stride == expected;
                expected *= side;
                fits
            })
    }
}

impl Global {
    /// The node for `module.name`, if it may be named.
    pub(super) fn by_name(module: &str, name: &str) -> Option<Node> {
        let global = match (module, name) {
            ("collections", "OrderedDict") => Self::OrderedDict,
            ("argparse", "Namespace") => Self::Namespace,
            ("torch", "Size") => Self::Size,
            ("torch._utils", "_rebuild_tensor_v2") => Self::RebuildTensorV2,
            ("torch._utils", "_rebuild_tensor_v3") => Self::RebuildTensorV3,
            ("torch._utils", "_rebuild_parameter") => Self::RebuildParameter,
            ("torch" | "torch.storage", "UntypedStorage") => Self::UntypedStorage,
            ("torch", name) => match name.strip_suffix("Storage") {
                Some(kind) => Self::TypedStorage(storage_dtype(kind)?),
                None => return Some(Node::Dtype(torch_dtype(name)?)),
            },
            _ => return None,
        };
        Some(Node::Global(global))
    }
}

fn storage_dtype(kind: &str) -> Option<Dtype> {
    Some(match kind {
        "Double" => Dtype::F64,
        "Float" => Dtype::F32,
        "Half" => Dtype::F16,
        "BFloat16" => Dtype::BF16,
        "Long" => Dtype::I64,
        "Int" => Dtype::I32,
        "Short" => Dtype::I16,
        "Char" => Dtype::I8,
        "Byte" => Dtype::U8,
        "Bool" => Dtype::BOOL,
        _ => return None,
    })
}

fn torch_dtype(name: &str) -> Option<Dtype> {
    Some(match name {
        "float64" => Dtype::F64,
        "float32" => Dtype::F32,
        "float16" => Dtype::F16,
        "bfloat16" => Dtype::BF16,
        "int64" => Dtype::I64,
        "int32" => Dtype::I32,
        "int16" => Dtype::I16,
        "int8" => Dtype::I8,
        "uint8" => Dtype::U8,
        "bool" => Dtype::BOOL,
        "uint16" => Dtype::U16,
        "uint32" => Dtype::U32,
        "uint64" => Dtype::U64,
        _ => return None,
    })
}

fn node(nodes: &[Node], id: Id) -> &Node {
    nodes.get(id as usize).unwrap_or(&Node::None)
}

fn natural(node: &Node) -> Option<u64> {
    match node {
        Node::Int(value) => u64::try_from(*value).ok(),
        _ => None,
    }
}

/// A persistent id: `("storage", type, key, location, numel)`, with one more `None` in the oldest form.
pub(super) fn storage(id: &Node, nodes: &[Node]) -> Result<Storage, Refusal> {
    let wrong = || Refusal::from("a persistent id that describes no storage");
    let Node::Tuple(parts) = id else { return Err(wrong()) };
    let parts: Vec<&Node> = parts.iter().take(7).map(|&part| node(nodes, part)).collect();
    let [Node::Str(tag), Node::Global(kind), Node::Str(key), Node::Str(_), numel, rest @ ..] = &parts[..] else {
        return Err(wrong());
    };
    if !matches!(rest, [] | [Node::None]) {
        return Err(format!(
            "storage `{key}` is a view of another; save the file again with a PyTorch of 1.6 or later"
        )
        .into());
    }
    let dtype = match kind {
        Global::TypedStorage(dtype) => Some(*dtype),
        Global::UntypedStorage => None,
        _ => return Err(wrong()),
    };
    let numel = natural(numel).filter(|_| tag == "storage").ok_or_else(wrong)?;
    Ok(Storage { key: key.clone(), dtype, numel })
}

/// What calling `global` with `args` would give.
pub(super) fn call(global: &Global, args: &[Id], nodes: &[Node]) -> Result<Node, Refusal> {
    // Not more than any of them takes, so that a long tuple is not copied over and over.
    let args: Vec<&Node> = args.iter().take(9).map(|&arg| node(nodes, arg)).collect();
    match (global, &args[..]) {
        (Global::OrderedDict, []) => Ok(Node::Dict(Vec::new())),
        (Global::Namespace, []) => Ok(Node::Namespace(None)),
        (Global::Size, [Node::Tuple(sides)]) if sides.len() <= MAX_RANK => Ok(Node::Tuple(sides.clone())),
        (Global::RebuildParameter, [Node::Tensor(tensor), _, _]) => Ok(Node::Tensor(tensor.clone())),
        (Global::RebuildTensorV2, [Node::Storage(storage), offset, shape, stride, _, _, ..]) => {
            let dtype = storage.dtype.ok_or("a tensor without dtype")?;
            view(storage.clone(), dtype, [offset, shape, stride], nodes)
        }
        (Global::RebuildTensorV3, [Node::Storage(storage), offset, shape, stride, _, _, Node::Dtype(dtype), ..]) => {
            view(storage.clone(), *dtype, [offset, shape, stride], nodes)
        }
        _ => Err(format!("a call of {global:?} with other arguments than torch.save writes").into()),
    }
}

/// Checks a view against its storage: inside it, and with no more elements than it has.
fn view(storage: Storage, dtype: Dtype, [offset, shape, stride]: [&Node; 3], nodes: &[Node]) -> Result<Node, Refusal> {
    let naturals = |list: &Node| match list {
        Node::Tuple(items) | Node::List(items) if items.len() <= MAX_RANK => {
            items.iter().map(|&item| natural(node(nodes, item))).collect::<Option<Vec<u64>>>()
        }
        _ => None,
    };
    let (Some(offset), Some(shape), Some(stride)) = (natural(offset), naturals(shape), naturals(stride)) else {
        return Err(format!("a tensor of storage `{}` without offset, shape and strides", storage.key).into());
    };
    let available = match storage.dtype {
        Some(_) => storage.numel,
        None => storage.numel / (dtype.bitsize() as u64 / 8),
    };
    let wrong = |what: &str| {
        let of = format!("offset {offset}, shape {shape:?}, strides {stride:?} in storage `{}`", storage.key);
        Refusal::from(format!("a tensor ({of} of {available} elements) {what}"))
    };
    if shape.len() != stride.len() {
        return Err(wrong("has not one stride a dimension"));
    }
    let sides = shape.iter().try_fold(1u64, |product, &side| product.checked_mul(side.max(1)));
    if shape.contains(&0) && sides.is_some() {
        return Ok(Node::Tensor(Box::new(TensorRef { storage, dtype, offset: 0, shape, stride })));
    }
    if sides.is_none_or(|numel| numel > available) {
        return Err(wrong("has more elements than its storage; save it with .contiguous()"));
    }
    let reach = shape
        .iter()
        .zip(&stride)
        .try_fold(offset, |end, (&side, &stride)| end.checked_add((side - 1).checked_mul(stride)?));
    if reach.is_none_or(|last| last >= available) {
        return Err(wrong("goes beyond its storage"));
    }
    Ok(Node::Tensor(Box::new(TensorRef { storage, dtype, offset, shape, stride })))
}
