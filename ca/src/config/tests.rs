//! What is accepted, what is refused and where, and that the example says all of it.

use std::collections::BTreeSet;

use super::*;

const MINIMAL: &str = "trust_domain = \"example.org\"\ndata_dir = \"/var/lib/chancery\"\n";
const DEVELOPMENT: Mode = Mode::Development { data_dir: None };

fn parse(text: &str, mode: &Mode) -> Result<Config, String> {
    Config::parse(Some(Path::new("ca.toml")), text, mode).map_err(|error| error.to_string())
}

fn refused(text: &str) -> String {
    parse(&format!("{MINIMAL}{text}"), &Mode::Production).unwrap_err()
}

/// The example with the lines of its `[[cluster]]` as if they were meant.
fn example_with_cluster() -> String {
    let (before, cluster) = EXAMPLE.split_once("# [[cluster]]").unwrap();
    let before = before.replace("# passphrase_file =", "passphrase_file =").replace("# identity_file =", "identity_file =");
    let cluster: Vec<&str> = cluster.lines().map(|line| line.strip_prefix("# ").unwrap_or(line)).collect();
    format!("{before}[[cluster]]{}", cluster.join("\n"))
}

#[test]
fn the_example_says_the_defaults() {
    let example = parse(EXAMPLE, &Mode::Production).unwrap();
    let minimal = parse(MINIMAL, &Mode::Production).unwrap();
    assert_eq!(example, Config { digest: example.digest, ..minimal });
}

#[test]
fn the_example_of_a_cluster_says_the_defaults() {
    let required = ["name", "issuer", "service_accounts", "jwks", "kubernetes", "publish", "agent_accounts", "shared_identities"];
    let document: toml::Table = example_with_cluster().parse().unwrap();
    let mut cluster = document["cluster"][0].as_table().unwrap().clone();
    let example: ClusterSettings = cluster.clone().try_into().unwrap();
    cluster.retain(|key, _| required.contains(&key));
    assert_eq!(example, cluster.try_into().unwrap());
}

#[test]
fn the_example_names_every_key() {
    let document: toml::Table = example_with_cluster().parse().unwrap();
    for section in ["", "keys", "log", "policy", "policy.lifetimes", "authority", "roles", "limits", "[cluster]"] {
        let table = section.trim_matches(['[', ']']).split('.').filter(|name| !name.is_empty()).fold(&document, |table, name| {
            let inner = &table[name];
            inner.as_table().or_else(|| inner[0].as_table()).unwrap()
        });
        let named: BTreeSet<&str> = table.keys().map(String::as_str).collect();
        let header = if section.is_empty() { String::new() } else { format!("[{section}]\n") };
        // An unknown key is refused with the names of all that are known.
        let error = parse(&format!("{header}zzz = 1\n"), &Mode::Production).unwrap_err();
        let (_, known) = error.split_once("expected").unwrap_or_else(|| panic!("{section}: {error}"));
        let known = known.split(';').next().unwrap();
        for key in known.split('`').skip(1).step_by(2) {
            assert!(named.contains(key), "the example does not name `{key}` in [{section}]");
        }
    }
}

#[test]
fn development_needs_no_configuration_and_has_an_issuer() {
    let config = parse("", &Mode::Development { data_dir: Some("elsewhere".into()) }).unwrap();
    assert!(config.listen.ip().is_loopback() && config.development);
    assert_eq!(config.data_dir, Path::new("elsewhere"));
    assert_eq!(config.admin_socket, Path::new("elsewhere/admin.sock"));
    assert_eq!(config.clusters[0].name, DEVELOPMENT_CLUSTER);
}

#[test]
fn development_listens_on_loopback_only() {
    let error = parse("listen = \"0.0.0.0:8443\"", &DEVELOPMENT).unwrap_err();
    assert!(error.starts_with("ca.toml:1: listen: ") && error.contains("loopback"), "{error}");
}

#[test]
fn lifetimes_of_seconds_are_for_development() {
    let seconds = "[policy.lifetimes]\nmin = \"6s\"\ndefault = \"6s\"\nmax = \"20s\"\nagent = \"20s\"\n";
    assert!(parse(seconds, &DEVELOPMENT).is_ok());
    let error = refused(seconds);
    assert!(error.starts_with("ca.toml:3: policy.lifetimes: ") && error.contains("60s"), "{error}");
}

#[test]
fn an_unknown_key_is_refused_with_its_line() {
    let error = refused("\ncolour = \"blue\"\n");
    assert!(error.starts_with("ca.toml:4:") && error.contains("unknown field `colour`"), "{error}");
    let error = refused("[limits]\nmax_conections = 5\n");
    assert!(error.starts_with("ca.toml:4:") && error.contains("max_connections"), "{error}");
}

#[test]
fn a_bad_trust_domain_is_refused_with_its_line() {
    let error = parse("data_dir = \"d\"\ntrust_domain = \"Example.org:8443\"\n", &Mode::Production).unwrap_err();
    assert!(error.starts_with("ca.toml:2:") && error.contains("trust domain"), "{error}");
}

