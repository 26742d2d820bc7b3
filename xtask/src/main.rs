//! `cargo xtask`: what the project builds and measures besides its crates.
//!
//! This file only dispatches; each subcommand is a module with its arguments and a `run`.

use clap::{Parser, Subcommand};
use std::process::ExitCode;

mod bench;
mod boot;
mod budgets;
mod callgrind;
mod cargo;
mod qemu;

/// kmem's own build and test commands.
#[derive(Parser)]
#[command(name = "cargo xtask", bin_name = "cargo xtask", arg_required_else_help = true)]
struct Cli {
    #[command(subcommand)]
    command: Command,
}

#[derive(Subcommand)]
enum Command {
    Bench(bench::Args),
    Budgets(budgets::Args),
    Boot(boot::Args),
}

fn main() -> ExitCode {
    let result = match Cli::parse().command {
        Command::Bench(args) => bench::run(&args),
        Command::Budgets(args) => budgets::run(&args),
        Command::Boot(args) => boot::run(&args),
    };
    match result {
        Ok(code) => code,
        Err(error) => {
            eprintln!("error: {error:#}");
            ExitCode::FAILURE
        }
    }
}
