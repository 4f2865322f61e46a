//! Operations over connections to rank 0, which gathers what all ranks give and sends back what they get. One operation at a
//! time, in the order in which they were started; rank 0 sees which rank is missing or does something else.

use super::rendezvous::{read_until, write_until};
use crate::call::{Call, Kind};
use crate::reduce::fold;
use crate::{CollectiveError, Dtype, ReduceOp, Region};
use std::io;
use std::net::TcpStream;
use std::time::{Duration, Instant};

/// How much longer than rank 0 the others wait, which tells them more than they see.
pub(super) const GRACE: Duration = Duration::from_secs(5);
const HEADER: usize = 24;
const LONGEST_REASON: usize = 4096;

/// The connections of one group.
pub(super) struct Star {
    pub rank: usize,
    pub size: usize,
    /// In the whole run, for messages.
    pub run_rank: usize,
    pub deadline: Duration,
    /// Of rank 0 to ranks 1, 2, …; of others to rank 0.
    pub streams: Vec<TcpStream>,
    /// Operations so far.
    pub number: u64,
    /// Why nothing works any more.
    pub failed: Option<String>,
}

/// Why an operation failed here.
enum Fault {
    Late(String),
    Other(String),
}

impl Star {
    /// Runs an operation to its end.
    pub fn run(&mut self, call: &Call) -> Result<(), CollectiveError> {
        let (rank, op, deadline) = (self.run_rank, call.name, self.deadline);
        if let Some(reason) = &self.failed {
            return Err(CollectiveError::Backend { rank, op, reason: format!("given up after: {reason}") });
        }
        self.number += 1;
        let outcome = match self.rank {
            0 => self.gather_and_answer(call),
            _ => self.give_and_get(call),
        };
        outcome.map_err(|fault| {
            let error = match fault {
                Fault::Late(phase) => CollectiveError::Deadline { rank, op, phase: phase.into(), deadline },
                Fault::Other(reason) => CollectiveError::Backend { rank, op, reason },
            };
            self.failed = Some(error.to_string());
            error
        })
    }

    /// What all ranks must have in common about an operation.
    fn header(&self, call: &Call) -> [u8; HEADER] {
        let (kind, detail) = match call.kind {
            Kind::AllReduce(op) => (1, op as u32),
            Kind::ReduceScatter(op) => (2, op as u32),
            Kind::AllGather => (3, 0),
            Kind::AllToAll => (4, 0),
            Kind::Broadcast { root } => (5, root as u32),
            Kind::Barrier => (6, 0),
        };
        let mut header = [0; HEADER];
        header[0] = kind;
        header[1] = call.dtype as u8;
        header[4..8].copy_from_slice(&detail.to_le_bytes());
        header[8..16].copy_from_slice(&(call.numel as u64).to_le_bytes());
        header[16..].copy_from_slice(&self.number.to_le_bytes());
        header
    }

    fn give_and_get(&self, call: &Call) -> Result<(), Fault> {
        let until = Instant::now() + self.deadline + GRACE;
        let stream = &self.streams[0];
        let talk = || -> io::Result<Result<(), String>> {
            write_until(stream, &self.header(call), until)?;
            write_until(stream, given(call, self.rank, self.size), until)?;
            let mut status = [0; 4];
            read_until(stream, &mut status, until)?;
            let length = u32::from_le_bytes(status) as usize;
            if length > 0 {
                let mut reason = vec![0; length.min(LONGEST_REASON)];
                read_until(stream, &mut reason, until)?;
                return Ok(Err(String::from_utf8_lossy(&reason).into_owned()));
            }
            read_until(stream, gotten(call, self.rank, self.size), until)?;
            Ok(Ok(()))
        };
        match talk() {
            Ok(told) => told.map_err(|reason| Fault::Other(format!("rank 0 says: {reason}"))),
            Err(error) => Err(fault_of(0, &error)),
        }
    }

    fn gather_and_answer(&self, call: &Call) -> Result<(), Fault> {
        let until = Instant::now() + self.deadline;
        let outcome = self.gather(call, until).and_then(|given| {
            let answers = Answers { call, given };
            for (index, stream) in self.streams.iter().enumerate() {
                let answer = [&0u32.to_le_bytes()[..], &answers.of(index + 1)].concat();
                write_until(stream, &answer, until).map_err(|error| fault_of(index + 1, &error))?;
            }
            gotten(call, 0, self.size).copy_from_slice(&answers.of(0));
            Ok(())
        });
        if let Err(Fault::Late(reason) | Fault::Other(reason)) = &outcome {
            let reason = &reason.as_bytes()[..reason.len().min(LONGEST_REASON)];
            let told = [&(reason.len() as u32).to_le_bytes()[..], reason].concat();
            for stream in &self.streams {
                // Some are gone: that is why.
                let _ = write_until(stream, &told, Instant::now() + Duration::from_secs(1));
            }
        }
        outcome
    }

