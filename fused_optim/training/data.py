"""Real text as bytes: which files, the split into training and validation, and the batches."""

from __future__ import annotations

import hashlib
import sysconfig
import zlib
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path, PurePath

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

SEPARATOR = 256
"""The token before the first byte of every file; tokens 0 to 255 are the bytes themselves."""

VOCABULARY = 257
VALIDATION_SHARE = 0.05
VALIDATION_TOKENS = 1 << 14
_SNIFFED_BYTES = 8192


class UsageError(ValueError):
    """What the user asked for cannot be done; the message is one line that says what can."""


@dataclass(frozen=True)
class Corpus:
    """Two token sequences (int16, two bytes of memory per byte of text) and where they came from."""

    source: str
    train: NDArray[np.int16]
    validation: NDArray[np.int16]
    train_files: int
    validation_files: int
    skipped_files: int
    fingerprint: str

    def summary(self) -> str:
        """One line for the top of the report."""
        skipped = f", {_binary_files(self.skipped_files)} left out" if self.skipped_files else ""
        sizes = f"{len(self.train) / 1e6:.2f} MB to train on, {len(self.validation) / 1e6:.2f} MB to validate"
        if self.validation_files:
            return f"{self.source}: {self.train_files} + {self.validation_files} files, {sizes}{skipped}"
        return f"{self.source}: {sizes} (the end of the file){skipped}"


def _binary_files(count: int) -> str:
    return f"{count} binary file{'s' if count > 1 else ''}"


def standard_library() -> Path:
    """Where the running interpreter keeps its own sources."""
    return Path(sysconfig.get_paths()["stdlib"])


def find_files(folder: Path, pattern: str) -> list[Path]:
    """The files of a folder, in a fixed order, without installed packages and hidden folders."""
    left_out = {"site-packages", "dist-packages", "__pycache__"}
    found = []
    for path in folder.rglob(pattern):
        parts = path.relative_to(folder).parts
        if not left_out.intersection(parts) and not any(p.startswith(".") for p in parts) and path.is_file():
            found.append(path)
    return sorted(found, key=lambda path: path.relative_to(folder).as_posix())


def split_files(names: Sequence[str]) -> tuple[list[str], list[str]]:
    """Names to train on and names to validate with, by a hash of each name alone.

    A file stays on its side when others come and go. Where too few files leave a side empty, the one
    with the most extreme hash moves there.
    """
    ranks = {
        name: int.from_bytes(hashlib.sha256(name.encode()).digest()[:8], "big") / 2**64 for name in names
    }
    validation = {name for name in names if ranks[name] < VALIDATION_SHARE}
    if not validation:
        validation = {min(names, key=ranks.__getitem__)}
    elif len(validation) == len(names):
        validation.remove(max(names, key=ranks.__getitem__))
    return [n for n in names if n not in validation], [n for n in names if n in validation]


def load_corpus(data: str | None, pattern: str | None) -> Corpus:
    """Reads a file, a folder, or (None) the standard library's sources.

    The files of a side are joined in the order of their names, a separator before each. A batch may
    run across a separator and the model sees both sides of it: no attention mask, no padding.

    Raises:
        UsageError: nothing there, or nothing that is text.
    """
    root = standard_library() if data is None else Path(data)
    if root.is_file():
        if pattern is not None:
            raise UsageError(
                f"--glob chooses among the files of a folder, but --data {data} is a file; leave it out"
            )
        return _split_by_position(root)
    if not root.is_dir():
        raise UsageError(f"--data {root} does not exist; give a text file or a folder of text files")
    if pattern is None:
        pattern = "*.py" if data is None else "*"
    _check_pattern(pattern)
    paths = {path.relative_to(root).as_posix(): path for path in find_files(root, pattern)}
    texts = {name: _tokens(path) for name, path in paths.items()}
    usable = [name for name, text in texts.items() if text is not None and len(text) > 1]
    skipped = sum(text is None for text in texts.values())
    if len(usable) < 2:
        left_out = f" ({_binary_files(skipped)} left out)" if skipped else ""
        raise UsageError(
            f"--data {root} has {len(usable)} text files that match {pattern!r} and are not empty{left_out}; "
            "give two or more, or a single file (its end becomes the validation text)"
        )
    sides = split_files(usable)
    train, validation = (
        np.concatenate([text for name in side if (text := texts[name]) is not None]) for side in sides
    )
    source = "Python's standard library" if data is None else data
    return Corpus(
        source, train, validation, len(sides[0]), len(sides[1]), skipped, _fingerprint(train, validation)
    )


