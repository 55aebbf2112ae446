//! Imports inside a crate run one way, along the arrows that its `lib.rs` draws.
//!
//! The picture in the documentation is what is enforced: a module that the picture does not name fails, too.

#![allow(clippy::unwrap_used, clippy::expect_used, reason = "a test that cannot go on fails")]

use std::collections::{BTreeMap, BTreeSet};
use std::path::{Path, PathBuf};

/// What a module may import: everything below its layer. A module at the edge may import everything, or be imported by everything, but
/// never both, which would be a way around the arrows.
#[derive(Debug)]
struct Arrows {
    layers: Vec<BTreeSet<String>>,
    edge: BTreeSet<String>,
}

/// Module by module, what it imports.
type Imports = BTreeMap<String, BTreeSet<String>>;

impl Arrows {
    /// Reads the one line with arrows: `a -> { b, c } -> d        e, f: at the edge`.
    fn read(lib: &str) -> Self {
        let line = lib.lines().filter(|line| line.starts_with("//!")).find(|line| line.contains("->")).expect("lib.rs draws its arrows");
        let line = line.trim_start_matches("//!").trim();
        let (arrows, edge) = line.split_once("   ").expect("the edge stands apart from the arrows");
        let names = |text: &str| -> BTreeSet<String> {
            text.split([',', '{', '}', ' ']).filter(|name| !name.is_empty()).map(str::to_owned).collect()
        };
        let edge = edge.trim().strip_suffix(": at the edge").expect("what stands apart is the edge");
        Self { layers: arrows.split("->").map(names).collect(), edge: names(edge) }
    }

    fn complaints(&self, imports: &Imports) -> Vec<String> {
        imports.iter().flat_map(|(from, all)| all.iter().filter_map(|to| self.complaint(imports, from, to))).collect()
    }

    fn complaint(&self, imports: &Imports, from: &str, to: &str) -> Option<String> {
        let layer = |name: &str| self.layers.iter().position(|layer| layer.contains(name));
        if from == to || self.edge.contains(from) {
            return None;
        }
        let Some(own) = layer(from) else { return Some(format!("{from} is not in the picture")) };
        match layer(to) {
            Some(other) if other > own => None,
            Some(_) => Some(format!("{from} imports {to}, against the arrows")),
            None if self.edge.contains(to) => {
                let back = imports.get(to)?.iter().find(|name| layer(name).is_some())?;
                Some(format!("{from} imports {to}, which is at the edge and imports {back}"))
            }
            None => Some(format!("{from} imports {to}, which is not in the picture")),
        }
    }
}

/// The first segment of every `crate::` path in the code: `use crate::a::b`, `use crate::{a::b, c}`, `crate::a::f()`.
fn imports(source: &str) -> BTreeSet<String> {
    let code: String = source.lines().map(|line| line.split("//").next().unwrap_or_default()).collect::<Vec<_>>().join("\n");
    let mut found = BTreeSet::new();
    for (at, marker) in code.match_indices("crate::") {
        if code[..at].ends_with(|before: char| before.is_alphanumeric() || before == '_' || before == '$') {
            continue;
        }
        let path = code[at + marker.len()..].trim_start();
        match path.strip_prefix('{') {
            Some(group) => found.extend(group_heads(group)),
            None => found.extend([head(path)]),
        }
    }
    found
}

/// The first segments in a `{a::b, c::{d, e}}` whose opening brace has been read.
fn group_heads(group: &str) -> Vec<String> {
    let (mut depth, mut heads, mut fresh) = (1, Vec::new(), true);
    for (at, character) in group.char_indices() {
        match character {
            '{' => depth += 1,
            '}' => depth -= 1,
            ',' if depth == 1 => fresh = true,
            _ if fresh && !character.is_whitespace() => {
                heads.push(head(&group[at..]));
                fresh = false;
            }
            _ => {}
        }
        if depth == 0 {
            break;
        }
    }
    heads
}

