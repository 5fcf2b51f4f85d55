/* SPDX-License-Identifier: Apache-2.0 */
#include "datagrams.h"

#include "buffers.h"
#include "table.h"

#include <errno.h>
#include <netinet/in.h>
#include <stdlib.h>
#include <string.h>
#include <sys/socket.h>

/* What the C library's headers lack or hide (linux/in6.h, linux/udp.h, asm-generic/socket.h, linux/sock_diag.h). */
#ifndef SO_MEMINFO
#define SO_MEMINFO 55
#endif
enum { LEVEL_UDP = 17, CONTROL_UDP_GRO = 104, MEMINFO_WORDS = 9, MEMINFO_DROPS = 8 };
struct pktinfo4 { int interface; uint8_t local[4]; uint8_t destination[4]; };  /* struct in_pktinfo */
struct pktinfo6 { uint8_t destination[16]; unsigned interface; };              /* struct in6_pktinfo */

enum {
    NAME_ROOM = 32, /* struct sockaddr_in6, rounded up so that the control messages are aligned */
    CONTROL_ROOM = CMSG_SPACE(sizeof(struct pktinfo6)) + 3 * CMSG_SPACE(sizeof(int)), /* TTL, TOS, UDP_GRO */
    HEAD_ROOM = sizeof(struct io_uring_recvmsg_out) + NAME_ROOM + CONTROL_ROOM,
    PAYLOAD_MAX = 65535,
    SLOT_SIZE = (HEAD_ROOM + PAYLOAD_MAX + 4095) / 4096 * 4096, /* whole pages: an ordinary datagram touches one */
    SLOTS_DEFAULT = 512, /* 5 ms of 100,000 packets/s, while the others wait in their sockets; 34 MiB if all are long */
};

static_assert(sizeof(struct sockaddr_in6) <= NAME_ROOM, "room for either address");
static_assert(sizeof(struct pktinfo4) <= sizeof(struct pktinfo6), "room for either");
static_assert((sizeof(struct io_uring_recvmsg_out) + NAME_ROOM) % sizeof(size_t) == 0, "control messages are aligned");
static_assert((int)DATAGRAM_SOCKETS_MAX <= (int)INGRESS_PARTS_MAX, "a completion names the socket");

enum state { UNUSED = 0, IDLE, ARMED, CANCELLED };

struct part { /* a socket */
    int fd;
    uint32_t number;
    uint64_t ticket; /* of the command that removes it, else 0 */
    uint32_t drops;  /* that it had told of so far */
    uint16_t port;
    uint8_t state;
    bool failed; /* idle until the timer */
};

struct datagrams {
    struct buffers buffers;
    struct packet packet; /* of the last frame */
    uint32_t parts_end;   /* those from here on were never used */
    uint32_t last_armed;  /* where to look for the next one from */
    uint32_t idle;        /* so many of each: what there is to do, without a look at all */
    uint32_t armed;
    uint32_t failed;
    uint32_t to_cancel;
    uint32_t to_end;      /* removed ones that are not armed any more */
    struct part parts[DATAGRAM_SOCKETS_MAX];
};

static const struct ingress_kind datagrams_kind;

static struct datagrams *datagrams_of(struct ingress *ingress)
{
    return (struct datagrams *)ingress; /* buffers.base is its first member */
}

int datagrams_new(struct ingress **out, uint8_t interface, uint32_t slots)
{
    struct datagrams *datagrams;
    struct ingress *ingress;

    if (interface >= TABLE_INTERFACES_MAX || slots > BUFFERS_SLOTS_MAX || (slots & (slots - 1)) != 0)
        return -EINVAL;
    datagrams = calloc(1, sizeof(*datagrams));
    if (!datagrams)
        return -ENOMEM;
    ingress = &datagrams->buffers.base;
    *ingress = (struct ingress){.kind = &datagrams_kind, .fd = -1, .interface = interface};
    datagrams->buffers.shape.msg_namelen = NAME_ROOM;
    datagrams->buffers.shape.msg_controllen = CONTROL_ROOM;
    if (buffers_open(&datagrams->buffers, slots ? slots : SLOTS_DEFAULT, SLOT_SIZE)) {
        ingress_free(ingress);
        return -ENOMEM;
    }
    *out = ingress;
    return 0;
}

