//! What a process did to the files below a directory, and what it said meanwhile, as `strace` saw it.

use std::collections::HashMap;
use std::fs;
use std::os::unix::ffi::OsStringExt;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};

const CALLS: &str = "trace=open,openat,creat,write,pwrite64,writev,pwritev,pwritev2,fsync,fdatasync,sync_file_range,rename,renameat,\
                     renameat2,link,linkat,unlink,unlinkat,truncate,ftruncate,fallocate,mkdir,mkdirat,rmdir,lseek,dup,fcntl";

/// The place of a file that is only appended to.
const AT_END: u64 = u64::MAX;

/// A system call that did something.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) enum Call {
    CreateDir(PathBuf),
    CreateFile(PathBuf),
    Write(PathBuf, u64, Vec<u8>),
    /// Of a file cut off or extended with zeros.
    SetLen(PathBuf, u64),
    /// Extends a file with zeros, or not at all.
    Allocate(PathBuf, u64),
    /// Of a directory, too.
    SyncAll(PathBuf),
    SyncData(PathBuf),
    Rename(PathBuf, PathBuf),
    /// Of a file, or of an empty directory.
    Remove(PathBuf),
    /// To its standard output.
    Say(String),
}

/// # Errors
/// Why no process can be traced here.
pub(super) fn is_possible() -> Result<(), String> {
    let tried = Command::new("strace").args(["-o", "/dev/null", "--seccomp-bpf", "-f", "true"]).output();
    let tried = tried.map_err(|error| format!("strace: {error}: run `tests/setup`"))?;
    if tried.status.success() { Ok(()) } else { Err(format!("strace: {}", String::from_utf8_lossy(&tried.stderr).trim())) }
}

/// Runs `command`, and tells what it did below `dir`.
pub(super) fn of(command: &Command, dir: &Path) -> Vec<Call> {
    let log = tempfile::NamedTempFile::new().unwrap();
    let mut traced = Command::new("strace");
    traced.args(["-f", "--seccomp-bpf", "-y", "-xx", "-s", "16777216", "-e", CALLS, "-e", "signal=none", "-o"]).arg(log.path());
    traced.arg(command.get_program()).args(command.get_args());
    traced.envs(command.get_envs().filter_map(|(name, value)| Some((name, value?)))).stdout(Stdio::null());
    assert!(traced.status().unwrap().success(), "the traced process failed");
    read(&fs::read_to_string(log.path()).unwrap(), dir)
}

fn read(log: &str, dir: &Path) -> Vec<Call> {
    let mut reader = Reader { dir, unfinished: HashMap::new(), places: HashMap::new(), calls: Vec::new() };
    log.lines().for_each(|line| reader.line(line));
    // How a socket came to be is not among the calls, and a power cut leaves none that matters.
    reader.calls.retain(|call| !matches!(call, Call::Remove(path) if path.extension().is_some_and(|extension| extension == "sock")));
    reader.calls
}

struct Reader<'a> {
    dir: &'a Path,
    /// By thread: what has begun. It counts when it ends.
    unfinished: HashMap<&'a str, &'a str>,
    /// Where the next write to a file goes, by descriptor.
    places: HashMap<String, u64>,
    calls: Vec<Call>,
}

impl<'a> Reader<'a> {
    fn line(&mut self, line: &'a str) {
        let (thread, line) = line.split_once(' ').unwrap_or_default();
        let line = line.trim_start();
        if let Some(begun) = line.strip_suffix("<unfinished ...>") {
            self.unfinished.insert(thread, begun);
        } else if let Some((_, rest)) = line.strip_prefix("<... ").and_then(|line| line.split_once(" resumed>")) {
            let begun = self.unfinished.remove(thread).unwrap_or_default();
            self.call(&format!("{}{rest}", begun.trim_end()));
        } else {
            self.call(line);
        }
    }

    fn call(&mut self, call: &str) {
        let Some((name, rest)) = call.split_once('(') else { return };
        let Some((arguments, result)) = rest.rsplit_once("= ").filter(|(_, result)| !result.starts_with(['-', '?'])) else { return };
        let Some(arguments) = arguments.trim_end().strip_suffix(')') else { return };
        let arguments: Vec<&str> = arguments.split(',').map(str::trim).collect();
        self.done(name, &arguments, result);
    }

