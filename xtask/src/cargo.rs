//! Running cargo on the project's crates.

use anyhow::{Context, Result, anyhow, bail};
use std::{
    env,
    ffi::OsString,
    path::{Path, PathBuf},
    process::{Command, Stdio},
};

/// The project's root directory.
pub fn root() -> &'static Path {
    Path::new(env!("CARGO_MANIFEST_DIR")).parent().unwrap_or(Path::new("."))
}

/// Where build output goes: `CARGO_TARGET_DIR`, or `target` in the root.
pub fn target_dir() -> PathBuf {
    match env::var_os("CARGO_TARGET_DIR") {
        Some(dir) => root().join(dir),
        None => root().join("target"),
    }
}

const TARGET: &str = "x86_64-unknown-linux-gnu";

/// Runs cargo on `kmem-boot`, in its directory so that its `.cargo/config.toml` applies. Cargo's
/// messages go to standard error.
fn cargo_image(before: &[&str], after: &[&str]) -> Result<()> {
    let cargo = env::var_os("CARGO").unwrap_or_else(|| OsString::from("cargo"));
    let status = Command::new(&cargo)
        .current_dir(root().join("kmem-boot"))
        .args(before)
        .args(after)
        // These would replace the image's own flags.
        .env_remove("RUSTFLAGS")
        .env_remove("CARGO_ENCODED_RUSTFLAGS")
        .stdin(Stdio::null())
        .status()
        .with_context(|| format!("cannot run {}", cargo.display()))?;
    if !status.success() {
        bail!("cargo {} failed for kmem-boot ({status})", before.join(" "));
    }
    Ok(())
}

/// Where the image's build output goes.
fn image_target_dir() -> Result<String> {
    let dir = target_dir().join("boot");
    dir.into_os_string()
        .into_string()
        .map_err(|dir| anyhow!("the target directory {} is not UTF-8", dir.display()))
}

/// Builds the image `kmem-boot` and returns the ELF file's path.
pub fn build_image(profile: &str) -> Result<PathBuf> {
    let dir = image_target_dir()?;
    let flags = ["--profile", profile, "--target", TARGET, "--target-dir", &dir];
    cargo_image(&["build"], &flags)?;
    let folder = if profile == "dev" { "debug" } else { profile };
    let image = Path::new(&dir).join(TARGET).join(folder).join("kmem-boot");
    if !image.is_file() {
        bail!("cargo left no image at {}", image.display());
    }
    Ok(image)
}

/// Checks the image's formatting and lints, which the workspace's own checks do not reach.
pub fn check_image() -> Result<()> {
    let dir = image_target_dir()?;
    let flags =
        ["--profile", "release", "--target", TARGET, "--target-dir", &dir, "--", "-Dwarnings"];
    cargo_image(&["fmt", "--check"], &[])?;
    cargo_image(&["clippy"], &flags)
}
