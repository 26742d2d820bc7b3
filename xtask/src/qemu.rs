//! Running an image in QEMU: command line, serial output line by line, time limit, exit status.

use anyhow::{Context, Result, bail};
use serde::Serialize;
use std::{
    ffi::OsString,
    io::{self, BufRead, BufReader, Read},
    path::Path,
    process::{Command, Stdio},
    sync::mpsc,
    thread,
    time::{Duration, Instant},
};
use wait_timeout::ChildExt;

/// The statuses the image ends with, as isa-debug-exit turns them into QEMU's.
const PASS: i32 = 33;
const FAIL: i32 = 35;
const CRASH: i32 = 37;

/// How a run ended.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Serialize)]
#[serde(rename_all = "kebab-case")]
pub enum Outcome {
    /// The image says that everything passed.
    Pass,
    /// The image says that something failed.
    Fail,
    /// The image panicked or took an exception.
    Crash,
    /// The machine reset itself: a triple fault.
    Reset,
    /// The time limit passed.
    Timeout,
    /// QEMU itself gave up; its message is on standard error.
    Qemu,
}

impl Outcome {
    /// A sentence for people.
    pub fn describe(self) -> &'static str {
        match self {
            Outcome::Pass => "passed",
            Outcome::Fail => "a test failed",
            Outcome::Crash => "the image panicked or took an exception",
            Outcome::Reset => "the machine reset itself (triple fault)",
            Outcome::Timeout => "the time limit passed",
            Outcome::Qemu => "QEMU gave up",
        }
    }

    fn from_code(code: Option<i32>) -> Outcome {
        match code {
            Some(PASS) => Outcome::Pass,
            Some(FAIL) => Outcome::Fail,
            Some(CRASH) => Outcome::Crash,
            Some(0) => Outcome::Reset,
            _ => Outcome::Qemu,
        }
    }
}

/// A machine to run an image on.
pub struct Machine<'a> {
    /// The ELF file.
    pub image: &'a Path,
    /// Bytes of memory.
    pub memory: u64,
    /// Bytes of it below 4 GiB; the rest starts there.
    pub below_4g: u64,
    /// CPUs.
    pub cpus: u32,
    /// What the image finds on its command line.
    pub append: &'a str,
    /// Translate one guest instruction at a time, so that interrupts can land after any of them.
    pub single_step: bool,
    /// When to stop waiting.
    pub timeout: Duration,
}

/// What a run left.
pub struct Run {
    /// How it ended.
    pub outcome: Outcome,
    /// How long it took.
    pub elapsed: Duration,
    /// What the image said.
    pub output: String,
}

impl Machine<'_> {
    fn arguments(&self) -> Vec<OsString> {
        let mut args: Vec<OsString> = [
            "-accel",
            "tcg",
            "-nodefaults",
            "-no-user-config",
            "-display",
            "none",
            "-serial",
            "stdio",
            "-no-reboot",
            "-device",
            "isa-debug-exit,iobase=0xf4,iosize=4",
            "-cpu",
            "qemu64",
        ]
        .map(OsString::from)
        .into();
        if self.single_step {
            args.push("-singlestep".into());
        }
        args.extend(["-machine".into(), format!("pc,max-ram-below-4g={}", self.below_4g).into()]);
        args.extend(["-m".into(), format!("{}B", self.memory).into()]);
        args.extend(["-smp".into(), self.cpus.to_string().into()]);
        args.extend(["-append".into(), self.append.into()]);
        args.extend(["-kernel".into(), self.image.into()]);
        args
    }

    /// Boots the image and hands every line it prints to `line` as it arrives.
    pub fn run(&self, mut line: impl FnMut(&str)) -> Result<Run> {
        const QEMU: &str = "qemu-system-x86_64";
        let start = Instant::now();
        let spawned = Command::new(QEMU)
            .args(self.arguments())
            .stdin(Stdio::null())
            .stdout(Stdio::piped())
            .stderr(Stdio::piped())
            .spawn();
        let mut child = match spawned {
            Err(error) if error.kind() == io::ErrorKind::NotFound => bail!(
                "{QEMU} is not installed; on Debian: \
                 apt-get install --no-install-recommends qemu-system-x86"
            ),
            other => other.with_context(|| format!("cannot run {QEMU}"))?,
        };
        let serial = child.stdout.take().context("no pipe from QEMU")?;
        let complaints = child.stderr.take().context("no pipe from QEMU")?;
        let (sender, lines) = mpsc::channel();
        let reader = thread::spawn(move || read_lines(serial, &sender));
        let complainer = thread::spawn(move || pass_on(complaints));

        let mut output = String::new();
        let mut timed_out = false;
        loop {
            let left = self.timeout.saturating_sub(start.elapsed());
            match lines.recv_timeout(left) {
                Ok(text) => {
                    line(&text);
                    output.push_str(&text);
                    output.push('\n');
                }
                Err(mpsc::RecvTimeoutError::Disconnected) => break,
                Err(mpsc::RecvTimeoutError::Timeout) => {
                    timed_out = true;
                    break;
                }
            }
        }
        // QEMU closes the pipe as it exits, so a short wait is enough.
        let status = if timed_out { None } else { child.wait_timeout(Duration::from_secs(5))? };
        let outcome = match status {
            Some(status) => Outcome::from_code(status.code()),
            None => {
                child.kill().context("cannot stop QEMU")?;
                child.wait()?;
                Outcome::Timeout
            }
        };
        if reader.join().is_err() || complainer.join().is_err() {
            bail!("a thread that reads from QEMU panicked");
        }
        Ok(Run { outcome, elapsed: start.elapsed(), output })
    }
}

/// Sends each line without its end; what is not UTF-8 is shown as replacement characters.
fn read_lines(serial: impl Read, lines: &mpsc::Sender<String>) {
    let mut serial = BufReader::new(serial);
    let mut bytes = Vec::new();
    while serial.read_until(b'\n', &mut bytes).is_ok_and(|n| n > 0) {
        let text = String::from_utf8_lossy(&bytes);
        if lines.send(text.trim_end_matches(['\n', '\r']).to_owned()).is_err() {
            return;
        }
        bytes.clear();
    }
}

/// Passes QEMU's own messages on, save the warning that a split of memory at anything but a GiB may
/// be slow: the split is what puts a small machine's memory into several zones.
fn pass_on(complaints: impl Read) {
    for line in BufReader::new(complaints).lines().map_while(Result::ok) {
        if !line.contains("not a multiple of 1G; possible bad performance") {
            eprintln!("{line}");
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn exit_codes_are_told_apart() {
        assert_eq!(Outcome::from_code(Some(33)), Outcome::Pass);
        assert_eq!(Outcome::from_code(Some(35)), Outcome::Fail);
        assert_eq!(Outcome::from_code(Some(37)), Outcome::Crash);
        assert_eq!(Outcome::from_code(Some(0)), Outcome::Reset);
        assert_eq!(Outcome::from_code(Some(1)), Outcome::Qemu);
        assert_eq!(Outcome::from_code(None), Outcome::Qemu);
    }

    #[test]
    fn lines_survive_odd_endings_and_bytes() {
        let (sender, lines) = mpsc::channel();
        read_lines(&b"one\r\n\ntw\xffo\nlast"[..], &sender);
        drop(sender);
        let got: Vec<String> = lines.iter().collect();
        assert_eq!(got, ["one", "", "tw\u{fffd}o", "last"]);
    }
}
