"""TextData, DigitsData and SyntheticTokens: what is in their splits, and what they refuse."""

import builtins
import itertools
import math
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
import torch

from lightning_efficient.data import DigitsData, SyntheticTokens, TextData


def write(path: Path, text: str) -> str:
    path.write_text(text, encoding="utf-8")
    return str(path)


@pytest.mark.parametrize("tokens", ["byte", "char"])
def test_splits_are_contiguous_and_make_up_the_text(tmp_path: Path, tokens: Any) -> None:
    text = "".join(chr(97 + index % 26) for index in range(900)) + "äöü" * 30
    data = TextData(write(tmp_path / "a.txt", text), tokens, block_size=8, val_fraction=0.2, test_fraction=0.1)
    parts = [data.splits.train, data.splits.val, data.splits.test]
    assert "".join(data.decode(part.tokens) for part in parts).replace("\ufffd", "") == text
    assert [len(part.tokens) / sum(len(p.tokens) for p in parts) for part in parts] == pytest.approx(
        [0.7, 0.2, 0.1], abs=0.01
    )
    assert data.vocab_size == (256 if tokens == "byte" else 29)
    assert data.decode(data.encode("abcä")) == "abcä"


def test_default_text_is_pythons_help_and_is_the_same_every_time() -> None:
    first, second = TextData(), TextData(seed=5)
    assert torch.equal(first.splits.train.tokens, second.splits.train.tokens)
    assert "assert" in first.decode(first.splits.train.tokens[:5000])
    assert len(first.splits.train.tokens) > 300_000
    batch = next(iter(first.train_dataloader()))
    assert {name: (value.shape, value.dtype) for name, value in batch.items()} == {
        "input_ids": (torch.Size([16, 128]), torch.int64),
        "labels": (torch.Size([16, 128]), torch.int64),
    }


def test_source_code_is_another_text_of_this_python() -> None:
    data = TextData(corpus="code")
    text = data.decode(data.splits.train.tokens)
    assert len(text) > 500_000
    assert text == TextData(corpus="code").decode(data.splits.train.tokens)
    assert text.count("\n    def ") > 1000
    assert TextData().decode(TextData().splits.train.tokens).count("\n    def ") < 100


def test_files_are_read_in_order_and_globs_sorted(tmp_path: Path) -> None:
    for name in ("b", "a", "c"):
        write(tmp_path / f"{name}.txt", name * 40)
    data = TextData([str(tmp_path / "c.txt"), str(tmp_path / "[ab].txt")], block_size=4)
    parts = data.splits
    text = data.decode(torch.cat([parts.train.tokens, parts.val.tokens]))
    assert text == "\n".join(("c" * 40, "a" * 40, "b" * 40))


def test_unigram_entropy_is_the_loss_of_the_best_guess_without_context(tmp_path: Path) -> None:
    data = TextData(write(tmp_path / "a.txt", "aaab" * 450 + "abbb" * 50), "char", block_size=4)
    counts = Counter("aaab" * 450)
    p = {c: (counts[c] + 1) / (1800 + 2) for c in "ab"}
    assert data.unigram_entropy() == pytest.approx(-(0.25 * math.log(p["a"]) + 0.75 * math.log(p["b"])), rel=1e-9)


def test_alphabet_does_not_need_setup() -> None:
    # LightningCLI links data.vocab_size to the model right after construction.
    assert TextData(tokens="char").vocab_size > 90


@pytest.mark.parametrize("noise", [0.0, 0.2, 1.0])
def test_synthetic_stream_has_the_entropy_it_claims(noise: float) -> None:
    data = SyntheticTokens(vocab_size=8, block_size=4, noise=noise, num_train_tokens=60_000)
    stream = data.splits.train.tokens.long()
    joint = torch.bincount(stream[:-1] * 8 + stream[1:], minlength=64).view(8, 8).double()
    conditional = joint / joint.sum(1, keepdim=True)
    empirical = -(joint / joint.sum() * conditional.clamp_min(1e-300).log()).sum()
    # The plug-in estimate of the entropy of 60 000 pairs: deviation about 0.004 nats, bias 56 / 120 000.
    assert float(empirical) == pytest.approx(data.entropy_floor, abs=0.015)
    assert {0.0: 0.0, 1.0: math.log(8)}.get(noise, data.entropy_floor) == pytest.approx(data.entropy_floor)


def test_synthetic_validation_follows_the_rule_of_training() -> None:
    data = SyntheticTokens(vocab_size=8, block_size=4, noise=0.0, num_train_tokens=100, num_val_tokens=100)
    rules = [dict(itertools.pairwise(part.tokens.tolist())) for part in (data.splits.train, data.splits.val)]
    assert rules[0] == rules[1]
    assert sorted(rules[0]) == sorted(rules[0].values()) == list(range(8))
    assert rules[0] != dict(itertools.pairwise(SyntheticTokens(8, 4, noise=0.0, seed=1).splits.val.tokens.tolist()))


