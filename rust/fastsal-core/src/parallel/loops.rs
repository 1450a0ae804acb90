//! Loops over items of equal standing, by the names of rayon's: on the pool of the current call, or
//! one item after the other where the call has none. Before each item they ask whether to stop.

use std::sync::Arc;

use rayon::iter::plumbing::{Producer, ProducerCallback};
use rayon::iter::{
    Enumerate, IndexedParallelIterator, IntoParallelIterator, ParallelIterator, Zip,
};

use super::{current, run, Call, Entered};

/// Items in order, of which the number is known.
pub(crate) trait Loop: IndexedParallelIterator {
    /// Pair the items with others.
    fn zip<Z>(self, other: Z) -> Zip<Self, Z::Iter>
    where
        Z: IntoParallelIterator<Iter: IndexedParallelIterator>,
    {
        IndexedParallelIterator::zip(self, other)
    }

    /// Number the items.
    fn enumerate(self) -> Enumerate<Self> {
        IndexedParallelIterator::enumerate(self)
    }

    /// Apply `job` to every item; `init` makes the memory that a worker reuses.
    fn map_init<S, R: Send, N, F>(self, init: N, job: F) -> Mapped<Self, N, F>
    where
        N: Fn() -> S + Sync + Send,
        F: Fn(&mut S, Self::Item) -> R + Sync + Send,
    {
        Mapped { items: self, init, job }
    }

    /// Apply `job` to every item.
    #[allow(clippy::type_complexity)] // the type of a closure has no name
    fn map<R: Send>(
        self,
        job: impl Fn(Self::Item) -> R + Sync + Send,
    ) -> Mapped<Self, fn(), impl Fn(&mut (), Self::Item) -> R + Sync + Send> {
        Mapped { items: self, init: || (), job: move |(): &mut (), item| job(item) }
    }

    /// Apply `job` to every item, for what it does.
    fn for_each(self, job: impl Fn(Self::Item) + Sync + Send) {
        Loop::for_each_init(self, || (), |(), item| job(item));
    }

    /// [`Loop::for_each`] with memory that a worker reuses.
    fn for_each_init<S>(
        self,
        init: impl Fn() -> S + Sync + Send,
        job: impl Fn(&mut S, Self::Item) + Sync + Send,
    ) {
        in_call(|call| {
            if call.alone.is_some() {
                let mut state = init();
                in_order(self, |item| {
                    if !call.is_stopped() {
                        job(&mut state, item);
                    }
                });
                return;
            }
            let begin = || (Entered::new(call), init());
            ParallelIterator::for_each_init(self, begin, |(_, state), item| {
                if !call.is_told_to_stop() {
                    job(state, item);
                }
            });
        });
    }

    /// Return what `job` finds first, in the order of the items.
    fn find_map_first<R: Send>(
        self,
        job: impl Fn(Self::Item) -> Option<R> + Sync + Send,
    ) -> Option<R> {
        in_call(|call| {
            if call.alone.is_some() {
                let mut found = None;
                in_order(self, |item| {
                    if found.is_none() && !call.is_stopped() {
                        found = job(item);
                    }
                });
                return found;
            }
            ParallelIterator::find_map_first(self, |item| {
                let _entered = Entered::new(call);
                if call.is_stopped() {
                    return None;
                }
                job(item)
            })
        })
    }
}

impl<I: IndexedParallelIterator> Loop for I {}

/// A loop with results.
pub(crate) struct Mapped<I, N, F> {
    items: I,
    init: N,
    job: F,
}

impl<I, S, R, N, F> Mapped<I, N, F>
where
    I: IndexedParallelIterator,
    R: Send,
    N: Fn() -> S + Sync + Send,
    F: Fn(&mut S, I::Item) -> R + Sync + Send,
{
    /// Collect the results in the order of the items.
    pub(crate) fn collect<C: FromIterator<R>>(self) -> C {
        let Self { items, init, job } = self;
        let results: Vec<Option<R>> = in_call(|call| {
            if call.alone.is_some() {
                let (mut state, mut results) = (init(), Vec::with_capacity(items.len()));
                in_order(items, |item| {
                    results.push((!call.is_stopped()).then(|| job(&mut state, item)));
                });
                return results;
            }
            let begin = || (Entered::new(call), init());
            let mapped = ParallelIterator::map_init(items, begin, |(_, state), item| {
                (!call.is_told_to_stop()).then(|| job(state, item))
            });
            ParallelIterator::collect(mapped)
        });
        // None is missing: a loop that left items out has unwound.
        results.into_iter().flatten().collect()
    }

    /// Combine the results in the order of the items.
    pub(crate) fn reduce(self, identity: impl Fn() -> R, op: impl Fn(R, R) -> R) -> R {
        self.collect::<Vec<R>>().into_iter().fold(identity(), op)
    }

    /// Combine the results in the order of the items; `None` if there are none.
    pub(crate) fn reduce_with(self, op: impl Fn(R, R) -> R) -> Option<R> {
        self.collect::<Vec<R>>().into_iter().reduce(op)
    }

    /// Add the results.
    pub(crate) fn sum<T: std::iter::Sum<R>>(self) -> T {
        self.collect::<Vec<R>>().into_iter().sum()
    }
}

/// Run a loop of the current call, or of one of its own; it unwinds if the call is to stop.
fn in_call<R: Send>(run_loop: impl FnOnce(&Arc<Call>) -> R + Send) -> R {
    let Some(call) = current() else { return run(|| in_call(run_loop)) };
    let result = run_loop(&call);
    call.unwind_if_stopped();
    result
}

/// Apply `f` to every item, one after the other, without a pool.
fn in_order<I: IndexedParallelIterator>(items: I, f: impl FnMut(I::Item)) {
    struct InOrder<F>(F);
    impl<T, F: FnMut(T)> ProducerCallback<T> for InOrder<F> {
        type Output = ();
        fn callback<P: Producer<Item = T>>(self, producer: P) {
            producer.into_iter().for_each(self.0);
        }
    }
    items.with_producer(InOrder(f));
}
