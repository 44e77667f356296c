"""Each fine-tuning script end to end on a layer of random weights, and what it refuses."""

import json
import subprocess
import sys
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch

from lplr_q import (
    eval_ppl,
    finetune_glue,
    finetune_rht,
    finetune_wikitext,
    finetune_winogrande,
)
from lplr_q.activation_aware.quantized_layer import quantised_layers
from lplr_q.finetune_rht import Targets
from tests.conftest import ROOT, child_environment
from workbench.errors import ConfigError, DataError
from workbench.models import load_model
from workbench.run import Run, RunOptions
from workbench.storage import read_json, read_safetensors
from workbench.tables import read_csv
from workbench.tiny import byte_tokenizer, tiny_model

WORLD = ("microworld:world",)
COMMON = {
    "base_model": "tiny:mistral",
    "include": r"layers\.0\.mlp\.down",
    "bits": 2.9,
    "calibration": WORLD,
    "calibration_tokens": 64,
    "ft_rank": 1,
    "batch_size": 2,
    "max_steps": 3,
    "eval_steps": 2,
    "save_steps": 2,
}
TEXTS = {"evaluation": WORLD, "evaluation_tokens": 64}
OWN = {
    finetune_rht: {**TEXTS, "devset": WORLD, "devset_size": 6, "ft_valid_size": 2, "ctx_size": 32,
                   "signs_learning_rate": 0.02, "learning_rate": 0.001},
    finetune_wikitext: {**TEXTS, "dataset": WORLD[0], "block_size": 32, "train_rows": 6,
                        "validation_rows": 2, "learning_rate": 0.05},
    finetune_winogrande: {"train_items": 4, "validation_items": 2, "max_seq_length": 48},
    finetune_glue: {"train_rows": 6, "validation_rows": 4, "max_seq_length": 32},
}  # fmt: skip


def settings(script, root, name=None, **changes):
    options = RunOptions(root=root, name=name or script.__name__[7:], threads=1, device="cpu")
    return replace(script.EXPERIMENT, **{**COMMON, **OWN[script], **changes}, run=options)


@pytest.fixture(scope="module")
def tuned(tmp_path_factory):
    """The signs and one component tuned; other tests go on from its folders.

    Weights of usual size (a model freshly drawn hardly looks at its layers), so that what
    compression costs can be won back.
    """
    root = tmp_path_factory.mktemp("runs")
    tiny_model("mistral", initializer_range=0.15).save_pretrained(root / "base")
    byte_tokenizer().save_pretrained(root / "base")
    e = settings(finetune_rht, root, base_model=str(root / "base"), include=r"layers\.0\.mlp")
    return root / "lplr_q" / "finetune_rht", finetune_rht.main(e)


def test_rht_tunes_signs_and_components_and_keeps_everything_else(tuned):
    folder, results = tuned
    assert [row["stage"] for row in results["rows"]] == ["original", "compressed", "tuned"]
    curve = results["curve"]
    assert curve[0]["step"] == 0
    assert curve[-1]["cross_entropy_nats"] < curve[0]["cross_entropy_nats"]
    assert results["rows"][1]["change"] == 1
    names = {name.rpartition(".")[2] for name in read_safetensors(folder / "trained.safetensors")}
    assert names == {"signs_in", "signs_out", "lora_L", "lora_R"}
    before, _ = load_model(folder / "compressed")
    after, _ = load_model(folder / "model")
    (_, old), (_, new) = (next(iter(quantised_layers(m))) for m in (before, after))
    assert torch.equal(old.q_codes, new.q_codes)
    assert new.form.signs == "float"
    assert new.form.ft_rank == 1
    assert not torch.equal(new.signs()[1], old.signs()[1])
    stored = {k: v for k, v in before.state_dict().items() if "layers.0.mlp" not in k}
    assert stored
    for key, value in stored.items():
        assert torch.equal(after.state_dict()[key], value)
    row = results["rows"][2]
    assert row["bits"] == pytest.approx(results["bits"]["tuned"])
    assert row["bits"] > results["bits"]["compressed"]
    assert read_csv(folder / "tables" / "perplexity.csv")
    assert (folder / "figures" / "validation.svg").is_file()


