//! The container files. Building them takes a container engine; what can go wrong without one is looked at here.

use std::path::Path;
use std::process::Command;

use chancery_tests::lab::Lab;
use chancery_tests::tools;

use crate::chart::said;

fn containerfile() -> String {
    std::fs::read_to_string(tools::source().join("deploy/containers/Containerfile")).unwrap()
}

#[test]
fn the_container_file_passes_its_linter() {
    let Some(hadolint) = tools::chart("hadolint") else { return };
    let output = Command::new(hadolint).arg(tools::source().join("deploy/containers/Containerfile")).output().unwrap();
    assert!(output.status.success(), "{}", said(&output));
}

#[test]
fn every_image_runs_as_a_numeric_user_that_is_not_root() {
    let text = containerfile();
    let stages: Vec<&str> = text.split("\nFROM ").skip(1).filter(|stage| stage.starts_with("${BASE}")).collect();
    assert_eq!(stages.len(), 2);
    for stage in stages {
        assert!(stage.contains("\nUSER 65532:65532\n"), "{stage}");
    }
}

/// What the build copies is enough for cargo to know the workspace, and no more than that and the sources.
#[test]
fn the_build_context_holds_what_cargo_needs() {
    let lab = Lab::new().unwrap();
    let ignore = std::fs::read_to_string(tools::source().join("deploy/containers/Containerfile.dockerignore")).unwrap();
    let lines = ignore.lines().filter(|line| !line.starts_with('#'));
    let mut kept = Vec::new();
    for line in lines {
        match line.strip_prefix('!') {
            Some(path) => kept.push(path),
            None => assert_eq!(line, "*", "everything is left out first"),
        }
    }
    let context = lab.at("context");
    for path in kept {
        let (from, to) = (tools::source().join(path), context.join(path));
        assert!(from.exists(), "{path} is not there");
        copy(&from, &to);
    }
    let mut metadata = Command::new(env!("CARGO"));
    let output = metadata.current_dir(&context).args(["metadata", "--locked", "--offline", "--no-deps", "--format-version", "1"]);
    let output = output.output().unwrap();
    assert!(output.status.success(), "{}", said(&output));
}

fn copy(from: &Path, to: &Path) {
    std::fs::create_dir_all(to.parent().unwrap()).unwrap();
    let status = Command::new("cp").arg("-a").args([from, to]).status().unwrap();
    assert!(status.success());
}
