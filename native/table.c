/* SPDX-License-Identifier: Apache-2.0 */
#include "table.h"

#include <errno.h>
#include <stdlib.h>

enum {
    PREFIX_MAX = 128,
    PREFIX_MAPPED = 96, /* a shorter prefix is of IPv6 alone */
    SHAPES_MAX = (PREFIX_MAX + 1) * 4,
    VLAN_MAX = 4094,
    DSCP_MAX = 63,
    FLAGS_ALL = 2 * OUTPUT_SPLIT_HORIZON - 1,
    FLAGS_OF_HEADERS = OUTPUT_KEEP_SOURCE | OUTPUT_KEEP_SOURCE_PORT,
    FLAGS_OF_DROPS = OUTPUT_PAUSED | OUTPUT_SPLIT_HORIZON,
};

struct shape {
    uint64_t mask[2]; /* network byte order */
    uint64_t traits;  /* its number, in place */
    uint16_t port_mask;
    uint8_t prefix;
    bool has_source;
};

struct table {
    uint32_t rules_count;
    uint32_t mask; /* buckets - 1; at most half of the buckets are used, so a probe always ends */
    uint32_t *buckets; /* index into rules + 1, 0 = empty */
    struct table_rule *rules;
    struct table_output *outputs;
    struct shape *shapes; /* the most specific first */
    uint32_t shapes_count;
    bool only_exact; /* the only shape is that of one address and port, and any source; its traits are 0 */
};

/* Places in `traits`: port, ingress, VLAN, protocol, shape. */
static uint64_t traits_of(uint16_t port, uint16_t ingress, uint16_t vlan, uint8_t protocol)
{
    return port | (uint64_t)(ingress & 0xff) << 16 | (uint64_t)vlan << 24 | (uint64_t)protocol << 40;
}

static uint64_t traits_of_shape(uint32_t number)
{
    return (uint64_t)number << 48;
}

static void apply(const uint64_t mask[2], union address *address)
{
    uint64_t halves[2];

    memcpy(halves, address->bytes, sizeof(halves));
    halves[0] &= mask[0];
    halves[1] &= mask[1];
    memcpy(address->bytes, halves, sizeof(halves));
}

static void make_mask(uint64_t mask[2], unsigned prefix)
{
    uint8_t bytes[16] = {0};

    for (unsigned bit = 0; bit < prefix; bit++)
        bytes[bit / 8] |= (uint8_t)(0x80 >> bit % 8);
    memcpy(mask, bytes, sizeof(bytes));
}

/* `source`: NULL for a shape without. */
static inline uint64_t hash(const union address *group, const union address *source, uint64_t traits)
{
    uint64_t h = address_hash(group);

    h = (h ^ h >> 29 ^ traits ^ traits >> 32) * ADDRESS_MULTIPLIER;
    if (source)
        h = (h ^ h >> 29 ^ address_hash(source)) * ADDRESS_MULTIPLIER;
    return h;
}

/* Where the search for a hash begins: its upper bits are the best. */
static uint32_t bucket(const struct table *table, uint64_t hash)
{
    return (uint32_t)(hash >> 32) & table->mask;
}

static inline const struct table_rule *probe(const struct table *table, const union address *group,
                                             const union address *source, uint64_t traits)
{
    uint32_t at = bucket(table, hash(group, source, traits));

    while (table->buckets[at]) {
        const struct table_rule *rule = &table->rules[table->buckets[at] - 1];

        if (rule->traits == traits && address_equals(&rule->group, group) &&
            (!source || address_equals(&rule->source, source)))
            return rule;
        at = (at + 1) & table->mask;
    }
    return NULL;
}

/* --- records -------------------------------------------------------------------------------------------------------- */

static bool is_zero(const uint8_t *bytes, size_t length)
{
    uint8_t any = 0;

    for (size_t i = 0; i < length; i++)
        any |= bytes[i];
    return !any;
}

static union address address_in(const uint8_t bytes[16])
{
    union address address;

    memcpy(address.bytes, bytes, sizeof(address.bytes));
    return address;
}

static bool rule_is_sound(const struct table_rule_record *record)
{
    const union address group = address_in(record->group), source = address_in(record->source);
    union address cut = group;
    uint64_t mask[2];

    if (record->ingress >= TABLE_INTERFACES_MAX || record->counter >= COUNTERS_RULES_MAX ||
        record->vlan > VLAN_MAX || record->prefix > PREFIX_MAX || !is_zero(record->reserved, sizeof(record->reserved)))
        return false;
    if (record->protocol != PROTOCOL_UDP && (record->protocol != PROTOCOL_ESP || record->port))
        return false;
    make_mask(mask, record->prefix);
    apply(mask, &cut);
    if (!address_equals(&group, &cut))
        return false;
    return address_is_any(&source) ||
           address_is_ipv4(&source) == (record->prefix >= PREFIX_MAPPED && address_is_ipv4(&group));
}

