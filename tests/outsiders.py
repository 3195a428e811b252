"""Programs that a system call had better not be put into, and one that kills whoever puts it."""

from __future__ import annotations

import subprocess
import tempfile
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Final

from tests.waits import build

if TYPE_CHECKING:
    from collections.abc import Iterator

SECCOMP_SOURCE: Final = r"""
#include <errno.h>
#include <linux/filter.h>
#include <linux/seccomp.h>
#include <stddef.h>
#include <stdio.h>
#include <string.h>
#include <sys/prctl.h>
#include <sys/syscall.h>
#include <unistd.h>

int main(int argc, char **argv)
{
    unsigned action = strcmp(argv[1], "kill") ? SECCOMP_RET_ERRNO | EPERM
                                              : SECCOMP_RET_KILL_PROCESS;
    struct sock_filter filter[] = {
        BPF_STMT(BPF_LD | BPF_W | BPF_ABS, offsetof(struct seccomp_data, nr)),
        BPF_JUMP(BPF_JMP | BPF_JEQ | BPF_K, SYS_prctl, 0, 1),
        BPF_STMT(BPF_RET | BPF_K, action),
        BPF_STMT(BPF_RET | BPF_K, SECCOMP_RET_ALLOW),
    };
    struct sock_fprog program = {4, filter};
    char c;
    prctl(PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0);
    if (!strcmp(argv[1], "strict") ? prctl(PR_SET_SECCOMP, SECCOMP_MODE_STRICT, 0, 0, 0)
                                   : prctl(PR_SET_SECCOMP, SECCOMP_MODE_FILTER, &program, 0, 0))
        return 3;
    if (write(1, "ready\n", 6) != 6 || read(0, &c, 1) != 1 || write(1, "ok\n", 3) != 3) return 4;
    syscall(SYS_exit, 0);
}
"""

VFORK_SOURCE: Final = r"""
#include <stdio.h>
#include <unistd.h>

int main(void)
{
    char c;
    if (!vfork()) {
        if (write(1, "ready\n", 6) != 6 || read(0, &c, 1) != 1) _exit(1);
        _exit(0);
    }
    return write(1, "ok\n", 3) != 3;
}
"""

# A coroutine on a small stack amid data that must not change.
COROUTINE_SOURCE: Final = r"""
#include <poll.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <ucontext.h>
#include <unistd.h>

static char *room;
static ucontext_t home, away;

static volatile int spins;

static void wait_for_a_line(void)
{
    char c;
    struct pollfd line = {.events = POLLIN};
    if (write(1, "ready\n", 6) != 6) _exit(1);
    while (spins && !poll(&line, 1, 0))
        for (volatile int i = 0; i < 1000000; i++);
    if (read(0, &c, 1) != 1) _exit(1);
}

int main(int argc, char **argv)
{
    spins = argc > 1;
    room = malloc(1 << 20);
    memset(room, 0x5a, 1 << 20);
    getcontext(&away);
    away.uc_stack.ss_sp = room + (1 << 19);
    away.uc_stack.ss_size = 4096;
    away.uc_link = &home;
    makecontext(&away, wait_for_a_line, 0);
    swapcontext(&home, &away);
    for (int i = 0; i < 1 << 20; i++)
        if ((i < 1 << 19 || i >= (1 << 19) + 4096) && room[i] != 0x5a) return 1;
    puts("ok");
    return 0;
}
"""

# An exec again and again, by a thread that is not the first.
EXEC_SOURCE: Final = r"""
#include <pthread.h>
#include <stdio.h>
#include <stdlib.h>
#include <unistd.h>

static char **arguments, number[16];

static void *again(void *unused)
{
    usleep(1000);
    execv("/proc/self/exe", arguments);
    return unused;
}

int main(int argc, char **argv)
{
    pthread_t thread;
    arguments = (char *[]){argv[0], number, NULL};
    snprintf(number, sizeof(number), "%d", atoi(argv[1]) - 1);
    if (!atoi(argv[1])) { puts("ok"); return 0; }
    if (argv[0][0]) { puts("ready"); fflush(stdout); }
    arguments[0] = "";
    pthread_create(&thread, NULL, again, NULL);
    for (;;) pause();
}
"""

