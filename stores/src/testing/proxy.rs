//! A proxy that goes wrong.

use super::http::{Head, Listener, answer, read_request};
use std::io::{self, BufReader, Read, Write};
use std::net::{SocketAddr, TcpStream};
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering::SeqCst};
use std::time::Duration;

/// Passes requests on to a server and spoils the drawn share of them, in the drawn way.
#[derive(Debug)]
pub struct FaultyProxy {
    listener: Listener,
    counts: Arc<Counts>,
}

#[derive(Debug, Default)]
struct Counts {
    requests: AtomicU64,
    faults: AtomicU64,
}

/// What becomes of a request.
#[derive(Debug, Clone, Copy, PartialEq)]
enum Fault {
    /// 503, and the server never hears of it.
    Busy,
    /// The connection breaks before the request is passed on.
    BrokenBefore,
    /// The server has done it, and the answer is lost.
    AnswerLost,
    /// The body breaks in the middle.
    Cut,
    /// The body stops in the middle; the connection stays.
    Stall,
    /// The body comes in small pieces.
    Trickle,
    /// A range is answered by the first half of it, correctly labelled.
    ShortRange,
}

const FAULTS: [Fault; 7] =
    [Fault::Busy, Fault::BrokenBefore, Fault::AnswerLost, Fault::Cut, Fault::Stall, Fault::Trickle, Fault::ShortRange];
/// How long a stalled connection stays open.
const STALL: Duration = Duration::from_secs(20);

impl FaultyProxy {
    /// A proxy in front of `server`, with a `share` of all requests going wrong.
    pub fn new(server: SocketAddr, share: f64, seed: u64) -> Self {
        let counts = Arc::new(Counts::default());
        let counted = counts.clone();
        let listener = Listener::start(move |client| {
            let Some((request, body)) = read_request(&client)? else { return Ok(()) };
            let drawn = mix(seed ^ mix(counted.requests.fetch_add(1, SeqCst)));
            let fault = ((drawn >> 11) as f64 / (1u64 << 53) as f64) < share;
            let fault = fault.then(|| FAULTS[(mix(drawn) % FAULTS.len() as u64) as usize]);
            if fault.is_some() {
                counted.faults.fetch_add(1, SeqCst);
            }
            handle(&client, server, request, &body, fault)
        });
        Self { listener, counts }
    }

    /// Where it listens.
    pub fn address(&self) -> SocketAddr {
        self.listener.address
    }

    /// Requests so far, and how many of them went wrong.
    pub fn counts(&self) -> (u64, u64) {
        (self.counts.requests.load(SeqCst), self.counts.faults.load(SeqCst))
    }
}

fn handle(
    mut client: &TcpStream,
    server: SocketAddr,
    mut request: Head,
    request_body: &[u8],
    fault: Option<Fault>,
) -> io::Result<()> {
    match fault {
        Some(Fault::Busy) => {
            let headers = vec![("content-length".to_owned(), "0".to_owned())];
            return answer(client, Head { first: "HTTP/1.1 503 Slow Down".to_owned(), headers }, &[]);
        }
        Some(Fault::BrokenBefore) => return Ok(()),
        _ => {}
    }
    let mut upstream = TcpStream::connect(server)?;
    // The signature covers the host that the client knows, so that stays.
    request.set("connection", "close".to_owned());
    upstream.write_all(&request.bytes())?;
    upstream.write_all(request_body)?;
    let mut reader = BufReader::new(&upstream);
    let Some(mut head) = Head::read(&mut reader)? else { return Ok(()) };
    let mut body = Vec::new();
    // A chunked body goes through as it is, up to the server's end of the connection.
    match head.get("content-length").filter(|_| !request.is_head_request()) {
        Some(length) => reader.take(length.parse().unwrap()).read_to_end(&mut body)?,
        None if request.is_head_request() || head.first.contains(" 204 ") => 0,
        None => reader.read_to_end(&mut body)?,
    };
    head.set("connection", "close".to_owned());
    let half = body.len() / 2;
    match fault {
        Some(Fault::AnswerLost) => Ok(()),
        Some(Fault::Cut) => {
            client.write_all(&head.bytes())?;
            client.write_all(&body[..half])
        }
        Some(Fault::Stall) => {
            client.write_all(&head.bytes())?;
            client.write_all(&body[..half])?;
            std::thread::sleep(STALL);
            Ok(())
        }
        Some(Fault::Trickle) => {
            client.write_all(&head.bytes())?;
            for piece in body.chunks(body.len().div_ceil(16).max(1)) {
                std::thread::sleep(Duration::from_millis(5));
                client.write_all(piece)?;
            }
            Ok(())
        }
        Some(Fault::ShortRange) if half > 0 && shorten(&mut head, half) => answer(client, head, &body[..half]),
        _ => answer(client, head, &body),
    }
}

/// Makes the answer to a range one of `bytes` bytes; false if it is none.
fn shorten(head: &mut Head, bytes: usize) -> bool {
    let range = head.get("content-range").and_then(|range| {
        let (first, size) = range.strip_prefix("bytes ")?.split_once('/')?;
        let first: usize = first.split_once('-')?.0.parse().ok()?;
        Some(format!("bytes {first}-{}/{size}", first + bytes - 1))
    });
    let Some(range) = range else { return false };
    head.set("content-range", range);
    head.set("content-length", bytes.to_string());
    true
}

/// SplitMix64's finaliser.
fn mix(x: u64) -> u64 {
    let x = x.wrapping_add(0x9e37_79b9_7f4a_7c15);
    let x = (x ^ (x >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
    let x = (x ^ (x >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
    x ^ (x >> 31)
}
