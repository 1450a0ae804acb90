use super::prelude::*;
use super::*;
use std::sync::atomic::AtomicUsize;

/// `set_threads` is one for the process, and tests run in parallel.
static THREADS: Mutex<()> = Mutex::new(());

/// Work that is not small.
const MUCH: u64 = u64::MAX;

#[test]
fn runs_with_the_threads_asked_for() {
    let _guard = lock(&THREADS);
    set_threads(3);
    let found = call(MUCH, never, || Ok((rayon::current_num_threads(), parts())));
    assert_eq!(found, Ok((3, 3)));
    assert_eq!(run(rayon::current_num_threads), 3);
    set_threads(0);
    assert_eq!(call(0, never, || Ok(parts())), Ok(1));
}

/// A loop inside a loop; the inner one works for the same call.
fn nested(items: usize) -> Vec<usize> {
    let item = |count: &mut usize, i: usize| {
        *count += 1;
        (0..3).into_par_iter().map(|k| k * i).sum::<usize>()
    };
    (0..items).into_par_iter().map_init(|| 0, item).collect()
}

#[test]
fn small_and_large_calls_do_the_same() {
    let expected: Vec<usize> = (0..100).map(|i| 3 * i).collect();
    for work in [0, MUCH] {
        assert_eq!(call(work, never, || Ok(nested(100))).as_ref(), Ok(&expected));
        let mut written = vec![0; 100];
        let write = || {
            let pairs = written.par_chunks_mut(7).zip(expected.par_chunks(7)).enumerate();
            pairs.for_each(|(_, (to, from))| to.copy_from_slice(from));
            Ok(())
        };
        assert_eq!(call(work, never, write), Ok(()));
        assert_eq!(written, expected);
        let first = || Ok(expected.par_iter().find_map_first(|x| (*x > 10).then_some(*x)));
        assert_eq!(call(work, never, first), Ok(Some(12)));
        let none =
            call(work, never, || Ok((0..0).into_par_iter().map(|i| i).reduce_with(|a, _| a)));
        assert_eq!(none, Ok(None));
    }
    // Without a call, a loop makes one.
    assert_eq!(nested(100), expected);
}

#[test]
fn small_calls_stay_on_the_calling_thread() {
    let here = std::thread::current().id();
    let threads = || {
        let items = (0..8).into_par_iter().map(|_| std::thread::current().id());
        Ok(items.collect::<Vec<_>>())
    };
    assert!(call(0, never, threads).is_ok_and(|ids| ids.iter().all(|id| *id == here)));
    assert!(call(MUCH, never, threads).is_ok_and(|ids| ids.iter().all(|id| *id != here)));
}

#[test]
fn an_interrupted_call_skips_the_rest() {
    static DONE: AtomicUsize = AtomicUsize::new(0);
    // An item that waits until the call is to stop.
    fn wait(_: usize) {
        DONE.fetch_add(1, Ordering::Relaxed);
        loop {
            checkpoint();
            std::thread::yield_now();
        }
    }
    let stop: Poll = || true;
    let each = || {
        (0..10_000).into_par_iter().for_each(wait);
        Ok(())
    };
    let collected = || Ok((0..10_000).into_par_iter().map(wait).collect::<Vec<_>>());
    let inside = || {
        (0..10_000).into_par_iter().for_each(|_| (0..10).into_par_iter().for_each(wait));
        Ok(())
    };
    assert_eq!(call(MUCH, stop, each), Err(Error::Interrupted));
    assert_eq!(call(MUCH, stop, inside), Err(Error::Interrupted));
    assert_eq!(call(MUCH, stop, collected), Err(Error::Interrupted));
    assert_eq!(alone(Some(stop), each), Err(Error::Interrupted));
    assert_eq!(alone(Some(stop), inside), Err(Error::Interrupted));
    // Only items that had begun; the leaves of a loop are few.
    assert!(DONE.load(Ordering::Relaxed) <= 5 * threads().max(8));
    // The next call is another one, and so is none.
    assert_eq!(call(MUCH, never, || Ok(nested(5))), Ok(vec![0, 3, 6, 9, 12]));
    checkpoint();
}

#[test]
fn a_call_that_ends_before_it_can_stop_has_no_result() {
    static ASKED: AtomicBool = AtomicBool::new(false);
    let stop: Poll = || {
        ASKED.store(true, Ordering::Relaxed);
        true
    };
    let job = || {
        while !ASKED.load(Ordering::Relaxed) {
            std::thread::yield_now();
        }
        Ok(1)
    };
    assert_eq!(call(MUCH, stop, job), Err(Error::Interrupted));
}

#[test]
fn a_call_inside_a_poll_is_its_own() {
    let poll: Poll = || call(0, never, || Ok(nested(2))) == Ok(vec![0, 3]);
    let forever = || loop {
        checkpoint();
    };
    let result: Result<()> = alone(Some(poll), forever);
    assert_eq!(result, Err(Error::Interrupted));
}

#[test]
fn panics_pass_through() {
    for work in [0, MUCH] {
        let job = || {
            (0..3).into_par_iter().for_each(|i| assert!(i < 2, "two"));
            Ok(())
        };
        let result = catch_unwind(AssertUnwindSafe(|| call(work, never, job)));
        assert!(result.is_err_and(|payload| !payload.is::<Stopped>()));
    }
}

#[test]
fn calls_do_not_depend_on_the_callers_floats() {
    use std::hint::black_box;
    let arithmetic = || {
        let tiny = black_box(f32::MIN_POSITIVE) * black_box(0.5);
        (tiny.to_bits(), (black_box(1.0f32) / black_box(3.0)).to_bits())
    };
    let expected = arithmetic();
    assert_ne!(expected.0, 0);
    let _guard = lock(&THREADS);
    // The pool is built by a thread with the other environment.
    let other = std::thread::spawn(move || {
        for (environment, count) in floats::OTHERS.iter().zip(5..) {
            let _theirs = Floats::of_caller(*environment);
            let theirs = arithmetic();
            set_threads(count);
            for work in [MUCH, 0] {
                let items = || (0..64).into_par_iter().map(|_| arithmetic()).collect::<Vec<_>>();
                assert_eq!(call(work, never, || Ok(items())), Ok(vec![expected; 64]));
                assert_eq!(arithmetic(), theirs);
            }
        }
        set_threads(0);
    });
    assert!(other.join().is_ok());
}
