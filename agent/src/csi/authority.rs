//! Lets the kubelet in, whose `:authority` is no authority.
//!
//! For its call to a plugin's registration socket, the kubelet (1.37 still) leaves gRPC's default, which is the socket's path with the slashes
//! escaped: `%2Fvar%2Flib%2F…`. RFC 3986 knows no such host, and `h2` ends the stream with `PROTOCOL_ERROR` before any handler runs. Nothing here
//! asks for the authority, so it is replaced on the way in: frames are found (RFC 9113, 4.1), and in a header block (RFC 7541) the literal value
//! of `:authority`, without decoding anything else.

use std::pin::Pin;
use std::task::{Context, Poll, ready};

use tokio::io::{AsyncRead, ReadBuf};

const PREFACE_BYTES: usize = 24;
const FRAME_HEADER_BYTES: usize = 9;
const HEADERS: u8 = 0x1;
const END_HEADERS: u8 = 0x4;
const PADDED: u8 = 0x8;
const PRIORITY: u8 = 0x20;
/// A larger one is passed on as it is: h2 refuses it.
const MAX_FRAME_BYTES: usize = 16 * 1024;
const READ_BYTES: usize = 4096;
/// In the static table (RFC 7541, appendix A).
const AUTHORITY_INDEX: usize = 1;
/// As short as any: the entry that it makes in our table must not be larger than the one that the client knows of, or ours would fill first
/// and lose entries that the client still refers to.
const REPLACEMENT: &[u8] = b"k";

/// What a client sends that may write any `:authority`.
#[derive(Debug)]
pub(super) struct AnyAuthority<S> {
    stream: S,
    /// Bytes that go through as they come, before the next frame begins.
    pass: usize,
    /// The beginning of something that is not whole yet.
    unread: Vec<u8>,
    /// Ready to be read, from `given` on.
    ready: Vec<u8>,
    given: usize,
}

impl<S> AnyAuthority<S> {
    pub(super) fn new(stream: S) -> Self {
        Self { stream, pass: PREFACE_BYTES, unread: Vec::new(), ready: Vec::new(), given: 0 }
    }

    /// Moves all that is whole from `unread` to `ready`.
    fn sort(&mut self) {
        loop {
            let passed = self.pass.min(self.unread.len());
            self.ready.extend(self.unread.drain(..passed));
            self.pass -= passed;
            let Some(header) = self.unread.first_chunk::<FRAME_HEADER_BYTES>() else { return };
            let length = u32::from_be_bytes([0, header[0], header[1], header[2]]) as usize;
            let whole = FRAME_HEADER_BYTES + length;
            if header[3] != HEADERS || length > MAX_FRAME_BYTES {
                self.pass = whole;
                continue;
            }
            if self.unread.len() < whole {
                return;
            }
            let frame: Vec<u8> = self.unread.drain(..whole).collect();
            self.ready.extend(replaced(&frame).unwrap_or(frame));
        }
    }
}

impl<S: AsyncRead + Unpin> AsyncRead for AnyAuthority<S> {
    fn poll_read(mut self: Pin<&mut Self>, context: &mut Context<'_>, buffer: &mut ReadBuf<'_>) -> Poll<std::io::Result<()>> {
        let this = &mut *self;
        while this.given == this.ready.len() {
            this.ready.clear();
            this.given = 0;
            let mut room = [0; READ_BYTES];
            let mut read = ReadBuf::new(&mut room);
            ready!(Pin::new(&mut this.stream).poll_read(context, &mut read))?;
            if read.filled().is_empty() {
                // The end. What is not whole by now never will be; h2 complains about it better than this could.
                this.ready.append(&mut this.unread);
                if this.ready.is_empty() {
                    return Poll::Ready(Ok(()));
                }
                break;
            }
            this.unread.extend_from_slice(read.filled());
            this.sort();
        }
        let given = buffer.remaining().min(this.ready.len() - this.given);
        buffer.put_slice(&this.ready[this.given..this.given + given]);
        this.given += given;
        Poll::Ready(Ok(()))
    }
}

/// A HEADERS frame with our authority in it, without padding. `None` if it has none of its own, or is none that this understands.
fn replaced(frame: &[u8]) -> Option<Vec<u8>> {
    let (header, payload) = frame.split_first_chunk::<FRAME_HEADER_BYTES>()?;
    let flags = header[4];
    // A block that goes on in further frames does not come from the kubelet.
    if flags & END_HEADERS == 0 {
        return None;
    }
    let payload = if flags & PADDED == 0 {
        payload
    } else {
        let (padding, rest) = payload.split_first()?;
        rest.get(..rest.len().checked_sub(usize::from(*padding))?)?
    };
    let (priority, block) = payload.split_at_checked(if flags & PRIORITY == 0 { 0 } else { 5 })?;
    let block = with_authority_replaced(block)?;
    let length = u32::try_from(priority.len() + block.len()).ok()?.to_be_bytes();
    let mut made = vec![length[1], length[2], length[3], HEADERS, flags & !PADDED];
    made.extend_from_slice(&header[5..]);
    made.extend_from_slice(priority);
    made.extend_from_slice(&block);
    Some(made)
}

