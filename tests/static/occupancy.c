#include <limits.h>
#include <stdio.h>
#include <string.h>
#include "cuda_occupancy.h"

/* stdin: capability, multiprocessor's warps, its shared bytes, registers, warps, shared bytes, barriers; stdout: blocks */
int main(void) {
    int cc, sm_warps, registers, warps, barriers;
    long sm_shared, shared;
    while (scanf("%d %d %ld %d %d %ld %d", &cc, &sm_warps, &sm_shared, &registers, &warps, &shared, &barriers) == 7) {
        cudaOccDeviceProp device;
        cudaOccFuncAttributes function;
        cudaOccDeviceState state;
        cudaOccResult result;
        memset(&device, 0, sizeof device);
        memset(&function, 0, sizeof function);
        memset(&state, 0, sizeof state);
        device.computeMajor = cc / 10;
        device.computeMinor = cc % 10;
        device.maxThreadsPerBlock = 1024;
        device.maxThreadsPerMultiprocessor = sm_warps * 32;
        device.regsPerBlock = device.regsPerMultiprocessor = 65536;
        device.warpSize = 32;
        device.sharedMemPerBlock = 48 * 1024;
        device.sharedMemPerMultiprocessor = sm_shared;
        device.sharedMemPerBlockOptin = sm_shared - 1024;
        device.reservedSharedMemPerBlock = 1024;
        device.numSms = 1;
        function.maxThreadsPerBlock = 1024;
        function.numRegs = registers;
        function.shmemLimitConfig = FUNC_SHMEM_LIMIT_OPTIN;
        function.maxDynamicSharedSizeBytes = shared;
        function.numBlockBarriers = barriers;
        state.carveoutConfig = SHAREDMEM_CARVEOUT_DEFAULT;
        cudaOccError error = cudaOccMaxActiveBlocksPerMultiprocessor(&result, &device, &function, &state, warps * 32, shared);
        printf("%d\n", error == CUDA_OCC_SUCCESS ? result.activeBlocksPerMultiprocessor : -1);
    }
    return 0;
}
