//! What the policy grants and refuses.

use super::*;
use crate::attestation::JwksSource;

fn cluster(name: &str, accounts: &str) -> ClusterSettings {
    ClusterSettings {
        name: name.into(),
        issuer: "https://k".into(),
        audiences: vec!["chancery".into()],
        agent_audience: "chancery-agent".into(),
        agent_accounts: Vec::new(),
        service_accounts: vec![accounts.parse().unwrap()],
        kubernetes: None,
        operators: false,
        publish: None,
        jwks: JwksSource::File("jwks.json".into()),
        shared_identities: false,
    }
}

fn policy_of(settings: PolicySettings) -> Policy {
    Policy::new("example.org".parse().unwrap(), settings, &[]).unwrap()
}

fn with_template(template: &str) -> Result<Policy, PolicyError> {
    let settings = PolicySettings { id_template: template.into(), ..PolicySettings::default() };
    Policy::new("example.org".parse().unwrap(), settings, &[])
}

const CART: Workload<'_> = Workload { cluster: "east", namespace: "shop", service_account: "cart" };
const NOTHING: Asked<'_> = Asked { key_type: KeyType::EcdsaP256, spiffe_id: None, dns_names: &[], lifetime: None };

#[test]
fn the_default_template_is_istios_form_and_lives_an_hour() {
    let decision = policy_of(PolicySettings::default()).evaluate(CART, &NOTHING).unwrap();
    assert_eq!(decision.spiffe_id.as_str(), "spiffe://example.org/ns/shop/sa/cart");
    assert_eq!((decision.lifetime, decision.dns_names), (Duration::from_secs(3600), Vec::new()));
}

#[test]
fn a_name_never_escapes_its_segment() {
    let policy = with_template("/{namespace}/{service_account}").unwrap();
    for name in ["a/b", "..", ".", "", "a%2fb", "a b", "ä"] {
        for workload in [Workload { namespace: name, ..CART }, Workload { service_account: name, ..CART }] {
            let refusal = policy.evaluate(workload, &NOTHING).unwrap_err();
            assert_eq!((refusal.reason, refusal.rule), ("id_impossible", "policy.id_template"), "{name:?}");
        }
    }
}

#[test]
fn no_workload_gets_an_id_of_chancerys_own() {
    assert_eq!(with_template("/chancery/{namespace}/{service_account}").unwrap_err(), PolicyError::Template(TemplateError::Reserved));
    let policy = with_template("/{namespace}/{service_account}").unwrap();
    let refusal = policy.evaluate(Workload { namespace: "chancery", service_account: "ca", ..CART }, &NOTHING).unwrap_err();
    assert!(refusal.reason == "id_impossible" && refusal.message.contains("reserved"), "{refusal}");
}

#[test]
fn templates_that_are_none_or_mix_accounts_are_refused() {
    for template in [
        "",
        "ns/{namespace}/{service_account}",
        "/ns/{namespace}/sa/{service_account}/",
        "/ns-{namespace}/{service_account}",
        "/{namespace}{service_account}",
        "/{pod}/{namespace}/{service_account}",
        "/../{namespace}/{service_account}",
        "/{namespace}/all",
        "/all/{service_account}",
        "/{cluster}",
    ] {
        assert!(with_template(template).is_err(), "{template:?}");
    }
    assert!(with_template("/{cluster}/x.y-z_1/{namespace}/{service_account}").is_ok());
}

#[test]
fn clusters_that_could_produce_the_same_id_are_refused_unless_both_say_so() {
    let domain: TrustDomain = "example.org".parse().unwrap();
    let new = |clusters: &[ClusterSettings]| Policy::new(domain.clone(), PolicySettings::default(), clusters);
    let (mut east, mut west) = (cluster("east", "shop/*"), cluster("west", "*"));
    let error = new(&[east.clone(), west.clone()]).unwrap_err().to_string();
    assert!(error.contains("east") && error.contains("west") && error.contains("shop/*"), "{error}");
    east.shared_identities = true;
    assert!(new(&[east.clone(), west.clone()]).is_err(), "one of two");
    west.shared_identities = true;
    assert!(new(&[east.clone(), west.clone()]).is_ok());
    assert!(new(&[cluster("east", "shop/*"), cluster("west", "bank/*")]).is_ok());
    let with_cluster = PolicySettings { id_template: "/{cluster}/{namespace}/{service_account}".into(), ..PolicySettings::default() };
    assert!(Policy::new(domain.clone(), with_cluster, &[cluster("east", "*"), cluster("west", "*")]).is_ok());
}

#[test]
fn a_csr_that_asks_for_another_id_is_refused() {
    let policy = policy_of(PolicySettings::default());
    let own: SpiffeId = "spiffe://example.org/ns/shop/sa/cart".parse().unwrap();
    assert!(policy.evaluate(CART, &Asked { spiffe_id: Some(&own), ..NOTHING }).is_ok());
    for other in ["spiffe://example.org/ns/shop/sa/checkout", "spiffe://other.org/ns/shop/sa/cart", "spiffe://example.org/ns/shop/sa/Cart"]
    {
        let other: SpiffeId = other.parse().unwrap();
        let refusal = policy.evaluate(CART, &Asked { spiffe_id: Some(&other), ..NOTHING }).unwrap_err();
        assert_eq!(refusal.reason, "csr_other_id");
    }
}

