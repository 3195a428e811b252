# Raw system calls. Each raises OSError with the errno; kernel/ turns that into a typed error.

# Categories of PAGEMAP_SCAN (include/uapi/linux/fs.h).
PAGE_IS_WPALLOWED = 1
PAGE_IS_WRITTEN = 2
PAGE_IS_FILE = 4
PAGE_IS_PRESENT = 8
PAGE_IS_SWAPPED = 16
PAGE_IS_PFNZERO = 32
PAGE_IS_HUGE = 64
PAGE_IS_SOFT_DIRTY = 128

cdef enum:
    P_FILE = 4
    P_PRESENT = 8
    P_PFNZERO = 32
    P_HUGE = 64
    SCAN_VECTOR = 4096


cdef object _os_error(int code, str what):
    """The one place where an errno becomes an exception."""
    return OSError(code, f"{what}: {os.strerror(code)}")


def pagemap_scan(int fd, uint64_t start, uint64_t end, uint64_t inverted, uint64_t mask,
                 uint64_t returned):
    """Ranges of pages whose categories match, by the PAGEMAP_SCAN ioctl.

    Parameters
    ----------
    fd : int
        An open /proc/PID/pagemap.
    start, end : int
        Addresses, page aligned.
    inverted, mask, returned : int
        `category_inverted`, `category_mask`, `return_mask`
        (Documentation/admin-guide/mm/pagemap.rst).

    Returns
    -------
    uint64 array, shape (n, 3)
        Start, end and categories of each range, ascending.

    Raises
    ------
    OSError
        ENOTTY where the kernel has no such call (before Linux 6.7).
    """
    cdef dedup_pm_scan_arg arg
    cdef uint64_t[:, ::1] view
    cdef int rc, failure = 0, i
    cdef uint64_t at = start
    cdef dedup_page_region *vector = <dedup_page_region *>malloc(
        SCAN_VECTOR * sizeof(dedup_page_region))
    if vector == NULL:
        raise MemoryError
    parts = []
    try:
        while at < end:
            memset(&arg, 0, sizeof(arg))
            arg.size = sizeof(arg)
            arg.start = at
            arg.end = end
            arg.vec = <uint64_t><uintptr_t>vector
            arg.vec_len = SCAN_VECTOR
            arg.category_inverted = inverted
            arg.category_mask = mask
            arg.return_mask = returned
            with nogil:
                rc = ioctl(fd, DEDUP_PAGEMAP_SCAN, &arg)
                failure = errno
            if rc < 0:
                if failure == EINTR:
                    continue
                raise _os_error(failure, "PAGEMAP_SCAN")
            if rc:
                part = np.empty((rc, 3), np.uint64)
                view = part
                for i in range(rc):
                    view[i, 0] = vector[i].start
                    view[i, 1] = vector[i].end
                    view[i, 2] = vector[i].categories
                parts.append(part)
            if rc < SCAN_VECTOR:
                break
            # walk_end can be stale once the kernel's own buffer has been full: never go back.
            at = max(arg.walk_end, vector[rc - 1].end)
    finally:
        free(vector)
    return np.concatenate(parts) if parts else np.empty((0, 3), np.uint64)


cdef enum:
    WORDS_AT_ONCE = 512
    WORDS_GAP = 16


def read_words(int fd, const int64_t[::1] indices not None):
    """The 8-byte words at `indices` of a file such as /proc/kpagecount.

    Returns
    -------
    uint64 array
        All ones where the file gave nothing.
    """
    cdef int64_t i = 0, j, k, got, n = indices.shape[0]
    cdef uint64_t[WORDS_AT_ONCE] block
    words = np.empty(n, np.uint64)
    cdef uint64_t[::1] view = words
    with nogil:
        while i < n:
            # Neighbours in one call: a word that nobody wants costs less than a call.
            j = i + 1
            while (j < n and 0 <= indices[j] - indices[j - 1] <= WORDS_GAP
                   and indices[j] - indices[i] < WORDS_AT_ONCE):
                j += 1
            got = pread(fd, block, (indices[j - 1] - indices[i] + 1) * 8, indices[i] * 8) // 8
            for k in range(i, j):
                if indices[k] - indices[i] < got:
                    view[k] = block[indices[k] - indices[i]]
                elif k == i:
                    view[k] = ~(<uint64_t>0)
                else:
                    # What it gave nothing for may be this one's neighbour alone.
                    j = k
                    break
            i = j
    return words


