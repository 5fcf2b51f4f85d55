/* SPDX-License-Identifier: Apache-2.0 */
/*
 * table.h: the compiled rules of one worker, as the engine looks them up.
 *
 * A table is built whole from a binary description, never changed, and replaced between two batches: what the engine
 * reads never moves under it. Building and freeing happen on the command side, so the engine allocates nothing.
 *
 * Rules with a prefix, any source or any port are found by tuple-space search: the table knows which shapes (length of
 * the prefix, with a source or not, with a port or not) its rules have, and probes one hash table once for each, the
 * most specific first. A table of exact rules is of one shape, so it is one probe.
 *
 * The description is a sequence of records, native byte order: a `struct table_rule_record` followed by as many
 * `struct table_output_record` as it says. src/mcrelay/entries.py writes the same layout.
 */
#ifndef MCRELAY_TABLE_H
#define MCRELAY_TABLE_H

#include "packet.h"
#include "ways.h"

enum {
    /* Interfaces a worker can know. Slots are small numbers given out by the supervisor, so that a rule keeps its slot
     * when its interface is re-created with another index. */
    TABLE_INTERFACES_MAX = 64,
    TABLE_OUTPUTS_PER_RULE_MAX = 1024,
};

struct table_rule_record {
    uint8_t group[16];  /* bits behind `prefix` are 0 */
    uint8_t source[16]; /* all 0: any */
    uint64_t id;        /* of the rule: tells it from others that had its counter */
    uint16_t port;      /* 0: any. Host byte order, as all numbers here */
    uint16_t ingress;   /* interface slot */
    uint16_t outputs;   /* records that follow */
    uint16_t vlan;      /* 0: untagged */
    uint8_t prefix;     /* of `group`, in bits of 128; 128: one address */
    uint8_t protocol;   /* PROTOCOL_UDP or PROTOCOL_ESP, which has no ports */
    uint8_t reserved[2];
    uint32_t counter; /* index into counters_page.rules */
};

enum output_flag {
    OUTPUT_KEEP_TTL = 1,         /* as it came, instead of one less */
    OUTPUT_KEEP_DSCP = 2,        /* as it came, instead of `dscp` */
    OUTPUT_KEEP_SOURCE = 4,      /* the address */
    OUTPUT_KEEP_SOURCE_PORT = 8, /* likewise */
    OUTPUT_PAUSED = 16,          /* sends nothing: DROP_PAUSED */
    OUTPUT_SPLIT_HORIZON = 32,   /* would leave by the interface that the packet came in by: DROP_SPLIT_HORIZON */
};

enum rate_unit { RATE_NONE, RATE_PACKETS, RATE_BITS };

struct table_output_record {
    uint8_t address[16]; /* bits behind `prefix` are the packet's destination's */
    uint8_t source[16];  /* all 0: what the kernel chooses, or the interface's own where we write the header */
    uint64_t rate;       /* packets, or bits of IP packets, a second */
    uint32_t counter;    /* index into counters_page.outputs */
    uint16_t port;       /* 0: the packet's */
    uint16_t source_port; /* 0: what the kernel chooses, or the packet's where we write the header */
    uint16_t egress;      /* interface slot */
    uint8_t way;          /* enum way */
    uint8_t prefix;       /* of `address`, in bits of 128; 128: all of it */
    uint8_t ttl;          /* 0: one less than it came with, never below 1 */
    uint8_t dscp;         /* 0 to 63 */
    uint8_t flags;        /* enum output_flag */
    uint8_t rate_unit;    /* enum rate_unit */
    uint8_t reserved[8];
};

static_assert(sizeof(struct table_rule_record) == 56, "layout shared with entries.py");
static_assert(sizeof(struct table_output_record) == 64, "layout shared with entries.py");

/* All numbers as in the records. */
struct table_output {
    union address address;
    union address source;
    uint64_t rate;
    uint32_t counter;
    uint16_t port;
    uint16_t source_port;
    uint16_t egress; /* table_egress of its interface slot and way */
    uint8_t way;
    uint8_t prefix;
    uint8_t ttl;
    uint8_t tos; /* the DSCP in its place, ECN 0 */
    uint8_t flags;
    uint8_t rate_unit;
    bool plain; /* it is sent always, by a UDP socket, and to the same address and port whatever the packet */
};

struct table_rule {
    union address group;
    union address source;
    uint64_t id;
    uint64_t traits; /* all other that a packet has to have, in one number */
    uint32_t counter;
    uint32_t outputs_count;
    const struct table_output *outputs;
};

struct table;

/* Build a table from `length` bytes of records. On success 0 and *out; -EINVAL if the description is not one (wrong
 * length, a number out of range, what contradicts itself, the same input twice), -ENOMEM. */
int table_build(struct table **out, const uint8_t *records, size_t length);

void table_free(struct table *table);

uint32_t table_rules(const struct table *table);

/* The rule that takes a packet which came in on interface slot `ingress`, or NULL. Of several that could, that for the
 * longest prefix; then one with a source; then one with a port. */
const struct table_rule *table_find(const struct table *table, const struct packet *packet, uint8_t ingress);

/* Where an engine has the egress of an interface slot and way. */
enum { TABLE_EGRESSES = TABLE_INTERFACES_MAX * WAYS };

static inline uint16_t table_egress(unsigned interface, enum way way)
{
    return (uint16_t)(interface * WAYS + way);
}

#endif
