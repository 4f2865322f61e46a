//! Pickles as data: a machine for the opcodes that `torch.save` writes (protocols 2 to 5), which builds plain values and
//! descriptions of tensors and never calls anything.
//!
//! Values lie in an arena and refer to each other by index, so that nesting of any depth and cycles cost no stack. Memory is
//! bounded by the pickle's length and [`MAX_NODES`].

use super::rebuild::{self, Global, Storage, TensorRef};
use crate::interop::values::Dtype;
use std::collections::HashMap;
use std::io::Read;

/// Longest pickle that is read; one of DiT-XL/2 with optimizer state has 0.5 MB.
const MAX_PICKLE_BYTES: u64 = 64 << 20;
/// Most values, stack entries and marks.
const MAX_NODES: usize = 4 << 20;
/// Longest module or attribute name.
const MAX_GLOBAL_BYTES: usize = 256;

/// Index of a value.
pub type Id = u32;

/// A value of a pickle.
#[derive(Clone, Debug, PartialEq)]
pub enum Node {
    /// `None`
    None,
    /// A truth value.
    Bool(bool),
    /// An integer of up to 64 bits.
    Int(i64),
    /// A float.
    Float(f64),
    /// A string.
    Str(String),
    /// A byte string.
    Bytes(Vec<u8>),
    /// A tuple, or a `torch.Size`.
    Tuple(Vec<Id>),
    /// A list or set.
    List(Vec<Id>),
    /// A dict or OrderedDict, in order; of equal keys the last counts.
    Dict(Vec<(Id, Id)>),
    /// An `argparse.Namespace` and its dict of attributes.
    Namespace(Option<Id>),
    /// A tensor's memory.
    Storage(Storage),
    /// A tensor: a view of a storage.
    Tensor(Box<TensorRef>),
    /// A `torch.dtype`.
    Dtype(Dtype),
    /// A function or class that may be named.
    Global(Global),
}

/// Why a pickle cannot be read.
#[derive(Debug, thiserror::Error)]
pub enum PickleError {
    /// It is cut short, damaged, or not a pickle of tensors and plain values.
    #[error("its pickle, at byte {at}: {reason}")]
    Malformed {
        /// Bytes from the pickle's beginning.
        at: u64,
        /// Found and expected.
        reason: String,
    },
    /// It names something that is neither a plain value nor a tensor.
    #[error("its pickle needs the Python object `{global}`")]
    Forbidden {
        /// `module.name`
        global: String,
    },
}

/// What an operation says about itself when it fails; the machine adds where.
pub(super) enum Refusal {
    Reason(String),
    Forbidden(String),
}

impl From<String> for Refusal {
    fn from(reason: String) -> Self {
        Self::Reason(reason)
    }
}

impl From<&str> for Refusal {
    fn from(reason: &str) -> Self {
        Self::Reason(reason.to_owned())
    }
}

/// A pickle's values.
#[derive(Debug)]
pub struct Pickle {
    nodes: Vec<Node>,
    root: Id,
}

impl Pickle {
    /// Reads one pickle from its first byte to its STOP; gives it and its length in bytes.
    ///
    /// # Errors
    /// [`PickleError`]; errors of `input` are among the malformed.
    pub fn read(input: impl Read) -> Result<(Self, u64), PickleError> {
        let mut machine = Machine {
            input: input.take(MAX_PICKLE_BYTES),
            nodes: vec![Node::None, Node::Bool(false), Node::Bool(true)],
            stack: Vec::new(),
            marks: Vec::new(),
            memo: HashMap::new(),
        };
        let outcome = machine.run();
        let at = machine.consumed();
        match outcome {
            Ok(root) => Ok((Self { nodes: machine.nodes, root }, at)),
            Err(Refusal::Reason(reason)) => Err(PickleError::Malformed { at, reason }),
            Err(Refusal::Forbidden(global)) => Err(PickleError::Forbidden { global }),
        }
    }

    /// The value that the pickle stands for.
    pub fn root(&self) -> &Node {
        self.get(self.root)
    }

    /// A value by its index.
    pub fn get(&self, id: Id) -> &Node {
        self.nodes.get(id as usize).unwrap_or(&Node::None)
    }

