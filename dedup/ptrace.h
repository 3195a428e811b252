/* What one system call inside another process must know of the architecture: registers, and the
 * signal frame that leads the thread back by itself.
 *
 * Sources: arch/x86/kernel/signal.c, signal_64.c, fpu/signal.c; arch/arm64/kernel/signal.c;
 * include/uapi/linux/ptrace.h, rseq.h.
 */
#ifndef DEDUP_PTRACE_H
#define DEDUP_PTRACE_H

#include <elf.h>
#include <errno.h>
#include <fcntl.h>
#include <pthread.h>
#include <sched.h>
#include <signal.h>
#include <stddef.h>
#include <stdint.h>
#include <string.h>
#include <sys/prctl.h>
#include <sys/ptrace.h>
#include <sys/uio.h>
#include <sys/user.h>
#include <sys/wait.h>
#include <time.h>
#include <unistd.h>

#ifndef NT_X86_XSTATE
#define NT_X86_XSTATE 0x202
#endif
#ifndef NT_ARM_SYSTEM_CALL
#define NT_ARM_SYSTEM_CALL 0x404
#endif

/* Newer than the headers of Debian 12; by number, as the C library may have them as an enum. */
enum {
    DEDUP_EVENT_STOP = 128,
    DEDUP_GET_RSEQ_CONFIGURATION = 0x420f,
    DEDUP_GET_SYSCALL_USER_DISPATCH_CONFIG = 0x4211,
};

/* How a thread was found. */
enum {
    DEDUP_WHOLE = 0,     /* in no system call, or in one that is over */
    DEDUP_RESTARTS = 1,  /* in a wait that the kernel takes up again */
    DEDUP_SEES_EINTR = 2 /* in a wait of which the program would see the end */
};

enum {
    DEDUP_FRAME_ROOM = 24576, /* the largest frame that we write */
    DEDUP_SITE = 16           /* bytes looked at where a gadget should be */
};

static inline long dedup_ptrace(int request, int tid, uintptr_t addr, uintptr_t data)
{
    return ptrace((__typeof__(PTRACE_CONT))request, tid, (void *)addr, (void *)data);
}

static inline int64_t dedup_now(void)
{
    struct timespec t;
    clock_gettime(CLOCK_MONOTONIC, &t);
    return (int64_t)t.tv_sec * 1000000000 + t.tv_nsec;
}

static inline void dedup_nap(long ns)
{
    struct timespec t = {0, ns};
    nanosleep(&t, NULL);
}

static inline int dedup_exchange(int *p, int v) { return __atomic_exchange_n(p, v, __ATOMIC_ACQ_REL); }

/* pthread_timedjoin_np wants CLOCK_REALTIME. */
static inline int dedup_join(pthread_t thread, int64_t ns)
{
    struct timespec t;
    clock_gettime(CLOCK_REALTIME, &t);
    ns += t.tv_nsec;
    t.tv_sec += ns / 1000000000;
    t.tv_nsec = ns % 1000000000;
    return pthread_timedjoin_np(thread, NULL, &t);
}

/* A thread that hears no signal: they are all blocked in it from its first instruction on. */
static inline int dedup_start(pthread_t *thread, void *(*run)(void *), void *with)
{
    sigset_t all, before;
    int rc;
    sigfillset(&all);
    pthread_sigmask(SIG_SETMASK, &all, &before);
    rc = pthread_create(thread, NULL, run, with);
    pthread_sigmask(SIG_SETMASK, &before, NULL);
    return rc;
}

#if defined(__x86_64__)

#include <cpuid.h>

#define DEDUP_ARCHITECTURE 1
typedef struct user_regs_struct dedup_regs;

static inline int dedup_is_native(const dedup_regs *r, size_t bytes)
{
    return bytes == sizeof(*r) && r->cs == 0x33;
}

static inline uint64_t dedup_ip(const dedup_regs *r) { return r->rip; }
static inline uint64_t dedup_sp(const dedup_regs *r) { return r->rsp; }
static inline int64_t dedup_result(const dedup_regs *r) { return (int64_t)r->rax; }

/* Where the thread's own control block lies; by the ABI its first word points to itself. */
static inline uint64_t dedup_thread_pointer(const dedup_regs *r) { return r->fs_base; }

