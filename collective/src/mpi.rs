//! MPI over CPU memory: data and control plane of a CPU run, control plane of a GPU run.
//!
//! One progress thread per process makes every MPI call after initialisation (only `MPI_Abort` may come from elsewhere):
//! it starts the non-blocking collective and polls it with a growing pause, so that data moves while the caller
//! computes and an idle rank burns no core.

use crate::{Collective, CollectiveError, Completer, Dtype, Op, Pending, ReduceOp, Region};
use mpi::environment::Universe;
use mpi::ffi;
use std::ffi::c_void;
use std::mem::MaybeUninit;
use std::sync::Mutex;
use std::sync::mpsc::{Receiver, RecvTimeoutError, Sender, channel};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

const BACKEND: &str = "mpi";
/// First pause between two polls; it doubles up to [`LONGEST_PAUSE`].
const SHORTEST_PAUSE: Duration = Duration::from_micros(10);
const LONGEST_PAUSE: Duration = Duration::from_millis(1);

/// World size as the MPI launcher's environment tells it, 1 when no MPI launcher started this process.
pub fn world_size_of_environment() -> usize {
    of_environment(&["OMPI_COMM_WORLD_SIZE", "PMI_SIZE"]).unwrap_or(1)
}

fn of_environment(names: &[&str]) -> Option<usize> {
    names.iter().find_map(|name| std::env::var(name).ok()?.parse().ok())
}

/// The ranks of `MPI_COMM_WORLD`.
pub struct MpiCollective {
    rank: usize,
    world_size: usize,
    deadline: Duration,
    requests: Option<Sender<Request>>,
    progress: Option<JoinHandle<()>>,
    /// Finalised by [`Drop`], after the progress thread has ended.
    _universe: Mutex<Universe>,
}

type Request = (Op, Completer);

impl MpiCollective {
    /// Initialises MPI for this process.
    ///
    /// A Rust panic that unwinds through the communicator would wait in `MPI_Finalize` for ever, so a panic anywhere
    /// in the process ends the run instead.
    ///
    /// # Errors
    /// [`CollectiveError::Init`] when MPI was initialised before or grants no threads.
    pub fn init(deadline: Duration) -> Result<Self, CollectiveError> {
        let failed = |reason: &str| CollectiveError::Init { backend: BACKEND, reason: reason.to_owned() };
        let (universe, threading) = mpi::initialize_with_threading(mpi::Threading::Multiple)
            .ok_or_else(|| failed("it was initialised before in this process"))?;
        if threading < mpi::Threading::Serialized {
            return Err(failed("it does not allow calls from several threads (MPI_THREAD_SERIALIZED)"));
        }
        let (mut rank, mut world_size) = (0, 0);
        // SAFETY: MPI is initialised; the out-pointers are valid.
        unsafe {
            ffi::MPI_Comm_rank(ffi::RSMPI_COMM_WORLD, &mut rank);
            ffi::MPI_Comm_size(ffi::RSMPI_COMM_WORLD, &mut world_size);
            ffi::MPI_Comm_set_errhandler(ffi::RSMPI_COMM_WORLD, ffi::RSMPI_ERRORS_RETURN);
        }
        let expected = world_size_of_environment();
        if world_size as usize != expected {
            return Err(failed(&format!(
                "it sees {world_size} rank(s) where the launcher started {expected}: `mpirun` and the MPI library that this \
                 program is linked with are different installations; use the mpirun of that library"
            )));
        }
        let in_place = if mpi::environment::library_version().is_ok_and(|v| v.contains("Open MPI")) { 1 } else { -1 };
        let earlier_hook = std::panic::take_hook();
        std::panic::set_hook(Box::new(move |info| {
            earlier_hook(info);
            abort(101);
        }));
        let (requests, queue) = channel();
        let progress = std::thread::Builder::new()
            .name("mpi-progress".to_owned())
            .spawn(move || {
                Progress { rank: rank as usize, world_size, deadline, in_place, active: Vec::new() }.run(queue)
            })
            .map_err(|error| failed(&format!("no progress thread: {error}")))?;
        Ok(Self {
            rank: rank as usize,
            world_size: world_size as usize,
            deadline,
            requests: Some(requests),
            progress: Some(progress),
            _universe: Mutex::new(universe),
        })
    }
}

impl Collective for MpiCollective {
    fn rank(&self) -> usize {
        self.rank
    }
    fn world_size(&self) -> usize {
        self.world_size
    }
    fn local_rank(&self) -> usize {
        of_environment(&["OMPI_COMM_WORLD_LOCAL_RANK", "MPI_LOCALRANKID"]).unwrap_or(0)
    }
    fn local_size(&self) -> usize {
        of_environment(&["OMPI_COMM_WORLD_LOCAL_SIZE", "MPI_LOCALNRANKS"]).unwrap_or(1)
    }
    fn deadline(&self) -> Duration {
        self.deadline
    }

