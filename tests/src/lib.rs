//! Numeric checks against recorded references: what the binary `verify-bundle` does.
//!
//! A bundle is a safetensors file with weights, inputs and expected outputs. [`verify`] loads one, finds its kind in
//! [`kinds::KINDS`] and lets that kind run Ditharos on it; a [`report::Report`] holds every recorded tensor against what
//! came out.

pub mod bundle;
pub mod dit;
pub mod kinds;
pub mod pass;
pub mod report;
pub mod tolerance;
pub mod verify;