static inline int dedup_is_gadget(const uint8_t *site, int then_return)
{
    return site[0] == 0x0f && site[1] == 0x05 && (!then_return || site[2] == 0xc3);
}

/* mov $__NR_rt_sigreturn, %rax or %eax; syscall */
static inline int dedup_is_restorer(const uint8_t *site)
{
    return !memcmp(site, "\x48\xc7\xc0\x0f\0\0\0\x0f\x05", 9) ||
           !memcmp(site, "\xb8\x0f\0\0\0\x0f\x05", 7);
}

static inline void dedup_set_call(dedup_regs *r, const int64_t *call, uint64_t gadget)
{
    r->rip = gadget;
    r->rax = (uint64_t)call[0];
    r->rdi = (uint64_t)call[1];
    r->rsi = (uint64_t)call[2];
    r->rdx = (uint64_t)call[3];
    r->r10 = (uint64_t)call[4];
    r->r8 = (uint64_t)call[5];
    r->r9 = (uint64_t)call[6];
    r->orig_rax = (uint64_t)-1; /* no system call that could be restarted */
    r->eflags &= ~(uint64_t)0x100; /* TF: no trap of the program's own after our instruction */
}

static inline void dedup_set_stack(dedup_regs *r, uint64_t sp) { r->rsp = sp; }

/* The waits that give EINTR after a stop, by signal(7), io_uring_enter(2) and io_getevents(2).
 * Nothing is lost when one of them begins anew, but for the time that it has waited. Not close():
 * its descriptor is free by then. */
static inline int dedup_begins_anew(uint64_t number)
{
    switch (number) {
    case 0: case 1: case 19: case 20:                /* read, write, readv, writev: sockets */
    case 42: case 43: case 44: case 45: case 46: case 47: /* connect accept send* recv* */
    case 288: case 299: case 307:                    /* accept4, recvmmsg, sendmmsg */
    case 65: case 220:                               /* semop, semtimedop */
    case 128:                                        /* rt_sigtimedwait */
    case 208: case 333:                              /* io_getevents, io_pgetevents */
    case 232: case 281: case 441:                    /* epoll_wait, epoll_pwait, epoll_pwait2 */
    case 426:                                        /* io_uring_enter */
        return 1;
    default:
        return 0;
    }
}

static inline int dedup_interrupted(const dedup_regs *r)
{
    if ((int64_t)r->orig_rax < 0)
        return DEDUP_WHOLE;
    switch ((int64_t)r->rax) {
    case -512: case -513: case -514: case -516: /* ERESTARTSYS, NOINTR, NOHAND, RESTARTBLOCK */
        return DEDUP_RESTARTS;
    case -EINTR:
        return dedup_begins_anew(r->orig_rax) ? DEDUP_SEES_EINTR : DEDUP_WHOLE;
    default:
        return DEDUP_WHOLE;
    }
}

/* -ERESTARTNOHAND: the kernel restarts it, or gives EINTR if a handler runs. So a signal that
 * comes at any moment still ends the wait. */
static inline void dedup_restart_unless_handled(dedup_regs *r) { r->rax = (uint64_t)-514; }

/* Back to the system call's instruction; the caller has seen that it is there. */
static inline void dedup_rewind(dedup_regs *r)
{
    r->rip -= 2;
    r->rax = r->orig_rax;
    r->orig_rax = (uint64_t)-1;
}

static inline uint64_t dedup_call_site(const dedup_regs *r) { return r->rip - 2; }

struct dedup_frame {
    uint64_t pretcode;
    struct {
        uint64_t flags, link;
        struct { uint64_t sp; int32_t flags, pad; uint64_t size; } stack;
        uint64_t r8, r9, r10, r11, r12, r13, r14, r15, di, si, bp, bx, dx, ax, cx, sp, ip, eflags;
        uint16_t cs, gs, fs, ss;
        uint64_t err, trapno, oldmask, cr2, fpstate, reserved[8];
        uint64_t sigmask;
    } uc;
    uint8_t siginfo[128];
};

enum {
    DEDUP_FPSTATE = 448, /* behind the frame, aligned to 64 as XRSTOR wants */
    DEDUP_RED_ZONE = 128,
    DEDUP_XTILEDATA = 18
};
_Static_assert(sizeof(struct dedup_frame) == 440, "the kernel's struct rt_sigframe");

