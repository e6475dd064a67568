"""Options that share out an accumulation: shards for batch systems, and a Ray cluster."""

from __future__ import annotations

import dataclasses
from typing import TYPE_CHECKING, Any

import click

from nnato.cli.common import options

if TYPE_CHECKING:
    from nnato.ray_engine import RayCluster
    from nnato.shards import Shard

cluster_options = options(
    click.option("--shard", metavar="I/N", help="Read only part I of N equal parts of the text; nnato merge puts them together."),
    click.option("--engine", type=click.Choice(["ray"]), help="Share the text out to workers of a Ray cluster."),
    click.option("--address", help="Of a running Ray cluster, e.g. auto.  [default: one on this machine]"),
    click.option(
        "--workers", type=click.IntRange(min=1), help="Ray workers, each with its model, on a GPU each if there are any.  [default: 2]"
    ),
    click.option("--threads", type=click.IntRange(min=1), help="CPU cores of a Ray worker.  [default: 1]"),
)


@dataclasses.dataclass(frozen=True)
class Sharing:
    """What these options say."""

    shard: Shard | None
    cluster: RayCluster | None


def take_cluster_options(values: dict[str, Any], elsewhere: bool) -> Sharing:
    """Take the values of `cluster_options` out of a command's keyword arguments.

    Raises:
        ClusterError: Options that do not go together.
        MomentsError: There is no such shard.
    """
    from nnato.errors import ClusterError

    shard, engine = values.pop("shard"), values.pop("engine")
    ray = {name: value for name in ("address", "workers", "threads") if (value := values.pop(name)) is not None}
    if sum((shard is not None, engine is not None, elsewhere)) > 1:
        raise ClusterError("give one of --shard, --engine and --remote: each says where the text is run")
    if ray and engine is None:
        raise ClusterError(f"--{next(iter(ray))} belongs to --engine ray")
    if shard is not None:
        from nnato.shards import Shard

        return Sharing(Shard.parse(shard), None)
    if engine is None:
        return Sharing(None, None)
    from nnato.ray_engine import RayCluster

    return Sharing(None, RayCluster(**({"workers": 2} | ray)))
