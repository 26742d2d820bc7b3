//! The `kmem` command.
//!
//! Results go to standard output, everything about the run itself (progress, errors) to standard error.
//! Exit codes: 0 success, 1 the run ended in an error, 2 the command line was wrong.

mod replay;

use clap::{Parser, Subcommand};
use std::process::ExitCode;

/// The Linux kernel's memory allocator as a library: its command-line companion.
#[derive(Parser)]
#[command(name = "kmem", version, arg_required_else_help = true)]
struct Cli {
    #[command(subcommand)]
    command: Command,
}

#[derive(Subcommand)]
enum Command {
    /// Replay a recorded kernel trace on a machine of the recorded shape.
    Replay(replay::Args),
}

fn main() -> ExitCode {
    let result = match Cli::parse().command {
        Command::Replay(args) => replay::run(&args),
    };
    match result {
        Ok(()) => ExitCode::SUCCESS,
        Err(e) => {
            eprintln!("kmem: {e:#}");
            ExitCode::FAILURE
        }
    }
}
