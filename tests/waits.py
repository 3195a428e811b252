"""Programs to put system calls into: blocked in every kind of wait, or checking themselves.

In C, as an interpreter would hide what a system call returned, and move registers about.
"""

from __future__ import annotations

import functools
import mmap
import os
import select
import subprocess
import tempfile
from pathlib import Path
from typing import IO, TYPE_CHECKING, Final, Self

if TYPE_CHECKING:
    from types import TracebackType

TIMED_MS: Final = 2500

WAITS_SOURCE: Final = r"""
#define _GNU_SOURCE
#include <errno.h>
#include <fcntl.h>
#include <linux/futex.h>
#include <netinet/in.h>
#include <poll.h>
#include <pthread.h>
#include <signal.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/epoll.h>
#include <sys/eventfd.h>
#include <sys/inotify.h>
#include <sys/ipc.h>
#include <sys/mman.h>
#include <sys/msg.h>
#include <sys/select.h>
#include <sys/sem.h>
#include <sys/socket.h>
#include <sys/syscall.h>
#include <sys/time.h>
#include <sys/timerfd.h>
#include <sys/wait.h>
#include <time.h>
#include <unistd.h>

static int pipe_ends[2], pair[2], listener, event, epoll, inotify, message_queue, semaphores, lock;
static struct sockaddr_in address;
static char folder[] = "/tmp/dedup-wait-XXXXXX";
static volatile int *word;              /* shared with the waker */
static pthread_mutex_t *mutex;
static pthread_cond_t *condition;
static volatile sig_atomic_t handled;
static pid_t waker;
static long ms;

static void on_signal(int n) { (void)n; handled++; }

static double now(void)
{
    struct timespec t;
    clock_gettime(CLOCK_MONOTONIC, &t);
    return t.tv_sec * 1e3 + t.tv_nsec / 1e6;
}

static void must(int ok, const char *what)
{
    if (!ok) { perror(what); exit(3); }
}

static void *busy_thread(void *unused)
{
    volatile unsigned long n = 0;
    struct timespec t = {0, 2000000};
    for (;;) {
        for (int i = 0; i < 20000; i++) n++;
        if (nanosleep(&t, NULL)) { printf("busy thread saw %s\n", strerror(errno)); exit(4); }
    }
    return unused;
}

static void set_up(const char *kind)
{
    socklen_t size = sizeof(address);
    pthread_mutexattr_t ma;
    pthread_condattr_t ca;
    struct sigaction sa;
    char name[64];
    must(!pipe(pipe_ends) && !socketpair(AF_UNIX, SOCK_STREAM, 0, pair), "pipe");
    listener = socket(AF_INET, SOCK_STREAM, 0);
    address.sin_family = AF_INET;
    address.sin_addr.s_addr = htonl(INADDR_LOOPBACK);
    must(!bind(listener, (void *)&address, sizeof(address)) && !listen(listener, 8) &&
         !getsockname(listener, (void *)&address, &size), "listen");
    event = eventfd(0, 0);
    epoll = epoll_create1(0);
    struct epoll_event e = {.events = EPOLLIN};
    must(!epoll_ctl(epoll, EPOLL_CTL_ADD, pipe_ends[0], &e), "epoll");
    must(mkdtemp(folder) != NULL, "mkdtemp");
    message_queue = msgget(IPC_PRIVATE, 0600);
    semaphores = semget(IPC_PRIVATE, 1, 0600);
    must(message_queue >= 0 && semaphores >= 0, "sysv");
    snprintf(name, sizeof(name), "%s/lock", folder);
    lock = open(name, O_RDWR | O_CREAT, 0600);
    if (!strcmp(kind, "inotify")) {  /* its release waits for all of the kernel's readers */
        inotify = inotify_init();
        must(inotify_add_watch(inotify, folder, IN_CREATE) >= 0, "inotify");
    }
    word = mmap(NULL, 4096, PROT_READ | PROT_WRITE, MAP_SHARED | MAP_ANONYMOUS, -1, 0);
    mutex = (void *)(word + 64);
    condition = (void *)(word + 128);
    pthread_mutexattr_init(&ma);
    pthread_mutexattr_setpshared(&ma, PTHREAD_PROCESS_SHARED);
    pthread_mutex_init(mutex, &ma);
    pthread_condattr_init(&ca);
    pthread_condattr_setpshared(&ca, PTHREAD_PROCESS_SHARED);
    pthread_cond_init(condition, &ca);
    memset(&sa, 0, sizeof(sa));
    sa.sa_handler = on_signal;
    sigaction(SIGUSR1, &sa, NULL);
}

static void clean_up(void)
{
    char name[64];
    msgctl(message_queue, IPC_RMID, NULL);
    semctl(semaphores, 0, IPC_RMID);
    snprintf(name, sizeof(name), "%s/lock", folder);
    unlink(name);
    snprintf(name, sizeof(name), "%s/new", folder);
    unlink(name);
    rmdir(folder);
}

/* The other process: waits for a line from the test, then does what ends the wait. */
static void wake(const char *kind, pid_t waiter)
{
    char c, name[64];
    struct flock whole = {.l_type = F_WRLCK};
    struct { long type; char text[1]; } message = {1, "x"};
    struct sembuf up = {0, 1, 0};
    char *room;
    if (!strcmp(kind, "fcntl_lock")) must(!fcntl(lock, F_SETLK, &whole), "lock");
    if (!strcmp(kind, "flock")) {
        snprintf(name, sizeof(name), "%s/lock", folder);
        lock = open(name, O_RDWR);
        must(!syscall(SYS_flock, lock, 2), "flock");
    }
    *word = 1;
    if (read(0, &c, 1) != 1) for (;;) pause();  /* what ends by itself is left alone */
    *word = 2;
    syscall(SYS_futex, word, FUTEX_WAKE, 100, NULL, NULL, 0);
    pthread_mutex_lock(mutex);
    word[1] = 1;
    pthread_cond_broadcast(condition);
    pthread_mutex_unlock(mutex);
    if (!strcmp(kind, "write")) {
        room = malloc(1 << 20);
        must(read(pipe_ends[0], room, 1 << 20) > 0, "drain");
    } else if (strstr(kind, "connect") || strstr(kind, "accept")) {
        must(!connect(socket(AF_INET, SOCK_STREAM, 0), (void *)&address, sizeof(address)),
             "connect");
    } else if (!strncmp(kind, "sig", 3) || !strcmp(kind, "pause") || strstr(kind, "signal")) {
        kill(waiter, SIGUSR1);
    } else if (!strncmp(kind, "msg", 3)) {
        must(!msgsnd(message_queue, &message, 1, 0), "msgsnd");
    } else if (!strncmp(kind, "sem", 3)) {
        must(!semop(semaphores, &up, 1), "semop");
    } else if (!strcmp(kind, "inotify")) {
        snprintf(name, sizeof(name), "%s/new", folder);
        close(open(name, O_RDWR | O_CREAT, 0600));
    } else if (!strcmp(kind, "eventfd")) {
        must(eventfd_write(event, 1) == 0, "eventfd");
    } else if (strstr(kind, "recv")) {
        must(write(pair[1], "x", 1) == 1, "send");
    } else if (strcmp(kind, "short_waits")) {
        must(write(pipe_ends[1], "x", 1) == 1, "write");
    }
    exit(0);  /* which ends fcntl_lock, flock and waitpid */
}

#define IS(name) (!strcmp(kind, name))
#define TIMED(deadline_kept) (timed = 1, kept = (deadline_kept))

int main(int argc, char **argv)
{
    const char *kind = argv[1];
    int threads = atoi(argv[2]), timed = 0, kept = 0, expected = -2, status;
    long rc = -3, expected_errno = 0;
    struct timespec t, left = {0, 0};
    struct timeval tv;
    struct pollfd pf;
    struct epoll_event events[4];
    struct itimerspec alarm_at;
    struct { long type; char text[1]; } message;
    struct sembuf down = {0, -1, 0};
    struct flock whole = {.l_type = F_WRLCK};
    fd_set set;
    sigset_t one, none;
    siginfo_t info;
    unsigned long long ticks;
    char *room = malloc(1 << 20);
    char c[4096];
    pthread_t thread;
    pid_t me = getpid();
    double begin, took;

    if (argc != 4) return 2;
    ms = atol(argv[3]);
    setvbuf(stdout, NULL, _IOLBF, 0);
    set_up(kind);
    sigemptyset(&none);
    sigemptyset(&one);
    sigaddset(&one, SIGUSR1);
    if (strstr(kind, "sigwait") || strstr(kind, "sigtimedwait") || IS("sigsuspend") ||
        IS("epoll_pwait_signal") || threads > 1)
        sigprocmask(SIG_BLOCK, &one, NULL);
    waker = fork();
    if (!waker) wake(kind, me);
    while (!*word) usleep(100);
    for (int i = 1; i < threads; i++) pthread_create(&thread, NULL, busy_thread, NULL);
    if (threads > 1 && (IS("pause") || IS("epoll_wait_signal")))
        sigprocmask(SIG_UNBLOCK, &one, NULL);
    t.tv_sec = ms / 1000;
    t.tv_nsec = ms % 1000 * 1000000;
    tv.tv_sec = ms / 1000;
    tv.tv_usec = ms % 1000 * 1000;
    pf.fd = pipe_ends[0];
    pf.events = POLLIN;
    FD_ZERO(&set);
    FD_SET(pipe_ends[0], &set);
    if (IS("write")) {
        fcntl(pipe_ends[1], F_SETPIPE_SZ, 4096);
        must(write(pipe_ends[1], room, 4096) == 4096, "fill");
    }
    if (IS("recv_timeout") || IS("recvmsg_timeout")) {
        struct timeval long_time = {600, 0};
        setsockopt(pair[0], SOL_SOCKET, SO_RCVTIMEO, &long_time, sizeof(long_time));
    }
    if (IS("accept_timeout")) {
        struct timeval long_time = {600, 0};
        setsockopt(listener, SOL_SOCKET, SO_RCVTIMEO, &long_time, sizeof(long_time));
    }
    printf("ready\n");
    begin = now();
    errno = 0;
    /* Those that end by themselves. */
    if (IS("nanosleep")) { TIMED(1); rc = syscall(SYS_nanosleep, &t, &left); expected = 0; }
    else if (IS("clock_nanosleep")) {
        struct timespec until;
        clock_gettime(CLOCK_MONOTONIC, &until);
        until.tv_sec += t.tv_sec; until.tv_nsec += t.tv_nsec;
        if (until.tv_nsec >= 1000000000) { until.tv_sec++; until.tv_nsec -= 1000000000; }
        TIMED(1);
        rc = syscall(SYS_clock_nanosleep, CLOCK_MONOTONIC, TIMER_ABSTIME, &until, NULL);
        expected = 0;
    }
    else if (IS("poll")) { TIMED(1); rc = syscall(SYS_poll, &pf, 1, ms); expected = 0; }
    else if (IS("ppoll")) { TIMED(1); rc = syscall(SYS_ppoll, &pf, 1, &t, &one, 8); expected = 0; }
    else if (IS("select")) {
        TIMED(1);
        rc = syscall(SYS_select, pipe_ends[0] + 1, &set, NULL, NULL, &tv);
        expected = 0;
    }
    else if (IS("pselect")) {
        struct { void *p; size_t n; } mask = {&one, 8};
        TIMED(1);
        rc = syscall(SYS_pselect6, pipe_ends[0] + 1, &set, NULL, NULL, &t, &mask);
        expected = 0;
    }
    else if (IS("futex_timed")) {
        TIMED(1);
        rc = syscall(SYS_futex, word + 9, FUTEX_WAIT, 0, &t, NULL, 0);
        expected = -1;
        expected_errno = ETIMEDOUT;
    }
    else if (IS("timerfd")) {
        int fd = timerfd_create(CLOCK_MONOTONIC, 0);
        memset(&alarm_at, 0, sizeof(alarm_at));
        alarm_at.it_value = t;
        timerfd_settime(fd, 0, &alarm_at, NULL);
        TIMED(1); rc = read(fd, &ticks, 8); expected = 8;
    }
    else if (IS("epoll_wait_timed")) {
        TIMED(0);
        rc = syscall(SYS_epoll_wait, epoll, events, 4, ms);
        expected = 0;
    }
    else if (IS("sigtimedwait_timed")) {
        TIMED(0);
        rc = syscall(SYS_rt_sigtimedwait, &one, &info, &t, 8);
        expected = -1;
        expected_errno = EAGAIN;
    }
    else if (IS("semtimedop_timed")) {
        TIMED(0);
        rc = syscall(SYS_semtimedop, semaphores, &down, 1, &t);
        expected = -1;
        expected_errno = EAGAIN;
    }
    /* Those that the waker ends. */
    else if (IS("read")) { rc = read(pipe_ends[0], c, 1); expected = 1; }
    else if (IS("write")) { rc = write(pipe_ends[1], room, 16); expected = 16; }
    else if (IS("recv")) { rc = recv(pair[0], c, 1, 0); expected = 1; }
    else if (IS("recv_timeout")) { rc = recv(pair[0], c, 1, 0); expected = 1; }
    else if (IS("recvmsg_timeout")) {
        struct iovec iov = {c, 1};
        struct msghdr h = {.msg_iov = &iov, .msg_iovlen = 1};
        rc = recvmsg(pair[0], &h, 0); expected = 1;
    }
    else if (IS("accept") || IS("accept_timeout")) {
        rc = accept(listener, NULL, NULL) >= 0;
        expected = 1;
    }
    else if (IS("futex")) {
        rc = syscall(SYS_futex, word, FUTEX_WAIT, 1, NULL, NULL, 0);
        expected = 0;
    }
    else if (IS("condvar")) {
        pthread_mutex_lock(mutex);
        while (!word[1]) rc = pthread_cond_wait(condition, mutex);
        pthread_mutex_unlock(mutex);
        expected = 0;
    }
    else if (IS("waitpid")) {
        rc = syscall(SYS_wait4, waker, &status, 0, NULL) == waker;
        expected = 1;
    }
    else if (IS("waitid")) {
        rc = syscall(SYS_waitid, P_PID, waker, &info, WEXITED, NULL);
        expected = 0;
    }
    else if (IS("pause")) { rc = syscall(SYS_pause); expected = -1; expected_errno = EINTR; }
    else if (IS("sigsuspend")) {
        rc = syscall(SYS_rt_sigsuspend, &none, 8);
        expected = -1;
        expected_errno = EINTR;
    }
    else if (IS("sigwait")) {
        rc = syscall(SYS_rt_sigtimedwait, &one, &info, NULL, 8);
        expected = SIGUSR1;
    }
    else if (IS("sigtimedwait")) {
        t.tv_sec = 600;
        rc = syscall(SYS_rt_sigtimedwait, &one, &info, &t, 8);
        expected = SIGUSR1;
    }
    else if (IS("inotify")) { rc = read(inotify, c, sizeof(c)) > 0; expected = 1; }
    else if (IS("eventfd")) { rc = read(event, &ticks, 8); expected = 8; }
    else if (IS("epoll_wait")) { rc = syscall(SYS_epoll_wait, epoll, events, 4, -1); expected = 1; }
    else if (IS("epoll_pwait")) {
        rc = syscall(SYS_epoll_pwait, epoll, events, 4, -1, &one, 8);
        expected = 1;
    }
    else if (IS("epoll_pwait2")) {
        rc = syscall(441, epoll, events, 4, NULL, &one, 8);
        expected = 1;
    }
    else if (IS("epoll_wait_signal")) {
        rc = syscall(SYS_epoll_wait, epoll, events, 4, -1);
        expected = -1;
        expected_errno = EINTR;
    }
    else if (IS("epoll_pwait_signal")) {
        rc = syscall(SYS_epoll_pwait, epoll, events, 4, -1, &none, 8);
        expected = -1;
        expected_errno = EINTR;
    }
    else if (IS("msgrcv")) { rc = msgrcv(message_queue, &message, 1, 0, 0); expected = 1; }
    else if (IS("semop")) { rc = semop(semaphores, &down, 1); expected = 0; }
    else if (IS("semtimedop")) {
        t.tv_sec = 600;
        rc = semtimedop(semaphores, &down, 1, &t);
        expected = 0;
    }
    else if (IS("fcntl_lock")) { rc = fcntl(lock, F_SETLKW, &whole); expected = 0; }
    else if (IS("flock")) { rc = syscall(SYS_flock, lock, 2); expected = 0; }
    /* Those that don't block for long. */
    else if (IS("busy")) { unsigned long n = 0; while (*word == 1) n++; rc = n > 0; expected = 1; }
    else if (IS("short_waits")) {
        struct timespec one_ms = {0, 1000000};
        expected = 0; rc = 0;
        while (*word == 1 && !rc) {
            double at = now();
            if (syscall(SYS_nanosleep, &one_ms, NULL)) { rc = 1; break; }
            if (now() - at < 1) { rc = 2; break; }
            if (syscall(SYS_epoll_wait, epoll, events, 4, 1) != 0) { rc = 3; break; }
            if (syscall(SYS_rt_sigtimedwait, &one, &info, &one_ms, 8) != -1 || errno != EAGAIN) {
                rc = 4;
                break;
            }
            if (syscall(SYS_poll, &pf, 1, 1) != 0) { rc = 5; break; }
            errno = 0;
            if (syscall(SYS_futex, word + 9, FUTEX_WAIT, 0, &one_ms, NULL, 0) != -1 ||
                errno != ETIMEDOUT) {
                rc = 6;
                break;
            }
            errno = 0;
            if (syscall(SYS_getpid) != me) { rc = 7; break; }
        }
    }
    else { fprintf(stderr, "no such wait: %s\n", kind); return 2; }
    took = now() - begin;
    status = errno;
    if (rc != expected || (expected == -1 && status != expected_errno) ||
        ((expected_errno == EINTR) != (handled == 1)) || (timed && took < ms) ||
        (timed && kept && took > ms + 1500))
        printf("%s saw rc=%ld errno=%s took=%.1f ms, handler ran %d times\n", kind,
               rc, strerror(status), took, (int)handled);
    else
        printf("ok\n");
    clean_up();
    if (!timed) { int s; waitpid(waker, &s, 0); }
    kill(waker, SIGKILL);
    return 0;
}
"""

