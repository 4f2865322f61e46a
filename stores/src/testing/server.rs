//! A server of objects in memory: the S3 protocol as far as reading goes, and the dialect of it that GCS calls its XML API.

use super::http::{Head, Listener, answer, read_request};
use bytes::Bytes;
use percent_encoding::percent_decode_str;
use std::collections::BTreeMap;
use std::io;
use std::net::{SocketAddr, TcpStream};
use std::process::Command;
use std::sync::{Arc, Mutex};
use url::Url;

/// Serves objects of one bucket, unsigned: `GET`, ranges, `HEAD`, and listings in pages of two. As GCS does also `PUT` (create if
/// absent by `x-goog-if-generation-match: 0`), multipart uploads and `DELETE`.
#[derive(Debug)]
pub struct MiniS3 {
    bucket: Arc<Mutex<Bucket>>,
    listener: Listener,
}

#[derive(Debug, Default)]
struct Bucket {
    objects: BTreeMap<String, Bytes>,
    /// Parts by upload and number.
    uploads: BTreeMap<usize, BTreeMap<usize, Vec<u8>>>,
    uploads_begun: usize,
    /// First lines.
    requests: Vec<String>,
}

/// Names on a page of a listing.
const PAGE: usize = 2;

impl MiniS3 {
    /// A server without objects.
    #[allow(clippy::new_without_default)]
    pub fn new() -> Self {
        let bucket = Arc::<Mutex<Bucket>>::default();
        let served = bucket.clone();
        let listener = Listener::start(move |stream| serve(&stream, &served));
        Self { bucket, listener }
    }

    /// Puts an object at `key`.
    pub fn put(&self, key: &str, bytes: impl Into<Bytes>) {
        self.bucket.lock().unwrap().objects.insert(key.to_owned(), bytes.into());
    }

    /// Where it listens.
    pub fn address(&self) -> SocketAddr {
        self.listener.address
    }

    /// Runs an ignored test of this test program with `DITHAROS_TEST_STORE=gs://bucket/prefix`, which leads here: in a process of its own,
    /// because a store is opened by its URL and the environment, as a user would. Gives the first lines of the requests.
    pub fn passes_as_gcs(&self, test: &str) -> Vec<String> {
        let account = r#"{"disable_oauth":true,"client_email":"","private_key":"","private_key_id":""}"#;
        let ran = Command::new(std::env::current_exe().unwrap())
            .args(["--ignored", "--exact", test])
            .env("DITHAROS_TEST_STORE", "gs://bucket/prefix")
            .env("GOOGLE_BASE_URL", format!("http://{}", self.address()))
            .env("GOOGLE_SERVICE_ACCOUNT_KEY", account)
            .env("GOOGLE_ALLOW_HTTP", "true")
            .output()
            .unwrap();
        let said = String::from_utf8_lossy(&ran.stdout);
        assert!(ran.status.success() && said.contains("1 passed"), "{said}");
        self.take_requests()
    }

    /// First lines of the requests since the last call.
    pub fn take_requests(&self) -> Vec<String> {
        std::mem::take(&mut self.bucket.lock().unwrap().requests)
    }
}

/// What is answered: a status, headers, a body.
type Answer = (&'static str, Vec<(&'static str, String)>, Bytes);

fn serve(stream: &TcpStream, bucket: &Mutex<Bucket>) -> io::Result<()> {
    let Some((request, body)) = read_request(stream)? else { return Ok(()) };
    let (status, headers, body) = bucket.lock().unwrap().answer(&request, body);
    let headers = headers.into_iter().map(|(name, value)| (name.to_owned(), value)).collect();
    let mut head = Head { first: format!("HTTP/1.1 {status}"), headers };
    head.set("content-length", body.len().to_string());
    answer(stream, head, if request.is_head_request() { &[] } else { &body })
}