    /// The entries of a dict or the attributes of a namespace; nothing for other values.
    pub fn entries<'a>(&'a self, node: &'a Node) -> &'a [(Id, Id)] {
        match node {
            Node::Dict(entries) => entries,
            Node::Namespace(Some(state)) => match self.get(*state) {
                Node::Dict(entries) => entries,
                _ => &[],
            },
            _ => &[],
        }
    }

    /// All values, in the order in which they were made.
    pub fn nodes(&self) -> impl Iterator<Item = &Node> {
        self.nodes.iter()
    }
}

const NONE: Id = 0;
const FALSE: Id = 1;
const TRUE: Id = 2;

struct Machine<R: Read> {
    input: std::io::Take<R>,
    nodes: Vec<Node>,
    stack: Vec<Id>,
    marks: Vec<usize>,
    memo: HashMap<u32, Id>,
}

type Step<T> = Result<T, Refusal>;

impl<R: Read> Machine<R> {
    fn run(&mut self) -> Step<Id> {
        loop {
            let [opcode] = self.bytes()?;
            match opcode {
                0x80 => {
                    let [protocol] = self.bytes()?;
                    if !(2..=5).contains(&protocol) {
                        return Err(format!("protocol {protocol}; expected 2 to 5").into());
                    }
                }
                // Frames are hints about buffering.
                0x95 => drop(self.bytes::<8>()?),
                b'.' => return self.pop(),

                b'N' => self.push(NONE)?,
                0x88 => self.push(TRUE)?,
                0x89 => self.push(FALSE)?,
                b'J' => self.int(|b: [u8; 4]| i32::from_le_bytes(b).into())?,
                b'K' => self.int(|b: [u8; 1]| b[0].into())?,
                b'M' => self.int(|b: [u8; 2]| u16::from_le_bytes(b).into())?,
                0x8a => self.long()?,
                b'G' => {
                    let value = f64::from_be_bytes(self.bytes()?);
                    self.make(Node::Float(value))?;
                }
                0x8c => self.text(|b: [u8; 1]| b[0].into())?,
                b'X' => self.text(|b: [u8; 4]| u32::from_le_bytes(b).into())?,
                0x8d => self.text(u64::from_le_bytes)?,
                b'C' => self.blob(|b: [u8; 1]| b[0].into())?,
                b'B' => self.blob(|b: [u8; 4]| u32::from_le_bytes(b).into())?,
                0x8e | 0x96 => self.blob(u64::from_le_bytes)?,

                b'(' => {
                    self.marks.push(self.stack.len());
                    self.bounded(self.marks.len())?;
                }
                b'0' => drop(self.pop_or_mark()?),
                b'1' => drop(self.pop_to_mark()?),
                b'2' => {
                    let top = self.top()?;
                    self.push(top)?;
                }
                b'q' => self.put(|b: [u8; 1]| b[0].into())?,
                b'r' => self.put(u32::from_le_bytes)?,
                0x94 => {
                    let (index, top) = (self.memo.len() as u32, self.top()?);
                    self.memo.insert(index, top);
                }
                b'h' => self.get(|b: [u8; 1]| b[0].into())?,
                b'j' => self.get(u32::from_le_bytes)?,

                b')' => self.make(Node::Tuple(Vec::new()))?,
                0x85..=0x87 => {
                    let mut items = Vec::new();
                    for _ in 0x85..=opcode {
                        items.insert(0, self.pop()?);
                    }
                    self.make(Node::Tuple(items))?;
                }
                b't' => {
                    let items = self.pop_to_mark()?;
                    self.make(Node::Tuple(items))?;
                }
                b']' | 0x8f => self.make(Node::List(Vec::new()))?,
                b'}' => self.make(Node::Dict(Vec::new()))?,
                b'l' | 0x91 => {
                    let items = self.pop_to_mark()?;
                    self.make(Node::List(items))?;
                }
                b'd' => {
                    let items = self.pop_to_mark()?;
                    let entries = pairs(&items)?;
                    self.make(Node::Dict(entries))?;
                }
                b'a' => {
                    let item = self.pop()?;
                    self.list()?.push(item);
                }
                b'e' | 0x90 => {
                    let items = self.pop_to_mark()?;
                    self.list()?.extend(items);
                }
                b's' => {
                    let (value, key) = (self.pop()?, self.pop()?);
                    self.dict()?.push((key, value));
                }
                b'u' => {
                    let items = self.pop_to_mark()?;
                    self.dict()?.extend(pairs(&items)?);
                }

                b'c' => {
                    let (module, name) = (self.line()?, self.line()?);
                    self.global(&module, &name)?;
                }
                0x93 => {
                    let (name, module) = (self.pop()?, self.pop()?);
                    let (Node::Str(module), Node::Str(name)) = (self.node(module), self.node(name)) else {
                        return Err("STACK_GLOBAL without two strings".into());
                    };
                    let (module, name) = (module.clone(), name.clone());
                    self.global(&module, &name)?;
                }
                b'Q' => {
                    let id = self.pop()?;
                    let storage = rebuild::storage(self.node(id), &self.nodes)?;
                    self.make(Node::Storage(storage))?;
                }
                b'R' | 0x81 => {
                    let (args, callee) = (self.pop()?, self.pop()?);
                    let (Node::Global(global), Node::Tuple(args)) = (self.node(callee), self.node(args)) else {
                        return Err("a call of something that is no function, or without a tuple".into());
                    };
                    let made = rebuild::call(global, args, &self.nodes)?;
                    self.make(made)?;
                }
                b'b' => self.build()?,
                other => return Err(format!("opcode {other:#04x}, which torch.save does not write").into()),
            }
        }
    }

