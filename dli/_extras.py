"""Packages that only some users need. One that is missing is named together with the command that installs it."""
from contextlib import contextmanager

DISTRIBUTION = "dynamic-label-injection"  # the name on the package index; the import is `dli`


@contextmanager
def extra(
    name: str,  # the extra that installs what is imported in the block: train, study, ray, coco, onnx, docs or dev
):
    """Import packages of an extra: `with extra("train"): import timm`.

    Raises ModuleNotFoundError, naming the package and the command that installs it, where one is missing."""
    try:
        yield
    except ModuleNotFoundError as error:
        package = (error.name or "").partition(".")[0]
        if package in ("", "dli"):
            raise
        message = f"{package} is not installed; it comes with: pip install '{DISTRIBUTION}[{name}]'"
        raise ModuleNotFoundError(message, name=error.name, path=error.path) from error
