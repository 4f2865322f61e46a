//! Any bytes as the one file of a data set: opened, looked at, and every row read.

use std::sync::Arc;

use data_loader::{Columns, InspectOptions, LatentDataset, RowRun, VerifyOptions};
use object_store::memory::InMemory;
use object_store::path::Path;
use object_store::{ObjectStore, ObjectStoreExt};

/// Rows of the last read: more would only be slow.
const ROWS: u64 = 1024;

/// Tells whether rows could be read.
pub fn run(data: &[u8]) -> bool {
    let store: Arc<dyn ObjectStore> = Arc::new(InMemory::new());
    let path = Path::from("a.parquet");
    if futures::executor::block_on(store.put(&path, data.to_vec().into())).is_err() {
        return false;
    }
    let Ok(dataset) = LatentDataset::open_in(store, path, &Columns::default()) else {
        return false;
    };
    let report = data_loader::verify_with(&dataset, &VerifyOptions::default(), &mut |_| ());
    if !report.is_good() {
        return false;
    }
    // What verify finds nothing wrong with can be read and shown.
    let runs = [RowRun { first_row: 0, rows: dataset.meta().rows.min(ROWS) }];
    if let Err(error) = dataset.read(&runs) {
        panic!("verify passes, but rows cannot be read: {error}");
    }
    let quick = InspectOptions { quick: true };
    if let Err(error) = data_loader::inspect_with(&dataset, quick, &mut |_| ()) {
        panic!("verify passes, but inspect fails: {error}");
    }
    let _ = data_loader::preview(&dataset, 4);
    true
}
