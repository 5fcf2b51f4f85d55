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

static bool is_waiting(const struct wholes *wholes, uint32_t buffer)
{
    for (uint32_t i = 0; i < wholes->waiting_count; i++)
        if (wholes->waiting[i].buffer == buffer)
            return true;
    return false;
}

/* WHOLES_MAX if all are in use. */
static uint32_t free_buffer(const struct wholes *wholes)
{
    uint32_t buffer = 0;

    while (buffer < WHOLES_MAX && (wholes->holder[buffer] || is_waiting(wholes, buffer)))
        buffer++;
    return buffer;
}

bool wholes_has_room(const struct wholes *wholes)
{
    return wholes->waiting_count || free_buffer(wholes) < WHOLES_MAX;
}

/* Read the next copy of the queue behind those that wait. False if there is none, or no room for it. */
static bool read_copy(struct wholes *wholes, int fd)
{
    uint32_t buffer = free_buffer(wholes);
    ssize_t received = -1;

    if (wholes->waiting_count == 2 || buffer == WHOLES_MAX)
        return false;
    /* The second time because an error of the interface's is told once, in place of what is there. */
    for (unsigned attempt = 0; attempt < 2 && received < 0; attempt++)
        received = recv(fd, wholes->memory + (size_t)buffer * WHOLE_BYTES, WHOLE_BYTES, MSG_DONTWAIT | MSG_TRUNC);
    if (received < 0 || received > WHOLE_BYTES)
        return false;
    wholes->waiting[wholes->waiting_count].buffer = buffer;
    wholes->waiting[wholes->waiting_count++].length = (size_t)received;
    return true;
}

const uint8_t *wholes_take(struct wholes *wholes, int fd, uint32_t slot, size_t skip, const uint8_t *beginning,
                           size_t beginning_length, size_t length)
{
    if (beginning_length > length)
        return NULL;
    for (uint32_t i = 0; i < wholes->waiting_count || read_copy(wholes, fd); i++) {
        uint32_t buffer = wholes->waiting[i].buffer;
        const uint8_t *bytes = wholes->memory + (size_t)buffer * WHOLE_BYTES + skip;

        if (wholes->waiting[i].length != skip + length || memcmp(bytes, beginning, beginning_length) != 0)
            continue;
        wholes->holder[buffer] = slot + 1;
        /* What is older has no slot any more. */
        wholes->waiting_count -= i + 1;
        if (wholes->waiting_count)
            wholes->waiting[0] = wholes->waiting[1];
        wholes->misses = 0;
        return bytes;
    }
    /* Slots whose copies a dead worker took are at most those that it held. */
    if (++wholes->misses > WHOLES_MAX) {
        wholes->waiting_count = 0;
        wholes->misses = 0;
    }
    return NULL;
}

void wholes_release(struct wholes *wholes, uint32_t slot)
{
    for (uint32_t buffer = 0; buffer < WHOLES_MAX; buffer++)
        if (wholes->holder[buffer] == slot + 1)
            wholes->holder[buffer] = 0;
}
