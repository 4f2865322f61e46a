//! The status server: metrics, JSON and a page over HTTP, to whoever may see them. It reads what the supervisor keeps and can hold
//! nothing up: every connection has a thread, an end and bounds, and there are only so many of them.

mod http;
mod metrics;
mod token;

use std::io::Write;
use std::net::{SocketAddr, TcpListener, TcpStream};
use std::path::Path;
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::time::{Duration, Instant};

use super::Status;
use http::{Answer, Request};
pub use token::VARIABLES as TOKEN_VARIABLES;
use token::{Token, TokenError};

/// Connections served at a time.
const MOST_CONNECTIONS: usize = 16;
/// Time for a request, and again for its answer.
const PATIENCE: Duration = Duration::from_secs(10);
/// A sample grid that is larger is not shown.
const MOST_IMAGE_BYTES: u64 = 32 << 20;
const PAGE: &str = include_str!("page.html");

/// Why there is no status server.
#[derive(Debug, thiserror::Error)]
pub enum ServerError {
    /// Who may see it is not said, or badly.
    #[error("--status-addr {address}: {reason}")]
    Token {
        /// Where it was to listen.
        address: SocketAddr,
        /// What is missing.
        reason: TokenError,
    },
    /// It cannot listen there.
    #[error("--status-addr {address}: {reason}; is the port taken, the address one of this machine?")]
    Listen {
        /// Where it was to listen.
        address: SocketAddr,
        /// As the system tells it.
        reason: std::io::Error,
    },
}

/// What every connection needs.
struct Server {
    status: Arc<Status>,
    token: Option<Token>,
    connections: AtomicUsize,
}

/// Serves `status` at `address` from now on; gives the address with the port that it has got. Beyond this machine's own programs
/// only who has the token is answered.
///
/// # Errors
/// [`ServerError`].
pub fn start(address: SocketAddr, status: Arc<Status>) -> Result<SocketAddr, ServerError> {
    let token = Token::of_environment().map_err(|reason| ServerError::Token { address, reason })?;
    if token.is_none() && !address.ip().is_loopback() {
        return Err(ServerError::Token { address, reason: TokenError::Missing });
    }
    let refused = |reason| ServerError::Listen { address, reason };
    let listener = TcpListener::bind(address).map_err(refused)?;
    let address = listener.local_addr().map_err(refused)?;
    let server = Arc::new(Server { status, token, connections: AtomicUsize::new(0) });
    let work = move || {
        for stream in listener.incoming() {
            match stream {
                Ok(stream) => server.clone().take(stream),
                // Out of descriptors, perhaps: that passes.
                Err(_) => std::thread::sleep(Duration::from_millis(100)),
            }
        }
    };
    std::thread::Builder::new().name("status-server".to_owned()).spawn(work).map_err(refused)?;
    Ok(address)
}

impl Server {
    /// Serves a connection on a thread of its own; closes it where there are too many.
    fn take(self: Arc<Self>, stream: TcpStream) {
        if self.connections.fetch_add(1, Ordering::Relaxed) >= MOST_CONNECTIONS {
            self.connections.fetch_sub(1, Ordering::Relaxed);
            return;
        }
        let server = self.clone();
        let work = move || {
            // A client that has gone, or is too slow, is no matter.
            let _ = server.serve(stream);
            server.connections.fetch_sub(1, Ordering::Relaxed);
        };
        if std::thread::Builder::new().name("status-client".to_owned()).spawn(work).is_err() {
            self.connections.fetch_sub(1, Ordering::Relaxed);
        }
    }

    fn serve(&self, mut stream: TcpStream) -> std::io::Result<()> {
        let request = http::read(&mut stream, Instant::now() + PATIENCE)?;
        let is_head = request.as_ref().is_ok_and(|request| request.is_head);
        let answer = request.map_or_else(|refusal| refusal, |request| self.answer(&request));
        http::write(&mut stream, &answer, is_head, Instant::now() + PATIENCE)?;
        stream.flush()
    }

    fn answer(&self, request: &Request) -> Answer {
        if let Some(refusal) = self.refusal(request) {
            return refusal;
        }
        let now = Instant::now();
        match request.path.as_str() {
            "/" => Answer::new(200, "text/html; charset=utf-8", PAGE),
            "/status.json" => Answer::new(200, "application/json", self.status.snapshot(now).to_string()),
            "/history.json" => Answer::new(200, "application/json", self.status.history().to_string()),
            "/metrics" => {
                let text = metrics::text(&self.status.snapshot(now));
                Answer::new(200, "text/plain; version=0.0.4; charset=utf-8", text)
            }
            "/sample.png" => match self.status.sample().and_then(|path| image(Path::new(&path))) {
                Some(image) => Answer::new(200, "image/png", image),
                None => Answer::text(404, "no sample grid that can be read here"),
            },
            _ => Answer::text(404, "there are /, /status.json, /history.json, /metrics and /sample.png"),
        }
    }

