//! Parameter names and layouts: the official state dict ↔ `DiTTransformer2DModel`.

use super::DiffusersError;
use super::config::TransformerConfig;
use crate::model::dit::{Dit, DitConfig};
use crate::model::{Model, sin_cos_2d};
use std::collections::BTreeMap;
use tch::Tensor;

/// Layers outside the blocks: official, diffusers.
const OUTER: [(&str, &str); 3] = [
    ("x_embedder.proj", "pos_embed.proj"),
    ("final_layer.adaLN_modulation.1", "proj_out_1"),
    ("final_layer.linear", "proj_out_2"),
];
/// Embedders, of which diffusers has a copy in every block, below `norm1.emb`.
const COPIED: [(&str, &str); 3] = [
    ("t_embedder.mlp.0", "timestep_embedder.linear_1"),
    ("t_embedder.mlp.2", "timestep_embedder.linear_2"),
    ("y_embedder.embedding_table", "class_embedder.embedding_table"),
];
/// Layers of a block, below `blocks.i` and `transformer_blocks.i`.
const INNER: [(&str, &str); 4] = [
    ("adaLN_modulation.1", "norm1.linear"),
    ("attn.proj", "attn1.to_out.0"),
    ("mlp.fc1", "ff.net.0.proj"),
    ("mlp.fc2", "ff.net.2"),
];
const QKV: &str = "attn.qkv";
const LABEL_TABLE: &str = "y_embedder.embedding_table.weight";
const POSITIONS: &str = "pos_embed";
/// Some versions of diffusers saved the position table too.
const SAVED_POSITIONS: &str = "pos_embed.pos_embed";
/// How far a position table may be from the formula that diffusers computes it by: the official EMA lets it drift by 5e-7.
const POSITION_DRIFT: f64 = 1e-5;

/// Where diffusers keeps an official parameter.
enum Place {
    /// Nowhere: the position table, which it computes.
    Computed,
    /// Under one name.
    One(String),
    /// The whole of it in every block, first to last.
    Copies(Vec<String>),
    /// Its rows in three equal parts: query, key, value.
    Thirds([String; 3]),
}

fn place(official: &str, depth: i64) -> Option<Place> {
    if official == POSITIONS {
        return Some(Place::Computed);
    }
    let (layer, leaf) = official.rsplit_once('.')?;
    let renamed =
        |table: &[(&str, &str)], layer: &str| table.iter().find(|row| row.0 == layer).map(|row| row.1.to_owned());
    if let Some(name) = renamed(&OUTER, layer) {
        return Some(Place::One(format!("{name}.{leaf}")));
    }
    if let Some(name) = renamed(&COPIED, layer) {
        let copy = |block| format!("transformer_blocks.{block}.norm1.emb.{name}.{leaf}");
        return Some(Place::Copies((0..depth).map(copy).collect()));
    }
    let (block, layer) = layer.strip_prefix("blocks.")?.split_once('.')?;
    if layer == QKV {
        return Some(Place::Thirds(
            ["q", "k", "v"].map(|part| format!("transformer_blocks.{block}.attn1.to_{part}.{leaf}")),
        ));
    }
    renamed(&INNER, layer).map(|name| Place::One(format!("transformer_blocks.{block}.{name}.{leaf}")))
}

/// Official tensors under their names in diffusers, for a label table of `label_rows` rows (see [`super::label_rows`]):
/// rows between the last class and the last row repeat the null label's.
///
/// # Errors
/// A tensor that no adaLN-Zero DiT has, or positions that diffusers would not compute.
pub fn to_diffusers(
    official: &BTreeMap<String, Tensor>,
    model: &DitConfig,
    label_rows: i64,
) -> Result<BTreeMap<String, Tensor>, DiffusersError> {
    let mut tensors = BTreeMap::new();
    for (name, tensor) in official {
        let place = place(name, model.depth).ok_or_else(|| DiffusersError::NotRepresentable {
            what: format!("the tensor `{name}` {:?}", tensor.size()),
            why: "DiTTransformer2DModel has no such parameter".to_owned(),
        })?;
        match place {
            Place::Computed => check_positions(tensor, model)?,
            Place::One(name) => drop(tensors.insert(name, tensor.shallow_clone())),
            Place::Copies(names) => {
                let missing = if name == LABEL_TABLE { label_rows - tensor.size()[0] } else { 0 };
                let null = tensor.narrow(0, tensor.size()[0] - 1, 1);
                let whole = match missing {
                    0 => tensor.shallow_clone(),
                    _ => Tensor::cat(&[tensor, &null.expand([missing, -1], false)], 0),
                };
                tensors.extend(names.into_iter().map(|name| (name, whole.shallow_clone())));
            }
            Place::Thirds(names) => tensors.extend(names.into_iter().zip(tensor.chunk(3, 0))),
        }
    }
    Ok(tensors)
}