    fn consumed(&self) -> u64 {
        MAX_PICKLE_BYTES - self.input.limit()
    }

    fn bytes<const N: usize>(&mut self) -> Step<[u8; N]> {
        let mut bytes = [0; N];
        self.input.read_exact(&mut bytes).map_err(|error| self.cut(&error))?;
        Ok(bytes)
    }

    fn cut(&self, error: &std::io::Error) -> Refusal {
        if self.input.limit() == 0 {
            return format!("longer than {MAX_PICKLE_BYTES} bytes").into();
        }
        format!("it ends too early ({error})").into()
    }

    /// `len` bytes; a length beyond the input's end is found out before memory is asked for it.
    fn take(&mut self, len: u64) -> Step<Vec<u8>> {
        let mut bytes = Vec::new();
        let read = (&mut self.input).take(len).read_to_end(&mut bytes);
        match read {
            Ok(read) if read as u64 == len => Ok(bytes),
            Ok(_) => Err(format!("a string of {len} bytes goes beyond its end").into()),
            Err(error) => Err(self.cut(&error)),
        }
    }

    fn line(&mut self) -> Step<String> {
        let mut line = Vec::new();
        loop {
            match self.bytes()? {
                [b'\n'] => return String::from_utf8(line).map_err(|_| "a name that is not UTF-8".into()),
                [byte] => line.push(byte),
            }
            if line.len() > MAX_GLOBAL_BYTES {
                return Err(format!("a module or object name of more than {MAX_GLOBAL_BYTES} bytes").into());
            }
        }
    }

    fn node(&self, id: Id) -> &Node {
        // Every index was given out by `make`.
        self.nodes.get(id as usize).unwrap_or(&Node::None)
    }

    fn bounded(&self, count: usize) -> Step<()> {
        if count > MAX_NODES { Err(format!("more than {MAX_NODES} values").into()) } else { Ok(()) }
    }

    fn push(&mut self, id: Id) -> Step<()> {
        self.bounded(self.stack.len())?;
        self.stack.push(id);
        Ok(())
    }

    fn make(&mut self, node: Node) -> Step<()> {
        self.bounded(self.nodes.len())?;
        self.nodes.push(node);
        self.push((self.nodes.len() - 1) as Id)
    }

    fn top(&self) -> Step<Id> {
        let fence = self.marks.last().copied().unwrap_or(0);
        self.stack[fence..].last().copied().ok_or_else(|| "the stack is empty".into())
    }

