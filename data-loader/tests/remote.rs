//! Whole epochs over the network, with a share of the requests going wrong: the same samples in the same order.
#![allow(clippy::unwrap_used)]

use std::path::Path;
use std::sync::Arc;
use std::time::Duration;

use configs::Columns;
use data_loader::{
    BlockCache, DataError, Flip, LatentDataset, LatentRow, LatentWriter, MicroBatchStream, OpenOptions, PlainMemory,
    ScheduleOptions, StreamOptions, StreamSource, WriterOptions,
};
use object_store::aws::AmazonS3Builder;
use object_store::azure::MicrosoftAzureBuilder;
use object_store::gcp::GoogleCloudStorageBuilder;
use object_store::{BackoffConfig, ClientOptions, ObjectStore, ObjectStoreExt, RetryConfig};
use stores::profile::Environment;
use stores::testing::{FaultyProxy, MiniS3};
use stores::{ReadError, ReadOptions};

const SHAPE: [usize; 3] = [4, 16, 16];
const FILES: usize = 5;
const FILE_ROWS: usize = 600;
const GROUP_ROWS: usize = 128;
const MIB: u64 = 1 << 20;
/// Lanes and rows of a micro-batch.
const LAYOUTS: [(usize, usize); 2] = [(4, 16), (2, 60)];

/// A data set of 12 MB in several files, in a folder.
fn local() -> tempfile::TempDir {
    let folder = tempfile::tempdir().unwrap();
    let numel: usize = SHAPE.iter().product();
    for file in 0..FILES {
        let options = WriterOptions { row_group_rows: GROUP_ROWS, ..WriterOptions::new(SHAPE.to_vec()) };
        let path = folder.path().join(format!("part-{file:05}-of-{FILES:05}.parquet"));
        let mut writer = LatentWriter::create(&path, options).unwrap();
        for row in file * FILE_ROWS..(file + 1) * FILE_ROWS {
            let latent = |column: usize| -> Vec<f32> {
                (0..numel).map(|i| ((row * 7919 + column * 501 + i * i) % 2039) as f32 / 64.0 - 15.0).collect()
            };
            let (mean, logvar, id) = (latent(0), latent(1), format!("row {row}"));
            let row = LatentRow { mean: &mean, logvar: &logvar, flipped: None, label: (row % 10) as i64, id: &id };
            writer.push(row).unwrap();
        }
        writer.finish().unwrap();
    }
    folder
}

fn files(folder: &Path) -> Vec<(String, Vec<u8>)> {
    let entries = std::fs::read_dir(folder).unwrap().map(|entry| entry.unwrap().path());
    let named = |path: std::path::PathBuf| {
        (path.file_name().unwrap().to_str().unwrap().to_owned(), std::fs::read(path).unwrap())
    };
    let mut files: Vec<_> = entries.filter(|path| path.is_file()).map(named).collect();
    files.sort();
    files
}

/// Everything that a rank with all lanes gets in one epoch: rows, labels and latents by step and lane.
fn epoch(dataset: &Arc<LatentDataset>, (lanes, micro_batch): (usize, usize)) -> Vec<(Vec<u64>, Vec<i64>, Vec<f32>)> {
    let options = ScheduleOptions { seed: 5, lanes, micro_batch, range_rows: 32, shuffle_window_rows: 150 };
    let schedule = dataset.schedule(options).unwrap();
    let steps = schedule.steps_per_epoch();
    let options = StreamOptions {
        prefetch_bytes: 1 << 20,
        flip: Flip::Never,
        num_classes: Some(10),
        threads: 2,
        captions: None,
        allocator: &PlainMemory,
    };
    let sources = vec![StreamSource { dataset: dataset.clone(), scaling_factor: 0.5 }];
    let mut stream = MicroBatchStream::start(sources, schedule, 0..lanes, 0, steps, options).unwrap();
    (0..steps * lanes as u64)
        .map(|_| {
            let batch = stream.next().unwrap();
            let found = (batch.rows.clone(), batch.labels.clone(), batch.x_start.to_f32());
            stream.recycle(batch);
            found
        })
        .collect()
}

/// Short enough for a test, long enough for a loaded machine.
fn patient(cache: Option<&Path>, bytes: u64) -> OpenOptions {
    let read = ReadOptions {
        try_timeout: Duration::from_secs(10),
        silence: Duration::from_millis(300),
        tries: 10,
        pause: Duration::from_millis(2),
        request_bytes: 256 << 10,
        ..ReadOptions::default()
    };
    let cache = cache.map(|dir| Arc::new(BlockCache::open(dir, bytes, |warning| panic!("{warning}")).unwrap()));
    OpenOptions { cache, read, ..OpenOptions::default() }
}

