//! The parameters of a model, segment by segment, as the trainer declares them.

use configs::{Conditioning, RunConfig};
use glob::Pattern;

/// Features of the timestep embedding before its MLP.
const FREQUENCY_DIM: usize = 256;

/// The dimensions of a DiT, none left to the data set.
#[derive(Debug, Clone, PartialEq)]
pub struct Dims {
    /// Side of the latent.
    pub input_size: usize,
    /// Channels of the latent.
    pub in_channels: usize,
    /// Classes.
    pub num_classes: usize,
    /// Side of a patch.
    pub patch_size: usize,
    /// Width of a token.
    pub hidden_size: usize,
    /// Blocks.
    pub depth: usize,
    /// Attention heads.
    pub num_heads: usize,
    /// Width of an MLP's middle.
    pub mlp_hidden: usize,
    /// Whether the label table has a row for no label.
    pub has_null_class: bool,
    /// Whether the output has channels of the variance.
    pub learn_sigma: bool,
    /// How time and label reach the blocks.
    pub conditioning: Conditioning,
}

/// What a config leaves to the data set.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct DataDims {
    /// Side of the latent.
    pub input_size: usize,
    /// Channels of the latent.
    pub in_channels: usize,
    /// Classes.
    pub num_classes: usize,
}

impl Dims {
    /// Those of a config; `data` fills in what it leaves out.
    pub fn of(config: &RunConfig, data: DataDims) -> Dims {
        let m = &config.model;
        Dims {
            input_size: m.input_size.unwrap_or(data.input_size),
            in_channels: m.in_channels.unwrap_or(data.in_channels),
            num_classes: m.num_classes.unwrap_or(data.num_classes),
            patch_size: m.patch_size,
            hidden_size: m.hidden_size,
            depth: m.depth,
            num_heads: m.num_heads,
            mlp_hidden: (m.hidden_size as f64 * m.mlp_ratio) as usize,
            has_null_class: m.class_dropout_prob > 0.0,
            learn_sigma: m.learn_sigma,
            conditioning: m.conditioning,
        }
    }

    /// Patches of a latent.
    pub fn tokens(&self) -> usize {
        (self.input_size / self.patch_size).pow(2)
    }

    /// Values of a patch.
    pub(crate) fn patch_inputs(&self) -> usize {
        self.in_channels * self.patch_size.pow(2)
    }

    /// Values that the model predicts for a patch.
    pub(crate) fn patch_outputs(&self) -> usize {
        self.patch_inputs() * if self.learn_sigma { 2 } else { 1 }
    }
}

/// A parameter.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Param {
    /// Full name.
    pub name: String,
    /// Shape, in elements.
    pub shape: Vec<usize>,
    /// Whether the optimizer changes it.
    pub trainable: bool,
}

impl Param {
    /// Elements.
    pub fn numel(&self) -> usize {
        self.shape.iter().product()
    }
}

/// What a segment computes.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Role {
    /// Latents, time and label to tokens.
    Embedders,
    /// The first part of a transformer block: all that comes before the MLP's branch.
    Attention,
    /// From the tokens to the middle of its MLP.
    Fc1,
    /// From there to the tokens.
    Fc2,
    /// Tokens to the prediction.
    Final,
}

/// A segment of the chain.
#[derive(Debug, Clone)]
pub struct Segment {
    /// What it computes.
    pub role: Role,
    /// What its parameters' names begin with.
    pub prefix: String,
    /// Its parameters in the order of their declaration.
    pub params: Vec<Param>,
}

/// Shapes by name, in order.
type Shapes = Vec<(String, Vec<usize>)>;

fn linear(name: &str, outputs: usize, inputs: usize) -> Shapes {
    vec![(format!("{name}.weight"), vec![outputs, inputs]), (format!("{name}.bias"), vec![outputs])]
}

fn norm(name: &str, width: usize) -> Shapes {
    vec![(format!("{name}.weight"), vec![width]), (format!("{name}.bias"), vec![width])]
}

fn embedders(dims: &Dims) -> Shapes {
    let Dims { hidden_size: d, patch_size: p, in_channels, .. } = *dims;
    let rows = dims.num_classes + usize::from(dims.has_null_class);
    let first = vec![
        ("pos_embed".to_owned(), vec![1, dims.tokens(), d]),
        ("x_embedder.proj.weight".to_owned(), vec![d, in_channels, p, p]),
        ("x_embedder.proj.bias".to_owned(), vec![d]),
    ];
    let labels = ("y_embedder.embedding_table.weight".to_owned(), vec![rows, d]);
    [first, linear("t_embedder.mlp.0", d, FREQUENCY_DIM), linear("t_embedder.mlp.2", d, d), vec![labels]].concat()
}

