/* SPDX-License-Identifier: Apache-2.0 */
/*
 * description.h: write the rule descriptions that table_build and engine_set_rules read, record by record. Nothing is
 * checked here, so that wrong ones can be written as well. Addresses in host byte order.
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
    struct table_rule_record record = {.port = port, .ingress = ingress, .outputs = outputs, .counter = counter};
    union address address = address_from_ipv4(htonl(group));

    memcpy(record.group, address.bytes, sizeof(record.group));
    description_append(description, &record, sizeof(record));
}

static inline void description_output(struct description *description, uint32_t destination, uint16_t port,
                                      uint16_t egress, uint8_t ttl, uint32_t counter)
{
    struct table_output_record record = {.port = port, .egress = egress, .ttl = ttl, .counter = counter};
    union address address = address_from_ipv4(htonl(destination));

    memcpy(record.address, address.bytes, sizeof(record.address));
    description_append(description, &record, sizeof(record));
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