TIMED: Final = (
    "nanosleep", "clock_nanosleep", "poll", "ppoll", "select", "pselect", "futex_timed", "timerfd",
    "epoll_wait_timed", "sigtimedwait_timed", "semtimedop_timed",
)  # fmt: skip
WOKEN: Final = (
    "read", "write", "recv", "recv_timeout", "recvmsg_timeout", "accept", "accept_timeout",
    "futex", "condvar", "waitpid", "waitid", "pause", "sigsuspend", "sigwait", "sigtimedwait",
    "inotify", "eventfd", "epoll_wait", "epoll_pwait", "epoll_pwait2", "epoll_wait_signal",
    "epoll_pwait_signal", "msgrcv", "semop", "semtimedop", "fcntl_lock", "flock",
)  # fmt: skip
RUNNING: Final = ("busy", "short_waits")
KINDS: Final = TIMED + WOKEN + RUNNING

# It fills general registers, the red zone, MXCSR, x87 and vector registers, spins, and looks
# whether they are what they were. Whoever watches sees its count grow in a file that both map.
CHECKER_SOURCE: Final = r"""
#define _GNU_SOURCE
#include <fcntl.h>
#include <pthread.h>
#include <signal.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/epoll.h>
#include <sys/mman.h>
#include <sys/syscall.h>
#include <time.h>
#include <unistd.h>

static volatile uint64_t *board;  /* 0: rounds, 1: what was wrong */

/* 0, or the number of what has changed. */
static int round_of_registers(uint64_t seed, int wide)
{
    uint64_t in[8][4], out[8][4];
    uint64_t wrong;
    for (int i = 0; i < 8; i++)
        for (int j = 0; j < 4; j++) in[i][j] = seed * 0x9e3779b97f4a7c15u + i * 4 + j;
    memset(out, 0, sizeof(out));
    if (wide)
        __asm__ volatile(
            "vmovdqu 0(%0),%%ymm8\n vmovdqu 32(%0),%%ymm9\n vmovdqu 64(%0),%%ymm10\n"
            "vmovdqu 96(%0),%%ymm11\n vmovdqu 128(%0),%%ymm12\n vmovdqu 160(%0),%%ymm13\n"
            "vmovdqu 192(%0),%%ymm14\n vmovdqu 224(%0),%%ymm15\n"
            :: "r"(in) : "xmm8", "xmm9", "xmm10", "xmm11", "xmm12", "xmm13", "xmm14", "xmm15");
    else
        __asm__ volatile(
            "movdqu 0(%0),%%xmm8\n movdqu 32(%0),%%xmm9\n movdqu 64(%0),%%xmm10\n"
            "movdqu 96(%0),%%xmm11\n movdqu 128(%0),%%xmm12\n movdqu 160(%0),%%xmm13\n"
            "movdqu 192(%0),%%xmm14\n movdqu 224(%0),%%xmm15\n"
            :: "r"(in) : "xmm8", "xmm9", "xmm10", "xmm11", "xmm12", "xmm13", "xmm14", "xmm15");
    __asm__ volatile(
        "push %%rbp\n push %%rbx\n"
        "fldpi\n"
        "mov %1,%%rax\n"
        "lea 1(%%rax),%%rbx\n lea 2(%%rax),%%rdx\n lea 3(%%rax),%%rsi\n lea 4(%%rax),%%rdi\n"
        "lea 5(%%rax),%%rbp\n lea 6(%%rax),%%r8\n lea 7(%%rax),%%r9\n lea 8(%%rax),%%r10\n"
        "lea 9(%%rax),%%r11\n lea 10(%%rax),%%r12\n lea 11(%%rax),%%r13\n lea 12(%%rax),%%r14\n"
        "mov %%rsp,%%r15\n"
        "mov %%rax,-8(%%rsp)\n mov %%rbx,-64(%%rsp)\n mov %%rdx,-128(%%rsp)\n"
        "std\n stc\n"
        "mov $20000,%%ecx\n"
        "1: dec %%ecx\n jnz 1b\n"
        "jnc 9f\n"
        "cmp %%rsp,%%r15\n jne 9f\n"
        "cmp %%rax,-8(%%rsp)\n jne 9f\n cmp %%rbx,-64(%%rsp)\n jne 9f\n"
        "cmp %%rdx,-128(%%rsp)\n jne 9f\n"
        "pushf\n popq %%rcx\n cld\n test $0x400,%%ecx\n jz 9f\n"
        "lea 1(%%rax),%%rcx\n cmp %%rcx,%%rbx\n jne 9f\n inc %%rcx\n cmp %%rcx,%%rdx\n jne 9f\n"
        "inc %%rcx\n cmp %%rcx,%%rsi\n jne 9f\n inc %%rcx\n cmp %%rcx,%%rdi\n jne 9f\n"
        "inc %%rcx\n cmp %%rcx,%%rbp\n jne 9f\n inc %%rcx\n cmp %%rcx,%%r8\n jne 9f\n"
        "inc %%rcx\n cmp %%rcx,%%r9\n jne 9f\n inc %%rcx\n cmp %%rcx,%%r10\n jne 9f\n"
        "inc %%rcx\n cmp %%rcx,%%r11\n jne 9f\n inc %%rcx\n cmp %%rcx,%%r12\n jne 9f\n"
        "inc %%rcx\n cmp %%rcx,%%r13\n jne 9f\n inc %%rcx\n cmp %%rcx,%%r14\n jne 9f\n"
        "fldpi\n fcomip %%st(1),%%st\n fstp %%st(0)\n jne 9f\n"
        "xor %%ecx,%%ecx\n jmp 8f\n"
        "9: cld\n mov $1,%%ecx\n"
        "8: pop %%rbx\n pop %%rbp\n"
        : "=&c"(wrong) : "m"(seed)
        : "rax", "rdx", "rsi", "rdi", "r8", "r9", "r10", "r11", "r12", "r13", "r14", "r15", "cc",
          "memory");
    if (wrong) return 1;
    if (wide)
        __asm__ volatile(
            "vmovdqu %%ymm8,0(%0)\n vmovdqu %%ymm9,32(%0)\n vmovdqu %%ymm10,64(%0)\n"
            "vmovdqu %%ymm11,96(%0)\n vmovdqu %%ymm12,128(%0)\n vmovdqu %%ymm13,160(%0)\n"
            "vmovdqu %%ymm14,192(%0)\n vmovdqu %%ymm15,224(%0)\n vzeroupper\n"
            :: "r"(out) : "memory");
    else
        __asm__ volatile(
            "movdqu %%xmm8,0(%0)\n movdqu %%xmm9,32(%0)\n movdqu %%xmm10,64(%0)\n"
            "movdqu %%xmm11,96(%0)\n movdqu %%xmm12,128(%0)\n movdqu %%xmm13,160(%0)\n"
            "movdqu %%xmm14,192(%0)\n movdqu %%xmm15,224(%0)\n" :: "r"(out) : "memory");
    for (int i = 0; i < 8; i++)
        if (memcmp(in[i], out[i], wide ? 32 : 16)) return 2;
    return 0;
}

static int mxcsr(void)
{
    unsigned v;
    __asm__ volatile("stmxcsr %0" : "=m"(v));
    return v;
}

static int checks(uint64_t i, int wide, int epoll)
{
    struct timespec t = {0, 50000};
    struct epoll_event e;
    sigset_t mask, wanted;
    stack_t old;
    int wrong = round_of_registers(i, wide);
    if (wrong) return wrong;
    if (mxcsr() != 0x1f80 - 0x80 + 0x2000) return 3;      /* as set in main: other than at start */
    if (epoll >= 0) {
        if (syscall(SYS_nanosleep, &t, NULL)) return 4;
        if (syscall(SYS_epoll_wait, epoll, &e, 1, 0)) return 5;
        sigemptyset(&wanted);
        sigaddset(&wanted, SIGUSR2);
        if (sigprocmask(SIG_BLOCK, NULL, &mask) || memcmp(&mask, &wanted, 8)) return 6;
        if (sigaltstack(NULL, &old) || old.ss_size != 65536 || old.ss_flags) return 7;
    }
    return 0;
}

int main(int argc, char **argv)
{
    int fd = open(argv[1], O_RDWR), wide = __builtin_cpu_supports("avx");
    int epoll = argc > 2 ? epoll_create1(0) : -1;
    unsigned v = 0x1f80 - 0x80 + 0x2000;                   /* invalid operations trap; round down */
    sigset_t mask;
    stack_t alternative = {.ss_sp = malloc(65536), .ss_size = 65536};
    board = mmap(NULL, 4096, PROT_READ | PROT_WRITE, MAP_SHARED, fd, 0);
    sigemptyset(&mask);
    sigaddset(&mask, SIGUSR2);
    sigprocmask(SIG_SETMASK, &mask, NULL);
    sigaltstack(&alternative, NULL);
    __asm__ volatile("ldmxcsr %0" :: "m"(v));
    for (uint64_t i = 1; !board[1]; i++) {
        board[1] = checks(i, wide, epoll);
        board[0] = i;
    }
    return 1;
}
"""


