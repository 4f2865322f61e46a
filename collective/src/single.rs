//! World size 1: every operation is a copy.

use crate::call::Call;
use crate::{Collective, CollectiveError, Op, Pending, Place};
use std::time::Duration;

/// The only rank of its world, over host memory.
pub struct SingleCollective {
    deadline: Duration,
}

impl SingleCollective {
    /// A world of one.
    pub fn new(deadline: Duration) -> Self {
        Self { deadline }
    }
}

impl Collective for SingleCollective {
    fn backend(&self) -> &'static str {
        "single"
    }
    fn rank(&self) -> usize {
        0
    }
    fn world_size(&self) -> usize {
        1
    }
    fn local_rank(&self) -> usize {
        0
    }
    fn local_size(&self) -> usize {
        1
    }
    fn deadline(&self) -> Duration {
        self.deadline
    }

    fn start(&self, op: Op) -> Result<Pending, CollectiveError> {
        let call = Call::new(op, 0, 1, 0)?;
        if call.place != Place::Host && !call.in_place {
            return Err(CollectiveError::Place { rank: 0, op: call.name, backend: "single", found: call.place });
        }
        if !call.in_place {
            // SAFETY: `Call` made the sizes equal; the two regions are distinct host memory that we own here.
            unsafe { std::ptr::copy(call.from(0), call.to(0), call.numel * call.dtype.bytes()) };
        }
        let (pending, completer) = Pending::new(0, call.name);
        completer.complete(Ok(call.into_result()));
        Ok(pending)
    }

    fn split(&self, _color: usize, _key: usize) -> Result<Box<dyn Collective>, CollectiveError> {
        Ok(Box::new(Self::new(self.deadline)))
    }

    fn abort(&self, code: i32) -> ! {
        std::process::exit(code)
    }
}

#[cfg(test)]
mod tests {
    use crate::conformance::{Host, run};

    #[test]
    fn passes_the_conformance_suite() {
        let single = super::SingleCollective::new(std::time::Duration::from_secs(5));
        run(&single, &Host).expect("conformance");
    }
}
