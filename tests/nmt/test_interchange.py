"""Models in other people's formats: the same logits there, the same model back."""

from __future__ import annotations

import json
from dataclasses import replace

import pytest
import torch
from torch import nn

from fastattn.integrations.marian import load_marian, save_marian
from fastattn.integrations.safetensors import load_safetensors, save_safetensors
from fastattn.nmt.generation import greedy_search
from fastattn.nmt.transformer import Transformer
from tests.support.tiny_transformer import TINY, sentences

pytest.importorskip("safetensors", reason="safetensors is not installed")

SHARED = replace(TINY, num_target_spaces=0)
SPACES = replace(TINY, num_target_spaces=3, d_model=18, bos_id=2, num_encoder_layers=1)


def random_model(config, seed=0):
    """A model none of whose parameters is still at its initial zero or one, in evaluation mode."""
    torch.manual_seed(seed)
    model = Transformer(config).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter += 0.3 * torch.randn_like(parameter)
        model.embedding.weight[config.pad_id] = 0
    return model


def marian_of(folder, config, eps=None):
    """The model that Hugging Face reads from a folder, all keys accounted for, with `eps` for its LayerNorms."""
    transformers = pytest.importorskip("transformers", reason="transformers is not installed")
    marian, loading = transformers.MarianMTModel.from_pretrained(folder, output_loading_info=True)
    assert not loading["unexpected_keys"] and not loading["mismatched_keys"]
    assert all("embed_positions" in key for key in loading["missing_keys"])
    for module in marian.modules():
        if isinstance(module, nn.LayerNorm) and eps is not None:
            module.eps = eps
    return marian.eval()


@torch.no_grad()
def marian_logits(marian, source, target):
    mask = (source != marian.config.pad_token_id).long()
    start = torch.full_like(target[:, :1], marian.config.decoder_start_token_id)
    return marian(source, mask, decoder_input_ids=torch.cat([start, target[:, :-1]], 1)).logits


BATCH = sentences([7, 3, 5], seed=1), sentences([4, 6, 2], seed=2)


@pytest.mark.parametrize("config", [SHARED, SPACES], ids=["shared", "target spaces"])
def test_marian_gives_the_same_logits(tmp_path, config):
    model = random_model(config)
    space = config.num_target_spaces - 1 if config.num_target_spaces else 0
    save_marian(model, tmp_path, space)
    with torch.no_grad():
        expected = model(*BATCH, space)
    marian = marian_of(tmp_path, config, eps=config.layer_norm_eps)
    torch.testing.assert_close(marian_logits(marian, *BATCH), expected, rtol=1e-5, atol=3e-5)
    with torch.no_grad():
        other_space = model(*BATCH, 0) if space else -expected
    assert (other_space - expected).abs().max() > 0.1


def test_marians_own_epsilon_changes_little(tmp_path):
    model = random_model(SHARED)
    save_marian(model, tmp_path)
    with torch.no_grad():
        difference = (marian_logits(marian_of(tmp_path, SHARED), *BATCH) - model(*BATCH)).abs().max()
    assert 0 < difference < 1e-3


def test_marian_writes_it_again(tmp_path):
    model = random_model(SHARED)
    save_marian(model, tmp_path / "first")
    marian_of(tmp_path / "first", SHARED).save_pretrained(tmp_path / "second")
    logits = [marian_logits(marian_of(tmp_path / name, SHARED), *BATCH) for name in ("first", "second")]
    assert torch.equal(*logits)
    assert load_marian(tmp_path / "second").config == model.config


@pytest.mark.parametrize("likes_padding", [False, True])
def test_marian_generates_the_same_ids(tmp_path, likes_padding):
    model = random_model(SHARED)
    if likes_padding:
        with torch.no_grad():
            model.embedding.weight[1:, 0] += 3
            model.decoder[-1].residuals[-1].norm.bias[0] -= 5
    save_marian(model, tmp_path)
    marian = marian_of(tmp_path, SHARED, eps=SHARED.layer_norm_eps)
    source = sentences([6, 4, 2], seed=5)
    mask = (source != SHARED.pad_id).long()
    generated = marian.generate(source, attention_mask=mask, num_beams=1, max_new_tokens=10).tolist()
    for ids, hypothesis in zip(generated, greedy_search(model, source), strict=True):
        ids = [token for token in ids[1:] if token != SHARED.pad_id]
        expected = [*hypothesis.tokens, SHARED.eos_id]
        assert ids[:9] == expected[:9]  # Marian ends at 10 ids


