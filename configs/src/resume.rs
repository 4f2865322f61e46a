//! May a run be continued with this config? Which keys differ in a way that would make it another experiment.

use serde_json::Value;

/// One key whose value differs between the run and the config it is to be continued with.
#[derive(Debug, Clone, PartialEq)]
pub struct KeyChange {
    /// Dotted key, e.g. `optimizer.lr`.
    pub key: String,
    /// Value in the run; `Null` if it had none.
    pub old: Value,
    /// Value asked for now; `Null` if there is none.
    pub new: Value,
}

impl std::fmt::Display for KeyChange {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "`{}` was {} and is now {}", self.key, self.old, self.new)
    }
}

/// Keys and (with a dot at the end) sections that may change on resume: they say where and how long a run goes on, where
/// it came from and what is reported, not what is computed. The preset is only a name for dimensions, which are compared
/// themselves.
const FREE: [&str; 22] = [
    "run.",
    "divergence.",
    "init",
    "init.",
    "data.url",
    "data.prefetch_bytes",
    "cache.",
    "data.on_broken",
    "data.skip_budget_rows",
    "data.threads",
    "model.preset",
    "train.device",
    "train.activation_checkpointing",
    "train.sharding",
    "train.sharding_ranks",
    "checkpoint.",
    "validation.",
    "fid.",
    "sample.",
    "log.",
    "collective.",
    "cluster.",
];

/// Differences between the configs of two starts (as given by `RunConfig::to_json`) that make another experiment,
/// in the order of their keys. `train.steps` counts only where the learning rate depends on it.
///
/// Values that the trainer takes from the data set (`model.num_classes` …) are compared as they stand: fill them in
/// before a config is recorded, so that "as the data set says" and the same number written out are equal.
pub fn changed_experiment_keys(old: &Value, new: &Value) -> Vec<KeyChange> {
    let decays = [old, new].iter().any(|config| {
        config.pointer("/optimizer/decay").and_then(Value::as_str).is_some_and(|decay| decay != "constant")
    });
    let free = |key: &str| {
        (key == "train.steps" && !decays)
            || FREE.iter().any(|free| {
                // A section that only one side has is one change.
                key == free.trim_end_matches('.') || (free.ends_with('.') && key.starts_with(free))
            })
    };
    let mut changes = Vec::new();
    compare("", old, new, &mut changes);
    changes.retain(|change| !free(&change.key));
    changes
}

/// Sources of a mix without their places, which may change as `data.url` may.
fn without_urls(sources: &Value) -> Value {
    let mut sources = sources.clone();
    for source in sources.as_array_mut().into_iter().flatten() {
        source.as_object_mut().map(|source| source.remove("url"));
    }
    sources
}

fn compare(key: &str, old: &Value, new: &Value, changes: &mut Vec<KeyChange>) {
    if key == "data.mix" && same(&without_urls(old), &without_urls(new)) {
        return;
    }
    let (Some(old_keys), Some(new_keys)) = (as_section(old), as_section(new)) else {
        if !same(old, new) {
            changes.push(KeyChange { key: key.to_owned(), old: old.clone(), new: new.clone() });
        }
        return;
    };
    let names: std::collections::BTreeSet<&String> = old_keys.chain(new_keys).collect();
    for name in names {
        let child = if key.is_empty() { name.clone() } else { format!("{key}.{name}") };
        compare(&child, &old[name.as_str()], &new[name.as_str()], changes);
    }
}

/// The keys of a section; `None` if the value is not one.
fn as_section(value: &Value) -> Option<Box<dyn Iterator<Item = &String> + '_>> {
    match value {
        Value::Object(map) => Some(Box::new(map.keys())),
        _ => None,
    }
}

