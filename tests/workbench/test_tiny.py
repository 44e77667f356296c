from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from workbench.errors import ConfigError
from workbench.tiny import FAMILIES, VOCAB_SIZE, byte_tokenizer, tiny_model


@pytest.mark.parametrize("family", sorted(FAMILIES))
def test_each_family_runs_is_causal_and_repeats(family):
    before = torch.get_rng_state()
    model = tiny_model(family, seed=3)
    assert torch.equal(before, torch.get_rng_state())
    ids = torch.randint(0, VOCAB_SIZE, (2, 24), generator=torch.Generator().manual_seed(0))
    with torch.inference_mode():
        logits = model(input_ids=ids).logits
        changed = ids.clone()
        changed[:, 16:] = (changed[:, 16:] + 1) % VOCAB_SIZE
        later = model(input_ids=changed).logits
    assert logits.shape == (2, 24, VOCAB_SIZE)
    torch.testing.assert_close(logits[:, :16], later[:, :16], atol=1e-5, rtol=1e-5)
    assert not torch.allclose(logits[:, 16:], later[:, 16:], atol=1e-3)
    again, other = tiny_model(family, seed=3), tiny_model(family, seed=4)
    name, weight = max(model.named_parameters(), key=lambda item: item[1].numel())
    assert torch.equal(weight, again.get_parameter(name))
    assert not torch.equal(weight, other.get_parameter(name))
    assert not model.training


def test_overrides_reach_the_config_and_nonsense_is_named():
    assert tiny_model("llama", num_hidden_layers=2).config.num_hidden_layers == 2
    with pytest.raises(ConfigError, match="mistral"):
        tiny_model("mistrall")


@settings(max_examples=40, deadline=None)
@given(st.text(st.characters(exclude_categories=["Cs"]), max_size=60))
def test_any_text_round_trips_byte_for_byte(text):
    tokenizer = byte_tokenizer()
    text = text.replace("<pad>", "").replace("<s>", "").replace("</s>", "")
    ids = tokenizer.encode(text, add_special_tokens=False)
    assert len(ids) == len(text.encode())
    assert tokenizer.decode(ids) == text


def test_special_ids_are_fixed():
    tokenizer = byte_tokenizer()
    assert (tokenizer.pad_token_id, tokenizer.bos_token_id, tokenizer.eos_token_id) == (0, 1, 2)
    assert len(tokenizer) == VOCAB_SIZE
    assert tokenizer.encode("a")[0] == 1  # as the built-in models' tokenizer
