//! Calls: parallel at the outermost level, safe after `fork`, and interruptible.
//!
//! A [`call`] runs functions of this crate, on the pool if there is much to do, otherwise on the
//! calling thread alone. While the pool works, the caller is asked at intervals whether to stop;
//! loops then skip the items that are left and unwind to the call, which returns
//! [`Error::Interrupted`]. Unwinding without a panic message is how long computations are cancelled
//! in salsa, too: no function between has to pass the news on, and nothing uses a part of a result.

mod loops;
mod pool;

use std::any::Any;
use std::cell::RefCell;
use std::panic::{catch_unwind, resume_unwind, AssertUnwindSafe};
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use crate::error::{Error, Result};
use crate::floats::{self, Floats};
pub use pool::{set_threads, threads};

/// The parallel loops of this crate; takes the place of `rayon::prelude`.
pub(crate) mod prelude {
    pub(crate) use super::loops::Loop;
    pub(crate) use rayon::iter::{IntoParallelIterator, IntoParallelRefIterator};
    pub(crate) use rayon::slice::{ParallelSlice, ParallelSliceMut};
}

/// How often a caller is asked whether to stop.
pub const POLL_EVERY: Duration = Duration::from_millis(50);

/// Work, in nanoseconds of one processor, that is done on the calling thread: to wake the workers and
/// to wait for them takes about as long.
pub const SMALL: u64 = 50_000;

/// Asks the caller of a function whether to stop; called on the calling thread only.
pub type Poll = fn() -> bool;

/// The answer of callers that never stop.
#[must_use]
pub fn never() -> bool {
    false
}

/// Run functions of this crate for a caller.
///
/// `work` is about how long they take on one processor, in nanoseconds; results do not depend on it.
/// `poll` is asked every [`POLL_EVERY`] whether to stop.
///
/// # Errors
/// Those of `job`; [`Error::Interrupted`] when `poll` said so.
pub fn call<R: Send>(work: u64, poll: Poll, job: impl FnOnce() -> Result<R> + Send) -> Result<R> {
    if work < SMALL {
        return alone(None, job);
    }
    // A limit on processes or on memory can leave the calling thread alone.
    let Some(workers) = pool::workers() else { return alone(Some(poll), job) };
    let (call, done, mut result) = (Arc::new(Call::default()), Latch::default(), None);
    workers.in_place_scope(|scope| {
        scope.spawn(|_| {
            let _done = SetAtEnd(&done);
            let _entered = Entered::new(&call);
            result = Some(catch_stop(job));
        });
        while !done.is_set_within(POLL_EVERY) {
            if !call.is_stopped() && poll() {
                call.stop();
            }
        }
    });
    // Other panics of the job are panics of the scope.
    call.outcome(result.unwrap_or(Err(Error::Interrupted)))
}

/// Run a job on the pool, so that the loops in it share one call; part of a call, it just runs.
pub fn run<R: Send>(job: impl FnOnce() -> R + Send) -> R {
    if current().is_some() {
        return job();
    }
    let Some(workers) = pool::workers() else {
        let _own = Floats::own();
        let _entered = Entered::new(&Arc::new(Call::alone(None)));
        return job();
    };
    workers.install(|| {
        let _entered = Entered::new(&Arc::default());
        job()
    })
}

/// Apply `f` to every item in parallel, in order: one call for all parameters of a model.
pub fn map<I: Send, R: Send>(items: Vec<I>, f: impl Fn(I) -> R + Sync + Send) -> Vec<R> {
    use prelude::{IntoParallelIterator, Loop};
    run(|| items.into_par_iter().map(f).collect())
}

/// Run a call on this thread.
fn alone<R>(poll: Option<Poll>, job: impl FnOnce() -> Result<R>) -> Result<R> {
    /// No arithmetic moves across the change of environment.
    #[inline(never)]
    fn apart<R>(job: impl FnOnce() -> Result<R>) -> Result<R> {
        catch_stop(job)
    }
    let call = Arc::new(Call::alone(poll));
    let _own = Floats::own();
    let _entered = Entered::new(&call);
    call.outcome(apart(job))
}

/// What unwinds from a loop to its call.
struct Stopped;

fn catch_stop<R>(job: impl FnOnce() -> Result<R>) -> Result<R> {
    let is_stop = |payload: &Box<dyn Any + Send>| payload.is::<Stopped>();
    match catch_unwind(AssertUnwindSafe(job)) {
        Err(payload) if is_stop(&payload) => Err(Error::Interrupted),
        Err(payload) => resume_unwind(payload),
        Ok(result) => result,
    }
}

