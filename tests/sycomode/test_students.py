"""Readers: equalities that hold before training, what training may touch, artefacts that reload."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from sycomode import students
from sycomode.students import Prompted, build_student
from workbench.errors import ConfigError, DataError
from workbench.seeding import Streams
from workbench.tiny import tiny_model

PROMPT = list(range(20, 32))
TALK = torch.tensor([[40, 41, 42, 43, 44], [50, 51, 52, 0, 0]])
KINDS = ("full", "lora", "memory", "kv")


@pytest.fixture(scope="module")
def teacher() -> Prompted:
    model = tiny_model("mistral", num_hidden_layers=2).requires_grad_(False)
    return Prompted(model, 1, PROMPT)


def student(kind: str, teacher: Prompted, **options):
    options = {"tokens": 4, "rank": 2, **options}
    return build_student(kind, teacher, init=Streams(0).torch("init"), **options)


def largest(a: torch.Tensor, b: torch.Tensor, skip: int = 0) -> float:
    return (a - b)[:, skip:].abs().max().item()


@torch.no_grad()
def test_cached_prompt_equals_reading_it_again(teacher: Prompted):
    naive = Prompted(teacher.model, 1, PROMPT, cached=False)
    assert largest(teacher.logits(TALK), naive.logits(TALK)) < 1e-5
    assert largest(teacher.logits(TALK[:, :1]), naive.logits(TALK[:, :1])) < 1e-5


@torch.no_grad()
def test_alignment_prediction_t_stands_for_token_t(teacher: Prompted):
    """By hand: the model on [BOS, p, x], its output at BOS + prompt + t − 1 predicts x_t."""
    whole = torch.cat([torch.tensor([[1, *PROMPT]]).expand(2, -1), TALK], dim=1)
    by_hand = teacher.model(whole).logits[:, len(PROMPT) : len(PROMPT) + TALK.shape[1]]
    assert largest(teacher.logits(TALK), by_hand) < 1e-5


@torch.no_grad()
@pytest.mark.parametrize("kind", ["full", "lora"])
def test_weights_start_at_the_bare_model(kind: str, teacher: Prompted):
    bare = Prompted(teacher.model, 1, cached=False)
    assert torch.equal(student(kind, teacher).logits(TALK), bare.logits(TALK))


@torch.no_grad()
def test_the_prompt_as_artefact_is_the_teacher(teacher: Prompted):
    """A KV prefix of the whole prompt, and its embeddings as memory, need no training at all."""
    kv = student("kv", teacher, tokens=len(PROMPT) + 1)
    memory = student("memory", teacher, tokens=len(PROMPT))
    assert largest(kv.logits(TALK), teacher.logits(TALK), skip=1) < 1e-5
    assert largest(memory.logits(TALK), teacher.logits(TALK)) < 1e-5


@torch.no_grad()
@pytest.mark.parametrize("kind", KINDS)
def test_padding_changes_nothing(kind: str, teacher: Prompted):
    reader = student(kind, teacher)
    alone = reader.logits(TALK[1:, :3])
    assert largest(reader.logits(TALK)[1:, :3], alone, skip=reader.unpredicted) < 1e-5


def train_a_little(reader, steps: int = 2) -> None:
    optimizer = torch.optim.AdamW(reader.trained().values(), lr=1e-2)
    for _ in range(steps):
        optimizer.zero_grad(set_to_none=True)
        reader.logits(TALK)[:, reader.unpredicted :].log_softmax(-1)[..., 7].mean().neg().backward()
        optimizer.step()


@pytest.mark.parametrize("kind", ["lora", "memory", "kv"])
def test_frozen_tensors_stay_bit_identical(kind: str, teacher: Prompted):
    before = {k: v.clone() for k, v in teacher.model.state_dict().items()}
    reader = student(kind, teacher)
    first = {k: v.clone() for k, v in reader.state_dict().items()}
    anchor = reader.anchor.clone() if kind == "kv" else None
    train_a_little(reader)
    after = teacher.model.state_dict()
    assert all(torch.equal(before[k], after[k]) for k in before)
    assert any(not torch.equal(first[k], v) for k, v in reader.state_dict().items())
    assert not any(p.requires_grad for p in teacher.model.parameters())
    if anchor is not None:
        assert torch.equal(anchor, reader.anchor)


def test_full_moves_its_own_copy_only(teacher: Prompted):
    before = {k: v.clone() for k, v in teacher.model.state_dict().items()}
    reader = student("full", teacher)
    train_a_little(reader)
    assert all(torch.equal(before[k], v) for k, v in teacher.model.state_dict().items())
    assert largest(reader.logits(TALK), Prompted(teacher.model, 1).logits(TALK)) > 1e-3


def test_trained_parameters_are_counted_right(teacher: Prompted):
    sizes = {
        kind: sum(p.numel() for p in student(kind, teacher).trained().values()) for kind in KINDS
    }
    linear = [m for m in teacher.model.model.modules() if isinstance(m, torch.nn.Linear)]
    assert sizes["lora"] == sum(2 * (m.in_features + m.out_features) for m in linear)
    assert sizes["memory"] == 4 * 64
    assert sizes["kv"] == 3 * 2 * 2 * 2 * 16  # 3 free positions, 2 layers, keys and values, 2 heads
    assert sizes["full"] == sum(p.numel() for p in teacher.model.parameters())


@pytest.mark.parametrize("kind", KINDS)
def test_artefact_reloads_to_equal_logits(kind: str, teacher: Prompted, tmp_path: Path):
    reader = student(kind, teacher)
    train_a_little(reader)
    reader.save(tmp_path / "artefact")
    with torch.no_grad():
        again = reader.reload(tmp_path / "artefact", teacher.model)(TALK)
        assert largest(again, reader.logits(TALK)) < 1e-6
    names = {path.name for path in (tmp_path / "artefact").iterdir()}
    assert names & {"adapter_config.json", "config.json"}
    assert not [path for path in tmp_path.iterdir() if path.name.startswith(".tmp")]


def test_state_goes_back_into_a_fresh_student(teacher: Prompted):
    reader = student("lora", teacher)
    train_a_little(reader)
    other = student("lora", teacher)
    other.load_state_dict(reader.state_dict())
    with torch.no_grad():
        assert torch.equal(other.logits(TALK), reader.logits(TALK))
    with pytest.raises(DataError, match="tensors given"):
        other.load_state_dict({"nothing": torch.zeros(1)})


def test_initialisation_comes_from_the_stream_alone(teacher: Prompted):
    torch.manual_seed(0)
    one = student("lora", teacher).state_dict()
    torch.manual_seed(1)
    state = torch.get_rng_state()
    two = student("lora", teacher).state_dict()
    assert torch.equal(torch.get_rng_state(), state)
    assert all(torch.equal(one[k], two[k]) for k in one)


def test_gpt2_like_names_train_too(teacher: Prompted):
    model = tiny_model("gpt2", n_layer=2).requires_grad_(False)
    other = Prompted(model, 1, PROMPT)
    for kind in KINDS:
        reader = student(kind, other)
        before = reader.logits(TALK).detach().clone()
        train_a_little(reader)
        assert largest(reader.logits(TALK), before, skip=reader.unpredicted) > 1e-4


def test_state_space_models_read_without_a_cache():
    model = tiny_model("mamba", num_hidden_layers=1).requires_grad_(False)
    teacher = Prompted(model, 1, PROMPT)
    assert not teacher.cached
    with torch.no_grad():
        assert teacher.logits(TALK).shape == (2, 5, model.config.vocab_size)
    with pytest.raises(ConfigError, match="key/value cache"):
        student("kv", teacher)


def test_kv_bytes_of_llama_3_8b():
    class Config:
        num_hidden_layers, num_key_value_heads, head_dim = 32, 8, 128

        def get_text_config(self):
            return self

    class Model:
        config, dtype = Config(), torch.bfloat16

    assert students.kv_bytes(Model(), 1) == 131_072  # 128 KiB per token in bf16


@pytest.mark.parametrize(
    ("kind", "tokens", "what"),
    [("memory", 13, "13 tokens"), ("kv", 14, "14 positions"), ("kv", 1, "at least 2")],
)
def test_more_tokens_than_the_prompt_has(kind: str, tokens: int, what: str, teacher: Prompted):
    with pytest.raises(ConfigError, match=what):
        student(kind, teacher, tokens=tokens)


def test_unknown_student_names_the_nearest(teacher: Prompted):
    with pytest.raises(ConfigError, match="nearest: lora"):
        student("lorra", teacher)


def test_too_long_an_input_says_by_how_much(teacher: Prompted):
    with pytest.raises(DataError, match="1 more than the model's 512"):
        teacher.logits(torch.zeros(1, 500, dtype=torch.long))


@pytest.mark.slow
def test_peft_folder_loads_in_a_fresh_process(teacher: Prompted, tmp_path: Path):
    teacher.model.save_pretrained(tmp_path / "base")
    expected = {}
    for kind in ("lora", "memory", "kv"):
        reader = student(kind, teacher)
        train_a_little(reader)
        reader.save(tmp_path / kind)
        with torch.no_grad():
            expected[kind] = reader.logits(TALK).contiguous()
    save_file(expected, str(tmp_path / "expected.safetensors"))
    program = f"""
import torch
from peft import PeftModel
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM
talk = torch.tensor({TALK.tolist()})
bos = torch.ones(2, 1, dtype=torch.long)
expected = load_file({str(tmp_path / "expected.safetensors")!r})
for kind in ("lora", "memory", "kv"):
    base = AutoModelForCausalLM.from_pretrained({str(tmp_path / "base")!r})
    model = PeftModel.from_pretrained(base, {str(tmp_path)!r} + "/" + kind).eval()
    ids = torch.cat([bos, talk], 1)[:, :-1] if kind == "lora" else talk[:, :-1]
    with torch.no_grad():
        mine = model(input_ids=ids).logits[:, -4:]
    difference = (mine - expected[kind][:, -4:]).abs().max().item()
    assert difference < 1e-5, (kind, difference)
"""
    done = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr[-2000:]
    assert set(load_file(str(tmp_path / "expected.safetensors"))) == set(expected)
