//! What autograd keeps, and what is computed, in a segment: the trainer's forward pass over tensors that have a size only.
//! Each function here stands for one of `trainer/src/model/dit`.

use std::collections::BTreeMap;

use configs::{Conditioning, Precision};

use crate::model::{Dims, Param, Role, Segment};

/// A tensor of which only the size is known.
#[derive(Debug, Clone, Copy)]
struct Shadow {
    /// What it is a view of; parameters have none.
    storage: Option<usize>,
    /// Bytes of all of the storage.
    storage_bytes: f64,
    numel: f64,
    element_bytes: f64,
    requires_grad: bool,
}

/// What one segment takes for one micro-batch.
#[derive(Debug, Clone, Default, PartialEq)]
pub struct SegmentCost {
    /// Kept from its forward pass until its backward pass; its output is not in it.
    pub kept_bytes: f64,
    /// Its output, which is the next segment's input.
    pub output_bytes: f64,
    /// Whether something up to here is trained.
    pub requires_grad: bool,
    /// The most that its backward pass needs beside what was kept.
    pub backward_bytes: f64,
    /// Floating-point operations of products in float32 and in bfloat16, forward.
    pub forward_flops: [f64; 2],
    /// The same, backward.
    pub backward_flops: [f64; 2],
    /// Bytes that everything but products reads and writes, forward.
    pub forward_traffic: f64,
}

struct Graph {
    dims: Dims,
    samples: f64,
    precision: Precision,
    params: BTreeMap<String, (f64, bool)>,
    /// What autograd keeps, by storage.
    saved: BTreeMap<usize, f64>,
    storages: usize,
    small_bytes: f64,
    cost: SegmentCost,
}

/// What a segment is given, and gives on.
#[derive(Debug, Clone, Copy, Default)]
pub struct Inputs {
    /// Whether something before it is trained.
    pub requires_grad: bool,
    /// Whether the conditioning vector depends on something that is trained.
    pub context_requires_grad: bool,
    /// Whether the MLP's part of a block's modulation does.
    pub modulation_requires_grad: bool,
    /// Whether the middle of the MLP does.
    pub hidden_requires_grad: bool,
}

/// What `segment` takes for `micro_batch` samples, and whether its output needs a gradient.
pub fn segment_cost(
    segment: &Segment,
    dims: &Dims,
    micro_batch: usize,
    precision: Precision,
    inputs: Inputs,
) -> (SegmentCost, Inputs) {
    let local = |param: &Param| param.name[segment.prefix.len()..].to_owned();
    let mut graph = Graph {
        dims: dims.clone(),
        samples: micro_batch as f64,
        precision,
        params: segment.params.iter().map(|p| (local(p), (p.numel() as f64, p.trainable))).collect(),
        saved: BTreeMap::new(),
        storages: 0,
        small_bytes: 0.0,
        cost: SegmentCost::default(),
    };
    let d = dims.hidden_size as f64;
    let context_tokens = if dims.conditioning == Conditioning::CrossAttention { 2.0 } else { 1.0 };
    let context_numel = graph.samples * d * context_tokens;
    let context = graph.leaf(context_numel, inputs.context_requires_grad);
    let tokens = graph.leaf(graph.samples * graph.tokens() * d, inputs.requires_grad);
    // Of the MLP's branch alone; the part before has all of it.
    let modulation = graph.leaf(graph.samples * d * graph.modulated(), inputs.modulation_requires_grad);
    let hidden = graph.samples * graph.tokens() * dims.mlp_hidden as f64;
    let hidden = graph.fresh(hidden, graph.product_bytes(), inputs.hidden_requires_grad);
    let mut next = inputs;
    // What is given on beside the output.
    let mut beside = None;
    let output = match segment.role {
        Role::Embedders => {
            let output = graph.embedders();
            next = Inputs {
                requires_grad: output.requires_grad,
                context_requires_grad: graph.trains(&["t_embedder", "y_embedder"]),
                ..inputs
            };
            output
        }
        Role::Attention => {
            let (output, whole_modulation) = graph.attention_part(tokens, context);
            beside = whole_modulation;
            next.modulation_requires_grad = beside.is_some_and(|modulation| modulation.requires_grad);
            output
        }
        Role::Fc1 => {
            let hidden = graph.fc1_part(tokens, modulation);
            next.hidden_requires_grad = hidden.requires_grad;
            beside = Some(hidden);
            tokens
        }
        Role::Fc2 => graph.fc2_part(tokens, modulation, hidden),
        Role::Final => graph.final_layer(tokens, context),
    };
    next.requires_grad = output.requires_grad;
    // The inputs are the segment before's, the output is counted by itself.
    for tensor in [tokens, context, modulation, hidden, output].into_iter().chain(beside) {
        tensor.storage.map(|storage| graph.saved.remove(&storage));
    }
    let mut cost = graph.cost;
    cost.kept_bytes = graph.saved.values().sum::<f64>() + graph.small_bytes;
    cost.output_bytes = beside.map_or(0.0, |tensor| tensor.storage_bytes);
    cost.output_bytes += match segment.role {
        Role::Embedders => output.storage_bytes + context_numel * 4.0,
        // The tokens are those that it was given.
        Role::Fc1 => 0.0,
        _ => output.storage_bytes,
    };
    cost.requires_grad = output.requires_grad || beside.is_some_and(|tensor| tensor.requires_grad);
    if !cost.requires_grad {
        (cost.backward_bytes, cost.backward_flops) = (0.0, [0.0; 2]);
    }
    (cost, next)
}

