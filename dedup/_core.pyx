# cython: language_level=3
"""The compiled core: read, hash, constant test, grouping, and raw system-call shims.

It holds what needs C and no policy: which memory to look at, and what a result means, is decided
in Python. A page's bytes live in a thread's buffer for as long as it takes to hash them.
"""

from libc.errno cimport EINTR, errno
from libc.stdint cimport int32_t, int64_t, uint8_t, uint16_t, uint32_t, uint64_t, uintptr_t
from libc.stdlib cimport calloc, free, malloc, realloc
from libc.string cimport memset

import ctypes
import os

import numpy as np

cimport cython

ctypedef uint64_t (*hash_fn)(const void *, size_t, const void *, size_t) noexcept nogil
ctypedef void (*secret_fn)(void *, uint64_t) noexcept nogil

cdef extern from *:
    """
    #include <errno.h>
    #include <fcntl.h>
    #include <stdint.h>
    #include <sys/ioctl.h>
    #include <sys/mman.h>
    #include <sys/prctl.h>
    #include <sys/uio.h>
    #include <unistd.h>

    /* include/uapi/linux/fs.h of Linux 6.7 and later; Debian 12's headers lack it. */
    struct dedup_page_region { uint64_t start, end, categories; };
    struct dedup_pm_scan_arg {
        uint64_t size, flags, start, end, walk_end, vec, vec_len, max_pages;
        uint64_t category_inverted, category_mask, category_anyof_mask, return_mask;
    };
    #define DEDUP_PAGEMAP_SCAN _IOWR('f', 16, struct dedup_pm_scan_arg)

    #ifndef PR_SET_MEMORY_MERGE
    #define PR_SET_MEMORY_MERGE 67
    #endif
    #ifndef PR_GET_MEMORY_MERGE
    #define PR_GET_MEMORY_MERGE 68
    #endif

    /* 32 words at a time, which compilers turn into vector instructions, those of this processor
     * (hashing a page takes not much longer); aligned loads alone, other than those of
     * memcmp(p, p + 8). */
    #define DEDUP_REPEATS(name) \\
        static int name(const uint64_t *word, size_t words) \\
        { \\
            const uint64_t first = word[0]; \\
            for (size_t i = 0; i < words; i += 32) { \\
                uint64_t differs = 0; \\
                for (size_t k = 0; k < 32; k++) \\
                    differs |= word[i + k] ^ first; \\
                if (differs) \\
                    return 0; \\
            } \\
            return 1; \\
        }
    DEDUP_REPEATS(dedup_repeats_plain)
    static int (*dedup_repeats)(const uint64_t *word, size_t words) = dedup_repeats_plain;
    #if defined(__x86_64__)
    __attribute__((target("avx2"))) DEDUP_REPEATS(dedup_repeats_avx2)
    __attribute__((target("avx512f"))) DEDUP_REPEATS(dedup_repeats_avx512)
    __attribute__((constructor)) static void dedup_choose(void)
    {
        __builtin_cpu_init();
        if (__builtin_cpu_supports("avx512f"))
            dedup_repeats = dedup_repeats_avx512;
        else if (__builtin_cpu_supports("avx2"))
            dedup_repeats = dedup_repeats_avx2;
    }
    #endif

    static inline int64_t dedup_fetch_add(int64_t *p, int64_t v)
    { return __atomic_fetch_add(p, v, __ATOMIC_RELAXED); }
    static inline int64_t dedup_load(int64_t *p) { return __atomic_load_n(p, __ATOMIC_RELAXED); }
    static inline void dedup_store(int64_t *p, int64_t v)
    { __atomic_store_n(p, v, __ATOMIC_RELAXED); }
    static inline uint32_t dedup_load32(uint32_t *p)
    { return __atomic_load_n(p, __ATOMIC_ACQUIRE); }
    /* Sets a slot that is 0; gives what it held before. */
    static inline uint32_t dedup_take32(uint32_t *p, uint32_t v)
    {
        uint32_t held = 0;
        __atomic_compare_exchange_n(p, &held, v, 0, __ATOMIC_RELEASE, __ATOMIC_ACQUIRE);
        return held;
    }
    """
    int dedup_repeats(const uint64_t *word, size_t words) noexcept nogil
    int64_t dedup_fetch_add(int64_t *p, int64_t v) noexcept nogil
    int64_t dedup_load(int64_t *p) noexcept nogil
    uint32_t dedup_load32(uint32_t *p) noexcept nogil
    uint32_t dedup_take32(uint32_t *p, uint32_t v) noexcept nogil
    void dedup_store(int64_t *p, int64_t v) noexcept nogil

    cdef struct dedup_page_region:
        uint64_t start
        uint64_t end
        uint64_t categories

    cdef struct dedup_pm_scan_arg:
        uint64_t size
        uint64_t flags
        uint64_t start
        uint64_t end
        uint64_t walk_end
        uint64_t vec
        uint64_t vec_len
        uint64_t max_pages
        uint64_t category_inverted
        uint64_t category_mask
        uint64_t category_anyof_mask
        uint64_t return_mask

    unsigned long DEDUP_PAGEMAP_SCAN
    int PR_SET_MEMORY_MERGE
    int PR_GET_MEMORY_MERGE

cdef extern from "<sys/uio.h>" nogil:
    cdef struct iovec:
        void *iov_base
        size_t iov_len
    ssize_t process_vm_readv(int pid, const iovec *local, unsigned long liovcnt,
                             const iovec *remote, unsigned long riovcnt, unsigned long flags)

cdef extern from "<unistd.h>" nogil:
    ssize_t pread(int fd, void *buf, size_t count, int64_t offset)

cdef extern from "<sys/syscall.h>" nogil:
    long SYS_kcmp

cdef extern from "<unistd.h>" nogil:
    long syscall(long number, ...)

cdef extern from "<stdlib.h>" nogil:
    void *aligned_alloc(size_t alignment, size_t size)

cdef extern from "<sys/ioctl.h>" nogil:
    int ioctl(int fd, unsigned long request, ...)

cdef extern from "<sys/prctl.h>" nogil:
    int c_prctl "prctl"(int option, ...)
    int PR_SET_CHILD_SUBREAPER
    int PR_SET_PDEATHSIG

cdef extern from "<sys/personality.h>" nogil:
    int c_personality "personality"(unsigned long persona)

cdef extern from "<sys/mman.h>" nogil:
    void *mmap(void *addr, size_t length, int prot, int flags, int fd, int64_t offset)
    int munmap(void *addr, size_t length)
    int c_madvise "madvise"(void *addr, size_t length, int advice)
    int PROT_READ
    int PROT_WRITE
    int MAP_PRIVATE
    int MAP_ANONYMOUS
    int MAP_NORESERVE
    int MADV_DONTNEED
    int MADV_HUGEPAGE
    int getpagesize() noexcept nogil
    void *MAP_FAILED

include "hash.pxi"
include "once.pxi"
include "scan.pxi"
include "group.pxi"
include "summary.pxi"
include "file.pxi"
include "shims.pxi"
include "ptrace.pxi"
