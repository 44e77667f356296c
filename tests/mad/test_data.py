"""Data sets on disk: names, bytes for any number of workers, damage, leakage, published folders."""

import json
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mad.data import Changes, Experiment, data_sets, lines_of, main, one_row
from mad.dataset import DataSet, data_set, make_name, parse, published_sets
from mad.published import load_published, verify_published
from mad.registry import TASKS
from mad.store import MANIFEST, leakage, leakage_warning, load, make, read_manifest, verify
from mad.tasks.task import IGNORE, generate, generate_splits
from workbench.cli import RunOptions
from workbench.errors import ConfigError, DataError

PUBLISHED = "t-CR_vs-16_sl-128_ntr-12800_nte-1280_km-1_vm-1_mq-1_fn-0#0_nvs-0_ntc-0_s-12345"


def small(task: str = "in-context-recall", **options) -> DataSet:
    sizes = {"seq_len": 16, "num_train_examples": 3000}
    return data_set(task, sizes | options, num_test_examples=200, seed=5)


def bytes_of(root: Path) -> dict[str, bytes]:
    return {p.relative_to(root).as_posix(): p.read_bytes() for p in root.rglob("*") if p.is_file()}


def all_of(*arguments, **options):
    return list(make(*arguments, **options))


# ---------------------------------------------------------------- names


def test_the_published_name_of_the_baselines():
    assert data_set("in-context-recall", {}).published_name == PUBLISHED
    assert data_set("in-context-recall", {}).name.startswith(PUBLISHED + "_k-")
    assert data_set("fuzzy-in-context-recall", {}).published_name == (
        "t-FR_vs-16_sl-128_ntr-12800_nte-1280_km-3_vm-3_mq-1_fn-0#0_nvs-0_ntc-0_s-12345"
    )
    assert data_set("selective-copying", {}).published_name == (
        "t-SC_vs-16_sl-256_ntr-12800_nte-1280_km-1_vm-1_mq-1_fn-0#0_nvs-0_ntc-16_s-12345"
    )
    assert "mq-0" in data_set("in-context-recall", {"multi_query": False}).name


FIELDS = st.fixed_dictionaries(
    {
        "task": st.sampled_from([*TASKS, "my_package.tasks_vs-1:My_Task", "a:B"]),
        "vocab_size": st.integers(1, 10**6),
        "seq_len": st.integers(1, 10**6),
        "num_train_examples": st.integers(1, 10**6),
        "num_test_examples": st.integers(1, 10**6),
        "k_motif_size": st.integers(1, 9),
        "v_motif_size": st.integers(1, 9),
        "multi_query": st.booleans(),
        "frac_noise": st.floats(0, 0.999),
        "noise_vocab_size": st.integers(0, 10**6),
        "num_tokens_to_copy": st.integers(0, 10**4),
        "seed": st.integers(-5, 2**40),
    },
    optional={"key": st.text("0123456789abcdef", min_size=1, max_size=12)},
)


@given(FIELDS)
@settings(max_examples=200, deadline=None)
def test_parse_is_the_inverse_of_make_name(fields):
    name = make_name(fields)
    assert parse(name) == fields
    assert parse(f"some/folder/{name}") == fields
    assert "/" not in name


@given(FIELDS, FIELDS)
@settings(max_examples=100, deadline=None)
def test_different_fields_have_different_names(one, other):
    assert (make_name(one) == make_name(other)) == (one == other)


@pytest.mark.parametrize("name", ["data", PUBLISHED[:-8], PUBLISHED.replace("mq-1", "mq-2"), "t-"])
def test_what_is_no_name_is_refused(name):
    with pytest.raises(DataError):
        parse(name)


def test_every_option_is_in_the_key():
    sets = [
        small(),
        small(vocab_size=18),
        small(multi_query=False),
        small(num_train_examples=2999),
        small("memorization", map_seed=1),
        small("memorization", map_seed=2),
        small("selective-copying", num_tokens_to_copy=3, slot="all"),
        small("selective-copying", num_tokens_to_copy=3),
        data_set("in-context-recall", {}, seed=1),
        data_set("in-context-recall", {}, legacy=True),
        data_set("in-context-recall", {}),
    ]
    assert len({one.key for one in sets}) == len({one.name for one in sets}) == len(sets)


