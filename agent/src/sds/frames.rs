//! gRPC's framing, with small buffers: a stream that waits for months should hold no memory for what it once read or wrote.
//!
//! tonic's own reader keeps the largest buffer that it ever needed, which an Envoy's first request (60 KB of node) makes large for the
//! stream's whole life. [`Requests`] gives the memory back after each message; [`Lean`] makes tonic's writer allocate what a message needs.

use std::marker::PhantomData;

use bytes::{Buf, BytesMut};
use http_body_util::BodyExt;
use prost::Message;
use tonic::Status;
use tonic::body::Body;
use tonic::codec::{BufferSettings, Codec, DecodeBuf, Decoder, EncodeBuf, Encoder};

/// The longest request that is read. Envoy's node takes 60 KB, with every ACK unless it is told otherwise.
pub(super) const MAX_REQUEST_BYTES: usize = 1 << 20;
/// Compressed-flag and length (gRPC over HTTP/2, "Length-Prefixed-Message").
const HEADER_BYTES: usize = 5;
const YIELD_BYTES: usize = 16 * 1024;

/// The messages that a client sends on one stream.
pub(super) struct Requests<M> {
    body: Body,
    unread: BytesMut,
    message: PhantomData<fn() -> M>,
}

impl<M: Message + Default> Requests<M> {
    pub(super) fn new(body: Body) -> Self {
        Self { body, unread: BytesMut::new(), message: PhantomData }
    }

    /// The next message; `None` when the client has said all. Loses nothing when it is dropped before it is done.
    pub(super) async fn next(&mut self) -> Result<Option<M>, Status> {
        loop {
            if let Some(message) = self.decode()? {
                return Ok(Some(message));
            }
            match self.body.frame().await {
                Some(Ok(frame)) => {
                    if let Ok(data) = frame.into_data() {
                        self.unread.extend_from_slice(&data);
                    }
                }
                Some(Err(status)) => return Err(status),
                None if self.unread.is_empty() => return Ok(None),
                None => return Err(Status::internal("the stream ended within a message")),
            }
        }
    }

    fn decode(&mut self) -> Result<Option<M>, Status> {
        let Some((header, rest)) = self.unread.split_first_chunk::<HEADER_BYTES>() else { return Ok(None) };
        let [compressed, length @ ..] = *header;
        if compressed != 0 {
            return Err(Status::unimplemented("compressed messages are not read; send them as they are"));
        }
        let length = u32::from_be_bytes(length) as usize;
        if length > MAX_REQUEST_BYTES {
            return Err(Status::resource_exhausted(format!("the request has {length} bytes; at most {MAX_REQUEST_BYTES} are read")));
        }
        let Some(message) = rest.get(..length) else { return Ok(None) };
        let message = M::decode(message).map_err(|error| Status::invalid_argument(format!("the request cannot be decoded: {error}")))?;
        self.unread.advance(HEADER_BYTES + length);
        if self.unread.is_empty() {
            self.unread = BytesMut::new();
        }
        Ok(Some(message))
    }
}

/// A codec that allocates exactly what a response needs, and reads nothing: [`Requests`] does.
pub(super) struct Lean<M>(PhantomData<fn() -> M>);

impl<M> Lean<M> {
    pub(super) fn new() -> Self {
        Self(PhantomData)
    }
}

/// What [`Lean`] reads requests as.
pub(super) struct Unread;

impl<M: Message + 'static> Codec for Lean<M> {
    type Encode = M;
    type Decode = Unread;
    type Encoder = Self;
    type Decoder = Self;

    fn encoder(&mut self) -> Self::Encoder {
        Self::new()
    }

    fn decoder(&mut self) -> Self::Decoder {
        Self::new()
    }
}

impl<M: Message> Encoder for Lean<M> {
    type Item = M;
    type Error = Status;

    fn encode(&mut self, item: M, buffer: &mut EncodeBuf<'_>) -> Result<(), Status> {
        buffer.reserve(item.encoded_len());
        item.encode(buffer).map_err(|error| Status::internal(format!("the response cannot be encoded: {error}")))
    }

    fn buffer_settings(&self) -> BufferSettings {
        BufferSettings::new(0, YIELD_BYTES)
    }
}

impl<M> Decoder for Lean<M> {
    type Item = Unread;
    type Error = Status;

    fn decode(&mut self, source: &mut DecodeBuf<'_>) -> Result<Option<Unread>, Status> {
        source.advance(source.remaining());
        Ok(Some(Unread))
    }

    fn buffer_settings(&self) -> BufferSettings {
        BufferSettings::new(0, YIELD_BYTES)
    }
}

#[cfg(test)]
mod tests {
    use bytes::Bytes;
    use chancery_proto::envoy::service::discovery::v3::DiscoveryRequest;
    use http_body::Frame;
    use http_body_util::StreamBody;

    use super::*;

    fn framed(request: &DiscoveryRequest) -> Vec<u8> {
        let message = request.encode_to_vec();
        let mut framed = vec![0];
        framed.extend_from_slice(&u32::try_from(message.len()).unwrap().to_be_bytes());
        framed.extend_from_slice(&message);
        framed
    }

    fn reading(parts: Vec<Vec<u8>>) -> Requests<DiscoveryRequest> {
        let frames = parts.into_iter().map(|part| Ok::<_, Status>(Frame::data(Bytes::from(part))));
        Requests::new(Body::new(StreamBody::new(tokio_stream::iter(frames))))
    }

    fn request(name: &str) -> DiscoveryRequest {
        DiscoveryRequest { resource_names: vec![name.to_owned()], ..DiscoveryRequest::default() }
    }

    #[tokio::test]
    async fn messages_are_found_however_they_are_cut() {
        let (first, second) = (request(&"long".repeat(20_000)), request("short"));
        let bytes = [framed(&first), framed(&second)].concat();
        for size in [1, 4, 5, 6, 16_384, bytes.len()] {
            let mut requests = reading(bytes.chunks(size).map(<[u8]>::to_vec).collect());
            assert_eq!(requests.next().await.unwrap().as_ref(), Some(&first));
            assert_eq!(requests.next().await.unwrap().as_ref(), Some(&second));
            assert_eq!(requests.next().await.unwrap(), None);
            assert_eq!(requests.unread.capacity(), 0, "the buffer must be given back");
        }
    }

    #[tokio::test]
    async fn a_message_over_the_limit_is_refused_before_it_is_read() {
        let length = u32::try_from(MAX_REQUEST_BYTES + 1).unwrap().to_be_bytes();
        let mut requests = reading(vec![[&[0], &length[..]].concat()]);
        assert_eq!(requests.next().await.unwrap_err().code(), tonic::Code::ResourceExhausted);
    }

    #[tokio::test]
    async fn garbage_compressed_and_cut_messages_are_refused() {
        for (bytes, code) in [
            (vec![0, 0, 0, 0, 2, 0xff, 0xff], tonic::Code::InvalidArgument),
            (vec![1, 0, 0, 0, 0], tonic::Code::Unimplemented),
            (vec![0, 0, 0, 0, 9, 1], tonic::Code::Internal),
        ] {
            assert_eq!(reading(vec![bytes]).next().await.unwrap_err().code(), code);
        }
    }
}
