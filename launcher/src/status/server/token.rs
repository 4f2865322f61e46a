//! The secret of those who may see the status from elsewhere.

use subtle::ConstantTimeEq;

const TOKEN: &str = "DITHAROS_STATUS_TOKEN";
const TOKEN_FILE: &str = "DITHAROS_STATUS_TOKEN_FILE";
/// No rank needs these.
pub const VARIABLES: [&str; 2] = [TOKEN, TOKEN_FILE];
/// Shorter tokens can be guessed.
const SHORTEST: usize = 16;

/// It is never written anywhere but into the cookie of who has given it.
pub struct Token(String);

/// Why there is no token.
#[derive(Debug, thiserror::Error)]
pub enum TokenError {
    /// One is needed.
    #[error(
        "an address that others can reach needs a token: set {TOKEN}, or {TOKEN_FILE} to a file that only its owner can read \
         (for example of `openssl rand -hex 32`); 127.0.0.1 needs none"
    )]
    Missing,
    /// Too short, or with characters that headers and addresses do not take.
    #[error(
        "the token has {length} characters; expected {SHORTEST} or more, of letters, digits and -._~, that nobody can guess"
    )]
    Form {
        /// How long it is.
        length: usize,
    },
    /// Its file cannot be read.
    #[error("{TOKEN_FILE}: {path}: {reason}")]
    File {
        /// The file.
        path: String,
        /// As the system tells it.
        reason: std::io::Error,
    },
}

impl Token {
    /// The one that the environment gives or names a file of, if it does.
    pub fn of_environment() -> Result<Option<Token>, TokenError> {
        let given = std::env::var(TOKEN).ok().filter(|token| !token.is_empty());
        match (given, std::env::var_os(TOKEN_FILE)) {
            (Some(token), _) => Token::new(token.trim()).map(Some),
            (None, Some(path)) => {
                let file = |reason| TokenError::File { path: path.display().to_string(), reason };
                Token::new(std::fs::read_to_string(&path).map_err(file)?.trim()).map(Some)
            }
            (None, None) => Ok(None),
        }
    }

    /// One in the form that is asked for.
    pub fn new(token: &str) -> Result<Token, TokenError> {
        let is_plain = token.bytes().all(|byte| byte.is_ascii_alphanumeric() || b"-._~".contains(&byte));
        match token.len() >= SHORTEST && is_plain {
            true => Ok(Token(token.to_owned())),
            false => Err(TokenError::Form { length: token.chars().count() }),
        }
    }

    /// Whether it is this one; how long that takes tells nothing but whether the length is right.
    pub fn is(&self, given: &str) -> bool {
        self.0.as_bytes().ct_eq(given.as_bytes()).into()
    }

    /// For the cookie.
    pub fn text(&self) -> &str {
        &self.0
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn short_tokens_and_those_that_break_a_header_are_refused_without_being_shown() {
        assert!(Token::new("0123456789abcdef").is_ok());
        for wrong in ["0123456789abcde", "0123456789abcdef\r\nSet-Cookie: a", "0123456789abcdef;", "0123456789abc def"]
        {
            let said = Token::new(wrong).err().map(|error| error.to_string()).unwrap_or_default();
            assert!(said.contains("16 or more") && !said.contains("0123456789"), "{said}");
        }
    }
}