def test_there_are_66_published_sets_and_one_name_each():
    sets = published_sets()
    assert len(sets) == len({one.published_name for one in sets}) == 66
    counts = {name: len(published_sets([name])) for name in TASKS if TASKS[name].benchmark}
    assert sorted(counts.values()) == [6, 11, 11, 11, 13, 14]
    assert data_sets(Experiment()) == sets


# ---------------------------------------------------------------- writing and reading


def test_bytes_are_the_same_for_any_number_of_workers(tmp_path):
    sets = [small(), small("fuzzy-in-context-recall"), small("compression", num_train_examples=1)]
    stored = {}
    for workers in (1, 2, 7):
        root = tmp_path / str(workers)
        done = all_of(root, sets, workers=workers, shard_rows=1024)
        assert {data for data, _, new in done if new} == set(sets)
        stored[workers] = bytes_of(root)
    assert stored[1] == stored[2] == stored[7]
    assert sum("train/inputs" in name for name in stored[1]) == 3 + 3 + 1


@pytest.mark.parametrize("shard_rows", [1024, 16384])
@pytest.mark.parametrize("task", ["noisy-in-context-recall", "compression"])
def test_what_is_loaded_is_what_is_generated(tmp_path, task, shard_rows):
    data = small(task)
    all_of(tmp_path, [data], shard_rows=shard_rows)
    for split, n in data.sizes.items():
        stored = load(tmp_path, data, split)
        for a, b in zip(stored, generate(data.setting, n, split, data.seed), strict=True):
            np.testing.assert_array_equal(a, b)
        if shard_rows > n:
            assert all(isinstance(part, np.memmap) for part in stored)
        assert stored.inputs.dtype == np.dtype("<i2")


def test_large_vocabularies_take_more_bytes(tmp_path):
    data = small("mqar", vocab_size=2**15 + 2, num_kv_pairs=2, num_train_examples=50)
    all_of(tmp_path, [data])
    assert load(tmp_path, data, "train").inputs.dtype == np.dtype("<i4")


def test_a_legacy_set_is_one_stream(tmp_path):
    data = data_set(
        "compression", {"num_train_examples": 50}, num_test_examples=20, seed=3, legacy=True
    )
    all_of(tmp_path, [data])
    expected = generate_splits(data.setting, data.sizes, 3, legacy=True)
    for split in data.sizes:
        np.testing.assert_array_equal(load(tmp_path, data, split).inputs, expected[split].inputs)


def test_an_interrupted_make_leaves_no_half_set_and_goes_on(tmp_path):
    sets = [small(), small(vocab_size=18), small(vocab_size=20)]
    pieces = make(tmp_path, sets)
    next(pieces)
    pieces.close()
    assert {p.name for p in tmp_path.iterdir()} == {sets[0].name}
    before = (tmp_path / sets[0].name / MANIFEST).stat().st_mtime_ns
    assert [new for _, _, new in make(tmp_path, sets)] == [False, True, True]
    assert (tmp_path / sets[0].name / MANIFEST).stat().st_mtime_ns == before
    assert {p.name for p in tmp_path.iterdir()} == {one.name for one in sets}


def test_a_folder_with_another_configuration_names_the_fields(tmp_path):
    data, other = small(), small(vocab_size=18)
    all_of(tmp_path, [data])
    (tmp_path / data.name).rename(tmp_path / other.name)
    with pytest.raises(DataError, match=r"options.vocab_size: 16 there, 18 asked for"):
        read_manifest(tmp_path, other)
    with pytest.raises(DataError, match="mad.data make"):
        load(tmp_path, data, "train")


