// Instructions that sm_90a alone has, wrapped once: barriers in shared memory that count arrivals and bytes, copies of boxes of a
// matrix, products of a warpgroup (128 threads). PTX ISA 8.8. An instruction that must follow another stands with it in one wrapper.
#pragma once
#include "types.cuh"

// A matrix as the driver describes it for copies of boxes (cuTensorMapEncodeTiled).
struct __align__(64) TensorMap {
    u64 opaque[16];
};

// Makes the barrier at this address one of so many arrivals. `barriers_ready` and a barrier of the block come before anybody uses it.
__device__ __forceinline__ void barrier_init(u32 barrier, u32 arrivals) {
    asm volatile("mbarrier.init.shared::cta.b64 [%0], %1;" ::"r"(barrier), "r"(arrivals) : "memory");
}

// What barrier_init wrote is seen by the copy engine.
__device__ __forceinline__ void barriers_ready() { asm volatile("fence.mbarrier_init.release.cluster;" ::: "memory"); }

__device__ __forceinline__ void barrier_arrive(u32 barrier) {
    asm volatile("mbarrier.arrive.shared::cta.b64 _, [%0];" ::"r"(barrier) : "memory");
}

// Arrives, and lets the phase also wait for so many bytes of copies.
__device__ __forceinline__ void barrier_arrive_expect(u32 barrier, u32 bytes) {
    asm volatile("mbarrier.arrive.expect_tx.shared::cta.b64 _, [%0], %1;" ::"r"(barrier), "r"(bytes) : "memory");
}

// Arrives at a barrier of another block of the cluster, by an address of `in_block`. It says that products have read a buffer, which were
// waited for; nothing written is made visible to the other block, and a fence for that (`.release.cluster`) would stand in a loop.
__device__ __forceinline__ void barrier_arrive_there(u32 barrier) {
    asm volatile("mbarrier.arrive.shared::cluster.b64 _, [%0];" ::"r"(barrier) : "memory");
}

// Where another block of the cluster has what lies at this address of shared memory here.
__device__ __forceinline__ u32 in_block(u32 rank, u32 at) {
    u32 there;
    asm volatile("mapa.shared::cluster.u32 %0, %1, %2;" : "=r"(there) : "r"(at), "r"(rank));
    return there;
}

// Waits until all threads of the cluster are here, and see what the others wrote.
__device__ __forceinline__ void cluster_barrier() {
    asm volatile("barrier.cluster.arrive.release;\n"
                 "barrier.cluster.wait.acquire;" ::: "memory");
}

// Waits for the end of the phase of this parity: 0 for the first one.
__device__ __forceinline__ void barrier_wait(u32 barrier, u32 parity) {
    asm volatile("{\n"
                 ".reg .pred done;\n"
                 "AGAIN:\n"
                 "mbarrier.try_wait.parity.shared::cta.b64 done, [%0], %1;\n"
                 "@!done bra AGAIN;\n"
                 "}" ::"r"(barrier), "r"(parity) : "memory");
}

// Starts the copy of the map's box whose first element is (row, column); the barrier counts its bytes. Elements beyond the matrix
// become zero and count as well.
__device__ __forceinline__ void copy_box(u32 to, const TensorMap &map, u32 barrier, u32 column, u32 row) {
    asm volatile("cp.async.bulk.tensor.2d.shared::cluster.global.tile.mbarrier::complete_tx::bytes [%0], [%1, {%3, %4}], [%2];"
                 ::"r"(to), "l"(&map), "r"(barrier), "r"(column), "r"(row) : "memory");
}

// The same to the same place of every block of the cluster whose bit is set, each of which counts the bytes at its own barrier there.
__device__ __forceinline__ void copy_box_to_all(u32 to, const TensorMap &map, u32 barrier, u32 column, u32 row, u16 blocks) {
    asm volatile("cp.async.bulk.tensor.2d.shared::cluster.global.tile.mbarrier::complete_tx::bytes.multicast::cluster "
                 "[%0], [%1, {%3, %4}], [%2], %5;"
                 ::"r"(to), "l"(&map), "r"(barrier), "r"(column), "r"(row), "h"(blocks) : "memory");
}

__device__ __forceinline__ void prefetch_map(const TensorMap &map) {
    asm volatile("prefetch.tensormap [%0];" ::"l"(&map) : "memory");
}

// Whether this is the one thread of a whole warp that acts for it.
__device__ __forceinline__ bool elected() {
    u32 yes;
    asm volatile("{ .reg .pred p; elect.sync _|p, 0xffffffff; selp.u32 %0, 1, 0, p; }" : "=r"(yes));
    return yes != 0;
}

// Registers of each thread of this warpgroup from here on: fewer, or more as soon as others gave theirs.
template <int N> __device__ __forceinline__ void give_registers() { asm volatile("setmaxnreg.dec.sync.aligned.u32 %0;" ::"n"(N)); }
template <int N> __device__ __forceinline__ void take_registers() { asm volatile("setmaxnreg.inc.sync.aligned.u32 %0;" ::"n"(N)); }

// Products of a warpgroup are started, closed into groups and waited for. Sums may be touched only before the fence and after the wait.
__device__ __forceinline__ void wgmma_fence() { asm volatile("wgmma.fence.sync.aligned;" ::: "memory"); }
__device__ __forceinline__ void wgmma_commit() { asm volatile("wgmma.commit_group.sync.aligned;" ::: "memory"); }

// Waits until at most N groups are under way.
template <int N> __device__ __forceinline__ void wgmma_wait() { asm volatile("wgmma.wait_group.sync.aligned %0;" ::"n"(N) : "memory"); }

