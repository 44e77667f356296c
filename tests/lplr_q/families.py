"""Two-block models of every family whose linear layers differ in kind."""

from __future__ import annotations

from typing import Any

from workbench.models import quiet_transformers
from workbench.tiny import tiny_model

COMMON: dict[str, Any] = {
    "vocab_size": 259, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2, "hidden_size": 64,
    "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 16,
    "intermediate_size": 96, "max_position_embeddings": 512, "tie_word_embeddings": True,
}  # fmt: skip
OTHERS: dict[str, tuple[str, str, dict[str, Any]]] = {
    "qwen2": ("Qwen2Config", "Qwen2ForCausalLM", {}),
    "qwen3": ("Qwen3Config", "Qwen3ForCausalLM", {}),
    "mixtral": (
        "MixtralConfig",
        "MixtralForCausalLM",
        {"intermediate_size": 48, "num_local_experts": 4, "num_experts_per_tok": 2},
    ),
    "qwen2_moe": (
        "Qwen2MoeConfig",
        "Qwen2MoeForCausalLM",
        {
            "num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 48,
            "shared_expert_intermediate_size": 48,
        },
    ),
}  # fmt: skip
FAMILIES = ["llama", "mistral", "phi3", "gpt2", "mamba", "mamba2", *OTHERS]
MOE = ("mixtral", "qwen2_moe")


def family_model(family: str, seed: int = 0) -> Any:
    """Random weights, eval mode."""
    if family not in OTHERS:
        layers = {"n_layer": 2} if family == "gpt2" else {"num_hidden_layers": 2}
        return tiny_model(family, seed=seed, **layers)
    import torch
    import transformers

    config_name, model_name, changes = OTHERS[family]
    config = getattr(transformers, config_name)(**{**COMMON, **changes})
    with quiet_transformers(), torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return getattr(transformers, model_name)(config).eval()