/* Builds the frame for a thread that is to go on at `r`, and says where it belongs and its size
 * in bytes. 0: there is none that would be whole. */
static inline size_t dedup_build_frame(uint8_t *out, uint64_t *at, int tid, const dedup_regs *r,
                                       uint64_t mask, uint64_t restorer)
{
    struct dedup_frame frame;
    uint8_t *fp = out + DEDUP_FPSTATE;
    struct iovec iov = {fp, DEDUP_FRAME_ROOM - DEDUP_FPSTATE - 64}; /* a multiple of 8, or EINVAL */
    const uint32_t magic2 = 0x46505845;
    uint64_t features, in_use;
    size_t whole;

    memset(out, 0, DEDUP_FPSTATE);
    if (dedup_ptrace(PTRACE_GETREGSET, tid, NT_X86_XSTATE, (uintptr_t)&iov) < 0 || iov.iov_len < 576)
        return 0;
    whole = iov.iov_len;
    /* The regset has XCR0 where the frame has struct _fpx_sw_bytes. */
    memcpy(&features, fp + 464, 8);
    memcpy(&in_use, fp + 512, 8);
    memset(fp + 464, 0, 48);
    memcpy(fp + whole, &magic2, 4);
    {
        uint32_t sw[5] = {0x46505853, (uint32_t)whole + 4, (uint32_t)features,
                          (uint32_t)(features >> 32), (uint32_t)whole};
        /* A thread that has not used AMX's tiles has the smaller state, without them. The kernel
         * looks for the second magic number at the end of the state that the thread has, which we
         * can't see: it stands at both ends. The tiles aren't loaded from there. */
        if (features >> DEDUP_XTILEDATA & 1 && !(in_use >> DEDUP_XTILEDATA & 1)) {
            uint32_t a, smaller, c, d;
            if (!__get_cpuid_count(0xd, DEDUP_XTILEDATA, &a, &smaller, &c, &d) ||
                smaller < 576 || smaller + 4 > whole)
                return 0;
            memcpy(fp + smaller, &magic2, 4);
            sw[4] = smaller;
        }
        memcpy(fp + 464, sw, sizeof(sw));
    }

    *at = (r->rsp - DEDUP_RED_ZONE - DEDUP_FPSTATE - whole - 4) & ~(uint64_t)63;
    memset(&frame, 0, sizeof(frame));
    frame.pretcode = restorer;
    frame.uc.flags = 1 | 2 | 4; /* UC_FP_XSTATE, UC_SIGCONTEXT_SS, UC_STRICT_RESTORE_SS */
    /* Flags that sigaltstack(2) refuses: rt_sigreturn leaves the thread's setting as it is then. */
    frame.uc.stack.flags = 0x4000;
    frame.uc.r8 = r->r8; frame.uc.r9 = r->r9; frame.uc.r10 = r->r10; frame.uc.r11 = r->r11;
    frame.uc.r12 = r->r12; frame.uc.r13 = r->r13; frame.uc.r14 = r->r14; frame.uc.r15 = r->r15;
    frame.uc.di = r->rdi; frame.uc.si = r->rsi; frame.uc.bp = r->rbp; frame.uc.bx = r->rbx;
    frame.uc.dx = r->rdx; frame.uc.ax = r->rax; frame.uc.cx = r->rcx; frame.uc.sp = r->rsp;
    frame.uc.ip = r->rip; frame.uc.eflags = r->eflags;
    frame.uc.cs = (uint16_t)r->cs; frame.uc.ss = (uint16_t)r->ss;
    frame.uc.fpstate = *at + DEDUP_FPSTATE;
    frame.uc.sigmask = mask;
    memcpy(out, &frame, sizeof(frame));
    return DEDUP_FPSTATE + whole + 4;
}

static inline int dedup_forget_call(int tid) { (void)tid; return 0; }

#elif defined(__aarch64__)

/* Untested: written from the sources. Without a frame of its own, so never self-healing; and the
 * kernel has taken a wait back to its instruction before we see the thread, so that one which
 * gives EINTR is seen by the program (x0 of before is lost by then). */

