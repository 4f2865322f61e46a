//! Work on row groups by several threads, with the results in the order of the data set.

use std::ops::ControlFlow;
use std::sync::mpsc::sync_channel;

/// Calls `work` on every number below `count`, by `threads` threads, and hands the results to `take` in order until it breaks.
/// Each thread is at most two results ahead, so that memory is bounded.
pub(crate) fn in_order<T: Send>(
    count: usize,
    threads: usize,
    work: impl Fn(usize) -> T + Sync,
    mut take: impl FnMut(usize, T) -> ControlFlow<()>,
) {
    let threads = threads.clamp(1, count.max(1));
    std::thread::scope(|scope| {
        // Thread `t` does t, t + threads, …
        let results: Vec<_> = (0..threads)
            .map(|thread| {
                let (sender, results) = sync_channel(1);
                let work = &work;
                scope.spawn(move || {
                    for at in (thread..count).step_by(threads) {
                        if sender.send(work(at)).is_err() {
                            return;
                        }
                    }
                });
                results
            })
            .collect();
        for at in 0..count {
            // A thread ends early only by a panic, which the scope passes on.
            let Ok(result) = results[at % threads].recv() else { break };
            if take(at, result).is_break() {
                break;
            }
        }
    });
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn results_come_in_order_and_the_work_stops_when_nobody_takes_it() {
        for threads in [1, 3, 8] {
            let mut taken = Vec::new();
            in_order(
                20,
                threads,
                |at| at * at,
                |at, square| {
                    assert_eq!(square, at * at);
                    taken.push(at);
                    if at == 12 { ControlFlow::Break(()) } else { ControlFlow::Continue(()) }
                },
            );
            assert_eq!(taken, (0..=12).collect::<Vec<_>>());
        }
        in_order(0, 2, |_| (), |_, ()| ControlFlow::Continue(()));
    }
}
