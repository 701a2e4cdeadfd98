"""The benchmarks of modules, models, layers and calls run, and give no number for what is wrong."""

from __future__ import annotations

import csv
import importlib
import json
from pathlib import Path

import pytest
import torch
from torch import nn

import fastattn
import quickstart
from benchmarks import (
    attention_columns,
    cases,
    decode,
    example_steps,
    gate,
    host,
    layers,
    lengths,
    multi_head_attention,
    overhead,
    plot,
    summary,
    torch_model,
    transformer_step,
)
from benchmarks.host_timing import HostTime
from benchmarks.timing import PassTime
from examples.wmt14.configs import CONFIGS
from fastattn import Transformer, TransformerConfig
from number_translation import Vocabulary

CPU = torch.device("cpu")
TINY = TransformerConfig(50, 16, 32, 2, num_encoder_layers=2, num_decoder_layers=2, num_target_spaces=0)


def smoke(name: str, folder: Path) -> list[dict[str, str]]:
    """The rows of the tiny form, every one of them with numbers."""
    benchmark = importlib.import_module(f"benchmarks.{name}")
    assert benchmark.main(["--smoke", "--device", "cpu", "--out", str(folder)]) == 0
    with (folder / f"{name}.csv").open() as file:
        rows = list(csv.DictReader(file))
    assert rows and not any(row.get("no_numbers_because") for row in rows)
    assert json.loads((folder / f"{name}.json").read_text())["size"] == "smoke"
    return rows


# ---- every one runs


def test_multi_head_attention(tmp_path):
    rows = smoke("multi_head_attention", tmp_path)
    assert {row["provider"] for row in rows} == {"torch", "fastattn", "fastattn-packed"}
    assert {row["workload"] for row in rows} == {"encoder 9", "decoder 7", "cross 7"}
    assert all(float(row["p50_ms"]) > 0 for row in rows)


def test_transformer_step(tmp_path):
    rows = smoke("transformer_step", tmp_path)
    assert [row["rung"] for row in rows] == [rung.name for rung in transformer_step.LADDER]
    assert all(int(row["tokens_per_s"]) > 0 for row in rows)


def test_example_steps(tmp_path):
    pytest.importorskip("fastattn._cpu", reason="fastattn._cpu is not built: it takes a C++ compiler")
    rows = smoke("example_steps", tmp_path)
    kinds = [("quickstart", "float32"), ("multi30k_fast", "float32"), ("multi30k_fast", "bfloat16")]
    assert [(row["example"], row["precision"]) for row in rows[::4]] == kinds
    assert [row["way"] for row in rows] == 3 * [way.name for way in example_steps.WAYS]
    assert all(float(row["step_ms"]) > 0 for row in rows)
    assert [row["way"] for row in rows if row["verdict"]] == 3 * ["cpu, packed"]


def test_the_steps_are_of_the_examples_models():
    examples = example_steps.EXAMPLES
    model = quickstart.build_model(Vocabulary())
    assert examples["quickstart"].config == model.config
    assert examples["multi30k_fast"].config == CONFIGS["multi30k_fast"].model(vocab_size=4000)


def test_what_a_step_saves_is_a_share_of_the_time_before():
    example = example_steps.EXAMPLES["multi30k_fast"]
    times = {"torch, packed": PassTime(100.0, 0, 0), "torch, padded": PassTime(50.0, 0, 0)}
    for ms, saved, verdict in ((70.0, "30.0", "reached"), (71.0, "29.0", "missed")):
        found = example_steps.verdict(example, times | {"cpu, packed": PassTime(ms, 0, 0)})
        assert (found["saved_percent"], found["verdict"]) == (saved, verdict)
    assert example_steps.verdict(example, times) == {}


def test_days_of_the_paper_are_its_updates_at_our_speed():
    assert transformer_step.paper_days("big", 1000) == f"{300_000 * 50 / 86_400:.2f}"
    assert transformer_step.paper_days("tiny", 1000) is None


@pytest.mark.filterwarnings("ignore:The PyTorch API of nested tensors")
def test_decode(tmp_path):
    rows = smoke("decode", tmp_path)
    assert [row["way"] for row in rows] == [way.name for way in decode.WAYS]
    assert len({row["tokens"] for row in rows}) == 1
    chosen = fastattn.explain(*torch.zeros(3, 1, 1, 1, 8)).backend
    assert [row["backend"] for row in rows] == [chosen, "torch", chosen, ""]


