//! A trust root that a corporate CA signed: OpenSSL is that CA, two real Envoys rotate onto its root under load, and every judge takes what is
//! below it without anything above it. The CA's keys lie sealed meanwhile.

#![allow(clippy::unwrap_used, clippy::expect_used, reason = "a test that cannot go on fails")]

use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::Duration;

use chancery_tests::agent::Agent;
use chancery_tests::ca::Ca;
use chancery_tests::lab::Lab;
use chancery_tests::load::{self, Steady};
use chancery_tests::mesh::{Mesh, Settings};
use chancery_tests::{tools, wait};
use serde_json::Value;

const HOUR: Duration = Duration::from_secs(3600);
const SOON: Duration = Duration::from_secs(30);

/// A company's root and the CA below it, as files.
struct Corporate {
    openssl: PathBuf,
    directory: PathBuf,
}

impl Corporate {
    fn found(lab: &Lab) -> Option<Self> {
        let corporate = Self { openssl: tools::openssl()?, directory: lab.at("corporate") };
        std::fs::create_dir_all(&corporate.directory).unwrap();
        let authority = "basicConstraints=critical,CA:TRUE\nkeyUsage=critical,keyCertSign,cRLSign\nsubjectKeyIdentifier=hash\n";
        std::fs::write(corporate.at("authority.ext"), authority).unwrap();
        let mesh = "basicConstraints=critical,CA:TRUE,pathlen:1\nkeyUsage=critical,keyCertSign,cRLSign\nsubjectKeyIdentifier=hash\n\
                    authorityKeyIdentifier=keyid\ncertificatePolicies=1.3.6.1.4.1.99999.1\ncrlDistributionPoints=URI:http://crl.corp.test/mesh.crl\n";
        std::fs::write(corporate.at("mesh.ext"), mesh).unwrap();
        let request = ["req", "-new", "-newkey", "rsa:2048", "-nodes"];
        corporate.run(&[&request[..], &["-keyout", "root.key", "-subj", "/C=DE/O=Corp/CN=Corp Root", "-out", "root.csr"]].concat());
        corporate.run(&[
            "x509",
            "-req",
            "-in",
            "root.csr",
            "-signkey",
            "root.key",
            "-days",
            "3650",
            "-extfile",
            "authority.ext",
            "-out",
            "root.pem",
        ]);
        corporate.run(&[&request[..], &["-keyout", "ca.key", "-subj", "/C=DE/O=Corp/CN=Corp Issuing CA", "-out", "ca.csr"]].concat());
        let signing = ["x509", "-req", "-in", "ca.csr", "-CA", "root.pem", "-CAkey", "root.key", "-CAcreateserial"];
        corporate.run(&[&signing[..], &["-days", "1825", "-extfile", "authority.ext", "-out", "ca.pem"]].concat());
        Some(corporate)
    }

    fn at(&self, name: &str) -> PathBuf {
        self.directory.join(name)
    }

    fn run(&self, arguments: &[&str]) -> String {
        let output = Command::new(&self.openssl).current_dir(&self.directory).args(arguments).output().unwrap();
        let words = String::from_utf8_lossy(&output.stdout).into_owned() + &String::from_utf8_lossy(&output.stderr);
        assert!(output.status.success(), "openssl {arguments:?}: {words}");
        words
    }

    /// Signs a request as a CA would that is asked for a subordinate one, and returns the file with the chain, from the top down.
    fn sign(&self, csr: &Path, days: &str) -> PathBuf {
        let csr = csr.to_str().unwrap();
        let signing = ["x509", "-req", "-in", csr, "-CA", "ca.pem", "-CAkey", "ca.key", "-CAcreateserial", "-sha384"];
        self.run(&[&signing[..], &["-days", days, "-extfile", "mesh.ext", "-out", "mesh.pem"]].concat());
        let chain = ["root.pem", "ca.pem", "mesh.pem"].map(|file| std::fs::read_to_string(self.at(file)).unwrap());
        std::fs::write(self.at("chain.pem"), chain.concat()).unwrap();
        self.at("chain.pem")
    }
}

