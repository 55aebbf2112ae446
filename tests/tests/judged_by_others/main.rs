//! Certificates judged by others: what a running CA issues must please programs and libraries that Chancery has no part in.

#![allow(clippy::unwrap_used, reason = "a test that cannot go on fails")]
#![allow(unreachable_pub, reason = "the modules of a test")]

mod issued;
mod judges;

use chancery_ca::issuance::policy::DnsRule;
use chancery_ca::issuance::{Policy, PolicySettings};
use chancery_identity::TrustDomain;
use chancery_tests::Result;
use issued::{Issued, KEY_TYPES, Setup};
use judges::{OpenSsl, Pkilint, spiffe_reads_bundle, spiffe_reads_svid, webpki_finds_unrevoked, webpki_verifies};
use proptest::prelude::*;
use rcgen::{BasicConstraints, CertificateParams, DnType, IsCa, Issuer, KeyPair};
use time::OffsetDateTime;

impl Issued {
    /// Every leaf as both ends of a connection, and the authorities for themselves.
    fn judged_by_openssl(&self, openssl: &OpenSsl) -> Result<()> {
        openssl.verify(std::slice::from_ref(&self.root), &self.root, "any", self.at)?;
        openssl.verify(std::slice::from_ref(&self.issuing), &self.root, "any", self.at)?;
        for leaf in &self.leaves {
            for purpose in ["sslserver", "sslclient"] {
                openssl.verify(&leaf.chain, &self.root, purpose, self.at).map_err(|error| format!("{}: {error}", leaf.owner))?;
            }
        }
        Ok(())
    }

    /// Every certificate, and every link of every chain.
    fn judged_by_pkilint(&self, pkilint: &Pkilint) -> Result<()> {
        pkilint.certificate(&self.root).map_err(|error| format!("the root: {error}"))?;
        pkilint.certificate(&self.issuing).map_err(|error| format!("the issuing certificate: {error}"))?;
        pkilint.link(&self.root, &self.issuing).map_err(|error| format!("the issuing certificate under the root: {error}"))?;
        for leaf in &self.leaves {
            let verdict = pkilint.certificate(&leaf.chain[0]).and_then(|()| pkilint.link(&self.issuing, &leaf.chain[0]));
            verdict.map_err(|error| format!("{}: {error}", leaf.owner))?;
        }
        Ok(())
    }

    fn judged_by_webpki(&self) -> Result<()> {
        self.leaves.iter().try_for_each(|leaf| {
            webpki_verifies(&leaf.chain, &self.root, self.at).map_err(|error| format!("{}: {error}", leaf.owner).into())
        })
    }

    fn judged_by_spiffe(&self) -> Result<()> {
        // The CA's own key never leaves it, and the crate does not hold a key against its certificate: another one stands in.
        let any = self.leaves.iter().find_map(|leaf| leaf.key.as_ref()).ok_or("no key")?;
        for leaf in &self.leaves {
            let key = leaf.key.as_ref().unwrap_or(any);
            let found = spiffe_reads_svid(&leaf.chain, key.secret_pkcs8()).map_err(|error| format!("{}: {error}", leaf.owner))?;
            let ours = chancery_identity::profile::check_leaf(&leaf.chain[0])?.id;
            if found != ours.as_str() {
                return Err(format!("{}: {found} instead of {ours}", leaf.owner).into());
            }
        }
        let authorities = spiffe_reads_bundle(self.trust_domain.as_str(), std::slice::from_ref(&self.root))?;
        if authorities == 1 { Ok(()) } else { Err(format!("{authorities} authorities in the bundle").into()) }
    }
}

#[tokio::test]
async fn openssl_verifies_every_chain_for_both_ends_of_a_connection() {
    let Some(openssl) = OpenSsl::find() else { return };
    Setup::default().issue().await.unwrap().judged_by_openssl(&openssl).unwrap();
}

#[tokio::test]
async fn pkilint_finds_no_error_in_root_issuing_certificate_and_leaves() {
    let Some(pkilint) = Pkilint::find() else { return };
    Setup::default().issue().await.unwrap().judged_by_pkilint(&pkilint).unwrap();
}

