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
    int forbidden_install(const char *name)


NUMBERS = {system_calls[i].name.decode("ascii"): system_calls[i].number for i in range(system_calls_count)}


def install(str name):
    cdef bytes encoded = name.encode("ascii")
    cdef int result = forbidden_install(encoded)
    if result < 0:
        raise OSError(-result, os.strerror(-result))