def test_eval_ppl_puts_trained_tensors_onto_the_compressed_model(tuned, tmp_path):
    folder, _ = tuned
    text = tmp_path / "text.txt"
    text.write_text("some text that is longer than a window " * 4, encoding="utf-8")
    found = []
    for name, change in (
        ("a", {"model_save_path": str(folder / "model")}),
        ("b", {"model_save_path": str(folder / "compressed"), "finetune_save_dir": folder}),
        ("c", {"model_save_path": str(folder / "compressed")}),
    ):
        e = replace(
            eval_ppl.EXPERIMENT, datasets=(f"file:{text}",), seqlen=32, **change,
            run=RunOptions(root=tmp_path, name=name, threads=1, device="cpu"),
        )  # fmt: skip
        found.append(eval_ppl.main(e)["rows"][0]["perplexity"])
    assert found[0] == found[1] != found[2]


def test_factors_train_on_from_the_folder_of_another_run(tuned, tmp_path):
    folder, _ = tuned
    file = tmp_path / "train.jsonl"
    file.write_text(
        "".join(
            json.dumps({"text": f"a text, number {i}, of some length"}) + "\n" for i in range(20)
        ),
        encoding="utf-8",
    )
    e = settings(
        finetune_wikitext, tmp_path, base_model=None, model_save_path=str(folder / "model"),
        train_file=file, ft_rank=64,
    )  # fmt: skip
    results = finetune_wikitext.main(e)
    assert [row["stage"] for row in results["rows"]] == ["compressed", "tuned"]
    assert results["curve"][-1]["loss_nats"] < results["curve"][0]["loss_nats"]
    names = read_safetensors(tmp_path / "lplr_q" / "finetune_wikitext" / "trained.safetensors")
    assert {name.rpartition(".")[2] for name in names} == {"lora_L", "lora_R"}
    assert finetune_wikitext.main(e) == results


def test_winogrande_reads_local_items(tuned, tmp_path):
    folder, _ = tuned
    file = tmp_path / "items.jsonl"
    record = {
        "sentence": "Ann met Bo and _ left.",
        "option1": "Ann",
        "option2": "Bo",
        "answer": "1",
    }
    file.write_text("".join(json.dumps(record) + "\n" for _ in range(6)), encoding="utf-8")
    e = settings(
        finetune_winogrande, tmp_path, base_model=None, model_save_path=str(folder / "compressed"),
        train_file=file, learning_rate=0.05, loss="choice",
    )  # fmt: skip
    results = finetune_winogrande.main(e)
    assert [row["stage"] for row in results["rows"]] == ["compressed", "tuned"]
    assert results["curve"][-1]["loss_nats"] < results["curve"][0]["loss_nats"]


def test_glue_reads_local_records_and_stores_its_head(tuned, tmp_path):
    folder, _ = tuned
    file = tmp_path / "records.jsonl"
    records = [
        {"sentence1": "x" * (i % 2 * 8 + 1), "sentence2": "y", "label": i % 2} for i in range(8)
    ]
    file.write_text("".join(json.dumps(r) + "\n" for r in records), encoding="utf-8")
    e = settings(
        finetune_glue, tmp_path, base_model=None, model_save_path=str(folder / "compressed"),
        train_file=file, validation_file=file, head_learning_rate=0.1, max_steps=8, warmup_steps=0,
    )  # fmt: skip
    results = finetune_glue.main(e)
    assert results["labels"] == ["0", "1"]
    assert results["curve"][-1]["loss_nats"] < results["curve"][0]["loss_nats"]
    head = read_safetensors(tmp_path / "lplr_q" / "finetune_glue" / "head.safetensors")
    assert head["weight"].shape == (2, 64)
    config = read_json(tmp_path / "lplr_q" / "finetune_glue" / "model" / "config.json")
    assert config["quantization_config"]["quant_method"] == "lplr_q"


def test_the_cached_teacher_is_the_one_that_runs_along(tmp_path):
    teacher, _ = load_model("tiny:mistral")
    tokens = torch.randint(3, 250, (3, 9), generator=torch.Generator().manual_seed(0))
    logits = torch.randn(2, 8, 259, generator=torch.Generator().manual_seed(1))
    with Run.open("lplr_q.finetune_rht", settings(finetune_rht, tmp_path)) as run:
        along = Targets(run, SimpleNamespace(teacher_cache=0), teacher, tokens)
        kept = Targets(run, SimpleNamespace(teacher_cache=300), teacher, tokens)
        whole = along.cross_entropy([2, 0], logits)
        cached = kept.cross_entropy([2, 0], logits)
    assert kept.top == 258
    torch.testing.assert_close(cached, whole, rtol=0, atol=5e-3)  # float16 on disk


