"""`python -m tests.e2e.lookout NODE`: the discovery of one node and nothing else; a JSON line for each sighting."""

import asyncio
import json
import sys

from piclusterd.cluster.discovery import Advert, Discovery, Sighting
from piclusterd.ids import NodeId


def tell(sighting: Sighting) -> None:
    sys.stdout.write(json.dumps([sighting.node, sighting.addresses]) + "\n")
    sys.stdout.flush()


async def main(node: str) -> None:
    discovery = Discovery(Advert(NodeId(node), "home", f"pi-{node[0]}", 7946, False), tell)
    discovery.start()
    await asyncio.Event().wait()


if __name__ == "__main__":
    asyncio.run(main(sys.argv[1]))
