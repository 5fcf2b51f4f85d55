/* SPDX-License-Identifier: Apache-2.0 */
/* test_addresses.c: a set has the addresses that it was built from and no other. */
#include "addresses.h"

#include "check.h"

#include <arpa/inet.h>
#include <errno.h>

static union address ipv4(uint32_t address)
{
    return address_from_ipv4(htonl(address));
}

/* Built from a block of exactly the size, gone before the set is used. */
static int build(struct addresses **out, const union address *items, size_t length)
{
    uint8_t *packed = exact_copy((const uint8_t *)items, length);
    int error = addresses_build(out, packed, length);

    free(packed);
    return error;
}

static void test_few(void)
{
    const union address other = ipv4(0xc0000202), unmapped = {.words = {0, 0, 0, htonl(0xc0000201)}}, none = {0};
    union address items[] = {ipv4(0xc0000201), {.bytes = {0x20, 1, 0x0d, 0xb8, [15] = 1}}, ipv4(0xc0000201)};
    struct addresses *set = NULL;

    check_case("none");
    CHECK_EQUAL(addresses_build(&set, NULL, 0), 0);
    CHECK(!addresses_contain(set, &items[0]));
    CHECK(!addresses_contain(set, &none));
    addresses_free(set);
    addresses_free(NULL);
    check_case("three, two of them the same");
    CHECK_EQUAL(build(&set, items, sizeof(items)), 0);
    CHECK(addresses_contain(set, &items[0]));
    CHECK(addresses_contain(set, &items[1]));
    CHECK(!addresses_contain(set, &other));
    CHECK(!addresses_contain(set, &unmapped));
    CHECK(!addresses_contain(set, &none));
    for (unsigned bit = 0; bit < 128; bit++) {
        items[1].bytes[bit / 8] ^= (uint8_t)(1 << bit % 8);
        CHECK(!addresses_contain(set, &items[1]));
        items[1].bytes[bit / 8] ^= (uint8_t)(1 << bit % 8);
    }
    addresses_free(set);
}

/* As many as there can be, counted up by `step`. */
static void test_most(uint32_t step)
{
    static union address items[ADDRESSES_MAX + 1];
    struct addresses *set = NULL;

    check_case("most, in steps of %u", step);
    for (uint32_t i = 0; i <= ADDRESSES_MAX; i++)
        items[i] = ipv4(0x0a000000 + i * step);
    CHECK_EQUAL(build(&set, items, ADDRESSES_MAX * sizeof(items[0])), 0);
    for (uint32_t i = 0; i <= ADDRESSES_MAX; i++)
        CHECK_EQUAL(addresses_contain(set, &items[i]), i < ADDRESSES_MAX);
    addresses_free(set);
}

static void test_refused(void)
{
    static const union address items[ADDRESSES_MAX + 1];
    struct addresses *set = NULL;

    check_case("refused");
    CHECK_EQUAL(build(&set, items, sizeof(items)), -EINVAL);
    CHECK_EQUAL(build(&set, items, 15), -EINVAL);
    CHECK_EQUAL(build(&set, items, 33), -EINVAL);
    CHECK(!set);
}

int main(void)
{
    test_few();
    test_most(1);
    test_most(256);
    test_most(65536);
    test_refused();
    return 0;
}
