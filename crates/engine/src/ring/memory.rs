//! The guest memory table of a vhost-user session (vhost-user.rst, "Memory region description").
//!
//! A table is immutable: adding or removing a region makes a new one that shares the mappings of
//! the regions that stay. Whoever uses pointers into it holds its `Arc`, so memory stays mapped
//! until the last request that uses it has finished, whatever the front-end does meanwhile.
//!
//! Invariants:
//! - Regions do not overlap in guest-physical addresses, none wraps around, none is empty, and
//!   each lay inside its file when it was mapped. (A front-end may truncate the file later; see
//!   `sigbus`.)
//! - [`GuestMemory::translate`] returns ranges inside mappings, or an error.
//!
//! Every write we make to guest memory goes through a range handed out here or through a queue's
//! used ring: those are the two places where dirty logging belongs when migration comes.

use std::io;
use std::os::fd::{AsRawFd, OwnedFd};
use std::ptr;
use std::sync::Arc;

use super::sigbus::Registration;
use crate::io::IoBuf;

/// What vhost-user's ACPI memory slots allow (QEMU: 509), and what we answer to GET_MAX_MEM_SLOTS.
pub const MAX_REGIONS: usize = 509;

/// Why a memory table was refused or an address was.
#[derive(Debug, thiserror::Error)]
pub enum MemoryError {
    #[error("{count} memory regions; at most {MAX_REGIONS} are possible")]
    TooManyRegions { count: usize },
    #[error("memory region at guest address {guest_address:#x} has size 0")]
    ZeroSize { guest_address: u64 },
    #[error(
        "memory region at guest address {guest_address:#x}, {size_bytes:#x} bytes: {what} wraps around"
    )]
    WrapAround {
        guest_address: u64,
        size_bytes: u64,
        what: &'static str,
    },
    #[error("memory region at guest address {guest_address:#x} overlaps the one at {other:#x}")]
    Overlap { guest_address: u64, other: u64 },
    #[error(
        "memory region at guest address {guest_address:#x} ends at {end_bytes:#x} of its file, which has {file_bytes:#x} bytes"
    )]
    BeyondFile {
        guest_address: u64,
        end_bytes: u64,
        file_bytes: u64,
    },
    #[error(
        "memory region at guest address {guest_address:#x}: its file descriptor is not shared memory (a regular file, such as a memfd)"
    )]
    NotMemory { guest_address: u64 },
    #[error("memory region at guest address {guest_address:#x} cannot be mapped: {error}")]
    Map {
        guest_address: u64,
        error: io::Error,
    },
    #[error(
        "no memory region at guest address {guest_address:#x}, user address {user_address:#x}, {size_bytes:#x} bytes"
    )]
    NoSuchRegion {
        guest_address: u64,
        user_address: u64,
        size_bytes: u64,
    },
    #[error("guest address {address:#x}, {len_bytes} bytes: outside guest memory")]
    OutsideGuest { address: u64, len_bytes: u64 },
    #[error("user address {address:#x}, {len_bytes} bytes: not inside one memory region")]
    OutsideUser { address: u64, len_bytes: u64 },
}

/// One region as the front-end describes it. The file is needed only until it is mapped.
#[derive(Debug)]
pub struct RegionSpec {
    pub guest_address: u64,
    pub size_bytes: u64,
    pub user_address: u64,
    pub mmap_offset_bytes: u64,
    pub file: OwnedFd,
}

/// Guest memory of one session: at most [`MAX_REGIONS`] mappings, sorted by guest address.
#[derive(Debug, Default, Clone)]
pub struct GuestMemory {
    regions: Vec<Region>,
}

#[derive(Debug, Clone)]
struct Region {
    guest_address: u64,
    size_bytes: u64,
    user_address: u64,
    /// Host address of the region's first byte.
    host: *mut u8,
    mapping: Arc<Mapping>,
}

// SAFETY: `host` points into `mapping`, which lives as long as the region does; guest memory is
// accessed through raw pointers only, on any thread.
unsafe impl Send for Region {}
// SAFETY: as above.
unsafe impl Sync for Region {}

impl GuestMemory {
    /// Maps all regions of SET_MEM_TABLE.
    pub fn new(specs: Vec<RegionSpec>) -> Result<Self, MemoryError> {
        let mut memory = Self::default();
        if specs.len() > MAX_REGIONS {
            return Err(MemoryError::TooManyRegions { count: specs.len() });
        }
        for spec in specs {
            memory.insert(&spec)?;
        }
        Ok(memory)
    }

    /// This table and one region more (ADD_MEM_REG).
    pub fn with_region(&self, spec: &RegionSpec) -> Result<Self, MemoryError> {
        let mut memory = self.clone();
        memory.insert(spec)?;
        Ok(memory)
    }

