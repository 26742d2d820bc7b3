//! Allocation flags as texts print them.
//!
//! Trace points print a gfp mask as the names of its bits, composed ones first: `GFP_KERNEL|__GFP_ZERO`. Rows keep
//! the mask itself, in the bit values of Linux 6.12. Bits above `__GFP_ZEROTAGS` move with the kernel's configuration
//! and are printed as a number, which is taken as it is. Kernels of old left out the underscores (`GFP_ZERO`).

const DMA: u32 = 1 << 0;
const HIGHMEM: u32 = 1 << 1;
const DMA32: u32 = 1 << 2;
const MOVABLE: u32 = 1 << 3;
const RECLAIMABLE: u32 = 1 << 4;
const HIGH: u32 = 1 << 5;
const IO: u32 = 1 << 6;
const FS: u32 = 1 << 7;
const ZERO: u32 = 1 << 8;
const DIRECT_RECLAIM: u32 = 1 << 10;
const KSWAPD_RECLAIM: u32 = 1 << 11;
const WRITE: u32 = 1 << 12;
const NOWARN: u32 = 1 << 13;
const RETRY_MAYFAIL: u32 = 1 << 14;
const NOFAIL: u32 = 1 << 15;
const NORETRY: u32 = 1 << 16;
const MEMALLOC: u32 = 1 << 17;
const COMP: u32 = 1 << 18;
const NOMEMALLOC: u32 = 1 << 19;
const HARDWALL: u32 = 1 << 20;
const THISNODE: u32 = 1 << 21;
const ACCOUNT: u32 = 1 << 22;
const ZEROTAGS: u32 = 1 << 23;

const RECLAIM: u32 = DIRECT_RECLAIM | KSWAPD_RECLAIM;
const KERNEL: u32 = RECLAIM | IO | FS;
const USER: u32 = KERNEL | HARDWALL;
const HIGHUSER: u32 = USER | HIGHMEM;
const HIGHUSER_MOVABLE: u32 = HIGHUSER | MOVABLE;
const TRANSHUGE_LIGHT: u32 = (HIGHUSER_MOVABLE | COMP | NOMEMALLOC | NOWARN) & !RECLAIM;

/// Every name and its bits.
const NAMES: [(&str, u32); 40] = [
    ("GFP_TRANSHUGE", TRANSHUGE_LIGHT | DIRECT_RECLAIM),
    ("GFP_TRANSHUGE_LIGHT", TRANSHUGE_LIGHT),
    ("GFP_HIGHUSER_MOVABLE", HIGHUSER_MOVABLE),
    ("GFP_HIGHUSER", HIGHUSER),
    ("GFP_USER", USER),
    ("GFP_KERNEL_ACCOUNT", KERNEL | ACCOUNT),
    ("GFP_KERNEL", KERNEL),
    ("GFP_NOFS", RECLAIM | IO),
    ("GFP_ATOMIC", HIGH | KSWAPD_RECLAIM),
    ("GFP_NOIO", RECLAIM),
    ("GFP_NOWAIT", KSWAPD_RECLAIM | NOWARN),
    ("GFP_DMA", DMA),
    ("GFP_DMA32", DMA32),
    ("__GFP_DMA", DMA),
    ("__GFP_HIGHMEM", HIGHMEM),
    ("__GFP_DMA32", DMA32),
    ("__GFP_MOVABLE", MOVABLE),
    ("__GFP_RECLAIMABLE", RECLAIMABLE),
    ("__GFP_HIGH", HIGH),
    ("__GFP_IO", IO),
    ("__GFP_FS", FS),
    ("__GFP_ZERO", ZERO),
    ("__GFP_DIRECT_RECLAIM", DIRECT_RECLAIM),
    ("__GFP_KSWAPD_RECLAIM", KSWAPD_RECLAIM),
    ("__GFP_RECLAIM", RECLAIM),
    ("__GFP_WRITE", WRITE),
    ("__GFP_NOWARN", NOWARN),
    ("__GFP_RETRY_MAYFAIL", RETRY_MAYFAIL),
    ("__GFP_NOFAIL", NOFAIL),
    ("__GFP_NORETRY", NORETRY),
    ("__GFP_MEMALLOC", MEMALLOC),
    ("__GFP_COMP", COMP),
    ("__GFP_NOMEMALLOC", NOMEMALLOC),
    ("__GFP_HARDWALL", HARDWALL),
    ("__GFP_THISNODE", THISNODE),
    ("__GFP_ACCOUNT", ACCOUNT),
    ("__GFP_ZEROTAGS", ZEROTAGS),
    ("__GFP_SKIP_ZERO", 0),
    ("__GFP_SKIP_KASAN", 0),
    ("none", 0),
];

/// The mask a text stands for: names and numbers (decimal, or hexadecimal with `0x`) joined by `|`. `None` if a part
/// is neither. The names of bits a kernel without KASAN does not have, `__GFP_SKIP_ZERO` and `__GFP_SKIP_KASAN`,
/// count as no bits.
pub fn parse(text: &str) -> Option<u32> {
    let mut mask = 0;
    for part in text.split('|') {
        let named = NAMES
            .iter()
            .find(|(name, _)| *name == part || name.strip_prefix("__") == Some(part))
            .map(|(_, bits)| *bits);
        let bits = named.or_else(|| match part.strip_prefix("0x") {
            Some(hex) => u32::from_str_radix(hex, 16).ok(),
            None => part.parse().ok(),
        });
        mask |= bits?;
    }
    Some(mask)
}
