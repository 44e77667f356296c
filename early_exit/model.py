"""A backbone with exits: build, save, load, generate.

    model = EarlyExitModel.from_pretrained("micro-mistral", exits_dir="runs/early_exit/mine")
    out = model.generate("Q what is", max_new_tokens=40, threshold=0.9, policy="defer")
    out.text, out.exit_layers, out.speedups

The folder of the exits holds `exits.safetensors` and `exit_config.json` only; the backbone is
named in it, never copied.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from early_exit.adapters.base import Adapter, adapt
from early_exit.data import frame
from early_exit.engine import Choose, Decoded, Engine, greedy
from early_exit.heads import Exits, check_exits, default_exits
from workbench import storage
from workbench.errors import ConfigError, DataError

TENSORS = "exits.safetensors"
CONFIG = "exit_config.json"
IDENTITY = ("model_type", "hidden_size", "num_hidden_layers", "vocab_size", "num_attention_heads")
"""Fields of a backbone's config that exits depend on."""


def backbone_hash(config: Any) -> str:
    """SHA-256 of the config fields that decide whether exits fit; weights may be compressed."""
    fields = {name: getattr(config, name, None) for name in IDENTITY}
    return hashlib.sha256(json.dumps(fields, sort_keys=True).encode()).hexdigest()


def exit_config(
    adapter: Adapter,
    exits: Exits,
    *,
    backbone: str,
    label_topk: int,
    thresholds: dict[str, float] | None = None,
    training: dict[str, Any] | None = None,
) -> dict[str, Any]:
    """What `exit_config.json` holds."""
    return {
        "format": 1,
        "backbone": backbone,
        "backbone_sha256": backbone_hash(adapter.model.config),
        "family": adapter.family,
        "layers": adapter.n_layers,
        "exits": list(exits.exits),
        "head": "gate",
        "gate_width": adapter.gate_width,
        "emission": exits.emission,
        "label": "final_in_exit_topk",
        "label_topk": label_topk,
        "thresholds": thresholds or {},
        "training": training or {},
    }


def load_exits(
    folder: Path | str, adapter: Adapter, *, force: bool = False
) -> tuple[Exits, dict[str, Any]]:
    """The exits of a folder, checked against the backbone.

    Raises:
        DataError: no such folder, damaged files.
        ConfigError: trained for another backbone (unless `force`), or tensors that do not fit.
    """
    folder = Path(folder)
    if not (folder / CONFIG).is_file():
        raise DataError(
            f"{folder}: no {CONFIG} in this folder; train exits with "
            "python -m early_exit.train --model MODEL and give its run folder"
        )
    config = storage.read_json(folder / CONFIG)
    missing = [k for k in ("exits", "emission", "backbone_sha256", "layers") if k not in config]
    if missing:
        raise DataError(f"{folder / CONFIG}: field {missing[0]!r} is missing; train the exits anew")
    if config["backbone_sha256"] != backbone_hash(adapter.model.config) and not force:
        raise ConfigError(
            f"{folder}: trained for backbone {config.get('backbone')!r} with {config['layers']} "
            f"blocks, this is {type(adapter.model).__name__} with {adapter.n_layers}; train exits "
            "for it, or pass --force if you know better"
        )
    layers = check_exits(config["exits"], adapter.n_layers)
    exits = Exits(layers, adapter.gate_width, adapter.width, config["emission"])
    exits.load(storage.read_safetensors(folder / TENSORS), str(folder / TENSORS))
    if config.get("tensors_sha256", found := storage.sha256(folder / TENSORS)) != found:
        raise DataError(
            f"{folder / TENSORS}: altered, its SHA-256 is not the one in {CONFIG}; restore a copy "
            "or train the exits anew"
        )
    exits.to(adapter.device).requires_grad_(False)
    return exits, config


@dataclass
class Generated(Decoded):
    """A decoded continuation with its text and its three accountings."""

    text: str = ""
    """The continuation."""
    pieces: tuple[str, ...] = ()
    """Text of each token."""
    speedups: dict[str, float] | None = None
    """S_blocks, S_work, S_arithmetic."""


