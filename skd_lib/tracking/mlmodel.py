"""The files by which MLflow loads a model that stays where it is: `MLmodel`, its environment, and the tokenizer.

`mlflow.transformers.load_model` gives transformers' pipeline, `mlflow.pyfunc.load_model` a model that continues a
prompt. The weights are neither read nor copied. The folder stays one that `AutoModelForCausalLM.from_pretrained` loads.

MLflow's own `save_model` copies the weights, so the files are made here, of the keys of `FlavorKey` in
mlflow/transformers/flavor_config.py.
"""

from __future__ import annotations

import json
import logging
import platform
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import TYPE_CHECKING, Any

from skd_lib import storage
from skd_lib._core.uris import is_sqlite
from skd_lib.errors import SkdError
from skd_lib.tracking.client import brief, quieten

if TYPE_CHECKING:
    from mlflow import MlflowClient

log = logging.getLogger(__name__)

MLMODEL = "MLmodel"
_TASK, _PIPELINE = "text-generation", "TextGenerationPipeline"
_REQUIREMENTS = ("torch", "transformers", "accelerate", "mlflow")
_REQUIREMENTS_FILE, _CONDA_FILE, _PYTHON_FILE = "requirements.txt", "conda.yaml", "python_env.yaml"
_EXAMPLE_FILE = "input_example.json"
_NOTE = "student"
_UNLOADABLE = "the version will not load by `mlflow.transformers.load_model`: %s"
_KUBEFLOWS_STORAGE = "minio://"
_SETTINGS = {"max_new_tokens": 256, "do_sample": False, "temperature": 1.0, "return_full_text": False}
"""Parameters of `predict`, and their defaults."""
_LONGEST_EXAMPLE = 2000


def write_beside(model: Path, uri: str, example: str = "") -> bool:
    """Write the files into the folder at `uri` where the model is, and return whether MLflow can load it now.

    What keeps it from that (no tokenizer, a folder that cannot be written) is a warning: the model is usable without.
    `model` may be a local copy; the example, a prompt, is shown on the model's page.
    """
    try:
        with described(model, ".", example) as files:
            if MLMODEL in storage.file_sizes(uri):
                return True
            if storage.is_remote(uri):
                storage.upload(files, uri, last=MLMODEL)
            else:
                found = (file for file in files.rglob("*") if file.is_file())
                for file in sorted(found, key=lambda file: file.name == MLMODEL):
                    storage.upload(file, str(Path(uri) / file.relative_to(files)))
    except SkdError as error:
        log.warning(_UNLOADABLE, error.brief)
        return False
    return True


@contextmanager
def described(model: Path, weights: str, example: str = "") -> Iterator[Path]:
    """Yield a temporary folder with the files, all but the weights, whose place is absolute or relative to it."""
    if not (model / "config.json").is_file():
        raise SkdError("no config.json in the model's folder", where=str(model))
    with tempfile.TemporaryDirectory() as scratch:
        files = Path(scratch) / "model"
        try:
            _write(model, files, weights, example)
        except ImportError as error:
            hint = "install the extra `tracking` where the step runs"
            raise SkdError(f"a package is missing ({error})", where=str(model), hint=hint) from error
        except (OSError, ValueError, KeyError) as error:  # of transformers, for a config or tokenizer that is broken
            raise SkdError(f"its config or tokenizer cannot be loaded: {brief(error)}", where=str(model)) from error
        yield files


