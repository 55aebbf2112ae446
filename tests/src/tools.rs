//! Finding the programs that tests run: Chancery's own, as built, and those that `tests/setup` installs.

use std::io::Write;
use std::path::{Path, PathBuf};

use crate::Result;

/// One of Chancery's own binaries, beside the one that is running.
pub fn chancery(name: &str) -> Result<PathBuf> {
    let running = std::env::current_exe()?;
    let built = running.ancestors().skip(1).take(2).map(|directory| directory.join(name)).find(|path| path.is_file());
    built.ok_or_else(|| format!("{name} has not been built: run `cargo build --workspace --bins`, or `make test`").into())
}

/// Envoy; without it, the test that asks is counted as skipped.
pub fn envoy() -> Option<PathBuf> {
    installed("Envoy", "CHANCERY_ENVOY", "lib/python3*/site-packages/envoy/_bin/envoy")
}

/// pkilint's linter for certificates; without it, the test that asks is counted as skipped.
pub fn pkilint() -> Option<PathBuf> {
    installed("pkilint", "CHANCERY_PKILINT", "bin/lint_pkix_cert")
}

/// OpenSSL's command line; without it, the test that asks is counted as skipped.
pub fn openssl() -> Option<PathBuf> {
    let found = on_path("openssl");
    if found.is_none() {
        skip("openssl is not installed: run `tests/setup`");
    }
    found
}

/// libfaketime, which gives a program a clock of its own; without it, the test that asks is counted as skipped.
pub fn faketime() -> Option<PathBuf> {
    let named = std::env::var_os("CHANCERY_FAKETIME").map(PathBuf::from);
    let found = named.or_else(|| {
        // One directory per architecture.
        let directories = std::fs::read_dir("/usr/lib").ok()?.filter_map(Result::ok);
        directories.map(|entry| entry.path().join("faketime/libfaketimeMT.so.1")).find(|path| path.is_file())
    });
    if found.is_none() {
        skip("libfaketime is not installed: run `tests/setup`, or name its libfaketimeMT.so.1 in CHANCERY_FAKETIME");
    }
    found
}

/// The Go compiler; without it, the test that asks is counted as skipped.
pub fn go() -> Option<PathBuf> {
    let named = std::env::var_os("CHANCERY_GO").map(PathBuf::from);
    let found = named.or_else(|| on_path("go"));
    if found.is_none() {
        skip("Go is not installed: run `tests/setup`, or name its compiler in CHANCERY_GO");
    }
    found
}

/// One of the tools for the Helm chart: `helm`, `kubectl`, `kubernetes-validate`, `checkov`, `yamllint`; without it, the test that asks is
/// counted as skipped.
pub fn chart(program: &str) -> Option<PathBuf> {
    let named = std::env::var_os("CHANCERY_CHART_TOOLS").map(PathBuf::from);
    let found = named.unwrap_or_else(|| source().join(".cache/chart/bin")).join(program);
    if !found.is_file() {
        skip(&format!("{program} is not installed: run `tests/setup`, or name its directory in CHANCERY_CHART_TOOLS"));
        return None;
    }
    Some(found)
}

/// The directory with etcd and kube-apiserver; without them, the test that asks is counted as skipped.
pub fn kubernetes() -> Option<PathBuf> {
    let directory = std::env::var_os("CHANCERY_KUBERNETES").map_or_else(|| source().join(".cache/kubernetes"), PathBuf::from);
    if ["etcd", "kube-apiserver"].iter().all(|program| directory.join(program).is_file()) {
        return Some(directory);
    }
    skip("etcd and kube-apiserver are not built: run `tests/setup kubernetes`, or name their directory in CHANCERY_KUBERNETES");
    None
}

/// A program of the system.
pub fn on_path(name: &str) -> Option<PathBuf> {
    let search = std::env::var_os("PATH").unwrap_or_default();
    std::env::split_paths(&search).map(|directory| directory.join(name)).find(|path| path.is_file())
}

/// The root of the source tree.
pub fn source() -> &'static Path {
    Path::new(concat!(env!("CARGO_MANIFEST_DIR"), "/.."))
}

fn installed(what: &str, variable: &str, in_venv: &str) -> Option<PathBuf> {
    let found = std::env::var_os(variable).map(PathBuf::from).or_else(|| matching(&source().join(".cache/venv"), in_venv));
    if found.as_ref().is_none_or(|path| !path.is_file()) {
        skip(&format!("{what} is not installed: run `tests/setup`, or name it in {variable}"));
        return None;
    }
    found
}

/// The first path below `root` that fits; a `*` ends a segment's fixed part.
fn matching(root: &Path, pattern: &str) -> Option<PathBuf> {
    pattern.split('/').try_fold(root.to_owned(), |path, segment| match segment.strip_suffix('*') {
        None => Some(path.join(segment)),
        Some(start) => std::fs::read_dir(path)
            .ok()?
            .filter_map(|entry| Some(entry.ok()?.path()))
            .find(|entry| entry.file_name().is_some_and(|name| name.to_string_lossy().starts_with(start))),
    })
}

/// Counts the running test as skipped, by its name. In CI nothing may be skipped.
pub fn skip(reason: &str) {
    assert!(std::env::var_os("CI").is_none(), "{reason}; in CI that is a failure");
    let test = std::thread::current().name().unwrap_or("a test").to_owned();
    eprintln!("skipped {test}: {reason}");
    if let Some(list) = std::env::var_os("CHANCERY_SKIPPED") {
        let appended = std::fs::OpenOptions::new().append(true).create(true).open(list);
        // One write, so that tests that skip at the same time do not mix their lines.
        let _ = appended.and_then(|mut list| list.write_all(format!("{test}: {reason}\n").as_bytes()));
    }
}
