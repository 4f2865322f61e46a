//! Which rank runs which lanes, and which rank holds what.
//!
//! The ranks are `replicas` groups of `shards` consecutive ranks. Every group runs an aligned block of the lanes, one node of
//! the canonical tree, and holds one copy of what is shared out. Of each bucket a rank of a group holds one of `shards` equal
//! parts, and of this it answers for one of `replicas` equal parts: for the sum over all lanes, its norm, and its place in
//! checkpoints. All of these are whole numbers of finest shards.

use configs::lanes::{LaneBlock, LaneError};
use configs::{Reduction, Sharding};

/// One rank's place.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Mesh {
    /// What is shared out within a group.
    pub sharding: Sharding,
    /// Lanes of the experiment; as many finest shards has a bucket.
    pub lanes: usize,
    /// Ranks of a group.
    pub shards: usize,
    /// Groups.
    pub replicas: usize,
    /// This rank's number in its group.
    pub shard: usize,
    /// Its group.
    pub replica: usize,
    /// What is shared out is so among all ranks; the groups, which are nodes, are the way there.
    pub over_all: bool,
}

impl Mesh {
    /// The place of `rank` where sums are made along the canonical tree, as [`Mesh::under`].
    #[cfg(test)]
    pub fn of(
        rank: usize,
        world_size: usize,
        lanes: usize,
        sharding: Sharding,
        group: Option<usize>,
    ) -> Result<Self, LaneError> {
        Self::under(Reduction::Invariant, rank, world_size, lanes, sharding, group)
    }

    /// The place of `rank`; `group` is the most ranks that hold one copy together (`None`: all).
    ///
    /// # Errors
    /// As [`LaneBlock::under`].
    pub fn under(
        reduction: Reduction,
        rank: usize,
        world_size: usize,
        lanes: usize,
        sharding: Sharding,
        group: Option<usize>,
    ) -> Result<Self, LaneError> {
        LaneBlock::under(reduction, rank, world_size, lanes)?;
        let shards = match sharding {
            Sharding::Nothing => 1,
            // Groups are equal.
            _ => (1..=group.unwrap_or(world_size)).rev().find(|ranks| world_size.is_multiple_of(*ranks)).unwrap_or(1),
        };
        let (replica, shard) = (rank / shards, rank % shards);
        Ok(Self { sharding, lanes, shards, replicas: world_size / shards, shard, replica, over_all: false })
    }

    /// The same place where each `node_ranks` consecutive ranks are those of a node and one group has all ranks: sums and weights then climb
    /// and descend inside the nodes, and between nodes each rank moves only its part of them. Weights that are shared out themselves
    /// (`Sharding::Weights`) keep the one group.
    pub fn over_nodes(self, node_ranks: usize) -> Self {
        let (world_size, rank) = (self.shards, self.shard);
        let are_nodes = (2..world_size).contains(&node_ranks) && world_size.is_multiple_of(node_ranks);
        if self.replicas > 1 || !are_nodes || self.sharding == Sharding::Weights {
            return self;
        }
        let (shards, replicas) = (node_ranks, world_size / node_ranks);
        Self { shards, replicas, shard: rank % shards, replica: rank / shards, over_all: true, ..self }
    }

    /// The place of a lone rank.
    ///
    /// # Errors
    /// As [`LaneBlock::under`].
    pub fn alone(lanes: usize) -> Result<Self, LaneError> {
        Self::under(Reduction::Invariant, 0, 1, lanes, Sharding::default(), None)
    }

    /// Lanes that a rank runs in a step.
    pub fn lanes_per_rank(&self) -> usize {
        self.lanes / (self.shards * self.replicas)
    }

    /// Whether the lanes of a group go to its ranks in turn, so that what they compute at a time is one node of the tree.
    /// Otherwise each rank has a block of its own.
    pub fn deals_in_turn(&self) -> bool {
        self.sharding >= Sharding::Gradients
    }

    /// Whether this rank holds only its part of the weights between the uses of a segment.
    pub fn shares_out_weights(&self) -> bool {
        self.sharding == Sharding::Weights && self.shards > 1
    }

    /// The lanes that this rank runs, in this order.
    pub fn lanes_of_rank(self) -> impl Iterator<Item = usize> {
        let (per_rank, of_group) = (self.lanes_per_rank(), self.lanes / self.replicas);
        let [first, stride] = if self.deals_in_turn() { [self.shard, self.shards] } else { [self.shard * per_rank, 1] };
        (0..per_rank).map(move |index| self.replica * of_group + first + index * stride)
    }

