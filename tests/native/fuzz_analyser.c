/* SPDX-License-Identifier: Apache-2.0 */
/*
 * fuzz_analyser.c: any bytes as datagrams of test traffic or of RTP. The first byte of an input chooses which, and how
 * many flows are announced; the rest is cut into datagrams, each behind a byte with its length.
 *
 * What has to hold: no byte beyond a datagram is read; every datagram is counted once; what there is to expect is no less
 * than what came.
 */
#include "analyser.h"

#include "check.h"
#include "fuzz.h"

static const uint64_t arrived_ns = UINT64_C(1700000000000000000);

int LLVMFuzzerTestOneInput(const uint8_t *data, size_t size)
{
    static struct analyser *analysers[2];
    static bool opened;
    const struct analyser_totals *totals;
    uint64_t before, after, count = 0;
    bool rtp;

    /* Kept from one input to the next, as a receiver would: to open one costs more than an input. */
    for (unsigned i = 0; !opened && i < 2; i++)
        CHECK_EQUAL(analyser_open(&analysers[i], i ? 1000 : 1, i), 0);
    opened = true;
    if (!size)
        return 0;
    rtp = data[0] & 1;
    totals = &analysers[rtp]->totals;
    before = totals->received + totals->duplicated + totals->late + totals->corrupted + totals->foreign;
    for (size_t at = 1; at < size; count++) {
        size_t length = data[at] < size - at - 1 ? data[at] : size - at - 1;
        uint8_t *exact = exact_copy(data + at + 1, length);

        analyser_account(analysers[rtp], exact, length, arrived_ns + count);
        free(exact);
        at += 1 + length;
    }
    after = totals->received + totals->duplicated + totals->late + totals->corrupted + totals->foreign;
    CHECK_EQUAL(after - before, count);
    CHECK(totals->expected >= totals->received);
    CHECK(totals->reordered <= totals->received && totals->latencies <= totals->received);
    CHECK(analyser_latency_ns(analysers[rtp], 0.5) <= analyser_latency_ns(analysers[rtp], 1.0));
    return 0;
}

#ifndef FUZZ_LIBFUZZER
/* Some datagrams that are right, of few flows. */
static size_t fuzz_seed(uint8_t *out, uint64_t *state)
{
    static uint8_t pattern[PATTERN_SIZE];
    size_t at = 1;

    pattern_fill(pattern);
    out[0] = (uint8_t)random_below(state, 2);
    for (unsigned i = random_below(state, 8); i; i--) {
        uint32_t flow = random_below(state, 3), header = out[0] ? RTP_HEADER : 0;
        uint64_t sequence = random_below(state, 100000), sent_ns = arrived_ns - random_below(state, 1000000);
        size_t length = header + PAYLOAD_HEADER + random_below(state, 40);
        uint8_t *datagram = out + at + 1;

        out[at] = (uint8_t)length;
        memset(datagram, 0, length);
        if (header) {
            datagram[0] = 0x80;
            datagram[1] = 96;
            datagram[2] = (uint8_t)(sequence >> 8);
            datagram[3] = (uint8_t)sequence;
            datagram[11] = (uint8_t)flow;
        }
        payload_write_header(datagram + header, flow, sequence, sent_ns);
        memcpy(datagram + header + PAYLOAD_HEADER, pattern + (flow % 61 + sequence % 61 + sent_ns % 61) % 61,
               length - header - PAYLOAD_HEADER);
        at += 1 + length;
    }
    return at;
}
#endif
