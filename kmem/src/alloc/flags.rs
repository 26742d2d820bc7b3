//! Allocation flags as Rust for Linux spells them.
//!
//! [`Flags`](super::Flags) is [`Gfp`](crate::Gfp), and these are its usual values; the others are in
//! [`gfp::classic`](crate::gfp::classic). They combine with `|`.

pub use crate::gfp::classic::{
    __GFP_COLD, __GFP_HIGH, __GFP_HIGHMEM, __GFP_NOFAIL, __GFP_NOMEMALLOC, __GFP_NORETRY,
    __GFP_NOWARN, __GFP_RETRY_MAYFAIL, __GFP_THISNODE, __GFP_ZERO, GFP_ATOMIC, GFP_DMA, GFP_DMA32,
    GFP_KERNEL, GFP_KERNEL_ACCOUNT, GFP_NOFS, GFP_NOIO, GFP_NOWAIT,
};
