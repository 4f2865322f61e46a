//! The profile files that tools for S3 share: `~/.aws/credentials` and `~/.aws/config`.

use crate::StoreError;
use std::{collections::BTreeMap, path::PathBuf};

/// Environment variables.
#[derive(Debug, Default)]
pub struct Environment(BTreeMap<String, String>);

impl<const N: usize> From<[(String, String); N]> for Environment {
    fn from(variables: [(String, String); N]) -> Self {
        Self(variables.into())
    }
}

impl Environment {
    /// This process's variables, as far as they are UTF-8.
    pub fn of_process() -> Self {
        let text = |(key, value): (std::ffi::OsString, std::ffi::OsString)| {
            Some((key.into_string().ok()?, value.into_string().ok()?))
        };
        Self(std::env::vars_os().filter_map(text).collect())
    }

    /// The value of a variable.
    pub fn get(&self, variable: &str) -> Option<&str> {
        self.0.get(variable).map(String::as_str)
    }

    /// The variables with a prefix, names in lower case as the stores' builders take them.
    pub fn with_prefix(&self, prefix: &'static str) -> impl Iterator<Item = (String, String)> {
        let chosen = self.0.iter().filter(move |(key, _)| key.starts_with(prefix));
        chosen.map(|(key, value)| (key.to_ascii_lowercase(), value.clone())).collect::<Vec<_>>().into_iter()
    }
}

/// Keys of a profile that we understand, which are also what the builder calls them.
const TAKEN: [&str; 5] = ["aws_access_key_id", "aws_secret_access_key", "aws_session_token", "region", "endpoint_url"];
/// Keys by which other tools get credentials that we cannot get.
const UNSUPPORTED: [&str; 4] = ["credential_process", "sso_session", "sso_start_url", "role_arn"];

/// What the profile files say for S3, to be overruled by the environment.
///
/// Credentials are taken from the profile unless the environment has some (`AWS_ACCESS_KEY_ID`, a web identity or a container's
/// role). The profile is `AWS_PROFILE` or `default`; the files are `AWS_SHARED_CREDENTIALS_FILE` and `AWS_CONFIG_FILE`, or those
/// in `~/.aws`. In both a key of the credentials file wins.
///
/// # Errors
/// [`StoreError::File`]: a file that cannot be read or is not of this form; a profile that was asked for by name and does not
/// exist, or that gets its credentials in a way that is not supported (SSO, roles, processes).
pub fn s3_settings(environment: &Environment) -> Result<Vec<(String, String)>, StoreError> {
    let named = environment.get("AWS_PROFILE").filter(|name| !name.is_empty());
    let profile = named.unwrap_or("default");
    let file = |variable: &str, name: &str| {
        environment
            .get(variable)
            .map(PathBuf::from)
            .or_else(|| Some(PathBuf::from(environment.get("HOME")?).join(".aws").join(name)))
    };
    let config = sections(file("AWS_CONFIG_FILE", "config"))?;
    let credentials = sections(file("AWS_SHARED_CREDENTIALS_FILE", "credentials"))?;
    let in_config = if profile == "default" { "default".to_owned() } else { format!("profile {profile}") };
    let found = [config.get(&in_config), credentials.get(profile)];
    if let (Some(name), [None, None]) = (named, found) {
        let file = "~/.aws/credentials and ~/.aws/config".to_owned();
        let reason = format!("there is no profile `{name}`, which AWS_PROFILE asks for");
        return Err(StoreError::File { file, reason });
    }
    let mut settings = BTreeMap::new();
    for section in found.into_iter().flatten() {
        settings.extend(section.clone());
    }
    const IN_ENVIRONMENT: [&str; 4] = [
        "AWS_ACCESS_KEY_ID",
        "AWS_WEB_IDENTITY_TOKEN_FILE",
        "AWS_CONTAINER_CREDENTIALS_RELATIVE_URI",
        "AWS_CONTAINER_CREDENTIALS_FULL_URI",
    ];
    if IN_ENVIRONMENT.into_iter().any(|variable| environment.get(variable).is_some_and(|value| !value.is_empty())) {
        settings.retain(|key, _| !key.starts_with("aws_"));
    } else if let (false, Some(key)) =
        (settings.contains_key("aws_access_key_id"), UNSUPPORTED.into_iter().find(|key| settings.contains_key(*key)))
    {
        let reason = format!(
            "profile `{profile}` gets its credentials by `{key}`, which is not supported; export them, for example with \
             `eval \"$(aws configure export-credentials --format env)\"`"
        );
        return Err(StoreError::File { file: "~/.aws/config".to_owned(), reason });
    }
    settings.retain(|key, _| TAKEN.contains(&key.as_str()));
    Ok(settings.into_iter().collect())
}

type Sections = BTreeMap<String, BTreeMap<String, String>>;

