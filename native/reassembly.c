/* SPDX-License-Identifier: Apache-2.0 */
#include "reassembly.h"

#include <stdio.h>
#include <stdlib.h>
#include <sys/mman.h>

enum {
    PLACES = REASSEMBLY_WAITING_MAX + REASSEMBLY_HELD_MAX,
    HEADER = 40,
    PAYLOAD_MAX = 65535, /* behind IPv6's own header */
    UNIT = 8,            /* fragments begin at multiples of it, and end there but for the last */
    UNITS = (PAYLOAD_MAX + UNIT) / UNIT,
    WORD_BITS = 64,
};

static_assert(PLACES <= UINT8_MAX, "a handle is index + 1");
static_assert(UNITS % WORD_BITS == 0, "bits fill their words");

enum state {
    FREE = 0,
    WAITING,
    SPOILT, /* nothing of it is wanted any more */
    HELD,   /* complete */
};

struct key {
    union address source;
    union address destination;
    uint32_t identification;
    uint16_t vlan;
    uint8_t interface;
    uint8_t zero;
};

static_assert(sizeof(struct key) == 40, "compared and hashed as bytes");

struct bits {
    uint64_t words[UNITS / WORD_BITS];
};

struct datagram {
    struct key key;
    uint64_t since_ns;
    uint64_t number;    /* in order of their first fragments */
    uint32_t fragments; /* that are there */
    uint32_t there;     /* bytes */
    uint32_t furthest;  /* end of the fragment that reaches furthest */
    uint32_t end;       /* 0: not known yet */
    uint32_t before;    /* extension headers that stood before it, of the first fragment */
    struct bits filled; /* units that are there */
    struct bits begins; /* units that fragments begin with */
};

struct reassembly {
    uint32_t waiting; /* or spoilt */
    uint32_t held;
    uint64_t last_number;
    uint8_t state[PLACES];
    uint32_t hash[PLACES]; /* of keys: what is looked through is short */
    struct datagram datagrams[PLACES];
    uint8_t memory[PLACES][HEADER + PAYLOAD_MAX + 1]; /* the last fills it up to a unit */
};

struct reassembly *reassembly_new(void)
{
    void *memory = mmap(NULL, sizeof(struct reassembly), PROT_READ | PROT_WRITE,
                        MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);

    return memory == MAP_FAILED ? NULL : memory; /* zeros: all is free */
}

void reassembly_free(struct reassembly *reassembly)
{
    if (reassembly)
        munmap(reassembly, sizeof(*reassembly));
}

/* --- units ---------------------------------------------------------------------------------------------------------- */

static bool bit(const struct bits *bits, size_t unit)
{
    return bits->words[unit / WORD_BITS] >> unit % WORD_BITS & 1;
}

/* Those of word `word` that lie in [from, to). */
static uint64_t mask(size_t word, size_t from, size_t to)
{
    uint64_t result = UINT64_MAX;

    if (word == from / WORD_BITS)
        result &= UINT64_MAX << from % WORD_BITS;
    if (word == to / WORD_BITS)
        result &= ~(UINT64_MAX << to % WORD_BITS);
    return result;
}

/* Whether any unit of [from, to) has its bit. */
static bool any(const struct bits *bits, size_t from, size_t to)
{
    for (size_t word = from / WORD_BITS; word * WORD_BITS < to; word++)
        if (bits->words[word] & mask(word, from, to))
            return true;
    return false;
}

static bool all(const struct bits *bits, size_t from, size_t to)
{
    for (size_t word = from / WORD_BITS; word * WORD_BITS < to; word++)
        if (~bits->words[word] & mask(word, from, to))
            return false;
    return true;
}

static void fill(struct bits *bits, size_t from, size_t to)
{
    for (size_t word = from / WORD_BITS; word * WORD_BITS < to; word++)
        bits->words[word] |= mask(word, from, to);
}

/* --- places --------------------------------------------------------------------------------------------------------- */

