"""Alpha-beta cost of collectives between H100s, eight to a node: predicted, nothing here is a measurement.

    seconds = latency + bytes / rate        the least over NCCL's algorithms and protocols

The latencies and shares of the rate are the table from which NCCL itself chooses (NCCL below), without its in-switch
reductions (NVLS, SHARP). Sources of the figures: docs/distributed.md.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from math import ceil, log2

NCCL = "https://github.com/NVIDIA/nccl/blob/5067397c2676d5aed50042fc39e5c8ee96eb0027/src/graph"
NODE = 8  # GPUs of a DGX or HGX H100, each with a network adapter of its own
NVLINK = 18 * 20.6e9  # bytes a second each way: 18 links, each 25e9 by the data sheet and 20.6e9 in NCCL's topo.h
INFINIBAND = 50e9  # NDR: 400 Gb/s an adapter

# tuning.cc: microseconds of protocols LL, LL128, Simple
BASE = {"tree": (6.8, 14.0, 8.4), "ring": (6.6, 14.0, 8.4)}
HOP_NVLINK = {"tree": (0.6, 1.25, 4.0), "ring": (0.6, 1.9, 3.4)}
HOP_NETWORK = {"tree": (5.0, 8.5, 14.0), "ring": (2.7, 4.0, 14.0)}
POST = (1.0, 1.0, 3.0)  # a network step of a ring takes the host at least that
LL_RATE = (141e9, 39e9, 20.4e9)  # at most, on one node, two, more
RING_SHARE = (0.5, 0.92, 1.0)  # of the slowest link's rate, by protocol
TREE_SHARE = (0.92 / 3.8, 0.92 * 120 / 128, 0.92)
TREE_SHARE_IN_NODE = (0.92 / 3.8, 0.92 * 7 / 9, 0.92)

MOVES = {  # bytes that a rank sends, in units of the tensor's, for a ring of p ranks
    "all_reduce": lambda p: 2 * (p - 1) / p,
    "all_gather": lambda p: (p - 1) / p,
    "reduce_scatter": lambda p: (p - 1) / p,
    "broadcast": lambda p: (p - 1) / p,  # all but the last pass it on: the mean of all
    "reduce": lambda p: (p - 1) / p,
    "all_to_all": lambda p: (p - 1) / p,
}
# What the slowest link carries, in the same units: all of a broadcast or a reduction.
CARRIES = MOVES | {"broadcast": lambda p: 1.0, "reduce": lambda p: 1.0}


@dataclass(frozen=True)
class Group:
    """Ranks that communicate, and how many of them share a node."""

    ranks: int
    in_node: int

    @property
    def nodes(self) -> int:
        return ceil(self.ranks / self.in_node)

    @property
    def rate(self) -> float:
        """Bytes a second each way of a ring: NVLink, or the adapters through which it leaves a node."""
        return NVLINK if self.nodes == 1 else min(NVLINK, self.in_node * INFINIBAND)


def packed(ranks: int) -> Group:
    """Ranks that fill node after node."""
    return Group(ranks, min(ranks, NODE))


@dataclass(frozen=True)
class Collective:
    """One collective of a step.

    bytes: of the whole tensor, which an all-gather ends with and a reduce-scatter begins with; of an all-to-all what a
    rank has. of: what it carries.
    """

    kind: str
    bytes: int
    group: Group
    of: str = ""

    @property
    def wire(self) -> float:
        """Bytes that a rank sends."""
        return MOVES[self.kind](self.group.ranks) * self.bytes

    @property
    def seconds(self) -> float:
        return min(self._ways()) if self.group.ranks > 1 else 0.0

    def _ways(self) -> Iterator[float]:
        group = self.group
        if self.kind == "all_to_all":  # each pair by itself: what leaves the node goes through one adapter
            near, hop = group.nodes == 1, (HOP_NVLINK, HOP_NETWORK)[group.nodes > 1]["ring"][2]
            leaving = group.ranks - (1 if near else group.in_node)
            rate = NVLINK if near else INFINIBAND
            yield 1e-6 * (BASE["ring"][2] + hop) + leaving / group.ranks * self.bytes / rate
            return
        tree_share = TREE_SHARE_IN_NODE if group.nodes == 1 else TREE_SHARE
        for protocol in range(3):
            most = LL_RATE[min(group.nodes, 3) - 1] if protocol == 0 else group.rate
            rate = min(group.rate * RING_SHARE[protocol], most)
            yield self._ring_latency(protocol) + CARRIES[self.kind](group.ranks) * self.bytes / rate
            if self.kind == "all_reduce":
                rate = min(group.rate * tree_share[protocol], most)
                hops = (group.in_node - 1) * HOP_NVLINK["tree"][protocol]
                hops += log2(group.nodes) * HOP_NETWORK["tree"][protocol]
                yield 1e-6 * (BASE["tree"][protocol] + 2 * hops) + 2 * self.bytes / rate

    def _ring_latency(self, protocol: int) -> float:
        group, base = self.group, BASE["ring"][protocol]
        if self.kind in ("broadcast", "reduce"):
            of = "tree" if protocol == 2 else "ring"  # with a piece's own time, as tuning.cc has it
            hop = (HOP_NVLINK if group.nodes == 1 else HOP_NETWORK)[of][protocol]
            return 1e-6 * (base + group.ranks * hop)
        rounds = 2 if self.kind == "all_reduce" else 1
        near = HOP_NVLINK["ring"][protocol]
        near = near if group.nodes == 1 else max(near, POST[protocol])
        far = HOP_NETWORK["tree" if group.in_node == 1 else "ring"][protocol]  # one rank a node hides nothing of it
        between = rounds * (group.nodes - 1)
        return 1e-6 * (base + (rounds * (group.ranks - 1) - between) * near + between * far)
