//! The worker pool: one for the process.
//!
//! A rayon pool does not survive `fork`: the child has the memory of the pool but not its threads, and
//! would wait for them forever; it may also have a lock that another thread held. Everything that is
//! shared therefore belongs to one process, and a child starts with its own.

use std::sync::atomic::{AtomicPtr, AtomicUsize, Ordering};
use std::sync::{Arc, Mutex};

use rayon::{ThreadPool, ThreadPoolBuilder};

use super::lock;
use crate::floats;

/// The argument of `set_threads`; zero if the environment decides.
static WANTED: AtomicUsize = AtomicUsize::new(0);

/// Environment variables of the number of threads; the first that holds one decides.
const VARIABLES: [&str; 3] = ["FASTSAL_NUM_THREADS", "RAYON_NUM_THREADS", "OMP_NUM_THREADS"];

/// Return the number of workers that the next call uses.
///
/// That of [`set_threads`]; otherwise the first of `FASTSAL_NUM_THREADS`, `RAYON_NUM_THREADS` and
/// `OMP_NUM_THREADS` that is a number above zero; otherwise the processors that this process may use
/// by its affinity and its quota.
#[must_use]
pub fn threads() -> usize {
    match WANTED.load(Ordering::Relaxed) {
        0 => VARIABLES
            .iter()
            .find_map(|name| count(&std::env::var(name).ok()?))
            .unwrap_or_else(|| std::thread::available_parallelism().map_or(1, Into::into)),
        n => n,
    }
}

/// A number above zero; of a list, which OpenMP takes for nested loops, the first.
fn count(text: &str) -> Option<usize> {
    text.split(',').next()?.trim().parse().ok().filter(|n| *n > 0)
}

/// Use `n` workers from the next call on; zero means as many as the environment says.
pub fn set_threads(n: usize) {
    WANTED.store(n, Ordering::Relaxed);
}

struct Pool {
    /// The number of threads that was asked for; there may be fewer.
    threads: usize,
    workers: Arc<ThreadPool>,
}

/// What the threads of one process share.
struct Process {
    id: u32,
    pool: Mutex<Option<Pool>>,
}

/// The process that used it last: this one, or one that it was forked from.
static PROCESS: AtomicPtr<Process> = AtomicPtr::new(std::ptr::null_mut());

impl Process {
    fn this() -> &'static Self {
        let id = std::process::id();
        let mut found = PROCESS.load(Ordering::Acquire);
        loop {
            // SAFETY: null, or from `Box::into_raw` below and never freed once it is here.
            if let Some(process) = unsafe { found.as_ref() }.filter(|process| process.id == id) {
                return process;
            }
            // The pool of another process is left alone: to drop it would take its lock and wake its
            // threads, which this process does not have.
            let own = Box::into_raw(Box::new(Self { id, pool: Mutex::new(None) }));
            match PROCESS.compare_exchange(found, own, Ordering::AcqRel, Ordering::Acquire) {
                // SAFETY: from `Box::into_raw`, and never freed.
                Ok(_) => return unsafe { &*own },
                Err(other) => {
                    // SAFETY: from `Box::into_raw`, and no other thread has seen it.
                    drop(unsafe { Box::from_raw(own) });
                    found = other;
                }
            }
        }
    }
}

/// The pool of this process, or `None` if no thread can be started.
pub(super) fn workers() -> Option<Arc<ThreadPool>> {
    let threads = threads();
    let mut pool = lock(&Process::this().pool);
    if let Some(found) = pool.as_ref().filter(|found| found.threads == threads) {
        return Some(Arc::clone(&found.workers));
    }
    *pool = None;
    let build = |n: usize| {
        let builder = ThreadPoolBuilder::new().num_threads(n);
        let builder = builder.thread_name(|i| format!("fastsal-{i}"));
        // Threads inherit the environment of the one that starts them.
        builder.start_handler(|_| floats::keep_own()).build().ok()
    };
    // Fewer threads where not as many can be started.
    let mut numbers = std::iter::successors(Some(threads), |n| (*n > 1).then_some(n / 2));
    let workers = Arc::new(numbers.find_map(build)?);
    *pool = Some(Pool { threads, workers: Arc::clone(&workers) });
    Some(workers)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_environment_says_how_many() {
        let cases = [("1", Some(1)), (" 12 ", Some(12)), ("4,2", Some(4)), ("0", None), ("", None)];
        for (text, expected) in cases {
            assert_eq!(count(text), expected, "{text:?}");
        }
        assert_eq!(count("-1"), None);
    }

    #[test]
    fn one_process_has_one_state() {
        let here = std::ptr::from_ref(Process::this()) as usize;
        let there = std::thread::spawn(|| std::ptr::from_ref(Process::this()) as usize);
        assert_eq!(there.join().ok(), Some(here));
    }
}
