"""Writes a trained model, with its vocabulary, in a format of other programs.

    python -m examples.wmt14.export runs/base_en_de/averaged.pt --format marian --output exported
    python -m examples.wmt14.export runs/base_en_de --format safetensors --output exported

safetensors is the parameters as they are, and config.json; `translate` reads the folder. marian is for Hugging Face's
MarianMTModel and MarianTokenizer: post-norm models with sinusoidal positions. Its logits are those of fastattn but for
the epsilon of LayerNorm (1e-5, the paper's authors' 1e-6), its beam search divides by length^0.6, not by the paper's
penalty, and its tokenizer neither lower-cases nor knows Moses.
"""

from __future__ import annotations

import argparse
import os
import shutil
import sys
from collections.abc import Sequence
from pathlib import Path

from fastattn.integrations.marian import save_marian
from fastattn.integrations.safetensors import save_safetensors

from .models import data_folder, errors_as_messages, load_model
from .subwords import MODEL_FILE, PREPARATION_FILE, Subwords


def parse_arguments(arguments: Sequence[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m examples.wmt14.export", description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )  # fmt: skip
    parser.add_argument("model", type=Path, help="a run (its newest checkpoint), a checkpoint, or an average")
    parser.add_argument("--format", choices=["safetensors", "marian"], required=True, help="what to write")
    parser.add_argument("--output", type=Path, required=True, metavar="FOLDER", help="to make; must not exist")
    parser.add_argument("--data", type=Path, metavar="FOLDER", help="with the vocabulary (default: that of the run)")
    return parser.parse_args(arguments)


def main(arguments: Sequence[str] | None = None) -> None:
    args = parse_arguments(arguments)
    with errors_as_messages():
        export(args.model, args.format, args.output, data_folder(args.model, args.data))
        print(*sorted(path.name for path in args.output.iterdir()), sep="\n")


def export(model_path: Path, kind: str, output: Path, data: Path) -> None:
    """Writes a model and its vocabulary; the folder is complete or not there at all.

    Args:
        model_path: as `models.load_model` takes it.
        kind: "safetensors" or "marian".
        output: folder to make.
        data: folder that holds the vocabulary.

    Raises:
        FileExistsError: the folder is there already.
        NotImplementedError: a model that Marian cannot hold.
    """
    if output.exists():
        raise FileExistsError(f"--output: {output} exists already")
    model, subwords = load_model(model_path, "cpu"), Subwords.load(data)
    partial = output.with_name(f".{output.name}.{os.getpid()}")
    try:
        if kind == "safetensors":
            save_safetensors(model, partial)
            for name in (MODEL_FILE, PREPARATION_FILE):
                shutil.copyfile(data / name, partial / name)
        else:
            save_marian(model, partial, sentencepiece_model=data / MODEL_FILE)
            for side, form in subwords.forms.items():
                changes = [name for name in ("lowercase", "moses") if getattr(form, name)]
                if changes:
                    print(f"warning: the {side} tokenizer expects text after {' and '.join(changes)}", file=sys.stderr)
        partial.rename(output)
    finally:
        shutil.rmtree(partial, ignore_errors=True)


if __name__ == "__main__":
    main()
