"""`python -m tests.netlab up 4 --rate 100mbit`, `down`, `run --hosts 4 --rate 100mbit -- COMMAND`. Needs root."""

import argparse
import signal
import sys

from tests.netlab.lab import Lab, NetlabError, remove_labs, why_unavailable


def main(arguments: list[str] | None = None) -> int:
    """Run the command line and return its exit code."""
    options = _parser().parse_args(arguments)
    # Leave through `finally` and `with` when told to stop, so that the lab goes too.
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))
    try:
        return int(options.action(options))
    except (NetlabError, ValueError) as error:
        print(f"netlab: {error}", file=sys.stderr)
        return 2


def _up(options: argparse.Namespace) -> int:
    lab = Lab(options.hosts, rate=options.rate, groups=options.groups, between=options.between, keep=True)
    for host, (namespace, address) in enumerate(zip(lab.namespaces, lab.addresses, strict=True)):
        print(f"host {host}  {address}  ip netns exec {namespace} COMMAND")
    print(f"Remove it with: python -m tests.netlab down {lab.name}")
    return 0


def _down(options: argparse.Namespace) -> int:
    if reason := why_unavailable():
        raise NetlabError(reason)
    removed = remove_labs(kept=True, name=options.name)
    print(f"removed {len(removed)}: {', '.join(removed)}" if removed else "nothing to remove")
    return 0


def _run(options: argparse.Namespace) -> int:
    if not options.command:
        raise ValueError("nothing to run: write the command after --.")
    with Lab(options.hosts, rate=options.rate, groups=options.groups, between=options.between) as lab:
        lab.run(options.command, timeout=options.timeout)
    return 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m tests.netlab", description=__doc__)
    actions = parser.add_subparsers(required=True, metavar="up|down|run")
    up = actions.add_parser("up", help="make a lab that stays until `down`")
    up.add_argument("hosts", type=int)
    up.set_defaults(action=_up)
    down = actions.add_parser("down", help="remove labs made with `up`, and those of dead owners")
    down.add_argument("name", nargs="?", help="the lab to remove; all made with `up` if left out")
    down.set_defaults(action=_down)
    run = actions.add_parser("run", help="make a lab, run a command on each host as one rank, remove the lab")
    run.add_argument("--hosts", type=int, default=2)
    run.add_argument("--timeout", type=float, default=600.0, help="seconds until everything is killed (600)")
    run.add_argument("command", nargs="*", help="after --; sees RANK, WORLD_SIZE, MASTER_ADDR, ... as under torchrun")
    run.set_defaults(action=_run)
    for action in (up, run):
        action.add_argument("--rate", help="of each host's link, each way: 100mbit, 2.5gbit; no limit if left out")
        action.add_argument("--groups", type=_sizes, help="sizes of groups of hosts, such as 2,2")
        action.add_argument("--between", help="rate of each group's link to the others")
    return parser


def _sizes(text: str) -> list[int]:
    return [int(size) for size in text.split(",")]


if __name__ == "__main__":
    sys.exit(main())
