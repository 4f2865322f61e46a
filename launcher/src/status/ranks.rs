//! The ranks by their heartbeats: where each is, which is slow, which is silent.

use std::collections::BTreeMap;
use std::time::{Duration, Instant};

use configs::beat::Beat;
use configs::phases::Phase;
use serde_json::{Value, json};

/// Rates are means over at least so long a time.
const WINDOW: Duration = Duration::from_secs(2);
/// Beside a rank that was heard so lately, one that was not is worth a remark.
const LATE: Duration = Duration::from_secs(3);
/// A rank is a straggler when its own work in a step takes longer than the median rank's by this factor …
const SLOW: f64 = 1.5;
/// … and by so many seconds, …
const SLOW_S: f64 = 0.005;
/// … in so many windows in a row of so many steps each; and no longer, when in one window it is below this factor.
const WINDOWS: u32 = 3;
const STEPS: u64 = 3;
const NO_LONGER_SLOW: f64 = 1.25;

/// All ranks that have shown a sign of life.
#[derive(Clone, Default)]
pub struct Ranks {
    ranks: BTreeMap<usize, Rank>,
    /// Samples of one rank in a step.
    images_per_step: f64,
}

#[derive(Clone)]
struct Rank {
    beat: Beat,
    heard: Instant,
    /// Where the window began that rates are taken over: when, and the beat of then.
    window: (Instant, Beat),
    rates: Option<Rates>,
    /// Windows in a row in which it was slow.
    slow: u32,
    is_straggler: bool,
}

/// Means over a window, per step where it says so.
#[derive(Clone, Copy)]
struct Rates {
    images_per_s: f64,
    data_wait_share: f64,
    own_s: f64,
    reduce_s: f64,
    data_s: f64,
}

impl Ranks {
    /// None yet; each works on so many samples in a step.
    pub fn new(images_per_step: f64) -> Ranks {
        Ranks { ranks: BTreeMap::new(), images_per_step }
    }

    /// Takes a beat; gives what to say of a rank that has become a straggler, or is none any more.
    pub fn beat(&mut self, number: usize, beat: Beat, now: Instant) -> Vec<String> {
        let rank = self.ranks.entry(number).or_insert_with(|| Rank {
            beat: beat.clone(),
            heard: now,
            window: (now, beat.clone()),
            rates: None,
            slow: 0,
            is_straggler: false,
        });
        (rank.beat, rank.heard) = (beat, now);
        let (began, first) = &rank.window;
        let (seconds, steps) = (now.saturating_duration_since(*began), rank.beat.step.saturating_sub(first.step));
        // Set-up is no part of a rate.
        if seconds < WINDOW || steps < STEPS || first.step == 0 {
            if first.step == 0 {
                rank.window = (now, rank.beat.clone());
            }
            return Vec::new();
        }
        let per_step = |sum: fn(&Beat) -> f64| (sum(&rank.beat) - sum(first)).max(0.0) / steps as f64;
        let (own_s, reduce_s, data_s) = (per_step(|b| b.own_s), per_step(|b| b.reduce_s), per_step(|b| b.data_s));
        let step_s = seconds.as_secs_f64() / steps as f64;
        rank.rates = Some(Rates {
            images_per_s: self.images_per_step / step_s,
            data_wait_share: (data_s / step_s).min(1.0),
            own_s,
            reduce_s,
            data_s,
        });
        rank.window = (now, rank.beat.clone());
        self.judge(number)
    }

    fn judge(&mut self, number: usize) -> Vec<String> {
        let Some(median) = self.median_own_s() else { return Vec::new() };
        let Some(rank) = self.ranks.get_mut(&number) else { return Vec::new() };
        let Some(Rates { own_s, data_s, .. }) = rank.rates else { return Vec::new() };
        let is_slow = own_s > SLOW * median && own_s > median + SLOW_S;
        rank.slow = if is_slow { rank.slow + 1 } else { 0 };
        let host = &rank.beat.host;
        if !rank.is_straggler && rank.slow >= WINDOWS {
            rank.is_straggler = true;
            return vec![format!(
                "rank {number} on {host} is slow, and the others wait for it: {own_s:.3} s of its own a step, {data_s:.3} s of them \
                 waiting for data; the median rank takes {median:.3} s"
            )];
        }
        if rank.is_straggler && own_s < NO_LONGER_SLOW * median {
            rank.is_straggler = false;
            return vec![format!("rank {number} on {host} is no slower than the others any more")];
        }
        Vec::new()
    }

