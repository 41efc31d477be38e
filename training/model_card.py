"""The README.md of a trained checkpoint: what it is, what it was trained on and how, what was measured."""

from __future__ import annotations

from pathlib import Path

from training.config import PYTHON_LIBRARY, PYTHON_SOURCES, TrainingConfig
from training.evaluate import ParallelBpb
from training.schedules.registry import entry
from training.trainer import Trainer

_PYTHON_NOTE = """\
The corpus `{}` is {} of the machine that trained the model,
without tests, generated files and tables, split into training and validation by a hash of each file's path. The model writes
Python, much of it in the manner of those packages; it knows nothing else and was not trained to chat. The files keep the
licences of their packages; none of them is part of this checkpoint."""
_PYTHON_NOTES = {
    (name,): _PYTHON_NOTE.format(name, what)
    for name, what in (
        (PYTHON_SOURCES, "the Python standard library and the installed packages"),
        (PYTHON_LIBRARY, "the Python standard library"),
    )
}


def model_card(trainer: Trainer, parallel: ParallelBpb, sequential: float, num_tokens: int, command: str) -> str:
    """Markdown. parallel, sequential: bits per byte on `num_tokens` validation tokens; command: what trained the model."""
    config = trainer.config
    per_pass = ", ".join(f"{value:.4f}" for value in parallel.passes)
    sections = [
        f"# Latent Recurrent Transformer, {_size(trainer)} parameters\n\n{_architecture(config)}",
        f"## Data\n\n{_data(config, len(trainer.corpus.train), trainer.corpus.num_characters)}",
        "## Training\n\n"
        f"    {command}\n\n"
        f"Seed {config.seed}; {trainer.num_steps_done} steps of {config.batch_size} x {config.model.sequence_len} tokens, "
        f"{trainer.num_tokens_done:,} tokens in all, in {trainer.elapsed / 60:.0f} minutes; {_schedule(config)}.",
        "## Measured\n\nBits per byte on "
        f"{num_tokens:,} validation tokens, with the weights of this checkpoint in float32 arithmetic:\n\n"
        "| | BPB |\n|---|---|\n"
        f"| sequential, token by token, as served | {sequential:.4f} |\n"
        f"| parallel, each position by its last forward | {parallel.merged:.4f} |\n"
        f"| parallel, per forward | {per_pass} |",
    ]
    return "\n\n".join(sections) + "\n"


def _size(trainer: Trainer) -> str:
    return f"{sum(parameter.numel() for parameter in trainer.model.parameters()) / 1e6:.1f}M"


def _architecture(config: TrainingConfig) -> str:
    model = config.model
    shape = (
        f"{model.num_layers} layers, hidden size {model.hidden_size}, {model.num_heads} heads and {model.num_kv_heads} "
        f"key/value heads of {model.head_dim}, vocabulary {model.vocab_size}, context {model.sequence_len}"
    )
    if model.recurrence is None:
        return f"{shape}; plain backbone, no recurrence."
    return f"{shape}; {model.recurrence.variant} recurrence, source layer {model.recurrence.source_layer}."


def _data(config: TrainingConfig, num_documents: int, num_characters: int) -> str:
    sources = ", ".join(f"`{Path(source).name}`" for source in config.data)
    kind = "conversations" if config.chat else "training pieces"
    summary = f"{sources}: {num_documents:,} {kind}, {num_characters / 1e6:.1f} million characters."
    if config.chat:
        return f"{summary} The model learned what the assistant says in them; the figures below are of that alone."
    return f"{summary}\n\n{_PYTHON_NOTES[config.data]}" if config.data in _PYTHON_NOTES else summary


def _schedule(config: TrainingConfig) -> str:
    defaults = {name: option.default for name, option in entry(config.schedule).options.items()}
    options = {**defaults, **config.schedule_options}
    said = [_said(name, value) for name, value in options.items() if value is not False and value != ()]
    return ", ".join([f"schedule `{config.schedule}`", *said])


def _said(name: str, value: object) -> str:
    words = name.replace("_", " ").removeprefix("num ")
    return words if value is True else f"{words}: {' '.join(map(str, value)) if isinstance(value, tuple | list) else value}"
