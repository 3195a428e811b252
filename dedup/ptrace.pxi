# System calls inside another process: stop one thread, let it make them, let it go on.
#
# All of it runs in a thread of its own that has no part in Python: nothing that Python does can
# keep the target stopped, and the kernel lets go of the target when that thread ends, however it
# ends. At every instant the target's registers lead it back by themselves where a frame could be
# put on its stack (`healing`):
#
#   stop        its own registers: the kernel goes on with them as after any stop; a wait that
#               would end with EINTR is made one that the kernel restarts, by its result
#   frame       written below the red zone, where nothing lives; registers as before
#   registers   set at once: the system call's instruction, then `ret` to rt_sigreturn, which
#               restores registers, FPU state and mask from the frame
#   calls       the same again, at the stop after each of them
#   restore     its own registers at once, with orig_rax: the kernel restarts what it interrupted

cdef extern from "ptrace.h" nogil:
    ctypedef struct dedup_regs:
        pass
    ctypedef struct pthread_t:
        pass
    cdef struct siginfo_t:
        pass
    int DEDUP_ARCHITECTURE
    int DEDUP_EVENT_STOP
    int DEDUP_GET_RSEQ_CONFIGURATION
    int DEDUP_GET_SYSCALL_USER_DISPATCH_CONFIG
    int DEDUP_RESTARTS
    int DEDUP_SEES_EINTR
    enum:
        DEDUP_FRAME_ROOM
        DEDUP_SITE
    int PTRACE_SEIZE, PTRACE_INTERRUPT, PTRACE_CONT, PTRACE_SYSCALL, PTRACE_DETACH
    int PTRACE_GETREGSET, PTRACE_SETREGSET, PTRACE_GETSIGMASK, PTRACE_SETSIGMASK
    int PTRACE_O_TRACESYSGOOD
    int NT_PRSTATUS
    int SIGTRAP, SIGSEGV, SIGBUS, SIGILL, SIGFPE, SIGSYS
    int WNOHANG, __WALL
    int EPERM, ESRCH, EIO
    int O_RDONLY, O_CLOEXEC, F_DUPFD_CLOEXEC
    int PR_SET_TIMERSLACK
    int WIFSTOPPED(int status)
    int WSTOPSIG(int status)
    int waitpid(int pid, int *status, int options)
    int sched_yield()
    int openat(int dir_fd, const char *path, int flags)
    int fcntl(int fd, int command, ...)
    int close(int fd)
    ssize_t pwrite(int fd, const void *buf, size_t count, int64_t offset)
    int snprintf(char *s, size_t n, const char *format, ...)
    int pthread_join(pthread_t thread, void **result)
    int pthread_detach(pthread_t thread)
    int64_t dedup_now()
    void dedup_nap(long ns)
    int dedup_exchange(int *p, int v)
    int dedup_join(pthread_t thread, int64_t ns)
    int dedup_start(pthread_t *thread, void *(*run)(void *) noexcept nogil, void *argument)
    long dedup_ptrace(int request, int tid, uintptr_t addr, uintptr_t data)
    int dedup_is_native(const dedup_regs *r, size_t n)
    uint64_t dedup_ip(const dedup_regs *r)
    uint64_t dedup_sp(const dedup_regs *r)
    int64_t dedup_result(const dedup_regs *r)
    uint64_t dedup_thread_pointer(const dedup_regs *r)
    int dedup_is_gadget(const uint8_t *site, int then_return)
    int dedup_is_restorer(const uint8_t *site)
    void dedup_set_call(dedup_regs *r, const int64_t *call, uint64_t gadget)
    void dedup_set_stack(dedup_regs *r, uint64_t sp)
    int dedup_interrupted(const dedup_regs *r)
    void dedup_restart_unless_handled(dedup_regs *r)
    void dedup_rewind(dedup_regs *r)
    uint64_t dedup_call_site(const dedup_regs *r)
    size_t dedup_build_frame(uint8_t *out, uint64_t *at, int tid, const dedup_regs *r,
                             uint64_t mask, uint64_t restorer)
    int dedup_forget_call(int tid)

# Whether this build knows the architecture's registers.
INJECT_ARCHITECTURE = bool(DEDUP_ARCHITECTURE)

