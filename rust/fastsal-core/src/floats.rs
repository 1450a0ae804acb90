//! The floating-point environment of computations: round to nearest, keep subnormal numbers.
//!
//! A thread inherits its environment from the one that starts it, and a caller may have changed its
//! own (`torch.set_flush_denormal`, libraries compiled with `-ffast-math`). Rust code assumes the
//! default; results must not depend on who calls.

use std::marker::PhantomData;

/// The control register of a thread's floating-point unit.
#[cfg(target_arch = "x86_64")]
mod control {
    use std::arch::asm;

    /// Round to nearest, no flags, all exceptions masked; subnormal numbers are kept.
    pub const DEFAULT: u64 = 0x1f80;

    pub fn read() -> u64 {
        let mut mxcsr = 0u32;
        // SAFETY: writes the four bytes of `mxcsr`.
        unsafe {
            asm!("stmxcsr [{}]", in(reg) &raw mut mxcsr, options(nostack, preserves_flags));
        }
        mxcsr.into()
    }

    pub fn write(value: u64) {
        let mxcsr = value as u32;
        // SAFETY: reads four bytes; the value is the default or was read from the register.
        unsafe {
            asm!("ldmxcsr [{}]", in(reg) &raw const mxcsr, options(nostack, preserves_flags));
        }
    }
}

/// The control register of a thread's floating-point unit.
#[cfg(target_arch = "aarch64")]
mod control {
    use std::arch::asm;

    /// Round to nearest, all exceptions masked; subnormal numbers are kept.
    pub const DEFAULT: u64 = 0;

    pub fn read() -> u64 {
        let fpcr: u64;
        // SAFETY: reads a register that programs may read.
        unsafe {
            asm!("mrs {}, fpcr", out(reg) fpcr, options(nostack, preserves_flags));
        }
        fpcr
    }

    pub fn write(value: u64) {
        // SAFETY: the value is the default or was read from the register.
        unsafe {
            asm!("msr fpcr, {}", in(reg) value, options(nostack, preserves_flags));
        }
    }
}

/// Other processors: nothing is known, nothing is changed.
#[cfg(not(any(target_arch = "x86_64", target_arch = "aarch64")))]
mod control {
    pub const DEFAULT: u64 = 0;
    pub fn read() -> u64 {
        DEFAULT
    }
    pub fn write(_: u64) {}
}

/// The environment of a thread until this is dropped; then the one before.
pub(crate) struct Floats {
    before: u64,
    /// The register belongs to the thread.
    not_send: PhantomData<*const ()>,
}

impl Floats {
    /// Use the default environment.
    pub(crate) fn own() -> Self {
        Self::exchanged(control::DEFAULT)
    }

    /// Use the environment that a thread had before.
    pub(crate) fn of_caller(before: u64) -> Self {
        Self::exchanged(before)
    }

    fn exchanged(value: u64) -> Self {
        let before = control::read();
        if before != value {
            control::write(value);
        }
        Self { before, not_send: PhantomData }
    }
}

impl Drop for Floats {
    fn drop(&mut self) {
        // Whatever exceptions the computation has flagged are its own.
        control::write(self.before);
    }
}

/// The environment of this thread.
pub(crate) fn current() -> u64 {
    control::read()
}

/// Use the default environment for the life of this thread.
pub(crate) fn keep_own() {
    control::write(control::DEFAULT);
}

/// Environments that a caller may have: subnormal numbers flushed to zero and taken for zeros; the
/// same, rounding up; rounding down.
#[cfg(all(test, target_arch = "x86_64"))]
pub(crate) const OTHERS: &[u64] = &[0x9fc0, 0xdfc0, 0x3f80];
#[cfg(all(test, target_arch = "aarch64"))]
pub(crate) const OTHERS: &[u64] = &[1 << 24, 1 << 24 | 1 << 22, 2 << 22];
#[cfg(all(test, not(any(target_arch = "x86_64", target_arch = "aarch64"))))]
pub(crate) const OTHERS: &[u64] = &[];

#[cfg(test)]
mod tests {
    use super::*;
    use std::hint::black_box;

    #[cfg(any(target_arch = "x86_64", target_arch = "aarch64"))]
    #[test]
    fn subnormal_numbers_are_kept_and_the_callers_environment_returns() {
        let halved = || black_box(f32::MIN_POSITIVE) * black_box(0.5);
        let _as_found = Floats::exchanged(OTHERS[0]);
        assert_eq!(halved(), 0.0);
        {
            let _own = Floats::own();
            assert!(halved() > 0.0);
            {
                let _outer = Floats::of_caller(OTHERS[0]);
                assert_eq!(halved(), 0.0);
            }
            assert!(halved() > 0.0);
        }
        assert_eq!(halved(), 0.0);
    }
}
