# SPDX-License-Identifier: Apache-2.0
# cython: language_level=3, freethreading_compatible=False
"""The loops of test traffic, native/generator.h and native/collector.h, as Python classes: a thin skin that turns
negative errno into OSError. They run without the GIL for a slice of time, and leave all else to the caller."""

from libc.stdint cimport uint8_t, uint32_t, uint64_t

import os


cdef extern from "<stdbool.h>":
    ctypedef bint c_bool "bool"


cdef extern from "analyser.h":
    enum:
        DATAGRAM_MAX
        PAYLOAD_HEADER
        RTP_HEADER
        FLOWS_MAX
    struct analyser_totals:
        uint64_t received
        uint64_t reordered
        uint64_t duplicated
        uint64_t late
        uint64_t corrupted
        uint64_t foreign
        uint64_t clock_skew
        uint64_t bytes
        uint64_t expected
        uint64_t first_ns
        uint64_t last_ns
        uint64_t latency_max_ns
        uint64_t latencies
        uint32_t flows
    struct analyser:
        analyser_totals totals
    int analyser_open(analyser **out, uint32_t flows, c_bool rtp)
    void analyser_close(analyser *analyser)
    uint64_t analyser_latency_ns(const analyser *analyser, double fraction)
    double analyser_jitter_ns(const analyser *analyser)


cdef extern from "collector.h":
    struct collector:
        pass
    int collector_open(collector **out, analyser *analyser, const int *fds, uint32_t count)
    void collector_close(collector *collector)
    int collector_run(collector *collector, uint64_t slice_ns, uint64_t wanted, c_bool drain) nogil


cdef extern from "generator.h":
    enum:
        CALL_DATAGRAMS_MAX
    struct generator_plan:
        uint64_t count
        uint64_t duration_ns
        double rate
        uint32_t flows
        uint32_t flow_id
        uint32_t size
        uint32_t segments
        uint32_t burst
        c_bool rtp
    struct generator_totals:
        uint64_t sent
        uint64_t retried
        uint64_t elapsed_ns
        uint64_t postponed_ns
        uint32_t segments
        int segments_refused
    struct generator:
        generator_totals totals
    int generator_open(generator **out, const generator_plan *plan, int fd, const uint8_t *addresses,
                       uint32_t address_size)
    void generator_close(generator *generator)
    int generator_run(generator *generator, uint64_t slice_ns) nogil


SIZE_MAX = DATAGRAM_MAX
SIZE_HEADER = PAYLOAD_HEADER
SIZE_RTP_HEADER = RTP_HEADER
RECEIVE_FLOWS_MAX = FLOWS_MAX
SEGMENTS_MAX = CALL_DATAGRAMS_MAX


cdef int check(int result) except -1:
    """The one place where a negative errno becomes an OSError."""
    if result < 0:
        raise OSError(-result, os.strerror(-result))
    return result


cdef class Generator:
    """See native/generator.h. `addresses` is empty for a connected socket, else one socket address per flow."""

    cdef generator *_generator

    def __cinit__(self, int fd, const uint8_t[::1] addresses not None, *, uint64_t count, uint64_t duration_ns,
                  double rate, uint32_t flows, uint32_t flow_id, uint32_t size, uint32_t segments, uint32_t burst,
                  bint rtp):
        cdef generator_plan plan
        cdef Py_ssize_t length = addresses.shape[0]
        plan.count = count
        plan.duration_ns = duration_ns
        plan.rate = rate
        plan.flows = flows
        plan.flow_id = flow_id
        plan.size = size
        plan.segments = segments
        plan.burst = burst
        plan.rtp = rtp
        if length and (not flows or length % flows):
            raise ValueError(f"{length} bytes are not {flows} addresses")
        check(generator_open(&self._generator, &plan, fd, &addresses[0] if length else NULL,
                             <uint32_t>(length // flows) if length else 0))

    def __dealloc__(self):
        if self._generator != NULL:
            generator_close(self._generator)

    def run(self, uint64_t slice_ns):
        """True when all is sent; OSError if a send failed."""
        cdef int result
        with nogil:
            result = generator_run(self._generator, slice_ns)
        return check(result) == 1

    def totals(self):
        """The fields of struct generator_totals."""
        return self._generator.totals


cdef class Collector:
    """See native/collector.h and native/analyser.h. `fds` are C ints."""

    cdef analyser *_analyser
    cdef collector *_collector

    def __cinit__(self, const int[::1] fds not None, *, uint32_t flows, bint rtp):
        check(analyser_open(&self._analyser, flows, rtp))
        check(collector_open(&self._collector, self._analyser, &fds[0], <uint32_t>fds.shape[0]))

    def __dealloc__(self):
        if self._collector != NULL:
            collector_close(self._collector)
        if self._analyser != NULL:
            analyser_close(self._analyser)

    def run(self, uint64_t slice_ns, uint64_t wanted, bint drain):
        """True when `wanted` datagrams have come, or, to drain, when nothing is left."""
        cdef int result
        with nogil:
            result = collector_run(self._collector, slice_ns, wanted, drain)
        return check(result) == 1

    def totals(self):
        """The fields of struct analyser_totals."""
        return self._analyser.totals

    def latency_ns(self, double fraction):
        """None if there is no latency."""
        if not self._analyser.totals.latencies:
            return None
        return analyser_latency_ns(self._analyser, fraction)

    def jitter_ns(self):
        """None if no flow has two datagrams."""
        jitter = analyser_jitter_ns(self._analyser)
        return None if jitter < 0 else jitter
