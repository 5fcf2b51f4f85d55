/* SPDX-License-Identifier: Apache-2.0 */
#include "buffers.h"

#include <errno.h>
#include <stdlib.h>
#include <sys/mman.h>

static struct buffers *buffers_of(struct ingress *ingress)
{
    return (struct buffers *)ingress; /* base is its first member */
}

/* What is not written of it takes no memory, and need not be there. */
static void *map(size_t size)
{
    void *memory = mmap(NULL, size, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);

    return memory == MAP_FAILED ? NULL : memory;
}

int buffers_open(struct buffers *buffers, uint32_t slots, size_t slot_size)
{
    buffers->slot_size = slot_size;
    buffers->memory_size = slots * slot_size;
    buffers->memory = map(buffers->memory_size);
    buffers->ring_size = slots * sizeof(struct io_uring_buf);
    buffers->ring = map(buffers->ring_size);
    buffers->queue = calloc(slots, sizeof(*buffers->queue));
    if (!buffers->memory || !buffers->ring || !buffers->queue)
        return -ENOMEM;
    return pool_open(&buffers->base.pool, slots);
}

void buffers_free(struct ingress *ingress)
{
    struct buffers *buffers = buffers_of(ingress);

    if (buffers->memory)
        munmap(buffers->memory, buffers->memory_size);
    if (buffers->ring)
        munmap(buffers->ring, buffers->ring_size);
    free(buffers->queue);
    pool_close(&ingress->pool);
    free(buffers);
}

int buffers_enter(struct ingress *ingress, struct io_uring *ring)
{
    struct buffers *buffers = buffers_of(ingress);
    struct io_uring_buf_reg registration = {
        .ring_addr = (uint64_t)(uintptr_t)buffers->ring,
        .ring_entries = ingress->pool.size,
        .bgid = ingress->interface,
    };
    int error = io_uring_register_buf_ring(ring, &registration, 0);

    if (error)
        return error;
    io_uring_buf_ring_init(buffers->ring);
    for (uint32_t slot = 0; slot < ingress->pool.size; slot++)
        buffers_give_back(ingress, slot);
    buffers_publish(ingress);
    return 0;
}

void buffers_leave(struct ingress *ingress, struct io_uring *ring)
{
    io_uring_unregister_buf_ring(ring, ingress->interface);
}

void buffers_give_back(struct ingress *ingress, uint32_t slot)
{
    struct buffers *buffers = buffers_of(ingress);

    io_uring_buf_ring_add(buffers->ring, buffers->memory + slot * buffers->slot_size, (unsigned)buffers->slot_size,
                          (unsigned short)slot, io_uring_buf_ring_mask(ingress->pool.size), (int)buffers->returned);
    buffers->returned++;
}

void buffers_publish(struct ingress *ingress)
{
    struct buffers *buffers = buffers_of(ingress);

    if (buffers->returned)
        io_uring_buf_ring_advance(buffers->ring, (int)buffers->returned);
    buffers->returned = 0;
}

bool buffers_is_drained(const struct ingress *ingress)
{
    return ((const struct buffers *)ingress)->queue_count == 0;
}

bool buffers_suffice(const struct ingress *ingress)
{
    return ingress->pool.free >= (ingress->pool.size + 3) / 4;
}

void buffers_arm(struct buffers *buffers, struct io_uring_sqe *sqe, int fd)
{
    io_uring_prep_recvmsg_multishot(sqe, fd, &buffers->shape, 0);
    sqe->flags |= IOSQE_BUFFER_SELECT;
    sqe->buf_group = buffers->base.interface;
}

bool buffers_complete(struct buffers *buffers, const struct io_uring_cqe *cqe, uint16_t port,
                      struct counters_page *counters)
{
    struct pool *pool = &buffers->base.pool;
    uint32_t slot = cqe->flags >> IORING_CQE_BUFFER_SHIFT;

    if (!(cqe->flags & IORING_CQE_F_BUFFER)) {
        if (cqe->res == -ENOBUFS)
            count(&counters->pool_exhausted, 1);
        return false;
    }
    pool_take(pool, slot);
    buffers->queue[(buffers->queue_head + buffers->queue_count++) & (pool->size - 1)] =
        (struct filled){slot, cqe->res > 0 ? (uint32_t)cqe->res : 0, port};
    return true;
}

bool buffers_next(struct buffers *buffers, uint32_t *slot, struct frame *frame, struct io_uring_recvmsg_out **out,
                  uint16_t *port)
{
    const struct filled *filled = &buffers->queue[buffers->queue_head];
    const size_t head = sizeof(**out) + buffers->shape.msg_namelen + buffers->shape.msg_controllen;
    uint8_t *data = buffers->memory + filled->slot * buffers->slot_size;

    if (buffers->queue_count == 0)
        return false;
    buffers->queue_head = (buffers->queue_head + 1) & (buffers->base.pool.size - 1);
    buffers->queue_count--;
    *slot = filled->slot;
    *frame = (struct frame){0};
    if (filled->length < head) {
        frame->reason = DROP_TRUNCATED;
        return true;
    }
    *out = (struct io_uring_recvmsg_out *)data;
    *port = filled->port;
    frame->data = data + head;
    frame->length = filled->length - head;
    return true;
}
