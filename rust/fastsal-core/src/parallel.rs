//! The worker pool: one for the process, parallel at the outermost level only, safe after `fork`.
//!
//! A rayon pool does not survive `fork`: the child has the memory of the pool but not its threads, and
//! would wait for them forever. The pool therefore records the process that built it, and a child
//! builds its own.

use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use rayon::prelude::*;
use rayon::{ThreadPool, ThreadPoolBuilder};

struct Pool {
    process: u32,
    threads: usize,
    workers: Arc<ThreadPool>,
}

static POOL: Mutex<Option<Pool>> = Mutex::new(None);
/// The argument of `set_threads`; zero means every processor that this process may use.
static WANTED: std::sync::atomic::AtomicUsize = std::sync::atomic::AtomicUsize::new(0);

fn lock() -> MutexGuard<'static, Option<Pool>> {
    // The guarded value is replaced as a whole, so it is valid even behind a poisoned lock.
    POOL.lock().unwrap_or_else(PoisonError::into_inner)
}

/// Return the number of workers that the next call uses.
#[must_use]
pub fn threads() -> usize {
    match WANTED.load(std::sync::atomic::Ordering::Relaxed) {
        0 => std::thread::available_parallelism().map_or(1, std::num::NonZero::get),
        n => n,
    }
}

/// Use `n` workers from the next call on; zero means every processor that this process may use.
pub fn set_threads(n: usize) {
    WANTED.store(n, std::sync::atomic::Ordering::Relaxed);
}

/// Run `job` inside the pool, so that rayon iterators in it use the pool's workers.
pub fn run<R: Send>(job: impl FnOnce() -> R + Send) -> R {
    match workers() {
        Some(pool) => pool.install(job),
        // No thread could be started (for example, a process limit): rayon runs on this thread alone.
        None => job(),
    }
}

/// Apply `f` to every item in parallel, in order: one call for all parameters of a model.
pub fn map<I: Send, R: Send>(items: Vec<I>, f: impl Fn(I) -> R + Sync + Send) -> Vec<R> {
    run(|| items.into_par_iter().map(f).collect())
}

fn workers() -> Option<Arc<ThreadPool>> {
    let (process, threads) = (std::process::id(), threads());
    let mut pool = lock();
    match pool.take() {
        Some(p) if p.process == process && p.threads == threads => {
            let workers = Arc::clone(&p.workers);
            *pool = Some(p);
            return Some(workers);
        }
        // Dropping a pool joins its threads, which a forked child does not have.
        Some(p) if p.process != process => std::mem::forget(p),
        _ => {}
    }
    let name = |i| format!("fastsal-{i}");
    let built = ThreadPoolBuilder::new().num_threads(threads).thread_name(name).build().ok()?;
    let workers = Arc::new(built);
    *pool = Some(Pool { process, threads, workers: Arc::clone(&workers) });
    Some(workers)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn runs_with_the_threads_asked_for() {
        set_threads(3);
        assert_eq!(run(rayon::current_num_threads), 3);
        set_threads(0);
        assert_eq!(run(rayon::current_num_threads), threads());
    }
}
