//! Streams and threads that share a context.

use crate::common::device::TestStream;
use crate::gpu;
use crate::step::{PACKED, State, Step, alone};

const THREADS: u64 = 6;
const ROUNDS: usize = 10;

fn state(seed: u64) -> State {
    State::random(seed, [100 * seed as usize + 1, 64, 700])
}

#[test]
fn threads_with_streams_of_their_own_do_not_disturb_each_other() {
    let Some((context, _lock)) = gpu() else { return };
    let expected: Vec<_> = (0..THREADS).map(|seed| alone(context, &state(seed), PACKED)).collect();
    std::thread::scope(|scope| {
        for (seed, expected) in (0..THREADS).zip(&expected) {
            scope.spawn(move || {
                let stream = TestStream::new();
                let step = Step::new(context, &state(seed), PACKED);
                for round in 0..ROUNDS {
                    step.poison();
                    step.submit(context, stream.stream());
                    stream.synchronize();
                    assert!(step.results().same_bits(expected), "thread {seed}, round {round}");
                }
            });
        }
    });
    assert!(context.take_device_errors().unwrap().is_empty());
}

#[test]
fn one_thread_may_use_many_streams_at_once() {
    let Some((context, _lock)) = gpu() else { return };
    let states: Vec<_> = (0..THREADS).map(state).collect();
    let steps: Vec<_> = states.iter().map(|s| (Step::new(context, s, PACKED), TestStream::new())).collect();
    for _ in 0..ROUNDS {
        steps.iter().for_each(|(step, stream)| step.submit(context, stream.stream()));
    }
    for ((step, stream), state) in steps.iter().zip(&states) {
        stream.synchronize();
        state.check(&step.results());
    }
    assert!(context.take_device_errors().unwrap().is_empty());
}