    /// The lower median of the ranks' own work; `None` as long as not all ranks of at least two have rates.
    fn median_own_s(&self) -> Option<f64> {
        let mut all: Vec<f64> = self.ranks.values().filter_map(|rank| Some(rank.rates?.own_s)).collect();
        all.sort_by(f64::total_cmp);
        (all.len() >= 2 && all.len() == self.ranks.len()).then(|| all[(all.len() - 1) / 2])
    }

    /// The rank that waits the least for others, and so is waited for.
    fn slowest(&self) -> Option<usize> {
        self.median_own_s()?;
        let waits = self.ranks.iter().filter_map(|(number, rank)| Some((*number, rank.rates?.reduce_s)));
        waits.min_by(|a, b| a.1.total_cmp(&b.1)).map(|(number, _)| number)
    }

    /// Nobody could be heard until now.
    pub fn forgive(&mut self, now: Instant) {
        self.ranks.values_mut().for_each(|rank| rank.heard = now);
    }

    /// The rank that has been silent longest, if that is longer than `limit`. One that has said that it ends is not.
    pub fn silent(&self, limit: Duration, now: Instant) -> Option<usize> {
        let living = self.ranks.iter().filter(|(_, rank)| rank.beat.phase != Phase::End);
        let silent = living.map(|(number, rank)| (*number, now.saturating_duration_since(rank.heard)));
        silent.filter(|(_, time)| *time >= limit).max_by_key(|(_, time)| *time).map(|(number, _)| number)
    }

    /// Where a rank was when it was last heard.
    pub fn place(&self, number: usize, now: Instant) -> Option<String> {
        let Rank { beat: Beat { host, step, phase, phase_s, .. }, heard, .. } = self.ranks.get(&number)?;
        let silent_s = now.saturating_duration_since(*heard).as_secs_f64();
        let heard =
            if silent_s >= LATE.as_secs_f64() { format!(", last heard {silent_s:.0} s ago") } else { String::new() };
        let lasting = if *phase_s >= 0.1 { format!(" for {phase_s:.1} s") } else { String::new() };
        Some(format!("on {host} at step {step} in phase {phase}{lasting}{heard}"))
    }

    /// Where the ranks of a machine were.
    pub fn places_on(&self, host: &str, now: Instant) -> Option<String> {
        // A name with or without its domain.
        let short = |name: &str| name.split('.').next().unwrap_or_default().to_owned();
        let there = self.ranks.iter().filter(|(_, rank)| short(&rank.beat.host) == short(host));
        let places: Vec<String> =
            there.filter_map(|(number, _)| Some(format!("rank {number} was {}", self.place(*number, now)?))).collect();
        (!places.is_empty()).then(|| places.join(", "))
    }

    /// The rank that `number` waited for: one that is silent, or the one that did not wait itself.
    pub fn waited_for(&self, number: usize, now: Instant) -> Option<usize> {
        let others = || self.ranks.iter().filter(|(other, rank)| **other != number && rank.beat.phase != Phase::End);
        let is_late = |rank: &Rank| now.saturating_duration_since(rank.heard) >= LATE;
        let late = others().filter(|(_, rank)| is_late(rank)).min_by_key(|(_, rank)| rank.heard);
        let waits = self.ranks.get(&number).is_some_and(|rank| rank.beat.phase == Phase::Reduce);
        let busy = others().filter(|(_, rank)| waits && rank.beat.phase != Phase::Reduce);
        let busy = || {
            busy.min_by(|a, b| {
                (a.1.beat.step, -a.1.beat.phase_s)
                    .partial_cmp(&(b.1.beat.step, -b.1.beat.phase_s))
                    .unwrap_or(std::cmp::Ordering::Equal)
            })
        };
        late.or_else(busy).map(|(number, _)| *number)
    }

    /// The step that is being made.
    pub fn step(&self) -> Option<u64> {
        self.ranks.values().map(|rank| rank.beat.step).max()
    }

