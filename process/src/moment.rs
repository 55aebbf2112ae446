//! How people are told times.

use time::OffsetDateTime;
use time::format_description::well_known::Rfc3339;

/// RFC 3339, to the second.
pub fn moment(time: OffsetDateTime) -> String {
    to_the_second(time).format(&Rfc3339).unwrap_or_default()
}

/// Without what is less than a second.
pub fn to_the_second(time: OffsetDateTime) -> OffsetDateTime {
    time.replace_nanosecond(0).unwrap_or(time)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn times_are_written_to_the_second() {
        let time = OffsetDateTime::from_unix_timestamp_nanos(1_700_000_000_999_999_999).unwrap();
        assert_eq!(moment(time), "2023-11-14T22:13:20Z");
    }
}
