/* SPDX-License-Identifier: Apache-2.0 */
/*
 * test_pool.c: a slot goes back with its last holder, and only then; whoever breaks the accounting ends the process.
 * The latter is seen from outside: a child breaks it, and has to die by SIGABRT with the reason on its standard error.
 */
#include "pool.h"

#include "check.h"

#include <errno.h>
#include <signal.h>
#include <sys/resource.h>
#include <sys/wait.h>

enum { SLOTS = 8, RANDOM_RUNS = 200000 };

static void test_holders(void)
{
    struct pool pool;

    check_case("holders");
    CHECK_EQUAL(pool_open(&pool, SLOTS), 0);
    CHECK_EQUAL(pool.size, SLOTS);
    CHECK_EQUAL(pool.free, SLOTS);
    pool_take(&pool, 3);
    CHECK_EQUAL(pool.free, SLOTS - 1);
    CHECK_EQUAL(pool.slots[3].holders, 1);
    CHECK_EQUAL(pool.slots[3].copies_sent, 0);
    CHECK_EQUAL(pool.slots[3].reason, DROP_NONE);
    CHECK_EQUAL(pool.slots[3].rule, POOL_NO_RULE);
    pool_hold(&pool, 3);
    pool_hold(&pool, 3);
    CHECK(!pool_release(&pool, 3));
    CHECK(!pool_release(&pool, 3));
    CHECK_EQUAL(pool.free, SLOTS - 1);
    CHECK(pool_release(&pool, 3));
    CHECK_EQUAL(pool.free, SLOTS);
    pool_close(&pool);
}

/* What one packet left behind in a slot is not there for the next. */
static void test_fresh_state(void)
{
    struct pool pool;

    check_case("state of a slot taken again");
    CHECK_EQUAL(pool_open(&pool, 1), 0);
    pool_take(&pool, 0);
    pool.slots[0].copies_sent = 1;
    pool.slots[0].reason = DROP_EGRESS_FULL;
    pool.slots[0].rule = 7;
    CHECK(pool_release(&pool, 0));
    pool_take(&pool, 0);
    CHECK_EQUAL(pool.slots[0].holders, 1);
    CHECK_EQUAL(pool.slots[0].copies_sent, 0);
    CHECK_EQUAL(pool.slots[0].reason, DROP_NONE);
    CHECK_EQUAL(pool.slots[0].rule, POOL_NO_RULE);
    CHECK(pool_release(&pool, 0));
    pool_close(&pool);
}

/* All slots at once, each with as many holders as a slot can have. */
static void test_most_holders(void)
{
    struct pool pool;

    check_case("most holders");
    CHECK_EQUAL(pool_open(&pool, SLOTS), 0);
    for (uint32_t slot = 0; slot < SLOTS; slot++) {
        pool_take(&pool, slot);
        for (unsigned holders = 1; holders < (unsigned)POOL_HOLDERS_MAX; holders++)
            pool_hold(&pool, slot);
    }
    CHECK_EQUAL(pool.free, 0);
    for (uint32_t slot = 0; slot < SLOTS; slot++)
        for (unsigned holders = (unsigned)POOL_HOLDERS_MAX; holders; holders--)
            CHECK_EQUAL(pool_release(&pool, slot), holders == 1);
    CHECK_EQUAL(pool.free, SLOTS);
    pool_close(&pool);
}

/* Beside a count kept here, step by step. */
static void test_random(void)
{
    uint64_t state = UINT64_C(0x706f6f6c);
    unsigned holders[SLOTS] = {0}, taken = 0;
    struct pool pool;

    CHECK_EQUAL(pool_open(&pool, SLOTS), 0);
    for (unsigned run = 0; run < RANDOM_RUNS; run++) {
        uint32_t slot = random_below(&state, SLOTS);

        check_case("random step %u", run);
        if (holders[slot] == 0) {
            pool_take(&pool, slot);
            holders[slot] = 1;
            taken++;
        } else if (random_below(&state, 2)) {
            pool_hold(&pool, slot);
            holders[slot]++;
        } else {
            CHECK_EQUAL(pool_release(&pool, slot), --holders[slot] == 0);
            taken -= holders[slot] == 0;
        }
        CHECK_EQUAL(pool.free, SLOTS - taken);
        CHECK_EQUAL(pool.slots[slot].holders, holders[slot]);
    }
    pool_close(&pool);
}

