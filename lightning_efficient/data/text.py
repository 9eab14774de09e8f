"""Text as a stream of bytes or characters, split without leaks."""

import glob
import math
import sysconfig
from pathlib import Path
from typing import Literal

import torch
from torch import Tensor
from typing_extensions import override

from lightning_efficient.data._examples import TokenBlocks
from lightning_efficient.data._module import InMemoryDataModule, Splits, require_at_least, require_fractions


class TextData(InMemoryDataModule):
    """Language-model batches from text: Python's own help topics by default, its source code, or any UTF-8 files.

    The default text is ``pydoc_data.topics`` (about 465 000 characters of English reference prose, on every CPython),
    so it is real and needs no download. ``corpus="code"`` is the source of the standard library's modules from a to d
    (about a million characters): what a model of the prose can be fine-tuned on. The text is cut once into contiguous
    parts, training first, then validation, then test, so no sentence is in two of them. Batches are ``{"input_ids",
    "labels"}``, both (B, ``block_size``) int64, labels already shifted by one.

    Args:
        files: paths or glob patterns of UTF-8 files, read in the given order (a pattern's matches sorted by name) and
            joined by a newline. ``None``: the text that ``corpus`` names.
        tokens: ``"byte"`` (vocabulary 256) or ``"char"`` (the characters that occur in the whole text, sorted).
        block_size: tokens per sequence, T.
        batch_size: sequences per process and batch.
        val_fraction: part of the text for validation, in (0, 1).
        test_fraction: part of the text for testing, in [0, 1 - val_fraction).
        seed: decides, with the epoch, which blocks a training batch holds.
        corpus: ``"help"`` or ``"code"``, of the Python that runs; without effect where files are named.

    Raises:
        ValueError: an argument is out of range, a file is not UTF-8, or a split is shorter than a block.
        FileNotFoundError: a path or pattern matches no file.
    """

    def __init__(
        self,
        files: str | list[str] | None = None,
        tokens: Literal["byte", "char"] = "byte",
        *,
        block_size: int = 128,
        batch_size: int = 16,
        val_fraction: float = 0.1,
        test_fraction: float = 0.0,
        seed: int = 0,
        corpus: Literal["help", "code"] = "help",
    ) -> None:
        super().__init__(batch_size=batch_size, seed=seed)
        if corpus not in CORPORA:
            raise ValueError(
                f"corpus is {corpus!r}: there are {', '.join(map(repr, CORPORA))}. Use one, or name files."
            )
        if tokens not in ("byte", "char"):
            raise ValueError(f"tokens is {tokens!r}: text is cut into bytes or characters. Use 'byte' or 'char'.")
        require_at_least("block_size", block_size, 1)
        require_fractions(val_fraction, test_fraction)
        self.files = [files] if isinstance(files, str) else files
        self.corpus = corpus
        self.tokens = tokens
        self.block_size = block_size
        self.val_fraction = val_fraction
        self.test_fraction = test_fraction
        self._alphabet: list[str] | None = None

    @property
    def vocab_size(self) -> int:
        """Number of different tokens: 256 for bytes, the size of the alphabet (which reads the text) for characters."""
        return 256 if self.tokens == "byte" else len(self.alphabet)

    @property
    def alphabet(self) -> list[str]:
        """The characters by token id, for ``tokens="char"``.

        Raises:
            ValueError: the tokens are bytes.
        """
        if self.tokens == "byte":
            raise ValueError("TextData(tokens='byte') has no alphabet: a token is a byte. Use tokens='char' for one.")
        if self._alphabet is None:
            self.splits  # noqa: B018 - reading the text finds the alphabet
        assert self._alphabet is not None
        return self._alphabet

    def encode(self, text: str) -> Tensor:
        """Return the token ids of ``text``, (N,) int64.

        Raises:
            ValueError: a character is not in the alphabet.
        """
        if self.tokens == "byte":
            return torch.tensor(list(text.encode("utf-8")), dtype=torch.int64)
        ids = {character: index for index, character in enumerate(self.alphabet)}
        if unknown := sorted(set(text) - ids.keys()):
            raise ValueError(
                f"The text has characters that the training text has not ({''.join(unknown[:10])!r}): they have no "
                "token. Use tokens='byte', which can encode any text."
            )
        return torch.tensor([ids[character] for character in text], dtype=torch.int64)

    def decode(self, ids_N: Tensor) -> str:
        """Return the text of the token ids; bytes that are not UTF-8 become the replacement character."""
        if self.tokens == "byte":
            return bytes(ids_N.tolist()).decode("utf-8", errors="replace")
        return "".join(self.alphabet[index] for index in ids_N.tolist())

    def unigram_entropy(self) -> float:
        r"""Return the loss, in nats per token, of the best guess that ignores context.

        It is the cross-entropy of the validation split under the token frequencies of the training split,
        :math:`-\frac1N \sum_i \log \frac{c(x_i) + 1}{n + V}` with training counts :math:`c`, n training tokens and V
        tokens in the vocabulary. A model whose validation loss is below it has learned from context.
        """
        train_N, val_N = self._tokens_of("train"), self._tokens_of("val")
        counts_V = torch.bincount(train_N.long(), minlength=self.vocab_size).double() + 1
        log_p_V = (counts_V / counts_V.sum()).log()
        return float(-log_p_V[val_N.long()].mean())

    @override
    def make_splits(self) -> Splits:
        """Read the text, encode it, and cut it into contiguous parts.

        Raises:
            ValueError: a part is shorter than a block and its next token.
        """
        tokens_N = self._read_tokens()
        total = len(tokens_N)
        num_test, num_val = math.floor(total * self.test_fraction), math.floor(total * self.val_fraction)
        parts = torch.split(tokens_N, [total - num_val - num_test, num_val, num_test])
        for name, part in zip(("training", "validation", "test"), parts, strict=True):
            wanted = name != "test" or self.test_fraction > 0
            if wanted and len(part) <= self.block_size:
                raise ValueError(
                    f"The {name} split has {len(part)} tokens, fewer than the {self.block_size + 1} that one block of "
                    f"block_size={self.block_size} and its next token need. Give more text, lower block_size or change "
                    "val_fraction and test_fraction."
                )
        train, val, test = (TokenBlocks(part, self.block_size) for part in parts)
        return Splits(train, val, test if self.test_fraction > 0 else None)

    def _tokens_of(self, name: Literal["train", "val"]) -> Tensor:
        examples = getattr(self.splits, name)
        assert isinstance(examples, TokenBlocks)
        return examples.tokens

    def _read_tokens(self) -> Tensor:
        text = CORPORA[self.corpus]() if self.files is None else "\n".join(map(read_utf8, expand(self.files)))
        if not text:
            raise ValueError(f"The text is empty ({self.files}): there is nothing to learn. Name files with text.")
        if self.tokens == "byte":
            return torch.frombuffer(bytearray(text.encode("utf-8")), dtype=torch.uint8)
        self._alphabet = sorted(set(text))
        return self.encode(text).to(torch.int32)