#[test]
fn dns_names_come_from_the_policy_and_others_are_refused() {
    let rule = DnsRule {
        service_accounts: vec!["shop/*".parse().unwrap()],
        names: vec!["{service_account}.{namespace}.svc.cluster.local".into(), "shop.example.org".into()],
    };
    let policy = policy_of(PolicySettings { dns_names: vec![rule], ..PolicySettings::default() });
    let granted = ["cart.shop.svc.cluster.local".to_owned(), "shop.example.org".to_owned()];
    assert_eq!(policy.evaluate(CART, &NOTHING).unwrap().dns_names, granted, "whether asked for or not");
    assert_eq!(policy.evaluate(CART, &Asked { dns_names: &granted[..1], ..NOTHING }).unwrap().dns_names, granted);
    let asked = ["bank.example.org".to_owned()];
    let refusal = policy.evaluate(CART, &Asked { dns_names: &asked, ..NOTHING }).unwrap_err();
    assert_eq!(refusal.reason, "dns_name_not_allowed");
    let teller = Workload { namespace: "bank", service_account: "teller", ..CART };
    assert!(policy.evaluate(teller, &Asked { dns_names: &granted[..1], ..NOTHING }).is_err());
    assert!(policy.evaluate(teller, &NOTHING).unwrap().dns_names.is_empty());
    for name in ["*.example.org", "", "a b", "{pod}.svc", "cart.svc.", "_cart.svc", "-cart.svc"] {
        let rule = DnsRule { service_accounts: vec!["*".parse().unwrap()], names: vec![name.into()] };
        let settings = PolicySettings { dns_names: vec![rule], ..PolicySettings::default() };
        let refused = Policy::new("example.org".parse().unwrap(), settings, &[]);
        assert!(matches!(refused, Err(PolicyError::DnsName(_))), "{name:?}");
    }
}

#[test]
fn lifetimes_and_key_types_outside_of_the_policy_are_refused() {
    let policy = policy_of(PolicySettings::default());
    let asked = |seconds| Asked { lifetime: Some(Duration::from_secs(seconds)), ..NOTHING };
    assert_eq!(policy.evaluate(CART, &asked(600)).unwrap().lifetime, Duration::from_secs(600));
    for seconds in [1, 299, 86401] {
        assert_eq!(policy.evaluate(CART, &asked(seconds)).unwrap_err().reason, "lifetime_not_allowed");
    }
    let refusal = policy.evaluate(CART, &Asked { key_type: KeyType::Rsa2048, ..NOTHING }).unwrap_err();
    assert_eq!(refusal.reason, "key_type_not_allowed");
    let lifetimes = |min: u64, default: u64, max: u64| Lifetimes {
        min: Duration::from_secs(min),
        default: Duration::from_secs(default),
        max: Duration::from_secs(max),
        ..Lifetimes::default()
    };
    for wrong in [lifetimes(0, 5, 9), lifetimes(6, 5, 9), lifetimes(1, 10, 9)] {
        let settings = PolicySettings { lifetimes: wrong, ..PolicySettings::default() };
        assert!(matches!(Policy::new("example.org".parse().unwrap(), settings, &[]), Err(PolicyError::Lifetimes(_))));
    }
}

#[test]
fn an_agent_gets_its_own_id_and_nothing_else() {
    let policy = policy_of(PolicySettings::default());
    let own: SpiffeId = "spiffe://example.org/chancery/agent/east/0b9a2c5e-8f5e-4f51-9c0e-6f1d6f0c7a11".parse().unwrap();
    let other: SpiffeId = "spiffe://example.org/chancery/ca".parse().unwrap();
    assert_eq!(policy.evaluate_agent(&own, &NOTHING).unwrap().lifetime, Duration::from_secs(86400));
    assert_eq!(policy.evaluate_agent(&own, &Asked { spiffe_id: Some(&other), ..NOTHING }).unwrap_err().reason, "csr_other_id");
    let names = ["ca.example.org".to_owned()];
    assert_eq!(policy.evaluate_agent(&own, &Asked { dns_names: &names, ..NOTHING }).unwrap_err().reason, "dns_name_not_allowed");
}

#[test]
fn settings_are_read_from_toml_and_unknown_keys_refused() {
    let text = "id_template = \"/{cluster}/{namespace}/{service_account}\"\nkey_types = [\"ecdsa-p384\"]\n\
                [lifetimes]\nmin = \"6s\"\ndefault = \"1m\"\n[[dns_names]]\nservice_accounts = [\"shop/*\"]\nnames = [\"a.b\"]\n";
    let settings: PolicySettings = toml::from_str(text).unwrap();
    assert_eq!((settings.lifetimes.min, settings.lifetimes.max), (Duration::from_secs(6), Duration::from_secs(86400)));
    assert!(toml::from_str::<PolicySettings>("id_tmplate = \"/x\"").is_err());
    assert!(toml::from_str::<PolicySettings>("[lifetimes]\nminimum = \"6s\"").is_err());
}
