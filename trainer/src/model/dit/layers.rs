//! Layers that several segments are made of, as functions of the segment's [`Weights`].

use super::DitConfig;
use crate::model::{Init, ParamSpec, Probe, Weights};
use tch::{Kind, Tensor};

/// Epsilon of every LayerNorm, but for [`super::Numerics`].
pub(super) const NORM_EPS: f64 = 1e-6;

/// Weight and bias of a linear layer with the ViT initialisation: Xavier-uniform, zero bias.
pub(super) fn linear(name: &str, out_features: i64, in_features: i64) -> [ParamSpec; 2] {
    linear_from(name, out_features, in_features, Init::XavierUniform { fan_in: in_features, fan_out: out_features })
}

/// Weight, initialised as `weight` says, and zero bias of a linear layer.
pub(super) fn linear_from(name: &str, out_features: i64, in_features: i64, weight: Init) -> [ParamSpec; 2] {
    [
        ParamSpec::new(&format!("{name}.weight"), &[out_features, in_features], weight),
        ParamSpec::new(&format!("{name}.bias"), &[out_features], Init::Zeros),
    ]
}

/// Weight and bias of a LayerNorm with affine part: the identity at first.
pub(super) fn affine_norm(name: &str, width: i64) -> [ParamSpec; 2] {
    [
        ParamSpec::new(&format!("{name}.weight"), &[width], Init::Ones),
        ParamSpec::new(&format!("{name}.bias"), &[width], Init::Zeros),
    ]
}

/// Parameters of the self-attention that every block has.
pub(super) fn attention_params(config: &DitConfig) -> Vec<ParamSpec> {
    let d = config.hidden_size;
    [linear("attn.qkv", 3 * d, d), linear("attn.proj", d, d)].into_iter().flatten().collect()
}

/// Parameters of the MLP's first layer, which every block has.
pub(super) fn fc1_params(config: &DitConfig) -> Vec<ParamSpec> {
    linear("mlp.fc1", config.mlp_hidden(), config.hidden_size).into()
}

/// Those of its second layer.
pub(super) fn fc2_params(config: &DitConfig) -> Vec<ParamSpec> {
    linear("mlp.fc2", config.hidden_size, config.mlp_hidden()).into()
}

/// Multiply-adds of self-attention and MLP over `tokens` tokens.
pub(super) fn attention_and_mlp_macs(config: &DitConfig, tokens: i64) -> i64 {
    let d = config.hidden_size;
    (4 * d * d + 2 * d * config.mlp_hidden()) * tokens + 2 * tokens * tokens * d
}

pub(super) fn apply_linear(weights: &Weights, name: &str, input: &Tensor) -> Tensor {
    input.linear(&weights[&format!("{name}.weight")], Some(&weights[&format!("{name}.bias")]))
}

/// [`apply_linear`] in the precision of the run, in which the result stays.
fn apply_product(weights: &Weights, name: &str, input: &Tensor) -> Tensor {
    let rounded = |part: &str| weights[&format!("{name}.{part}")].to_kind(weights.kind);
    input.to_kind(weights.kind).linear(&rounded("weight"), Some(&rounded("bias")))
}

/// LayerNorm without affine part over the last dimension.
pub(super) fn layer_norm(x: &Tensor) -> Tensor {
    layer_norm_eps(x, NORM_EPS)
}

/// [`layer_norm`] with an epsilon of its own.
pub(super) fn layer_norm_eps(x: &Tensor, eps: f64) -> Tensor {
    x.layer_norm([width(x)], None::<&Tensor>, None::<&Tensor>, eps, false)
}

/// LayerNorm with the affine part called `name`.
pub(super) fn apply_norm(weights: &Weights, name: &str, x: &Tensor) -> Tensor {
    let (scale, shift) = (&weights[&format!("{name}.weight")], &weights[&format!("{name}.bias")]);
    x.layer_norm([width(x)], Some(scale), Some(shift), NORM_EPS, false)
}

fn width(x: &Tensor) -> i64 {
    x.size().last().copied().unwrap_or(1)
}

/// x·(1 + scale) + shift, one shift and scale for all tokens of a sample.
///
/// # Shapes
/// `x` [N, T, D]; `shift`, `scale` [N, D].
pub(super) fn modulate(x: &Tensor, shift: &Tensor, scale: &Tensor) -> Tensor {
    x * (scale.unsqueeze(1) + 1.0) + shift.unsqueeze(1)
}

/// Multi-head self-attention, `attn.qkv` and `attn.proj`; rows of `qkv` are [q | k | v], each head-major.
///
/// # Shapes
/// `x` [N, T, D] → [N, T, D].
pub(super) fn self_attention(w: &Weights, heads: i64, x: &Tensor, see: Probe) -> Tensor {
    let qkv = apply_product(w, "attn.qkv", x); // [N, T, 3D]
    see("qkv", &qkv);
    let [q, k, v] = split_heads(&qkv, heads);
    let attention = apply_product(w, "attn.proj", &attend(&q, &k, &v)).to_kind(Kind::Float);
    see("attn", &attention);
    attention
}

/// Multi-head attention of `x` to `context`, `cross_attn.q`, `.kv` and `.proj`; rows of `kv` are [k | v], head-major.
///
/// # Shapes
/// `x` [N, T, D], `context` [N, S, D] → [N, T, D].
pub(super) fn cross_attention(w: &Weights, heads: i64, x: &Tensor, context: &Tensor) -> Tensor {
    let [q] = split_heads(&apply_product(w, "cross_attn.q", x), heads);
    let [k, v] = split_heads(&apply_product(w, "cross_attn.kv", context), heads);
    apply_product(w, "cross_attn.proj", &attend(&q, &k, &v)).to_kind(Kind::Float)
}

/// [N, T, P·D] → P tensors [N, heads, T, D/heads].
fn split_heads<const P: usize>(joined: &Tensor, heads: i64) -> [Tensor; P] {
    let (n, tokens, width) = joined.size3().unwrap_or_else(|_| panic!("attention takes [N, T, D]"));
    let parts = P as i64;
    let split = joined.view([n, tokens, parts, heads, width / parts / heads]).permute([2, 0, 3, 1, 4]);
    std::array::from_fn(|part| split.get(part as i64))
}

/// softmax(q·kᵀ/√d)·v, heads joined again: [N, T, D].
fn attend(q: &Tensor, k: &Tensor, v: &Tensor) -> Tensor {
    let mixed = Tensor::scaled_dot_product_attention(q, k, v, None::<&Tensor>, 0.0, false, None, false);
    mixed.transpose(1, 2).flatten(2, 3)
}

/// GELU(fc1 x), in the precision of the run: [N, T, D] → [N, T, mlp_hidden].
pub(super) fn fc1(w: &Weights, x: &Tensor, see: Probe) -> Tensor {
    let hidden = apply_product(w, "mlp.fc1", x).gelu("tanh");
    see("mlp_act", &hidden);
    hidden
}

/// The MLP's result from what [`fc1`] gives: [N, T, mlp_hidden] → [N, T, D].
pub(super) fn fc2(w: &Weights, hidden: &Tensor, see: Probe) -> Tensor {
    let mlp = apply_product(w, "mlp.fc2", hidden).to_kind(Kind::Float);
    see("mlp", &mlp);
    mlp
}
