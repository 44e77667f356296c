"""Hugging Face side: a registered ``quantization_config`` and quantiser, and saving of compressed
models.

After ``import lplr_q`` a folder written by :func:`save_compressed` loads with plain
``AutoModelForCausalLM.from_pretrained(folder)``; no base model is needed. Layers of GPT-2 (Conv1D,
weight transposed) become ordinary compressed layers; experts that transformers fuses into one
parameter are taken apart first, in the file and in the loaded model alike.
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from lplr_q.activation_aware.discovery import (
    UnfusedExperts,
    is_linear,
    linear_shape,
    unfuse_experts,
    unfused_names,
)
from lplr_q.activation_aware.quantized_layer import LPLRQuantizedLinear, quantised_layers
from workbench import storage
from workbench.errors import ConfigError, DataError

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

METHOD = "lplr_q"
VERSION = 3
"""Of the format; 2 added trained parts, rescaling and trellises, 3 a width for each factor. Older
ones are read."""

SHARD_SIZE = "5GB"


def replace_linears(
    model: nn.Module, modules: dict[str, dict[str, Any]], experts: list[str] | None = None
) -> None:
    """Put an empty compressed layer in the place of every named linear.

    Args:
        model: changed in place; fused experts that hold named linears, and those named in
            ``experts``, are taken apart.
        modules: settings of every compressed layer by name.
        experts: modules that were saved with their experts apart.

    Raises:
        DataError: a name that is no linear of this model, or of another shape; a model that is
            compressed already.
    """
    apart = sorted({*unfused_names(modules), *(experts or [])})
    if apart:
        unfuse_experts(model, apart)
    for name, settings in modules.items():
        try:
            old: Any = model.get_submodule(name)
        except AttributeError:
            raise DataError(f"{name} is compressed in the file but not in this model") from None
        if isinstance(old, LPLRQuantizedLinear):
            raise DataError(f"{name} is compressed already; start from the original model")
        shape = (settings["in_features"], settings["out_features"])
        if not is_linear(old) or linear_shape(old)[::-1] != shape:
            raise DataError(f"{name}: the file holds a {shape} linear layer, the model {old}")
        new = LPLRQuantizedLinear.from_settings(settings, dtype=old.weight.dtype)
        _replace(model, name, new)


def require_uncompressed(model: nn.Module) -> None:
    """Raise ConfigError when the model holds compressed layers, or was quantised otherwise."""
    name = next((name for name, _ in quantised_layers(model)), None)
    if name is not None:
        raise ConfigError(f"{name} is compressed already; compress the original model")
    other = getattr(getattr(model, "config", None), "quantization_config", None)
    if other is not None:
        kind = other.get("quant_method") if isinstance(other, dict) else other.quant_method
        raise ConfigError(f"the model is quantised already ({kind}); compress the original model")


def _replace(model: nn.Module, name: str, new: nn.Module) -> None:
    parent, _, last = name.rpartition(".")
    setattr(model.get_submodule(parent), last, new)


def register() -> None:
    """Register configuration and quantiser with transformers; safe to call again."""
    from transformers.quantizers import auto
    from transformers.quantizers.base import HfQuantizer
    from transformers.utils.quantization_config import QuantizationConfigMixin

    if METHOD in auto.AUTO_QUANTIZER_MAPPING:
        return

    @auto.register_quantization_config(METHOD)
    class LPLRConfig(QuantizationConfigMixin):
        """Per-module settings of every compressed layer."""

        def __init__(
            self, modules: dict[str, dict[str, Any]], version: int = VERSION, **others: Any
        ) -> None:
            self.quant_method: Any = METHOD
            self.version = version
            self.modules = modules
            self.experts: list[str] = list(others.get("experts", []))
            self.notes = others.get("notes", {})
            if version > VERSION:
                raise DataError(
                    f"the model was written by format version {version}, this is {VERSION}; "
                    "update fivefold"
                )

    @auto.register_quantizer(METHOD)
    class LPLRQuantizer(HfQuantizer):
        """Swaps linears for compressed layers before the weights are read."""

        requires_calibration = True

        def _process_model_before_weight_loading(self, model: Any, **kwargs: Any) -> Any:
            with torch.device("meta"):
                config = self.quantization_config
                replace_linears(model, config.modules, config.experts)
            return model

        def _process_model_after_weight_loading(self, model: Any, **kwargs: Any) -> Any:
            for parameter in model.parameters():  # embeddings and norms stay as they are
                parameter.requires_grad_(False)
            return model

        def is_serializable(self) -> Any:
            """Compressed models can be saved again."""
            return True

        @property
        def is_trainable(self) -> Any:
            """Adapters, signs and the released components train; the codes do not."""
            return True


def exact_dtype(model: nn.Module) -> torch.dtype:
    """The narrowest of float16, bfloat16, float32 that holds every parameter exactly.

    Parameters inside compressed layers have a type of their own (:func:`own_parameters`).
    """
    apart = own_parameters(model)
    others = [p for name, p in model.named_parameters() if name not in apart]
    for dtype in (torch.float16, torch.bfloat16):
        if all(bool((p == p.to(dtype).to(p.dtype)).all()) for p in others):
            return dtype
    return torch.float32


def own_parameters(model: nn.Module) -> set[str]:
    """Names of the components that are parameters of compressed layers, bfloat16 in the file.

    Raises:
        ConfigError: a layer is still being trained.
    """
    names: set[str] = set()
    for name, layer in quantised_layers(model):
        for leaf, parameter in layer.named_parameters():
            if leaf == "bias":
                continue
            if parameter.dtype != torch.bfloat16:
                raise ConfigError(f"{name}.{leaf} is in training; call merge_trained(model) first")
            names.add(f"{name}.{leaf}")
    return names


def compression_config(model: nn.Module, notes: dict[str, Any] | None = None) -> Any:
    """The ``quantization_config`` of a model that holds compressed layers.

    Raises:
        ConfigError: it holds none.
    """
    register()
    from transformers.quantizers import auto

    modules = {name: layer.settings() for name, layer in quantised_layers(model)}
    if not modules:
        raise ConfigError(f"{type(model).__name__} holds no compressed layer; compress it first")
    experts = [name for name, m in model.named_modules() if isinstance(m, UnfusedExperts)]
    build = auto.AUTO_QUANTIZATION_CONFIG_MAPPING[METHOD]
    return build(modules=modules, experts=experts, notes=notes or {})


CARD = """---
library_name: transformers
tags: [lplr_q]
---
Compressed with lplr_q (W = Q + L R): {bits:.3f} bits per weight in the linear layers of the
decoder blocks.