// An operand in shared memory with a swizzle of 128 bytes (PTX ISA, "Asynchronous warpgroup level matrix shared memory layout"), which
// starts at a multiple of 1024 bytes. Along k in memory: rows of 64 elements, 1024 bytes from eight rows to the next eight. Else panels
// of 64 columns, 1024 bytes from eight steps of k to the next eight, 8192 from panel to panel. The lower word holds the place in units of
// 16 bytes, so places are added to it; the upper word is the same for both.
template <bool KMajor> __device__ __forceinline__ u32 operand_at(u32 at) {
    constexpr u32 LEADING = KMajor ? 1 : 8192 / 16;
    return (at & 0x3ffff) >> 4 | LEADING << 16;
}
__device__ __forceinline__ u64 operand(u32 at) {
    constexpr u32 STRIDE = 1024 / 16, SWIZZLE_128 = 1;
    return u64(STRIDE | SWIZZLE_128 << 30) << 32 | at;
}

// 16 steps of k on from an operand, in 16 bytes: 32 bytes of each row, or 16 rows of 128 bytes.
template <bool KMajor> constexpr u32 STEP_OF_16 = (KMajor ? 32 : 2048) / 16;

// Sums of 64 rows by N columns over the warpgroup. Lane l of warp w holds, for each eight columns j, (row, column) of
// [4 j] (16 w + l / 4, 8 j + l % 4 * 2), [4 j + 1] the next column, [4 j + 2] and [4 j + 3] those eight rows below.
template <int N> using WarpgroupSums = float[N / 2];

// What is done to sums stays on this side: the compiler moves plain instructions past wgmma, which it does not see to touch them.
template <int N> __device__ __forceinline__ void keep_sums(float (&sums)[N]) {
#pragma unroll
    for (int i = 0; i < N; i++) asm volatile("" : "+f"(sums[i])::"memory");
}

#define FLOATS_8(d, i)                                                                                                                \
    "+f"(d[i]), "+f"(d[i + 1]), "+f"(d[i + 2]), "+f"(d[i + 3]), "+f"(d[i + 4]), "+f"(d[i + 5]), "+f"(d[i + 6]), "+f"(d[i + 7])
#define FLOATS_32(d, i) FLOATS_8(d, i), FLOATS_8(d, i + 8), FLOATS_8(d, i + 16), FLOATS_8(d, i + 24)
#define NAMES_0 "%0, %1, %2, %3, %4, %5, %6, %7, %8, %9, %10, %11, %12, %13, %14, %15, %16, %17, %18, %19, %20, %21, %22, %23, %24, " \
                "%25, %26, %27, %28, %29, %30, %31"
#define NAMES_1 "%32, %33, %34, %35, %36, %37, %38, %39, %40, %41, %42, %43, %44, %45, %46, %47, %48, %49, %50, %51, %52, %53, %54, " \
                "%55, %56, %57, %58, %59, %60, %61, %62, %63"
#define NAMES_2 "%64, %65, %66, %67, %68, %69, %70, %71, %72, %73, %74, %75, %76, %77, %78, %79, %80, %81, %82, %83, %84, %85, %86, " \
                "%87, %88, %89, %90, %91, %92, %93, %94, %95"
#define NAMES_3 "%96, %97, %98, %99, %100, %101, %102, %103, %104, %105, %106, %107, %108, %109, %110, %111, %112, %113, %114, "      \
                "%115, %116, %117, %118, %119, %120, %121, %122, %123, %124, %125, %126, %127"

// d = or += a b for 16 steps of k: d is set where `add` is 0. Operands lie along k in memory where their flag says so.
template <bool AKMajor, bool BKMajor> __device__ __forceinline__ void wgmma(WarpgroupSums<64> &d, u64 a, u64 b, u32 add) {
    asm volatile("{ .reg .pred p; setp.ne.u32 p, %34, 0;\n"
                 "wgmma.mma_async.sync.aligned.m64n64k16.f32.bf16.bf16 {" NAMES_0 "}, %32, %33, p, 1, 1, %35, %36; }"
                 : FLOATS_32(d, 0)
                 : "l"(a), "l"(b), "r"(add), "n"(int(!AKMajor)), "n"(int(!BKMajor)));
}
template <bool AKMajor, bool BKMajor> __device__ __forceinline__ void wgmma(WarpgroupSums<128> &d, u64 a, u64 b, u32 add) {
    asm volatile("{ .reg .pred p; setp.ne.u32 p, %66, 0;\n"
                 "wgmma.mma_async.sync.aligned.m64n128k16.f32.bf16.bf16 {" NAMES_0 ", " NAMES_1 "}, %64, %65, p, 1, 1, %67, %68; }"
                 : FLOATS_32(d, 0), FLOATS_32(d, 32)
                 : "l"(a), "l"(b), "r"(add), "n"(int(!AKMajor)), "n"(int(!BKMajor)));
}
template <bool AKMajor, bool BKMajor> __device__ __forceinline__ void wgmma(WarpgroupSums<256> &d, u64 a, u64 b, u32 add) {
    asm volatile("{ .reg .pred p; setp.ne.u32 p, %130, 0;\n"
                 "wgmma.mma_async.sync.aligned.m64n256k16.f32.bf16.bf16 {" NAMES_0 ", " NAMES_1 ", " NAMES_2 ", " NAMES_3
                 "}, %128, %129, p, 1, 1, %131, %132; }"
                 : FLOATS_32(d, 0), FLOATS_32(d, 32), FLOATS_32(d, 64), FLOATS_32(d, 96)
                 : "l"(a), "l"(b), "r"(add), "n"(int(!AKMajor)), "n"(int(!BKMajor)));
}

#undef FLOATS_8
#undef FLOATS_32
#undef NAMES_0
#undef NAMES_1
#undef NAMES_2
#undef NAMES_3
