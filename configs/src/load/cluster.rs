//! `[cluster]`.

use super::COUNT;
use crate::cluster::{Bind, ClusterConfig, KubernetesConfig, SlurmConfig, SlurmMpi};
use crate::lanes::MAX_LANES;
use crate::reader::Reader;

pub(super) fn read(r: &mut Reader) -> ClusterConfig {
    let hosts = r.text_list("cluster.hosts");
    for host in &hosts {
        refuse_unless(r, "cluster.hosts", host, is_name, "give host names or IPv4 addresses");
    }
    ClusterConfig {
        nodes: r.integer("cluster.nodes", 1..=MAX_LANES as u64, 1) as usize,
        procs_per_node: r.optional_integer("cluster.procs_per_node", 1..=MAX_LANES as u64).map(|procs| procs as usize),
        hosts,
        gpus_per_node: r.optional_integer("cluster.gpus_per_node", 0..=1024).map(|gpus| gpus as usize),
        cores_per_node: r.optional_integer("cluster.cores_per_node", 1..=COUNT).map(|cores| cores as usize),
        interface: name(r, "cluster.interface", "give the name of a network interface, such as eth0"),
        remote_shell: name(r, "cluster.remote_shell", "give a program that is called like ssh, without arguments")
            .unwrap_or_else(|| "ssh".to_owned()),
        bind: r.choice("cluster.bind", &[("none", Bind::None), ("core", Bind::Core)], Bind::None),
        restarts: r.optional_integer("cluster.restarts", 0..=1_000_000).map(|restarts| restarts as u32),
        silence_s: r.integer("cluster.silence_s", 0..=86_400, 30),
        slurm: slurm(r),
        kubernetes: kubernetes(r),
    }
}

fn slurm(r: &mut Reader) -> SlurmConfig {
    let options = r.text_list("cluster.slurm.options");
    for option in &options {
        let is_option = |text: &str| text.starts_with("--") && is_one_line(text);
        refuse_unless(r, "cluster.slurm.options", option, is_option, "give options such as \"--mem=0\"");
    }
    let advice = "give it as sbatch takes it";
    SlurmConfig {
        partition: name(r, "cluster.slurm.partition", advice),
        account: name(r, "cluster.slurm.account", advice),
        qos: name(r, "cluster.slurm.qos", advice),
        constraint: text(r, "cluster.slurm.constraint", is_one_line, advice),
        time: text(
            r,
            "cluster.slurm.time",
            is_time,
            "give it as Slurm writes it, such as \"1-12:00:00\" or \"90\" (minutes)",
        ),
        save_before_end_s: r.integer("cluster.slurm.save_before_end_s", 1..=65_535, 120),
        chain: r.integer("cluster.slurm.chain", 1..=10_000, 1) as usize,
        mpi: r.choice("cluster.slurm.mpi", &[("pmix", SlurmMpi::Pmix), ("none", SlurmMpi::None)], SlurmMpi::Pmix),
        options,
    }
}

fn kubernetes(r: &mut Reader) -> KubernetesConfig {
    let claims = r.text_list("cluster.kubernetes.claims");
    for claim in &claims {
        let is_claim = |text: &str| {
            text.split_once(':')
                .is_some_and(|(claim, path)| is_label(claim) && path.starts_with('/') && is_one_line(path))
        };
        refuse_unless(r, "cluster.kubernetes.claims", claim, is_claim, "give \"CLAIM:/PATH\"");
    }
    let advice = "give lower-case letters, digits and hyphens, at most 63";
    KubernetesConfig {
        image: text(r, "cluster.kubernetes.image", is_one_line, "give the image's name"),
        name: text(r, "cluster.kubernetes.name", is_label, advice).unwrap_or_else(|| "ditharos".to_owned()),
        namespace: text(r, "cluster.kubernetes.namespace", is_label, advice),
        claims,
        secret: text(r, "cluster.kubernetes.secret", is_label, advice),
    }
}

fn name(r: &mut Reader, key: &'static str, advice: &str) -> Option<String> {
    text(r, key, is_name, advice)
}

fn text(r: &mut Reader, key: &'static str, is_valid: impl Fn(&str) -> bool, advice: &str) -> Option<String> {
    let text = r.optional_text(key)?;
    refuse_unless(r, key, &text, is_valid, advice).then_some(text)
}

fn refuse_unless(r: &mut Reader, key: &str, text: &str, is_valid: impl Fn(&str) -> bool, advice: &str) -> bool {
    let is_valid = is_valid(text);
    if !is_valid {
        r.refuse(key, format!("holds {text:?}, which cannot be one"), advice);
    }
    is_valid
}

/// What programs take for a name, a path or an address, and never for an option or for several words.
fn is_name(text: &str) -> bool {
    !text.is_empty()
        && !text.starts_with('-')
        && text.chars().all(|c| c.is_ascii_alphanumeric() || "._-/@+".contains(c))
}

/// A label of RFC 1123.
fn is_label(text: &str) -> bool {
    let is_inner = |c: char| c.is_ascii_lowercase() || c.is_ascii_digit() || c == '-';
    (1..=63).contains(&text.len()) && text.chars().all(is_inner) && !text.starts_with('-') && !text.ends_with('-')
}

fn is_one_line(text: &str) -> bool {
    !text.is_empty() && !text.chars().any(char::is_control)
}

fn is_time(text: &str) -> bool {
    !text.is_empty() && text.chars().all(|c| c.is_ascii_digit() || c == ':' || c == '-')
}
