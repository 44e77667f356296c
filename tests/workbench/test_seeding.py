"""Named streams: equal for equal names, independent otherwise, untouched by anything else."""

from __future__ import annotations

import random

import numpy as np
import torch

from workbench import seeding, storage


def test_a_stream_depends_on_seed_name_and_index_alone():
    first = seeding.Streams(3)("data/train", index=17).integers(0, 2**62, 8)
    np.random.seed(1)
    seeding.Streams(3)("other").integers(0, 9, 100)
    assert (seeding.Streams(3)("data/train", index=17).integers(0, 2**62, 8) == first).all()
    for other in (
        seeding.Streams(4)("data/train", index=17),
        seeding.Streams(3)("data/test", index=17),
        seeding.Streams(3)("data/train", index=18),
    ):
        assert not (other.integers(0, 2**62, 8) == first).any()


def test_neighbouring_seeds_share_no_shifted_stretch():
    """Seeding a counter with seed × constant makes seed + 1 the same stream, shifted by a draw."""
    seen: set[int] = set()
    for seed in range(4):
        draws = seeding.Streams(seed)("x").integers(0, 2**63, 20_000).tolist()
        assert not seen & set(draws)
        seen |= set(draws)


def test_keys_come_from_sha256_of_seed_name_and_index():
    """The digest is what `printf 'fivefold:0:x:0' | sha256sum` prints."""
    digest = bytes.fromhex("ddcc0c61c8a3a751a6f956357af309f14952d9a8bed27996f71e39c87a0fa3a8")
    streams = seeding.Streams(0)
    assert streams.integer("x") == int.from_bytes(digest[:8], "little") // 2
    key = [int.from_bytes(digest[:8], "little"), int.from_bytes(digest[8:16], "little")]
    expected = np.random.Generator(np.random.Philox(key=np.array(key, dtype=np.uint64)))
    assert (streams("x").integers(0, 1000, 9) == expected.integers(0, 1000, 9)).all()


def test_torch_streams_do_not_touch_the_global_generator():
    before = torch.get_rng_state()
    a = torch.rand(3, generator=seeding.Streams(0).torch("init"))
    b = torch.rand(3, generator=seeding.Streams(0).torch("init"))
    assert torch.equal(a, b)
    assert torch.equal(before, torch.get_rng_state())


def test_global_states_survive_storage(tmp_path):
    saved = seeding.capture()
    try:
        seeding.set_global(5)
        storage.save_tree(tmp_path / "t", seeding.capture())
        drawn = (random.random(), np.random.rand(), torch.rand(2).tolist())
        random.random()
        seeding.restore(storage.load_tree(tmp_path / "t"))
        assert (random.random(), np.random.rand(), torch.rand(2).tolist()) == drawn
    finally:
        seeding.restore(saved)
