//! Runs the conformance suite on the collective of the engine that started it, for example
//! `mpirun -n 2 collective-conformance`.

fn main() {
    let deadline = std::time::Duration::from_secs(60);
    let collective = match collective::from_environment(deadline) {
        Ok(collective) => collective,
        Err(error) => {
            eprintln!("collective-conformance: {error}");
            std::process::exit(1);
        }
    };
    match collective::conformance::run(&*collective) {
        Ok(()) => println!("rank {} of {}: ok", collective.rank(), collective.world_size()),
        Err(reason) => {
            eprintln!("collective-conformance: {reason}");
            collective.abort(1);
        }
    }
}
