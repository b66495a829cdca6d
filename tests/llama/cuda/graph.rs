//! Work recorded once and submitted as a whole.
#![allow(unsafe_code, reason = "graphs are handles of the driver")]

use super::gpu::{Gpu, driver_error};
use crate::llama::error::Result;
use cudarc::driver::{result, sys};
use std::rc::Rc;

#[derive(Debug)]
pub struct Graph {
    gpu: Rc<Gpu>,
    executable: sys::CUgraphExec,
}

impl Graph {
    /// Records what `work` submits to the stream, without running it. All kernels must have been loaded, which running
    /// the work before sees to.
    pub fn capture(gpu: &Rc<Gpu>, work: impl FnOnce() -> Result<()>) -> Result<Self> {
        let stream = gpu.raw_stream();
        // SAFETY: the stream is alive; the capture is ended whatever happens, and the graph destroyed once.
        unsafe {
            let mode = sys::CUstreamCaptureMode_enum::CU_STREAM_CAPTURE_MODE_THREAD_LOCAL;
            result::stream::begin_capture(stream, mode).map_err(driver_error("cuStreamBeginCapture"))?;
            let worked = work();
            let captured = result::stream::end_capture(stream).map_err(driver_error("cuStreamEndCapture"));
            worked?;
            let graph = captured?;
            let mut executable = std::ptr::null_mut();
            let made = sys::cuGraphInstantiateWithFlags(&raw mut executable, graph, 0).result();
            let destroyed = result::graph::destroy(graph);
            made.and(destroyed).map_err(driver_error("cuGraphInstantiate"))?;
            Ok(Self { gpu: Rc::clone(gpu), executable })
        }
    }

    pub fn launch(&self) -> Result<()> {
        // SAFETY: both are alive.
        unsafe { result::graph::launch(self.executable, self.gpu.raw_stream()) }
            .map_err(driver_error("cuGraphLaunch"))
    }
}

impl Drop for Graph {
    fn drop(&mut self) {
        // SAFETY: made by `capture`, destroyed once. Nothing can be done about an error.
        let _ = unsafe { result::graph::exec_destroy(self.executable) };
    }
}
