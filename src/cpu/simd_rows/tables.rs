//! Byte-shuffle controls for 8 values of 16 or 8 bits, indexed by 8 bits of a bitmap.

/// 256 controls of 16 bytes for `pshufb`: bytes `2i` and `2i + 1` of an entry say where value i comes from; 0x80
/// writes zero.
#[repr(C, align(64))]
pub(crate) struct Shuffles(pub(crate) [[u8; 16]; 256]);

const ZERO: u8 = 0x80;

/// Packed values to channels: channel i takes the value whose rank is the number of set bits below i.
pub(crate) static EXPAND: Shuffles = shuffles(true);

/// Channels to packed values: the inverse of [`EXPAND`].
pub(crate) static PACK: Shuffles = shuffles(false);

/// As [`EXPAND`], for bytes.
pub(crate) static EXPAND_CODES: [[u8; 8]; 256] = {
    let (mut table, mut bits) = ([[ZERO; 8]; 256], 0);
    while bits < 256 {
        let mut channel = 0;
        while channel < 8 {
            let control = EXPAND.0[bits][2 * channel];
            table[bits][channel] = if control == ZERO { ZERO } else { control / 2 };
            channel += 1;
        }
        bits += 1;
    }
    table
};

/// For each byte of a bitmap, where each 16-bit element comes from.
const fn shuffles(to_channels: bool) -> Shuffles {
    let mut table = [[ZERO; 16]; 256];
    let mut bits = 0;
    while bits < 256 {
        let (mut channel, mut rank) = (0, 0);
        while channel < 8 {
            if bits >> channel & 1 == 1 {
                let (to, from) = if to_channels { (channel, rank) } else { (rank, channel) };
                table[bits][2 * to] = 2 * from as u8;
                table[bits][2 * to + 1] = 2 * from as u8 + 1;
                rank += 1;
            }
            channel += 1;
        }
        bits += 1;
    }
    Shuffles(table)
}
