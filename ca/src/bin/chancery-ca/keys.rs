//! `chancery-ca keys`: what the CA's private keys are sealed with.

use std::error::Error;
use std::io::{self, Write};
use std::path::PathBuf;

use chancery_ca::authority::DataDirectory;
use chancery_ca::config::{Config, Mode};
use chancery_ca::keys::{SealSettings, reseal};
use clap::{ArgGroup, Args, Subcommand};

#[derive(Debug, Subcommand)]
pub(crate) enum Command {
    /// Seal the keys with another passphrase or identity. The CA may run meanwhile; its next start needs the new one.
    Reseal(ResealArgs),
}

#[derive(Debug, Args)]
#[command(group = ArgGroup::new("with").required(true).args(["passphrase_file", "identity_file"]))]
pub(crate) struct ResealArgs {
    /// The CA's configuration, which names what the keys are sealed with now.
    #[arg(long, value_name = "FILE")]
    config: PathBuf,
    /// A file with the new passphrase.
    #[arg(long, value_name = "FILE")]
    passphrase_file: Option<PathBuf>,
    /// A file with the new identity, as `age-keygen` writes it.
    #[arg(long, value_name = "FILE")]
    identity_file: Option<PathBuf>,
}

pub(crate) fn run(command: Command) -> Result<(), Box<dyn Error>> {
    chancery_process::hardening::harden()?;
    let Command::Reseal(ResealArgs { config, passphrase_file, identity_file }) = command;
    let path = config.display().to_string();
    let config = Config::load(Some(&config), &Mode::Production)?;
    let new = SealSettings { passphrase_file, identity_file };
    let (Some(old), Some(secret)) = (config.keys.secret()?, new.secret()?) else {
        return Err(format!("{path}: there is no secret under [keys]: name the one that the keys are sealed with now").into());
    };
    reseal(&DataDirectory::keys_of(&config.data_dir), &old, &secret)?;
    let told = "the keys open with the new secret alone; name it under [keys] before the CA starts again";
    Ok(writeln!(io::stdout(), "{told}\nbackups made until now still need the old one: keep it as long as them")?)
}
