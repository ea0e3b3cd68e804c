//! Survives a front-end that truncates the file behind guest memory.
//!
//! Touching a mapped page beyond the end of its file raises SIGBUS, which would end the daemon and
//! with it every other guest's disks. The handler here replaces the *whole* mapping in which the
//! fault lies by anonymous zero pages and marks it lost; the thread that faulted goes on, and the
//! worker stops the session when it sees the mark. The whole mapping, not the page: a guest could
//! otherwise make us split one mapping into more pieces than the kernel allows a process.
//!
//! Invariants:
//! - The table of mappings is fixed in size and read by the handler without locks: each slot is a
//!   sequence lock (odd version: being written).
//! - A slot is registered after its mapping exists and released before it is unmapped; whoever
//!   touches a mapping keeps it alive, so a fault's own slot never changes under the handler.
//! - Faults elsewhere go to the handler that was installed before, or end the process as usual.
//!
//! Any thread may register and release. io_uring does not come here: it completes with EFAULT.

use std::io;
use std::ptr;
use std::sync::atomic::{AtomicBool, AtomicU64, AtomicUsize, Ordering, fence};
use std::sync::{Mutex, OnceLock, PoisonError};

/// Mappings of guest memory in one process: 32 sessions with as many regions as the protocol
/// allows, or thousands with the usual few.
const SLOTS: usize = 16384;

struct Slot {
    /// Even: start and end are consistent. Odd: being changed.
    version: AtomicU64,
    /// First byte of the mapping; 0: the slot is free.
    start: AtomicUsize,
    end: AtomicUsize,
    lost: AtomicBool,
}

static TABLE: [Slot; SLOTS] = [const {
    Slot {
        version: AtomicU64::new(0),
        start: AtomicUsize::new(0),
        end: AtomicUsize::new(0),
        lost: AtomicBool::new(false),
    }
}; SLOTS];

/// Free slots and the number of slots ever used; taken by registration, never by the handler.
static FREE: Mutex<Vec<usize>> = Mutex::new(Vec::new());
/// Slots from here on were never used; bounds the handler's search.
static USED: AtomicUsize = AtomicUsize::new(0);
static LOSSES: AtomicU64 = AtomicU64::new(0);
static PREVIOUS: OnceLock<Result<Previous, i32>> = OnceLock::new();

struct Previous(libc::sigaction);

// SAFETY: a sigaction is plain data: numbers and the address of a function.
unsafe impl Send for Previous {}
// SAFETY: as above; it is never changed after it was stored.
unsafe impl Sync for Previous {}

/// How many mappings this process has lost. Cheap to compare on every turn of a worker; when it
/// has grown, the worker asks each of its memory tables.
#[must_use]
pub fn losses() -> u64 {
    LOSSES.load(Ordering::Acquire)
}

/// A mapping known to the handler. Its owner calls `release` before it unmaps.
#[derive(Debug)]
pub(super) struct Registration {
    slot: usize,
}

impl Registration {
    /// Registers `start..start + len`, which is mapped, and installs the handler if this is the
    /// first mapping of the process.
    pub(super) fn new(start: usize, len: usize) -> io::Result<Self> {
        install()?;
        let slot = {
            let mut free = FREE.lock().unwrap_or_else(PoisonError::into_inner);
            match free.pop() {
                Some(slot) => slot,
                None => {
                    let slot = USED.load(Ordering::Relaxed);
                    if slot == SLOTS {
                        return Err(io::Error::from_raw_os_error(libc::ENOMEM));
                    }
                    USED.store(slot + 1, Ordering::Release);
                    slot
                }
            }
        };
        TABLE[slot].lost.store(false, Ordering::Relaxed);
        TABLE[slot].write(start, start + len);
        Ok(Self { slot })
    }

    pub(super) fn lost(&self) -> bool {
        TABLE[self.slot].lost.load(Ordering::Acquire)
    }

    /// Forgets the mapping; once only.
    pub(super) fn release(&mut self) {
        TABLE[self.slot].write(0, 0);
        FREE.lock()
            .unwrap_or_else(PoisonError::into_inner)
            .push(self.slot);
    }
}

impl Slot {
    /// Only the owner of the slot's registration writes, so there is one writer at a time.
    fn write(&self, start: usize, end: usize) {
        let version = self.version.load(Ordering::Relaxed);
        self.version.store(version + 1, Ordering::Relaxed);
        fence(Ordering::Release);
        self.start.store(start, Ordering::Relaxed);
        self.end.store(end, Ordering::Relaxed);
        self.version.store(version + 2, Ordering::Release);
    }

    /// The range, or nothing if the slot is free or being changed: in neither case can it be the
    /// mapping a thread has just faulted on.
    fn read(&self) -> Option<(usize, usize)> {
        let before = self.version.load(Ordering::Acquire);
        let range = (
            self.start.load(Ordering::Relaxed),
            self.end.load(Ordering::Relaxed),
        );
        fence(Ordering::Acquire);
        let after = self.version.load(Ordering::Relaxed);
        (before == after && before.is_multiple_of(2) && range.0 != 0).then_some(range)
    }
}

