//! Counter-based random numbers: Philox-4x32-10. No generator state exists, so a resumed run draws what it would have drawn.
//!
//! Source: Salmon et al. 2011, "Parallel random numbers: as easy as 1, 2, 3", section 3.3.

/// A stream of random numbers fixed by a key; a value depends on the key and its index alone.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Stream {
    key: [u32; 2],
    hi: [u32; 2],
}

/// Ten rounds of Philox-4x32.
pub fn philox(mut c: [u32; 4], mut k: [u32; 2]) -> [u32; 4] {
    for round in 0..10 {
        if round > 0 {
            k = [k[0].wrapping_add(0x9E37_79B9), k[1].wrapping_add(0xBB67_AE85)];
        }
        let p0 = u64::from(c[0]) * 0xD251_1F53;
        let p1 = u64::from(c[2]) * 0xCD9E_8D57;
        c = [(p1 >> 32) as u32 ^ c[1] ^ k[0], p1 as u32, (p0 >> 32) as u32 ^ c[3] ^ k[1], p0 as u32];
    }
    c
}

/// [`philox`] of `N` counters side by side: word by word, a counter in the low half of each lane. The upper halves of what comes back
/// are whatever they are. No lane waits for another, so a loop over them becomes vectors.
#[inline(always)]
#[allow(clippy::needless_range_loop, reason = "a lane is an index into four arrays")]
pub fn philox_lanes<const N: usize>(mut c: [[u64; N]; 4], mut k: [u32; 2]) -> [[u64; N]; 4] {
    const LOW: u64 = 0xffff_ffff;
    for round in 0..10 {
        if round > 0 {
            k = [k[0].wrapping_add(0x9E37_79B9), k[1].wrapping_add(0xBB67_AE85)];
        }
        let [k0, k1] = k.map(u64::from);
        for l in 0..N {
            // Products of two halves: the upper halves do not take part, so nothing has to clear them.
            let p0 = (c[0][l] & LOW).wrapping_mul(0xD251_1F53);
            let p1 = (c[2][l] & LOW).wrapping_mul(0xCD9E_8D57);
            (c[0][l], c[1][l], c[2][l], c[3][l]) = ((p1 >> 32) ^ c[1][l] ^ k0, p1, (p0 >> 32) ^ c[3][l] ^ k1, p0);
        }
    }
    c
}

/// Mixes words into one 64-bit key (SplitMix64 finaliser over a running state), for naming streams.
pub fn mix(words: &[u64]) -> u64 {
    let mut state = 0x9E37_79B9_7F4A_7C15_u64;
    for &w in words {
        state = state.wrapping_add(w).wrapping_add(0x9E37_79B9_7F4A_7C15);
        state = (state ^ (state >> 30)).wrapping_mul(0xBF58_476D_1CE4_E5B9);
        state = (state ^ (state >> 27)).wrapping_mul(0x94D0_49BB_1331_11EB);
        state ^= state >> 31;
    }
    state
}

impl Stream {
    /// The stream named by `words`, for example `[seed, purpose, epoch, dataset]`.
    pub fn new(words: &[u64]) -> Self {
        let a = mix(words);
        let b = mix(&[a, 1]);
        Self { key: [a as u32, (a >> 32) as u32], hi: [b as u32, (b >> 32) as u32] }
    }

    /// What names the stream, for a device that draws from it: the key of Philox, then the upper half of its counter.
    pub fn words(&self) -> [u32; 4] {
        [self.key[0], self.key[1], self.hi[0], self.hi[1]]
    }

    /// Four 32-bit words at block `index`.
    pub fn block(&self, index: u64) -> [u32; 4] {
        philox([index as u32, (index >> 32) as u32, self.hi[0], self.hi[1]], self.key)
    }

