//! The blocks of Inception-v3: branches side by side, joined along the channels. Every map is `[N,C,H,W]` in f32.

use super::MetricsError;
use super::weights::InceptionWeights;
use tch::{Kind, Tensor};

/// Every batch norm uses this epsilon.
const BATCH_NORM_EPS: f64 = 1e-3;

type Result<T> = std::result::Result<T, MetricsError>;

/// Convolution without bias, batch norm by running statistics, ReLU.
pub(super) struct Conv {
    weight: Tensor,
    bias: Tensor,
    stride: i64,
    padding: [i64; 2],
}

impl Conv {
    pub(super) fn new(
        weights: &mut InceptionWeights,
        name: &str,
        from: i64,
        to: i64,
        kernel: [i64; 2],
        stride: i64,
        padding: [i64; 2],
    ) -> Result<Self> {
        let weight = weights.take(&format!("{name}.conv.weight"), &[to, from, kernel[0], kernel[1]])?;
        let mut norm = |part: &str| {
            Ok::<_, MetricsError>(weights.take(&format!("{name}.bn.{part}"), &[to])?.to_kind(Kind::Double))
        };
        let (scale, shift, mean, variance) =
            (norm("weight")?, norm("bias")?, norm("running_mean")?, norm("running_var")?);
        let scale = scale / (variance + BATCH_NORM_EPS).f_sqrt()?;
        let bias = shift - mean * &scale;
        let weight = weight.to_kind(Kind::Double) * scale.f_view([-1, 1, 1, 1])?;
        Ok(Self { weight: weight.to_kind(Kind::Float), bias: bias.to_kind(Kind::Float), stride, padding })
    }

    pub(super) fn forward(&self, x: &Tensor) -> Result<Tensor> {
        let stride = [self.stride, self.stride];
        Ok(x.f_conv2d(&self.weight, Some(&self.bias), stride, self.padding, [1, 1], 1)?.f_relu_()?)
    }
}

/// What a branch begins with.
#[derive(Clone, Copy)]
enum Pool {
    None,
    /// 3 × 3, same size, the padding left out of the mean.
    Average,
    /// 3 × 3, same size.
    Max,
    /// 3 × 3, stride 2.
    MaxHalving,
}

impl Pool {
    fn apply(self, x: &Tensor) -> Result<Tensor> {
        let max = |stride, padding| x.f_max_pool2d([3, 3], [stride, stride], [padding, padding], [1, 1], false);
        Ok(match self {
            Self::None => x.shallow_clone(),
            Self::Average => x.f_avg_pool2d([3, 3], [1, 1], [1, 1], false, false, None)?,
            Self::Max => max(1, 1)?,
            Self::MaxHalving => max(2, 0)?,
        })
    }
}

struct Branch {
    pool: Pool,
    /// One after the other.
    chain: Vec<Conv>,
    /// After the chain, side by side; none where the chain's end is the branch's.
    fork: Vec<Conv>,
}

/// Branches over the same input.
pub(super) struct Mixed(Vec<Branch>);

/// Name below the block's, output channels, kernel; all keep the size.
type Spec = (&'static str, i64, [i64; 2]);

/// Adds the branches of one block.
struct Builder<'a> {
    weights: &'a mut InceptionWeights,
    block: &'a str,
    from: i64,
    branches: Vec<Branch>,
}

impl<'a> Builder<'a> {
    fn new(weights: &'a mut InceptionWeights, block: &'a str, from: i64) -> Self {
        Self { weights, block, from, branches: Vec::new() }
    }

    fn conv(&mut self, (name, to, kernel): Spec, from: i64, stride: i64) -> Result<Conv> {
        let padding = if stride == 1 { kernel.map(|side| side / 2) } else { [0, 0] };
        Conv::new(self.weights, &format!("{}.{name}", self.block), from, to, kernel, stride, padding)
    }

    /// A branch of convolutions that keep the size, except that the last one halves it if `halve`.
    fn branch(&mut self, pool: Pool, chain: &[Spec], halve: bool, fork: &[Spec]) -> Result<()> {
        let mut from = self.from;
        let mut built = Branch { pool, chain: Vec::new(), fork: Vec::new() };
        for (number, &spec) in chain.iter().enumerate() {
            let stride = if halve && number + 1 == chain.len() { 2 } else { 1 };
            built.chain.push(self.conv(spec, from, stride)?);
            from = spec.1;
        }
        for &spec in fork {
            built.fork.push(self.conv(spec, from, 1)?);
        }
        self.branches.push(built);
        Ok(())
    }

    fn keep(&mut self, chain: &[Spec]) -> Result<()> {
        self.branch(Pool::None, chain, false, &[])
    }

    fn halve(&mut self, chain: &[Spec]) -> Result<()> {
        self.branch(Pool::None, chain, true, &[])
    }

    fn fork(&mut self, chain: &[Spec], fork: &[Spec]) -> Result<()> {
        self.branch(Pool::None, chain, false, fork)
    }
}

