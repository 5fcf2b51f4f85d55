/* SPDX-License-Identifier: Apache-2.0 */
#include "pool.h"

#include <errno.h>
#include <stdio.h>
#include <stdlib.h>

/* Not assert(): it must hold in every build. */
static void require(bool holds, const char *what, uint32_t index)
{
    if (holds)
        return;
    fprintf(stderr, "mcrelay: pool slot %u: %s\n", index, what);
    abort();
}

int pool_open(struct pool *pool, uint32_t size)
{
    pool->slots = calloc(size, sizeof(*pool->slots));
    if (!pool->slots)
        return -ENOMEM;
    pool->size = size;
    pool->free = size;
    return 0;
}

void pool_close(struct pool *pool)
{
    free(pool->slots);
    pool->slots = NULL;
}

void pool_take(struct pool *pool, uint32_t index)
{
    require(index < pool->size, "filled but not ours", index);
    require(pool->slots[index].holders == 0, "filled while it was held", index);
    pool->slots[index] = (struct pool_slot){.holders = 1, .rule = POOL_NO_RULE, .datagrams = 1};
    pool->free--;
}

void pool_hold(struct pool *pool, uint32_t index)
{
    require(index < pool->size && pool->slots[index].holders > 0, "held after it was given back", index);
    require(pool->slots[index].holders < POOL_HOLDERS_MAX, "too many holders", index);
    pool->slots[index].holders++;
}

bool pool_release(struct pool *pool, uint32_t index)
{
    require(index < pool->size && pool->slots[index].holders > 0, "given back twice", index);
    if (--pool->slots[index].holders > 0)
        return false;
    pool->free++;
    return true;
}
