//! What the engine that started this process says about it.

use std::fmt::Display;
use std::str::FromStr;

/// Where a process stands among the others.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Seat {
    pub world_size: usize,
    pub local_rank: usize,
    pub local_size: usize,
}

/// A place where ranks meet that no MPI launcher has introduced to each other.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Meeting {
    pub rank: usize,
    pub seat: Seat,
    /// Of rank 0.
    pub host: String,
    pub port: u16,
}

/// What started this process.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) enum Started {
    Alone,
    /// An MPI launcher; MPI itself knows the rank.
    Mpi(Seat),
    /// Slurm, Kubernetes or a launcher like torchrun.
    Tcp(Meeting),
}

/// Names the meeting place where Slurm does not (`host:port`).
pub(crate) const RENDEZVOUS: &str = "DITHAROS_RENDEZVOUS";

/// What this process's environment says.
///
/// # Errors
/// Variables that contradict each other or are missing, by name.
pub(crate) fn started() -> Result<Started, String> {
    Environment(&|name| std::env::var(name).ok()).started()
}

struct Environment<'a>(&'a dyn Fn(&str) -> Option<String>);

impl Environment<'_> {
    fn started(&self) -> Result<Started, String> {
        let mut started = Started::Alone;
        for engine in [Self::mpi, Self::torchrun, Self::slurm] {
            if let Some(by_engine) = engine(self)? {
                started = by_engine;
                break;
            }
        }
        Ok(match started {
            Started::Mpi(Seat { world_size: 1, .. })
            | Started::Tcp(Meeting { seat: Seat { world_size: 1, .. }, .. }) => Started::Alone,
            Started::Tcp(Meeting { rank, seat: Seat { world_size, .. }, .. }) if rank >= world_size => {
                return Err(format!("this is rank {rank} of {world_size}; expected a rank below {world_size}"));
            }
            started => started,
        })
    }

    /// mpirun of Open MPI or MPICH.
    fn mpi(&self) -> Result<Option<Started>, String> {
        let Some(world_size) = self.number(&["OMPI_COMM_WORLD_SIZE", "PMI_SIZE"])? else { return Ok(None) };
        let local_rank = self.number(&["OMPI_COMM_WORLD_LOCAL_RANK", "MPI_LOCALRANKID"])?.unwrap_or(0);
        let local_size = self.number(&["OMPI_COMM_WORLD_LOCAL_SIZE", "MPI_LOCALNRANKS"])?.unwrap_or(1);
        Ok(Some(Started::Mpi(Seat { world_size, local_rank, local_size })))
    }

    /// torchrun, and Kubernetes operators that set the same variables. A plain indexed job has its index for a rank.
    fn torchrun(&self) -> Result<Option<Started>, String> {
        let Some(world_size) = self.number(&["WORLD_SIZE"])? else { return Ok(None) };
        let Some(rank) = self.number(&["RANK", "JOB_COMPLETION_INDEX"])? else { return Ok(None) };
        let local_rank = self.number(&["LOCAL_RANK"])?.unwrap_or(0);
        let local_size = self.number(&["LOCAL_WORLD_SIZE"])?.unwrap_or(1);
        let seat = Seat { world_size, local_rank, local_size };
        let (host, port) = match (self.named_meeting()?, self.text("MASTER_ADDR"), self.number(&["MASTER_PORT"])?) {
            (Some(meeting), _, _) => meeting,
            (None, Some(host), Some(port)) => (host, port),
            _ if world_size == 1 => (String::new(), 0),
            _ => {
                return Err(format!(
                    "WORLD_SIZE is {world_size}, but nothing says where rank 0 is: set MASTER_ADDR and MASTER_PORT, or \
                     {RENDEZVOUS} (host:port)"
                ));
            }
        };
        Ok(Some(Started::Tcp(Meeting { rank, seat, host, port })))
    }

    /// srun; with PMIx it introduces MPI processes to each other. The variables of the step: those of the job are also
    /// there in a batch script, which is no rank.
    fn slurm(&self) -> Result<Option<Started>, String> {
        let Some(world_size) = self.number(&["SLURM_STEP_NUM_TASKS"])? else { return Ok(None) };
        let Some(rank) = self.number::<usize>(&["SLURM_PROCID"])? else { return Ok(None) };
        let local_rank = self.number(&["SLURM_LOCALID"])?.unwrap_or(0);
        let node: usize = self.number(&["SLURM_NODEID"])?.unwrap_or(0);
        let tasks_per_node = self.text("SLURM_STEP_TASKS_PER_NODE").unwrap_or_default();
        let local_size = tasks_of_node(&tasks_per_node, node).unwrap_or(1);
        let seat = Seat { world_size, local_rank, local_size };
        if self.text("PMIX_RANK").is_some() {
            return Ok(Some(Started::Mpi(seat)));
        }
        let (host, port) = match self.named_meeting()? {
            Some(meeting) => meeting,
            None => {
                let nodes = self.text("SLURM_STEP_NODELIST").unwrap_or_default();
                let host = first_host(&nodes).ok_or_else(|| {
                    format!("SLURM_STEP_NODELIST is {nodes:?}; expected a list of nodes. Set {RENDEZVOUS} (host:port)")
                })?;
                let job: u64 = self.number(&["SLURM_JOB_ID"])?.unwrap_or(0);
                let step: u64 = self.number(&["SLURM_STEP_ID"])?.unwrap_or(0);
                (host, (20_000 + (job * 16 + step % 16) % 12_000) as u16)
            }
        };
        Ok(Some(Started::Tcp(Meeting { rank, seat, host, port })))
    }

    fn named_meeting(&self) -> Result<Option<(String, u16)>, String> {
        let Some(text) = self.text(RENDEZVOUS) else { return Ok(None) };
        let parts = text.rsplit_once(':').and_then(|(host, port)| Some((host, port.parse().ok()?)));
        match parts {
            Some((host, port)) if !host.is_empty() => Ok(Some((host.trim_matches(['[', ']']).to_owned(), port))),
            _ => Err(format!("{RENDEZVOUS} is {text:?}; expected host:port")),
        }
    }

    fn text(&self, name: &str) -> Option<String> {
        (self.0)(name).filter(|value| !value.is_empty())
    }

    /// The first of these variables that is set.
    fn number<T: FromStr<Err: Display>>(&self, names: &[&str]) -> Result<Option<T>, String> {
        let Some((name, value)) = names.iter().find_map(|name| Some((name, self.text(name)?))) else { return Ok(None) };
        value.parse().map(Some).map_err(|error| format!("{name} is {value:?}; expected a number ({error})"))
    }
}