def help_topics() -> str:
    """Return Python's help topics as one text, in sorted order of their names."""
    from pydoc_data.topics import topics  # a large literal; only those who train on it should pay for it

    return "\n".join(topics[name] for name in sorted(topics))


def standard_library() -> str:
    """Return the source of the standard library's modules from a to d as one text, sorted by name.

    Raises:
        FileNotFoundError: this Python comes without sources.
    """
    folder = Path(sysconfig.get_path("stdlib"))
    paths = sorted(path for path in folder.glob("[a-d]*.py") if path.is_file())
    if not paths:
        raise FileNotFoundError(
            f"There is no Python source in {str(folder)!r}: this Python comes without it, so corpus='code' has no "
            "text. Use corpus='help', or name files."
        )
    return "\n".join(map(read_utf8, paths))


CORPORA = {"help": help_topics, "code": standard_library}
"""Texts that every CPython has, by name."""


def expand(patterns: list[str]) -> list[Path]:
    """Return the files that ``patterns`` name.

    Raises:
        FileNotFoundError: a path or pattern matches no file.
        ValueError: there is no pattern at all.
    """
    if not patterns:
        raise ValueError("files is an empty list: there is no text to read. Name a file, or leave files out.")
    paths: list[Path] = []
    for pattern in patterns:
        expanded = Path(pattern).expanduser()
        # A path that exists is meant literally, even if its name holds a bracket.
        matches = [expanded] if expanded.is_file() else sorted(map(Path, glob.glob(str(expanded), recursive=True)))
        matches = [match for match in matches if match.is_file()]
        if not matches:
            raise FileNotFoundError(
                f"No text file matches {pattern!r} (looked from {Path.cwd()}): TextData needs existing UTF-8 files. "
                "Check the path, or leave files out to use Python's help topics."
            )
        paths.extend(matches)
    return paths


def read_utf8(path: Path) -> str:
    """Return the text of a file.

    Raises:
        ValueError: the file is not UTF-8.
    """
    try:
        return path.read_bytes().decode("utf-8")
    except UnicodeDecodeError as error:
        raise ValueError(
            f"The file {str(path)!r} is not UTF-8 text (byte {error.start} is {error.object[error.start]:#04x}). "
            "Convert it, for example with `iconv -f LATIN1 -t UTF-8`, or remove it from files."
        ) from error
