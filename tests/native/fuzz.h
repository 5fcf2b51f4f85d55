/* SPDX-License-Identifier: Apache-2.0 */
/*
 * fuzz.h: the driver of a fuzz target where no fuzzer is at hand: inputs made by damaging seeds, always the same ones
 * for the same number.
 *
 *     fuzz_packet EXECUTIONS SEED [FILE...]
 *
 * Before those, each file is an input as it is: those in corpus/ are what libFuzzer has found to reach something new.
 *
 * With a compiler that brings libFuzzer, the target alone is what is wanted:
 *
 *     clang -g -O1 -fsanitize=fuzzer,address,undefined -DFUZZ_LIBFUZZER -Inative \
 *         tests/native/fuzz_packet.c native/packet.c
 */
#ifndef MCRELAY_TESTS_FUZZ_H
#define MCRELAY_TESTS_FUZZ_H

#include "check.h"

int LLVMFuzzerTestOneInput(const uint8_t *data, size_t size);

#ifndef FUZZ_LIBFUZZER

enum { FUZZ_INPUT_MAX = 4096 };

/* Write a sensible input of at most FUZZ_INPUT_MAX bytes into `out`; returns its length. */
static size_t fuzz_seed(uint8_t *out, uint64_t *state);

static size_t fuzz_damage(uint8_t *input, size_t length, uint64_t *state)
{
    static const uint8_t telling[] = {0, 1, 0x7f, 0x80, 0xff};
    uint32_t at = length ? random_below(state, (uint32_t)length) : 0;

    switch (random_below(state, 6)) {
    case 0:
        return length ? random_below(state, (uint32_t)length) : 0; /* cut */
    case 1:
        if (length < FUZZ_INPUT_MAX)
            input[length++] = (uint8_t)random_next(state);
        return length;
    case 2:
        if (length)
            input[at] ^= (uint8_t)(1u << random_below(state, 8));
        return length;
    case 3:
        if (length)
            input[at] = telling[random_below(state, sizeof(telling))];
        return length;
    case 4: /* a piece is gone */
        if (length)
            memmove(input + at, input + at + 1, --length - at);
        return length;
    default:
        if (length)
            input[at] = (uint8_t)random_next(state);
        return length;
    }
}

static void fuzz_file(const char *path)
{
    uint8_t input[FUZZ_INPUT_MAX], *exact;
    FILE *file = fopen(path, "rb");
    size_t length;

    check_case("%s", path);
    CHECK(file);
    length = fread(input, 1, sizeof(input), file);
    CHECK(!ferror(file) && !fclose(file));
    exact = exact_copy(input, length);
    LLVMFuzzerTestOneInput(exact, length);
    free(exact);
}

int main(int argc, char **argv)
{
    unsigned long executions = argc > 1 ? strtoul(argv[1], NULL, 0) : 100000;
    uint64_t state = argc > 2 ? strtoull(argv[2], NULL, 0) : 1;
    uint8_t input[FUZZ_INPUT_MAX];

    if (!state)
        state = 1;
    for (int i = 3; i < argc; i++)
        fuzz_file(argv[i]);
    for (unsigned long execution = 0; execution < executions; execution++) {
        size_t length = fuzz_seed(input, &state);
        uint8_t *exact;

        check_case("execution %lu", execution);
        for (uint32_t damages = random_below(&state, 5); damages; damages--)
            length = fuzz_damage(input, length, &state);
        exact = exact_copy(input, length);
        LLVMFuzzerTestOneInput(exact, length);
        free(exact);
    }
    return 0;
}

#endif
#endif