static uint32_t hash_of(const struct key *key)
{
    uint64_t h = address_hash(&key->source) ^ key->identification;

    h = h * ADDRESS_MULTIPLIER ^ address_hash(&key->destination);
    return (uint32_t)((h ^ ((uint64_t)key->vlan << 8 | key->interface)) * ADDRESS_MULTIPLIER >> 32);
}

/* PLACES if there is none. */
static unsigned find(const struct reassembly *r, const struct key *key, uint32_t hash)
{
    unsigned place = 0;

    while (place < PLACES && !(r->hash[place] == hash && (r->state[place] == WAITING || r->state[place] == SPOILT) &&
                               !memcmp(&r->datagrams[place].key, key, sizeof(*key))))
        place++;
    return place;
}

/* Give up a packet that is not complete. Returns how many fragments are lost with it. */
static uint32_t lose(struct reassembly *r, unsigned place)
{
    r->waiting--;
    r->state[place] = FREE;
    return r->datagrams[place].fragments;
}

static bool is_late(const struct reassembly *r, unsigned place, uint64_t now_ns)
{
    return now_ns - r->datagrams[place].since_ns >= REASSEMBLY_TIMEOUT_NS;
}

static bool is_incomplete(const struct reassembly *r, unsigned place)
{
    return r->state[place] == WAITING || r->state[place] == SPOILT;
}

static unsigned oldest(const struct reassembly *r)
{
    unsigned found = PLACES;

    for (unsigned place = 0; place < PLACES; place++)
        if (is_incomplete(r, place) &&
            (found == PLACES || r->datagrams[place].number < r->datagrams[found].number))
            found = place;
    return found;
}

static unsigned open_place(struct reassembly *r, const struct key *key, uint32_t hash, uint64_t now_ns, uint32_t *lost)
{
    unsigned place = 0;

    if (r->waiting == REASSEMBLY_WAITING_MAX)
        *lost += lose(r, oldest(r));
    while (r->state[place] != FREE)
        place++;
    r->state[place] = WAITING;
    r->hash[place] = hash;
    r->waiting++;
    r->datagrams[place] = (struct datagram){.key = *key, .since_ns = now_ns, .number = ++r->last_number};
    return place;
}

/* --- fragments ------------------------------------------------------------------------------------------------------ */

static size_t end_of(const struct packet_fragment *f)
{
    return f->offset + f->length;
}

/* It may be part of a packet. */
static bool is_sound(const struct packet_fragment *f)
{
    return f->length && !(f->more && f->length % UNIT) && f->before + end_of(f) <= PAYLOAD_MAX && !f->headless;
}

static size_t first_unit(const struct packet_fragment *f)
{
    return f->offset / UNIT;
}

static size_t unit_behind(const struct packet_fragment *f)
{
    return (end_of(f) + UNIT - 1) / UNIT;
}

/* One of the fragments that are there is just the same. */
static bool is_duplicate(const struct datagram *d, const uint8_t *payload, const struct packet_fragment *f)
{
    size_t from = first_unit(f), to = unit_behind(f);

    return all(&d->filled, from, to) && bit(&d->begins, from) && !any(&d->begins, from + 1, to) &&
           (to == UNITS || !bit(&d->filled, to) || bit(&d->begins, to)) &&
           (f->more ? !d->end || end_of(f) < d->end : end_of(f) == d->end) && !memcmp(payload + f->offset, f->piece, f->length);
}

/* It cannot be of the same packet as those that are there. */
static bool is_contradiction(const struct datagram *d, const struct packet_fragment *f)
{
    size_t end = end_of(f);

    if (d->end ? end > d->end || (!f->more && end != d->end) : !f->more && end < d->furthest)
        return true;
    return any(&d->filled, first_unit(f), unit_behind(f));
}

