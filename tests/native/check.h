/* SPDX-License-Identifier: Apache-2.0 */
/*
 * check.h: assertions for the tests of the C core, and the two things that most of them need: reproducible random
 * numbers, and buffers of exactly the size that the code under test is told, so that a sanitizer sees one byte too
 * many.
 *
 * A failed check prints where, what and in which case, and ends the process: a test is a program that exits with 0.
 */
#ifndef MCRELAY_TESTS_CHECK_H
#define MCRELAY_TESTS_CHECK_H

#include <inttypes.h>
#include <stdarg.h>
#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>

__attribute__((weak)) char check_context[160]; /* one for all files of a program */

/* Name the case that the following checks belong to. */
__attribute__((format(printf, 1, 2))) static inline void check_case(const char *format, ...)
{
    va_list arguments;

    va_start(arguments, format);
    vsnprintf(check_context, sizeof(check_context), format, arguments);
    va_end(arguments);
}

__attribute__((noreturn, format(printf, 3, 4))) static inline void check_failed(const char *file, int line,
                                                                                const char *format, ...)
{
    va_list arguments;

    fprintf(stderr, "%s:%d: ", file, line);
    va_start(arguments, format);
    vfprintf(stderr, format, arguments);
    va_end(arguments);
    fprintf(stderr, check_context[0] ? " [%s]\n" : "\n", check_context);
    fflush(NULL);
    _exit(1); /* not exit(): other threads may be at work, and what is left allocated is no news */
}

#define CHECK(condition)                                                                                               \
    do {                                                                                                               \
        if (!(condition))                                                                                              \
            check_failed(__FILE__, __LINE__, "not true: %s", #condition);                                              \
    } while (0)

#define CHECK_EQUAL(actual, expected)                                                                                  \
    do {                                                                                                               \
        intmax_t check_actual = (intmax_t)(actual), check_expected = (intmax_t)(expected);                             \
        if (check_actual != check_expected)                                                                            \
            check_failed(__FILE__, __LINE__, "%s is %" PRIdMAX ", expected %s = %" PRIdMAX, #actual, check_actual,     \
                         #expected, check_expected);                                                                   \
    } while (0)

#define CHECK_BYTES(actual, expected, length)                                                                          \
    do {                                                                                                               \
        const uint8_t *check_actual = (const uint8_t *)(actual), *check_expected = (const uint8_t *)(expected);        \
        for (size_t check_at = 0; check_at < (size_t)(length); check_at++)                                             \
            if (check_actual[check_at] != check_expected[check_at])                                                    \
                check_failed(__FILE__, __LINE__, "%s[%zu] is 0x%02x, expected 0x%02x", #actual, check_at,              \
                             check_actual[check_at], check_expected[check_at]);                                        \
    } while (0)

/* xorshift64* (Vigna, "An experimental exploration of Marsaglia's xorshift generators, scrambled"). No seed of 0. */
static inline uint64_t random_next(uint64_t *state)
{
    *state ^= *state >> 12;
    *state ^= *state << 25;
    *state ^= *state >> 27;
    return *state * UINT64_C(0x2545f4914f6cdd1d);
}

static inline uint32_t random_below(uint64_t *state, uint32_t limit)
{
    return (uint32_t)((random_next(state) >> 32) * limit >> 32);
}

/* A copy in a heap block of exactly `length` bytes; free() it. */
static inline uint8_t *exact_copy(const uint8_t *bytes, size_t length)
{
    uint8_t *copy = malloc(length);

    CHECK(copy || !length);
    if (length)
        memcpy(copy, bytes, length);
    return copy;
}

#endif