/* --- sockets ------------------------------------------------------------------------------------------------------ */

/* How many datagrams the socket has dropped since it was opened; 32 bits that go round. */
static uint32_t drops_of(int fd)
{
    uint32_t words[MEMINFO_WORDS] = {0};
    socklen_t size = sizeof(words);

    return getsockopt(fd, SOL_SOCKET, SO_MEMINFO, words, &size) < 0 ? 0 : words[MEMINFO_DROPS];
}

/* The port that the socket is bound to; 0 if it is not one of ours. */
static uint16_t port_of(int fd)
{
    union {
        struct sockaddr any;
        struct sockaddr_in v4;
        struct sockaddr_in6 v6;
    } name;
    socklen_t size = sizeof(name);

    memset(&name, 0, sizeof(name));
    if (getsockname(fd, &name.any, &size) < 0)
        return 0;
    if (name.any.sa_family == AF_INET)
        return ntohs(name.v4.sin_port);
    return name.any.sa_family == AF_INET6 ? ntohs(name.v6.sin6_port) : 0;
}

static int datagrams_add(struct ingress *ingress, int fd, uint32_t number)
{
    struct datagrams *datagrams = datagrams_of(ingress);
    struct part *free = NULL;
    uint16_t port = port_of(fd);

    if (!port)
        return -EINVAL;
    for (uint32_t i = 0; i < datagrams->parts_end; i++) {
        struct part *part = &datagrams->parts[i];

        if (part->state == UNUSED)
            free = part;
        else if (part->number == number && !part->ticket)
            return -EEXIST;
    }
    if (!free) {
        if (datagrams->parts_end == DATAGRAM_SOCKETS_MAX)
            return -ENFILE;
        free = &datagrams->parts[datagrams->parts_end++];
    }
    *free = (struct part){.fd = fd, .number = number, .port = port, .drops = drops_of(fd), .state = IDLE};
    datagrams->idle++;
    return 0;
}

static int datagrams_remove(struct ingress *ingress, uint32_t number, uint64_t ticket)
{
    struct datagrams *datagrams = datagrams_of(ingress);

    for (uint32_t i = 0; i < datagrams->parts_end; i++) {
        struct part *part = &datagrams->parts[i];

        if (part->state == UNUSED || part->number != number || part->ticket)
            continue;
        part->ticket = ticket;
        if (part->state == IDLE) {
            datagrams->idle--;
            datagrams->failed -= part->failed;
            datagrams->to_end++;
        } else {
            datagrams->to_cancel += part->state == ARMED;
        }
        return 0;
    }
    return -ENOENT;
}

/* A removed socket of which nothing is in flight any more. */
static uint64_t datagrams_ended(struct ingress *ingress)
{
    struct datagrams *datagrams = datagrams_of(ingress);

    for (uint32_t i = 0; datagrams->to_end && i < datagrams->parts_end; i++) {
        struct part *part = &datagrams->parts[i];
        uint64_t ticket = part->ticket;

        if (part->state != IDLE || !ticket)
            continue;
        *part = (struct part){.state = UNUSED};
        datagrams->to_end--;
        return ticket;
    }
    return 0;
}

/* One that failed waits for the timer, which clears the mark of the whole. */
static bool datagrams_wants_arming(const struct ingress *ingress, bool looked_at)
{
    const struct datagrams *datagrams = (const struct datagrams *)ingress;

    (void)looked_at; /* it is the receive that fetches the frames */
    return datagrams->idle > (ingress->failed ? datagrams->failed : 0) && buffers_suffice(ingress);
}

