//! The `kmem` command.
//!
//! Results go to standard output, everything about the run itself (progress, errors) to standard error.
//! Exit codes: 0 success, 1 the run ended in an error, 2 the command line was wrong.

mod replay;

use clap::{Parser, Subcommand};
use std::process::ExitCode;

/// The Linux kernel's memory allocator as a library: its command-line companion.
#[derive(Parser)]
#[command(name = "kmem", version)]
struct Cli {
    /// What to do; without one, `replay` of the recording that comes with the project.
    #[command(subcommand)]
    command: Option<Command>,
}

#[derive(Subcommand)]
enum Command {
    /// Replay a recorded kernel trace on a machine of the recorded shape.
    Replay(replay::Args),
}

fn main() -> ExitCode {
    let cli = match Cli::parse() {
        Cli { command: None } => Cli::parse_from(["kmem", "replay"]),
        cli => cli,
    };
    let result = match cli.command {
        Some(Command::Replay(args)) => replay::run(&args),
        None => Ok(()),
    };
    match result {
        Ok(()) => ExitCode::SUCCESS,
        Err(e) => {
            eprintln!("kmem: {e:#}");
            ExitCode::FAILURE
        }
    }
}
