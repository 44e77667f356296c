"""One loader for every language model: built-in name, local folder, hub id, or `tiny:<family>`.

    model, tokenizer = load_model("micro-mistral")
    model, tokenizer = load_model("../models/my-llama", device=run.device.device)
    model, tokenizer = load_model("mistralai/Mistral-7B-v0.1", dtype=torch.bfloat16)

Weights are read from safetensors alone; a folder that would need a pickle or its own Python code
is refused before anything is opened, with the safe alternative. Missing, surplus, misshapen or
non-finite weights are errors: a model that loads is the model that was saved.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

from workbench import storage
from workbench.errors import DataError, shorten, unknown_name

if TYPE_CHECKING:
    import torch
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

WEIGHTS = Path(__file__).parent / "backbones" / "weights"
"""Folder of the built-in models."""

PICKLES = (".bin", ".pt", ".pth", ".ckpt", ".pkl", ".pickle", ".joblib", ".dill", ".npy", ".npz")
"""Endings of weight files that may hold a pickle."""

OLD_BUFFERS = ("rotary_emb.inv_freq", ".attn.bias", ".attn.masked_bias")
"""Constants that older checkpoints store and today's classes compute."""


def built_in_names() -> list[str]:
    """Names of the models shipped with the repository."""
    if not WEIGHTS.is_dir():
        return []
    return sorted(p.name for p in WEIGHTS.iterdir() if (p / "config.json").is_file())


@contextlib.contextmanager
def quiet_transformers() -> Iterator[None]:
    """No progress bars and hints of transformers inside the block; its settings are restored."""
    from transformers.utils import logging

    verbosity, bars = logging.get_verbosity(), logging.is_progress_bar_enabled()
    logging.set_verbosity(logging.CRITICAL)
    logging.disable_progress_bar()
    try:
        yield
    finally:
        logging.set_verbosity(verbosity)
        if bars:
            logging.enable_progress_bar()


# ---------------------------------------------------------------- where a model comes from


def resolve(spec: str | Path) -> tuple[str, str]:
    """("tiny", family), ("folder", path) or ("hub", id) for what a user typed after `--model`.

    Order: `tiny:`, built-in name, existing folder, folder below $FIVEFOLD_DATA, hub id.
    """
    text = os.fspath(spec)
    if not text.strip():
        raise DataError(f"--model is empty; give {_choices()}")
    if text.startswith("tiny:"):
        return "tiny", text.removeprefix("tiny:")
    if text in built_in_names():
        return "folder", str(WEIGHTS / text)
    folder = Path(text).expanduser()
    if folder.is_dir():
        return "folder", str(folder)
    shared = os.environ.get("FIVEFOLD_DATA")
    if shared and (Path(shared) / text).is_dir():
        return "folder", str(Path(shared) / text)
    if folder.is_file():
        raise DataError(f"--model {text}: is a file; give the folder that holds config.json")
    if text.startswith((".", "/", "~")) or text.count("/") > 1 or "\\" in text:
        raise DataError(f"--model {text}: no such folder; give {_choices()}")
    if text.startswith("micro-"):
        raise unknown_name("built-in model", text, built_in_names())
    return "hub", text


def _choices() -> str:
    names = ", ".join(built_in_names()) or "tiny:mistral"
    return f"a built-in name ({names}), a local folder with config.json, or a hub id owner/name"


# ---------------------------------------------------------------- checks before loading


def check_folder(folder: Path | str, *, weights: bool = True) -> dict[str, Any]:
    """The parsed config of a model folder that is safe to load.

    Raises:
        DataError: no config, its own Python code (`auto_map`, `trust_remote_code`), weights only
            as pickles, or a damaged safetensors file.
    """
    folder = Path(folder)
    if not (folder / "config.json").is_file():
        raise DataError(
            f"{folder}: no config.json in this folder; expected a Hugging Face model folder "
            "(config.json, model.safetensors, tokenizer.json)"
        )
    config = storage.read_json(folder / "config.json")
    if not isinstance(config, dict):
        raise DataError(f"{folder / 'config.json'}: expected a JSON object")
    for name in ("config.json", "tokenizer_config.json", "generation_config.json"):
        if (folder / name).is_file():
            content = config if name == "config.json" else storage.read_json(folder / name)
            refuse_code(content, folder / name)
    if weights:
        _check_weights(folder)
    return config


