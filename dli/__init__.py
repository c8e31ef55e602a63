"Dynamic Label Injection for imbalanced multi-class defect segmentation. The names below are the public ones; each is documented in its notebook."
__version__ = "0.1.0"

from importlib import import_module

NAMES = {  # public name: its module, which is imported when the name is first asked for
    "read_folds": "benchmark", "score": "benchmark",
    "cut_paste": "blending", "poisson_blend": "blending",
    "Samples": "data", "load_dataset": "data", "magnetic_tiles": "data", "split_samples": "data", "synthetic_tiles": "data",
    "DonorPool": "injection", "DonorTransform": "injection", "DynamicLabelInjection": "injection",
    "InjectionPlan": "injection", "show_batch": "injection",
    "make_loss": "losses",
    "compare": "metrics", "count_batch": "metrics", "counts_table": "metrics", "scores": "metrics", "summarize": "metrics",
    "lightweight_unet": "models",
    "METHODS": "training", "PRESETS": "training", "RunConfig": "training", "run": "training",
}
__all__ = list(NAMES)


def __getattr__(name: str):
    "A public name. Raises AttributeError."
    if name not in NAMES: raise AttributeError(f"module 'dli' has no attribute {name!r}")
    return getattr(import_module(f"dli.{NAMES[name]}"), name)


def __dir__() -> list[str]:
    return sorted([*globals(), *NAMES])
