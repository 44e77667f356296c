"""A small language model trained within the run, so that the whole pipeline needs no download,
and a few LoRA steps on what compression made of it.

Four blocks of width 128 on the microworld and the standard library's documentation with the
built-in tokenizer; it knows far less than the built-in models, and what it knows survives
compression or does not.
"""

from __future__ import annotations

import warnings
from typing import Any

import torch

from lplr_q.evaluate import load_blocks
from workbench.models import load_tokenizer, quiet_transformers, weights_digest
from workbench.optim import clip, cosine_schedule, parameter_groups
from workbench.run import Run

SOURCES = ("microworld:doc", "stdlib")


def build_toy(tokenizer: Any, *, seed: int, hidden: int = 128, layers: int = 4) -> Any:
    """A Llama of this size with random weights."""
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=hidden,
        intermediate_size=5 * hidden // 2,
        num_hidden_layers=layers,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=512,
        pad_token_id=tokenizer.pad_token_id,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        tie_word_embeddings=True,
    )
    with torch.random.fork_rng(devices=[]), quiet_transformers():
        torch.manual_seed(seed)
        return LlamaForCausalLM(config)


def train_toy(
    run: Run, *, steps: int, length: int = 128, rows: int = 16, hidden: int = 128, layers: int = 4
) -> tuple[Any, Any]:
    """(model, tokenizer) after ``steps`` steps of AdamW; a stopped training goes on."""
    tokenizer = load_tokenizer("micro-mistral")
    model = build_toy(tokenizer, seed=run.streams.integer("toy"), hidden=hidden, layers=layers)
    model = model.to(run.device.device)
    parts = [
        load_blocks(tokenizer, source, tokens=rows * length * max(8, steps // 4), length=length,
                    split="train")
        for source in SOURCES
    ]  # fmt: skip
    tokens = torch.cat([part.tokens for part in parts])
    counted = torch.cat([part.counted for part in parts])
    optimizer = torch.optim.AdamW(parameter_groups(model), lr=3e-3, betas=(0.9, 0.95))
    schedule = cosine_schedule(optimizer, steps, warmup_steps=max(1, steps // 20))
    state = {"model": model, "optimizer": optimizer, "schedule": schedule}
    model.train()
    for step in run.steps(steps, state, phase="toy", label="toy model"):
        drawn = run.streams("toy/batches", index=step).integers(0, len(tokens), rows)
        ids, kept = tokens[drawn].to(run.device.device), counted[drawn].to(run.device.device)
        logits = model(input_ids=ids, use_cache=False).logits[:, :-1]
        nats = torch.nn.functional.cross_entropy(
            logits.flatten(0, 1), ids[:, 1:].flatten(), reduction="none"
        )
        loss = (nats * kept[:, 1:].flatten()).sum() / kept[:, 1:].sum()
        run.require_finite(step, batch={"ids": ids}, loss=loss.detach())
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        clip(model.parameters())
        optimizer.step()
        schedule.step()
        if run.every(step, 20):
            run.log(step, {"toy/loss_nats": loss.detach()})
    model.eval()
    for parameter in model.parameters():
        parameter.requires_grad_(False)
    run.require_same("toy", weights_digest(model))
    return model, tokenizer


def tune_adapter(
    model: Any, tokens: torch.Tensor, counted: torch.Tensor, *, steps: int = 8, seed: int
) -> dict[str, Any]:
    """Loss before and after some steps of a LoRA adapter on the compressed layers.

    The adapter is PEFT's; ``model`` keeps its codes and loses the adapter again. Tokens that are
    not ``counted`` (padding) are read, not learnt.
    """
    from peft import LoraConfig

    from lplr_q.activation_aware.quantized_layer import quantised_layers
    from lplr_q.peft import get_peft_model

    names = sorted({name.rpartition(".")[2] for name, _ in quantised_layers(model)})
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", FutureWarning)  # PEFT asks Transformers an old question
            tuned = get_peft_model(
                model, LoraConfig(r=4, lora_alpha=8, target_modules=names, task_type="CAUSAL_LM")
            )
    trained = [p for p in tuned.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=2e-3)
    losses = []
    labels = tokens.masked_fill(~counted, -100)
    for _ in range(steps + 1):
        loss = tuned(input_ids=tokens, labels=labels, use_cache=False).loss
        losses.append(float(loss.detach()))
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        optimizer.step()
    return {
        "loss_before": losses[0],
        "loss_after": losses[-1],
        "trained_parameters": sum(p.numel() for p in trained),
    }