class EarlyExitModel:
    """A frozen causal language model with trained exits."""

    def __init__(self, adapter: Adapter, tokenizer: Any, exits: Exits, config: dict[str, Any]):
        self.adapter, self.tokenizer = adapter, tokenizer
        self.exits, self.config = exits, config

    @classmethod
    def from_backbone(
        cls,
        model: Any,
        tokenizer: Any,
        *,
        exits: Sequence[int] = (),
        emission: str = "lens",
        name: str = "",
    ) -> EarlyExitModel:
        """Untrained exits on a loaded backbone (placed by the published rule if none are given)."""
        adapter = adapt(model)
        layers = check_exits(exits or default_exits(adapter.n_layers), adapter.n_layers)
        heads = Exits(layers, adapter.gate_width, adapter.width, emission).to(adapter.device)
        config = exit_config(adapter, heads, backbone=name, label_topk=1)
        return cls(adapter, tokenizer, heads.requires_grad_(False), config)

    @classmethod
    def from_pretrained(
        cls,
        backbone: str | None = None,
        *,
        exits_dir: Path | str,
        device: Any = None,
        dtype: Any = None,
        force: bool = False,
    ) -> EarlyExitModel:
        """A backbone (by default the one named in the exits' config) with its trained exits."""
        from workbench.models import load_model

        named = Path(exits_dir) / CONFIG
        if backbone is None:
            if not named.is_file():
                raise DataError(f"{exits_dir}: no {CONFIG} in this folder; give a training run")
            backbone = str(storage.read_json(named).get("backbone", ""))
        model, tokenizer = load_model(backbone, device=device, dtype=dtype)
        adapter = adapt(model)
        exits, config = load_exits(exits_dir, adapter, force=force)
        return cls(adapter, tokenizer, exits, config)

    def save_exits(self, folder: Path | str) -> Path:
        """Write `exits.safetensors` and `exit_config.json`."""
        folder = Path(folder)
        file = storage.write_safetensors(folder / TENSORS, self.exits.tensors())
        storage.write_json(folder / CONFIG, self.config | {"tensors_sha256": storage.sha256(file)})
        return folder

    def engine(self, **settings: Any) -> Engine:
        """A decoding engine with these settings (see `Engine`)."""
        if settings.get("criterion", "gate") == "gate" and not self.exits.gates.weight.any():
            raise ConfigError(
                "criterion gate without trained gates; run python -m early_exit.train, or use "
                "criterion maxprob, margin, entropy or saturation"
            )
        return Engine(self.adapter, self.exits, **settings)

    def generate(
        self,
        prompt: str | Tensor,
        *,
        max_new_tokens: int = 50,
        choose: Choose = greedy,
        stop: bool = True,
        **settings: Any,
    ) -> Generated:
        """Continue a prompt; `settings` are the engine's (criterion, threshold, policy, …).

        Raises:
            DataError: the prompt is empty.
        """
        if isinstance(prompt, str):
            ids = frame(self.tokenizer, prompt)
            if self.tokenizer.eos_token_id is not None:
                ids = ids[:-1]
            prompt = torch.tensor(ids, dtype=torch.long)
        eos = self.tokenizer.eos_token_id if stop else None
        engine = self.engine(**settings)
        done = engine.decode(prompt, max_new_tokens, eos=eos, choose=choose)
        pieces = tuple(self.tokenizer.decode([token]) for token in done.tokens)
        return Generated(
            **vars(done),
            text=self.tokenizer.decode(done.tokens, skip_special_tokens=True),
            pieces=pieces,
            speedups=done.tally.speedups(self.adapter.costs(), self.adapter.width),
        )


def sampler(
    *,
    temperature: float = 0.0,
    top_k: int = 0,
    top_p: float = 1.0,
    repetition_penalty: float = 1.0,
    generator: torch.Generator | None = None,
) -> Choose:
    """Greedy choice (temperature 0) or sampling through the Hugging Face logits processors.

    Raises:
        ConfigError: a negative temperature.
    """
    if temperature < 0:
        raise ConfigError(f"temperature={temperature}: expected 0 (greedy) or more")
    from transformers import (
        LogitsProcessorList,
        RepetitionPenaltyLogitsProcessor,
        TemperatureLogitsWarper,
        TopKLogitsWarper,
        TopPLogitsWarper,
    )

    chain = LogitsProcessorList()
    if repetition_penalty != 1.0:
        chain.append(RepetitionPenaltyLogitsProcessor(repetition_penalty))
    if temperature > 0:
        chain.append(TemperatureLogitsWarper(float(temperature)))
        if top_k > 0:
            chain.append(TopKLogitsWarper(top_k))
        if top_p < 1:
            chain.append(TopPLogitsWarper(top_p))

    def choose(logits: Tensor, known: list[int]) -> int:
        ids = torch.tensor([known], device=logits.device)
        scores: Any = chain(ids, logits[None].clone().float())[0]
        if temperature == 0:
            return int(scores.argmax())
        return int(torch.multinomial(scores.softmax(-1), 1, generator=generator))

    return choose