@pytest.mark.parametrize("config", [SHARED, SPACES], ids=["shared", "target spaces"])
def test_marian_comes_back(tmp_path, config):
    model = random_model(config)
    save_marian(model, tmp_path, target_space=0)
    back = load_marian(tmp_path).eval()
    assert back.config == replace(config, num_target_spaces=min(1, config.num_target_spaces))
    with torch.no_grad():
        torch.testing.assert_close(back(*BATCH), model(*BATCH), rtol=1e-5, atol=1e-5)
    if not config.num_target_spaces:
        assert all(map(torch.equal, back.state_dict().values(), model.state_dict().values()))


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"norm": "pre"}, "norm 'pre': Marian's class has post-norm only"),
        ({"positions": "learned"}, "positions 'learned': Marian's are sinusoidal"),
        ({"head_dim": 2}, "head_dim 2: Marian's is d_model / num_heads, 4"),
        ({"v_head_dim": 5}, "v_head_dim 5: Marian's is 4"),
        ({"d_model": 9}, "d_model 9: Marian's must be even"),
    ],
)
def test_what_marian_cannot_hold(tmp_path, changes, reason):
    with pytest.raises(NotImplementedError, match=reason):
        save_marian(Transformer(replace(SHARED, **changes)), tmp_path)
    assert not any(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"model_type": "bart"}, "model_type 'bart' is not marian"),
        ({"activation_function": "swish"}, "activation_function 'swish': ours is relu"),
        ({"scale_embedding": False}, "not scaled"),
        ({"decoder_ffn_dim": 11}, "different widths"),
        ({"decoder_vocab_size": 5}, "vocabularies of their own"),
        ({"decoder_start_token_id": 0}, "starts with padding"),
    ],
)
def test_what_this_transformer_cannot_hold(tmp_path, changes, reason):
    save_marian(Transformer(SHARED), tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps({**config, **changes}))
    with pytest.raises(NotImplementedError, match=reason):
        load_marian(tmp_path)


@pytest.mark.parametrize("name", ["final_logits_bias", "model.encoder.embed_tokens.weight"])
def test_parameters_this_transformer_does_not_have(tmp_path, name):
    from safetensors.torch import load_file, save_file

    save_marian(random_model(SPACES), tmp_path)
    tensors = load_file(tmp_path / "model.safetensors")
    tensors[name][0, 3] += 1
    save_file(tensors, tmp_path / "model.safetensors")
    with pytest.raises(NotImplementedError, match="bias of the logits|more than one vector"):
        load_marian(tmp_path)


def test_target_space_outside_the_table(tmp_path):
    with pytest.raises(ValueError, match=r"target_space: must lie in \[0, 3\), got 3"):
        save_marian(Transformer(SPACES), tmp_path, target_space=3)


def test_safetensors_comes_back(tmp_path):
    model = random_model(replace(TINY, norm="pre", positions="learned", head_dim=2))
    save_safetensors(model, tmp_path)
    back = load_safetensors(tmp_path)
    assert back.config == model.config
    state = back.state_dict()
    assert list(state) == list(model.state_dict())
    assert all(map(torch.equal, state.values(), model.state_dict().values()))
    assert back.training


def test_safetensors_of_another_model(tmp_path):
    save_marian(Transformer(SHARED), tmp_path)
    with pytest.raises(ValueError, match="model_type must be 'fastattn.Transformer', got 'marian'"):
        load_safetensors(tmp_path)


@pytest.mark.parametrize(("save", "load"), [(save_safetensors, load_safetensors), (save_marian, load_marian)])
def test_files_that_do_not_fit_together(tmp_path, save, load):
    from safetensors.torch import load_file, save_file

    save(Transformer(SHARED), tmp_path)
    path = tmp_path / "model.safetensors"
    tensors = load_file(path)
    for changed in (dict(list(tensors.items())[:-1]), {name: value[:3].clone() for name, value in tensors.items()}):
        save_file(changed, path)
        with pytest.raises(ValueError, match="config.json does not describe model.safetensors"):
            load(tmp_path)
    path.write_bytes(b"\x80\x04cos\nmkdir\n(S'executed'\ntR.")
    with pytest.raises(ValueError, match="model.safetensors: is not a safetensors file"):
        load(tmp_path)
