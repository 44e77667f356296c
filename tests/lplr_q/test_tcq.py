"""Trellises: the Viterbi forms agree, circles close, reference errors, ragged shapes."""

import stat

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from lplr_q import native
from lplr_q.codebooks import trellis
from lplr_q.codebooks.base import CODEBOOKS, Codebook, make_codebook, row_groups
from lplr_q.codebooks.tcq import parse_name, trellis_table
from lplr_q.codebooks.training import train_table
from lplr_q.codebooks.trellis import circles, reference_circle, torch_circles, windows
from workbench.errors import ConfigError

needs_compiler = pytest.mark.skipif(native.library() is None, reason=native.status())


def gaussian(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def states_by_hand(symbols, bits, window):
    """The last ``window`` bits read, going round the circle as often as needed."""
    found = []
    for t in range(len(symbols)):
        state = 0
        for back in range(window, -1, -1):
            state = (state << bits) | symbols[(t - back) % len(symbols)]
        found.append(state % 2**window)
    return found


@settings(max_examples=30, deadline=None)
@given(st.integers(1, 4), st.integers(8, 13), st.integers(1, 40), st.integers(0, 99))
def test_state_is_the_last_bits_of_the_circle(bits, window, length, seed):
    generator = torch.Generator().manual_seed(seed)
    symbols = torch.randint(0, 2**bits, (length,), generator=generator)
    expected = states_by_hand(symbols.tolist(), bits, window)
    assert windows(symbols[None], bits, window)[0].tolist() == expected


def test_successive_states_overlap():
    symbols = torch.randint(0, 4, (3, 50), generator=torch.Generator().manual_seed(0))
    states = windows(symbols, 2, 9)
    assert torch.equal(states, ((states.roll(1, -1) << 2) | symbols) % 2**9)


@pytest.mark.parametrize(("bits", "window"), [(1, 5), (2, 6), (3, 7), (4, 8)])
def test_batched_search_is_the_recursion_as_written(bits, window):
    x, table = gaussian(3, 29), trellis_table(window, "random")
    expected = [reference_circle(row, table, bits) for row in x]
    assert torch_circles(x, table, bits).tolist() == expected


def test_recursion_finds_the_best_of_all_paths():
    """Every circle of six symbols, tried one by one, against the path with its overlap fixed."""
    x, table, bits, window = gaussian(6), trellis_table(4, "random"), 2, 4
    every = torch.cartesian_prod(*[torch.arange(4)] * 6)
    states = windows(every, bits, window)
    errors = (table[states] - x).square().sum(1)
    for overlap in range(4):
        mine = errors[states[:, -1] % 4 == overlap].min()
        path = trellis.reference_path(x, table, bits, overlap)
        assert path[-1] % 4 == overlap
        assert path[0] >> bits == overlap  # the circle closes
        assert float((table[path] - x).square().sum()) == pytest.approx(float(mine))


@pytest.mark.parametrize("kind", ["1mad", "random", "3inst"])
def test_tables_look_gaussian(kind):
    table = trellis_table(12, kind)
    table = table / table.std()
    assert abs(float(table.mean())) < 0.05
    assert float((table.abs() < 1).float().mean()) == pytest.approx(0.683, abs=0.04)
    assert float((table.abs() < 2).float().mean()) == pytest.approx(0.954, abs=0.015)


def test_tables_by_hand():
    # state 0: 76625530 = 0x0491367A -> 0x04 + 0x91 + 0x36 + 0x7A = 325
    assert float(trellis_table(8, "1mad")[0]) == pytest.approx((325 - 510) / 147.8)
    # state 0: 64248484 = 0x03D45AA4; 0x3B60 is 0.922 in half precision
    halves = torch.tensor([(0x5AA4 & 0x8FFF) ^ 0x3B60, (0x03D4 & 0x8FFF) ^ 0x3B60])
    value = halves.to(torch.int16).view(torch.float16).float().sum()
    assert float(trellis_table(8, "3inst")[0]) == float(value)


def circle_error(window, kind, bits, scale, *, count):
    x = gaussian(count, 256, seed=1)
    x = x / x.square().mean().sqrt()
    table = trellis_table(window, kind)
    factor = scale * float(table.std())
    points = table[windows(circles(x * factor, table, bits), bits, window)]
    return float((points / factor - x).square().mean())


# with free ends 0.0845 and 0.0873
@pytest.mark.parametrize(("kind", "value"), [("1mad", 0.0862), ("random", 0.0888)])
def test_gaussian_error_of_small_trellises(kind, value):
    assert circle_error(8, kind, 2, 0.95, count=64) == pytest.approx(value, abs=0.0015)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("window", "bits", "scale", "value", "tolerance"),
    [
        (10, 2, 0.95, 0.0775, 0.001),
        (12, 2, 0.95, 0.0755, 0.001),
        (12, 1, 1.1, 0.2818, 0.003),  # QTIP, Table 2: 0.2803
        (12, 3, 0.9, 0.0195, 0.0005),  # 0.0198
        (12, 4, 0.85, 0.0050, 0.0002),  # 0.0055
    ],
)
def test_gaussian_error_of_large_trellises(window, bits, scale, value, tolerance):
    found = circle_error(window, "1mad", bits, scale, count=128)
    assert found == pytest.approx(value, abs=tolerance)
    assert found > 4.0**-bits


