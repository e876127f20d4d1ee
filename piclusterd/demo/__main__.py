"""`python -m piclusterd.demo` (what `make demo` runs): the story, then a cluster to play with until Ctrl-C.

--once     end after the story: status 0, or 1 if a step did not happen
--hub      auto (default), workerd or python
--dir      where the nodes' files go; default: a temporary directory, removed at the end
"""

from __future__ import annotations

import asyncio
import logging
import signal
import sys
import tempfile
from pathlib import Path

import click

from ..errors import PiclusterError
from .cluster import DemoFailed
from .hub_process import HubFailed
from .story import Story


@click.command(context_settings={"help_option_names": ["-h", "--help"]})
@click.option("--once", is_flag=True, help="End after the story.")
@click.option("--hub", type=click.Choice(["auto", "workerd", "python"]), default="auto", show_default=True)
@click.option("--dir", "directory", type=click.Path(path_type=Path), help="Keep the nodes' files here.")
def main(once: bool, hub: str, directory: Path | None) -> None:
    """The main job on this machine: a signed webhook, three nodes, a local model, a killed coordinator."""
    logging.basicConfig(level=logging.ERROR)
    with tempfile.TemporaryDirectory(prefix="picluster-demo-") as scratch:
        root = directory or Path(scratch)
        root.mkdir(parents=True, exist_ok=True)
        sys.exit(asyncio.run(_play(root, hub, once)))


async def _play(root: Path, hub: str, once: bool) -> int:
    story = Story(root, lambda line: print(line, flush=True), hub)
    loop = asyncio.get_running_loop()
    play = asyncio.create_task(_tell(story, once))
    for number in (signal.SIGINT, signal.SIGTERM):
        loop.add_signal_handler(number, play.cancel)
    try:
        await play
    except asyncio.CancelledError:
        print("\nstopping …", flush=True)
    except (DemoFailed, HubFailed, PiclusterError, OSError) as fault:
        print(f"\nFAILED: {fault}", flush=True)
        return 1
    finally:
        await story.close()
    return 0


async def _tell(story: Story, once: bool) -> None:
    await story.play()
    if once:
        return
    member = story.cluster.members[0]
    print(
        f"\nThe cluster stays up until Ctrl-C. Try, in another terminal:\n"
        f"  .venv/bin/picluster --host {member.url} status\n"
        f'  .venv/bin/picluster --host {member.url} chat "Title: printer on fire"\n'
        f"  {member.url}/ in a browser\n",
        flush=True,
    )
    await asyncio.Event().wait()


if __name__ == "__main__":
    main()