# Every signal counts once: the sender waits until it has been handled.
SIGNALS_SOURCE: Final = r"""
#include <errno.h>
#include <poll.h>
#include <signal.h>
#include <stdio.h>
#include <stdlib.h>
#include <sys/epoll.h>
#include <sys/wait.h>
#include <unistd.h>

static volatile sig_atomic_t handled;
static void on_signal(int n) { (void)n; handled++; }

int main(int argc, char **argv)
{
    int n = atoi(argv[1]), tell[2], epoll = epoll_create1(0), interruptions = 0;
    struct sigaction sa = {.sa_handler = on_signal};
    struct epoll_event e;
    pid_t me = getpid();
    char c;
    sigaction(SIGUSR1, &sa, NULL);
    if (pipe(tell)) return 2;
    puts("ready");
    fflush(stdout);
    if (!fork()) {
        for (int i = 0; i < n; i++) {
            usleep(500);
            kill(me, SIGUSR1);
            if (read(tell[0], &c, 1) != 1) return 2;
        }
        return 0;
    }
    for (int seen = 0; seen < n;) {
        /* EINTR without a signal is what must not be; a signal before the wait is not lost. */
        if (epoll_wait(epoll, &e, 1, 2) < 0) {
            if (errno != EINTR || handled == seen) { printf("EINTR without a signal\n"); return 1; }
            interruptions++;
        }
        while (seen < handled) { seen++; if (write(tell[1], "x", 1) != 1) return 2; }
    }
    wait(NULL);
    printf(handled == n ? "ok\n" : "%d signals\n", handled);
    return 0;
}
"""

FOREIGN_SOURCE: Final = """
.globl _start
_start: mov $4, %eax
        mov $1, %ebx
        mov $text, %ecx
        mov $6, %edx
        int $0x80
        mov $3, %eax
        xor %ebx, %ebx
        mov $room, %ecx
        mov $1, %edx
        int $0x80
        mov $1, %eax
        xor %ebx, %ebx
        int $0x80
.data
text:   .ascii "ready\\n"
room:   .byte 0
"""

# Follows a stopped process, its threads too, and kills it at its Nth stop at the entry or end of
# ptrace(2) or pwrite64(2). Says which that was: how many such stops after the last PTRACE_SEIZE,
# the call, the request, whether its entry or end; or `end` where there are fewer.
KILLER_SOURCE: Final = r"""
#define _GNU_SOURCE
#include <errno.h>
#include <signal.h>
#include <stdio.h>
#include <stdlib.h>
#include <sys/ptrace.h>
#include <sys/syscall.h>
#include <sys/user.h>
#include <sys/wait.h>
#include <unistd.h>

int main(int argc, char **argv)
{
    pid_t pid = atoi(argv[1]), tid;
    int at = atoi(argv[2]), n = 0, seized = 0, status, sig, within[1 << 16] = {0}, killed = 0;
    struct user_regs_struct r;
    if (ptrace(PTRACE_SEIZE, pid, 0, PTRACE_O_TRACESYSGOOD | PTRACE_O_TRACECLONE)) return 2;
    kill(pid, SIGCONT);
    while ((tid = waitpid(-1, &status, __WALL)) > 0) {
        if (!WIFSTOPPED(status)) {
            if (tid == pid) break;
            continue;
        }
        sig = WSTOPSIG(status);
        if (sig == (SIGTRAP | 0x80)) {
            int end = within[tid & 0xffff] = !within[tid & 0xffff];
            ptrace(PTRACE_GETREGS, tid, 0, &r);
            if (r.orig_rax == SYS_ptrace || r.orig_rax == SYS_pwrite64) {
                n++;
                if (r.orig_rax == SYS_ptrace && r.rdi == PTRACE_SEIZE && end) seized = n;
                if (n == at) {
                    kill(pid, SIGKILL);
                    printf("%d %s %lld %s\n", n - seized,
                           r.orig_rax == SYS_ptrace ? "ptrace" : "pwrite64",
                           r.orig_rax == SYS_ptrace ? (long long)r.rdi : 0, end ? "entry" : "end");
                    killed = 1;
                }
            }
            sig = 0;
        } else if (status >> 16) {
            sig = 0;
        }
        ptrace(PTRACE_SYSCALL, tid, 0, sig);
    }
    if (!killed) puts("end");
    return 0;
}
"""


@contextmanager
def running(source: str, *arguments: str) -> Iterator[subprocess.Popen[str]]:
    """A program that has said `ready`; a line lets it go on, to say `ok`."""
    with started([str(build(source)), *arguments]) as process:
        yield process


@contextmanager
def started(command: list[str]) -> Iterator[subprocess.Popen[str]]:
    """As `running`, for a program that is there."""
    with subprocess.Popen(
        command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, bufsize=1
    ) as process:
        assert process.stdout is not None
        try:
            assert process.stdout.readline() == "ready\n"
            yield process
        finally:
            process.kill()


def build_foreign() -> Path:
    """A 32-bit program, without any library."""
    folder = Path(tempfile.mkdtemp(prefix="dedup-programs-"))
    (folder / "program.s").write_text(FOREIGN_SOURCE)
    for command in (
        ["as", "--32", "-o", "program.o", "program.s"],
        ["ld", "-m", "elf_i386", "-o", "program", "program.o"],
    ):
        subprocess.run(command, cwd=folder, check=True, timeout=60)
    return folder / "program"