@pytest.mark.parametrize("bits", [1, 2, 3, 4])
@pytest.mark.parametrize("window", [8, 10])
def test_trained_tables_err_less_than_computed_ones(window, bits):
    x = gaussian(40 if window == 8 else 24, 256, seed=8)
    x = x / x.square().mean().sqrt()
    errors = []
    for kind in ("trained", "1mad"):
        book = make_codebook(f"tcq-{window}-{kind}", bits)
        table = trellis_table(window, kind, bits)
        points = table[windows(circles(x * book.opt_scale, table, bits), bits, window)]
        errors.append(float((points / book.opt_scale - x).square().mean()))
    assert 4.0**-bits < errors[0] < 0.985 * errors[1]


def test_training_lowers_the_error():
    """From any table; the result is stored in half precision."""
    start = trellis_table(8, "random")
    generator = torch.Generator().manual_seed(0)
    table = train_table(start, 2, rounds=4, sequences=48, generator=generator)
    assert torch.equal(table, table.half().float())
    x = gaussian(32, 256, seed=9)
    before, after = (
        float((t[windows(circles(x, t, 2), 2, 8)] - x).square().mean()) for t in (start, table)
    )
    assert after < 0.97 * before


def test_unvisited_states_keep_their_value():
    start = torch.full((256,), 50.0)
    start[:200] = trellis_table(8, "1mad")[:200]
    generator = torch.Generator().manual_seed(0)
    table = train_table(start, 2, rounds=1, sequences=2, generator=generator)
    assert 0 < int((table == 50).sum()) <= 56


def test_closing_the_circle_costs_little():
    x, table = gaussian(160, 256, seed=3), trellis_table(8, "1mad")
    x = 0.95 * x / x.square().mean().sqrt()
    free = table[trellis._Survivors(table, 2).run(x, None)]
    closed = table[windows(circles(x, table, 2), 2, 8)]
    open_error, closed_error = ((v - x).square().mean() / 0.95**2 for v in (free, closed))
    assert float(open_error) == pytest.approx(0.0847, abs=0.001)
    assert 1 < float(closed_error / open_error) < 1.04


@needs_compiler
@pytest.mark.parametrize(
    ("window", "bits", "count", "length"),
    [(8, 1, 5, 64), (8, 2, 17, 256), (8, 3, 8, 30), (8, 4, 9, 20), (10, 2, 3, 101), (9, 2, 1, 6)],
)
def test_compiled_search_gives_the_same_codes(window, bits, count, length):
    x, table = gaussian(count, length, seed=window + bits), trellis_table(window, "1mad")
    assert torch.equal(native.trellis_circles(x, table, bits), torch_circles(x, table, bits))


@needs_compiler
def test_compiled_search_breaks_ties_as_torch_does():
    x = torch.zeros(9, 40)
    table = trellis_table(8, "1mad").round()  # many states share a value
    assert torch.equal(native.trellis_circles(x, table, 2), torch_circles(x, table, 2))