    /// The rank that runs `lane`, and which of its lanes that is.
    pub fn place_of_lane(&self, lane: usize) -> (usize, usize) {
        let (per_rank, of_group) = (self.lanes_per_rank(), self.lanes / self.replicas);
        let (replica, lane) = (lane / of_group, lane % of_group);
        let (shard, index) = match self.deals_in_turn() {
            true => (lane % self.shards, lane / self.shards),
            false => (lane / per_rank, lane % per_rank),
        };
        (replica * self.shards + shard, index)
    }

    /// The finest shards that come to this rank in its group, and to no other rank of it.
    pub fn part(&self) -> LaneBlock {
        let len = self.lanes / self.shards;
        LaneBlock { first: self.shard * len, len }
    }

    /// Those of [`Mesh::part`] that this rank answers for; no other does.
    pub fn own(&self) -> LaneBlock {
        let len = self.lanes_per_rank();
        LaneBlock { first: self.part().first + self.replica * len, len }
    }

    /// Those whose state this rank holds: [`Mesh::part`], or [`Mesh::own`] where state is shared out among all ranks.
    pub fn held(&self) -> LaneBlock {
        if self.over_all { self.own() } else { self.part() }
    }

    /// The rank that answers for a finest shard, and which of its own that is.
    pub fn owner(&self, finest: usize) -> (usize, usize) {
        let (part, index) = (finest / self.lanes_per_rank(), finest % self.lanes_per_rank());
        let (shard, replica) = (part / self.replicas, part % self.replicas);
        (replica * self.shards + shard, index)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use configs::lanes::allowed_world_sizes;

    #[test]
    fn lanes_and_finest_shards_are_dealt_once_and_a_group_holds_everything() {
        for (lanes, sharding) in [1, 4, 16].into_iter().flat_map(|lanes| Sharding::ALL.map(|level| (lanes, level))) {
            for world_size in allowed_world_sizes(lanes) {
                let places =
                    [None, Some(1), Some(2), Some(4)].into_iter().flat_map(|group| [1, 2, 4].map(|n| (group, n)));
                for (group, node) in places {
                    let mesh = |rank| Mesh::of(rank, world_size, lanes, sharding, group).unwrap().over_nodes(node);
                    let (mut run, mut owned) = (vec![0; lanes], vec![0; lanes]);
                    let mut held = vec![0; lanes];
                    for rank in 0..world_size {
                        for (index, lane) in mesh(rank).lanes_of_rank().enumerate() {
                            run[lane] += 1;
                            assert_eq!(mesh(0).place_of_lane(lane), (rank, index));
                        }
                        for (index, finest) in mesh(rank).own().range().enumerate() {
                            owned[finest] += 1;
                            assert_eq!(mesh(0).owner(finest), (rank, index));
                        }
                        mesh(rank).held().range().for_each(|finest| held[finest] += 1);
                        assert!(mesh(rank).own().range().all(|finest| mesh(rank).held().range().contains(&finest)));
                    }
                    let copies = if mesh(0).over_all { 1 } else { mesh(0).replicas };
                    assert_eq!([run, owned, held], [vec![1; lanes], vec![1; lanes], vec![copies; lanes]]);
                }
            }
        }
    }

    #[test]
    fn what_a_group_computes_at_a_time_is_a_node_of_the_tree() {
        for sharding in [Sharding::Gradients, Sharding::Weights] {
            let lanes = |rank| Mesh::of(rank, 4, 16, sharding, Some(2)).unwrap().lanes_of_rank().collect::<Vec<_>>();
            assert_eq!([lanes(0), lanes(1)], [[0, 2, 4, 6], [1, 3, 5, 7]]);
            assert_eq!([lanes(2), lanes(3)], [[8, 10, 12, 14], [9, 11, 13, 15]]);
        }
        let nodes = |rank| Mesh::of(rank, 4, 16, Sharding::Gradients, None).unwrap().over_nodes(2);
        assert!(nodes(2).over_all && nodes(2).lanes_of_rank().eq([8, 10, 12, 14]));
        let block = Mesh::of(3, 4, 16, Sharding::Optimizer, Some(2)).unwrap();
        assert_eq!(block.lanes_of_rank().collect::<Vec<_>>(), [12, 13, 14, 15]);
    }
}