```python
import lplr_q  # registers the format
from transformers import AutoModelForCausalLM, AutoTokenizer

model = AutoModelForCausalLM.from_pretrained("this folder")
```
"""


def save_compressed(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase | None,
    folder: Path | str,
    *,
    notes: dict[str, Any] | None = None,
    max_shard_size: int | str = SHARD_SIZE,
) -> dict[str, float]:
    """Write config, weights, tokenizer and model card; everything that is not compressed is stored
    too.

    Args:
        model: with compressed layers, none in training.
        tokenizer: saved beside it.
        folder: receives the files.
        notes: go into the configuration as they are.
        max_shard_size: of each weight file, as in ``save_pretrained``.

    Returns what the file takes: see :func:`storage_report`.

    Raises:
        ConfigError: no compressed layer, or one in training.
    """
    folder = Path(folder)
    model.config.quantization_config = compression_config(model, notes)
    dtype, apart = exact_dtype(model), own_parameters(model)
    kept = {name: p.data for name, p in model.named_parameters()}
    config_dtype = model.config.dtype
    try:
        for name, parameter in model.named_parameters():
            if name not in apart:
                parameter.data = parameter.data.to(dtype)
        model.config.dtype = dtype
        # transformers removes shards of an earlier save, but not their table of contents
        (folder / "model.safetensors.index.json").unlink(missing_ok=True)
        model.save_pretrained(
            folder, max_shard_size=max_shard_size, save_original_format=not _experts(model)
        )
        for path in folder.glob("*.safetensors"):
            storage.write_safetensors(path, storage.read_safetensors(path), {"format": "pt"})
    finally:
        for name, parameter in model.named_parameters():
            parameter.data = kept[name]
        model.config.dtype = config_dtype
    if tokenizer is not None:
        tokenizer.save_pretrained(folder)
    report = storage_report(folder)
    card = CARD.format(bits=report["bits_per_weight"])
    storage.write_text(folder / "README.md", card)
    return report


def _experts(model: nn.Module) -> bool:
    return any(isinstance(module, UnfusedExperts) for module in model.modules())


def storage_report(folder: Path | str) -> dict[str, float]:
    """Bits per weight from the *files*: tensor bytes of the compressed layers, and of the whole
    model.

    ``bits_per_weight`` counts codes, scales and signs of the compressed layers;
    ``model_bits_per_weight`` everything in the safetensors files; ``header_bytes`` is what the
    files' tables of contents add.
    """
    folder = Path(folder)
    config = storage.read_json(folder / "config.json")
    modules = config["quantization_config"]["modules"]
    weights = sum(s["in_features"] * s["out_features"] for s in modules.values())
    compressed = other = other_count = header_bytes = 0
    sizes = {"F32": 4, "F16": 2, "BF16": 2, "I64": 8, "I32": 4, "I16": 2, "U8": 1, "I8": 1}
    files = sorted(folder.glob("*.safetensors"))
    if not files:
        raise DataError(f"{folder} holds no safetensors file")
    for path in files:
        with open(path, "rb") as handle:
            length = int.from_bytes(handle.read(8), "little")
            header = storage.parse_json(handle.read(length).decode("utf-8"))
        header_bytes += 8 + length
        for name, entry in header.items():
            if name == "__metadata__":
                continue
            low, high = entry["data_offsets"]
            module, _, leaf = name.rpartition(".")
            if module in modules and leaf != "bias":
                compressed += high - low
            else:
                other += high - low
                other_count += (high - low) // sizes[entry["dtype"]]
    return {
        "bits_per_weight": 8 * compressed / weights,
        "model_bits_per_weight": 8 * (compressed + other) / (weights + other_count),
        "compressed_bytes": compressed,
        "other_bytes": other,
        "header_bytes": header_bytes,
        "weights": weights,
        "file_bytes": sum(path.stat().st_size for path in files),
    }
