//! Which caches look for which mistakes, as a start-up parameter says it (`slab_debug`).
//!
//! # Concepts
//! ```text
//!   pattern = block { ";" block }        block = [ "-" | letters ] { "," name }
//! ```
//! Letters are F ([`CONSISTENCY_CHECKS`](SlabFlags::CONSISTENCY_CHECKS)), Z ([`RED_ZONE`](SlabFlags::RED_ZONE)),
//! P ([`POISON`](SlabFlags::POISON)) and U ([`STORE_USER`](SlabFlags::STORE_USER)), in either case; none at all
//! are all of them, "-" is nothing. A name may end in `*`, which stands for anything. The first block that names
//! a cache decides; of blocks that name none the last one, for all caches that nobody names.
//!
//! # Locking
//! None: text.

use super::super::SlabFlags;

/// Longest name that a cache may have.
const LONGEST: usize = 31;

/// Looks through a pattern; where it is wrong in bytes from its beginning, and what is wrong there.
pub(crate) fn check(pattern: &str) -> Result<(), (usize, &'static str)> {
    let mut at = 0;
    for block in pattern.split(';') {
        let mut words = block.split(',');
        let letters = words.next().unwrap_or_default();
        if let Some(i) = letters.chars().position(|c| letter(c).is_none() && letters != "-") {
            let wrong = if letters.starts_with('-') {
                "'-' stands alone"
            } else {
                "not one of the letters F, Z, P and U"
            };
            // Characters before it are letters, of a byte each.
            return Err((at + i, wrong));
        }
        let mut start = at + letters.len();
        for name in words {
            start += 1;
            check_name(name).map_err(|(i, wrong)| (start + i, wrong))?;
            start += name.len();
        }
        at += block.len() + 1;
    }
    Ok(())
}

fn check_name(name: &str) -> Result<(), (usize, &'static str)> {
    let plain = name.strip_suffix('*').unwrap_or(name);
    if name.is_empty() {
        return Err((0, "a name is missing"));
    }
    if let Some(i) = plain.find('*') {
        return Err((i, "'*' stands at the end of a name"));
    }
    if let Some(i) = plain.find(|c: char| c.is_whitespace() || c.is_control()) {
        return Err((i, "no cache has such a name"));
    }
    if plain.len() > LONGEST { Err((LONGEST, "no cache has so long a name")) } else { Ok(()) }
}

fn letter(c: char) -> Option<SlabFlags> {
    Some(match c.to_ascii_uppercase() {
        'F' => SlabFlags::CONSISTENCY_CHECKS,
        'Z' => SlabFlags::RED_ZONE,
        'P' => SlabFlags::POISON,
        'U' => SlabFlags::STORE_USER,
        _ => return None,
    })
}

/// What a pattern wants of a cache.
pub(in super::super) fn flags_for(pattern: &str, cache: &str) -> SlabFlags {
    let mut others = SlabFlags::empty();
    for block in pattern.split(';') {
        let mut words = block.split(',');
        let flags = match words.next().unwrap_or_default() {
            "" => SlabFlags::DEBUG,
            letters => letters.chars().filter_map(letter).collect(),
        };
        let mut names = words.peekable();
        if names.peek().is_none() {
            others = flags;
        }
        let named = |name: &str| match name.strip_suffix('*') {
            Some(beginning) => cache.starts_with(beginning),
            None => cache == name,
        };
        if names.any(named) {
            return flags;
        }
    }
    others
}

#[cfg(test)]
mod tests {
    use super::*;

    const F: SlabFlags = SlabFlags::CONSISTENCY_CHECKS;
    const Z: SlabFlags = SlabFlags::RED_ZONE;
    const P: SlabFlags = SlabFlags::POISON;

    #[test]
    fn the_first_block_that_names_a_cache_decides() {
        let pattern = "zP,dentry*;F,kmalloc-*,inode;-,dentry-x;P";
        assert_eq!(check(pattern), Ok(()));
        for (cache, flags) in [
            ("dentry", Z | P),
            ("dentry-x", Z | P),
            ("kmalloc-64", F),
            ("kmalloc", P),
            ("inode", F),
            ("inodes", P),
        ] {
            assert_eq!(flags_for(pattern, cache), flags, "{cache}");
        }
        assert_eq!(flags_for("", "any"), SlabFlags::DEBUG);
        assert_eq!(flags_for("-", "any"), SlabFlags::empty());
        assert_eq!(flags_for(",one;Z;F", "one"), SlabFlags::DEBUG);
        assert_eq!(flags_for(",one;Z;F", "two"), F);
    }

    #[test]
    fn what_is_wrong_is_found_where_it_is() {
        for (pattern, at) in [
            ("PX", 1),
            ("P;ZQ,a", 3),
            ("P-", 1),
            ("-P", 0),
            ("é", 0),
            ("P,", 2),
            ("P,a,,b", 4),
            ("P,a*b", 3),
            ("F,ok;P,two words", 10),
            ("P,a-name-of-thirty-two-characters-", 33),
        ] {
            assert_eq!(check(pattern).map_err(|(i, _)| i), Err(at), "{pattern}");
        }
    }
}