    /// The blocks from `first` on, `N` of them in their order: words 0 and 1 of a block in `[0]`, 2 and 3 in `[1]`, the earlier one in
    /// the low half.
    #[inline(always)]
    pub fn blocks<const N: usize>(&self, first: u64) -> [[u64; N]; 2] {
        let (mut low, mut high) = ([0; N], [0; N]);
        for l in 0..N {
            let index = first.wrapping_add(l as u64);
            (low[l], high[l]) = (index, index >> 32);
        }
        let [a, b, c, d] = philox_lanes([low, high, [self.hi[0].into(); N], [self.hi[1].into(); N]], self.key);
        let mut pairs = [[0; N]; 2];
        for l in 0..N {
            pairs[0][l] = a[l] & 0xffff_ffff | b[l] << 32;
            pairs[1][l] = c[l] & 0xffff_ffff | d[l] << 32;
        }
        pairs
    }

    /// 64 random bits at `index`.
    pub fn u64_at(&self, index: u64) -> u64 {
        let b = self.block(index / 2);
        let at = (index % 2) as usize * 2;
        u64::from(b[at]) | u64::from(b[at + 1]) << 32
    }

    /// What [`Stream::u64_at`] gives at `first` and after it, many times faster: blocks side by side, in the widest vectors there are.
    pub fn fill(&self, first: u64, out: &mut [u64]) {
        let out = match out {
            [own, rest @ ..] if first % 2 == 1 => {
                *own = self.u64_at(first);
                rest
            }
            _ => out,
        };
        let block = first.div_ceil(2);
        #[cfg(target_arch = "x86_64")]
        {
            #[target_feature(enable = "avx512f,avx512dq,avx512vl")]
            fn avx512(s: &Stream, block: u64, out: &mut [u64]) {
                s.fill_blocks(block, out);
            }
            #[target_feature(enable = "avx2")]
            fn avx2(s: &Stream, block: u64, out: &mut [u64]) {
                s.fill_blocks(block, out);
            }
            let has_512 = is_x86_feature_detected!("avx512f") && is_x86_feature_detected!("avx512vl");
            if has_512 && is_x86_feature_detected!("avx512dq") {
                // SAFETY: the processor has the features.
                return unsafe { avx512(self, block, out) };
            }
            if is_x86_feature_detected!("avx2") {
                // SAFETY: as above.
                return unsafe { avx2(self, block, out) };
            }
        }
        self.fill_blocks(block, out);
    }

    #[inline(always)]
    fn fill_blocks(&self, first: u64, out: &mut [u64]) {
        const SIDE: usize = 32;
        for (i, out) in out.chunks_mut(2 * SIDE).enumerate() {
            let [low, high] = self.blocks::<SIDE>(first.wrapping_add((i * SIDE) as u64));
            let mut both = [0; 2 * SIDE];
            for j in 0..SIDE {
                (both[2 * j], both[2 * j + 1]) = (low[j], high[j]);
            }
            out.copy_from_slice(&both[..out.len()]);
        }
    }

    /// Uniform in [0, 1) with 53 bits, at `index`.
    pub fn f64_at(&self, index: u64) -> f64 {
        uniform(self.u64_at(index))
    }

    /// Standard normal at `index`.
    pub fn normal_at(&self, index: u64) -> f64 {
        normal(self.u64_at(2 * index), self.u64_at(2 * index + 1))
    }

    /// A permutation of `0..n` (Fisher & Yates with multiply-shift draws; the bias is below n/2^64).
    pub fn permutation(&self, n: usize) -> Vec<u32> {
        let mut p: Vec<u32> = (0..u32::try_from(n).expect("a permutation fits u32")).collect();
        // Draws of many places at once: the swaps, which wait for memory, then follow each other without a draw in between.
        let mut draws = [0; 512];
        let mut end = n;
        while end > 1 {
            let first = end.saturating_sub(draws.len()).max(1);
            let draws = &mut draws[..end - first];
            self.fill(first as u64, draws);
            for (i, &draw) in (first..end).zip(&*draws).rev() {
                let j = (u128::from(draw) * (i as u128 + 1)) >> 64;
                p.swap(i, j as usize);
            }
            end = first;
        }
        p
    }
}