def refuse_code(content: Any, where: Path | str) -> None:
    """Raises DataError if a config asks for Python code from the model's own folder."""
    for path, value in _walk(content, ""):
        key = path.rpartition(".")[2]
        if key in ("auto_map", "custom_pipelines", "custom_generate") and value:
            raise DataError(
                f"{where}: field {path.lstrip('.')} asks to run Python code that comes with the "
                "model; this is never done. Remove the field: transformers then uses its own class "
                "for the model_type, if it has one"
            )
        if key == "trust_remote_code" and value not in (False, None):
            raise DataError(
                f"{where}: field {path.lstrip('.')} = {value!r} asks to trust code that comes with "
                "the model; this is never done. Remove the field"
            )


def _walk(value: Any, path: str) -> Iterator[tuple[str, Any]]:
    if isinstance(value, dict):
        for key, inner in value.items():
            yield f"{path}.{key}", inner
            yield from _walk(inner, f"{path}.{key}")
    elif isinstance(value, list):
        for index, inner in enumerate(value):
            yield from _walk(inner, f"{path}[{index}]")


def verify_built_in(folder: Path) -> None:
    """Compares a shipped model with the hashes it was published with (backbones.json).

    A changed bit in the weights would otherwise load without a word.
    """
    manifest = WEIGHTS.parent / "backbones.json"
    if folder.parent != WEIGHTS or not manifest.is_file():
        return
    entry = storage.read_json(manifest).get(folder.name, {})
    for file, key in (("model.safetensors", "sha256"), ("tokenizer.json", "tokenizer_sha256")):
        if key in entry and storage.sha256(folder / file) != entry[key]:
            raise DataError(
                f"{folder / file}: altered, its SHA-256 is not the one in {manifest.name}; restore "
                f"it (git checkout {folder.name}) or train it anew (python -m workbench.backbones)"
            )


def _check_weights(folder: Path) -> None:
    files = sorted(folder.glob("*.safetensors"))
    pickles = sorted(p.name for p in folder.iterdir() if p.suffix.lower() in PICKLES)
    if not files:
        if pickles:
            raise DataError(
                f"{folder}: weights only as {', '.join(pickles[:3])}, which may run code when "
                "opened; convert them on a machine you trust with "
                "model.save_pretrained(folder, safe_serialization=True)"
            )
        raise DataError(f"{folder}: no *.safetensors file; expected model.safetensors")
    index = folder / "model.safetensors.index.json"
    if index.is_file():
        listed = storage.read_json(index)
        shards = set(listed.get("weight_map", {}).values()) if isinstance(listed, dict) else set()
        for shard in sorted(map(str, shards)):
            if Path(shard).name != shard:
                raise DataError(f"{index}: shard {shard!r} lies outside the folder")
            if not (folder / shard).is_file():
                raise DataError(f"{folder / shard}: missing, though {index.name} lists it")
    for file in files:
        check_safetensors(file)


def check_safetensors(path: Path) -> dict[str, Any]:
    """The header of a safetensors file whose sizes agree with the file, read without the data."""
    size = path.stat().st_size
    with open(path, "rb") as handle:
        start = handle.read(8)
        length = int.from_bytes(start, "little")
        if len(start) < 8 or length > min(size - 8, storage.MAX_HEADER_BYTES):
            raise DataError(
                f"{path}: truncated or no safetensors file: {size} bytes, its first eight announce "
                f"a header of {length}; copy or download it again"
            )
        raw = handle.read(length)
    try:
        header = storage.parse_json(raw.decode("utf-8"))
        entries = {name: entry for name, entry in header.items() if name != "__metadata__"}
        end = max((int(entry["data_offsets"][1]) for entry in entries.values()), default=0)
    except (ValueError, KeyError, TypeError, AttributeError, IndexError) as error:
        raise DataError(f"{path}: damaged safetensors header ({error}); copy it again") from None
    if 8 + length + end != size:
        raise DataError(
            f"{path}: truncated: {size} bytes, expected {8 + length + end}; copy or download it "
            "again"
        )
    return entries


def weights_digest(model: torch.nn.Module) -> str:
    """SHA-256 over the names, shapes, formats and bytes of all weights and buffers."""
    import torch

    digest = hashlib.sha256()
    for name, tensor in sorted(model.state_dict().items()):
        digest.update(f"{name} {tuple(tensor.shape)} {tensor.dtype}".encode())
        raw = tensor.detach().cpu().contiguous().flatten().view(torch.uint8)
        digest.update(memoryview(raw.numpy()))
    return digest.hexdigest()


