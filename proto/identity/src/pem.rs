//! PEM (RFC 7468) out of DER, into one buffer of the final size: growing it would leave copies of a private key behind in freed memory.

use base64::Engine;
use base64::engine::general_purpose::STANDARD;

/// Bytes of DER on one line of 64 characters.
const LINE: usize = 48;

/// How many bytes [`push`] appends at most.
pub(crate) fn encoded_len(label: &str, der_len: usize) -> usize {
    let lines = der_len.div_ceil(LINE);
    "-----BEGIN -----\n-----END -----\n".len() + 2 * label.len() + 65 * lines
}

/// Appends `der` as a PEM block.
pub(crate) fn push(text: &mut String, label: &str, der: &[u8]) {
    text.reserve(encoded_len(label, der.len()));
    text.push_str("-----BEGIN ");
    text.push_str(label);
    text.push_str("-----\n");
    for line in der.chunks(LINE) {
        STANDARD.encode_string(line, text);
        text.push('\n');
    }
    text.push_str("-----END ");
    text.push_str(label);
    text.push_str("-----\n");
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_block_never_outgrows_the_buffer_made_for_it() {
        for length in 0..300 {
            let mut text = String::with_capacity(encoded_len("PRIVATE KEY", length));
            let capacity = text.capacity();
            push(&mut text, "PRIVATE KEY", &vec![0x5a; length]);
            assert_eq!(text.capacity(), capacity, "{length} bytes");
        }
    }
}
