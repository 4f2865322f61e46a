//! What the engine that started this process says about it.

/// World size as the MPI launcher's environment tells it; `None` when no MPI launcher started this process.
pub(crate) fn mpi_world_size() -> Option<usize> {
    number(&["OMPI_COMM_WORLD_SIZE", "PMI_SIZE"])
}

/// This process's number on its node and how many there are, as MPI launchers tell them.
pub(crate) fn mpi_local() -> (usize, usize) {
    (
        number(&["OMPI_COMM_WORLD_LOCAL_RANK", "MPI_LOCALRANKID"]).unwrap_or(0),
        number(&["OMPI_COMM_WORLD_LOCAL_SIZE", "MPI_LOCALNRANKS"]).unwrap_or(1),
    )
}

fn number(names: &[&str]) -> Option<usize> {
    names.iter().find_map(|name| std::env::var(name).ok()?.parse().ok())
}
