"""Dynamic Label Injection for imbalanced multi-class defect segmentation.

The names below are the ones most users need; each wing (`dli.data`, `dli.method`, `dli.network`, `dli.scoring`,
`dli.experiment`, `dli.study`, `dli.deploy`) has a few more. Each is documented in the notebook of its room."""
__version__ = "0.2.0"

from ._door import door

__all__, __getattr__, __dir__ = door(__name__, {
    "data": "Samples magnetic_tiles split_samples synthetic_tiles",
    "method": "DonorPool DonorTransform DynamicLabelInjection InjectionPlan cut_paste poisson_blend show_batch",
    "network": "lightweight_unet make_loss",
    "scoring": "compare count_batch counts_table read_folds score scores summarize",
    "experiment": "METHODS PRESETS RunConfig load_dataset load_runs run",
    "deploy": "choose_thresholds judge load predict_files",
})
