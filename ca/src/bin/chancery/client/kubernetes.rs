//! Who asks, by Kubernetes: a short-lived token of a service account, for the CA alone, that the person may ask their API server for.
//!
//! The person's own credential goes to the API server only. The token is kept in memory, and replaced before it expires.

use std::str::FromStr;
use std::sync::Arc;
use std::time::Duration;

use arc_swap::ArcSwapOption;
use chancery_ca::attestation::{OPERATORS_AUDIENCE, OPERATORS_CLUSTER_KEY};
use chancery_ca::kubernetes::{OPERATOR_TOKEN_LIFETIME, request_operator_token};
use chancery_identity::TrustDomain;
use clap::Args;
use tonic::metadata::{Ascii, MetadataValue};
use tonic::service::Interceptor;
use tonic::{Request, Status};
use zeroize::Zeroizing;

use super::CliError;

/// After a failure to replace the token.
const RETRY: Duration = Duration::from_secs(10);
const NO_ACCOUNT: &str = "--kube needs --kube-service-account NAMESPACE/NAME: a service account that you may create tokens for. If there is none yet: \
     kubectl create serviceaccount, and a clusterrolebinding of it to chancery-auditor or chancery-admin";

/// Whose token, and where from.
#[derive(Clone, Debug, Default, Args)]
#[command(next_help_heading = "Connection")]
pub(crate) struct Options {
    /// Come as a service account that you may create tokens for, by your kubeconfig (KUBECONFIG or ~/.kube/config). What it may do the
    /// cluster's RBAC says. Needs --kube-service-account, --server, --ca-bundle and --trust-domain.
    #[arg(long, global = true)]
    kube: bool,
    /// The context of the kubeconfig, if not the current one.
    #[arg(long, global = true, value_name = "NAME")]
    context: Option<String>,
    /// The service account, with --kube: one that a binding makes an auditor or an admin.
    #[arg(long, global = true, env = "CHANCERY_KUBE_SERVICE_ACCOUNT", value_name = "NAMESPACE/NAME")]
    kube_service_account: Option<Account>,
    /// What the CA calls that cluster; needed if it has operators of several.
    #[arg(long, global = true, env = "CHANCERY_KUBE_CLUSTER", value_name = "NAME")]
    kube_cluster: Option<String>,
    /// The CA's trust domain, with --kube: it must prove to be this one's.
    #[arg(long, global = true, env = "CHANCERY_TRUST_DOMAIN", value_name = "NAME")]
    trust_domain: Option<TrustDomain>,
}

/// A service account.
#[derive(Clone, Debug)]
pub(super) struct Account {
    namespace: String,
    name: String,
}

/// Shows a token with every call, if there is one.
#[derive(Clone)]
pub(crate) struct Bearer {
    header: Arc<ArcSwapOption<MetadataValue<Ascii>>>,
    cluster: Option<MetadataValue<Ascii>>,
}

impl Options {
    pub(super) fn is_wanted(&self) -> bool {
        self.kube
    }

    pub(super) fn trust_domain(&self) -> Result<&TrustDomain, CliError> {
        let missing = || CliError::Usage("--kube needs --trust-domain: whose CA is at the other end".into());
        self.trust_domain.as_ref().ok_or_else(missing)
    }

    pub(super) fn account(&self) -> Result<&Account, CliError> {
        self.kube_service_account.as_ref().ok_or_else(|| CliError::Usage(NO_ACCOUNT.into()))
    }

    async fn header(&self) -> Result<MetadataValue<Ascii>, CliError> {
        let Account { namespace, name } = self.account()?;
        let token = request_operator_token(self.context.clone(), namespace, name, OPERATORS_AUDIENCE).await;
        let token = token.map_err(|error| CliError::Failed(error.to_string()))?;
        let text = Zeroizing::new(format!("Bearer {}", *token));
        let mut header =
            MetadataValue::try_from(text.as_str()).map_err(|_| CliError::Failed("the API server's token is no token".into()))?;
        header.set_sensitive(true);
        Ok(header)
    }
}

impl Bearer {
    pub(super) fn none() -> Self {
        Self { header: Arc::default(), cluster: None }
    }

    /// Asks for a token now, and for others while this program runs.
    pub(super) async fn ask(options: &Options) -> Result<Self, CliError> {
        let cluster = options.kube_cluster.as_deref().map(MetadataValue::try_from).transpose();
        let cluster = cluster.map_err(|_| CliError::Usage("--kube-cluster is no cluster's name".into()))?;
        let header = Arc::new(ArcSwapOption::from_pointee(options.header().await?));
        tokio::spawn(keep(options.clone(), Arc::clone(&header)));
        Ok(Self { header, cluster })
    }
}

/// Replaces the token when half of its life is over. While that fails, the CA says what is wrong with the old one.
async fn keep(options: Options, header: Arc<ArcSwapOption<MetadataValue<Ascii>>>) {
    let mut pause = OPERATOR_TOKEN_LIFETIME / 2;
    loop {
        tokio::time::sleep(pause).await;
        pause = match options.header().await {
            Ok(newer) => {
                header.store(Some(Arc::new(newer)));
                OPERATOR_TOKEN_LIFETIME / 2
            }
            Err(_) => RETRY,
        };
    }
}

impl Interceptor for Bearer {
    fn call(&mut self, mut request: Request<()>) -> Result<Request<()>, Status> {
        if let Some(header) = &*self.header.load() {
            request.metadata_mut().insert("authorization", MetadataValue::clone(header));
        }
        if let Some(cluster) = &self.cluster {
            request.metadata_mut().insert(OPERATORS_CLUSTER_KEY, cluster.clone());
        }
        Ok(request)
    }
}

impl FromStr for Account {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        match text.split_once('/') {
            Some((namespace, name)) if !namespace.is_empty() && !name.is_empty() && !name.contains('/') => {
                Ok(Self { namespace: namespace.into(), name: name.into() })
            }
            _ => Err("a service account is namespace/name".into()),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_service_account_has_a_namespace_and_a_name() {
        let account: Account = "ops/audit".parse().unwrap();
        assert_eq!((account.namespace.as_str(), account.name.as_str()), ("ops", "audit"));
        assert!(["", "audit", "/audit", "ops/", "a/b/c"].into_iter().all(|text| text.parse::<Account>().is_err()));
    }

    #[test]
    fn nobody_is_asked_for_the_token_of_a_service_account_that_was_not_named() {
        let Err(CliError::Usage(complaint)) = Options::default().account() else { panic!("there is no usual one") };
        assert!(["--kube-service-account", "kubectl create serviceaccount"].iter().all(|step| complaint.contains(step)), "{complaint}");
    }

    #[tokio::test]
    async fn a_token_is_shown_with_each_call_and_never_in_what_is_printed() {
        let mut header: MetadataValue<Ascii> = "Bearer secret".parse().unwrap();
        header.set_sensitive(true);
        let header = Arc::new(ArcSwapOption::from_pointee(header));
        let mut bearer = Bearer { header, cluster: Some("east".parse().unwrap()) };
        let request = bearer.call(Request::new(())).unwrap();
        assert_eq!(request.metadata().get("authorization").unwrap(), "Bearer secret");
        assert_eq!(request.metadata().get(OPERATORS_CLUSTER_KEY).unwrap(), "east");
        assert!(!format!("{request:?}").contains("secret"), "{request:?}");
        assert!(Bearer::none().call(Request::new(())).unwrap().metadata().is_empty());
    }
}
