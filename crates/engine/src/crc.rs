//! CRC-32C (Castagnoli), the one checksum of the store: blocks, headers, nodes, superblocks.

use crc_fast::{CrcAlgorithm, checksum};

/// CRC-32C of `bytes` (RFC 3720, appendix B.4: reflected, initial and final value all ones).
#[must_use]
pub fn crc32c(bytes: &[u8]) -> u32 {
    // The algorithm yields 32 bits in a 64-bit type.
    checksum(CrcAlgorithm::Crc32Iscsi, bytes) as u32
}

/// Of a block of zeroes.
pub const ZERO_BLOCK_CRC: u32 = 0x98f9_4189;

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn rfc3720_vectors() {
        assert_eq!(crc32c(b"123456789"), 0xe306_9283);
        assert_eq!(crc32c(&[0; 32]), 0x8a91_36aa);
        assert_eq!(crc32c(&[0xff; 32]), 0x62a8_ab43);
        assert_eq!(crc32c(&[0; crate::types::BLOCK_BYTES]), ZERO_BLOCK_CRC);
    }
}
