//! Pictures in and out: ADM's crop and resize, sample grids as PNG, and the `.npz` that FID evaluators read.

mod atomic;
mod batch;
mod error;
mod grid;
mod npz;
mod resample;
mod resize;
#[cfg(test)]
mod tests;

pub use atomic::AtomicFile;
pub use batch::ImageBatch;
pub use error::ImageError;
pub use grid::Grid;
pub use npz::NpzWriter;
pub use resize::Picture;
