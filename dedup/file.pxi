# Pages that lie in files: read in bounded pieces, tested and hashed as those of a process are.

cdef enum:
    FILE_BUFFER_BYTES = 1024 * 1024


def hash_file(int fd, int page_size, uint64_t seed, const int64_t[::1] offset not None,
              const int64_t[::1] count not None, const int64_t[::1] first not None,
              uint64_t[::1] hashes not None, uint64_t[::1] frames not None, uint64_t word):
    """Read, test and hash pieces of a file, without the interpreter's lock.

    It reads with pread: a file that is cut meanwhile ends the work, and sends no signal.

    Parameters
    ----------
    fd : int
    page_size : int
        Bytes.
    seed : int
    offset, count, first : int64 arrays, one entry a piece
        Where it begins in the file (bytes, of any alignment), its pages, and where they go in
        `hashes` and `frames`.
    hashes, frames : uint64 arrays
        Written in place.
    word : int
        The frame word of each page, before what the content adds.

    Returns
    -------
    int
        Pages done: fewer than asked for where the file ends sooner.

    Raises
    ------
    OSError
        Reading failed.
    MemoryError
    """
    cdef uint8_t secret[192]
    cdef uint8_t *buffer
    cdef uint8_t *page
    cdef int64_t i, k, n, got, at, left, where, done = 0, room = FILE_BUFFER_BYTES // page_size
    cdef uint64_t zero_hash, found
    cdef int failure = 0
    if _hash_page == NULL:
        raise RuntimeError("no hash is loaded: call load_hash first")
    if not offset.shape[0] == count.shape[0] == first.shape[0]:
        raise ValueError("the pieces' arrays differ in length")
    for i in range(offset.shape[0]):
        if (offset[i] < 0 or count[i] < 0 or first[i] < 0
                or count[i] > hashes.shape[0] - first[i]
                or count[i] > frames.shape[0] - first[i]):
            raise ValueError("a piece lies outside the arrays")
    buffer = <uint8_t *>aligned_alloc(page_size, room * page_size)
    if buffer == NULL:
        raise MemoryError
    with nogil:
        _make_secret(secret, seed)
        memset(buffer, 0, page_size)
        zero_hash = _hash_page(buffer, page_size, secret, 192)
        for i in range(offset.shape[0]):
            at, left, where = offset[i], count[i], first[i]
            while left > 0:
                n = left if left < room else room
                got = _pread_all(fd, buffer, n * page_size, at)
                if got < 0:
                    failure = errno
                    break
                n = got // page_size
                for k in range(n):
                    page = buffer + k * page_size
                    found = word
                    if _is_constant(page, page_size):
                        found |= CONSTANT
                        if (<uint64_t *>page)[0] == 0:
                            found |= ZERO
                    frames[where + k] = found
                    if found & ZERO:
                        hashes[where + k] = zero_hash
                    else:
                        hashes[where + k] = _hash_page(page, page_size, secret, 192)
                done += n
                if n < (left if left < room else room):
                    break
                at += n * page_size
                where += n
                left -= n
            if left > 0:
                break
        free(buffer)
    if failure:
        raise _os_error(failure, "pread")
    return done


def look_like_in_file(int fd, int64_t offset, int page_size, uint64_t seed, uint64_t digest):
    """Read a page of a file once more and say what it looks like, as `look_like` does.

    Parameters
    ----------
    fd : int
    offset : int
        Bytes.
    page_size : int
    seed, digest : int
        The scan's seed, and the hash that the page had.

    Returns
    -------
    int
        `LOOK_*`; `LOOK_NONE` where it can't be read.

    Raises
    ------
    MemoryError
    """
    cdef uint8_t secret[192]
    cdef uint8_t *page
    cdef int found = L_NONE
    if _hash_page == NULL:
        raise RuntimeError("no hash is loaded: call load_hash first")
    page = <uint8_t *>aligned_alloc(page_size, page_size)
    if page == NULL:
        raise MemoryError
    with nogil:
        _make_secret(secret, seed)
        if _pread_all(fd, page, page_size, offset) == page_size:
            found = _judge(page, page_size, secret, digest)
        free(page)
    return found
