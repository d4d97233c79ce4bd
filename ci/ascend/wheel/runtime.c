/* CANN's runtime over host memory: one device whose memory is this process's own. Copies are memcpy,
   streams and events are numbers, all is done when it returns. Prototypes are those of the headers in
   the torch_npu wheel, so that a function of another form does not compile. */
#include <stdint.h>
#include <stdlib.h>
#include <string.h>

#include "acl/acl.h"
#include "acl/acl_op_compiler.h"
#include "acl/acl_rt_allocator.h"

enum { ALIGNMENT = 512, CORES = 24 };
static const size_t MEMORY = (size_t)8 << 30;

static void *new_handle(void)
{
    static uintptr_t last = 0x1000;
    return (void *)(__atomic_add_fetch(&last, 16, __ATOMIC_RELAXED));
}

static aclError allocate(void **memory, size_t size)
{
    return posix_memalign(memory, ALIGNMENT, size + ALIGNMENT) ? ACL_ERROR_BAD_ALLOC : ACL_SUCCESS;
}

/* The process and its only device. DSA_HAL_SOC chooses what it says it is. */
aclError aclInit(const char *path) { return ACL_SUCCESS; }
aclError aclFinalize(void) { return ACL_SUCCESS; }
const char *aclGetRecentErrMsg(void) { return "the host-memory device has no more to say"; }
const char *aclrtGetSocName(void)
{
    const char *chosen = getenv("DSA_HAL_SOC");
    return chosen ? chosen : "Ascend910B2";
}
aclError aclsysGetVersionStr(char *package, char *version)
{
    strcpy(version, "9.0.0");
    return ACL_SUCCESS;
}
aclError aclSetCompileopt(aclCompileOpt option, const char *value) { return ACL_SUCCESS; }
aclError aclrtGetDeviceCount(uint32_t *count) { *count = 1; return ACL_SUCCESS; }
aclError aclrtSetDevice(int32_t device) { return ACL_SUCCESS; }
aclError aclrtGetDevice(int32_t *device) { *device = 0; return ACL_SUCCESS; }
aclError aclrtResetDevice(int32_t device) { return ACL_SUCCESS; }
aclError aclrtGetLogicDevIdByUserDevId(const int32_t user, int32_t *const logical)
{
    *logical = user;
    return ACL_SUCCESS;
}
aclError aclrtGetPrimaryCtxState(int32_t device, uint32_t *flags, int32_t *active)
{
    *active = 1;
    return ACL_SUCCESS;
}
aclError aclrtGetCurrentContext(aclrtContext *context) { *context = (void *)16; return ACL_SUCCESS; }
aclError aclrtSetCurrentContext(aclrtContext context) { return ACL_SUCCESS; }
aclError aclrtDeviceCanAccessPeer(int32_t *can, int32_t device, int32_t peer)
{
    *can = 0;
    return ACL_SUCCESS;
}
aclError aclrtPeekAtLastError(aclrtLastErrLevel level) { return ACL_SUCCESS; }
aclError aclrtGetLastError(aclrtLastErrLevel level) { return ACL_SUCCESS; }

/* What it can do, and its settings. */
aclError aclGetDeviceCapability(uint32_t device, aclDeviceInfo info, int64_t *value)
{
    *value = 0;
    return ACL_SUCCESS;
}
aclError aclrtGetDeviceInfo(uint32_t device, aclrtDevAttr attribute, int64_t *value)
{
    *value = CORES;
    return ACL_SUCCESS;
}
aclError aclrtGetDeviceResLimit(int32_t device, aclrtDevResLimitType type, uint32_t *value)
{
    *value = CORES;
    return ACL_SUCCESS;
}
aclError aclrtGetStreamResLimit(aclrtStream stream, aclrtDevResLimitType type, uint32_t *value)
{
    *value = CORES;
    return ACL_SUCCESS;
}
aclError aclrtGetResInCurrentThread(aclrtDevResLimitType type, uint32_t *value)
{
    *value = CORES;
    return ACL_SUCCESS;
}
aclError aclrtGetSysParamOpt(aclSysParamOpt option, int64_t *value) { *value = 0; return ACL_SUCCESS; }
aclError aclrtSetSysParamOpt(aclSysParamOpt option, int64_t value) { return ACL_SUCCESS; }
aclError aclrtCtxGetSysParamOpt(aclSysParamOpt option, int64_t *value) { *value = 0; return ACL_SUCCESS; }
aclError aclrtCtxSetSysParamOpt(aclSysParamOpt option, int64_t value) { return ACL_SUCCESS; }
aclError aclrtSetDeviceSatMode(aclrtFloatOverflowMode mode) { return ACL_SUCCESS; }
aclError aclrtGetDeviceSatMode(aclrtFloatOverflowMode *mode)
{
    *mode = ACL_RT_OVERFLOW_MODE_INFNAN;
    return ACL_SUCCESS;
}
aclError aclrtSetOpExecuteTimeOut(uint32_t seconds) { return ACL_SUCCESS; }
aclError aclrtSetOpExecuteTimeOutV2(uint64_t wanted, uint64_t *actual)
{
    *actual = wanted;
    return ACL_SUCCESS;
}
aclError aclrtSetOpWaitTimeout(uint32_t seconds) { return ACL_SUCCESS; }

