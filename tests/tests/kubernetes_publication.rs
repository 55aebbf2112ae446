//! Copies of the trust bundle in a cluster, on the real API server, with the rights that the CA needs for it and no others.

#![allow(clippy::unwrap_used, clippy::expect_used, reason = "a test that cannot go on fails")]

use std::process::Command;
use std::time::Duration;

use chancery_tests::ca::Ca;
use chancery_tests::kubernetes::place::{self, Territory};
use chancery_tests::kubernetes::{Admin, ApiServer, shared};
use chancery_tests::lab::Lab;
use chancery_tests::{tools, wait};
use k8s_openapi::api::certificates::{v1, v1beta1};
use k8s_openapi::api::core::v1::ConfigMap;
use kube::Api;
use serde::de::DeserializeOwned;
use serde_json::{Value, json};

const HOUR: Duration = Duration::from_secs(3600);
const SOON: Duration = Duration::from_secs(30);
const SIGNER: &str = "chancery.dev/mesh";
const BUNDLE: &str = "chancery.dev:mesh:trust-bundle";
/// As Kubernetes 1.33 to 1.36 can be told to.
const BETA_ALONE: &str = "certificates.k8s.io/v1/clustertrustbundles=false,certificates.k8s.io/v1beta1/clustertrustbundles=true";
const CONFIG_MAP: &str = "chancery-trust-bundle";

/// A cluster with a CA that publishes to one of its namespaces.
struct Place {
    admin: Admin,
    namespace: String,
    ca: Ca,
    _lab: Lab,
}

impl Place {
    /// With the rights that publishing needs.
    async fn allowed(server: &ApiServer) -> Self {
        let rules = [
            json!({"apiGroups": [""], "resources": ["configmaps"], "resourceNames": [CONFIG_MAP], "verbs": ["get", "create", "patch"]}),
            json!({"apiGroups": ["certificates.k8s.io"], "resources": ["clustertrustbundles"], "resourceNames": [BUNDLE],
                "verbs": ["get", "create", "patch"]}),
            json!({"apiGroups": ["certificates.k8s.io"], "resources": ["signers"], "resourceNames": [SIGNER], "verbs": ["attest"]}),
        ];
        let of = Territory::new(server).await.unwrap();
        of.admin.allow(&of.system, "ca", &json!(rules)).await.unwrap();
        Self::of(server, of).await
    }

    async fn of(server: &ApiServer, of: Territory) -> Self {
        let publish = format!("publish = {{ namespaces = [\"{}\"], signer_name = \"{SIGNER}\" }}\n", of.system);
        let place::Place { of, ca, lab, .. } = place::Place::with(server, of, HOUR, &publish).await.unwrap();
        Self { admin: of.admin, namespace: of.system, ca, _lab: lab }
    }

    /// Waits until every copy is the bundle, which has so many roots.
    async fn copies_are_the_bundle(&self, roots: usize) {
        self.copies_are(&Api::<v1::ClusterTrustBundle>::all(self.admin.client().clone()), roots, |bundle| bundle.spec).await;
    }

    async fn copies_are<K>(&self, bundles: &Api<K>, roots: usize, spec: fn(K) -> v1::ClusterTrustBundleSpec)
    where
        K: Clone + std::fmt::Debug + DeserializeOwned,
    {
        let config_maps = Api::<ConfigMap>::namespaced(self.admin.client().clone(), &self.namespace);
        wait::until("every copy is the bundle", SOON, async || {
            let bundle = std::fs::read_to_string(self.ca.bundle()).map_err(|error| error.to_string())?;
            let config_map = config_maps.get(CONFIG_MAP).await.map_err(|error| error.to_string())?;
            let trust_bundle = bundles.get(BUNDLE).await.map_err(|error| error.to_string())?;
            let (_, pem) = bundle.split_once('\n').ok_or("no line with the sequence")?;
            let copies = (config_map.data.unwrap_or_default().remove("trust-bundle.pem"), spec(trust_bundle));
            let is_same = copies.0.as_deref() == Some(&*bundle) && copies.1.trust_bundle == pem;
            if is_same && copies.1.signer_name.as_deref() == Some(SIGNER) && pem.matches("BEGIN CERTIFICATE").count() == roots {
                return Ok(());
            }
            Err(format!("{copies:#?} for {roots} roots in {bundle}"))
        })
        .await
        .unwrap();
    }