fn install() -> io::Result<()> {
    let installed = PREVIOUS.get_or_init(|| {
        // SAFETY: sigaction is plain data for which zeroes are valid; the first call only reads
        // the action in force. The handler does nothing but atomics and system calls.
        unsafe {
            let mut previous: libc::sigaction = std::mem::zeroed();
            if libc::sigaction(libc::SIGBUS, ptr::null(), &raw mut previous) != 0 {
                return Err(*libc::__errno_location());
            }
            Ok(Previous(previous))
        }
    });
    if let Err(code) = installed {
        return Err(io::Error::from_raw_os_error(*code));
    }
    // The previous action is stored before ours is in force: the handler finds it at any time.
    static OURS: OnceLock<i32> = OnceLock::new();
    let code = *OURS.get_or_init(|| {
        // SAFETY: as above; `on_sigbus` has the signature SA_SIGINFO asks for.
        unsafe {
            let mut action: libc::sigaction = std::mem::zeroed();
            action.sa_sigaction = on_sigbus as *const () as usize;
            action.sa_flags = libc::SA_SIGINFO | libc::SA_ONSTACK;
            libc::sigemptyset(&raw mut action.sa_mask);
            if libc::sigaction(libc::SIGBUS, &raw const action, ptr::null_mut()) == 0 {
                0
            } else {
                *libc::__errno_location()
            }
        }
    });
    if code == 0 {
        Ok(())
    } else {
        Err(io::Error::from_raw_os_error(code))
    }
}

/// Runs on the thread that faulted, at any point of its work: no locks, no allocation, errno kept.
extern "C" fn on_sigbus(
    signal: libc::c_int,
    info: *mut libc::siginfo_t,
    context: *mut libc::c_void,
) {
    // SAFETY: the kernel passes a valid siginfo; si_addr is meaningful for SIGBUS.
    let (code, address) = unsafe { ((*info).si_code, (*info).si_addr() as usize) };
    // A poisoned page (BUS_MCEERR_*) is a hardware failure, not a truncated file.
    if code == libc::BUS_ADRERR && replace_mapping_at(address) {
        return;
    }
    chain(signal, info, context);
}

fn replace_mapping_at(address: usize) -> bool {
    let used = USED.load(Ordering::Acquire).min(SLOTS);
    for slot in &TABLE[..used] {
        let Some((start, end)) = slot.read() else {
            continue;
        };
        if !(start..end).contains(&address) {
            continue;
        }
        // SAFETY: the range is one whole mapping of guest memory, kept alive by the thread that
        // faulted in it. It is only ever accessed through raw pointers, for which any content is
        // as good as another; errno is saved because the interrupted code may be about to read it.
        let replaced = unsafe {
            let errno = *libc::__errno_location();
            let result = libc::mmap(
                start as *mut libc::c_void,
                end - start,
                libc::PROT_READ | libc::PROT_WRITE,
                libc::MAP_FIXED | libc::MAP_ANONYMOUS | libc::MAP_PRIVATE | libc::MAP_NORESERVE,
                -1,
                0,
            );
            *libc::__errno_location() = errno;
            result != libc::MAP_FAILED
        };
        if replaced {
            slot.lost.store(true, Ordering::Release);
            LOSSES.fetch_add(1, Ordering::AcqRel);
        }
        return replaced;
    }
    false
}

fn chain(signal: libc::c_int, info: *mut libc::siginfo_t, context: *mut libc::c_void) {
    let previous = match PREVIOUS.get() {
        Some(Ok(previous)) => previous.0,
        // SAFETY: zeroes are a valid sigaction and mean the default action.
        _ => unsafe { std::mem::zeroed() },
    };
    // SAFETY: the handler address and its flags were read together from the kernel; calling it
    // with our own arguments is what the kernel would have done. Without a handler the default
    // action is put back: on return the faulting instruction runs again and the process ends
    // with SIGBUS, as it would have without us.
    unsafe {
        match previous.sa_sigaction {
            libc::SIG_DFL | libc::SIG_IGN => {
                let mut default: libc::sigaction = std::mem::zeroed();
                default.sa_sigaction = libc::SIG_DFL;
                libc::sigaction(signal, &raw const default, ptr::null_mut());
            }
            handler if previous.sa_flags & libc::SA_SIGINFO != 0 => {
                let handler: extern "C" fn(libc::c_int, *mut libc::siginfo_t, *mut libc::c_void) =
                    std::mem::transmute(handler);
                handler(signal, info, context);
            }
            handler => {
                let handler: extern "C" fn(libc::c_int) = std::mem::transmute(handler);
                handler(signal);
            }
        }
    }
}
