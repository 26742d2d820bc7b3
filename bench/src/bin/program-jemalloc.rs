//! The programs of `kmem_bench::program` with jemalloc as their global allocator.

#[global_allocator]
static HEAP: tikv_jemallocator::Jemalloc = tikv_jemallocator::Jemalloc;

fn main() -> anyhow::Result<()> {
    kmem_bench::program::main()
}
