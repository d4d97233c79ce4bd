/* CANN's operator library as seen by its callers: argument objects, and per operator the two functions
   aclnnXGetWorkspaceSize and aclnnX, which tell `hear` what they were given. operators.h, a list of
   ENTRY(aclnnX), is generated. */
#include <stdbool.h>
#include <stdint.h>
#include <stdlib.h>
#include <string.h>

#include "acl/acl_base.h"

typedef int aclnnStatus;

enum { RANK = 12 };

typedef enum { TENSOR = 1, TENSORS, SCALAR, SCALARS, INTS, FLOATS, BOOLS } Kind;

/* Every argument object: a tensor with its view of device memory, or an array of plain values.
   Those that live are in a ring, so that any number can be asked whether it is one. */
typedef struct Object {
    struct Object *next, *before;
    int64_t kind, dtype, rank, offset, format, storage_rank;
    int64_t sizes[RANK], strides[RANK], storage[RANK];
    void *data;
    uint64_t count;
    void *values;
} Object;

static Object living = {.next = &living, .before = &living};
static int lock;

static void locked(void (*change)(Object *), Object *object)
{
    while (__atomic_test_and_set(&lock, __ATOMIC_ACQUIRE)) {}
    change(object);
    __atomic_clear(&lock, __ATOMIC_RELEASE);
}

static void enter(Object *object)
{
    object->next = living.next;
    object->before = &living;
    living.next->before = object;
    living.next = object;
}

static void leave(Object *object)
{
    object->next->before = object->before;
    object->before->next = object->next;
}

static Object *new_object(Kind kind)
{
    Object *object = calloc(1, sizeof *object);
    object->kind = kind;
    locked(enter, object);
    return object;
}

static Object *array(Kind kind, const void *values, uint64_t count, size_t size)
{
    Object *object = new_object(kind);
    object->count = count;
    object->values = malloc(count * size + 1);
    memcpy(object->values, values, count * size);
    return object;
}

static aclnnStatus destroy(const void *handle)
{
    Object *object = (Object *)handle;
    if (object == NULL)
        return ACL_SUCCESS;
    locked(leave, object);
    if (object->kind == TENSORS || object->kind == SCALARS)
        for (uint64_t i = 0; i < object->count; i++)
            destroy(((Object **)object->values)[i]);
    free(object->values);
    free(object);
    return ACL_SUCCESS;
}

/* The object with this address, or NULL. */
Object *object_at(uint64_t address)
{
    Object *found = NULL;
    while (__atomic_test_and_set(&lock, __ATOMIC_ACQUIRE)) {}
    for (Object *each = living.next; each != &living; each = each->next)
        if ((uint64_t)each == address)
            found = each;
    __atomic_clear(&lock, __ATOMIC_RELEASE);
    return found;
}

Object *aclCreateTensor(const int64_t *sizes, uint64_t rank, aclDataType dtype, const int64_t *strides,
                        int64_t offset, aclFormat format, const int64_t *storage, uint64_t storage_rank,
                        void *data)
{
    if (rank > RANK || storage_rank > RANK)
        return NULL;
    Object *object = new_object(TENSOR);
    object->rank = rank;
    object->dtype = dtype;
    object->offset = offset;
    object->format = format;
    object->storage_rank = storage_rank;
    object->data = data;
    memcpy(object->sizes, sizes, rank * sizeof *sizes);
    memcpy(object->strides, strides, rank * sizeof *strides);
    memcpy(object->storage, storage, storage_rank * sizeof *storage);
    return object;
}
Object *aclCreateScalar(const void *value, aclDataType dtype)
{
    size_t size = dtype == ACL_FLOAT16 || dtype == ACL_BF16 ? 2 : dtype == ACL_BOOL ? 1 : dtype == ACL_FLOAT ? 4 : 8;
    Object *object = array(SCALAR, value, 1, size);
    object->dtype = dtype;
    return object;
}
Object *aclCreateTensorList(Object *const *tensors, uint64_t count) { return array(TENSORS, tensors, count, 8); }
Object *aclCreateScalarList(Object *const *scalars, uint64_t count) { return array(SCALARS, scalars, count, 8); }
Object *aclCreateIntArray(const int64_t *values, uint64_t count) { return array(INTS, values, count, 8); }
Object *aclCreateFloatArray(const float *values, uint64_t count) { return array(FLOATS, values, count, 4); }
Object *aclCreateBoolArray(const bool *values, uint64_t count) { return array(BOOLS, values, count, 1); }
aclnnStatus aclDestroyTensor(const void *handle) { return destroy(handle); }
aclnnStatus aclDestroyScalar(const void *handle) { return destroy(handle); }
aclnnStatus aclDestroyTensorList(const void *handle) { return destroy(handle); }
aclnnStatus aclDestroyScalarList(const void *handle) { return destroy(handle); }
aclnnStatus aclDestroyIntArray(const void *handle) { return destroy(handle); }
aclnnStatus aclDestroyFloatArray(const void *handle) { return destroy(handle); }
aclnnStatus aclDestroyBoolArray(const void *handle) { return destroy(handle); }
aclnnStatus aclDestroyAclOpExecutor(void *executor) { return ACL_SUCCESS; }

/* How Python hears of calls: integer arguments in their order (those in registers, then those on the
   stack, of which too many are read: who knows the operator knows where they end), and floating-point
   arguments in theirs. The second phase comes without arguments. */
typedef int (*Hear)(const char *name, uint64_t *integers, const double *floats, uint64_t executor);
static Hear hearing;
void hear(Hear who) { hearing = who; }

static int heard(const char *name, uint64_t *integers, const double *floats, uint64_t executor)
{
    return hearing ? hearing(name, integers, floats, executor) : ACL_ERROR_API_NOT_SUPPORT;
}

/* Both Linux calling conventions in use here pass integers and floating-point numbers in registers of
   their own, 6 or 8 and 8 of them, and further integers on the stack, 8 bytes each: a function declared
   with enough of each finds every one, whatever the order in which the caller declared them. */
#define EIGHT(x, of) of x##0, of x##1, of x##2, of x##3, of x##4, of x##5, of x##6, of x##7
#define STACK(of) EIGHT(s, of), EIGHT(t, of), EIGHT(u, of), EIGHT(v, of)
#if defined(__x86_64__)
#define REGISTERS(of) of r0, of r1, of r2, of r3, of r4, of r5
#elif defined(__aarch64__)
#define REGISTERS(of) EIGHT(r, of)
#else
#error "how this processor passes arguments is not known here"
#endif

#define ENTRY(name)                                                                                        \
    int name##GetWorkspaceSize(REGISTERS(uint64_t), EIGHT(f, double), STACK(uint64_t))                     \
    {                                                                                                      \
        return heard(#name, (uint64_t[]){REGISTERS(), STACK()}, (double[]){EIGHT(f, )}, 0);                \
    }                                                                                                      \
    int name(void *workspace, uint64_t size, uint64_t executor, void *stream)                              \
    {                                                                                                      \
        return heard(#name, NULL, NULL, executor);                                                         \
    }

#include "operators.h"
