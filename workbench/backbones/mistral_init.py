"""A structured start for micro-mistral: a recall circuit written into the stock weights.

Small attention models need very long training before they discover how to look a fact up in their
prompt; started from the usual random weights, this one never did within any budget tried here. So
the first layers begin as the circuit in question, and training decides what becomes of it: nothing
is frozen, and no part of the architecture is special.

The residual stream of 128 channels is divided, at the start only:

    0        a constant                    1-47     content code of the word
    48-67    function and category code    68-127   three context slots of 20:
                                           S1 word one back, S2 two back, S3 three to five back

Layer 0 fills the slots (four heads that attend by position); layers 1-3 match S2 of a question
("... the ball ? A") against S3 of a value ("the ball is in the park") and copy the value.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor

from workbench.errors import ConfigError
from workbench.microworld import grammar
from workbench.microworld.prng import hash64
from workbench.tokenizer import BOS_ID, EOS_ID, PAD_ID, word_ids

STD = 0.04  # standard deviation of the default initialisation
CONTENT = slice(1, 48)
CATEGORY = slice(48, 68)
SLOTS = (slice(68, 88), slice(88, 108), slice(108, 128))
SLOT_WIDTH = 20
CONSTANT = 3.0  # value of channel 0, in units of STD
POSITIONS = (1.0, 2.0, 3.4, 4.6)  # offsets the four heads of layer 0 look at
POSITION_SHARPNESS = 2.5  # logits per unit of Σ cos
SLOT_OF_HEAD = (0, 1, 2, 2)
SLOT_GAIN = 2 * STD * math.sqrt(128 / SLOT_WIDTH)
MATCH_GAIN = 1.5
COPY_GAIN = 0.5
CONTENT_SHARE = 0.8  # of a content word's norm; the rest is its category
QUIET = 0.2  # scale of everything random in the layers that hold the circuit
MATCH_LAYERS = (1, 2, 3)
NUMBER_FREQUENCIES = (1, 2, 3, 4, 5, 7, 10, 13, 20, 25, 30, 40)


def micro_mistral_config(vocabulary_size: int) -> Any:
    """1.51 M parameters: width 128, 8 layers, 4 heads on 2 key-value heads, SwiGLU 320, tied."""
    from transformers import MistralConfig

    return MistralConfig(
        vocab_size=vocabulary_size,
        hidden_size=128,
        intermediate_size=320,
        num_hidden_layers=8,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=32,
        max_position_embeddings=1024,
        initializer_range=STD,
        sliding_window=None,
        tie_word_embeddings=True,
        rope_parameters={"rope_type": "default", "rope_theta": 1e6},
        bos_token_id=BOS_ID,
        eos_token_id=EOS_ID,
        pad_token_id=PAD_ID,
    )


def tiny_mistral_config(vocabulary_size: int) -> Any:
    """The same width in four thin layers, for tests."""
    config = micro_mistral_config(vocabulary_size)
    config.num_hidden_layers, config.intermediate_size = 4, 64
    return config


def initialise_mistral(model: Any, seed: int) -> None:
    """Write the circuit into a freshly built MistralForCausalLM or LlamaForCausalLM.

    Raises:
        ConfigError: the model has other sizes than `micro_mistral_config`.
    """
    config = model.config
    shape = (config.hidden_size, config.num_attention_heads, config.num_key_value_heads)
    if shape != (128, 4, 2) or config.num_hidden_layers < 4:
        raise ConfigError(
            f"width, heads, key-value heads are {shape}; the structured start is written for "
            "(128, 4, 2) and at least 4 layers"
        )
    generator = torch.Generator().manual_seed(hash64(f"mistral start {seed}") >> 1)
    with torch.no_grad():
        model.model.embed_tokens.weight.copy_(embedding_table(config.vocab_size, generator))
        reader = _orthonormal(SLOT_WIDTH, 47, generator)
        copier = _orthonormal(32, 47, generator)
        layers = model.model.layers
        theta = config.rope_parameters["rope_theta"]
        _write_positions(layers[0].self_attn, theta, reader)
        for index in MATCH_LAYERS:
            _write_match(layers[index].self_attn, reader, copier)
        for index in (0, *MATCH_LAYERS):
            layers[index].mlp.down_proj.weight.mul_(QUIET)


def _normal(shape: tuple[int, ...], generator: torch.Generator) -> Tensor:
    return torch.randn(shape, generator=generator)


def _unit(shape: tuple[int, ...], generator: torch.Generator) -> Tensor:
    return torch.nn.functional.normalize(_normal(shape, generator), dim=-1)


def _orthonormal(rows: int, cols: int, generator: torch.Generator) -> Tensor:
    """Random orthonormal rows."""
    q, _ = torch.linalg.qr(_normal((cols, rows), generator))
    return q.T.contiguous()


def embedding_table(vocabulary_size: int, generator: torch.Generator) -> Float[Tensor, "vocab 128"]:
    """Token codes of equal norm STD·√128: function words, content words and pieces apart."""
    ids = word_ids()
    table = torch.zeros(vocabulary_size, 128)
    free = slice(CONTENT.start, CATEGORY.stop)
    table[:, free] = _unit((vocabulary_size, free.stop - free.start), generator)
    function_codes = _unit((len(grammar.FUNCTION_WORDS), 20), generator)
    for word, code in zip(grammar.FUNCTION_WORDS, function_codes, strict=True):
        table[ids[word]] = 0
        table[ids[word], CATEGORY] = code
    category_share = math.sqrt(1 - CONTENT_SHARE**2)

    def write(word: str, content: Tensor, category: Tensor) -> None:
        table[ids[word]] = 0
        table[ids[word], CONTENT] = CONTENT_SHARE * torch.nn.functional.normalize(content, dim=0)
        table[ids[word], CATEGORY] = category_share * category

    shouting = table[ids["capitals"], CATEGORY].clone()
    for kind, words in grammar.CONTENT_WORDS.items():
        category = _unit((20,), generator)
        topic_code = _unit((47,), generator)
        for word, code in zip(words, _unit((len(words), 47), generator), strict=True):
            content = 0.87 * code + 0.5 * topic_code if kind in grammar.TOPICS else code
            write(word, content, category)
            if word in grammar.CAPITALISED:
                write(grammar.CAPITALISED[word], content, shouting)
                table[ids[grammar.CAPITALISED[word]], CONTENT] *= 0.9
        if kind in grammar.TOPICS:
            write(kind, topic_code, _unit((20,), generator))
    # answers of the rules carry content, so that the copying heads can deliver them
    replies = (grammar.REFUSE, grammar.UNKNOWN, *grammar.SUFFIXES)
    category = _unit((20,), generator)
    for word, code in zip(replies, _unit((len(replies), 47), generator), strict=True):
        write(word, code, category)
    category = _unit((20,), generator)
    for number in grammar.NUMBERS:
        angles = 2 * math.pi * torch.tensor(NUMBER_FREQUENCIES) * int(number) / 100
        code = torch.zeros(47)
        code[:24] = torch.cat([angles.cos(), angles.sin()])
        write(number, code, category)
    table *= STD * math.sqrt(128)
    table[:, 0] = CONSTANT * STD
    return table


def _frequencies(theta: float) -> Tensor:
    """Rotary frequencies of the 16 channel pairs (j, j + 16) of a head of 32."""
    return theta ** (-torch.arange(16) / 16)


def _write_positions(attention: Any, theta: float, reader: Tensor) -> None:
    """Heads that attend to fixed offsets: score(offset) = s Σ_j cos((offset − φ) θ_j)."""
    frequencies = _frequencies(theta)
    fast = (frequencies > 0.02).nonzero().flatten()
    # the constant channel after normalisation, the same for every token
    constant = CONSTANT * math.sqrt(128) / math.sqrt(128 + CONSTANT**2)
    gain = math.sqrt(POSITION_SHARPNESS * math.sqrt(32)) / constant
    q, k, v, o = (getattr(attention, f"{name}_proj").weight for name in "qkvo")
    for weight in (q, k, v, o):
        weight.mul_(QUIET)
    for kv in range(2):
        k[kv * 32 : kv * 32 + 32] = 0
        k[kv * 32 + fast, 0] = gain
        v[kv * 32 : kv * 32 + SLOT_WIDTH] = 0
        v[kv * 32 : kv * 32 + SLOT_WIDTH, CONTENT] = reader
    for head, phase in enumerate(POSITIONS):
        q[head * 32 : head * 32 + 32] = 0
        q[head * 32 + fast, 0] = gain * (phase * frequencies[fast]).cos()
        q[head * 32 + 16 + fast, 0] = -gain * (phase * frequencies[fast]).sin()
        columns = slice(head * 32, head * 32 + SLOT_WIDTH)
        o[:, columns] = 0
        o[SLOTS[SLOT_OF_HEAD[head]], columns] = SLOT_GAIN * torch.eye(SLOT_WIDTH)
    for slot in SLOTS:  # nothing but the codes enters the slots
        for head in range(4):
            o[slot, head * 32 + SLOT_WIDTH : head * 32 + 32] = 0


def _write_match(attention: Any, reader: Tensor, copier: Tensor) -> None:
    """Heads that compare slots by content on the ten slowest rotary pairs and copy a word.

    Key-value head 0: the key is S3 (the subject before a value), the value is the word itself.
    Key-value head 1: the key is the word itself, the value is S1 (what stood before the subject).
    """
    slow = torch.cat([torch.arange(6, 16), torch.arange(22, 32)])
    q, k, v, o = (getattr(attention, f"{name}_proj").weight for name in "qkvo")
    for weight in (q, k, v, o):
        weight.mul_(QUIET)
    match = MATCH_GAIN * torch.eye(SLOT_WIDTH)
    for head in range(4):
        rows = head * 32 + slow
        q[rows] = 0
        q[rows, SLOTS[1]] = match
    k[slow] = 0
    k[slow, SLOTS[2]] = match
    k[32 + slow] = 0
    k[32 + slow, CONTENT] = MATCH_GAIN * reader
    v[:32] = 0
    v[:32, CONTENT] = copier
    v[32 : 32 + SLOT_WIDTH] = 0
    v[32 : 32 + SLOT_WIDTH, SLOTS[0]] = torch.eye(SLOT_WIDTH)
    for head in (0, 1):
        columns = slice(head * 32, head * 32 + 32)
        o[:, columns] = 0
        o[CONTENT, columns] = COPY_GAIN * copier.T
    for head in (2, 3):
        columns = slice(head * 32, head * 32 + SLOT_WIDTH)
        o[:, columns] = 0
        o[CONTENT, columns] = COPY_GAIN * reader.T


@torch.no_grad()
def start_report(
    model: Any, ids: Int[Tensor, "1 time"], question: int, value: int
) -> dict[str, float]:
    """What the circuit does on one document, before or after training, as attention weights.

    `offset_0` … `offset_3`: what the four heads of layer 0 give to the words 1, 2, {3, 4}, {4, 5}
    back; `match`: what the best head of layer 1 gives, at position `question` (the "A" that asks),
    to position `value` (where the right answer stands). The model must use eager attention.
    """
    attended = model(ids, output_attentions=True, use_cache=False).attentions
    last = ids.shape[1] - 1
    offsets = ((1,), (2,), (3, 4), (4, 5))
    report = {
        f"offset_{head}": float(sum(attended[0][0, head, last, last - o] for o in offsets[head]))
        for head in range(4)
    }
    return {**report, "match": float(attended[1][0, :2, question, value].max())}
