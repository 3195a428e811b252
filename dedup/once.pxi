# Frames met in a look, so that each is read once, however many mappings it has.
#
# A KSM page never changes, and a frame that several processes share since a fork is copied before
# it is written to, as long as they share it. (Freed and shared anew within a look, it counts with
# what it held before: as does whatever changes once it was read.)
#
# The table holds places in the arrays of the pages, and finds a frame by its number there: 4 bytes
# a slot. Blocks of frames lie together, as they do in memory, at a place that is drawn anew up to
# so many times.

cdef enum:
    FRAMES_BLOCK = 512
    FRAMES_DRAWS = 8


cdef struct Frames:
    uint32_t *slots    # a page's place plus one, 0 for none; NULL: nothing is kept
    size_t room        # bytes
    uint64_t mask      # blocks less one, a power of two


cdef int _frames_open(Frames *t, int64_t pages) noexcept nogil:
    """Room for so many frames, which takes memory as it fills: -1 without."""
    cdef uint64_t blocks = 1
    while blocks * FRAMES_BLOCK < 2 * <uint64_t>pages:
        blocks *= 2
    t.room = blocks * FRAMES_BLOCK * sizeof(uint32_t)
    t.slots = <uint32_t *>mmap(NULL, t.room, PROT_READ | PROT_WRITE,
                               MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0)
    if t.slots == <uint32_t *>MAP_FAILED:
        t.slots = NULL
        return -1
    t.mask = blocks - 1
    return 0


cdef void _frames_close(Frames *t) noexcept nogil:
    if t.slots != NULL:
        munmap(t.slots, t.room)
        t.slots = NULL


cdef inline uint32_t *_frames_slot(Frames *t, uint64_t pfn, uint64_t draw) noexcept nogil:
    return t.slots + ((_mix64(pfn // FRAMES_BLOCK + (draw << 52)) & t.mask) * FRAMES_BLOCK
                      + pfn % FRAMES_BLOCK)


cdef inline int64_t _frames_find(Frames *t, uint64_t pfn, const uint64_t *frames) noexcept nogil:
    """The place of a page with this frame, -1 for none."""
    cdef uint64_t draw
    cdef uint32_t found
    for draw in range(FRAMES_DRAWS):
        found = dedup_load32(_frames_slot(t, pfn, draw))
        if found == 0:
            return -1
        if frames[found - 1] & FRAME_MASK == pfn:
            return <int64_t>found - 1
    return -1


cdef inline void _frames_add(Frames *t, uint64_t pfn, int64_t place,
                             const uint64_t *frames) noexcept nogil:
    """Keep a page whose hash and frame word are stored; not, where every place drawn is taken."""
    cdef uint64_t draw
    cdef uint32_t found
    for draw in range(FRAMES_DRAWS):
        found = dedup_take32(_frames_slot(t, pfn, draw), <uint32_t>(place + 1))
        if found == 0 or frames[found - 1] & FRAME_MASK == pfn:
            return
