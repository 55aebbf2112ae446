//! `chancery-ca backup` and `chancery-ca restore`.

use std::error::Error;
use std::io;
use std::path::PathBuf;
use std::sync::Arc;

use chancery_ca::backup::{self, AcceptLoss, Backup, Restore};
use chancery_ca::config::{Config, Mode};
use chancery_identity::{Clock, SystemClock};
use chancery_process::output::{Format, fields};
use clap::{ArgGroup, Args};
use indicatif::{ProgressBar, ProgressStyle};
use serde::Serialize;
use time::OffsetDateTime;

#[derive(Debug, Args)]
#[command(group = ArgGroup::new("of").required(true).args(["config", "data_dir"]))]
pub(crate) struct BackupArgs {
    /// The CA's configuration, which names its data directory.
    #[arg(long, value_name = "FILE")]
    config: Option<PathBuf>,
    /// The CA's data directory.
    #[arg(long, value_name = "DIR")]
    data_dir: Option<PathBuf>,
    /// The backup: a file that is not there yet.
    #[arg(long, value_name = "FILE.tar")]
    to: PathBuf,
    /// Put the CA's keys in, encrypted to the recipient. Otherwise no key is in a backup: keep a copy of them elsewhere.
    #[arg(long, requires = "recipient")]
    with_keys: bool,
    /// Who can decrypt the keys: a public key of age (age1…), whose other half is kept far from the CA and its backups.
    #[arg(long, value_name = "AGE1", requires = "with_keys")]
    recipient: Option<String>,
    /// How to print what was written.
    #[arg(long, short, value_enum, default_value_t)]
    output: Format,
}

#[derive(Debug, Args)]
pub(crate) struct RestoreArgs {
    /// The backup.
    #[arg(value_name = "FILE.tar")]
    backup: PathBuf,
    /// The data directory to make: a new or an empty one.
    #[arg(long, value_name = "DIR")]
    data_dir: PathBuf,
    /// Decrypts the keys in the backup: a file that age-keygen wrote.
    #[arg(long, value_name = "AGE_KEY_FILE")]
    identity: Option<PathBuf>,
    /// The newest checkpoint that is known: `checkpoint` of the lost data directory, an auditor's, an agent's; may be given several times. A
    /// backup that ends before it is refused.
    #[arg(long, value_name = "FILE")]
    checkpoint: Vec<PathBuf>,
    /// Entries are lost: begin a new ledger with what the backup has, whose first entry says what is missing.
    #[arg(long, requires = "reason")]
    accept_loss: bool,
    /// Why; it is recorded.
    #[arg(long, value_name = "TEXT", requires = "accept_loss", value_parser = clap::builder::NonEmptyStringValueParser::new())]
    reason: Option<String>,
    /// The old data directory's `ledger-keys`, if these keys are not in the backup.
    #[arg(long, value_name = "DIR", requires = "accept_loss")]
    ledger_keys: Option<PathBuf>,
    /// How to print what was restored.
    #[arg(long, short, value_enum, default_value_t)]
    output: Format,
}

#[derive(Serialize)]
struct Written<'a> {
    file: String,
    entries: u64,
    bytes: u64,
    keys: &'a str,
    #[serde(with = "time::serde::rfc3339")]
    made_at: OffsetDateTime,
    seconds: f64,
    checkpoint: &'a str,
}

#[derive(Serialize)]
struct Restored<'a> {
    data_directory: String,
    origin: &'a str,
    entries: u64,
    #[serde(with = "time::serde::rfc3339")]
    made_at: OffsetDateTime,
    new_ledger: Option<NewLedger<'a>>,
    next_steps: &'a [String],
}

#[derive(Serialize)]
struct NewLedger<'a> {
    origin: &'a str,
    entries: u64,
    missing_from: u64,
    missing_until: u64,
    #[serde(with = "time::serde::rfc3339")]
    roots_kept_until: OffsetDateTime,
    previous: String,
}

pub(crate) fn create(args: &BackupArgs) -> Result<(), Box<dyn Error>> {
    chancery_process::hardening::harden()?;
    let data_dir = match (&args.data_dir, &args.config) {
        (Some(data_dir), _) => data_dir.clone(),
        (None, config) => Config::load(config.as_deref(), &Mode::Production)?.data_dir,
    };
    let bar = progress();
    let backup = Backup { data_dir: &data_dir, to: &args.to, recipient: args.recipient.as_deref(), now: SystemClock.now() };
    let written = backup::create(&backup, |done, total| show(&bar, done, total));
    bar.finish_and_clear();
    let written = written?;
    let answer = Written {
        file: args.to.display().to_string(),
        entries: written.info.entries,
        bytes: written.bytes,
        keys: if written.info.keys { "encrypted to the recipient" } else { "none: keep a copy of them elsewhere" },
        made_at: written.info.made_at,
        seconds: written.took.as_secs_f64(),
        checkpoint: &written.checkpoint,
    };
    Ok(fields(&mut io::stdout().lock(), args.output, &answer)?)
}

pub(crate) fn restore(args: &RestoreArgs) -> Result<(), Box<dyn Error>> {
    chancery_process::hardening::harden()?;
    let bar = progress();
    let loss = args.reason.as_deref().filter(|_| args.accept_loss).map(|why| AcceptLoss { why, ledger_keys: args.ledger_keys.as_deref() });
    let restore = Restore {
        backup: &args.backup,
        data_dir: &args.data_dir,
        identity: args.identity.as_deref(),
        checkpoints: &args.checkpoint,
        loss: loss.as_ref(),
        actor: format!("local:uid={}", rustix::process::getuid().as_raw()),
        clock: Arc::new(SystemClock),
    };
    let restored = backup::restore(&restore, |done, total| show(&bar, done, total));
    bar.finish_and_clear();
    let restored = restored?;
    let answer = Restored {
        data_directory: args.data_dir.display().to_string(),
        origin: &restored.info.origin,
        entries: restored.info.entries,
        made_at: restored.info.made_at,
        new_ledger: restored.new_log.as_ref().map(|new| NewLedger {
            origin: &new.origin,
            entries: new.entries,
            missing_from: new.missing.start,
            missing_until: new.missing.end,
            roots_kept_until: new.roots_kept_until,
            previous: args.data_dir.join(&new.previous).display().to_string(),
        }),
        next_steps: &restored.next_steps,
    };
    Ok(fields(&mut io::stdout().lock(), args.output, &answer)?)
}

/// On standard error, if somebody watches.
fn progress() -> ProgressBar {
    let bar = ProgressBar::new(0);
    match ProgressStyle::with_template("{bar:40} {bytes}/{total_bytes}, {bytes_per_sec}, {eta} left") {
        Ok(style) => bar.with_style(style),
        Err(_) => bar,
    }
}

fn show(bar: &ProgressBar, done: u64, total: u64) {
    bar.set_length(total.max(done));
    bar.set_position(done);
}