    /// This table without the region that has exactly these addresses (REM_MEM_REG).
    pub fn without_region(
        &self,
        guest_address: u64,
        user_address: u64,
        size_bytes: u64,
    ) -> Result<Self, MemoryError> {
        let mut memory = self.clone();
        let at = memory
            .regions
            .iter()
            .position(|r| {
                (r.guest_address, r.user_address, r.size_bytes)
                    == (guest_address, user_address, size_bytes)
            })
            .ok_or(MemoryError::NoSuchRegion {
                guest_address,
                user_address,
                size_bytes,
            })?;
        memory.regions.remove(at);
        Ok(memory)
    }

    fn insert(&mut self, spec: &RegionSpec) -> Result<(), MemoryError> {
        let RegionSpec {
            guest_address,
            size_bytes,
            user_address,
            ..
        } = *spec;
        if self.regions.len() == MAX_REGIONS {
            return Err(MemoryError::TooManyRegions {
                count: MAX_REGIONS + 1,
            });
        }
        if size_bytes == 0 {
            return Err(MemoryError::ZeroSize { guest_address });
        }
        let wraps = |what| MemoryError::WrapAround {
            guest_address,
            size_bytes,
            what,
        };
        let guest_end = guest_address
            .checked_add(size_bytes)
            .ok_or_else(|| wraps("guest address"))?;
        user_address
            .checked_add(size_bytes)
            .ok_or_else(|| wraps("user address"))?;
        spec.mmap_offset_bytes
            .checked_add(size_bytes)
            .ok_or_else(|| wraps("file offset"))?;
        // User addresses may overlap: they are only the front-end's names for places, and one
        // piece of its memory can appear at two guest addresses.
        let at = self
            .regions
            .partition_point(|r| r.guest_address < guest_address);
        let before = at.checked_sub(1).map(|i| &self.regions[i]);
        let clash = before
            .filter(|r| r.guest_address + r.size_bytes > guest_address)
            .or_else(|| self.regions.get(at).filter(|r| r.guest_address < guest_end));
        if let Some(other) = clash {
            return Err(MemoryError::Overlap {
                guest_address,
                other: other.guest_address,
            });
        }
        let (mapping, host) = Mapping::new(spec)?;
        let region = Region {
            guest_address,
            size_bytes,
            user_address,
            host,
            mapping: Arc::new(mapping),
        };
        self.regions.insert(at, region);
        Ok(())
    }

    /// Appends the host memory of a guest-physical range to `out`: one piece, or several where
    /// the range crosses from one region to the next. On an error `out` may have grown.
    pub fn translate(
        &self,
        address: u64,
        len_bytes: u64,
        out: &mut Vec<IoBuf>,
    ) -> Result<(), MemoryError> {
        let (mut at, mut left) = (address, len_bytes);
        while left > 0 {
            let piece = self
                .piece(at, left)
                .ok_or(MemoryError::OutsideGuest { address, len_bytes })?;
            out.push(piece);
            left -= piece.len() as u64;
            // Inside a region whose end does not wrap, so neither does this.
            at += piece.len() as u64;
        }
        Ok(())
    }

    /// Copies from guest-physical memory, which may lie in several regions.
    pub fn read(&self, address: u64, to: &mut [u8]) -> Result<(), MemoryError> {
        let mut done = 0;
        while done < to.len() {
            let left = (to.len() - done) as u64;
            let piece = address
                .checked_add(done as u64)
                .and_then(|at| self.piece(at, left));
            let piece = piece.ok_or(MemoryError::OutsideGuest {
                address,
                len_bytes: to.len() as u64,
            })?;
            piece.copy_to(&mut to[done..done + piece.len()]);
            done += piece.len();
        }
        Ok(())
    }

    /// As much of `address..address + len` as lies in the region where it begins.
    fn piece(&self, address: u64, len_bytes: u64) -> Option<IoBuf> {
        let after = self.regions.partition_point(|r| r.guest_address <= address);
        let region = &self.regions[after.checked_sub(1)?];
        let offset = address - region.guest_address;
        let here = region
            .size_bytes
            .checked_sub(offset)
            .filter(|&n| n > 0)?
            .min(len_bytes);
        // SAFETY: offset + here ≤ size_bytes, all of which is mapped at `host`; the caller keeps
        // this table alive while it uses the piece.
        Some(unsafe { IoBuf::new(region.host.add(offset as usize), here as usize) })
    }

    /// Host memory of a range given in the front-end's addresses (SET_VRING_ADDR). It must lie in
    /// one region: a ring is accessed through one pointer.
    pub fn user_range(&self, address: u64, len_bytes: u64) -> Result<IoBuf, MemoryError> {
        for region in &self.regions {
            let Some(offset) = address.checked_sub(region.user_address) else {
                continue;
            };
            if offset < region.size_bytes && len_bytes <= region.size_bytes - offset {
                // SAFETY: as in `piece`.
                return Ok(unsafe {
                    IoBuf::new(region.host.add(offset as usize), len_bytes as usize)
                });
            }
        }
        Err(MemoryError::OutsideUser { address, len_bytes })
    }