# How an injection ended.
INJECT_DONE = 0
INJECT_NOT_STOPPED = 1   # it did not stop in time; it was let alone
INJECT_GONE = 2
INJECT_NOT_SEIZED = 3    # PTRACE_SEIZE said the errno
INJECT_FOREIGN = 4       # not of our own ABI: 32-bit
INJECT_IN_RSEQ = 5       # in a restartable sequence: come again
INJECT_NO_GADGET = 6     # the instructions aren't where they were said to be
INJECT_NO_ROOM = 7       # no safe place for a frame in this thread
INJECT_DISPATCHED = 8    # syscall user dispatch is on in this thread
INJECT_FAULT = 9         # a fault at our instruction; everything was restored
INJECT_LEFT = 10         # a call did not end in time; the thread ends it and goes on by itself
INJECT_STUCK = 11        # our own thread did not come back in time
INJECT_FAILED = 12       # another ptrace call failed with the errno; everything was let go
cdef enum:
    I_DONE = 0
    I_NOT_STOPPED = 1
    I_GONE = 2
    I_NOT_SEIZED = 3
    I_FOREIGN = 4
    I_IN_RSEQ = 5
    I_NO_GADGET = 6
    I_NO_ROOM = 7
    I_DISPATCHED = 8
    I_FAULT = 9
    I_LEFT = 10
    I_STUCK = 11
    I_FAILED = 12

# What a range of stacks is: the kernel's own for the main thread, or one that the C library made.
INJECT_MAIN_STACK = 1
INJECT_THREAD_STACK = 2
cdef enum:
    I_MAIN_STACK = 1
    I_THREAD_STACK = 2

# PTRACE_O_SUSPEND_SECCOMP (include/uapi/linux/ptrace.h).
INJECT_SUSPEND_SECCOMP = 1 << 21
cdef enum:
    I_SUSPEND_SECCOMP = 1 << 21

cdef enum:
    CALL_WORDS = 7           # number and six arguments
    SPIN_NS = 100_000        # so long we look without sleeping
    NAP_NS = 50_000
    I_RUNNING = 0
    I_OVER = 1
    I_ABANDONED = 2


cdef struct Injected:
    int tid
    int is_main
    int dir_fd
    int mem_fd
    int options
    int allow_plain
    int state
    uint64_t gadget
    uint64_t restorer
    uint64_t *stacks
    int64_t n_stacks
    int64_t *calls
    int64_t *results
    int64_t n_calls
    int64_t stop_ns
    int64_t call_ns
    int64_t budget_ns
    int code
    int failure
    int healing
    int interrupted
    int64_t done
    int64_t stopped_ns
    int64_t window_ns


cdef struct RseqConfiguration:
    uint64_t pointer
    uint32_t size
    uint32_t signature
    uint32_t flags
    uint32_t pad


cdef struct RseqCs:
    uint32_t version
    uint32_t flags
    uint64_t start
    uint64_t length
    uint64_t abort


cdef int _wait(int tid, int *status, int64_t until) noexcept nogil:
    """1: its state changed; 0: not until then; -1: it is not ours any more."""
    cdef int64_t begin = dedup_now(), now
    cdef int rc
    while True:
        rc = waitpid(tid, status, __WALL | WNOHANG)
        if rc == tid:
            return 1
        if rc < 0 and errno != EINTR:
            return -1
        now = dedup_now()
        if until and now >= until:
            return 0
        if now - begin < SPIN_NS:
            sched_yield()
        else:
            dedup_nap(NAP_NS)


cdef int _regs(int request, int tid, dedup_regs *regs, size_t *size) noexcept nogil:
    cdef iovec iov
    cdef long rc
    iov.iov_base = regs
    iov.iov_len = sizeof(dedup_regs)
    rc = dedup_ptrace(request, tid, NT_PRSTATUS, <uintptr_t>&iov)
    if size != NULL:
        size[0] = iov.iov_len
    return rc < 0


cdef int _fails(Injected *q) noexcept nogil:
    """A ptrace call failed: killed meanwhile, most likely. Gives the outcome."""
    q.failure = errno
    q.code = I_GONE if errno == ESRCH else I_FAILED
    return q.code


cdef int _stop(Injected *q) noexcept nogil:
    """Wait for the stop that we asked for; signals that come first are passed on."""
    cdef int status = 0, rc
    cdef int64_t until = dedup_now() + q.stop_ns
    if dedup_ptrace(PTRACE_INTERRUPT, q.tid, 0, 0) < 0:
        return _fails(q)
    while True:
        rc = _wait(q.tid, &status, until)
        if rc == 0:
            return I_NOT_STOPPED
        if rc < 0 or not WIFSTOPPED(status):
            return I_GONE
        if status >> 16 == DEDUP_EVENT_STOP:
            return I_DONE
        if dedup_ptrace(PTRACE_CONT, q.tid, 0, 0 if status >> 16 else WSTOPSIG(status)) < 0:
            return _fails(q)


