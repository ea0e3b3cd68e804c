//! Placeholder with the agreed interface until the map lands: replace this folder whole.
use crate::types::*;
use std::collections::BTreeMap;
pub const LEAF_BLOCKS: u64 = 1024;
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct NodeLocation {
    pub segment: SegmentNumber,
    pub offset_bytes: u32,
    pub len_bytes: u32,
    pub checksum: u32,
}
#[derive(Debug)]
pub struct NeedNode(pub NodeLocation);
#[derive(Clone, Copy, Debug)]
pub struct Displaced {
    pub address: Address,
    pub count: u32,
}
#[derive(Debug, Clone, Copy)]
pub enum Extent {
    Hole {
        block: BlockNumber,
        count: u32,
    },
    Mapped {
        block: BlockNumber,
        count: u32,
        address: Address,
        first_crc: usize,
    },
}
#[derive(Debug, Default)]
pub struct Extents {
    pub extents: Vec<Extent>,
    pub checksums: Vec<u32>,
}
#[derive(Debug)]
pub enum CheckpointProgress {
    More,
    Done { root: Option<NodeLocation> },
}
#[derive(Debug)]
pub struct Map {
    e: BTreeMap<u64, (u64, u32)>,
    need: Option<NodeLocation>,
    frozen: Option<Vec<u8>>,
    dirty: bool,
    root: Option<NodeLocation>,
    dead: Vec<NodeLocation>,
}
impl Map {
    pub fn open(root: Option<NodeLocation>, _mapped: u64) -> Map {
        Map {
            e: BTreeMap::new(),
            need: root,
            frozen: None,
            dirty: false,
            root,
            dead: vec![],
        }
    }
    fn chk(&self) -> Result<(), NeedNode> {
        match self.need {
            Some(n) => Err(NeedNode(n)),
            None => Ok(()),
        }
    }
    pub fn lookup(&mut self, b: BlockNumber, n: u32, out: &mut Extents) -> Result<(), NeedNode> {
        self.chk()?;
        out.extents.clear();
        out.checksums.clear();
        for i in b.0..b.0 + n as u64 {
            match self.e.get(&i) {
                None => out.extents.push(Extent::Hole {
                    block: BlockNumber(i),
                    count: 1,
                }),
                Some(&(a, c)) => {
                    out.checksums.push(c);
                    out.extents.push(Extent::Mapped {
                        block: BlockNumber(i),
                        count: 1,
                        address: Address::from_bits(a),
                        first_crc: out.checksums.len() - 1,
                    })
                }
            }
        }
        Ok(())
    }
    pub fn ensure_resident(&mut self, _: BlockNumber, _: u32) -> Result<(), NeedNode> {
        self.chk()
    }
    pub fn insert(
        &mut self,
        b: BlockNumber,
        a: Address,
        crcs: &[u32],
        d: &mut Vec<Displaced>,
    ) -> Result<(), NeedNode> {
        self.chk()?;
        self.dirty = true;
        for (i, c) in crcs.iter().enumerate() {
            if let Some(o) = self.e.insert(b.0 + i as u64, (a.plus(i as u32).bits(), *c)) {
                d.push(Displaced {
                    address: Address::from_bits(o.0),
                    count: 1,
                })
            }
        }
        Ok(())
    }
    pub fn remove(
        &mut self,
        b: BlockNumber,
        n: u32,
        d: &mut Vec<Displaced>,
    ) -> Result<(), NeedNode> {
        self.chk()?;
        self.dirty = true;
        for i in b.0..b.0 + n as u64 {
            if let Some(o) = self.e.remove(&i) {
                d.push(Displaced {
                    address: Address::from_bits(o.0),
                    count: 1,
                })
            }
        }
        Ok(())
    }
    pub fn next_mapped(
        &mut self,
        f: BlockNumber,
        e: BlockNumber,
    ) -> Result<Option<BlockNumber>, NeedNode> {
        self.chk()?;
        if f >= e {
            return Ok(None);
        }
        Ok(self.e.range(f.0..e.0).next().map(|x| BlockNumber(*x.0)))
    }
    pub fn supply(
        &mut self,
        l: NodeLocation,
        bytes: &[u8],
    ) -> Result<(), crate::segment::FormatError> {
        if bytes.len() != l.len_bytes as usize || crate::crc::crc32c(bytes) != l.checksum {
            return Err(crate::segment::FormatError::Checksum("node"));
        }
        let n = u64::from_le_bytes(bytes[..8].try_into().expect("8")) as usize;
        for c in bytes[8..8 + n * 20].chunks(20) {
            self.e.insert(
                u64::from_le_bytes(c[..8].try_into().expect("8")),
                (
                    u64::from_le_bytes(c[8..16].try_into().expect("8")),
                    u32::from_le_bytes(c[16..].try_into().expect("4")),
                ),
            );
        }
        self.need = None;
        Ok(())
    }
    pub fn mapped_blocks(&self) -> u64 {
        self.e.len() as u64
    }
    pub fn memory_bytes(&self) -> usize {
        self.e.len() * 20
    }
    pub fn dirty_bytes(&self) -> usize {
        if self.dirty { 1 } else { 0 }
    }
    pub fn evict(&mut self, _: usize) {}
    pub fn begin_checkpoint(&mut self) {
        if self.dirty {
            let mut v = (self.e.len() as u64).to_le_bytes().to_vec();
            for (k, (a, c)) in &self.e {
                v.extend(k.to_le_bytes());
                v.extend(a.to_le_bytes());
                v.extend(c.to_le_bytes());
            }
            while v.len() % 8 != 0 {
                v.push(0)
            }
            self.frozen = Some(v);
            self.dirty = false;
        }
    }
    pub fn write_nodes(
        &mut self,
        s: SegmentNumber,
        o: u32,
        space: u32,
        out: &mut Vec<u8>,
    ) -> CheckpointProgress {
        match &self.frozen {
            None => CheckpointProgress::Done { root: self.root },
            Some(v) if v.len() > space as usize => CheckpointProgress::More,
            Some(v) => {
                out.extend(v);
                if let Some(r) = self.root {
                    self.dead.push(r)
                }
                self.root = Some(NodeLocation {
                    segment: s,
                    offset_bytes: o,
                    len_bytes: v.len() as u32,
                    checksum: crate::crc::crc32c(v),
                });
                CheckpointProgress::Done { root: self.root }
            }
        }
    }
    pub fn finish_checkpoint(&mut self) {
        self.frozen = None
    }
    pub fn abort_checkpoint(&mut self) {
        if self.frozen.take().is_some() {
            self.dirty = true
        }
    }
    pub fn take_dead_nodes(&mut self, o: &mut Vec<NodeLocation>) {
        o.append(&mut self.dead)
    }
    pub fn relocate(&mut self, _: u8, _: BlockNumber, _: NodeLocation) -> Result<bool, NeedNode> {
        Ok(false)
    }
}
