"""The loop, what trains, and the losses; the scripts themselves are in test_finetune_scripts."""

import copy
import subprocess
import sys
from dataclasses import replace

import pytest
import torch
from torch import nn

from lplr_q.activation_aware.decompose import decompose, prepare_hessian
from lplr_q.activation_aware.quantized_layer import LPLRQuantizedLinear
from lplr_q.choices import Pair
from lplr_q.classifier import Classifier, encode_texts
from lplr_q.finetune_rht import grouped_cross_entropy
from lplr_q.finetune_winogrande import choice_loss
from lplr_q.finetuning import Tuning, token_blocks, tuning_groups, widest
from lplr_q.trainable import Trained, make_trainable, put_trained, release_exactly
from lplr_q.tuning_loop import Job, Progress, build_schedule, fit, steps_of
from tests.conftest import ROOT, child_environment
from workbench.errors import ConfigError, DataError, DivergedError
from workbench.run import Run, RunOptions
from workbench.storage import write_safetensors
from workbench.tiny import byte_tokenizer, tiny_model


def layer_of(rank=4, *, m=24, n=40, rotated=True, seed=0, **options):
    generator = torch.Generator().manual_seed(seed)
    weight = torch.randn(m, n, generator=generator)
    prepared = prepare_hessian(None, n, generator=generator if rotated else None)
    options = {"rounds": 1, "sweeps": 0, "inner_iterations": 1, **options}
    result = decompose(
        weight, prepared, rank=rank, generator=generator if rotated else None, **options
    )
    return LPLRQuantizedLinear.from_decomposition(result)


class Holder(nn.Module):
    def __init__(self, *layers):
        super().__init__()
        self.norm = nn.LayerNorm(40)
        self.layers = nn.ModuleList(layers)


# ---------------------------------------------------------------- what trains


@pytest.mark.parametrize(
    "form",
    [{}, {"factor_bits": 16}, {"factor_bits": 3}, {"rotated": False}, {"q_bits": 0},
     {"m": 13, "n": 21}],
    ids=str,
)  # fmt: skip
@pytest.mark.parametrize("ft_rank", [1, 3, 4])
def test_components_become_parameters_without_a_change_of_the_matrix(form, ft_rank):
    layer = layer_of(**form)
    before = {k: t.clone() for k, t in layer.state_dict().items()}
    new = copy.deepcopy(layer)
    release_exactly(new, ft_rank)
    # 16-bit rounding of the decoded factors is all that changes
    torch.testing.assert_close(new.dequantize(), layer.dequantize(), rtol=0, atol=0.03)
    assert new.form.coded_rank == 4 - ft_rank
    assert new.lora_L.shape == (layer.out_features, ft_rank)
    assert all(torch.equal(t, before[k]) for k, t in layer.state_dict().items())
    codes = {k: t.clone() for k, t in new.state_dict().items()}
    release_exactly(new, ft_rank)  # nothing left to do
    assert all(torch.equal(t, codes[k]) for k, t in new.state_dict().items())
    for name in before:  # Q, scales of Q and signs are the same tensors
        if name[:2] not in ("l_", "r_"):
            assert torch.equal(new.state_dict()[name], before[name])
    if ft_rank < 4:
        rest = layer.factor("r")[ft_rank:]
        assert torch.equal(new.factor("r"), rest)


def test_more_components_than_there_are():
    layer = layer_of()
    with pytest.raises(ConfigError, match="ft_rank=5 of a layer of rank 4"):
        release_exactly(layer, 5)
    release_exactly(layer, 2)
    with pytest.raises(ConfigError, match="2 trained components"):
        release_exactly(layer, 3)