cdef int _next_call_stop(Injected *q) noexcept nogil:
    """Go on to the entry of a system call, or from there to its end."""
    cdef int status = 0, rc, sig = 0
    # Without a frame nobody but us can bring it back: no deadline then.
    cdef int64_t until = dedup_now() + q.call_ns if q.healing else 0
    while True:
        if dedup_ptrace(PTRACE_SYSCALL, q.tid, 0, sig) < 0:
            return _fails(q)
        rc = _wait(q.tid, &status, until)
        if rc == 0:
            return I_LEFT
        if rc < 0 or not WIFSTOPPED(status):
            return I_GONE
        sig = WSTOPSIG(status)
        if sig == (SIGTRAP | 0x80):
            return I_DONE
        if status >> 16:
            sig = 0  # the whole process is being stopped: this thread goes on until it is done
        elif sig in (SIGSEGV, SIGBUS, SIGILL, SIGFPE, SIGTRAP, SIGSYS):
            return I_FAULT
        # Else SIGSTOP, the one signal that can't be held back: it takes effect now.


cdef int _has_room(Injected *q, const dedup_regs *regs, uint64_t at) noexcept nogil:
    """Whether nothing can live between `at` and the stack pointer."""
    cdef uint64_t sp = dedup_sp(regs), pointer = dedup_thread_pointer(regs), self = 0
    cdef int64_t i
    for i in range(q.n_stacks):
        if not q.stacks[3 * i] <= at < sp < q.stacks[3 * i + 1]:
            continue
        if q.stacks[3 * i + 2] == I_MAIN_STACK:
            return q.is_main
        # The C library puts a thread's control block above its stack. A coroutine's or a Go
        # routine's stack has none, and what lies below it belongs to others.
        return (sp < pointer < q.stacks[3 * i + 1]
                and pread(q.mem_fd, &self, 8, <int64_t>pointer) == 8 and self == pointer)
    return 0


cdef int _in_rseq(Injected *q, const dedup_regs *regs) noexcept nogil:
    cdef RseqConfiguration c
    cdef RseqCs cs
    cdef uint64_t at = 0, ip = dedup_ip(regs)
    if dedup_ptrace(DEDUP_GET_RSEQ_CONFIGURATION, q.tid, sizeof(c), <uintptr_t>&c) < 0:
        return 0
    if c.pointer == 0 or pread(q.mem_fd, &at, 8, <int64_t>c.pointer + 8) != 8 or at == 0:
        return 0
    if pread(q.mem_fd, &cs, sizeof(cs), <int64_t>at) != sizeof(cs):
        return 0
    return ip - cs.start < cs.length


cdef int _is_dispatched(int tid) noexcept nogil:
    cdef uint64_t config[4]
    memset(config, 0, sizeof(config))
    if dedup_ptrace(DEDUP_GET_SYSCALL_USER_DISPATCH_CONFIG, tid, sizeof(config),
                    <uintptr_t>config) < 0:
        return 0
    return config[0] != 0