# ---------------------------------------------------------------- loading


def load_model(
    spec: str | Path,
    *,
    device: torch.device | str | None = None,
    dtype: torch.dtype | None = None,
    device_map: str | None = None,
    seed: int = 0,
) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """The causal language model of `spec` in eval mode, and its tokenizer.

    Args:
        spec: built-in name, folder, hub id, or `tiny:<family>` with random weights from `seed`.
        device: where to put it (default CPU).
        dtype: number format of the weights (default float32 on CPU, the file's own elsewhere).
        device_map: passed to `from_pretrained` for models that need several devices.

    Raises:
        DataError: what is wrong with the folder, or that the hub cannot be reached.
        ConfigError: unknown built-in name or tiny family.
    """
    import torch

    kind, name = resolve(spec)
    if dtype is None:
        on_cpu = device is None or torch.device(device).type == "cpu"
        dtype = torch.float32 if on_cpu and device_map is None else None
    if kind == "tiny":
        from workbench.tiny import byte_tokenizer, tiny_model

        model = tiny_model(name, seed=seed)
        return _place(model, device, dtype), byte_tokenizer()
    tokenizer = load_tokenizer(spec)
    model = _from_pretrained(kind, name, dtype, device_map)
    check_vocabulary(model, tokenizer, name)
    return (_place(model, device, None) if device_map is None else model), tokenizer


def _place(model: Any, device: Any, dtype: Any) -> Any:
    if dtype is not None:
        model = model.to(dtype=dtype)
    if device is not None:
        model = model.to(device)
    return model.eval()


def _from_pretrained(kind: str, name: str, dtype: Any, device_map: str | None) -> PreTrainedModel:
    import torch
    from transformers import AutoModelForCausalLM

    config = check_folder(name) if kind == "folder" else _hub_config(name)
    options: dict[str, Any] = {"use_safetensors": True, "trust_remote_code": False}
    options["dtype"] = dtype if dtype is not None else "auto"
    plain = "quantization_config" not in config
    options["ignore_mismatched_sizes"] = plain  # they are reported below, with name and shapes
    if device_map is not None:
        options["device_map"] = device_map
    try:
        with quiet_transformers():
            loaded: Any = AutoModelForCausalLM.from_pretrained(
                name, output_loading_info=True, **options
            )
        model, info = loaded
    except Exception as error:
        raise _explain(kind, name, config, error) from error
    if plain:
        _check_loaded(model, info, name)
        for key, tensor in model.state_dict().items():
            if tensor.is_floating_point() and not torch.isfinite(tensor).all():
                raise DataError(
                    f"{name}: weight {key} holds NaN or infinite values; the file is damaged or "
                    "its training diverged; use an earlier copy"
                )
    return model.eval()


def _check_loaded(model: Any, info: dict[str, Any], name: str) -> None:
    shapes = [
        f"{key} is {tuple(found)}, expected {tuple(expected)}"
        for key, found, expected in info.get("mismatched_keys") or ()
    ]
    if shapes:
        raise DataError(f"{name}: weights of another shape than config.json says: {_some(shapes)}")
    if info.get("missing_keys"):
        raise DataError(
            f"{name}: weights missing that {type(model).__name__} needs: "
            f"{_some(info['missing_keys'])}; the file is incomplete or config.json is of another "
            "model"
        )
    surplus = [k for k in info.get("unexpected_keys") or () if not str(k).endswith(OLD_BUFFERS)]
    if surplus:
        raise DataError(
            f"{name}: weights that {type(model).__name__} has no place for: {_some(surplus)}; "
            "config.json is of another model"
        )


def _some(names: Any) -> str:
    listed = sorted(str(name) for name in names)
    more = f" and {len(listed) - 3} more" if len(listed) > 3 else ""
    return shorten(", ".join(listed[:3]), 300) + more


def _explain(kind: str, name: str, config: dict[str, Any], error: Exception) -> DataError:
    text = shorten(" ".join(str(error).split()), 300)
    if kind == "hub" and _is_connection(error):
        return hub_error("model", name, error)
    method = (config.get("quantization_config") or {}).get("quant_method")
    if method and ("quant" in text.lower()):
        return DataError(
            f"{name}: compressed with {method!r}, which is not registered here; import the package "
            f"that wrote it first ({text})"
        )
    if "model_type" in text or "architecture" in text or "Unrecognized" in text:
        return DataError(
            f"{name}: transformers has no class for model_type {config.get('model_type')!r}; use a "
            "newer transformers or another model"
        )
    return DataError(f"{name}: cannot be loaded as a causal language model ({text})")


