//! `[init]`, `[lora]` and `train.freeze`.

use super::{COUNT, POSITIVE, required_url};
use crate::reader::Reader;
use crate::schema::{Adapt, InitClasses, InitConfig, InitPositions, LoraConfig};
use std::path::Path;

pub(super) fn read_init(r: &mut Reader, base: &Path) -> Option<InitConfig> {
    let given = r.given("init");
    let from = match given {
        true => required_url(
            r,
            "init.from",
            base,
            "set it to a run, a checkpoint, a .pt or .safetensors file or a diffusers folder, or remove [init]",
        ),
        false => r.optional_text("init.from").unwrap_or_default(),
    };
    let adapt = [("keep", Adapt::Keep), ("adapt", Adapt::Adapt)];
    let init = InitConfig {
        from,
        weights: r.text("init.weights", "ema"),
        classes: r.choice("init.classes", &[("keep", InitClasses::Keep), ("new", InitClasses::New)], InitClasses::Keep),
        null_class: r.choice("init.null_class", &adapt, Adapt::Keep),
        positions: r.optional_choice(
            "init.positions",
            &[("interpolate", InitPositions::Interpolate), ("extend", InitPositions::Extend)],
        ),
        learn_sigma: r.choice("init.learn_sigma", &adapt, Adapt::Keep),
    };
    given.then_some(init)
}

pub(super) fn read_lora(r: &mut Reader) -> Option<LoraConfig> {
    let given = r.given("lora");
    if given {
        r.require("lora.rank", "set it to the inner dimension of the adapters, such as 16, or remove [lora]");
    }
    let rank = r.optional_integer("lora.rank", 1..=COUNT).unwrap_or(1) as usize;
    let targets = r.optional_text_list("lora.targets");
    if targets.as_ref().is_some_and(Vec::is_empty) && r.sound(&["lora.targets"]) {
        r.refuse("lora.targets", "is empty", "name linear layers, such as \"attn.qkv\", or remove [lora]");
    }
    let usual = || ["attn.qkv", "attn.proj", "mlp.fc1", "mlp.fc2"].map(str::to_owned).to_vec();
    let lora = LoraConfig {
        rank,
        alpha: r.float("lora.alpha", POSITIVE, rank as f64),
        targets: targets.unwrap_or_else(usual),
        also_train: r.text_list("lora.also_train"),
    };
    given.then_some(lora)
}