cdef int _work(Injected *q) noexcept nogil:
    """From SEIZE to DETACH; what it can't detach, the end of this thread does."""
    cdef dedup_regs own, back, regs
    cdef uint8_t frame[DEDUP_FRAME_ROOM]
    cdef uint8_t site[DEDUP_SITE]
    cdef char path[64]
    cdef uint64_t mask = 0, all_signals = ~(<uint64_t>0), at = 0
    cdef size_t size = 0, frame_size = 0
    cdef int64_t begin, opened = 0, rc
    cdef int code, interrupted, fd

    memset(&own, 0, sizeof(own))
    memset(site, 0, sizeof(site))
    if dedup_ptrace(PTRACE_SEIZE, q.tid, 0, q.options) < 0:
        q.failure = errno
        return I_GONE if q.failure == ESRCH else I_NOT_SEIZED
    # The folder is that of the process that was chosen, or dead: so is the thread that we have.
    snprintf(path, sizeof(path), b"task/%d", q.tid)
    fd = openat(q.dir_fd, path, O_RDONLY | O_CLOEXEC)
    if fd < 0:
        return I_GONE
    close(fd)
    begin = dedup_now()
    code = _stop(q)
    if code != I_DONE:
        return code

    while True:  # once: `break` detaches
        code = I_FOREIGN
        if _regs(PTRACE_GETREGSET, q.tid, &own, &size):
            code = _fails(q)
            break
        if not dedup_is_native(&own, size):
            break
        # `own` is how the kernel takes it on; `back` is where to go on without its help.
        interrupted = dedup_interrupted(&own)
        if interrupted and (pread(q.mem_fd, site, DEDUP_SITE, <int64_t>dedup_call_site(&own)) < 3
                            or not dedup_is_gadget(site, 0)):
            interrupted = 0
        # At once, as EINTR is what it sees should we die before.
        if interrupted == DEDUP_SEES_EINTR:
            dedup_restart_unless_handled(&own)
            if _regs(PTRACE_SETREGSET, q.tid, &own, NULL):
                code = _fails(q)
                break
            q.window_ns = dedup_now() - begin
        back = own
        q.interrupted = interrupted
        if interrupted:
            dedup_rewind(&back)
        code = I_IN_RSEQ
        if _in_rseq(q, &own):
            break
        code = I_DISPATCHED
        if _is_dispatched(q.tid):
            break
        code = I_NO_GADGET
        if pread(q.mem_fd, site, DEDUP_SITE, <int64_t>q.gadget) < 3:
            break
        if not dedup_is_gadget(site, q.restorer != 0):
            break
        if q.restorer:
            if pread(q.mem_fd, site, DEDUP_SITE, <int64_t>q.restorer) < 9:
                break
            if not dedup_is_restorer(site):
                break
        if dedup_ptrace(PTRACE_GETSIGMASK, q.tid, 8, <uintptr_t>&mask) < 0:
            code = _fails(q)
            break

        q.healing = 0
        if q.restorer:
            frame_size = dedup_build_frame(frame, &at, q.tid, &back, mask, q.restorer)
            if frame_size and _has_room(q, &own, at):
                q.healing = (pwrite(q.mem_fd, frame, frame_size, <int64_t>at)
                             == <ssize_t>frame_size)
        if not q.healing and not q.allow_plain:
            code = I_NO_ROOM
            break

        regs = own
        if q.healing:
            dedup_set_stack(&regs, at)
        for q.done in range(q.n_calls):
            dedup_set_call(&regs, q.calls + CALL_WORDS * q.done, q.gadget)
            if q.done == 0:
                opened = dedup_now()
            if _regs(PTRACE_SETREGSET, q.tid, &regs, NULL):
                code = _fails(q)
                break
            if q.done == 0 and (
                dedup_ptrace(PTRACE_SETSIGMASK, q.tid, 8, <uintptr_t>&all_signals) < 0
                or dedup_forget_call(q.tid) < 0
            ):
                code = _fails(q)
                break
            code = _next_call_stop(q)
            if code == I_DONE:
                code = _next_call_stop(q)
            if code != I_DONE:
                break
            if _regs(PTRACE_GETREGSET, q.tid, &regs, NULL):
                code = _fails(q)
                break
            rc = dedup_result(&regs)
            if -516 <= rc <= -512:
                break  # it gave way to a SIGSTOP: once more, after that
            q.results[q.done] = rc
            if dedup_now() - begin > q.budget_ns:
                q.done += 1
                break
            if q.healing:
                dedup_set_stack(&regs, at)
        else:
            q.done = q.n_calls
        if code in (I_GONE, I_LEFT, I_FAILED):
            if code != I_FAILED:
                return code
        else:
            # A pending interrupt makes the kernel look at the restart once more.
            if dedup_ptrace(PTRACE_INTERRUPT, q.tid, 0, 0) < 0:
                return _fails(q)
        if (dedup_ptrace(PTRACE_SETSIGMASK, q.tid, 8, <uintptr_t>&mask) < 0
                or dedup_forget_call(q.tid) < 0
                or _regs(PTRACE_SETREGSET, q.tid, &own, NULL)):
            return _fails(q)
        if not q.healing or q.options & I_SUSPEND_SECCOMP:
            q.window_ns += dedup_now() - opened
        break
    dedup_ptrace(PTRACE_DETACH, q.tid, 0, 0)
    q.stopped_ns = dedup_now() - begin
    return code


cdef void _free_injected(Injected *q) noexcept nogil:
    if q.dir_fd >= 0:
        close(q.dir_fd)
    if q.mem_fd >= 0:
        close(q.mem_fd)
    free(q.stacks)
    free(q.calls)
    free(q.results)
    free(q)


cdef void *_inject_thread(void *argument) noexcept nogil:
    cdef Injected *q = <Injected *>argument
    cdef unsigned long nothing = 0
    c_prctl(PR_SET_TIMERSLACK, <unsigned long>1, nothing, nothing, nothing)
    q.code = _work(q)
    if dedup_exchange(&q.state, I_OVER) == I_ABANDONED:
        _free_injected(q)
    return NULL


