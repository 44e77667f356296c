"""L R as LoRA adapter, LoRA adapters on compressed layers.   [PEFT; LoRA]

    lora_A = R, lora_B = L, alpha = r:    W^ = Q^ + lora_B lora_A

Four ways between the two:

* :func:`export_adapter` writes L, R of every compressed layer as an adapter folder that
  ``peft.PeftModel.from_pretrained`` puts on the model without them (:func:`without_factors`, or a
  dense model with the weights Q^);
* :func:`import_adapter` adds an adapter folder to the layers as parameters (the ``ft_rank`` part);
* :func:`get_peft_model` and :func:`load_adapter` train and load adapters on top of compressed
  layers;
* merging such an adapter (``merge_and_unload``) adds it to the layers as parameters as well: the
  codes cannot take it up.

:func:`enable` does for ``peft.get_peft_model`` and ``PeftModel.from_pretrained`` themselves what
:func:`get_peft_model` and :func:`load_adapter` do.
"""

from __future__ import annotations

import copy
from functools import lru_cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

from torch import Tensor, nn

from lplr_q.activation_aware.components import add_components, drop_components, take_factors
from lplr_q.activation_aware.quantized_layer import LPLRQuantizedLinear, quantised_layers
from workbench import storage
from workbench.errors import ConfigError, DataError

if TYPE_CHECKING:
    from peft import LoraConfig, PeftModel

PREFIX = "base_model.model."
WEIGHTS = "adapter_model.safetensors"
CONFIG = "adapter_config.json"


# ---------------------------------------------------------------- adapters on compressed layers


@lru_cache(maxsize=1)
def _lora_layer() -> type[nn.Module]:
    """PEFT's LoRA layer around a compressed one; made at first use because it needs PEFT."""
    from peft.tuners.lora.layer import Linear
    from peft.tuners.tuners_utils import check_adapters_to_merge

    class LPLRLoraLinear(Linear):
        """y = base(x) + scaling lora_B(lora_A(x)); merging adds parameters to the base layer."""

        def _get_in_out_features(self, module: nn.Module) -> tuple[int, int]:
            assert isinstance(module, LPLRQuantizedLinear)
            return module.in_features, module.out_features

        def _plain(self, adapter: str) -> None:
            if adapter in self.lora_variant or self.lora_bias[adapter]:
                raise ConfigError(
                    f"adapter {adapter!r} is no plain LoRA (a variant or a bias): it cannot be "
                    "merged into a compressed layer; keep it as an adapter"
                )

        def merge(self, safe_merge: bool = False, adapter_names: list[str] | None = None) -> None:
            """Add the adapters' products to the base layer as parameters of 16 bits."""
            base = self.get_base_layer()
            for adapter in check_adapters_to_merge(self, adapter_names):
                if adapter not in self.lora_A:
                    continue
                self._plain(adapter)
                left = self.lora_B[adapter].weight * self.scaling[adapter]
                right = self.lora_A[adapter].weight
                if safe_merge and not bool(left.isfinite().all() & right.isfinite().all()):
                    raise DataError(f"adapter {adapter!r} holds values that are not finite")
                add_components(base, left, right)
                self.merged_adapters.append(adapter)

        def unmerge(self) -> None:
            """Take them out again."""
            while self.merged_adapters:
                adapter = self.merged_adapters.pop()
                if adapter in self.lora_A:
                    drop_components(self.get_base_layer(), self.r[adapter])

    return LPLRLoraLinear


def prepare_config(config: LoraConfig) -> LoraConfig:
    """The same configuration, told how compressed layers are wrapped."""
    prepared = copy.deepcopy(config)
    prepared._register_custom_module({LPLRQuantizedLinear: _lora_layer()})
    return prepared


def get_peft_model(model: nn.Module, config: LoraConfig, **options: Any) -> PeftModel:
    """``peft.get_peft_model`` for a model that holds compressed layers."""
    import peft

    return peft.get_peft_model(model, prepare_config(config), **options)  # pyright: ignore[reportArgumentType]


def load_adapter(
    model: nn.Module, folder: Path | str, *, is_trainable: bool = False, **options: Any
) -> PeftModel:
    """``PeftModel.from_pretrained`` for a model that holds compressed layers."""
    import peft

    read_adapter(folder)
    config = prepare_config(peft.LoraConfig.from_pretrained(str(folder)))
    config.inference_mode = not is_trainable
    return peft.PeftModel.from_pretrained(
        model,  # pyright: ignore[reportArgumentType]
        str(folder),
        config=config,
        is_trainable=is_trainable,
        **options,
    )


