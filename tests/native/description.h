/* SPDX-License-Identifier: Apache-2.0 */
/*
 * description.h: write the rule descriptions that table_build and engine_set_rules read, record by record. Nothing is
 * checked here, so that wrong ones can be written as well. Addresses in host byte order; what is not given is as in a
 * rule of the simplest kind, from one IPv4 address to others, by UDP.
 */
#ifndef MCRELAY_TESTS_DESCRIPTION_H
#define MCRELAY_TESTS_DESCRIPTION_H

#include "check.h"
#include "table.h"

#include <arpa/inet.h>

struct description {
    uint8_t *bytes;
    size_t length;
    size_t room;
};

static inline void description_append(struct description *description, const void *record, size_t size)
{
    if (description->length + size > description->room) {
        description->room = 2 * (description->length + size);
        description->bytes = realloc(description->bytes, description->room);
        CHECK(description->bytes);
    }
    memcpy(description->bytes + description->length, record, size);
    description->length += size;
}

static inline void description_rule(struct description *description, uint32_t group, uint16_t port, uint16_t ingress,
                                    uint16_t outputs, uint32_t counter)
{
    struct table_rule_record record = {.id = counter + 1, .port = port, .ingress = ingress, .outputs = outputs,
                                       .counter = counter, .prefix = 128, .protocol = PROTOCOL_UDP};
    union address address = address_from_ipv4(htonl(group));

    memcpy(record.group, address.bytes, sizeof(record.group));
    description_append(description, &record, sizeof(record));
}

static inline void description_output(struct description *description, uint32_t destination, uint16_t port,
                                      uint16_t egress, uint8_t ttl, uint32_t counter)
{
    struct table_output_record record = {.port = port, .egress = egress, .ttl = ttl, .counter = counter,
                                         .way = WAY_UDP4, .prefix = 128, .flags = OUTPUT_KEEP_DSCP};
    union address address = address_from_ipv4(htonl(destination));

    memcpy(record.address, address.bytes, sizeof(record.address));
    description_append(description, &record, sizeof(record));
}

/* Whether the first `prefix` bits of two addresses are the same: bit by bit, on purpose unlike native/table.c. */
static inline bool description_same_prefix(const uint8_t *a, const uint8_t *b, unsigned prefix)
{
    for (unsigned bit = 0; bit < prefix; bit++)
        if ((a[bit / 8] ^ b[bit / 8]) >> (7 - bit % 8) & 1)
            return false;
    return true;
}

static inline bool description_takes(const struct table_rule_record *record, const struct packet *packet,
                                     unsigned ingress)
{
    static const uint8_t any[16];

    return record->ingress == ingress && record->vlan == packet->vlan && record->protocol == packet->protocol &&
           (record->port == 0 || record->port == packet->destination_port) &&
           (!memcmp(record->source, any, sizeof(any)) || !memcmp(record->source, packet->source.bytes, sizeof(any))) &&
           description_same_prefix(record->group, packet->destination.bytes, record->prefix) &&
           (record->prefix >= 96 || !address_is_ipv4(&packet->destination));
}

/* The rule record that takes a packet, found by looking at all of them; false if there is none. `outputs` (may be NULL)
 * is where its outputs are. The bytes are those of a description that table_build has accepted. */
static inline bool description_find(const uint8_t *bytes, size_t length, const struct packet *packet, unsigned ingress,
                                    struct table_rule_record *best, const uint8_t **outputs)
{
    static const uint8_t any[16];
    int best_rank = -1;

    for (size_t at = 0; at < length;) {
        struct table_rule_record record;
        int rank;

        memcpy(&record, bytes + at, sizeof(record));
        at += sizeof(record);
        rank = record.prefix * 4 + (memcmp(record.source, any, sizeof(any)) ? 2 : 0) + (record.port ? 1 : 0);
        if (rank > best_rank && description_takes(&record, packet, ingress)) {
            best_rank = rank;
            *best = record;
            if (outputs)
                *outputs = bytes + at;
        }
        at += record.outputs * sizeof(struct table_output_record);
    }
    return best_rank >= 0;
}

static inline void description_free(struct description *description)
{
    free(description->bytes);
    *description = (struct description){0};
}

/* table_build from a block of exactly the description's size, gone before the table is used. */
static inline int description_build(const struct description *description, struct table **table)
{
    uint8_t *bytes = exact_copy(description->bytes, description->length);
    int error = table_build(table, bytes, description->length);

    free(bytes);
    return error;
}

#endif
