# Passes over frame words: pages chosen by their flags, sums for each group of pages and each huge
# page. What a sum means is for others to say.

cdef struct FrameSlot:
    uint64_t frame        # with FRAME_LONE and FRAME_OUTSIDE
    uint32_t group        # whose entry it is: one more than the group's number
    uint32_t merged       # mappings that are KSM pages


cdef struct FrameTable:
    FrameSlot *slots
    int64_t size          # a power of two
    int64_t mask          # of those in use for the present group
    int64_t used
    bint pairs            # of a frame and a process, which stands in `merged`


cdef struct Sums:
    int64_t merged
    int64_t nodes
    int64_t room
    int64_t frames
    int64_t outside


cdef enum:
    FRAME_SLOTS = 4096    # at first, and of a group at first
    GATHERED = 1024
    SPAN_MOST = 1 << 30   # frames between the lowest and the highest, for one bit each
    OWNER_BITS = 6        # of the pages that share a hint
    BINS_MOST = 1 << 17   # so that none has more than PART_MOST frames
    DIGIT_BITS = 11       # of a sort
    DIGITS = 1 << DIGIT_BITS

cdef int64_t PART_MOST = <int64_t>1 << 32
cdef uint64_t FRAME_LONE = <uint64_t>1 << 62
cdef uint64_t FRAME_OUTSIDE = <uint64_t>1 << 63


def count(const uint64_t[::1] frames not None, uint64_t mask, uint64_t value):
    """How many words have `value` of the flags in `mask`."""
    cdef int64_t i, n = 0
    with nogil:
        for i in range(frames.shape[0]):
            n += (frames[i] & mask) == value
    return n


def select(const uint64_t[::1] frames not None, uint64_t mask, uint64_t value):
    """Where words have `value` of the flags in `mask`: int64 array, ascending."""
    cdef int64_t i, n = 0
    # Room for all and one more: what is never touched takes no memory.
    found = np.empty(frames.shape[0] + 1, np.int64)
    cdef int64_t[::1] index = found
    with nogil:
        for i in range(frames.shape[0]):
            # Written before it is known whether it counts, which nothing could foretell.
            index[n] = i
            n += (frames[i] & mask) == value
    return found[:n].copy()


def put(uint64_t[::1] frames not None, uint64_t mask, uint64_t value, uint64_t flags):
    """Set `flags` in the words that have `value` of the flags in `mask`."""
    cdef int64_t i
    with nogil:
        for i in range(frames.shape[0]):
            frames[i] |= flags if (frames[i] & mask) == value else 0


def all_apart(const uint64_t[::1] frames not None, uint64_t mask, uint64_t value):
    """Whether the words that have `value` of the flags in `mask` all have different frames.

    Returns
    -------
    bool
        False too where that would take too much memory to tell: frames that lie far apart.

    Raises
    ------
    MemoryError
    """
    cdef int apart
    with nogil:
        apart = _all_apart(frames, mask, value)
    if apart < 0:
        raise MemoryError("no memory to compare frame numbers")
    return apart == 1


