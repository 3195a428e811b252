# Grouping by content: radix partition on the hash's top bits, then a small table a part.

cdef struct Slot:
    uint64_t hash
    int64_t count
    int64_t place     # group's place in the part's output, -1 for a single


cdef struct Table:
    Slot *slots
    int64_t size      # a power of two


cdef struct Output:
    int64_t *order     # room for all pages: what is never touched takes no memory
    size_t room        # bytes
    int64_t n_order
    int64_t *offsets   # of each group's end
    int64_t n_groups
    int64_t cap_groups
    int64_t considered


cdef enum:
    PART_PAGES = 4096          # wanted in a part, and gathered at a time
    TABLE_SLOTS = 8192         # of a part at first: it grows by contents, not by copies
    PARTS_MOST_BITS = 12
    FLAG_BITS = 14
    HUGE_ROOM = 2 * 1024 * 1024


def group(const uint64_t[::1] hashes not None, uint64_t[::1] frames not None, uint64_t skip,
          int slice_bits=0, uint64_t which=0):
    """Group equal hashes; mark those that occur twice or more.

    Slices of the hash space are independent of each other: threads may group one each, and
    memory stays bounded.

    Parameters
    ----------
    hashes : uint64 array, shape (n,)
    frames : uint64 array, shape (n,)
        Frame words; `DUPLICATE` is set in those of a group of two or more. Clear it before.
    skip : int
        Pages with any of these flags are left out.
    slice_bits, which : int
        Only hashes whose top `slice_bits` bits are `which`.

    Returns
    -------
    order : int64 array
        Indices of the pages with a partner, group after group, ascending within a group.
    offsets : int64 array
        Group g is ``order[offsets[g]:offsets[g + 1]]``.
    considered : int
        Pages not left out.

    Raises
    ------
    MemoryError
    """
    cdef Output out
    cdef int rc = 0, part_bits = 0
    cdef int64_t n = hashes.shape[0]
    if frames.shape[0] != n:
        raise ValueError("hashes and frames differ in length")
    if n > <int64_t>1 << 32:
        raise ValueError("more than 2**32 pages")
    memset(&out, 0, sizeof(out))
    try:
        if n:
            while part_bits < PARTS_MOST_BITS and (n >> (slice_bits + part_bits)) > PART_PAGES:
                part_bits += 1
            with nogil:
                rc = _group_slice(&hashes[0], &frames[0], n, skip, slice_bits, part_bits, which,
                                  &out)
            if rc < 0:
                raise MemoryError("no memory to group the pages")
        order, offsets = _taken(&out), np.zeros(out.n_groups + 1, np.int64)
        _copy_out(offsets[1:], out.offsets)
        return order, offsets, out.considered
    finally:
        if out.order != NULL:
            munmap(out.order, out.room)
        free(out.offsets)


def census(const uint64_t[::1] frames not None, const int64_t[::1] first not None,
           const int64_t[::1] count not None, const int64_t[::1] process not None):
    """Count the pages of runs by process and flags.

    Parameters
    ----------
    frames : uint64 array
        Frame words.
    first, count, process : int64 arrays, one entry a run
        Its pages in `frames`, and whose they are; neighbours of one process are counted together.

    Returns
    -------
    process : int64 array
    flags : uint64 array
        Frame words without the frame number and `SEEN`.
    count : int64 array
        Pages, above 0.
    """
    cdef int64_t runs = first.shape[0], r, i, n_met = 0
    cdef uint64_t bits
    if count.shape[0] != runs or process.shape[0] != runs:
        raise ValueError("the arrays of the runs differ in length")
    table = np.zeros(1 << FLAG_BITS, np.int64)
    met_bits = np.empty(1 << FLAG_BITS, np.uint64)
    cdef int64_t[::1] counts = table
    cdef uint64_t[::1] met = met_bits
    found = []
    for r in range(runs):
        if first[r] < 0 or count[r] < 0 or first[r] + count[r] > frames.shape[0]:
            raise ValueError("a run lies beyond the pages")
        with nogil:
            for i in range(first[r], first[r] + count[r]):
                bits = (frames[i] & ~SEEN) >> FRAME_BITS & ((1 << FLAG_BITS) - 1)
                if counts[bits] == 0:
                    met[n_met] = bits
                    n_met += 1
                counts[bits] += 1
        if n_met and (r + 1 == runs or process[r + 1] != process[r]):
            which = met_bits[:n_met].astype(np.int64)
            found.append((np.full(n_met, process[r], np.int64), which, table[which]))
            table[which] = 0
            n_met = 0
    if not found:
        empty = np.zeros(0, np.int64)
        return empty, np.zeros(0, np.uint64), empty
    whose, which, pages = (np.concatenate(part) for part in zip(*found, strict=True))
    return whose, which.astype(np.uint64) << np.uint64(FRAME_BITS), pages


