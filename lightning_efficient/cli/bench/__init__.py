"""`lightning-efficient bench`: sweeps over techniques, serving, collectives, and reports of what was measured."""

from __future__ import annotations

import sys
from collections.abc import Callable, Sequence

from lightning_efficient.cli.errors import EXIT_BAD_INPUT, UserError, did_you_mean

__all__ = ["main"]

_KINDS = {
    "serve": "generation: time to the first token, between tokens, throughput under load",
    "comm": "collectives: time over size, latency and rate of the link",
    "report": "write the tables and the page of a results.jsonl again",
}
_USAGE = """\
usage: lightning-efficient bench -c SWEEP.yaml [options]     measure a matrix of training cases
       lightning-efficient bench KIND [options]

{kinds}

'bench -c SWEEP --help' shows a sweep's options, 'bench KIND --help' the others'.

examples:
  lightning-efficient bench -c bench/quick
  lightning-efficient bench -c bench/quick --list
  lightning-efficient recipes copy bench/quick mine.yaml
"""


def main(argv: Sequence[str]) -> int:
    """Run `bench` with the words after it.

    Args:
        argv: e.g. `["-c", "bench/quick"]`, or `["comm", "--world-size", "2"]`.

    Returns:
        The exit code: 0; 1 where a case failed; 2 for bad input.

    Raises:
        UserError: An option or the sweep file is wrong.
    """
    first = argv[0] if argv else ""
    if first in _KINDS:
        return _tool(first)(list(argv[1:]))
    if not first or argv in (["-h"], ["--help"]):
        kinds = "\n".join(f"  {name:<8} {text}" for name, text in _KINDS.items())
        (sys.stdout if first else sys.stderr).write(_USAGE.format(kinds=kinds))
        return 0 if first else EXIT_BAD_INPUT
    if not first.startswith("-"):
        raise UserError(
            f"bench knows no '{first}'.{did_you_mean(first, _KINDS)} It takes -c SWEEP.yaml, or one of "
            f"{', '.join(_KINDS)}."
        )
    from lightning_efficient.cli.bench import command

    return command.main(argv)


def _tool(name: str) -> Callable[[Sequence[str]], int]:
    if name == "serve":
        from lightning_efficient.cli.bench import serve

        return serve.main
    if name == "comm":
        from lightning_efficient.cli.bench import comm

        return comm.main
    from lightning_efficient.cli.bench import command

    return command.report_main
