//! The ledger for those who verify it: checkpoints, tiles, proofs, entries.
//!
//! Every answer is about the newest checkpoint, which is published first if entries have arrived since the last one: whoever issued a
//! moment ago can prove it now.

use std::sync::Arc;

use axum::Router;
use axum::middleware::Next;
use bytes::Bytes;
use chancery_proto::chancery::v1::log_service_server::LogService;
use chancery_proto::chancery::v1::{
    GetCheckpointRequest, GetCheckpointResponse, GetTileRequest, GetTileResponse, IdentityFilter as WireFilter, ListActsRequest,
    ListActsResponse, ProveConsistencyRequest, ProveConsistencyResponse, ProveInclusionRequest, ProveInclusionResponse, ReadEntriesRequest,
    RotateCheckpointKeyRequest, RotateCheckpointKeyResponse, prove_inclusion_request::Of,
};
use tonic::metadata::MetadataMap;
use tonic::{Request, Response, Status};
use x509_parser::prelude::{FromDer, X509Certificate};

use crate::api::People;
use crate::api::error::ApiError;
use crate::api::exports::{Entries, Exports};
use crate::api::operator::page_size;
use crate::api::tiles::{TileName, TileSource, ledger_routes, refused};
use crate::ledger::{Checkpoints, IdentityFilter, Ledger, LedgerError, Published};

/// Of serial numbers of certificates that this CA issues.
const SERIAL_BYTES: usize = 16;
/// How the ledger names the act.
const ROTATE_KEY: &str = "log.checkpoint-key";

/// Answers those who verify.
#[derive(Clone)]
pub struct LogApi {
    /// What is verified.
    pub ledger: Ledger,
    /// Signs it.
    pub checkpoints: Arc<Checkpoints>,
    /// Decides who may ask.
    pub people: Arc<People>,
    /// Whoever reads entries.
    pub exports: Exports,
}

#[tonic::async_trait]
impl LogService for LogApi {
    async fn get_checkpoint(&self, request: Request<GetCheckpointRequest>) -> Result<Response<GetCheckpointResponse>, Status> {
        self.people
            .answer("GetCheckpoint", request, async |_, _| {
                let newest = self.newest().await?;
                Ok(GetCheckpointResponse { note: newest.note.clone(), verifier_keys: verifier_keys(&newest) })
            })
            .await
    }

    async fn get_tile(&self, request: Request<GetTileRequest>) -> Result<Response<GetTileResponse>, Status> {
        self.people
            .answer("GetTile", request, async |_, request| {
                let tile = self.read_tile(tile_name(&request)?).await?;
                Ok(GetTileResponse { tile })
            })
            .await
    }

    async fn prove_inclusion(&self, request: Request<ProveInclusionRequest>) -> Result<Response<ProveInclusionResponse>, Status> {
        self.people.answer("ProveInclusion", request, async |_, request| self.do_prove_inclusion(request.of).await).await
    }

    async fn prove_consistency(&self, request: Request<ProveConsistencyRequest>) -> Result<Response<ProveConsistencyResponse>, Status> {
        self.people
            .answer("ProveConsistency", request, async |_, request| {
                let newest = self.newest().await?;
                let hashes = self.ledger.consistency_proof(request.since, newest.checkpoint.size).await?;
                let hashes = hashes.iter().map(|hash| hash.to_vec()).collect();
                Ok(ProveConsistencyResponse { note: newest.note.clone(), verifier_keys: verifier_keys(&newest), hashes })
            })
            .await
    }

    type ReadEntriesStream = Entries;

    async fn read_entries(&self, request: Request<ReadEntriesRequest>) -> Result<Response<Entries>, Status> {
        let begin = async |request| self.do_read_entries(request).await;
        self.people.answer_for_long("ReadEntries", request, begin).await
    }

    async fn list_acts(&self, request: Request<ListActsRequest>) -> Result<Response<ListActsResponse>, Status> {
        self.people
            .answer("ListActs", request, async |_, request| {
                let size = page_size(request.page_size)?;
                let token = (!request.page_token.is_empty()).then_some(request.page_token.as_str());
                let page = self.ledger.list_acts(&request.filter.unwrap_or_default().into(), size, token).await?;
                let acts = page.acts.into_iter().map(Into::into).collect();
                Ok(ListActsResponse { acts, next_page_token: page.next.unwrap_or_default() })
            })
            .await
    }

    async fn rotate_checkpoint_key(
        &self,
        request: Request<RotateCheckpointKeyRequest>,
    ) -> Result<Response<RotateCheckpointKeyResponse>, Status> {
        self.people
            .answer("RotateCheckpointKey", request, async |who, request| {
                let rotate = async |actor: &str, why: &str| Ok(self.checkpoints.rotate_key(actor, why).await.map_err(LedgerError::from)?);
                let key = self.people.act_by(who, ROTATE_KEY, String::new(), &request.reason, rotate).await?;
                Ok(RotateCheckpointKeyResponse { verifier_key: key.to_string() })
            })
            .await
    }
}

impl LogApi {
    async fn newest(&self) -> Result<Arc<Published>, ApiError> {
        Ok(self.checkpoints.publish().await.map_err(LedgerError::from)?)
    }

