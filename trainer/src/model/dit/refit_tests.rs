#![allow(clippy::unwrap_used)]

use super::*;
use crate::model::dit::Dit;
use crate::model::{Model, sin_cos_2d};
use tch::{Device, Kind};

fn config(change: impl Fn(&mut DitConfig)) -> DitConfig {
    let mut config = crate::model::testing::tiny_dit().config().clone();
    change(&mut config);
    config
}

fn keep() -> InitConfig {
    InitConfig {
        from: "file:///base".to_owned(),
        weights: "ema".to_owned(),
        classes: InitClasses::Keep,
        null_class: Adapt::Keep,
        positions: None,
        learn_sigma: Adapt::Keep,
    }
}

/// Every element of the source is its index, every fresh one −1.
fn refit(from: &DitConfig, to: &DitConfig, how: &InitConfig, name: &str) -> Refitted {
    refit_untold(Some(from), from, to, how, name)
}

fn refit_untold(told: Option<&DitConfig>, from: &DitConfig, to: &DitConfig, how: &InitConfig, name: &str) -> Refitted {
    let spec = |config: &DitConfig| {
        let params = Dit::new(config.clone()).unwrap().named_params();
        params.into_iter().find(|(other, _)| other == name).unwrap().1
    };
    let (source, target) = (spec(from), spec(to));
    let tensor = Tensor::arange(source.numel() as i64, (Kind::Float, Device::Cpu)).view(source.shape.as_slice());
    let fresh = || Tensor::full(target.shape.as_slice(), -1.0, (Kind::Float, Device::Cpu));
    let refitted = Refit { from: told, to, how }.parameter(name, tensor, &target, &fresh);
    if let Ok((tensor, _)) = &refitted {
        assert_eq!(tensor.size(), target.shape);
    }
    refitted
}

fn value(tensor: &Tensor, row: i64) -> f64 {
    tensor.get(row).reshape([-1]).double_value(&[0])
}

const LABELS: &str = "y_embedder.embedding_table.weight";

#[test]
fn a_new_label_table_keeps_the_null_row_where_both_have_one() {
    let (seven, ten) = (config(|_| {}), config(|c| c.num_classes = 10));
    let refused = refit(&seven, &ten, &keep(), LABELS).unwrap_err();
    assert!(refused.contains("7 classes; expected 10") && refused.contains("init.classes = \"new\""), "{refused}");
    let new = InitConfig { classes: InitClasses::New, ..keep() };
    // Also with as many classes: they are asked to be others.
    for to in [&ten, &seven] {
        for told in [Some(&seven), None] {
            if told.is_none() && to.num_classes == 7 {
                continue;
            }
            let (table, change) = refit_untold(told, &seven, to, &new, LABELS).unwrap();
            assert!((0..to.num_classes).all(|row| value(&table, row) == -1.0));
            assert_eq!(value(&table, to.num_classes), 7.0 * 36.0);
            assert!(change.unwrap().untrained);
        }
    }
}

#[test]
fn the_null_row_comes_and_goes_only_when_asked() {
    let (with, without) = (config(|_| {}), config(|c| c.class_dropout_prob = 0.0));
    assert!(refit(&with, &with, &keep(), LABELS).unwrap().1.is_none());
    for (from, to) in [(&with, &without), (&without, &with)] {
        let refused = refit(from, to, &keep(), LABELS).unwrap_err();
        assert!(refused.contains("init.null_class = \"adapt\""), "{refused}");
    }
    let adapt = InitConfig { null_class: Adapt::Adapt, ..keep() };
    let (table, change) = refit(&without, &with, &adapt, LABELS).unwrap();
    assert_eq!((value(&table, 6), value(&table, 7)), (6.0 * 36.0, -1.0));
    assert!(change.unwrap().untrained);
    let (table, change) = refit(&with, &without, &adapt, LABELS).unwrap();
    assert_eq!((table.size()[0], value(&table, 6)), (7, 6.0 * 36.0));
    assert!(!change.unwrap().untrained);
}

#[test]
fn positions_of_another_grid_are_interpolated_or_extended_when_asked() {
    let (small, large) = (config(|_| {}), config(|c| c.input_size = 16));
    let refused = refit(&small, &large, &keep(), "pos_embed").unwrap_err();
    assert!(refused.contains("4×4") && refused.contains("8×8") && refused.contains("init.positions"), "{refused}");
    let table = |positions| {
        let how = InitConfig { positions: Some(positions), ..keep() };
        let (table, change) = refit(&small, &large, &how, "pos_embed").unwrap();
        assert!(!change.unwrap().untrained);
        Vec::<f32>::try_from(table.reshape([-1])).unwrap()
    };
    let of = |dim: usize, grid: i64, token: usize| {
        sin_cos_2d(dim as i64, grid)[token * dim..(token + 1) * dim].iter().map(|v| *v as f32).collect::<Vec<_>>()
    };
    let extended = table(InitPositions::Extend);
    assert_eq!(extended[..], (0..64).flat_map(|token| of(36, 8, token)).collect::<Vec<_>>());
    // Every second token of the finer grid lies where a token of the coarse one lay: (2, 6) on (1, 3).
    let interpolated = table(InitPositions::Interpolate);
    assert_eq!(interpolated[(2 * 8 + 6) * 36..][..36], of(36, 4, 4 + 3));
    assert!((interpolated[36] - 0.5f32.sin()).abs() < 1e-6, "token (0, 1) lies at column ½");
    // With the same grid the source's table is taken as it is.
    assert!(refit(&small, &small, &keep(), "pos_embed").unwrap().1.is_none());
}

#[test]
fn the_variance_comes_and_goes_only_when_asked() {
    let (with, without) = (config(|_| {}), config(|c| c.learn_sigma = false));
    for name in ["final_layer.linear.weight", "final_layer.linear.bias"] {
        let refused = refit(&with, &without, &keep(), name).unwrap_err();
        assert!(refused.contains("init.learn_sigma = \"adapt\""), "{refused}");
        let adapt = InitConfig { learn_sigma: Adapt::Adapt, ..keep() };
        // Rows are [patch pixel, channel]: of 4 × 8 rows the first 4 of every 8 stay.
        let width = if name.ends_with("bias") { 1.0 } else { 36.0 };
        let (dropped, _) = refit(&with, &without, &adapt, name).unwrap();
        assert_eq!([3, 4, 15].map(|row| value(&dropped, row)), [3.0, 8.0, 27.0].map(|row| row * width));
        let (added, change) = refit(&without, &with, &adapt, name).unwrap();
        assert_eq!([3, 4, 8, 31].map(|row| value(&added, row)), [3.0 * width, -1.0, 4.0 * width, -1.0]);
        assert!(change.unwrap().untrained);
    }
}

#[test]
fn what_nothing_bridges_is_named() {
    let to = config(|_| {});
    let from = config(|c| {
        c.num_heads = 4;
        c.in_channels = 3;
    });
    let how = keep();
    let contradictions = Refit { from: Some(&from), to: &to, how: &how }.contradictions();
    assert_eq!(
        contradictions,
        ["`model.in_channels` is 4, but 3 in the source", "`model.num_heads` is 3, but 4 in the source"]
    );
    let refused = refit(&from, &to, &how, "x_embedder.proj.weight").unwrap_err();
    assert_eq!(refused, "has shape [36, 3, 2, 2]; expected [36, 4, 2, 2]");
    let unrelated = refit(&from, &to, &InitConfig { learn_sigma: Adapt::Adapt, ..keep() }, "final_layer.linear.bias");
    assert!(unrelated.unwrap_err().contains("expected 32 rows"));
}
