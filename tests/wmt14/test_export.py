"""Exported folders: they translate as the model does, here and in Hugging Face's classes."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from examples.wmt14 import export, translate
from examples.wmt14.subwords import Subwords, train_subwords
from fastattn.nmt.generation import greedy_search
from tests.support.trained_run import random_model, text, write_run

pytest.importorskip("safetensors", reason="safetensors is not installed")

LINES = [text(n, 3 + n) for n in range(5)]


def translations(folder, *options):
    """The output of the translate command for LINES."""
    translator, _ = translate.make_translator(translate.parse_arguments([str(folder), "--max-extra", "5", *options]))
    return [translator.texts(hypotheses)[0] for hypotheses in translator.translate(LINES)]


def test_safetensors_translates_alone(tmp_path, capsys):
    run = write_run(tmp_path / "run", norm="pre")
    export.main([str(run), "--format", "safetensors", "--output", str(tmp_path / "exported")])
    names = ["config.json", "model.safetensors", "preparation.json", "subwords.model"]
    assert capsys.readouterr().out.split() == names
    expected = translations(run)
    for file in run.rglob("*.*"):
        file.unlink()
    assert translations(tmp_path / "exported") == expected
    assert len(set(expected)) > 1


def test_marian_comes_back_to_translate(tmp_path):
    run = write_run(tmp_path / "run", num_target_spaces=0)
    export.main([str(run), "--format", "marian", "--output", str(tmp_path / "exported")])
    assert translations(tmp_path / "exported", "--data", str(run / "data")) == translations(run)


@pytest.mark.parametrize("spaces", [0, 3])
def test_hugging_face_translates_to_the_same_text(tmp_path, spaces):
    transformers = pytest.importorskip("transformers", reason="transformers is not installed")
    run = write_run(tmp_path / "run", num_target_spaces=spaces)
    folder = tmp_path / "exported"
    export.main([str(run), "--format", "marian", "--output", str(folder)])
    tokenizer = transformers.MarianTokenizer.from_pretrained(folder)
    marian = transformers.MarianMTModel.from_pretrained(folder).eval()
    for module in marian.modules():
        if isinstance(module, nn.LayerNorm):
            module.eps = 1e-6
    subwords = Subwords.load(run / "data")
    batch = tokenizer(LINES, return_tensors="pt", padding=True)
    encoded = subwords.encode(LINES)
    assert [row[row != 0].tolist() for row in batch["input_ids"]] == encoded
    generated = marian.generate(**batch, num_beams=1, max_new_tokens=12)
    texts = tokenizer.batch_decode(generated, skip_special_tokens=True)
    found = greedy_search(random_model(num_target_spaces=spaces), batch["input_ids"])
    assert texts == subwords.decode([best.tokens[:11] for best in found])  # the twelfth is the end
    assert len(set(texts)) > 1
    assert (marian.generation_config.num_beams, marian.generation_config.length_penalty) == (4, 0.6)
    with torch.no_grad():
        assert marian.generate(**batch).shape[0] == len(LINES)


def test_text_that_the_tokenizer_does_not_prepare(tmp_path, capsys):
    run = write_run(tmp_path / "run", preparation={"lowercase": True, "moses": True}, num_target_spaces=0)
    export.main([str(run), "--format", "marian", "--output", str(tmp_path / "exported")])
    err = capsys.readouterr().err
    assert "warning: the source tokenizer expects text after lowercase and moses" in err


def test_refusals(tmp_path, capsys):
    run = write_run(tmp_path / "run", norm="pre")
    cases = {
        "norm 'pre': Marian's class has post-norm only": [str(run), "--output", str(tmp_path / "new")],
        f"--output: {run} exists already": [str(run), "--output", str(run)],
        "--data: must name the data folder": [str(tmp_path / "nowhere"), "--output", str(tmp_path / "new")],
    }
    for message, arguments in cases.items():
        with pytest.raises(SystemExit) as stopped:
            export.main([*arguments, "--format", "marian"])
        assert message in stopped.value.code
    assert [path.name for path in tmp_path.iterdir()] == ["run"]


def test_a_vocabulary_of_another_size(tmp_path):
    run = write_run(tmp_path / "run", num_target_spaces=0)
    (run / "data/subwords.model").write_bytes(train_subwords(LINES, 30, 1.0))
    with pytest.raises(SystemExit, match="sentencepiece_model: vocab_size must be the model's 60, got 30"):
        export.main([str(run), "--format", "marian", "--output", str(tmp_path / "new")])
    assert [path.name for path in tmp_path.iterdir()] == ["run"]


def test_a_folder_of_safetensors_holds_no_code(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    run = write_run(tmp_path / "run")
    export.main([str(run), "--format", "safetensors", "--output", str(tmp_path / "exported")])
    (tmp_path / "exported/model.safetensors").write_bytes(b"\x80\x04cos\nmkdir\n(S'executed'\ntR.")
    with pytest.raises(SystemExit) as stopped:
        translate.main([str(tmp_path / "exported"), "--input", str(run / "data/test.source.txt")])
    assert "model.safetensors: is not a safetensors file" in stopped.value.code
    assert not (tmp_path / "executed").exists()