def damage(folder: Path, how: str) -> None:
    path = folder / "train" / "inputs-00000.npy"
    if how == "bit":
        raw = bytearray(path.read_bytes())
        raw[-2] ^= 1  # still a token of the vocabulary
        path.write_bytes(raw)
    elif how == "cut":
        path.write_bytes(path.read_bytes()[:-10])
    elif how == "gone":
        path.unlink()
    elif how == "added":
        np.save(folder / "train" / "inputs-00001.npy", np.zeros((1, 15), dtype=np.int16))
    elif how == "shape":
        np.save(path, np.load(path)[:-1])
    elif how == "objects":
        np.save(path, np.array([{}]), allow_pickle=True)
    else:
        (folder / MANIFEST).write_text(how, encoding="utf-8")


@pytest.mark.parametrize(
    "how", ["bit", "cut", "gone", "added", "shape", "objects", "{", "[]", '{"key": 1}']
)
def test_damage_is_found(tmp_path, how):
    data = small()
    all_of(tmp_path, [data])
    assert verify(tmp_path, data)["key"] == data.key
    damage(tmp_path / data.name, how)
    with pytest.raises(DataError):
        verify(tmp_path, data)


# ---------------------------------------------------------------- leakage


@given(
    st.lists(st.tuples(st.integers(0, 2), st.integers(0, 2)), min_size=1, max_size=12),
    st.lists(st.tuples(st.integers(0, 2), st.integers(0, 2)), min_size=1, max_size=12),
)
@settings(max_examples=50, deadline=None)
def test_leakage_counts_like_sets(train, test):
    found = leakage(np.array(train, dtype=np.int16), np.array(test, dtype=np.int16))
    assert found["test_in_train"] == pytest.approx(sum(t in train for t in test) / len(test))
    assert found["train_repeated"] == pytest.approx(1 - len(set(train)) / len(train))


def test_leakage_is_warned_about_unless_rows_repeat_by_design(tmp_path):
    leaky = small("compression", vocab_size=4, seq_len=4)
    fine = small("compression")
    repeats = small("memorization", vocab_size=8, seq_len=4)
    warnings = {
        data: leakage_warning(data, m) for data, m, _ in make(tmp_path, [leaky, fine, repeats])
    }
    assert "occur in training" in warnings[leaky]
    assert warnings[fine] == warnings[repeats] == ""
    assert read_manifest(tmp_path, repeats)["leakage"]["test_in_train"] > 0.5


# ---------------------------------------------------------------- published folders


def publish(root: Path, data: DataSet) -> None:
    """The folder of a published data set, as its code writes it."""
    rows = generate_splits(data.setting, data.sizes, data.seed, legacy=True)
    for split, targets in (("train", rows["train"].dense), ("test", rows["test"].answers)):
        folder = root / data.published_name / split
        folder.mkdir(parents=True)
        np.save(folder / "inputs.npy", rows[split].inputs)
        np.save(folder / "targets.npy", targets)


@pytest.fixture
def zenodo(tmp_path):
    data = small(num_train_examples=40)
    publish(tmp_path / "zenodo", data)
    return tmp_path / "zenodo", data


def test_published_folders_are_read(zenodo):
    root, data = zenodo
    expected = generate_splits(data.setting, data.sizes, data.seed, legacy=True)
    train, test = (load_published(root, data, split) for split in ("train", "test"))
    np.testing.assert_array_equal(train.inputs, expected["train"].inputs)
    np.testing.assert_array_equal(train.dense, expected["train"].dense)
    np.testing.assert_array_equal(test.answers, expected["test"].answers)
    assert isinstance(test.inputs, np.memmap)
    with pytest.raises(DataError, match="no validation split"):
        load_published(root, data, "val")
    with pytest.raises(DataError, match="holds 1 of them"):
        load_published(root, small(vocab_size=18), "train")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda a: a[:-1], r"shape \(39, 15\), the settings ask for \(40, 15\)"),
        (lambda a: a[:, :-1], "shape"),
        (lambda a: a.astype(float), "integers"),
        (lambda a: np.where(a == a[3, 4], 16, a), "no token of a vocabulary of 16"),
        (lambda a: np.where(a == a[3, 4], IGNORE, a), "-100 at row"),
    ],
)
def test_published_files_that_do_not_fit_are_refused(zenodo, change, message):
    root, data = zenodo
    path = root / data.published_name / "train" / "inputs.npy"
    np.save(path, change(np.load(path)))
    with pytest.raises(DataError, match=message):
        verify_published(root, data)