/// One call, shared by the threads that work for it.
#[derive(Default)]
struct Call {
    is_stopped: AtomicBool,
    /// Set where the calling thread does all the work, and asks by itself.
    alone: Option<Alone>,
}

/// A call without workers.
struct Alone {
    poll: Option<Poll>,
    start: Instant,
    /// When to ask next, in nanoseconds from the start.
    next: AtomicU64,
    /// The floating-point environment of the caller.
    floats: u64,
}

impl Alone {
    fn must_stop(&self) -> bool {
        let Some(poll) = self.poll else { return false };
        let nanoseconds = || self.start.elapsed().as_nanos() as u64;
        if nanoseconds() < self.next.load(Ordering::Relaxed) {
            return false;
        }
        let _theirs = Floats::of_caller(self.floats);
        let must_stop = poll();
        self.next.store(nanoseconds() + POLL_EVERY.as_nanos() as u64, Ordering::Relaxed);
        must_stop
    }
}

impl Call {
    fn alone(poll: Option<Poll>) -> Self {
        let (start, floats) = (Instant::now(), floats::current());
        let next = AtomicU64::new(POLL_EVERY.as_nanos() as u64);
        let alone = Some(Alone { poll, start, next, floats });
        Self { alone, ..Self::default() }
    }

    fn stop(&self) {
        self.is_stopped.store(true, Ordering::Relaxed);
    }

    /// Whether the caller has said so; a worker does not ask.
    #[inline(always)]
    fn is_told_to_stop(&self) -> bool {
        self.is_stopped.load(Ordering::Relaxed)
    }

    fn is_stopped(&self) -> bool {
        if self.is_told_to_stop() {
            return true;
        }
        let must_stop = self.alone.as_ref().is_some_and(Alone::must_stop);
        if must_stop {
            self.stop();
        }
        must_stop
    }

    /// Leave for the end of the call if it is to stop.
    fn unwind_if_stopped(&self) {
        if self.is_stopped() {
            resume_unwind(Box::new(Stopped));
        }
    }

    /// The result of a job, unless the caller was told that it would have none.
    fn outcome<R>(&self, result: Result<R>) -> Result<R> {
        if self.is_told_to_stop() {
            return Err(Error::Interrupted);
        }
        result
    }
}

thread_local! {
    /// The call that this thread works for.
    static CALL: RefCell<Option<Arc<Call>>> = const { RefCell::new(None) };
}

fn current() -> Option<Arc<Call>> {
    CALL.with_borrow(Option::clone)
}

/// Stop here, in the middle of an item, if the call is to stop; for long computations of one block.
#[inline(never)]
pub(crate) fn checkpoint() {
    if let Some(call) = current() {
        call.unwind_if_stopped();
    }
}

/// [`checkpoint`] at every few rows of a matrix of `size` rows that takes long.
#[inline(always)]
pub(crate) fn checkpoint_at(row: usize, size: usize) {
    if size >= 512 && row.is_multiple_of(64) {
        checkpoint();
    }
}

/// Number of threads that the loops of this call are shared by.
pub(crate) fn parts() -> usize {
    match current() {
        Some(call) if call.alone.is_some() => 1,
        _ => threads(),
    }
}

/// The thread works for a call until this is dropped, then for the one before.
struct Entered(Option<Arc<Call>>);

impl Entered {
    fn new(call: &Arc<Call>) -> Self {
        Self(CALL.replace(Some(Arc::clone(call))))
    }
}

impl Drop for Entered {
    fn drop(&mut self) {
        CALL.set(self.0.take());
    }
}

/// The end of a job, for the thread that waits for it.
#[derive(Default)]
struct Latch {
    is_set: Mutex<bool>,
    changed: Condvar,
}

impl Latch {
    fn set(&self) {
        *lock(&self.is_set) = true;
        self.changed.notify_all();
    }

    /// Wait for at most `time`; return whether the latch is set.
    fn is_set_within(&self, time: Duration) -> bool {
        let waited = self.changed.wait_timeout_while(lock(&self.is_set), time, |is_set| !*is_set);
        *waited.unwrap_or_else(PoisonError::into_inner).0
    }
}

/// Sets a latch at the end of a job, also of one that panics.
struct SetAtEnd<'a>(&'a Latch);

impl Drop for SetAtEnd<'_> {
    fn drop(&mut self) {
        self.0.set();
    }
}

fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    // Guarded values are replaced as a whole, so they are valid even behind a poisoned lock.
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

#[cfg(test)]
mod tests;
