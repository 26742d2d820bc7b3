//! What the textbook's temporary mappings are for.

macro_rules! purposes {
    ($(#[$meta:meta])* $type:ident { $($name:ident,)* }) => {
        $(#[$meta])*
        pub enum $type {
            $($name,)*
        }

        impl $type {
            /// All of them, by number.
            pub const ALL: [$type; $type::COUNT] = [$($type::$name,)*];

            /// How many there are (`KM_TYPE_NR`).
            pub const COUNT: usize = [$(stringify!($name),)*].len();

            /// The kernel's name.
            pub const fn name(self) -> &'static str {
                match self {
                    $($type::$name => stringify!($name),)*
                }
            }
        }
    };
}

purposes! {
    /// A purpose of a temporary mapping (`enum km_type`): each has a place of its own on each CPU \[H2\].
    ///
    /// Linux did away with them in 2.6.37; whoever names none takes the next place of a stack.
    #[derive(Clone, Copy, PartialEq, Eq, Debug, Hash)]
    #[repr(u8)]
    #[expect(missing_docs, reason = "the kernel's names tell")]
    #[expect(non_camel_case_types, reason = "the kernel's names")]
    KmType {
        KM_BOUNCE_READ,
        KM_SKB_SUNRPC_DATA,
        KM_SKB_DATA_SOFTIRQ,
        KM_USER0,
        KM_USER1,
        KM_BIO_SRC_IRQ,
        KM_BIO_DST_IRQ,
        KM_PTE0,
        KM_PTE1,
        KM_PTE2,
        KM_IRQ0,
        KM_IRQ1,
        KM_SOFTIRQ0,
        KM_SOFTIRQ1,
        KM_SYNC_ICACHE,
        KM_SYNC_DCACHE,
        KM_UML_USERCOPY,
        KM_IRQ_PTE,
        KM_NMI,
        KM_NMI_PTE,
    }
}
