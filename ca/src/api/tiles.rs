//! The ledger over HTTP for anybody's tools, as C2SP tlog-tiles has it: `checkpoint`, `tile/<L>/<N>[.p/<W>]` and
//! `tile/entries/<N>[.p/<W>]` below [`LEDGER_PREFIX`].
//!
//! A tile has one name: numbers with a sign, a zero too many or a group too many are not found. What a tile holds never changes, a partial
//! one included, so both may be kept for ever; the checkpoint must be asked for each time.

use std::fmt;
use std::str::FromStr;
use std::sync::Arc;

use axum::Router;
use axum::extract::State;
use axum::http::header::{CACHE_CONTROL, CONTENT_TYPE};
use axum::http::{StatusCode, Uri};
use axum::response::{IntoResponse, Response};
use axum::routing::get;
use bytes::Bytes;
use tonic::{Code, Status};

/// Where the ledger's files are.
pub const LEDGER_PREFIX: &str = "/ledger";
/// How many hashes or entries a whole tile has.
const WIDTH: u16 = 256;
/// Groups of digits in a tile's number: more than 2^64 needs.
const MAX_GROUPS: usize = 7;
/// Entries name pods and nodes: only the one who asked may keep them.
const FOR_EVER: &str = "private, max-age=31536000, immutable";
const NEVER: &str = "no-store";
const NOTE: &str = "text/plain; charset=utf-8";
const TILE: &str = "application/octet-stream";

/// Which tile.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct TileName {
    /// Of the tree's hashes; none for a tile of entries.
    pub level: Option<u8>,
    /// Its number in its level.
    pub index: u64,
    /// How many hashes or entries: 1 to 256, and less than 256 in a partial tile.
    pub width: u16,
}

/// Not a tile's name.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
#[error("no tile has this name; see https://c2sp.org/tlog-tiles")]
pub struct NoTile;

/// Where checkpoint and tiles come from: the ledger itself, or a CA that is asked for them.
#[tonic::async_trait]
pub trait TileSource: Send + Sync + 'static {
    /// The newest checkpoint, a signed note.
    async fn checkpoint(&self) -> Result<String, Status>;

    /// What the tile holds; [`Code::NotFound`] where the ledger does not reach.
    async fn tile(&self, name: TileName) -> Result<Bytes, Status>;
}

/// Serves the ledger's files from `source`.
pub fn ledger_routes(source: Arc<dyn TileSource>) -> Router {
    let (checkpoint_path, tiles) = (format!("{LEDGER_PREFIX}/checkpoint"), format!("{LEDGER_PREFIX}/tile/{{*name}}"));
    Router::new().route(&checkpoint_path, get(checkpoint)).route(&tiles, get(tile)).with_state(source)
}

async fn checkpoint(State(source): State<Arc<dyn TileSource>>) -> Response {
    match source.checkpoint().await {
        Ok(note) => ([(CONTENT_TYPE, NOTE), (CACHE_CONTROL, NEVER)], note).into_response(),
        Err(status) => refused(&status),
    }
}

async fn tile(State(source): State<Arc<dyn TileSource>>, uri: Uri) -> Response {
    // The path as it was sent: a name in another spelling is another name.
    let name = uri.path().strip_prefix(LEDGER_PREFIX).and_then(|path| path.strip_prefix('/'));
    let tile = match name.and_then(|name| name.parse().ok()) {
        Some(name) => source.tile(name).await,
        None => Err(Status::not_found(NoTile.to_string())),
    };
    match tile {
        Ok(tile) => ([(CONTENT_TYPE, TILE), (CACHE_CONTROL, FOR_EVER)], tile).into_response(),
        Err(status) => refused(&status),
    }
}

pub(super) fn refused(status: &Status) -> Response {
    let code = match status.code() {
        Code::NotFound | Code::InvalidArgument => StatusCode::NOT_FOUND,
        Code::Unauthenticated => StatusCode::UNAUTHORIZED,
        Code::PermissionDenied => StatusCode::FORBIDDEN,
        _ => StatusCode::SERVICE_UNAVAILABLE,
    };
    // What is not there now may be there soon.
    (code, [(CONTENT_TYPE, NOTE), (CACHE_CONTROL, NEVER)], format!("{}\n", status.message())).into_response()
}

