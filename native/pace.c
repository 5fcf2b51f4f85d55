/* SPDX-License-Identifier: Apache-2.0 */
#include "pace.h"

uint64_t pace_next(struct pace *pace, uint64_t now_ns, uint64_t packets)
{
    uint64_t elapsed_ns = now_ns - pace->window_began_ns;

    if (!pace->budget_ns)
        return 0;
    pace->window_packets += packets;
    if (elapsed_ns >= PACE_WINDOW_NS) {
        pace->expected = pace->window_packets * pace->budget_ns / elapsed_ns;
        pace->window_began_ns = now_ns;
        pace->window_packets = 0;
    }
    return pace->expected >= PACE_COMPANY_MIN ? pace->budget_ns : 0;
}