def test_only_what_was_asked_for_trains():
    model = Holder(layer_of(4), layer_of(2, seed=1))
    found = make_trainable(model, signs=True, ft_rank=3)
    assert [p.shape for p in found["factors"]] == [(24, 3), (3, 40), (24, 2), (2, 40)]
    assert sorted(p.shape[0] for p in found["signs"]) == [24, 24, 40, 40]
    wanted = {id(p) for group in found.values() for p in group}
    assert wanted == {id(p) for p in model.parameters() if p.requires_grad}
    assert all(p.dtype == torch.float32 for group in found.values() for p in group)
    for p in (p for group in found.values() for p in group):
        assert p.grad is None
    x = torch.randn(3, 40)
    sum(layer(x).square().sum() for layer in model.layers).backward()
    assert all(float(p.grad.abs().sum()) > 0 for group in found.values() for p in group)
    with pytest.raises(ConfigError, match="the largest rank in this model is 2"):
        make_trainable(Holder(layer_of(2)), signs=False, ft_rank=3)
    with pytest.raises(ConfigError, match="no layer was compressed with rotation"):
        make_trainable(Holder(layer_of(2, rotated=False)), signs=True, ft_rank=0)
    with pytest.raises(ConfigError, match="no compressed layer"):
        make_trainable(nn.Linear(2, 2), signs=True, ft_rank=0)


def test_trained_tensors_go_onto_an_equal_model(tmp_path):
    model = Holder(layer_of(4))
    fresh = copy.deepcopy(model)
    make_trainable(model, signs=True, ft_rank=2)
    with torch.no_grad():
        for parameter in Trained(model).parameters.values():
            parameter.mul_(1.25)
    file = write_safetensors(tmp_path / "trained.safetensors", Trained(model).state_dict())
    put_trained(fresh, file)
    model.layers[0].merge_trained()
    assert torch.equal(fresh.layers[0].dequantize(), model.layers[0].dequantize())
    assert not any(p.requires_grad for p in fresh.layers[0].parameters())
    with pytest.raises(DataError, match=r"layers\.0 is no compressed layer"):
        put_trained(nn.Linear(2, 2), file)
    with pytest.raises(DataError, match="does not fit"):
        put_trained(Holder(layer_of(4, m=16)), file)


def test_widest_clips_with_a_note_and_refuses_rank_zero():
    class Notes:
        said = ""

        def note(self, text):
            self.said = text

    notes = Notes()
    assert widest(Holder(layer_of(3)), 64, notes) == 3
    assert "all components train" in notes.said
    assert widest(Holder(layer_of(3)), 2, notes) == 2
    with pytest.raises(ConfigError, match="rank 0"):
        widest(Holder(layer_of(0)), 64, notes)


# ---------------------------------------------------------------- losses


def test_cross_entropy_with_all_tokens_kept_is_the_whole_one():
    generator = torch.Generator().manual_seed(0)
    p, q = torch.randn(2, 5, 7, generator=generator).log_softmax(-1)
    whole = -(p.exp() * q).sum(-1)
    values, places = p.topk(6)
    torch.testing.assert_close(grouped_cross_entropy(values, q.gather(-1, places)), whole)
    # one outcome for the rest: never more than the whole, equal at q = p up to the rest's entropy
    values, places = p.topk(2)
    grouped = grouped_cross_entropy(values, q.gather(-1, places))
    assert bool((grouped <= whole + 1e-6).all())


def test_grouped_cross_entropy_is_least_at_the_teacher():
    p = torch.randn(3, 6, generator=torch.Generator().manual_seed(1)).log_softmax(-1)
    values, places = p.topk(3)
    logits = p.clone().requires_grad_()
    grouped_cross_entropy(values, logits.log_softmax(-1).gather(-1, places)).sum().backward()
    assert float(logits.grad.abs().max()) < 1e-5


def test_choice_loss_is_the_softmax_over_options():
    model = tiny_model("mistral")
    items = [{"gold": 1}, {"gold": 0}]
    pairs = [[Pair([1, 5, 9], 1, 1), Pair([1, 5, 8, 7], 2, 2)], [Pair([1, 4], 1, 1)] * 3]
    settings = type("E", (), {"loss": "choice"})
    with torch.no_grad():
        logs = [model(input_ids=torch.tensor([p.ids])).logits[0].log_softmax(-1) for p in pairs[0]]
        s = torch.stack([logs[0][1, 9], logs[1][1, 8] + logs[1][2, 7]])
        expected = -s.log_softmax(0)[1] + torch.log(torch.tensor(3.0))
        torch.testing.assert_close(choice_loss(model, items, pairs, settings), expected)
        settings.loss = "lm"
        expected = (
            -(s[1] / 2) - model(input_ids=torch.tensor([[1, 4]])).logits[0].log_softmax(-1)[0, 4]
        )
        torch.testing.assert_close(choice_loss(model, items, pairs, settings), expected)