static void insert(struct datagram *d, uint8_t *packet, const struct packet_fragment *f)
{
    memcpy(packet + HEADER + f->offset, f->piece, f->length);
    fill(&d->filled, first_unit(f), unit_behind(f));
    fill(&d->begins, first_unit(f), first_unit(f) + 1);
    d->fragments++;
    d->there += (uint32_t)f->length;
    if (end_of(f) > d->furthest)
        d->furthest = (uint32_t)end_of(f);
    if (!f->more)
        d->end = (uint32_t)end_of(f);
    if (f->offset == 0) {
        memcpy(packet, f->header, HEADER);
        packet[6] = f->next;
        d->before = (uint32_t)f->before;
    }
}

static void require(bool holds, const char *what)
{
    if (holds)
        return;
    fprintf(stderr, "mcrelay: reassembly: %s\n", what);
    abort();
}

/* Complete, unless it is too long with the headers that each fragment had. */
static uint8_t complete(struct reassembly *r, unsigned place, uint32_t *lost)
{
    struct datagram *d = &r->datagrams[place];

    if (d->before + d->end > PAYLOAD_MAX) {
        *lost += lose(r, place);
        return 0;
    }
    r->memory[place][4] = (uint8_t)(d->end >> 8);
    r->memory[place][5] = (uint8_t)d->end;
    require(reassembly_has_room(r), "more packets are held than may be");
    r->state[place] = HELD;
    r->waiting--;
    r->held++;
    return (uint8_t)(place + 1);
}

uint8_t reassembly_add(struct reassembly *r, const struct packet_fragment *f, uint8_t interface, uint16_t vlan,
                       uint64_t now_ns, uint32_t *lost)
{
    const struct key key = {f->source, f->destination, f->identification, vlan, interface, 0};
    const uint32_t hash = hash_of(&key);
    struct datagram *d;
    unsigned place;

    if (!is_sound(f)) {
        ++*lost;
        return 0;
    }
    place = find(r, &key, hash);
    if (place != PLACES && is_late(r, place, now_ns)) {
        *lost += lose(r, place);
        place = PLACES;
    }
    if (place == PLACES)
        place = open_place(r, &key, hash, now_ns, lost);
    d = &r->datagrams[place];
    if (r->state[place] == SPOILT || is_duplicate(d, r->memory[place] + HEADER, f)) {
        ++*lost;
        return 0;
    }
    if (is_contradiction(d, f)) {
        *lost += d->fragments + 1;
        d->fragments = 0;
        r->state[place] = SPOILT;
        return 0;
    }
    insert(d, r->memory[place], f);
    return d->there == d->end ? complete(r, place, lost) : 0;
}

/* --- packets -------------------------------------------------------------------------------------------------------- */

/* A packet that is sent after its release would be a stranger's. */
static unsigned place_of(const struct reassembly *r, uint8_t handle)
{
    require(handle && handle <= PLACES && r->state[handle - 1] == HELD, "a packet is used that is not held");
    return handle - 1u;
}

bool reassembly_has_room(const struct reassembly *r)
{
    return r->held < REASSEMBLY_HELD_MAX;
}

const uint8_t *reassembly_packet(const struct reassembly *r, uint8_t handle, size_t *length)
{
    unsigned place = place_of(r, handle);

    *length = HEADER + r->datagrams[place].end;
    return r->memory[place];
}

void reassembly_release(struct reassembly *r, uint8_t handle)
{
    r->state[place_of(r, handle)] = FREE;
    r->held--;
}

bool reassembly_waits(const struct reassembly *r)
{
    return r->waiting;
}

uint32_t reassembly_expire(struct reassembly *r, uint64_t now_ns)
{
    uint32_t lost = 0;

    for (unsigned place = 0; r->waiting && place < PLACES; place++)
        if (is_incomplete(r, place) && is_late(r, place, now_ns))
            lost += lose(r, place);
    return lost;
}

uint32_t reassembly_forget(struct reassembly *r, uint8_t interface)
{
    uint32_t lost = 0;

    for (unsigned place = 0; r->waiting && place < PLACES; place++)
        if (is_incomplete(r, place) && r->datagrams[place].key.interface == interface)
            lost += lose(r, place);
    return lost;
}