def inject(int pid, int tid, int dir_fd, int mem_fd, int options, uint64_t gadget,
           uint64_t restorer, bint allow_plain, const uint64_t[:, ::1] stacks not None,
           const int64_t[:, ::1] calls not None, int64_t[::1] results not None,
           double stop_seconds, double call_seconds, double budget_seconds):
    """Make system calls in a thread of another process, in one stop.

    Parameters
    ----------
    pid, tid : int
        The process and the thread that makes them.
    dir_fd, mem_fd : int
        The process's folder in /proc, and its `mem`, open for reading and writing.
    options : int
        `PTRACE_O_*` beside TRACESYSGOOD.
    gadget, restorer : int
        Addresses of `syscall; ret` and of rt_sigreturn; where the latter is 0, `syscall` alone
        will do for the former.
    allow_plain : bool
        Go on also where no frame can be put that would lead the thread back without us.
    stacks : uint64 array, shape (n, 3)
        Start, end and `INJECT_*_STACK` of mappings that are nothing but a thread's stack.
    calls : int64 array, shape (n, 7)
        Numbers and arguments of the system calls.
    results : int64 array, shape (n,)
        Takes what they return.
    stop_seconds, call_seconds : float
        Deadlines: until the thread stops, and for each call's entry and end.
    budget_seconds : float
        No further call begins once the stop has lasted so long.

    Returns
    -------
    tuple
        `INJECT_*`; errno; how many calls were made; whether a frame was put; how the thread was
        found (0 whole, 1 in a wait that the kernel restarts, 2 in one that we did); seconds from
        our asking for the stop to its end; seconds in which our death would have been seen.

    Raises
    ------
    MemoryError
    ValueError
    """
    cdef Injected *q
    cdef pthread_t thread
    cdef int rc
    cdef int64_t i, j, patience
    if stacks.shape[0] and stacks.shape[1] != 3 or calls.shape[1] != CALL_WORDS:
        raise ValueError("stacks have three words, calls seven")
    if results.shape[0] < calls.shape[0] or calls.shape[0] == 0:
        raise ValueError("no calls, or no room for their results")
    q = <Injected *>malloc(sizeof(Injected))
    if q == NULL:
        raise MemoryError
    memset(q, 0, sizeof(Injected))
    q.dir_fd = fcntl(dir_fd, F_DUPFD_CLOEXEC, 0)
    q.mem_fd = fcntl(mem_fd, F_DUPFD_CLOEXEC, 0)
    q.stacks = <uint64_t *>malloc(24 * stacks.shape[0] + 8)
    q.calls = <int64_t *>malloc(8 * CALL_WORDS * calls.shape[0])
    q.results = <int64_t *>malloc(8 * calls.shape[0])
    if (q.dir_fd < 0 or q.mem_fd < 0 or q.stacks == NULL or q.calls == NULL
            or q.results == NULL):
        _free_injected(q)
        raise MemoryError
    q.tid = tid
    q.is_main = pid == tid
    q.options = options | PTRACE_O_TRACESYSGOOD
    q.gadget = gadget
    q.restorer = restorer
    q.allow_plain = allow_plain
    q.n_stacks = stacks.shape[0]
    for i in range(q.n_stacks):
        for j in range(3):
            q.stacks[3 * i + j] = stacks[i, j]
    q.n_calls = calls.shape[0]
    for i in range(q.n_calls):
        for j in range(CALL_WORDS):
            q.calls[CALL_WORDS * i + j] = calls[i, j]
    q.stop_ns = <int64_t>(stop_seconds * 1e9)
    q.call_ns = <int64_t>(call_seconds * 1e9)
    q.budget_ns = <int64_t>(budget_seconds * 1e9)
    # Every wait of the thread has its deadline; but SEIZE, /proc and a call without a frame may
    # take longer.
    patience = q.stop_ns + 2 * q.call_ns + q.budget_ns + 1_000_000_000
    with nogil:
        rc = dedup_start(&thread, _inject_thread, q)
        if rc == 0:
            rc = dedup_join(thread, patience)
            if rc and dedup_exchange(&q.state, I_ABANDONED) == I_OVER:
                rc = pthread_join(thread, NULL)
            elif rc:
                pthread_detach(thread)
                with gil:
                    return I_STUCK, 0, 0, False, 0, 0.0, 0.0
        else:
            q.code = I_FAILED
            q.failure = rc
    for i in range(q.done):
        results[i] = q.results[i]
    found = (q.code, q.failure, q.done, bool(q.healing), q.interrupted,
             q.stopped_ns / 1e9, q.window_ns / 1e9)
    _free_injected(q)
    return found
