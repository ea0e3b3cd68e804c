//! `vhostd._native`: the engine as Python sees it; `vhostd/_native.pyi` is the contract.
//!
//! Invariants:
//! - A call that waits (for a worker, for I/O, for the kernel to map memory) has released the GIL.
//! - Every Rust error becomes an exception of `vhostd.errors`, in `errors` and nowhere else.
//! - The engine never calls Python. `unsafe` is in `fds`.
//!
//! The classes are frozen: methods may be called from any thread.

mod convert;
mod device;
mod engine;
mod errors;
mod export;
mod fds;
mod rebuild;
mod roots;
mod volume;

use pyo3::prelude::*;

#[pyfunction]
fn version() -> &'static str {
    env!("CARGO_PKG_VERSION")
}

/// CRC-32C of `data`.
#[pyfunction]
#[pyo3(signature = (data, /))]
fn crc32c(py: Python<'_>, data: &[u8]) -> u32 {
    py.detach(|| vhostd_engine::crc::crc32c(data))
}

#[pymodule]
fn _native(module: &Bound<'_, PyModule>) -> PyResult<()> {
    module.add_function(wrap_pyfunction!(version, module)?)?;
    module.add_function(wrap_pyfunction!(crc32c, module)?)?;
    module.add_function(wrap_pyfunction!(device::format_device, module)?)?;
    module.add_class::<engine::Engine>()?;
    module.add_class::<device::Device>()?;
    module.add_class::<volume::Volume>()?;
    module.add_class::<export::Export>()
}
