#![allow(clippy::unwrap_used)]

use super::*;
use crate::cli::Nodes;
use crate::machine::Machine;
use crate::plan::Request;

const GPU_NODE: Machine = Machine { cores: 96, gpus: 8 };

fn config(overrides: &[&str]) -> RunConfig {
    let folder = tempfile::tempdir().unwrap();
    let file = folder.path().join("run.toml");
    let text = "run.url = \"s3://bucket/r\"\ndata.url = \"s3://bucket/d\"\nmodel.preset = \"DiT-XL/2\"\n[train]\nsteps = 400\nmicro_batch = 8\n\
                lanes = 4096\n";
    std::fs::write(&file, text).unwrap();
    let overrides: Vec<String> = overrides.iter().map(|text| text.to_string()).collect();
    RunConfig::load(&file, &overrides).unwrap()
}

fn forecast(nodes: usize, overrides: &[&str]) -> (Plan, Forecast) {
    let config = config(overrides);
    let request = Request { nodes: Some(Nodes::exactly(nodes)), ..Request::default() };
    let plan = Plan::new(&config, &request, &GPU_NODE).unwrap();
    let asked = Asked { hardware: Some("a100".to_owned()), ..Asked::default() };
    let forecast = Forecast::new(&config, &plan, &asked).unwrap().unwrap();
    (plan, forecast)
}

fn shown(plan: &Plan, forecast: &Forecast) -> String {
    let mut out = Vec::new();
    forecast.show(plan, &mut out).unwrap();
    String::from_utf8(out).unwrap()
}

#[test]
fn every_number_of_gpus_has_a_forecast_that_fits_a_screen() {
    for nodes in [1, 2, 8, 512] {
        let (plan, forecast) = forecast(nodes, &[]);
        assert_eq!(plan.world_size, 8 * nodes);
        let text = shown(&plan, &forecast);
        assert!(text.lines().count() <= 12, "{text}");
        assert!(text.contains("675.1 million parameters") && text.contains("not a measurement"), "{text}");
        assert_eq!(text.contains("NIC"), nodes > 1, "{text}");
        assert!(text.contains("for want of a data set"), "{text}");
    }
}

#[test]
fn what_does_not_fit_is_told_with_the_quickest_change_that_makes_it_fit() {
    let (plan, large) = forecast(1, &["train.micro_batch=128", "train.lanes=64"]);
    assert_eq!(large.fits, Some(false));
    let change = large.first_change.clone().unwrap();
    assert!(change.fits && change.same_bits && change.peak_bytes <= large.budget_bytes.unwrap());
    let quicker = large.tried.iter().filter(|other| other.fits && other.same_bits && other.step_s < change.step_s);
    assert_eq!(quicker.count(), 0);
    assert!(shown(&plan, &large).contains(&format!("change first  --set {}", change.set[0])));
    // The change does what it says.
    let changed: Vec<&str> =
        ["train.micro_batch=128", "train.lanes=64"].into_iter().chain(change.set.iter().map(String::as_str)).collect();
    let (_, changed) = forecast(1, &changed);
    assert_eq!((changed.fits, changed.memory.peak_bytes), (Some(true), change.peak_bytes));
    let (plan, hopeless) = forecast(1, &["model.hidden_size=16384", "model.num_heads=128", "train.lanes=8"]);
    assert!(hopeless.first_change.is_none());
    assert!(shown(&plan, &hopeless).contains("none suffices"));
}

#[test]
fn what_nvidia_smi_says_is_read() {
    assert_eq!(
        gpu_of("NVIDIA H100 80GB HBM3, 81559\nNVIDIA H100 80GB HBM3, 81559\n"),
        Some(("NVIDIA H100 80GB HBM3".to_owned(), 81559 << 20))
    );
    assert_eq!(gpu_of("No devices were found\n"), None);
}