    async fn read_tile(&self, TileName { level, index, width }: TileName) -> Result<Bytes, ApiError> {
        let tile = match level {
            Some(level) => self.ledger.tile(level, index, width).await?,
            None => self.ledger.entry_bundle(index, width).await?,
        };
        Ok(tile.into())
    }

    async fn do_prove_inclusion(&self, of: Option<Of>) -> Result<ProveInclusionResponse, ApiError> {
        let entry = match of {
            Some(Of::Entry(entry)) => entry,
            Some(Of::Serial(serial)) => self.issued(&serial).await?.0,
            Some(Of::Certificate(der)) => self.recorded(&der).await?,
            None => return Err(ApiError::Invalid("name an entry, a serial number or a certificate".into())),
        };
        // After the look-up, so that it covers what was found.
        let newest = self.newest().await?;
        let size = newest.checkpoint.size;
        let hashes = self.ledger.inclusion_proof(entry, size).await?;
        let bytes = self.ledger.stored_entries(entry..entry + 1, usize::MAX).await?.pop().unwrap_or_default();
        Ok(ProveInclusionResponse {
            note: newest.note.clone(),
            verifier_keys: verifier_keys(&newest),
            entry,
            bytes,
            hashes: hashes.iter().map(|hash| hash.to_vec()).collect(),
        })
    }

    /// The entry of this certificate, of the CA's own or another.
    async fn recorded(&self, der: &[u8]) -> Result<u64, ApiError> {
        let serial = serial_of(der)?;
        let own = self.ledger.authority_certificates().await?;
        if let Some((entry, _)) = own.iter().find(|(_, own)| own.certificate == der) {
            return Ok(*entry);
        }
        // Theirs all have that many bytes.
        if serial.len() != 2 * SERIAL_BYTES {
            return Err(ApiError::NotFound(format!("this certificate is not in the ledger: its serial number is {serial}")));
        }
        let (entry, recorded) = self.issued(&serial).await?;
        if recorded == der {
            return Ok(entry);
        }
        Err(ApiError::NotFound(format!("entry {entry} has another certificate with the serial number {serial} than this one")))
    }

    /// The entry and the certificate with this serial number.
    async fn issued(&self, serial: &str) -> Result<(u64, Bytes), ApiError> {
        let filter = IdentityFilter::try_from(&WireFilter { serial: serial.to_owned(), ..WireFilter::default() })?;
        let wanted = filter.serial.ok_or_else(|| ApiError::Invalid("the serial number is empty".into()))?;
        let found = self.ledger.show(wanted).await?;
        let found = found.ok_or_else(|| ApiError::NotFound(format!("no certificate with the serial number {serial} was issued")))?;
        Ok((found.index, found.issuance.certificate))
    }

    async fn do_read_entries(&self, request: ReadEntriesRequest) -> Result<Entries, ApiError> {
        let filter = request.filter.as_ref().map(IdentityFilter::try_from).transpose()?;
        let newest = self.newest().await?.checkpoint.size;
        let end = if request.end == 0 { newest } else { request.end };
        if end > newest || request.first > end {
            let problem = format!("entries {} to {end} were asked for, and the newest checkpoint has {newest}", request.first);
            return Err(ApiError::Invalid(problem));
        }
        self.exports.begin(self.ledger.clone(), request.first..end, filter)
    }
}

/// The ledger's files on the TLS port, for the same people as the rest of it.
pub fn auditors_ledger_routes(api: LogApi) -> Router {
    let people = Arc::clone(&api.people);
    let admit = move |request: axum::extract::Request, next: Next| {
        let people = Arc::clone(&people);
        async move {
            let headers = MetadataMap::from_headers(request.headers().clone());
            let asked = Request::from_parts(headers, request.extensions().clone(), ());
            match people.admit("GetTile", &asked).await {
                // Held until the answer is made, as every permit is.
                Ok(_admitted) => next.run(request).await,
                Err(error) => refused(&error.into()),
            }
        }
    };
    ledger_routes(Arc::new(api)).layer(axum::middleware::from_fn(admit))
}

/// Whoever asks was admitted.
#[tonic::async_trait]
impl TileSource for LogApi {
    async fn checkpoint(&self) -> Result<String, Status> {
        Ok(self.newest().await?.note.clone())
    }

    async fn tile(&self, name: TileName) -> Result<Bytes, Status> {
        Ok(self.read_tile(name).await?)
    }
}

fn verifier_keys(published: &Published) -> Vec<String> {
    published.signed_by.iter().map(ToString::to_string).collect()
}

fn tile_name(request: &GetTileRequest) -> Result<TileName, ApiError> {
    let width = if request.width == 0 { 256 } else { request.width };
    let name = || {
        let level = request.level.map(u8::try_from).transpose().ok()?;
        Some(TileName { level, index: request.index, width: u16::try_from(width).ok()? })
    };
    name().ok_or_else(|| ApiError::NotFound(format!("there is no tile of level {:?} with {width} hashes", request.level)))
}

/// As filters read it.
fn serial_of(der: &[u8]) -> Result<String, ApiError> {
    let (_, certificate) = X509Certificate::from_der(der).map_err(|error| ApiError::Invalid(format!("this is no certificate: {error}")))?;
    Ok(hex::encode(certificate.raw_serial()))
}
