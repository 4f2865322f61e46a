//! A server of objects in memory, by the S3 protocol as far as reading goes.

use super::http::{Head, Listener, answer, read_request};
use bytes::Bytes;
use std::collections::BTreeMap;
use std::io;
use std::net::{SocketAddr, TcpStream};
use std::sync::{Arc, Mutex};
use url::Url;

/// Serves objects of one bucket, unsigned: `GET`, ranges, `HEAD`, and listings in pages of two.
#[derive(Debug)]
pub struct MiniS3 {
    objects: Arc<Mutex<BTreeMap<String, Bytes>>>,
    requests: Arc<Mutex<Vec<String>>>,
    listener: Listener,
}

/// Names on a page of a listing.
const PAGE: usize = 2;

impl MiniS3 {
    /// A server without objects.
    #[allow(clippy::new_without_default)]
    pub fn new() -> Self {
        let (objects, requests) = (Arc::<Mutex<BTreeMap<_, _>>>::default(), Arc::<Mutex<Vec<_>>>::default());
        let (served, asked) = (objects.clone(), requests.clone());
        let listener = Listener::start(move |stream| serve(&stream, &served.lock().unwrap().clone(), &asked));
        Self { objects, requests, listener }
    }

    /// Puts an object at `key`.
    pub fn put(&self, key: &str, bytes: impl Into<Bytes>) {
        self.objects.lock().unwrap().insert(key.to_owned(), bytes.into());
    }

    /// Where it listens.
    pub fn address(&self) -> SocketAddr {
        self.listener.address
    }

    /// First lines of the requests since the last call.
    pub fn take_requests(&self) -> Vec<String> {
        std::mem::take(&mut *self.requests.lock().unwrap())
    }
}

fn serve(stream: &TcpStream, objects: &BTreeMap<String, Bytes>, requests: &Mutex<Vec<String>>) -> io::Result<()> {
    let Some((request, _)) = read_request(stream)? else { return Ok(()) };
    requests.lock().unwrap().push(request.first.clone());
    let mut head = Head { first: "HTTP/1.1 200 OK".to_owned(), headers: Vec::new() };
    let target = request.first.split(' ').nth(1).unwrap_or_default();
    let url = Url::parse(&format!("http://host{target}")).unwrap();
    let query: BTreeMap<String, String> = url.query_pairs().into_owned().collect();
    // `/bucket/key`
    let key = url.path().trim_start_matches('/').split_once('/').map_or("", |(_, key)| key);
    let body: Bytes = if query.contains_key("list-type") {
        listing(objects, &query).into()
    } else if let Some(object) = objects.get(key) {
        head.set("etag", e_tag(object));
        head.set("last-modified", "Thu, 01 Jan 2026 00:00:00 GMT".to_owned());
        match request.get("range").and_then(|range| parse_range(range, object.len())) {
            Some((start, end)) => {
                head.first = "HTTP/1.1 206 Partial Content".to_owned();
                head.set("content-range", format!("bytes {start}-{}/{}", end - 1, object.len()));
                object.slice(start..end)
            }
            None => object.clone(),
        }
    } else {
        head.first = "HTTP/1.1 404 Not Found".to_owned();
        Bytes::new()
    };
    head.set("content-length", body.len().to_string());
    answer(stream, head, if request.is_head_request() { &[] } else { &body })
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

fn listing(objects: &BTreeMap<String, Bytes>, query: &BTreeMap<String, String>) -> String {
    let of = |name: &str| query.get(name).map_or("", String::as_str);
    let after = of("continuation-token");
    let mut found = objects.iter().filter(|(key, _)| key.starts_with(of("prefix")) && key.as_str() > after);
    let page: Vec<_> = found.by_ref().take(PAGE).collect();
    let mut xml = "<?xml version=\"1.0\" encoding=\"UTF-8\"?><ListBucketResult>".to_owned();
    for (key, object) in &page {
        let tag = e_tag(object).replace('"', "&quot;");
        xml.push_str(&format!(
            "<Contents><Key>{key}</Key><LastModified>2026-01-01T00:00:00.000Z</LastModified><ETag>{tag}</ETag>\
             <Size>{}</Size></Contents>",
            object.len()
        ));
    }
    let truncated = found.next().is_some();
    xml.push_str(&format!("<IsTruncated>{truncated}</IsTruncated>"));
    if let (true, Some((last, _))) = (truncated, page.last()) {
        xml.push_str(&format!("<NextContinuationToken>{last}</NextContinuationToken>"));
    }
    xml + "</ListBucketResult>"
}