    fn start(&self, op: Op) -> Result<Pending, CollectiveError> {
        op.check(self.rank, self.world_size)?;
        let (pending, completer) = Pending::new(self.rank, op.name());
        let op = match op.into_result_if_empty() {
            // Nothing to move, on any rank; and the address of an empty buffer may be the one that means "in place".
            Ok(nothing) => {
                completer.complete(Ok(nothing));
                return Ok(pending);
            }
            Err(op) => op,
        };
        if let Some(requests) = &self.requests {
            // A dead progress thread drops the completer, which `Pending::wait` reports.
            let _ = requests.send((op, completer));
        }
        Ok(pending)
    }

    fn abort(&self, code: i32) -> ! {
        abort(code)
    }
}

impl Drop for MpiCollective {
    fn drop(&mut self) {
        drop(self.requests.take());
        if let Some(progress) = self.progress.take() {
            let _ = progress.join();
        }
    }
}

fn abort(code: i32) -> ! {
    // SAFETY: MPI is initialised (with MPI_THREAD_MULTIPLE where the library grants it, since the progress thread may be
    // inside a call), and MPI_Abort does not return.
    unsafe { ffi::MPI_Abort(ffi::RSMPI_COMM_WORLD, code) };
    std::process::exit(code)
}

/// What the progress thread owns.
struct Progress {
    rank: usize,
    world_size: i32,
    deadline: Duration,
    /// The address that means "in place": 1 for Open MPI, -1 for MPICH.
    in_place: isize,
    active: Vec<Active>,
}

/// An operation on the wire with everything it may touch.
struct Active {
    request: ffi::MPI_Request,
    name: &'static str,
    result: Region,
    _send: Option<Region>,
    completer: Completer,
}

impl Progress {
    fn run(mut self, queue: Receiver<Request>) {
        let mut pause = SHORTEST_PAUSE;
        loop {
            let next = if self.active.is_empty() {
                queue.recv().map_err(|_| RecvTimeoutError::Disconnected)
            } else {
                queue.recv_timeout(pause)
            };
            match next {
                Ok((op, completer)) => {
                    self.begin(op, completer);
                    pause = SHORTEST_PAUSE;
                }
                Err(RecvTimeoutError::Timeout) => pause = (pause * 2).min(LONGEST_PAUSE),
                // The collective is gone, and with it everyone who could wait. What is on the wire still uses its
                // buffers, so it is completed first.
                Err(RecvTimeoutError::Disconnected) => return self.drain(),
            }
            if self.poll() {
                pause = SHORTEST_PAUSE;
            }
        }
    }

    /// Completes what is on the wire, or ends the run when a partner does not come.
    fn drain(mut self) {
        let ended_by = Instant::now() + self.deadline;
        while !self.active.is_empty() {
            if Instant::now() > ended_by {
                let open: Vec<_> = self.active.iter().map(|active| active.name).collect();
                eprintln!(
                    "mpi: rank {}: {open:?} did not complete within {:?}; ending the run",
                    self.rank, self.deadline
                );
                abort(1);
            }
            if !self.poll() {
                std::thread::sleep(LONGEST_PAUSE);
            }
        }
    }

    fn begin(&mut self, op: Op, completer: Completer) {
        let name = op.name();
        match self.start_request(op) {
            Ok((request, result, send)) => {
                self.active.push(Active { request, name, result, _send: send, completer });
            }
            Err(error) => completer.complete(Err(error)),
        }
    }

