//! The Rust layer \[O1–O3\]: vectors beside std's, allocators without a size, collections that others wrote.

mod collections;
mod faults;
mod homes;
mod model;
mod vectors;
