//! A decode step captured once and replayed for other lengths, tables and contents.

use crate::common::device::TestStream;
use crate::gpu;
use crate::step::{PACKED, State, Step, alone};
use cudarc::driver::{result, sys};
use mustafar::ops;

/// An executable graph.
pub struct Graph(sys::CUgraphExec);

impl Graph {
    /// What `work` submits to the stream. In global mode any call that is not allowed during a capture fails.
    pub fn capture(stream: &TestStream, work: impl FnOnce()) -> Self {
        // SAFETY: the stream is alive; the graph comes from the driver and is destroyed once.
        unsafe {
            let mode = sys::CUstreamCaptureMode_enum::CU_STREAM_CAPTURE_MODE_GLOBAL;
            result::stream::begin_capture(stream.raw(), mode).unwrap();
            work();
            let graph = result::stream::end_capture(stream.raw()).unwrap();
            let mut exec = std::ptr::null_mut();
            sys::cuGraphInstantiateWithFlags(&raw mut exec, graph, 0).result().unwrap();
            result::graph::destroy(graph).unwrap();
            Self(exec)
        }
    }

    pub fn launch(&self, stream: &TestStream) {
        // SAFETY: both are alive.
        unsafe { result::graph::launch(self.0, stream.raw()) }.unwrap();
        stream.synchronize();
    }
}

impl Drop for Graph {
    fn drop(&mut self) {
        // SAFETY: made by `capture`, destroyed once.
        let _ = unsafe { result::graph::exec_destroy(self.0) };
    }
}

#[test]
fn a_captured_step_follows_what_device_memory_holds() {
    let Some((context, _lock)) = gpu() else { return };
    let first = State::random(1, [700, 1, 130]);
    let (step, stream) = (Step::new(context, &first, PACKED), TestStream::new());
    let needed = || ops::attend_workspace(context, &step.attend()).unwrap();
    let workspace = needed();
    let graph = Graph::capture(&stream, || step.submit(context, stream.stream()));
    assert!(step.is_untouched(), "a capture runs nothing");

    for (seed, lens) in [(1, [700, 1, 130]), (2, [5, 700, 64]), (3, [0, 128, 699]), (4, [65, 2, 0])] {
        let state = State::random(seed, lens);
        step.load(&state);
        step.poison();
        graph.launch(&stream);
        assert!(context.take_device_errors().unwrap().is_empty());
        let replayed = step.results();
        assert!(replayed.same_bits(&alone(context, &state, PACKED)), "lengths {lens:?}");
        state.check(&replayed);
        assert_eq!(needed(), workspace);
    }
}
