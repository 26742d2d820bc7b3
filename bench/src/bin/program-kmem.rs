//! The programs of `kmem_bench::program` with kmem as their global allocator.

#[global_allocator]
static HEAP: kmem_hosted::KmemGlobal = kmem_hosted::KmemGlobal::new();

fn main() -> anyhow::Result<()> {
    kmem_bench::program::main()
}