def clear(uint64_t[::1] frames not None, uint64_t flags):
    """Take `flags` out of all frame words; gives the flags that any of them has then."""
    cdef uint64_t found = 0
    cdef int64_t i
    with nogil:
        for i in range(frames.shape[0]):
            frames[i] &= ~flags
            found |= frames[i]
    return found & ~FRAME_MASK


@cython.final
cdef class _Owned:
    """Memory from mmap that an array looks into."""

    cdef int64_t *memory
    cdef size_t room
    cdef int64_t n

    def __dealloc__(self):
        if self.memory != NULL:
            munmap(self.memory, self.room)

    @property
    def __array_interface__(self):
        return {
            "version": 3,
            "typestr": np.dtype(np.int64).str,
            "shape": (self.n,),
            "data": (<uintptr_t>self.memory, False),
        }


cdef object _taken(Output *out):
    """The order as an array without a copy: the memory is the array's from here on."""
    cdef _Owned owner = _Owned()
    if out.n_order == 0:
        return np.empty(0, np.int64)
    owner.memory, owner.room, owner.n = out.order, out.room, out.n_order
    out.order = NULL
    return np.asarray(owner)


def let_go(int64_t[::1] values not None):
    """Give the memory of values that are not needed any more back to the kernel.

    Parameters
    ----------
    values : int64 array
        From `group`, or a part of it: they are undefined from here on. Only whole pages of memory
        go, so that a neighbour's stay.
    """
    cdef uintptr_t page = getpagesize(), begin, end
    if values.shape[0] == 0:
        return
    begin = (<uintptr_t>&values[0] + page - 1) // page * page
    end = <uintptr_t>(&values[0] + values.shape[0]) // page * page
    if end > begin:
        with nogil:
            c_madvise(<void *>begin, end - begin, MADV_DONTNEED)


cdef inline size_t _whole(size_t size) noexcept nogil:
    """The size, in whole huge pages where it is one or more: so the kernel aligns it to them."""
    return (size + HUGE_ROOM - 1) // HUGE_ROOM * HUGE_ROOM if size >= HUGE_ROOM else size


cdef uint8_t *_room(size_t size) noexcept nogil:
    """Memory from the kernel itself: malloc would keep it. On huge pages where it is one
    or more: the first touch of small ones would take longer than the grouping. NULL without memory.
    """
    cdef void *memory = mmap(NULL, size, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1,
                             0)
    if memory == MAP_FAILED:
        return NULL
    if size >= HUGE_ROOM:
        c_madvise(memory, size, MADV_HUGEPAGE)
    return <uint8_t *>memory


cdef void _copy_out(int64_t[::1] into, const int64_t *values) noexcept:
    cdef int64_t i
    for i in range(into.shape[0]):
        into[i] = values[i]


cdef inline int64_t _part(uint64_t hash, int bits, int64_t before, int64_t parts) noexcept nogil:
    """The part of a hash; `parts` where it is of another slice. Nothing here to mispredict."""
    cdef uint64_t part = (hash >> (64 - bits) if bits else 0) - <uint64_t>before
    return <int64_t>part if part < <uint64_t>parts else parts


