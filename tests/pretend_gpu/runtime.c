/* CUDA's runtime and driver, as far as torch's autograd and DDP ask them. To be preloaded: found before the real
   ones. Devices, streams and events are there; nothing is ever waited for, since all has been done already. */

static _Thread_local int device;

int cudaGetDeviceCount(int *count) { *count = 8; return 0; }
int cudaGetDevice(int *index) { *index = device; return 0; }
int cudaSetDevice(int index) { device = index; return 0; }
int cudaDeviceSynchronize(void) { return 0; }
int cudaDriverGetVersion(int *version) { *version = 99000; return 0; }
int cudaGetLastError(void) { return 0; }

int cudaDeviceGetStreamPriorityRange(int *least, int *greatest) { *least = *greatest = 0; return 0; }
int cudaStreamCreateWithPriority(void **stream, unsigned flags, int priority) { *stream = &device; return 0; }
int cudaStreamIsCapturing(void *stream, int *status) { *status = 0; return 0; }
int cudaStreamQuery(void *stream) { return 0; }
int cudaStreamSynchronize(void *stream) { return 0; }
int cudaStreamWaitEvent(void *stream, void *event, unsigned flags) { return 0; }

int cudaEventCreateWithFlags(void **event, unsigned flags) { *event = &device; return 0; }
int cudaEventDestroy(void *event) { return 0; }
int cudaEventElapsedTime(float *milliseconds, void *start, void *end) { *milliseconds = 0; return 0; }
int cudaEventQuery(void *event) { return 0; }
int cudaEventRecord(void *event, void *stream) { return 0; }
int cudaEventRecordWithFlags(void *event, void *stream, unsigned flags) { return 0; }
int cudaEventSynchronize(void *event) { return 0; }

/* Of the driver, since this library calls itself libcuda.so.1: nothing was computed on the device before. */
int cuDevicePrimaryCtxGetState(int index, unsigned *flags, int *active) { *flags = *active = 0; return 0; }
