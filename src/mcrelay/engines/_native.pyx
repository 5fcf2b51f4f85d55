# SPDX-License-Identifier: Apache-2.0
# cython: language_level=3, freethreading_compatible=False
"""The C engine of native/engine.h as a Python class: a thin skin that turns negative errno into exceptions."""

from libc.errno cimport EBUSY
from libc.stdint cimport int64_t, uint8_t, uint32_t, uint64_t

import os


cdef extern from "counters.h":
    struct counters_page:
        pass
    size_t sizeof_counters_page "sizeof(struct counters_page)"
    uint64_t COUNTERS_MAGIC
    enum:
        COUNTERS_VERSION
        DROP_REASONS


cdef extern from "ways.h":
    enum:
        WAY_UDP4
        WAY_UDP6
        WAY_LOOP4
        WAY_LOOP6
        WAY_FRAME
        WAY_RAW4
        WAY_RAW6
        WAYS
    size_t sizeof_egress_link "sizeof(struct egress_link)"


cdef extern from "table.h":
    enum:
        OUTPUT_KEEP_TTL
        OUTPUT_KEEP_DSCP
        OUTPUT_KEEP_SOURCE
        OUTPUT_KEEP_SOURCE_PORT
        OUTPUT_PAUSED
        OUTPUT_SPLIT_HORIZON
        RATE_NONE
        RATE_PACKETS
        RATE_BITS
    size_t sizeof_rule_record "sizeof(struct table_rule_record)"
    size_t sizeof_output_record "sizeof(struct table_output_record)"
    struct table:
        pass
    int table_build(table **out, const uint8_t *records, size_t length)
    void table_free(table *table)
    uint32_t table_rules(const table *table)


cdef extern from "tap.h":
    size_t sizeof_tap_record "sizeof(struct tap_record)"
    enum:
        TAP_DROPS_MAX
        TAP_BYTES_MAX
        TAPS_MAX


cdef extern from "engine.h":
    struct engine:
        pass
    struct engine_answer:
        uint64_t ticket
        int result
    struct engine_pace:
        uint32_t latency_budget_us
        bint busy_poll
    int engine_open(engine **out, counters_page *counters, int command_fd, int answer_fd, engine_pace pace)
    int engine_run(engine *engine) nogil
    void engine_close(engine *engine)
    int64_t engine_attach_receive(engine *engine, unsigned interface, int fd, bint loopback, uint32_t mtu,
                                  uint32_t slots)
    int64_t engine_attach_ring(engine *engine, unsigned interface, int fd, bint loopback, uint32_t block_size,
                               uint32_t blocks, uint32_t frame_size)
    int64_t engine_attach_datagrams(engine *engine, unsigned interface, bint loopback, uint32_t slots)
    int64_t engine_add_socket(engine *engine, unsigned interface, int fd, uint32_t number)
    int64_t engine_remove_socket(engine *engine, unsigned interface, uint32_t number)
    int64_t engine_detach_ingress(engine *engine, unsigned interface)
    int64_t engine_attach_egress(engine *engine, unsigned interface, unsigned way, int fd, uint32_t mtu,
                                 const uint8_t *link, size_t length)
    int64_t engine_detach_egress(engine *engine, unsigned interface, unsigned way)
    int64_t engine_set_rules(engine *engine, const uint8_t *records, size_t length)
    int64_t engine_set_own_addresses(engine *engine, const uint8_t *packed, size_t length)
    int64_t engine_open_tap(engine *engine, uint32_t rule, int fd, uint64_t count, uint32_t snap)
    int64_t engine_close_tap(engine *engine, int fd)
    int64_t engine_probe(engine *engine)
    int64_t engine_stop(engine *engine)
    int engine_answer_take "engine_answer"(engine *engine, engine_answer *answer)


PAGE_SIZE = sizeof_counters_page
PAGE_MAGIC = COUNTERS_MAGIC
PAGE_VERSION = COUNTERS_VERSION
DROP_REASON_COUNT = DROP_REASONS
TAP_RECORD_SIZE = sizeof_tap_record
TAP_DROPS = TAP_DROPS_MAX
TAP_BYTES = TAP_BYTES_MAX
TAPS = TAPS_MAX
# What Python states as well, by the names that it has there.
WAY_NUMBERS = {
    "UDP4": WAY_UDP4,
    "UDP6": WAY_UDP6,
    "LOOP4": WAY_LOOP4,
    "LOOP6": WAY_LOOP6,
    "FRAME": WAY_FRAME,
    "RAW4": WAY_RAW4,
    "RAW6": WAY_RAW6,
}
LEG_FLAGS = {
    "KEEP_TTL": OUTPUT_KEEP_TTL,
    "KEEP_DSCP": OUTPUT_KEEP_DSCP,
    "KEEP_SOURCE": OUTPUT_KEEP_SOURCE,
    "KEEP_SOURCE_PORT": OUTPUT_KEEP_SOURCE_PORT,
    "PAUSED": OUTPUT_PAUSED,
    "SPLIT_HORIZON": OUTPUT_SPLIT_HORIZON,
}
RATE_UNITS = {"NONE": RATE_NONE, "PACKETS": RATE_PACKETS, "BITS": RATE_BITS}
LINK_SIZE = sizeof_egress_link
RULE_RECORD_SIZE = sizeof_rule_record
OUTPUT_RECORD_SIZE = sizeof_output_record