def test_known_hashes_of_published_files_are_compared(zenodo):
    root, data = zenodo
    known = verify_published(root, data)
    assert len(known) == 4
    assert verify_published(root, data, known) == known
    path = root / data.published_name / "test" / "targets.npy"
    targets = np.load(path)
    targets[0, -1] = 15 if targets[0, -1] != 15 else 14
    np.save(path, targets)
    with pytest.raises(DataError, match="SHA-256"):
        verify_published(root, data, known)


# ---------------------------------------------------------------- the script


def options(tmp_path, **more) -> Experiment:
    return Experiment(
        tasks=("compression", "memorization"),
        changes=Changes(seq_len=(8,)),
        num_test_examples=50,
        run=RunOptions(root=tmp_path),
        **more,
    )


def test_make_then_verify_then_make_what_was_removed(tmp_path):
    import shutil
    from dataclasses import replace

    made = main(options(tmp_path))
    assert made["data_sets"] == 4
    assert made["rows"] == 2 * (12800 + 100) + 2 * (256 + 100)
    check = replace(options(tmp_path), action="verify")
    assert main(check)["verified"] == 4
    folder = tmp_path / "mad" / "data" / data_sets(check)[0].name
    shutil.rmtree(folder)
    with pytest.raises(DataError, match="1 of 4 data sets fail"):
        main(check)
    assert main(options(tmp_path)) == made
    assert main(check)["verified"] == 4
    json.loads((folder / MANIFEST).read_text(encoding="utf-8"))


def test_verify_writes_and_compares_published_hashes(tmp_path):
    one = Experiment(
        action="verify",
        tasks=("memorization",),
        grid=False,
        num_test_examples=50,
        zenodo=tmp_path / "zenodo",
        hashes=tmp_path / "hashes.json",
        run=RunOptions(root=tmp_path),
    )
    (data,) = data_sets(one)
    publish(one.zenodo, data)
    assert main(one)["known_hashes"] == 0
    assert main(one)["known_hashes"] == 4
    path = one.zenodo / data.published_name / "train" / "inputs.npy"
    rows = np.load(path)
    rows[0, 0] = (rows[0, 0] + 1) % 100
    np.save(path, rows)
    with pytest.raises(DataError, match="known is"):
        main(one)


@pytest.mark.parametrize("task", list(TASKS))
def test_a_row_is_shown_with_its_answers(tmp_path, capsys, task):
    one = Experiment(action="show", tasks=(task,), grid=False, run=RunOptions(root=tmp_path))
    (data,) = data_sets(one)
    lines = [line.plain for line in lines_of(data.setting, one_row(one, data), 60)]
    rows = generate(data.setting, 1, "test", one.seed)
    for label, part in (("inputs", rows.inputs), ("answers", rows.answers)):
        shown = " ".join(line.split(maxsplit=1)[1] for line in lines if line.startswith(label))
        assert [IGNORE if t == "·" else int(t) for t in shown.split()] == part[0].tolist()
    assert main(one) == {"shown": 1}
    assert task in capsys.readouterr().out


@pytest.mark.parametrize(
    ("make_it", "message"),
    [
        (lambda: Experiment(tasks=("compresion",)), "nearest: compression"),
        (lambda: Experiment(workers=0), "workers=0"),
        (lambda: Experiment(row=-1), "negative"),
        (lambda: Experiment(zenodo=Path("x")), "verify or show"),
        (lambda: Experiment(action="verify", hashes=Path("x")), "--zenodo"),
        (lambda: Experiment(num_test_examples=0), "at least one row"),
        (lambda: Experiment(tasks=("mqar",), changes=Changes(frac_noise=(0.1,))), "no option"),
        (lambda: main(Experiment(action="show", row=1280)), "has 1280 rows"),
        (lambda: all_of("x", [small()], workers=0), "workers=0"),
    ],
)
def test_bad_input_is_refused(make_it, message):
    with pytest.raises(ConfigError, match=message):
        make_it()
