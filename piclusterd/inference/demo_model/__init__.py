"""The demo model: a very small language model that triages software issues, shipped inside the package.

It is a *demo model*. It has 1.5 million parameters, was trained from scratch in minutes on text that
`issues.py` makes up, and is here for one reason: that the main job (a webhook in, a triaged issue out) runs
on a fresh machine with no download. It answers other prompts with nonsense and is no substitute for a real
model; its GGUF metadata says so.

::

    phrases.toml, templates.toml -> issues.py -> train.py -> triage-demo.gguf
                                    prompt.py -------^            |
                                        \\-- the same text --> llama.cpp worker

The shipped file is what `train` writes with its defaults (seed 1, 1100 steps). Held out, through llama.cpp: type 0.98,
priority 0.87 of 600 issues; the figures are in the file's metadata. On prose unlike the generator's it is much weaker.

* `issues`: draws issues with labels, with a held-out split (wordings, templates, products and
  combinations).
* `prompt`: the chat messages, the chat template and the answer's JSON; no third-party import.
* `train`, `network`, `gguf_export`, `held_out`: development only (extra `train`); nothing at run time
  imports them.
"""

from pathlib import Path

GGUF_FILE = Path(__file__).with_name("triage-demo.gguf")
"""The shipped weights (Q8_0), loadable by llama.cpp as architecture `llama`."""
