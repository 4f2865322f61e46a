//! How ranks find each other and prove that they belong to the same run: rank 0 listens, the others connect, and both sides
//! show that they know the run's token without sending it.

use crate::CollectiveError;
use hmac::{Hmac, KeyInit, Mac};
use sha2::Sha256;
use std::io::{self, Read, Write};
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr, TcpListener, TcpStream, ToSocketAddrs};
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::mpsc::channel;
use std::time::{Duration, Instant};

const TOKEN: &str = "DITHAROS_RENDEZVOUS_TOKEN";
const TOKEN_FILE: &str = "DITHAROS_RENDEZVOUS_TOKEN_FILE";
/// The only network interface to listen on.
const INTERFACE: &str = "DITHAROS_INTERFACE";
/// Shorter tokens can be guessed.
const SHORTEST_TOKEN: usize = 16;
const MAGIC: [u8; 8] = *b"DTHRSTC1";
/// How long a stranger may take to say who it is.
const HANDSHAKE: Duration = Duration::from_secs(10);
const LONGEST_PAUSE: Duration = Duration::from_millis(500);

/// A secret of one run. It is never written anywhere.
#[derive(Clone)]
pub(super) struct Token(Arc<[u8]>);

impl Token {
    /// The one that the environment gives or names a file of.
    pub fn of_environment() -> Result<Self, String> {
        let given = std::env::var(TOKEN).ok().filter(|token| !token.is_empty());
        let token = match (given, std::env::var_os(TOKEN_FILE)) {
            (Some(token), _) => token,
            (None, Some(path)) => {
                std::fs::read_to_string(&path).map_err(|error| format!("{TOKEN_FILE}: {}: {error}", path.display()))?
            }
            (None, None) => {
                return Err(format!(
                    "ranks that meet over TCP need a secret of their run, the same on all: set {TOKEN}, or {TOKEN_FILE} to a \
                     file that only its owner can read (for example of `openssl rand -hex 32`)"
                ));
            }
        };
        Self::new(token.trim()).map_err(|length| {
            format!("the run's token has {length} characters; expected {SHORTEST_TOKEN} or more that nobody can guess")
        })
    }

    /// Or its length, when that is too short.
    pub fn new(token: &str) -> Result<Self, usize> {
        if token.len() < SHORTEST_TOKEN { Err(token.len()) } else { Ok(Self(token.as_bytes().into())) }
    }

    fn mac(&self, who: &str, hello: &Hello, answer: &[u8; 32]) -> Hmac<Sha256> {
        // HMAC takes keys of any length.
        #[allow(clippy::unwrap_used)]
        let mut mac = Hmac::<Sha256>::new_from_slice(&self.0).unwrap();
        mac.update(who.as_bytes());
        mac.update(&hello.to_bytes());
        mac.update(answer);
        mac
    }
}

/// What a rank says first.
#[derive(Clone, Copy)]
struct Hello {
    group: u64,
    rank: u32,
    size: u32,
    nonce: [u8; 32],
}

impl Hello {
    const BYTES: usize = 8 + 8 + 4 + 4 + 32;

    fn to_bytes(self) -> [u8; Self::BYTES] {
        let mut bytes = [0; Self::BYTES];
        bytes[..8].copy_from_slice(&MAGIC);
        bytes[8..16].copy_from_slice(&self.group.to_le_bytes());
        bytes[16..20].copy_from_slice(&self.rank.to_le_bytes());
        bytes[20..24].copy_from_slice(&self.size.to_le_bytes());
        bytes[24..].copy_from_slice(&self.nonce);
        bytes
    }

    fn from_bytes(bytes: [u8; Self::BYTES]) -> Option<Self> {
        let number = |at: usize| u32::from_le_bytes([bytes[at], bytes[at + 1], bytes[at + 2], bytes[at + 3]]);
        let group = u64::from(number(8)) | u64::from(number(12)) << 32;
        let mut nonce = [0; 32];
        nonce.copy_from_slice(&bytes[24..]);
        (bytes[..8] == MAGIC).then_some(Self { group, rank: number(16), size: number(20), nonce })
    }
}

/// A group that meets, seen from one of its ranks.
#[derive(Clone)]
pub(super) struct Group {
    /// Tells apart the groups of a run.
    pub id: u64,
    pub rank: usize,
    pub size: usize,
    /// In the whole run, for messages.
    pub run_rank: usize,
    pub token: Token,
    pub deadline: Duration,
}

impl Group {
    fn failed(&self, reason: String) -> CollectiveError {
        let rank = self.run_rank;
        CollectiveError::Init { backend: super::BACKEND, reason: format!("rank {rank}: {reason}") }
    }