@needs_compiler
def test_compiled_search_in_several_pieces():
    x, table = gaussian(37, 32), trellis_table(8, "1mad")
    whole = native.trellis_circles(x, table, 2)
    seen = []

    def work(low, high):
        seen.append((low, high))
        return torch.equal(native.trellis_circles(x[low:high], table, 2), whole[low:high])

    before = torch.get_num_threads()
    torch.set_num_threads(3)
    try:
        assert all(native.in_threads(work, 37, 8))
    finally:
        torch.set_num_threads(before)
    assert sorted(seen) == [(0, 16), (16, 32), (32, 37)]


@needs_compiler
@pytest.mark.parametrize("name", ["tcq", "tcq-12", "tcq-8-16x16"])
@pytest.mark.parametrize("shape", [(200, 5), (65, 1), (1, 3), (2, 2), (64, 1)])
@pytest.mark.parametrize("bits", [1, 2, 3])
def test_compiled_decoding_gives_the_same_points(name, shape, bits):
    codebook = make_codebook(name, bits)
    generator = torch.Generator().manual_seed(0)
    codes = torch.randint(0, 2**bits, (*shape, codebook.dim), generator=generator)
    assert torch.equal(codebook.decode(codes), codebook.torch_decode(codes))
    one = codes[:, 0]
    assert torch.equal(codebook.decode(one), codebook.torch_decode(one))


def test_without_compiler_or_switched_off_torch_does_it(monkeypatch):
    monkeypatch.setenv("FIVEFOLD_NATIVE", "0")
    assert native.library() is None
    assert "switched off" in native.status()
    x, table = gaussian(2, 20), trellis_table(8, "1mad")
    assert torch.equal(circles(x, table, 2), torch_circles(x, table, 2))


@pytest.mark.parametrize(
    ("problem", "expected"),
    [("none", "no C compiler"), ("fails", "cc failed: no headers"), ("folder", "Error")],
)
def test_every_way_a_compiler_can_fail_is_one_line(tmp_path, monkeypatch, problem, expected):
    """A compiler that is missing, one that fails, a cache folder that cannot be made."""
    binaries = tmp_path / "bin"
    binaries.mkdir()
    if problem != "none":
        fake = binaries / "cc"
        body = "echo cc 1.0; exit 0" if problem == "folder" else "echo 'no headers' >&2; exit 1"
        fake.write_text(f"#!/bin/sh\n{body}\n", encoding="utf-8")
        fake.chmod(fake.stat().st_mode | stat.S_IXUSR)
    cache = tmp_path / "cache"
    if problem == "folder":
        cache.write_text("a file, not a folder", encoding="utf-8")
    monkeypatch.setenv("PATH", str(binaries))
    monkeypatch.setenv("XDG_CACHE_HOME", str(cache))
    monkeypatch.delenv("CC", raising=False)
    found, reason = native.load.__wrapped__(native._SOURCE)
    assert found is None
    assert expected in reason
    assert len(reason.splitlines()) == 1