/// Equal up to what a trip through JSON text may change: an integral float may come back as an integer, and the last
/// bit of a float may differ.
fn same(old: &Value, new: &Value) -> bool {
    match (old, new) {
        (Value::Number(a), Value::Number(b)) if a.is_f64() || b.is_f64() => match (a.as_f64(), b.as_f64()) {
            (Some(a), Some(b)) => (a - b).abs() <= 4.0 * f64::EPSILON * a.abs().max(b.abs()),
            _ => false,
        },
        (Value::Array(a), Value::Array(b)) => a.len() == b.len() && a.iter().zip(b).all(|(a, b)| same(a, b)),
        (Value::Object(a), Value::Object(b)) => {
            a.len() == b.len() && a.iter().all(|(key, a)| b.get(key).is_some_and(|b| same(a, b)))
        }
        _ => old == new,
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use serde_json::json;

    fn config() -> Value {
        json!({
            "seed": 9007199254740993u64,
            "run": {"url": "file:///a"},
            "data": {"url": "file:///d", "range_rows": 256, "columns": {"id": "id"}},
            "model": {"preset": "DiT-S/2", "depth": 12, "num_classes": null},
            "optimizer": {"lr": 1e-4, "betas": [0.9, 0.999], "decay": "constant"},
            "train": {"steps": 100, "lanes": 4},
            "sample": {"every_steps": 0}, "log": {"every_steps": 10},
            "cluster": {"nodes": 1},
        })
    }

    fn changed(pointer: &str, value: Value) -> Vec<String> {
        let mut new = config();
        if let Some(slot) = new.pointer_mut(pointer) {
            *slot = value;
        }
        changed_experiment_keys(&config(), &new).into_iter().map(|change| change.key).collect()
    }

    #[test]
    fn place_length_and_reporting_may_change() {
        for pointer in ["/run/url", "/data/url", "/sample/every_steps", "/log/every_steps", "/cluster/nodes"] {
            assert_eq!(changed(pointer, json!(7)), [""; 0], "{pointer}");
        }
        assert_eq!(changed("/train/steps", json!(7)), [""; 0]);
        let mut with_cache = config();
        with_cache["cache"] = json!({"dir": null, "bytes": 7});
        assert_eq!(changed_experiment_keys(&config(), &with_cache), []);
        let mut with_validation = config();
        with_validation["validation"] = json!({"url": "file:///v", "rows": 5});
        assert_eq!(changed_experiment_keys(&config(), &with_validation), []);
        assert_eq!(changed_experiment_keys(&with_validation, &config()), []);
        let mut with_policy = config();
        with_policy["divergence"] = json!({"policy": "skip"});
        assert_eq!(changed_experiment_keys(&config(), &with_policy), []);
        assert_eq!(changed("/model/preset", json!(null)), [""; 0]);
        for free in ["/train/activation_checkpointing", "/train/sharding", "/train/sharding_ranks"] {
            let (section, key) = free[1..].split_once('/').unwrap_or_default();
            let mut without = config();
            without[section].as_object_mut().map(|section| section.remove(key));
            let mut with = without.clone();
            with[section][key] = json!(2);
            assert_eq!(changed_experiment_keys(&without, &with), [], "{free}");
        }
        assert_eq!(changed("/optimizer/lr", json!(0.00010000000000000002)), [""; 0]);
    }

    #[test]
    fn where_the_first_weights_came_from_may_change_or_be_left_out() {
        let mut old = config();
        old["init"] = json!({"from": "file:///a", "classes": "new"});
        let mut new = old.clone();
        new["init"]["from"] = json!("file:///b");
        for new in [new, config()] {
            assert_eq!(changed_experiment_keys(&old, &new), []);
            assert_eq!(changed_experiment_keys(&new, &old), []);
        }
        new = old.clone();
        new["lora"] = json!({"rank": 4});
        assert_eq!(changed_experiment_keys(&old, &new)[0].key, "lora");
    }

    #[test]
    fn everything_else_is_named() {
        assert_eq!(changed("/optimizer/lr", json!(2e-4)), ["optimizer.lr"]);
        assert_eq!(changed("/optimizer/betas", json!([0.9, 0.99])), ["optimizer.betas"]);
        assert_eq!(changed("/data/columns/id", json!("key")), ["data.columns.id"]);
        assert_eq!(changed("/model/num_classes", json!(10)), ["model.num_classes"]);
        // Neighbours that one and the same float would stand for.
        assert_eq!(changed("/seed", json!(9007199254740992u64)), ["seed"]);
        let mut rounded = config();
        rounded["train"]["precision"] = json!("bf16");
        assert_eq!(changed_experiment_keys(&config(), &rounded)[0].key, "train.precision");
    }

    #[test]
    fn the_sources_of_a_mix_may_move_but_not_change() {
        let mut old = config();
        old["data"]["mix"] = json!([{"url": "file:///a", "weight": 0.5}, {"url": "file:///b", "weight": 2.0}]);
        let mut new = old.clone();
        new["data"]["mix"][1]["url"] = json!("s3://b");
        assert_eq!(changed_experiment_keys(&old, &new), []);
        new["data"]["mix"][1]["weight"] = json!(1.0);
        let changes = changed_experiment_keys(&old, &new);
        assert_eq!(changes.iter().map(|change| change.key.as_str()).collect::<Vec<_>>(), ["data.mix"]);
        assert_eq!(changed_experiment_keys(&config(), &old)[0].key, "data.mix");
    }

    #[test]
    fn steps_count_when_the_learning_rate_depends_on_them() {
        let mut old = config();
        old["optimizer"]["decay"] = json!("cosine");
        let mut new = old.clone();
        new["train"]["steps"] = json!(200);
        let changes = changed_experiment_keys(&old, &new);
        assert_eq!(changes, [KeyChange { key: "train.steps".into(), old: json!(100), new: json!(200) }]);
        assert_eq!(changes[0].to_string(), "`train.steps` was 100 and is now 200");
    }

    #[test]
    fn keys_that_only_one_side_has_are_named() {
        let mut new = config();
        new["train"]["extra"] = json!(1);
        new["ema"] = json!({"decay": 0.9});
        let keys: Vec<String> = changed_experiment_keys(&config(), &new).into_iter().map(|c| c.key).collect();
        assert_eq!(keys, ["ema", "train.extra"]);
    }
}