def test_layers(tmp_path):
    rows = smoke("layers", tmp_path)
    assert {row["layer"] for row in rows} == set(layers.LAYERS)
    assert {row["note"] for row in rows if "attention" in row["layer"]} == {
        fastattn.explain(*torch.zeros(3, 1, 1, 1, 16)).backend
    }
    assert all(int(row["batch"]) * int(row["seqlen"]) == 64 for row in rows)


def test_overhead(tmp_path):
    threads = torch.get_num_threads()
    rows = {row["op"]: row for row in smoke("overhead", tmp_path)}
    assert torch.get_num_threads() == threads
    assert {"varlen_attention", "explain", "import fastattn, after torch", "MultiHeadAttention, evaluation"} <= set(
        rows
    )
    assert all(0 < float(row["min_us"]) <= float(row["p50_us"]) for row in rows.values())
    judged = {name for name, row in rows.items() if row["verdict"]}
    assert len(judged) == 8 and all(rows[name]["verdict"] in ("ok", "over") for name in judged)


def test_overhead_is_judged_by_the_minimum():
    def verdict(ours: float, theirs: float, **limit: float) -> str:
        call = overhead.ComparedCall("f", print, "g", print, **limit)
        times = {("f", "ours"): HostTime(ours, 99.0, 99.0), ("f", "theirs"): HostTime(theirs, 1.0, 1.0)}
        return overhead.row(call, times)["verdict"]

    assert (verdict(19.9, 5.0, extra_us=15.0), verdict(20.1, 5.0, extra_us=15.0)) == ("ok", "over")
    assert (verdict(7.4, 5.0, factor=1.5), verdict(7.6, 5.0, factor=1.5)) == ("ok", "over")


# ---- what is wrong gets no number


def test_torchs_layers_are_the_same_model():
    model = Transformer(TINY).eval()
    twin = torch_model.TorchTransformer(TINY).copy_from(model).train()
    for dropout in (m for m in twin.modules() if isinstance(m, nn.Dropout)):
        dropout.p = 0.0
    source, target = torch.tensor([[3, 4, 5, 1], [7, 1, 0, 0]]), torch.tensor([[5, 6, 1], [4, 1, 0]])
    ours, theirs = (m.hidden(source, target)[target != 0] for m in (model, twin))
    torch.testing.assert_close(theirs, ours)


class Unmasked(Transformer):
    """A model that forgets the padding of the source."""

    def hidden(self, source, target, target_space=0):
        return super().hidden(source.where(source != self.config.pad_id, 3), target, target_space)


@pytest.mark.parametrize("precision", [torch.float32, torch.bfloat16], ids=str)
def test_a_training_step_without_a_mask_is_wrong(precision):
    update = lengths.Lengths((3, 9), (6, 8))
    rung = transformer_step.LADDER[2]
    for right in transformer_step.LADDER:
        transformer_step.check(right, TINY, precision, update, CPU)
    with pytest.raises(gate.Wrong, match="states off by"):
        transformer_step.check(rung._replace(make=Unmasked), TINY, precision, update, CPU)
    doubled = rung._replace(loss=lambda *arguments: 2 * transformer_step.whole_logits(*arguments))
    with pytest.raises(gate.Wrong, match="loss off by"):
        transformer_step.check(doubled, TINY, precision, update, CPU)


def test_ids_are_the_same_whatever_the_default_device():
    ids = transformer_step.padded_ids((3, 2), 50, CPU)
    assert ids[0, 2] == ids[1, 1] == 1 and ids[1, 2] == 0 and ids[:, 0].min() >= 3
    with torch.device("meta"):
        assert torch.equal(transformer_step.padded_ids((3, 2), 50, CPU), ids)


def test_a_module_without_a_mask_is_wrong(monkeypatch):
    update = lengths.Lengths((3, 9, 5), (4, 2, 7))
    case = next(cases.of_updates([update], [torch.float32], nheads=2))
    expected = multi_head_attention.results("torch", case, CPU)
    assert (
        multi_head_attention.why_wrong(multi_head_attention.results("fastattn", case, CPU), expected, torch.float32)
        is None
    )
    forward = nn.MultiheadAttention.forward

    def forget(self, *arguments, key_padding_mask, **options):
        return forward(self, *arguments, **options)

    monkeypatch.setattr(nn.MultiheadAttention, "forward", forget)
    wrong = multi_head_attention.why_wrong(multi_head_attention.results("torch", case, CPU), expected, torch.float32)
    assert wrong is not None and wrong.startswith("wrong: out is off by")