    /// All ranks, in their order.
    pub fn to_json(&self, now: Instant) -> Value {
        let slowest = self.slowest();
        let one = |(number, rank): (&usize, &Rank)| {
            let Beat { host, step, phase, phase_s, memory_bytes, .. } = &rank.beat;
            let rates = rank.rates;
            json!({
                "rank": number,
                "host": host,
                "step": step,
                "phase": phase,
                "phase_s": rounded(*phase_s),
                "heard_s_ago": rounded(now.saturating_duration_since(rank.heard).as_secs_f64()),
                "images_per_s": rates.map(|rates| rounded(rates.images_per_s)),
                "data_wait_share": rates.map(|rates| rounded(rates.data_wait_share)),
                "own_s_per_step": rates.map(|rates| rates.own_s),
                "wait_s_per_step": rates.map(|rates| rates.reduce_s),
                "memory_bytes": memory_bytes,
                "slowest": slowest == Some(*number),
                "straggler": rank.is_straggler,
            })
        };
        self.ranks.iter().map(one).collect()
    }

    /// A line for each rank; where there are more than `most`, of those that the others wait for most.
    pub fn lines(&self, most: usize, now: Instant) -> Vec<String> {
        let slowest = self.slowest();
        let mut ranks: Vec<(&usize, &Rank)> = self.ranks.iter().collect();
        let left_out = ranks.len().saturating_sub(most);
        if left_out > 0 {
            let wait = |rank: &Rank| rank.rates.map_or(0.0, |rates| rates.reduce_s);
            ranks.sort_by(|a, b| wait(a.1).total_cmp(&wait(b.1)));
            ranks.truncate(most.saturating_sub(1));
        }
        let line = |(number, rank): &(&usize, &Rank)| {
            let Beat { host, step, phase, phase_s, memory_bytes, .. } = &rank.beat;
            let rates = rank.rates.map(|rates| {
                format!(
                    "{:8.1} images/s  data {:3.0}%  own {:.3} s/step",
                    rates.images_per_s,
                    100.0 * rates.data_wait_share,
                    rates.own_s
                )
            });
            let silent = now.saturating_duration_since(rank.heard);
            let silent = if silent >= LATE { format!("  silent for {} s", silent.as_secs()) } else { String::new() };
            let mark = if slowest == Some(**number) { "  slowest" } else { "" };
            format!(
                "rank {number:<4} {host:<12} step {step:<8} {phase:<10} {phase_s:5.1} s  {}  {:.2} GiB{silent}{mark}",
                rates.unwrap_or_default(),
                *memory_bytes as f64 / f64::from(1 << 30)
            )
        };
        let mut lines: Vec<String> = ranks.iter().map(line).collect();
        if left_out > 0 {
            lines.push(format!("… and {} ranks more", self.ranks.len() - lines.len()));
        }
        lines
    }
}

