/* SPDX-License-Identifier: Apache-2.0 */
/* commands.c: commands and their answers, on both threads. See core.h. */
#include "core.h"

#include "datagrams.h"
#include "receive.h"
#include "ring.h"

#include <errno.h>
#include <unistd.h>

/* --- on the engine's thread ----------------------------------------------------------------------------------------- */

void commands_answer(struct engine *engine, struct answer given)
{
    uint32_t tail = atomic_load_explicit(&engine->answers.tail, memory_order_relaxed);
    const uint64_t one = 1;
    ssize_t written;

    engine->answers.items[tail & (COMMANDS_MAX - 1)] = given;
    atomic_store_explicit(&engine->answers.tail, tail + 1, memory_order_release);
    written = write(engine->answer_fd, &one, sizeof(one));
    (void)written; /* EAGAIN: the counter is full, so it is signalled */
}

static int execute_attach(struct engine *engine, struct command *command)
{
    struct ingress *ingress = command->ingress;
    int error = engine->stopping                      ? -ECANCELED
                : engine->ingress[command->interface] ? -EEXIST
                                                      : ingress->kind->enter(ingress, &engine->ring);

    if (error)
        return error;
    engine->ingress[command->interface] = ingress;
    engine->attached[engine->attached_count++] = ingress;
    return 0;
}

static int execute_add(struct engine *engine, const struct command *command)
{
    struct ingress *ingress = engine->ingress[command->interface];

    if (!ingress || ingress->detaching || !ingress->kind->sockets)
        return -ENOENT;
    return ingress->kind->sockets->add(ingress, command->fd, command->number);
}

static void execute(struct engine *engine, struct command *command)
{
    struct answer given = {.public.ticket = command->ticket};
    struct ingress *ingress;
    struct egress *egress;

    switch (command->kind) {
    case ATTACH_INGRESS:
        given.public.result = execute_attach(engine, command);
        if (given.public.result)
            given.ingress = command->ingress;
        break;
    case DETACH_INGRESS:
        ingress = engine->ingress[command->interface];
        if (ingress && !ingress->detaching) {
            core_start_detach(engine, ingress, command->ticket);
            return;
        }
        given.public.result = -ENOENT;
        break;
    case ADD_SOCKET:
        given.public.result = execute_add(engine, command);
        break;
    case REMOVE_SOCKET:
        ingress = engine->ingress[command->interface];
        given.public.result = !ingress || !ingress->kind->sockets
                                  ? -ENOENT
                                  : ingress->kind->sockets->remove(ingress, command->number, command->ticket);
        if (!given.public.result)
            return; /* upkeep answers */
        break;
    case ATTACH_EGRESS:
        engine->egress[table_egress(command->interface, command->way)] = command->egress;
        break;
    case DETACH_EGRESS:
        egress = &engine->egress[table_egress(command->interface, command->way)];
        given.public.result = egress->fd < 0 ? -ENOENT : 0;
        egress->fd = -1;
        break;
    case SET_RULES:
        given.table = engine->table;
        engine->table = command->table;
        break;
    case SET_OWN_ADDRESSES:
        given.addresses = engine->own;
        engine->own = command->addresses;
        break;
    case OPEN_TAP:
        given.public.result =
            taps_open(&engine->taps, command->tap.rule, command->fd, command->tap.count, command->tap.snap);
        break;
    case CLOSE_TAP:
        given.public.result = taps_close(&engine->taps, command->fd);
        break;
    case PROBE:
        break;
    case STOP:
        if (engine->stopping) {
            given.public.result = -EALREADY;
            break;
        }
        engine->stopping = true;
        engine->stop_ticket = command->ticket;
        for (unsigned i = 0; i < engine->attached_count; i++)
            if (!engine->attached[i]->detaching)
                core_start_detach(engine, engine->attached[i], 0);
        return;
    }
    commands_answer(engine, given);
}

void commands_execute(struct engine *engine)
{
    uint32_t head = atomic_load_explicit(&engine->commands.head, memory_order_relaxed);

    engine->commands_waiting = false;
    while (head != atomic_load_explicit(&engine->commands.tail, memory_order_acquire)) {
        execute(engine, &engine->commands.items[head & (COMMANDS_MAX - 1)]);
        atomic_store_explicit(&engine->commands.head, ++head, memory_order_release);
    }
}

/* --- on the command side -------------------------------------------------------------------------------------------- */

static int64_t submit(struct engine *engine, struct command command)
{
    uint32_t tail = atomic_load_explicit(&engine->commands.tail, memory_order_relaxed);
    const uint64_t one = 1;
    ssize_t written;

    if (engine->outstanding == COMMANDS_MAX)
        return -EBUSY;
    engine->outstanding++;
    command.ticket = ++engine->last_ticket;
    engine->commands.items[tail & (COMMANDS_MAX - 1)] = command;
    atomic_store_explicit(&engine->commands.tail, tail + 1, memory_order_release);
    written = write(engine->command_fd, &one, sizeof(one));
    (void)written; /* EAGAIN: the counter is full, so it is signalled */
    return (int64_t)command.ticket;
}

static int64_t submit_ingress(struct engine *engine, unsigned interface, bool loopback, struct ingress *ingress)
{
    int64_t ticket;

    ingress->loopback = loopback;
    ticket = submit(engine, (struct command){.kind = ATTACH_INGRESS, .interface = interface, .ingress = ingress});
    if (ticket < 0)
        ingress_free(ingress);
    return ticket;
}