static void datagrams_arm(struct ingress *ingress, struct io_uring_sqe *sqe)
{
    struct datagrams *datagrams = datagrams_of(ingress);

    for (uint32_t tried = 0; tried < datagrams->parts_end; tried++) {
        uint32_t i = (datagrams->last_armed + 1 + tried) % datagrams->parts_end;
        struct part *part = &datagrams->parts[i];

        if (part->state != IDLE || part->ticket || (part->failed && ingress->failed))
            continue;
        datagrams->last_armed = i;
        datagrams->failed -= part->failed;
        part->failed = false;
        part->state = ARMED;
        datagrams->idle--;
        datagrams->armed++;
        buffers_arm(&datagrams->buffers, sqe, part->fd);
        sqe->user_data |= (uint64_t)i << INGRESS_PART_SHIFT;
        return;
    }
}

static bool datagrams_cancel(struct ingress *ingress, uint32_t *index)
{
    struct datagrams *datagrams = datagrams_of(ingress);

    for (uint32_t i = 0; (datagrams->to_cancel || ingress->detaching) && i < datagrams->parts_end; i++) {
        struct part *part = &datagrams->parts[i];

        if (part->state != ARMED || !(part->ticket || ingress->detaching))
            continue;
        part->state = CANCELLED;
        datagrams->to_cancel -= part->ticket != 0;
        *index = i;
        return true;
    }
    return false;
}

static void ended(struct datagrams *datagrams, struct part *part, bool failed)
{
    if (part->ticket) {
        datagrams->to_cancel -= part->state == ARMED; /* it ended by itself before it was cancelled */
        datagrams->to_end++;
    } else {
        datagrams->idle++;
        part->failed = failed;
        datagrams->failed += failed;
        datagrams->buffers.base.failed |= failed;
    }
    part->state = IDLE;
    datagrams->buffers.base.armed = --datagrams->armed > 0;
}

static void datagrams_complete(struct ingress *ingress, const struct io_uring_cqe *cqe, struct counters_page *counters)
{
    struct datagrams *datagrams = datagrams_of(ingress);
    struct part *part = &datagrams->parts[(uint32_t)cqe->user_data >> INGRESS_PART_SHIFT];

    buffers_complete(&datagrams->buffers, cqe, part->port, counters);
    if (!(cqe->flags & IORING_CQE_F_MORE))
        ended(datagrams, part, cqe->res < 0 && cqe->res != -ENOBUFS && cqe->res != -ECANCELED);
}

static uint32_t datagrams_overruns(struct ingress *ingress)
{
    struct datagrams *datagrams = datagrams_of(ingress);
    uint32_t overruns = 0;

    for (uint32_t i = 0; i < datagrams->parts_end; i++) {
        struct part *part = &datagrams->parts[i];
        uint32_t drops;

        if (part->state == UNUSED || part->ticket) /* its descriptor may be closed by then */
            continue;
        drops = drops_of(part->fd);
        overruns += drops - part->drops;
        part->drops = drops;
    }
    return overruns;
}

/* --- frames ------------------------------------------------------------------------------------------------------- */

static int read_int(const struct cmsghdr *control)
{
    int value = 0;

    if (control->cmsg_len >= CMSG_LEN(sizeof(value)))
        memcpy(&value, CMSG_DATA(control), sizeof(value));
    else if (control->cmsg_len > CMSG_LEN(0))
        value = *CMSG_DATA(control); /* IP_TOS is one byte */
    return value;
}

static union address address_of4(const void *bytes)
{
    uint32_t word;

    memcpy(&word, bytes, sizeof(word));
    return address_from_ipv4(word);
}

static bool read_source(struct io_uring_recvmsg_out *out, struct packet *packet)
{
    const void *name = io_uring_recvmsg_name(out);
    struct sockaddr_in v4;
    struct sockaddr_in6 v6;

    memcpy(&v4, name, sizeof(v4));
    memcpy(&v6, name, sizeof(v6));
    if (out->namelen >= sizeof(v4) && v4.sin_family == AF_INET) {
        packet->source = address_of4(&v4.sin_addr);
        packet->source_port = ntohs(v4.sin_port);
        return true;
    }
    if (out->namelen >= sizeof(v6) && v6.sin6_family == AF_INET6) {
        memcpy(packet->source.bytes, &v6.sin6_addr, sizeof(packet->source.bytes));
        packet->source_port = ntohs(v6.sin6_port);
        return true;
    }
    return false;
}

