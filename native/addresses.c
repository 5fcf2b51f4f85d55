/* SPDX-License-Identifier: Apache-2.0 */
#include "addresses.h"

#include <errno.h>
#include <stdlib.h>
#include <string.h>

struct addresses {
    uint32_t mask; /* buckets - 1; at most half of the buckets are used, so a probe always ends */
    uint16_t *buckets; /* index into items + 1, 0 = empty */
    union address *items;
};

static_assert((int)ADDRESSES_MAX <= UINT16_MAX, "a bucket holds any index + 1");

/* The bucket that has the address, or the empty one where it would be. */
static uint32_t bucket_of(const struct addresses *addresses, const union address *address)
{
    uint32_t at = (uint32_t)(address_hash(address) >> 32) & addresses->mask;

    while (addresses->buckets[at] &&
           memcmp(addresses->items[addresses->buckets[at] - 1].bytes, address->bytes, sizeof(address->bytes)) != 0)
        at = (at + 1) & addresses->mask;
    return at;
}

int addresses_build(struct addresses **out, const uint8_t *packed, size_t length)
{
    size_t count = length / sizeof(union address), buckets = 2;
    struct addresses *addresses;

    if (length % sizeof(union address) || count > ADDRESSES_MAX)
        return -EINVAL;
    while (buckets < count * 2)
        buckets *= 2;
    addresses = calloc(1, sizeof(*addresses));
    if (!addresses)
        return -ENOMEM;
    addresses->mask = (uint32_t)buckets - 1;
    addresses->buckets = calloc(buckets, sizeof(*addresses->buckets));
    addresses->items = calloc(count + 1, sizeof(*addresses->items)); /* + 1: calloc(0) may be NULL */
    if (!addresses->buckets || !addresses->items) {
        addresses_free(addresses);
        return -ENOMEM;
    }
    for (size_t i = 0; i < count; i++) {
        memcpy(addresses->items[i].bytes, packed + i * sizeof(union address), sizeof(union address));
        addresses->buckets[bucket_of(addresses, &addresses->items[i])] = (uint16_t)(i + 1);
    }
    *out = addresses;
    return 0;
}

void addresses_free(struct addresses *addresses)
{
    if (!addresses)
        return;
    free(addresses->buckets);
    free(addresses->items);
    free(addresses);
}

bool addresses_contain(const struct addresses *addresses, const union address *address)
{
    return addresses->buckets[bucket_of(addresses, address)] != 0;
}