/* Memory. */
aclError aclrtGetMemInfo(aclrtMemAttr attribute, size_t *unused, size_t *total)
{
    *unused = *total = MEMORY;
    return ACL_SUCCESS;
}
aclError aclrtMalloc(void **memory, size_t size, aclrtMemMallocPolicy policy) { return allocate(memory, size); }
aclError aclrtMallocAlign32(void **memory, size_t size, aclrtMemMallocPolicy policy)
{
    return allocate(memory, size);
}
aclError aclrtFree(void *memory) { free(memory); return ACL_SUCCESS; }
aclError aclrtMallocHost(void **memory, size_t size) { return allocate(memory, size); }
aclError aclrtMallocHostWithCfg(void **memory, uint64_t size, aclrtMallocConfig *wish)
{
    return allocate(memory, size);
}
aclError aclrtFreeHost(void *memory) { free(memory); return ACL_SUCCESS; }
aclError aclrtHostRegister(void *memory, uint64_t size, aclrtHostRegisterType type, void **device)
{
    *device = memory;
    return ACL_SUCCESS;
}
aclError aclrtHostUnregister(void *memory) { return ACL_SUCCESS; }
aclError aclrtMemcpy(void *to, size_t room, const void *from, size_t count, aclrtMemcpyKind kind)
{
    if (count > room)
        return ACL_ERROR_INVALID_PARAM;
    memmove(to, from, count);
    return ACL_SUCCESS;
}
aclError aclrtMemcpyAsync(
    void *to, size_t room, const void *from, size_t count, aclrtMemcpyKind kind, aclrtStream stream)
{
    return aclrtMemcpy(to, room, from, count, kind);
}
aclError aclrtMemcpyAsyncWithCondition(
    void *to, size_t room, const void *from, size_t count, aclrtMemcpyKind kind, aclrtStream stream)
{
    return aclrtMemcpy(to, room, from, count, kind);
}
aclError aclrtMemset(void *to, size_t room, int32_t value, size_t count)
{
    if (count > room)
        return ACL_ERROR_INVALID_PARAM;
    memset(to, value, count);
    return ACL_SUCCESS;
}
aclError aclrtMemsetAsync(void *to, size_t room, int32_t value, size_t count, aclrtStream stream)
{
    return aclrtMemset(to, room, value, count);
}

/* Streams and events: whatever was asked is done already. */
aclError aclrtCreateStream(aclrtStream *stream) { *stream = new_handle(); return ACL_SUCCESS; }
aclError aclrtCreateStreamWithConfig(aclrtStream *stream, uint32_t priority, uint32_t flag)
{
    *stream = new_handle();
    return ACL_SUCCESS;
}
aclError aclrtDestroyStream(aclrtStream stream) { return ACL_SUCCESS; }
aclError aclrtDestroyStreamForce(aclrtStream stream) { return ACL_SUCCESS; }
aclError aclrtSynchronizeStream(aclrtStream stream) { return ACL_SUCCESS; }
aclError aclrtSynchronizeStreamWithTimeout(aclrtStream stream, int32_t timeout) { return ACL_SUCCESS; }
aclError aclrtSynchronizeDevice(void) { return ACL_SUCCESS; }
aclError aclrtSynchronizeDeviceWithTimeout(int32_t timeout) { return ACL_SUCCESS; }
aclError aclrtStreamQuery(aclrtStream stream, aclrtStreamStatus *status)
{
    *status = ACL_STREAM_STATUS_COMPLETE;
    return ACL_SUCCESS;
}
aclError aclrtStreamGetId(aclrtStream stream, int32_t *id) { *id = 1; return ACL_SUCCESS; }
aclError aclrtSetStreamFailureMode(aclrtStream stream, uint64_t mode) { return ACL_SUCCESS; }
aclError aclrtSetStreamAttribute(aclrtStream stream, aclrtStreamAttr name, aclrtStreamAttrValue *value)
{
    return ACL_SUCCESS;
}
aclError aclrtCreateEventWithFlag(aclrtEvent *event, uint32_t flag) { *event = new_handle(); return ACL_SUCCESS; }
aclError aclrtCreateEventExWithFlag(aclrtEvent *event, uint32_t flag)
{
    *event = new_handle();
    return ACL_SUCCESS;
}
aclError aclrtDestroyEvent(aclrtEvent event) { return ACL_SUCCESS; }
aclError aclrtRecordEvent(aclrtEvent event, aclrtStream stream) { return ACL_SUCCESS; }
aclError aclrtResetEvent(aclrtEvent event, aclrtStream stream) { return ACL_SUCCESS; }
aclError aclrtStreamWaitEvent(aclrtStream stream, aclrtEvent event) { return ACL_SUCCESS; }
aclError aclrtSynchronizeEvent(aclrtEvent event) { return ACL_SUCCESS; }
aclError aclrtEventElapsedTime(float *ms, aclrtEvent start, aclrtEvent end) { *ms = 0; return ACL_SUCCESS; }
aclError aclrtQueryEventStatus(aclrtEvent event, aclrtEventRecordedStatus *status)
{
    *status = ACL_EVENT_RECORDED_STATUS_COMPLETE;
    return ACL_SUCCESS;
}
aclError aclrtQueryEventWaitStatus(aclrtEvent event, aclrtEventWaitStatus *status)
{
    *status = ACL_EVENT_WAIT_STATUS_COMPLETE;
    return ACL_SUCCESS;
}
