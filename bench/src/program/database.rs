//! redb in memory: the phases of its own benchmark, scaled down.
//!
//! # Concepts
//! Pairs of 24 and 150 bytes, as there: one large load, small transactions, reads and ranges on many threads
//! beside a writer, removal of half. Readers look at one snapshot, so what they find does not depend on the writer.
//!
//! # Locking
//! The engine's own.

use super::{NOTHING, digest};
use anyhow::{Result, anyhow};
use redb::{
    Database, ReadTransaction, ReadableDatabase, ReadableTable, ReadableTableMetadata,
    TableDefinition, backends::InMemoryBackend,
};
use std::thread;

const TABLE: TableDefinition<&[u8], &[u8]> = TableDefinition::new("pairs");

/// Pairs loaded at once, per unit of scale.
const LOADED: u64 = 20_000;
/// Transactions, and pairs in each.
const TRANSACTIONS: u64 = 60;
const IN_TRANSACTION: u64 = 40;
/// Reads of each thread.
const READS: u64 = 10_000;
/// Every so many reads are ranges, of so many pairs.
const RANGE_EVERY: u64 = 10;
const RANGE: usize = 50;
/// Bytes the engine keeps of what it read.
const CACHE: usize = 32 << 20;

fn pair(n: u64) -> ([u8; 24], [u8; 150]) {
    let mut random = fastrand::Rng::with_seed(n);
    let (mut key, mut value) = ([0; 24], [0; 150]);
    random.fill(&mut key);
    random.fill(&mut value);
    (key, value)
}

fn insert(db: &Database, numbers: impl Iterator<Item = u64>) -> Result<()> {
    let transaction = db.begin_write()?;
    {
        let mut table = transaction.open_table(TABLE)?;
        for n in numbers {
            let (key, value) = pair(n);
            table.insert(key.as_slice(), value.as_slice())?;
        }
    }
    transaction.commit()?;
    Ok(())
}

fn read(snapshot: &ReadTransaction, seed: u64, loaded: u64) -> Result<u64> {
    let table = snapshot.open_table(TABLE)?;
    let mut random = fastrand::Rng::with_seed(seed);
    let mut result = NOTHING;
    for n in 0..READS {
        let (key, expected) = pair(random.u64(..loaded));
        if n.is_multiple_of(RANGE_EVERY) {
            for entry in table.range(key.as_slice()..)?.take(RANGE) {
                let (key, value) = entry?;
                result = digest(digest(result, key.value()), value.value());
            }
        } else {
            let value = table.get(key.as_slice())?.ok_or_else(|| anyhow!("a pair is missing"))?;
            if value.value() != expected {
                return Err(anyhow!("a pair has another value"));
            }
            result = digest(result, &expected[..8]);
        }
    }
    Ok(result)
}

/// Runs the phases and returns the digest of what was read and of what is left.
pub(super) fn run(threads: usize, scale: u64) -> Result<u64> {
    let db =
        Database::builder().set_cache_size(CACHE).create_with_backend(InMemoryBackend::new())?;
    let loaded = LOADED * scale;
    insert(&db, 0..loaded)?;
    let mut result = NOTHING;
    for round in 0..scale {
        // Before the writer begins.
        let snapshots =
            (0..threads).map(|_| Ok(db.begin_read()?)).collect::<Result<Vec<ReadTransaction>>>()?;
        let results: Vec<Result<u64>> = thread::scope(|scope| {
            let readers: Vec<_> = (0..)
                .zip(snapshots)
                .map(|(t, snapshot)| scope.spawn(move || read(&snapshot, round << 32 | t, loaded)))
                .collect();
            let first = loaded + round * TRANSACTIONS * IN_TRANSACTION;
            let written: Result<()> = (0..TRANSACTIONS).try_for_each(|t| {
                let first = first + t * IN_TRANSACTION;
                insert(&db, first..first + IN_TRANSACTION)
            });
            let mut all: Vec<_> = readers
                .into_iter()
                .map(|r| r.join().unwrap_or_else(|_| Err(anyhow!("a reader panicked"))))
                .collect();
            all.push(written.map(|()| 0));
            all
        });
        for one in results {
            result = digest(result, &one?.to_le_bytes());
        }
        let transaction = db.begin_write()?;
        {
            let mut table = transaction.open_table(TABLE)?;
            let first = loaded + round * TRANSACTIONS * IN_TRANSACTION;
            for n in (first..first + TRANSACTIONS * IN_TRANSACTION).step_by(2) {
                table.remove(pair(n).0.as_slice())?;
            }
        }
        transaction.commit()?;
    }
    let transaction = db.begin_read()?;
    let table = transaction.open_table(TABLE)?;
    for entry in table.iter()? {
        let (key, value) = entry?;
        result = digest(digest(result, key.value()), value.value());
    }
    Ok(digest(result, &table.len()?.to_le_bytes()))
}