/// Without holding up the load, which runs on the same threads.
fn chancery(ca: &Ca, arguments: &[&str]) -> Result<String, String> {
    tokio::task::block_in_place(|| ca.chancery(arguments)).map_err(|error| error.to_string())
}

fn json(ca: &Ca, arguments: &[&str]) -> Value {
    serde_json::from_str(&chancery(ca, &[&["-o", "json"], arguments].concat()).unwrap()).unwrap()
}

/// State and corporate CA of each root.
fn roots(ca: &Ca) -> Vec<(String, String)> {
    let word = |root: &Value, key: &str| root[key].as_str().unwrap().to_owned();
    json(ca, &["root", "list"]).as_array().unwrap().iter().map(|root| (word(root, "state"), word(root, "signed_by"))).collect()
}

fn states(ca: &Ca) -> Vec<String> {
    roots(ca).into_iter().map(|(state, _)| state).collect()
}

fn write_private(path: &Path, text: &str) {
    std::fs::write(path, text).unwrap();
    std::fs::set_permissions(path, std::os::unix::fs::PermissionsExt::from_mode(0o600)).unwrap();
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn two_envoys_rotate_onto_a_corporate_root_and_every_judge_takes_what_is_below_it() {
    let lab = Lab::new().unwrap();
    let (Some(envoy), Some(corporate)) = (tools::envoy(), Corporate::found(&lab)) else { return };
    let passphrase = lab.at("passphrase");
    write_private(&passphrase, "open sesame\n");
    let sealed = format!("\n[keys]\npassphrase_file = \"{}\"\n", passphrase.display());
    let ca = Ca::start_in(&lab, &lab.at("ca"), HOUR, &sealed).await.unwrap();
    let agent = Agent::start(&lab, &ca, chancery_tests::mesh::NODE).await.unwrap();
    let settings = Settings::lasting(envoy);
    let mut mesh = Mesh::around(ca, agent, lab, settings).unwrap();
    let checkout = mesh.workload("checkout", None).await.unwrap();
    let cart = mesh.workload("cart", Some(checkout.envoy.at.inbound)).await.unwrap();
    let load = Steady::begin(&cart.envoy).await.unwrap();

    let csr = mesh.lab.at("root.csr");
    let prepare = ["root", "prepare", "--reason", "under the corporate CA"];
    let request = [&prepare[..], &["--csr", csr.to_str().unwrap()]].concat();
    chancery(&mesh.ca, &request).unwrap();
    let written = std::fs::read(&csr).unwrap();
    mesh.ca.kill().unwrap();
    mesh.ca.run(&mesh.lab).await.unwrap();
    assert_eq!(json(&mesh.ca, &request)["changed"], false);
    assert_eq!(std::fs::read(&csr).unwrap(), written, "the request outlives a kill");

    let above = corporate.at("ca.pem");
    let refused = chancery(&mesh.ca, &[&prepare[..], &["--certificate", above.to_str().unwrap()]].concat()).unwrap_err();
    assert!(refused.contains("no open request has the key"), "{refused}");
    let short = corporate.sign(&csr, "1");
    let refused = chancery(&mesh.ca, &[&prepare[..], &["--certificate", short.to_str().unwrap()]].concat()).unwrap_err();
    assert!(refused.contains("two issuing certificates"), "{refused}");
    let chain = corporate.sign(&csr, "60");
    let answer = [&prepare[..], &["--certificate", chain.to_str().unwrap()]].concat();
    assert_eq!(json(&mesh.ca, &answer)["state"], "prepared");
    assert_eq!(json(&mesh.ca, &answer)["changed"], false);

    chancery(&mesh.ca, &["root", "rotate", "--reason", "under the corporate CA", "--deadline", "90s"]).unwrap();
    assert_eq!(states(&mesh.ca), ["retired", "active"]);
    assert!(roots(&mesh.ca)[1].1.ends_with("CN=Corp Issuing CA"), "{:?}", roots(&mesh.ca));
    load.end(&cart.envoy, &checkout.envoy).await.unwrap();

    let bundle = std::fs::read_to_string(mesh.ca.bundle()).unwrap();
    let signed = std::fs::read_to_string(corporate.at("mesh.pem")).unwrap();
    let body = |pem: &str| pem.lines().filter(|line| !line.starts_with(['#', '-'])).collect::<String>();
    assert_eq!(body(&bundle), body(&signed), "what was signed is the anchor, and nothing above it is");
    openssl_takes_what_is_below(&mesh, &corporate, &cart.envoy.certificate().await.unwrap().serial);
    renewal(&mesh.ca, &corporate, &csr);
    assert!(holds_no_plain_key(&mesh.ca.data().join("keys")));
    mesh.ca.stop().await.unwrap();
    let verify = ["--output", "json", "log", "verify", "--certificates", "--data-dir"];
    let verified = Command::new(tools::chancery("chancery").unwrap()).args(verify).arg(mesh.ca.data()).output().unwrap();
    let verdict = String::from_utf8_lossy(&verified.stdout);
    assert!(verdict.contains("intact"), "{verdict}{}", String::from_utf8_lossy(&verified.stderr));
}

fn openssl_takes_what_is_below(mesh: &Mesh, corporate: &Corporate, serial: &str) {
    let shown = json(&mesh.ca, &["identity", "show", serial]);
    std::fs::write(corporate.at("leaf.pem"), shown["certificate_pem"].as_str().unwrap()).unwrap();
    std::fs::copy(mesh.ca.data().join("authority/issuing.pem"), corporate.at("issuing.pem")).unwrap();
    let chain = ["-untrusted", "issuing.pem", "leaf.pem"];
    for purpose in ["sslclient", "sslserver"] {
        let below = ["verify", "-x509_strict", "-purpose", purpose, "-partial_chain", "-trusted", "mesh.pem"];
        assert!(corporate.run(&[&below[..], &chain].concat()).contains("leaf.pem: OK"));
    }
    // And with the whole company above it, for whoever trusts that.
    let whole = ["verify", "-x509_strict", "-trusted", "root.pem", "-untrusted", "ca.pem", "-untrusted", "mesh.pem"];
    assert!(corporate.run(&[&whole[..], &chain].concat()).contains("leaf.pem: OK"));
}

/// The CA makes no next root by itself: it says in time that one has to be asked for.
fn renewal(ca: &Ca, corporate: &Corporate, answered: &Path) {
    let listed =
        Command::new(tools::chancery("chancery").unwrap()).arg("--socket").arg(ca.admin_socket()).args(["root", "list"]).output().unwrap();
    assert!(!String::from_utf8_lossy(&listed.stderr).contains("--csr"), "60 days are more than half of its life");
    let refused = chancery(ca, &["root", "rotate", "--reason", "a test"]).unwrap_err();
    assert!(refused.contains("signed by") && refused.contains("root prepare --csr FILE"), "{refused}");
    let active = json(ca, &["root", "list"])[1]["fingerprint"].as_str().unwrap().to_owned();
    let refused = chancery(ca, &["root", "distrust", &active, "--reason", "a test"]).unwrap_err();
    assert!(refused.contains("--self-signed"), "{refused}");
    assert_eq!(states(ca), ["retired", "active"], "nothing was begun that cannot be finished");
    let next = corporate.at("next.csr");
    let request = |path: &Path| chancery(ca, &["root", "prepare", "--reason", "renewal", "--csr", path.to_str().unwrap()]);
    let refused = request(answered).unwrap_err();
    assert!(refused.contains("holds something else"), "{refused}");
    request(&next).unwrap();
    let chain = corporate.sign(&next, "365");
    chancery(ca, &["root", "prepare", "--reason", "renewal", "--certificate", chain.to_str().unwrap()]).unwrap();
    assert_eq!(states(ca), ["retired", "active", "prepared"]);
}

fn holds_no_plain_key(directory: &Path) -> bool {
    std::fs::read_dir(directory).unwrap().all(|file| std::fs::read(file.unwrap().path()).unwrap().starts_with(b"age-encryption.org"))
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn keys_that_lay_in_clear_are_sealed_at_the_next_start_and_open_with_the_right_passphrase_alone() {
    // To stretch passphrases is much work, and meant to be.
    let _turn = load::turn().await;
    let lab = Lab::new().unwrap();
    let mut ca = Ca::start(&lab, HOUR).await.unwrap();
    let root = json(&ca, &["root", "list"])[0]["fingerprint"].clone();
    ca.stop().await.unwrap();
    assert!(!holds_no_plain_key(&ca.data().join("keys")));

    let passphrase = lab.at("passphrase");
    let plain = std::fs::read_to_string(ca.config()).unwrap();
    std::fs::write(ca.config(), format!("{plain}\n[keys]\npassphrase_file = \"{}\"\n", passphrase.display())).unwrap();
    let missing = ca.refused(&lab).await.unwrap();
    assert!(missing.contains("keys") && missing.contains("passphrase: cannot open"), "{missing}");
    write_private(&passphrase, "open sesame\n");
    ca.run(&lab).await.unwrap();
    assert!(holds_no_plain_key(&ca.data().join("keys")));
    assert_eq!(json(&ca, &["root", "list"])[0]["fingerprint"], root);
    ca.kill().unwrap();

    write_private(&passphrase, "open barley\n");
    let refused = ca.refused(&lab).await.unwrap();
    assert!(refused.contains("does not open it") && refused.contains("[keys]") && !refused.contains("barley"), "{refused}");
    std::fs::write(ca.config(), &plain).unwrap();
    let refused = ca.refused(&lab).await.unwrap();
    assert!(refused.contains("set `passphrase_file` or `identity_file` under [keys]"), "{refused}");

    reseal(&lab, &ca, &passphrase);
    std::fs::write(ca.config(), format!("{plain}\n[keys]\npassphrase_file = \"{}\"\n", lab.at("new").display())).unwrap();
    ca.run(&lab).await.unwrap();
    assert_eq!(json(&ca, &["root", "list"])[0]["fingerprint"], root);
    let log = ca.log().unwrap();
    assert!(!log.contains("sesame") && !log.contains("AGE-SECRET-KEY") && !log.contains("PRIVATE KEY"));
    wait::until("it issues", SOON, async || chancery(&ca, &["doctor"]).map(|_| ())).await.unwrap();
}

/// Goes over from the first passphrase to the one in the file `new`.
fn reseal(lab: &Lab, ca: &Ca, passphrase: &Path) {
    write_private(passphrase, "open sesame\n");
    write_private(&lab.at("new"), "a better one\n");
    let config = lab.at("reseal.toml");
    let text = format!(
        "trust_domain = \"mesh.test\"\ndata_dir = \"{}\"\n[keys]\npassphrase_file = \"{}\"\n",
        ca.data().display(),
        passphrase.display()
    );
    std::fs::write(&config, text).unwrap();
    let reseal = || {
        let mut command = Command::new(tools::chancery("chancery-ca").unwrap());
        command.args(["keys", "reseal", "--config"]).arg(&config).arg("--passphrase-file").arg(lab.at("new")).output().unwrap()
    };
    let done = reseal();
    assert!(done.status.success(), "{}", String::from_utf8_lossy(&done.stderr));
    let again = reseal();
    assert!(!again.status.success() && String::from_utf8_lossy(&again.stderr).contains("does not open it"));
}
