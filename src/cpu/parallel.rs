//! Threads of one op: started when it runs, gone when it returns.

use std::iter;
use std::sync::{Mutex, PoisonError};
use std::thread;

/// Below this much memory traffic per thread, starting one (about 20 us) costs more than it saves.
const MIN_BYTES_PER_THREAD: usize = 128 << 10;

/// How many of `threads` are worth using for `bytes` of memory traffic.
pub(crate) fn useful_threads(threads: usize, bytes: usize) -> usize {
    (bytes / MIN_BYTES_PER_THREAD).clamp(1, threads)
}

/// Runs `work` on every item, with up to `threads` threads including the caller's: [`drain`] without states. What
/// an item does must not depend on the others.
pub(crate) fn for_each<I>(threads: usize, items: I, work: impl Fn(I::Item) + Sync)
where
    I: IntoIterator<IntoIter: Send, Item: Send>,
{
    let items = items.into_iter();
    let most = items.size_hint().1.unwrap_or(usize::MAX);
    drain(iter::repeat_n((), threads.min(most).max(1)), items, |(), item| work(item));
}

/// Runs `work` on every item of `queue`, one thread per element of `states` (the caller's included). Each thread
/// takes the next item when it is done with one, so uneven items balance; nothing is allocated.
pub(crate) fn drain<S: Send, T: Send>(
    states: impl Iterator<Item = S>,
    queue: impl Iterator<Item = T> + Send,
    work: impl Fn(&mut S, T) + Sync,
) {
    let queue = Mutex::new(queue);
    let run = |mut state: S| {
        loop {
            // A poisoned queue means that another thread panicked inside `next`; the scope passes that on.
            let next = queue.lock().unwrap_or_else(PoisonError::into_inner).next();
            let Some(item) = next else { break };
            work(&mut state, item);
        }
    };
    let mut states = states.peekable();
    let Some(mine) = states.next() else { return };
    if states.peek().is_none() {
        return run(mine);
    }
    thread::scope(|scope| {
        for state in states {
            let run = &run;
            // Where the system refuses another thread, those that run do all the work.
            if thread::Builder::new().spawn_scoped(scope, move || run(state)).is_err() {
                break;
            }
        }
        run(mine);
    });
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn drain_takes_every_item_once() {
        for threads in [1, 2, 3, 8] {
            for n in [0, 1, 7, 333] {
                let mut counts = vec![0usize; threads];
                let seen = Mutex::new(Vec::new());
                drain(counts.iter_mut(), 0..n, |count, i| {
                    **count += 1;
                    seen.lock().expect("no panic").push(i);
                });
                let mut seen = seen.into_inner().expect("no panic");
                seen.sort_unstable();
                assert_eq!(seen, (0..n).collect::<Vec<i32>>());
                assert_eq!(counts.iter().sum::<usize>(), n as usize);
            }
        }
    }

    #[test]
    fn every_item_once() {
        for threads in [1, 2, 3, 8, 50] {
            for n in [0, 1, 2, 7, 33] {
                let seen = Mutex::new(Vec::new());
                for_each(threads, 0..n, |i| seen.lock().expect("no panic").push(i));
                let mut seen = seen.into_inner().expect("no panic");
                seen.sort_unstable();
                assert_eq!(seen, (0..n).collect::<Vec<i32>>());
            }
        }
    }
}