cdef int _all_apart(const uint64_t[::1] frames, uint64_t mask, uint64_t value) noexcept nogil:
    cdef uint64_t bit, counts, both = 0, low = FRAME_MASK, high = 0
    cdef uint64_t *seen
    cdef uint64_t[GATHERED] chosen
    cdef int64_t i, n, end, begin = 0
    for i in range(frames.shape[0]):
        counts = -<uint64_t>((frames[i] & mask) == value)
        low = min(low, frames[i] & FRAME_MASK | ~counts)
        high = max(high, frames[i] & FRAME_MASK & counts)
    if low > high:
        return 1
    if high - low >= <uint64_t>SPAN_MOST:
        return 0
    seen = <uint64_t *>calloc((high - low) // 64 + 1, sizeof(uint64_t))
    if seen == NULL:
        return -1
    while begin < frames.shape[0]:
        end = min(begin + <int64_t>GATHERED, <int64_t>frames.shape[0])
        n = 0
        # No branch on whether a word counts, which nothing could foretell.
        for i in range(begin, end):
            chosen[n] = (frames[i] & FRAME_MASK) - low
            n += (frames[i] & mask) == value
        for i in range(n):
            bit = <uint64_t>1 << (chosen[i] & 63)
            both |= seen[chosen[i] >> 6] & bit
            seen[chosen[i] >> 6] |= bit
        begin = end
    free(seen)
    return both == 0


def sums(const uint64_t[::1] frames not None, const uint32_t[::1] order not None,
         const int64_t[::1] offsets not None, uint64_t skip, uint64_t mask, uint64_t value,
         int64_t limit):
    """Sums for each group of pages; group g is ``order[offsets[g]:offsets[g + 1]]``.

    A page with `HIDDEN` has a frame of its own.

    Parameters
    ----------
    frames : uint64 array
        Frame words.
    order : uint32 array
    offsets : int64 array
    skip : int
        Groups whose first page has any of these flags are passed by: their sums are 0.
    mask, value : int
        Pages with `value` of the flags in `mask` are known to have a frame of their own.
    limit : int

    Returns
    -------
    some, every : uint64 arrays
        Flags that any page has, and those that all have; of a group passed by, its first page's.
    sums : int64 array, shape (5, groups)
        KSM pages; their frames; what these lack, all in all, of `limit` pages each; frames of the
        other pages; frames with `OUTSIDE`.

    Raises
    ------
    MemoryError
    """
    cdef int64_t g, groups = offsets.shape[0] - 1
    cdef int rc = 0
    cdef FrameTable table
    if groups and (offsets[0] < 0 or offsets[groups] > order.shape[0]):
        raise ValueError("a group lies beyond the order")
    some_found, every_found = np.empty(groups, np.uint64), np.empty(groups, np.uint64)
    sums_found = np.zeros((5, groups), np.int64)
    cdef uint64_t[::1] some = some_found, every = every_found
    cdef int64_t[:, ::1] into = sums_found
    cdef Sums of
    table.slots = <FrameSlot *>calloc(FRAME_SLOTS, sizeof(FrameSlot))
    table.size, table.pairs = FRAME_SLOTS, False
    if table.slots == NULL:
        raise MemoryError("no memory to count frames")
    with nogil:
        for g in range(groups):
            memset(&of, 0, sizeof(of))
            some[g], every[g] = 0, ~FRAME_MASK
            if offsets[g] == offsets[g + 1]:
                continue
            if frames[order[offsets[g]]] & skip:
                some[g] = every[g] = frames[order[offsets[g]]] & ~FRAME_MASK
                continue
            rc = _sum_group(&frames[0], &order[offsets[g]], offsets[g + 1] - offsets[g],
                            offsets[groups] - offsets[g], mask, value, limit, <uint32_t>(g + 1),
                            &table, &some[g], &every[g], &of)
            if rc < 0:
                break
            into[0, g], into[1, g], into[2, g] = of.merged, of.nodes, of.room
            into[3, g], into[4, g] = of.frames, of.outside
        free(table.slots)
    if rc < 0:
        raise MemoryError("no memory to count frames")
    return some_found, every_found, sums_found


cdef int _sum_group(const uint64_t *frames, const uint32_t *order, int64_t n, int64_t rest,
                    uint64_t mask, uint64_t value, int64_t limit, uint32_t group, FrameTable *t,
                    uint64_t *some, uint64_t *every, Sums *of) noexcept nogil:
    """Sum up `n` pages; `rest` entries of `order` lie from here on."""
    cdef uint64_t word, any_of = 0, all_of = ~<uint64_t>0
    cdef int64_t i, own = 0, own_merged = 0, own_outside = 0
    cdef FrameSlot *slot
    _begin_group(t, n)
    for i in range(n):
        dedup_prefetch(&frames[order[min(i + AHEAD, rest - 1)]])   # copies lie far apart
        word = frames[order[i]]
        any_of |= word
        all_of &= word
        if (word & mask) == value or word & HIDDEN:
            own += 1
            own_merged += (word & KSM) != 0
            own_outside += (word & OUTSIDE) != 0
            continue
        slot = _frame_slot(t, word & FRAME_MASK, group)
        if slot == NULL:
            return -1
        if word & KSM:
            of.merged += 1
            of.nodes += slot.merged == 0
            if slot.merged == 0:
                of.room += limit - 1 if limit > 1 else 0
            elif slot.merged < limit:
                of.room -= 1
            slot.merged += 1
        elif not slot.frame & FRAME_LONE:
            slot.frame |= FRAME_LONE
            of.frames += 1
        if word & OUTSIDE and not slot.frame & FRAME_OUTSIDE:
            slot.frame |= FRAME_OUTSIDE
            of.outside += 1
    of.merged += own_merged
    of.nodes += own_merged
    of.room += own_merged * (limit - 1 if limit > 1 else 0)
    of.frames += own - own_merged
    of.outside += own_outside
    some[0] = any_of & ~FRAME_MASK
    every[0] = all_of & ~FRAME_MASK
    return 0


cdef inline void _begin_group(FrameTable *t, int64_t n) noexcept nogil:
    t.used = 0
    t.mask = FRAME_SLOTS - 1
    while t.mask > 7 and t.mask > 4 * n:
        t.mask >>= 1


cdef inline int64_t _frame_hash(uint64_t frame) noexcept nogil:
    return <int64_t>(frame * <uint64_t>0x9E3779B97F4A7C15 >> 24)


cdef inline FrameSlot *_frame_slot(FrameTable *t, uint64_t frame, uint32_t group) noexcept nogil:
    """The frame's place, made where there is none yet; NULL without memory."""
    cdef int64_t at
    if 2 * t.used > t.mask and _grow_frames(t, group) < 0:
        return NULL
    at = _frame_hash(frame) & t.mask
    while t.slots[at].group == group and (t.slots[at].frame & FRAME_MASK) != frame:
        at = (at + 1) & t.mask
    if t.slots[at].group != group:
        t.slots[at].frame, t.slots[at].group, t.slots[at].merged = frame, group, 0
        t.used += 1
    return &t.slots[at]


cdef inline uint64_t _pair(uint64_t frame, uint32_t process) noexcept nogil:
    """Both as one number, for the hash."""
    return frame ^ <uint64_t>process * <uint64_t>0xC2B2AE3D27D4EB4F


cdef inline int _add_pair(FrameTable *t, uint64_t frame, uint32_t process,
                          uint32_t group) noexcept nogil:
    """Note a frame of a process: 1 where that is new, -1 without memory."""
    cdef int64_t at
    if 2 * t.used > t.mask and _grow_frames(t, group) < 0:
        return -1
    at = _frame_hash(_pair(frame, process)) & t.mask
    while t.slots[at].group == group:
        if t.slots[at].frame == frame and t.slots[at].merged == process:
            return 0
        at = (at + 1) & t.mask
    t.slots[at].frame, t.slots[at].group, t.slots[at].merged = frame, group, process
    t.used += 1
    return 1


cdef int _grow_frames(FrameTable *t, uint32_t group) noexcept nogil:
    """More places for the frames of the group under way."""
    cdef int64_t i, at, mask = 4 * t.mask + 3
    cdef uint64_t frame
    cdef int64_t size = mask + 1 if mask + 1 > t.size else t.size
    cdef FrameSlot *slots = <FrameSlot *>calloc(size, sizeof(FrameSlot))
    if slots == NULL:
        return -1
    for i in range(t.mask + 1):
        if t.slots[i].group == group:
            frame = t.slots[i].frame & FRAME_MASK
            at = _frame_hash(_pair(frame, t.slots[i].merged) if t.pairs else frame) & mask
            while slots[at].group == group:
                at = (at + 1) & mask
            slots[at] = t.slots[i]
    free(t.slots)
    t.slots, t.size, t.mask = slots, size, mask
    return 0


cdef struct Owners:
    const int64_t *start
    const int64_t *process
    const uint32_t *hint
    int64_t n             # stretches of pages
    int64_t processes


cdef inline int64_t _owner(const Owners *o, int64_t page) noexcept nogil:
    cdef int64_t at = o.hint[page >> OWNER_BITS]
    while at + 1 < o.n and o.start[at + 1] <= page:
        at += 1
    return o.process[at]


cdef object _set_owners(Owners *o, int64_t pages, const int64_t[::1] start,
                        const int64_t[::1] process, const uint32_t[::1] hint, int64_t processes):
    cdef int64_t i
    o.n, o.processes = start.shape[0], processes
    if process.shape[0] != o.n or (pages and not o.n):
        raise ValueError("a process for each stretch, and one stretch at the least")
    if hint.shape[0] != (pages + (1 << OWNER_BITS) - 1) >> OWNER_BITS:
        raise ValueError("the stretches were found for other pages")
    for i in range(o.n):
        if process[i] < 0 or process[i] >= processes:
            raise ValueError("no such process")
    for i in range(hint.shape[0]):
        if hint[i] >= o.n:
            raise ValueError("no such stretch")
    if pages:
        o.start, o.process, o.hint = &start[0], &process[0], &hint[0]


def by_process(const uint64_t[::1] frames not None, const uint32_t[::1] order not None,
               const int64_t[::1] offsets not None, const uint8_t[::1] which not None,
               uint64_t mask, uint64_t value, const int64_t[::1] start not None,
               const int64_t[::1] process not None, const uint32_t[::1] hint not None,
               int64_t processes):
    """Mappings of some groups by process; group g is ``order[offsets[g]:offsets[g + 1]]``.

    Parameters
    ----------
    frames : uint64 array
        Frame words.
    order : uint32 array
    offsets : int64 array
    which : uint8 array
        0 for groups that do not count, 2 for those of which one mapping is left over.
    mask, value : int
        Pages with `value` of the flags in `mask` are known to have a frame of their own, and so
        have those with `HIDDEN`.
    start, process : int64 arrays
        Of stretches of pages, ascending.
    hint : uint32 array
        The stretch that each 64th page lies in.
    processes : int
        How many there are.

    Returns
    -------
    counts : int64 array, shape (4, processes)
        Mappings; then of groups with one left over: those of this process alone, those of several
        of which it is the last, and all those of several.
    within : int64 array
        Frames that each group has in a process more than one, all processes together.

    Raises
    ------
    MemoryError
    """
    cdef int64_t g, groups = offsets.shape[0] - 1
    cdef int rc = 0
    cdef FrameTable table
    cdef Owners owners
    memset(&owners, 0, sizeof(owners))
    _set_owners(&owners, frames.shape[0], start, process, hint, processes)
    if which.shape[0] != groups:
        raise ValueError("a mark for each group")
    if groups and (offsets[0] < 0 or offsets[groups] > order.shape[0]):
        raise ValueError("a group lies beyond the order")
    counts_found, within_found = np.zeros((4, processes), np.int64), np.zeros(groups, np.int64)
    seen_room = np.zeros(processes, np.uint32)
    cdef int64_t[:, ::1] counts = counts_found
    cdef int64_t[::1] within = within_found
    cdef uint32_t[::1] seen = seen_room
    table.slots = <FrameSlot *>calloc(FRAME_SLOTS, sizeof(FrameSlot))
    table.size, table.pairs = FRAME_SLOTS, True
    if table.slots == NULL:
        raise MemoryError("no memory to count frames")
    with nogil:
        for g in range(groups):
            if not which[g] or offsets[g] == offsets[g + 1]:
                continue
            rc = _share_group(&frames[0], &order[offsets[g]], offsets[g + 1] - offsets[g],
                              offsets[groups] - offsets[g], mask, value, which[g] == 2,
                              <uint32_t>(g + 1), &owners, &table, counts, &seen[0], &within[g])
            if rc < 0:
                break
        free(table.slots)
    if rc < 0:
        raise MemoryError("no memory to count frames")
    return counts_found, within_found


cdef int _share_group(const uint64_t *frames, const uint32_t *order, int64_t n, int64_t rest,
                      uint64_t mask, uint64_t value, bint left, uint32_t group,
                      const Owners *owners, FrameTable *t, int64_t[:, ::1] counts, uint32_t *seen,
                      int64_t *within) noexcept nogil:
    cdef uint64_t word
    cdef int64_t i, p, last = -1, involved = 0, own = 0
    cdef int new
    _begin_group(t, n)
    for i in range(n):
        dedup_prefetch(&frames[order[min(i + AHEAD, rest - 1)]])
        word = frames[order[i]]
        p = _owner(owners, order[i])
        counts[0, p] += 1
        involved += seen[p] != group
        seen[p] = group
        last = max(last, p)
        if (word & mask) == value or word & HIDDEN:
            own += 1
            continue
        new = _add_pair(t, word & FRAME_MASK, <uint32_t>p, group)
        if new < 0:
            return -1
        own += new
    within[0] = own - involved
    if left and involved == 1:
        counts[1, last] += 1
    elif left:
        counts[2, last] += 1
        for p in range(owners.processes):
            counts[3, p] += seen[p] == group
    return 0


def frame_parts(const uint64_t[::1] frames not None, uint64_t mask, uint64_t value, int64_t most,
                int64_t size):
    """Parts of the frame numbers, each with some `most` of the words that count.

    Parameters
    ----------
    frames : uint64 array
        Frame words.
    mask, value : int
        Only words that have `value` of the flags in `mask` count.
    most : int
    size : int
        Parts begin and end at multiples of this.

    Returns
    -------
    int64 array, shape (parts, 2)
        First frame, and the one behind the last: ascending, `PART_MOST` frames at the most.
    """
    cdef uint64_t step, counts, base, frame, low = FRAME_MASK, high = 0
    cdef int64_t i, n = 0, bins, begin = 0
    if size <= 0 or <uint64_t>size > <uint64_t>PART_MOST:
        raise ValueError("no such size")
    with nogil:
        for i in range(frames.shape[0]):
            counts = -<uint64_t>((frames[i] & mask) == value)
            low = min(low, frames[i] & FRAME_MASK | ~counts)
            high = max(high, frames[i] & FRAME_MASK & counts)
            n += <int64_t>(counts & 1)
    if not n:
        return np.empty((0, 2), np.int64)
    step = <uint64_t>size
    base = low - low % step
    while (high - base) // step >= <uint64_t>BINS_MOST:
        step *= 2
    bins = <int64_t>((high - base) // step) + 1
    of_bin = np.zeros(bins, np.uint32)
    cdef uint32_t[::1] into = of_bin
    cdef int bits = 0, power = step & (step - 1) == 0
    while (<uint64_t>1 << bits) < step:
        bits += 1
    with nogil:
        for i in range(frames.shape[0]):
            if (frames[i] & mask) == value:
                frame = (frames[i] & FRAME_MASK) - base
                into[<int64_t>(frame >> bits if power else frame // step)] += 1
    parts = []
    n = 0
    for i in range(bins):
        if n and (n + into[i] > most or <uint64_t>(i + 1 - begin) * step > <uint64_t>PART_MOST):
            parts.append((int(base + begin * step), int(base + i * step)))
            n = 0
        if not n:
            # A gap belongs to no part.
            begin = i
        n += into[i]
    parts.append((int(base + begin * step), int(base + bins * step)))
    return np.array(parts, np.int64)


def between(const uint64_t[::1] frames not None, uint64_t mask, uint64_t value, uint64_t low,
            uint64_t high):
    """Words that have `value` of the flags in `mask`, and a frame from `low` to below `high`.

    Returns
    -------
    uint64 array
        Of each the frame, less `low`, above 32 bits of where it is; ascending.
    """
    cdef int64_t i, n = 0
    cdef uint64_t frame, span = high - low
    cdef bint there
    if high < low or span > <uint64_t>PART_MOST or frames.shape[0] > <int64_t>PART_MOST:
        raise ValueError("more frames or words than 32 bits tell apart")
    # What is never touched takes no memory.
    room = np.empty(frames.shape[0] + 1, np.uint64)
    cdef uint64_t[::1] found = room
    with nogil:
        for i in range(frames.shape[0]):
            frame = (frames[i] & FRAME_MASK) - low
            found[n] = frame << 32 | <uint64_t>i
            n += (frame < span) & ((frames[i] & mask) == value)
    other = np.empty(n + 1, np.uint64)
    cdef uint64_t[::1] spare = other
    with nogil:
        there = _sort_by_frame(&found[0], &spare[0], n, span)
    return (other if there else room)[:n]


cdef bint _sort_by_frame(uint64_t *found, uint64_t *spare, int64_t n,
                         uint64_t span) noexcept nogil:
    """Sort words that ascend by their lower 32 bits by the upper ones, all of them below `span`.

    Digit by digit: that takes a fraction of what comparing takes. Gives whether the result lies in
    `spare`.
    """
    cdef int64_t[DIGITS] at
    cdef int64_t i, k, before, total
    cdef int shift = 32, there = 0
    cdef uint64_t *swap
    while shift < 64 and (span - 1) >> (shift - 32):
        memset(at, 0, sizeof(at))
        for i in range(n):
            at[found[i] >> shift & (DIGITS - 1)] += 1
        total = 0
        for k in range(DIGITS):
            before = at[k]
            at[k] = total
            total += before
        for i in range(n):
            k = found[i] >> shift & (DIGITS - 1)
            spare[at[k]] = found[i]
            at[k] += 1
        swap = found
        found = spare
        spare = swap
        there ^= 1
        shift += DIGIT_BITS
    return there


cdef struct Stretch:
    int64_t block
    int64_t count
    int64_t last


cdef struct Blocks:
    Stretch *stretches
    int64_t n
    int64_t capacity
    int64_t others        # how many


def by_block(const uint64_t[::1] frames not None, uint64_t mask, uint64_t value, uint64_t flag,
             int64_t size):
    """Count words by block of `size` frames: frame number // size.

    Parameters
    ----------
    frames : uint64 array
        Frame words.
    mask, value : int
        Only words that have `value` of the flags in `mask` count.
    flag : int
        Those without it lie in no block.
    size : int

    Returns
    -------
    others : int64 array
        Where the words that lie in no block are, ascending.
    block, count, last : int64 arrays
        Blocks that have any word, ascending; how many; where the last one is.

    Raises
    ------
    MemoryError
    """
    cdef Blocks found
    cdef int rc
    cdef int64_t i
    if size <= 0:
        raise ValueError("a block has a frame at the least")
    room = np.empty(frames.shape[0] + 1, np.int64)
    cdef int64_t[::1] others = room
    cdef int64_t[:, ::1] into
    memset(&found, 0, sizeof(found))
    try:
        with nogil:
            rc = _find_blocks(frames, mask, value, flag, <uint64_t>size, &others[0], &found)
        if rc < 0:
            raise MemoryError("no memory to count frames")
        stretches = np.empty((3, found.n), np.int64)
        into = stretches
        for i in range(found.n):
            into[0, i], into[1, i] = found.stretches[i].block, found.stretches[i].count
            into[2, i] = found.stretches[i].last
    finally:
        free(found.stretches)
    # Ascending by place, so that of each block the last one stays the last.
    block, count, last = stretches[:, np.argsort(stretches[0], kind="stable")]
    if not len(block):
        return room[: found.others].copy(), block, count, last
    starts = np.flatnonzero(np.diff(block, prepend=block[0] - 1))
    ends = np.append(starts[1:], len(block)) - 1
    return room[: found.others].copy(), block[starts], np.add.reduceat(count, starts), last[ends]


cdef int _find_blocks(const uint64_t[::1] frames, uint64_t mask, uint64_t value, uint64_t flag,
                      uint64_t size, int64_t *others, Blocks *found) noexcept nogil:
    """Pages of one block mostly follow each other: so many are counted at a time."""
    cdef uint64_t word, frame, counts, inside, start = 0
    cdef int64_t[GATHERED] chosen
    cdef int64_t i, end, begin = 0, pages = 0, block = -1, n = 0, of_block, last = 0
    while begin < frames.shape[0]:
        end = min(begin + <int64_t>GATHERED, <int64_t>frames.shape[0])
        of_block = 0
        # No branch on what counts, which nothing could foretell.
        for i in range(begin, end):
            word = frames[i]
            counts = (word & mask) == value
            inside = (word & flag) != 0
            others[n] = chosen[of_block] = i
            n += counts & ~inside
            of_block += counts & inside
        for i in range(of_block):
            frame = frames[chosen[i]] & FRAME_MASK
            if frame - start >= size or block < 0:
                if block >= 0 and _add_stretch(found, block, pages, last) < 0:
                    return -1
                block, pages = frame // size, 0
                start = frame - frame % size
            pages += 1
            last = chosen[i]
        begin = end
    found.others = n
    return _add_stretch(found, block, pages, last) if block >= 0 else 0


cdef int _add_stretch(Blocks *found, int64_t block, int64_t count, int64_t last) noexcept nogil:
    cdef int64_t capacity = found.capacity
    cdef Stretch *grown
    if found.n == capacity:
        capacity = 2 * capacity + 1024
        grown = <Stretch *>realloc(found.stretches, capacity * sizeof(Stretch))
        if grown == NULL:
            return -1
        found.stretches, found.capacity = grown, capacity
    grown = &found.stretches[found.n]
    grown.block, grown.count, grown.last = block, count, last
    found.n += 1
    return 0


cdef object _check_runs(int64_t n, const int64_t[::1] first, const int64_t[::1] count):
    cdef int64_t r
    if count.shape[0] != first.shape[0]:
        raise ValueError("the arrays of the runs differ in length")
    for r in range(first.shape[0]):
        if first[r] < 0 or count[r] < 0 or first[r] + count[r] > n:
            raise ValueError("a run lies beyond the pages")


def block_heads(const uint64_t[::1] frames not None, const int64_t[::1] first not None,
                const int64_t[::1] count not None, uint64_t mask, uint64_t value, int64_t size):
    """A word of each block of `size` frames that runs have words of.

    Parameters
    ----------
    frames : uint64 array
        Frame words.
    first, count : int64 arrays, one entry a run
        Its words in `frames`.
    mask, value : int
        Only words that have `value` of the flags in `mask` count.
    size : int

    Returns
    -------
    int64 array
        Where the words are, ascending as the runs do: the first of each stretch in one block.
    """
    cdef int64_t r, i, n = 0, total = 0
    cdef uint64_t frame, start = 0
    _check_runs(frames.shape[0], first, count)
    if size <= 0:
        raise ValueError("a block has a frame at the least")
    for r in range(first.shape[0]):
        total += count[r]
    # What is never touched takes no memory.
    found = np.empty(total, np.int64)
    cdef int64_t[::1] index = found
    with nogil:
        for r in range(first.shape[0]):
            for i in range(first[r], first[r] + count[r]):
                frame = frames[i] & FRAME_MASK
                if ((frames[i] & mask) == value) & ((frame - start >= <uint64_t>size) | (n == 0)):
                    index[n] = i
                    n += 1
                    start = frame - frame % <uint64_t>size
    return found[:n].copy()


def put_in_runs(uint64_t[::1] frames not None, const int64_t[::1] first not None,
                const int64_t[::1] count not None, uint64_t mask, uint64_t value, uint64_t flags):
    """As `put`, in the pages of some runs."""
    cdef int64_t r, i
    _check_runs(frames.shape[0], first, count)
    with nogil:
        for r in range(first.shape[0]):
            for i in range(first[r], first[r] + count[r]):
                frames[i] |= flags if (frames[i] & mask) == value else 0


def blocks_of(const uint64_t[::1] frames not None, const uint32_t[::1] order not None,
              const int64_t[::1] offsets not None, const uint8_t[::1] which not None,
              uint64_t mask, uint64_t value, int64_t size):
    """Blocks of `size` frames that the pages of some groups lie in: int64 array, ascending.

    Parameters
    ----------
    frames : uint64 array
        Frame words.
    order : uint32 array
    offsets : int64 array
        Group g is ``order[offsets[g]:offsets[g + 1]]``.
    which : uint8 array
        Not 0 for groups that count.
    mask, value : int
        Only words that have `value` of the flags in `mask` count.
    size : int

    Raises
    ------
    MemoryError
    """
    cdef int64_t i, n, groups = offsets.shape[0] - 1
    cdef uint8_t *marks = NULL
    if which.shape[0] != groups or size <= 0:
        raise ValueError("a mark for each group, and a frame in a block at the least")
    if groups and (offsets[0] < 0 or offsets[groups] > order.shape[0]):
        raise ValueError("a group lies beyond the order")
    try:
        with nogil:
            n = _mark_blocks(frames, order, offsets, which, mask, value, <uint64_t>size, &marks)
        if n < 0:
            raise MemoryError("no memory to mark blocks of frames")
        return np.flatnonzero(<uint8_t[:n]>marks) if n else np.empty(0, np.int64)
    finally:
        free(marks)


cdef int64_t _mark_blocks(const uint64_t[::1] frames, const uint32_t[::1] order,
                          const int64_t[::1] offsets, const uint8_t[::1] which, uint64_t mask,
                          uint64_t value, uint64_t size, uint8_t **marks) noexcept nogil:
    """Mark them; gives how many marks there are, below 0 without memory."""
    cdef int64_t g, i, wanted, n = 0
    cdef uint64_t word, frame, block
    cdef uint8_t *mark = NULL
    cdef int bits = 0, power = size & (size - 1) == 0
    while (<uint64_t>1 << bits) < size:
        bits += 1
    for g in range(which.shape[0]):
        if not which[g]:
            continue
        for i in range(offsets[g], offsets[g + 1]):
            dedup_prefetch(&frames[order[min(i + AHEAD, offsets[which.shape[0]] - 1)]])
            word = frames[order[i]]
            if (word & mask) != value:
                continue
            frame = word & FRAME_MASK
            # A size mostly is a power of two, and a shift takes far less than a division.
            block = frame >> bits if power else frame // size
            if <int64_t>block >= n:
                wanted = 2 * <int64_t>block + 1024
                mark = <uint8_t *>realloc(marks[0], wanted)
                if mark == NULL:
                    return -1
                memset(mark + n, 0, wanted - n)
                marks[0], n = mark, wanted
            mark[block] = 1
    return n


def any_in_one_block(const uint64_t[::1] frames not None, const uint32_t[::1] order not None,
                     const int64_t[::1] offsets not None, uint64_t skip, uint64_t mask,
                     uint64_t value, int64_t size):
    """Whether all pages of any group lie in one block of `size` frames.

    Parameters
    ----------
    frames : uint64 array
        Frame words.
    order : uint32 array
    offsets : int64 array
        Group g is ``order[offsets[g]:offsets[g + 1]]``.
    skip : int
        Groups whose first page has any of these flags are passed by.
    mask, value : int
        A page without `value` of the flags in `mask` lies in no block.
    size : int
    """
    cdef int64_t g, i, groups = offsets.shape[0] - 1
    cdef uint64_t word, block
    cdef bint found = False
    if size <= 0 or (groups and (offsets[0] < 0 or offsets[groups] > order.shape[0])):
        raise ValueError("a group lies beyond the order, or a block has no frame")
    with nogil:
        for g in range(groups):
            if offsets[g] == offsets[g + 1]:
                continue
            word = frames[order[offsets[g]]]
            if word & skip or (word & mask) != value:
                continue
            block = (word & FRAME_MASK) // <uint64_t>size
            found = True
            for i in range(offsets[g] + 1, offsets[g + 1]):
                word = frames[order[i]]
                if (word & mask) != value or (word & FRAME_MASK) // <uint64_t>size != block:
                    found = False
                    break
            if found:
                break
    return found