/// Milliseconds are enough for people.
fn rounded(value: f64) -> f64 {
    (value * 1000.0).round() / 1000.0
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use super::*;

    fn beat(step: u64, phase: Phase, own_s: f64, reduce_s: f64) -> Beat {
        let host = "dn1".to_owned();
        Beat { host, step, phase, phase_s: 0.5, own_s, data_s: own_s / 4.0, reduce_s, memory_bytes: 1 << 30 }
    }

    /// Beats of three ranks, `pace` seconds of their own a step, every 10 steps from `from` on, so many times.
    fn run(ranks: &mut Ranks, began: Instant, from: u64, times: u64, pace: [f64; 3]) -> Vec<String> {
        let longest = pace.into_iter().fold(0.0, f64::max);
        let mut said = Vec::new();
        for time in 0..times {
            let step = from + 10 * time;
            for (number, own) in pace.into_iter().enumerate() {
                let made = (step - from) as f64;
                let beat = beat(step, Phase::Forward, 100.0 + made * own, 100.0 + made * (longest - own));
                said.extend(ranks.beat(number, beat, began + Duration::from_secs(3 * (step / 10))));
            }
        }
        said
    }

    #[test]
    fn a_straggler_is_named_once_after_some_windows_and_taken_back_when_it_recovers() {
        let mut ranks = Ranks::new(8.0);
        let began = Instant::now();
        assert!(run(&mut ranks, began, 10, 10, [0.1, 0.1, 0.12]).is_empty());
        assert!(run(&mut ranks, began, 110, 3, [0.1, 0.1, 0.4]).is_empty(), "not for a while only");
        let said = run(&mut ranks, began, 140, 12, [0.1, 0.1, 0.4]);
        assert_eq!(said.len(), 1, "{said:?}");
        assert!(
            said[0].starts_with("rank 2 on dn1 is slow") && said[0].contains("median rank takes 0.100 s"),
            "{said:?}"
        );
        let all = ranks.to_json(began + Duration::from_secs(90));
        assert_eq!(
            (&all[2]["straggler"], &all[2]["slowest"], &all[0]["slowest"]),
            (&true.into(), &true.into(), &false.into())
        );
        let said = run(&mut ranks, began, 260, 12, [0.1, 0.1, 0.11]);
        assert_eq!(said, ["rank 2 on dn1 is no slower than the others any more"]);
    }

    #[test]
    fn ranks_that_are_all_slow_are_no_stragglers_and_neither_is_one_alone() {
        let (mut ranks, began) = (Ranks::new(8.0), Instant::now());
        assert!(run(&mut ranks, began, 10, 20, [0.4, 0.4, 0.4]).is_empty());
        let mut alone = Ranks::new(8.0);
        for step in 1..50 {
            let made = step as f64;
            let at = began + Duration::from_secs(step);
            assert!(alone.beat(0, beat(step, Phase::Forward, made, 0.0), at).is_empty());
        }
        assert_eq!(alone.to_json(began)[0]["slowest"], false);
    }

    #[test]
    fn silence_counts_from_the_last_beat_and_not_after_the_end() {
        let (mut ranks, began) = (Ranks::new(8.0), Instant::now());
        let (limit, at) = (Duration::from_secs(30), |s| began + Duration::from_secs(s));
        assert_eq!(ranks.silent(limit, at(1000)), None);
        ranks.beat(0, beat(5, Phase::End, 1.0, 1.0), at(0));
        ranks.beat(1, beat(5, Phase::Checkpoint, 1.0, 1.0), at(10));
        assert_eq!(ranks.silent(limit, at(39)), None);
        assert_eq!(ranks.silent(limit, at(41)), Some(1));
        assert_eq!(
            ranks.place(1, at(41)).unwrap(),
            "on dn1 at step 5 in phase checkpoint for 0.5 s, last heard 31 s ago"
        );
        assert_eq!(ranks.places_on("dn1.lan", at(10)).unwrap().matches("rank ").count(), 2);
        assert_eq!(ranks.places_on("dn2", at(10)), None);
        ranks.forgive(at(41));
        assert_eq!(ranks.silent(limit, at(60)), None);
    }

    #[test]
    fn who_waits_in_vain_waits_for_the_rank_that_does_not_wait() {
        let (mut ranks, now) = (Ranks::new(8.0), Instant::now());
        ranks.beat(0, beat(5, Phase::Reduce, 1.0, 1.0), now);
        ranks.beat(1, beat(5, Phase::Reduce, 1.0, 1.0), now);
        assert_eq!(ranks.waited_for(0, now), None);
        ranks.beat(2, beat(5, Phase::Data, 1.0, 1.0), now);
        assert_eq!(ranks.waited_for(0, now), Some(2));
        assert_eq!(ranks.waited_for(2, now), None);
        // A stopped rank may have been heard of last while it waited.
        let later = now + LATE;
        ranks.beat(0, beat(5, Phase::Reduce, 1.0, 1.0), later);
        ranks.beat(2, beat(5, Phase::Reduce, 1.0, 1.0), later);
        assert_eq!(ranks.waited_for(0, later), Some(1));
    }

    #[test]
    fn many_ranks_take_few_lines_and_the_slowest_is_among_them() {
        let mut ranks = Ranks::new(8.0);
        let began = Instant::now();
        for (step, at) in [(1, 0), (11, 5)] {
            for number in 0..40 {
                let waited = if number == 33 { 0.0 } else { step as f64 };
                ranks.beat(number, beat(step, Phase::Backward, step as f64, waited), began + Duration::from_secs(at));
            }
        }
        let lines = ranks.lines(8, began + Duration::from_secs(5));
        assert_eq!(lines.len(), 8);
        assert!(
            lines[0].starts_with("rank 33") && lines[0].ends_with("slowest") && lines[0].contains("16.0 images/s"),
            "{lines:?}"
        );
        assert_eq!(lines[7], "… and 33 ranks more");
    }
}
