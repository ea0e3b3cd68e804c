//! The vhost-user front-end: connects, negotiates, shares memory, starts and stops rings.
//!
//! Message and feature numbers: vhost-user.rst ("Front-end message types", "Protocol features") and
//! virtio 1.3, 5.2.3 and 6. Blocking, and only before and after the load; one thread.

use std::io;
use std::mem::MaybeUninit;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::os::unix::net::UnixStream;
use std::path::Path;
use std::time::Duration;

use rustix::net::{
    RecvAncillaryBuffer, RecvAncillaryMessage, RecvFlags, SendAncillaryBuffer,
    SendAncillaryMessage, SendFlags, recvmsg, sendmsg,
};

use crate::error::Error;
use crate::memory::{GUEST_BASE, GuestMemory};
use crate::ring::Layout;

pub const F_BLK_RO: u64 = 1 << 5;
pub const F_BLK_BLK_SIZE: u64 = 1 << 6;
pub const F_BLK_FLUSH: u64 = 1 << 9;
pub const F_BLK_MQ: u64 = 1 << 12;
pub const F_RING_INDIRECT: u64 = 1 << 28;
pub const F_RING_EVENT_IDX: u64 = 1 << 29;
const F_PROTOCOL_FEATURES: u64 = 1 << 30;
const F_VERSION_1: u64 = 1 << 32;

const P_MQ: u64 = 1 << 0;
const P_REPLY_ACK: u64 = 1 << 3;
const P_CONFIG: u64 = 1 << 9;
const P_INFLIGHT_SHMFD: u64 = 1 << 12;

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[repr(u32)]
enum Message {
    GetFeatures = 1,
    SetFeatures = 2,
    SetOwner = 3,
    SetMemTable = 5,
    SetVringNum = 8,
    SetVringAddr = 9,
    SetVringBase = 10,
    GetVringBase = 11,
    SetVringKick = 12,
    SetVringCall = 13,
    GetProtocolFeatures = 15,
    SetProtocolFeatures = 16,
    GetQueueNum = 17,
    SetVringEnable = 18,
    GetConfig = 24,
    GetInflightFd = 31,
    SetInflightFd = 32,
}

const HEADER_BYTES: usize = 12;
const VERSION: u32 = 1;
const FLAG_REPLY: u32 = 1 << 2;
const FLAG_NEED_REPLY: u32 = 1 << 3;
/// Replies we ask for are shorter; longer ones are a broken back-end.
const MAX_REPLY_BYTES: usize = 512;
/// `struct virtio_blk_config` up to and with its write-zeroes fields (virtio 1.3, 5.2.4).
const CONFIG_BYTES: usize = 60;
/// A back-end that takes longer for a message than this is told to be dead.
const MESSAGE_TIMEOUT: Duration = Duration::from_secs(30);

pub struct Frontend {
    socket: UnixStream,
    reply_ack: bool,
    protocol_features: u64,
    inflight: Option<OwnedFd>,
    pub features: u64,
    pub capacity_bytes: u64,
    pub logical_block_bytes: u32,
}

/// What the load wants of the device; what is not offered is an error that names it.
#[derive(Clone, Copy)]
pub struct Wish {
    pub queues: u16,
    pub indirect: bool,
    pub event_idx: bool,
    pub write: bool,
    pub flush: bool,
}

impl Frontend {
    /// Connects and negotiates, up to the point where memory and rings can be set.
    pub fn connect(path: &Path, wish: Wish) -> Result<Self, Error> {
        let socket = UnixStream::connect(path).map_err(|source| Error::Connect {
            path: path.to_owned(),
            source,
        })?;
        socket.set_read_timeout(Some(MESSAGE_TIMEOUT))?;
        socket.set_write_timeout(Some(MESSAGE_TIMEOUT))?;
        let mut frontend = Self {
            socket,
            reply_ack: false,
            protocol_features: 0,
            inflight: None,
            features: 0,
            capacity_bytes: 0,
            logical_block_bytes: 512,
        };
        frontend.negotiate(wish)?;
        Ok(frontend)
    }

