"""What code finds that imports flash_attn by name; padding and its inverse."""

from __future__ import annotations

import importlib
import importlib.util
import sys
from collections.abc import Iterator
from types import ModuleType

import pytest
import torch

from fastattn.integrations import flash_attn
from fastattn.integrations.flash_attn import install_as_flash_attn, pad_input, unpad_input


@pytest.fixture(autouse=True)
def modules_as_they_were(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """No flash_attn before, and none of ours afterwards."""
    for name in [name for name in sys.modules if name.partition(".")[0] == "flash_attn"]:
        monkeypatch.delitem(sys.modules, name)
    yield
    for name in [name for name in sys.modules if name.partition(".")[0] == "flash_attn"]:
        del sys.modules[name]


# ---- install_as_flash_attn ----


def test_flash_attn_is_found_by_name() -> None:
    install_as_flash_attn()
    package = importlib.import_module("flash_attn")
    interface = importlib.import_module("flash_attn.flash_attn_interface")
    padding = importlib.import_module("flash_attn.bert_padding")
    names = [name for name in flash_attn.__all__ if name.startswith("flash_attn_")]
    assert len(names) == 7
    for name in names:
        assert getattr(package, name) is getattr(interface, name) is getattr(flash_attn, name)
    assert padding.pad_input is pad_input and padding.unpad_input is unpad_input
    assert torch.equal(padding.index_first_axis(torch.arange(6).view(3, 2), torch.tensor([2])), torch.tensor([[4, 5]]))
    assert package.flash_attn_interface is interface and package.bert_padding is padding
    assert package.__version__.startswith("2.") and package.__version__.endswith("+fastattn")
    for name in ("flash_attn", "flash_attn.bert_padding"):
        spec = importlib.util.find_spec(name)
        assert spec is not None and spec.name == name


def test_twice_is_once() -> None:
    install_as_flash_attn()
    first = sys.modules["flash_attn"]
    install_as_flash_attn()
    assert sys.modules["flash_attn"] is first


def test_what_is_not_there_is_said_not_to_be() -> None:
    install_as_flash_attn()
    with pytest.raises(ModuleNotFoundError, match="No module named 'flash_attn.layers'$"):
        importlib.import_module("flash_attn.layers.rotary")
    with pytest.raises(ImportError, match="_flash_attn_forward"):
        exec("from flash_attn.flash_attn_interface import _flash_attn_forward")


def test_another_one_that_is_imported_already_is_left_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    other = ModuleType("flash_attn")
    other.__file__ = "elsewhere.py"
    monkeypatch.setitem(sys.modules, "flash_attn", other)
    with pytest.raises(RuntimeError, match="flash_attn: must not be imported before .* from elsewhere.py"):
        install_as_flash_attn()
    assert sys.modules["flash_attn"] is other and "flash_attn.bert_padding" not in sys.modules


# ---- padding ----

MASK = torch.tensor([[1, 1, 0, 0], [0, 0, 0, 0], [1, 0, 1, 1]])


@pytest.mark.parametrize("dtype", [torch.bool, torch.int64, torch.int32])
@pytest.mark.parametrize("shape", [(), (5,), (2, 5)], ids=str)
def test_padding_comes_off_and_on(dtype: torch.dtype, shape: tuple[int, ...]) -> None:
    x = torch.randn(3, 4, *shape, requires_grad=True)
    tokens, indices, edges, longest, used = unpad_input(x, MASK.to(dtype))
    assert torch.equal(tokens, x[MASK.bool()])
    assert indices.tolist() == [0, 1, 8, 10, 11] and longest == 3 and type(longest) is int
    assert edges.tolist() == [0, 2, 2, 5] and used.tolist() == [2, 0, 3]
    assert edges.dtype == used.dtype == torch.int32 and indices.dtype == torch.int64
    padded = pad_input(tokens, indices, 3, 4)
    kept = MASK.bool().view(3, 4, *[1] * len(shape))
    assert torch.equal(padded, torch.where(kept, x, 0.0))
    upstream = torch.randn_like(x)
    (grad,) = torch.autograd.grad(padded, x, upstream)
    assert torch.equal(grad, torch.where(kept, upstream, 0.0))


@pytest.mark.parametrize("dtype", [torch.bool, torch.int64])
def test_places_that_are_kept_without_being_tokens(dtype: torch.dtype) -> None:
    unused = torch.tensor([[0, 0, 1, 0], [0, 0, 0, 0], [0, 1, 0, 0]])
    x = torch.randn(3, 4, 2)
    tokens, _, edges, longest, used = unpad_input(x, MASK.to(dtype), unused.to(dtype))
    assert torch.equal(tokens, x[(MASK + unused).bool()])
    assert edges.tolist() == [0, 3, 3, 7] and longest == 4 and used.tolist() == [2, 0, 3]


def test_nothing_is_padded_too() -> None:
    tokens, indices, edges, longest, _ = unpad_input(torch.randn(2, 3, 5), torch.zeros(2, 3, dtype=torch.bool))
    assert tokens.shape == (0, 5) and edges.tolist() == [0, 0, 0] and longest == 0
    assert not pad_input(tokens, indices, 2, 3).any()
    assert unpad_input(torch.randn(0, 3, 5), torch.zeros(0, 3))[3] == 0


def test_what_does_not_fit_is_refused() -> None:
    x = torch.randn(3, 4, 2)
    with pytest.raises(ValueError, match=r"attention_mask: must be \(batch, seqlen\), those of hidden_states, got"):
        unpad_input(x, MASK[:, :3])
    with pytest.raises(ValueError, match="unused_mask: must be"):
        unpad_input(x, MASK, MASK[:2])
    with pytest.raises(ValueError, match=r"indices: must be \(total,\) = \(5,\), one for each token, got \(4,\)"):
        pad_input(x.flatten(0, 1)[:5], torch.arange(4), 3, 4)
    with pytest.raises(ValueError, match="seqlen: must be an int, got 4.0"):
        pad_input(x.flatten(0, 1)[:5], torch.arange(5), 3, 4.0)
    with pytest.raises(ValueError, match="hidden_states: must be a tensor, got None"):
        unpad_input(None, MASK)