int64_t engine_attach_receive(struct engine *engine, unsigned interface, int fd, bool loopback, uint32_t mtu,
                              uint32_t slots)
{
    struct ingress *ingress;
    int error = interface < TABLE_INTERFACES_MAX ? receive_new(&ingress, (uint8_t)interface, fd, mtu, slots) : -EINVAL;

    return error ? error : submit_ingress(engine, interface, loopback, ingress);
}

int64_t engine_attach_ring(struct engine *engine, unsigned interface, int fd, bool loopback, uint32_t block_size,
                           uint32_t blocks, uint32_t frame_size)
{
    const struct ring_geometry geometry = {block_size, blocks, frame_size};
    struct ingress *ingress;
    int error = interface < TABLE_INTERFACES_MAX ? ring_new(&ingress, (uint8_t)interface, fd, &geometry) : -EINVAL;

    return error ? error : submit_ingress(engine, interface, loopback, ingress);
}

int64_t engine_attach_datagrams(struct engine *engine, unsigned interface, bool loopback, uint32_t slots)
{
    struct ingress *ingress;
    int error = interface < TABLE_INTERFACES_MAX ? datagrams_new(&ingress, (uint8_t)interface, slots) : -EINVAL;

    return error ? error : submit_ingress(engine, interface, loopback, ingress);
}

int64_t engine_add_socket(struct engine *engine, unsigned interface, int fd, uint32_t number)
{
    if (interface >= TABLE_INTERFACES_MAX || fd < 0)
        return -EINVAL;
    return submit(engine, (struct command){.kind = ADD_SOCKET, .interface = interface, .fd = fd, .number = number});
}

int64_t engine_remove_socket(struct engine *engine, unsigned interface, uint32_t number)
{
    if (interface >= TABLE_INTERFACES_MAX)
        return -EINVAL;
    return submit(engine, (struct command){.kind = REMOVE_SOCKET, .interface = interface, .number = number});
}

static int64_t submit_plain(struct engine *engine, enum command_kind kind, unsigned interface)
{
    if (interface >= TABLE_INTERFACES_MAX)
        return -EINVAL;
    return submit(engine, (struct command){.kind = kind, .interface = interface});
}

int64_t engine_detach_ingress(struct engine *engine, unsigned interface)
{
    return submit_plain(engine, DETACH_INGRESS, interface);
}

int64_t engine_attach_egress(struct engine *engine, unsigned interface, unsigned way, int fd, uint32_t mtu,
                             const uint8_t *link, size_t length)
{
    struct egress_link given;

    if (interface >= TABLE_INTERFACES_MAX || way >= WAYS || fd < 0 || length != sizeof(given) ||
        (way_writes_headers(way) && mtu < HEADERS_MTU_MIN))
        return -EINVAL;
    memcpy(&given, link, sizeof(given));
    if (given.header != 0 && given.header != ETHERNET_HEADER)
        return -EINVAL;
    return submit(engine, (struct command){.kind = ATTACH_EGRESS, .interface = interface, .way = way,
                                           .egress = egress_of(interface, way, fd, mtu, &given)});
}

int64_t engine_detach_egress(struct engine *engine, unsigned interface, unsigned way)
{
    if (interface >= TABLE_INTERFACES_MAX || way >= WAYS)
        return -EINVAL;
    return submit(engine, (struct command){.kind = DETACH_EGRESS, .interface = interface, .way = way});
}

int64_t engine_set_rules(struct engine *engine, const uint8_t *records, size_t length)
{
    struct table *table;
    int64_t ticket;
    int error = table_build(&table, records, length);

    if (error)
        return error;
    ticket = submit(engine, (struct command){.kind = SET_RULES, .table = table});
    if (ticket < 0)
        table_free(table);
    return ticket;
}

int64_t engine_set_own_addresses(struct engine *engine, const uint8_t *packed, size_t length)
{
    struct addresses *addresses;
    int64_t ticket;
    int error = addresses_build(&addresses, packed, length);

    if (error)
        return error;
    ticket = submit(engine, (struct command){.kind = SET_OWN_ADDRESSES, .addresses = addresses});
    if (ticket < 0)
        addresses_free(addresses);
    return ticket;
}

int64_t engine_open_tap(struct engine *engine, uint32_t rule, int fd, uint64_t count, uint32_t snap)
{
    return submit(engine, (struct command){.kind = OPEN_TAP, .fd = fd, .tap = {count, rule, snap}});
}

int64_t engine_close_tap(struct engine *engine, int fd)
{
    return submit(engine, (struct command){.kind = CLOSE_TAP, .fd = fd});
}

int64_t engine_probe(struct engine *engine)
{
    return submit_plain(engine, PROBE, 0);
}

int64_t engine_stop(struct engine *engine)
{
    return submit_plain(engine, STOP, 0);
}

int engine_answer(struct engine *engine, struct engine_answer *out)
{
    uint32_t head = atomic_load_explicit(&engine->answers.head, memory_order_relaxed);
    struct answer *answer;

    if (head == atomic_load_explicit(&engine->answers.tail, memory_order_acquire))
        return 0;
    answer = &engine->answers.items[head & (COMMANDS_MAX - 1)];
    *out = answer->public;
    ingress_free(answer->ingress);
    table_free(answer->table);
    addresses_free(answer->addresses);
    atomic_store_explicit(&engine->answers.head, head + 1, memory_order_release);
    engine->outstanding--;
    return 1;
}

void commands_drain(struct engine *engine)
{
    struct engine_answer ignored;
    uint32_t head = atomic_load(&engine->commands.head);

    while (engine_answer(engine, &ignored))
        ;
    for (; head != atomic_load(&engine->commands.tail); head++) {
        struct command *command = &engine->commands.items[head & (COMMANDS_MAX - 1)];

        ingress_free(command->ingress);
        table_free(command->table);
        addresses_free(command->addresses);
    }
}
