//! In which order a micro-batch runs the segments of a chain, and which of them compute their activations twice.

use crate::model::Model;

/// What the backward pass does next.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Turn {
    /// Runs a segment forwards once more, see [`super::tape::Backward::again`].
    Again(usize),
    /// Runs a segment backwards, see [`super::tape::Backward::segment`].
    Backward(usize),
}

impl Turn {
    /// Which segment.
    pub fn segment(self) -> usize {
        match self {
            Turn::Again(index) | Turn::Backward(index) => index,
        }
    }
}

/// What a segment keeps between its forward and its backward pass.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Keep {
    /// Its graph.
    Activations,
    /// What it was given.
    Input,
    /// Nothing: the segment before it is run again first.
    Nothing,
}

/// The turns of a chain. Segments that follow each other and share a prefix are a unit: all of its activations are kept, or all are
/// computed again, from the input of its first segment.
#[derive(Clone, Debug)]
pub struct Turns {
    /// By segment.
    pub keeps: Vec<Keep>,
    /// The backward pass.
    pub backward: Vec<Turn>,
}

impl Turns {
    /// Of every `recompute_every` units (0: never) the last is computed again.
    pub fn new(model: &dyn Model, recompute_every: usize) -> Self {
        let (mut keeps, mut units) = (Vec::new(), Vec::new());
        for (number, segments) in model.segments().chunk_by(|a, b| a.prefix() == b.prefix()).enumerate() {
            let (start, end) = (keeps.len(), keeps.len() + segments.len());
            let again = recompute_every > 0 && (number + 1).is_multiple_of(recompute_every);
            keeps.extend((start..end).map(|index| match again {
                false => Keep::Activations,
                true if index == start => Keep::Input,
                true => Keep::Nothing,
            }));
            // The last one's graph is made when it runs backwards.
            let first = if again { start..end - 1 } else { start..start };
            let turns = first.map(Turn::Again).chain((start..end).rev().map(Turn::Backward));
            units.push(turns.collect::<Vec<_>>());
        }
        Self { keeps, backward: units.into_iter().rev().flatten().collect() }
    }

    /// The segments in the order of a micro-batch, which another one follows: forwards, then backwards. With each goes whether its weights
    /// are best kept for its next use: where that is the next of all, and until what is computed again has run backwards.
    pub fn uses(&self) -> Vec<(usize, bool)> {
        let forwards = (0..self.keeps.len()).map(|index| (index, index + 1 == self.keeps.len()));
        let backward = |turn: &Turn| (turn.segment(), matches!(turn, Turn::Again(_) | Turn::Backward(0)));
        forwards.chain(self.backward.iter().map(backward)).collect()
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::model::testing::tiny_dit;

    #[test]
    fn what_is_computed_again_is_whole_blocks_from_one_input_each() {
        // Embedders, two blocks of three parts, final layer.
        let model = tiny_dit();
        let turns = |every| Turns::new(&model, every);
        let keeps = |every: usize| -> String {
            let letter = |keep: &Keep| match keep {
                Keep::Activations => 'a',
                Keep::Input => 'i',
                Keep::Nothing => '-',
            };
            turns(every).keeps.iter().map(letter).collect()
        };
        assert_eq!([0, 1, 2, 3].map(keeps), ["aaaaaaaa", "ii--i--i", "ai--aaai", "aaaai--a"]);
        let backward = |every: usize| -> String {
            let word = |turn: &Turn| match turn {
                Turn::Again(index) => format!("+{index} "),
                Turn::Backward(index) => format!("-{index} "),
            };
            turns(every).backward.iter().map(word).collect()
        };
        assert_eq!(backward(0), "-7 -6 -5 -4 -3 -2 -1 -0 ");
        assert_eq!(backward(1), "-7 +4 +5 -6 -5 -4 +1 +2 -3 -2 -1 -0 ");
        assert_eq!(backward(2), "-7 -6 -5 -4 +1 +2 -3 -2 -1 -0 ");
        let staying: Vec<usize> =
            turns(2).uses().into_iter().filter_map(|(index, stays)| stays.then_some(index)).collect();
        assert_eq!(staying, [7, 1, 2, 0]);
    }
}
