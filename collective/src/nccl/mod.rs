//! NCCL over device memory, with another collective for host memory and as control plane.
//!
//! libcuda and libnccl are looked for when a collective is made, not before. Tensors go through NCCL on streams of our own,
//! which wait for the caller's current stream; small messages in host memory, barriers and the unique id go through the
//! control plane. One progress thread per process makes all NCCL calls.

mod communicator;
mod driver;
mod library;
mod memory;
mod progress;

pub use driver::StreamHandle;
pub use memory::DeviceMemory;

use crate::call::Call;
use crate::{Collective, CollectiveError, Op, Pending, Place, Region};
use communicator::ID_BYTES;
use driver::{Device, Event};
use progress::{Order, Progress};
use std::collections::VecDeque;
use std::sync::mpsc::{Receiver, RecvTimeoutError, Sender, channel};
use std::sync::{Arc, Mutex, MutexGuard, OnceLock, PoisonError};
use std::time::Duration;

const BACKEND: &str = "nccl";
/// How long aborting communicators may take before a wait that was given up returns.
const ABORT_GRACE: Duration = Duration::from_secs(10);

/// Says which stream the calling thread puts its work on, or why that cannot be said.
pub type CallerStream = dyn Fn() -> Result<StreamHandle, String> + Send + Sync;

/// How this backend works.
pub struct NcclOptions {
    /// The GPU of this rank, as this process counts its devices.
    pub ordinal: usize,
    /// How long an operation may last from its start, and the making of communicators.
    pub deadline: Duration,
    /// The most elements of a rank's part that one NCCL call moves. NCCL counts in 64 bits, so this is no limit of sizes.
    pub chunk_numel: usize,
    /// The stream that buffers are computed on.
    pub caller_stream: Arc<CallerStream>,
}

impl NcclOptions {
    /// With whole buffers in one call, computed on the default stream.
    pub fn new(ordinal: usize, deadline: Duration) -> Self {
        let default_stream = Arc::new(|| Ok(StreamHandle::from_raw(std::ptr::null_mut())));
        Self { ordinal, deadline, chunk_numel: usize::MAX, caller_stream: default_stream }
    }
}

/// The ranks of a control plane, each with a GPU.
pub struct NcclCollective {
    control: Arc<dyn Collective>,
    /// In the whole run, for messages.
    run_rank: usize,
    communicator: usize,
    process: Arc<Process>,
}

/// What all collectives of this process share.
struct Process {
    deadline: Duration,
    device: Arc<Device>,
    caller_stream: Arc<CallerStream>,
    failure: Arc<OnceLock<String>>,
    orders: Mutex<Option<Sender<Order>>>,
    /// Disconnected when the progress thread has ended.
    ended: Mutex<Receiver<()>>,
}

