# One pass over present anonymous pages: find, read without harm, test, hash.

# A frame word: the frame number below, flags above. pages.py gives them to Python.
cdef enum:
    FRAME_BITS = 48

cdef extern from *:
    const uint64_t FRAME_MASK "(((uint64_t)1 << 48) - 1)"
    const uint64_t EXCLUSIVE "((uint64_t)1 << 48)"   # pagemap bit 56: one mapping alone
    const uint64_t KSM "((uint64_t)1 << 49)"         # already a KSM page
    const uint64_t THP "((uint64_t)1 << 50)"         # part of a huge page
    const uint64_t ZERO "((uint64_t)1 << 51)"        # all bytes zero
    const uint64_t CONSTANT "((uint64_t)1 << 52)"    # the same 8 bytes throughout
    const uint64_t VOLATILE "((uint64_t)1 << 53)"    # content differed between two looks
    const uint64_t GONE "((uint64_t)1 << 54)"        # no longer there at the last look
    const uint64_t NEW "((uint64_t)1 << 55)"         # first seen at the last look
    const uint64_t SEEN "((uint64_t)1 << 56)"        # met in the look under way
    const uint64_t UNREAD "((uint64_t)1 << 57)"      # present, but could not be read
    const uint64_t DUPLICATE "((uint64_t)1 << 58)"   # content with two mappings or more
    const uint64_t LOCKED "((uint64_t)1 << 59)"      # in a VM_LOCKED mapping
    const uint64_t HIDDEN "((uint64_t)1 << 60)"      # the kernel did not show the frame number
    const uint64_t OUTSIDE "((uint64_t)1 << 61)"     # the frame is mapped outside the scan too

FLAGS = {
    "EXCLUSIVE": EXCLUSIVE, "KSM": KSM, "THP": THP, "ZERO": ZERO, "CONSTANT": CONSTANT,
    "VOLATILE": VOLATILE, "GONE": GONE, "NEW": NEW, "SEEN": SEEN, "UNREAD": UNREAD,
    "DUPLICATE": DUPLICATE, "LOCKED": LOCKED, "HIDDEN": HIDDEN,
    "OUTSIDE": OUTSIDE,
}

# Flags of a range given to a Job.
RANGE_HUGE = 1       # PMD-mapped huge pages throughout
RANGE_KSM = 2        # may hold KSM pages: look at kpageflags, else no fast path
RANGE_LOCKED = 4
RANGE_SHARED = 8     # the exclusive mark of its pages says nothing: see ranges.Chooser.add
RANGE_TORN = 16      # relatives may map other pages of a huge page that is not mapped as one
cdef enum:
    R_HUGE = 1
    R_KSM = 2
    R_LOCKED = 4
    R_SHARED = 8
    R_TORN = 16

# Flags of a target given to a Job.
TARGET_FAST = 1      # process_vm_readv allowed over exclusive pages that are no KSM page
TARGET_IN_PLACE = 2  # our own memory: hash where it lies
cdef enum:
    T_FAST = 1
    T_IN_PLACE = 2

# What frames a Job reads once, however many mappings they have.
ONCE_SHARED = 1      # what pagemap does not call exclusive, KSM pages apart
ONCE_KSM = 2         # KSM pages: only while ksmd rests, which else might use a frame anew
cdef enum:
    O_SHARED = 1
    O_KSM = 2

# pagemap (Documentation/admin-guide/mm/pagemap.rst)
cdef extern from *:
    const uint64_t PM_PRESENT "((uint64_t)1 << 63)"
    const uint64_t PM_FILE "((uint64_t)1 << 61)"
    const uint64_t PM_EXCLUSIVE "((uint64_t)1 << 56)"
    const uint64_t PM_PFN "(((uint64_t)1 << 55) - 1)"
    # kpageflags (include/uapi/linux/kernel-page-flags.h)
    const uint64_t KPF_HEAD_OR_TAIL "(((uint64_t)1 << 15) | ((uint64_t)1 << 16))"
    const uint64_t KPF_KSM "((uint64_t)1 << 21)"
    const uint64_t KPF_THP "((uint64_t)1 << 22)"

# What a sample counts of all pages present, read or not: the columns of Job.counts.
COUNTS = ("present", "exclusive", "ksm", "huge")
cdef enum:
    COUNTED = 4

cdef enum:
    UNIT_BYTES = 2 * 1024 * 1024   # what a thread takes at a time
    # Pages land so far beyond a page's beginning. Were source and copy at the same offset, the
    # kernel's copy would wait for stores to the same low 12 bits of an address (4K aliasing).
    BUFFER_OFFSET = 1024
    MAPPING_BYTES = 2 * UNIT_BYTES + BUFFER_OFFSET   # room to align a buffer in
    UNIT_RANGES = 512              # ranges in a unit, at the most
    MAX_IOV = 1024
    LOOK_AGAIN_STEP = 256
    LOOK_AGAIN_HUGE_STEP = 512
    NEARBY_SLOTS = 2048            # more than twice the pages of a unit


cdef struct Unit:
    int64_t range      # first range
    int64_t start      # address in it
    int64_t pages      # pages in all


cdef struct Run:
    uint64_t start
    int64_t count
    int64_t first
    int64_t range


cdef struct Worker:
    uint8_t *mapping       # buffer lies in it, aligned to a huge page
    uint8_t *buffer
    uint64_t *look         # pagemap words of the unit
    uint64_t *address      # of each candidate
    uint64_t *word         # its frame word
    uint64_t *digest
    int32_t *where_range  # its range
    # Of a page with the same frame: one more than its place; below 0, than its number here; or 0.
    int64_t *known
    uint16_t *nearby      # a table of frames of the unit: one more than a candidate's number
    iovec *local
    iovec *remote
    Run *runs
    int64_t n_runs
    int64_t cap_runs
    int64_t fast_pages
    int64_t slow_pages
    int64_t changed_pages
    int64_t unread_pages
    int64_t known_pages
    int64_t bytes
    int64_t seen[4]   # COUNTS of the unit
    int64_t *in_range     # candidates in each range of the unit, in order
    int64_t n_ranges