/// RFC 7541, section 6: one representation after the other.
fn with_authority_replaced(block: &[u8]) -> Option<Vec<u8>> {
    let mut made = Vec::with_capacity(block.len());
    let mut found = false;
    let mut rest = block;
    while let Some(first) = rest.first() {
        let before = rest;
        let literal_prefix = match first {
            // An index alone, or a change of the table's size.
            0x80.. => {
                integer(&mut rest, 7)?;
                None
            }
            0x20..0x40 => {
                integer(&mut rest, 5)?;
                None
            }
            0x40.. => Some(6),
            _ => Some(4),
        };
        let mut is_authority = false;
        if let Some(prefix) = literal_prefix {
            let index = integer(&mut rest, prefix)?;
            if index == 0 {
                string(&mut rest)?;
            }
            is_authority = index == AUTHORITY_INDEX;
        }
        made.extend_from_slice(&before[..before.len() - rest.len()]);
        if is_authority {
            string(&mut rest)?;
            made.push(u8::try_from(REPLACEMENT.len()).ok()?);
            made.extend_from_slice(REPLACEMENT);
            found = true;
        } else if literal_prefix.is_some() {
            made.extend_from_slice(string(&mut rest)?);
        }
    }
    found.then_some(made)
}

/// RFC 7541, section 5.1.
fn integer(rest: &mut &[u8], prefix: u32) -> Option<usize> {
    let (first, mut after) = rest.split_first()?;
    let most = (1_usize << prefix) - 1;
    let mut value = usize::from(*first) & most;
    if value == most {
        for shift in (0..28).step_by(7) {
            let (byte, next) = after.split_first()?;
            after = next;
            value += usize::from(byte & 0x7f) << shift;
            if byte & 0x80 == 0 {
                *rest = after;
                return Some(value);
            }
        }
        return None;
    }
    *rest = after;
    Some(value)
}

/// RFC 7541, section 5.2: with its length, as it is written.
fn string<'b>(rest: &mut &'b [u8]) -> Option<&'b [u8]> {
    let before = *rest;
    let length = integer(rest, 7)?;
    *rest = rest.get(length..)?;
    Some(&before[..before.len() - rest.len()])
}

#[cfg(test)]
mod tests {
    use tokio::io::AsyncReadExt;

    use super::*;

    /// What grpc-go 1.82 writes for the kubelet's call of `GetInfo`: preface, SETTINGS, its acknowledgement, HEADERS, DATA.
    const KUBELET: &str = "505249202a20485454502f322e300d0a0d0a534d0d0a0d0a000000040000000000000000040100000000\
        0000830104000000018386459c62ba2d98d558598c84d83498f52fb4b31909b06931ea63115392a94f41bd5458534d6a8b091065a63aa2c3dc762a2c341a35458\
        7adb19682a55161ae8b6635488ac2cc6426cf4a8b091065c938ea216cf4bc85eeb58599741c9d7f5f8b1d75d0620d263d4c4d65647a8a9acac8b4c7602bbc25c3\
        40027465864d833505b11f0000050001000000010000000000";
    /// The value of `:authority` in it, with its length.
    const AUTHORITY: &str =
        "bd5458534d6a8b091065a63aa2c3dc762a2c341a354587adb19682a55161ae8b6635488ac2cc6426cf4a8b091065c938ea216cf4bc85eeb58599741c9d7f";

    async fn through(bytes: &[u8], size: usize) -> Vec<u8> {
        let (near, far) = tokio::io::duplex(size);
        let bytes = bytes.to_vec();
        tokio::spawn(async move {
            let mut near = near;
            tokio::io::AsyncWriteExt::write_all(&mut near, &bytes).await.unwrap();
        });
        let mut read = Vec::new();
        AnyAuthority::new(far).read_to_end(&mut read).await.unwrap();
        read
    }

    #[tokio::test]
    async fn the_kubelets_authority_is_replaced_and_nothing_else_however_its_bytes_are_cut() {
        let bytes = hex::decode(KUBELET).unwrap();
        let shorter = 0x83 - AUTHORITY.len() / 2 + 2;
        let expected = KUBELET.replace(AUTHORITY, "016b").replace("0000830104", &format!("{shorter:06x}0104"));
        for size in [1, 7, 64, 1 << 16] {
            assert_eq!(hex::encode(through(&bytes, size).await), expected);
        }
    }

    #[tokio::test]
    async fn what_is_not_understood_goes_through_as_it_is() {
        let preface = hex::decode(&KUBELET[..2 * PREFACE_BYTES]).unwrap();
        for frames in [
            "",
            "00",
            // No authority; a block that goes on; garbage; padding that is longer than the frame; a large frame; one that is cut.
            "000002010400000001 8386",
            "000004010000000001 41016b83",
            "000003010400000001 7fffff",
            "000002010c00000001 ff83",
            "ff0000000000000001 00",
            "000004010400000001 4101",
        ] {
            let bytes = [preface.clone(), hex::decode(frames.replace(' ', "")).unwrap()].concat();
            assert_eq!(through(&bytes, 16).await, bytes, "{frames}");
        }
    }

    #[tokio::test]
    async fn padding_and_priority_are_known() {
        let preface = &KUBELET[..2 * PREFACE_BYTES];
        let (padded, plain) = ("00000e012c00000001 02 0000000010 01 03616263 82 0000", "000009012400000001 0000000010 01 016b 82");
        let frames = |text: &str| format!("{preface}{text}").replace(' ', "");
        assert_eq!(hex::encode(through(&hex::decode(frames(padded)).unwrap(), 5).await), frames(plain));
    }
}
