# Grouping by content: partition by the hash's top bits, then a small table a part.
#
# Threads share the work without waiting for each other's start: a phase is a number of tasks,
# taken off a counter, and is over when all of them are done, whoever did them. The pages' numbers
# are partitioned into the memory that becomes the order: each part is grouped in place, and what
# remains is moved together at the end.

cdef extern from *:
    """
    static inline int64_t dedup_done(int64_t *p)
    { return __atomic_add_fetch(p, 1, __ATOMIC_ACQ_REL); }
    static inline int64_t dedup_load_acquire(int64_t *p)
    { return __atomic_load_n(p, __ATOMIC_ACQUIRE); }
    #if defined(__x86_64__) || defined(__i386__)
    #define dedup_pause() __builtin_ia32_pause()
    #else
    #define dedup_pause() __asm__ volatile("" ::: "memory")
    #endif
    #define dedup_prefetch(p) __builtin_prefetch(p)
    #define dedup_lowest(w) __builtin_ctzll(w)
    """
    int64_t dedup_done(int64_t *p) noexcept nogil
    int64_t dedup_load_acquire(int64_t *p) noexcept nogil
    void dedup_pause() noexcept nogil
    void dedup_prefetch(const void *p) noexcept nogil
    int dedup_lowest(uint64_t w) noexcept nogil

cdef extern from "<string.h>" nogil:
    void *memcpy(void *to, const void *what, size_t size)
    void *memmove(void *to, const void *what, size_t size)

cdef extern from "<stdlib.h>" nogil:
    void *calloc(size_t count, size_t size)

cdef extern from "<unistd.h>" nogil:
    int usleep(unsigned int microseconds)


cdef struct Phase:
    int64_t taken
    int64_t done
    int64_t tasks


cdef struct Part:
    int64_t start     # in `members`, a multiple of 64
    int64_t pages
    int64_t kept      # pages in groups, at the part's start
    int64_t groups


cdef struct Rows:
    int64_t *values   # process, flags, pages
    int64_t n
    int64_t room


cdef struct Slot:
    uint64_t hash
    uint32_t count
    uint32_t place    # where the content's next page goes, plus one


cdef struct Table:
    Slot *slots
    int64_t size      # a power of two


cdef struct Piece:
    int64_t run         # its first page: run, and page of it
    int64_t page
    int64_t pages


cdef enum:
    THREADS_MOST = 8            # more would wait for memory, and take more of it


cdef struct Work:
    const uint64_t *hashes
    uint64_t *frames
    int64_t n
    uint64_t skip
    const int64_t *first
    const int64_t *count
    const int64_t *process
    int64_t n_runs
    int threads
    int64_t joined      # threads so far
    uint64_t heavy      # a hash that many pages may have: a part of its own, the first
    int shift           # a hash's part is its top bits, plus one
    int64_t n_parts
    int64_t n_stretches
    uint8_t *unstable   # by stretch: whether it has pages to skip
    uint32_t *places    # by stretch and part: pages, then where they go
    Part *parts
    uint32_t *members   # pages' numbers, part after part, ascending; at the end the order
    size_t room         # bytes of it
    uint64_t *heads     # a bit for each place in `members`: a group starts there
    uint64_t *marks     # by thread: a bit for each page that has a partner; then all in the first
    int64_t mark_words  # of a thread, in whole pages of memory
    int64_t most        # pages of a part that a thread's own memory is made for
    int64_t considered
    int64_t covered     # pages in runs
    Piece *pieces
    Rows[THREADS_MOST] rows
    int64_t *offsets
    size_t offsets_room
    int64_t n_order
    int64_t n_groups
    Phase counted
    Phase laid_out
    Phase spread
    Phase grouped
    Phase marked
    Phase told
    int64_t failed


cdef struct Scratch:
    void *memory
    uint64_t *hash      # of the part's pages that may have a copy
    uint64_t *content   # hash of each content
    uint32_t *index     # of those pages
    uint32_t *which     # content of each
    uint32_t *count     # pages of each content, then where they go
    uint32_t *table     # content plus one, by hash
    uint8_t *met        # by hash: 0 never, 1 once, more several times
    uint64_t *marks
    int64_t *counts     # by flags and lane
    int64_t *flags      # that were counted
    int64_t n_flags