    /// What each rank gives.
    fn gather(&self, call: &Call, until: Instant) -> Result<Vec<Region>, Fault> {
        let header = self.header(call);
        let own = region_of(call.dtype, given(call, 0, self.size).len());
        bytes_of(&own).copy_from_slice(given(call, 0, self.size));
        let mut all = vec![own];
        for (index, stream) in self.streams.iter().enumerate() {
            let rank = index + 1;
            let mut other = [0; HEADER];
            read_until(stream, &mut other, until).map_err(|error| fault_of(rank, &error))?;
            if other != header {
                return Err(Fault::Other(format!(
                    "rank {rank} is at {}, rank 0 at {}: all ranks have to start the same operations in the same order",
                    described(&other),
                    described(&header)
                )));
            }
            let theirs = region_of(call.dtype, given_bytes(call, rank, self.size));
            read_until(stream, bytes_of(&theirs), until).map_err(|error| fault_of(rank, &error))?;
            all.push(theirs);
        }
        Ok(all)
    }
}

fn fault_of(rank: usize, error: &io::Error) -> Fault {
    match error.kind() {
        io::ErrorKind::TimedOut | io::ErrorKind::WouldBlock => Fault::Late(format!("waiting for rank {rank}")),
        io::ErrorKind::UnexpectedEof => Fault::Other(format!("rank {rank} has gone")),
        _ => Fault::Other(format!("rank {rank} has gone: {error}")),
    }
}

fn described(header: &[u8; HEADER]) -> String {
    let name = match header[0] {
        1 => "all_reduce",
        2 => "reduce_scatter",
        3 => "all_gather",
        4 => "all_to_all",
        5 => "broadcast",
        6 => "barrier",
        _ => "an unknown operation",
    };
    let number = |at: usize| header[at..at + 8].iter().rev().fold(0u64, |number, byte| number << 8 | u64::from(*byte));
    format!("{name} of {} element(s), its operation {}", number(8), number(16))
}

/// Bytes that `rank` gives.
fn given_bytes(call: &Call, rank: usize, size: usize) -> usize {
    let part = call.numel * call.dtype.bytes();
    match call.kind {
        Kind::AllReduce(_) | Kind::AllGather => part,
        Kind::ReduceScatter(_) | Kind::AllToAll => part * size,
        Kind::Broadcast { root } if root == rank => part,
        Kind::Broadcast { .. } | Kind::Barrier => 0,
    }
}

/// Bytes that `rank` gets.
fn gotten_bytes(call: &Call, rank: usize, size: usize) -> usize {
    let part = call.numel * call.dtype.bytes();
    match call.kind {
        Kind::AllReduce(_) | Kind::ReduceScatter(_) => part,
        Kind::AllGather | Kind::AllToAll => part * size,
        Kind::Broadcast { root } if root != rank => part,
        Kind::Broadcast { .. } | Kind::Barrier => 0,
    }
}

fn given(call: &Call, rank: usize, size: usize) -> &[u8] {
    match given_bytes(call, rank, size) {
        0 => &[],
        // SAFETY: host memory that `call` keeps and has checked for this length; it is not written before it was read.
        bytes => unsafe { std::slice::from_raw_parts(call.from(0), bytes) },
    }
}

#[allow(clippy::mut_from_ref)] // The call stands for memory that is not in it.
fn gotten(call: &Call, rank: usize, size: usize) -> &mut [u8] {
    match gotten_bytes(call, rank, size) {
        0 => &mut [],
        // SAFETY: as above; what was given has been read by now.
        bytes => unsafe { std::slice::from_raw_parts_mut(call.to(0), bytes) },
    }
}

/// Zeros, aligned for `dtype`.
fn region_of(dtype: Dtype, bytes: usize) -> Region {
    Region::zeros(dtype, bytes / dtype.bytes())
}

#[allow(clippy::mut_from_ref)] // As above.
fn bytes_of(region: &Region) -> &mut [u8] {
    // SAFETY: the region owns that many bytes, and only this module has it.
    unsafe { std::slice::from_raw_parts_mut(region.as_ptr(), region.len_bytes()) }
}

/// What rank 0 makes of what all gave.
struct Answers<'a> {
    call: &'a Call,
    given: Vec<Region>,
}

impl Answers<'_> {
    fn of(&self, rank: usize) -> Vec<u8> {
        let part = self.call.numel * self.call.dtype.bytes();
        match self.call.kind {
            Kind::Barrier => Vec::new(),
            Kind::Broadcast { root } if root == rank => Vec::new(),
            Kind::Broadcast { root } => bytes_of(&self.given[root]).to_vec(),
            Kind::AllGather => self.given.iter().flat_map(|given| bytes_of(given).iter().copied()).collect(),
            Kind::AllToAll => {
                let to_rank = |given: &Region| bytes_of(given)[rank * part..][..part].to_vec();
                self.given.iter().flat_map(to_rank).collect()
            }
            Kind::AllReduce(op) => self.reduced(op, 0),
            Kind::ReduceScatter(op) => self.reduced(op, rank * part),
        }
    }

    /// The reduction, in rank order, of one part that begins at byte `start` of what was given.
    fn reduced(&self, op: ReduceOp, start: usize) -> Vec<u8> {
        let Call { numel, dtype, .. } = *self.call;
        let sum = Region::zeros(dtype, numel);
        let bytes = sum.len_bytes();
        bytes_of(&sum).copy_from_slice(&bytes_of(&self.given[0])[start..][..bytes]);
        for given in &self.given[1..] {
            let theirs = &bytes_of(given)[start..][..bytes];
            // SAFETY: both have `numel` elements and begin at a whole one of an aligned region.
            unsafe { fold(dtype, op, theirs.as_ptr(), sum.as_ptr(), numel) };
        }
        bytes_of(&sum).to_vec()
    }
}