impl NcclCollective {
    /// Connects the GPUs of all ranks of `control`; all ranks call it together. When one of them cannot, all get to know.
    ///
    /// # Errors
    /// [`CollectiveError::Init`] without a driver, libnccl or GPU, or when ranks do not fit together;
    /// [`CollectiveError::Deadline`] when a rank does not come in time; what NCCL says.
    pub fn init(control: Arc<dyn Collective>, options: NcclOptions) -> Result<Self, CollectiveError> {
        let failed = |reason: String| CollectiveError::Init { backend: BACKEND, reason };
        let run_rank = control.rank();
        let mine = Candidate::here(options.ordinal, run_rank == 0);
        let message = mine.as_ref().map_or_else(|reason| format!("!{reason}"), |mine| mine.describe());
        let all: Vec<String> = control
            .gather_bytes(message.as_bytes())?
            .into_iter()
            .map(|message| String::from_utf8_lossy(&message).into_owned())
            .collect();
        fit_together(&all).map_err(failed)?;
        let Candidate { device, id, .. } = mine.map_err(failed)?;
        let id = control.broadcast(Region::from_vec(id.to_vec()), 0)?.wait(control.deadline())?.into_vec::<u8>()?;
        let id: [u8; ID_BYTES] = id.try_into().unwrap_or([0; ID_BYTES]);

        let (orders, queue) = channel();
        let (alive, ended) = channel::<()>();
        let failure = Arc::new(OnceLock::new());
        let NcclOptions { deadline, chunk_numel, caller_stream, .. } = options;
        let progress = Progress {
            rank: run_rank,
            deadline,
            chunk_numel,
            device: device.clone(),
            caller_stream: caller_stream.clone(),
            failure: failure.clone(),
            communicators: Vec::new(),
            active: VecDeque::new(),
        };
        let context = device.clone();
        std::thread::Builder::new()
            .name("nccl-progress".to_owned())
            .spawn(move || {
                let run = || {
                    progress.run(&queue);
                    Ok(())
                };
                if let Err(reason) = context.within(run) {
                    eprintln!("nccl: rank {run_rank}: {reason}");
                }
                drop(alive);
            })
            .map_err(|error| failed(format!("no progress thread: {error}")))?;
        let (orders, ended) = (Mutex::new(Some(orders)), Mutex::new(ended));
        let process = Arc::new(Process { deadline, device, caller_stream, failure, orders, ended });
        let (rank, size) = (control.rank(), control.world_size());
        let communicator = process.make(run_rank, "init", |answer| Order::Join { id, rank, size, answer })?;
        Ok(Self { control, run_rank, communicator, process })
    }

    /// Memory of this rank's GPU.
    pub fn memory(&self) -> DeviceMemory {
        DeviceMemory::new(self.run_rank, self.process.device.clone())
    }
}

/// What a rank brings along.
struct Candidate {
    device: Arc<Device>,
    bus_id: String,
    version: i32,
    id: [u8; ID_BYTES],
}

impl Candidate {
    fn here(ordinal: usize, is_first: bool) -> Result<Self, String> {
        let version = library::load()?;
        let device = Device::open(ordinal)?;
        let id = if is_first { communicator::unique_id()? } else { [0; ID_BYTES] };
        Ok(Self { bus_id: device.bus_id()?, device, version, id })
    }

    fn describe(&self) -> String {
        format!("{}\n{} {}", library::version_text(self.version), crate::host_name(), self.bus_id)
    }
}

/// Looks at what all ranks say of themselves: `!` and a reason, or version and GPU on two lines.
fn fit_together(all: &[String]) -> Result<(), String> {
    if let Some((rank, reason)) = all.iter().enumerate().find_map(|(rank, said)| Some((rank, said.strip_prefix('!')?)))
    {
        return Err(format!("rank {rank}: {reason}"));
    }
    let parts: Vec<(&str, &str)> = all.iter().map(|said| said.split_once('\n').unwrap_or((said, ""))).collect();
    for (rank, (version, gpu)) in parts.iter().enumerate() {
        if *version != parts[0].0 {
            return Err(format!(
                "rank {rank} has libnccl {version}, rank 0 has {}; all nodes need the same one",
                parts[0].0
            ));
        }
        if let Some(other) = parts[..rank].iter().position(|(_, other)| other == gpu) {
            return Err(format!("ranks {other} and {rank} are on the same GPU ({gpu}); start one rank per GPU"));
        }
    }
    Ok(())
}

