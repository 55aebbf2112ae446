//! What every command prints alike: times, UUIDs, errors.

use std::io::{self, IsTerminal, Write};

use time::OffsetDateTime;
use time::format_description::well_known::Rfc3339;
use uuid::Uuid;

/// RFC 3339, to the second; empty for 0, which stands for "never" on the wire.
pub(crate) fn moment(millis: i64) -> String {
    if millis == 0 {
        return String::new();
    }
    let time = OffsetDateTime::from_unix_timestamp(millis.div_euclid(1000)).unwrap_or(OffsetDateTime::UNIX_EPOCH);
    time.format(&Rfc3339).unwrap_or_default()
}

/// A UUID of 16 bytes; other bytes as the text that they are.
pub(crate) fn uuid(bytes: &[u8]) -> String {
    Uuid::from_slice(bytes).map_or_else(|_| String::from_utf8_lossy(bytes).into_owned(), |uuid| uuid.to_string())
}

/// Says something beside the answer, such as why there is none. A closed standard error leaves nobody to tell.
pub(crate) fn remark(remark: impl std::fmt::Display) {
    let _closed = writeln!(io::stderr(), "chancery: {remark}");
}

/// A word in colour, if somebody watches: green for good, yellow for a warning, red for bad.
pub(crate) fn coloured(level: &str, word: &str) -> String {
    let code = match level {
        "ok" => "32",
        "warn" => "33",
        _ => "31",
    };
    if io::stdout().is_terminal() && std::env::var_os("NO_COLOR").is_none() {
        format!("\x1b[{code}m{word}\x1b[0m")
    } else {
        word.to_owned()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn times_are_written_to_the_second() {
        assert_eq!(moment(1_700_000_000_999), "2023-11-14T22:13:20Z");
        assert_eq!(moment(0), "");
    }

    #[test]
    fn what_is_no_uuid_is_shown_as_its_text() {
        assert_eq!(uuid(b"token-7"), "token-7");
        assert_eq!(uuid(&[0; 16]), "00000000-0000-0000-0000-000000000000");
    }
}
