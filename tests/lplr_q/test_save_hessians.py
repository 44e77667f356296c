from dataclasses import replace

import pytest

from lplr_q.activation_aware.dataclasses import DataParameters, ModelParameters
from lplr_q.activation_aware.hessian import load_hessians
from lplr_q.calibration import calibration_blocks, use_token
from lplr_q.save_hessians import EXPERIMENT, main
from tests.lplr_q.test_distributed import run_two
from workbench.cli import RunOptions, parse
from workbench.errors import ConfigError
from workbench.storage import read_json
from workbench.tables import read_csv
from workbench.tiny import byte_tokenizer

TINY = replace(
    EXPERIMENT,
    base_model="tiny:mistral",
    include=r"layers\.0\.mlp",
    data=DataParameters(devset="microworld:world", devset_size=4, context_length=48, batch_size=2),
)


def options(root, name="tiny"):
    return RunOptions(root=root, name=name, threads=1, device="cpu")


def test_the_folder_holds_what_compression_reads(tmp_path):
    e = replace(TINY, run=options(tmp_path))
    results = main(e)
    folder = tmp_path / "lplr_q" / "tiny"
    found = load_hessians(folder / results["folder"])
    assert set(found.key_of) == {
        f"model.layers.0.mlp.{name}" for name in ("gate_proj", "up_proj", "down_proj")
    }
    assert results["hessians"] == len(found.moments) == 2
    assert results["calibration"] == found.digest()
    rows = read_csv(folder / "tables" / "hessians.csv")
    assert [row["used_by"] for row in rows] == [2, 1]
    for row in rows:
        assert 1 <= float(row["participation"]) <= float(row["width"])
        assert 0 <= float(row["mean_share"]) <= 1
    origin = read_json(folder / "hessians" / "fingerprint.json")
    assert origin["layers"] == [0]
    assert len(origin["tokens"]) == len(origin["weights"]) == 64
    assert main(e) == results


def test_a_named_folder_is_shared_by_runs_and_refuses_other_text(tmp_path):
    shared = tmp_path / "hessians"
    first = main(replace(TINY, hessian_save_path=shared, run=options(tmp_path, "a")))
    stamps = {p: p.stat().st_mtime_ns for p in shared.iterdir()}
    again = main(replace(TINY, hessian_save_path=shared, run=options(tmp_path, "b")))
    assert again["calibration"] == first["calibration"]
    assert {p: p.stat().st_mtime_ns for p in shared.iterdir()} == stamps
    other = replace(TINY, data=replace(TINY.data, devset_size=5))
    with pytest.raises(ConfigError, match="rows: 4 → 5"):
        main(replace(other, hessian_save_path=shared, run=options(tmp_path, "c")))
    with pytest.raises(ConfigError, match="resume is off"):
        replace(TINY, hessian_save_path=shared, resume=False)


def test_sequences_are_shared_evenly_among_sources():
    data = DataParameters(
        devset=("microworld:world", "stdlib"), devset_size=5, context_length=32, batch_size=2
    )
    tokens, counted = calibration_blocks(data, byte_tokenizer())
    assert tokens.shape == counted.shape == (5, 32)
    assert bool(counted[2:].all())  # the second source is cut into full rows


def test_the_token_is_taken_from_the_file_and_never_shown(tmp_path, monkeypatch, capsys):
    monkeypatch.delenv("HF_TOKEN", raising=False)
    monkeypatch.chdir(tmp_path)
    assert not use_token(ModelParameters(base_model="tiny:mistral"))
    (tmp_path / "hf_access_token.txt").write_text("hf_secret\n", encoding="utf-8")
    monkeypatch.setenv("HF_TOKEN", "")
    main(replace(TINY, run=options(tmp_path / "runs")))
    import os

    assert os.environ["HF_TOKEN"] == "hf_secret"
    printed = capsys.readouterr()
    assert "hf_secret" not in printed.out + printed.err
    for path in (tmp_path / "runs").rglob("*"):
        assert not path.is_file() or b"hf_secret" not in path.read_bytes()


def test_a_token_given_as_a_flag_is_in_no_setting(monkeypatch):
    import os

    monkeypatch.setenv("HF_TOKEN", "")
    e, _ = parse(EXPERIMENT, ["--token", "hf_secret"])
    assert e == EXPERIMENT
    assert "hf_secret" not in repr(e)
    assert os.environ["HF_TOKEN"] == "hf_secret"


def test_the_published_flags_are_understood():
    words = (
        "--base_model tiny:llama --hessian_save_path h --devset wikitext --devset_size 256 "
        "--context_length 4096 --batch_size 2 --chunk_size 128 --devices cpu --n_sample_proc 2 "
        "--dtype float32 --seed 3"
    )
    e, _ = parse(EXPERIMENT, words.split())
    assert e.base_model == "tiny:llama"
    assert e.data == replace(
        EXPERIMENT.data, devset="wikitext", devset_size=256, context_length=4096, batch_size=2
    )
    assert (e.run.device, e.run.dtype, e.seed) == ("cpu", "float32", 3)
    with pytest.raises(ConfigError, match="2 devices: torchrun --nproc-per-node 2"):
        replace(EXPERIMENT, devices=("cuda:0", "cuda:1"))
    with pytest.raises(ConfigError, match="chunk_size=0"):
        replace(EXPERIMENT, chunk_size=0)


@pytest.mark.slow
def test_under_torchrun_the_processes_share_the_text(tmp_path):
    alone = main(replace(TINY, run=options(tmp_path / "one")))
    run_two(
        [
            "-m", "lplr_q.save_hessians", "--base-model", "tiny:mistral", "--include",
            r"layers\.0\.mlp", "--data.devset", "microworld:world", "--data.devset-size", "4",
            "--data.context-length", "48", "--data.batch-size", "2", "--root",
            str(tmp_path / "two"), "--name", "tiny", "--threads", "1", "--device", "cpu",
        ]
    )  # fmt: skip
    assert (tmp_path / "two" / "lplr_q" / "tiny.rank1" / "results.json").is_file()
    ours = load_hessians(tmp_path / "two" / "lplr_q" / "tiny" / "hessians")
    one = load_hessians(tmp_path / "one" / "lplr_q" / "tiny" / alone["folder"])
    for key, moment in one.moments.items():
        assert ours.moments[key].count == moment.count
        scale = float(moment.matrix().abs().max())
        gap = float((ours.moments[key].matrix() - moment.matrix()).abs().max())
        assert gap <= 1e-6 * scale