@needs_compiler
def test_the_library_is_compiled_once(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    source = tmp_path / "answer.c"
    source.write_text("int answer(void) { return 42; }\n", encoding="utf-8")
    library, reason = native.load.__wrapped__(source)
    assert library is not None, reason
    assert library.answer() == 42
    (built,) = (tmp_path / "fivefold" / "native").iterdir()
    before = built.stat().st_mtime_ns
    native.load.__wrapped__(source)
    assert [(p, p.stat().st_mtime_ns) for p in built.parent.iterdir()] == [(built, before)]
    source.write_text("int answer(void) { return 43; }\n", encoding="utf-8")
    assert native.load.__wrapped__(source)[0].answer() == 43


# ------------------------------------------------------------------------------ the codebook


@pytest.mark.parametrize("name", ["tcq", "tcq-8", "tcq-8-random", "tcq-8-3inst", "tcq-8-16x16"])
@pytest.mark.parametrize("shape", [(37, 3), (64, 1), (130, 2), (6, 1)])
def test_encoding_points_again_finds_them(name, shape):
    """P8 for a trellis: the points of any codes have a path without error."""
    codebook = make_codebook(name, 2)
    m, blocks = shape
    codes = codebook.encode(gaussian(m, blocks, codebook.dim) * codebook.opt_scale)
    points = codebook.decode(codes)
    assert torch.equal(codebook.decode(codebook.encode(points)), points)
    free = torch.randint(0, 4, codes.shape, generator=torch.Generator().manual_seed(1))
    if m >= 37:  # a short circle of arbitrary codes may be closed elsewhere
        points = codebook.decode(free)
        assert torch.equal(codebook.decode(codebook.encode(points)), points)


def test_tiles_are_coded_by_themselves():
    codebook = make_codebook("tcq-8-16x16", 2)
    x = gaussian(40, 3, 16)
    codes = codebook.encode(x)
    assert codes.shape == x.shape
    assert torch.equal(codes[16:32, 1], codebook.encode(x[16:32, 1]))
    assert torch.equal(codes[32:, 2], codebook.encode(x[32:, 2]))
    changed = x.clone()
    changed[:16] = 0
    assert torch.equal(codebook.encode(changed)[16:], codes[16:])


def test_layout_as_documented():
    """Symbol t of a tile is the code of its row t // columns and column t mod columns."""
    codebook = make_codebook("tcq-8-1mad-16x16", 2)
    codes = torch.randint(0, 4, (16, 16), generator=torch.Generator().manual_seed(0))
    states = states_by_hand(codes.flatten().tolist(), 2, 8)
    expected = trellis_table(8, "1mad")[states].reshape(16, 16)
    assert torch.equal(codebook.decode(codes), expected)


@settings(max_examples=60, deadline=None)
@given(st.integers(0, 300), st.integers(1, 70))
def test_groups_of_rows_cover_all_rows(m, rows):
    groups = row_groups(m, rows)
    assert sum(count * height for count, height in groups) == m
    heights = [height for count, height in groups for _ in range(count)]
    assert all(height == rows for height in heights[:-1])  # cuts at multiples of rows are safe
    assert all(0 < height <= rows for height in heights)


def test_interface_and_names():
    for name in (n for n in CODEBOOKS if n.startswith("tcq")):
        codebook = make_codebook(name, 2)
        assert isinstance(codebook, Codebook)
        assert codebook.name == name
        assert sum(codebook.streams) == codebook.bits * codebook.dim
    assert parse_name("tcq") == (10, "trained", (64, 4))
    assert parse_name("tcq-12") == (12, "1mad", (64, 4))
    assert parse_name("tcq-12-3inst-16x16") == (12, "3inst", (16, 16))
    assert make_codebook("tcq-9-random-32x8", 3).rows == 32  # not listed, still of the family


@pytest.mark.parametrize(
    ("name", "bits", "message"),
    [
        ("tcq-8x", 2, "not of the form"),
        ("tcq-6", 4, "choose 8 to 16"),
        ("tcq", 5, "choose from 1, 2, 3, 4"),
        ("tcq-10-2x2", 2, "at least 10 bits"),
        ("tcq-10-48x4", 2, "a divisor of 64"),
        ("tcq-12-trained", 2, "no trained table for states of 12 bits; choose 8 or 10"),
    ],
)
def test_bad_names_and_bits(name, bits, message):
    with pytest.raises(ConfigError, match=message):
        make_codebook(name, bits)


@pytest.mark.parametrize(("rows", "bits"), [(1, 2), (2, 1), (1, 1)])
def test_a_few_rows_make_short_circles(rows, bits):
    """Shorter than a state the window goes round more than once; the best circle is found."""
    codebook = make_codebook("tcq-10-1mad", bits)
    x = gaussian(rows, 4, seed=5)
    found = codebook.decode(codebook.encode(x))
    every = torch.cartesian_prod(*[torch.arange(2**bits)] * (rows * 4))
    points = trellis_table(10, "1mad")[windows(every, bits, 10)]
    best = (points - x.flatten()).square().sum(1).min()
    assert float((found - x).square().sum()) == pytest.approx(float(best), rel=1e-5)


@pytest.mark.parametrize("shape", [(0, 4), (0, 3, 4), (5, 0, 4)])
def test_nothing_is_coded_as_nothing(shape):
    codebook = make_codebook("tcq", 2)
    codes = codebook.encode(torch.empty(shape))
    assert codes.shape == codebook.decode(codes).shape == shape


def test_input_is_not_changed():
    x = gaussian(64, 4)
    before = x.clone()
    make_codebook("tcq-8", 2).encode(x)
    assert torch.equal(x, before)