/// `node07` of `node[07-12,20],other`, `a` of `a,b`.
fn first_host(nodes: &str) -> Option<String> {
    let end = nodes.find([',', '[']).unwrap_or(nodes.len());
    let (prefix, rest) = nodes.split_at(end);
    let host = match rest.strip_prefix('[') {
        None => prefix.to_owned(),
        Some(ranges) => format!("{prefix}{}", ranges.split(['-', ',', ']']).next()?),
    };
    (!host.is_empty()).then_some(host)
}

/// The tasks of one node of `2(x3),1`: 2, 2, 2, 1.
fn tasks_of_node(tasks_per_node: &str, node: usize) -> Option<usize> {
    let mut first = 0usize;
    for part in tasks_per_node.split(',') {
        let (tasks, times) = match part.split_once("(x") {
            None => (part, 1),
            Some((tasks, times)) => (tasks, times.trim_end_matches(')').parse().ok()?),
        };
        first = first.saturating_add(times);
        if node < first {
            return tasks.parse().ok();
        }
    }
    None
}

#[cfg(test)]
mod tests {
    use super::*;

    fn started(variables: &str) -> Result<Started, String> {
        let value = |name: &str| {
            let pairs = variables.split_whitespace().filter_map(|pair| pair.split_once('='));
            pairs.filter(|(n, _)| *n == name).map(|(_, value)| value.to_owned()).next()
        };
        Environment(&value).started()
    }

