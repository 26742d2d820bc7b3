//! `kmem-recode IN OUT`: reads a recording of any form and writes it in this project's own, checking the result.
//!
//! The written file is read back and compared with what was read, so that a recording is only replaced by something
//! that says exactly the same.

use std::path::PathBuf;
use std::process::ExitCode;

use clap::Parser;
use kmem_trace::Recording;

/// Re-encode a recording of kernel memory events as a .kmr file.
#[derive(Parser)]
#[command(version)]
struct Arguments {
    /// The recording: .kmt.zst (with .json and folder beside it), .kmr, or perf script / ftrace text
    input: PathBuf,
    /// The .kmr file to write
    output: PathBuf,
    /// Call it this instead of the name of the input
    #[arg(long)]
    name: Option<String>,
}

fn main() -> ExitCode {
    match recode(Arguments::parse()) {
        Ok(report) => {
            println!("{report}");
            ExitCode::SUCCESS
        }
        Err(error) => {
            eprintln!("kmem-recode: {error}");
            ExitCode::FAILURE
        }
    }
}

fn recode(arguments: Arguments) -> Result<String, Box<dyn std::error::Error>> {
    let mut recording = Recording::open(&arguments.input)?;
    if let Some(name) = arguments.name {
        recording.meta.name = name;
    }
    recording.write(&arguments.output)?;
    if Recording::open(&arguments.output)? != recording {
        return Err(format!("{} reads back differently", arguments.output.display()).into());
    }
    let bytes = std::fs::metadata(&arguments.output)?.len();
    let (rows, ids) = (recording.rows.len(), recording.ids());
    Ok(format!("{}: {rows} rows, {ids} ids, {bytes} bytes", arguments.output.display()))
}
