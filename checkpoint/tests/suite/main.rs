//! The protocol through the public interface, on the memory and the file store and on one that misbehaves.
#![allow(clippy::unwrap_used)]

mod corpus;
mod damage;
mod fault_schedules;
mod fencing;
mod garbage;
mod hostile;
mod misbehaving;
mod probe;
mod protocol;
mod reads;
mod real_server;
mod retention;
mod world;