@cython.final
cdef class Job:
    """One look at a batch of targets, shared by the threads that run it.

    Parameters
    ----------
    page_size : int
        Bytes.
    seed : int
        64-bit seed of XXH3.
    pids, mem_fds, pagemap_fds, target_flags : int64 arrays, one entry a target
        The descriptors stay the caller's.
    range_start, range_end : uint64 arrays
        Address ranges to look at, page aligned, ascending within a target.
    range_target, range_flags : int64 arrays
        The target of each range, and `RANGE_*`.
    hashes, frames : uint64 arrays
        Where the pages go; `used` of them are taken already.
    used : int
    zero_frame : int
        Frame number of the shared zero page, -1 where frames are hidden.
    kpageflags_fd : int
        -1 where it can't be read.
    huge_bytes : int
        Size of a PMD-mapped huge page.
    every_folio : bool
        Look up kpageflags of each page (huge pages of all sizes in use), not once per block of
        `huge_bytes`.
    prior : tuple of int64 arrays or None
        For a second look, the runs of the first: (offset by target, start, count, first),
        ascending by address within a target.
    below : int
        For a sample, what the mixed number of a frame must lie below to be read, of 2**64; 0
        reads everything. A later look reads what the first one chose.
    only : bool array or None
        For a later look, which pages of the first one to read, by their place in `hashes`; None
        reads everything. Of the others it is only noted whether they are there, and new pages are
        kept unread, with 0 for a hash.
    content_below : int
        For a sample by content: all frames are read at the first look, and a page is kept if the
        mixed number of its hash lies below this, of 2**64, or that of its frame below `below`;
        0 keeps what was read. A later look reads what the first one kept.
    counted_hashes : uint64 array or None
        With `content_below`, contents that are counted, and kept by frame alone; see
        `counted_pages`.
    once : int
        `ONCE_*`: which frames are read for one of their mappings alone.
    """

    cdef:
        readonly int page_size
        uint64_t seed
        uint8_t secret[192]
        uint64_t zero_hash
        int64_t[::1] pids, mem_fds, pagemap_fds, target_flags
        uint64_t[::1] range_start, range_end
        int64_t[::1] range_target, range_flags
        uint64_t[::1] hashes, frames
        int64_t[::1] prior_offset, prior_start, prior_count, prior_first
        int64_t[::1] dead, no_fast
        uint8_t[::1] block_state
        uint8_t[::1] unit_done
        int second
        int64_t zero_frame
        int kpageflags_fd
        int block_shift
        int every_folio
        Unit *units
        int64_t n_units
        int64_t next_unit
        int64_t n_used
        int64_t stop
        int64_t overflow, full_at
        int64_t pages_done
        object run_parts
        uint64_t below, sample_seed, content_below
        uint64_t[::1] of_counted
        int64_t[::1] counted_at, counted_pages_
        uint64_t counted_mask
        int64_t[:, ::1] counted
        int64_t[::1] in_ranges
        const uint8_t[::1] only
        int partial
        int once, reads
        Frames by_frame
        readonly int64_t fast_pages, slow_pages, changed_pages, unread_pages, known_pages, bytes

    def __cinit__(self, *args, **kwargs):
        self.units = NULL
        self.by_frame.slots = NULL

    def __dealloc__(self):
        free(self.units)
        _frames_close(&self.by_frame)

    def __init__(self, int page_size, uint64_t seed, pids, mem_fds, pagemap_fds, target_flags,
                 range_start, range_end, range_target, range_flags, hashes, frames,
                 int64_t used, int64_t zero_frame, int kpageflags_fd, int64_t huge_bytes,
                 bint every_folio,
                 prior=None, uint64_t below=0, only=None, uint64_t content_below=0,
                 counted_hashes=None, int once=0):
        if _hash_page == NULL:
            raise RuntimeError("no hash is loaded: call load_hash first")
        self.page_size = page_size
        self.seed = seed
        _make_secret(self.secret, seed)
        zeros = np.zeros(page_size, np.uint8)
        cdef const uint8_t[::1] zero_view = zeros
        self.zero_hash = _hash_page(&zero_view[0], page_size, self.secret, 192)
        self.pids, self.mem_fds, self.pagemap_fds = pids, mem_fds, pagemap_fds
        self.target_flags = target_flags
        self.reads = any(not flags & T_IN_PLACE for flags in target_flags)
        self.range_start, self.range_end = range_start, range_end
        self.range_target, self.range_flags = range_target, range_flags
        self.hashes, self.frames = hashes, frames
        self.n_used = used
        self.zero_frame = zero_frame
        self.kpageflags_fd = kpageflags_fd
        self.block_shift = (huge_bytes // page_size).bit_length() - 1
        self.every_folio = every_folio
        self.second = prior is not None
        if prior is None:
            empty = np.zeros(0, np.int64)
            prior = (np.zeros(self.pids.shape[0] + 1, np.int64), empty, empty, empty)
        self.prior_offset, self.prior_start, self.prior_count, self.prior_first = prior
        self.dead = np.zeros(self.pids.shape[0], np.int64)
        self.no_fast = np.zeros(self.pids.shape[0], np.int64)
        # A state for each block of physical memory: 0 unknown, 1 no huge page, 2 huge.
        self.block_state = np.zeros(1 << 20, np.uint8)
        self.run_parts = []
        self.below = below
        # Not the hash's own seed: what is read must not hang together with what it is.
        self.sample_seed = _mix64(seed ^ <uint64_t>0x73616D706C65)
        self.counted = np.zeros((self.pids.shape[0], COUNTED), np.int64)
        self.in_ranges = np.zeros(self.range_start.shape[0], np.int64)
        self.partial = only is not None
        self.only = np.zeros(0, np.uint8) if only is None else only.view(np.uint8)
        self.content_below = content_below
        self._list_counted(np.zeros(0, np.uint64) if counted_hashes is None else counted_hashes)
        self._cut_units()
        self.once = once
        if once and _frames_open(&self.by_frame, self._pages_most()) < 0:
            raise MemoryError("no memory to find frames in")

    def _pages_most(self):
        """Pages of address space in all units."""
        cdef int64_t i, total = 0
        for i in range(self.n_units):
            total += self.units[i].pages
        return total

    def _list_counted(self, uint64_t[::1] hashes):
        """Make the table that finds a counted content: places, linear probing, a quarter full."""
        cdef int64_t i, size = 8
        cdef uint64_t at
        while size < 4 * hashes.shape[0]:
            size *= 2
        self.of_counted = hashes
        self.counted_mask = <uint64_t>(size - 1)
        self.counted_at = np.full(size, -1, np.int64)
        self.counted_pages_ = np.zeros(hashes.shape[0], np.int64)
        for i in range(hashes.shape[0]):
            at = hashes[i] & self.counted_mask
            while self.counted_at[at] >= 0:
                at = (at + 1) & self.counted_mask
            self.counted_at[at] = i

    def _cut_units(self):
        """Cut the ranges into units of at most UNIT_BYTES and UNIT_RANGES, within a target."""
        cdef int64_t i, n = self.range_start.shape[0], cap = 1024, count = 0, room, ranges, take
        cdef int64_t per_unit = UNIT_BYTES // self.page_size, last_target = -1
        cdef uint64_t at, step
        cdef Unit *grown
        self.units = <Unit *>malloc(cap * sizeof(Unit))
        if self.units == NULL:
            raise MemoryError
        room = 0
        ranges = 0
        for i in range(n):
            at = self.range_start[i]
            while at < self.range_end[i]:
                # Units of a long range end at their own multiples: a huge page is whole.
                if room == 0 or ranges == UNIT_RANGES or self.range_target[i] != last_target:
                    if count == cap:
                        cap *= 2
                        grown = <Unit *>realloc(self.units, cap * sizeof(Unit))
                        if grown == NULL:
                            raise MemoryError
                        self.units = grown
                    self.units[count].range = i
                    self.units[count].start = <int64_t>at
                    self.units[count].pages = 0
                    count += 1
                    room = per_unit
                    ranges = 0
                    last_target = self.range_target[i]
                step = UNIT_BYTES - at % UNIT_BYTES
                if step > self.range_end[i] - at:
                    step = self.range_end[i] - at
                take = <int64_t>(step // <uint64_t>self.page_size)
                if take > room:
                    if room < per_unit and take <= per_unit:
                        room = 0       # begin a new unit rather than split here
                        continue
                    take = room
                self.units[count - 1].pages += take
                room -= take
                ranges += 1
                at += <uint64_t>(take * self.page_size)
        self.n_units = count
        self.unit_done = np.zeros(max(count, 1), np.uint8)

    @property
    def used(self):
        """int: pages in the arrays so far."""
        return self.full_at if self.overflow else self.n_used

    @property
    def pages_looked(self):
        """int: pages of address space done so far, for a progress view."""
        return dedup_load(&self.pages_done)

    @property
    def overflowed(self):
        """bool: some units did not fit into the arrays; give larger ones and run again."""
        return dedup_load(&self.overflow) != 0

    def dead_targets(self):
        """Targets (indices) whose memory could no longer be reached."""
        return np.flatnonzero(np.asarray(self.dead))

    def counts(self):
        """Pages present by target, shape (targets, 4): those of `COUNTS`; a sample counts alone."""
        return np.asarray(self.counted)

    def counted_pages(self):
        """Pages of each of the counted contents, in their order; not to be had of a job that grew.
        """
        return np.asarray(self.counted_pages_)

    def range_pages(self):
        """Present pages of each range, whether they were read or not: int64 array."""
        return np.asarray(self.in_ranges)

    def forked_targets(self):
        """Targets (indices) where an exclusive page changed its frame while it was read."""
        return np.flatnonzero(np.asarray(self.no_fast))

    def cancel(self):
        """Make the threads stop at their next unit."""
        dedup_store(&self.stop, 1)

    def grow(self, hashes, frames, int64_t used):
        """Continue in larger arrays, the first `used` entries of which are copied already."""
        self.hashes, self.frames = hashes, frames
        self.n_used = used
        self.overflow = 0
        self.next_unit = 0

    def runs(self):
        """Runs found: int64 arrays (start, count, first, range), in no order."""
        if not self.run_parts:
            return tuple(np.zeros(0, np.int64) for _ in range(4))
        table = np.concatenate(self.run_parts)
        return tuple(np.ascontiguousarray(table[:, i]) for i in range(4))

    def run(self):
        """Work until no unit is left; call it from as many threads as wanted.

        Raises
        ------
        MemoryError
            The thread's buffers could not be had.
        """
        cdef Worker w
        cdef int rc
        cdef int64_t[:, ::1] out
        cdef int64_t i
        memset(&w, 0, sizeof(w))
        with nogil:
            rc = _worker_open(&w, self.page_size, self.reads)
            if rc == 0:
                rc = self._loop(&w)
        try:
            if rc != 0:
                self.cancel()
                raise MemoryError("no memory for the buffers of a reading thread")
            if w.n_runs:
                table = np.empty((w.n_runs, 4), np.int64)
                out = table
                for i in range(w.n_runs):
                    out[i, 0] = <int64_t>w.runs[i].start
                    out[i, 1] = w.runs[i].count
                    out[i, 2] = w.runs[i].first
                    out[i, 3] = w.runs[i].range
                self.run_parts.append(table)
        finally:
            _worker_close(&w)
        dedup_fetch_add(&self.fast_pages, w.fast_pages)
        dedup_fetch_add(&self.slow_pages, w.slow_pages)
        dedup_fetch_add(&self.changed_pages, w.changed_pages)
        dedup_fetch_add(&self.unread_pages, w.unread_pages)
        dedup_fetch_add(&self.known_pages, w.known_pages)
        dedup_fetch_add(&self.bytes, w.bytes)

    cdef int _loop(self, Worker *w) noexcept nogil:
        cdef int64_t u
        while not dedup_load(&self.stop):
            u = dedup_fetch_add(&self.next_unit, 1)
            if u >= self.n_units:
                return 0
            if self.unit_done[u]:
                continue
            if self._unit(w, u) < 0:
                return -1
            dedup_fetch_add(&self.pages_done, self.units[u].pages)
        return 0

    cdef int _unit(self, Worker *w, int64_t u) noexcept nogil:
        """One unit: 0 done or left for another run, -1 without memory."""
        cdef int64_t n, i, unread, known, target = self.range_target[self.units[u].range]
        cdef int64_t page_size = self.page_size
        cdef int flags = <int>self.target_flags[target], rc
        cdef uint8_t *page
        if self.dead[target]:
            self.unit_done[u] = 1
            return 0
        n = self._look(w, u, target)
        if self.below:
            n = self._choose(w, n, target)
        elif self.partial and n > 0:
            n = self._choose_again(w, n, target, &unread)
            rc = self._keep(w, self._spare(), unread)
            if rc:
                return rc if rc < 0 else 0
        if n > 0:
            known = self._recall(w, n) if self.once else 0
            if not flags & T_IN_PLACE:
                self._read(w, n, target, known)
            for i in range(n):
                if known and w.known[i]:
                    self._take_over(w, i)
                    continue
                if w.word[i] & UNREAD:
                    w.digest[i] = 0
                    continue
                if flags & T_IN_PLACE:
                    page = <uint8_t *><uintptr_t>w.address[i]
                else:
                    page = w.buffer + i * page_size
                if _is_constant(page, page_size):
                    w.word[i] |= CONSTANT
                    if (<uint64_t *>page)[0] == 0:
                        w.word[i] |= ZERO
                        w.digest[i] = self.zero_hash
                        continue
                w.digest[i] = _hash_page(page, page_size, self.secret, 192)
            w.bytes += (n - known) * page_size
            if self.second:
                n = self._compare(w, n, target)
            elif self.content_below:
                n = self._drop(w, n, target)
            rc = self._keep(w, 0, n)
            if rc:
                return rc if rc < 0 else 0
        if self.below:
            for i in range(COUNTED):
                dedup_fetch_add(&self.counted[target, i], w.seen[i])
        for i in range(w.n_ranges):
            dedup_fetch_add(&self.in_ranges[self.units[u].range + i], w.in_range[i])
        self.unit_done[u] = 1
        return 0

    cdef int _keep(self, Worker *w, int64_t at, int64_t n) noexcept nogil:
        """Add the `n` candidates from `at` on: 1 if they don't fit, -1 without memory."""
        cdef int64_t i, first
        if n == 0:
            return 0
        first = dedup_fetch_add(&self.n_used, n)
        if first + n > self.hashes.shape[0]:
            # Later claims begin beyond the end too, so this first one tells what is in use.
            if first <= self.hashes.shape[0]:
                self.full_at = first
            dedup_store(&self.overflow, 1)
            return 1
        memcpy(&self.hashes[first], w.digest + at, n * sizeof(uint64_t))
        memcpy(&self.frames[first], w.word + at, n * sizeof(uint64_t))
        if self.once:
            for i in range(n):
                self._keep_frame(first + i)
        return self._note_runs(w, at, at + n, first)

    cdef inline int _is_once(self, uint64_t word) noexcept nogil:
        """Whether the frame of a page is to be read once."""
        if word & (HIDDEN | UNREAD):
            return 0
        if word & KSM:
            return self.once & O_KSM
        return self.once & O_SHARED and not word & EXCLUSIVE

    cdef inline void _keep_frame(self, int64_t place) noexcept nogil:
        """Find the frame of a page that is stored from here on."""
        if self._is_once(self.frames[place]):
            _frames_add(&self.by_frame, self.frames[place] & FRAME_MASK, place, &self.frames[0])

    cdef int64_t _recall(self, Worker *w, int64_t n) noexcept nogil:
        """Note which candidates have a frame that was read already; gives their number."""
        cdef int64_t i, found = 0, at
        cdef uint64_t pfn
        memset(w.nearby, 0, NEARBY_SLOTS * sizeof(uint16_t))
        for i in range(n):
            w.known[i] = 0
            if not self._is_once(w.word[i]):
                continue
            pfn = w.word[i] & FRAME_MASK
            w.known[i] = 1 + _frames_find(&self.by_frame, pfn, &self.frames[0])
            if not w.known[i]:
                at = <int64_t>(_mix64(pfn) & (NEARBY_SLOTS - 1))
                while w.nearby[at] and w.word[w.nearby[at] - 1] & FRAME_MASK != pfn:
                    at = (at + 1) & (NEARBY_SLOTS - 1)
                if w.nearby[at]:
                    w.known[i] = -<int64_t>w.nearby[at]
                else:
                    w.nearby[at] = <uint16_t>(i + 1)
            found += w.known[i] != 0
        w.known_pages += found
        return found

    cdef inline void _take_over(self, Worker *w, int64_t i) noexcept nogil:
        """What was found in another mapping of a candidate's frame."""
        cdef int64_t other = w.known[i] - 1
        if other >= 0:
            w.digest[i] = self.hashes[other]
            w.word[i] |= self.frames[other] & (ZERO | CONSTANT)
            return
        other = -w.known[i] - 1
        w.digest[i] = w.digest[other]
        w.word[i] |= w.word[other] & (ZERO | CONSTANT | UNREAD)
        w.unread_pages += (w.word[i] & UNREAD) != 0

    cdef int64_t _look(self, Worker *w, int64_t u, int64_t target) noexcept nogil:
        """Pagemap of the unit; fills address, word, where_range; gives the candidates."""
        cdef int64_t left = self.units[u].pages, r = self.units[u].range, n = 0, count, i, got
        cdef int64_t before
        cdef uint64_t at = <uint64_t>self.units[u].start, e, word, pfn
        cdef int64_t block, blocks = self.block_state.shape[0]
        cdef uint8_t state
        cdef int64_t page_size = self.page_size, zero_frame = self.zero_frame
        cdef int fd = <int>self.pagemap_fds[target]
        cdef int range_flags, each, by_block, unasked = 0
        cdef uint64_t mark, exclusive
        w.n_ranges = 0
        while left > 0:
            before = n
            count = <int64_t>((self.range_end[r] - at) // <uint64_t>page_size)
            if count > left:
                count = left
            range_flags = <int>self.range_flags[r]
            mark = (LOCKED if range_flags & R_LOCKED else 0) | (THP if range_flags & R_HUGE else 0)
            exclusive = 0 if range_flags & R_SHARED else PM_EXCLUSIVE
            each = self.kpageflags_fd >= 0 and self._each_apart(range_flags)
            by_block = self.kpageflags_fd >= 0 and not each and not range_flags & R_HUGE
            got = _pread_all(fd, w.look, count * 8, <int64_t>(at // <uint64_t>page_size) * 8)
            if got <= 0:
                # The address space is gone (0) or out of reach.
                self.dead[target] = 1
                return 0
            for i in range(got // 8):
                e = w.look[i]
                if not e & PM_PRESENT or e & PM_FILE:
                    continue
                pfn = e & PM_PFN
                if <int64_t>pfn == zero_frame:
                    continue
                word = mark | (pfn if pfn != 0 else HIDDEN)
                if e & exclusive:
                    word |= EXCLUSIVE
                if pfn != 0:
                    unasked |= each
                    if by_block:
                        block = <int64_t>(pfn >> self.block_shift)
                        state = self.block_state[block] if block < blocks else 0
                        if state == 0:
                            word |= self._flags_of_block(pfn)
                        elif state == 2:
                            word |= THP
                w.address[n] = at + <uint64_t>(i * page_size)
                w.word[n] = word
                w.where_range[n] = <int32_t>r
                n += 1
            w.in_range[w.n_ranges] = n - before
            w.n_ranges += 1
            left -= count
            r += 1
            if left > 0:
                at = self.range_start[r]
        if unasked:
            self._ask_each(w, n)
        return n

    cdef inline int _each_apart(self, int range_flags) noexcept nogil:
        """Whether a frame's neighbours don't tell what it is."""
        return not range_flags & R_HUGE and (self.every_folio or range_flags & R_KSM)

    cdef void _ask_each(self, Worker *w, int64_t n) noexcept nogil:
        """KSM and THP of each such page, frames in a row by one call."""
        cdef int64_t i = 0, j, k, got, place
        cdef uint64_t pfn
        while i < n:
            if w.word[i] & HIDDEN or not self._each_apart(
                    <int>self.range_flags[w.where_range[i]]):
                i += 1
                continue
            pfn = w.word[i] & FRAME_MASK
            if self.once & O_KSM:
                place = _frames_find(&self.by_frame, pfn, &self.frames[0])
                if place >= 0:
                    w.word[i] |= self.frames[place] & (KSM | THP)
                    i += 1
                    continue
            j = i + 1
            while (j < n and not w.word[j] & HIDDEN
                   and w.word[j] & FRAME_MASK == pfn + <uint64_t>(j - i)
                   and self._each_apart(<int>self.range_flags[w.where_range[j]])):
                j += 1
            got = _pread_all(self.kpageflags_fd, w.look, (j - i) * 8, <int64_t>pfn * 8) // 8
            for k in range(got):
                w.word[i + k] |= _flags_of(w.look[k])
            i = j

    cdef uint64_t _flags_of_block(self, uint64_t pfn) noexcept nogil:
        """THP of a frame; one look per block of `huge_bytes`, which is of one kind."""
        cdef uint64_t kpf = 0, word
        cdef int64_t block = <int64_t>(pfn >> self.block_shift)
        if pread(self.kpageflags_fd, &kpf, 8, <int64_t>pfn * 8) != 8:
            return 0
        word = _flags_of(kpf)
        if block < self.block_state.shape[0]:
            self.block_state[block] = 2 if word & THP else 1
        return word

    cdef void _read(self, Worker *w, int64_t n, int64_t target, int64_t known) noexcept nogil:
        """Fill the buffer: page i of the candidates at offset i; UNREAD where it can't be."""
        cdef int64_t i = 0, j, k, start, page_size = self.page_size, got, fast, read = 0, r = -1
        cdef int allowed = self.target_flags[target] & T_FAST and not self.no_fast[target]
        cdef int pid = <int>self.pids[target], mem = <int>self.mem_fds[target]
        cdef uint64_t mask = 0
        # Until hashing, digest[i] says that page i has been read the fast way.
        memset(w.digest, 0, n * sizeof(uint64_t))
        # The fast way, many runs a call, over exclusive pages that are no KSM page.
        while allowed and i < n:
            k = 0
            fast = 0
            start = i
            while i < n and k < MAX_IOV:
                if w.where_range[i] != r:
                    r = w.where_range[i]
                    mask = self._fast_mask(<int>self.range_flags[r])
                if (w.word[i] & mask) != EXCLUSIVE or (known and w.known[i]):
                    i += 1
                    continue
                j = i
                while True:
                    w.digest[j] = 1
                    j += 1
                    # Another range has a mask of its own: it begins a run of its own.
                    if (j == n or w.address[j] != w.address[j - 1] + <uint64_t>page_size
                            or w.where_range[j] != r
                            or (w.word[j] & mask) != EXCLUSIVE
                            or (known and w.known[j])):
                        break
                w.local[k].iov_base = w.buffer + i * page_size
                w.local[k].iov_len = (j - i) * page_size
                w.remote[k].iov_base = <void *><uintptr_t>w.address[i]
                w.remote[k].iov_len = (j - i) * page_size
                fast += j - i
                k += 1
                i = j
            if k == 0:
                break
            got = process_vm_readv(pid, w.local, k, w.remote, k, 0)
            if got < 0:
                got = 0
            got //= page_size
            w.fast_pages += got
            read += got
            if got < fast:
                # A page that it may not read (PROT_NONE, a hole, a dead target): the rest of
                # this unit goes the other way.
                allowed = 0
                self._keep_marks(w, start, i, got)
        if read + known < n:
            self._read_slowly(w, n, mem)
        if read:
            self._look_again(w, n, target)

    cdef void _read_slowly(self, Worker *w, int64_t n, int mem) noexcept nogil:
        """The harmless way for all that has not been read."""
        cdef int64_t i = 0, j, page_size = self.page_size, got
        while i < n:
            if w.digest[i] or w.known[i]:
                i += 1
                continue
            j = i + 1
            while (j < n and not w.digest[j] and not w.known[j]
                   and w.address[j] == w.address[j - 1] + <uint64_t>page_size):
                j += 1
            while i < j:
                got = pread(mem, w.buffer + i * page_size, (j - i) * page_size,
                            <int64_t>w.address[i])
                if got < 0 and errno == EINTR:
                    continue
                got = got // page_size if got > 0 else 0
                w.slow_pages += got
                i += got
                if got == 0 and i < j:
                    w.word[i] |= UNREAD
                    w.unread_pages += 1
                    i += 1

    cdef inline uint64_t _fast_mask(self, int range_flags) noexcept nogil:
        """The one rule: a page may be read the fast way if its word has, of these flags, EXCLUSIVE.

        Exclusive, no part of a shared huge page, known to be no KSM page. 0, of which nothing is
        EXCLUSIVE, for a range that must not be read so.
        """
        cdef uint64_t mask = EXCLUSIVE | KSM
        # Of a huge page that relatives map in part, process_vm_readv would copy even a page that
        # has no other mapping (mm/memory.c, wp_can_reuse_anon_folio).
        if range_flags & R_TORN:
            mask |= THP
        if range_flags & R_KSM:
            if self.kpageflags_fd < 0:
                return 0
            mask |= HIDDEN
        return mask

    cdef void _keep_marks(self, Worker *w, int64_t start, int64_t end, int64_t got) noexcept nogil:
        """Of the marks in `digest` of [start, end), keep those of the `got` pages read."""
        cdef int64_t i
        for i in range(start, end):
            if w.digest[i]:
                w.digest[i] = got > 0
                got -= 1

    cdef void _look_again(self, Worker *w, int64_t n, int64_t target) noexcept nogil:
        """Count pages read fast whose frame is another one now: sharing that we may have cost.

        A fork takes the exclusive mark from all pages at once (mm/memory.c, copy_present_ptes), so
        a few pages tell whether there was one; only then each is looked at. The last page that was
        read tells it even when the child has ended meanwhile: what is read after a fork moves. To
        miss it, a child must have ended within the read of the unit, between two of these pages:
        0.3 ms, where a fork of so much memory takes longer.
        """
        cdef int64_t i = 0, j, k, got, changed = 0, page_size = self.page_size, last = n - 1
        cdef int fd = <int>self.pagemap_fds[target]
        cdef int suspect = 0
        cdef uint64_t e = 0
        while last >= 0 and not w.digest[last]:
            last -= 1
        if (self.range_flags[w.where_range[last]] & R_HUGE
                and w.where_range[0] == w.where_range[last]):
            # A huge page mapped as one has one mark for all: its last page tells as much.
            i = last
        while i <= last and not suspect:
            if w.digest[i]:
                got = pread(fd, &e, 8, <int64_t>(w.address[i] // <uint64_t>page_size) * 8)
                suspect = got == 8 and self._differs(w, i, e)
                if i == last:
                    break
                i += (LOOK_AGAIN_HUGE_STEP if self.range_flags[w.where_range[i]] & R_HUGE
                      else LOOK_AGAIN_STEP)
                i = min(i, last)
            else:
                i += 1
        if not suspect:
            return
        self.no_fast[target] = 1
        i = 0
        while i < n:
            if not w.digest[i]:
                i += 1
                continue
            j = i + 1
            while (j < n and w.digest[j]
                   and w.address[j] == w.address[j - 1] + <uint64_t>page_size):
                j += 1
            got = _pread_all(fd, w.look, (j - i) * 8,
                             <int64_t>(w.address[i] // <uint64_t>page_size) * 8)
            for k in range(got // 8 if got > 0 else 0):
                e = w.look[k]
                if (e & PM_PRESENT and not w.word[i + k] & HIDDEN
                        and (e & PM_PFN) != (w.word[i + k] & FRAME_MASK)):
                    changed += 1
            i = j
        w.changed_pages += changed

    cdef inline int _differs(self, Worker *w, int64_t i, uint64_t e) noexcept nogil:
        """Not exclusive any more: it forks. Another frame: maybe by our read."""
        if not e & PM_PRESENT:
            return 0
        if not e & PM_EXCLUSIVE:
            return 1
        return not w.word[i] & HIDDEN and (e & PM_PFN) != (w.word[i] & FRAME_MASK)

    cdef int64_t _compare(self, Worker *w, int64_t n, int64_t target) noexcept nogil:
        """Second look: update pages of the first in place; keep the new ones, give their number."""
        cdef int64_t i, kept = 0, at, page_size = self.page_size
        cdef int64_t end = self.prior_offset[target + 1], r
        cdef uint64_t a, word
        r = self._prior_run(target, w.address[0])
        for i in range(n):
            a = w.address[i]
            while (r < end and a >= <uint64_t>self.prior_start[r]
                   + <uint64_t>(self.prior_count[r] * page_size)):
                r += 1
            if r < end and a >= <uint64_t>self.prior_start[r]:
                at = self.prior_first[r] + <int64_t>((a - <uint64_t>self.prior_start[r])
                                                     // <uint64_t>page_size)
                word = w.word[i] | SEEN | (self.frames[at] & VOLATILE)
                if self.hashes[at] != w.digest[i] and not (self.frames[at] & UNREAD):
                    word |= VOLATILE
                self.hashes[at] = w.digest[i]
                self.frames[at] = word
                if self.once:
                    self._keep_frame(at)
            else:
                w.address[kept] = a
                w.digest[kept] = w.digest[i]
                w.word[kept] = w.word[i] | NEW | SEEN
                w.where_range[kept] = w.where_range[i]
                kept += 1
        return kept

    cdef int64_t _choose(self, Worker *w, int64_t n, int64_t target) noexcept nogil:
        """Count the candidates, and keep those of the sample; gives their number.

        Of a sample by content all: what they hold has to be known first.
        """
        cdef int64_t i, kept = 0, exclusive = 0, ksm = 0, huge = 0, page_size = self.page_size
        cdef int64_t r = 0, end = 0
        cdef uint64_t a, word
        cdef int keep
        if self.second and n:
            r = self._prior_run(target, w.address[0])
            end = self.prior_offset[target + 1]
        for i in range(n):
            a, word = w.address[i], w.word[i]
            exclusive += (word & EXCLUSIVE) != 0
            ksm += (word & KSM) != 0
            huge += (word & THP) != 0
            if self.second:
                # By address: a page that was written to may lie in another frame by now.
                while (r < end and a >= <uint64_t>self.prior_start[r]
                       + <uint64_t>(self.prior_count[r] * page_size)):
                    r += 1
                keep = r < end and a >= <uint64_t>self.prior_start[r]
            else:
                keep = self.content_below != 0 or self._by_frame(w, i, target)
            # No branch: the processor could not foresee it.
            w.address[kept] = a
            w.word[kept] = word
            w.where_range[kept] = w.where_range[i]
            kept += keep
        w.seen[0], w.seen[1], w.seen[2], w.seen[3] = n, exclusive, ksm, huge
        return kept

    cdef inline int _by_frame(self, Worker *w, int64_t i, int64_t target) noexcept nogil:
        """Whether a frame is in the sample, so that all its mappings are, or none."""
        cdef uint64_t key = w.word[i] & FRAME_MASK
        if w.word[i] & HIDDEN:
            key = _mix64(<uint64_t>self.pids[target]) ^ (w.address[i] // <uint64_t>self.page_size)
        return _mix64(self.sample_seed ^ key) < self.below

    cdef int64_t _drop(self, Worker *w, int64_t n, int64_t target) noexcept nogil:
        """Keep, of hashed candidates, those of the sample by content; gives their number."""
        cdef int64_t i, c, kept = 0, last = -1, times = 0
        cdef uint64_t at
        cdef int keep
        for i in range(n):
            keep = 1
            if not w.word[i] & UNREAD:
                at = w.digest[i] & self.counted_mask
                c = self.counted_at[at]
                while c >= 0 and self.of_counted[c] != w.digest[i]:
                    at = (at + 1) & self.counted_mask
                    c = self.counted_at[at]
                # Equal pages often lie beside each other: one addition for them.
                if c != last:
                    if last >= 0:
                        dedup_fetch_add(&self.counted_pages_[last], times)
                    last, times = c, 0
                times += 1
                keep = (self._by_frame(w, i, target)
                        or (c < 0 and _mix64(w.digest[i]) < self.content_below))
            w.address[kept] = w.address[i]
            w.word[kept] = w.word[i]
            w.digest[kept] = w.digest[i]
            w.where_range[kept] = w.where_range[i]
            kept += keep
        if last >= 0:
            dedup_fetch_add(&self.counted_pages_[last], times)
        return kept

    cdef inline int64_t _spare(self) noexcept nogil:
        """Where a worker has room for as many candidates again as a unit has."""
        return UNIT_BYTES // self.page_size

    cdef int64_t _choose_again(self, Worker *w, int64_t n, int64_t target,
                               int64_t *unread) noexcept nogil:
        """Keep the candidates of `only`, give their number; the new ones, unread, go to spare room.

        The others keep what they had: pagemap tells that they are there, which is all.
        """
        cdef int64_t i, kept = 0, fresh = self._spare(), page_size = self.page_size, at
        cdef int64_t r = self._prior_run(target, w.address[0]), end = self.prior_offset[target + 1]
        cdef uint64_t a
        for i in range(n):
            a = w.address[i]
            while (r < end and a >= <uint64_t>self.prior_start[r]
                   + <uint64_t>(self.prior_count[r] * page_size)):
                r += 1
            if r == end or a < <uint64_t>self.prior_start[r]:
                w.address[fresh] = a
                w.word[fresh] = w.word[i] | NEW | SEEN
                w.digest[fresh] = 0
                w.where_range[fresh] = w.where_range[i]
                fresh += 1
                continue
            at = self.prior_first[r] + <int64_t>((a - <uint64_t>self.prior_start[r])
                                                 // <uint64_t>page_size)
            if at < self.only.shape[0] and self.only[at]:
                w.address[kept] = a
                w.word[kept] = w.word[i]
                w.where_range[kept] = w.where_range[i]
                kept += 1
            else:
                self.frames[at] |= SEEN
        unread[0] = fresh - self._spare()
        return kept

    cdef int64_t _prior_run(self, int64_t target, uint64_t address) noexcept nogil:
        """The last run of the earlier look that begins at or below an address, else the first."""
        cdef int64_t lo = self.prior_offset[target], hi = self.prior_offset[target + 1], mid
        while lo < hi:
            mid = (lo + hi) // 2
            if <uint64_t>self.prior_start[mid] <= address:
                lo = mid + 1
            else:
                hi = mid
        return lo - 1 if lo > self.prior_offset[target] else lo

    cdef int _note_runs(self, Worker *w, int64_t at, int64_t end, int64_t first) noexcept nogil:
        """The runs of candidates [at, end), the first of which is page `first`."""
        cdef int64_t i = at, j
        cdef Run *grown
        while i < end:
            j = i + 1
            while (j < end and w.where_range[j] == w.where_range[i]
                   and w.address[j] == w.address[j - 1] + <uint64_t>self.page_size):
                j += 1
            if w.n_runs == w.cap_runs:
                w.cap_runs = w.cap_runs * 2 if w.cap_runs else 1024
                grown = <Run *>realloc(w.runs, w.cap_runs * sizeof(Run))
                if grown == NULL:
                    return -1
                w.runs = grown
            w.runs[w.n_runs].start = w.address[i]
            w.runs[w.n_runs].count = j - i
            w.runs[w.n_runs].first = first + i - at
            w.runs[w.n_runs].range = w.where_range[i]
            w.n_runs += 1
            i = j
        return 0


cdef inline uint64_t _mix64(uint64_t x) noexcept nogil:
    """A permutation of 64 bits that leaves no pattern: the finalizer of SplitMix64."""
    x += <uint64_t>0x9E3779B97F4A7C15
    x = (x ^ (x >> 30)) * <uint64_t>0xBF58476D1CE4E5B9
    x = (x ^ (x >> 27)) * <uint64_t>0x94D049BB133111EB
    return x ^ (x >> 31)


cdef inline uint64_t _flags_of(uint64_t kpf) noexcept nogil:
    """Of a word of kpageflags."""
    cdef uint64_t word = KSM if kpf & KPF_KSM else 0
    if kpf & KPF_THP and kpf & KPF_HEAD_OR_TAIL:
        word |= THP
    return word


cdef int64_t _pread_all(int fd, void *buf, int64_t size, int64_t offset) noexcept nogil:
    """pread until `size` bytes or the end; -1 on an error."""
    cdef int64_t done = 0, got
    while done < size:
        got = pread(fd, <uint8_t *>buf + done, size - done, offset + done)
        if got < 0:
            if errno == EINTR:
                continue
            return -1
        if got == 0:
            break
        done += got
    return done


cdef int _worker_open(Worker *w, int page_size, int reads) noexcept nogil:
    """Buffers of a thread; the page buffer, if it reads, on a huge page, touched once."""
    cdef size_t pages = UNIT_BYTES // page_size
    cdef uint8_t *begin
    cdef size_t i
    w.mapping = <uint8_t *>mmap(NULL, MAPPING_BYTES, PROT_READ | PROT_WRITE,
                                MAP_PRIVATE | MAP_ANONYMOUS, -1, 0)
    if w.mapping == <uint8_t *>MAP_FAILED:
        w.mapping = NULL
        return -1
    begin = w.mapping + (UNIT_BYTES - <uintptr_t>w.mapping % UNIT_BYTES) % UNIT_BYTES
    w.buffer = begin + BUFFER_OFFSET
    w.look = <uint64_t *>malloc(pages * 8)
    # Twice what a unit has: see _spare.
    w.address = <uint64_t *>malloc(2 * pages * 8)
    w.word = <uint64_t *>malloc(2 * pages * 8)
    w.digest = <uint64_t *>malloc(2 * pages * 8)
    w.where_range = <int32_t *>malloc(2 * pages * 4)
    w.in_range = <int64_t *>malloc(UNIT_RANGES * sizeof(int64_t))
    w.known = <int64_t *>calloc(pages, sizeof(int64_t))
    w.nearby = <uint16_t *>malloc(NEARBY_SLOTS * sizeof(uint16_t))
    w.local = <iovec *>malloc(MAX_IOV * sizeof(iovec))
    w.remote = <iovec *>malloc(MAX_IOV * sizeof(iovec))
    if (w.look == NULL or w.address == NULL or w.word == NULL or w.digest == NULL
            or w.where_range == NULL or w.known == NULL or w.nearby == NULL
            or w.in_range == NULL or w.local == NULL or w.remote == NULL):
        return -1
    if reads:
        # Reading lands on one huge page but for the end: fewer TLB misses, one fault.
        c_madvise(begin, UNIT_BYTES, MADV_HUGEPAGE)
        for i in range(pages):
            w.buffer[i * page_size] = 0
    return 0


cdef void _worker_close(Worker *w) noexcept nogil:
    if w.mapping != NULL:
        munmap(w.mapping, MAPPING_BYTES)
    free(w.look)
    free(w.address)
    free(w.word)
    free(w.digest)
    free(w.where_range)
    free(w.known)
    free(w.in_range)
    free(w.nearby)
    free(w.local)
    free(w.remote)
    free(w.runs)