def test_digits_are_split_by_class_without_overlap() -> None:
    pytest.importorskip("sklearn")
    data = DigitsData(val_fraction=0.2, test_fraction=0.1)
    parts = [data.splits.train, data.splits.val, data.splits.test]
    assert sum(part.num_items for part in parts) == 1797
    rows = [row for part in parts for row in map(tuple, part.inputs.flatten(1).tolist())]
    assert len(set(rows)) == 1797  # no two digits are the same picture, so none is in two splits
    shares = torch.stack([torch.bincount(part.labels, minlength=10) for part in parts]).double()
    torch.testing.assert_close(
        shares / shares.sum(0), torch.tensor([[0.7], [0.2], [0.1]]).double().expand(3, 10), rtol=0, atol=0.01
    )
    images, labels = next(iter(data.train_dataloader()))
    assert (images.shape, images.dtype, labels.dtype) == ((64, 1, 8, 8), torch.float32, torch.int64)
    assert (float(images.min()), float(images.max())) == (0.0, 1.0)
    assert next(iter(DigitsData(flat=True).val_dataloader()))[0].shape[1:] == (64,)


def test_the_seed_alone_decides_the_split() -> None:
    pytest.importorskip("sklearn")
    first = DigitsData(seed=1).splits.val.inputs
    torch.manual_seed(99)
    assert torch.equal(first, DigitsData(seed=1).splits.val.inputs)
    assert not torch.equal(first, DigitsData(seed=2).splits.val.inputs)


def test_missing_scikit_learn_names_the_extra(monkeypatch: pytest.MonkeyPatch) -> None:
    real_import = builtins.__import__

    def without_sklearn(name: str, *args: Any, **kwargs: Any) -> Any:
        if name == "sklearn":
            raise ModuleNotFoundError("No module named 'sklearn'")
        return real_import(name, *args, **kwargs)

    monkeypatch.setattr(builtins, "__import__", without_sklearn)
    with pytest.raises(ModuleNotFoundError, match=r"pip install 'lightning-efficient\[data\]'"):
        DigitsData().setup("fit")


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: TextData(batch_size=0), "batch_size is 0, but must be at least 1"),
        (lambda: TextData(block_size=0), "block_size is 0, but must be at least 1"),
        (lambda: TextData(seed=-1), "seed is -1, but must be at least 0"),
        (lambda: TextData(val_fraction=0), "val_fraction is 0, but must lie strictly between 0 and 1"),
        (lambda: TextData(val_fraction=1.0), "val_fraction is 1.0, but must lie strictly between 0 and 1"),
        (lambda: TextData(test_fraction=0.9), "nothing is left for training"),
        (lambda: TextData(tokens="word"), "tokens is 'word': .* Use 'byte' or 'char'"),
        (lambda: TextData(files=[]).splits, "files is an empty list"),
        (lambda: TextData().alphabet, "has no alphabet"),
        (lambda: TextData(tokens="char").encode("\u2603"), "characters that the training text has not .*tokens='byte'"),
        (lambda: TextData().test_dataloader(), r"TextData has no test split \(test_fraction=0\). Set test_fraction"),
        (lambda: DigitsData(batch_size=-3), "batch_size is -3"),
        (lambda: SyntheticTokens(vocab_size=1), "vocab_size is 1, but must be at least 2"),
        (lambda: SyntheticTokens(noise=1.5), "noise is 1.5, but is a probability"),
        (lambda: SyntheticTokens(block_size=9, num_val_tokens=9), "num_val_tokens is 9, but must be at least 10"),
    ],
)
def test_bad_arguments_are_refused(make: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        make()


def test_an_unknown_corpus_and_a_python_without_sources_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(ValueError, match="corpus is 'prose': there are 'help', 'code'"):
        TextData(corpus="prose")  # type: ignore[arg-type]
    monkeypatch.setattr("sysconfig.get_path", lambda name: "/nowhere")
    with pytest.raises(FileNotFoundError, match="this Python comes without it"):
        TextData(corpus="code").setup("fit")


def test_bad_files_are_refused(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match=r"No text file matches '.*nothing.txt'.*Check the path"):
        TextData(str(tmp_path / "nothing.txt")).setup("fit")
    (tmp_path / "latin.txt").write_bytes("größe".encode("latin-1"))
    with pytest.raises(ValueError, match=r"latin.txt' is not UTF-8 text \(byte 2 is 0xf6\).*iconv"):
        TextData(str(tmp_path / "latin.txt")).setup("fit")
    with pytest.raises(ValueError, match="The text is empty"):
        TextData(write(tmp_path / "empty.txt", "")).setup("fit")
    with pytest.raises(ValueError, match=r"validation split has 10 tokens, fewer than the 17 .*lower block_size"):
        TextData(write(tmp_path / "short.txt", "x" * 100), block_size=16).setup("fit")
