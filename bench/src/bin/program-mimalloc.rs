//! The programs of `kmem_bench::program` with mimalloc as their global allocator.

#[global_allocator]
static HEAP: mimalloc::MiMalloc = mimalloc::MiMalloc;

fn main() -> anyhow::Result<()> {
    kmem_bench::program::main()
}
