//! What goes wrong, as the ranks themselves see it. Tests read what they print.

use super::Scenario;
use collective::conformance::Memory;
use collective::{Collective, CollectiveError, Dtype, Place, ReduceOp, Region};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, Instant};

pub fn play(scenario: Scenario, collective: &dyn Collective, memory: &dyn Memory) -> Result<(), CollectiveError> {
    let (rank, world_size) = (collective.rank(), collective.world_size());
    match scenario {
        Scenario::Suite => {}
        Scenario::Idle => {
            collective.barrier()?;
            if rank == 1 {
                std::thread::sleep(Duration::from_secs(2));
            }
            let used_before = processor_time();
            let buffer = memory.put(Region::from_vec(vec![1f32; 1000]))?;
            collective.all_reduce(buffer, ReduceOp::Sum)?.wait(collective.deadline())?;
            println!("rank {rank} of {world_size}: waiting took {} ms", (processor_time() - used_before).as_millis());
        }
        Scenario::Stall | Scenario::Die if rank + 1 == world_size => {
            collective.barrier()?;
            if scenario == Scenario::Die {
                std::process::abort();
            }
            // Until the others have given up and end the run.
            std::thread::sleep(Duration::from_secs(60));
        }
        Scenario::Stall | Scenario::Die => {
            collective.barrier()?;
            let freed = Arc::new(AtomicBool::new(false));
            let pending = collective.all_reduce(watched_region(freed.clone()), ReduceOp::Sum)?;
            let begin = Instant::now();
            let told = told(pending.wait(collective.deadline()));
            let (after, freed) = (begin.elapsed().as_secs_f64(), freed.load(Ordering::SeqCst));
            println!("rank {rank} of {world_size}: after {after:.1} s: {told}; buffer freed: {freed}");
            collective.abort(3);
        }
        Scenario::Told | Scenario::Odd => {
            for _ in 0..2 {
                let buffer = memory.put(Region::from_vec(vec![1f32; 1000 * world_size]))?;
                let pending = match scenario == Scenario::Odd && rank + 1 == world_size {
                    true => collective.all_gather(None, buffer),
                    false => collective.all_reduce(buffer, ReduceOp::Sum),
                };
                let waited = pending.and_then(|pending| pending.wait(collective.deadline()));
                println!("rank {rank} of {world_size}: told: {}", told(waited));
            }
        }
    }
    Ok(())
}

fn told(outcome: Result<Region, CollectiveError>) -> String {
    outcome.map_or_else(|error| error.to_string(), |_| "nothing".to_owned())
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
    unsafe { Region::from_raw(owner.0.as_mut_ptr().cast(), 1000, Dtype::F32, Place::Host, owner) }
}

/// Processor time of all threads of this process.
fn processor_time() -> Duration {
    let mut time = libc::timespec { tv_sec: 0, tv_nsec: 0 };
    // SAFETY: a valid out-pointer.
    unsafe { libc::clock_gettime(libc::CLOCK_PROCESS_CPUTIME_ID, &mut time) };
    Duration::new(time.tv_sec as u64, time.tv_nsec as u32)
}