    fn start_request(&self, op: Op) -> Result<(ffi::MPI_Request, Region, Option<Region>), CollectiveError> {
        let name = op.name();
        let in_place = self.in_place as *const c_void;
        let world = self.world_size as usize;
        let mut request = MaybeUninit::uninit();
        let handle = request.as_mut_ptr();
        // SAFETY (all calls below): the regions are valid for their sizes, which `Op::check` has compared with the
        // world size, and `Active` keeps them until `MPI_Test` reports completion; counts were checked against i32.
        let (code, result, send) = match op {
            Op::AllReduce { buffer, op } => {
                let (count, datatype) = (self.count(buffer.numel(), name)?, self.numeric(&buffer, name)?);
                // SAFETY: see above.
                let code = unsafe {
                    let (to, op, comm) = (buffer.as_ptr().cast(), operation(op), ffi::RSMPI_COMM_WORLD);
                    ffi::MPI_Iallreduce(in_place, to, count, datatype, op, comm, handle)
                };
                (code, buffer, None)
            }
            Op::ReduceScatter { send, recv, op } => {
                let (count, datatype) = (self.count(recv.numel(), name)?, self.numeric(&recv, name)?);
                // SAFETY: see above.
                let code = unsafe {
                    let (from, to) = (send.as_ptr().cast(), recv.as_ptr().cast());
                    let (op, comm) = (operation(op), ffi::RSMPI_COMM_WORLD);
                    ffi::MPI_Ireduce_scatter_block(from, to, count, datatype, op, comm, handle)
                };
                (code, recv, Some(send))
            }
            Op::AllGather { send, recv } => {
                let (count, datatype) = (self.count(recv.numel() / world, name)?, plain(recv.dtype()));
                let from = send.as_ref().map_or(in_place, |send| send.as_ptr().cast_const().cast());
                // SAFETY: see above.
                let code = unsafe {
                    let (to, comm) = (recv.as_ptr().cast(), ffi::RSMPI_COMM_WORLD);
                    ffi::MPI_Iallgather(from, count, datatype, to, count, datatype, comm, handle)
                };
                (code, recv, send)
            }
            Op::AllToAll { send, recv } => {
                let (count, datatype) = (self.count(recv.numel() / world, name)?, plain(recv.dtype()));
                // SAFETY: see above.
                let code = unsafe {
                    let (from, to) = (send.as_ptr().cast(), recv.as_ptr().cast());
                    ffi::MPI_Ialltoall(from, count, datatype, to, count, datatype, ffi::RSMPI_COMM_WORLD, handle)
                };
                (code, recv, Some(send))
            }
            Op::Broadcast { buffer, root } => {
                let (count, datatype) = (self.count(buffer.numel(), name)?, plain(buffer.dtype()));
                // SAFETY: see above.
                let code = unsafe {
                    let (to, comm) = (buffer.as_ptr().cast(), ffi::RSMPI_COMM_WORLD);
                    ffi::MPI_Ibcast(to, count, datatype, root as i32, comm, handle)
                };
                (code, buffer, None)
            }
            // SAFETY: see above.
            Op::Barrier => (unsafe { ffi::MPI_Ibarrier(ffi::RSMPI_COMM_WORLD, handle) }, Region::empty(), None),
        };
        if code != 0 {
            return Err(self.failed(name, code));
        }
        // SAFETY: a call that returned success has written the request.
        Ok((unsafe { request.assume_init() }, result, send))
    }

    /// Completes what has arrived; true when anything has.
    fn poll(&mut self) -> bool {
        let before = self.active.len();
        let mut still = Vec::with_capacity(before);
        for mut active in std::mem::take(&mut self.active) {
            let mut done = 0;
            // SAFETY: the request was started by this thread and has not completed yet.
            let code = unsafe { ffi::MPI_Test(&mut active.request, &mut done, ffi::RSMPI_STATUS_IGNORE) };
            match (code, done) {
                (0, 0) => still.push(active),
                (0, _) => active.completer.complete(Ok(active.result)),
                _ => active.completer.complete(Err(self.failed(active.name, code))),
            }
        }
        self.active = still;
        self.active.len() < before
    }

    fn count(&self, numel: usize, op: &'static str) -> Result<i32, CollectiveError> {
        i32::try_from(numel).map_err(|_| CollectiveError::Size {
            rank: self.rank,
            op,
            found: format!("{numel} elements per rank"),
            expected: "fewer than 2^31; use smaller segments".to_owned(),
        })
    }

    fn numeric(&self, region: &Region, op: &'static str) -> Result<ffi::MPI_Datatype, CollectiveError> {
        if region.dtype() == Dtype::Bf16 {
            let (rank, backend, dtype) = (self.rank, BACKEND, region.dtype().name());
            return Err(CollectiveError::Unsupported { rank, backend, op, dtype });
        }
        Ok(plain(region.dtype()))
    }

    fn failed(&self, op: &'static str, code: i32) -> CollectiveError {
        let mut text = [0u8; 512];
        let mut length = 0;
        // SAFETY: the buffer is larger than MPI_MAX_ERROR_STRING (256 in Open MPI, 512 in MPICH).
        unsafe { ffi::MPI_Error_string(code, text.as_mut_ptr().cast(), &mut length) };
        let reason = String::from_utf8_lossy(&text[..length.max(0) as usize]).into_owned();
        CollectiveError::Backend { rank: self.rank, op, reason }
    }
}

/// The MPI type that moves elements of `dtype`; bf16 travels as 16-bit words.
fn plain(dtype: Dtype) -> ffi::MPI_Datatype {
    // SAFETY: constants of the initialised library.
    unsafe {
        match dtype {
            Dtype::F32 => ffi::RSMPI_FLOAT,
            Dtype::F64 => ffi::RSMPI_DOUBLE,
            Dtype::Bf16 => ffi::RSMPI_UINT16_T,
            Dtype::I64 => ffi::RSMPI_INT64_T,
            Dtype::U8 => ffi::RSMPI_UINT8_T,
        }
    }
}

fn operation(op: ReduceOp) -> ffi::MPI_Op {
    // SAFETY: constants of the initialised library.
    unsafe {
        match op {
            ReduceOp::Sum => ffi::RSMPI_SUM,
            ReduceOp::Max => ffi::RSMPI_MAX,
            ReduceOp::Min => ffi::RSMPI_MIN,
        }
    }
}
