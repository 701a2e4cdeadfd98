"""Trains a small Transformer with fastattn on a self-made English -> German task and translates unseen sentences.

    python examples/quickstart.py                       # about two minutes on two CPU cores
    python examples/quickstart.py --translate "on Monday she bought three old apples"

The task is in `number_translation`; the recipe is that of "Attention Is All You Need", made small. Ctrl-C ends the
training early and leaves a model that --translate reads.
"""

from __future__ import annotations

import os

os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")  # read when torch is imported: idle threads sleep

import argparse
import json
import random
import signal
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, field
from pathlib import Path

import torch
from torch import Tensor
from torch.optim.swa_utils import AveragedModel
from tqdm import tqdm

import fastattn
from demo_report import Attention, Sample, draw_attention, draw_history, write_page
from fastattn.nmt.generation import cross_attention_weights, translate
from fastattn.nmt.layout import PackedTokens
from fastattn.nmt.losses import label_smoothed_cross_entropy
from fastattn.nmt.schedule import noam_schedule
from number_translation import Vocabulary, draw_pairs

TEST_SEED = 2017  # the test sentences are the same for every --seed
BATCH_TOKENS = 1_200  # most tokens of a batch on each side, if it were padded
WARMUP_STEPS = 400
LEARNING_RATE_FACTOR = 0.7
AVERAGED_SHARE = 0.2  # the weights after each of the last fifth of the steps are averaged
SHOWN = 12  # sentences of the page
INTERRUPTED = 130  # exit code of a command ended by Ctrl-C


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--seed", type=int, default=1, help="of the training sentences and the model (default 1)")
    parser.add_argument("--steps", type=positive_int, default=1500, help="optimiser steps (default 1500)")
    parser.add_argument(
        "--training-pairs", type=positive_int, default=40_000, help="sentences to learn (default 40000)"
    )
    parser.add_argument("--test-sentences", type=positive_int, default=500, help="unseen sentences (default 500)")
    device = "cuda" if torch.cuda.is_available() else "cpu"
    parser.add_argument("--device", default=device, help=f"cpu, cuda, cuda:1 ... (default {device})")
    backends = ["cpu", "cuda", "triton", "torch", "reference"]
    parser.add_argument("--backend", choices=backends, help="default: the best one there is")
    parser.add_argument("--out", type=Path, default=Path("demo"), help="folder of model and pictures (default demo)")
    parser.add_argument("--translate", metavar="SENTENCE", help="only translate SENTENCE with the model in --out")
    return parser.parse_args()


def positive_int(text: str) -> int:
    """An option's value that is at least 1."""
    value = int(text)
    if value < 1:
        raise argparse.ArgumentTypeError(f"must be at least 1, got {value}")
    return value


def main() -> int:
    args = parse_arguments()
    with fastattn.use_backend(args.backend) if args.backend else nullcontext():
        try:
            return translate_one(args) if args.translate else train_and_translate(args)
        except NotImplementedError as error:
            sys.exit(f"--backend {args.backend}: {error}")
        except KeyboardInterrupt:
            print("\nInterrupted. What was written before is complete.")
            return INTERRUPTED


def translate_one(args: argparse.Namespace) -> int:
    """Prints the translation of one sentence by a model trained before; returns the exit code."""
    try:
        model, vocabulary = load_model(args.out / "model", args.device)
        print(translate_texts(model, vocabulary, [args.translate])[0])
    except FileNotFoundError as error:
        sys.exit(f"--out: there is no model yet, run this command without --translate first ({error})")
    except ValueError as error:
        sys.exit(f"--translate: {error}")
    return 0


def train_and_translate(args: argparse.Namespace) -> int:
    """The whole demonstration; returns the exit code."""
    vocabulary = Vocabulary()
    training = draw_pairs(args.training_pairs, args.seed)
    test = draw_pairs(args.test_sentences, TEST_SEED, test=True)
    assert not {english for english, _ in training} & {english for english, _ in test}
    print(f"{len(training):,} training pairs, {len(test)} test pairs never seen in training, {len(vocabulary)} pieces")

    torch.manual_seed(args.seed)
    model = build_model(vocabulary).to(args.device)
    print(f"{sum(p.numel() for p in model.parameters()):,} parameters on {args.device}\n")
    print(explain_attention(model.config, args.device), "\n")
    model, history = train(model, vocabulary, training, args)
    save_model(args.out / "model", model, vocabulary)
    if history.interrupted:
        print(f"Interrupted after step {len(history.nll)}. The model so far is in {args.out / 'model'}; to use it:")
        print(f'  python {sys.argv[0]} --out {args.out} --translate "{test[0][0]}"')
        return INTERRUPTED
    draw_history(args.out / "loss.png", history.nll, history.learning_rate)

    model, vocabulary = load_model(args.out / "model", args.device)
    numbers, signature = report(translate_texts(model, vocabulary, [english for english, _ in test]), test)
    draw_attention(args.out / "attention.png", attention_of(model, vocabulary, longest(vocabulary, test)))
    samples = [Sample(attention_of(model, vocabulary, english), german) for english, german in test[:SHOWN]]
    write_page(args.out / "index.html", numbers, signature, history.nll, samples)
    names = ("model", "loss.png", "attention.png", "index.html")
    print(f"Written: {', '.join(str(args.out / name) for name in names)}; look at the last one in a browser")
    return 0