@functools.cache
def build(source: str, *options: str) -> Path:
    """A program from C source, in a temporary folder of this session."""
    folder = Path(tempfile.mkdtemp(prefix="dedup-programs-"))
    text, program = folder / "program.c", folder / "program"
    text.write_text(source)
    subprocess.run(
        ["cc", "-O1", "-w", "-pthread", *options, "-o", program, text], check=True, timeout=60
    )
    return program


class Wait:
    """A program in one kind of wait; `finish` ends the wait and gives what it saw."""

    def __init__(self, kind: str, threads: int = 1, timed_ms: int = TIMED_MS) -> None:
        self.kind, self.threads = kind, threads
        self.process = subprocess.Popen(
            [build(WAITS_SOURCE), kind, str(threads), str(timed_ms)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )
        assert self.process.stdin is not None
        assert self.process.stdout is not None
        self._in: IO[str] = self.process.stdin
        self._out: IO[str] = self.process.stdout
        self.pid = self.process.pid
        assert self._out.readline() == "ready\n"

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, e: BaseException | None, tb: TracebackType | None
    ) -> None:
        self.process.kill()
        self.process.wait()
        self._in.close()
        self._out.close()

    def finish(self) -> str:
        """What the program saw: `ok`, or what was wrong."""
        if self.kind not in TIMED:
            self._in.write("\n")
            self._in.flush()
        # What it says, not its end: the kernel may take a minute over that (inotify's release).
        if not select.select([self._out], [], [], 60)[0]:
            return "never came back from its wait"
        return self._out.readline().strip() or f"died, status {self.process.wait()}"


class Checker:
    """A program that looks at its own registers, FPU, stack, signal mask and system calls.

    Parameters
    ----------
    calls : bool
        Make system calls between; else it only computes.
    options : str
        Of the compiler.
    """

    def __init__(self, *options: str, calls: bool = True) -> None:
        fd, name = tempfile.mkstemp(prefix="dedup-checker-")
        os.ftruncate(fd, mmap.PAGESIZE)
        self._board = mmap.mmap(fd, mmap.PAGESIZE)
        os.close(fd)
        self.process = subprocess.Popen(
            [build(CHECKER_SOURCE, *options), name, *(["calls"] if calls else [])]
        )
        self.pid = self.process.pid
        while not self.rounds:
            assert self.process.poll() is None
        os.unlink(name)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, e: BaseException | None, tb: TracebackType | None
    ) -> None:
        self.process.kill()
        self.process.wait()
        self._board.close()

    def _word(self, number: int) -> int:
        return int.from_bytes(self._board[8 * number : 8 * number + 8], "little")

    @property
    def rounds(self) -> int:
        """How often it has looked."""
        return self._word(0)

    @property
    def wrong(self) -> int:
        """What had changed, 0 where nothing has."""
        return self._word(1)