cdef enum:
    PART_PAGES = 4096           # wanted in a part
    PART_BITS_MOST = 12
    OWN_PAGES = 16384           # larger parts are looked at twice, with a table that grows
    STRETCH_PAGES = 1 << 15
    STRETCHES_MOST = 64
    TASKS = 64                  # to group the parts in
    PIECES = 32                 # to count the pages in
    BLOCK_PAGES = 4096
    AHEAD = 96                  # pages whose hashes are asked for ahead
    MET_A_PAGE = 8
    SAMPLE = 64
    TABLE_SLOTS = 8192          # of a large part at first: it grows by contents, not by copies
    FLAG_BITS = 14
    DUPLICATE_BIT = 58
    LANES = 4
    HUGE_ROOM = 2 * 1024 * 1024

cdef uint64_t SPREAD = 0x9E3779B97F4A7C15
cdef uint64_t PAGES_MOST = (<uint64_t>1 << 32) - (1 << 20)   # places are uint32
cdef uint32_t NOWHERE = 0xFFFFFFFF


def group(const uint64_t[::1] hashes not None, uint64_t[::1] frames not None, uint64_t skip,
          const int64_t[::1] first not None, const int64_t[::1] count not None,
          const int64_t[::1] process not None, int threads=1):
    """Group equal hashes, mark those that occur twice or more, count the pages by their flags.

    Parameters
    ----------
    hashes : uint64 array, shape (n,)
    frames : uint64 array, shape (n,)
        Frame words; `DUPLICATE` is set in those of a group of two or more, and in no other.
    skip : int
        Pages with any of these flags are left out.
    first, count, process : int64 arrays, one entry a run
        Its pages, and whose they are; no page is in two runs.
    threads : int
        That share the work, this one among them; more than `THREADS_MOST` are not started.

    Returns
    -------
    order : uint32 array
        Indices of the pages with a partner, group after group, ascending within a group.
    offsets : int64 array
        Group g is ``order[offsets[g]:offsets[g + 1]]``.
    considered : int
        Pages not left out.
    census : int64 array, shape (rows, 3)
        Pages of the runs: a process, frame words without the frame number and `SEEN`, and how
        many there are, above 0. Several rows may tell of the same.

    Raises
    ------
    MemoryError
    """
    cdef Work w
    cdef int64_t r, runs = first.shape[0]
    if frames.shape[0] != hashes.shape[0]:
        raise ValueError("hashes and frames differ in length")
    if <uint64_t>hashes.shape[0] > PAGES_MOST:
        raise ValueError("more than 2**32 - 2**20 pages")
    if count.shape[0] != runs or process.shape[0] != runs:
        raise ValueError("the arrays of the runs differ in length")
    for r in range(runs):
        if first[r] < 0 or count[r] < 0 or count[r] > hashes.shape[0] - first[r]:
            raise ValueError("a run lies beyond the pages")
    if hashes.shape[0] == 0:
        return np.empty(0, np.uint32), np.zeros(1, np.int64), 0, np.empty((0, 3), np.int64)
    memset(&w, 0, sizeof(w))
    w.hashes, w.frames, w.n, w.skip = &hashes[0], &frames[0], hashes.shape[0], skip
    if runs:
        w.first, w.count, w.process, w.n_runs = &first[0], &count[0], &process[0], runs
    w.threads = min(max(threads, 1), THREADS_MOST)
    try:
        with nogil:
            if _prepare(&w) < 0:
                w.failed = 1
            else:
                _group_all(&w)
        if w.failed:
            raise MemoryError("no memory to group the pages")
        order = _Owned.of("u4", <void **>&w.members, w.room, w.n_order)
        offsets = _Owned.of("i8", <void **>&w.offsets, w.offsets_room, w.n_groups + 1)
        return order, offsets, w.considered, _rows_of(&w)
    finally:
        _release(&w)


@cython.final
cdef class _Owned:
    """Memory from mmap that an array looks into."""

    cdef void *memory
    cdef size_t room
    cdef int64_t n
    cdef object kind

    def __dealloc__(self):
        if self.memory != NULL:
            munmap(self.memory, self.room)

    @property
    def __array_interface__(self):
        return {
            "version": 3,
            "typestr": np.dtype(self.kind).str,
            "shape": (self.n,),
            "data": (<uintptr_t>self.memory, False),
        }

    @staticmethod
    cdef object of(kind, void **memory, size_t room, int64_t n):
        """An array without a copy: the memory is the array's from here on."""
        cdef _Owned owner = _Owned()
        owner.kind, owner.memory, owner.room, owner.n = kind, memory[0], room, n
        memory[0] = NULL
        return np.asarray(owner)