impl Graph {
    /// Tokens that flow from block to block.
    fn tokens(&self) -> f64 {
        self.dims.tokens() as f64 + if self.dims.conditioning == Conditioning::InContext { 2.0 } else { 0.0 }
    }

    /// Chunks of the modulation of one branch.
    fn modulated(&self) -> f64 {
        match self.dims.conditioning {
            Conditioning::AdaLnZero => 3.0,
            Conditioning::AdaLn => 2.0,
            Conditioning::InContext | Conditioning::CrossAttention => 0.0,
        }
    }

    fn trains(&self, prefixes: &[&str]) -> bool {
        let is_one = |name: &str| prefixes.iter().any(|prefix| name.starts_with(prefix));
        self.params.iter().any(|(name, (_, trainable))| *trainable && is_one(name))
    }

    fn fresh(&mut self, numel: f64, element_bytes: f64, requires_grad: bool) -> Shadow {
        self.storages += 1;
        let storage_bytes = numel * element_bytes;
        Shadow { storage: Some(self.storages), storage_bytes, numel, element_bytes, requires_grad }
    }

    fn leaf(&mut self, numel: f64, requires_grad: bool) -> Shadow {
        self.fresh(numel, 4.0, requires_grad)
    }

    fn param(&self, name: &str) -> Shadow {
        let (numel, requires_grad) = self.params.get(name).copied().unwrap_or((0.0, false));
        Shadow { storage: None, storage_bytes: 0.0, numel, element_bytes: 4.0, requires_grad }
    }

    fn save(&mut self, tensor: Shadow) {
        if let Some(storage) = tensor.storage {
            self.saved.insert(storage, tensor.storage_bytes);
        }
    }

    /// An elementwise operation that keeps nothing itself.
    fn elementwise(&mut self, inputs: &[Shadow]) -> Shadow {
        let largest = inputs.iter().fold(0.0f64, |numel, input| numel.max(input.numel));
        let width = inputs.iter().fold(0.0f64, |width, input| width.max(input.element_bytes));
        self.cost.forward_traffic += largest * width + inputs.iter().map(|i| i.numel * i.element_bytes).sum::<f64>();
        self.fresh(largest, width, inputs.iter().any(|input| input.requires_grad))
    }

    /// An elementwise function whose derivative needs its input.
    fn activation(&mut self, input: Shadow) -> Shadow {
        if input.requires_grad {
            self.save(input);
        }
        self.elementwise(&[input])
    }

    fn product(&mut self, a: Shadow, b: Shadow) -> Shadow {
        if b.requires_grad {
            self.save(a);
        }
        if a.requires_grad {
            self.save(b);
        }
        self.elementwise(&[a, b])
    }

    fn cast(&mut self, input: Shadow, element_bytes: f64) -> Shadow {
        if input.element_bytes == element_bytes {
            return input;
        }
        self.cost.forward_traffic += input.numel * (input.element_bytes + element_bytes);
        self.fresh(input.numel, element_bytes, input.requires_grad)
    }

    /// A weight as the layer sees it: with its adapter, if it has one.
    fn weight(&mut self, name: &str) -> Shadow {
        let weight = self.param(&format!("{name}.weight"));
        let (a, b) = (self.param(&format!("{name}.lora_A.weight")), self.param(&format!("{name}.lora_B.weight")));
        if a.numel == 0.0 {
            return weight;
        }
        let requires_grad = weight.requires_grad || a.requires_grad || b.requires_grad;
        self.cost.forward_traffic += 5.0 * 4.0 * weight.numel;
        Shadow { requires_grad, ..self.fresh(weight.numel, 4.0, requires_grad) }
    }

