"""Results as JSON lines on the disk, one as soon as it is there: a sweep that was killed goes on where it was.

The first line says which sweep it is; every other line is a :class:`CaseResult`. The last line of a case counts.
"""

from __future__ import annotations

import fcntl
import json
import os
import warnings
from pathlib import Path
from types import TracebackType
from typing import Any

from typing_extensions import Self

from lightning_efficient.cli.errors import UserError
from lightning_efficient.dissect.result import SCHEMA, CaseResult, from_json, to_json

KIND = "lightning-efficient bench"


class Store:
    """The results of one sweep; one process at a time has it open.

    Args:
        path: the file; made if it is not there, with its folder.
        fingerprint: of the sweep; see :func:`lightning_efficient.cli.bench.cases.fingerprint`.
        fresh: whether to begin anew; the file that was there is kept as ``*.old.jsonl``, ``*.old2.jsonl``, ...

    Attributes:
        results: by case, in the order of the file.

    Raises:
        UserError: the file is another sweep's, of another schema, damaged, or open elsewhere.
    """

    def __init__(self, path: Path, fingerprint: str, *, fresh: bool = False) -> None:
        self.path = path
        path.parent.mkdir(parents=True, exist_ok=True)
        self._lock = (path.parent / f".{path.name}.lock").open("w")
        try:
            fcntl.flock(self._lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            self._lock.close()
            raise UserError(
                f"{path} is in use: another sweep writes to it. Wait until it has ended, or give another --out."
            ) from error
        try:
            if fresh and path.exists():
                path.replace(_free_name(path))
            self.results = self._read(fingerprint) if path.exists() and path.stat().st_size else {}
            self._file = path.open("a", encoding="utf-8")
            if not self._file.tell():
                self._write({"kind": KIND, "schema": SCHEMA, "fingerprint": fingerprint})
        except BaseException:
            self._lock.close()
            raise

    def append(self, result: CaseResult) -> None:
        """Add a result; it is on the disk when this returns."""
        self._write(to_json(result))
        self.results[result.case_id] = result

    def close(self) -> None:
        """Let go of the file."""
        self._file.close()
        self._lock.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def _write(self, data: dict[str, Any]) -> None:
        self._file.write(json.dumps(data) + "\n")
        self._file.flush()
        os.fsync(self._file.fileno())

    def _read(self, fingerprint: str) -> dict[str, CaseResult]:
        kept = _drop_half_line(self.path)
        if not kept:
            return {}
        found, results = _parse(self.path)
        if found != fingerprint:
            raise UserError(
                f"{self.path} holds the results of another sweep: its matrix, recipes or window differ from this "
                "one's, and results would mix. Give another folder with --out, or --fresh to begin anew here."
            )
        return results


def read_results(path: Path) -> list[CaseResult]:
    """Return the results of a file that a sweep has written, or is writing; a half-written last line is left out.

    Raises:
        UserError: there is no such file, it is no results file, or of another schema.
    """
    if not path.is_file():
        raise UserError(f"there is no file {path}: results are kept as results.jsonl in a sweep's folder. Name it.")
    return list(_parse(path)[1].values())


def _free_name(path: Path) -> Path:
    names = (path.with_suffix(f".old{number or ''}.jsonl") for number in (0, *range(2, 10_000)))
    return next(each for each in names if not each.exists())


def _drop_half_line(path: Path) -> int:
    """Cut off what a killed process wrote of its last line; return the bytes that stay."""
    whole = path.read_bytes()
    kept = whole.rfind(b"\n") + 1
    if kept < len(whole):
        warnings.warn(
            f"{path} ends in half a line: the sweep was killed while it wrote. That case will run again.", stacklevel=2
        )
        with path.open("r+b") as file:
            file.truncate(kept)
    return kept


def _parse(path: Path) -> tuple[str, dict[str, CaseResult]]:
    try:
        text = path.read_text(encoding="utf-8")
        lines = text[: text.rfind("\n") + 1].splitlines()
        if not lines:
            raise UserError(f"{path} holds nothing yet: the sweep has only begun. Wait for its first case.")
        head, *rest = [json.loads(line) for line in lines]
    except ValueError as error:
        raise UserError(
            f"{path} is damaged ({error}): a line is no JSON. Remove that line, or begin anew with --fresh."
        ) from error
    if not isinstance(head, dict) or head.get("kind") != KIND:
        raise UserError(f"{path} is no results file: its first line does not say so. Name a sweep's results.jsonl.")
    if head["schema"] != SCHEMA:
        raise UserError(
            f"{path} has schema {head['schema']}, this version reads {SCHEMA}: another version of lightning-efficient "
            "wrote it. Measure again with --fresh, or use that version."
        )
    try:
        results = [from_json(CaseResult, each) for each in rest]
    except ValueError as error:
        raise UserError(f"{path}: {error}") from error
    return str(head["fingerprint"]), {each.case_id: each for each in results}