    /// Whether the front-end truncated the file of a region and zeroes have taken its place.
    #[must_use]
    pub fn lost(&self) -> Option<u64> {
        self.regions
            .iter()
            .find(|r| r.mapping.registration.lost())
            .map(|r| r.guest_address)
    }

    /// Number of regions.
    #[must_use]
    pub fn len(&self) -> usize {
        self.regions.len()
    }

    #[must_use]
    pub fn is_empty(&self) -> bool {
        self.regions.is_empty()
    }
}

/// One mmap, known to the SIGBUS handler while it lives.
#[derive(Debug)]
struct Mapping {
    start: usize,
    len: usize,
    /// Released in `drop`, before the memory is unmapped.
    registration: Registration,
}

impl Mapping {
    /// Maps the region's part of its file, widened to whole pages; returns the mapping and the
    /// address of the region's first byte.
    fn new(spec: &RegionSpec) -> Result<(Self, *mut u8), MemoryError> {
        let guest_address = spec.guest_address;
        let failed = |error| MemoryError::Map {
            guest_address,
            error,
        };
        let end_bytes = spec.mmap_offset_bytes + spec.size_bytes;
        let (file_bytes, page_bytes) = inspect(spec)?;
        if end_bytes > file_bytes {
            return Err(MemoryError::BeyondFile {
                guest_address,
                end_bytes,
                file_bytes,
            });
        }
        // Both ends are below the file's size, which fits i64, so widening cannot overflow.
        let first = spec.mmap_offset_bytes & !(page_bytes - 1);
        let len = (end_bytes - first).next_multiple_of(page_bytes) as usize;
        // SAFETY: a new mapping at an address of the kernel's choice; arguments are checked above
        // and a failure is handled.
        let start = unsafe {
            libc::mmap(
                ptr::null_mut(),
                len,
                libc::PROT_READ | libc::PROT_WRITE,
                libc::MAP_SHARED | libc::MAP_NORESERVE,
                spec.file.as_raw_fd(),
                first as libc::off_t,
            )
        };
        if start == libc::MAP_FAILED {
            return Err(failed(io::Error::last_os_error()));
        }
        let registration = match Registration::new(start as usize, len) {
            Ok(registration) => registration,
            Err(error) => {
                // SAFETY: mapped just above, and nobody else knows of it.
                unsafe { libc::munmap(start, len) };
                return Err(failed(error));
            }
        };
        // A core dump of the daemon should not hold the guests' memory.
        // SAFETY: the mapping is ours; a refusal changes nothing.
        unsafe { libc::madvise(start, len, libc::MADV_DONTDUMP) };
        let lead = (spec.mmap_offset_bytes - first) as usize;
        // SAFETY: lead < page_bytes ≤ len.
        let host = unsafe { start.cast::<u8>().add(lead) };
        Ok((
            Self {
                start: start as usize,
                len,
                registration,
            },
            host,
        ))
    }
}

impl Drop for Mapping {
    fn drop(&mut self) {
        self.registration.release();
        // SAFETY: mapped in `new`; whoever used pointers into it held the table that held this.
        unsafe { libc::munmap(self.start as *mut libc::c_void, self.len) };
    }
}

/// Size of the region's file and the page size its mappings are made of.
fn inspect(spec: &RegionSpec) -> Result<(u64, u64), MemoryError> {
    let guest_address = spec.guest_address;
    let failed = || MemoryError::Map {
        guest_address,
        error: io::Error::last_os_error(),
    };
    // SAFETY: both structures are plain data, filled by the kernel; results are checked.
    unsafe {
        let mut stat: libc::stat = std::mem::zeroed();
        if libc::fstat(spec.file.as_raw_fd(), &raw mut stat) != 0 {
            return Err(failed());
        }
        if stat.st_mode & libc::S_IFMT != libc::S_IFREG {
            return Err(MemoryError::NotMemory { guest_address });
        }
        let mut fs: libc::statfs = std::mem::zeroed();
        if libc::fstatfs(spec.file.as_raw_fd(), &raw mut fs) != 0 {
            return Err(failed());
        }
        // Offsets and lengths on hugetlbfs are multiples of its huge pages.
        let page_bytes = if fs.f_type == libc::HUGETLBFS_MAGIC {
            fs.f_bsize as u64
        } else {
            libc::sysconf(libc::_SC_PAGESIZE) as u64
        };
        Ok((stat.st_size as u64, page_bytes))
    }
}
