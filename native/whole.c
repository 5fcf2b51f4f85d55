/* SPDX-License-Identifier: Apache-2.0 */
#include "whole.h"

#include <errno.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/socket.h>

int wholes_open(struct wholes *wholes)
{
    void *memory = mmap(NULL, (size_t)WHOLES_MAX * WHOLE_BYTES, PROT_READ | PROT_WRITE,
                        MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);

    if (memory == MAP_FAILED)
        return -ENOMEM;
    *wholes = (struct wholes){.memory = memory};
    return 0;
}

void wholes_close(struct wholes *wholes)
{
    if (wholes->memory)
        munmap(wholes->memory, (size_t)WHOLES_MAX * WHOLE_BYTES);
    wholes->memory = NULL;
}

/* WHOLES_MAX if all are held. */
static uint32_t free_buffer(const struct wholes *wholes)
{
    uint32_t buffer = 0;

    while (buffer < WHOLES_MAX && (wholes->holder[buffer] || wholes->waiting == buffer + 1))
        buffer++;
    return buffer;
}

bool wholes_has_room(const struct wholes *wholes)
{
    return wholes->waiting || free_buffer(wholes) < WHOLES_MAX;
}

const uint8_t *wholes_take(struct wholes *wholes, int fd, uint32_t slot, size_t skip, const uint8_t *beginning,
                           size_t beginning_length, size_t length)
{
    uint32_t buffer;
    const uint8_t *bytes;

    if (!wholes->waiting) {
        ssize_t received;

        buffer = free_buffer(wholes);
        if (buffer == WHOLES_MAX)
            return NULL;
        received = recv(fd, wholes->memory + (size_t)buffer * WHOLE_BYTES, WHOLE_BYTES, MSG_DONTWAIT | MSG_TRUNC);
        if (received < 0 || received > WHOLE_BYTES)
            return NULL;
        wholes->waiting = buffer + 1;
        wholes->waiting_length = (size_t)received;
    }
    buffer = wholes->waiting - 1;
    bytes = wholes->memory + (size_t)buffer * WHOLE_BYTES + skip;
    if (wholes->waiting_length != skip + length || beginning_length > length ||
        memcmp(bytes, beginning, beginning_length) != 0)
        return NULL;
    wholes->waiting = 0;
    wholes->holder[buffer] = slot + 1;
    return bytes;
}

void wholes_release(struct wholes *wholes, uint32_t slot)
{
    for (uint32_t buffer = 0; buffer < WHOLES_MAX; buffer++)
        if (wholes->holder[buffer] == slot + 1)
            wholes->holder[buffer] = 0;
}
