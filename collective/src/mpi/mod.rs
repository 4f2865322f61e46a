//! MPI over CPU memory: data and control plane of a CPU run, control plane of a GPU run.
//!
//! One progress thread per process makes every MPI call after initialisation (only `MPI_Abort` may come from elsewhere):
//! it starts the non-blocking collective and polls it with a growing pause, so that data moves while the caller
//! computes and an idle rank burns no core.

mod bf16;
mod progress;
mod wire;

use crate::call::Call;
use crate::environment::{self, Seat, Started};
use crate::{Collective, CollectiveError, Op, Pending, Place};
use mpi::environment::Universe;
use mpi::ffi;
use progress::{Order, Progress};
use std::sync::mpsc::{Receiver, Sender, channel};
use std::sync::{Arc, Mutex};
use std::time::Duration;
use wire::Comm;

const BACKEND: &str = "mpi";

/// How this backend works.
#[derive(Clone, Copy, Debug)]
pub struct MpiOptions {
    /// How long a wait may last.
    pub deadline: Duration,
    /// The most elements of a rank's part that one MPI call moves; MPI counts in `i32`. Longer parts are moved by several
    /// calls. At most what keeps `world_size` parts below 2^31 is used.
    pub chunk_numel: usize,
}

impl MpiOptions {
    /// With the usual chunks: 2^28 elements.
    pub fn new(deadline: Duration) -> Self {
        Self { deadline, chunk_numel: 1 << 28 }
    }
}

/// The ranks of `MPI_COMM_WORLD`, or of a group of them.
pub struct MpiCollective {
    /// In the whole run, for messages.
    run_rank: usize,
    comm: Comm,
    process: Arc<Process>,
}

/// What all collectives of this process share.
struct Process {
    deadline: Duration,
    seat: Seat,
    orders: Mutex<Option<Sender<Order>>>,
    /// Disconnected when the progress thread has ended.
    ended: Mutex<Receiver<()>>,
    /// Finalised after the progress thread has ended.
    _universe: Mutex<Universe>,
}

impl MpiCollective {
    /// Initialises MPI for this process.
    ///
    /// A Rust panic that unwinds through the communicator would wait in `MPI_Finalize` for ever, so a panic anywhere
    /// in the process ends the run instead.
    ///
    /// # Errors
    /// [`CollectiveError::Init`] when MPI was initialised before or grants no threads.
    pub fn init(options: MpiOptions) -> Result<Self, CollectiveError> {
        let failed = |reason: &str| CollectiveError::Init { backend: BACKEND, reason: reason.to_owned() };
        let (universe, threading) = mpi::initialize_with_threading(mpi::Threading::Multiple)
            .ok_or_else(|| failed("it was initialised before in this process"))?;
        if threading < mpi::Threading::Serialized {
            return Err(failed("it does not allow calls from several threads (MPI_THREAD_SERIALIZED)"));
        }
        let world = Comm::world()?;
        let seat = match environment::started().map_err(|reason| failed(&reason))? {
            Started::Mpi(seat) => seat,
            // As MPI starts a program without a launcher.
            _ => Seat { world_size: 1, local_rank: 0, local_size: 1 },
        };
        if world.size != seat.world_size {
            return Err(failed(&format!(
                "it sees {} rank(s) where the launcher started {}: `mpirun` and the MPI library that this program is linked \
                 with are different installations; use the mpirun of that library",
                world.size, seat.world_size
            )));
        }
        let earlier_hook = std::panic::take_hook();
        std::panic::set_hook(Box::new(move |info| {
            earlier_hook(info);
            abort(101);
        }));
        let (orders, queue) = channel();
        let (alive, ended) = channel::<()>();
        let run_rank = world.rank;
        std::thread::Builder::new()
            .name("mpi-progress".to_owned())
            .spawn(move || {
                Progress::new(run_rank, options).run(&queue);
                drop(alive);
            })
            .map_err(|error| failed(&format!("no progress thread: {error}")))?;
        let process = Process {
            deadline: options.deadline,
            seat,
            orders: Mutex::new(Some(orders)),
            ended: Mutex::new(ended),
            _universe: Mutex::new(universe),
        };
        Ok(Self { run_rank, comm: world, process: Arc::new(process) })
    }

    fn order(&self, order: Order) {
        if let Some(orders) = lock(&self.process.orders).as_ref() {
            // A dead progress thread drops what answers the caller, who learns of it by that.
            let _ = orders.send(order);
        }
    }
}

impl Collective for MpiCollective {
    fn backend(&self) -> &'static str {
        BACKEND
    }
    fn rank(&self) -> usize {
        self.comm.rank
    }
    fn world_size(&self) -> usize {
        self.comm.size
    }
    fn local_rank(&self) -> usize {
        self.process.seat.local_rank
    }
    fn local_size(&self) -> usize {
        self.process.seat.local_size
    }
    fn deadline(&self) -> Duration {
        self.process.deadline
    }

    fn start(&self, op: Op) -> Result<Pending, CollectiveError> {
        let rank = self.run_rank;
        let call = Call::new(op, self.comm.rank, self.comm.size, rank)?;
        if call.place != Place::Host {
            return Err(CollectiveError::Place { rank, op: call.name, backend: BACKEND, found: call.place });
        }
        let (pending, completer) = Pending::new(rank, call.name);
        if call.is_empty() {
            completer.complete(Ok(call.into_result()));
        } else {
            self.order(Order::Start { comm: self.comm, call: Box::new(call), completer });
        }
        Ok(pending)
    }

    fn split(&self, color: usize, key: usize) -> Result<Box<dyn Collective>, CollectiveError> {
        let (rank, deadline) = (self.run_rank, self.process.deadline);
        let op = "split";
        let number = |value: usize, name: &str| {
            i32::try_from(value).map_err(|_| CollectiveError::Size {
                rank,
                op,
                found: format!("{name} {value}"),
                expected: "a number below 2^31".to_owned(),
            })
        };
        let (color, key) = (number(color, "color")?, number(key, "key")?);
        // MPI has no split that can be given up. When all have come here first, none can keep it waiting.
        (self as &dyn Collective).barrier()?;
        let (answer, answered) = channel();
        self.order(Order::Split { comm: self.comm, color, key, answer });
        let phase = crate::Phase::Wire.name().into();
        match answered.recv_timeout(deadline) {
            Ok(comm) => Ok(Box::new(Self { run_rank: rank, comm: comm?, process: self.process.clone() })),
            Err(_) => Err(CollectiveError::Deadline { rank, op, phase, deadline }),
        }
    }

    fn abort(&self, code: i32) -> ! {
        abort(code)
    }
}

impl Drop for Process {
    fn drop(&mut self) {
        drop(lock(&self.orders).take());
        // The thread gives what is on the wire `deadline` to complete; when it does not come back from MPI at all,
        // neither would MPI_Finalize.
        let patience = self.deadline + Duration::from_secs(5);
        if let Err(std::sync::mpsc::RecvTimeoutError::Timeout) = lock(&self.ended).recv_timeout(patience) {
            eprintln!("mpi: the progress thread did not end within {patience:?}; ending the run");
            abort(1);
        }
    }
}

fn lock<T>(mutex: &Mutex<T>) -> std::sync::MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(std::sync::PoisonError::into_inner)
}

fn abort(code: i32) -> ! {
    // SAFETY: MPI is initialised (with MPI_THREAD_MULTIPLE where the library grants it, since the progress thread may be
    // inside a call), and MPI_Abort does not return.
    unsafe { ffi::MPI_Abort(ffi::RSMPI_COMM_WORLD, code) };
    std::process::exit(code)
}