/// Tensors of a `DiTTransformer2DModel` under their official names, with the model that they make up.
///
/// # Errors
/// Lists every tensor that is missing, unknown or of another shape; names a block whose embedders are not those of block 0.
pub fn from_diffusers(
    mut tensors: BTreeMap<String, Tensor>,
    config: &TransformerConfig,
    origin: &str,
) -> Result<(BTreeMap<String, Tensor>, DitConfig), DiffusersError> {
    let mut model = config.dit();
    let refuse = |problems| DiffusersError::Weights { origin: origin.to_owned(), problems };
    let dit = Dit::new(model.clone()).map_err(|error| refuse(vec![error.to_string()]))?;
    let saved_positions = tensors.contains_key(SAVED_POSITIONS);
    let mut problems = Vec::new();
    let mut take = |name: &str, shape: &[i64]| match tensors.remove(name) {
        Some(tensor) if tensor.size() == shape => Some(tensor),
        found => {
            let found = found.map_or_else(|| "missing".to_owned(), |tensor| format!("shape {:?}", tensor.size()));
            problems.push(format!("{name}: {found}, expected shape {shape:?}"));
            None
        }
    };
    let mut official = BTreeMap::new();
    for (name, spec) in dit.named_params() {
        let tensor = match place(&name, model.depth) {
            None => continue, // cannot be: `config.dit()` is adaLN-Zero
            Some(Place::Computed) if saved_positions => take(SAVED_POSITIONS, &spec.shape),
            Some(Place::Computed) => Some(positions(&model)),
            Some(Place::One(name)) => take(&name, &spec.shape),
            Some(Place::Copies(names)) => {
                let copies: Vec<Tensor> = names.iter().filter_map(|name| take(name, &spec.shape)).collect();
                let complete = copies.len() == names.len();
                if complete && let Some(block) = copies.iter().position(|copy| !copy.equal(&copies[0])) {
                    let difference = (&copies[block] - &copies[0]).abs().max().double_value(&[]);
                    return Err(DiffusersError::UntiedCopies {
                        origin: origin.to_owned(),
                        name: names[block].clone(),
                        block,
                        difference,
                    });
                }
                copies.into_iter().next()
            }
            Some(Place::Thirds(names)) => {
                let shape: Vec<i64> =
                    std::iter::once(spec.shape[0] / 3).chain(spec.shape[1..].iter().copied()).collect();
                let parts: Vec<Tensor> = names.iter().filter_map(|name| take(name, &shape)).collect();
                (parts.len() == 3).then(|| Tensor::cat(&parts, 0))
            }
        };
        official.extend(tensor.map(|tensor| (name, tensor)));
    }
    problems.extend(
        tensors.iter().map(|(name, tensor)| format!("{name}: no part of this config (shape {:?})", tensor.size())),
    );
    if !problems.is_empty() {
        problems.sort();
        return Err(refuse(problems));
    }
    if let Some(table) = official.get_mut(LABEL_TABLE) {
        model.num_classes = config.recorded_classes().unwrap_or_else(|| classes(table));
        let last = table.size()[0] - 1;
        *table = Tensor::cat(&[table.narrow(0, 0, model.num_classes), table.narrow(0, last, 1)], 0);
    }
    Ok((official, model))
}

/// Classes in a label table whose last row is the null label's: rows that only fill it up to 1000 classes are all equal.
fn classes(table: &Tensor) -> i64 {
    let null = table.size()[0] - 1;
    let same = |a: i64, b: i64| table.get(a).equal(&table.get(b));
    if null < super::PIPELINE_NULL_LABEL || null < 2 {
        return null;
    }
    let mut first = null - 1;
    while first > 1 && same(first - 1, null - 1) {
        first -= 1;
    }
    if first < null - 1 || same(first, null) { first } else { null }
}

/// The table that diffusers computes, [1, tokens, D].
fn positions(model: &DitConfig) -> Tensor {
    let grid = model.input_size / model.patch_size;
    let table: Vec<f32> = sin_cos_2d(model.hidden_size, grid).into_iter().map(|value| value as f32).collect();
    Tensor::from_slice(&table).view([1, grid * grid, model.hidden_size])
}

fn check_positions(table: &Tensor, model: &DitConfig) -> Result<(), DiffusersError> {
    let expected = positions(model);
    let off =
        if table.size() == expected.size() { (table - expected).abs().max().double_value(&[]) } else { f64::INFINITY };
    if off <= POSITION_DRIFT {
        return Ok(());
    }
    Err(DiffusersError::NotRepresentable {
        what: format!(
            "the position table {:?}, which differs from the sine-cosine formula by up to {off:.1e},",
            table.size()
        ),
        why: "DiTTransformer2DModel always computes its positions by that formula".to_owned(),
    })
}
