//! Runs the conformance suite, or one of the scenarios that tests look at from outside, on the collective of the engine that
//! started it, for example `mpirun -n 2 collective-conformance`.

use clap::{Parser, ValueEnum};
use collective::conformance::Host;
use collective::mpi::{MpiCollective, MpiOptions};
use collective::{Collective, CollectiveError, Place, ReduceOp, Region};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, Instant};

#[derive(Parser)]
struct Args {
    /// Seconds that a wait may last.
    #[arg(long, default_value_t = 60.0)]
    deadline_s: f64,
    /// The most elements that one call of the backend moves.
    #[arg(long)]
    chunk_numel: Option<usize>,
    /// What to do.
    #[arg(long, value_enum, default_value_t = Scenario::Suite)]
    scenario: Scenario,
}

#[derive(Clone, Copy, ValueEnum)]
enum Scenario {
    /// The conformance suite.
    Suite,
    /// Rank 1 comes two seconds late; the others say how much processor time their waiting took.
    Idle,
    /// The last rank never comes; the others say what they are told.
    Stall,
    /// The last rank dies; the others wait for it.
    Die,
}

fn main() {
    let args = Args::parse();
    let outcome = open(&args).map_err(|error| error.to_string()).and_then(|collective| {
        let outcome = run(&args, &*collective);
        outcome.map_err(|reason| {
            eprintln!("collective-conformance: {reason}");
            collective.abort(1)
        })
    });
    if let Err(reason) = outcome {
        eprintln!("collective-conformance: {reason}");
        std::process::exit(1);
    }
}

fn open(args: &Args) -> Result<Box<dyn Collective>, CollectiveError> {
    let deadline = Duration::from_secs_f64(args.deadline_s);
    match args.chunk_numel {
        None => collective::from_environment(deadline),
        Some(chunk_numel) => Ok(Box::new(MpiCollective::init(MpiOptions { deadline, chunk_numel })?)),
    }
}

fn run(args: &Args, collective: &dyn Collective) -> Result<(), String> {
    let (rank, world_size) = (collective.rank(), collective.world_size());
    let failed = |error: CollectiveError| error.to_string();
    match args.scenario {
        Scenario::Suite => {
            collective::conformance::run(collective, &Host)?;
            println!("rank {rank} of {world_size}: ok");
        }
        Scenario::Idle => {
            collective.barrier().map_err(failed)?;
            if rank == 1 {
                std::thread::sleep(Duration::from_secs(2));
            }
            let used_before = processor_time();
            collective.barrier().map_err(failed)?;
            println!("rank {rank} of {world_size}: waiting took {:?}", processor_time() - used_before);
        }
        Scenario::Stall | Scenario::Die if rank + 1 == world_size => {
            collective.barrier().map_err(failed)?;
            if let Scenario::Die = args.scenario {
                std::process::abort();
            }
            // Until the others have given up and end the run.
            std::thread::sleep(Duration::from_secs(60));
        }
        Scenario::Stall | Scenario::Die => {
            collective.barrier().map_err(failed)?;
            let freed = Arc::new(AtomicBool::new(false));
            let pending = collective.all_reduce(watched_region(freed.clone()), ReduceOp::Sum).map_err(failed)?;
            let begin = Instant::now();
            let told = pending.wait(collective.deadline()).err().map(|error| error.to_string());
            println!(
                "rank {rank} of {world_size}: after {:.1} s: {}; buffer freed: {}",
                begin.elapsed().as_secs_f64(),
                told.as_deref().unwrap_or("nothing"),
                freed.load(Ordering::SeqCst)
            );
            collective.abort(3);
        }
    }
    Ok(())
}

/// A region that says when its memory is freed.
fn watched_region(freed: Arc<AtomicBool>) -> Region {
    struct Owner(Vec<f32>, Arc<AtomicBool>);
    impl Drop for Owner {
        fn drop(&mut self) {
            self.1.store(true, Ordering::SeqCst);
        }
    }
    let mut owner = Box::new(Owner(vec![1.0; 1000], freed));
    // SAFETY: the vector lives as long as its owner and nobody else has it.
    unsafe { Region::from_raw(owner.0.as_mut_ptr().cast(), 1000, collective::Dtype::F32, Place::Host, owner) }
}

/// Processor time of all threads of this process.
fn processor_time() -> Duration {
    let mut time = libc::timespec { tv_sec: 0, tv_nsec: 0 };
    // SAFETY: a valid out-pointer.
    unsafe { libc::clock_gettime(libc::CLOCK_PROCESS_CPUTIME_ID, &mut time) };
    Duration::new(time.tv_sec as u64, time.tv_nsec as u32)
}
