/// `text` in which every URL has lost its user-info, query and fragment. Error messages of HTTP clients quote URLs,
/// and signed URLs carry their signature in the query.
pub fn redact_text(text: &str) -> String {
    let mut out = String::with_capacity(text.len());
    let mut rest = text;
    while let Some(at) = rest.find("://") {
        let (before, url) = rest.split_at(at + 3);
        out.push_str(before);
        let end = url
            .find(|c: char| c.is_whitespace() || matches!(c, '"' | '\'' | ')' | '>' | '`' | ','))
            .unwrap_or(url.len());
        let (url, after) = url.split_at(end);
        let (kept, had_query) = match url.find(['?', '#']) {
            Some(cut) => (&url[..cut], true),
            None => (url, false),
        };
        let authority_end = kept.find('/').unwrap_or(kept.len());
        let (authority, path) = kept.split_at(authority_end);
        out.push_str(authority.rsplit('@').next().unwrap_or(authority));
        out.push_str(path);
        if had_query {
            let closing = url.trim_end_matches(['.', ':', ';']).len();
            out.push_str(&url[closing..]);
        }
        rest = after;
    }
    out.push_str(rest);
    out
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn secrets_leave_urls_and_messages() {
        assert_eq!(redact_text("s3://key:secret@bucket/run?token=1#x"), "s3://bucket/run");
        assert_eq!(redact_text("file:///a/b"), "file:///a/b");
        assert_eq!(
            redact_text("sending to (https://u:p@h.net/c/k?sig=SECRET&x=1): refused, see http://x/y?z=SECRET"),
            "sending to (https://h.net/c/k): refused, see http://x/y"
        );
        assert_eq!(redact_text("no url here"), "no url here");
    }
}
