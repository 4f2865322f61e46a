//! A model for unit tests.
#![allow(clippy::unwrap_used)]

use super::dit::Dit;

/// Two blocks, odd widths.
pub(crate) fn tiny_dit() -> Dit {
    let config = serde_json::json!({
        "input_size": 8, "in_channels": 4, "patch_size": 2, "hidden_size": 36, "depth": 2, "num_heads": 3,
        "mlp_ratio": 4.0, "class_dropout_prob": 0.1, "num_classes": 7, "learn_sigma": true,
    });
    Dit::new(serde_json::from_value(config).unwrap()).unwrap()
}
