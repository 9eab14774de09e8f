"""Slow links on one machine: hosts as Linux network namespaces on a bridge, each with a rate of its own.

with Lab(4, rate="100mbit") as lab:
    results = lab.run_ranks(fn)          # fn(rank, 4) on four hosts, joined by gloo over the slow links
    lab.run(["python", "train.py"], timeout=60)

From a shell, as root: `python -m tests.netlab run --hosts 4 --rate 100mbit -- python train.py`.
"""

from tests.netlab.lab import Lab, Links, NetlabError, remove_labs, tx_bytes_here, why_unavailable

__all__ = ["Lab", "Links", "NetlabError", "remove_labs", "tx_bytes_here", "why_unavailable"]