cdef object _rows_of(Work *w):
    """The threads' rows of the census in one array."""
    cdef int64_t t, i, j, at = 0
    for t in range(w.threads):
        at += w.rows[t].n
    found = np.empty((at, 3), np.int64)
    cdef int64_t[:, ::1] values = found
    at = 0
    for t in range(w.threads):
        for i in range(w.rows[t].n):
            for j in range(3):
                values[at, j] = w.rows[t].values[3 * i + j]
            at += 1
    return found


cdef inline size_t _whole(size_t size) noexcept nogil:
    """The size, in whole huge pages where it is one or more: so the kernel aligns it to them."""
    return (size + HUGE_ROOM - 1) // HUGE_ROOM * HUGE_ROOM if size >= HUGE_ROOM else size


cdef void *_room(size_t size) noexcept nogil:
    """Memory from the kernel itself, `_whole(size)` bytes: malloc would keep it. On huge pages as
    far as it fills them: the first touch of small ones would take longer than the grouping. NULL
    without memory.
    """
    cdef void *memory = mmap(NULL, _whole(size), PROT_READ | PROT_WRITE,
                             MAP_PRIVATE | MAP_ANONYMOUS, -1, 0)
    if memory == MAP_FAILED:
        return NULL
    if size >= HUGE_ROOM:
        c_madvise(memory, size // HUGE_ROOM * HUGE_ROOM, MADV_HUGEPAGE)
    return memory


cdef int _prepare(Work *w) noexcept nogil:
    cdef int bits = 1
    cdef int64_t words
    while bits < PART_BITS_MOST and w.n >> bits > PART_PAGES:
        bits += 1
    w.shift = 64 - bits
    w.n_parts = ((<int64_t>1) << bits) + 1
    w.n_stretches = (w.n + STRETCH_PAGES - 1) // STRETCH_PAGES
    if w.n_stretches > STRETCHES_MOST:
        w.n_stretches = STRETCHES_MOST
    w.most = 2 * (w.n >> bits)
    if w.most < OWN_PAGES:
        w.most = OWN_PAGES
    w.heavy = _frequent(w.hashes, w.n)
    w.room = _whole((w.n + 64 * w.n_parts) * sizeof(uint32_t))
    w.unstable = <uint8_t *>calloc(w.n_stretches, 1)
    w.places = <uint32_t *>calloc(w.n_stretches * w.n_parts, sizeof(uint32_t))
    w.parts = <Part *>calloc(w.n_parts, sizeof(Part))
    w.heads = <uint64_t *>calloc(w.n // 64 + 1 + w.n_parts, sizeof(uint64_t))
    w.members = <uint32_t *>_room((w.n + 64 * w.n_parts) * sizeof(uint32_t))
    words = getpagesize() // sizeof(uint64_t)
    w.mark_words = (w.n // 64 // words + 1) * words
    w.marks = <uint64_t *>_room(w.threads * w.mark_words * sizeof(uint64_t))
    w.pieces = <Piece *>calloc(PIECES, sizeof(Piece))
    if (w.unstable == NULL or w.places == NULL or w.parts == NULL or w.heads == NULL
            or w.members == NULL or w.marks == NULL or w.pieces == NULL):
        return -1
    w.counted.tasks = w.n * sizeof(uint32_t) // HUGE_ROOM + w.n_stretches
    w.spread.tasks = w.marked.tasks = w.n_stretches
    w.laid_out.tasks = 1
    w.grouped.tasks = 2 * TASKS
    w.told.tasks = 1 + PIECES
    return 0


cdef void _release(Work *w) noexcept nogil:
    cdef int64_t t
    for t in range(w.threads):
        free(w.rows[t].values)
    free(w.unstable)
    free(w.places)
    free(w.parts)
    free(w.heads)
    free(w.pieces)
    if w.marks != NULL:
        munmap(w.marks, _whole(w.threads * w.mark_words * sizeof(uint64_t)))
    if w.members != NULL:
        munmap(w.members, w.room)
    if w.offsets != NULL:
        munmap(w.offsets, w.offsets_room)


cdef uint64_t _frequent(const uint64_t *hashes, int64_t n) noexcept nogil:
    """The most frequent hash of a few: that of zero pages mostly."""
    cdef uint64_t[SAMPLE] some
    cdef int64_t i, j, same, most = 0, size = SAMPLE if n > SAMPLE else n
    cdef uint64_t found = 0
    for i in range(size):
        some[i] = hashes[n // size * i]
    for i in range(size):
        same = 0
        for j in range(size):
            same += some[i] == some[j]
        if same > most:
            most, found = same, some[i]
    return found


cdef inline bint _next(Phase *phase, int64_t *task) noexcept nogil:
    task[0] = dedup_fetch_add(&phase.taken, 1)
    return task[0] < phase.tasks


cdef void _until_done(Phase *phase) noexcept nogil:
    """Wait for what other threads have in hand."""
    cdef int spins = 0
    while dedup_load_acquire(&phase.done) < phase.tasks:
        if spins < 4096:
            spins += 1
            dedup_pause()
        else:
            usleep(50)


cdef void _group_all(Work *w) noexcept nogil:
    """Group in threads. Where one can't be started, the others do its work."""
    cdef pthread_t[THREADS_MOST] helpers
    cdef int64_t started = 0, t
    for t in range(w.threads - 1):
        if dedup_start(&helpers[started], &_help, w) == 0:
            started += 1
    _help(w)
    for t in range(started):
        pthread_join(helpers[t], NULL)


cdef void *_help(void *argument) noexcept nogil:
    cdef Work *w = <Work *>argument
    cdef Scratch own
    cdef int64_t task = 0, me = dedup_fetch_add(&w.joined, 1)
    memset(&own, 0, sizeof(own))
    while _next(&w.counted, &task):
        _count(w, task)
        dedup_done(&w.counted.done)
    _until_done(&w.counted)
    while _next(&w.laid_out, &task):
        _lay_out(w)
        dedup_done(&w.laid_out.done)
    _until_done(&w.laid_out)
    while _next(&w.spread, &task):
        _spread(w, task)
        dedup_done(&w.spread.done)
    _until_done(&w.spread)
    if _own(&own, w.most) < 0:
        dedup_store(&w.failed, 1)
    own.marks = w.marks + me * w.mark_words
    while _next(&w.grouped, &task):
        if not dedup_load(&w.failed) and _group_some(w, &own, task) < 0:
            dedup_store(&w.failed, 1)
        dedup_done(&w.grouped.done)
    _until_done(&w.grouped)
    while _next(&w.marked, &task):
        _join_marks(w, task)
        dedup_done(&w.marked.done)
    _until_done(&w.marked)
    while _next(&w.told, &task):
        if not dedup_load(&w.failed):
            if task == 0:
                if _together(w) < 0:
                    dedup_store(&w.failed, 1)
            elif _tell(w, &own, &w.pieces[task - 1], &w.rows[me]) < 0:
                dedup_store(&w.failed, 1)
        dedup_done(&w.told.done)
    free(own.memory)
    free(own.counts)
    free(own.flags)
    return NULL


cdef inline int64_t _first(const Work *w, int64_t stretch) noexcept nogil:
    """A stretch's first page: words of marks are not shared."""
    return w.n if stretch == w.n_stretches else w.n * stretch // w.n_stretches // 64 * 64


cdef void _count(Work *w, int64_t task) noexcept nogil:
    """Have a huge page of `members` made ready, or count a stretch's pages by part.

    Old marks are taken away. Huge pages are first: two threads that meet a new one in `_spread`
    would both clear it.
    """
    cdef int64_t touched = w.counted.tasks - w.n_stretches
    if task < touched:
        w.members[task * HUGE_ROOM // sizeof(uint32_t)] = 0
    else:
        _count_stretch(w, task - touched)


cdef void _count_stretch(Work *w, int64_t stretch) noexcept nogil:
    cdef int64_t begin = _first(w, stretch), stop = _first(w, stretch + 1), end, i
    cdef uint32_t *counts = w.places + stretch * w.n_parts
    cdef const uint64_t *hashes = w.hashes
    cdef uint64_t *frames = w.frames
    cdef uint64_t found, heavy = w.heavy, skip = w.skip
    cdef int shift = w.shift
    while begin < stop:
        end = begin + BLOCK_PAGES if stop - begin > BLOCK_PAGES else stop
        found = 0
        for i in range(begin, end):
            found |= frames[i]
        if found & DUPLICATE:
            for i in range(begin, end):
                frames[i] &= ~DUPLICATE
        if found & skip:
            w.unstable[stretch] = 1
            for i in range(begin, end):
                if not frames[i] & skip:
                    counts[_part(hashes[i], heavy, shift)] += 1
        else:
            for i in range(begin, end):
                counts[_part(hashes[i], heavy, shift)] += 1
        begin = end


cdef inline uint64_t _part(uint64_t hash, uint64_t heavy, int shift) noexcept nogil:
    """Nothing here to mispredict."""
    return ((hash >> shift) + 1) & -<uint64_t>(hash != heavy)


cdef void _lay_out(Work *w) noexcept nogil:
    """Where each part lies, and each stretch's pages in it."""
    cdef int64_t s, p, at = 0
    cdef uint32_t *row
    cdef uint32_t pages
    cdef Part *part
    for s in range(w.n_stretches):
        row = w.places + s * w.n_parts
        for p in range(w.n_parts):
            pages = row[p]
            row[p] = <uint32_t>w.parts[p].pages
            w.parts[p].pages += pages
    for p in range(w.n_parts):
        part = &w.parts[p]
        part.start = at
        at += (part.pages + 63) // 64 * 64
        w.considered += part.pages
    for s in range(w.n_stretches):
        row = w.places + s * w.n_parts
        for p in range(w.n_parts):
            row[p] += <uint32_t>w.parts[p].start
    part = w.parts
    if part.pages >= 2:
        part.kept, part.groups = part.pages, 1
        w.heads[part.start // 64] |= 1
    _cut(w)


cdef void _cut(Work *w) noexcept nogil:
    """The runs' pages in pieces of about the same size."""
    cdef int64_t r, piece = 0, before = 0, begin, end
    for r in range(w.n_runs):
        w.covered += w.count[r]
    for r in range(w.n_runs):
        end = before + w.count[r]
        while piece < PIECES:
            begin = w.covered * piece // PIECES
            if begin >= end:
                break
            w.pieces[piece].run = r
            w.pieces[piece].page = begin - before
            w.pieces[piece].pages = w.covered * (piece + 1) // PIECES - begin
            piece += 1
        before = end


cdef void _spread(Work *w, int64_t stretch) noexcept nogil:
    """Put the numbers of a stretch's pages into the parts."""
    cdef int64_t begin = _first(w, stretch), end = _first(w, stretch + 1), i
    cdef uint32_t *places = w.places + stretch * w.n_parts
    cdef uint32_t *members = w.members
    cdef const uint64_t *hashes = w.hashes
    cdef const uint64_t *frames = w.frames
    cdef uint64_t part, heavy = w.heavy, skip = w.skip
    cdef int shift = w.shift
    if w.unstable[stretch]:
        for i in range(begin, end):
            if not frames[i] & skip:
                part = _part(hashes[i], heavy, shift)
                members[places[part]] = <uint32_t>i
                places[part] += 1
    else:
        for i in range(begin, end):
            part = _part(hashes[i], heavy, shift)
            members[places[part]] = <uint32_t>i
            places[part] += 1


cdef int _group_some(Work *w, Scratch *own, int64_t task) noexcept nogil:
    """A stretch of the pages with the heavy hash, or of the other parts."""
    cdef Part *part = w.parts
    cdef int64_t i, p, end
    if task < TASKS:
        if part.kept:
            i = part.pages * task // TASKS
            _mark_all(w.members + part.start + i, part.pages * (task + 1) // TASKS - i, own.marks)
        return 0
    task -= TASKS
    end = 1 + (w.n_parts - 1) * (task + 1) // TASKS
    for p in range(1 + (w.n_parts - 1) * task // TASKS, end):
        part = &w.parts[p]
        if part.pages < 2:
            continue
        if part.pages <= w.most:
            _group_part(w, own, part, w.parts[end - 1].start + w.parts[end - 1].pages)
        elif _group_large(w, own, part) < 0:
            return -1
    return 0


cdef void _mark_all(const uint32_t *pages, int64_t n, uint64_t *marks) noexcept nogil:
    """Mark ascending pages: word after word."""
    cdef int64_t i, at = 0
    cdef uint64_t word = 0
    for i in range(n):
        if pages[i] // 64 != at:
            marks[at] |= word
            at = pages[i] // 64
            word = 0
        word |= <uint64_t>1 << (pages[i] & 63)
    marks[at] |= word


cdef inline void _mark(uint64_t *marks, uint32_t page) noexcept nogil:
    marks[page // 64] |= <uint64_t>1 << (page & 63)


cdef int _own(Scratch *own, int64_t pages) noexcept nogil:
    """A thread's memory for parts of so many pages."""
    cdef size_t size = _power(pages)
    own.memory = malloc(size * (8 + 8 + 4 + 4 + 4 + 2 * 4 + MET_A_PAGE))
    if own.memory == NULL:
        return -1
    own.hash = <uint64_t *>own.memory
    own.content = own.hash + size
    own.index = <uint32_t *>(own.content + size)
    own.which = own.index + size
    own.count = own.which + size
    own.table = own.count + size
    own.met = <uint8_t *>(own.table + 2 * size)
    return 0


cdef inline int64_t _power(int64_t least) noexcept nogil:
    """The first power of two from 8 on that is no less."""
    cdef int64_t size = 8
    while size < least:
        size *= 2
    return size


cdef void _group_part(Work *w, Scratch *own, Part *part, int64_t end) noexcept nogil:
    """Drop pages whose hash is there once, number the contents of the others, give them places.

    The members of other parts up to `end` come next.
    """
    cdef int64_t n = part.pages, i, at, mask, contents = 0, some = 0, left = end - part.start
    cdef const uint64_t *hashes = w.hashes
    cdef uint32_t *members = w.members + part.start
    cdef uint64_t *hash = own.hash
    cdef uint64_t *content = own.content
    cdef uint32_t *index = own.index
    cdef uint32_t *which = own.which
    cdef uint32_t *count = own.count
    cdef uint32_t *table = own.table
    cdef uint8_t *met = own.met
    cdef uint64_t value
    cdef uint32_t c, place = 0
    cdef int64_t size = _power(n) * MET_A_PAGE
    cdef int shift = 64 - dedup_lowest(size)
    memset(met, 0, size)
    for i in range(n):
        if i + AHEAD < left:
            dedup_prefetch(&hashes[members[i + AHEAD]])
        # An odd factor: equal if and only if the hashes are.
        value = hashes[members[i]] * SPREAD
        hash[i] = value
        met[value >> shift] = met[value >> shift] << 1 | 1
    for i in range(n):
        value = hash[i]
        hash[some] = value
        index[some] = members[i]
        some += met[value >> shift] > 1
    if some < 2:
        return
    size = _power(2 * some)
    mask = size - 1
    memset(table, 0, size * sizeof(uint32_t))
    for i in range(some):
        value = hash[i]
        at = <int64_t>(value >> 20) & mask
        c = table[at]
        while c and content[c - 1] != value:
            at = (at + 1) & mask
            c = table[at]
        if c == 0:
            content[contents] = value
            count[contents] = 0
            contents += 1
            c = <uint32_t>contents
            table[at] = c
        count[c - 1] += 1
        which[i] = c - 1
    for i in range(contents):
        c = count[i]
        if c < 2:
            count[i] = NOWHERE
            continue
        count[i] = place
        _mark_head(w, part.start + place)
        part.groups += 1
        place += c
    part.kept = place
    if place == 0:
        return
    for i in range(some):
        c = which[i]
        if count[c] != NOWHERE:
            members[count[c]] = index[i]
            count[c] += 1
            _mark(own.marks, index[i])


cdef inline void _mark_head(Work *w, int64_t place) noexcept nogil:
    """Parts share no word of `heads`."""
    w.heads[place // 64] |= <uint64_t>1 << (place & 63)


cdef int _group_large(Work *w, Scratch *own, Part *part) noexcept nogil:
    """Count in a table that grows, then fill the places in other memory. -1 without memory."""
    cdef size_t size = part.pages * sizeof(uint32_t)
    cdef uint32_t *order = <uint32_t *>_room(size)
    cdef Table table
    cdef int rc = -1
    table.size = TABLE_SLOTS
    table.slots = <Slot *>calloc(table.size, sizeof(Slot))
    if order != NULL and table.slots != NULL:
        rc = _in_table(w, part, &table, order, own.marks)
    if order != NULL:
        munmap(order, _whole(size))
    free(table.slots)
    return rc


cdef int _in_table(Work *w, Part *part, Table *t, uint32_t *order,
                   uint64_t *marks) noexcept nogil:
    cdef const uint32_t *members = w.members + part.start
    cdef uint64_t[BLOCK_PAGES] gathered
    cdef int64_t i, begin, end, n = part.pages, contents = 0
    cdef uint32_t place = 0
    cdef Slot *slot
    begin = 0
    while begin < n:
        end = _gather(w.hashes, members, begin, n, gathered)
        for i in range(end - begin):
            slot = _find(t, gathered[i])
            if slot.count == 0:
                contents += 1
                if 2 * contents > t.size:
                    if _double(t) < 0:
                        return -1
                    slot = _find(t, gathered[i])
                slot.hash = gathered[i]
            slot.count += 1
        begin = end
    begin = 0
    while begin < n:
        end = _gather(w.hashes, members, begin, n, gathered)
        for i in range(end - begin):
            slot = _find(t, gathered[i])
            if slot.count < 2:
                continue
            if slot.place == 0:
                slot.place = place + 1
                place += slot.count
                _mark_head(w, part.start + slot.place - 1)
                part.groups += 1
            order[slot.place - 1] = members[begin + i]
            slot.place += 1
            _mark(marks, members[begin + i])
        begin = end
    part.kept = place
    memcpy(w.members + part.start, order, place * sizeof(uint32_t))
    return 0


cdef inline int64_t _gather(const uint64_t *hashes, const uint32_t *members, int64_t begin,
                            int64_t n, uint64_t *gathered) noexcept nogil:
    """The hashes of so many members, all at once: the memory's latency is waited for but once."""
    cdef int64_t end = begin + BLOCK_PAGES if n - begin > BLOCK_PAGES else n, i
    for i in range(begin, end):
        gathered[i - begin] = hashes[members[i]]
    return end


cdef int _double(Table *t) noexcept nogil:
    """A table twice as large with the same contents."""
    cdef Table twice
    cdef int64_t i
    twice.size = 2 * t.size
    twice.slots = <Slot *>calloc(twice.size, sizeof(Slot))
    if twice.slots == NULL:
        return -1
    for i in range(t.size):
        if t.slots[i].count:
            _find(&twice, t.slots[i].hash)[0] = t.slots[i]
    free(t.slots)
    t[0] = twice
    return 0


cdef inline Slot *_find(const Table *t, uint64_t hash) noexcept nogil:
    cdef int64_t mask = t.size - 1, at = <int64_t>(hash * SPREAD >> 20) & mask
    while t.slots[at].count and t.slots[at].hash != hash:
        at = (at + 1) & mask
    return &t.slots[at]


cdef void _join_marks(Work *w, int64_t stretch) noexcept nogil:
    """All threads' marks of a stretch in the first's. Pages of no run are marked here."""
    cdef int64_t begin = _first(w, stretch), end = _first(w, stretch + 1), i, t
    cdef int64_t low = begin // 64, high = (end + 63) // 64
    cdef uint64_t *other
    for t in range(1, w.threads):
        other = w.marks + t * w.mark_words
        for i in range(low, high):
            w.marks[i] |= other[i]
    if w.covered != w.n:
        for i in range(begin, end):
            w.frames[i] |= (w.marks[i // 64] >> (i & 63) & 1) << DUPLICATE_BIT


cdef int _tell(Work *w, Scratch *own, const Piece *piece, Rows *rows) noexcept nogil:
    """Mark a piece's pages, and count them by process and flags. -1 without memory."""
    cdef int64_t r = piece.run, page = piece.page, left = piece.pages, pages
    if own.counts == NULL:
        own.counts = <int64_t *>calloc(LANES << FLAG_BITS, sizeof(int64_t))
        own.flags = <int64_t *>malloc((LANES * sizeof(int64_t)) << FLAG_BITS)
        if own.counts == NULL or own.flags == NULL:
            return -1
    while left:
        pages = w.count[r] - page
        if pages > left:
            pages = left
        _tally(w, own, w.first[r] + page, w.first[r] + page + pages)
        left -= pages
        if (left == 0 or w.process[r + 1] != w.process[r]) and _write_rows(
                own, w.process[r], rows) < 0:
            return -1
        r += 1
        page = 0
    return 0


cdef void _tally(Work *w, Scratch *own, int64_t begin, int64_t stop) noexcept nogil:
    """Neighbours are counted apart: a count that is wanted again at once is waited for."""
    cdef int64_t i, end, n_flags = own.n_flags
    cdef int64_t *counts = own.counts
    cdef int64_t *flags = own.flags
    cdef uint64_t marks, word
    cdef uint64_t *frames = w.frames
    i = begin
    while i < stop:
        end = i // 64 * 64 + 64
        end = end if end < stop else stop
        marks = w.marks[i // 64] >> (i & 63)
        if marks:
            while i < end:
                word = frames[i] | (marks & 1) << DUPLICATE_BIT
                frames[i] = word
                marks >>= 1
                n_flags = _tally_one(counts, flags, n_flags, word, i)
                i += 1
        else:
            while i < end:
                n_flags = _tally_one(counts, flags, n_flags, frames[i], i)
                i += 1
    own.n_flags = n_flags


cdef inline int64_t _tally_one(int64_t *counts, int64_t *flags, int64_t n_flags, uint64_t word,
                               int64_t i) noexcept nogil:
    cdef uint64_t some = (word & ~SEEN) >> FRAME_BITS & ((1 << FLAG_BITS) - 1)
    cdef int64_t *count = counts + some * LANES + (i & (LANES - 1))
    if count[0] == 0:
        flags[n_flags] = <int64_t>some
        n_flags += 1
    count[0] += 1
    return n_flags


cdef int _write_rows(Scratch *own, int64_t process, Rows *rows) noexcept nogil:
    """What was counted, as rows of a process, and start anew. -1 without memory."""
    cdef int64_t i, lane, total, room = rows.room
    cdef int64_t *row
    cdef int64_t *counts
    while rows.n + own.n_flags > room:
        room = 2 * room if room else 64
    if room > rows.room:
        row = <int64_t *>realloc(rows.values, room * 3 * sizeof(int64_t))
        if row == NULL:
            return -1
        rows.values, rows.room = row, room
    for i in range(own.n_flags):
        counts = own.counts + own.flags[i] * LANES
        total = 0
        for lane in range(LANES):
            total += counts[lane]
            counts[lane] = 0
        if total:    # else a lane before has told of it
            row = rows.values + 3 * rows.n
            row[0], row[1], row[2] = process, own.flags[i] << FRAME_BITS, total
            rows.n += 1
    own.n_flags = 0
    return 0


cdef int _together(Work *w) noexcept nogil:
    """Move the parts' groups together; what is left over goes back. -1 without memory."""
    cdef size_t marks = w.mark_words * sizeof(uint64_t)
    cdef int64_t to = 0, group = 0, p, i
    cdef int64_t *offsets
    cdef uint64_t heads
    cdef size_t used
    cdef Part *part
    if w.threads > 1:
        c_madvise(w.marks + w.mark_words, (w.threads - 1) * marks, MADV_DONTNEED)
    for p in range(w.n_parts):
        w.n_groups += w.parts[p].groups
    w.offsets_room = _whole((w.n_groups + 1) * sizeof(int64_t))
    offsets = w.offsets = <int64_t *>_room((w.n_groups + 1) * sizeof(int64_t))
    if offsets == NULL:
        return -1
    for p in range(w.n_parts):
        part = &w.parts[p]
        for i in range((part.kept + 63) // 64):
            heads = w.heads[part.start // 64 + i]
            while heads:
                offsets[group] = to + 64 * i + dedup_lowest(heads)
                group += 1
                heads &= heads - 1
        if to != part.start:
            memmove(w.members + to, w.members + part.start, part.kept * sizeof(uint32_t))
        to += part.kept
    offsets[group] = to
    used = _whole(to * sizeof(uint32_t) if to * sizeof(uint32_t) > HUGE_ROOM else HUGE_ROOM)
    if used < w.room:
        munmap(<uint8_t *>w.members + used, w.room - used)
        w.room = used
    w.n_order = to
    return 0