#[tokio::test]
async fn webpki_verifies_every_chain_for_both_ends_of_a_connection() {
    Setup::default().issue().await.unwrap().judged_by_webpki().unwrap();
}

#[tokio::test]
async fn the_spiffe_crate_accepts_every_svid_and_the_bundle() {
    Setup::default().issue().await.unwrap().judged_by_spiffe().unwrap();
}

/// Leaves that live as long as their issuing certificate, so that only the CRL can run out before.
fn long_lived() -> Setup {
    Setup { key_types: KEY_TYPES[..2].to_vec(), workload_lifetime: 7 * 86400, ..Setup::default() }
}

/// The CA is away from the moment of the revocation on.
#[tokio::test]
async fn a_ca_that_is_away_for_a_week_locks_nobody_out_and_lets_nobody_back_in() {
    let Some(openssl) = OpenSsl::find() else { return };
    let issued = long_lived().issue_and_revoke().await.unwrap();
    let [good, revoked] = &issued.leaves[issued.leaves.len() - 2..] else { panic!("two workloads") };
    // Whose clock is a little behind, at once, and up to the end of the issuing certificate.
    let moments = [time::Duration::seconds(-20), time::Duration::ZERO, time::Duration::days(1), time::Duration::days(7)];
    for moment in moments.map(|after| issued.at + after - time::Duration::seconds(1)) {
        for purpose in ["sslserver", "sslclient"] {
            openssl.verify_with(&good.chain, &issued.root, Some(&issued.crl), purpose, moment).unwrap();
            let verdict = openssl.verify_with(&revoked.chain, &issued.root, Some(&issued.crl), purpose, moment).unwrap_err().to_string();
            assert!(verdict.contains("certificate revoked"), "{verdict}");
        }
        webpki_finds_unrevoked(&good.chain, &issued.root, &issued.crl, moment).unwrap();
        let verdict = webpki_finds_unrevoked(&revoked.chain, &issued.root, &issued.crl, moment).unwrap_err().to_string();
        assert!(verdict.contains("Revoked"), "{verdict}");
    }
    let other = long_lived().issue_and_revoke().await.unwrap();
    assert!(webpki_finds_unrevoked(&good.chain, &issued.root, &other.crl, issued.at).is_err(), "the judge wants a list of the issuer");
    assert!(openssl.verify_with(&good.chain, &issued.root, Some(&other.crl), "sslclient", issued.at).is_err());
}

#[tokio::test]
async fn a_chain_under_another_root_is_refused_by_openssl_and_webpki() {
    let Some(openssl) = OpenSsl::find() else { return };
    let setup = Setup { key_types: KEY_TYPES[..1].to_vec(), ..Setup::default() };
    let (issued, other) = (setup.issue().await.unwrap(), setup.issue().await.unwrap());
    let impostor = Issued { root: other.root, ..issued };
    assert!(impostor.judged_by_openssl(&openssl).is_err());
    assert!(impostor.judged_by_webpki().is_err());
}

#[test]
fn the_judges_find_what_is_wrong() {
    let (Some(openssl), Some(pkilint)) = (OpenSsl::find(), Pkilint::find()) else { return };
    let now = OffsetDateTime::now_utc();
    // An authority that does not say what its key is for, and what it signed, which does not say who signed it.
    let mut params = CertificateParams::default();
    params.is_ca = IsCa::Ca(BasicConstraints::Unconstrained);
    params.distinguished_name.push(DnType::CommonName, "root");
    let (key, other) = (KeyPair::generate().unwrap(), KeyPair::generate().unwrap());
    let root = params.self_signed(&key).unwrap().der().clone();
    let leaf = CertificateParams::default().signed_by(&other, &Issuer::new(params, key)).unwrap().der().clone();

    let verdict = openssl.verify(std::slice::from_ref(&leaf), &root, "sslserver", now).unwrap_err().to_string();
    assert!(verdict.contains("Missing Authority Key Identifier"), "{verdict}");
    let verdict = pkilint.certificate(&root).unwrap_err().to_string();
    assert!(verdict.contains("ERROR pkix.ca_certificate_no_ku_extension"), "{verdict}");
    let verdict = pkilint.link(&leaf, &root).unwrap_err().to_string();
    assert!(verdict.contains("ERROR"), "{verdict}");
    let verdict = spiffe_reads_svid(&[leaf], &other.serialize_der()).unwrap_err().to_string();
    assert!(verdict.contains("extension"), "{verdict}");
}