impl Collective for NcclCollective {
    fn backend(&self) -> &'static str {
        BACKEND
    }
    fn rank(&self) -> usize {
        self.control.rank()
    }
    fn world_size(&self) -> usize {
        self.control.world_size()
    }
    fn local_rank(&self) -> usize {
        self.control.local_rank()
    }
    fn local_size(&self) -> usize {
        self.control.local_size()
    }
    fn deadline(&self) -> Duration {
        self.process.deadline
    }

    fn start(&self, op: Op) -> Result<Pending, CollectiveError> {
        if op.place() == Place::Host {
            return self.control.start(op);
        }
        let (rank, process) = (self.run_rank, &self.process);
        let call = Call::new(op, self.rank(), self.world_size(), rank)?;
        let op = call.name;
        if call.place != Place::Device(process.device.ordinal) {
            return Err(CollectiveError::Place { rank, op, backend: BACKEND, found: call.place });
        }
        if let Some(reason) = process.failure.get() {
            return Err(CollectiveError::Backend { rank, op, reason: format!("given up after: {reason}") });
        }
        let (pending, completer) = Pending::on_stream(rank, op, ABORT_GRACE);
        if call.is_empty() {
            completer.complete(Ok(call.into_result()));
            return Ok(pending);
        }
        let ready = (process.caller_stream)()
            .and_then(|stream| Event::on(&process.device, stream))
            .map_err(|reason| CollectiveError::Backend { rank, op, reason })?;
        process.order(Order::Start { communicator: self.communicator, call, ready, completer });
        Ok(pending)
    }

    fn split(&self, color: usize, key: usize) -> Result<Box<dyn Collective>, CollectiveError> {
        // It checks the numbers, and all ranks have come when it is done.
        let control: Arc<dyn Collective> = self.control.split(color, key)?.into();
        let (parent, size) = (self.communicator, control.world_size());
        let (color, key) = (color as i32, key as i32);
        let order = |answer| Order::Split { parent, color, key, size, answer };
        let communicator = self.process.make(self.run_rank, "split", order)?;
        Ok(Box::new(Self { control, run_rank: self.run_rank, communicator, process: self.process.clone() }))
    }

    fn abort(&self, code: i32) -> ! {
        self.control.abort(code)
    }
}

impl Process {
    fn order(&self, order: Order) {
        if let Some(orders) = lock(&self.orders).as_ref() {
            // A dead progress thread drops what answers the caller, who learns of it by that.
            let _ = orders.send(order);
        }
    }

    /// Has a communicator made, and waits for it.
    fn make(
        &self,
        rank: usize,
        op: &'static str,
        order: impl FnOnce(Sender<Result<usize, CollectiveError>>) -> Order,
    ) -> Result<usize, CollectiveError> {
        let (answer, answered) = channel();
        self.order(order(answer));
        match answered.recv_timeout(self.deadline + ABORT_GRACE) {
            Ok(made) => made,
            Err(RecvTimeoutError::Timeout) => {
                let phase = crate::Phase::Wire.name().into();
                Err(CollectiveError::Deadline { rank, op, phase, deadline: self.deadline })
            }
            Err(RecvTimeoutError::Disconnected) => {
                Err(CollectiveError::Backend { rank, op, reason: "the progress thread ended".to_owned() })
            }
        }
    }
}

impl Drop for Process {
    fn drop(&mut self) {
        drop(lock(&self.orders).take());
        let patience = self.deadline + ABORT_GRACE;
        if let Err(RecvTimeoutError::Timeout) = lock(&self.ended).recv_timeout(patience) {
            eprintln!("nccl: the communicators were not freed within {patience:?}");
        }
    }
}

fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

#[cfg(test)]
mod tests {
    use super::fit_together;

    fn said(all: &[&str]) -> Result<(), String> {
        fit_together(&all.iter().map(|said| said.to_string()).collect::<Vec<_>>())
    }

    #[test]
    fn ranks_with_different_libraries_or_one_gpu_are_refused_by_name() {
        said(&["2.29.7\na 01", "2.29.7\na 02", "2.29.7\nb 01"]).unwrap();
        let error = said(&["2.29.7\na 01", "!no driver", "!no libnccl"]).unwrap_err();
        assert_eq!(error, "rank 1: no driver");
        assert!(
            said(&["2.29.7\na 01", "2.30.1\na 02"])
                .unwrap_err()
                .contains("rank 1 has libnccl 2.30.1, rank 0 has 2.29.7")
        );
        assert!(
            said(&["2.29.7\na 01", "2.29.7\na 02", "2.29.7\na 01"])
                .unwrap_err()
                .contains("ranks 0 and 2 are on the same GPU")
        );
    }
}