def enable() -> None:
    """Let plain ``peft.get_peft_model`` and ``PeftModel.from_pretrained`` accept compressed
    layers in this process; safe to call again."""
    from peft.tuners.lora.model import LoraModel

    original = LoraModel._create_new_module
    if getattr(original, "knows_lplr_q", False):
        return

    def create(lora_config: Any, adapter_name: str, target: nn.Module, **options: Any) -> nn.Module:
        base = target.get_base_layer() if hasattr(target, "get_base_layer") else target
        if isinstance(base, LPLRQuantizedLinear):
            options.pop("device_map", None)
            return _lora_layer()(target, adapter_name, config=lora_config, **options)
        return original(lora_config, adapter_name, target, **options)

    create.knows_lplr_q = True  # pyright: ignore[reportFunctionMemberAccess]
    LoraModel._create_new_module = staticmethod(create)  # pyright: ignore[reportAttributeAccessIssue]


# ---------------------------------------------------------------- L R as adapter folder


def without_factors(model: nn.Module) -> nn.Module:
    """A copy of the model whose compressed layers hold Q alone."""
    bare = copy.deepcopy(model)
    for name, layer in quantised_layers(bare):
        if not layer.form.q_bits:
            raise ConfigError(f"{name} has no Q; nothing would be left of it")
        if layer.form.rank:
            take_factors(layer)
    return bare


def export_adapter(
    model: nn.Module, folder: Path | str, *, base_model: str | None = None
) -> dict[str, int]:
    """Write L, R of every compressed layer as LoRA adapter; rank of each layer by name.

    Args:
        model: with compressed layers; it is not changed.
        folder: receives adapter_config.json and adapter_model.safetensors (float32).
        base_model: where the model without the factors lies, noted in the configuration.

    Raises:
        ConfigError: no compressed layer has factors.
    """
    from peft import LoraConfig

    tensors: dict[str, Tensor] = {}
    ranks: dict[str, int] = {}
    for name, layer in quantised_layers(model):
        if layer.form.rank:
            for leaf, value in layer.lora_state().items():
                tensors[f"{PREFIX}{name}.{leaf}.weight"] = value.cpu()
            ranks[name] = layer.form.rank
    if not ranks:
        raise ConfigError("no compressed layer of this model has factors; nothing to export")
    usual = max(ranks.values())
    pattern = {name: rank for name, rank in ranks.items() if rank != usual}
    config = LoraConfig(
        r=usual,
        lora_alpha=usual,
        target_modules=sorted(ranks),
        rank_pattern=dict(pattern),
        alpha_pattern=dict(pattern),
        base_model_name_or_path=base_model,
        inference_mode=True,
    )
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    storage.write_safetensors(folder / WEIGHTS, tensors, {"format": "pt"})
    config.save_pretrained(str(folder))
    return ranks


def read_adapter(folder: Path | str) -> dict[str, tuple[Tensor, Tensor]]:
    """(lora_B times its scaling, lora_A) of every module of an adapter folder.

    Raises:
        DataError: a file is missing or damaged, the adapter is no plain LoRA, or a pair is
            incomplete.
    """
    folder = Path(folder)
    for name in (CONFIG, WEIGHTS):
        if not (folder / name).is_file():
            raise DataError(f"{folder}: no {name}; expected a PEFT adapter folder")
    config = storage.read_json(folder / CONFIG)
    if config.get("peft_type") != "LORA" or config.get("use_dora"):
        raise DataError(f"{folder / CONFIG}: only plain LoRA adapters become factors")
    tensors = storage.read_safetensors(folder / WEIGHTS)
    pairs: dict[str, tuple[Tensor, Tensor]] = {}
    for key, right in tensors.items():
        if not key.endswith(".lora_A.weight"):
            continue
        name = key.removeprefix(PREFIX).removesuffix(".lora_A.weight")
        left = tensors.get(key.replace(".lora_A.", ".lora_B."))
        if left is None:
            raise DataError(f"{folder / WEIGHTS}: {name} has lora_A but no lora_B")
        pairs[name] = (left.float() * _scaling(config, name, right.shape[0]), right.float())
    if len(tensors) != 2 * len(pairs):
        raise DataError(f"{folder / WEIGHTS}: holds more than pairs of lora_A and lora_B")
    return pairs


def _scaling(config: dict[str, Any], name: str, rank: int) -> float:
    import re

    alpha = config["lora_alpha"]
    for pattern, value in (config.get("alpha_pattern") or {}).items():
        if re.match(rf"(.*\.)?({pattern})$", name):
            alpha = value
            break
    return alpha / (rank**0.5 if config.get("use_rslora") else rank)


def import_adapter(model: nn.Module, folder: Path | str) -> list[str]:
    """Add an adapter folder to the compressed layers as parameters; names of the layers changed.

    Raises:
        DataError: the adapter is for layers that are not compressed.
    """
    pairs = read_adapter(folder)
    layers = dict(quantised_layers(model))
    foreign = sorted(set(pairs) - set(layers))
    if foreign:
        raise DataError(
            f"{folder}: {foreign[0]} (and {len(foreign) - 1} more) is no compressed layer of this "
            "model; put the adapter on with load_adapter instead"
        )
    for name, (left, right) in pairs.items():
        add_components(layers[name], left, right)
    return sorted(pairs)
