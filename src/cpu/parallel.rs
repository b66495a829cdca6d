//! Threads of one op: started when it runs, gone when it returns.

use std::thread;

/// Below this much memory traffic per thread, starting one (about 20 us) costs more than it saves.
const MIN_BYTES_PER_THREAD: usize = 128 << 10;

/// How many of `threads` are worth using for `bytes` of memory traffic.
pub(crate) fn useful_threads(threads: usize, bytes: usize) -> usize {
    (bytes / MIN_BYTES_PER_THREAD).clamp(1, threads)
}

/// Runs `work` on every item, with up to `threads` threads including the caller's. Each thread takes a
/// contiguous share of the items in order, so what an item does must not depend on the others.
pub(crate) fn for_each<T: Send>(threads: usize, items: Vec<T>, work: impl Fn(T) + Sync) {
    let shares = threads.clamp(1, items.len().max(1));
    let (base, extra) = (items.len() / shares, items.len() % shares);
    let mut items = items.into_iter();
    let mine: Vec<T> = items.by_ref().take(base + usize::from(extra > 0)).collect();
    let work = &work;
    thread::scope(|scope| {
        for share in 1..shares {
            let share: Vec<T> = items.by_ref().take(base + usize::from(share < extra)).collect();
            scope.spawn(move || share.into_iter().for_each(work));
        }
        mine.into_iter().for_each(work);
    });
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::sync::Mutex;

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