def test_classifier_reads_the_last_token_whatever_the_padding():
    records = [{"texts": ["ab"], "label": "x"}, {"texts": ["a", "longer"], "label": "y"}]
    examples = encode_texts(byte_tokenizer(), records, ["x", "y"], 6)
    assert [len(example.ids) for example in examples] == [3, 6]
    model = Classifier(tiny_model("mistral"), 2, torch.Generator().manual_seed(0))
    with torch.no_grad():
        both, _ = model.loss_sum(examples)
        apart = sum(model.loss_sum([example])[0] for example in examples)
    torch.testing.assert_close(both, apart)
    with pytest.raises(DataError, match="label 'z'"):
        encode_texts(byte_tokenizer(), [{"texts": ["a"], "label": "z"}], ["x"], 6)


# ---------------------------------------------------------------- the loop


def toy(seed=0, n=12, lr=0.3):
    """Least squares with rows of unequal weight; validation on other rows."""
    generator = torch.Generator().manual_seed(seed)
    x, w = torch.randn(n + 8, 5, generator=generator), torch.randn(5, generator=generator)
    y = x @ w
    module = nn.Linear(5, 1, bias=False)
    nn.init.zeros_(module.weight)
    weight = 1.0 + (torch.arange(n) % 3)

    def error(rows):
        return (module(x[rows]).squeeze(-1) - y[rows]) ** 2

    return Job(
        module=module,
        groups=[{"params": list(module.parameters()), "lr": lr, "weight_decay": 0.0}],
        weight_of=weight,
        loss_sum=lambda rows: (error(rows) * weight[rows]).sum(),
        validate=lambda: {"error": float(error(list(range(n, n + 8))).mean())},
    )


def tuning(tmp_path, name="t", **changes):
    options = RunOptions(root=tmp_path, name=name, threads=1, device="cpu")
    settings = {"batch_size": 4, "epochs": 4, "save_steps": 3, "eval_steps": 2, **changes}
    return Tuning(**settings, run=options)


def train(e, job):
    with Run.open("lplr_q.toy", e) as run:
        progress = fit(run, e, job)
    return progress, job.module.weight.detach().clone()


def test_the_loop_learns_and_micro_batches_do_not_matter(tmp_path):
    progress, once = train(tuning(tmp_path), toy())
    assert progress.curve[0]["step"] == 0
    assert [point["step"] for point in progress.curve] == [0, 2, 4, 6, 8, 10, 12]
    assert progress.best < 0.7 * progress.curve[0]["error"]
    _, parts = train(tuning(tmp_path, "u", batch_size=1, gradient_accumulation_steps=4), toy())
    torch.testing.assert_close(parts, once, rtol=1e-5, atol=1e-6)


def test_a_run_that_broke_off_ends_as_if_it_had_not(tmp_path):
    whole, expected = train(tuning(tmp_path), toy())
    job = toy()
    inner, calls = job.loss_sum, 0

    def breaks(rows):
        nonlocal calls
        calls += 1
        if calls == 8:
            raise KeyboardInterrupt
        return inner(rows)

    job.loss_sum = breaks
    with pytest.raises(KeyboardInterrupt):
        train(tuning(tmp_path, "u"), job)
    again, found = train(tuning(tmp_path, "u"), toy())
    assert torch.equal(found, expected)
    assert again.curve == whole.curve


def test_tuning_that_only_hurts_changes_nothing_and_stops_early(tmp_path):
    job = toy(lr=50.0)
    start = job.module.weight.detach().clone()
    progress, weight = train(tuning(tmp_path, patience=2), job)
    assert progress.curve[-1]["step"] == 4
    assert torch.equal(weight, start)


