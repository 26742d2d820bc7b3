//! syn on this project's sources: text to syntax trees, trees to text.
//!
//! # Locking
//! None.

use super::{NOTHING, digest};
use anyhow::{Context, Result, anyhow};
use quote::ToTokens;
use std::{fs, path::Path, thread};

/// Times that each thread parses everything, per unit of scale.
const ROUNDS: u64 = 1;

/// The sources of the crate `kmem`, in the order of their names.
pub(super) fn sources() -> Result<Vec<String>> {
    fn collect(dir: &Path, all: &mut Vec<String>) -> Result<()> {
        let read = || format!("cannot read {}", dir.display());
        let mut paths: Vec<_> = fs::read_dir(dir)
            .with_context(read)?
            .map(|entry| Ok(entry.with_context(read)?.path()))
            .collect::<Result<_>>()?;
        paths.sort();
        for path in paths {
            if path.is_dir() {
                collect(&path, all)?;
            } else if path.extension().is_some_and(|e| e == "rs") {
                all.push(fs::read_to_string(&path).with_context(read)?);
            }
        }
        Ok(())
    }
    let mut all = Vec::new();
    collect(&Path::new(env!("CARGO_MANIFEST_DIR")).join("../kmem/src"), &mut all)?;
    Ok(all)
}

/// Parses the sources, holding all trees, and returns the digest of what they are printed as.
pub(super) fn parse(sources: &[String]) -> Result<u64> {
    let mut trees = Vec::new();
    for source in sources {
        trees.push(syn::parse_file(source).context("a source does not parse")?);
    }
    // A second set, of which every other goes before the rest is printed.
    let mut copies: Vec<_> = trees.iter().cloned().map(Some).collect();
    copies.iter_mut().step_by(2).for_each(|copy| *copy = None);
    let mut result = NOTHING;
    for tree in trees.iter().chain(copies.iter().flatten()) {
        result = digest(result, tree.to_token_stream().to_string().as_bytes());
    }
    Ok(result)
}

/// Parses on every thread, some times, and returns the digest of all results.
pub(super) fn run(threads: usize, scale: u64) -> Result<u64> {
    let sources = sources()?;
    let results: Vec<Result<u64>> = thread::scope(|scope| {
        let work = || (0..ROUNDS * scale).map(|_| parse(&sources)).collect::<Result<Vec<u64>>>();
        let all: Vec<_> = (0..threads).map(|_| scope.spawn(work)).collect();
        all.into_iter()
            .map(|t| {
                let results = t.join().map_err(|_| anyhow!("a thread panicked"))??;
                Ok(results.iter().fold(NOTHING, |all, one| digest(all, &one.to_le_bytes())))
            })
            .collect()
    });
    results.into_iter().try_fold(NOTHING, |all, one| Ok(digest(all, &one?.to_le_bytes())))
}
