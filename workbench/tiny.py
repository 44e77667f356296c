"""Random-weight models of each family, for unit tests and dry runs; and a byte tokenizer.

They have the shapes that catch mistakes: grouped queries (4 heads, 2 key/value heads), a
feed-forward width that is no power of two, tied embeddings, 4 layers. They know nothing.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from workbench.errors import ConfigError, unknown_name

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerFast

VOCAB_SIZE = 259
"""256 bytes after <pad> 0, <s> 1, </s> 2."""

_COMMON: dict[str, Any] = {
    "vocab_size": VOCAB_SIZE,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "hidden_size": 64,
    "num_hidden_layers": 4,
    "tie_word_embeddings": True,
}
_ATTENTION: dict[str, Any] = {
    **_COMMON,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "intermediate_size": 172,
    "max_position_embeddings": 512,
}

FAMILIES: dict[str, tuple[str, str, dict[str, Any]]] = {
    "llama": ("LlamaConfig", "LlamaForCausalLM", {**_ATTENTION, "head_dim": 16}),
    "mistral": (
        "MistralConfig",
        "MistralForCausalLM",
        {**_ATTENTION, "head_dim": 16, "sliding_window": None},
    ),
    "phi3": ("Phi3Config", "Phi3ForCausalLM", {**_ATTENTION, "sliding_window": None}),
    "gpt2": (
        "GPT2Config",
        "GPT2LMHeadModel",
        {
            **{key: _COMMON[key] for key in ("vocab_size", "bos_token_id", "eos_token_id")},
            "pad_token_id": 0,
            "n_embd": 64,
            "n_layer": 4,
            "n_head": 4,
            "n_positions": 512,
            "resid_pdrop": 0.0,
            "embd_pdrop": 0.0,
            "attn_pdrop": 0.0,
        },
    ),
    "mamba": (
        "MambaConfig",
        "MambaForCausalLM",
        {**_COMMON, "state_size": 8, "expand": 2, "conv_kernel": 4, "use_mambapy": False},
    ),
    "mamba2": (
        "Mamba2Config",
        "Mamba2ForCausalLM",
        {
            **_COMMON,
            "state_size": 16,
            "expand": 2,
            "head_dim": 16,
            "num_heads": 8,
            "n_groups": 1,
            "chunk_size": 32,
        },
    ),
}
"""family → (config class, model class, settings); names of classes in `transformers`."""


def tiny_model(family: str, *, seed: int = 0, **overrides: Any) -> PreTrainedModel:
    """A random-weight causal model of `family`, in eval mode, equal for equal seeds.

    `overrides` are fields of the family's Hugging Face config, e.g. `num_hidden_layers=2`.
    """
    import torch
    import transformers

    if family not in FAMILIES:
        raise unknown_name("tiny family", family, FAMILIES)
    config_name, model_name, settings = FAMILIES[family]
    config_class = getattr(transformers, config_name)
    try:
        config = config_class(**{**settings, **overrides})
    except (TypeError, ValueError) as error:
        raise ConfigError(f"tiny:{family} with {overrides}: {error}") from error
    from workbench.models import quiet_transformers

    with quiet_transformers(), torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)  # inside fork_rng: the caller's generator stays as it was
        model = getattr(transformers, model_name)(config)
    return model.eval()


def byte_tokenizer() -> PreTrainedTokenizerFast:
    """A tokenizer with one token per byte after <pad> 0, <s> 1 and </s> 2; any text round-trips.

    Like the built-in models' tokenizer it puts <s> before a text unless told not to.
    """
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors
    from transformers import PreTrainedTokenizerFast

    specials = ["<pad>", "<s>", "</s>"]
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocabulary = {piece: index for index, piece in enumerate(specials + alphabet)}
    backend = Tokenizer(models.BPE(vocab=vocabulary, merges=[]))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    backend.decoder = decoders.ByteLevel()
    backend.add_special_tokens(specials)
    backend.post_processor = processors.TemplateProcessing(
        single="<s> $A", pair="<s> $A $B", special_tokens=[("<s>", vocabulary["<s>"])]
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=backend,
        pad_token="<pad>",
        bos_token="<s>",
        eos_token="</s>",
        clean_up_tokenization_spaces=False,
    )