def version_source(
    client: MlflowClient, tracking_uri: str, model_uri: str, weights_sha256: str, run_id: str, example: str = ""
) -> str:
    """Return what to register as a version's source: the model's folder, wherever MLflow takes that.

    A tracking server refuses a path of this machine that is not among the run's own artifacts, since no other machine
    could read it. There the run gets small files that say where the weights are, and the version points at them.
    """
    if model_uri.startswith(_KUBEFLOWS_STORAGE):
        return f"s3://{model_uri.removeprefix(_KUBEFLOWS_STORAGE)}"  # the name by which MLflow reads it
    remote = "://" in model_uri and not model_uri.startswith("file://")
    if remote or is_sqlite(tracking_uri) or not run_id:
        return model_uri
    log.warning(
        "%s is a path of this machine, which a tracking server cannot serve: the registered version points at a note "
        "of it, by which MLflow loads it on this machine alone. Keep artifacts in object storage to share students.",
        model_uri,
    )
    folder = Path(model_uri.removeprefix("file://"))
    try:
        with described(folder, str(folder.resolve()), example) as files:
            client.log_artifacts(run_id, str(files), _NOTE)
    except SkdError as error:
        log.warning(_UNLOADABLE, error.brief)
    client.log_dict(run_id, {"weights_uri": model_uri, "weights_sha256": weights_sha256}, f"{_NOTE}/weights.json")
    return f"runs:/{run_id}/{_NOTE}"


def _write(model: Path, files: Path, weights: str, example: str) -> None:
    quieten()
    import mlflow.pyfunc
    import transformers
    from mlflow.models import Model, infer_signature

    tokenizer = transformers.AutoTokenizer.from_pretrained(model)
    config = transformers.AutoConfig.from_pretrained(model)
    tokenizer.save_pretrained(files / "components" / "tokenizer")  # MLflow looks for it there alone

    example = example.removeprefix(tokenizer.bos_token or "")[:_LONGEST_EXAMPLE]  # the tokenizer puts it there again
    signature = infer_signature("text", "text", _SETTINGS)
    description: Any = Model(signature=signature, saved_input_example_info=_write_example(files, example))
    description.add_flavor(
        "transformers",
        transformers_version=transformers.__version__,
        code=None,
        task=_TASK,
        instance_type=_PIPELINE,
        torch_dtype=str(config.dtype or "torch.float32"),
        pipeline_model_type=config.architectures[0],
        source_model_name=str(model),
        model_binary=weights,
        components=["tokenizer"],
        tokenizer_type=type(tokenizer).__name__,
    )
    environment = {"conda_env": _CONDA_FILE, "python_env": _PYTHON_FILE}
    mlflow.pyfunc.add_to_model(description, loader_module="mlflow.transformers", **environment)
    description.model_size_bytes = sum(file.stat().st_size for file in model.glob("*.safetensors"))
    _write_environment(files)
    description.save(str(files / MLMODEL))


def _write_example(files: Path, example: str) -> dict[str, str]:
    """Write the input example, and return what MLmodel says of it."""
    serving = f"serving_{_EXAMPLE_FILE}"
    texts = [example or "Once upon a time"]
    (files / _EXAMPLE_FILE).write_text(json.dumps(texts), encoding="utf-8")
    (files / serving).write_text(json.dumps({"inputs": texts}), encoding="utf-8")
    return {"artifact_path": _EXAMPLE_FILE, "serving_input_path": serving, "type": "json_object"}


def _write_environment(files: Path) -> None:
    """Write the packages that loading needs, pinned to the installed releases (without PyTorch's `+cu126`)."""
    import yaml

    pins = []
    for name in _REQUIREMENTS:
        try:
            pins.append(f"{name}=={version(name).partition('+')[0]}")
        except PackageNotFoundError:
            continue
    python = platform.python_version()
    conda = {
        "name": "mlflow-env",
        "channels": ["conda-forge"],
        "dependencies": [f"python={python}", "pip", {"pip": pins}],
    }
    virtual = {"python": python, "build_dependencies": ["pip"], "dependencies": [f"-r {_REQUIREMENTS_FILE}"]}
    (files / _REQUIREMENTS_FILE).write_text("\n".join(pins) + "\n", encoding="utf-8")
    for name, content in ((_CONDA_FILE, conda), (_PYTHON_FILE, virtual)):
        (files / name).write_text(yaml.safe_dump(content, sort_keys=False), encoding="utf-8")
