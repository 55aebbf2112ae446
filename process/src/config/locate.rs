//! Where in a TOML text a key stands, for problems that only show once the whole file was read.

use toml::de::{DeTable, DeValue};

/// The line (counted from 1) of the key at `path`, where a number selects an element of an array; the nearest one above it that exists, if
/// it does not.
pub fn line_of(text: &str, path: &[&str]) -> Option<usize> {
    let document = DeTable::parse(text).ok()?;
    let mut at = None;
    let mut table = Some(document.get_ref());
    let mut segments = path.iter().peekable();
    while let (Some(current), Some(segment)) = (table, segments.next()) {
        let Some((key, value)) = current.iter().find(|(key, _)| key.get_ref().as_ref() == *segment) else { break };
        at = Some(key.span().start);
        table = match value.get_ref() {
            DeValue::Table(inner) => Some(inner),
            DeValue::Array(elements) => {
                let index = segments.next().and_then(|segment| segment.parse::<usize>().ok());
                let element = index.and_then(|index| elements.get(index));
                at = element.map(|element| element.span().start).or(at);
                element.and_then(|element| element.get_ref().as_table())
            }
            _ => None,
        };
    }
    at.map(|offset| text[..offset].matches('\n').count() + 1)
}

#[cfg(test)]
mod tests {
    use super::*;

    const TEXT: &str = "a = 1\n[policy]\n\nid = 2\n[[cluster]]\nname = 1\n[[cluster]]\nname = 2\n";

    #[test]
    fn a_key_is_found_in_tables_and_arrays() {
        assert_eq!(line_of(TEXT, &["a"]), Some(1));
        assert_eq!(line_of(TEXT, &["policy", "id"]), Some(4));
        assert_eq!(line_of(TEXT, &["cluster", "1", "name"]), Some(8));
    }

    #[test]
    fn a_key_that_is_not_there_leads_to_what_is_above_it() {
        assert_eq!(line_of(TEXT, &["policy", "missing"]), Some(2));
        assert_eq!(line_of(TEXT, &["cluster", "0", "missing"]), Some(5));
        assert_eq!(line_of(TEXT, &["missing"]), None);
    }
}