fn attention(dims: &Dims) -> Shapes {
    let d = dims.hidden_size;
    let own = [linear("attn.qkv", 3 * d, d), linear("attn.proj", d, d)].concat();
    match dims.conditioning {
        Conditioning::AdaLnZero => [own, linear("adaLN_modulation.1", 6 * d, d)].concat(),
        Conditioning::AdaLn => [own, linear("adaLN_modulation.1", 4 * d, d)].concat(),
        Conditioning::InContext => [norm("norm1", d), own].concat(),
        Conditioning::CrossAttention => [
            norm("norm1", d),
            norm("norm_cross", d),
            linear("cross_attn.q", d, d),
            linear("cross_attn.kv", 2 * d, d),
            linear("cross_attn.proj", d, d),
            own,
        ]
        .concat(),
    }
}

fn fc1(dims: &Dims) -> Shapes {
    let d = dims.hidden_size;
    let own = linear("mlp.fc1", dims.mlp_hidden, d);
    match dims.conditioning {
        Conditioning::AdaLnZero | Conditioning::AdaLn => own,
        Conditioning::InContext | Conditioning::CrossAttention => [norm("norm2", d), own].concat(),
    }
}

fn final_layer(dims: &Dims) -> Shapes {
    let d = dims.hidden_size;
    let to_patches = linear("linear", dims.patch_outputs(), d);
    match dims.conditioning {
        Conditioning::AdaLnZero | Conditioning::AdaLn => [to_patches, linear("adaLN_modulation.1", 2 * d, d)].concat(),
        Conditioning::InContext | Conditioning::CrossAttention => [norm("norm_final", d), to_patches].concat(),
    }
}

/// The segments of a config's model with its adapters and what it freezes. Patterns that match nothing are the trainer's to
/// refuse.
pub fn segments(config: &RunConfig, dims: &Dims) -> Vec<Segment> {
    let patterns = |texts: &[String]| texts.iter().filter_map(|text| Pattern::new(text).ok()).collect::<Vec<_>>();
    let matches = |patterns: &[Pattern], name: &str| patterns.iter().any(|pattern| pattern.matches(name));
    let frozen = patterns(&config.train.freeze);
    let (mut targets, mut also_trained) = (Vec::new(), Vec::new());
    if let Some(lora) = &config.lora {
        let ends = |target: &String| [format!("{target}.weight"), format!("*.{target}.weight")];
        targets = patterns(&lora.targets.iter().flat_map(ends).collect::<Vec<_>>());
        also_trained = patterns(&lora.also_train);
    }
    let segment = |role, prefix: String, shapes: Shapes| {
        let mut params = Vec::new();
        for (name, shape) in shapes {
            let name = format!("{prefix}{name}");
            let adapter = config.lora.as_ref().filter(|_| shape.len() == 2 && matches(&targets, &name));
            let trained = config.lora.is_none() || matches(&also_trained, &name);
            let stem = name.strip_suffix("weight").unwrap_or(&name).to_owned();
            let sides = [shape.first().copied().unwrap_or(1), shape.last().copied().unwrap_or(1)];
            params.push(Param { trainable: trained && name != "pos_embed", name, shape });
            if let Some(lora) = adapter {
                for (part, shape) in [("A", vec![lora.rank, sides[1]]), ("B", vec![sides[0], lora.rank])] {
                    params.push(Param { name: format!("{stem}lora_{part}.weight"), shape, trainable: true });
                }
            }
        }
        params.iter_mut().for_each(|param| param.trainable &= !matches(&frozen, &param.name));
        Segment { role, prefix, params }
    };
    let mut segments = vec![segment(Role::Embedders, String::new(), embedders(dims))];
    for index in 0..dims.depth {
        let fc2 = linear("mlp.fc2", dims.hidden_size, dims.mlp_hidden);
        for (role, shapes) in [(Role::Attention, attention(dims)), (Role::Fc1, fc1(dims)), (Role::Fc2, fc2)] {
            segments.push(segment(role, format!("blocks.{index}."), shapes));
        }
    }
    segments.push(segment(Role::Final, "final_layer.".to_owned(), final_layer(dims)));
    segments
}