impl Bucket {
    fn answer(&mut self, request: &Head, body: Vec<u8>) -> Answer {
        self.requests.push(request.first.clone());
        let mut words = request.first.split(' ');
        let (method, target) = (words.next().unwrap_or_default(), words.next().unwrap_or_default());
        let url = Url::parse(&format!("http://host{target}")).unwrap();
        let query: BTreeMap<String, String> = url.query_pairs().into_owned().collect();
        // `/bucket/key`; a client may encode the slashes of a key, too.
        let key = url.path().trim_start_matches('/').split_once('/').map_or("", |(_, key)| key);
        let key = percent_decode_str(key).decode_utf8().unwrap().into_owned();
        let ok = |body: String| ("200 OK", Vec::new(), body.into());
        let not_found = || ("404 Not Found", Vec::new(), Bytes::new());
        let upload = query.get("uploadId").map(|id| id.parse::<usize>().unwrap());
        match (method, upload) {
            ("GET" | "HEAD", _) if query.contains_key("list-type") => ok(listing(&self.objects, &query)),
            ("GET" | "HEAD", _) => match self.objects.get(&key) {
                Some(object) => read(object, request.get("range")),
                None => not_found(),
            },
            ("PUT", Some(upload)) => {
                let part = e_tag(&body);
                match self.uploads.get_mut(&upload) {
                    Some(parts) => drop(parts.insert(query["partNumber"].parse().unwrap(), body)),
                    None => return not_found(),
                }
                ("200 OK", vec![("etag", part)], Bytes::new())
            }
            ("PUT", None) => {
                let must_be_absent = request.get("x-goog-if-generation-match") == Some("0");
                if must_be_absent && self.objects.contains_key(&key) {
                    return ("412 Precondition Failed", Vec::new(), Bytes::new());
                }
                let tag = e_tag(&body);
                self.objects.insert(key, body.into());
                ("200 OK", vec![("etag", tag)], Bytes::new())
            }
            ("POST", None) if query.contains_key("uploads") => {
                self.uploads_begun += 1;
                self.uploads.insert(self.uploads_begun, BTreeMap::new());
                let id = self.uploads_begun;
                ok(format!("<InitiateMultipartUploadResult><UploadId>{id}</UploadId></InitiateMultipartUploadResult>"))
            }
            ("POST", Some(upload)) => {
                let Some(parts) = self.uploads.remove(&upload) else { return not_found() };
                let object = parts.into_values().flatten().collect::<Vec<u8>>();
                let tag = escaped(&e_tag(&object));
                self.objects.insert(key, object.into());
                ok(format!("<CompleteMultipartUploadResult><ETag>{tag}</ETag></CompleteMultipartUploadResult>"))
            }
            ("DELETE", upload) => {
                let found = match upload {
                    Some(upload) => self.uploads.remove(&upload).is_some(),
                    None => self.objects.remove(&key).is_some(),
                };
                if found { ("204 No Content", Vec::new(), Bytes::new()) } else { not_found() }
            }
            _ => ("405 Method Not Allowed", Vec::new(), Bytes::new()),
        }
    }
}

fn read(object: &Bytes, range: Option<&str>) -> Answer {
    let mut headers = vec![("etag", e_tag(object)), ("last-modified", "Thu, 01 Jan 2026 00:00:00 GMT".to_owned())];
    let Some(range) = range else { return ("200 OK", headers, object.clone()) };
    let Some((start, end)) = parse_range(range, object.len()) else {
        return ("416 Requested Range Not Satisfiable", headers, Bytes::new());
    };
    headers.push(("content-range", format!("bytes {start}-{}/{}", end - 1, object.len())));
    ("206 Partial Content", headers, object.slice(start..end))
}

fn e_tag(object: &[u8]) -> String {
    format!("\"{:08x}-{}\"", crc32c::crc32c(object), object.len())
}

/// `bytes=START-LAST`.
fn parse_range(range: &str, length: usize) -> Option<(usize, usize)> {
    let (start, last) = range.strip_prefix("bytes=")?.split_once('-')?;
    let (start, end) = (start.parse().ok()?, last.parse::<usize>().ok()?.saturating_add(1).min(length));
    (start < end).then_some((start, end))
}

fn escaped(text: &str) -> String {
    text.replace('&', "&amp;").replace('<', "&lt;").replace('"', "&quot;")
}

fn listing(objects: &BTreeMap<String, Bytes>, query: &BTreeMap<String, String>) -> String {
    let of = |name: &str| query.get(name).map_or("", String::as_str);
    let after = of("continuation-token");
    let mut found = objects.iter().filter(|(key, _)| key.starts_with(of("prefix")) && key.as_str() > after);
    let page: Vec<_> = found.by_ref().take(PAGE).collect();
    let mut xml = "<?xml version=\"1.0\" encoding=\"UTF-8\"?><ListBucketResult>".to_owned();
    for (key, object) in &page {
        xml.push_str(&format!(
            "<Contents><Key>{}</Key><LastModified>2026-01-01T00:00:00.000Z</LastModified><ETag>{}</ETag>\
             <Size>{}</Size></Contents>",
            escaped(key),
            escaped(&e_tag(object)),
            object.len()
        ));
    }
    let truncated = found.next().is_some();
    xml.push_str(&format!("<IsTruncated>{truncated}</IsTruncated>"));
    if let (true, Some((last, _))) = (truncated, page.last()) {
        xml.push_str(&format!("<NextContinuationToken>{}</NextContinuationToken>", escaped(last)));
    }
    xml + "</ListBucketResult>"
}
