//! Kubernetes: an MPIJob of the Kubeflow MPI operator (v2beta1), whose launcher pod runs this launcher over its host file.

use std::ffi::OsString;
use std::path::Path;

use configs::{Device, RunConfig, Urls, location};
use serde_json::{Value, json};

use super::{Cluster, ClusterError, Handover, Start, TrainerCall};
use crate::cli::Via;
use crate::plan::{Job, Plan};

/// Where the operator puts the names of the workers.
const HOSTFILE: &str = "/etc/mpi/hostfile";
/// Where the config is mounted in the pods.
const CONFIG_FOLDER: &str = "/etc/ditharos";
/// Where the image has the binaries; see the project's Dockerfile.
const BINARIES: &str = "/opt/ditharos/bin";
/// Seconds that pods have to save when they are asked to go.
const GRACE_S: u64 = 300;

/// A Kubernetes cluster with the MPI operator.
pub struct Kubernetes {
    pub config: RunConfig,
}

impl Cluster for Kubernetes {
    fn start(&self, plan: &Plan, trainer: &TrainerCall) -> Result<Start, ClusterError> {
        let via = Via::Kubernetes;
        if !plan.hosts.is_empty() {
            return Err(ClusterError::Hosts { via });
        }
        if plan.job != Job::Train {
            return Err(ClusterError::NotTraining { via });
        }
        let remedy = "cluster.kubernetes.secret";
        if location::redact(&self.config.run.url) != self.config.run.url {
            return Err(ClusterError::Secret { key: "run.url", remedy });
        }
        let data = &self.config.data.url;
        if data.as_ref().map(Urls::redacted) != *data {
            return Err(ClusterError::Secret { key: "data.url", remedy });
        }
        let advice = "the image that the project's Dockerfile makes";
        let image = self.config.cluster.kubernetes.image.as_ref();
        let image = image.ok_or(ClusterError::Missing { via, key: "cluster.kubernetes.image", advice })?;
        let objects = json!({
            "apiVersion": "v1",
            "kind": "List",
            "items": [self.config_map(trainer)?, self.job(plan, trainer, image)],
        });
        // JSON is YAML, and kubectl takes both.
        Ok(Start::Handover(Handover { text: format!("{objects:#}\n"), submit: Vec::new() }))
    }
}

impl Kubernetes {
    fn metadata(&self) -> Value {
        let kubernetes = &self.config.cluster.kubernetes;
        match &kubernetes.namespace {
            Some(namespace) => json!({"name": kubernetes.name, "namespace": namespace}),
            None => json!({"name": kubernetes.name}),
        }
    }

    /// The config's text as it is; overrides are arguments of the launcher in the pod.
    fn config_map(&self, trainer: &TrainerCall) -> Result<Value, ClusterError> {
        let path = trainer.config.display().to_string();
        let text = std::fs::read_to_string(&trainer.config)
            .map_err(|error| ClusterError::Config { path, reason: error.to_string() })?;
        Ok(json!({"apiVersion": "v1", "kind": "ConfigMap", "metadata": self.metadata(), "data": {"run.toml": text}}))
    }

    fn job(&self, plan: &Plan, trainer: &TrainerCall, image: &str) -> Value {
        let config = format!("{CONFIG_FOLDER}/run.toml");
        let mut command: Vec<OsString> = trainer.launcher(Path::new(&config));
        command[0] = format!("{BINARIES}/launcher").into();
        let sizes = ["--nodes", &plan.nodes.to_string(), "--procs-per-node", &plan.procs_per_node.to_string()]
            .map(OsString::from);
        command.extend(["--via", "mpirun", "--hostfile", HOSTFILE].map(OsString::from).into_iter().chain(sizes));
        let command: Vec<String> = command.iter().map(|argument| argument.to_string_lossy().into_owned()).collect();
        let gpus =
            (plan.device == Device::Cuda).then(|| self.config.cluster.gpus_per_node.unwrap_or(plan.procs_per_node));
        let cores = plan.procs_per_node * plan.threads_per_rank;
        let resources = match gpus {
            Some(gpus) => json!({"limits": {"nvidia.com/gpu": gpus}, "requests": {"cpu": cores.to_string()}}),
            None => json!({"requests": {"cpu": cores.to_string()}}),
        };
        let replica = |replicas: usize, command: Value, resources: Value| {
            json!({
                "replicas": replicas,
                "restartPolicy": "OnFailure",
                "template": {"spec": {
                    "terminationGracePeriodSeconds": GRACE_S,
                    "volumes": self.volumes(),
                    "containers": [{
                        "name": "ditharos", "image": image, "command": command, "resources": resources,
                        "env": [{"name": "OMPI_MCA_orte_keep_fqdn_hostnames", "value": "true"}],
                        "envFrom": self.secret(),
                        "volumeMounts": self.mounts(),
                    }],
                }},
            })
        };
        json!({
            "apiVersion": "kubeflow.org/v2beta1",
            "kind": "MPIJob",
            "metadata": self.metadata(),
            "spec": {
                "slotsPerWorker": plan.procs_per_node,
                "mpiImplementation": "OpenMPI",
                // A launcher that has saved (75) or failed is started again, and resumes.
                "runPolicy": {"cleanPodPolicy": "Running", "backoffLimit": 1000},
                "mpiReplicaSpecs": {
                    "Launcher": replica(1, json!(command), json!({})),
                    "Worker": replica(plan.nodes, json!(["/usr/sbin/sshd", "-De"]), resources),
                },
            },
        })
    }

    fn claims(&self) -> impl Iterator<Item = (&str, &str)> {
        self.config.cluster.kubernetes.claims.iter().filter_map(|claim| claim.split_once(':'))
    }

    fn volumes(&self) -> Value {
        let config = json!({"name": "config", "configMap": {"name": self.config.cluster.kubernetes.name}});
        // Ranks of a pod talk through shared memory, of which a container has 64 MB.
        let shared = json!({"name": "shared-memory", "emptyDir": {"medium": "Memory"}});
        let claims = self.claims().enumerate().map(|(index, (claim, _))| {
            json!({"name": format!("claim-{index}"), "persistentVolumeClaim": {"claimName": claim}})
        });
        [config, shared].into_iter().chain(claims).collect()
    }

    fn mounts(&self) -> Value {
        let config = json!({"name": "config", "mountPath": CONFIG_FOLDER, "readOnly": true});
        let shared = json!({"name": "shared-memory", "mountPath": "/dev/shm"});
        let claims = self
            .claims()
            .enumerate()
            .map(|(index, (_, path))| json!({"name": format!("claim-{index}"), "mountPath": path}));
        [config, shared].into_iter().chain(claims).collect()
    }

    fn secret(&self) -> Value {
        let secret = self.config.cluster.kubernetes.secret.iter();
        secret.map(|name| json!({"secretRef": {"name": name}})).collect()
    }
}
