"""Perplexity of a model on held-out texts, by the protocol of the published tables.

    python -m lplr_q.eval_ppl --model-save-path runs/lplr_q/run-1234/models/lplr-2.5
    python -m lplr_q.eval_ppl --model-save-path FOLDER --base-model ORIGINAL --seqlen 4096
    python -m lplr_q.eval_ppl --model-save-path FOLDER --datasets wikitext2 c4 file:book.txt

wikitext2, c4, file:PATH and hub data sets: the texts are joined by blank lines and cut into windows
of `seqlen` tokens that do not overlap; the remainder is dropped; perplexity is exp of the mean
negative log-likelihood over the seqlen - 1 predictions of every window. wikitext2 is the raw test
split. c4 is 256 windows, each at a random place of a random document of the first validation shard;
c4_new the first 256 windows of its first 1100 documents joined by spaces. Built-in texts
(microworld:doc, stdlib, ...) keep their own framing. With --base-model the original model is judged
on the same windows, and the ratio has a paired interval.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from workbench.cli import RunField, RunOptions, cli
from workbench.errors import ConfigError, DataError, require_least
from workbench.run import Run

if TYPE_CHECKING:
    from lplr_q.evaluate import TextBlocks

C4_SHARD = "en/c4-validation.00000-of-00008.json.gz"
C4_WINDOWS = 256
C4_DOCUMENTS = 1100


@dataclass(frozen=True)
class Experiment:
    """Which model on which texts."""

    model_save_path: str = "micro-mistral"
    """Folder of a compressed model, or any model: built-in name, folder, hub id."""
    base_model: str | None = None
    """The original, judged on the same windows for the ratio."""
    finetune_save_dir: Path | None = None
    """Folder with trained.safetensors of a fine-tuning run, put onto the model."""
    datasets: tuple[str, ...] = ("microworld:doc", "stdlib")
    """wikitext2, c4, c4_new, file:PATH, microworld:KIND, stdlib, or a hub id."""
    seqlen: int = 512
    """Tokens per window (4096 in the published tables, 8192 for Llama-3)."""
    max_windows: int | None = None
    """Use the first windows only; built-in texts have 16 unless told."""
    batch_size: int = 4
    """Windows per forward pass."""
    seed: int = 0
    """Seed of the random places of c4 and of generated text."""
    output_path: Path | None = None
    """Also write the rows as JSON to this file."""
    run: RunField = RunOptions()

    def __post_init__(self) -> None:
        if not self.datasets:
            raise ConfigError("datasets is empty; give at least one")
        if len(set(self.datasets)) < len(self.datasets):
            raise ConfigError(f"a data set is named twice: {', '.join(self.datasets)}")
        if self.seqlen < 2:
            raise ConfigError(f"seqlen={self.seqlen}: a window needs at least 2 tokens")
        require_least(self, 1, "batch_size", "max_windows")


EXPERIMENT = Experiment()  # edit me


def main(experiment: Experiment) -> dict[str, Any]:
    """Evaluate on every text; returns the rows of the table."""
    with Run.open("lplr_q.eval_ppl", experiment) as run:
        results = run.results if run.finished else _evaluate(run, experiment)
    if experiment.output_path is not None:
        from workbench import storage

        storage.write_json(experiment.output_path, results)
    return results


def _evaluate(run: Run, e: Experiment) -> dict[str, Any]:
    from lplr_q.evaluate import perplexity_columns

    model, tokenizer = _subject(run, e)
    limit = getattr(model.config, "max_position_embeddings", None)
    if limit is not None and e.seqlen > limit:
        raise ConfigError(f"seqlen={e.seqlen}: the model reads at most {limit} tokens")
    texts = [windows(tokenizer, source, run, e) for source in e.datasets]
    nats = {"compressed": _nats(run, "model", model, texts, e)}
    if e.base_model is not None:
        del model
        base, _ = run.load_model(e.base_model, what="base_model")
        nats["base"] = _nats(run, "base_model", base, texts, e)
    rows = []
    for text in texts:
        found = nats["compressed"][text.name]
        reference = nats["base"][text.name] if "base" in nats else None
        columns = perplexity_columns(text, found, reference)
        row = {"dataset": text.name, "seqlen": e.seqlen, "windows": len(text.tokens), **columns}
        if reference is not None:
            row["base_perplexity"] = columns["perplexity"] / columns["ratio"]
        rows.append(row)
        run.note(
            f"{text.name}: perplexity {row['perplexity']:.4f} "
            f"[{row['perplexity_low']:.4f}, {row['perplexity_high']:.4f}], "
            f"n_tokens {row['n_tokens']} in {row['windows']} windows"
        )
    run.table(
        "perplexity",
        rows,
        caption="Perplexity with its 95 % interval over windows"
        + ("; ratio to the original, paired." if e.base_model else "."),
    )
    said = ", ".join(
        f"{r['perplexity']:.3f} on {r['dataset']} (n = {r['n_tokens']} tokens)" for r in rows
    )
    return run.finish(
        {"rows": rows, "model": e.model_save_path},
        title=f"Perplexity of {Path(e.model_save_path).name}",
        question="How well does the model predict held-out text?",
        summary=f"Perplexity {said}.",
        headline={f"perplexity, {r['dataset']}": r["perplexity"] for r in rows},
    )


def _subject(run: Run, e: Experiment) -> tuple[Any, Any]:
    """The model under test, with fine-tuned tensors where asked; decoded once."""
    from lplr_q.activation_aware.quantized_layer import set_mode

    model, tokenizer = run.load_model(e.model_save_path)
    if e.finetune_save_dir is not None:
        from lplr_q.trainable import put_trained
        from workbench import storage

        file = e.finetune_save_dir / "trained.safetensors"
        if not file.is_file():
            raise DataError(f"{file}: no such file; expected the folder of a fine-tuning run")
        run.require_same("trained", storage.sha256(file))
        put_trained(model, file)
    set_mode(model, "cached")
    return model, tokenizer


def _nats(run: Run, what: str, model: Any, texts: list[TextBlocks], e: Experiment) -> Any:
    """-ln p of every token, one unit per text."""
    from workbench.evaluate import token_nats

    found = {}
    for text in texts:

        def compute(text: TextBlocks = text) -> dict[str, Any]:
            import torch

            parts = [
                token_nats(model, text.tokens[at : at + e.batch_size], e.batch_size)
                for at in run.progress(range(0, len(text.tokens), e.batch_size), text.name)
            ]
            return {"nats": torch.cat(parts)}

        found[text.name] = run.once(f"{what}/{text.name}", compute)["nats"]
    return found


def windows(tokenizer: Any, source: str, run: Run, e: Experiment) -> TextBlocks:
    """The windows of one text; see the protocol at the head of this file.

    Raises:
        DataError: the text is shorter than one window, or cannot be had.
    """
    import torch

    from lplr_q.evaluate import TextBlocks, load_blocks

    if source.startswith(("microworld", "stdlib")):
        tokens = (e.max_windows or 16) * e.seqlen
        return load_blocks(
            tokenizer, source, tokens=tokens, length=e.seqlen, split="test", seed=e.seed
        )
    if source == "c4":
        blocks = _random_windows(tokenizer, _c4_documents(None), run, e)
    else:
        ids = _encode(tokenizer, joined_text(source))
        n = len(ids) // e.seqlen
        if not n:
            raise DataError(
                f"{source}: {len(ids)} tokens, too few for one window of {e.seqlen}; use a "
                "smaller --seqlen"
            )
        n = min(n, C4_WINDOWS) if source == "c4_new" else n
        blocks = torch.tensor(ids[: n * e.seqlen]).view(n, e.seqlen)
    blocks = blocks[: e.max_windows]
    return TextBlocks(source, blocks, torch.ones_like(blocks, dtype=torch.bool))


def joined_text(source: str) -> str:
    """The whole test text of `source` as one string."""
    from lplr_q.eval_tasks import hub_rows
    from workbench.text import load_texts, read_text_file, read_texts

    if source == "wikitext2":
        rows = hub_rows("Salesforce/wikitext:wikitext-2-raw-v1", "test")
        return "\n\n".join(row["text"] for row in rows)
    if source == "c4_new":
        return " ".join(_c4_documents(C4_DOCUMENTS))
    if source.startswith("file:"):
        path = Path(source.removeprefix("file:")).expanduser()
        plain = path.name.removesuffix(".gz").endswith((".txt", ".md", ".text"))
        return read_text_file(path) if plain else "\n\n".join(read_texts(path))
    return "\n\n".join(load_texts(source, n=100_000, split="test"))


def _c4_documents(n: int | None) -> list[str]:
    from lplr_q.eval_tasks import hub_rows

    rows = hub_rows("allenai/c4", "validation", n, data_files={"validation": C4_SHARD})
    return [row["text"] for row in rows]


def _encode(tokenizer: Any, text: str) -> list[int]:
    from workbench.models import quiet_transformers

    with quiet_transformers():  # it would say that the text is longer than the model's context
        return tokenizer.encode(text)


def _random_windows(tokenizer: Any, documents: list[str], run: Run, e: Experiment) -> Any:
    """256 windows, each at a random place of a random document that is long enough."""
    import torch

    stream = run.streams("c4")
    known: dict[int, list[int]] = {}
    chosen = []
    for _ in run.progress(range(C4_WINDOWS), "c4"):
        ids: list[int] = []
        while len(ids) <= e.seqlen:
            if len(known) == len(documents) and all(len(i) <= e.seqlen for i in known.values()):
                raise DataError(f"c4: no document has more than {e.seqlen} tokens; lower --seqlen")
            number = int(stream.integers(len(documents)))
            if number not in known:
                known[number] = _encode(tokenizer, documents[number])
            ids = known[number]
        at = int(stream.integers(len(ids) - e.seqlen))
        chosen.append(torch.tensor(ids[at : at + e.seqlen]))
    return torch.stack(chosen)


if __name__ == "__main__":
    cli(main, EXPERIMENT)
