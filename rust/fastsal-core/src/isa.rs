//! The instruction sets that kernels are compiled for, and which of them this processor has.

use std::sync::OnceLock;

use crate::error::{Error, Result};

/// Instruction set of a kernel.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Isa {
    /// Plain Rust: SSE2 on x86-64, NEON on arm64.
    Portable,
    /// 256-bit vectors and fused multiply-add.
    Avx2,
    /// 512-bit vectors.
    Avx512,
}

impl Isa {
    /// Return the fastest instruction set of this processor.
    #[must_use]
    pub fn best() -> Self {
        static BEST: OnceLock<Isa> = OnceLock::new();
        *BEST.get_or_init(|| Self::available().last().copied().unwrap_or(Self::Portable))
    }

    /// Return all instruction sets of this processor, slowest first.
    #[must_use]
    pub fn available() -> Vec<Self> {
        #[allow(unused_mut)] // modified on x86-64 only
        let mut found = vec![Self::Portable];
        #[cfg(target_arch = "x86_64")]
        {
            if is_x86_feature_detected!("avx2") && is_x86_feature_detected!("fma") {
                found.push(Self::Avx2);
            }
            if is_x86_feature_detected!("avx512f") {
                found.push(Self::Avx512);
            }
        }
        found
    }

    /// Require that this processor has the instruction set.
    pub(crate) fn check(self) -> Result<()> {
        if self == Self::best() || Self::available().contains(&self) {
            return Ok(());
        }
        let got = self.name().to_owned();
        Err(Error::Value { what: "isa", got, expected: "one that this processor has" })
    }

    /// Return the common name.
    #[must_use]
    pub fn name(self) -> &'static str {
        match self {
            Self::Portable if cfg!(target_arch = "aarch64") => "neon",
            Self::Portable => "portable",
            Self::Avx2 => "avx2+fma",
            Self::Avx512 => "avx512f",
        }
    }
}
