# The real XXH3 through the xxhash package's compiled symbols, called without the GIL.

cdef hash_fn _hash_page = NULL        # XXH3_64bits_withSecret, dispatching where it can
cdef secret_fn _make_secret = NULL
_hash_source = "none"
_libraries = []                       # keeps the shared objects loaded


def _load_from(path, source):
    """Take the hash from the shared object at `path`; False if it lacks a symbol."""
    global _hash_page, _make_secret, _hash_source
    library = ctypes.CDLL(path)
    try:
        secret = getattr(library, "XXH3_generateSecret_fromSeed")
    except AttributeError:
        return False
    entry = None
    for name in ("XXH3_64bits_withSecret_dispatch", "XXH3_64bits_withSecret"):
        entry = getattr(library, name, None)
        if entry is not None:
            break
    if entry is None:
        return False
    _hash_page = <hash_fn><uintptr_t>ctypes.cast(entry, ctypes.c_void_p).value
    _make_secret = <secret_fn><uintptr_t>ctypes.cast(secret, ctypes.c_void_p).value
    _libraries.append(library)
    _hash_source = f"{source}:{name}"
    return True


_reference = None


cdef void _keep_seed(void *secret, uint64_t seed) noexcept nogil:
    (<uint64_t *>secret)[0] = seed


cdef uint64_t _hash_by_python(const void *page, size_t size, const void *secret,
                              size_t length) noexcept with gil:
    """The documented Python call, a page at a time: the same values, slower."""
    return _reference((<const uint8_t *>page)[:size], (<const uint64_t *>secret)[0])


def load_hash(candidates, reference, int page_size):
    """Choose the first library whose XXH3 gives the reference's values.

    Where none does, pages are hashed by the reference itself, with the interpreter's lock.

    Parameters
    ----------
    candidates : iterable of (path, source)
        Shared objects to try, in order; `source` names each for people.
    reference : callable
        ``reference(data, seed) -> int``, the documented Python call.
    page_size : int
        Bytes.

    Returns
    -------
    str
        ``source:symbol`` of the one in use.
    """
    global _hash_page, _make_secret, _hash_source, _reference
    sample = bytes((i * 131 + (i >> 8)) & 255 for i in range(page_size))
    for path, source in candidates:
        try:
            found = _load_from(path, source)
        except OSError:
            found = False    # not on this machine: the next one
        if not found:
            continue
        if all(hash_bytes(sample, seed) == reference(sample, seed)
               for seed in (0, 1, 0x9E3779B97F4A7C15, 2**64 - 1)):
            return _hash_source
    _reference = reference
    _hash_page = _hash_by_python
    _make_secret = _keep_seed
    _hash_source = "python:xxh3_64_intdigest"
    return _hash_source


def hash_bytes(const uint8_t[::1] data not None, uint64_t seed):
    """XXH3-64 of `data` (more than 240 bytes) under `seed`, by the entry that a scan uses."""
    cdef uint8_t secret[192]
    if _hash_page == NULL:
        raise RuntimeError("no hash is loaded: call load_hash first")
    if data.shape[0] <= 240:
        raise ValueError("pages are longer than 240 bytes; shorter input hashes differently")
    _make_secret(secret, seed)
    return _hash_page(&data[0], data.shape[0], secret, 192)


cdef inline int _is_constant(const uint8_t *page, size_t size) noexcept nogil:
    """1 if the page, of a multiple of 256 bytes, repeats its first 8 bytes throughout."""
    if (<const uint64_t *>page)[0] != (<const uint64_t *>page)[1]:
        return 0
    return dedup_repeats(<const uint64_t *>page, size // 8)