    fn negotiate(&mut self, wish: Wish) -> Result<(), Error> {
        let offered = self.ask_u64(Message::GetFeatures)?;
        self.tell(Message::SetOwner, &[], &[])?;
        let mut needed = F_VERSION_1 | F_PROTOCOL_FEATURES;
        for (wanted, bit) in [
            (wish.indirect, F_RING_INDIRECT),
            (wish.queues > 1, F_BLK_MQ),
            (wish.flush, F_BLK_FLUSH),
        ] {
            needed |= if wanted { bit } else { 0 };
        }
        if offered & needed != needed {
            return Err(Error::FeaturesMissing {
                missing: needed & !offered,
                offered,
            });
        }
        if wish.write && offered & F_BLK_RO != 0 {
            return Err(Error::ReadOnly);
        }
        // FLUSH is acknowledged whenever offered: without it a back-end must write through.
        // EVENT_IDX likewise, as every Linux guest does: without it some back-ends are kicked
        // once a request.
        let event_idx = if wish.event_idx { F_RING_EVENT_IDX } else { 0 };
        self.features = needed | (offered & (F_BLK_FLUSH | F_BLK_BLK_SIZE | F_BLK_RO | event_idx));

        let offered = self.ask_u64(Message::GetProtocolFeatures)?;
        self.protocol_features = offered & (P_MQ | P_REPLY_ACK | P_CONFIG | P_INFLIGHT_SHMFD);
        if self.protocol_features & P_CONFIG == 0 {
            return Err(Error::ConfigMissing { offered });
        }
        self.tell(
            Message::SetProtocolFeatures,
            &self.protocol_features.to_le_bytes(),
            &[],
        )?;
        self.reply_ack = self.protocol_features & P_REPLY_ACK != 0;
        if wish.queues > 1 {
            let queues = self.ask_u64(Message::GetQueueNum)?;
            if u64::from(wish.queues) > queues {
                return Err(Error::Queues {
                    wanted: wish.queues,
                    offered: queues,
                });
            }
        }
        self.read_config()?;
        self.tell(Message::SetFeatures, &self.features.to_le_bytes(), &[])
    }

    fn read_config(&mut self) -> Result<(), Error> {
        let mut request = [0; 12 + CONFIG_BYTES];
        request[4..8].copy_from_slice(&(CONFIG_BYTES as u32).to_le_bytes());
        let (reply, _) = self.ask(Message::GetConfig, &request)?;
        if reply.len() < 12 + CONFIG_BYTES {
            return Err(Error::Protocol(
                "GET_CONFIG was refused or answered too short".into(),
            ));
        }
        let config = &reply[12..];
        let sectors = u64::from_le_bytes(config[..8].try_into().unwrap_or_default());
        self.capacity_bytes = sectors
            .checked_mul(512)
            .ok_or_else(|| Error::Protocol("the capacity overflows 64 bits of bytes".into()))?;
        if self.features & F_BLK_BLK_SIZE != 0 {
            self.logical_block_bytes =
                u32::from_le_bytes(config[20..24].try_into().unwrap_or_default());
        }
        Ok(())
    }

    /// Gives the back-end our memory and, when it can keep one, an inflight region as QEMU does.
    pub fn share_memory(
        &mut self,
        memory: &GuestMemory,
        queues: u16,
        ring_size: u16,
    ) -> Result<(), Error> {
        if self.protocol_features & P_INFLIGHT_SHMFD != 0 {
            let mut request = [0; 20];
            request[16..18].copy_from_slice(&queues.to_le_bytes());
            request[18..20].copy_from_slice(&ring_size.to_le_bytes());
            let (reply, fd) = self.ask(Message::GetInflightFd, &request)?;
            let fd = fd
                .ok_or_else(|| Error::Protocol("GET_INFLIGHT_FD was answered without fd".into()))?;
            self.tell(Message::SetInflightFd, &reply, &[fd.as_fd()])?;
            self.inflight = Some(fd);
        }
        let mut table = Vec::with_capacity(40);
        table.extend_from_slice(&1_u32.to_le_bytes());
        table.extend_from_slice(&0_u32.to_le_bytes());
        for field in [GUEST_BASE, memory.len_bytes(), memory.user_base(), 0] {
            table.extend_from_slice(&field.to_le_bytes());
        }
        self.tell(Message::SetMemTable, &table, &[memory.fd()])
    }

    pub fn start_ring(
        &mut self,
        index: u16,
        size: u16,
        layout: Layout,
        user_base: u64,
        kick: BorrowedFd<'_>,
        call: BorrowedFd<'_>,
    ) -> Result<(), Error> {
        let index = u32::from(index);
        self.tell(Message::SetVringNum, &pair(index, u32::from(size)), &[])?;
        self.tell(Message::SetVringBase, &pair(index, 0), &[])?;
        let mut address = pair(index, 0).to_vec();
        for part in [layout.descriptors, layout.used, layout.available] {
            address.extend_from_slice(&(user_base + part as u64).to_le_bytes());
        }
        address.extend_from_slice(&0_u64.to_le_bytes());
        self.tell(Message::SetVringAddr, &address, &[])?;
        self.tell(
            Message::SetVringCall,
            &u64::from(index).to_le_bytes(),
            &[call],
        )?;
        self.tell(
            Message::SetVringKick,
            &u64::from(index).to_le_bytes(),
            &[kick],
        )?;
        self.tell(Message::SetVringEnable, &pair(index, 1), &[])
    }

    /// Stops a ring; the answer is the available index the back-end stopped at.
    pub fn stop_ring(&mut self, index: u16) -> Result<u16, Error> {
        let (reply, _) = self.ask(Message::GetVringBase, &pair(u32::from(index), 0))?;
        match reply.as_slice() {
            [_, _, _, _, low, high, ..] => Ok(u16::from_le_bytes([*low, *high])),
            _ => Err(Error::Protocol(
                "GET_VRING_BASE was answered too short".into(),
            )),
        }
    }

