/* Reads rows "registers opted block dynamic blocks" and compares the last figure with cuda_occupancy.h. */
#include <limits.h>
#include <stddef.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "cuda_occupancy.h"

int main(int argc, char **argv) {
    if (argc != 7) return 2;
    cudaOccDeviceProp p;
    memset(&p, 0, sizeof p);
    p.computeMajor = atoi(argv[1]);
    p.computeMinor = atoi(argv[2]);
    p.maxThreadsPerBlock = 1024;
    p.maxThreadsPerMultiprocessor = atoi(argv[5]);
    p.regsPerBlock = 65536;
    p.regsPerMultiprocessor = 65536;
    p.warpSize = 32;
    p.sharedMemPerBlock = 49152;
    p.sharedMemPerMultiprocessor = atoi(argv[4]);
    p.numSms = atoi(argv[6]);
    p.sharedMemPerBlockOptin = atoi(argv[3]);
    p.reservedSharedMemPerBlock = 1024;
    int registers, opted, block, dynamic, blocks, rows = 0, wrong = 0;
    while (scanf("%d %d %d %d %d", &registers, &opted, &block, &dynamic, &blocks) == 5) {
        cudaOccFuncAttributes f;
        cudaOccDeviceState s;
        cudaOccResult r;
        memset(&f, 0, sizeof f);
        memset(&s, 0, sizeof s);
        s.carveoutConfig = SHAREDMEM_CARVEOUT_DEFAULT;
        f.maxThreadsPerBlock = 1024;
        f.numRegs = registers;
        f.shmemLimitConfig = FUNC_SHMEM_LIMIT_OPTIN;
        f.maxDynamicSharedSizeBytes = opted ? opted : 49152;
        f.numBlockBarriers = 1;
        if (cudaOccMaxActiveBlocksPerMultiprocessor(&r, &p, &f, &s, block, dynamic) != CUDA_OCC_SUCCESS) return 3;
        rows++;
        if (r.activeBlocksPerMultiprocessor != blocks && wrong++ < 20)
            printf("registers %d, opted in %d, block %d, dynamic %d: %d, the calculator says %d\n", registers, opted, block,
                   dynamic, blocks, r.activeBlocksPerMultiprocessor);
    }
    printf("%d rows, %d wrong\n", rows, wrong);
    return rows == 0 || wrong != 0;
}