def check_vocabulary(model: Any, tokenizer: Any, name: str) -> None:
    """Raises DataError if the tokenizer can produce an id that the embedding has no row for."""
    rows = int(model.get_input_embeddings().weight.shape[0])
    if len(tokenizer) > rows:
        raise DataError(
            f"{name}: {len(tokenizer)} tokens in the tokenizer, {rows} rows in the embedding; "
            "they belong to different models"
        )


def load_tokenizer(spec: str | Path) -> PreTrainedTokenizerBase:
    """The tokenizer of `spec` (see `load_model`); its pad token is set, if need be to </s>."""
    kind, name = resolve(spec)
    if kind == "tiny":
        from workbench.tiny import byte_tokenizer

        return byte_tokenizer()
    from transformers import AutoTokenizer

    if kind == "folder":
        check_folder(name, weights=False)
        verify_built_in(Path(name))
        if not any(Path(name).glob("tokenizer*")) and not (Path(name) / "vocab.json").is_file():
            raise DataError(f"{name}: no tokenizer.json in this folder; copy the model's tokenizer")
        _check_tokenizer_file(Path(name) / "tokenizer.json")
    try:
        with quiet_transformers():
            tokenizer = AutoTokenizer.from_pretrained(name, trust_remote_code=False)
    except Exception as error:
        if kind == "hub" and _is_connection(error):
            raise hub_error("model", name, error) from error
        text = shorten(" ".join(str(error).split()), 300)
        raise DataError(f"{name}: its tokenizer cannot be read ({text})") from error
    if tokenizer.pad_token_id is None and tokenizer.eos_token is not None:
        tokenizer.pad_token = tokenizer.eos_token
    return tokenizer


def _check_tokenizer_file(path: Path) -> None:
    """A pickled or cut tokenizer.json is named as such before a library stumbles over it."""
    if not path.is_file():
        return
    try:
        json.loads(path.read_text(encoding="utf-8"))
    except (UnicodeDecodeError, ValueError, RecursionError) as error:
        raise DataError(f"{path}: damaged ({shorten(str(error), 200)}); copy it again") from None


# ---------------------------------------------------------------- the hub


def _hub_config(name: str) -> dict[str, Any]:
    """The config of a hub model, fetched and scanned before anything else of it is."""
    from transformers import PretrainedConfig
    from transformers.models.auto.configuration_auto import CONFIG_MAPPING

    try:
        with quiet_transformers():
            config, _ = PretrainedConfig.get_config_dict(name)
    except Exception as error:
        raise hub_error("model", name, error) from error
    if config.get("model_type") not in CONFIG_MAPPING:
        refuse_code(config, f"hub model {name}: config.json")  # with an own class it is never run
    return config


def _is_connection(error: BaseException | None) -> bool:
    signs = (
        "connect",
        "offline",
        "resolve",
        "timed out",
        "timeout",
        "not a valid model identifier",
    )
    signs += ("couldn't reach", "http", "cached", "localentrynotfound", "repository not found")
    while error is not None:
        text = f"{type(error).__name__} {error}".lower()
        if isinstance(error, (ConnectionError, TimeoutError)) or any(s in text for s in signs):
            return True
        error = error.__cause__ or error.__context__
    return False


def hub_error(kind: str, name: str, error: BaseException) -> DataError:
    """One line for a hub id that cannot be had: what, why, and how to go on without the hub."""
    text = f"{type(error).__name__} {error}".lower()
    if os.environ.get("HF_HUB_OFFLINE", "").lower() in ("1", "true", "yes", "on"):
        why = "HF_HUB_OFFLINE is set and it is not in the local cache"
    elif "401" in text or "gated" in text or "403" in text:
        why = "the hub refused access (log in with `hf auth login` or accept its licence)"
    elif "404" in text or "not a valid" in text or "not found" in text:
        why = "the hub does not know it, or cannot be reached"
    else:
        why = "the hub cannot be reached and it is not in the local cache"
    flag = "--model" if kind == "model" else "--data"
    if kind == "model":
        known = ", ".join(built_in_names()) or "tiny:mistral"
    else:
        known = "microworld:doc, microworld:world, stdlib"
    return DataError(
        f"{kind} {name!r} is no built-in name and no local folder, and {why}. "
        f"Use {flag} FOLDER with a local copy, or a built-in: {known}"
    )