    fn done(&mut self, name: &str, arguments: &[&str], result: &str) {
        let number = |text: &str| text.parse::<u64>().unwrap_or_else(|_| panic!("{name}: {text}"));
        let first = arguments[0];
        match name {
            "open" | "openat" | "creat" => self.opened(arguments, result),
            "dup" | "fcntl" if name == "dup" || arguments[1].starts_with("F_DUPFD") => {
                let place = self.place(first);
                assert!(place == 0 || self.below(first).is_none(), "two descriptors write to one file, in turn: {first}");
                self.places.insert(descriptor(result).to_owned(), place);
            }
            "fcntl" | "sync_file_range" => {}
            "lseek" => drop(self.places.insert(descriptor(first).to_owned(), number(result))),
            "write" if first.starts_with("1<") => {
                self.calls.push(Call::Say(String::from_utf8_lossy(&string(arguments[1])).into_owned()));
            }
            "write" => {
                let place = self.place(first);
                assert!(place != AT_END || self.below(first).is_none(), "where an appending write goes is not followed: {first}");
                self.places.insert(descriptor(first).to_owned(), place.saturating_add(number(result)));
                self.on(first, |path| Call::Write(path, place, string(arguments[1])));
            }
            "pwrite64" => self.on(first, |path| Call::Write(path, number(arguments[3]), string(arguments[1]))),
            "fsync" => self.on(first, Call::SyncAll),
            "fdatasync" => self.on(first, Call::SyncData),
            "ftruncate" => self.on(first, |path| Call::SetLen(path, number(arguments[1]))),
            "fallocate" => self.on(first, |path| Call::Allocate(path, number(arguments[3]))),
            "truncate" => self.named(&[first], |paths| Call::SetLen(paths[0].clone(), number(arguments[1]))),
            "mkdir" => self.named(&[first], |paths| Call::CreateDir(paths[0].clone())),
            "mkdirat" => self.named(&[&arguments[..2].join("/")], |paths| Call::CreateDir(paths[0].clone())),
            "unlink" | "rmdir" => self.named(&[first], |paths| Call::Remove(paths[0].clone())),
            "unlinkat" => self.named(&[&arguments[..2].join("/")], |paths| Call::Remove(paths[0].clone())),
            "rename" => self.named(&arguments[..2], |paths| Call::Rename(paths[0].clone(), paths[1].clone())),
            "renameat" | "renameat2" => {
                let (from, to) = (arguments[..2].join("/"), arguments[2..4].join("/"));
                self.named(&[&from, &to], |paths| Call::Rename(paths[0].clone(), paths[1].clone()));
            }
            _ => assert!(self.below(first).is_none(), "a call that is not known here: {name}({arguments:?})"),
        }
    }

    fn opened(&mut self, arguments: &[&str], result: &str) {
        let has = |flag: &str| arguments.iter().any(|argument| argument.split('|').any(|found| found == flag));
        self.places.insert(descriptor(result).to_owned(), if has("O_APPEND") { AT_END } else { 0 });
        let Some(path) = self.below(result) else { return };
        if has("O_CREAT") {
            self.calls.push(Call::CreateFile(path.clone()));
        }
        if has("O_TRUNC") {
            self.calls.push(Call::SetLen(path, 0));
        }
    }

    /// Something done to an open file.
    fn on(&mut self, file: &str, call: impl FnOnce(PathBuf) -> Call) {
        self.calls.extend(self.below(file).map(call));
    }

    /// Something done to names.
    fn named(&mut self, names: &[&str], call: impl FnOnce(&[PathBuf]) -> Call) {
        let paths: Vec<_> = names.iter().filter_map(|name| self.below(name)).collect();
        assert!(paths.is_empty() || paths.len() == names.len(), "from or to another directory: {paths:?}");
        if !paths.is_empty() {
            self.calls.push(call(&paths));
        }
    }

    fn place(&self, file: &str) -> u64 {
        self.places.get(descriptor(file)).copied().unwrap_or_default()
    }

    /// The path in `text`, if it is one below the directory: of a descriptor `3<path>`, of a string, or of both, the directory and the name.
    fn below(&self, text: &str) -> Option<PathBuf> {
        if text.ends_with("(deleted)") {
            return None;
        }
        let text = text.split_once('<').map_or(text, |(_, text)| text);
        let path: PathBuf = text.split(['>', '"']).filter(|part| part.starts_with("\\x")).map(|part| PathBuf::from(os(part))).collect();
        path.starts_with(self.dir).then_some(path)
    }
}

fn os(hexadecimal: &str) -> std::ffi::OsString {
    std::ffi::OsString::from_vec(string(hexadecimal))
}

/// The number of `3<path>`.
fn descriptor(file: &str) -> &str {
    file.split('<').next().unwrap_or_default()
}

/// The bytes of a string as `-xx` writes it.
fn string(text: &str) -> Vec<u8> {
    assert!(!text.ends_with("..."), "it was cut off");
    hex::decode(text.trim_matches('"').replace("\\x", "")).unwrap()
}