    /// Listens where the others will look, or on all interfaces when that name is not one of this machine's own (a service
    /// in front of it); never on another interface than the environment names, if it does.
    pub fn listen(&self, host: &str, port: u16) -> Result<TcpListener, CollectiveError> {
        let only = std::env::var(INTERFACE).ok().filter(|name| !name.is_empty());
        let name = only.as_deref().unwrap_or_default();
        let failed = |error: io::Error| self.failed(format!("{INTERFACE} is {name:?}: {error}"));
        let allowed = only.as_deref().map(super::interface::addresses).transpose().map_err(failed)?;
        let everywhere = vec![IpAddr::from(Ipv6Addr::UNSPECIFIED), Ipv4Addr::UNSPECIFIED.into()];
        let otherwise = allowed.clone().unwrap_or(everywhere).into_iter().map(|ip| SocketAddr::new(ip, port));
        let named = (host, port).to_socket_addrs().into_iter().flatten();
        let mut reason = String::new();
        for address in named.chain(otherwise) {
            match TcpListener::bind(address) {
                Ok(_) if allowed.as_ref().is_some_and(|allowed| !allowed.contains(&address.ip())) => {
                    // The others would look in vain on that one.
                    reason = format!(
                        "the others look for rank 0 at {address}, which is not on the interface {name:?} ({INTERFACE}): give them its \
                         address there, {}=HOST:PORT",
                        crate::environment::RENDEZVOUS
                    );
                    break;
                }
                Ok(listener) => return Ok(listener),
                Err(error) => {
                    reason = format!("cannot listen on {address}: {error}");
                    if error.kind() == io::ErrorKind::AddrInUse {
                        // The others would look in vain on another interface.
                        break;
                    }
                }
            }
        }
        Err(self.failed(reason))
    }

    /// Rank 0: takes in all others, in rank order. Strangers are turned away and cannot hold anybody up.
    pub fn take_in(&self, listener: &TcpListener) -> Result<Vec<TcpStream>, CollectiveError> {
        let failed = |error: io::Error| self.failed(format!("listening: {error}"));
        listener.set_nonblocking(true).map_err(failed)?;
        let until = Instant::now() + self.deadline;
        let (sender, arrivals) = channel::<(usize, TcpStream)>();
        let busy = Arc::new(AtomicUsize::new(0));
        let mut present: Vec<Option<TcpStream>> = (1..self.size).map(|_| None).collect();
        let mut pause = Duration::from_millis(1);
        loop {
            while let Ok((rank, stream)) = arrivals.try_recv() {
                present[rank - 1] = Some(stream);
            }
            if present.iter().all(Option::is_some) {
                return Ok(present.into_iter().flatten().collect());
            }
            match listener.accept() {
                Ok((stream, _)) if busy.load(Ordering::Relaxed) < self.size + 16 => {
                    let (group, sender, busy) = (self.clone(), sender.clone(), busy.clone());
                    busy.fetch_add(1, Ordering::Relaxed);
                    let greet = move || {
                        if let Ok(rank) = group.greet(&stream) {
                            let _ = sender.send((rank, stream));
                        }
                        busy.fetch_sub(1, Ordering::Relaxed);
                    };
                    std::thread::Builder::new().name("rendezvous".to_owned()).spawn(greet).map_err(failed)?;
                    pause = Duration::from_millis(1);
                }
                Ok(_) => {}
                Err(error) if error.kind() == io::ErrorKind::WouldBlock => {
                    std::thread::sleep(pause);
                    pause = (pause * 2).min(LONGEST_PAUSE / 10);
                }
                Err(error) => return Err(failed(error)),
            }
            if Instant::now() > until {
                let missing = present.iter().enumerate().filter(|(_, stream)| stream.is_none());
                let missing: Vec<String> = missing.take(8).map(|(index, _)| (index + 1).to_string()).collect();
                return Err(CollectiveError::Deadline {
                    rank: self.run_rank,
                    op: "rendezvous",
                    phase: format!("waiting for rank(s) {} of {}", missing.join(", "), self.size).into(),
                    deadline: self.deadline,
                });
            }
        }
    }

    /// Finds out who is at the other end, and lets it know that this is the right place.
    fn greet(&self, stream: &TcpStream) -> Result<usize, String> {
        let text = |error: io::Error| error.to_string();
        prepare(stream).map_err(text)?;
        let mut bytes = [0; Hello::BYTES];
        read_until(stream, &mut bytes, Instant::now() + HANDSHAKE).map_err(text)?;
        let hello = Hello::from_bytes(bytes).ok_or("not a rank")?;
        let nonce: [u8; 32] = rand::random();
        let proof = self.token.mac("server", &hello, &nonce).finalize().into_bytes();
        write_until(stream, &[&nonce[..], &proof].concat(), Instant::now() + HANDSHAKE).map_err(text)?;
        let mut proof = [0; 32];
        read_until(stream, &mut proof, Instant::now() + HANDSHAKE).map_err(text)?;
        self.token.mac("client", &hello, &nonce).verify_slice(&proof).map_err(|_| "another token")?;
        let rank = hello.rank as usize;
        let expected = (self.id, self.size as u32);
        let fits = (hello.group, hello.size) == expected && (1..self.size).contains(&rank);
        write_until(stream, &[u8::from(fits)], Instant::now() + HANDSHAKE).map_err(text)?;
        if fits { Ok(rank) } else { Err("of another group".to_owned()) }
    }