impl FromStr for TileName {
    type Err = NoTile;

    fn from_str(name: &str) -> Result<Self, NoTile> {
        let name = name.strip_prefix("tile/").ok_or(NoTile)?;
        let (level, place) = name.split_once('/').ok_or(NoTile)?;
        let level = if level == "entries" { None } else { Some(number(level).ok_or(NoTile)?) };
        let (index, width) = match place.split_once(".p/") {
            None => (place, WIDTH),
            Some((index, width)) => (index, number(width).filter(|width| (1..WIDTH).contains(width)).ok_or(NoTile)?),
        };
        Ok(Self { level, index: grouped(index).ok_or(NoTile)?, width })
    }
}

impl fmt::Display for TileName {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self.level {
            Some(level) => write!(f, "tile/{level}/")?,
            None => f.write_str("tile/entries/")?,
        }
        let digits = self.index.to_string();
        let digits = format!("{digits:0>width$}", width = digits.len().next_multiple_of(3));
        for (at, digit) in digits.char_indices() {
            match (at % 3, at + 3 < digits.len()) {
                (0, true) if at == 0 => f.write_str("x")?,
                (0, true) => f.write_str("/x")?,
                (0, false) if at > 0 => f.write_str("/")?,
                _ => {}
            }
            write!(f, "{digit}")?;
        }
        if self.width < WIDTH { write!(f, ".p/{}", self.width) } else { Ok(()) }
    }
}

/// A decimal number in its shortest form.
fn number<T: FromStr + ToString>(text: &str) -> Option<T> {
    text.parse().ok().filter(|number: &T| number.to_string() == text)
}

/// Groups of three digits, an `x` before each but the last, as few as possible.
fn grouped(text: &str) -> Option<u64> {
    let groups: Vec<&str> = text.split('/').collect();
    let (last, before) = groups.split_last().filter(|_| groups.len() <= MAX_GROUPS)?;
    let mut digits = String::new();
    for group in before {
        digits.push_str(group.strip_prefix('x')?.get(..3).filter(|three| three.len() + 1 == group.len())?);
    }
    if last.len() != 3 || (!before.is_empty() && digits.starts_with("000")) {
        return None;
    }
    digits.push_str(last);
    if digits.bytes().all(|digit| digit.is_ascii_digit()) { digits.parse().ok() } else { None }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_tile_has_one_name() {
        for (name, level, index, width) in [
            ("tile/0/000", Some(0), 0, 256),
            ("tile/0/x001/234", Some(0), 1234, 256),
            ("tile/5/x001/x234/067.p/255", Some(5), 1_234_067, 255),
            ("tile/entries/999.p/1", None, 999, 1),
            ("tile/entries/x018/x446/x744/x073/x709/x551/615", None, u64::MAX, 256),
        ] {
            let tile = TileName { level, index, width };
            assert_eq!(name.parse(), Ok(tile));
            assert_eq!(tile.to_string(), name);
        }
    }

    #[test]
    fn other_spellings_are_no_tiles() {
        for name in [
            "",
            "tile",
            "tile/0",
            "tile/0/",
            "tile/0/0",
            "tile/0/00",
            "tile/0/0000",
            "tile/00/000",
            "tile/+0/000",
            "tile/-1/000",
            "tile/256/000",
            "tile/0/x000/001",
            "tile/0/x001",
            "tile/0/001/234",
            "tile/0/x001/x234",
            "tile/0/x1/234",
            "tile/0/x0001/234",
            "tile/0/x001//234",
            "tile/0/+01",
            "tile/0/ 01",
            "tile/0/%30%30%30",
            "tile/0/000.p/0",
            "tile/0/000.p/256",
            "tile/0/000.p/01",
            "tile/0/000.p/",
            "tile/0/000.p",
            "tile/0/000.p/1/",
            "tile/data/000",
            "tile/8/0/000",
            "/tile/0/000",
            "tile/0/000/",
            "tile/entries/x999/x999/x999/x999/x999/x999/999",
            "tile/0/x001/x000/x000/x000/x000/x000/x000/000",
            "tile/0/٠٠٠",
            "tile/0/xé1/000",
        ] {
            assert_eq!(name.parse::<TileName>(), Err(NoTile), "{name:?}");
        }
    }
}