    fn pop(&mut self) -> Step<Id> {
        let top = self.top()?;
        self.stack.pop();
        Ok(top)
    }

    fn pop_or_mark(&mut self) -> Step<()> {
        match self.marks.last() {
            Some(&mark) if mark == self.stack.len() => drop(self.marks.pop()),
            _ => drop(self.pop()?),
        }
        Ok(())
    }

    fn pop_to_mark(&mut self) -> Step<Vec<Id>> {
        let mark = self.marks.pop().ok_or("there is no mark")?;
        // No operation goes below a mark, so the stack is at least that long.
        Ok(self.stack.split_off(mark.min(self.stack.len())))
    }

    fn list(&mut self) -> Step<&mut Vec<Id>> {
        match self.top().map(|id| self.nodes.get_mut(id as usize))? {
            Some(Node::List(items)) => Ok(items),
            _ => Err("an item for something that is no list".into()),
        }
    }

    fn dict(&mut self) -> Step<&mut Vec<(Id, Id)>> {
        match self.top().map(|id| self.nodes.get_mut(id as usize))? {
            Some(Node::Dict(entries)) => Ok(entries),
            _ => Err("an entry for something that is no dict".into()),
        }
    }

    fn int<const N: usize>(&mut self, value: impl Fn([u8; N]) -> i64) -> Step<()> {
        let value = value(self.bytes()?);
        self.make(Node::Int(value))
    }

    /// A two's-complement integer of any length; those beyond 64 bits (only the format's own magic number) become bytes.
    fn long(&mut self) -> Step<()> {
        let [len] = self.bytes()?;
        let bytes = self.take(len.into())?;
        if bytes.len() > 8 {
            return self.make(Node::Bytes(bytes));
        }
        let fill = if bytes.last().is_some_and(|top| top & 0x80 != 0) { 0xff } else { 0 };
        let mut wide = [fill; 8];
        wide[..bytes.len()].copy_from_slice(&bytes);
        self.make(Node::Int(i64::from_le_bytes(wide)))
    }

    fn text<const N: usize>(&mut self, len: impl Fn([u8; N]) -> u64) -> Step<()> {
        let len = len(self.bytes()?);
        let text = String::from_utf8(self.take(len)?).map_err(|_| "a string that is not UTF-8")?;
        self.make(Node::Str(text))
    }

    fn blob<const N: usize>(&mut self, len: impl Fn([u8; N]) -> u64) -> Step<()> {
        let len = len(self.bytes()?);
        let bytes = self.take(len)?;
        self.make(Node::Bytes(bytes))
    }

    fn put<const N: usize>(&mut self, index: impl Fn([u8; N]) -> u32) -> Step<()> {
        let (index, top) = (index(self.bytes()?), self.top()?);
        self.memo.insert(index, top);
        self.bounded(self.memo.len())
    }

    fn get<const N: usize>(&mut self, index: impl Fn([u8; N]) -> u32) -> Step<()> {
        let index = index(self.bytes()?);
        let id = *self.memo.get(&index).ok_or_else(|| format!("nothing was remembered as {index}"))?;
        self.push(id)
    }

    fn global(&mut self, module: &str, name: &str) -> Step<()> {
        let known = Global::by_name(module, name);
        let node = known.ok_or_else(|| Refusal::Forbidden(format!("{module}.{name}").escape_debug().to_string()))?;
        self.make(node)
    }

    /// BUILD: a namespace takes its attributes; the attributes of an OrderedDict (`_metadata` of state dicts) are left out.
    fn build(&mut self) -> Step<()> {
        let state = self.pop()?;
        let target = self.top()?;
        match self.nodes.get_mut(target as usize) {
            Some(Node::Namespace(attributes)) => *attributes = Some(state),
            Some(Node::Dict(_)) => {}
            _ => return Err("a state for something that has none".into()),
        }
        Ok(())
    }
}

fn pairs(items: &[Id]) -> Step<Vec<(Id, Id)>> {
    match items.as_chunks::<2>() {
        (pairs, []) => Ok(pairs.iter().map(|&[key, value]| (key, value)).collect()),
        _ => Err("a key without a value".into()),
    }
}
