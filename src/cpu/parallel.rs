//! Threads of one op: started when it runs, gone when it returns.

use std::sync::{Mutex, PoisonError};
use std::thread;

/// Below this much memory traffic per thread, starting one (about 20 us) costs more than it saves.
const MIN_BYTES_PER_THREAD: usize = 128 << 10;

/// How many of `threads` are worth using for `bytes` of memory traffic.
pub(crate) fn useful_threads(threads: usize, bytes: usize) -> usize {
    (bytes / MIN_BYTES_PER_THREAD).clamp(1, threads)
}

/// Runs `work` on every item, with up to `threads` threads including the caller's. Threads take items from one
/// queue, so what an item does must not depend on the others. Where the system refuses a thread, the others do
/// its work.
pub(crate) fn for_each<T: Send>(threads: usize, items: Vec<T>, work: impl Fn(T) + Sync) {
    let extra = threads.min(items.len()).saturating_sub(1);
    let queue = Mutex::new(items.into_iter());
    let next = || queue.lock().unwrap_or_else(PoisonError::into_inner).next();
    let drain = || {
        while let Some(item) = next() {
            work(item);
        }
    };
    thread::scope(|scope| {
        for _ in 0..extra {
            if thread::Builder::new().spawn_scoped(scope, drain).is_err() {
                break;
            }
        }
        drain();
    });
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_item_once() {
        for threads in [1, 2, 3, 8, 50] {
            for n in [0, 1, 2, 7, 33] {
                let seen = Mutex::new(Vec::new());
                for_each(threads, (0..n).collect(), |i| seen.lock().expect("no panic").push(i));
                let mut seen = seen.into_inner().expect("no panic");
                seen.sort_unstable();
                assert_eq!(seen, (0..n).collect::<Vec<i32>>());
            }
        }
    }
}