    fn root(&self, arguments: &[&str]) -> Result<String, String> {
        self.ca.chancery(&[&["root"], arguments].concat()).map_err(|error| error.to_string())
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn every_copy_is_the_bundle_before_during_and_after_a_change_of_the_root() {
    let Some(server) = shared().await.unwrap() else { return };
    let place = Place::allowed(&server).await;
    place.copies_are_the_bundle(1).await;

    place.root(&["prepare", "--reason", "a test"]).unwrap();
    place.root(&["publish", "--reason", "a test"]).unwrap();
    place.copies_are_the_bundle(2).await;
    let mut gate = Command::new(tools::chancery("chancery").unwrap());
    gate.arg("--socket").arg(place.ca.admin_socket()).args(["-o", "json", "root", "activate", "--dry-run"]);
    let gate: Value = serde_json::from_slice(&gate.output().unwrap().stdout).unwrap();
    let unproven = gate["unproven"].to_string();
    assert_eq!((&gate["open"], &gate["unproven_total"]), (&json!(false), &json!(2)), "{gate}");
    assert!(unproven.contains(BUNDLE) && unproven.contains(&format!("{}/{CONFIG_MAP}", place.namespace)), "{gate}");

    place.root(&["activate", "--reason", "a test", "--accept-unproven"]).unwrap();
    place.copies_are_the_bundle(2).await;
    let retire = async || place.root(&["retire", "--reason", "a test"]);
    wait::until("nothing is left under the old root", SOON, retire).await.unwrap();
    place.copies_are_the_bundle(1).await;
}

#[tokio::test]
async fn a_bundle_that_changes_while_the_api_server_is_away_is_everywhere_once_it_is_back() {
    let Some(mut server) = ApiServer::start().await.unwrap() else { return };
    let place = Place::allowed(&server).await;
    place.copies_are_the_bundle(1).await;
    server.kill().unwrap();
    place.root(&["prepare", "--reason", "a test"]).unwrap();
    place.root(&["publish", "--reason", "a test"]).unwrap();
    server.run().await.unwrap();
    place.copies_are_the_bundle(2).await;
}

#[tokio::test]
async fn where_only_the_beta_of_cluster_trust_bundles_is_served_that_is_kept() {
    let Some(server) = ApiServer::start_with(BETA_ALONE).await.unwrap() else { return };
    let place = Place::allowed(&server).await;
    place.admin.get("/apis/certificates.k8s.io/v1/clustertrustbundles").await.unwrap_err();
    let bundles = Api::<v1beta1::ClusterTrustBundle>::all(place.admin.client().clone());
    let spec = |bundle: v1beta1::ClusterTrustBundle| v1::ClusterTrustBundleSpec {
        signer_name: bundle.spec.signer_name,
        trust_bundle: bundle.spec.trust_bundle,
    };
    place.copies_are(&bundles, 1, spec).await;
    place.root(&["prepare", "--reason", "a test"]).unwrap();
    place.root(&["publish", "--reason", "a test"]).unwrap();
    place.copies_are(&bundles, 2, spec).await;
}

#[tokio::test]
async fn a_ca_that_may_not_publish_says_what_it_must_be_allowed() {
    let Some(server) = shared().await.unwrap() else { return };
    let place = Place::of(&server, Territory::new(&server).await.unwrap()).await;
    let findings = async || {
        let findings = place.ca.chancery(&["doctor"]).unwrap_or_else(|error| error.to_string());
        let expected = ["get, create and patch on the ConfigMap chancery-trust-bundle", "attest on the signer chancery.dev/mesh"];
        if expected.iter().all(|words| findings.contains(words)) { Ok(()) } else { Err(findings) }
    };
    wait::until("the doctor says it", SOON, findings).await.unwrap();
}