prop_compose! {
    /// Whatever a configuration may say, and whoever may ask.
    fn setups()(
        at in 1_750_000_000i64..2_900_000_000,
        trust_domain in prop_oneof!["[a-z0-9]{1,12}(\\.[a-z0-9]{1,12}){0,3}", "[a-z0-9._-]{1,40}", "[a-z0-9]{60}(\\.[a-z0-9]{60}){2}"]
            .prop_filter("no trust domain", |name| name.parse::<TrustDomain>().is_ok()),
        id_template in prop::sample::select(vec![
            "/ns/{namespace}/sa/{service_account}", "/{cluster}/{namespace}/{service_account}", "/a_b/{service_account}/{namespace}",
        ]),
        dns_names in prop::collection::vec(dns_name(), 0..3).prop_filter("no policy", |names| is_policy(names)),
        (workload_lifetime, issuing_lifetime, root_lifetime) in (1u64..90 * 86400, 3600u64..30 * 86400, 86400u64..30 * 365 * 86400),
        key_type in prop::sample::select(KEY_TYPES.to_vec()),
        namespace in "[a-z0-9]([a-z0-9-]{0,20}[a-z0-9])?",
        service_account in "[a-z0-9]([a-z0-9-]{0,20}[a-z0-9])?",
    ) -> Setup {
        Setup {
            at: OffsetDateTime::from_unix_timestamp(at).unwrap(),
            id_template: id_template.to_owned(),
            key_types: vec![key_type],
            trust_domain, dns_names, workload_lifetime, issuing_lifetime, root_lifetime, namespace, service_account,
        }
    }
}

/// Names as people write them, and names that only the policy's own check keeps out. All end as pkilint wants it: with a top-level domain,
/// which names of services in a cluster need not have.
fn dns_name() -> impl Strategy<Value = String> {
    prop_oneof![
        prop::sample::select(vec!["{service_account}.{namespace}.svc".to_owned(), "{service_account}.{cluster}.example.org".to_owned()]),
        "[a-zA-Z0-9_-]{1,10}(\\.[a-z0-9_-]{1,10}){0,2}\\.[a-z]{2,6}\\.?",
    ]
}

/// Whether a policy may have these names.
fn is_policy(dns_names: &[String]) -> bool {
    let rule = DnsRule { service_accounts: vec!["*".parse().unwrap()], names: dns_names.to_vec() };
    let settings = PolicySettings { dns_names: vec![rule], ..PolicySettings::default() };
    Policy::new("mesh.test".parse().unwrap(), settings, &[]).is_ok()
}

proptest! {
    #![proptest_config(ProptestConfig { cases: ProptestConfig::default().cases / 32, max_shrink_iters: 8, failure_persistence: None, ..ProptestConfig::default() })]

    #[test]
    fn what_any_policy_lets_through_pleases_every_judge(setup in setups()) {
        let (Some(openssl), Some(pkilint)) = (OpenSsl::find(), Pkilint::find()) else { return Ok(()) };
        let runtime = tokio::runtime::Runtime::new().unwrap();
        let mut issued = runtime.block_on(setup.issue()).map_err(|error| TestCaseError::fail(error.to_string()))?;
        // The workload's comes last; the others are the same for all policies.
        issued.leaves.drain(..issued.leaves.len() - 1);
        let verdict = issued.judged_by_openssl(&openssl)
            .and_then(|()| issued.judged_by_pkilint(&pkilint))
            .and_then(|()| issued.judged_by_webpki())
            .and_then(|()| issued.judged_by_spiffe());
        prop_assert!(verdict.is_ok(), "{}", verdict.unwrap_err());
    }
}
