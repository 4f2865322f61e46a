//! Communicators: ranks that exchange files.

use crate::log::{Fault, call, fault, folder};
use crate::stream::Stream;
use half::bf16;
use std::collections::HashMap;
use std::path::PathBuf;
use std::sync::atomic::{AtomicBool, AtomicI32, AtomicU32, AtomicU64, Ordering};
use std::sync::{Arc, Mutex};
use std::time::Duration;

pub const SUCCESS: i32 = 0;
pub const INTERNAL_ERROR: i32 = 3;
pub const INVALID_USAGE: i32 = 5;
pub const REMOTE_ERROR: i32 = 6;
pub const IN_PROGRESS: i32 = 7;

/// Times that the state has to be asked for before an operation is on its stream.
const POLLS_TO_LAUNCH: u32 = 2;

/// What a communicator does with one operation, all pointers as numbers.
#[derive(Clone, Copy, Debug)]
pub enum Kind {
    AllReduce { op: i32 },
    ReduceScatter { op: i32 },
    Reduce { op: i32, root: usize },
    AllGather,
    Broadcast { root: usize },
    Send { peer: usize },
    Recv { peer: usize },
}

#[derive(Clone, Copy, Debug)]
pub struct Operation {
    pub function: &'static str,
    pub kind: Kind,
    pub from: usize,
    pub to: usize,
    pub count: usize,
    pub dtype: i32,
}

impl Operation {
    fn bytes(&self) -> usize {
        let element = match self.dtype {
            1 => 1,
            4 | 8 => 8,
            7 => 4,
            9 => 2,
            other => panic!("stub: datatype {other}"),
        };
        self.count * element
    }
}

/// What waits for the launch: a stream and the operations of one group.
type Launch = (Arc<Stream>, Vec<Operation>);

pub struct Comm {
    /// Part of the names of all files.
    id: String,
    pub rank: usize,
    pub size: usize,
    /// [`IN_PROGRESS`] while it is made or finalised.
    making: AtomicI32,
    launch: Mutex<Option<Launch>>,
    polls: AtomicU32,
    error: AtomicI32,
    aborted: AtomicBool,
    /// Of collective operations, and of messages by direction and peer.
    sequence: AtomicU64,
    messages: Mutex<HashMap<(bool, usize), u64>>,
    splits: AtomicU64,
}

impl Comm {
    /// One that joins the others in the background.
    pub fn join(id: String, rank: usize, size: usize) -> Arc<Comm> {
        let comm = Arc::new(Comm::new(id, rank, size));
        let joining = comm.clone();
        std::thread::spawn(move || match fault("ncclCommInitRankConfig") {
            Some(Fault::Async) => joining.making.store(REMOTE_ERROR, Ordering::SeqCst),
            Some(Fault::Hang) => {}
            _ => {
                joining.exchange("join", b"");
                joining.making.store(SUCCESS, Ordering::SeqCst);
            }
        });
        comm
    }

    fn new(id: String, rank: usize, size: usize) -> Comm {
        Comm {
            id,
            rank,
            size,
            making: AtomicI32::new(IN_PROGRESS),
            launch: Mutex::new(None),
            polls: AtomicU32::new(0),
            error: AtomicI32::new(SUCCESS),
            aborted: AtomicBool::new(false),
            sequence: AtomicU64::new(0),
            messages: Mutex::default(),
            splits: AtomicU64::new(0),
        }
    }

    /// Hands the communicator of those with the same color to `ready`, later; both are in progress until then.
    pub fn split(self: &Arc<Comm>, color: i32, key: i32, ready: impl FnOnce(Arc<Comm>) + Send + 'static) {
        let parent = self.clone();
        let number = self.splits.fetch_add(1, Ordering::SeqCst);
        self.making.store(IN_PROGRESS, Ordering::SeqCst);
        std::thread::spawn(move || {
            let mine = [color.to_le_bytes(), key.to_le_bytes()].concat();
            let Some(all) = parent.exchange(&format!("split{number}"), &mine) else { return };
            let number_of = |bytes: &[u8]| i32::from_le_bytes(bytes.try_into().expect("stub: 4 bytes"));
            let mut members: Vec<(i32, usize)> = all
                .iter()
                .enumerate()
                .filter(|(_, told)| number_of(&told[..4]) == color)
                .map(|(rank, told)| (number_of(&told[4..]), rank))
                .collect();
            members.sort();
            let rank = members.iter().position(|(_, rank)| *rank == parent.rank).expect("stub: a member of its group");
            let id = format!("{}-{number}c{color}", parent.id);
            let child = Arc::new(Comm::new(id, rank, members.len()));
            child.making.store(SUCCESS, Ordering::SeqCst);
            ready(child);
            parent.making.store(SUCCESS, Ordering::SeqCst);
        });
    }

