//! Texts that come from elsewhere and must not be long.

/// The beginning of `text`, up to the last character that ends within its first `most` bytes.
pub fn beginning(text: &str, most: usize) -> &str {
    let mut end = text.len().min(most);
    while !text.is_char_boundary(end) {
        end -= 1;
    }
    &text[..end]
}

/// Leaves the [`beginning`] of `text`.
pub fn cut(text: &mut String, most: usize) {
    text.truncate(beginning(text, most).len());
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn no_character_is_cut_in_two() {
        let cases = [
            ("ab", 3, "ab"),
            ("ab", 2, "ab"),
            ("ab", 1, "a"),
            ("ab", 0, ""),
            ("a\u{e4}b", 2, "a"),
            ("a\u{e4}b", 3, "a\u{e4}"),
            ("\u{e4}", 1, ""),
        ];
        for (text, most, expected) in cases {
            let mut cut_off = text.to_owned();
            cut(&mut cut_off, most);
            assert_eq!(cut_off, expected, "{text} to {most} bytes");
        }
    }
}