    fn multiply(&mut self, input: Shadow, weight: Shadow, outputs: f64) -> Shadow {
        let inputs = weight.numel / outputs;
        let out = input.numel / inputs * outputs;
        let requires_grad = input.requires_grad || weight.requires_grad;
        let kind = usize::from(input.element_bytes < 4.0);
        let flops = 2.0 * input.numel * outputs;
        self.cost.forward_flops[kind] += flops;
        if weight.requires_grad {
            self.save(input);
            self.cost.backward_flops[kind] += flops;
        }
        if input.requires_grad {
            self.save(weight);
            self.cost.backward_flops[kind] += flops;
        }
        self.fresh(out, input.element_bytes, requires_grad)
    }

    /// `apply_linear`
    fn linear(&mut self, name: &str, input: Shadow) -> Shadow {
        let (weight, outputs) = (self.weight(name), self.param(&format!("{name}.bias")).numel);
        self.multiply(input, weight, outputs)
    }

    /// Of an element of what `apply_product` gives.
    fn product_bytes(&self) -> f64 {
        if self.precision == Precision::Bf16 { 2.0 } else { 4.0 }
    }

    /// `apply_product`
    fn rounded_linear(&mut self, name: &str, input: Shadow) -> Shadow {
        let bytes = self.product_bytes();
        let (weight, outputs) = (self.weight(name), self.param(&format!("{name}.bias")).numel);
        let (input, weight) = (self.cast(input, bytes), self.cast(weight, bytes));
        self.multiply(input, weight, outputs)
    }

    fn norm(&mut self, input: Shadow, name: Option<&str>) -> Shadow {
        let affine = name.is_some_and(|name| self.trains(&[&format!("{name}.")]));
        let requires_grad = input.requires_grad || affine;
        if requires_grad {
            self.save(input);
            self.small_bytes += 8.0 * input.numel / self.dims.hidden_size as f64;
        }
        let output = self.elementwise(&[input]);
        Shadow { requires_grad, ..output }
    }

    /// A chunk of the modulation, one row a sample.
    fn chunk(&self, modulation: Shadow, chunks: f64) -> Shadow {
        Shadow { numel: modulation.numel / chunks, ..modulation }
    }

    fn modulate(&mut self, x: Shadow, modulation: Shadow, chunks: f64) -> Shadow {
        let chunk = self.chunk(modulation, chunks);
        let scale = self.elementwise(&[chunk]);
        let scaled = self.product(x, scale);
        self.elementwise(&[scaled, chunk])
    }

    fn attend(&mut self, q: Shadow, k: Shadow, v: Shadow, queries: f64, keys: f64) -> Shadow {
        let d = self.dims.hidden_size as f64;
        let kind = usize::from(q.element_bytes < 4.0);
        let flops = 4.0 * self.samples * queries * keys * d;
        self.cost.forward_flops[kind] += flops;
        let requires_grad = q.requires_grad || k.requires_grad;
        let out = self.fresh(self.samples * queries * d, q.element_bytes, requires_grad);
        if requires_grad {
            [q, k, v, out].into_iter().for_each(|tensor| self.save(tensor));
            self.small_bytes += 4.0 * self.samples * queries * self.dims.num_heads as f64;
            // The scores are computed again.
            self.cost.backward_flops[kind] += 2.5 * flops;
        }
        out
    }

    fn self_attention(&mut self, x: Shadow) -> Shadow {
        let qkv = self.rounded_linear("attn.qkv", x);
        let tokens = self.tokens();
        let attended = self.attend(qkv, qkv, qkv, tokens, tokens);
        let projected = self.rounded_linear("attn.proj", attended);
        // At its fullest backward holds the gradients of output, of q, k and v, and of one weight.
        let gradient = 4.0 * self.param("attn.qkv.weight").numel;
        self.cost.backward_bytes = 4.0 * x.numel + qkv.storage_bytes + gradient;
        self.cast(projected, 4.0)
    }

    fn fc1(&mut self, x: Shadow) -> Shadow {
        let product = self.rounded_linear("mlp.fc1", x);
        let hidden = self.activation(product);
        // At its fullest backward holds the gradients of the tokens, of the middle before the activation, and of the middle or the weight.
        let gradient = 4.0 * self.param("mlp.fc1.weight").numel;
        self.cost.backward_bytes = 4.0 * x.numel + product.storage_bytes + gradient.max(hidden.storage_bytes);
        hidden
    }