@pytest.mark.parametrize(
    ("script", "changes", "said"),
    [
        (finetune_rht, {"ft_valid_size": 6}, "ft_valid_size=6 of devset_size=6"),
        (finetune_rht, {"train_signs": False, "ft_rank": 0}, "nothing to train"),
        (finetune_rht, {"ctx_size": 1}, "ctx_size"),
        (finetune_wikitext, {"ft_rank": 0}, "nothing to train"),
        (finetune_wikitext, {"validation_file": "x"}, "without --train-file"),
        (finetune_winogrande, {"task": "winogrand"}, "nearest: winogrande"),
        (finetune_winogrande, {"train_items": 0}, "train_items=0"),
        (finetune_glue, {"task_name": "stsb"}, "unknown task 'stsb'"),
        (finetune_glue, {"train_file": "x"}, "belong together"),
    ],
)
def test_settings_that_cannot_work(script, changes, said, tmp_path):
    with pytest.raises(ConfigError, match=said):
        settings(script, tmp_path, **changes)


LAUNCHED = [
    ("ddp", {}, "optimiser state in the first"),
    ("fsdp", {}, "a part of gradients"),
    # the launcher for zero2 itself asks for DeepSpeed; these are the words it passes on
    ("ddp", {"ACCELERATE_USE_DEEPSPEED": "true", "ACCELERATE_DEEPSPEED_ZERO_STAGE": "2"},
     "a part of gradients"),
]  # fmt: skip


def tiny_run(launcher, root, name, **environment):
    """The tiny settings of finetune_wikitext, started as a user would."""
    config = ROOT / "configs" / "lplr_q" / "finetune_wikitext.tiny.yaml"
    command = [sys.executable, "-m", *launcher, "lplr_q.finetune_wikitext", "--config", config,
               "--root", root, "--name", name, "--device", "cpu"]  # fmt: skip
    done = subprocess.run(
        [*map(str, command)], cwd=ROOT, env=child_environment(**environment), capture_output=True,
        text=True, timeout=300, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-3000:]
    return root / "lplr_q" / name


@pytest.fixture(scope="module")
def by_one(tmp_path_factory):
    folder = tiny_run([], tmp_path_factory.mktemp("alone"), "alone")
    return read_safetensors(folder / "trained.safetensors")


@pytest.mark.slow
@pytest.mark.parametrize(("config", "environment", "kept"), LAUNCHED, ids=["ddp", "fsdp", "zero2"])
def test_two_processes_of_accelerate_give_the_result_of_one(
    config, environment, kept, by_one, tmp_path
):
    file = ROOT / "configs" / "lplr_q" / f"accelerate.{config}.yaml"
    launcher = ["accelerate.commands.launch", "--config_file", file, "-m"]
    folder = tiny_run(launcher, tmp_path, "two", **environment)
    assert kept in (folder / "log.txt").read_text(encoding="utf-8")
    by_two = read_safetensors(folder / "trained.safetensors")
    assert set(by_two) == set(by_one)
    for name, value in by_one.items():
        torch.testing.assert_close(by_two[name], value, rtol=1e-5, atol=1e-6)


def test_bad_input_is_one_error(tuned, tmp_path):
    folder, _ = tuned
    ready = {"base_model": None, "model_save_path": str(folder / "compressed")}
    with pytest.raises(ConfigError, match="give --base-model"):
        finetune_rht.main(settings(finetune_rht, tmp_path, **ready))
    with pytest.raises(DataError, match="no such file"):
        finetune_wikitext.main(
            settings(finetune_wikitext, tmp_path, train_file=tmp_path / "no.jsonl", **ready)
        )
    with pytest.raises(ConfigError, match="no compressed layer"):
        finetune_rht.main(
            settings(finetune_rht, tmp_path, "plain", model_save_path="tiny:mistral", ft_rank=0)
        )
    file = tmp_path / "one.jsonl"
    file.write_text('{"text": "a", "label": 1}\n{"text": "b", "label": 1}\n', encoding="utf-8")
    with pytest.raises(DataError, match="only label '1'"):
        finetune_glue.main(
            settings(finetune_glue, tmp_path, train_file=file, validation_file=file, **ready)
        )