/* Whether an address may be one of this way's: either family is, of `frame`. */
static bool way_has_family(uint8_t way, bool ipv4)
{
    switch ((enum way)way) {
    case WAY_UDP4:
    case WAY_LOOP4:
    case WAY_RAW4:
        return ipv4;
    case WAY_UDP6:
    case WAY_LOOP6:
    case WAY_RAW6:
        return !ipv4;
    default:
        return true;
    }
}

static bool output_is_sound(const struct table_output_record *record, uint8_t protocol)
{
    const union address address = address_in(record->address), source = address_in(record->source);

    if (record->egress >= TABLE_INTERFACES_MAX || record->counter >= COUNTERS_OUTPUTS_MAX || record->way >= WAYS ||
        record->prefix > PREFIX_MAX || record->dscp > DSCP_MAX || record->flags > FLAGS_ALL ||
        record->rate_unit > RATE_BITS || !is_zero(record->reserved, sizeof(record->reserved)))
        return false;
    if ((record->rate == 0) != (record->rate_unit == RATE_NONE))
        return false;
    if (record->prefix == PREFIX_MAX && !way_has_family(record->way, address_is_ipv4(&address)))
        return false;
    if (!address_is_any(&source) && !way_has_family(record->way, address_is_ipv4(&source)))
        return false;
    /* A UDP socket has one source port, and no say in the protocol. */
    if (!way_writes_headers(record->way) &&
        (record->flags & FLAGS_OF_HEADERS || record->source_port || protocol != PROTOCOL_UDP))
        return false;
    return protocol != PROTOCOL_ESP || (!record->port && !record->source_port);
}

/* Count rules and outputs and check that the records are sound and fill the description exactly. Which shapes there are
 * is noted in `shapes`. */
static int measure(const uint8_t *records, size_t length, size_t *rules, size_t *outputs, bool shapes[SHAPES_MAX])
{
    size_t at = 0;

    *rules = 0;
    *outputs = 0;
    while (at < length) {
        struct table_rule_record record;

        if (length - at < sizeof(record))
            return -EINVAL;
        memcpy(&record, records + at, sizeof(record));
        at += sizeof(record);
        if (record.outputs == 0 || record.outputs > TABLE_OUTPUTS_PER_RULE_MAX ||
            length - at < record.outputs * sizeof(struct table_output_record) || !rule_is_sound(&record))
            return -EINVAL;
        for (size_t i = 0; i < record.outputs; i++) {
            struct table_output_record output;

            memcpy(&output, records + at, sizeof(output));
            at += sizeof(output);
            if (!output_is_sound(&output, record.protocol))
                return -EINVAL;
        }
        shapes[record.prefix * 4 + !is_zero(record.source, sizeof(record.source)) * 2 + (record.port != 0)] = true;
        *rules += 1;
        *outputs += record.outputs;
    }
    if (*rules > COUNTERS_RULES_MAX || *outputs > COUNTERS_OUTPUTS_MAX)
        return -EINVAL;
    return 0;
}

static void fill_output(struct table_output *output, const struct table_output_record *record)
{
    *output = (struct table_output){
        .address = address_in(record->address),
        .source = address_in(record->source),
        .rate = record->rate,
        .counter = record->counter,
        .port = record->port,
        .source_port = record->source_port,
        .egress = table_egress(record->egress, record->way),
        .way = record->way,
        .prefix = record->prefix,
        .ttl = record->ttl,
        .tos = (uint8_t)(record->dscp << 2),
        .flags = record->flags,
        .rate_unit = record->rate_unit,
        .plain = !way_writes_headers(record->way) && record->prefix == PREFIX_MAX && record->port &&
                 record->rate_unit == RATE_NONE && !(record->flags & FLAGS_OF_DROPS),
    };
}

static int add_rule(struct table *table, const struct table_rule_record *record, uint32_t shape,
                    const struct table_output *outputs)
{
    struct table_rule *rule = &table->rules[table->rules_count];
    const union address *source = table->shapes[shape].has_source ? &rule->source : NULL;
    uint32_t at;

    *rule = (struct table_rule){
        .group = address_in(record->group),
        .source = address_in(record->source),
        .id = record->id,
        .traits = traits_of(record->port, record->ingress, record->vlan, record->protocol) | traits_of_shape(shape),
        .counter = record->counter,
        .outputs_count = record->outputs,
        .outputs = outputs,
    };
    if (probe(table, &rule->group, source, rule->traits))
        return -EINVAL;
    at = bucket(table, hash(&rule->group, source, rule->traits));
    while (table->buckets[at])
        at = (at + 1) & table->mask;
    table->buckets[at] = ++table->rules_count;
    return 0;
}

