//! Each GFP flag changes what a request does, and here is how \[G2, G4, P4\].

mod effects;
mod reclaim;
mod reports;
mod reserves;
mod retries;
