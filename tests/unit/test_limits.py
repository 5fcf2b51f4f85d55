"""Bounds and the ring's geometry: what the kernel accepts is what we compute."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from mcrelay.limits import MTU_MAX, RING_ALIGNMENT, RING_BLOCK_SIZE, RING_HEAD, ring_geometry


@given(st.integers(68, MTU_MAX), st.integers(0, 64 * 2**20))
def test_a_ring_holds_packets_of_the_mtu_and_stays_within_its_memory(mtu: int, memory: int) -> None:
    ring = ring_geometry(mtu, memory)
    assert ring.frame_size >= RING_HEAD + mtu
    assert ring.frame_size % RING_ALIGNMENT == 0
    assert ring.block_size // ring.frame_size >= 1
    assert ring.block_size * ring.blocks <= max(memory, RING_BLOCK_SIZE)


@pytest.mark.parametrize("mtu", [1500, 9000, MTU_MAX])
def test_a_ring_of_the_usual_size_holds_a_useful_number_of_frames(mtu: int) -> None:
    ring = ring_geometry(mtu)
    assert ring.block_size // ring.frame_size * ring.blocks >= 128