def test_a_loss_that_is_not_finite_is_an_error(tmp_path):
    job = toy()
    inner = job.loss_sum
    job.loss_sum = lambda rows: inner(rows) * float("nan")
    with pytest.raises(DivergedError, match="loss = nan"):
        train(tuning(tmp_path), job)


def test_steps_schedules_and_groups():
    e = Tuning(batch_size=2, gradient_accumulation_steps=3, epochs=2.5)
    assert steps_of(e, 13) == (3, 8)
    assert steps_of(replace(e, max_steps=5), 13) == (3, 5)
    assert steps_of(Tuning(batch_size=64, epochs=1), 13) == (1, 1)
    p = nn.Parameter(torch.zeros(1))
    groups = tuning_groups(e, {"signs": [p], "factors": []}, signs=0.5)
    assert groups == [{"params": [p], "lr": 0.5, "weight_decay": 0.0}]
    for kind, last in (("linear", 0.0), ("cosine", 0.05), ("constant", 0.5)):
        settings = replace(e, lr_scheduler_type=kind, warmup_ratio=0.5)
        optimizer = torch.optim.SGD(groups)
        schedule = build_schedule(optimizer, settings, 4)
        assert schedule.get_last_lr() == [0.25]
        for _ in range(4):
            optimizer.step()
            schedule.step()
        assert schedule.get_last_lr() == pytest.approx([last])
    progress = Progress()
    assert [progress.add(s, {"x": v}) for s, v in ((0, 2.0), (1, 1.0), (2, 1.0))] == [1, 1, 0]
    assert progress.waited == 1


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"ft_rank": -1}, "ft_rank=-1"),
        ({"batch_size": 0}, "batch_size=0"),
        ({"max_steps": 0}, "max_steps=0"),
        ({"epochs": 0}, "must be positive"),
        ({"warmup_ratio": 2.0}, "warmup_ratio"),
    ],
)
def test_settings_that_cannot_work(changes, said):
    with pytest.raises(ConfigError, match=said):
        Tuning(**changes)


def test_rows_of_a_file_are_at_most_those_there_are(tmp_path):
    path = tmp_path / "a.txt"
    path.write_text("word " * 20, encoding="utf-8")
    rows = token_blocks(byte_tokenizer(), path, split="train", length=16, n=99)
    assert rows.tokens.shape == (6, 16)
    assert len(token_blocks(byte_tokenizer(), path, split="train", length=16, n=2).tokens) == 2


JOB = """
import sys
from pathlib import Path
from dataclasses import replace
from tests.lplr_q.test_finetuning import toy, tuning
from lplr_q.finetuning import together
from lplr_q.tuning_loop import fit
from lplr_q import distributed
import torch
e = tuning(Path(sys.argv[1]), sys.argv[2])
job = toy()
def work(run):
    fit(run, e, job)
    torch.save(job.module.weight.detach(), f"{sys.argv[1]}/{sys.argv[2]}.{distributed.rank()}.pt")
    return run.finish({}) if distributed.rank() == 0 else {}
together("lplr_q.toy", e, work)
"""


@pytest.mark.slow
def test_two_processes_give_the_result_of_one(tmp_path):
    _, alone = train(tuning(tmp_path, "alone"), toy())
    script = tmp_path / "job.py"
    script.write_text(JOB, encoding="utf-8")
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone",
               "--nproc-per-node", "2", str(script), str(tmp_path), "two"]  # fmt: skip
    for _ in range(2):  # the second time the run is finished: all ranks return at once
        done = subprocess.run(
            command, cwd=ROOT, env=child_environment(), capture_output=True, text=True,
            timeout=200, check=False,
        )  # fmt: skip
        assert done.returncode == 0, done.stderr[-3000:]
    for rank in range(2):
        weight = torch.load(tmp_path / f"two.{rank}.pt", weights_only=True)
        torch.testing.assert_close(weight, alone, rtol=1e-5, atol=1e-5)