    /// What `ncclCommGetAsyncError` says. Operations come on their stream after some of these.
    pub fn state(self: &Arc<Comm>) -> i32 {
        let (error, making) = (self.error.load(Ordering::SeqCst), self.making.load(Ordering::SeqCst));
        if error != SUCCESS || making != SUCCESS {
            return if error != SUCCESS { error } else { making };
        }
        let mut launch = self.launch.lock().expect("stub");
        if launch.is_none() {
            return SUCCESS;
        }
        if self.polls.fetch_add(1, Ordering::SeqCst) < POLLS_TO_LAUNCH {
            return IN_PROGRESS;
        }
        if let Some((stream, operations)) = launch.take() {
            let comm = self.clone();
            stream.push(move || comm.execute(&operations));
        }
        SUCCESS
    }

    /// Refuses a call that NCCL's manual forbids.
    pub fn is_free(self: &Arc<Comm>, function: &str) -> bool {
        let busy = self.launch.lock().expect("stub").is_some() || self.making.load(Ordering::SeqCst) == IN_PROGRESS;
        if busy {
            call(&format!("VIOLATION {function} on a communicator in progress"));
        }
        !busy
    }

    /// Takes the operations of a group.
    pub fn begin(self: &Arc<Comm>, stream: Arc<Stream>, operations: Vec<Operation>) -> i32 {
        if operations.iter().any(|operation| fault(operation.function) == Some(Fault::Fail)) {
            return INTERNAL_ERROR;
        }
        self.polls.store(0, Ordering::SeqCst);
        *self.launch.lock().expect("stub") = Some((stream, operations));
        IN_PROGRESS
    }

    pub fn abort(&self) {
        self.aborted.store(true, Ordering::SeqCst);
    }

    /// What the device does.
    fn execute(&self, operations: &[Operation]) {
        for operation in operations {
            match fault(operation.function) {
                Some(Fault::Hang) => {
                    while !self.aborted.load(Ordering::SeqCst) {
                        std::thread::sleep(Duration::from_millis(1));
                    }
                    return;
                }
                Some(Fault::Async) => {
                    self.error.store(REMOTE_ERROR, Ordering::SeqCst);
                    return self.execute_after_abort();
                }
                _ => {}
            }
        }
        // All is sent before anything is waited for, as in a group.
        let names: Vec<String> = operations.iter().map(|operation| self.send(operation)).collect();
        for (operation, name) in operations.iter().zip(names) {
            if self.receive(operation, &name).is_none() {
                return;
            }
        }
    }

    fn execute_after_abort(&self) {
        while !self.aborted.load(Ordering::SeqCst) {
            std::thread::sleep(Duration::from_millis(1));
        }
    }

    /// Writes what the operation gives; the name by which its files are found.
    fn send(&self, operation: &Operation) -> String {
        let bytes = match operation.kind {
            Kind::ReduceScatter { .. } => operation.bytes() * self.size,
            Kind::Recv { .. } => 0,
            Kind::Broadcast { root } if root != self.rank => 0,
            _ => operation.bytes(),
        };
        let data = match bytes {
            0 => &[][..],
            // SAFETY: callers keep to NCCL's manual: buffers are as long as the operation needs, until it is done.
            _ => unsafe { std::slice::from_raw_parts(operation.from as *const u8, bytes) },
        };
        let next = |direction, peer| {
            let mut messages = self.messages.lock().expect("stub");
            let number = messages.entry((direction, peer)).or_default();
            *number += 1;
            *number
        };
        match operation.kind {
            Kind::Send { peer } => {
                let name = format!("m{}-{}-{}", self.rank, peer, next(true, peer));
                self.write(&name, data);
                name
            }
            Kind::Recv { peer } => format!("m{}-{}-{}", peer, self.rank, next(false, peer)),
            _ => {
                let name = format!("o{}", self.sequence.fetch_add(1, Ordering::SeqCst));
                self.write(&format!("{name}.{}", self.rank), data);
                name
            }
        }
    }