fn retry() -> RetryConfig {
    let (init_backoff, max_backoff) = (Duration::from_millis(5), Duration::from_millis(50));
    RetryConfig {
        backoff: BackoffConfig { init_backoff, max_backoff, base: 2.0 },
        max_retries: 3,
        retry_timeout: Duration::from_secs(5),
    }
}

fn client() -> ClientOptions {
    ClientOptions::new()
        .with_allow_http(true)
        .with_read_timeout(Duration::from_secs(1))
        .with_timeout(Duration::from_secs(30))
}

/// A client of a [`MiniS3`], perhaps through a proxy.
fn mini(address: std::net::SocketAddr) -> Arc<dyn ObjectStore> {
    let builder = AmazonS3Builder::new()
        .with_endpoint(format!("http://{address}"))
        .with_bucket_name("bucket")
        .with_region("us-east-1")
        .with_skip_signature(true)
        .with_client_options(client())
        .with_retry(retry());
    Arc::new(builder.build().unwrap())
}

/// Reads epochs of `store` in all layouts, without a cache, with one that holds all and with one that does not.
fn assert_reads_as_local(store: &Arc<dyn ObjectStore>, path: &str, local: &Path) {
    let reference = Arc::new(LatentDataset::open(local.to_str().unwrap(), &Columns::default()).unwrap());
    let dir = tempfile::tempdir().unwrap();
    let (large, small) = (dir.path().join("large"), dir.path().join("small"));
    let caches =
        [(None, 0), (Some(&*large), 64 * MIB), (Some(&*large), 64 * MIB), (Some(&*small), BlockCache::LEAST_BYTES)];
    for (cache, bytes) in caches {
        let options = patient(cache, bytes);
        let dataset = LatentDataset::open_in_with(store.clone(), path.into(), &options).unwrap();
        assert_eq!(dataset.layout_sha256(), reference.layout_sha256());
        let dataset = Arc::new(dataset);
        for layout in LAYOUTS {
            assert!(epoch(&dataset, layout) == epoch(&reference, layout), "layout {layout:?}, cache {cache:?}");
        }
    }
}

#[test]
fn an_epoch_over_a_bad_network_is_the_same_epoch() {
    let folder = local();
    let server = MiniS3::new();
    files(folder.path()).into_iter().for_each(|(name, bytes)| server.put(&format!("set/{name}"), bytes));
    let proxy = FaultyProxy::new(server.address(), 0.1, 7);
    assert_reads_as_local(&mini(proxy.address()), "set", folder.path());
    let (requests, faults) = proxy.counts();
    let share = faults as f64 / requests as f64;
    assert!(requests > 200 && (0.05..0.2).contains(&share), "{faults} of {requests} requests went wrong");
}

/// The rows of a shuffle window that lie in one row group are fetched by one request, and what is cached by none.
#[test]
fn a_window_costs_one_request_for_each_of_its_row_groups() {
    let folder = local();
    let server = MiniS3::new();
    files(folder.path()).into_iter().for_each(|(name, bytes)| server.put(&format!("set/{name}"), bytes));
    let dir = tempfile::tempdir().unwrap();
    for cache in [None, Some(dir.path())] {
        let options = OpenOptions { read: ReadOptions::default(), ..patient(cache, 64 * MIB) };
        let dataset = LatentDataset::open_in_with(mini(server.address()), "set".into(), &options).unwrap();
        // A look-up, three pages of a listing, a footer of each file.
        let opening = server.take_requests();
        assert_eq!(opening.len(), 1 + 3 + FILES, "{opening:?}");
        let group = |number: usize| dataset.row_groups()[number];
        let run = |number: usize, from: u64, rows: u64| data_loader::RowRun {
            first_row: group(number).first_row + from,
            rows,
        };
        // Three runs in one row group, one in a second one of the same file, two in another file.
        let runs = [run(0, 5, 20), run(7, 3, 9), run(0, 60, 30), run(2, 0, 128), run(0, 100, 1), run(7, 90, 9)];
        dataset.read(&runs).unwrap();
        let requests = server.take_requests();
        assert!(requests.len() <= 3 && requests.iter().all(|line| line.starts_with("GET")), "{requests:?}");
        dataset.read(&runs).unwrap();
        assert_eq!(server.take_requests().len(), if cache.is_some() { 0 } else { 3 });
    }
}

#[test]
fn a_file_that_is_replaced_in_the_middle_of_a_run_is_named() {
    let folder = local();
    let dir = tempfile::tempdir().unwrap();
    for cache in [None, Some(dir.path())] {
        let server = MiniS3::new();
        let files = files(folder.path());
        files.iter().for_each(|(name, bytes)| server.put(&format!("set/{name}"), bytes.clone()));
        let dataset =
            LatentDataset::open_in_with(mini(server.address()), "set".into(), &patient(cache, 64 * MIB)).unwrap();
        let last = dataset.meta().rows - 1;
        let read = |first_row, rows| dataset.read(&[data_loader::RowRun { first_row, rows }]);
        read(last - 300, 10).unwrap();
        let mut changed = files[4].1.clone();
        changed[1000] ^= 1;
        server.put(&format!("set/{}", files[4].0), changed);
        let error = read(last - 599, 10).unwrap_err();
        assert!(matches!(&error, DataError::Remote(ReadError::Changed { .. })), "{error}");
        assert!(error.to_string().contains(&files[4].0), "{error}");
        read(0, 10).unwrap();
    }
}

