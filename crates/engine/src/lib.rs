//! The engine of vhostd: what runs once per request or once per block.
//!
//! Dependencies point one way: `worker` → `ring`, `request`, `volume`; `volume` → `map`, `log`;
//! `log` → `segment`, `io`; `device` → `segment`, `io`. `ring` knows nothing of `log`; `segment`
//! does no I/O; `io` is a trait with an io_uring implementation, which finds its files through
//! `device`, and a simulated one.

pub mod crc;
pub mod device;
pub mod io;
pub mod log;
pub mod map;
pub mod request;
pub mod ring;
pub mod segment;
pub mod types;
pub mod volume;
pub mod worker;