cdef int64_t check(int64_t result) except -1:
    """The one place where a negative errno becomes an exception (BlockingIOError for EBUSY, else by OSError)."""
    if result == -EBUSY:
        raise BlockingIOError(EBUSY, "too many commands are waiting for the engine")
    if result < 0:
        raise OSError(-result, os.strerror(-result))
    return result


def rules_in(const uint8_t[::1] records not None):
    """How many rules a description holds; OSError (EINVAL) if it is not one."""
    cdef table *built = NULL
    check(table_build(&built, &records[0] if records.shape[0] else NULL, <size_t>records.shape[0]))
    count = table_rules(built)
    table_free(built)
    return count


cdef class Engine:
    """See native/engine.h. The page is a writable buffer of PAGE_SIZE bytes and stays mapped while the engine lives."""

    cdef engine *_engine
    cdef uint8_t[::1] _page

    def __cinit__(self, uint8_t[::1] page not None, int command_fd, int answer_fd, uint32_t latency_budget_us,
                  bint busy_poll):
        cdef engine_pace pace
        pace.latency_budget_us = latency_budget_us
        pace.busy_poll = busy_poll
        if <size_t>page.shape[0] < sizeof_counters_page:
            raise ValueError(f"the counter page has {page.shape[0]} bytes, the engine needs {PAGE_SIZE}")
        self._page = page
        check(engine_open(&self._engine, <counters_page *>&page[0], command_fd, answer_fd, pace))

    def __dealloc__(self):
        if self._engine != NULL:
            engine_close(self._engine)

    def close(self):
        """Release everything; only after run() has returned. A second call does nothing."""
        if self._engine != NULL:
            engine_close(self._engine)
            self._engine = NULL
            self._page = None

    cdef engine *_open(self) except NULL:
        if self._engine == NULL:
            raise ValueError("the engine is closed")
        return self._engine

    def run(self):
        cdef engine *opened = self._open()
        cdef int result
        with nogil:
            result = engine_run(opened)
        check(result)

    def attach_receive(self, unsigned interface, int fd, bint loopback, uint32_t mtu, uint32_t slots):
        return check(engine_attach_receive(self._open(), interface, fd, loopback, mtu, slots))

    def attach_ring(self, unsigned interface, int fd, bint loopback, uint32_t block_size, uint32_t blocks,
                    uint32_t frame_size):
        return check(engine_attach_ring(self._open(), interface, fd, loopback, block_size, blocks, frame_size))

    def attach_datagrams(self, unsigned interface, bint loopback, uint32_t slots):
        return check(engine_attach_datagrams(self._open(), interface, loopback, slots))

    def add_socket(self, unsigned interface, int fd, uint32_t number):
        return check(engine_add_socket(self._open(), interface, fd, number))

    def remove_socket(self, unsigned interface, uint32_t number):
        return check(engine_remove_socket(self._open(), interface, number))

    def detach_ingress(self, unsigned interface):
        return check(engine_detach_ingress(self._open(), interface))

    def attach_egress(self, unsigned interface, unsigned way, int fd, uint32_t mtu, const uint8_t[::1] link not None):
        cdef const uint8_t *first = &link[0] if link.shape[0] else NULL
        return check(engine_attach_egress(self._open(), interface, way, fd, mtu, first, <size_t>link.shape[0]))

    def detach_egress(self, unsigned interface, unsigned way):
        return check(engine_detach_egress(self._open(), interface, way))

    def set_rules(self, const uint8_t[::1] records not None):
        cdef const uint8_t *first = &records[0] if records.shape[0] else NULL
        return check(engine_set_rules(self._open(), first, <size_t>records.shape[0]))

    def set_own_addresses(self, const uint8_t[::1] packed not None):
        cdef const uint8_t *first = &packed[0] if packed.shape[0] else NULL
        return check(engine_set_own_addresses(self._open(), first, <size_t>packed.shape[0]))

    def open_tap(self, uint32_t rule, int fd, uint64_t count, uint32_t snap):
        return check(engine_open_tap(self._open(), rule, fd, count, snap))

    def close_tap(self, int fd):
        return check(engine_close_tap(self._open(), fd))

    def probe(self):
        return check(engine_probe(self._open()))

    def stop(self):
        return check(engine_stop(self._open()))

    def answers(self):
        """The answers that have come, as (ticket, errno or 0)."""
        cdef engine_answer answer
        cdef engine *opened = self._open()
        taken = []
        while engine_answer_take(opened, &answer):
            taken.append((answer.ticket, -answer.result))
        return taken