/// The same against a server: `DITHAROS_TEST_STORE` is `s3://bucket/prefix`, `az://container/prefix` or `gs://bucket/prefix`, and the
/// credentials are where they usually are. `./dev test --stores` starts servers and runs this.
#[test]
#[ignore = "needs DITHAROS_TEST_STORE=URL and a server behind it"]
fn epochs_of_a_real_server() {
    let base = std::env::var("DITHAROS_TEST_STORE").unwrap();
    let nanos = std::time::SystemTime::now().duration_since(std::time::SystemTime::UNIX_EPOCH).unwrap().as_nanos();
    let url = url::Url::parse(&format!("{base}/set-{nanos}")).unwrap();
    let folder = local();
    let (store, path) = stores::open(&url, stores::Bounds::default()).unwrap();
    let runtime = tokio::runtime::Runtime::new().unwrap();
    for (name, bytes) in files(folder.path()) {
        // As a conversion does.
        let mut pieces = runtime.block_on(store.put_multipart(&path.clone().join(name.as_str()))).unwrap();
        runtime.block_on(pieces.put_part(bytes.into())).unwrap();
        runtime.block_on(pieces.complete()).unwrap();
    }
    drop(store);
    let reference = Arc::new(LatentDataset::open(folder.path().to_str().unwrap(), &Columns::default()).unwrap());
    let dir = tempfile::tempdir().unwrap();
    for cache in [None, Some(dir.path()), Some(dir.path())] {
        let dataset = Arc::new(LatentDataset::open_with(url.as_str(), &patient(cache, 64 * MIB)).unwrap());
        assert!(epoch(&dataset, LAYOUTS[0]) == epoch(&reference, LAYOUTS[0]));
    }
    let server = endpoint(&url);
    let proxy = FaultyProxy::new(format!("127.0.0.1:{}", server.port().unwrap()).parse().unwrap(), 0.1, 11);
    let mut through = server.clone();
    through.set_port(Some(proxy.address().port())).unwrap();
    let store: Arc<dyn ObjectStore> = match url.scheme() {
        "s3" => Arc::new(
            s3_settings(AmazonS3Builder::from_env())
                .with_url(url.as_str())
                .with_endpoint(through.as_str().trim_end_matches('/'))
                .with_client_options(client())
                .with_retry(retry())
                .build()
                .unwrap(),
        ),
        "gs" => Arc::new(
            GoogleCloudStorageBuilder::from_env()
                .with_url(url.as_str())
                .with_base_url(through.as_str().trim_end_matches('/'))
                .with_client_options(client())
                .with_retry(retry())
                .build()
                .unwrap(),
        ),
        _ => Arc::new(
            MicrosoftAzureBuilder::from_env()
                .with_use_emulator(false)
                .with_url(url.as_str())
                .with_endpoint(through.as_str().trim_end_matches('/').to_owned())
                .with_client_options(client())
                .with_retry(retry())
                .build()
                .unwrap(),
        ),
    };
    assert_reads_as_local(&store, path.as_ref(), folder.path());
    let (requests, faults) = proxy.counts();
    assert!(requests > 200 && faults > requests / 20, "{faults} of {requests} requests went wrong");
    println!("{faults} of {requests} requests went wrong");
}

#[test]
fn epochs_of_a_server_that_speaks_the_dialect_of_gcs() {
    let requests = MiniS3::new().passes_as_gcs("epochs_of_a_real_server");
    assert!(requests.iter().any(|line| line.starts_with("GET /bucket/prefix%2Fset")), "{requests:?}");
}

/// With what the profile files say.
fn s3_settings(builder: AmazonS3Builder) -> AmazonS3Builder {
    let settings = stores::profile::s3_settings(&Environment::of_process()).unwrap();
    settings.into_iter().fold(builder, |builder, (key, value)| builder.with_config(key.parse().unwrap(), value))
}

/// The server on this machine that the environment names.
fn endpoint(url: &url::Url) -> url::Url {
    let variable = match url.scheme() {
        "s3" => "AWS_ENDPOINT_URL",
        "gs" => "GOOGLE_BASE_URL",
        _ => "AZURE_STORAGE_ENDPOINT",
    };
    std::env::var(variable).unwrap_or_else(|_| panic!("{variable} is not set")).parse().unwrap()
}
