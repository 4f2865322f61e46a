//! The real programs on a tiny experiment: same bits on any number of ranks, killed or not; clear errors for bad input.
#![allow(clippy::unwrap_used)]

mod averages;
mod bad_input;
mod bundle;
mod checkpoints;
mod crashes;
mod damage;
mod divergence;
mod doctor;
mod evaluation;
mod experiment;
mod finetuning;
mod gpu;
mod interop;
mod mixing;
mod nodes;
mod objectives;
mod phases;
mod preflight;
mod reduction;
mod same_bits;
mod sampling;
mod servers;
mod sharding;
mod slurm;
mod stopping;
mod telemetry;
mod trace;
mod validation;
mod watching;
mod when;
