#![allow(clippy::unwrap_used)]

use super::*;

const LAPTOP: Machine = Machine { cores: 6, gpus: 0 };
const GPU_NODE: Machine = Machine { cores: 96, gpus: 8 };

fn config(lanes: usize, overrides: &[&str]) -> RunConfig {
    let folder = tempfile::tempdir().unwrap();
    let file = folder.path().join("run.toml");
    let text = format!(
        "run.url = \"s3://key:hunter2@bucket/r\"\ndata.url = \"/d\"\nmodel.preset = \"DiT-S/2\"\n[train]\nsteps = 7\nmicro_batch = 8\nlanes = {lanes}\n"
    );
    std::fs::write(&file, text).unwrap();
    let overrides: Vec<String> = overrides.iter().map(|text| text.to_string()).collect();
    RunConfig::load(&file, &overrides).unwrap()
}

fn request(nodes: Option<usize>, procs_per_node: Option<usize>) -> Request {
    Request { nodes: nodes.map(Nodes::exactly), procs_per_node, ..Request::default() }
}

/// (nodes, procs_per_node, lanes_per_rank, idle nodes)
fn layout(plan: &Plan) -> (usize, usize, usize, usize) {
    (plan.nodes, plan.procs_per_node, plan.lanes_per_rank, plan.idle_nodes.len())
}

#[test]
fn ranks_per_node_follow_the_machine_rounded_down_to_fit() {
    let plan = |lanes, machine: &Machine, overrides: &[&str]| {
        layout(&Plan::new(&config(lanes, overrides), &Request::default(), machine).unwrap())
    };
    assert_eq!(plan(16, &LAPTOP, &[]), (1, 4, 4, 0)); // 6 cores → 4 ranks
    assert_eq!(plan(16, &LAPTOP, &["train.threads_per_rank=2"]), (1, 2, 8, 0)); // 3 → 2
    assert_eq!(plan(16, &LAPTOP, &["train.threads_per_rank=12"]), (1, 1, 16, 0)); // more threads than cores → 1
    assert_eq!(plan(2, &LAPTOP, &[]), (1, 2, 1, 0)); // no more ranks than lanes
    assert_eq!(plan(16, &GPU_NODE, &[]), (1, 8, 2, 0)); // one rank per GPU
    assert_eq!(plan(256, &GPU_NODE, &["train.device=cpu"]), (1, 64, 4, 0)); // 96 cores
    assert_eq!(plan(16, &LAPTOP, &["cluster.procs_per_node=1"]), (1, 1, 16, 0));
}

#[test]
fn fast_sums_run_on_every_divisor_of_the_lanes_and_say_what_that_costs() {
    let fast = config(12, &["reduction=fast"]);
    let plan = |nodes, procs, machine| Plan::new(&fast, &request(nodes, procs), machine).unwrap();
    assert_eq!(layout(&plan(None, None, &LAPTOP)), (1, 6, 2, 0));
    assert_eq!(layout(&plan(Some(3), None, &GPU_NODE)), (3, 4, 1, 0));
    assert_eq!(layout(&plan(Some(5), Some(3), &GPU_NODE)), (4, 3, 1, 1));
    assert_eq!(plan(None, Some(3), &LAPTOP).allowed_world_sizes, [1, 2, 3, 4, 6, 12]);
    let notes = plan(None, Some(3), &LAPTOP).notes;
    assert!(notes[0].contains("the same bits only from starts on 3 ranks"), "{notes:?}");
    let refused = Plan::new(&fast, &request(None, Some(5)), &LAPTOP).unwrap_err().to_string();
    assert!(refused.contains("allowed world sizes are 1, 2, 3, 4, 6, 12"), "{refused}");
}

#[test]
fn sampling_takes_any_number_of_ranks() {
    let plan = |procs, machine| {
        let request = Request { job: Job::Sample, ..request(Some(3), procs) };
        layout(&Plan::new(&config(4, &[]), &request, machine).unwrap())
    };
    assert_eq!(plan(None, &LAPTOP), (3, 6, 0, 0));
    assert_eq!(plan(Some(5), &LAPTOP), (3, 5, 0, 0));
    assert_eq!(plan(None, &GPU_NODE), (3, 8, 0, 0));
}