static void release_twice(struct pool *pool)
{
    pool_take(pool, 2);
    pool_release(pool, 2);
    pool_release(pool, 2);
}

static void release_free(struct pool *pool)
{
    pool_release(pool, 2);
}

static void release_foreign(struct pool *pool)
{
    pool_release(pool, SLOTS);
}

static void take_held(struct pool *pool)
{
    pool_take(pool, 2);
    pool_take(pool, 2);
}

static void take_foreign(struct pool *pool)
{
    pool_take(pool, SLOTS);
}

static void hold_free(struct pool *pool)
{
    pool_hold(pool, 2);
}

static void hold_foreign(struct pool *pool)
{
    pool_hold(pool, UINT32_MAX);
}

static void hold_too_often(struct pool *pool)
{
    pool_take(pool, 2);
    for (unsigned holders = 1; holders <= (unsigned)POOL_HOLDERS_MAX; holders++)
        pool_hold(pool, 2);
}

static const struct offence {
    const char *name;
    void (*commit)(struct pool *pool);
    const char *message;
} offences[] = {
    {"released twice", release_twice, "mcrelay: pool slot 2: given back twice\n"},
    {"released when free", release_free, "mcrelay: pool slot 2: given back twice\n"},
    {"released, not of this pool", release_foreign, "mcrelay: pool slot 8: given back twice\n"},
    {"taken when held", take_held, "mcrelay: pool slot 2: filled while it was held\n"},
    {"taken, not of this pool", take_foreign, "mcrelay: pool slot 8: filled but not ours\n"},
    {"held when free", hold_free, "mcrelay: pool slot 2: held after it was given back\n"},
    {"held, not of this pool", hold_foreign, "mcrelay: pool slot 4294967295: held after it was given back\n"},
    {"held too often", hold_too_often, "mcrelay: pool slot 2: too many holders\n"},
};

static void child(const struct offence *offence, int standard_error)
{
    const struct rlimit no_core = {0};
    struct pool pool;

    setrlimit(RLIMIT_CORE, &no_core);
    if (pool_open(&pool, SLOTS) || dup2(standard_error, STDERR_FILENO) < 0)
        _exit(1);
    offence->commit(&pool);
    _exit(0);
}

static void test_offence(const struct offence *offence)
{
    char message[256];
    size_t length = 0;
    ssize_t size;
    int ends[2], status;
    pid_t pid;

    check_case("%s", offence->name);
    CHECK_EQUAL(pipe(ends), 0);
    pid = fork();
    CHECK(pid >= 0);
    if (pid == 0)
        child(offence, ends[1]);
    close(ends[1]);
    while ((size = read(ends[0], message + length, sizeof(message) - 1 - length)) > 0)
        length += (size_t)size;
    close(ends[0]);
    message[length] = 0;
    while (waitpid(pid, &status, 0) < 0)
        CHECK_EQUAL(errno, EINTR);
    CHECK(WIFSIGNALED(status));
    CHECK_EQUAL(WTERMSIG(status), SIGABRT);
    if (strcmp(message, offence->message) != 0)
        check_failed(__FILE__, __LINE__, "it said \"%s\", expected \"%s\"", message, offence->message);
}

int main(void)
{
    test_holders();
    test_fresh_state();
    test_most_holders();
    test_random();
    for (size_t i = 0; i < sizeof(offences) / sizeof(offences[0]); i++)
        test_offence(&offences[i]);
    return 0;
}