/* What the control messages say; false if they do not say where it went. */
static bool read_control(const struct datagrams *datagrams, struct io_uring_recvmsg_out *out, struct frame *frame,
                         struct packet *packet)
{
    struct msghdr shape = datagrams->buffers.shape;
    struct cmsghdr *control = io_uring_recvmsg_cmsg_firsthdr(out, &shape);
    bool told = false;

    for (; control; control = io_uring_recvmsg_cmsg_nexthdr(out, &shape, control)) {
        if (control->cmsg_level == IPPROTO_IP && control->cmsg_type == IP_PKTINFO &&
            control->cmsg_len >= CMSG_LEN(sizeof(struct pktinfo4))) {
            struct pktinfo4 info;

            memcpy(&info, CMSG_DATA(control), sizeof(info));
            packet->destination = address_of4(info.destination);
            told = true;
        } else if (control->cmsg_level == IPPROTO_IPV6 && control->cmsg_type == IPV6_PKTINFO &&
                   control->cmsg_len >= CMSG_LEN(sizeof(struct pktinfo6))) {
            struct pktinfo6 info;

            memcpy(&info, CMSG_DATA(control), sizeof(info));
            memcpy(packet->destination.bytes, info.destination, sizeof(packet->destination.bytes));
            told = true;
        } else if ((control->cmsg_level == IPPROTO_IP && control->cmsg_type == IP_TTL) ||
                   (control->cmsg_level == IPPROTO_IPV6 && control->cmsg_type == IPV6_HOPLIMIT)) {
            packet->ttl = (uint8_t)read_int(control);
        } else if ((control->cmsg_level == IPPROTO_IP && control->cmsg_type == IP_TOS) ||
                   (control->cmsg_level == IPPROTO_IPV6 && control->cmsg_type == IPV6_TCLASS)) {
            packet->tos = (uint8_t)read_int(control);
        } else if (control->cmsg_level == LEVEL_UDP && control->cmsg_type == CONTROL_UDP_GRO) {
            frame->segment = (uint16_t)read_int(control);
        }
    }
    return told;
}

static bool datagrams_next(struct ingress *ingress, uint32_t *slot, struct frame *frame)
{
    struct datagrams *datagrams = datagrams_of(ingress);
    struct packet *packet = &datagrams->packet;
    struct io_uring_recvmsg_out *out;
    uint16_t port;

    if (!buffers_next(&datagrams->buffers, slot, frame, &out, &port))
        return false;
    if (frame->reason != DROP_NONE)
        return true;
    *packet = (struct packet){.destination_port = port, .protocol = PROTOCOL_UDP};
    packet->payload = frame->data;
    packet->payload_length = frame->length;
    frame->packet = packet;
    if (!read_source(out, packet) || !read_control(datagrams, out, frame, packet))
        frame->reason = DROP_TRUNCATED;
    else if (out->flags & MSG_TRUNC)
        frame->reason = DROP_OVERSIZE;
    return true;
}

static const struct ingress_kind datagrams_kind = {
    .enter = buffers_enter,
    .leave = buffers_leave,
    .wants_arming = datagrams_wants_arming,
    .arm = datagrams_arm,
    .complete = datagrams_complete,
    .next = datagrams_next,
    .give_back = buffers_give_back,
    .publish = buffers_publish,
    .is_drained = buffers_is_drained,
    .free = buffers_free,
    .sockets = &(const struct ingress_sockets){
        .add = datagrams_add,
        .remove = datagrams_remove,
        .ended = datagrams_ended,
        .cancel = datagrams_cancel,
        .overruns = datagrams_overruns,
    },
};
