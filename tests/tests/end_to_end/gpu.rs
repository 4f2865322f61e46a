//! What needs GPUs: run by `./dev test --gpu`, which says how many there are.

use crate::experiment::Experiment;

#[test]
#[ignore = "needs GPUs: ./dev test --gpu"]
fn training_on_real_gpus_gives_the_same_bits_on_one_and_on_several() {
    let Some(gpus) = std::env::var("DITHAROS_GPUS").ok().and_then(|gpus| gpus.parse::<usize>().ok()) else {
        eprintln!("skipped: no GPUs; this is a part of ./dev test --gpu");
        return;
    };
    let experiment = Experiment::new();
    let on_gpu = ["train.device=\"cuda\""];
    experiment.train(1, "alone", &on_gpu);
    for ranks in [2, 4].into_iter().filter(|ranks| *ranks <= gpus) {
        let run = format!("run-{ranks}");
        experiment.train(ranks, &run, &on_gpu);
        assert_eq!(experiment.digest(&run), experiment.digest("alone"), "{ranks} GPUs");
    }
}