/// Sections of an INI file as these tools write it: `[name]`, `key = value`, comments with `#` or `;`. Indented lines belong to
/// the key above them (`s3 =`) and are none of ours. A file that does not exist is empty.
fn sections(path: Option<PathBuf>) -> Result<Sections, StoreError> {
    let Some(path) = path else { return Ok(Sections::new()) };
    let refuse = |reason: String| StoreError::File { file: path.display().to_string(), reason };
    let text = match std::fs::read_to_string(&path) {
        Ok(text) => text,
        Err(error) if error.kind() == std::io::ErrorKind::NotFound => return Ok(Sections::new()),
        Err(error) => return Err(refuse(error.to_string())),
    };
    let mut sections = Sections::new();
    let mut current = None;
    for (number, line) in text.lines().enumerate() {
        if line.trim().is_empty() || line.starts_with([' ', '\t', '#', ';']) {
            continue;
        }
        if let Some(name) = line.trim().strip_prefix('[').and_then(|rest| rest.strip_suffix(']')) {
            let name = name.split_whitespace().collect::<Vec<_>>().join(" ");
            current = Some(name.clone());
            sections.entry(name).or_default();
            continue;
        }
        // The line itself may be a secret: it is not shown.
        let bad = || refuse(format!("line {} is neither `[section]` nor `key = value`", number + 1));
        let (key, value) = line.split_once('=').ok_or_else(bad)?;
        let section = current.as_ref().and_then(|name| sections.get_mut(name)).ok_or_else(bad)?;
        section.insert(key.trim().to_ascii_lowercase(), value.trim().to_owned());
    }
    Ok(sections)
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]
    use super::*;

    const CREDENTIALS: &str = "# mine\n[default]\naws_access_key_id = A\naws_secret_access_key=B=\n\n[work]\naws_access_key_id=C\naws_secret_access_key=D\naws_session_token=E\n[sso]\n";
    const CONFIG: &str = "[default]\nregion = eu-west-1\noutput = json\ns3 =\n  max_concurrent_requests = 20\n[profile work]\nendpoint_url = http://localhost:9000\n[profile sso]\nsso_session = corp\n";

    fn settings(variables: &[(&str, &str)]) -> Result<Vec<(String, String)>, StoreError> {
        let home = tempfile::tempdir().unwrap();
        std::fs::create_dir(home.path().join(".aws")).unwrap();
        std::fs::write(home.path().join(".aws/credentials"), CREDENTIALS).unwrap();
        std::fs::write(home.path().join(".aws/config"), CONFIG).unwrap();
        let mut environment = Environment::from([("HOME".to_owned(), home.path().to_str().unwrap().to_owned())]);
        environment.0.extend(variables.iter().map(|(key, value)| ((*key).to_owned(), (*value).to_owned())));
        s3_settings(&environment)
    }

    fn pairs(found: Vec<(String, String)>) -> Vec<String> {
        found.into_iter().map(|(key, value)| format!("{key}={value}")).collect()
    }

    #[test]
    fn the_profile_is_read_from_both_files() {
        let expected = ["aws_access_key_id=A", "aws_secret_access_key=B=", "region=eu-west-1"];
        assert_eq!(pairs(settings(&[]).unwrap()), expected);
        let expected = [
            "aws_access_key_id=C",
            "aws_secret_access_key=D",
            "aws_session_token=E",
            "endpoint_url=http://localhost:9000",
        ];
        assert_eq!(pairs(settings(&[("AWS_PROFILE", "work")]).unwrap()), expected);
        let elsewhere = settings(&[("AWS_SHARED_CREDENTIALS_FILE", "/nowhere"), ("AWS_CONFIG_FILE", "/nowhere")]);
        assert_eq!(pairs(elsewhere.unwrap()), [""; 0]);
    }

    #[test]
    fn credentials_of_the_environment_are_not_mixed_with_those_of_a_profile() {
        assert_eq!(pairs(settings(&[("AWS_ACCESS_KEY_ID", "X")]).unwrap()), ["region=eu-west-1"]);
    }

    #[test]
    fn what_cannot_be_used_is_said_without_secrets() {
        let error = settings(&[("AWS_PROFILE", "sso")]).unwrap_err().to_string();
        assert!(error.contains("`sso_session`") && error.contains("export"), "{error}");
        let error = settings(&[("AWS_PROFILE", "nobody")]).unwrap_err().to_string();
        assert!(error.contains("`nobody`"), "{error}");
        let file = tempfile::NamedTempFile::new().unwrap();
        std::fs::write(file.path(), "[default]\nSECRET\n").unwrap();
        let error = settings(&[("AWS_CONFIG_FILE", file.path().to_str().unwrap())]).unwrap_err().to_string();
        assert!(error.contains("line 2") && !error.contains("SECRET"), "{error}");
    }
}