#[test]
fn what_is_required_is_named() {
    assert!(parse("data_dir = \"d\"", &Mode::Production).unwrap_err().contains("trust_domain: missing"));
    assert!(parse("trust_domain = \"a\"", &Mode::Production).unwrap_err().contains("data_dir: missing"));
}

#[test]
fn a_missing_file_of_keys_is_refused_with_its_line() {
    let cluster =
        "[[cluster]]\nname = \"east\"\nissuer = \"https://k\"\nservice_accounts = [\"*\"]\njwks = { file = \"/missing/jwks.json\" }\n";
    let error = refused(cluster);
    assert!(error.starts_with("ca.toml:7: cluster.0.jwks: /missing/jwks.json: "), "{error}");
}

#[test]
fn a_role_for_somebody_who_cannot_have_it_is_refused_with_its_line() {
    let admins = |ids: &str| refused(&format!("[roles]\nadmin = [{ids}]\nauditor = [\"spiffe://example.org/ns/ops/sa/audit\"]\n"));
    for (ids, problem) in [
        ("\"spiffe://other.org/ns/ops/sa/alice\"", "another trust domain"),
        ("\"spiffe://example.org/chancery/agent/east/7\"", "/chancery/"),
        ("\"example.org/alice\"", "spiffe://"),
    ] {
        let error = admins(ids);
        assert!(error.starts_with("ca.toml:4:") && error.contains(problem), "{error}");
    }
    let twice = admins("\"spiffe://example.org/ns/ops/sa/audit\"");
    assert!(twice.starts_with("ca.toml:5: roles.auditor: ") && twice.contains("name it once"), "{twice}");
    let fine = "[roles]\nadmin = [\"spiffe://example.org/ns/ops/sa/alice\"]\n";
    let config = parse(&format!("{MINIMAL}{fine}"), &Mode::Production).unwrap();
    assert_eq!(parse(MINIMAL, &Mode::Production).unwrap().changed(&config), ["roles"]);
}

#[test]
fn a_missing_configuration_is_named() {
    let error = Config::load(Some(Path::new("/missing/ca.toml")), &Mode::Production).unwrap_err().to_string();
    assert!(error.starts_with("/missing/ca.toml: "), "{error}");
}

#[test]
fn clusters_that_could_produce_the_same_identities_are_refused() {
    let directory = tempfile::tempdir().unwrap();
    let jwks = directory.path().join("jwks.json");
    std::fs::write(&jwks, "{}").unwrap();
    let cluster = |name: &str| {
        let jwks = jwks.display();
        format!("[[cluster]]\nname = \"{name}\"\nissuer = \"https://k\"\nservice_accounts = [\"*\"]\njwks = {{ file = \"{jwks}\" }}\n")
    };
    let error = refused(&(cluster("east") + &cluster("west")));
    assert!(error.contains("shared_identities"), "{error}");
    assert!(
        refused(&(cluster("east") + &cluster("east"))).starts_with("ca.toml:8: "),
        "{}",
        refused(&(cluster("east") + &cluster("east")))
    );
}

#[test]
fn what_changed_is_told_apart_by_whether_it_needs_a_restart() {
    let before = parse("", &DEVELOPMENT).unwrap();
    let text = "listen = \"127.0.0.1:1\"\n[log]\nlevel = \"debug\"\nformat = \"json\"\n[policy.lifetimes]\ndefault = \"30m\"\n";
    let after = parse(text, &DEVELOPMENT).unwrap();
    assert_eq!(before.changed(&after), ["log", "policy"]);
    assert_eq!(before.needs_restart(&after), ["listen", "log.format"]);
    assert!(before.changed(&before).is_empty() && before.needs_restart(&before).is_empty());
}

#[test]
fn a_secret_for_the_keys_that_is_no_good_is_found_before_a_start() {
    let directory = tempfile::tempdir().unwrap();
    let file = directory.path().join("passphrase");
    let check = |keys: &str| parse(&format!("{MINIMAL}\n[keys]\n{keys}"), &Mode::Production).unwrap_err();
    let named = format!("passphrase_file = {:?}\n", file.display().to_string());
    let error = check(&named);
    assert!(error.contains("keys") && error.contains("passphrase: cannot open"), "{error}");
    std::fs::write(&file, "open sesame\n").unwrap();
    std::fs::set_permissions(&file, std::os::unix::fs::PermissionsExt::from_mode(0o644)).unwrap();
    assert!(check(&named).contains("chmod 0600"));
    std::fs::set_permissions(&file, std::os::unix::fs::PermissionsExt::from_mode(0o600)).unwrap();
    let error = check(&format!("{named}identity_file = \"other\"\n"));
    assert!(error.contains("not with both"), "{error}");
    std::fs::write(&file, "\n").unwrap();
    assert!(check(&named).contains("it is empty"));
    std::fs::write(&file, "open sesame\n").unwrap();
    parse(&format!("{MINIMAL}\n[keys]\n{named}"), &Mode::Production).unwrap();
}