def _check_pattern(pattern: str) -> None:
    parts = PurePath(pattern).parts
    if not parts or PurePath(pattern).anchor or any("**" in part and part != "**" for part in parts):
        raise UsageError(
            f"--glob {pattern!r} is no pattern of files in the folder; give one such as '*.txt' or "
            "'books/*.txt', which is looked for in all folders of --data"
        )


def _split_by_position(path: Path) -> Corpus:
    tokens = _tokens(path)
    if tokens is None:
        raise UsageError(f"--data {path} contains NUL bytes and is not text; give a text file")
    cut = len(tokens) - int(len(tokens) * VALIDATION_SHARE)
    train, validation = tokens[:cut], tokens[cut:]
    return Corpus(str(path), train, validation, 1, 0, 0, _fingerprint(train, validation))


def _tokens(path: Path) -> NDArray[np.int16] | None:
    """A separator and the bytes of a file; None if they are not text."""
    try:
        text = path.read_bytes()
    except OSError as error:
        raise UsageError(f"--data: cannot read {path} ({error.strerror}); fix it or leave it out") from error
    if b"\0" in text[:_SNIFFED_BYTES]:
        return None
    tokens = np.empty(len(text) + 1, dtype=np.int16)
    tokens[0] = SEPARATOR
    tokens[1:] = np.frombuffer(text, dtype=np.uint8)
    return tokens


def _fingerprint(train: NDArray[np.int16], validation: NDArray[np.int16]) -> str:
    return f"{len(train)}+{len(validation)}:{zlib.crc32(validation.data, zlib.crc32(train.data)):08x}"


def check_length(corpus: Corpus, sequence_length: int) -> None:
    """Refuses text that is shorter than one sequence.

    Raises:
        UsageError: on either side of the split.
    """
    for side, tokens in (("training", corpus.train), ("validation", corpus.validation)):
        if len(tokens) <= sequence_length:
            raise UsageError(
                f"{corpus.source} gives {len(tokens)} tokens of {side} text, too few for --sequence-length "
                f"{sequence_length}; give more text or shorter sequences"
            )


def _windows(tokens: NDArray[np.int16], starts: NDArray[np.int64], sequence_length: int) -> Tensor:
    return torch.from_numpy(tokens[starts[:, None] + np.arange(sequence_length + 1)].astype(np.int64))


def training_batch(corpus: Corpus, batch_size: int, sequence_length: int, seed: int, step: int) -> Tensor:
    """Tokens ``[batch_size, sequence_length + 1]`` (int64), a function of seed and step alone."""
    starts = np.random.default_rng((seed, step)).integers(0, len(corpus.train) - sequence_length, batch_size)
    return _windows(corpus.train, starts, sequence_length)


def validation_batches(
    corpus: Corpus, batch_size: int, sequence_length: int, most: int = VALIDATION_TOKENS
) -> list[Tensor]:
    """The same evenly spaced windows every time, of at most so many tokens in all."""
    tokens = corpus.validation
    count = max(1, min(len(tokens), most) // (sequence_length + 1))
    starts = np.linspace(0, len(tokens) - sequence_length - 1, count).astype(np.int64)
    return list(_windows(tokens, starts, sequence_length).split(batch_size))
