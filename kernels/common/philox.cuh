// Counter-based random numbers: Philox-4x32-10 (Salmon et al. 2011, section 3.3), the bits of src/rng.rs.
#pragma once

// Names a stream: the words that `Stream::words` gives.
struct Stream {
    u32 key0, key1, hi0, hi1;
};

// Block `index` of a stream: four words.
__device__ __forceinline__ void philox(u32 (&c)[4], u64 index, const Stream &s) {
    c[0] = u32(index), c[1] = u32(index >> 32), c[2] = s.hi0, c[3] = s.hi1;
    u32 k0 = s.key0, k1 = s.key1;
#pragma unroll
    for (int round = 0; round < 10; round++) {
        const u32 high0 = __umulhi(c[0], 0xD2511F53u), low0 = c[0] * 0xD2511F53u;
        const u32 high1 = __umulhi(c[2], 0xCD9E8D57u), low1 = c[2] * 0xCD9E8D57u;
        const u32 c1 = c[1], c3 = c[3];
        c[0] = high1 ^ c1 ^ k0, c[1] = low1, c[2] = high0 ^ c3 ^ k1, c[3] = low0;
        k0 += 0x9E3779B9u, k1 += 0xBB67AE85u;
    }
}

// Four lanes hold four words each: afterwards lane q of them holds word q of lane 0 .. 3.
__device__ __forceinline__ void turn_words(u32 (&w)[4]) {
    const u32 lane = threadIdx.x % 4;
#pragma unroll
    for (int bit = 1; bit <= 2; bit *= 2) {
        const bool upper = lane & bit;
#pragma unroll
        for (int i = 0; i < 4; i++) {
            if (i & bit) continue;
            const u32 other = __shfl_xor_sync(0xffffffffu, upper ? w[i] : w[i + bit], bit);
            if (upper) {
                w[i] = other;
            } else {
                w[i + bit] = other;
            }
        }
    }
}