    /// Who may not see it. A token in the query becomes a cookie, so that it stays in no address bar.
    fn refusal(&self, request: &Request) -> Option<Answer> {
        let Some(token) = &self.token else {
            // A page from elsewhere may have given its own name this machine's address.
            let is_ours = request.header("host").is_some_and(is_loopback_name);
            return (!is_ours).then(|| Answer::text(403, "without a token only localhost is answered"));
        };
        if request.query.as_deref().and_then(|query| query.strip_prefix("token=")).is_some_and(|given| token.is(given))
        {
            let cookie = format!("{COOKIE}={}; HttpOnly; SameSite=Strict; Path=/", token.text());
            return Some(Answer::text(303, "").with("Location", "/").with("Set-Cookie", &cookie));
        }
        let bearer = request.header("authorization").and_then(|value| value.strip_prefix("Bearer "));
        let cookies = request.header("cookie").unwrap_or_default().split(';');
        let cookie = cookies.filter_map(|cookie| cookie.trim().strip_prefix(COOKIE)?.strip_prefix('=')).next();
        let is_known = [bearer, cookie].into_iter().flatten().any(|given| token.is(given));
        (!is_known).then(|| {
            let how = "give the token: Authorization: Bearer TOKEN, or /?token=TOKEN once";
            Answer::text(401, how).with("WWW-Authenticate", "Bearer")
        })
    }
}

const COOKIE: &str = "ditharos_status";

fn is_loopback_name(host: &str) -> bool {
    let name = match host.strip_prefix('[') {
        Some(rest) => rest.split(']').next().unwrap_or_default(),
        None => host.split(':').next().unwrap_or_default(),
    };
    name == "localhost" || name.parse::<std::net::IpAddr>().is_ok_and(|ip| ip.is_loopback())
}

/// A grid that a run on this machine has written.
fn image(path: &Path) -> Option<Vec<u8>> {
    let is_image = path.is_absolute() && path.extension().is_some_and(|extension| extension == "png");
    let is_small = std::fs::metadata(path).is_ok_and(|file| file.is_file() && file.len() <= MOST_IMAGE_BYTES);
    (is_image && is_small).then(|| std::fs::read(path).ok()).flatten()
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use super::*;

    fn server(token: Option<&str>) -> Server {
        let status = Arc::new(Status::new(None).unwrap());
        let token = token.map(|token| Token::new(token).unwrap());
        Server { status, token, connections: AtomicUsize::new(0) }
    }

    fn ask(server: &Server, target: &str, headers: &[(&str, &str)]) -> Answer {
        server.answer(&Request::new(target, headers))
    }

    #[test]
    fn without_a_token_only_this_machines_names_are_answered() {
        let server = server(None);
        for (host, status) in [
            ("localhost:9000", 200),
            ("127.0.0.1:9000", 200),
            ("[::1]:9000", 200),
            ("evil.example", 403),
            ("127.0.0.1.evil.example", 403),
            ("", 403),
        ] {
            assert_eq!(ask(&server, "/status.json", &[("host", host)]).status, status, "{host}");
        }
        assert_eq!(ask(&server, "/", &[]).status, 403);
    }

    #[test]
    fn with_a_token_whoever_has_it_is_answered_and_nobody_else() {
        let (secret, server) = ("0123456789abcdef", server(Some("0123456789abcdef")));
        let status = |target: &str, headers: &[(&str, &str)]| ask(&server, target, headers).status;
        for path in ["/", "/status.json", "/history.json", "/metrics", "/sample.png", "/nothing"] {
            assert_eq!(status(path, &[("host", "localhost")]), 401, "{path}");
        }
        assert_eq!(status("/metrics", &[("authorization", &format!("Bearer {secret}"))]), 200);
        assert_eq!(status("/metrics", &[("authorization", "Bearer 0123456789abcdeg")]), 401);
        assert_eq!(status("/metrics", &[("authorization", "Bearer 0123")]), 401);
        let entered = ask(&server, &format!("/?token={secret}"), &[]);
        let cookie = entered.headers.iter().find(|(name, _)| *name == "Set-Cookie").unwrap().1.clone();
        assert!(entered.status == 303 && cookie.contains("HttpOnly; SameSite=Strict"), "{cookie}");
        let pair = cookie.split(';').next().unwrap();
        assert_eq!(status("/", &[("cookie", &format!("a=b; {pair}"))]), 200);
        assert_eq!(status("/", &[("cookie", "a=b; ditharos_status=wrong")]), 401);
        assert_eq!(status("/?token=wrong", &[]), 401);
    }

    #[test]
    fn beyond_the_loopback_it_does_not_start_without_a_token() {
        let status = Arc::new(Status::new(None).unwrap());
        let refused = start("0.0.0.0:0".parse().unwrap(), status).unwrap_err().to_string();
        assert!(refused.contains("0.0.0.0:0") && refused.contains("DITHAROS_STATUS_TOKEN"), "{refused}");
    }

    #[test]
    fn only_images_with_a_whole_path_are_read() {
        let folder = tempfile::tempdir().unwrap();
        let (grid, other) = (folder.path().join("a.png"), folder.path().join("a.txt"));
        std::fs::write(&grid, "png").unwrap();
        std::fs::write(&other, "text").unwrap();
        assert_eq!(image(&grid).unwrap(), b"png");
        assert!(
            image(&other).is_none()
                && image(Path::new("a.png")).is_none()
                && image(Path::new("s3://b/a.png")).is_none()
        );
    }
}
