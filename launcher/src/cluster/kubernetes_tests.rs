//! Manifests against what the operator's custom resource definition says of an MPIJob, and the example of docs/CLUSTER.md.
#![allow(clippy::unwrap_used)]

use super::*;
use crate::cli::Nodes;
use crate::machine::Machine;
use crate::plan::Request;
use serde_json::{Value, json};

const LOGIN: Machine = Machine { cores: 2, gpus: 0 };

/// What is wrong with `value`, by place. Knows the words of JSON Schema that the schema uses, and refuses others.
fn mistakes(value: &Value, schema: &Value, root: &Value, place: &str) -> Vec<String> {
    if let Some(name) = schema["$ref"].as_str() {
        return mistakes(value, root.pointer(name.trim_start_matches('#')).unwrap(), root, place);
    }
    let known = [
        "$schema",
        "$comment",
        "$defs",
        "type",
        "required",
        "properties",
        "additionalProperties",
        "items",
        "enum",
        "minimum",
    ];
    assert!(schema.as_object().unwrap().keys().all(|word| known.contains(&word.as_str())), "{place}: {schema}");
    let mut found = Vec::new();
    let is_a = |kind: &Value| match kind.as_str().unwrap() {
        "object" => value.is_object(),
        "array" => value.is_array(),
        "string" => value.is_string(),
        "integer" => value.is_i64() || value.is_u64(),
        "boolean" => value.is_boolean(),
        other => panic!("{other}"),
    };
    let is_right_type = match &schema["type"] {
        Value::Null => true,
        Value::Array(kinds) => kinds.iter().any(is_a),
        kind => is_a(kind),
    };
    let is_listed = schema["enum"].as_array().is_none_or(|values| values.contains(value));
    let is_enough = schema["minimum"].as_i64().is_none_or(|least| value.as_i64().is_none_or(|value| value >= least));
    if !(is_right_type && is_listed && is_enough) {
        found.push(format!("{place}: found {value}"));
    }
    for key in
        schema["required"].as_array().into_iter().flatten().filter(|key| value.get(key.as_str().unwrap()).is_none())
    {
        found.push(format!("{place}: {key} is missing"));
    }
    for (key, value) in value.as_object().into_iter().flatten() {
        let place = format!("{place}.{key}");
        match (schema["properties"].get(key), &schema["additionalProperties"]) {
            (Some(schema), _) => found.extend(mistakes(value, schema, root, &place)),
            (None, Value::Object(_)) => found.extend(mistakes(value, &schema["additionalProperties"], root, &place)),
            (None, _) => found.push(format!("{place}: no such field")),
        }
    }
    for (index, value) in value.as_array().into_iter().flatten().enumerate() {
        found.extend(mistakes(value, &schema["items"], root, &format!("{place}[{index}]")));
    }
    found
}

fn schema() -> Value {
    serde_json::from_str(include_str!("mpijob_schema.json")).unwrap()
}

/// The manifest that the launcher makes of a config on a machine without GPUs.
fn manifest(config: &Path, nodes: usize) -> String {
    let call = TrainerCall {
        program: "/opt/d/trainer".into(),
        config: config.to_owned(),
        overrides: Vec::new(),
        command: "train",
        options: Vec::new(),
    };
    let config = RunConfig::load(config, &[]).unwrap();
    let request = Request { nodes: Some(Nodes::exactly(nodes)), via: Some(Via::Kubernetes), ..Request::default() };
    let plan = Plan::new(&config, &request, &LOGIN).unwrap();
    match for_plan(&plan, &config).start(&plan, &call).unwrap() {
        Start::Handover(handover) => handover.text,
        Start::Engine(command) => panic!("{command:?}"),
    }
}

fn examples() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("../docs/examples")
}

#[test]
fn manifests_are_what_the_custom_resource_definition_asks_for() {
    let folder = tempfile::tempdir().unwrap();
    let bare = folder.path().join("run.toml");
    let text = "run.url = \"s3://b/r\"\ndata.url = \"s3://b/d\"\nmodel.preset = \"DiT-S/2\"\n[train]\nsteps = 7\nmicro_batch = 8\n\
                lanes = 8\n[cluster.kubernetes]\nimage = \"ditharos:1\"\n";
    std::fs::write(&bare, text).unwrap();
    for (config, nodes) in [(bare, 1), (examples().join("kubernetes.toml"), 2)] {
        let list: Value = serde_json::from_str(&manifest(&config, nodes)).unwrap();
        let (map, job) = (&list["items"][0], &list["items"][1]);
        assert_eq!(mistakes(job, &schema(), &schema(), "MPIJob"), [""; 0], "{job:#}");
        // Beyond types: one launcher, volumes that are there, names that pods can have.
        assert_eq!(job["spec"]["mpiReplicaSpecs"]["Launcher"]["replicas"], 1);
        for replica in ["Launcher", "Worker"] {
            let pod = &job["spec"]["mpiReplicaSpecs"][replica]["template"]["spec"];
            let names = |of: &Value| -> Vec<String> {
                of.as_array().unwrap().iter().map(|entry| entry["name"].as_str().unwrap().to_owned()).collect()
            };
            assert_eq!(names(&pod["containers"][0]["volumeMounts"]), names(&pod["volumes"]));
            assert_eq!(pod["volumes"][0]["configMap"]["name"], map["metadata"]["name"]);
        }
        let pod = format!("{}-worker-{}", job["metadata"]["name"].as_str().unwrap(), nodes - 1);
        assert!(
            pod.len() < 64 && pod.bytes().all(|c| c.is_ascii_lowercase() || c.is_ascii_digit() || c == b'-'),
            "{pod}"
        );
    }
}

#[test]
fn what_the_definition_does_not_know_is_found() {
    let list: Value = serde_json::from_str(&manifest(&examples().join("kubernetes.toml"), 2)).unwrap();
    for (pointer, wrong, says) in [
        ("/spec/slotsPerWorker", json!("4"), "MPIJob.spec.slotsPerWorker: found \"4\""),
        ("/spec/runPolicy/cleanPodPolicy", json!("Sometimes"), "cleanPodPolicy: found \"Sometimes\""),
        (
            "/spec/mpiReplicaSpecs/Worker",
            json!({"replicas": 0, "restartPolicy": "Never", "template": {"spec": {}}}),
            "\"containers\" is missing",
        ),
        (
            "/spec/mpiReplicaSpecs/Launcher/template/spec/containers/0",
            json!({"nam": "x"}),
            "containers[0].nam: no such field",
        ),
    ] {
        let mut job = list["items"][1].clone();
        *job.pointer_mut(pointer).unwrap() = wrong;
        let found = mistakes(&job, &schema(), &schema(), "MPIJob");
        assert!(found.iter().any(|mistake| mistake.contains(says)), "{pointer}: {found:?}");
    }
}

#[test]
fn the_example_in_the_docs_is_what_the_launcher_makes() {
    let rendered = manifest(&examples().join("kubernetes.toml"), 2);
    let file = examples().join("kubernetes.json");
    let kept = std::fs::read_to_string(&file).unwrap_or_default();
    let made = std::env::temp_dir().join("ditharos-kubernetes.json");
    if kept != rendered {
        std::fs::write(&made, &rendered).unwrap();
    }
    assert_eq!(kept, rendered, "look at the difference; if it is meant: cp {} {}", made.display(), file.display());
}