/* Number the shapes that there are, the most specific first. */
static void fill_shapes(struct table *table, const bool there[SHAPES_MAX], uint16_t numbers[SHAPES_MAX])
{
    for (unsigned kind = SHAPES_MAX; kind-- > 0;) {
        struct shape *shape = &table->shapes[table->shapes_count];

        if (!there[kind])
            continue;
        *shape = (struct shape){
            .prefix = (uint8_t)(kind / 4),
            .has_source = kind & 2,
            .port_mask = kind & 1 ? UINT16_MAX : 0,
            .traits = traits_of_shape(table->shapes_count),
        };
        make_mask(shape->mask, shape->prefix);
        numbers[kind] = (uint16_t)table->shapes_count++;
    }
    table->only_exact = table->shapes_count == 1 && table->shapes[0].prefix == PREFIX_MAX &&
                        !table->shapes[0].has_source && table->shapes[0].port_mask;
}

/* Whether no two outputs of a rule have the same counter. `seen` has a bit for each counter, all 0. */
static bool counters_differ(const struct table_output *outputs, uint32_t count, uint8_t seen[COUNTERS_OUTPUTS_MAX / 8])
{
    bool differ = true;

    for (uint32_t i = 0; i < count; i++) {
        uint8_t *byte = &seen[outputs[i].counter / 8], bit = (uint8_t)(1 << outputs[i].counter % 8);

        differ &= !(*byte & bit);
        *byte |= bit;
    }
    for (uint32_t i = 0; i < count; i++)
        seen[outputs[i].counter / 8] = 0;
    return differ;
}

/* Read records that were measured. -EINVAL if two rules have the same input, or two outputs of a rule the same counter. */
static int read_records(struct table *table, const uint8_t *records, size_t length, const uint16_t numbers[SHAPES_MAX])
{
    uint8_t seen[COUNTERS_OUTPUTS_MAX / 8] = {0};
    struct table_output *next = table->outputs;

    for (size_t at = 0; at < length;) {
        struct table_rule_record record;
        struct table_output *first = next;
        unsigned kind;
        int error;

        memcpy(&record, records + at, sizeof(record));
        at += sizeof(record);
        for (size_t i = 0; i < record.outputs; i++, at += sizeof(struct table_output_record)) {
            struct table_output_record output;

            memcpy(&output, records + at, sizeof(output));
            fill_output(next++, &output);
        }
        if (!counters_differ(first, record.outputs, seen))
            return -EINVAL;
        kind = record.prefix * 4u + !is_zero(record.source, sizeof(record.source)) * 2u + (record.port != 0);
        error = add_rule(table, &record, numbers[kind], first);
        if (error)
            return error;
    }
    return 0;
}

int table_build(struct table **out, const uint8_t *records, size_t length)
{
    bool shapes[SHAPES_MAX] = {false};
    uint16_t numbers[SHAPES_MAX];
    size_t rules, outputs, buckets = 2;
    struct table *table;
    int error = measure(records, length, &rules, &outputs, shapes);

    if (error)
        return error;
    while (buckets < rules * 2)
        buckets *= 2;
    table = calloc(1, sizeof(*table));
    if (table) {
        table->mask = (uint32_t)buckets - 1;
        table->buckets = calloc(buckets, sizeof(*table->buckets));
        table->rules = calloc(rules + 1, sizeof(*table->rules)); /* + 1: calloc(0) may be NULL */
        table->outputs = calloc(outputs + 1, sizeof(*table->outputs));
        table->shapes = calloc((rules < SHAPES_MAX ? rules : SHAPES_MAX) + 1, sizeof(*table->shapes));
    }
    if (!table || !table->buckets || !table->rules || !table->outputs || !table->shapes) {
        error = -ENOMEM;
    } else {
        fill_shapes(table, shapes, numbers);
        error = read_records(table, records, length, numbers);
    }
    if (error) {
        table_free(table);
        return error;
    }
    *out = table;
    return 0;
}

void table_free(struct table *table)
{
    if (!table)
        return;
    free(table->buckets);
    free(table->rules);
    free(table->outputs);
    free(table->shapes);
    free(table);
}

uint32_t table_rules(const struct table *table)
{
    return table->rules_count;
}

/* Out of the way of the usual case below, which needs no registers for it. */
__attribute__((noinline)) static const struct table_rule *find_by_shapes(const struct table *table,
                                                                         const struct packet *packet, uint64_t traits)
{
    for (uint32_t i = 0; i < table->shapes_count; i++) {
        const struct shape *shape = &table->shapes[i];
        const uint64_t wanted = traits | shape->traits | (packet->destination_port & shape->port_mask);
        union address group = packet->destination;
        const struct table_rule *rule;

        if (shape->prefix < PREFIX_MAPPED && address_is_ipv4(&group))
            continue;
        apply(shape->mask, &group);
        rule = probe(table, &group, shape->has_source ? &packet->source : NULL, wanted);
        if (rule)
            return rule;
    }
    return NULL;
}

const struct table_rule *table_find(const struct table *table, const struct packet *packet, uint8_t ingress)
{
    const uint64_t traits = traits_of(0, ingress, packet->vlan, packet->protocol);

    if (!table->only_exact)
        return find_by_shapes(table, packet, traits);
    return probe(table, &packet->destination, NULL, traits | packet->destination_port);
}
