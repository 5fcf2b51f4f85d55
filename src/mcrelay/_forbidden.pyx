# SPDX-License-Identifier: Apache-2.0
# cython: language_level=3, freethreading_compatible=False
"""native/forbidden.h for Python: the numbers of system calls here, and who names the one that was forbidden."""

import os


cdef extern from "forbidden.h":
    struct system_call:
        long number
        const char *name
    const system_call system_calls[]
    size_t system_calls_count
    int forbidden_install(const char *before, const char *after)


NUMBERS = {system_calls[i].name.decode("ascii"): system_calls[i].number for i in range(system_calls_count)}


def install(str before, str after):
    """Name it on standard error, between these two of up to 128 and 16 bytes."""
    cdef bytes first = before.encode("ascii"), last = after.encode("ascii")
    cdef int result = forbidden_install(first, last)
    if result < 0:
        raise OSError(-result, os.strerror(-result))
