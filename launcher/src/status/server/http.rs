//! As much of HTTP/1.1 as the status server needs: one GET or HEAD a connection, no bodies of requests.

use std::io::{Error, ErrorKind, Read, Result, Write};
use std::net::{Shutdown, TcpStream};
use std::time::{Duration, Instant};

/// A longer head is refused.
const MOST_HEAD_BYTES: usize = 16 * 1024;
const MOST_HEADERS: usize = 64;

/// What was asked.
pub struct Request {
    pub is_head: bool,
    pub path: String,
    pub query: Option<String>,
    /// Names in lower case; values that are no text are left out.
    headers: Vec<(String, String)>,
}

impl Request {
    /// A GET of `target`.
    #[cfg(test)]
    pub fn new(target: &str, headers: &[(&str, &str)]) -> Request {
        let headers = headers.iter().map(|(name, value)| (name.to_string(), value.to_string())).collect();
        Request::of("GET", target, headers)
    }

    fn of(method: &str, target: &str, headers: Vec<(String, String)>) -> Request {
        let (path, query) = target.split_once('?').map_or((target, None), |(path, query)| (path, Some(query)));
        Request { is_head: method == "HEAD", path: path.to_owned(), query: query.map(str::to_owned), headers }
    }

    /// The first header of that name.
    pub fn header(&self, name: &str) -> Option<&str> {
        self.headers.iter().find(|(key, _)| key == name).map(|(_, value)| value.as_str())
    }
}

/// What is answered.
pub struct Answer {
    pub status: u16,
    kind: &'static str,
    body: Vec<u8>,
    /// Beside those that every answer has.
    pub headers: Vec<(&'static str, String)>,
}

impl Answer {
    pub fn new(status: u16, kind: &'static str, body: impl Into<Vec<u8>>) -> Answer {
        Answer { status, kind, body: body.into(), headers: Vec::new() }
    }

    pub fn text(status: u16, text: &str) -> Answer {
        Answer::new(status, "text/plain; charset=utf-8", format!("{text}\n"))
    }

    pub fn with(mut self, name: &'static str, value: &str) -> Answer {
        self.headers.push((name, value.to_owned()));
        self
    }

    fn head(&self) -> String {
        let Answer { status, kind, body, headers } = self;
        let reason = match status {
            200 => "OK",
            303 => "See Other",
            401 => "Unauthorized",
            403 => "Forbidden",
            404 => "Not Found",
            405 => "Method Not Allowed",
            431 => "Request Header Fields Too Large",
            _ => "Bad Request",
        };
        let more: String = headers.iter().map(|(name, value)| format!("{name}: {value}\r\n")).collect();
        format!(
            "HTTP/1.1 {status} {reason}\r\nContent-Type: {kind}\r\nContent-Length: {}\r\nConnection: close\r\nCache-Control: no-store\r\n\
             X-Content-Type-Options: nosniff\r\nReferrer-Policy: no-referrer\r\nCross-Origin-Resource-Policy: same-origin\r\n\
             Content-Security-Policy: default-src 'none'; script-src 'unsafe-inline'; style-src 'unsafe-inline'; img-src 'self'; \
             connect-src 'self'; frame-ancestors 'none'; base-uri 'none'; form-action 'none'\r\n{more}\r\n",
            body.len()
        )
    }
}

/// Reads a request until `deadline`, or the answer to what is none.
///
/// # Errors
/// The client has gone or is too slow.
pub fn read(stream: &mut TcpStream, deadline: Instant) -> Result<std::result::Result<Request, Answer>> {
    let mut head = Vec::new();
    let mut buffer = [0; 4096];
    loop {
        stream.set_read_timeout(Some(until(deadline)?))?;
        let count = stream.read(&mut buffer)?;
        if count == 0 {
            return Err(ErrorKind::UnexpectedEof.into());
        }
        head.extend_from_slice(&buffer[..count]);
        if head.len() > MOST_HEAD_BYTES {
            return Ok(Err(Answer::text(431, "the request is too long")));
        }
        if let Some(request) = parse(&head) {
            return Ok(request);
        }
    }
}

/// `None`: the head is not whole yet.
fn parse(head: &[u8]) -> Option<std::result::Result<Request, Answer>> {
    let mut headers = [httparse::EMPTY_HEADER; MOST_HEADERS];
    let mut request = httparse::Request::new(&mut headers);
    match request.parse(head) {
        Ok(httparse::Status::Partial) => return None,
        Ok(httparse::Status::Complete(_)) => {}
        Err(httparse::Error::TooManyHeaders) => return Some(Err(Answer::text(431, "too many headers"))),
        Err(_) => return Some(Err(Answer::text(400, "no HTTP request"))),
    }
    let (method, target) = (request.method.unwrap_or_default(), request.path.unwrap_or_default());
    if !matches!(method, "GET" | "HEAD") {
        return Some(Err(Answer::text(405, "only GET and HEAD").with("Allow", "GET, HEAD")));
    }
    let text = |header: &httparse::Header| {
        Some((header.name.to_ascii_lowercase(), std::str::from_utf8(header.value).ok()?.to_owned()))
    };
    let headers = request.headers.iter().filter_map(text).collect();
    Some(Ok(Request::of(method, target, headers)))
}

/// Writes an answer until `deadline` and ends the connection.
///
/// # Errors
/// The client has gone or is too slow.
pub fn write(stream: &mut TcpStream, answer: &Answer, is_head: bool, deadline: Instant) -> Result<()> {
    let mut bytes = answer.head().into_bytes();
    if !is_head {
        bytes.extend_from_slice(&answer.body);
    }
    let mut rest = bytes.as_slice();
    while !rest.is_empty() {
        stream.set_write_timeout(Some(until(deadline)?))?;
        let count = stream.write(rest)?;
        rest = &rest[count..];
    }
    stream.shutdown(Shutdown::Write)
}

fn until(deadline: Instant) -> Result<Duration> {
    let left = deadline.saturating_duration_since(Instant::now());
    if left.is_zero() { Err(Error::from(ErrorKind::TimedOut)) } else { Ok(left) }
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use super::*;

    fn status(head: &[u8]) -> Option<u16> {
        parse(head).map(|request| request.map_or_else(|answer| answer.status, |_| 200))
    }

    #[test]
    fn whole_requests_are_read_and_others_waited_for_or_refused() {
        let whole = b"GET /metrics?a=b HTTP/1.1\r\nHost: x\r\nX: \xff\r\n\r\n";
        for cut in 0..whole.len() {
            assert_eq!(status(&whole[..cut]), None, "{cut}");
        }
        let request = parse(whole).unwrap().ok().unwrap();
        assert_eq!(
            (request.path.as_str(), request.query.as_deref(), request.is_head),
            ("/metrics", Some("a=b"), false)
        );
        assert_eq!((request.header("host"), request.header("x")), (Some("x"), None));
        assert_eq!(status(b"POST / HTTP/1.1\r\n\r\n"), Some(405));
        assert_eq!(status(b"\x16\x03\x01\x02\x00"), Some(400), "TLS");
        let many = format!("GET / HTTP/1.1\r\n{}\r\n", "A: b\r\n".repeat(MOST_HEADERS + 1));
        assert_eq!(status(many.as_bytes()), Some(431));
    }
}
