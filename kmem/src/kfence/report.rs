//! Reports in the kernel's form.

use super::{
    pool::{Damage, Fault, Pool},
    slot::{NO_CPU, Track},
};
use core::{fmt, panic::Location};

/// Where code is that was found at a mistake.
#[derive(Clone, Copy)]
enum Place {
    /// An instruction's address, as a fault tells it; 0 if it does not.
    Instruction(usize),
    /// A call.
    Call(&'static Location<'static>),
}

impl fmt::Display for Place {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Place::Instruction(0) => f.write_str("unknown code"),
            Place::Instruction(at) => write!(f, "{at:#x}"),
            Place::Call(at) => write!(f, "{at}"),
        }
    }
}

/// What is known of a slot's object.
struct Story<'a>(&'a Pool, usize);

impl Story<'_> {
    fn user(f: &mut fmt::Formatter<'_>, what: &str, track: &Track) -> fmt::Result {
        let Some((site, cpu, when)) = track.get() else { return Ok(()) };
        write!(f, "\n\n{what} ")?;
        match cpu {
            NO_CPU => f.write_str("on no cpu")?,
            cpu => write!(f, "on cpu {cpu}")?,
        }
        write!(f, " at {}.{:06}s:\n {site}", when / 1_000_000_000, when / 1000 % 1_000_000)
    }
}

impl fmt::Display for Story<'_> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Story(pool, i) = *self;
        let slot = &pool.slots()[i];
        let info = slot.info();
        let first = pool.address(i, info);
        let last = first + usize::from(info.size) - 1;
        let (size, cache) = (info.size, slot.name());
        write!(f, "\n\nkfence-#{i}: {first:#x}-{last:#x}, size={size}, cache={cache}")?;
        Self::user(f, "allocated", &slot.allocated)?;
        Self::user(f, "freed", &slot.freed)
    }
}

/// A fault's report.
pub(crate) struct FaultReport<'a> {
    pub(crate) pool: &'a Pool,
    pub(crate) fault: Fault,
    pub(crate) addr: usize,
    pub(crate) is_write: bool,
    /// Address of the instruction; 0 if it is not known.
    pub(crate) ip: usize,
}

impl fmt::Display for FaultReport<'_> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let FaultReport { pool, fault, addr, is_write, ip } = *self;
        let (ip, access) = (Place::Instruction(ip), if is_write { "write" } else { "read" });
        match fault {
            Fault::OutOfBounds(i) => {
                let info = pool.slots()[i].info();
                let begin = pool.address(i, info);
                let (far, side) = match addr < begin {
                    true => (begin - addr, "left"),
                    false => (addr - (begin + usize::from(info.size)) + 1, "right"),
                };
                write!(f, "BUG: KFENCE: out-of-bounds {access} in {ip}")?;
                write!(
                    f,
                    "\n\nOut-of-bounds {access} at {addr:#x} ({far}B {side} of kfence-#{i}):"
                )?;
                write!(f, "\n {ip}{}", Story(pool, i))
            }
            Fault::UseAfterFree(i) => {
                write!(f, "BUG: KFENCE: use-after-free {access} in {ip}")?;
                write!(f, "\n\nUse-after-free {access} at {addr:#x} (in kfence-#{i}):")?;
                write!(f, "\n {ip}{}", Story(pool, i))
            }
            Fault::Invalid | Fault::Stale => {
                write!(f, "BUG: KFENCE: invalid {access} in {ip}")?;
                write!(f, "\n\nInvalid {access} at {addr:#x}:\n {ip}")
            }
        }
    }
}

/// The report of a free that found a mistake.
pub(crate) struct FreeReport<'a> {
    pub(crate) pool: &'a Pool,
    pub(crate) addr: usize,
    /// The slot whose page that is.
    pub(crate) slot: Option<usize>,
    /// The bytes that were written to, if that is what was found.
    pub(crate) damage: Option<Damage>,
    pub(crate) at: &'static Location<'static>,
}

impl fmt::Display for FreeReport<'_> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let at = Place::Call(self.at);
        match &self.damage {
            Some(damage) => {
                let first = self.addr.wrapping_add_signed(damage.offset as isize);
                write!(f, "BUG: KFENCE: memory corruption in {at}")?;
                write!(f, "\n\nCorrupted memory at {first:#x} [")?;
                for (byte, wrong) in &damage.bytes[..damage.nr] {
                    match wrong {
                        true => write!(f, " {byte:#04x}")?,
                        false => f.write_str(" .")?,
                    }
                }
                f.write_str(" ]")?;
            }
            None => {
                write!(f, "BUG: KFENCE: invalid free in {at}")?;
                write!(f, "\n\nInvalid free of {:#x}", self.addr)?;
            }
        }
        match self.slot {
            Some(i) => write!(f, " (in kfence-#{i}):\n {at}{}", Story(self.pool, i)),
            None => write!(f, ":\n {at}"),
        }
    }
}
