/* Peers that have to be as fast as the machine lets them: plain C, threads, chunks off one counter.
 *
 * Nothing is looked at but in the sum. A reader copies into a buffer of one chunk a thread, touched
 * before the clock starts, on a huge page, so that it stays in the cache.
 */
#define _GNU_SOURCE
#include <errno.h>
#include <pthread.h>
#include <stdint.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/uio.h>
#include <time.h>
#include <unistd.h>

enum { CHUNK = 2 << 20, SPANS = 512, MAX_THREADS = 256 };
enum { READV = 0, MEM = 1, SUM = 2, COPY = 3 };

struct span {
    uint64_t start, length;
};

/* Spans first[i] to first[i + 1] are chunk i: CHUNK bytes and SPANS spans at the most. */
struct work {
    int what, pid, fd;
    const struct span *spans;
    const uint64_t *first;
    uint64_t chunks;
    uint8_t *to;
    uint64_t to_size;
    uint64_t next;
    uint64_t sum;
    int failed;
};

struct worker {
    struct work *work;
    uint8_t *buffer;
};

static uint64_t sum_of(const uint64_t *words, size_t count)
{
    uint64_t sum = 0;
    for (size_t i = 0; i < count; i++)
        sum += words[i];
    return sum;
}

/* The bytes of a chunk that it came by; -1 with errno. */
static ssize_t read_chunk(const struct work *w, const struct span *some, uint64_t count,
                          uint64_t length, uint8_t *buffer)
{
    if (w->what == READV) {
        struct iovec local = {buffer, length}, remote[SPANS];
        for (uint64_t i = 0; i < count; i++)
            remote[i] = (struct iovec){(void *)(uintptr_t)some[i].start, some[i].length};
        return process_vm_readv(w->pid, &local, 1, remote, count, 0);
    }
    ssize_t done = 0;
    for (uint64_t i = 0; i < count; i++) {
        ssize_t got = pread(w->fd, buffer + done, some[i].length, (off_t)some[i].start);
        if (got < 0)
            return -1;
        done += got;
    }
    return done;
}

static void *run(void *argument)
{
    struct worker *me = argument;
    struct work *w = me->work;
    uint64_t sum = 0;
    for (;;) {
        uint64_t at = __atomic_fetch_add(&w->next, 1, __ATOMIC_RELAXED);
        if (at >= w->chunks)
            break;
        const struct span *some = w->spans + w->first[at];
        uint64_t count = w->first[at + 1] - w->first[at], length = 0;
        for (uint64_t i = 0; i < count; i++)
            length += some[i].length;
        ssize_t got = (ssize_t)length;
        if (w->what == READV || w->what == MEM)
            got = read_chunk(w, some, count, length, me->buffer);
        for (uint64_t i = 0; i < count && w->what == SUM; i++)
            sum += sum_of((const uint64_t *)(uintptr_t)some[i].start, some[i].length / 8);
        for (uint64_t i = 0; i < count && w->what == COPY; i++)
            memcpy(w->to + some[i].start % w->to_size / CHUNK * CHUNK,
                   (const uint8_t *)(uintptr_t)some[i].start, some[i].length);
        if (got != (ssize_t)length) {
            __atomic_store_n(&w->failed, got < 0 ? errno : EIO, __ATOMIC_RELAXED);
            break;
        }
    }
    __atomic_fetch_add(&w->sum, sum, __ATOMIC_RELAXED);
    return NULL;
}

/* Seconds that it took, or an errno below zero. */
double peer(int what, int pid, int fd, const struct span *spans, const uint64_t *first,
            uint64_t chunks, int threads, uint8_t *to, uint64_t to_size)
{
    struct work work = {what, pid, fd, spans, first, chunks, to, to_size, 0, 0, 0};
    struct worker workers[MAX_THREADS];
    pthread_t ids[MAX_THREADS];
    struct timespec begin, end;
    if (threads < 1 || threads > MAX_THREADS)
        return -EINVAL;
    size_t room = (size_t)CHUNK * (threads + 1);
    uint8_t *buffers = mmap(NULL, room, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
    if (buffers == MAP_FAILED)
        return -errno;
    uint8_t *aligned = buffers + (CHUNK - (uintptr_t)buffers % CHUNK) % CHUNK;
    madvise(aligned, (size_t)CHUNK * threads, MADV_HUGEPAGE);
    memset(aligned, 1, (size_t)CHUNK * threads);
    clock_gettime(CLOCK_MONOTONIC, &begin);
    int started = 0;
    for (; started < threads; started++) {
        workers[started] = (struct worker){&work, aligned + (size_t)CHUNK * started};
        if (pthread_create(&ids[started], NULL, run, &workers[started])) {
            work.failed = EAGAIN;
            break;
        }
    }
    for (int i = 0; i < started; i++)
        pthread_join(ids[i], NULL);
    clock_gettime(CLOCK_MONOTONIC, &end);
    munmap(buffers, room);
    /* The sum is told to the outside, so that it can't be left out. */
    if (to != NULL && what == SUM)
        memcpy(to, &work.sum, 8);
    if (work.failed)
        return -work.failed;
    return (double)(end.tv_sec - begin.tv_sec) + 1e-9 * (double)(end.tv_nsec - begin.tv_nsec);
}