def test_a_layer_without_its_window_is_wrong(monkeypatch):
    attend = fastattn.scaled_dot_product_attention
    name = "restricted self-attention"
    assert layers.why_wrong(name, 16, torch.float32, CPU) is None

    def forget(q, k, v, window):
        return attend(q, k, v, window=window if q.dtype == torch.float64 else None)

    monkeypatch.setattr(fastattn, "scaled_dot_product_attention", forget)
    assert layers.why_wrong(name, 16, torch.float32, CPU).startswith("wrong: off by")


def test_other_translations_are_wrong():
    torch.manual_seed(0)
    model, other = Transformer(TINY).eval(), Transformer(TINY).eval()
    source = transformer_step.padded_ids((3, 9, 6, 5), TINY.vocab_size, CPU)  # complete one by one
    for way in decode.WAYS:
        assert decode.share_of_others(way, model, source, 5) == 0
    wrong = decode.WAYS[2]._replace(cache=lambda model: lambda _, *rest: decode.recompute(other, *rest))
    assert decode.share_of_others(wrong, model, source, 5) > decode.MAX_DIFFERENT


# ---- pictures and the summary


@pytest.fixture
def results(tmp_path) -> Path:
    """Tables of two devices: one with times of fastattn's kernels, made up, and one with those of a smoke run."""
    origin = {
        "device": "A GPU",
        "versions": {"torch": "2.7.1"},
        "driver": "580",
        "commit": "0123456789abc",
        "dirty": True,
    }
    origin |= {"date": "2026-01-02T03:04", "command": "python -m benchmarks.attention", "copy_gb_s": 500.0}
    (tmp_path / "a-gpu").mkdir()
    (tmp_path / "a-gpu" / "attention.json").write_text(json.dumps(origin))
    with (tmp_path / "a-gpu" / "attention.csv").open("w") as file:
        writer = csv.DictWriter(file, attention_columns.COLUMNS)
        writer.writeheader()
        for case in (case for case in cases.every_case() if case.dtype == torch.float16):
            for provider, ms in (("fastattn-cuda", 2.0), ("torch-math", 1.0 if case.suite == "long" else 3.0)):
                theirs = {"published_vanilla_ms": "4.25"} if case.suite == "published" else {}
                row = case.columns() | {"provider": provider, "pass": "both", "p50_ms": ms} | theirs
                writer.writerow(row)
    smoke("layers", tmp_path / "cpu")
    smoke("transformer_step", tmp_path / "cpu")
    return tmp_path


def test_pictures(results):
    assert plot.main([str(results / "a-gpu"), str(results / "cpu")]) == 0
    drawn = {file.stem for file in results.glob("*/*.png")}
    assert {"attention_float16", "attention_batches_float16", "attention_speedup_wmt", "layers"} <= drawn
    assert all(file.read_bytes().startswith(b"\x89PNG") for file in results.glob("*/*.png"))


def test_summary_lists_every_loss(results, capsys):
    (results / "cpu" / "layers.png").touch()
    assert summary.main(["--results", str(results)]) == 0
    page = (results / "README.md").read_text()
    long = sum((case.suite, case.dtype) == ("long", torch.float16) for case in cases.every_case())
    assert f"| long | 0.50x | {long} | {long} |" in page and "| wmt | 1.50x |" in page
    assert page.count("| fastattn-cuda | 2.0 | torch-math | 1.0 | 0.50x |") == long
    assert "4.25" in page and "commit 0123456789 with changes" in page
    assert "![layers](cpu/layers.png)" in page and f"kernels {host.instruction_set()}, torch " in page
    assert "LOST" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("origin", "says_it"),
    [
        ({"device": "CPU x", "backends": {"float32": "cpu"}}, False),
        ({"device": "CPU x", "backends": {"float32": "torch"}}, True),
        ({"device": "CPU x"}, True),  # of the time before there were such kernels
        ({"device": "Tesla P100"}, False),
    ],
)
def test_the_summary_says_where_fastattns_kernels_did_not_run(origin, says_it):
    text = summary.opening(origin)
    assert text.startswith(f"\n## {origin['device']}\n")
    assert ("say nothing of the speed of fastattn's own kernels" in text) == says_it
