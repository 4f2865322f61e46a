//! The curve of a run, in bounded memory.

use serde_json::{Value, json};

/// More points are thinned out.
const MOST: usize = 2048;

/// One logged step.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Point {
    pub step: u64,
    pub loss: f64,
    pub images_per_s: f64,
    pub time: f64,
}

impl Point {
    /// As the status server gives it; a loss that is not finite is `null`.
    pub fn to_json(self) -> Value {
        let Point { step, loss, images_per_s, time } = self;
        json!({"step": step, "loss": loss, "images_per_s": images_per_s, "time": time})
    }
}

/// Logged steps in their order, evenly thinned out when there are many.
#[derive(Debug)]
pub struct History {
    points: Vec<Point>,
    /// Of so many points one is kept.
    stride: u64,
    offered: u64,
}

impl Default for History {
    fn default() -> History {
        History { points: Vec::new(), stride: 1, offered: 0 }
    }
}

impl History {
    /// Takes the next logged step.
    pub fn push(&mut self, step: u64, loss: f64, images_per_s: f64, time: f64) {
        if self.points.last().is_some_and(|last| last.step >= step) {
            self.go_back_to(step.saturating_sub(1));
        }
        self.offered += 1;
        if !self.offered.is_multiple_of(self.stride) {
            return;
        }
        self.points.push(Point { step, loss, images_per_s, time });
        if self.points.len() >= MOST {
            let mut nth = 0;
            self.points.retain(|_| {
                nth += 1;
                nth % 2 == 0
            });
            self.stride *= 2;
        }
    }

    /// What came after `step` is made again.
    pub fn go_back_to(&mut self, step: u64) {
        self.points.retain(|point| point.step <= step);
    }

    /// Those that are kept.
    pub fn points(&self) -> &[Point] {
        &self.points
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_long_run_keeps_an_even_curve_and_a_restart_takes_its_end_back() {
        let mut history = History::default();
        (1..=20_000).for_each(|step| history.push(step, 1.0, 1.0, 0.0));
        let points = history.points();
        assert!((MOST / 4..MOST).contains(&points.len()), "{}", points.len());
        let gaps: Vec<u64> = points.windows(2).map(|pair| pair[1].step - pair[0].step).collect();
        assert!(gaps.iter().all(|gap| *gap == gaps[0]), "{gaps:?}");
        // A run that has gone back by itself.
        history.push(9000, 1.0, 1.0, 0.0);
        assert!(history.points().iter().all(|point| point.step <= 9000));
        history.go_back_to(500);
        assert!(!history.points().is_empty() && history.points().iter().all(|point| point.step <= 500));
    }
}