def first_present(int fd, const uint64_t[::1] starts not None, const uint64_t[::1] ends not None,
                  uint64_t huge_bytes, int page_size):
    """The first present anonymous page of each range, and whether a huge page is mapped as one.

    Huge pages are looked for at their own multiples, which takes one call for each where memory
    is; the shared zero page is left out.

    Parameters
    ----------
    fd : int
        An open /proc/PID/pagemap.
    starts, ends : uint64 arrays, shape (n,)
        Page aligned.
    huge_bytes : int
        Of a PMD-mapped huge page; 0 where the kernel has none.
    page_size : int

    Returns
    -------
    words : uint64 array, shape (n,)
        Of pagemap; 0 for a range without such a page.
    huge : bool array, shape (n,)

    Raises
    ------
    OSError
        ENOTTY where the kernel has no PAGEMAP_SCAN.
    """
    cdef int64_t i, n = starts.shape[0]
    cdef uint64_t at
    cdef dedup_page_region found
    cdef int rc = 0, failure = 0
    words, huge = np.zeros(n, np.uint64), np.zeros(n, np.uint8)
    cdef uint64_t[::1] word = words
    cdef uint8_t[::1] is_huge = huge
    with nogil:
        for i in range(n):
            rc = _present_page(fd, starts[i], ends[i], &found)
            if rc == 1:
                is_huge[i] = found.categories & P_HUGE != 0
                if pread(fd, &word[i], 8, <int64_t>(found.start // page_size) * 8) != 8:
                    word[i] = 0
                while huge_bytes and not is_huge[i] and rc == 1:
                    at = found.start // huge_bytes * huge_bytes + huge_bytes
                    if at + huge_bytes > ends[i]:
                        break
                    # The next page wherever it is, so that holes, which may be long, cost nothing.
                    rc = _present_page(fd, at, ends[i], &found)
                    is_huge[i] = rc == 1 and found.categories & P_HUGE != 0
            if rc < 0:
                failure = errno
                break
    if rc < 0:
        raise _os_error(failure, "PAGEMAP_SCAN")
    return words, huge.view(np.bool_)


cdef int _present_page(int fd, uint64_t start, uint64_t end,
                       dedup_page_region *found) noexcept nogil:
    """The first present anonymous page of a range: 1 if there is one, -1 with errno."""
    cdef dedup_pm_scan_arg arg
    cdef int rc
    memset(&arg, 0, sizeof(arg))
    arg.size = sizeof(arg)
    arg.start = start
    arg.end = end
    arg.vec = <uint64_t><uintptr_t>found
    arg.vec_len = 1
    arg.max_pages = 1
    arg.category_inverted = P_FILE | P_PFNZERO
    arg.category_mask = P_PRESENT | P_FILE | P_PFNZERO
    arg.return_mask = P_HUGE
    while True:
        rc = ioctl(fd, DEDUP_PAGEMAP_SCAN, &arg)
        if rc >= 0 or errno != EINTR:
            return rc


def address_of(const uint8_t[::1] data not None):
    """Address of the buffer's first byte."""
    return <uintptr_t>&data[0] if data.shape[0] else 0


def madvise(uint64_t start, uint64_t length, int advice):
    """madvise(2) on our own memory.

    Raises
    ------
    OSError
    """
    cdef int rc, failure
    with nogil:
        rc = c_madvise(<void *><uintptr_t>start, length, advice)
        failure = errno
    if rc < 0:
        raise _os_error(failure, "madvise")


def kcmp_vm(int pid, int other):
    """kcmp(KCMP_VM): 0 when both have one address space, 1 or 2 for an order of those that differ.

    Raises
    ------
    OSError
        EPERM, ESRCH; ENOSYS where the kernel has no such call.
    """
    cdef long rc = syscall(SYS_kcmp, pid, other, 1, 0, 0)
    if rc < 0:
        raise _os_error(errno, "kcmp")
    return rc


def prctl_memory_merge(int on):
    """PR_SET_MEMORY_MERGE for the calling process.

    Raises
    ------
    OSError
        EINVAL where the kernel has no such option (before Linux 6.4).
    """
    cdef unsigned long nothing = 0
    if c_prctl(PR_SET_MEMORY_MERGE, <unsigned long>on, nothing, nothing, nothing) < 0:
        raise _os_error(errno, "prctl(PR_SET_MEMORY_MERGE)")


def prctl_get_memory_merge():
    """PR_GET_MEMORY_MERGE of the calling process: 0 or 1.

    Raises
    ------
    OSError
        EINVAL where the kernel has no such option (before Linux 6.4).
    """
    cdef unsigned long nothing = 0
    cdef int on = c_prctl(PR_GET_MEMORY_MERGE, nothing, nothing, nothing, nothing)
    if on < 0:
        raise _os_error(errno, "prctl(PR_GET_MEMORY_MERGE)")
    return on


def probe_process_vm_readv():
    """Read 8 bytes of our own with process_vm_readv(2), to see whether the call works.

    Raises
    ------
    OSError
        ENOSYS where the kernel has no such call, EPERM where a seccomp filter forbids it.
    """
    cdef uint64_t there = 1, here = 0
    cdef iovec local, remote
    local.iov_base, local.iov_len = &here, 8
    remote.iov_base, remote.iov_len = &there, 8
    if process_vm_readv(os.getpid(), &local, 1, &remote, 1, 0) != 8:
        raise _os_error(errno, "process_vm_readv")


def child_subreaper():
    """PR_SET_CHILD_SUBREAPER for the calling process: orphans among its descendants become its.

    Raises
    ------
    OSError
    """
    cdef unsigned long nothing = 0
    if c_prctl(PR_SET_CHILD_SUBREAPER, <unsigned long>1, nothing, nothing, nothing) < 0:
        raise _os_error(errno, "prctl(PR_SET_CHILD_SUBREAPER)")


def parent_death_signal(int number):
    """PR_SET_PDEATHSIG: the signal that we get when the thread that forked us ends.

    Raises
    ------
    OSError
    """
    cdef unsigned long nothing = 0
    if c_prctl(PR_SET_PDEATHSIG, <unsigned long>number, nothing, nothing, nothing) < 0:
        raise _os_error(errno, "prctl(PR_SET_PDEATHSIG)")


def personality(unsigned long persona):
    """personality(2) of the calling process; 0xffffffff only asks.

    Returns
    -------
    int
        The personality before.

    Raises
    ------
    OSError
        EPERM or whatever errno a seccomp filter has for it.
    """
    cdef int before = c_personality(persona)
    if before < 0:
        raise _os_error(errno, "personality")
    return before


# What a page looks like, as `look_like` says it.
LOOK_NONE = 0        # not there any more, or not ours to read
LOOK_CHANGED = 1
LOOK_ZERO = 2
LOOK_CONSTANT = 3
LOOK_TEXT = 4
LOOK_BINARY = 5
cdef enum:
    L_NONE = 0
    L_CHANGED = 1
    L_ZERO = 2
    L_CONSTANT = 3
    L_TEXT = 4
    L_BINARY = 5
    TEXT_LEAST_BYTES = 32
    TEXT_PERCENT = 90


def look_like(int mem_fd, int pagemap_fd, uint64_t address, int page_size, uint64_t seed,
              uint64_t digest):
    """Read a page once more and say what it looks like; its bytes stay here.

    It is read only if it is present right before, through /proc/PID/mem, which harms no sharing.

    Parameters
    ----------
    mem_fd, pagemap_fd : int
        /proc/PID/mem and /proc/PID/pagemap.
    address : int
        Of the page.
    page_size : int
    seed, digest : int
        The scan's seed, and the hash that the page had.

    Returns
    -------
    int
        `LOOK_*`: text is what consists, but for NUL bytes at its end, of at least 32 bytes, 90 %
        of which are printable ASCII, white space, or characters in well-formed UTF-8.

    Raises
    ------
    MemoryError
    """
    cdef uint8_t secret[192]
    cdef uint8_t *page
    cdef uint64_t entry = 0
    cdef int64_t got
    cdef int found = L_NONE
    if _hash_page == NULL:
        raise RuntimeError("no hash is loaded: call load_hash first")
    page = <uint8_t *>aligned_alloc(page_size, page_size)
    if page == NULL:
        raise MemoryError
    with nogil:
        _make_secret(secret, seed)
        got = _pread_all(pagemap_fd, &entry, 8, <int64_t>(address // <uint64_t>page_size) * 8)
        if got == 8 and entry & PM_PRESENT:
            if _pread_all(mem_fd, page, page_size, <int64_t>address) == page_size:
                found = _judge(page, page_size, secret, digest)
        free(page)
    return found


cdef int _judge(const uint8_t *page, int page_size, const uint8_t *secret,
                uint64_t digest) noexcept nogil:
    if _hash_page(page, page_size, secret, 192) != digest:
        return L_CHANGED
    if _is_constant(page, page_size):
        return L_ZERO if (<const uint64_t *>page)[0] == 0 else L_CONSTANT
    return L_TEXT if _is_text(page, page_size) else L_BINARY


cdef int _is_text(const uint8_t *page, int size) noexcept nogil:
    cdef int i = 0, j, more, good = 0
    cdef uint8_t c
    while size and page[size - 1] == 0:
        size -= 1
    if size < TEXT_LEAST_BYTES:
        return 0
    while i < size:
        c = page[i]
        more = -1
        if 0x20 <= c < 0x7f or 0x09 <= c <= 0x0d:
            more = 0
        elif 0xc2 <= c < 0xe0:
            more = 1
        elif 0xe0 <= c < 0xf0:
            more = 2
        elif 0xf0 <= c < 0xf5:
            more = 3
        if more > 0:
            for j in range(1, more + 1):
                if i + j >= size or page[i + j] & 0xc0 != 0x80:
                    more = -1
                    break
        if more >= 0:
            good += more + 1
            i += more + 1
        else:
            i += 1
    return good * 100 >= size * TEXT_PERCENT