    /// The other ranks: the connection to rank 0, which may not be there yet.
    pub fn connect(&self, host: &str, port: u16) -> Result<TcpStream, CollectiveError> {
        let until = Instant::now() + self.deadline;
        let mut pause = Duration::from_millis(10);
        loop {
            let reason = match self.try_connect(host, port, until) {
                Ok(Ok(stream)) => return Ok(stream),
                // Somebody else is there, who will not go away.
                Ok(Err(reason)) => return Err(self.failed(format!("{host}:{port}: {reason}"))),
                Err(error) => error.to_string(),
            };
            if Instant::now() + pause > until {
                return Err(CollectiveError::Deadline {
                    rank: self.run_rank,
                    op: "rendezvous",
                    phase: format!("connecting to rank 0 at {host}:{port}: {reason}").into(),
                    deadline: self.deadline,
                });
            }
            std::thread::sleep(pause);
            pause = (pause * 2).min(LONGEST_PAUSE);
        }
    }

    /// Outer errors may pass, inner ones are final.
    fn try_connect(&self, host: &str, port: u16, until: Instant) -> io::Result<Result<TcpStream, String>> {
        let mut last = io::Error::new(io::ErrorKind::NotFound, "the name has no address");
        for address in (host, port).to_socket_addrs()? {
            let patience = until.saturating_duration_since(Instant::now()).min(HANDSHAKE).max(Duration::from_millis(1));
            match TcpStream::connect_timeout(&address, patience) {
                Ok(stream) => return self.introduce(stream, until),
                Err(error) => last = error,
            }
        }
        Err(last)
    }

    fn introduce(&self, stream: TcpStream, until: Instant) -> io::Result<Result<TcpStream, String>> {
        prepare(&stream)?;
        let hello = Hello { group: self.id, rank: self.rank as u32, size: self.size as u32, nonce: rand::random() };
        write_until(&stream, &hello.to_bytes(), until)?;
        let mut answer = [0; 64];
        read_until(&stream, &mut answer, until)?;
        let (nonce, proof) = answer.split_at(32);
        let nonce: &[u8; 32] = nonce.try_into().map_err(io::Error::other)?;
        if self.token.mac("server", &hello, nonce).verify_slice(proof).is_err() {
            return Ok(Err("what listens there does not know this run's token".to_owned()));
        }
        let proof = self.token.mac("client", &hello, nonce).finalize().into_bytes();
        write_until(&stream, &proof, until)?;
        let mut welcome = [0];
        read_until(&stream, &mut welcome, until)?;
        match welcome {
            [1] => Ok(Ok(stream)),
            _ => Ok(Err(format!("rank 0 expects another world than one of {} with a rank {}", self.size, self.rank))),
        }
    }
}

fn prepare(stream: &TcpStream) -> io::Result<()> {
    stream.set_nonblocking(false)?;
    stream.set_nodelay(true)
}

/// Fills `buffer`, or fails when that takes until `until`.
pub(super) fn read_until(mut stream: &TcpStream, mut buffer: &mut [u8], until: Instant) -> io::Result<()> {
    while !buffer.is_empty() {
        stream.set_read_timeout(Some(left(until)?))?;
        match stream.read(buffer) {
            Ok(0) => return Err(io::ErrorKind::UnexpectedEof.into()),
            Ok(count) => buffer = &mut buffer[count..],
            Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
            Err(error) => return Err(error),
        }
    }
    Ok(())
}

/// Writes all of `buffer`, or fails when that takes until `until`.
pub(super) fn write_until(mut stream: &TcpStream, mut buffer: &[u8], until: Instant) -> io::Result<()> {
    while !buffer.is_empty() {
        stream.set_write_timeout(Some(left(until)?))?;
        match stream.write(buffer) {
            Ok(0) => return Err(io::ErrorKind::WriteZero.into()),
            Ok(count) => buffer = &buffer[count..],
            Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
            Err(error) => return Err(error),
        }
    }
    Ok(())
}

fn left(until: Instant) -> io::Result<Duration> {
    let left = until.saturating_duration_since(Instant::now());
    if left.is_zero() { Err(io::ErrorKind::TimedOut.into()) } else { Ok(left) }
}
