/* How many bytes this process holds from malloc, and the most it has held: preload it (LD_PRELOAD), then call
 * meter_held, meter_peak and meter_reset. It counts every thread, also those that free what others allocated. */
#define _GNU_SOURCE
#include <dlfcn.h>
#include <errno.h>
#include <malloc.h>
#include <stdatomic.h>
#include <stddef.h>

extern void *__libc_malloc(size_t), *__libc_calloc(size_t, size_t), *__libc_realloc(void *, size_t);
extern void *__libc_memalign(size_t, size_t);
extern void __libc_free(void *);

static atomic_long held, peak;

static void *gained(void *block) {
    if (!block) return block;
    long size = (long)malloc_usable_size(block), now = atomic_fetch_add(&held, size) + size, seen = atomic_load(&peak);
    while (now > seen && !atomic_compare_exchange_weak(&peak, &seen, now)) {}
    return block;
}

static void lost(void *block) {
    if (block) atomic_fetch_sub(&held, (long)malloc_usable_size(block));
}

void *malloc(size_t size) { return gained(__libc_malloc(size)); }
void *calloc(size_t count, size_t size) { return gained(__libc_calloc(count, size)); }
void *memalign(size_t alignment, size_t size) { return gained(__libc_memalign(alignment, size)); }
void *aligned_alloc(size_t alignment, size_t size) { return gained(__libc_memalign(alignment, size)); }

int posix_memalign(void **out, size_t alignment, size_t size) {
    void *block = gained(__libc_memalign(alignment, size));
    if (!block) return ENOMEM;
    *out = block;
    return 0;
}

void *realloc(void *block, size_t size) {
    long before = block ? (long)malloc_usable_size(block) : 0;
    void *moved = __libc_realloc(block, size);
    if (moved || size == 0) atomic_fetch_sub(&held, before);
    return gained(moved);
}

void free(void *block) {
    lost(block);
    __libc_free(block);
}

long meter_held(void) { return atomic_load(&held); }
long meter_peak(void) { return atomic_load(&peak); }
void meter_reset(void) { atomic_store(&peak, atomic_load(&held)); }
