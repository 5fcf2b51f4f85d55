/* SPDX-License-Identifier: Apache-2.0 */
/*
 * forbidden.h: the last words of a process that made a system call it may not make.
 *
 * The filter of mcrelay/seccomp.py answers such a call with SIGSYS (SECCOMP_RET_TRAP). The handler here names the call
 * on standard error and ends the process. It is in C because a signal handler must not need the interpreter: the thread
 * may be the engine's, which has none, or be anywhere inside it.
 *
 * The handler is for the log, not for safety: the call has been refused when it runs. The kernel ends a process that
 * blocks or ignores SIGSYS by itself, and the filter ends one that touches what SIGSYS does.
 */
#ifndef MCRELAY_FORBIDDEN_H
#define MCRELAY_FORBIDDEN_H

#include <stddef.h>

struct system_call {
    long number;
    const char *name;
};

/* Those that the headers knew which this was built with. */
extern const struct system_call system_calls[];
extern const size_t system_calls_count;

/* Handle SIGSYS from now on. What stands before the words, who says them above all, and behind (of up to 128 and 16
 * bytes), is the log's format. 0 or negative errno. */
int forbidden_install(const char *before, const char *after);

#endif