/// Uniform in [0, 1), with 53 of these bits.
pub fn uniform(bits: u64) -> f64 {
    (bits >> 11) as f64 / (1u64 << 53) as f64
}

/// Standard normal from two times 64 bits (Box & Muller 1958).
pub fn normal(first: u64, second: u64) -> f64 {
    (-2.0 * (1.0 - uniform(first)).ln()).sqrt() * (std::f64::consts::TAU * uniform(second)).cos()
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Known answers of the Random123 distribution (kat_vectors, philox4x32 10).
    #[test]
    fn philox_known_answers() {
        assert_eq!(philox([0; 4], [0; 2]), [0x6627_e8d5, 0xe169_c58d, 0xbc57_ac4c, 0x9b00_dbd8]);
        assert_eq!(philox([u32::MAX; 4], [u32::MAX; 2]), [0x408f_276d, 0x41c8_3b0e, 0xa20b_c7c6, 0x6d54_51fd]);
        assert_eq!(
            philox([0x243f_6a88, 0x85a3_08d3, 0x1319_8a2e, 0x0370_7344], [0xa409_3822, 0x299f_31d0]),
            [0xd16c_fe09, 0x94fd_cceb, 0x5001_e420, 0x2412_6ea1]
        );
    }

    #[test]
    fn blocks_side_by_side_are_those_drawn_one_by_one() {
        let s = Stream::new(&[3, 1]);
        for first in [0, 5, u64::from(u32::MAX) - 2, u64::MAX - 3] {
            let [low, high] = s.blocks::<8>(first);
            for l in 0..8 {
                let [a, b, c, d] = s.block(first.wrapping_add(l as u64)).map(u64::from);
                assert_eq!((low[l], high[l]), (a | b << 32, c | d << 32), "{first} {l}");
            }
        }
    }

    #[test]
    fn many_numbers_at_once_are_those_drawn_one_by_one() {
        let s = Stream::new(&[3, 2]);
        for (first, n) in [(0, 200), (7, 131), (8, 1), (5, 1), (4, 0), (1, 2), (u64::from(u32::MAX) * 2 - 9, 70)] {
            let (mut all, mut plain) = (vec![0; n], vec![0; n]);
            s.fill(first, &mut all);
            let expected: Vec<u64> = (first..).take(n).map(|i| s.u64_at(i)).collect();
            assert_eq!(all, expected, "{first} {n}");
            s.fill_blocks(first / 2, &mut plain);
            let expected: Vec<u64> = (first / 2 * 2..).take(n).map(|i| s.u64_at(i)).collect();
            assert_eq!(plain, expected, "{first} {n}");
        }
    }

    #[test]
    fn permutation_is_a_permutation_and_depends_on_the_key() {
        // One draw for each place, from the last on.
        for n in [0, 1, 2, 511, 512, 513, 514, 1500] {
            let s = Stream::new(&[1, n as u64]);
            let mut expected: Vec<u32> = (0..n as u32).collect();
            for i in (1..n).rev() {
                expected.swap(i, ((u128::from(s.u64_at(i as u64)) * (i as u128 + 1)) >> 64) as usize);
            }
            assert_eq!(s.permutation(n), expected, "{n}");
        }
        let a = Stream::new(&[1, 2]).permutation(1000);
        let mut sorted = a.clone();
        sorted.sort_unstable();
        assert!(sorted.iter().enumerate().all(|(i, &x)| i == x as usize));
        assert_ne!(a, Stream::new(&[1, 3]).permutation(1000));
        assert_eq!(a, Stream::new(&[1, 2]).permutation(1000));
    }

    #[test]
    fn moments() {
        let s = Stream::new(&[7]);
        let n = 20_000u64;
        let (mut m, mut v) = (0.0, 0.0);
        for i in 0..n {
            let x = s.normal_at(i);
            m += x;
            v += x * x;
        }
        assert!((m / n as f64).abs() < 0.03 && (v / n as f64 - 1.0).abs() < 0.05);
    }
}
