//! Taking one line of a text recording apart.

use std::str::FromStr;

/// What a line is.
pub(super) enum Text<'a> {
    /// Nothing to record: a comment, a blank line, a part of a call stack.
    Nothing,
    /// The recorder says that events were lost here; 1 if it does not say how many.
    Lost(u64),
    /// An event.
    Event(Event<'a>),
}

/// One event's line.
pub(super) struct Event<'a> {
    pub cpu: u16,
    pub time_ns: u64,
    /// Without the subsystem perf puts before it.
    pub name: &'a str,
    fields: &'a str,
}

impl<'a> Event<'a> {
    /// The text of field `name`.
    pub(super) fn field(&self, name: &str) -> Result<&'a str, String> {
        let mut words = self.fields.split_whitespace();
        let value = words.find_map(|word| word.strip_prefix(name)?.strip_prefix('='));
        // Older kernels pad a NULL: `ptr=          (null)`.
        value
            .map(|value| if value.is_empty() { words.next().unwrap_or("") } else { value })
            .filter(|value| !value.is_empty())
            .ok_or_else(|| format!("the {} event has no {name}", self.name))
    }

    /// The number in field `name`: hexadecimal with `0x`, decimal without.
    pub(super) fn number<T: FromStr + TryFrom<u64>>(&self, name: &str) -> Result<T, String> {
        let text = self.field(name)?;
        let number = match text.strip_prefix("0x") {
            Some(hex) => u64::from_str_radix(hex, 16).ok(),
            None if text == "-1" => Some(u64::MAX),
            None => text.parse().ok(),
        };
        let number = number.and_then(|number| T::try_from(number).ok());
        number.ok_or_else(|| format!("{name}={text} is not a number in range"))
    }

    /// The pointer in field `name`, which is hexadecimal with or without `0x`; `None` if it is NULL.
    pub(super) fn pointer(&self, name: &str) -> Result<Option<u64>, String> {
        let text = self.field(name)?;
        if is_null(text) {
            return Ok(None);
        }
        let pointer = u64::from_str_radix(text.strip_prefix("0x").unwrap_or(text), 16);
        pointer.map(Some).map_err(|_| format!("{name}={text} is not a pointer"))
    }
}

/// Whether a pointer is printed as NULL.
pub(super) fn is_null(text: &str) -> bool {
    matches!(text, "(nil)" | "(null)")
        || text.strip_prefix("0x").unwrap_or(text).bytes().all(|byte| byte == b'0')
}

/// Takes a line apart.
///
/// # Errors
/// It is none of the known kinds; the text says so.
pub(super) fn split(line: &str) -> Result<Text<'_>, String> {
    let text = line.trim();
    if text.is_empty() || text.starts_with('#') || is_banner(text) {
        return Ok(Text::Nothing);
    }
    if let Some(events) = lost(text) {
        return Ok(Text::Lost(events));
    }
    if let Some(event) = event(line) {
        return Ok(Text::Event(event));
    }
    if line.starts_with([' ', '\t']) && is_stack(text) {
        return Ok(Text::Nothing);
    }
    Err("this is no event with a CPU in brackets, a time and a name (perf needs -a to record CPUs)"
        .to_owned())
}

/// What trace-cmd prints before the first event.
fn is_banner(text: &str) -> bool {
    text.strip_prefix("cpus=").is_some_and(|cpus| cpus.parse::<u32>().is_ok())
        || text.strip_prefix("version = ").is_some_and(|version| version.parse::<u32>().is_ok())
        || text.strip_prefix("CPU ").and_then(|rest| rest.strip_suffix(" is empty")).is_some()
}

/// `CPU:1 [LOST 35 EVENTS]`, `CPU:1 [35 EVENTS DROPPED]`, `... PERF_RECORD_LOST lost 35`: how many events were lost.
fn lost(text: &str) -> Option<u64> {
    let in_ring = text.starts_with("CPU:") && (text.contains("LOST") || text.contains("DROPPED"));
    if !in_ring && !text.contains("PERF_RECORD_LOST") {
        return None;
    }
    let words = text.split(|letter: char| letter.is_whitespace() || "[]:".contains(letter));
    let after_cpu =
        words.skip_while(|word| !(matches!(*word, "LOST" | "lost") || in_ring && word.is_empty()));
    Some(after_cpu.filter_map(|word| word.parse().ok()).next().unwrap_or(1))
}

/// One line of a call stack: perf writes an address, a symbol and `(object)`, ftrace ` => symbol`.
fn is_stack(text: &str) -> bool {
    let address = text.split_whitespace().next().unwrap_or("");
    text.starts_with("=> ")
        || text.ends_with(')')
            && address.len() < text.len()
            && address.bytes().all(|byte| byte.is_ascii_hexdigit())
}

/// Finds the CPU in brackets. A task's name may hold brackets too; the right ones are followed by a time and a name.
fn event(line: &str) -> Option<Event<'_>> {
    line.match_indices('[').find_map(|(open, _)| {
        let (cpu, rest) = line[open + 1..].split_once(']')?;
        let cpu: u16 = cpu.parse().ok()?;
        let (mut word, mut rest) = next_word(rest)?;
        let time_ns = match time(word) {
            Some(time_ns) => time_ns,
            None => {
                // ftrace's column of flags: interrupts off, preemption depth...
                (word, rest) = next_word(rest)?;
                time(word)?
            }
        };
        let (name, fields) = next_word(rest)?;
        let name = name.strip_suffix(':')?;
        let name = name.rsplit_once(':').map_or(name, |(_, name)| name);
        let plain = |byte: u8| byte.is_ascii_alphanumeric() || byte == b'_';
        (!name.is_empty() && name.bytes().all(plain)).then_some(Event {
            cpu,
            time_ns,
            name,
            fields,
        })
    })
}

fn next_word(text: &str) -> Option<(&str, &str)> {
    let text = text.trim_start();
    let end = text.find(char::is_whitespace).unwrap_or(text.len());
    (end > 0).then(|| text.split_at(end))
}

/// `5678.123456:`, in seconds with any number of decimals, to nanoseconds.
fn time(word: &str) -> Option<u64> {
    let (seconds, decimals) = word.strip_suffix(':')?.split_once('.')?;
    let digits = |text: &str| !text.is_empty() && text.bytes().all(|byte| byte.is_ascii_digit());
    if !digits(seconds) || !digits(decimals) {
        return None;
    }
    let nanos = decimals
        .bytes()
        .chain(std::iter::repeat(b'0'))
        .take(9)
        .fold(0, |sum, byte| sum * 10 + u64::from(byte - b'0'));
    seconds.parse::<u64>().ok()?.checked_mul(1_000_000_000)?.checked_add(nanos)
}
