//! The instruction sets that kernels are compiled for, and which of them this processor has.

use std::sync::OnceLock;

use crate::error::{Error, Result};

/// The environment variable that names the instruction set to use; see [`Isa::chosen`].
pub const VARIABLE: &str = "FASTSAL_ISA";

/// An instruction set of this processor. A value is the proof that the processor has it: there is no
/// other way to get one than to ask the processor.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Isa(Set);

/// The name of an instruction set, which this processor may lack.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Set {
    /// Plain Rust: SSE2 on x86-64, NEON on arm64.
    Portable,
    /// 256-bit vectors, fused multiply-add and conversion of half precision.
    Avx2,
    /// 512-bit vectors.
    Avx512,
}

impl Isa {
    /// The instruction set that every processor has.
    pub const PORTABLE: Self = Self(Set::Portable);

    /// Return the fastest instruction set of this processor.
    #[must_use]
    pub fn best() -> Self {
        static BEST: OnceLock<Isa> = OnceLock::new();
        *BEST.get_or_init(|| Self::available().last().copied().unwrap_or(Self::PORTABLE))
    }

    /// Return all instruction sets of this processor, slowest first.
    #[must_use]
    pub fn available() -> Vec<Self> {
        #[allow(unused_mut)] // modified on x86-64 only
        let mut found = vec![Self::PORTABLE];
        #[cfg(target_arch = "x86_64")]
        {
            let has_avx2 = is_x86_feature_detected!("avx2") && is_x86_feature_detected!("fma");
            if has_avx2 && is_x86_feature_detected!("f16c") {
                found.push(Self(Set::Avx2));
            }
            // Kernels of 512 bits use vectors of half the width, too.
            if found.len() > 1 && is_x86_feature_detected!("avx512f") {
                found.push(Self(Set::Avx512));
            }
        }
        found
    }

    /// Return the instruction set that the environment variable [`VARIABLE`] names, or the fastest one
    /// where it is not set. The variable is read once.
    ///
    /// # Errors
    /// [`Error::Isa`] when it names no instruction set of this processor.
    pub fn chosen() -> Result<Self> {
        static CHOSEN: OnceLock<Result<Isa>> = OnceLock::new();
        let read = || match std::env::var_os(VARIABLE) {
            None => Ok(Self::best()),
            Some(name) if name.is_empty() => Ok(Self::best()),
            Some(name) => Self::named(&name.to_string_lossy()),
        };
        CHOSEN.get_or_init(read).clone()
    }

    /// Return the instruction set of a name: portable, avx2 or avx512.
    ///
    /// # Errors
    /// [`Error::Isa`] when this processor has none of that name.
    pub fn named(name: &str) -> Result<Self> {
        let available = Self::available();
        available.iter().find(|isa| isa.short_name() == name).copied().ok_or_else(|| {
            let names: Vec<&str> = available.iter().map(|isa| isa.short_name()).collect();
            Error::Isa { got: name.to_owned(), available: names.join(", ") }
        })
    }

    /// Return the name that [`Isa::named`] accepts.
    #[must_use]
    pub fn short_name(self) -> &'static str {
        match self.0 {
            Set::Portable => "portable",
            Set::Avx2 => "avx2",
            Set::Avx512 => "avx512",
        }
    }

    /// Return the names of its extensions.
    #[must_use]
    pub fn name(self) -> &'static str {
        match self.0 {
            Set::Portable if cfg!(target_arch = "aarch64") => "neon",
            Set::Portable => "portable",
            Set::Avx2 => "avx2+fma",
            Set::Avx512 => "avx512f",
        }
    }

    /// Which instruction set this is.
    pub(crate) fn set(self) -> Set {
        self.0
    }

    /// Return a named instruction set without asking the processor.
    ///
    /// # Safety
    /// This processor has it.
    pub(crate) unsafe fn assume(set: Set) -> Self {
        Self(set)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_are_those_of_the_processor() {
        let available = Isa::available();
        assert_eq!(available[0], Isa::PORTABLE);
        assert_eq!(available.last(), Some(&Isa::best()));
        for isa in &available {
            assert_eq!(Isa::named(isa.short_name()), Ok(*isa));
        }
        for name in ["sse9", "AVX2", "", "avx512f"] {
            let error = Isa::named(name).expect_err(name).to_string();
            assert!(
                error.starts_with("FASTSAL_ISA must be") && error.contains("portable"),
                "{error}"
            );
        }
        assert!(available.contains(&Isa::chosen().expect("a valid FASTSAL_ISA")));
    }
}