fn head(path: &str) -> String {
    path.chars().take_while(|character| character.is_alphanumeric() || *character == '_').collect()
}

/// Module name and source of each file below `src`, except the crate's roots.
fn sources(src: &Path) -> Vec<(String, PathBuf)> {
    let mut found = Vec::new();
    let mut todo = vec![src.to_owned()];
    while let Some(directory) = todo.pop() {
        for entry in std::fs::read_dir(directory).unwrap() {
            let path = entry.unwrap().path();
            let inner = path.strip_prefix(src).unwrap();
            let module = inner.iter().next().unwrap().to_str().unwrap().trim_end_matches(".rs").to_owned();
            if path.is_dir() {
                // Binaries see the library from outside.
                if module != "bin" {
                    todo.push(path);
                }
            } else if path.extension().is_some_and(|extension| extension == "rs") && !["lib", "main"].contains(&module.as_str()) {
                found.push((module, path));
            }
        }
    }
    found
}

fn complaints(krate: &str) -> Vec<String> {
    let src = Path::new(env!("CARGO_MANIFEST_DIR")).join("..").join(krate).join("src");
    let arrows = Arrows::read(&std::fs::read_to_string(src.join("lib.rs")).unwrap());
    let sources = sources(&src);
    assert!(sources.len() >= 4, "the sources of {krate} were not found");
    let mut found = Imports::new();
    for (module, path) in sources {
        found.entry(module).or_default().append(&mut imports(&std::fs::read_to_string(path).unwrap()));
    }
    arrows.complaints(&found)
}

#[test]
fn the_cas_imports_follow_the_arrows() {
    let complaints = complaints("ca");
    assert!(complaints.is_empty(), "{}", complaints.join("\n"));
}

#[test]
fn the_agents_imports_follow_the_arrows() {
    let complaints = complaints("agent");
    assert!(complaints.is_empty(), "{}", complaints.join("\n"));
}

#[test]
fn the_ca_and_the_agent_never_know_each_other() {
    for (krate, other) in [("ca", "chancery_agent"), ("agent", "chancery_ca")] {
        for (_, path) in sources(&Path::new(env!("CARGO_MANIFEST_DIR")).join("..").join(krate).join("src")) {
            let text = std::fs::read_to_string(&path).unwrap();
            assert!(!text.contains(&format!("{other}::")), "{} names {other}", path.display());
        }
    }
}

#[test]
fn an_import_against_the_arrows_is_found() {
    let arrows = Arrows::read("//! Words.\n//! api -> { issuance, fleet } -> ledger        config, telemetry: at the edge\n");
    let judged: BTreeMap<(&str, &str), bool> = [
        (("api", "ledger"), true),
        (("issuance", "issuance"), true),
        (("config", "api"), true),
        (("ledger", "telemetry"), true),
        (("ledger", "api"), false),
        (("issuance", "fleet"), false),
        (("ledger", "config"), false),
        (("api", "unknown"), false),
        (("unknown", "ledger"), false),
    ]
    .into();
    for ((from, to), allowed) in judged {
        let mut imports: Imports = [("config".to_owned(), ["api".to_owned()].into()), ("telemetry".to_owned(), BTreeSet::new())].into();
        imports.entry(from.to_owned()).or_default().insert(to.to_owned());
        assert_eq!(arrows.complaints(&imports).is_empty(), allowed, "{from} -> {to}");
    }
}

#[test]
fn every_form_of_an_import_is_read() {
    let source = "use crate::ledger::Entry;\nuse crate::{\n    api::{self, x},\n    fleet,\n};\n// use crate::commented::out;\n\
                  fn f() { crate::store::open(); mycrate::nothing(); }\npub(in crate::issuance) struct S;";
    let expected: BTreeSet<String> = ["api", "fleet", "issuance", "ledger", "store"].map(str::to_owned).into();
    assert_eq!(imports(source), expected);
}