cdef int _group_slice(const uint64_t *hashes, uint64_t *frames, int64_t n, uint64_t skip,
                      int slice_bits, int part_bits, uint64_t which, Output *out) noexcept nogil:
    cdef int64_t parts = <int64_t>1 << part_bits, i, at, total = 0
    cdef int64_t before = <int64_t>which << part_bits
    cdef int bits = slice_bits + part_bits
    cdef size_t room
    # One part more for the pages of other slices, all on one place.
    cdef int64_t *ends = <int64_t *>malloc((parts + 1) * sizeof(int64_t))
    cdef uint32_t *members = NULL
    cdef Table table
    cdef int rc = -1
    if ends == NULL:
        return -1
    memset(ends, 0, (parts + 1) * sizeof(int64_t))
    for i in range(n):
        if skip and frames[i] & skip:
            continue
        ends[_part(hashes[i], bits, before, parts)] += 1
    for i in range(parts + 1):
        at = ends[i]
        ends[i] = total
        total += at if i < parts else 0
    out.considered += total
    room = _whole((total + 1) * sizeof(uint32_t))
    members = <uint32_t *>_room(room)
    out.room = _whole((total + 1) * sizeof(int64_t))
    out.order = <int64_t *>_room(out.room)
    table.slots = <Slot *>malloc(TABLE_SLOTS * sizeof(Slot))
    table.size = TABLE_SLOTS
    if members != NULL and out.order != NULL and table.slots != NULL:
        for i in range(n):
            if skip and frames[i] & skip:
                continue
            at = _part(hashes[i], bits, before, parts)
            members[ends[at]] = <uint32_t>i
            ends[at] += at < parts
        rc = 0
        at = 0
        for i in range(parts):
            if ends[i] - at >= 2 and _group_part(members + at, ends[i] - at, &table, hashes,
                                                 frames, out) < 0:
                rc = -1
                break
            at = ends[i]
    free(ends)
    if members != NULL:
        munmap(members, room)
    free(table.slots)
    return rc


cdef int _group_part(const uint32_t *members, int64_t n, Table *t, const uint64_t *hashes,
                     uint64_t *frames, Output *out) noexcept nogil:
    """Count in the table, give each content with a partner its place, then fill the places."""
    cdef int64_t i, at, mask = t.size - 1, groups = 0, contents = 0, place
    cdef int64_t begin, end
    cdef uint64_t[PART_PAGES] gathered
    cdef uint64_t hash
    cdef Slot *table = t.slots
    memset(table, 0, t.size * sizeof(Slot))
    begin = 0
    while begin < n:
        end = begin + PART_PAGES if n - begin > PART_PAGES else n
        # All at once, so that the memory's latency is waited for but once.
        for i in range(begin, end):
            gathered[i - begin] = hashes[members[i]]
        for i in range(begin, end):
            hash = gathered[i - begin]
            at = _find(table, mask, hash)
            if table[at].count == 0:
                contents += 1
                if 2 * contents > t.size:
                    if _double(t) < 0:
                        return -1
                    table, mask = t.slots, t.size - 1
                    at = _find(table, mask, hash)
                table[at].hash = hash
            table[at].count += 1
            if table[at].count == 2:
                groups += 1
        begin = end
    if not groups:
        return 0
    if _reserve(&out.offsets, &out.cap_groups, out.n_groups + groups) < 0:
        return -1
    place = out.n_order
    begin = 0
    while begin < n:
        end = begin + PART_PAGES if n - begin > PART_PAGES else n
        if n > PART_PAGES:
            for i in range(begin, end):
                gathered[i - begin] = hashes[members[i]]
        for i in range(begin, end):
            at = _find(table, mask, gathered[i - begin])
            if table[at].count < 2:
                continue
            if table[at].place == 0:
                # Places are kept as place + 1, since 0 means none yet.
                table[at].place = place + 1
                place += table[at].count
                out.offsets[out.n_groups] = place
                out.n_groups += 1
            out.order[table[at].place - 1] = members[i]
            table[at].place += 1
            frames[members[i]] |= DUPLICATE
        begin = end
    out.n_order = place
    return 0


cdef int _double(Table *t) noexcept nogil:
    """A table twice as large with the same contents."""
    cdef int64_t i, at, size = 2 * t.size
    cdef Slot *slots = <Slot *>malloc(size * sizeof(Slot))
    if slots == NULL:
        return -1
    memset(slots, 0, size * sizeof(Slot))
    for i in range(t.size):
        if t.slots[i].count:
            at = _find(slots, size - 1, t.slots[i].hash)
            slots[at] = t.slots[i]
    free(t.slots)
    t.slots = slots
    t.size = size
    return 0


cdef inline int64_t _find(const Slot *table, int64_t mask, uint64_t hash) noexcept nogil:
    cdef int64_t at = <int64_t>(hash * <uint64_t>0x9E3779B97F4A7C15 >> 20) & mask
    while table[at].count and table[at].hash != hash:
        at = (at + 1) & mask
    return at


cdef int _reserve(int64_t **values, int64_t *capacity, int64_t wanted) noexcept nogil:
    cdef int64_t size = capacity[0] if capacity[0] else 1024
    cdef int64_t *grown
    if wanted <= capacity[0]:
        return 0
    while size < wanted:
        size *= 2
    grown = <int64_t *>realloc(values[0], size * sizeof(int64_t))
    if grown == NULL:
        return -1
    values[0] = grown
    capacity[0] = size
    return 0