    /// True when the back-end closed the connection.
    pub fn hung_up(&self) -> bool {
        let mut byte = [0];
        let flags = RecvFlags::PEEK | RecvFlags::DONTWAIT;
        match rustix::net::recv(&self.socket, &mut byte, flags) {
            Ok((_, read_bytes)) => read_bytes == 0,
            Err(error) => error != rustix::io::Errno::AGAIN,
        }
    }

    fn send(
        &self,
        message: Message,
        flags: u32,
        payload: &[u8],
        fds: &[BorrowedFd<'_>],
    ) -> Result<(), Error> {
        let mut bytes = Vec::with_capacity(HEADER_BYTES + payload.len());
        for field in [message as u32, VERSION | flags, payload.len() as u32] {
            bytes.extend_from_slice(&field.to_le_bytes());
        }
        bytes.extend_from_slice(payload);
        let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(1))];
        let mut ancillary = SendAncillaryBuffer::new(&mut space);
        if !fds.is_empty() && !ancillary.push(SendAncillaryMessage::ScmRights(fds)) {
            return Err(Error::Protocol("more than one fd in a message".into()));
        }
        let parts = [io::IoSlice::new(&bytes)];
        let sent = sendmsg(&self.socket, &parts, &mut ancillary, SendFlags::NOSIGNAL).map_err(
            |error| Error::Message {
                what: format!("{message:?}"),
                source: error.into(),
            },
        )?;
        if sent != bytes.len() {
            return Err(Error::Protocol(format!(
                "{message:?} was sent only in part"
            )));
        }
        Ok(())
    }

    /// Sends a message that has no answer of its own; with REPLY_ACK its result is awaited.
    fn tell(
        &mut self,
        message: Message,
        payload: &[u8],
        fds: &[BorrowedFd<'_>],
    ) -> Result<(), Error> {
        if !self.reply_ack {
            return self.send(message, 0, payload, fds);
        }
        self.send(message, FLAG_NEED_REPLY, payload, fds)?;
        let (reply, _) = self.receive(message)?;
        match reply.iter().all(|byte| *byte == 0) {
            true => Ok(()),
            false => Err(Error::Protocol(format!("the back-end refused {message:?}"))),
        }
    }

    fn ask(
        &mut self,
        message: Message,
        payload: &[u8],
    ) -> Result<(Vec<u8>, Option<OwnedFd>), Error> {
        self.send(message, 0, payload, &[])?;
        self.receive(message)
    }

    fn ask_u64(&mut self, message: Message) -> Result<u64, Error> {
        let (reply, _) = self.ask(message, &[])?;
        let bytes = reply.as_slice().try_into().map_err(|_| {
            Error::Protocol(format!(
                "{message:?} was answered with {} bytes",
                reply.len()
            ))
        })?;
        Ok(u64::from_le_bytes(bytes))
    }

    fn receive(&self, message: Message) -> Result<(Vec<u8>, Option<OwnedFd>), Error> {
        let mut header = [0; HEADER_BYTES];
        let mut fd = self.receive_exactly(message, &mut header)?;
        let field = |at: usize| {
            u32::from_le_bytes([header[at], header[at + 1], header[at + 2], header[at + 3]])
        };
        let (request, flags, len_bytes) = (field(0), field(4), field(8) as usize);
        if request != message as u32 || flags & FLAG_REPLY == 0 || len_bytes > MAX_REPLY_BYTES {
            return Err(Error::Protocol(format!(
                "{message:?} was answered by request {request}, flags {flags:#x}, {len_bytes} bytes"
            )));
        }
        let mut payload = vec![0; len_bytes];
        if let Some(late) = self.receive_exactly(message, &mut payload)? {
            fd = Some(late);
        }
        Ok((payload, fd))
    }

    fn receive_exactly(
        &self,
        message: Message,
        bytes: &mut [u8],
    ) -> Result<Option<OwnedFd>, Error> {
        let failed = |source| Error::Message {
            what: format!("answer to {message:?}"),
            source,
        };
        let mut fd = None;
        let mut done = 0;
        while done < bytes.len() {
            let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(1))];
            let mut ancillary = RecvAncillaryBuffer::new(&mut space);
            let mut parts = [io::IoSliceMut::new(&mut bytes[done..])];
            let got = recvmsg(
                &self.socket,
                &mut parts,
                &mut ancillary,
                RecvFlags::CMSG_CLOEXEC,
            )
            .map_err(|error| failed(error.into()))?;
            for part in ancillary.drain() {
                if let RecvAncillaryMessage::ScmRights(fds) = part {
                    fd = fds.last().or(fd);
                }
            }
            if got.bytes == 0 {
                return Err(failed(io::ErrorKind::UnexpectedEof.into()));
            }
            done += got.bytes;
        }
        Ok(fd)
    }
}

fn pair(first: u32, second: u32) -> [u8; 8] {
    let mut bytes = [0; 8];
    bytes[..4].copy_from_slice(&first.to_le_bytes());
    bytes[4..].copy_from_slice(&second.to_le_bytes());
    bytes
}
