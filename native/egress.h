/* SPDX-License-Identifier: Apache-2.0 */
/*
 * egress.h: the sends in flight.
 *
 * A send owns its message header, address and control data from preparation to completion, so that the rule it came
 * from may be replaced meanwhile; the payload stays in the receive slot, of which the send is a holder. Sends never
 * wait for room (MSG_DONTWAIT): a full egress is a drop of that output, and does not delay another. It also means that
 * a send completes while it is submitted, so datagrams of one flow leave in the order of their preparation.
 */
#ifndef MCRELAY_EGRESS_H
#define MCRELAY_EGRESS_H

#include "receive.h"
#include "table.h"

#include <netinet/in.h>

enum {
    SENDS_MAX = 512, /* prepared between two submissions; 280 bytes each */
};

struct send {
    struct msghdr message;
    struct iovec payload;
    struct sockaddr_in address;
    _Alignas(struct cmsghdr) uint8_t control[CMSG_SPACE(sizeof(int))];
    struct ingress *ingress; /* whose slot the payload lies in */
    uint32_t slot;
    uint32_t output; /* counter index */
    uint16_t next_free;
};

struct sends {
    struct send all[SENDS_MAX];
    uint16_t first_free;
    uint16_t in_flight;
};

void sends_init(struct sends *sends);

static inline bool sends_available(const struct sends *sends)
{
    return sends->in_flight < SENDS_MAX;
}

/* Fill a free send (there must be one) and the submission entry for it. The caller holds the slot for it. Returns the
 * index that sends_finish takes. */
uint16_t sends_prepare(struct sends *sends, struct io_uring_sqe *sqe, int fd, const struct table_output *output,
                       const struct packet *packet, struct ingress *ingress, uint32_t slot);

/* The send is done: it may be reused. The returned pointer is good until the next sends_prepare. */
const struct send *sends_finish(struct sends *sends, uint16_t index);

/* Why a send with this result (negative errno) did not leave. */
enum drop_reason send_drop_reason(int result);

#endif
