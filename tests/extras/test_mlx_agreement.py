"""MLX (also its CPU build) reads our folders: logits close to torch, greedy tokens equal."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from workbench.errors import DataError
from workbench.models import built_in_names, load_model
from workbench.tiny import byte_tokenizer, tiny_model

pytestmark = pytest.mark.extras
pytest.importorskip("mlx.core")
pytest.importorskip("mlx_lm")


def folder_of(spec: str, tmp_path) -> str:
    if not spec.startswith("tiny:"):
        return spec
    tiny_model(spec.removeprefix("tiny:")).save_pretrained(tmp_path)
    byte_tokenizer().save_pretrained(tmp_path)
    return str(tmp_path)


@pytest.mark.parametrize(
    "spec", ["tiny:llama", "tiny:mistral", *[n for n in built_in_names() if "mistral" in n]]
)
def test_logits_and_greedy_tokens_agree(tmp_path, spec):
    from workbench.integrations.mlx import load_mlx

    name = folder_of(spec, tmp_path)
    model, tokenizer = load_model(name)
    ids = [1, *tokenizer.encode("Q where is the ball ? A", add_special_tokens=False)]
    ours = load_mlx(name)
    with torch.inference_mode():
        expected = model(input_ids=torch.tensor([ids])).logits[0].numpy()
    np.testing.assert_allclose(ours.logits(ids), expected, atol=5e-3, rtol=5e-3)
    with torch.inference_mode():
        greedy = model.generate(
            torch.tensor([ids]),
            max_new_tokens=12,
            min_new_tokens=12,
            do_sample=False,
            pad_token_id=0,
        )
    if spec.startswith("tiny:"):  # generate forbids </s> before the minimum; random weights hit it
        assert ours.greedy(ids, 1) == [int(expected[-1].argmax())]
    else:
        assert ours.greedy(ids, 12) == greedy[0, len(ids) :].tolist()


def test_what_mlx_cannot_read_is_one_clear_error(tmp_path):
    from workbench.integrations.mlx import load_mlx

    with pytest.raises(DataError, match="folder"):
        load_mlx("tiny:mistral")