    fn meeting(rank: usize, seat: [usize; 3], host: &str, port: u16) -> Started {
        let [world_size, local_rank, local_size] = seat;
        Started::Tcp(Meeting { rank, seat: Seat { world_size, local_rank, local_size }, host: host.to_owned(), port })
    }

    #[test]
    fn engines_are_known_by_their_variables() {
        assert_eq!(started(""), Ok(Started::Alone));
        let ompi = "OMPI_COMM_WORLD_SIZE=4 OMPI_COMM_WORLD_LOCAL_RANK=1 OMPI_COMM_WORLD_LOCAL_SIZE=2";
        let seat = Seat { world_size: 4, local_rank: 1, local_size: 2 };
        assert_eq!(started(ompi), Ok(Started::Mpi(seat)));
        assert_eq!(started("OMPI_COMM_WORLD_SIZE=1 WORLD_SIZE=4 RANK=0"), Ok(Started::Alone));

        let torchrun = "WORLD_SIZE=8 RANK=5 LOCAL_RANK=1 LOCAL_WORLD_SIZE=4 MASTER_ADDR=head MASTER_PORT=29500";
        assert_eq!(started(torchrun), Ok(meeting(5, [8, 1, 4], "head", 29500)));
        assert_eq!(started("WORLD_SIZE=1 RANK=0"), Ok(Started::Alone));
        let indexed = "WORLD_SIZE=3 JOB_COMPLETION_INDEX=2 DITHAROS_RENDEZVOUS=job-0.train:4000";
        assert_eq!(started(indexed), Ok(meeting(2, [3, 0, 1], "job-0.train", 4000)));

        let srun = "SLURM_STEP_NUM_TASKS=6 SLURM_PROCID=5 SLURM_LOCALID=1 SLURM_NODEID=2 SLURM_STEP_TASKS_PER_NODE=2(x3) \
                    SLURM_STEP_NODELIST=gpu[07-08,11] SLURM_JOB_ID=1000 SLURM_STEP_ID=3";
        assert_eq!(started(srun), Ok(meeting(5, [6, 1, 2], "gpu07", 20_000 + 4003)));
        let seat = Seat { world_size: 6, local_rank: 1, local_size: 2 };
        assert_eq!(started(&format!("{srun} PMIX_RANK=5")), Ok(Started::Mpi(seat)));
        assert_eq!(started("SLURM_NTASKS=6 SLURM_PROCID=0 SLURM_NODELIST=a"), Ok(Started::Alone), "a batch script");
    }

    #[test]
    fn variables_that_do_not_fit_are_named() {
        for (variables, named) in [
            ("WORLD_SIZE=2 RANK=0", "set MASTER_ADDR and MASTER_PORT, or DITHAROS_RENDEZVOUS"),
            ("WORLD_SIZE=2 RANK=2 MASTER_ADDR=a MASTER_PORT=1", "rank 2 of 2"),
            ("WORLD_SIZE=two RANK=0", "WORLD_SIZE is \"two\"; expected a number"),
            ("WORLD_SIZE=2 RANK=0 DITHAROS_RENDEZVOUS=here", "DITHAROS_RENDEZVOUS is \"here\"; expected host:port"),
            ("SLURM_STEP_NUM_TASKS=2 SLURM_PROCID=0", "SLURM_STEP_NODELIST is \"\""),
        ] {
            let error = started(variables).unwrap_err();
            assert!(error.contains(named), "{variables}: {error}");
        }
    }

    #[test]
    fn slurm_lists_are_read() {
        assert_eq!(first_host("a").as_deref(), Some("a"));
        assert_eq!(first_host("rack1-n[3],b").as_deref(), Some("rack1-n3"));
        assert_eq!(first_host(""), None);
        let nodes: Vec<_> = (0..5).map(|node| tasks_of_node("4(x2),1,3", node)).collect();
        assert_eq!(nodes, [Some(4), Some(4), Some(1), Some(3), None]);
    }
}