#include <asm/ptrace.h>

#define DEDUP_ARCHITECTURE 1
typedef struct user_pt_regs dedup_regs;

static inline int dedup_is_native(const dedup_regs *r, size_t bytes)
{
    return bytes == sizeof(*r) && !(r->pstate & 0x10); /* PSR_MODE32_BIT */
}

static inline uint64_t dedup_ip(const dedup_regs *r) { return r->pc; }
static inline uint64_t dedup_sp(const dedup_regs *r) { return r->sp; }
static inline int64_t dedup_result(const dedup_regs *r) { return (int64_t)r->regs[0]; }
static inline uint64_t dedup_thread_pointer(const dedup_regs *r) { (void)r; return 0; }

static inline int dedup_is_gadget(const uint8_t *site, int then_return)
{
    return !then_return && !memcmp(site, "\x01\0\0\xd4", 4); /* svc #0 */
}

static inline int dedup_is_restorer(const uint8_t *site) { (void)site; return 0; }

static inline void dedup_set_call(dedup_regs *r, const int64_t *call, uint64_t gadget)
{
    int i;
    r->pc = gadget;
    r->regs[8] = (uint64_t)call[0];
    for (i = 0; i < 6; i++)
        r->regs[i] = (uint64_t)call[i + 1];
}

static inline void dedup_set_stack(dedup_regs *r, uint64_t sp) { r->sp = sp; }
static inline int dedup_interrupted(const dedup_regs *r) { (void)r; return DEDUP_WHOLE; }
static inline void dedup_restart_unless_handled(dedup_regs *r) { (void)r; }
static inline void dedup_rewind(dedup_regs *r) { (void)r; }
static inline uint64_t dedup_call_site(const dedup_regs *r) { return r->pc - 4; }

static inline size_t dedup_build_frame(uint8_t *out, uint64_t *at, int tid, const dedup_regs *r,
                                       uint64_t mask, uint64_t restorer)
{
    (void)out; (void)at; (void)tid; (void)r; (void)mask; (void)restorer;
    return 0;
}

/* What orig_rax = -1 is on x86-64: the thread is in no system call that could be restarted. */
static inline int dedup_forget_call(int tid)
{
    int none = -1;
    struct iovec iov = {&none, sizeof(none)};
    return (int)dedup_ptrace(PTRACE_SETREGSET, tid, NT_ARM_SYSTEM_CALL, (uintptr_t)&iov);
}

#else

#define DEDUP_ARCHITECTURE 0
typedef struct { uint64_t none; } dedup_regs;

static inline int dedup_is_native(const dedup_regs *r, size_t n) { (void)r; (void)n; return 0; }
static inline uint64_t dedup_ip(const dedup_regs *r) { (void)r; return 0; }
static inline uint64_t dedup_sp(const dedup_regs *r) { (void)r; return 0; }
static inline int64_t dedup_result(const dedup_regs *r) { (void)r; return 0; }
static inline uint64_t dedup_thread_pointer(const dedup_regs *r) { (void)r; return 0; }
static inline int dedup_is_gadget(const uint8_t *s, int t) { (void)s; (void)t; return 0; }
static inline int dedup_is_restorer(const uint8_t *s) { (void)s; return 0; }
static inline void dedup_set_call(dedup_regs *r, const int64_t *c, uint64_t g)
{
    (void)r; (void)c; (void)g;
}
static inline void dedup_set_stack(dedup_regs *r, uint64_t sp) { (void)r; (void)sp; }
static inline int dedup_interrupted(const dedup_regs *r) { (void)r; return DEDUP_WHOLE; }
static inline void dedup_restart_unless_handled(dedup_regs *r) { (void)r; }
static inline void dedup_rewind(dedup_regs *r) { (void)r; }
static inline uint64_t dedup_call_site(const dedup_regs *r) { (void)r; return 0; }
static inline size_t dedup_build_frame(uint8_t *out, uint64_t *at, int tid, const dedup_regs *r,
                                       uint64_t mask, uint64_t restorer)
{
    (void)out; (void)at; (void)tid; (void)r; (void)mask; (void)restorer;
    return 0;
}
static inline int dedup_forget_call(int tid) { (void)tid; return 0; }

#endif
#endif
