//! What all benchmark programs are told.
//!
//! # Locking
//! None.

use crate::report::Report;
use anyhow::Result;
use indicatif::{ProgressBar, ProgressStyle};

/// Arguments of a benchmark program.
#[derive(clap::Args, Debug)]
pub struct Options {
    /// Print JSON.
    #[arg(long)]
    pub json: bool,
    /// Fewer and shorter rounds, and less of what is large.
    #[arg(long)]
    pub quick: bool,
    /// Only workloads whose name contains this.
    #[arg(long, default_value = "", value_name = "TEXT")]
    pub only: String,
}

impl Options {
    /// Prints a report as JSON or as `text` has it.
    ///
    /// # Errors
    /// It cannot be written as JSON.
    pub fn print(&self, report: &Report, text: impl FnOnce(&Report) -> String) -> Result<()> {
        if self.json {
            println!("{}", serde_json::to_string_pretty(report)?);
        } else {
            print!("{}", text(report));
        }
        Ok(())
    }
}

/// What shows that turns are taken.
///
/// # Errors
/// None in practice: the template is a constant.
pub fn spinner() -> Result<ProgressBar> {
    let style = ProgressStyle::with_template("{spinner} {elapsed} {pos} turns  {msg}")?;
    Ok(ProgressBar::new_spinner().with_style(style))
}