# ---- the model ----


def build_model(vocabulary: Vocabulary) -> fastattn.Transformer:
    """A Transformer of about half a million parameters."""
    config = fastattn.TransformerConfig(
        vocab_size=len(vocabulary), d_model=96, d_ff=384, num_heads=4, num_encoder_layers=2, num_decoder_layers=2,
        dropout=0.0, num_target_spaces=0, pad_id=vocabulary.pad_id, bos_id=vocabulary.eos_id, eos_id=vocabulary.eos_id,
    )  # fmt: skip
    return fastattn.Transformer(config)


def explain_attention(config: fastattn.TransformerConfig, device: str) -> str:
    """Which backend runs the model's attention, and why: a call as in training, two sentences of 30 pieces."""
    q, k, v = torch.zeros(3, 60, config.num_heads, config.d_model // config.num_heads, device=device).unbind()
    cu_seqlens = torch.tensor([0, 30, 60], dtype=torch.int32, device=device)
    return f"Attention, of sentences end to end:\n{fastattn.explain(q, k, v, cu_seqlens, cu_seqlens, 30, 30)}"


def save_model(folder: Path, model: fastattn.Transformer, vocabulary: Vocabulary) -> None:
    """Writes weights, configuration and vocabulary; every file is complete or not there at all."""
    folder.mkdir(parents=True, exist_ok=True)
    weights, pieces = folder / "model.pt", folder / "vocabulary.json"
    model.save(weights.with_suffix(".partial"))
    pieces.with_suffix(".partial").write_text(json.dumps(vocabulary.pieces, ensure_ascii=False), encoding="utf-8")
    weights.with_suffix(".partial").replace(weights)
    pieces.with_suffix(".partial").replace(pieces)


def load_model(folder: Path, device: str) -> tuple[fastattn.Transformer, Vocabulary]:
    """Model and vocabulary that `save_model` wrote, ready to translate."""
    vocabulary = Vocabulary(json.loads((folder / "vocabulary.json").read_text(encoding="utf-8")))
    return fastattn.Transformer.load(folder / "model.pt", device).eval(), vocabulary


# ---- training ----


@dataclass
class History:
    """Measurements of a training, one entry per step, for its picture."""

    nll: list[float] = field(default_factory=list)  # nats per German piece
    learning_rate: list[float] = field(default_factory=list)
    interrupted: bool = False


def train(
    model: fastattn.Transformer, vocabulary: Vocabulary, pairs: list[tuple[str, str]], args: argparse.Namespace
) -> tuple[fastattn.Transformer, History]:
    """The paper's recipe: Adam and learning rate (section 5.3), label smoothing (5.4), averaged weights (6.1)."""
    averaged = AveragedModel(model)
    optimizer = torch.optim.Adam(model.parameters(), lr=1.0, betas=(0.9, 0.98), eps=1e-9, fused=True)
    schedule = noam_schedule(optimizer, model.config.d_model, WARMUP_STEPS, LEARNING_RATE_FACTOR)
    batches = endless_batches(encode_pairs(pairs, vocabulary), args.seed)
    history = History()
    tokens, start = 0, time.perf_counter()
    model.train()
    with stop_on_interrupt() as stop, tqdm(total=args.steps, desc="training", unit="step", mininterval=0.5) as bar:
        for step in range(1, args.steps + 1):
            source, target = (side.to(args.device) for side in next(batches))
            hidden = model.hidden(source, target)
            smoothing = model.config.label_smoothing
            output = model.output_weight()
            sums = label_smoothed_cross_entropy(hidden, output, target.tokens, smoothing, vocabulary.pad_id)
            optimizer.zero_grad()
            (sums.loss / sums.num_tokens).backward()
            history.learning_rate.append(float(schedule.get_last_lr()[0]))
            optimizer.step()
            schedule.step()
            if step > (1 - AVERAGED_SHARE) * args.steps:
                averaged.update_parameters(model)
            history.nll.append(sums.nll.item() / sums.num_tokens.item())
            tokens += int(sums.num_tokens)
            speed = tokens / (time.perf_counter() - start)
            bar.set_postfix_str(
                f"{speed:,.0f} tokens/s, loss {history.nll[-1]:.3f}, lr {history.learning_rate[-1]:.1e}", refresh=False
            )
            bar.update()
            if stop.is_set():
                history.interrupted = True
                break
    trained = averaged.module if averaged.n_averaged else model
    assert isinstance(trained, fastattn.Transformer)  # the average is a copy of the model
    return trained, history


def encode_pairs(pairs: list[tuple[str, str]], vocabulary: Vocabulary) -> list[tuple[Tensor, Tensor]]:
    """The ids of both sides of every pair, each side ended by `</s>`."""

    def ids(text: str) -> Tensor:
        return torch.tensor([*vocabulary.encode(text), vocabulary.eos_id])

    return [(ids(english), ids(german)) for english, german in pairs]


def endless_batches(encoded: list[tuple[Tensor, Tensor]], seed: int) -> Iterator[tuple[PackedTokens, PackedTokens]]:
    """Source and target ids of sentences of similar length, end to end, in a new order in every round."""
    rng = random.Random(seed)
    while True:
        batches = token_batches(sorted(encoded, key=lambda pair: len(pair[0]) + len(pair[1]) + 6 * rng.random()))
        rng.shuffle(batches)
        for batch in batches:
            source, target = (end_to_end(list(side)) for side in zip(*batch, strict=True))
            yield source, target


def end_to_end(sentences: list[Tensor]) -> PackedTokens:
    """Sentences without padding."""
    lengths = torch.tensor([0, *map(len, sentences)])
    return PackedTokens(torch.cat(sentences), lengths.cumsum(0).int(), int(lengths.max()))


def token_batches(pairs: list[tuple[Tensor, Tensor]]) -> list[list[tuple[Tensor, Tensor]]]:
    """Cuts the list into batches of at most BATCH_TOKENS places on the longer side."""
    batches: list[list[tuple[Tensor, Tensor]]] = [[]]
    longest = 0
    for source, target in pairs:
        longest = max(longest, len(source), len(target))
        if longest * (len(batches[-1]) + 1) > BATCH_TOKENS:
            batches.append([])
            longest = max(len(source), len(target))
        batches[-1].append((source, target))
    return batches


@contextmanager
def stop_on_interrupt() -> Iterator[threading.Event]:
    """Ctrl-C sets the event, so that the step under way is finished; a second Ctrl-C interrupts as usual."""
    stop = threading.Event()

    def stop_once(signum: int, frame: object) -> None:
        stop.set()
        signal.signal(signal.SIGINT, previous)

    previous = signal.signal(signal.SIGINT, stop_once)
    try:
        yield stop
    finally:
        signal.signal(signal.SIGINT, previous)


# ---- translation ----


def translate_texts(model: fastattn.Transformer, vocabulary: Vocabulary, texts: list[str]) -> list[str]:
    """The best translation of every text by beam search (the paper's: beam 4, length penalty 0.6)."""
    sources = [[*vocabulary.encode(text), vocabulary.eos_id] for text in texts]
    return [vocabulary.decode(best.tokens) for best, *_ in translate(model, sources, batch_size=100)]


def report(translations: list[str], test: list[tuple[str, str]]) -> tuple[list[tuple[str, str]], str]:
    """Prints BLEU with its signature, exact match and the first five sentences; returns the numbers, and how they are.

    The numbers are texts, each with what it is of.
    """
    from sacrebleu.metrics.bleu import BLEU

    references = [german for _, german in test]
    metric = BLEU()
    score = metric.corpus_score(translations, [references])
    exact = sum(map(str.__eq__, translations, references)) / len(references)
    print(f"BLEU {score.score:.1f}  ({metric.get_signature()})")
    print(f"exact match {exact:.1%} of {len(references)} unseen sentences\n")
    for (english, german), translation in list(zip(test, translations, strict=True))[:5]:
        print(f"  English     {english}\n  translation {translation}")
        print("  as the reference\n" if translation == german else f"  reference   {german}\n")
    named = [
        (f"{score.score:.1f}", "BLEU"),
        (f"{exact:.1%}", f"exactly as the reference, of {len(references)}"),
    ]
    return named, str(metric.get_signature())


# ---- pictures ----


def attention_of(model: fastattn.Transformer, vocabulary: Vocabulary, english: str) -> Attention:
    """Cross-attention of the last layer for the translation of a sentence."""
    source = [*vocabulary.encode(english), vocabulary.eos_id]
    target = [*translate(model, [source])[0][0].tokens, vocabulary.eos_id]
    with torch.inference_mode():
        device = model.embedding.weight.device
        source_ids, target_ids = (torch.tensor([side], device=device) for side in (source, target))
        weights = cross_attention_weights(model, source_ids, target_ids)[0, -1].cpu()  # (heads, target, source)
    pieces = [[vocabulary.pieces[token] for token in side] for side in (source, target)]
    return Attention(weights, *pieces, english, vocabulary.decode(target))


def longest(vocabulary: Vocabulary, test: list[tuple[str, str]]) -> str:
    """The longest test sentence of at most 22 pieces, which a picture holds."""
    lengths = {english: len(vocabulary.encode(english)) for english, _ in test}
    return max((text for text in lengths if lengths[text] <= 22), key=lengths.__getitem__, default=test[0][0])


if __name__ == "__main__":
    sys.exit(main())
