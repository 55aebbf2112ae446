//! Reading a TOML configuration file into a type, with errors that name the place and the next step.
//!
//! Types refuse unknown keys themselves (`#[serde(deny_unknown_fields)]`) and check values while they are parsed (`#[serde(try_from)]`),
//! so that a wrong value is reported with its line. What spans several keys is for the caller to check afterwards.

mod locate;

use std::path::{Path, PathBuf};

use serde::de::DeserializeOwned;

/// For durations such as `"30s"` or `"1h 30m"`, optional ones too: `#[serde(with = "chancery_process::config::duration")]`.
pub use humantime_serde as duration;
pub use locate::line_of;

/// Larger files are refused unread.
const MAX_BYTES: u64 = 1 << 20;

/// A configuration that cannot be used.
#[derive(Debug, thiserror::Error)]
pub enum ConfigError {
    /// The file could not be read at all.
    #[error("{}: {error}; check that the file exists and that this process may read it", path.display())]
    Read {
        /// The file.
        path: PathBuf,
        /// What the system said.
        error: std::io::Error,
    },
    /// The file is larger than any configuration.
    #[error("{}: larger than {MAX_BYTES} bytes; is this a configuration file?", path.display())]
    TooLarge {
        /// The file.
        path: PathBuf,
    },
    /// Not TOML, or TOML that does not fit.
    #[error("{}:{line}:{column}: {message}; {next_step}", path.display())]
    Invalid {
        /// The file.
        path: PathBuf,
        /// Counted from 1.
        line: usize,
        /// In characters, counted from 1.
        column: usize,
        /// What is wrong.
        message: String,
        /// What to do about it.
        next_step: &'static str,
    },
}

/// Reads the file at `path` and parses it.
pub fn load<T: DeserializeOwned>(path: &Path) -> Result<T, ConfigError> {
    parse(path, &read(path)?)
}

/// Reads the file at `path`, for callers that need its text beside what it says.
pub fn read(path: &Path) -> Result<String, ConfigError> {
    let read = |error| ConfigError::Read { path: path.to_owned(), error };
    if std::fs::metadata(path).map_err(read)?.len() > MAX_BYTES {
        return Err(ConfigError::TooLarge { path: path.to_owned() });
    }
    std::fs::read_to_string(path).map_err(read)
}

/// Parses `text`; `path` is for the error alone.
pub fn parse<T: DeserializeOwned>(path: &Path, text: &str) -> Result<T, ConfigError> {
    toml::from_str(text).map_err(|error| {
        let (line, column) = position(text, error.span().map_or(0, |span| span.start));
        let message = error.message().trim().replace('\n', ", ");
        let next_step = next_step(&message);
        ConfigError::Invalid { path: path.to_owned(), line, column, message, next_step }
    })
}

fn position(text: &str, offset: usize) -> (usize, usize) {
    let before = text.get(..offset).unwrap_or(text);
    let line_start = before.rfind('\n').map_or(0, |newline| newline + 1);
    (before.matches('\n').count() + 1, before[line_start..].chars().count() + 1)
}

fn next_step(message: &str) -> &'static str {
    if message.starts_with("unknown field") {
        "remove it or mend its spelling (`config example` prints every key)"
    } else if message.starts_with("missing field") {
        "add it (`config example` prints every key)"
    } else {
        "mend this value (`config example` prints every key with its meaning)"
    }
}

#[cfg(test)]
mod tests {
    use std::time::Duration;

    use serde::Deserialize;

    use super::*;

    #[derive(Debug, Deserialize)]
    #[serde(deny_unknown_fields)]
    struct Example {
        #[serde(with = "duration")]
        lifetime: Duration,
        #[serde(default, with = "duration")]
        grace: Option<Duration>,
    }

    fn error(text: &str) -> String {
        parse::<Example>(Path::new("ca.toml"), text).unwrap_err().to_string()
    }

    #[test]
    fn durations_are_written_for_people() {
        let example: Example = parse(Path::new("ca.toml"), "lifetime = \"1h 30m\"\ngrace = \"30s\"").unwrap();
        assert_eq!(example.lifetime, Duration::from_secs(5400));
        assert_eq!(example.grace, Some(Duration::from_secs(30)));
    }

    #[test]
    fn an_unknown_key_is_refused_with_its_place_and_the_known_ones() {
        let error = error("lifetime = \"1h\"\n\n  lifetimes = 3\n");
        assert!(error.starts_with("ca.toml:3:3: unknown field `lifetimes`, expected"), "{error}");
        assert!(error.contains("`grace`") && error.contains("config example"), "{error}");
    }

    #[test]
    fn a_bad_value_is_refused_with_its_place() {
        let error = error("grace = \"1s\"\nlifetime = \"soon\"\n");
        assert!(error.starts_with("ca.toml:2:12: "), "{error}");
    }

    #[test]
    fn a_missing_key_is_named() {
        assert!(error("grace = \"1s\"").contains("missing field `lifetime`"), "{}", error(""));
    }

    #[test]
    fn broken_toml_is_refused_with_its_place() {
        assert!(error("lifetime = \"1h\"\n[[").starts_with("ca.toml:2:"), "{}", error("[["));
    }

    #[test]
    fn a_missing_file_is_named() {
        let error = load::<Example>(Path::new("/nonexistent/ca.toml")).unwrap_err().to_string();
        assert!(error.starts_with("/nonexistent/ca.toml: "), "{error}");
    }

    #[test]
    fn a_huge_file_is_refused_unread() {
        let file = tempfile::NamedTempFile::new().unwrap();
        file.as_file().set_len(MAX_BYTES + 1).unwrap();
        assert!(matches!(load::<Example>(file.path()), Err(ConfigError::TooLarge { .. })));
    }
}
