//! How messages travel: as prost writes them, with buffers that begin small.
//!
//! tonic gives each direction of each stream a buffer of 8 KiB, which it keeps as long as the stream is open. Streams here stay open for
//! hours, a thousand at a time, and most messages on them are small; for larger ones the buffer grows.

use std::marker::PhantomData;

use prost::Message;
use tonic::codec::{BufferSettings, Codec};
use tonic_prost::{ProstDecoder, ProstEncoder};

/// What a buffer begins with, in bytes.
const BUFFER: usize = 1024;
/// So much is encoded before it is handed on: tonic's own choice.
const YIELD_AT: usize = 32 * 1024;

/// The codec of every generated client and server.
#[derive(Clone, Copy, Debug)]
pub struct SmallBuffers<T, U>(PhantomData<(T, U)>);

impl<T, U> Default for SmallBuffers<T, U> {
    fn default() -> Self {
        Self(PhantomData)
    }
}

impl<T, U> Codec for SmallBuffers<T, U>
where
    T: Message + Send + 'static,
    U: Message + Default + Send + 'static,
{
    type Encode = T;
    type Decode = U;
    type Encoder = ProstEncoder<T>;
    type Decoder = ProstDecoder<U>;

    fn encoder(&mut self) -> Self::Encoder {
        ProstEncoder::new(BufferSettings::new(BUFFER, YIELD_AT))
    }

    fn decoder(&mut self) -> Self::Decoder {
        ProstDecoder::new(BufferSettings::new(BUFFER, YIELD_AT))
    }
}
