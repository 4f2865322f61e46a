use crate::CollectiveError;
use std::any::Any;
use std::fmt;

/// The element type of a [`Region`].
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Dtype {
    /// 32-bit float.
    F32,
    /// 64-bit float.
    F64,
    /// bfloat16.
    Bf16,
    /// 64-bit signed integer.
    I64,
    /// Byte.
    U8,
}

impl Dtype {
    /// Bytes of one element.
    pub fn bytes(self) -> usize {
        match self {
            Dtype::F64 | Dtype::I64 => 8,
            Dtype::F32 => 4,
            Dtype::Bf16 => 2,
            Dtype::U8 => 1,
        }
    }

    /// Its usual name.
    pub fn name(self) -> &'static str {
        match self {
            Dtype::F32 => "f32",
            Dtype::F64 => "f64",
            Dtype::Bf16 => "bf16",
            Dtype::I64 => "i64",
            Dtype::U8 => "u8",
        }
    }
}

/// A Rust type that can be an element of a [`Region`].
pub trait Element: Copy + Default + Send + 'static {
    /// The element type it is.
    const DTYPE: Dtype;
}

impl Element for f32 {
    const DTYPE: Dtype = Dtype::F32;
}
impl Element for f64 {
    const DTYPE: Dtype = Dtype::F64;
}
impl Element for i64 {
    const DTYPE: Dtype = Dtype::I64;
}
impl Element for u8 {
    const DTYPE: Dtype = Dtype::U8;
}
impl Element for half::bf16 {
    const DTYPE: Dtype = Dtype::Bf16;
}

/// Where the memory of a [`Region`] is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Place {
    /// Memory that this process can read and write.
    Host,
    /// Memory of the CUDA device with this ordinal, as this process counts its devices.
    Device(usize),
}

impl fmt::Display for Place {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Place::Host => f.write_str("host memory"),
            Place::Device(ordinal) => write!(f, "memory of GPU {ordinal}"),
        }
    }
}

/// Contiguous memory that an operation reads or writes, kept alive by its owner for as long as the region lives.
pub struct Region {
    ptr: *mut u8,
    numel: usize,
    dtype: Dtype,
    place: Place,
    owner: Box<dyn Any + Send>,
}

// SAFETY: the memory belongs to `owner`, which is Send, and `from_raw` demands that nobody else touches it meanwhile.
unsafe impl Send for Region {}

impl Region {
    /// A region over memory that `owner` keeps alive, such as a tensor's storage.
    ///
    /// # Safety
    /// `ptr` is valid, where `place` says, for reads and writes of `numel` elements of `dtype` until `owner` is dropped,
    /// and nothing else reads or writes them while an operation has the region (reading is allowed while it is only
    /// sent; on a device, work that was put on the caller's stream before the operation is done first).
    pub unsafe fn from_raw(ptr: *mut u8, numel: usize, dtype: Dtype, place: Place, owner: Box<dyn Any + Send>) -> Self {
        Self { ptr, numel, dtype, place, owner }
    }

    /// A region that owns `values`; [`Region::into_vec`] gives them back.
    pub fn from_vec<T: Element>(mut values: Vec<T>) -> Self {
        let (ptr, numel) = (values.as_mut_ptr().cast::<u8>(), values.len());
        // Moving a Vec does not move its heap memory, so `ptr` stays valid inside the box.
        Self { ptr, numel, dtype: T::DTYPE, place: Place::Host, owner: Box::new(values) }
    }

    /// The values of a region made by [`Region::from_vec`].
    ///
    /// # Errors
    /// [`CollectiveError::ElementType`] when the region was not made from a `Vec<T>`.
    pub fn into_vec<T: Element>(self) -> Result<Vec<T>, CollectiveError> {
        let mismatch = CollectiveError::ElementType { found: self.dtype.name(), expected: T::DTYPE.name() };
        self.owner.downcast::<Vec<T>>().map(|values| *values).map_err(|_| mismatch)
    }

    /// `numel` zeros in host memory, as [`Region::from_vec`] makes them.
    pub fn zeros(dtype: Dtype, numel: usize) -> Self {
        match dtype {
            Dtype::F32 => Self::from_vec(vec![0f32; numel]),
            Dtype::F64 => Self::from_vec(vec![0f64; numel]),
            Dtype::Bf16 => Self::from_vec(vec![half::bf16::ZERO; numel]),
            Dtype::I64 => Self::from_vec(vec![0i64; numel]),
            Dtype::U8 => Self::from_vec(vec![0u8; numel]),
        }
    }

    /// A region without elements.
    pub fn empty() -> Self {
        Self::from_vec(Vec::<u8>::new())
    }

    /// Elements.
    pub fn numel(&self) -> usize {
        self.numel
    }

    /// Element type.
    pub fn dtype(&self) -> Dtype {
        self.dtype
    }

    /// Where it is.
    pub fn place(&self) -> Place {
        self.place
    }

    /// Bytes.
    pub fn len_bytes(&self) -> usize {
        self.numel * self.dtype.bytes()
    }

    /// The first byte.
    pub fn as_ptr(&self) -> *mut u8 {
        self.ptr
    }
}