impl Mixed {
    /// 35 × 35 positions.
    pub(super) fn a(weights: &mut InceptionWeights, name: &str, from: i64, pooled: i64) -> Result<Self> {
        let mut block = Builder::new(weights, name, from);
        block.keep(&[("branch1x1", 64, [1, 1])])?;
        block.keep(&[("branch5x5_1", 48, [1, 1]), ("branch5x5_2", 64, [5, 5])])?;
        block.keep(&[
            ("branch3x3dbl_1", 64, [1, 1]),
            ("branch3x3dbl_2", 96, [3, 3]),
            ("branch3x3dbl_3", 96, [3, 3]),
        ])?;
        block.branch(Pool::Average, &[("branch_pool", pooled, [1, 1])], false, &[])?;
        Ok(Self(block.branches))
    }

    /// 35 × 35 to 17 × 17 positions.
    pub(super) fn b(weights: &mut InceptionWeights, name: &str, from: i64) -> Result<Self> {
        let mut block = Builder::new(weights, name, from);
        block.halve(&[("branch3x3", 384, [3, 3])])?;
        block.halve(&[
            ("branch3x3dbl_1", 64, [1, 1]),
            ("branch3x3dbl_2", 96, [3, 3]),
            ("branch3x3dbl_3", 96, [3, 3]),
        ])?;
        block.branch(Pool::MaxHalving, &[], false, &[])?;
        Ok(Self(block.branches))
    }

    /// 17 × 17 positions.
    pub(super) fn c(weights: &mut InceptionWeights, name: &str, from: i64, narrow: i64) -> Result<Self> {
        let mut block = Builder::new(weights, name, from);
        block.keep(&[("branch1x1", 192, [1, 1])])?;
        block.keep(&[
            ("branch7x7_1", narrow, [1, 1]),
            ("branch7x7_2", narrow, [1, 7]),
            ("branch7x7_3", 192, [7, 1]),
        ])?;
        block.keep(&[
            ("branch7x7dbl_1", narrow, [1, 1]),
            ("branch7x7dbl_2", narrow, [7, 1]),
            ("branch7x7dbl_3", narrow, [1, 7]),
            ("branch7x7dbl_4", narrow, [7, 1]),
            ("branch7x7dbl_5", 192, [1, 7]),
        ])?;
        block.branch(Pool::Average, &[("branch_pool", 192, [1, 1])], false, &[])?;
        Ok(Self(block.branches))
    }

    /// 17 × 17 to 8 × 8 positions.
    pub(super) fn d(weights: &mut InceptionWeights, name: &str, from: i64) -> Result<Self> {
        let mut block = Builder::new(weights, name, from);
        block.halve(&[("branch3x3_1", 192, [1, 1]), ("branch3x3_2", 320, [3, 3])])?;
        block.halve(&[
            ("branch7x7x3_1", 192, [1, 1]),
            ("branch7x7x3_2", 192, [1, 7]),
            ("branch7x7x3_3", 192, [7, 1]),
            ("branch7x7x3_4", 192, [3, 3]),
        ])?;
        block.branch(Pool::MaxHalving, &[], false, &[])?;
        Ok(Self(block.branches))
    }

    /// 8 × 8 positions; the last block pools by maximum.
    pub(super) fn e(weights: &mut InceptionWeights, name: &str, from: i64, last: bool) -> Result<Self> {
        let mut block = Builder::new(weights, name, from);
        block.keep(&[("branch1x1", 320, [1, 1])])?;
        block.fork(&[("branch3x3_1", 384, [1, 1])], &[("branch3x3_2a", 384, [1, 3]), ("branch3x3_2b", 384, [3, 1])])?;
        block.fork(
            &[("branch3x3dbl_1", 448, [1, 1]), ("branch3x3dbl_2", 384, [3, 3])],
            &[("branch3x3dbl_3a", 384, [1, 3]), ("branch3x3dbl_3b", 384, [3, 1])],
        )?;
        let pool = if last { Pool::Max } else { Pool::Average };
        block.branch(pool, &[("branch_pool", 192, [1, 1])], false, &[])?;
        Ok(Self(block.branches))
    }

    /// Each branch's (or prong's) output, in the order in which they are joined.
    pub(super) fn branches(&self, x: &Tensor) -> Result<Vec<Tensor>> {
        let mut outputs = Vec::new();
        for branch in &self.0 {
            let mut x = branch.pool.apply(x)?;
            for conv in &branch.chain {
                x = conv.forward(&x)?;
            }
            for conv in &branch.fork {
                outputs.push(conv.forward(&x)?);
            }
            if branch.fork.is_empty() {
                outputs.push(x);
            }
        }
        Ok(outputs)
    }

    pub(super) fn forward(&self, x: &Tensor) -> Result<Tensor> {
        Ok(Tensor::f_cat(&self.branches(x)?, 1)?)
    }
}
