/* SPDX-License-Identifier: Apache-2.0 */
/* traffic.c: see traffic.h. */
#include "traffic.h"

#include "datagram.h"

/* All lengths from 4 bytes up, and different bytes. Returns the length. */
static size_t make_payload(uint32_t number, uint8_t payload[RIG_PAYLOAD_MAX])
{
    uint64_t state = UINT64_C(0x9e3779b97f4a7c15) * (number + 1);
    size_t length = 4 + random_below(&state, RIG_PAYLOAD_MAX - 3);

    write32(payload, number);
    for (size_t i = 4; i < length; i++)
        payload[i] = (uint8_t)random_next(&state);
    return length;
}

/* The number of a payload that arrived, which has to be what was sent under that number. */
static uint32_t payload_number(const uint8_t *payload, size_t length)
{
    uint8_t expected[RIG_PAYLOAD_MAX];
    uint32_t number;

    CHECK(length >= 4);
    number = (uint32_t)payload[0] << 24 | (uint32_t)payload[1] << 16 | (uint32_t)payload[2] << 8 | payload[3];
    CHECK_EQUAL(length, make_payload(number, expected));
    CHECK_BYTES(payload, expected, length);
    return number;
}

void traffic_open(struct traffic *traffic, uint32_t count, unsigned wanted, unsigned or_wanted)
{
    *traffic = (struct traffic){.count = count, .wanted = {(uint8_t)wanted, (uint8_t)or_wanted}};
    traffic->seen = calloc(count, 1);
    CHECK(traffic->seen);
}

static bool is_wanted(const struct traffic *traffic, uint32_t number)
{
    return traffic->seen[number] == traffic->wanted[0] || traffic->seen[number] == traffic->wanted[1];
}

bool traffic_take(struct rig *rig, struct traffic *traffic)
{
    uint8_t payload[RIG_PAYLOAD_MAX];
    bool any = false;
    ssize_t length;

    for (unsigned r = 0; r < RIG_RECEIVERS; r++)
        while ((length = rig_try_receive(rig, r, payload, NULL)) >= 0) {
            uint32_t number = payload_number(payload, (size_t)length);

            CHECK(number < traffic->sent);
            CHECK(number >= traffic->next[r]);
            traffic->next[r] = number + 1;
            traffic->seen[number] |= (uint8_t)(1 << r);
            traffic->done += is_wanted(traffic, number);
            any = true;
        }
    return any;
}

static bool may_send(const struct traffic *traffic)
{
    return traffic->sent < traffic->count && traffic->sent - traffic->done < RIG_WINDOW;
}

bool traffic_step(struct rig *rig, struct traffic *traffic)
{
    uint8_t payload[RIG_PAYLOAD_MAX];
    bool any = false;

    while (may_send(traffic) && rig_try_send(rig, 0, 64, payload, make_payload(traffic->sent, payload))) {
        traffic->sent++;
        any = true;
    }
    return traffic_take(rig, traffic) || any;
}

void traffic_wait(struct rig *rig, const struct traffic *traffic)
{
    struct pollfd polled[RIG_RECEIVERS + 2];

    for (unsigned r = 0; r < RIG_RECEIVERS; r++)
        polled[r] = (struct pollfd){.fd = rig->receivers[r], .events = POLLIN};
    polled[RIG_RECEIVERS] = (struct pollfd){.fd = rig->answer_fd, .events = POLLIN};
    polled[RIG_RECEIVERS + 1] = (struct pollfd){.fd = rig->feed[0], .events = POLLOUT};
    rig_wait(polled, RIG_RECEIVERS + 1 + may_send(traffic));
}

void traffic_run(struct rig *rig, struct traffic *traffic, uint32_t done)
{
    while (traffic->done < done)
        if (!traffic_step(rig, traffic))
            traffic_wait(rig, traffic);
}

void traffic_close(struct rig *rig, struct traffic *traffic)
{
    CHECK(!traffic_take(rig, traffic));
    CHECK_EQUAL(traffic->sent, traffic->count);
    CHECK_EQUAL(traffic->done, traffic->count);
    for (uint32_t number = 0; number < traffic->count; number++)
        CHECK(is_wanted(traffic, number));
    free(traffic->seen);
}