    /// Waits for what the operation takes and writes it; `None` when aborted.
    fn receive(&self, operation: &Operation, name: &str) -> Option<()> {
        let put = |offset: usize, data: &[u8]| {
            // SAFETY: as in `send`.
            unsafe { std::ptr::copy(data.as_ptr(), (operation.to as *mut u8).add(offset), data.len()) };
        };
        match operation.kind {
            Kind::Send { .. } => {}
            Kind::Recv { .. } => {
                put(0, &self.read(name)?);
                std::fs::remove_file(self.path(name)).expect("stub: a message");
            }
            kind => {
                let all = self.read_all(name)?;
                let bytes = operation.bytes();
                match kind {
                    Kind::AllReduce { op } => put(0, &fold(operation.dtype, op, &all, 0..bytes)),
                    Kind::Reduce { op, root } if root == self.rank => {
                        put(0, &fold(operation.dtype, op, &all, 0..bytes))
                    }
                    Kind::ReduceScatter { op } => {
                        put(0, &fold(operation.dtype, op, &all, self.rank * bytes..(self.rank + 1) * bytes));
                    }
                    Kind::AllGather => all.iter().enumerate().for_each(|(rank, data)| put(rank * bytes, data)),
                    Kind::Broadcast { root } => put(0, &all[root]),
                    _ => {}
                }
            }
        }
        Some(())
    }

    fn path(&self, name: &str) -> PathBuf {
        folder().join(format!("{}.{name}", self.id))
    }

    fn write(&self, name: &str, data: &[u8]) {
        let (path, new) = (self.path(name), self.path(&format!("new.{name}")));
        std::fs::write(&new, data).and_then(|()| std::fs::rename(&new, &path)).expect("stub: a message");
    }

    fn read(&self, name: &str) -> Option<Vec<u8>> {
        let path = self.path(name);
        let mut pause = Duration::from_micros(50);
        loop {
            if let Ok(data) = std::fs::read(&path) {
                return Some(data);
            }
            if self.aborted.load(Ordering::SeqCst) {
                return None;
            }
            std::thread::sleep(pause);
            pause = (pause * 2).min(Duration::from_millis(1));
        }
    }

    fn read_all(&self, name: &str) -> Option<Vec<Vec<u8>>> {
        (0..self.size).map(|rank| self.read(&format!("{name}.{rank}"))).collect()
    }

    /// Every rank's data.
    fn exchange(&self, name: &str, mine: &[u8]) -> Option<Vec<Vec<u8>>> {
        self.write(&format!("{name}.{}", self.rank), mine);
        self.read_all(name)
    }
}

/// The reduction (0 sum, 2 max, 3 min) of `range` of all ranks' bytes, in rank order.
fn fold(dtype: i32, op: i32, all: &[Vec<u8>], range: std::ops::Range<usize>) -> Vec<u8> {
    fn each<const N: usize, T: Copy>(
        all: &[&[u8]],
        read: fn([u8; N]) -> T,
        write: fn(T) -> [u8; N],
        combine: impl Fn(T, T) -> T,
    ) -> Vec<u8> {
        let value = |data: &[u8], at: usize| read(data[at..at + N].try_into().expect("stub: an element"));
        (0..all[0].len())
            .step_by(N)
            .flat_map(|at| write(all[1..].iter().fold(value(all[0], at), |sum, data| combine(sum, value(data, at)))))
            .collect()
    }
    let parts: Vec<&[u8]> = all.iter().map(|data| &data[range.clone()]).collect();
    macro_rules! fold_as {
        ($t:ty, $sum:expr) => {
            match op {
                0 => each(&parts, <$t>::from_le_bytes, <$t>::to_le_bytes, $sum),
                2 => each(&parts, <$t>::from_le_bytes, <$t>::to_le_bytes, |a: $t, b: $t| a.max(b)),
                3 => each(&parts, <$t>::from_le_bytes, <$t>::to_le_bytes, |a: $t, b: $t| a.min(b)),
                other => panic!("stub: reduction {other}"),
            }
        };
    }
    match dtype {
        1 => fold_as!(u8, u8::wrapping_add),
        4 => fold_as!(i64, i64::wrapping_add),
        7 => fold_as!(f32, |a, b| a + b),
        8 => fold_as!(f64, |a, b| a + b),
        9 => fold_as!(bf16, |a, b| a + b),
        other => panic!("stub: datatype {other}"),
    }
}