    fn fc2(&mut self, hidden: Shadow) -> Shadow {
        let projected = self.rounded_linear("mlp.fc2", hidden);
        // Those of output, of the middle and of one weight.
        let gradient = 4.0 * self.param("mlp.fc2.weight").numel;
        self.cost.backward_bytes = 4.0 * projected.numel + hidden.storage_bytes + gradient;
        self.cast(projected, 4.0)
    }

    /// With the modulation that both branches take their parts of.
    fn attention_part(&mut self, x: Shadow, context: Shadow) -> (Shadow, Option<Shadow>) {
        let chunks = 2.0 * self.modulated();
        if chunks > 0.0 {
            let condition = self.activation(context);
            let modulation = self.linear("adaLN_modulation.1", condition);
            let normed = self.norm(x, None);
            let modulated = self.modulate(normed, modulation, chunks);
            let attention = self.self_attention(modulated);
            let branch = self.gate(attention, modulation, chunks);
            return (self.elementwise(&[x, branch]), Some(modulation));
        }
        let normed = self.norm(x, Some("norm1"));
        let attention = self.self_attention(normed);
        let x = self.elementwise(&[x, attention]);
        if self.dims.conditioning == Conditioning::InContext {
            return (x, None);
        }
        let normed = self.norm(x, Some("norm_cross"));
        let q = self.rounded_linear("cross_attn.q", normed);
        let kv = self.rounded_linear("cross_attn.kv", context);
        let attended = self.attend(q, kv, kv, self.tokens(), 2.0);
        let projected = self.rounded_linear("cross_attn.proj", attended);
        let cross = self.cast(projected, 4.0);
        (self.elementwise(&[x, cross]), None)
    }

    /// The middle of the MLP; `modulation`: of this branch alone.
    fn fc1_part(&mut self, x: Shadow, modulation: Shadow) -> Shadow {
        let chunks = self.modulated();
        let input = if chunks > 0.0 {
            let normed = self.norm(x, None);
            self.modulate(normed, modulation, chunks)
        } else {
            self.norm(x, Some("norm2"))
        };
        self.fc1(input)
    }

    fn fc2_part(&mut self, x: Shadow, modulation: Shadow, hidden: Shadow) -> Shadow {
        let mlp = self.fc2(hidden);
        let branch = self.gate(mlp, modulation, self.modulated());
        self.elementwise(&[x, branch])
    }

    /// A branch times its gate, where the design has one.
    fn gate(&mut self, branch: Shadow, modulation: Shadow, chunks: f64) -> Shadow {
        match self.dims.conditioning {
            Conditioning::AdaLnZero => self.product(self.chunk(modulation, chunks), branch),
            _ => branch,
        }
    }

    fn embedders(&mut self) -> Shadow {
        let d = self.dims.hidden_size as f64;
        let tokens = self.dims.tokens() as f64;
        let patches = self.leaf(self.samples * tokens * self.dims.patch_inputs() as f64, false);
        let kernel = self.param("x_embedder.proj.weight");
        let embedded = self.multiply(patches, kernel, d);
        let table = self.param("pos_embed");
        let embedded = self.elementwise(&[embedded, table]);
        let frequencies = self.leaf(self.samples * 256.0, false);
        let hidden = self.linear("t_embedder.mlp.0", frequencies);
        let hidden = self.activation(hidden);
        let time = self.linear("t_embedder.mlp.2", hidden);
        self.cost.backward_bytes = 4.0 * embedded.numel;
        match self.dims.conditioning {
            Conditioning::InContext => {
                let joined = self.fresh(self.samples * self.tokens() * d, 4.0, embedded.requires_grad);
                Shadow {
                    requires_grad: embedded.requires_grad || time.requires_grad || self.trains(&["y_embedder"]),
                    ..joined
                }
            }
            _ => embedded,
        }
    }

    fn final_layer(&mut self, x: Shadow, context: Shadow) -> Shadow {
        let of_image = Shadow { numel: x.numel / self.tokens() * self.dims.tokens() as f64, ..x };
        let normed = match self.dims.conditioning {
            Conditioning::AdaLnZero | Conditioning::AdaLn => {
                let condition = self.activation(context);
                let modulation = self.linear("adaLN_modulation.1", condition);
                let normed = self.norm(x, None);
                self.modulate(normed, modulation, 2.0)
            }
            _ => self.norm(of_image, Some("norm_final")),
        };
        let tokens = self.linear("linear", normed);
        let image = self.elementwise(&[tokens]);
        // The loss keeps about four of its size: squared errors, and the bound of the variance.
        self.cost.backward_bytes = 2.0 * 4.0 * normed.numel + 8.0 * image.storage_bytes;
        image
    }
}
