/* A program as others write it: the real cuda.h, linked with libcuda.so, a vector addition with graph, event and callback. */
#include <cuda.h>
#include <stdio.h>
#include <stdlib.h>

#include "functions.h"

#define OK(call) do { CUresult r = (call); const char *s = "?"; if (r != CUDA_SUCCESS) { \
    cuGetErrorName(r, &s); fprintf(stderr, "%s:%d: %s: %s\n", __FILE__, __LINE__, #call, s); exit(1); } } while (0)

static int called;
static void CUDA_CB host(void *data) { called += *(int *)data; }

int main(int argc, char **argv) {
    enum { N = 1000 };
    CUdevice device; CUcontext context; CUmodule module; CUfunction add; CUstream stream; CUevent begin, end;
    CUgraph graph; CUgraphExec exec; CUdeviceptr out, x, y;
    if (argc != 2 || functions() < 150) return 2;
    OK(cuInit(0));
    OK(cuDeviceGet(&device, 0));
    OK(cuCtxCreate(&context, 0, device));
    OK(cuModuleLoad(&module, argv[1]));
    OK(cuModuleGetFunction(&add, module, "add"));
    OK(cuStreamCreate(&stream, CU_STREAM_NON_BLOCKING));
    OK(cuEventCreate(&begin, CU_EVENT_DEFAULT));
    OK(cuEventCreate(&end, CU_EVENT_DEFAULT));
    static float a[N], b[N], c[N];
    for (int i = 0; i < N; i++) { a[i] = (float)i; b[i] = 2.0f * (float)i; }
    OK(cuMemAlloc(&out, sizeof c));
    OK(cuMemAllocAsync(&x, sizeof a, stream));
    OK(cuMemAllocAsync(&y, sizeof b, stream));
    OK(cuMemcpyHtoDAsync(x, a, sizeof a, stream));
    OK(cuMemcpyHtoDAsync(y, b, sizeof b, stream));
    unsigned n = N;
    int one = 1;
    void *args[] = {&out, &x, &y, &n};
    OK(cuStreamBeginCapture(stream, CU_STREAM_CAPTURE_MODE_GLOBAL));
    OK(cuLaunchKernel(add, (N + 127) / 128, 1, 1, 128, 1, 1, 0, stream, args, NULL));
    OK(cuLaunchHostFunc(stream, host, &one));
    OK(cuStreamEndCapture(stream, &graph));
    OK(cuGraphInstantiate(&exec, graph, 0));
    OK(cuEventRecord(begin, stream));
    OK(cuGraphLaunch(exec, stream));
    CUlaunchConfig config = {.gridDimX = (N + 127) / 128, .gridDimY = 1, .gridDimZ = 1, .blockDimX = 128, .blockDimY = 1,
                             .blockDimZ = 1, .hStream = stream};
    OK(cuLaunchKernelEx(&config, add, args, NULL));
    OK(cuEventRecord(end, stream));
    OK(cuMemcpyDtoHAsync(c, out, sizeof c, stream));
    float ms = -1.0f;
    OK(cuEventElapsedTime(&ms, begin, end));
    if (ms < 0.0f || called != 1) return 3;
    for (int i = 0; i < N; i++) if (c[i] != 3.0f * (float)i) return 4;
    void *found = NULL;
    CUdriverProcAddressQueryResult status;
    OK(cuGetProcAddress("cuMemAlloc", &found, CUDA_VERSION, CU_GET_PROC_ADDRESS_DEFAULT, &status));
    if (found != (void *)cuMemAlloc) return 5;
    OK(cuGraphExecDestroy(exec));
    OK(cuGraphDestroy(graph));
    OK(cuMemFreeAsync(x, stream));
    OK(cuMemFreeAsync(y, stream));
    OK(cuStreamDestroy(stream));
    OK(cuMemFree(out));
    OK(cuModuleUnload(module));
    OK(cuCtxDestroy(context));
    puts("vector addition is right");
    return 0;
}