#[test]
fn nodes_that_do_not_fit_a_power_of_two_idle_and_are_named() {
    let plan = |nodes, procs| Plan::new(&config(16, &[]), &request(Some(nodes), procs), &GPU_NODE).unwrap();
    assert_eq!(layout(&plan(4, None)), (4, 4, 1, 0)); // 8 GPUs each, but 16 lanes
    assert_eq!(layout(&plan(3, Some(2))), (2, 2, 4, 1));
    assert_eq!(layout(&plan(8, Some(8))), (2, 8, 1, 6));
    assert_eq!(plan(3, Some(2)).idle_nodes, [2]);
    let hosts = Request { hosts: vec!["ada".into(), "bob".into(), "cy".into()], ..Request::default() };
    let named = Plan::new(&config(16, &[]), &hosts, &GPU_NODE).unwrap();
    assert!(named.notes[0].contains("cy idle"), "{:?}", named.notes);
}

#[test]
fn the_numbers_of_a_plan_fit_together_for_any_request() {
    for lanes in [1, 2, 8, 64] {
        for nodes in 1..=9 {
            for procs in [None, Some(1), Some(2), Some(4)] {
                let Ok(plan) = Plan::new(&config(lanes, &[]), &request(Some(nodes), procs), &LAPTOP) else {
                    assert!(procs.is_some_and(|procs| procs > lanes), "{lanes} lanes, {nodes} nodes, {procs:?}");
                    continue;
                };
                assert_eq!(plan.world_size, plan.nodes * plan.procs_per_node);
                assert_eq!(plan.lanes, plan.world_size * plan.lanes_per_rank);
                assert_eq!(plan.nodes + plan.idle_nodes.len(), nodes);
                assert!(plan.allowed_world_sizes.contains(&plan.world_size));
                assert!(procs.is_none_or(|procs| procs == plan.procs_per_node));
            }
        }
    }
}

#[test]
fn a_world_size_that_is_not_allowed_is_refused_with_those_that_are() {
    for procs in [3, 8] {
        let error = Plan::new(&config(4, &[]), &request(None, Some(procs)), &LAPTOP).unwrap_err();
        assert!(matches!(error, PlanError::WorldSize { world_size, .. } if world_size == procs), "{error:?}");
        assert!(error.to_string().contains("allowed world sizes are 1, 2, 4;"), "{error}");
    }
}

#[test]
fn cuda_that_is_not_there_is_refused_before_anything_starts() {
    let error = Plan::new(&config(4, &["train.device=cuda"]), &Request::default(), &LAPTOP).unwrap_err();
    assert_eq!(error, PlanError::NoGpu);
    assert_eq!(Plan::new(&config(4, &[]), &Request::default(), &LAPTOP).unwrap().device, Device::Cpu);
    assert_eq!(Plan::new(&config(4, &[]), &Request::default(), &GPU_NODE).unwrap().device, Device::Cuda);
}

#[test]
fn fewer_host_names_than_nodes_are_refused() {
    let request = Request { nodes: Some(Nodes::exactly(3)), hosts: vec!["ada".into()], ..Request::default() };
    assert!(matches!(Plan::new(&config(4, &[]), &request, &LAPTOP), Err(PlanError::Hosts { nodes: 3, .. })));
}

#[test]
fn too_many_threads_are_remarked() {
    let crowded = Plan::new(&config(8, &[]), &request(None, Some(8)), &LAPTOP).unwrap();
    assert!(crowded.notes[0].contains("8 threads share 6 cores"), "{:?}", crowded.notes);
    assert!(Plan::new(&config(8, &[]), &request(None, Some(4)), &LAPTOP).unwrap().notes.is_empty());
}

#[test]
fn a_plan_holds_no_secret() {
    let plan = Plan::new(&config(4, &[]), &Request::default(), &LAPTOP).unwrap();
    assert_eq!(plan.run_url, "s3://bucket/r");
}
