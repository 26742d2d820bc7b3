//! The programs of `kmem_bench::program` with glibc's malloc as their global allocator.

#[global_allocator]
static HEAP: std::alloc::System = std::alloc::System;

fn main() -> anyhow::Result<()> {
    kmem_bench::program::main()
}
